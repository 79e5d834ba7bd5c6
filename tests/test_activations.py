"""relu, silu, gelu, swiglu and geglu against their formulas: every 16-bit number, length, layout and thread count."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import reference as ref
from conftest import DTYPES
from guard import guarded, guarded_copy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import forge_c as fc

pytestmark = pytest.mark.usefixtures("two_threads")

LENGTHS = (*range(1, 67), 127, 128, 129, 255, 256, 257, 767, 768, 4096, 4099, 8191, 8192, 8193)
FUNCTIONS = {"relu": fc.relu, "silu": fc.silu, "gelu": fc.gelu,
             "gelu_tanh": functools.partial(fc.gelu, approximate="tanh"),
             "swiglu": fc.swiglu, "geglu": fc.geglu, "geglu_tanh": functools.partial(fc.geglu, approximate="tanh")}
REFERENCE = {"relu": ref.relu, "silu": ref.silu, "gelu": ref.gelu,
             "gelu_tanh": functools.partial(ref.gelu, approximate="tanh"), "swiglu": ref.swiglu, "geglu": ref.geglu,
             "geglu_tanh": functools.partial(ref.geglu, approximate="tanh")}
UNARY, GATED = ("relu", "silu", "gelu", "gelu_tanh"), ("swiglu", "geglu", "geglu_tanh")
X = [-6.0, -3.0, -1.0, -0.5, 0.0, 0.25, 1.0, 2.5, 8.0]
# torch in float64; its erf form is rounded at -6, where 1 + erf cancels, so that number is from the C library's erfc.
GOLDEN = {
    "relu": [0.0, 0.0, 0.0, 0.0, 0.0, 0.25, 1.0, 2.5, 8.0],
    "silu": [-0.014835738939808647, -0.14227761953270035, -0.2689414213699951, -0.1887703343990727, 0.0,
             0.14054412522144952, 0.7310585786300049, 2.3103545499468914, 7.997317198956269],
    "gelu": [-5.919525870226207e-09, -0.00404969409489031, -0.15865525393145702, -0.15426876936299344, 0.0,
             0.14967658142073093, 0.841344746068543, 2.4844758366855597, 7.999999999999995],
    "gelu_tanh": [-8.43964897967453e-11, -0.0036373920817729943, -0.15880800939172324, -0.15428599017485606, 0.0,
                  0.149675350701685, 0.8411919906082768, 2.484915733910001, 8.0],
}
SUBNORMAL_ERROR = 1.43 * 2.0**-149  # of silu under 2^-126; gelu's is 2^-149


def normal(rng, *shape, dtype, scale=3.0):
    return (rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(dtype)


def arguments(name, rng, *shape, dtype):
    return [normal(rng, *shape, dtype=dtype) for _ in range(1 if name in UNARY else 2)]


def every_number(dtype):
    return np.arange(2**16, dtype=np.uint16).view(dtype)


@functools.cache
def expected_of_every_number(name, dtype):
    with np.errstate(all="ignore"):
        return REFERENCE[name](every_number(dtype))


def magnitude(name, want, args):
    """What TOLERANCES asks for: gelu's errors are relative to |x|, and a gated floor is as large as |linear|."""
    args = [abs(ref.f64(a)) for a in args]
    if name in ("relu", "silu"):
        return None
    if name in UNARY:
        return args[0]
    size = abs(want) if name == "swiglu" else args[0] * args[1]
    return size + args[1] * SUBNORMAL_ERROR * 2.0**24 / 6


@pytest.fixture
def assert_right(assert_close):
    """Compare a result with the reference for the same arguments."""
    def check(name, got, *args, want=None):
        with np.errstate(all="ignore"):
            want = REFERENCE[name](*args) if want is None else np.array(want)
            size = magnitude(name, want, args)
            assert_close(name.removesuffix("_tanh"), got, want, magnitude=size)
        infinite = np.isinf(want)
        np.testing.assert_array_equal(got[infinite].astype(np.float64), want[infinite])

    return check


