"""causal_conv1d against its formula: any width and size, any cut, the state, edge of memory, ONNX's own cases."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import reference as ref
from child import run_c
from conftest import check_close
from guard import guarded, guarded_copy
from suite import case

import forge_c as fc
from forge_c import functional

WIDTHS = (1, 2, 3, 4, 5, 8, 33)
CHANNELS = (1, 3, 15, 16, 17, 40, 131)


def inputs(rng, batch, seq, channels, width, dtype=np.float32):
    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    return {"x": normal(batch, seq, channels).astype(dtype), "weight": normal(channels, width),
            "bias": normal(channels), "state": normal(batch, width - 1, channels)}


def check(got, a, activation=None):
    y, state = ref.causal_conv1d(**a, activation=activation)
    with np.errstate(invalid="ignore"):
        size = ref.causal_conv1d(**{name: np.abs(ref.f64(x)) for name, x in a.items()})[0]
    op, n = "causal_conv1d" if activation is None else "causal_conv1d_silu", a["weight"].shape[1]
    check_close(op, got[0], y, magnitude=np.nan_to_num(size), n=n)
    assert got[1].dtype == np.float32
    np.testing.assert_array_equal(got[1], state)


def same(got, want):
    return all(g.dtype == w.dtype and g.tobytes() == w.tobytes() for g, w in zip(got, want, strict=True))


def pieces(a, cuts, **options):
    bounds, parts, state = [0, *cuts, a["x"].shape[1]], [], a.get("state")
    for begin, end in itertools.pairwise(bounds):
        y, state = fc.causal_conv1d(**{**a, "x": a["x"][:, begin:end], "state": state}, **options)
        parts.append(y)
    return np.concatenate(parts, axis=1), state


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_and_number_of_channels(isa, dtype, rng, width, activation):
    for channels, seq in itertools.product(CHANNELS, (1, 2, 3, 4, 7, 12, 70)):
        with case(channels, seq):
            a = inputs(rng, 2, seq, channels, width, dtype)
            check(fc.causal_conv1d(**a, activation=activation), a, activation)


def test_without_bias_and_state(isa, dtype, rng):
    for left_out in (("bias",), ("state",), ("bias", "state")):
        a = {name: x for name, x in inputs(rng, 2, 9, 21, 4, dtype).items() if name not in left_out}
        check(fc.causal_conv1d(**a), a)


def test_weight_and_bias_of_other_dtypes_and_layouts(isa, dtype, rng):
    a = inputs(rng, 2, 9, 40, 4)
    small = {"weight": a["weight"].astype(dtype), "bias": a["bias"].astype(dtype)}
    want = fc.causal_conv1d(**{**a, **{name: x.astype(np.float32) for name, x in small.items()}})
    assert same(fc.causal_conv1d(**{**a, **small}), want)
    for odd in (np.asfortranarray(small["weight"]), small["weight"][:, None][:, 0], small["weight"][::-1].copy()[::-1]):
        assert same(fc.causal_conv1d(**{**a, **small, "weight": odd}), want)


def test_any_cut_gives_the_bits_of_the_whole(isa, dtype, rng, each_thread_count):
    for width in (2, 4, 7):
        a = inputs(rng, 2, 140, 150, width, dtype)
        whole = fc.causal_conv1d(**a, activation="silu")
        for threads in each_thread_count():
            for cuts in ((1,), (63,), (64,), (139,), (0, 0, 2), (5, 7, 8), range(1, 140)):
                with case(width, threads, cuts):
                    assert same(pieces(a, cuts, activation="silu"), whole)


def test_a_row_of_a_batch_has_the_bits_that_it_has_alone(isa, dtype, rng):
    a = inputs(rng, 3, 20, 37, 4, dtype)
    together = fc.causal_conv1d(**a)
    for b in range(3):
        alone = fc.causal_conv1d(**{**a, "x": a["x"][b:b + 1], "state": a["state"][b:b + 1]})
        assert same(alone, [r[b:b + 1] for r in together])


def test_silu_is_that_of_the_sum(isa, rng):
    a = inputs(rng, 2, 21, 45, 4)
    y, state = fc.causal_conv1d(**a)
    assert same(fc.causal_conv1d(**a, activation="silu"), (fc.silu(y), state))


# ---- the state --------------------------------------------------------------------------------------

@pytest.mark.parametrize("seq", [0, 1, 2, 5, 6])
def test_the_state_is_the_last_inputs_and_may_be_renewed_in_place(isa, dtype, rng, seq):
    a = inputs(rng, 2, seq, 19, 6, dtype)
    before = a["state"].copy()
    want = fc.causal_conv1d(**a)
    assert a["state"].tobytes() == before.tobytes()
    np.testing.assert_array_equal(want[1], np.concatenate([before, a["x"].astype(np.float32)], axis=1)[:, seq:])
    y, state = fc.causal_conv1d(**a, out=(None, a["state"]))
    assert state is a["state"] and same((y, state), want)


def test_a_state_finer_than_x(isa, rng):
    """It need not be made of inputs: its float32 is used as it is."""
    a = inputs(rng, 1, 5, 19, 4, np.float16)
    a["state"] = np.nextafter(a["state"].astype(np.float16).astype(np.float32), np.float32(9))
    check(fc.causal_conv1d(**a), a)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "state"])
def test_nan_and_infinity_go_where_the_formula_sends_them(isa, rng, name):
    for value in (np.nan, np.inf, -np.inf):
        for activation in (None, "silu"):
            a = inputs(rng, 1, 11, 19, 4)
            a[name].reshape(-1)[a[name].size // 2] = value
            with case(value, activation):
                check(fc.causal_conv1d(**a, activation=activation), a, activation)


# ---- edge of memory ---------------------------------------------------------------------------------

def test_nothing_is_read_or_written_outside(isa, dtype, rng):
    for channels, width, seq in itertools.product((1, 5, 16, 23, 64), (1, 3, 4, 9), (1, 3, 18)):
        a = inputs(rng, 1, seq, channels, width, dtype)
        want = fc.causal_conv1d(**a)
        for at_end in (False, True):
            inside = {name: guarded_copy(x, at_end=at_end) for name, x in a.items()}
            out = tuple(guarded(w.shape, w.dtype, at_end=at_end) for w in want)
            got = fc.causal_conv1d(**inside, out=out)
            with case(channels, width, seq, at_end):
                assert got[0] is out[0] and got[1] is out[1] and same(got, want)
                assert all(inside[name].tobytes() == x.tobytes() for name, x in a.items())


@pytest.fixture
def past_the_caches():
    """As if no result fitted into a cache."""
    functional._set_cache_bytes("last", 1)
    yield
    functional._set_cache_bytes("last", 0)


@pytest.mark.parametrize("width", [1, 3, 4, 6])
def test_results_past_the_caches_have_the_same_bits(isa, dtype, rng, width, each_thread_count, past_the_caches):
    """Wherever rows begin, from whatever x lies in, up to the edge of memory."""
    for channels, activation in itertools.product((32, 96, 224), (None, "silu")):
        a = inputs(rng, 2, 141, channels, width, dtype)
        functional._set_cache_bytes("last", 1 << 30)
        want = fc.causal_conv1d(**a, activation=activation)
        functional._set_cache_bytes("last", 1)
        wide = np.zeros((2, 141, channels + 5), dtype)
        wide[..., 2:-3] = a["x"]
        for threads, x in itertools.product(each_thread_count(), (guarded_copy(a["x"], at_end=True), wide[..., 2:-3])):
            for skip in (0, 1, 7, 16, 31):
                out = guarded((want[0].size + skip,), dtype, at_end=True)[skip:].reshape(want[0].shape)
                with case(channels, activation, threads, skip):
                    got = fc.causal_conv1d(**{**a, "x": x}, activation=activation, out=(out, None))
                    assert got[0] is out and same(got, want)


# ---- others -----------------------------------------------------------------------------------------

PACKED = r"""
#include <stdio.h>
#include <string.h>
#include "forge.h"

