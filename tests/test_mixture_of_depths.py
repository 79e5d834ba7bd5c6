"""Mixture of depths: which tokens are chosen, to the last tie; and the layer, whose others pass by bit for bit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import reference as ref
from guard import guarded_copy
from suite import case

import forge_c as fc
from forge_c import functional, nn
from forge_c.nn.mixture_of_depths import RaggedCache

LENGTHS = (*range(1, 67), 127, 128, 129, 255, 256, 257, 768, 2049)
MODES = ("threshold", "predictor")


def whole(rng, *shape, dtype=np.float32, most=4):
    """Small whole numbers: sums of their products are exact, and equal ones are many."""
    return rng.integers(-most, most + 1, shape).astype(np.float32).astype(dtype)


def normal(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape, np.float32).astype(dtype)


# ---- the op ------------------------------------------------------------------------------------------


def test_golden_numbers(isa, dtype):
    x = np.array([[[1, 2], [3, -1], [0, 0], [2, 0], [1, 1], [5, 5]]], dtype)
    indices, gate = fc.route_tokens(x, np.array([1.0, 0.5], np.float32), capacity=0.5)
    assert indices.tolist() == [[0, 1, 5]] and gate.tolist() == [[2.0, 2.5, 7.5]]
    assert indices.dtype == np.int64 and gate.dtype == np.float32


def test_the_largest_with_all_ties(isa, dtype, rng):
    for seq in (1, 2, 7, 8, 63, 257, 1000):
        x, weight = whole(rng, 3, seq, 24, dtype=dtype), whole(rng, 24)
        for capacity in (1e-9, 0.125, 0.29, 0.5, 0.999, 1):
            with case(seq, capacity):
                want = ref.route_tokens(x, weight, capacity)
                for got, expected in zip(fc.route_tokens(x, weight, capacity=capacity), want, strict=True):
                    np.testing.assert_array_equal(got, expected)


def test_an_eighth_by_default(rng):
    assert fc.route_tokens(normal(rng, 2, 2048, 8), normal(rng, 8))[0].shape == (2, 256)
    assert fc.route_tokens(normal(rng, 2, 15, 8), normal(rng, 8))[0].shape == (2, 1)


def test_of_equal_ones_the_first(isa):
    for value in (0.0, -3.0, np.inf, -np.inf, np.nan):
        indices, gate = fc.route_tokens(np.full((2, 9, 1), value, np.float32), np.ones(1, np.float32), capacity=0.5)
        assert indices.tolist() == [[0, 1, 2, 3]] * 2
        np.testing.assert_array_equal(gate, np.full((2, 4), value, np.float32))


def test_zeros_of_both_signs_are_equal():
    x = np.array([-0.0, 0.0, -0.0, 0.0, -1.0], np.float32).reshape(1, 5, 1)
    assert fc.route_tokens(x, np.ones(1, np.float32), capacity=0.6)[0].tolist() == [[0, 1, 2]]


def test_nan_is_less_than_any_number_and_infinity_more(isa, dtype):
    x = np.array([np.nan, -np.inf, 3, np.nan, np.inf, -5, 2], np.float32).astype(dtype).reshape(1, 7, 1)
    one = np.ones(1, np.float32)
    for capacity, want in ((0.3, [2, 4]), (0.6, [2, 4, 5, 6]), (0.75, [1, 2, 4, 5, 6]), (0.9, [0, 1, 2, 4, 5, 6])):
        indices, gate = fc.route_tokens(x, one, capacity=capacity)
        assert indices.tolist() == [want]
        np.testing.assert_array_equal(gate, x[:, want, 0].astype(np.float32))


def test_every_order_of_many_sizes_of_numbers(rng):
    """Also those that differ in the last bit, the least and the largest."""
    edges = [np.inf, -np.inf, 1e-45, -1e-45, 3e38, 1.0, *np.nextafter(np.float32(1), np.float32([0, 2]))]
    r = np.concatenate([np.ldexp(normal(rng, 200), rng.integers(-148, 127, 200)), edges]).astype(np.float32)
    for _ in range(20):
        rng.shuffle(r)
        for capacity in rng.random(5):
            want = ref.route_tokens(r[None, :, None], [1.0], capacity)[0]
            got = fc.route_tokens(r[None, :, None], np.ones(1, np.float32), capacity=capacity)[0]
            np.testing.assert_array_equal(got, want)


def test_every_length_between_guard_pages(isa, dtype, rng, assert_close):
    for n in LENGTHS:
        x, weight = normal(rng, 2, 3, n, dtype=dtype), normal(rng, n)
        want = ref.route_tokens(x, weight, 1)[1]
        magnitude = np.abs(ref.f64(x)) @ np.abs(ref.f64(weight))
        results = []
        for at_end in (False, True):
            got = fc.route_tokens(guarded_copy(x, at_end=at_end), guarded_copy(weight, at_end=at_end), capacity=1)[1]
            assert_close("router_logits", got, want, n=n, magnitude=magnitude, case=str(n))
            results.append(got.tobytes())
        assert results[0] == results[1]


def test_layouts_weights_and_rows(isa, dtype, rng, each_thread_count):
    """Strides, batches and threads change no bit; the weight may be of any float dtype."""
    x, weight = normal(rng, 6, 300, 40, dtype=dtype), normal(rng, 40)
    want = fc.route_tokens(x, weight)
    views = {"reversed": x[:, ::-1].copy()[:, ::-1], "transposed": x.transpose(1, 0, 2).copy().transpose(1, 0, 2),
             "inside": np.pad(x, ((0, 0), (0, 0), (3, 5)))[:, :, 3:-5]}
    for _ in each_thread_count():
        for name, view in {"itself": x, **views}.items():
            with case(name):
                got = fc.route_tokens(view, weight)
                assert all(g.tobytes() == w.tobytes() for g, w in zip(got, want, strict=True))
    for b in range(6):
        got = fc.route_tokens(x[b : b + 1], weight)
        assert all(g.tobytes() == w[b].tobytes() for g, w in zip(got, want, strict=True))
    half = weight.astype(dtype)
    got, want = fc.route_tokens(x, half), fc.route_tokens(x, half.astype(np.float32))
    assert all(g.tobytes() == w.tobytes() for g, w in zip(got, want, strict=True))


def test_nothing_to_choose_from():
    for shape, count in (((0, 5, 3), 1), ((2, 0, 3), 0), ((0, 0, 3), 0)):
        indices, gate = fc.route_tokens(np.ones(shape, np.float32), np.ones(3, np.float32))
        assert indices.shape == gate.shape == (shape[0], count)
    indices, gate = fc.route_tokens(np.ones((1, 8, 0), np.float32), np.ones(0, np.float32), capacity=0.25)
    assert indices.tolist() == [[0, 1]] and gate.tolist() == [[0, 0]]


@pytest.mark.parametrize(("change", "error", "reason"), [
    ({"x": np.ones((2, 3), np.float32)}, ValueError, r"x has shape \(2, 3\), expected \(batch, seq, channels\)"),
    ({"x": np.ones((1, 2, 3))}, TypeError, "x has dtype float64, expected float32, float16 or bfloat16"),
    ({"x": None}, TypeError, "x is a NoneType"),
    ({"weight": np.ones(4, np.float32)}, ValueError, r"weight has shape \(4,\), expected \(3,\)"),
    ({"weight": np.ones((3, 1), np.float32)}, ValueError, r"weight has shape \(3, 1\), expected \(3,\)"),
    ({"weight": None}, TypeError, r"weight is None, expected an array \(3,\)"),
    ({"capacity": 0}, ValueError, "capacity is 0, expected a number above 0 and at most 1"),
    ({"capacity": 1.01}, ValueError, "capacity is 1.01, expected"),
    ({"capacity": float("nan")}, ValueError, "capacity is nan, expected"),
    ({"capacity": "all"}, TypeError, "capacity is 'all', expected a number"),
])
def test_mistakes(change, error, reason):
    given = {"x": np.ones((1, 2, 3), np.float32), "weight": np.ones(3, np.float32), "capacity": 0.5} | change
    with pytest.raises(error, match=f"^route_tokens: {reason}"):
        fc.route_tokens(given["x"], given["weight"], capacity=given["capacity"])


def test_the_way_back(isa, dtype, rng, assert_close, each_thread_count):
    for n in (1, 3, 16, 33, 300):
        x, y, gate = normal(rng, 50, n, dtype=dtype), normal(rng, 20, n, dtype=dtype), normal(rng, 20)
        gate[:2] = 0, 1
        rows = rng.permutation(50)[:20]
        r = ref.f64(gate)[:, None]
        want = ref.f64(x[rows]) + r * (ref.f64(y) - ref.f64(x[rows]))
        magnitude = (1 + abs(r)) * abs(ref.f64(x[rows])) + abs(r * ref.f64(y))
        for _ in each_thread_count():
            out = x.copy()
            functional._gate_update(out, y, gate, rows)
            assert_close("gate_update", out[rows], want, magnitude=magnitude)
            assert (out[rows[0]] == x[rows[0]]).all() and (out[rows[1]] == y[1]).all()
            rest = np.delete(np.arange(50), rows)
            assert out[rest].tobytes() == x[rest].tobytes()


# ---- the layer ---------------------------------------------------------------------------------------


def made(rng, mode="topk", capacity=0.3, d=48, **options):
    """A layer around a block whose weights matter."""
    block = nn.ModernTransformerBlock(d, 4, 2, max_seq_len=2048, base=100.0, eps=1e-5, seed=rng)
    block.attention.W_q, block.attention.W_k = (3 * w for w in (block.attention.W_q, block.attention.W_k))
    return nn.MixtureOfDepths(block, d, capacity, mode, seed=rng, **options)


def formula(block):
    """block(tokens (n, d), positions (n,)) in float64."""
    a, f = block.attention, block.ffn

    def compute(x, at):
        n = len(x)
        normed = ref.rms_norm(x, block.norm1.weight, block.norm1.eps)
        q, k, v = (ref.linear(normed, w).reshape(1, n, -1, a.head_dim) for w in (a.W_q, a.W_k, a.W_v))
        q, k = (ref.rope(y, block.rope.table.cos, block.rope.table.sin, at) for y in (q, k))
        h = x + ref.linear(ref.attention(q, k, v, causal=True)[0].reshape(n, -1), a.W_o)
        normed = ref.rms_norm(h, block.norm2.weight, block.norm2.eps)
        return h + ref.linear(ref.linear(normed, f.W_gate) * ref.silu(ref.linear(normed, f.W_up)), f.W_down)

    return compute


def chosen_by(layer, x):
    """(batch, seq) bool, in float64."""
    if layer.mode == "topk":
        chosen = np.zeros(x.shape[:2], bool)
        np.put_along_axis(chosen, ref.route_tokens(x, layer.router, layer.capacity)[0], True, axis=1)
        return chosen
    if layer.mode == "threshold":
        return ref.f64(x) @ ref.f64(layer.router) > layer.threshold
    p = layer.predictor
    return ref.silu(ref.linear(ref.f64(x), p.W_up) + ref.f64(p.b_up)) @ ref.f64(p.w_down) + p.b_down[0] > 0


@pytest.mark.parametrize("mode", ["topk", *MODES])
def test_the_formula(isa, dtype, rng, mode):
    layer, x = made(rng, mode), normal(rng, 2, 40, 48, dtype=dtype)
    if mode == "predictor":
        layer.predictor.b_up = normal(rng, layer.predictor.hidden_dim)
    chosen = chosen_by(layer, x)
    assert 0 < chosen.sum(axis=1).min() and chosen.sum(axis=1).max() < 40
    got, want = layer(x), ref.mixture_of_depths(x, layer.router, formula(layer.block), chosen)
    assert got.dtype == x.dtype and got[~chosen].tobytes() == x[~chosen].tobytes()
    half_ulp = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype.name]
    gate = 1 + np.abs(ref.f64(x) @ ref.f64(layer.router)).max()
    bound = gate * (300 * 2.0**-24 + 8 * half_ulp) * abs(want).max()
    np.testing.assert_allclose(ref.f64(got), want, rtol=0, atol=bound)


def test_capacity_1_with_gate_1_is_the_dense_block(isa, dtype, rng):
    x = normal(rng, 2, 300, 48, dtype=dtype)
    x[..., 0] = 1
    for mode in ("topk", "threshold"):
        layer = made(rng, mode, 1.0)
        layer.router = np.eye(48)[0]
        np.testing.assert_array_equal(layer(x), layer.block(x))


def test_the_chosen_see_only_each_other_at_their_own_positions(rng):
    """As if the others had never been, but for the positions."""
    layer, x = made(rng), normal(rng, 1, 64, 48)
    at, gate = fc.route_tokens(x, layer.router, capacity=0.3)
    y = layer.block(x[:, at[0]], positions=at[0])
    want = x[:, at[0]] + gate[..., None] * (y - x[:, at[0]])
    np.testing.assert_allclose(layer(x)[:, at[0]], want, atol=1e-5)
    assert np.abs(y - layer.block(x[:, at[0]])).max() > 1e-3
    other = x + normal(rng, 1, 64, 48) * ~np.isin(np.arange(64), at[0])[None, :, None] * 1e-3
    assert layer(other)[:, at[0]].tobytes() == layer(x)[:, at[0]].tobytes()


@pytest.mark.parametrize("mode", ["topk", *MODES])
def test_a_token_of_nan_passes_by_and_spoils_nobody(rng, mode):
    layer, x = made(rng, mode), normal(rng, 1, 40, 48)
    x[0, 5] = np.nan
    y = layer(x)
    assert y[0, 5].tobytes() == x[0, 5].tobytes() and np.isfinite(np.delete(y[0], 5, axis=0)).all()


def test_topk_is_not_causal_and_the_others_are(rng):
    """A last token that is chosen takes the place of an earlier one."""
    x = normal(rng, 1, 40, 48)
    for mode in ("topk", *MODES):
        layer = made(rng, mode)
        last = x.copy()
        last[0, -1] = 20 * np.sign(layer.router)
        before, after = layer(x)[:, :-1], layer(last)[:, :-1]
        assert (before.tobytes() == after.tobytes()) == (mode != "topk")


@pytest.mark.parametrize("mode", MODES)
def test_prompt_pieces_and_tokens_give_the_same_bits(isa, dtype, rng, mode):
    layer, x = made(rng, mode), normal(rng, 2, 700, 48, dtype=dtype)
    want = layer(x)
    assert (want != x).any(axis=2).sum(axis=1).min() > 300  # more than a page
    for cuts in ([0, 700], [0, 1, 2, 3, 300, 599, 600, 700], [0, 650, *range(651, 701)]):
        cache, parts = None, []
        for a, b in zip(cuts[:-1], cuts[1:], strict=True):
            y, cache = layer(x[:, a:b], use_cache=True, kv_cache=cache)
            parts.append(y)
        assert np.concatenate(parts, axis=1).tobytes() == want.tobytes()
        assert cache.seen.tolist() == [700, 700]
    for b in range(2):
        assert layer(x[b : b + 1]).tobytes() == want[b].tobytes()


@pytest.mark.parametrize("mode", MODES)
def test_the_cache_holds_what_went_through_alone(rng, mode):
    layer, x = made(rng, mode), normal(rng, 3, 50, 48)
    x[2] = x[2, 0] * (1 if not chosen_by(layer, x)[2, 0] else -1)
    chosen = chosen_by(layer, x)
    assert not chosen[2].any()
    _, cache = layer(x, use_cache=True)
    assert [at.tolist() for at in cache.positions] == [np.flatnonzero(row).tolist() for row in chosen]
    assert [0 if c is None else c.seq_len for c in cache.caches] == cache.lengths.tolist() == chosen.sum(1).tolist()
    assert cache.nbytes == sum(c.nbytes for c in cache.caches[:2]) and "seen=[50, 50, 50]" in repr(cache)


def test_back_and_apart(rng):
    layer, x = made(rng, "threshold"), normal(rng, 2, 60, 48)
    want = layer(x)
    _, cache = layer(x[:, :50], use_cache=True)
    twin, third = copy.copy(cache), copy.deepcopy(cache)
    layer(x[:, :10], kv_cache=cache)
    cache.truncate([20, 35])
    assert cache.seen.tolist() == [20, 35] and all(len(p) == 0 or p[-1] < n for p, n in zip(cache.positions, [20, 35],
                                                                                           strict=True))
    cache.truncate(20)
    assert layer(x[:, 20:], kv_cache=cache)[0].tobytes() == want[:, 20:].tobytes()
    for other in (twin, third):
        assert layer(x[:, 50:], kv_cache=other)[0].tobytes() == want[:, 50:].tobytes()
    with pytest.raises(ValueError, match=r"RaggedCache.truncate: n is 61, expected 0 to 60"):
        twin.truncate(61)
    twin.truncate(0)
    assert layer(x, kv_cache=twin)[0].tobytes() == want.tobytes()


def test_a_call_that_raises_leaves_the_cache_as_it_was(rng, monkeypatch):
    layer, x = made(rng, "threshold"), normal(rng, 2, 60, 48)
    want = layer(x)
    _, cache = layer(x[:, :40], use_cache=True)
    real, calls = nn.SwiGLU.forward, []

    def fails_at_the_second(self, *args, **options):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *args, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(nn.SwiGLU, "forward", fails_at_the_second)
        layer(x[:, 40:], kv_cache=cache)
    assert cache.seen.tolist() == [40, 40]
    assert layer(x[:, 40:], kv_cache=cache)[0].tobytes() == want[:, 40:].tobytes()


@pytest.mark.parametrize("mode", ["topk", *MODES])
@pytest.mark.parametrize("shape", [(2, 4, 40, 40), (2, 1, 1, 40), (40, 40), (1, 1, 40, 1), (4, 40, 40)])
def test_a_mask_is_that_of_the_whole_text(rng, mode, shape):
    """The block gets its rows and columns of the tokens that go through, as a bool or added to the scores."""
    layer, x = made(rng, mode), normal(rng, 2, 40, 48)
    allowed = rng.random(shape) < 0.6
    added = np.where(allowed, normal(rng, *shape), -np.inf).astype(np.float32)
    plain, chosen = layer(x), chosen_by(layer, x)
    for mask in (allowed, added):
        whole, got = np.broadcast_to(mask, (2, 4, 40, 40)), layer(x, mask=mask)
        for b, at in enumerate(map(np.flatnonzero, chosen)):
            y = layer.block(x[b : b + 1, at], mask=whole[b : b + 1][:, :, at][..., at], positions=at)
            want, r = x[b].copy(), (x[b, at] @ layer.router)[:, None]
            want[at] = (1 - r) * x[b, at] + r * y[0]
            np.testing.assert_allclose(got[b], want, atol=1e-5)
        assert not np.array_equal(got, plain)
        if mode != "topk":
            cut = whole[:, :, :25, :25]
            a, cache = layer(x[:, :25], use_cache=True, mask=cut)
            b, cache = layer(x[:, 25:], kv_cache=cache, mask=whole[:, :, 25:])
            assert np.concatenate([a, b], axis=1).tobytes() == got.tobytes()


@pytest.mark.parametrize("block", [nn.SwiGLU(48, 60, seed=1), nn.GroupedQueryAttention(48, 4, 2, causal=True, seed=1),
                                   nn.MultiQueryAttention(48, 4, causal=True, seed=1)], ids=lambda b: type(b).__name__)
def test_any_layer_is_a_block(rng, block):
    layer, x = nn.MixtureOfDepths(block, 48, mode="threshold", seed=2), normal(rng, 2, 50, 48)
    chosen = chosen_by(layer, x)
    want = x.copy()
    for b in range(2):
        tokens = x[b : b + 1, chosen[b]]
        gate = (tokens @ layer.router)[..., None]
        want[b, chosen[b]] += (gate * (block(tokens) - tokens))[0]
    np.testing.assert_allclose(layer(x), want, atol=1e-5)
    y, cache = layer(x[:, :30], use_cache=True)
    z, cache = layer(x[:, 30:], kv_cache=cache)
    assert np.concatenate([y, z], axis=1).tobytes() == layer(x).tobytes()
    cache.truncate(30)
    assert layer(x[:, 30:], kv_cache=cache)[0].tobytes() == z.tobytes()


def test_formats_change_the_block_and_not_who_is_chosen(rng):
    for mode in ("topk", *MODES):
        layer, x = made(rng, mode, d=64), normal(rng, 1, 200, 64)
        small = layer.astype("int8")
        assert small.dtype == small.block.dtype == small.block.ffn.dtype == "int8"
        np.testing.assert_array_equal((small(x) != x).any(-1), (layer(x) != x).any(-1))
        assert np.abs(small(x) - layer(x)).max() < 0.05 and (small(x) != layer(x)).any()
        if mode == "predictor":
            assert small.predictor.dtype == "float32"
        again = small.load(layer.parameters())
        assert again is small and small.block.dtype == "int8"


def test_names():
    layer = nn.MixtureOfDepths(nn.SwiGLU(32, 20, bias=False, seed=0), 32, 0.25, "predictor", seed=0)
    assert list(layer.parameters()) == ["router", "block.W_up", "block.W_gate", "block.W_down", "predictor.W_up",
                                        "predictor.b_up", "predictor.w_down", "predictor.b_down"]
    assert {name: value.shape for name, value in layer.parameters().items() if name[:5] != "block"} == {
        "router": (32,), "predictor.W_up": (32, 16), "predictor.b_up": (16,), "predictor.w_down": (16,),
        "predictor.b_down": (1,)}
    assert repr(layer).startswith("MixtureOfDepths(d_model=32, capacity=0.25, mode='predictor', threshold=0.0")
    assert nn.MixtureOfDepths(nn.SwiGLU(32, 20), 32, seed=3).router.tolist() == nn.MixtureOfDepths(
        nn.SwiGLU(32, 20), 32, seed=3).router.tolist()


@pytest.mark.parametrize("mode", ["topk", *MODES])
def test_empty_inputs(rng, mode):
    layer = made(rng, mode)
    for shape in ((0, 5, 48), (2, 0, 48), (0, 0, 48)):
        assert layer(np.ones(shape, np.float32)).shape == shape
    if mode != "topk":
        y, cache = layer(np.ones((2, 0, 48), np.float32), use_cache=True)
        assert y.shape == (2, 0, 48) and cache.seen.tolist() == [0, 0]


@pytest.mark.parametrize(("options", "error", "reason"), [
    ({"mode": "best"}, ValueError, "mode is 'best', expected one of topk, threshold, predictor"),
    ({"capacity": 0}, ValueError, "capacity is 0, expected a number above 0 and at most 1"),
    ({"capacity": 2}, ValueError, "capacity is 2, expected"),
    ({"block": len}, TypeError, "block is a builtin_function_or_method, expected a layer"),
])
def test_a_layer_that_cannot_be(options, error, reason):
    given = {"block": nn.SwiGLU(8, 8), "d_model": 8} | options
    with pytest.raises(error, match=f"^MixtureOfDepths: {reason}"):
        nn.MixtureOfDepths(**given)


@pytest.mark.parametrize(("call", "error", "reason"), [
    (lambda m, x: m(x[0]), ValueError, r"x has shape \(9, 48\), expected \(batch, seq, 48\)"),
    (lambda m, x: m(x[..., :40]), ValueError, r"x has shape \(2, 9, 40\), expected \(batch, seq, 48\)"),
    (lambda m, x: m(x, kv_cache=RaggedCache(3)), ValueError, "kv_cache has 3 rows, expected 2 as x"),
    (lambda m, x: m(x, kv_cache=fc.KVCache(2, 9, 2, 12)), TypeError, "kv_cache is a KVCache, expected a RaggedCache"),
    (lambda m, x: made(np.random.default_rng(0))(x, use_cache=True), ValueError,
     "mode 'topk' chooses among all tokens of a sequence, which no cache has"),
    (lambda m, x: m(x, mask=np.ones((9, 8), bool)), ValueError,
     r"mask has shape \(9, 8\), expected one that broadcasts to \(2, heads, 9, 9\)"),
    (lambda m, x: m(x, kv_cache=m(x, use_cache=True)[1], mask=np.ones((9, 9), bool)), ValueError,
     r"mask has shape \(9, 9\), expected one that broadcasts to \(2, heads, 9, 18\)"),
    (lambda m, x: m(x, mask=np.ones((1, 1, 1, 9, 9), bool)), ValueError, r"mask has shape \(1, 1, 1, 9, 9\)"),
    (lambda m, x: nn.MixtureOfDepths(nn.SwiGLU(48, 8), 48)(x, mask=np.ones((9, 9), bool)), TypeError,
     "mask is given, and the block, SwiGLU, takes none; expected None"),
])
def test_calls_that_cannot_be(rng, call, error, reason):
    with pytest.raises(error, match=f"^MixtureOfDepths: {reason}"):
        call(made(rng, "threshold"), normal(rng, 2, 9, 48))


def test_positions_of_a_block(isa, dtype, rng):
    """Explicit positions that say what the default does give its bits, with a cache and without."""
    block, x = made(rng).block, normal(rng, 2, 30, 48, dtype=dtype)
    want = block(x)
    assert block(x, positions=np.arange(30)).tobytes() == want.tobytes()
    both = np.tile(np.arange(30), (2, 1))
    assert block(x, positions=both).tobytes() == want.tobytes()
    y, cache = block(x[:, :20], use_cache=True, positions=both[:, :20])
    z, cache = block(x[:, 20:], kv_cache=cache, positions=np.arange(20, 30))
    assert np.concatenate([y, z], axis=1).tobytes() == want.tobytes()
    got, want = block(x[:1], positions=3 * np.arange(30))[0], formula(block)(ref.f64(x[0]), 3 * np.arange(30))
    bound = {"float32": 1e-5, "float16": 0.02, "bfloat16": 0.15}[dtype.name]
    np.testing.assert_allclose(ref.f64(got), want, rtol=0, atol=bound)
    for wrong in (np.arange(29), np.zeros((3, 30), int), np.arange(30.0)):
        with pytest.raises(ValueError, match="GroupedQueryAttention: positions has shape"):
            block(x, positions=wrong)
    with pytest.raises(IndexError, match="position 2048 is outside the table"):
        block(x[:, :1], positions=np.array([2048]))
