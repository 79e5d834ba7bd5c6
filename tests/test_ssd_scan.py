"""ssd_scan against its recurrence: every size and option, cuts, edges of memory, layouts; dt of 0, huge, negative."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import reference as ref
from c_constants import c_constant
from child import run_c
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
FREE = (-np.inf, np.inf)


def inputs(rng, batch=2, seq=7, heads=4, p=24, groups=2, n=20, dtype=F32, everything=True) -> dict[str, Any]:
    def normal(*shape):
        return rng.standard_normal(shape, np.float32).astype(dtype)

    a = {"x": normal(batch, seq, heads, p), "dt": normal(batch, seq, heads), "A": -np.exp(normal(heads)).astype(dtype),
         "B": normal(batch, seq, groups, n), "C": normal(batch, seq, groups, n), "dt_softplus": True}
    if everything:
        a |= {"D": normal(heads), "z": normal(batch, seq, heads, p), "dt_bias": normal(heads),
              "state": rng.standard_normal((batch, heads, p, n), np.float32)}
    return a


def steps(a: dict[str, Any]) -> Any:
    dt = ref.f64(a["dt"]) + (0 if a.get("dt_bias") is None else ref.f64(a["dt_bias"]))
    return np.clip(ref.softplus(dt) if a.get("dt_softplus") else dt, *a.get("dt_limit", (0, np.inf)))


def magnitudes(a: dict[str, Any]) -> tuple[Any, Any]:
    """What the roundings act on: the sums of the sizes of all terms."""
    size = {name: np.abs(ref.f64(a[name])) for name in ("x", "B", "C", "state") if a.get(name) is not None}
    skip = 0 if a.get("D") is None else np.abs(ref.f64(a["D"]))[:, None] * size["x"]
    size["x"] = size["x"] * np.sign(steps(a))[..., None]
    y, h = ref.ssd_scan(**size, dt=steps(a), A=a["A"], dt_limit=FREE)
    return (y + skip) * (1 if a.get("z") is None else np.abs(ref.silu(a["z"]))), h


def exponents(a: dict[str, Any]) -> float:
    return float(min(np.abs(steps(a) * ref.f64(a["A"])).max(initial=0), 104))


def check(got: tuple[Any, Any], a: dict[str, Any], name: str = "") -> None:
    want, size = ref.ssd_scan(**a), magnitudes(a)
    (_, seq, _, _), n = a["x"].shape, a["B"].shape[-1]
    assert got[0].dtype == a["x"].dtype and got[1].dtype == np.float32
    for g, w, m in zip(got, want, size, strict=True):
        check_close("ssd_scan", g, w, magnitude=m, n=seq, d=n, s=exponents(a), case=name)


def bits(result: tuple[Any, Any]) -> bytes:
    return result[0].tobytes() + result[1].tobytes()


def tokens(a: dict[str, Any], some: slice) -> dict[str, Any]:
    return a | {name: a[name][:, some] for name in ("x", "dt", "B", "C", "z") if a.get(name) is not None}


# ---- against the recurrence -------------------------------------------------------------------------


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
def test_sizes(isa, dtype, rng, everything):
    for p, n in ((1, 1), (1, 16), (16, 1), (8, 8), (15, 17), (17, 15), (33, 40), (64, 128), (80, 16), (0, 3), (3, 0)):
        for seq in (0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5):
            with case(p, n, seq):
                a = inputs(rng, 1, seq, 2, p, 1, n, dtype, everything)
                check(fc.ssd_scan(**a), a)


def test_groups(isa, rng):
    for heads, groups in ((1, 1), (6, 1), (6, 2), (6, 3), (6, 6)):
        a = inputs(rng, heads=heads, groups=groups)
        check(fc.ssd_scan(**a), a, f"{heads} heads, {groups} groups")


def test_each_option_alone(isa, rng):
    every = inputs(rng)
    for name in ("D", "z", "dt_bias", "state"):
        a = {key: value for key, value in every.items() if key in ("x", "dt", "A", "B", "C", "dt_softplus", name)}
        check(fc.ssd_scan(**a), a, name)
    for limit in ((0.0, np.inf), (0.1, 0.4), (-0.2, 0.3), [0, 0], FREE):
        for softplus in (False, True):
            a = inputs(rng, everything=False) | {"dt_limit": limit, "dt_softplus": softplus}
            check(fc.ssd_scan(**a), a, f"{limit}")


@settings(derandomize=True, database=None, deadline=None, max_examples=60,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.integers(0, 3), seq=st.integers(0, 40), groups=st.integers(1, 3), share=st.integers(1, 3),
       p=st.integers(0, 40), n=st.integers(0, 40), name=st.sampled_from(list(DTYPES)), everything=st.booleans(),
       seed=st.integers(0, 2**32 - 1))
def test_any_shape(isa, batch, seq, groups, share, p, n, name, everything, seed):
    a = inputs(np.random.default_rng(seed), batch, seq, groups * share, p, groups, n, DTYPES[name], everything)
    check(fc.ssd_scan(**a), a)


def test_golden_numbers(isa):
    """By hand: h = 2, 2 / 2 + 4 = 5, 5 / 2 + 6 = 8.5; y = 3 h + 10 x."""
    x = np.array([2, 4, 6], np.float32).reshape(1, 3, 1, 1)
    one = np.ones((1, 3, 1, 1), np.float32)
    y, h = fc.ssd_scan(x, one[..., 0], np.full(1, np.log(0.5), np.float32), one, 3 * one, np.full(1, 10, np.float32))
    np.testing.assert_allclose(y.ravel(), [26, 55, 85.5], rtol=1e-6)
    np.testing.assert_allclose(h.ravel(), [8.5], rtol=1e-6)


# ---- the same bits ----------------------------------------------------------------------------------


def test_any_cut_gives_the_bits_of_the_whole(isa, dtype, rng):
    a = inputs(rng, seq=3 * BLOCK, p=19, n=37, dtype=dtype)
    whole = fc.ssd_scan(**a)
    for sizes in CUTS:
        state, parts, at = a["state"], [], 0
        for size in sizes:
            y, state = fc.ssd_scan(**tokens(a, slice(at, at + size)) | {"state": state})
            parts.append(y)
            at += size
        assert bits((np.concatenate(parts, axis=1), state)) == bits(whole), sizes


def test_a_long_sequence_is_cut_where_it_likes(isa, rng):
    """Longer than what is done between two looks for Ctrl-C."""
    span = c_constant("FC_SPAN", "threads.h")
    a = inputs(rng, 1, span + 700, 1, 3, 1, 5)
    y, state = fc.ssd_scan(**a)
    first = fc.ssd_scan(**tokens(a, slice(0, span // 2 + 7)))
    second = fc.ssd_scan(**tokens(a, slice(span // 2 + 7, None)) | {"state": first[1]})
    assert bits((np.concatenate([first[0], second[0]], axis=1), second[1])) == bits((y, state))


def test_a_head_alone_is_the_head_among_others(isa, dtype, rng):
    a = inputs(rng, dtype=dtype)
    y, h = fc.ssd_scan(**a)
    for b, head in ((0, 0), (1, 3), (0, 2)):
        row, group = slice(b, b + 1), slice(head // 2, head // 2 + 1)
        own = {name: a[name][row, :, head:head + 1] for name in ("x", "dt", "z")}
        own |= {name: a[name][row, :, group] for name in ("B", "C")}
        own |= {name: a[name][head:head + 1] for name in ("A", "D", "dt_bias")}
        alone = fc.ssd_scan(**own, state=a["state"][row, head:head + 1], dt_softplus=True)
        assert bits(alone) == bits((y[row, :, head:head + 1], h[row, head:head + 1]))


@pytest.mark.parametrize("shape", [(1, 40, 1, 300, 1, 64), (2, 3, 5, 64, 5, 128), (1, 200, 2, 17, 1, 33)])
def test_any_thread_count_gives_the_same_bits(isa, dtype, rng, each_thread_count, shape):
    a = inputs(rng, *shape, dtype=dtype)
    seen = {bits(fc.ssd_scan(**a)) for _ in each_thread_count()}
    assert len(seen) == 1


# ---- memory -----------------------------------------------------------------------------------------


def test_any_strides_and_alignment(isa, dtype, rng):
    a = inputs(rng, dtype=dtype)
    want = bits(fc.ssd_scan(**a))
    for name, view in LAYOUTS.items():
        odd = {key: view(x) if isinstance(x, np.ndarray) and (x.ndim > 1 or name == "unaligned") else x
               for key, x in a.items()}
        assert bits(fc.ssd_scan(**odd)) == want, name
    scattered = np.asfortranarray(a["dt"])
    assert bits(fc.ssd_scan(**a | {"dt": scattered})) == want
    assert bits(fc.ssd_scan(**a | {"dt": a["dt"].astype(np.float32)})) == want


def test_out_and_in_place(isa, dtype, rng):
    a = inputs(rng, dtype=dtype)
    y, h = fc.ssd_scan(**a)
    before = {key: x.tobytes() for key, x in a.items() if isinstance(x, np.ndarray)}
    for outs in ((np.empty_like(y), None), (None, np.empty_like(h)), (np.empty_like(y), np.empty_like(h))):
        got = fc.ssd_scan(**a, out=outs)
        assert bits(got) == bits((y, h))
        assert all(o is None or g is o for g, o in zip(got, outs, strict=True))
    assert {key: x.tobytes() for key, x in a.items() if isinstance(x, np.ndarray)} == before
    for name in ("x", "z"):
        mine = a | {name: a[name].copy(), "state": a["state"].copy()}
        got = fc.ssd_scan(**mine, out=(mine[name], mine["state"]))
        assert bits(got) == bits((y, h)) and got[0] is mine[name] and got[1] is mine["state"]
    room = np.full((*h.shape[:-1], h.shape[-1] + 4), 7, np.float32)
    fc.ssd_scan(**a, out=(None, room[..., 1:-3]))
    assert room[..., 1:-3].tobytes() == h.tobytes() and (room[..., 0] == 7).all() and (room[..., -3:] == 7).all()


@pytest.mark.parametrize("at_end", [False, True])
def test_arrays_between_forbidden_pages(isa, dtype, rng, at_end):
    for p, n, seq in ((1, 1, 1), (3, 5, 2), (16, 16, BLOCK + 1), (17, 33, 1), (35, 19, BLOCK + 8)):
        a = inputs(rng, 1, seq, 2, p, 1, n, dtype)
        held = {key: guarded_copy(x, at_end=at_end) if isinstance(x, np.ndarray) else x for key, x in a.items()}
        outs = tuple(guarded_copy(np.zeros(x.shape, x.dtype), at_end=at_end) for x in (a["x"], a["state"]))
        assert bits(fc.ssd_scan(**held, out=outs)) == bits(fc.ssd_scan(**a))


# ---- values -----------------------------------------------------------------------------------------


def test_a_step_of_0_changes_nothing(isa, rng):
    a = inputs(rng, everything=False) | {"dt": np.zeros((2, 7, 4), np.float32), "dt_softplus": False}
    held = rng.standard_normal((2, 4, 24, 20), np.float32)
    y, h = fc.ssd_scan(**a, state=held)
    assert h.tobytes() == held.tobytes()
    check((y, h), a | {"state": held})


@pytest.mark.parametrize("step", [30.0, 1e4, 1e30, -1e-3, -2.0, -8.0, np.inf])
@pytest.mark.parametrize("softplus", [False, True])
def test_huge_and_negative_steps(isa, rng, step, softplus):
    a = inputs(rng, seq=3) | {"dt_softplus": softplus, "dt_limit": FREE}
    a["dt"][:, 1] = step
    if step == np.inf:
        a["x"][0] = 0
    with np.errstate(over="ignore"):
        want, size = ref.ssd_scan(**a), magnitudes(a)
    got = fc.ssd_scan(**a)
    for g, w, m in zip(got, want, size, strict=True):
        w = np.where(np.abs(w) > 3e38, np.copysign(np.inf, w), w)
        if step == np.inf:
            np.testing.assert_array_equal(np.isnan(g), np.isnan(w))
        else:
            check_close("ssd_scan", g, w, magnitude=m, n=3, d=20, s=exponents(a))


def test_softplus_keeps_small_and_large_steps(isa, rng):
    """As dt goes from -80 to 80, dt itself is what a state of 0 and B = x = 1 take over."""
    dt = np.linspace(-80, 80, 1601, dtype=np.float32)
    one = np.ones((1601, 1, 1, 1), np.float32)
    _, h = fc.ssd_scan(one, dt.reshape(-1, 1, 1), np.zeros(1, np.float32), one, one, dt_softplus=True)
    np.testing.assert_allclose(h.ravel(), ref.softplus(dt), rtol=4e-7)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity(isa, dtype, rng, special):
    for name, at in (("x", (0, 2, 1, 3)), ("B", (0, 2, 0, 19)), ("C", (0, 2, 1, 0)), ("z", (0, 2, 1, 3)),
                     ("dt", (0, 2, 3)), ("D", 1), ("A", 2), ("state", (1, 2, 23, 19)), ("dt_bias", 0)):
        with case(name):
            a = inputs(rng, p=24, n=20, dtype=dtype)
            clean = fc.ssd_scan(**a)
            a[name] = a[name].copy()
            a[name][at] = special
            got, want = fc.ssd_scan(**a), ref.ssd_scan(**a)
            for g, w, c in zip(got, want, clean, strict=True):
                g = g.astype(np.float64)
                np.testing.assert_array_equal(np.isnan(g), np.isnan(w))
                touched = ~np.isfinite(w)
                np.testing.assert_array_equal(g[touched], w[touched])
                if name in ("x", "B", "C", "z", "dt"):
                    assert g[:, :2].tobytes() == c.astype(np.float64)[:, :2].tobytes() or g.shape == want[1].shape


@pytest.mark.alone
def test_a_state_that_has_died_away_costs_nothing(isa, one_thread):
    """Subnormal numbers count as 0 in the recurrence, and are numbers again after it."""
    x, bc = np.zeros((1, 256, 2, 64), np.float32), np.ones((1, 256, 1, 64), np.float32)
    dt, a = np.full((1, 256, 2), 1e-5, np.float32), np.full(2, -1, np.float32)
    one, tiny = np.ones((1, 2, 64, 64), np.float32), np.full((1, 2, 64, 64), 1e-40, np.float32)

    def seconds(state):
        start = time.perf_counter()
        fc.ssd_scan(x, dt, a, bc, bc, state=state)
        return time.perf_counter() - start

    y, h = fc.ssd_scan(x, dt, a, bc, bc, state=tiny)
    assert not y.any() and not h.any()
    assert (tiny * np.float32(1.5)).all()
    assert min(seconds(tiny) for _ in range(20)) < 10 * min(seconds(one) for _ in range(20))


# ---- drift ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("decay", "drift"), [(0.5, 2e-6), (0.01, 1e-5), (1e-4, 1e-4)])
def test_a_million_steps_against_float64(rng, decay, drift):
    """The state is a sum with weights e^(sum of later dt A): its error is that of about 1 / decay roundings."""
    seq = 1_000_000
    a = inputs(rng, 1, seq, 1, 4, 1, 4, everything=False)
    a |= {"dt_softplus": False, "A": np.full(1, -1, np.float32),
          "dt": (decay * rng.uniform(0.5, 1.5, (1, seq, 1))).astype(np.float32)}
    _, h = fc.ssd_scan(**a)
    dt = ref.f64(a["dt"]).ravel()
    later = np.cumsum(dt[::-1])[::-1] - dt
    terms = (np.exp(-later) * dt)[:, None] * ref.f64(a["x"])[0, :, 0]
    want = terms.T @ ref.f64(a["B"])[0, :, 0]
    size = np.abs(terms).T @ np.abs(ref.f64(a["B"]))[0, :, 0]
    assert (np.abs(h[0, 0] - want) <= drift * size).all(), (np.abs(h[0, 0] - want) / size).max()


# ---- what is refused --------------------------------------------------------------------------------

X, DT, A = np.ones((2, 3, 4, 5), np.float32), np.ones((2, 3, 4), np.float32), np.ones(4, np.float32)
BC, STATE = np.ones((2, 3, 2, 6), np.float32), np.ones((2, 4, 5, 6), np.float32)


def call(x=X, dt=DT, a=A, b=BC, c=BC, d=None, **options):
    return fc.ssd_scan(x, dt, a, b, c, d, **options)


@pytest.mark.parametrize(("wrong", "error", "message"), [
    (lambda: call(x=X[0]), ValueError, "x has shape (3, 4, 5), expected (batch, seq, heads, p)"),
    (lambda: call(x=X.astype(np.float64)), TypeError, "pass x.astype(np.float32)"),
    (lambda: call(x=X[..., ::2]), ValueError, "x has stride 8 bytes on its last axis"),
    (lambda: call(dt=DT[:, :2]), ValueError, "dt has shape (2, 2, 4), expected (2, 3, 4)"),
    (lambda: call(dt=None), TypeError, "dt is a NoneType"),
    (lambda: call(a=A[:3]), ValueError, "A has shape (3,), expected (4,)"),
    (lambda: call(a=None), TypeError, "A is a NoneType"),
    (lambda: call(b=BC[0]), ValueError, "B has shape (3, 2, 6), expected (batch, seq, groups, n)"),
    (lambda: call(b=BC[:, :2]), ValueError, "B has shape (2, 2, 2, 6), expected (2, 3, 2, 6)"),
    (lambda: call(b=np.ones((2, 3, 3, 6), np.float32)), ValueError,
     "x has 4 heads, expected a multiple of B's 3 groups"),
    (lambda: call(b=BC[:, :, :0]), ValueError, "x has 4 heads, expected a multiple of B's 0 groups"),
    (lambda: call(b=BC.astype(np.float16)), TypeError, "B has dtype float16, expected float32"),
    (lambda: call(c=BC[..., :5]), ValueError, "C has shape (2, 3, 2, 5), expected (2, 3, 2, 6)"),
    (lambda: call(d=X[0, 0]), ValueError, "D has shape (4, 5), expected (4,)"),
    (lambda: call(z=X[:1]), ValueError, "z has shape (1, 3, 4, 5), expected (2, 3, 4, 5)"),
    (lambda: call(dt_bias=A[:1]), ValueError, "dt_bias has shape (1,), expected (4,)"),
    (lambda: call(dt_softplus=A), TypeError, "dt_softplus is array"),
    (lambda: call(dt_limit=0), TypeError, "dt_limit is 0, expected a pair of numbers"),
    (lambda: call(dt_limit=(1, 0)), ValueError, "dt_limit is (1, 0), expected the smaller number first"),
    (lambda: call(dt_limit=(0, np.nan)), ValueError, "expected the smaller number first"),
    (lambda: call(dt_limit=("0", 1)), TypeError, "dt_limit[0] is '0', expected a number"),
    (lambda: call(state=STATE[:1]), ValueError, "state has shape (1, 4, 5, 6), expected (2, 4, 5, 6)"),
    (lambda: call(state=STATE.astype(np.float16)), TypeError, "state has dtype float16, expected float32"),
    (lambda: call(out=X), TypeError, "out is a ndarray, expected a pair (y, state)"),
    (lambda: call(out=(X.copy(), STATE[:1].copy())), ValueError,
     "out[1] has shape (1, 4, 5, 6), expected (2, 4, 5, 6)"),
    (lambda: call(state=(s := STATE.copy())[:, ::-1], out=(None, s)), ValueError, "out[1] overlaps state"),
])
def test_a_refused_call_says_why(wrong, error, message):
    with pytest.raises(error) as caught:
        wrong()
    assert str(caught.value).startswith("ssd_scan: ") and message in str(caught.value)


BY_N = r"""
#include <stdio.h>
#include <string.h>
#include "forge.h"

