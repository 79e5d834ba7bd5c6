"""s4d_scan and s4d_kernel against their formulas and each other: sizes, both discretisations, cuts, layouts, drift."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference as ref
from c_constants import c_constant
from conftest import DTYPES, check_close
from guard import guarded_copy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS
from suite import case

import forge_c as fc

F32 = np.dtype(np.float32)
BLOCK = c_constant("FC_HEAD_TOKENS", "ops/heads.h")
CUTS = ([1] * 3 * BLOCK, [0, 3 * BLOCK, 0], [BLOCK, 2 * BLOCK], [BLOCK - 1, 2, 0, BLOCK, BLOCK - 1], [BLOCK // 4] * 12)
METHODS = pytest.mark.parametrize("method", ["zoh", "bilinear"])
SYSTEM = ("A", "B", "C", "dt")


def system(rng, channels=5, n=6) -> dict[str, Any]:
    """As S4D-Lin begins: A = -1/2 + i pi n, dt from 0.001 to 0.1."""
    def normal():
        return (rng.standard_normal((channels, n)) + 1j * rng.standard_normal((channels, n))).astype(np.complex64)

    a = np.broadcast_to(-0.5 + 1j * np.pi * np.arange(n), (channels, n)).astype(np.complex64)
    return {"A": a, "B": normal(), "C": normal(), "dt": np.exp(rng.uniform(-6.9, -2.3, channels)).astype(np.float32)}


def inputs(rng, batch=2, seq=7, channels=5, n=6, dtype=F32, everything=True) -> dict[str, Any]:
    a = {"u": rng.standard_normal((batch, seq, channels), np.float32).astype(dtype), **system(rng, channels, n)}
    if everything:
        state = rng.standard_normal((batch, channels, n)) + 1j * rng.standard_normal((batch, channels, n))
        a |= {"D": rng.standard_normal(channels, np.float32).astype(dtype), "state": state.astype(np.complex64)}
    return a


def magnitudes(a: dict[str, Any]) -> tuple[Any, Any]:
    """The sums of the sizes of all terms."""
    da, db = (np.abs(x) for x in ref.s4d_system(a["A"], a["B"], a["dt"], a.get("method", "zoh")))
    u = np.abs(ref.f64(a["u"]))
    x = np.zeros((len(u), *da.shape)) if a.get("state") is None else np.abs(a["state"]).astype(np.float64)
    y = np.zeros(u.shape) if a.get("D") is None else np.abs(ref.f64(a["D"])) * u
    for t in range(u.shape[1]):
        x = da * x + db * u[:, t, :, None]
        y[:, t] += (2 * np.abs(a["C"]) * x).sum(axis=-1)
    return y, x


def check(got: tuple[Any, Any], a: dict[str, Any], name: str = "") -> None:
    (y, x), (want_y, want_x), (size_y, size_x) = got, ref.s4d_scan(**a), magnitudes(a)
    seq, n = a["u"].shape[1], a["A"].shape[1]
    assert y.dtype == a["u"].dtype and x.dtype == np.complex64
    check_close("s4d_scan", y, want_y, magnitude=size_y, n=seq, d=n, case=name)
    for part in (np.real, np.imag):
        check_close("s4d_scan", part(x), part(want_x), magnitude=size_x, n=seq, d=n, case=name)


def bits(result: tuple[Any, Any]) -> bytes:
    return result[0].tobytes() + result[1].tobytes()


# ---- against the recurrence -------------------------------------------------------------------------


@METHODS
def test_sizes(isa, dtype, rng, method):
    for channels, n in ((1, 1), (3, 2), (8, 8), (16, 16), (17, 7), (33, 9), (70, 32), (130, 3), (0, 3), (3, 0)):
        for seq in (0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1):
            with case(channels, n, seq):
                a = inputs(rng, 2, seq, channels, n, dtype, seq % 2 == 1) | {"method": method}
                check(fc.s4d_scan(**a), a)


@settings(derandomize=True, database=None, deadline=None, max_examples=60,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.integers(0, 3), seq=st.integers(0, 40), channels=st.integers(0, 40), n=st.integers(0, 40),
       name=st.sampled_from(list(DTYPES)), everything=st.booleans(), method=st.sampled_from(["zoh", "bilinear"]),
       seed=st.integers(0, 2**32 - 1))
def test_any_shape(isa, batch, seq, channels, n, name, everything, method, seed):
    a = inputs(np.random.default_rng(seed), batch, seq, channels, n, DTYPES[name], everything) | {"method": method}
    check(fc.s4d_scan(**a), a)


@METHODS
def test_modes_of_every_kind(isa, rng, method):
    """A of 0, tiny, real, imaginary, fast and hardly decaying; dt small and large."""
    modes = np.array([0, 1e-20, -1e-6, 1j, -3, -0.5 + 300j, -1e-3 + 2j, -50 + 1j], np.complex64)
    for dt in (1e-4, 0.1, 1.0):
        a = inputs(rng, 1, 60, 3, len(modes)) | {"A": np.tile(modes, (3, 1)), "method": method}
        a["dt"] = np.full(3, dt, F32)
        check(fc.s4d_scan(**a), a, f"dt {dt}")
        check_kernel({name: a[name] for name in (*SYSTEM, "method")}, 60)


def test_golden_numbers(isa):
    """By hand, A = -1, dt = ln 2, B = 2, C = 1/2: dA = 1/2, dB = 1/2 * 2, so that x = 1, 2.5, 4.25 and y = x + 10 u."""
    one = np.ones((1, 1), np.complex64)
    dt, d = np.full(1, np.log(2), np.float32), np.full(1, 10, np.float32)
    y, x = fc.s4d_scan(np.array([1, 2, 3], np.float32).reshape(1, 3, 1), -one, 2 * one, one / 2, dt, d)
    np.testing.assert_allclose(y.ravel(), [11, 22.5, 34.25], rtol=1e-6)
    np.testing.assert_allclose(x.ravel(), [4.25], rtol=1e-6)


# ---- the convolution --------------------------------------------------------------------------------


def check_kernel(a: dict[str, Any], length: int) -> None:
    got, want = fc.s4d_kernel(**a, length=length), ref.s4d_kernel(**a, length=length)
    da, db = ref.s4d_system(a["A"], a["B"], a["dt"], a.get("method", "zoh"))
    size = ((2 * np.abs(a["C"]) * np.abs(db))[..., None] * np.abs(da)[..., None] ** np.arange(length)).sum(axis=1)
    assert got.dtype == np.float32
    check_close("s4d_kernel", got, want, magnitude=size)


@METHODS
def test_kernel(isa, rng, method):
    for channels, n, length in ((1, 1, 1), (3, 5, 0), (5, 6, 7), (2, 32, 8), (17, 16, 33), (3, 8, 1000), (3, 0, 4),
                                (0, 3, 4)):
        with case(channels, n, length):
            check_kernel(system(rng, channels, n) | {"method": method}, length)


def test_kernel_beyond_the_smallest_double(isa):
    """A mode that has died away stays 0, and others go on."""
    a = np.array([[-400, -1e-3]], np.complex64)
    one = np.ones((1, 2), np.complex64)
    check_kernel({"A": a, "B": one, "C": one, "dt": np.ones(1, np.float32)}, 3000)


@METHODS
def test_the_convolution_is_the_recurrence(isa, rng, method):
    """To 1e-6 of the largest, over 4096 tokens of a layer of S4D-Lin."""
    length = 4096
    a = inputs(rng, 1, length, 24, 32) | {"method": method, "state": None}
    a["B"][:] = 1
    y, _ = fc.s4d_scan(**a)
    kernel = ref.f64(fc.s4d_kernel(**{name: a[name] for name in (*SYSTEM, "method")}, length=length)).T
    size = 2 * length
    u = ref.f64(a["u"])[0]
    other = np.fft.irfft(np.fft.rfft(kernel, size, axis=0) * np.fft.rfft(u, size, axis=0), size, axis=0)[:length]
    other += ref.f64(a["D"]) * u
    assert np.abs(y[0] - other).max() <= 1e-6 * np.abs(other).max()


# ---- the same bits, memory --------------------------------------------------------------------------


def test_any_cut_gives_the_bits_of_the_whole(isa, dtype, rng):
    a = inputs(rng, seq=3 * BLOCK, channels=19, n=13, dtype=dtype)
    whole = fc.s4d_scan(**a)
    for sizes in CUTS:
        state, parts, at = a["state"], [], 0
        for size in sizes:
            y, state = fc.s4d_scan(**a | {"u": a["u"][:, at:at + size], "state": state})
            parts.append(y)
            at += size
        assert bits((np.concatenate(parts, axis=1), state)) == bits(whole), sizes


def test_a_channel_alone_is_the_channel_among_others(isa, rng):
    a = inputs(rng, channels=40)
    y, x = fc.s4d_scan(**a)
    for b, c in ((0, 0), (1, 39), (0, 17)):
        own = slice(c, c + 1)
        alone = {"u": a["u"][b:b + 1, :, own], "state": a["state"][b:b + 1, own]}
        alone |= {name: a[name][own] for name in (*SYSTEM, "D")}
        assert bits(fc.s4d_scan(**alone)) == bits((y[b:b + 1, :, own], x[b:b + 1, own]))


@pytest.mark.parametrize("shape", [(1, 40, 300, 16), (3, 200, 17, 5)])
def test_any_thread_count_gives_the_same_bits(isa, dtype, rng, each_thread_count, shape):
    a = inputs(rng, *shape, dtype=dtype)
    seen = {bits(fc.s4d_scan(**a)) + fc.s4d_kernel(*(a[name] for name in SYSTEM), 50).tobytes()
            for _ in each_thread_count()}
    assert len(seen) == 1


def test_any_strides_and_alignment(isa, dtype, rng):
    a = inputs(rng, dtype=dtype)
    want = bits(fc.s4d_scan(**a))
    for name, view in LAYOUTS.items():
        odd = {key: view(x) if x.ndim > 1 or name == "unaligned" else x for key, x in a.items()}
        assert bits(fc.s4d_scan(**odd)) == want, name
    assert bits(fc.s4d_scan(**a | {name: np.asfortranarray(a[name]) for name in "ABC"})) == want


def test_out_and_in_place(isa, dtype, rng):
    a = inputs(rng, dtype=dtype)
    y, x = fc.s4d_scan(**a)
    before = {key: value.tobytes() for key, value in a.items()}
    for outs in ((np.empty_like(y), None), (None, np.empty_like(x)), (np.empty_like(y), np.empty_like(x))):
        got = fc.s4d_scan(**a, out=outs)
        assert bits(got) == bits((y, x))
        assert all(o is None or g is o for g, o in zip(got, outs, strict=True))
    assert {key: value.tobytes() for key, value in a.items()} == before
    mine = a | {"u": a["u"].copy(), "state": a["state"].copy()}
    got = fc.s4d_scan(**mine, out=(mine["u"], mine["state"]))
    assert bits(got) == bits((y, x)) and got[0] is mine["u"] and got[1] is mine["state"]


@pytest.mark.parametrize("at_end", [False, True])
def test_arrays_between_forbidden_pages(isa, dtype, rng, at_end):
    for channels, n, seq in ((1, 1, 1), (3, 5, 2), (16, 8, BLOCK + 1), (35, 19, 40)):
        a = inputs(rng, 1, seq, channels, n, dtype)
        held = {key: guarded_copy(x, at_end=at_end) for key, x in a.items()}
        outs = tuple(guarded_copy(np.zeros(x.shape, x.dtype), at_end=at_end) for x in (a["u"], a["state"]))
        assert bits(fc.s4d_scan(**held, out=outs)) == bits(fc.s4d_scan(**a))


def test_modes_once_made_serve_later_calls(isa, rng):
    a = inputs(rng)
    modes = fc.functional._s4d_modes(*(a[name] for name in SYSTEM))
    again = fc.functional._s4d_scan(a["u"], modes, a["A"].shape[1], a["D"], state=a["state"])
    assert bits(again) == bits(fc.s4d_scan(**a))


# ---- values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_in_their_channel(isa, dtype, rng, special):
    a = inputs(rng, channels=20, dtype=dtype)
    clean = fc.s4d_scan(**a)
    a["u"][0, 3, 17] = special
    y, x = fc.s4d_scan(**a)
    assert not np.isfinite(y[0, 3:, 17].astype(np.float32)).any() and not np.isfinite(x[0, 17]).any()
    y[0, 3:, 17], x[0, 17] = clean[0][0, 3:, 17], clean[1][0, 17]
    assert bits((y, x)) == bits(clean)


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "drift"), [(-0.5, 1e-6), (-0.01, 2e-6), (-1e-4, 2e-5)])
def test_a_million_steps_against_float64(rng, rate, drift):
    """dA carried in two floats, what is left is a rounding a step, of which about 1 / (1 - |dA|) are remembered."""
    seq = 1_000_000
    a = {"A": np.array([[rate, rate + 0.01j, rate + 1j]], np.complex64), "B": np.ones((1, 3), np.complex64),
         "C": np.ones((1, 3), np.complex64), "dt": np.ones(1, np.float32)}
    u = rng.standard_normal((1, seq, 1), np.float32)
    _, x = fc.s4d_scan(u, **a)
    da, db = ref.s4d_system(a["A"], a["B"], a["dt"])
    terms = np.exp(np.log(da[0])[:, None] * np.arange(seq)[::-1]) * db[0][:, None] * ref.f64(u)[0, :, 0]
    error = np.abs(x[0, 0] - terms.sum(axis=1)) / np.abs(terms).sum(axis=1)
    assert (error <= drift).all(), error


# ---- what is refused --------------------------------------------------------------------------------

U, ABC, DT = np.ones((2, 3, 4), np.float32), np.ones((4, 5), np.complex64), np.ones(4, np.float32)
STATE = np.ones((2, 4, 5), np.complex64)


def scan(u=U, a=ABC, b=ABC, c=ABC, dt=DT, d=None, **options):
    return fc.s4d_scan(u, a, b, c, dt, d, **options)


def kernel(a=ABC, b=ABC, c=ABC, dt=DT, length=3, **options):
    return fc.s4d_kernel(a, b, c, dt, length, **options)


@pytest.mark.parametrize(("wrong", "error", "message"), [
    (lambda: scan(u=U[0]), ValueError, "s4d_scan: u has shape (3, 4), expected (batch, seq, channels)"),
    (lambda: scan(u=U.astype(np.float64)), TypeError, "pass u.astype(np.float32)"),
    (lambda: scan(u=U[..., ::2]), ValueError, "u has stride 8 bytes on its last axis"),
    (lambda: scan(a=ABC[:3]), ValueError, "s4d_scan: A has shape (3, 5), expected (4, n)"),

    (lambda: scan(a=ABC.astype(np.complex128)), TypeError,
     "s4d_scan: A has dtype complex128, expected complex64; pass A.astype(np.complex64)"),
    (lambda: scan(b=ABC[:, :4]), ValueError, "s4d_scan: B has shape (4, 4), expected (4, 5)"),
    (lambda: scan(c=ABC.real), TypeError, "s4d_scan: C has dtype float32, expected complex64"),
    (lambda: scan(dt=DT[:2]), ValueError, "s4d_scan: dt has shape (2,), expected (4,)"),
    (lambda: scan(dt=None), TypeError, "s4d_scan: dt is a NoneType"),
    (lambda: scan(d=DT[:2]), ValueError, "s4d_scan: D has shape (2,), expected (4,)"),
    (lambda: scan(method="euler"), ValueError, "s4d_scan: method is 'euler', expected 'zoh' or 'bilinear'"),
    (lambda: scan(state=STATE[:1]), ValueError, "s4d_scan: state has shape (1, 4, 5), expected (2, 4, 5)"),
    (lambda: scan(state=STATE.real.copy()), TypeError, "s4d_scan: state has dtype float32, expected complex64"),
    (lambda: scan(out=U), TypeError, "s4d_scan: out is a ndarray, expected a pair (y, state)"),
    (lambda: scan(out=(None, STATE.real.copy())), TypeError, "s4d_scan: out[1] has dtype float32, expected complex64"),
    (lambda: scan(out=(None, [1])), TypeError, "s4d_scan: out[1] is a list, expected a NumPy array"),
    (lambda: scan(out=(None, np.broadcast_to(STATE[0], (2, 4, 5)))), ValueError, "s4d_scan: out[1] is read-only"),
    (lambda: scan(state=(s := STATE.copy())[::-1], out=(None, s)), ValueError, "s4d_scan: out[1] overlaps state"),
    (lambda: kernel(length=-1), ValueError, "s4d_kernel: length is -1, expected 0 to"),
    (lambda: kernel(length=2.5), TypeError, "s4d_kernel: length is 2.5, expected an integer"),
    (lambda: kernel(length=2**63), ValueError, "s4d_kernel: length is 9223372036854775808, expected 0 to"),
    (lambda: kernel(length=2**60), ValueError, "s4d_kernel: length is 1152921504606846976, expected 0 to"),
    (lambda: kernel(a=ABC[0]), ValueError, "s4d_kernel: A has shape (5,), expected (channels, n)"),
    (lambda: kernel(method=None), ValueError, "s4d_kernel: method is None, expected 'zoh' or 'bilinear'"),
])
def test_a_refused_call_says_why(wrong, error, message):
    with pytest.raises(error) as caught:
        wrong()
    assert str(caught.value).startswith("s4d_") and message in str(caught.value)
