"""The embedded model: a prompt of 512 bytes, and 64 bytes decoded one at a time. All of it stays in cache."""
from __future__ import annotations

import json

import numpy as np
import pytest

DTYPES = {"float32": 4, "bfloat16": 2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "tokens"), [("model_prefill", 512), ("model_decode", 64)])
def test_embedded(bench, embedded, op, tokens, dtype):
    c = json.loads((embedded / "config.json").read_text())
    d, dim = c["hidden_size"], c["head_dim"]
    layer = d * dim * 2 * (c["num_attention_heads"] + c["num_key_value_heads"]) + 3 * d * c["intermediate_size"]
    size = c["num_hidden_layers"] * layer + c["vocab_size"] * d
    pairs = c["num_hidden_layers"] * c["num_attention_heads"] * tokens * (tokens + 1) // 2
    ids = np.random.default_rng(0).integers(32, 127, tokens)
    bench(op, embedded, ids, case=f"embedded model, {tokens} tokens {op.removeprefix('model_')}", dtype=dtype, hot=True,
          tokens=tokens, read=size * DTYPES[dtype] * (tokens if op == "model_decode" else 1),
          written=4 * tokens * c["vocab_size"], flops=2 * tokens * size + 4 * dim * pairs)
