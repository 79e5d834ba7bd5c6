"""Grouped-query attention, 32 query heads over 8 key/value heads: causal prompts, and new tokens against many keys."""
from __future__ import annotations

import pytest

DTYPES = {"float32": 4, "bfloat16": 2}
HEADS, KV_HEADS, DIM = 32, 8, 128
KEYS = [512, 4096, *(pytest.param(keys, marks=pytest.mark.large) for keys in (32768, 131072))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, DIM])
@pytest.mark.parametrize("seq", [512, pytest.param(2048, marks=pytest.mark.large)])
def test_prefill(bench, normal, seq, dim, dtype):
    q, (k, v) = normal(1, seq, HEADS, dim), normal(2, 1, seq, KV_HEADS, dim)
    size = DTYPES[dtype]
    case = f"attention, causal, L {seq}" + (f", heads of {dim}" if dim != DIM else "")
    bench("attention", q, k, v, case=case, dtype=dtype, written=q.size * size, hot=True,
          read=(q.size + k.size + v.size) * size, flops=4 * HEADS * dim * seq * (seq + 1) // 2)


@pytest.mark.parametrize("seq", [512, pytest.param(2048, marks=pytest.mark.large)])
def test_prefill_blocked(bench, normal, seq):
    """NumPy with the blocking of the others written by hand."""
    q, (k, v) = normal(1, seq, HEADS, DIM), normal(2, 1, seq, KV_HEADS, DIM)
    bench("attention_blocked", q, k, v, case=f"attention, causal, L {seq}", variant="float32, blocked by hand",
          written=q.nbytes, hot=True, read=q.nbytes + k.nbytes + v.nbytes,
          flops=4 * HEADS * DIM * seq * (seq + 1) // 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", KEYS)
def test_decode(bench, normal, keys, dtype):
    q, (k, v) = normal(1, 1, HEADS, DIM), normal(2, 1, keys, KV_HEADS, DIM)
    bench("decode", q, k, v, case=f"attention, one token against {keys} keys", dtype=dtype,
          read=(k.size + v.size) * DTYPES[dtype], written=q.size * DTYPES[dtype], flops=4 * HEADS * DIM * keys)