@pytest.mark.parametrize("name", FUNCTIONS)
def test_golden_numbers(isa, dtype, assert_right, name):
    x = np.array(X, dtype)
    if name in UNARY:
        assert_right(name, FUNCTIONS[name](x), x, want=GOLDEN[name])
        return
    linear = np.array([2.0, -1.0, 0.5, -3.0, 7.0, 4.0, -0.125, 1.5, -2.0], dtype)
    plain = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}[name]
    assert_right(name, FUNCTIONS[name](x, linear), x, linear, want=np.array(GOLDEN[plain]) * linear.astype(np.float64))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_length_between_guard_pages(isa, dtype, rng, assert_right, name):
    for n in LENGTHS:
        args = arguments(name, rng, n, dtype=dtype)
        results = []
        for at_end in (False, True):
            inside, out = [guarded_copy(a, at_end=at_end) for a in args], guarded((n,), dtype, at_end=at_end)
            assert FUNCTIONS[name](*inside, out=out) is out
            assert [a.tobytes() for a in inside] == [a.tobytes() for a in args]
            results.append(out.tobytes())
        assert results[0] == results[1]
        assert_right(name, out, *args)


@pytest.mark.parametrize("name", UNARY)
def test_every_number_of_sixteen_bits(isa, assert_right, name):
    for dtype in (DTYPES["float16"], DTYPES["bfloat16"]):
        x = every_number(dtype)
        assert_right(name, FUNCTIONS[name](x), x, want=expected_of_every_number(name, dtype))


@pytest.mark.parametrize("name", GATED)
def test_every_gate_of_sixteen_bits(isa, rng, assert_right, name):
    for dtype in (DTYPES["float16"], DTYPES["bfloat16"]):
        gated = every_number(dtype)
        linear = (rng.uniform(-1, 1, 2**16) * 2.0 ** rng.integers(-14, 15, 2**16)).astype(dtype)
        assert_right(name, FUNCTIONS[name](gated, linear), gated, linear)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_numbers_of_every_size(isa, rng, assert_right, name):
    """Random bits, so every exponent, NaN and both infinities; and all of the range where the functions bend."""
    bits = rng.integers(0, 2**32, 30_000, dtype=np.uint32).view(np.float32)
    limits = np.array([0, np.inf, np.nan, 2.0**-149, 2.0**-126, 3.4028235e38, 1e30, 1e19, 88.7, 104], np.float32)
    x = np.concatenate([bits, limits, -limits, np.linspace(-110, 110, 20_001, dtype=np.float32)])
    args = [x] if name in UNARY else [x, normal(rng, len(x), dtype=np.float32)]
    assert_right(name, FUNCTIONS[name](*args), *args)


def test_the_tails_of_gelu_keep_their_digits(isa):
    """As -x grows, x Phi(x) is far below |x| and the general bound no test at all: here the error is relative.

    erf form: ten Horner steps with two roundings each where there is no FMA and a condition of 3.5, exp, quotient
    and products stay under 100 roundings; a^2/2 rounded once grows by a^2/2 in the exponential. tanh form: four
    roundings of the argument u grow by |u|, and 9 more.
    """
    x = np.linspace(-12.5, 0, 50_001, dtype=np.float32)[:-1]
    u = math.sqrt(8 / math.pi) * (x + 0.044715 * x.astype(np.float64) ** 3)
    for approximate, roundings in (("none", 100 + x.astype(np.float64) ** 2 / 2), ("tanh", 9 - 4 * u)):
        want = ref.gelu(x, approximate)
        error = abs(fc.gelu(x, approximate).astype(np.float64) - want)
        assert (error <= 2.0**-24 * roundings * abs(want) + 108 * 2.0**-149).all()


def test_silu_and_gelu_of_large_numbers(isa, dtype):
    for name in ("silu", "gelu", "gelu_tanh"):
        largest = np.array([65504.0 if dtype == np.float16 else 3.3895e38, 60000.0, 1000.0], np.float32).astype(dtype)
        assert (FUNCTIONS[name](largest) == largest).all()
        assert (FUNCTIONS[name](-largest) == 0).all()


