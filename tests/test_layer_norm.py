"""layer_norm against its formula: every length, edge of memory, extreme value, layout and thread count."""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref
from conftest import DTYPES
from guard import guarded, guarded_copy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import forge_c as fc

LENGTHS = (*range(1, 67), 127, 128, 129, 143, 144, 145, 255, 256, 257, 767, 768, 4096, 4099)
X = [[0.5, -1.25, 2.0, 3.5, -0.75], [100.0, -200.0, 300.0, 0.25, -50.0]]
WEIGHT, BIAS = [1.0, 0.5, -2.0, 0.25, 1.5], [0.1, 0.2, -0.3, 0.0, 1.0]
# torch.nn.functional.layer_norm in float64, with the bias as float32 has it.
GOLDEN = [[-0.07080200437639012, -0.38357351706366394, -1.6664160588529786, 0.384304513199639, -0.323715545465423],
          [0.5210723312835914, -0.4924066408295533, -3.549992161391941, -0.04484615949909066, 0.27719428163042803]]


def normal(rng, *shape, dtype):
    return rng.standard_normal(shape, np.float32).astype(dtype)


def bound(h, weight=None, bias=None, eps=1e-5):
    """The magnitude that TOLERANCES asks for: |weight| (|h - mean| + mean|h|) / sigma + |bias|.

    Rounding a subnormal mean moves it as far as rounding the smallest normal number, which eps hides; without eps
    the result is of normal size and its digits count.
    """
    h = ref.f64(h)
    with np.errstate(all="ignore"):
        centred = h - h.mean(-1, keepdims=True)
        sigma = np.sqrt(np.mean(centred * centred, -1, keepdims=True) + eps)
        size = (abs(centred) + np.maximum(abs(h).mean(-1, keepdims=True), 2.0**-126 if eps else 0.0)) / sigma
        size = size if weight is None else abs(ref.f64(weight)) * size
        return size if bias is None else size + abs(ref.f64(bias))


@pytest.fixture
def assert_right(assert_close):
    """Compare a result with the reference for the same arguments."""
    def check(got, x, weight=None, bias=None, eps=1e-5):
        with np.errstate(all="ignore"):
            want = ref.layer_norm(x, weight, bias, eps)
        assert_close("layer_norm", got, want, magnitude=bound(x, weight, bias, eps), n=x.shape[-1])
        infinite = np.isinf(want)
        np.testing.assert_array_equal(got[infinite].astype(np.float64), want[infinite])

    return check


def test_golden_numbers(isa, dtype, assert_close):
    weight, bias = np.array(WEIGHT, np.float32), np.array(BIAS, np.float32)
    got = fc.layer_norm(np.array(X, dtype), weight, bias)
    assert_close("layer_norm", got, np.array(GOLDEN), magnitude=bound(X, weight, bias), n=5)


def test_every_length_between_guard_pages(isa, dtype, rng, assert_close, assert_right):
    for n in LENGTHS:
        x, residual, weight, bias = (normal(rng, *shape, dtype=dtype) for shape in ((3, n), (3, n), (n,), (n,)))
        results = []
        for at_end in (False, True):
            gx, gr, gw, gb = (guarded_copy(a, at_end=at_end) for a in (x, residual, weight, bias))
            wide_weight, wide_bias = (guarded_copy(a.astype(np.float32), at_end=at_end) for a in (weight, bias))
            out, y, h = (guarded(x.shape, dtype, at_end=at_end) for _ in range(3))
            assert fc.layer_norm(gx, gw, gb, out=out) is out
            fused = fc.layer_norm(gx, wide_weight, wide_bias, residual=gr, out=(y, h))
            assert fused[0] is y and fused[1] is h
            assert gx.tobytes() == x.tobytes() and gr.tobytes() == residual.tobytes()
            results.append(out.tobytes() + y.tobytes() + h.tobytes())
        assert results[0] == results[1]
        assert_right(out, x, weight, bias)
        assert_close("residual", h, ref.f64(x) + ref.f64(residual))
        assert_right(y, h, weight, bias)


def test_weight_and_bias_of_any_dtype_or_none(isa, dtype, rng, assert_right):
    x = normal(rng, 3, 37, dtype=dtype)
    for other in (None, *DTYPES.values()):
        weight = None if other is None else normal(rng, 37, dtype=other)
        for bias in (None, normal(rng, 37, dtype=np.float32), normal(rng, 37, dtype=dtype)):
            assert_right(fc.layer_norm(x, weight, bias), x, weight, bias)


