"""One LLaMA block from functions over NumPy arrays: a prompt, then token by token with a cache, and the same bits.

    python examples/decoder_layer.py
"""
from __future__ import annotations

import numpy as np

import forge_c as fc

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 256, 8, 2, 32, 640
RNG = np.random.default_rng(0)


def matrix(rows: int, columns: int) -> np.ndarray:
    return (RNG.standard_normal((rows, columns)) * rows**-0.5).astype(np.float32)


QKV = fc.pack(matrix(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM), "bfloat16")
OUT = fc.pack(matrix(HEADS * HEAD_DIM, HIDDEN), "bfloat16")
GATE_UP = fc.pack_gated(matrix(HIDDEN, INNER), matrix(HIDDEN, INNER), "bfloat16")
DOWN = fc.pack(matrix(INNER, HIDDEN), "bfloat16")
NORM1, NORM2 = (np.ones(HIDDEN, np.float32) for _ in range(2))
TABLE = fc.rope_table(HEAD_DIM, 4096)


def block(x: np.ndarray, cache: fc.KVCache) -> np.ndarray:
    """x (batch, seq, HIDDEN), the tokens after those in the cache -> the same shape."""
    batch, seq, _ = x.shape
    heads = fc.linear(fc.rms_norm(x, NORM1), QKV).reshape(batch, seq, HEADS + 2 * KV_HEADS, HEAD_DIM)
    turned = heads[:, :, : HEADS + KV_HEADS]
    fc.rope(turned, TABLE, start_pos=cache.seq_len, out=turned)
    cache.append(turned[:, :, HEADS:], heads[:, :, HEADS + KV_HEADS :])
    y = fc.attention(turned[:, :, :HEADS], cache, causal=True)
    h = fc.linear(y.reshape(batch, seq, -1), OUT, residual=x)
    return fc.linear(fc.gated_linear(fc.rms_norm(h, NORM2), GATE_UP), DOWN, residual=h)


def main() -> None:
    x = RNG.standard_normal((1, 48, HIDDEN)).astype(np.float32)
    whole = block(x, fc.KVCache(1, 64, KV_HEADS, HEAD_DIM))
    cache = fc.KVCache(1, 64, KV_HEADS, HEAD_DIM)
    steps = np.concatenate([block(x[:, i : i + 1], cache) for i in range(48)], axis=1)
    print(f"{fc.isa()}, {fc.get_num_threads()} threads; the same bits: {np.array_equal(whole, steps)}")


if __name__ == "__main__":
    main()
