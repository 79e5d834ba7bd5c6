"""The pre-norm decoder block of LLaMA, Mistral and Qwen."""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c.nn.layer import Layer, Seed, cast_input
from forge_c.nn.modern_activations import SwiGLU
from forge_c.nn.modern_attention import GroupedQueryAttention
from forge_c.nn.normalization import RMSNorm
from forge_c.nn.positional import RotaryPositionalEmbedding
from forge_c.state.kv import KVCache

# Hugging Face's names in a LLaMA layer, and ours. What it calls gate_proj goes through the activation: our W_up.
_LLAMA = {
    "input_layernorm.weight": "norm1.weight", "post_attention_layernorm.weight": "norm2.weight",
    "mlp.gate_proj.weight": "ffn.W_up", "mlp.up_proj.weight": "ffn.W_gate", "mlp.down_proj.weight": "ffn.W_down",
} | {f"self_attn.{x}_proj.{theirs}": f"attention.{ours}_{x}" for x in "qkvo"
     for theirs, ours in (("weight", "W"), ("bias", "b"))}


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

    @classmethod
    def from_llama(cls, weights: Mapping[str, ArrayLike], n_heads: int, n_kv_heads: int, *, prefix: str = "",
                   **options: Any) -> Self:
        """A block with the weights of a LLaMA layer as Hugging Face names and stores them, (out_features, in_features).

        weights: any mapping that holds prefix + "self_attn.q_proj.weight" and so on, such as a state dict with the
        prefix "model.layers.0."; what else it holds is left alone. Biases of attention are taken where there are any.
        options: max_seq_len, base, scaling, eps and causal, as for the class.
        """
        got = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if lacking := [name for name in _LLAMA if name not in got and not name.endswith("bias")]:
            raise ValueError(f"{cls.__name__}.from_llama: weights lacks {prefix}{lacking[0]}")
        shape = np.shape(got["mlp.gate_proj.weight"])
        if len(shape) != 2:
            raise ValueError(f"{cls.__name__}.from_llama: {prefix}mlp.gate_proj.weight has shape {shape}, expected "
                             "(hidden, in)")
        hidden, width = shape
        biased = any(name in got for name in _LLAMA if name.endswith("bias"))
        block = cls(width, n_heads, n_kv_heads, hidden_dim=hidden, bias=biased, seed=0, **options)
        taken = {ours: np.transpose(got[name]) for name, ours in _LLAMA.items() if name in got}
        zeros = {name: np.zeros_like(value) for name, value in block.parameters().items() if ".b_" in name}
        return block.load(zeros | taken)

    @overload
    def forward(self, x: ArrayLike, mask: ArrayLike | None = None, use_cache: Literal[False] = False,
                kv_cache: None = None, *, positions: NDArray[np.integer[Any]] | None = None) -> NDArray[Any]: ...

    @overload
    def forward(self, x: ArrayLike, mask: ArrayLike | None = None, use_cache: bool = False,
                kv_cache: KVCache | None = None, *, positions: NDArray[np.integer[Any]] | None = None) -> Any: ...

    def forward(self, x: ArrayLike, mask: ArrayLike | None = None, use_cache: bool = False,
                kv_cache: KVCache | None = None, *, positions: NDArray[np.integer[Any]] | None = None) -> Any:
        """x (batch, seq, d_model) -> the same shape; mask, cache and positions as in GroupedQueryAttention."""
        a = cast_input(self, "x", x)
        h = self.attention(self.norm1(a), mask, use_cache, kv_cache, residual=a, positions=positions)
        if isinstance(h, tuple):
            h, kv_cache = h
            return self.ffn(self.norm2(h), residual=h), kv_cache
        return self.ffn(self.norm2(h), residual=h)

    if TYPE_CHECKING:
        __call__ = forward
