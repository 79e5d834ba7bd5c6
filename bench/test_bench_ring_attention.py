"""Attention over ranks that are threads of one process, which together have as many threads as the others: on one
machine ranks bring no speed, and these say what they cost. bench/ring.py measures processes."""
from __future__ import annotations

import pytest

HEADS, KV_HEADS, DIM = 8, 2, 64
LARGE = pytest.mark.large
STORED = {"float32": 4, "bfloat16": 2, "int8": 1 + 4 / DIM}


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=LARGE)])
@pytest.mark.parametrize(("way", "layout"), [("ring", "zigzag"), pytest.param("ring", "striped", marks=LARGE),
                                             pytest.param("ring", "contiguous", marks=LARGE), ("gathered", "zigzag"),
                                             ("ulysses", "zigzag")])
@pytest.mark.parametrize("seq", [2048, pytest.param(8192, marks=LARGE)])
def test_prefill(bench, normal, seq, way, layout, ranks):
    q, (k, v) = normal(1, seq, HEADS, DIM), normal(2, 1, seq, KV_HEADS, DIM)
    bench("over_ranks", q, k, v, case=f"attention, causal, L {seq}, over ranks", way=way, ranks=ranks, layout=layout,
          variant=f"{way}, {layout}, {ranks} ranks", written=q.nbytes, hot=True, read=q.nbytes + k.nbytes + v.nbytes,
          flops=4 * HEADS * DIM * seq * (seq + 1) // 2)


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=LARGE)])
@pytest.mark.parametrize("keys", [4096, pytest.param(131072, marks=LARGE)])
def test_decode(bench, normal, keys, ranks, dtype):
    q, (k, v) = normal(1, 1, HEADS, DIM), normal(2, 1, keys, KV_HEADS, DIM)
    bench("decode_over_ranks", q, k, v, case=f"attention, one token against {keys} keys on ranks", dtype=dtype,
          variant=f"{dtype}, {ranks} ranks", ranks=ranks, read=int((k.size + v.size) * STORED[dtype]),
          written=q.nbytes, flops=4 * HEADS * DIM * keys)
