"""Parts whose matrices come one by one, each in its own format, compute what they compute from joined ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from forge_c import pack, pack_gated, rope_table
from forge_c.functional import AttentionPart, AttentionState, LayeredModel, MLPPart, Norm, PackedWeight, StateTable
from forge_c.state.kv import KVCache

Array = NDArray[Any]
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB = 64, 3, 1, 12, 40, 50
COLUMNS = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
DTYPES = ("float32", "bfloat16", "int8")


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, np.float32) / np.float32(8)


def logits(rng: np.random.Generator, qkv: Any, up: Any, seq: int, **biases: Array | None) -> Array:
    """Of one layer; everything but qkv and up is drawn from rng."""
    norm = Norm("rms", HIDDEN, normal(rng, HIDDEN) + 1)
    mixer = AttentionPart(qkv, pack(normal(rng, COLUMNS[0], HIDDEN)), heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM,
                          norm=norm, q_norm=Norm("rms", HEAD_DIM, normal(rng, HEAD_DIM)), scale=0.3,
                          qkv_bias=biases.get("qkv_bias"))
    mlp = MLPPart(up, pack(normal(rng, INNER, HIDDEN)), norm=norm, activation="gelu", up_bias=biases.get("up_bias"))
    model = LayeredModel(normal(rng, VOCAB, HIDDEN), [(mixer, mlp, False, 1.0)], norm, pack(normal(rng, HIDDEN, VOCAB)))
    cache = KVCache(2, 32, KV_HEADS, HEAD_DIM)
    cache.reserve(np.zeros(2, np.int64), np.full(2, seq))
    states = StateTable([AttentionState(cache._pages, rope_table(HEAD_DIM, 32))])
    ids = np.random.default_rng(1).integers(0, VOCAB, (2, seq))
    return model.forward(ids, states, np.zeros(2, np.int64))[0]


def seeded() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize("seq", [1, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_keys_and_values_from_matrices_of_their_own(isa, rng, dtype, seq):
    """A column's bits do not depend on which matrix holds it."""
    parts, up = [normal(rng, HIDDEN, n) for n in COLUMNS], pack(normal(rng, HIDDEN, INNER))
    bias = normal(rng, sum(COLUMNS))
    joined = logits(seeded(), pack(np.concatenate(parts, axis=1), dtype), up, seq, qkv_bias=bias)
    two = pack(np.concatenate(parts[:2], axis=1), dtype), pack(parts[2], dtype)
    for given in ([pack(w, dtype) for w in parts], two):
        assert logits(seeded(), given, up, seq, qkv_bias=bias).tobytes() == joined.tobytes()


def test_formats_may_differ(rng):
    """As if each matrix were what its format rounds it to, in float32."""
    parts, up = [pack(normal(rng, HIDDEN, n), t) for n, t in zip(COLUMNS, DTYPES, strict=True)], pack(
        normal(rng, HIDDEN, INNER))
    exact = np.concatenate([p.unpack() for p in parts], axis=1)
    np.testing.assert_allclose(logits(seeded(), parts, up, 5), logits(seeded(), pack(exact), up, 5), atol=0.05)


@pytest.mark.parametrize("seq", [1, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gated_pair_from_two_matrices(isa, rng, dtype, seq):
    qkv, bias = pack(normal(rng, HIDDEN, sum(COLUMNS))), normal(rng, 2, INNER)
    gate, up = normal(rng, HIDDEN, INNER), normal(rng, HIDDEN, INNER)
    joined = logits(seeded(), qkv, pack_gated(gate, up, dtype), seq, up_bias=bias)
    apart = logits(seeded(), qkv, (pack(gate, dtype), pack(up, dtype)), seq, up_bias=bias)
    assert apart.tobytes() == joined.tobytes()


def test_what_is_no_part_is_refused(rng):
    w = {n: pack(normal(rng, HIDDEN, n)) for n in (*COLUMNS, INNER, sum(COLUMNS))}
    out, down = pack(normal(rng, COLUMNS[0], HIDDEN)), pack(normal(rng, INNER, HIDDEN))
    pair = pack_gated(normal(rng, HIDDEN, INNER), normal(rng, HIDDEN, INNER))

    def attention(qkv: Any, **more: Any) -> AttentionPart:
        return AttentionPart(qkv, out, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, **more)

    three: list[PackedWeight] = [w[n] for n in COLUMNS]
    for qkv in ((), [*three, w[12]], [None, *three], "qkv", [pair, w[12]]):
        with pytest.raises(TypeError, match="^AttentionPart: qkv is .*expected a PackedWeight, or up to 3"):
            attention(qkv)
    for qkv in (w[36], three[:2], [w[12]] * 2):
        with pytest.raises(ValueError, match="^AttentionPart: qkv has shapes .*expected 60 columns"):
            attention(qkv)
    with pytest.raises(ValueError, match="^AttentionPart: qkv has shape"):
        attention([pack(normal(rng, 60, 36)), *three[1:]])
    with pytest.raises(ValueError, match="^AttentionPart: qkv_bias has 59 values, expected 60"):
        attention(three, qkv_bias=np.zeros(59))
    with pytest.raises(TypeError, match="^MLPPart: up is .*up to 2"):
        MLPPart([w[INNER], pair], down)
    with pytest.raises(ValueError, match=r"^MLPPart: gate has shape \(64, 36\), expected \(64, 40\)"):
        MLPPart([w[36], w[INNER]], down)
