"""What keeps int8 caches close where keys have large biases, as in Qwen2: one channel of 300 among others of 2 would
leave those a scale of 300 / 127.

A score is a sum over channels of q k, so a channel's keys may be divided by a number and its queries multiplied by it.
A power of two changes no bit of what is not rounded to integers, and one that both channels of a rotated pair have
commutes with the rotation.
"""
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from forge_c.models.spec import Attention

_USUAL = 8.0  # the magnitude that keys without biases reach; larger ones are brought down to once or twice this


def balance(kind: Attention, qkv_bias: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
    """(A + C,): what each channel of queries and keys is multiplied by, given the biases (A + 2 C); None: all by 1."""
    if qkv_bias is None or kind.qk_norm is not None:
        return None
    queries, keys, dim = kind.n_heads * kind.head_dim, kind.n_kv_heads * kind.head_dim, kind.head_dim
    size = np.abs(qkv_bias[queries : queries + keys]).reshape(-1, dim).astype(np.float64)  # (kv_heads, D)
    if kind.rope is not None:
        half = kind.rope.dim // 2
        pairs = np.hypot(size[:, :half], size[:, half : 2 * half])
        size[:, : 2 * half] = np.concatenate([pairs, pairs], 1)
    if not np.isfinite(size).all() or (size < 2 * _USUAL).all():
        return None
    factor = np.exp2(np.floor(np.log2(np.maximum(size / _USUAL, 1.0))))
    group = np.repeat(factor, kind.n_heads // kind.n_kv_heads, axis=0)  # (heads, D)
    return np.concatenate([group.ravel(), 1.0 / factor.ravel()]).astype(np.float32)