def test_the_fused_residual_is_the_sum_and_then_the_norm(isa, dtype, rng):
    for n in (1, 5, 37, 145, 768):
        x, residual = normal(rng, 4, n, dtype=dtype), normal(rng, 4, n, dtype=dtype)
        weight, bias = normal(rng, n, dtype=np.float32), normal(rng, n, dtype=np.float32)
        y, h = fc.layer_norm(x, weight, bias, 1e-6, residual=residual)
        assert h.tobytes() == (x + residual).tobytes()
        assert y.tobytes() == fc.layer_norm(h, weight, bias, 1e-6).tobytes()


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1.0, 1e30])
def test_eps_is_inside_the_root(isa, dtype, rng, assert_right, eps):
    for scale in (1.0, 2.0**-10):
        x = (normal(rng, 3, 37, dtype=np.float32) * np.float32(scale)).astype(dtype)
        assert_right(fc.layer_norm(x, eps=eps), x, eps=eps)
    for shape in ((2, 5), (2, 1)):
        assert_right(fc.layer_norm(np.zeros(shape, dtype), eps=eps), np.zeros(shape), eps=eps)


@pytest.mark.parametrize("eps", [-1e-6, -np.inf, np.nan])
def test_eps_that_is_no_number_from_zero_on(eps):
    with pytest.raises(ValueError, match="layer_norm: eps is"):
        fc.layer_norm(np.ones(4, np.float32), eps=eps)


def test_a_mean_far_from_zero_does_not_eat_the_variance(isa, rng, assert_right):
    """mean(x^2) - mean(x)^2 would be off by 6 % here, which the bound does not allow."""
    for n in (5, 37, 145, 768):
        x = (1000 + rng.uniform(-1, 1, (3, n))).astype(np.float32)
        assert_right(fc.layer_norm(x), x)


def test_squares_beyond_the_range_of_float32(isa, dtype, rng, assert_right):
    """Sums overflow near 1e38, squares from 1.8e19 on, and below 2.6e-23 squares are zero."""
    scales = (65000.0, 1e-6) if dtype == np.float16 else (1e17, 1e19, 1e30, 1.6e38, 1e-12, 1e-18, 1e-30, 1e-38, 1e-43)
    for n in (2, 5, 37, 145, 4099):
        weight, bias = normal(rng, n, dtype=np.float32), normal(rng, n, dtype=np.float32)
        for scale in scales:
            x = (rng.uniform(-1, 1, (3, n)) * scale).astype(dtype)
            x[:, 0] = scale
            assert_right(fc.layer_norm(x, weight, bias, eps=0.0), x, weight, bias, 0.0)
            assert_right(fc.layer_norm(x), x)


def test_a_difference_beyond_the_range_of_float32(isa, dtype, assert_right):
    """x - mean itself overflows: the largest number among many of the smallest."""
    largest = np.array(65504.0 if dtype == np.float16 else 3.3895e38, np.float32).astype(dtype)
    for n in (4, 37, 145):
        x = np.full((2, n), -largest)
        x[0, 1] = x[1, -1] = largest
        assert_right(fc.layer_norm(x), x)


