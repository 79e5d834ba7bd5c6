"""ModernTransformerBlock at the mission's sizes (768 channels, 12 heads over 3): a prompt, and a token after 1024."""
from __future__ import annotations

import pytest
from test_bench_rope import tables

D, HEADS, KV_HEADS, HIDDEN = 768, 12, 3, 2048
DTYPES = {"float32": 4, "bfloat16": 2}


@pytest.fixture
def weights(normal):
    kv = KV_HEADS * D // HEADS
    shapes = {"q": (D, D), "k": (D, kv), "v": (D, kv), "o": (D, D), "gate": (D, HIDDEN), "up": (D, HIDDEN),
              "down": (HIDDEN, D)}
    cos, sin = tables(2048, D // HEADS)
    return {name: normal(*shape, scale=shape[0] ** -0.5) for name, shape in shapes.items()} | {
        "norm1": normal(D), "norm2": normal(D), "cos": cos, "sin": sin, "eps": 1e-6, "heads": HEADS,
        "kv_heads": KV_HEADS}


def products(weights) -> int:
    return sum(w.size for name, w in weights.items() if name not in ("cos", "sin") and getattr(w, "ndim", 0) == 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prompt(bench, normal, weights, dtype):
    seq, size = 512, products(weights)
    bench("block", normal(1, seq, D), weights, case=f"transformer block, {seq} tokens", dtype=dtype, hot=True,
          read=size * DTYPES[dtype] + 4 * seq * D, written=4 * seq * D, tokens=seq,
          flops=2 * seq * size + 4 * D * seq * (seq + 1) // 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_token(bench, normal, weights, dtype):
    past, size = normal(2, 1, 1024, KV_HEADS, D // HEADS), products(weights)
    bench("block", normal(1, 1, D), weights, past=tuple(past), case="transformer block, one token after 1024",
          dtype=dtype, read=size * DTYPES[dtype] + past.nbytes, written=4 * D, tokens=1,
          flops=2 * size + 4 * D * 1025)
