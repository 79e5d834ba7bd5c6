"""Grouped-query attention over 8 key/value heads: causal prompts, and new tokens against many keys."""
from __future__ import annotations

import pytest

DTYPES = {"float32": 4, "bfloat16": 2}
STORED = DTYPES | {"int8": 1 + 4 / 128}  # bytes a number in a cache, with a share of its token's scale
HEADS, KV_HEADS, DIM = 32, 8, 128
LARGE = pytest.mark.large
KEYS = [512, 4096, *(pytest.param(keys, marks=LARGE) for keys in (32768, 131072))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seq", "dim"), [(512, 64), (512, DIM), pytest.param(2048, 64, marks=LARGE),
                                           pytest.param(2048, DIM, marks=LARGE), pytest.param(8192, DIM, marks=LARGE)])
def test_prefill(bench, normal, seq, dim, dtype):
    q, (k, v) = normal(1, seq, HEADS, dim), normal(2, 1, seq, KV_HEADS, dim)
    size = DTYPES[dtype]
    case = f"attention, causal, L {seq}" + (f", heads of {dim}" if dim != DIM else "")
    bench("attention", q, k, v, case=case, dtype=dtype, written=q.size * size, hot=True,
          read=(q.size + k.size + v.size) * size, flops=4 * HEADS * dim * seq * (seq + 1) // 2,
          curve=f"causal prompt, heads of {dim}", length=seq)


@pytest.mark.parametrize("seq", [512, pytest.param(2048, marks=LARGE)])
def test_prefill_blocked(bench, normal, seq):
    """NumPy with the blocking of the others written by hand."""
    q, (k, v) = normal(1, seq, HEADS, DIM), normal(2, 1, seq, KV_HEADS, DIM)
    bench("attention_blocked", q, k, v, case=f"attention, causal, L {seq}", variant="float32, blocked by hand",
          written=q.nbytes, hot=True, read=q.nbytes + k.nbytes + v.nbytes,
          flops=4 * HEADS * DIM * seq * (seq + 1) // 2)


@pytest.mark.parametrize("window", [256, pytest.param(1024, marks=LARGE)])
def test_window(bench, normal, window):
    seq = 4096
    q, (k, v) = normal(1, seq, HEADS, DIM), normal(2, 1, seq, KV_HEADS, DIM)
    seen = window * (window + 1) // 2 + (seq - window) * window
    bench("windowed", q, k, v, case=f"attention, causal, L {seq}, window of {window}", window=window, written=q.nbytes,
          hot=True, read=q.nbytes + k.nbytes + v.nbytes, flops=4 * HEADS * DIM * seen)


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("keys", KEYS)
def test_decode(bench, normal, keys, dtype):
    q, (k, v) = normal(1, 1, HEADS, DIM), normal(2, 1, keys, KV_HEADS, DIM)
    bench("decode", q, k, v, case=f"attention, one token against {keys} keys", dtype=dtype,
          read=int((k.size + v.size) * STORED[dtype]), written=q.size * 4, flops=4 * HEADS * DIM * keys,
          curve="one token", length=keys)


@pytest.mark.large
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize(("heads", "tokens"), [(8, 1), (8, 2), (8, 8), (32, 2), (32, 8), (64, 1)])
def test_verify(bench, normal, heads, tokens, dtype):
    """Other ratios of heads, and several tokens at once as speculative decoding verifies them."""
    keys = 32768
    q, (k, v) = normal(1, tokens, heads, DIM), normal(2, 1, keys, KV_HEADS, DIM)
    bench("verify", q, k, v, case=f"attention, {tokens} of {heads} heads against {keys} keys", dtype=dtype,
          read=int((k.size + v.size) * STORED[dtype]), written=q.size * 4, flops=4 * heads * DIM * keys * tokens)


@pytest.mark.large
@pytest.mark.parametrize("dtype", DTYPES)
def test_uneven(bench, normal, dtype):
    """A batch whose rows have different lengths: the work is that of the tokens there are."""
    lens = (16384, 4096, 1024, 256, 8192, 512, 2048, 128)
    q, (k, v) = normal(len(lens), 1, HEADS, DIM), normal(2, len(lens), max(lens), KV_HEADS, DIM)
    numbers = 2 * sum(lens) * KV_HEADS * DIM
    bench("uneven", q, k, v, case=f"attention, 8 rows of 128 to {max(lens)} keys", dtype=dtype, lens=lens,
          read=numbers * DTYPES[dtype], written=q.size * 4, flops=4 * HEADS * DIM * sum(lens))
