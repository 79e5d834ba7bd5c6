"""The pre-norm decoder block of LLaMA, Mistral and Qwen."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from forge_c.nn.layer import Layer, Seed, cast_input
from forge_c.nn.modern_activations import SwiGLU
from forge_c.nn.modern_attention import GroupedQueryAttention
from forge_c.nn.normalization import RMSNorm
from forge_c.nn.positional import RotaryPositionalEmbedding
from forge_c.state.kv import KVCache


class ModernTransformerBlock(Layer):
    """h = x + attention(norm1(x));  h + ffn(norm2(h)): RMSNorm, grouped-query attention with RoPE, SwiGLU.

    block(x, mask) -> y;  block(x, use_cache=True, kv_cache=None) -> (y, kv_cache). x (batch, seq, d_model).
    rope (of max_seq_len positions, base and scaling) turns queries and keys inside the attention.

    >>> block = ModernTransformerBlock(d_model=64, n_heads=4, n_kv_heads=2, seed=0)
    >>> block(np.ones((1, 5, 64))).shape
    (1, 5, 64)
    """

    def __init__(self, d_model: int = 768, n_heads: int = 12, n_kv_heads: int = 3, *, hidden_dim: int | None = None,
                 max_seq_len: int = 4096, base: float = 10000.0, causal: bool = True,
                 scaling: Mapping[str, Any] | None = None, eps: float = 1e-6, bias: bool = False,
                 seed: Seed = None) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        self.rope = RotaryPositionalEmbedding(d_model // n_heads, max_seq_len, base, scaling)
        self.norm1, self.norm2 = RMSNorm(d_model, eps), RMSNorm(d_model, eps)
        self.attention = GroupedQueryAttention(d_model, n_heads, n_kv_heads, bias=bias, rope=self.rope, causal=causal,
                                               seed=rng)
        self.ffn = SwiGLU(d_model, hidden_dim, bias, seed=rng)

    def forward(self, x: ArrayLike, mask: ArrayLike | None = None, use_cache: bool = False,
                kv_cache: KVCache | None = None) -> Any:
        """x (batch, seq, d_model) -> the same shape; mask and cache as in GroupedQueryAttention."""
        a = cast_input(self, "x", x)
        h = self.attention(self.norm1(a), mask, use_cache, kv_cache, residual=a)
        if isinstance(h, tuple):
            h, kv_cache = h
            return self.ffn(self.norm2(h), residual=h), kv_cache
        return self.ffn(self.norm2(h), residual=h)