/* Panels of the weight spare the op its own, and change no bit. */
int main(void) {
    enum { B = 2, S = 9, C = 37, K = 4, PANELS = 3 };
    static float x[B][S][C], w[C][K], panels[PANELS][K][16], y[2][B][S][C], state[2][B][K - 1][C];
    for (int i = 0; i < B * S * C; i++) x[0][0][i] = (float)(i % 17) - 8;
    for (int i = 0; i < C * K; i++) w[0][i] = (float)(i % 7) / 3;
    for (int i = 0; i < 2; i++) {
        fc_conv1d_args a = {.size = sizeof a, .out = y[i], .x = x, .new_state = state[i][0][0], .silu = 1,
                            .layout = i ? FC_PACKED_F32 : FC_COLS, .weight = i ? (void *)panels : (void *)w,
                            .ldw = sizeof w[0], .batch = B, .seq = S, .channels = C, .width = K,
                            .out_stride = {sizeof x[0], sizeof x[0][0]}, .x_stride = {sizeof x[0], sizeof x[0][0]},
                            .new_state_stride = {sizeof state[0][0], sizeof state[0][0][0]}};
        if (fc_pack_columns(FC_F32, panels, sizeof panels[0], w, sizeof w[0], K, C) || fc_conv1d(&a)) return 1;
    }
    printf("%d %d %d", y[0][1][8][36] != 0, memcmp(y[0], y[1], sizeof y[0]),
           memcmp(state[0], state[1], sizeof state[0]));
    return 0;
}
"""


def test_a_weight_in_panels(tmp_path):
    assert run_c(tmp_path, PACKED) == (0, "1 0 0")


@pytest.mark.filterwarnings("ignore")
def test_the_cases_of_onnx(monkeypatch):
    """CausalConvWithState of opset 27; it has (batch, channels, length) and a state of the input's dtype."""
    module = pytest.importorskip("onnx.backend.test.case.node.causal_conv_with_state")
    cases: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "expect", lambda node, **given: cases.append({"node": node, **given}))
    for name in dir(module.CausalConvWithState):
        if name.startswith("export"):
            getattr(module.CausalConvWithState, name)()
    for given in cases:
        with case(given["name"]):
            check_onnx(given["node"], given["inputs"], given["outputs"])
    assert len(cases) >= 13


def check_onnx(node, arrays, results):
    given = dict(zip([name for name in node.input if name], arrays, strict=True))
    x, state = given["input"].swapaxes(1, 2), given.get("past_state")
    activation = next((a.s.decode() for a in node.attribute if a.name == "activation"), "none")
    y, new = fc.causal_conv1d(
        np.ascontiguousarray(x), given["weight"][:, 0], given.get("bias"),
        activation=None if activation == "none" else "silu",
        state=None if state is None else np.ascontiguousarray(state.swapaxes(1, 2)).astype(np.float32))
    ulp = 4 * np.finfo(x.dtype).eps if x.dtype != np.dtype("bfloat16") else 2.0**-6
    np.testing.assert_allclose(ref.f64(y.swapaxes(1, 2)), ref.f64(results[0]), rtol=ulp, atol=4 * ulp)
    np.testing.assert_array_equal(new.swapaxes(1, 2), np.asarray(results[1], np.float32))
