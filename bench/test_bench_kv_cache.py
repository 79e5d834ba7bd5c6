"""Appending keys and values (8 heads of 128 channels) to a cache that holds 1024 tokens: one token, and a chunk."""
from __future__ import annotations

import pytest

DTYPES = {"float32": 4, "bfloat16": 2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 512])
def test_append(bench, normal, tokens, dtype):
    k, v = normal(2, 1, tokens, 8, 128)
    bench("kv_append", k, v, past=1024, room=4096, case=f"KVCache.append, {tokens} tokens", dtype=dtype,
          read=k.nbytes + v.nbytes, written=(k.size + v.size) * DTYPES[dtype], hot=True)
