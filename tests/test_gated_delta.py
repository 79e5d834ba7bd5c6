"""gated_delta against its recurrence: four rules, heads that are shared either way, cuts, edges of memory, layouts;
ONNX's LinearAttention, Qwen3-Next's layer and Mamba-2, which is one of the rules."""

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
RULES = ("linear", "gated", "delta", "gated_delta")
EACH_RULE = pytest.mark.parametrize("rule", RULES)


def normalized(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def inputs(rng, rule="gated_delta", batch=2, seq=7, heads=4, p=24, n=20, q_heads=4, k_heads=4, dtype=F32, each_n=False,
           state=True) -> dict[str, Any]:
    """Keys of length 1, decays of at most 1 and beta from 0 to 1, as models have them: no state grows without bound."""
    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    a = {"q": normal(batch, seq, q_heads, n), "k": normalized(normal(batch, seq, k_heads, n)),
         "v": normal(batch, seq, heads, p)}
    if "gated" in rule:
        a["g"] = -0.3 * np.abs(normal(batch, seq, heads, n) if each_n else normal(batch, seq, heads))
    if "delta" in rule:
        a["beta"] = rng.random((batch, seq, heads), np.float32)
    a = {name: x.astype(dtype) for name, x in a.items()}
    return a | ({"state": normal(batch, heads, n, p)} if state else {})


def magnitudes(a: dict[str, Any]) -> tuple[Any, Any]:
    """The sums of the sizes of all terms; by the delta rule, where S only shrinks, the largest length that a column of
    S may have, times that of q."""
    if a.get("beta") is None:
        given = [name for name in ("q", "k", "v", "state", "scale") if a.get(name) is not None]
        sizes = {name: np.abs(ref.f64(a[name])) for name in given}
        return ref.gated_delta(**sizes, g=a.get("g"))
    (batch, _, heads, p), n, most = a["v"].shape, a["q"].shape[-1], max(a["v"].shape[2], a["q"].shape[2])
    column = np.abs(ref.f64(a["v"])).sum(axis=1)
    if a.get("state") is not None:
        column = column + np.sqrt((ref.f64(a["state"]) ** 2).sum(axis=2))
    length = np.sqrt((ref.f64(a["q"]) ** 2).sum(axis=-1)) * abs(a.get("scale", n ** -0.5 if n else 1.0))
    q_length = np.repeat(length, most // a["q"].shape[2], axis=2)
    y = q_length[..., None] * np.repeat(column, most // heads, axis=1)[:, None]
    return y, np.broadcast_to(column[:, :, None], (batch, heads, n, p))


def check(got: tuple[Any, Any], a: dict[str, Any], name: str = "") -> None:
    want, size = ref.gated_delta(**a), magnitudes(a)
    seq, n = a["v"].shape[1], a["q"].shape[-1]
    assert got[0].dtype == a["q"].dtype and got[1].dtype == np.float32
    s = float(np.abs(ref.f64(a["g"])).max(initial=0)) if a.get("g") is not None else 0.0
    for g, w, m in zip(got, want, size, strict=True):
        check_close("gated_delta", g, w, magnitude=m, n=seq, d=n, s=min(s, 104), case=name)


def run(a: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """By the rule that the arguments are for."""
    rule = {(False, False): "linear", (True, False): "gated", (False, True): "delta", (True, True): "gated_delta"}
    return fc.gated_delta(**a, rule=rule[a.get("g") is not None, a.get("beta") is not None], **options)


def bits(result: tuple[Any, Any]) -> bytes:
    return result[0].tobytes() + result[1].tobytes()


def tokens(a: dict[str, Any], some: slice) -> dict[str, Any]:
    return a | {name: a[name][:, some] for name in ("q", "k", "v", "g", "beta") if a.get(name) is not None}


# ---- against the recurrence -------------------------------------------------------------------------


@EACH_RULE
def test_sizes(isa, dtype, rng, rule):
    for p, n in ((1, 1), (1, 16), (16, 1), (8, 8), (15, 17), (17, 15), (33, 40), (64, 128), (0, 3), (3, 0)):
        for seq in (0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5):
            with case(p, n, seq):
                a = inputs(rng, rule, 1, seq, 2, p, n, 2, 2, dtype, state=seq % 2 == 0)
                check(run(a), a)


@EACH_RULE
@pytest.mark.parametrize("each_n", [False, True], ids=["a_decay_a_head", "a_decay_a_row"])
def test_heads_that_are_shared(isa, rng, rule, each_n):
    for heads, q_heads, k_heads in ((4, 4, 4), (4, 8, 4), (1, 8, 1), (4, 2, 2), (6, 3, 2), (6, 1, 1), (4, 2, 4),
                                    (2, 6, 1)):
        a = inputs(rng, rule, heads=heads, q_heads=q_heads, k_heads=k_heads, each_n=each_n)
        y, state = run(a)
        assert y.shape == (2, 7, max(heads, q_heads), 24) and state.shape == (2, heads, 20, 24)
        check((y, state), a, f"{heads} heads, {q_heads} of q, {k_heads} of k")


def test_scale(isa, rng):
    for scale in (0.25, 0.0, -3.0, 1):
        a = inputs(rng) | {"scale": scale}
        check(run(a), a, f"{scale}")


@settings(derandomize=True, database=None, deadline=None, max_examples=60,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rule=st.sampled_from(RULES), batch=st.integers(0, 3), seq=st.integers(0, 40), heads=st.integers(1, 4),
       share=st.integers(1, 3), p=st.integers(0, 40), n=st.integers(0, 40), name=st.sampled_from(list(DTYPES)),
       each_n=st.booleans(), more_of_q=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_any_shape(isa, rule, batch, seq, heads, share, p, n, name, each_n, more_of_q, seed):
    few = heads * share if more_of_q else heads
    a = inputs(np.random.default_rng(seed), rule, batch, seq, heads if more_of_q else heads * share, p, n, few, heads,
               DTYPES[name], each_n)
    check(run(a), a)


def test_golden_numbers(isa):
    """By hand, decay 1/2 and beta 1/2: S = 1/2 (4 - 0) = 2; 1 + (4 - 1) / 2 = 2.5; 1.25 + (4 - 1.25) / 2 = 2.625."""
    one = np.ones((1, 3, 1, 1), np.float32)
    g, beta = np.full((1, 3, 1), np.log(0.5), np.float32), np.full((1, 3, 1), 0.5, np.float32)
    y, state = fc.gated_delta(2 * one, one, 4 * one, g, beta)
    np.testing.assert_allclose(y.ravel(), [4, 5, 5.25], rtol=1e-6)
    np.testing.assert_allclose(state.ravel(), [2.625], rtol=1e-6)


# ---- others' definitions ----------------------------------------------------------------------------


def onnx_cases() -> list[Any]:
    """(name, node, inputs, outputs) of ONNX's own tests of LinearAttention."""
    module = pytest.importorskip("onnx.backend.test.case.node.linear_attention")
    found: list[Any] = []
    original, module.expect = module.expect, lambda node, inputs, outputs, name, **_: found.append(
        (name, node, inputs, outputs))
    try:
        np.random.seed(0)
        for export in [name for name in vars(module.LinearAttention) if name.startswith("export")]:
            getattr(module.LinearAttention, export)()
    finally:
        module.expect = original
    return found


def test_linear_attention_of_onnx(isa):
    cases = onnx_cases()
    assert len(cases) >= 14
    for name, node, arrays, (output, present) in cases:
        with case(name):
            given = dict(zip([i for i in node.input if i], arrays, strict=True))
            options = {a.name: a.s.decode() if a.s else a.f if a.name == "scale" else a.i for a in node.attribute}
            a = from_onnx(given, options["q_num_heads"], options["kv_num_heads"])
            a |= {"scale": options["scale"]} if "scale" in options else {}
            y, state = fc.gated_delta(**a, rule=options.get("update_rule", "gated_delta"))
            check((y, state), a)
            room = {"rtol": 2e-3, "atol": 2e-3} if output.dtype == np.float16 else {"rtol": 2e-5, "atol": 2e-5}
            np.testing.assert_allclose(y.reshape(output.shape), output, **room)
            np.testing.assert_allclose(state, present, **room)


def from_onnx(given: dict[str, Any], q_heads: int, heads: int) -> dict[str, Any]:
    """(batch, seq, heads * channels) as ours."""
    batch, seq, _ = given["query"].shape
    a = {ours: given[theirs].reshape(batch, seq, count, -1)
         for ours, theirs, count in (("q", "query", q_heads), ("k", "key", heads), ("v", "value", heads))}
    if "decay" in given:
        each_n = given["decay"].shape[-1] != heads
        a["g"] = given["decay"].reshape((batch, seq, heads, -1) if each_n else (batch, seq, heads))
    if "beta" in given:
        a["beta"] = np.broadcast_to(given["beta"], (batch, seq, heads))
    if "past_state" in given:
        a["state"] = given["past_state"].astype(np.float32)
    return a


def test_the_recurrence_of_qwen3_next(isa, rng):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next").torch_recurrent_gated_delta_rule
    a = inputs(rng, seq=40, heads=6, q_heads=2, k_heads=2, n=64, p=48)
    given = {name: torch.from_numpy(x) for name, x in a.items()}
    given |= {name: given[name].repeat_interleave(3, 2) for name in "qk"}  # 5.17 asks for it
    y, state = theirs(given["q"], given["k"], given["v"], given["g"], given["beta"], initial_state=given["state"],
                      output_final_state=True)
    got = fc.gated_delta(**a)
    np.testing.assert_allclose(got[0], y.numpy(), atol=2e-6)
    np.testing.assert_allclose(got[1], state.numpy(), atol=2e-6)


def test_mamba_2_is_the_gated_rule(isa, rng):
    """q = C, k = B, v = dt x, g = dt A, scale 1, and the state with its axes swapped."""
    x, (b, c) = rng.standard_normal((2, 50, 6, 24), np.float32), rng.standard_normal((2, 2, 50, 2, 20), np.float32)
    dt, a = rng.random((2, 50, 6), np.float32), -np.exp(rng.standard_normal(6, np.float32))
    y, h = fc.ssd_scan(x, dt, a, b, c)
    other, s = fc.gated_delta(c, b, dt[..., None] * x, dt * a, rule="gated", scale=1.0)
    assert y.tobytes() == other.tobytes() and h.tobytes() == np.ascontiguousarray(s.swapaxes(2, 3)).tobytes()


# ---- the same bits ----------------------------------------------------------------------------------


@EACH_RULE
def test_any_cut_gives_the_bits_of_the_whole(isa, dtype, rng, rule):
    for each_n in (False, True):
        a = inputs(rng, rule, seq=3 * BLOCK, p=19, n=37, q_heads=8, dtype=dtype, each_n=each_n)
        whole = run(a)
        for sizes in CUTS:
            state, parts, at = a["state"], [], 0
            for size in sizes:
                y, state = run(tokens(a, slice(at, at + size)) | {"state": state})
                parts.append(y)
                at += size
            assert bits((np.concatenate(parts, axis=1), state)) == bits(whole), sizes


@EACH_RULE
def test_a_head_alone_is_the_head_among_others(isa, rng, rule):
    a = inputs(rng, rule)
    y, state = run(a)
    for b, head in ((0, 0), (1, 3), (0, 2)):
        row, own = slice(b, b + 1), slice(head, head + 1)
        alone = {name: x[row, own] if name == "state" else x[row, :, own] for name, x in a.items()}
        assert bits(run(alone)) == bits((y[row, :, own], state[row, own]))


@EACH_RULE
@pytest.mark.parametrize("shape", [(1, 40, 1, 300, 64), (2, 3, 4, 64, 128), (1, 200, 2, 17, 33)])
def test_any_thread_count_gives_the_same_bits(isa, dtype, rng, each_thread_count, rule, shape):
    a = inputs(rng, rule, *shape, q_heads=shape[2], k_heads=1, dtype=dtype)
    assert len({bits(run(a)) for _ in each_thread_count()}) == 1


# ---- memory -----------------------------------------------------------------------------------------


def test_any_strides_and_alignment(isa, dtype, rng):
    a = inputs(rng, each_n=True, dtype=dtype)
    want = bits(run(a))
    for name, view in LAYOUTS.items():
        assert bits(run({key: view(x) for key, x in a.items()})) == want, name
    wide = {name: a[name].astype(np.float32) for name in ("g", "beta")}
    assert bits(run(a | wide)) == want
    assert bits(run(a | {"beta": np.asfortranarray(a["beta"])})) == want


@EACH_RULE
def test_out_and_in_place(isa, dtype, rng, rule):
    a = inputs(rng, rule, dtype=dtype)
    y, state = run(a)
    before = {key: x.tobytes() for key, x in a.items()}
    for outs in ((np.empty_like(y), None), (None, np.empty_like(state)), (np.empty_like(y), np.empty_like(state))):
        got = run(a, out=outs)
        assert bits(got) == bits((y, state))
        assert all(o is None or g is o for g, o in zip(got, outs, strict=True))
    assert {key: x.tobytes() for key, x in a.items()} == before
    mine = a | {"v": a["v"].copy(), "state": a["state"].copy()}
    got = run(mine, out=(mine["v"], mine["state"]))
    assert bits(got) == bits((y, state)) and got[0] is mine["v"] and got[1] is mine["state"]


@EACH_RULE
@pytest.mark.parametrize("at_end", [False, True])
def test_arrays_between_forbidden_pages(isa, dtype, rng, at_end, rule):
    for p, n, seq, each_n in ((1, 1, 1, False), (3, 5, 2, True), (16, 16, BLOCK + 1, False), (17, 33, 1, True),
                              (35, 19, 40, True)):
        a = inputs(rng, rule, 1, seq, 2, p, n, 4, 1, dtype, each_n)
        held = {key: guarded_copy(x, at_end=at_end) for key, x in a.items()}
        y, state = run(a)
        outs = tuple(guarded_copy(np.zeros(x.shape, x.dtype), at_end=at_end) for x in (y, state))
        assert bits(run(held, out=outs)) == bits((y, state))


# ---- values -----------------------------------------------------------------------------------------


def test_a_beta_of_0_writes_nothing_and_a_decay_of_0_forgets(isa, rng):
    a = inputs(rng, "delta")
    a["beta"][:] = 0
    assert run(a)[1].tobytes() == a["state"].tobytes()
    a = inputs(rng, "gated")
    a["g"][:, 6] = -np.inf
    want = a["k"][:, 6, :, :, None] * a["v"][:, 6, :, None]
    np.testing.assert_allclose(run(a)[1], want, rtol=1e-6)


@EACH_RULE
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity(isa, rng, special, rule):
    for name, at in (("q", (0, 2, 1, 3)), ("k", (0, 2, 1, 19)), ("v", (0, 2, 1, 0)), ("g", (0, 2, 3)),
                     ("beta", (0, 2, 3)), ("state", (1, 2, 19, 23))):
        with case(name):
            a = inputs(rng, rule)
            if name not in a:
                continue
            clean = run(a)
            a[name][at] = special
            got, want = run(a), ref.gated_delta(**a)
            for g, w in zip(got, want, strict=True):
                np.testing.assert_array_equal(np.isnan(g), np.isnan(w))
                np.testing.assert_array_equal(g[np.isinf(w)], w[np.isinf(w)])
            if name != "state":
                assert got[0][:, :2].tobytes() == clean[0][:, :2].tobytes()


@pytest.mark.slow
def test_a_million_steps_against_float64(rng):
    """By the delta rule with keys of length 1 a step forgets what it overwrites: errors do not pile up."""
    seq, n = 1_000_000, 2
    a = inputs(rng, "delta", 1, seq, 1, 2, n, 1, 1)
    _, state = run(a)
    k, v, beta = (ref.f64(a[name])[0, -2000:, 0] for name in ("k", "v", "beta"))
    s = np.zeros((n, 2))
    for t in range(2000):
        s = s + beta[t] * np.outer(k[t], v[t] - k[t] @ s)
    assert np.abs(state[0, 0] - s).max() < 1e-6 * np.abs(v).max()


# ---- what is refused --------------------------------------------------------------------------------

Q, V, G = np.ones((2, 3, 4, 6), np.float32), np.ones((2, 3, 4, 5), np.float32), np.ones((2, 3, 4), np.float32)
STATE = np.ones((2, 4, 6, 5), np.float32)


def call(q=Q, k=Q, v=V, g=G, beta=G, **options):
    return fc.gated_delta(q, k, v, g, beta, **options)


@pytest.mark.parametrize(("wrong", "error", "message"), [
    (lambda: call(q=Q[0]), ValueError, "q has shape (3, 4, 6), expected (batch, seq, heads, n)"),
    (lambda: call(q=Q.astype(np.float64)), TypeError, "pass q.astype(np.float32)"),
    (lambda: call(k=Q.astype(np.float16)), TypeError, "k has dtype float16, expected float32"),
    (lambda: call(k=Q[..., :5]), ValueError, "k has shape (2, 3, 4, 5), expected (2, 3, k_heads, 6)"),
    (lambda: call(v=V[:, :2]), ValueError, "v has shape (2, 2, 4, 5), expected (2, 3, heads, p)"),
    (lambda: call(v=V[..., ::2]), ValueError, "v has stride 8 bytes on its last axis"),
    (lambda: call(k=Q[:, :, :3]), ValueError, "v has 4 heads, expected a multiple of k's 3"),
    (lambda: call(q=Q[:, :, :3]), ValueError, "q has 3 heads, expected a multiple or a divisor of v's 4"),
    (lambda: call(q=np.ones((2, 3, 6, 6), np.float32)), ValueError,
     "q has 6 heads, expected a multiple or a divisor of v's 4"),
    (lambda: call(g=G[:1]), ValueError, "g has shape (1, 3, 4), expected (2, 3, 4)"),
    (lambda: call(g=V), ValueError, "g has shape (2, 3, 4, 5), expected (2, 3, 4, 6)"),
    (lambda: call(beta=G[..., :1]), ValueError, "beta has shape (2, 3, 1), expected (2, 3, 4)"),
    (lambda: call(g=G.astype(np.int32)), TypeError, "g has dtype int32"),
    (lambda: call(rule="delta net"), ValueError,
     "rule is 'delta net', expected one of gated_delta, gated, delta, linear"),
    (lambda: call(rule=["delta"]), ValueError, "rule is ['delta'], expected one of"),
    (lambda: call(g=None), ValueError, "g is None, expected an array with rule='gated_delta'"),
    (lambda: call(beta=None), ValueError, "beta is None, expected an array with rule='gated_delta'"),
    (lambda: call(rule="delta"), ValueError, "g is given, expected None with rule='delta'"),
    (lambda: call(rule="gated"), ValueError, "beta is given, expected None with rule='gated'"),
    (lambda: call(rule="linear", beta=None), ValueError, "g is given, expected None with rule='linear'"),
    (lambda: call(scale="x"), TypeError, "scale is 'x', expected a number"),
    (lambda: call(state=STATE.swapaxes(2, 3).copy()), ValueError,
     "state has shape (2, 4, 5, 6), expected (2, 4, 6, 5)"),
    (lambda: call(state=STATE.astype(np.float16)), TypeError, "state has dtype float16, expected float32"),
    (lambda: call(out=V), TypeError, "out is a ndarray, expected a pair (y, state)"),
    (lambda: call(q=(q := Q.copy()), v=Q, out=(q, None)), ValueError, "out overlaps q; pass an array of its own"),
])
def test_a_refused_call_says_why(wrong, error, message):
    with pytest.raises(error) as caught:
        wrong()
    assert str(caught.value).startswith("gated_delta: ") and message in str(caught.value)