def test_subnormal_inputs(isa, dtype, rng, assert_right):
    smallest = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}[dtype.name]
    for n in (2, 5, 37, 145):
        x = (rng.integers(1, 100, (3, n)) * smallest).astype(dtype)
        assert_right(fc.layer_norm(x, eps=0.0), x, eps=0.0)
        assert_right(fc.layer_norm(x), x)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_specials_anywhere_in_a_row(isa, dtype, rng, assert_right, special):
    """One NaN or Inf makes its row NaN, wherever it stands; other rows do not notice."""
    for n in (1, 3, 37, 150):
        places = sorted({0, n // 4, n // 2, n - 1})
        x = normal(rng, 2 * len(places) + 1, n, dtype=dtype)
        clean = x.copy()
        for i, at in enumerate(places):
            x[2 * i + 1, at] = special
        residual = np.where(np.isfinite(x), x.dtype.type(0), x)
        for got in (fc.layer_norm(x), fc.layer_norm(clean, residual=residual)[0]):
            assert np.isnan(got[1::2].astype(np.float32)).all()
            assert got[::2].tobytes() == fc.layer_norm(clean)[::2].tobytes()
        parameter = np.ones(n, np.float32)
        parameter[places] = special
        assert_right(fc.layer_norm(clean, parameter), clean, parameter)
        assert_right(fc.layer_norm(clean, None, parameter), clean, None, parameter)


def test_layouts(isa, dtype, rng):
    x = normal(rng, 4, 3, 2, 53, dtype=dtype)
    weight, bias = normal(rng, 50, dtype=np.float32), normal(rng, 50, dtype=np.float32)
    unaligned = np.frombuffer(b"\0" + x.tobytes(), dtype, offset=1).reshape(x.shape)
    assert not unaligned.flags.aligned and not unaligned.flags.writeable
    odd_weight, odd_bias = (np.frombuffer(b"\0" + a.tobytes(), np.float32, offset=1) for a in (weight, bias))
    before = x.tobytes()
    for whole in (x[::-1], x[::2, ::-2], x.swapaxes(0, 2), np.broadcast_to(x[:1], x.shape), x[0, 0, 0], unaligned):
        for odd in (whole[..., 3:], whole[..., :50]):
            plain = fc.layer_norm(odd.copy(), weight, bias)
            assert fc.layer_norm(odd, odd_weight, odd_bias).tobytes() == plain.tobytes()
            fused = fc.layer_norm(odd, odd_weight, odd_bias, residual=odd[...])
            for got, want in zip(fused, fc.layer_norm(odd.copy(), weight, bias, residual=odd.copy()), strict=True):
                assert got.tobytes() == want.tobytes()
    assert x.tobytes() == before


def test_out_with_gaps_and_backwards(isa, dtype, rng):
    x, residual = normal(rng, 4, 3, 37, dtype=dtype), normal(rng, 4, 3, 37, dtype=dtype)
    plain, fused = fc.layer_norm(x), fc.layer_norm(x, residual=residual)
    rooms = [np.full((3, 4, 42), 7, dtype) for _ in range(3)]
    out, y, h = (room.swapaxes(0, 1)[::-1, :, 2:-3] for room in rooms)
    assert fc.layer_norm(x, out=out) is out
    fc.layer_norm(x, residual=residual, out=(y, h))
    assert [a.tobytes() for a in (out, y, h)] == [a.tobytes() for a in (plain, *fused)]
    assert all((room[..., :2] == 7).all() and (room[..., -3:] == 7).all() for room in rooms)


def test_out_may_be_the_inputs_themselves(isa, dtype, rng):
    x, residual = normal(rng, 3, 150, dtype=dtype), normal(rng, 3, 150, dtype=dtype)
    weight, bias = normal(rng, 150, dtype=np.float32), normal(rng, 150, dtype=np.float32)
    mine = x.copy()
    assert fc.layer_norm(mine, weight, bias, out=mine) is mine
    assert mine.tobytes() == fc.layer_norm(x, weight, bias).tobytes()
    wanted = b"".join(a.tobytes() for a in fc.layer_norm(x, weight, bias, residual=residual))
    for places in ("x-", "-x", "r-", "-r", "xr", "rx"):
        arrays = {"x": x.copy(), "r": residual.copy(), "-": np.empty_like(x)}
        y, h = (arrays[place] for place in places)
        fc.layer_norm(arrays["x"], weight, bias, residual=arrays["r"], out=(y, h))
        assert y.tobytes() + h.tobytes() == wanted, places


@pytest.mark.parametrize("places", ["out on x", "out on weight", "out on bias", "y on x", "y on h", "h on residual",
                                    "h on weight", "h on bias"])
def test_any_other_overlap_is_refused(places):
    memory = np.arange(40, dtype=np.float32)
    arrays = {"x": np.ones((2, 8), np.float32), "residual": np.ones((2, 8), np.float32),
              "weight": np.ones(8, np.float32), "bias": np.ones(8, np.float32)}
    mine, near = memory[:16].reshape(2, 8), memory[8:24].reshape(2, 8)
    y, h = np.full((2, 8), 7, np.float32), np.full((2, 8), 7, np.float32)
    out, on = places.split(" on ")
    if on == "h":
        h = mine
    else:
        arrays[on] = mine if on in ("x", "residual") else memory[16:24]
    pair = {"out": near, "y": (near, h), "h": (y, near)}[out]
    if out == "out":
        arrays["residual"] = None
    with pytest.raises(ValueError, match="overlaps"):
        fc.layer_norm(**arrays, out=pair)
    assert memory.tobytes() == np.arange(40, dtype=np.float32).tobytes() and (y == 7).all()


def test_wrong_shapes_and_dtypes_are_refused_and_write_nothing():
    x, out = np.ones((2, 8), np.float32), np.full((2, 8), 7, np.float32)
    half, locked = np.ones((2, 8), np.float16), out.copy()
    locked.flags.writeable = False
    for error, args, kwargs in (
        (ValueError, (np.float32(1),), {}),
        (ValueError, (x, np.ones(7, np.float32)), {"out": out}),
        (ValueError, (x, None, np.ones(9, np.float32)), {"out": out}),
        (TypeError, (x, None, np.ones(8)), {"out": out}),
        (TypeError, (x.astype(np.float64),), {}),
        (ValueError, (x,), {"residual": np.ones((1, 8), np.float32), "out": (out, out.copy())}),
        (TypeError, (x,), {"residual": half, "out": (out, out.copy())}),
        (TypeError, (x,), {"residual": x, "out": out}),
        (TypeError, (x,), {"residual": x, "out": (out, half)}),
        (ValueError, (x,), {"residual": x, "out": (out, locked)}),
        (TypeError, (half,), {"out": out}),
        (ValueError, (x,), {"out": locked}),
        (ValueError, (x[:1],), {"out": out}),
        (ValueError, (np.ones((8, 2), np.float32).T,), {"out": out}),
    ):
        with pytest.raises(error, match="layer_norm: "):
            fc.layer_norm(*args, **kwargs)
        assert (out == 7).all()


def test_empty(isa, dtype):
    for shape in ((0,), (3, 0), (0, 5), (2, 0, 4), (2, 0, 0)):
        for at_end in (False, True):
            x = guarded(shape, dtype, at_end=at_end)
            weight = guarded(shape[-1:], np.float32, at_end=at_end)
            assert fc.layer_norm(x, weight, weight, out=x) is x
            y, h = fc.layer_norm(x, weight, residual=x)
            assert y.shape == h.shape == shape and y.dtype == h.dtype == dtype


def test_a_row_does_not_depend_on_its_batch(isa, dtype, rng):
    for n in (5, 145, 768):
        x, residual = normal(rng, 33, n, dtype=dtype), normal(rng, 33, n, dtype=dtype)
        weight, bias = normal(rng, n, dtype=np.float32), normal(rng, n, dtype=np.float32)
        whole = fc.layer_norm(x, weight, bias, residual=residual)
        for rows in (slice(0, 1), slice(7, 8), slice(32, 33), slice(3, 20)):
            part = fc.layer_norm(x[rows], weight, bias, residual=residual[rows])
            assert all(p.tobytes() == w[rows].tobytes() for p, w in zip(part, whole, strict=True))


@pytest.mark.parametrize("shape", [(129, 1031), (5, 40003), (3, 43, 257)])
def test_equal_bytes_for_any_thread_count(isa, dtype, rng, each_thread_count, shape):
    x, residual = normal(rng, *shape, dtype=dtype), normal(rng, *shape, dtype=dtype)
    weight, bias = normal(rng, shape[-1], dtype=np.float32), normal(rng, shape[-1], dtype=np.float32)
    seen = set()
    for _ in each_thread_count():
        y, h = fc.layer_norm(x, weight, bias, residual=residual)
        seen.add(fc.layer_norm(x, weight, bias).tobytes() + y.tobytes() + h.tobytes())
    assert len(seen) == 1


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(outer=st.lists(st.integers(0, 5), max_size=4), n=st.integers(1, 200), name=st.sampled_from(list(DTYPES)),
       power=st.integers(-40, 14), swap=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_any_shape(isa, assert_right, outer, n, name, power, swap, seed):
    rng = np.random.default_rng(seed)
    x = (rng.uniform(-1, 1, (*outer, n)) * 2.0**power).astype(DTYPES[name])
    x = x.swapaxes(0, -2) if swap and len(outer) > 1 else x
    weight, bias = rng.uniform(-2, 2, n).astype(np.float32), rng.uniform(-2, 2, n).astype(np.float32)
    assert_right(fc.layer_norm(x, weight, bias), x, weight, bias)