def test_relu_is_exact(isa, dtype, rng):
    x = normal(rng, 1000, dtype=dtype)
    assert fc.relu(x).tobytes() == np.where(x > 0, x, x.dtype.type(0)).tobytes()
    assert (fc.relu(np.array([-0.0, 0.0], dtype)) == 0).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_specials_touch_only_their_own_place(isa, dtype, rng, assert_right, name):
    """NaN, Inf and -Inf, in every argument, in the first lane, the vector loop and the tail."""
    for n in (1, 3, 37, 150):
        for special in (np.nan, np.inf, -np.inf):
            args = arguments(name, rng, n, dtype=dtype)
            plain = FUNCTIONS[name](*args)
            others = np.ones(n, bool)
            for i, a in enumerate(args):
                places = sorted({0, n // 4, n // 2, n - 1})[i::len(args)]
                a[places] = special
                others[places] = False
            got = FUNCTIONS[name](*args)
            assert_right(name, got, *args)
            assert got[others].tobytes() == plain[others].tobytes()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_number_does_not_depend_on_its_place(isa, dtype, rng, name):
    args = arguments(name, rng, 150, dtype=dtype)
    whole = FUNCTIONS[name](*args)
    for i in (*range(20), 126, 127, 128, 148, 149):
        assert FUNCTIONS[name](*(a[i : i + 1] for a in args)).tobytes() == whole[i : i + 1].tobytes()
    assert FUNCTIONS[name](*(a.reshape(3, 2, 25) for a in args)).tobytes() == whole.tobytes()
    assert FUNCTIONS[name](*(a[7:] for a in args)).tobytes() == whole[7:].tobytes()
    one = FUNCTIONS[name](*(a[5].reshape(()) for a in args))
    assert one.shape == () and one.dtype == dtype and one.tobytes() == whole[5].tobytes()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_layouts(isa, dtype, rng, name):
    args = arguments(name, rng, 4, 3, 2, 53, dtype=dtype)
    before = [a.tobytes() for a in args]
    views = (lambda x: x[::-1], lambda x: x[::2, ::-2], lambda x: x.swapaxes(0, 2), lambda x: x[0, 0, 0],
             lambda x: np.broadcast_to(x[:1], x.shape), lambda x: x[..., 3:], lambda x: x[:, :, 1:, :50],
             lambda x: np.frombuffer(b"\0" + x.tobytes(), dtype, offset=1).reshape(x.shape))
    for view in views:
        odd = [view(a) for a in args]
        want = FUNCTIONS[name](*(a.copy() for a in odd)).tobytes()
        assert FUNCTIONS[name](*odd).tobytes() == want
        assert FUNCTIONS[name](odd[0], *(a.copy() for a in odd[1:])).tobytes() == want
    assert not odd[0].flags.aligned and not odd[0].flags.writeable
    assert [a.tobytes() for a in args] == before


@pytest.mark.parametrize("name", FUNCTIONS)
def test_out(isa, dtype, rng, name):
    args = arguments(name, rng, 4, 3, 37, dtype=dtype)
    plain = FUNCTIONS[name](*args).tobytes()
    room = np.full((3, 4, 42), 7, dtype)
    out = room.swapaxes(0, 1)[::-1, :, 2:-3]
    assert FUNCTIONS[name](*args, out=out) is out
    assert out.tobytes() == plain and (room[..., :2] == 7).all() and (room[..., -3:] == 7).all()
    for i in range(len(args)):
        mine = [a.copy() for a in args]
        assert FUNCTIONS[name](*mine, out=mine[i]) is mine[i]
        assert mine[i].tobytes() == plain


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_refused_writes_nothing(name):
    memory = np.arange(40, dtype=np.float32)
    x, near, free = (memory[start : start + 16].reshape(2, 8) for start in (0, 8, 24))
    other = np.ones((2, 8), np.float32)
    locked = other.copy()
    locked.flags.writeable = False
    rest = [] if name in UNARY else [other]
    cases = [
        (ValueError, [x, *rest], near),
        (ValueError, [x, *rest], x[::-1]),
        (TypeError, [x.astype(np.float64), *rest], free),
        (TypeError, [x.astype(np.float16), *(a.astype(np.float16) for a in rest)], free),
        (ValueError, [x[:1], *(a[:1] for a in rest)], free),
        (ValueError, [x, *rest], memory[24:].reshape(8, 2).T),
        (ValueError, [x.reshape(8, 2).T, *(a.reshape(8, 2).T for a in rest)], None),
        (ValueError, [x, *rest], locked),
    ]
    if rest:
        cases += [(ValueError, [other, x], near), (ValueError, [x, other[:1]], free),
                  (TypeError, [x, other.astype(np.float16)], free), (ValueError, [x, other.reshape(8, 2).T], free)]
    for error, args, out in cases:
        with pytest.raises(error, match=f"{name.removesuffix('_tanh')}: "):
            FUNCTIONS[name](*args, out=out)
        assert memory.tobytes() == np.arange(40, dtype=np.float32).tobytes()


def test_an_unknown_form_of_gelu():
    x = np.ones(3, np.float32)
    for wrong in ("erf", None, True):
        with pytest.raises(ValueError, match="gelu: approximate is .*, expected 'none' or 'tanh'"):
            fc.gelu(x, wrong)
        with pytest.raises(ValueError, match="geglu: approximate is .*, expected 'none' or 'tanh'"):
            fc.geglu(x, x, wrong)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_empty(isa, dtype, name):
    for shape in ((0,), (3, 0), (0, 5), (2, 0, 4), (2, 0, 0)):
        for at_end in (False, True):
            args = [guarded(shape, dtype, at_end=at_end) for _ in range(1 if name in UNARY else 2)]
            assert FUNCTIONS[name](*args, out=args[0]) is args[0]
            got = FUNCTIONS[name](*args)
            assert got.shape == shape and got.dtype == dtype


@pytest.mark.parametrize("name", FUNCTIONS)
def test_equal_bytes_for_any_thread_count(isa, dtype, rng, each_thread_count, name):
    """One long row cut into blocks, rows of odd length with gaps, and rows of several blocks each."""
    for view in (np.s_[:16 * 8192 + 5], np.s_[: 129 * 1033]):
        args = [a[view] for a in arguments(name, rng, 140_000, dtype=dtype)]
        if len(args[0]) == 129 * 1033:
            args = [a.reshape(129, 1033)[::-1, 2:] for a in args]
        assert len({FUNCTIONS[name](*args).tobytes() for _ in each_thread_count()}) == 1
    wide = [a.reshape(7, 20_000)[:, 3:] for a in arguments(name, rng, 140_000, dtype=dtype)]
    whole = {FUNCTIONS[name](*wide).tobytes() for _ in each_thread_count()}
    assert whole == {FUNCTIONS[name](*(np.ascontiguousarray(a) for a in wide)).tobytes()}


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.lists(st.integers(0, 6), max_size=4), n=st.integers(1, 200), dtype_name=st.sampled_from(list(DTYPES)),
       name=st.sampled_from(list(FUNCTIONS)), power=st.integers(-14, 8), swap=st.booleans(),
       seed=st.integers(0, 2**32 - 1))
def test_any_shape(isa, assert_right, shape, n, dtype_name, name, power, swap, seed):
    rng = np.random.default_rng(seed)
    args = [(rng.uniform(-1, 1, (*shape, n)) * 2.0**power).astype(DTYPES[dtype_name])
            for _ in range(1 if name in UNARY else 2)]
    args = [a.swapaxes(0, -2) if swap and len(shape) > 1 else a for a in args]
    assert_right(name, FUNCTIONS[name](*args), *args)
