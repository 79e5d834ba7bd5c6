"""Tokens through block.pyx, and the same ones through functions of forge_c over NumPy arrays."""
from __future__ import annotations

import time

import numpy as np
from block import Block

import forge_c as fc

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, TOKENS = 256, 688, 8, 2, 32, 64
RNG = np.random.default_rng(0)
NORM, TABLE = np.ones(HIDDEN, np.float32), fc.rope_table(HEAD_DIM, TOKENS)


def weight(n_out: int, n_in: int) -> np.ndarray:
    """(out_features, in_features), as in a checkpoint."""
    return RNG.standard_normal((n_out, n_in), np.float32) / np.float32(n_in**0.5)


def through_python(x: np.ndarray, qkv: np.ndarray, out: np.ndarray, gate: np.ndarray, up: np.ndarray,
                   down: np.ndarray) -> tuple[np.ndarray, float]:
    """What Block.decode does, (TOKENS, HIDDEN), and the seconds it took."""
    w_qkv, w_out, w_down = (fc.pack(w.T) for w in (qkv, out, down))
    w_gated, cache, y = fc.pack_gated(gate.T, up.T), fc.KVCache(1, TOKENS, KV_HEADS, HEAD_DIM), []
    start = time.perf_counter()
    for t in range(TOKENS):
        heads = fc.linear(fc.rms_norm(x, NORM), w_qkv).reshape(1, 1, -1, HEAD_DIM)
        turned = fc.rope(heads[:, :, :-KV_HEADS], TABLE, start_pos=t)
        cache.append(turned[:, :, HEADS:], heads[:, :, -KV_HEADS:])
        seen = fc.attention(turned[:, :, :HEADS], cache, causal=True).reshape(1, -1)
        h = fc.linear(seen, w_out, residual=x)
        y.append(fc.linear(fc.gated_linear(fc.rms_norm(h, NORM), w_gated), w_down, residual=h))
        x = fc.rms_norm(y[-1])
    return np.concatenate(y), time.perf_counter() - start


def random_weights() -> list[np.ndarray]:
    """qkv, out, gate, up, down."""
    return [weight((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN), weight(HIDDEN, HEADS * HEAD_DIM), weight(INNER, HIDDEN),
            weight(INNER, HIDDEN), weight(HIDDEN, INNER)]


def new_block(weights: list[np.ndarray]) -> Block:
    """With an empty cache for TOKENS tokens."""
    return Block(*weights, NORM, NORM, TABLE.cos, TABLE.sin, heads=HEADS, kv_heads=KV_HEADS)


def main() -> None:
    weights, x = random_weights(), RNG.standard_normal((1, HIDDEN), np.float32)
    block = new_block(weights)
    start = time.perf_counter()
    y = block.decode(x[0], TOKENS)
    took = time.perf_counter() - start
    same, took_python = through_python(x, *weights)
    print(f"{fc.isa()}, {fc.get_num_threads()} threads: {TOKENS} tokens at {TOKENS / took:.0f} a second, "
          f"through Python at {TOKENS / took_python:.0f}, checksum {y.sum(dtype=float):.6f}, "
          f"the same bits: {np.array_equal(y, same)}")


if __name__ == "__main__":
    main()