/* States with p last hold the numbers of those with n last. */
int main(void) {
    enum { B = 2, S = 19, H = 3, P = 21, N = 18 };
    static float x[B][S][H][P], b[B][S][1][N], c[B][S][1][N], dt[B][S][H], y[2][B][S][H][P];
    static float by_p[2][B][H][P][N], by_n[2][B][H][N][P];
    const float decay[H] = {-0.5f, -1, -2};
    for (int i = 0; i < B * S * H * P; i++) x[0][0][0][i] = (float)(i % 17) - 8;
    for (int i = 0; i < B * S * N; i++) b[0][0][0][i] = (float)(i % 7) / 3, c[0][0][0][i] = (float)(i % 5) - 2;
    for (int i = 0; i < B * S * H; i++) dt[0][0][i] = (float)(i % 3) / 4;
    for (int i = 0; i < B * H * P * N; i++) {
        by_p[0][0][0][0][i] = (float)(i % 23) - 11;
        by_n[0][i / (H * P * N)][i / (P * N) % H][i % N][i / N % P] = by_p[0][0][0][0][i];
    }
    for (int i = 0; i < 2; i++) {
        const ptrdiff_t head = sizeof by_p[0][0][0], row = i ? P * 4 : N * 4;
        fc_ssd_scan_args a = {
            .size = sizeof a, .out = y[i], .new_state = i ? by_n[1][0][0][0] : by_p[1][0][0][0], .x = x, .dt = dt,
            .b = b, .c = c, .a = decay, .state = i ? by_n[0][0][0][0] : by_p[0][0][0][0], .batch = B, .seq = S,
            .heads = H, .groups = 1, .p = P, .n = N, .out_stride = {sizeof x[0], sizeof x[0][0], P * 4},
            .x_stride = {sizeof x[0], sizeof x[0][0], P * 4}, .dt_stride = {sizeof dt[0], sizeof dt[0][0], 4},
            .b_stride = {sizeof b[0], N * 4, N * 4}, .c_stride = {sizeof c[0], N * 4, N * 4},
            .state_stride = {H * head, head, row}, .new_state_stride = {H * head, head, row}, .dt_max = 1e9f,
            .state_by_n = i};
        if (fc_ssd_scan(&a) != FC_OK) return 1;
    }
    if (memcmp(y[0], y[1], sizeof y[0])) return 2;
    for (int i = 0; i < B * H * P * N; i++)
        if (by_n[1][i / (H * P * N)][i / (P * N) % H][i % N][i / N % P] != by_p[1][0][0][0][i]) return 3;
    return 0;
}
"""


def test_states_with_p_last(tmp_path):
    assert run_c(tmp_path, BY_N) == (0, "")
