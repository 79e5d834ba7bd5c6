"""Grouped-query (arXiv 2305.13245) and multi-query (arXiv 1911.02150) attention."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c import functional
from forge_c.formats.layout import Precision
from forge_c.nn.layer import Layer, Matrix, Seed, Vector, cast_input, uniform
from forge_c.nn.positional import RotaryPositionalEmbedding
from forge_c.rotary import RopeTable
from forge_c.state.kv import KVCache

_FIRST_CACHE = 512  # positions of the cache that a layer makes; it doubles when full


class GroupedQueryAttention(Layer):
    """Attention where n_heads query heads share n_kv_heads key/value heads; head h reads h // (n_heads // n_kv_heads).

    W_q (d_model, n_heads * head_dim), W_k, W_v (d_model, n_kv_heads * head_dim) and W_o (n_heads * head_dim, d_model)
    start uniform in +-1/sqrt(in); biases b_q, b_k, b_v, b_o at zero, None with bias=False. rope turns queries and keys
    at their absolute positions. dropout is accepted and inactive: this is inference.

    gqa(x, mask) -> y.  gqa(x, use_cache=True) -> (y, kv_cache); pass kv_cache back with the next tokens. Attention with
    a cache is causal. The cache that the layer makes holds x's dtype (float16 as float32), so that y has the bits of a
    call without one; a KVCache of another dtype rounds to that. attention_precision, None, may be set to "float32",
    "bfloat16" or "int8", what attention multiplies in. A full cache is replaced by one twice as large: keep
    the one that is returned. A call that raises leaves the cache as it was.

    >>> gqa = GroupedQueryAttention(64, n_heads=4, n_kv_heads=2, seed=0)
    >>> y, kv = gqa(np.ones((1, 3, 64)), use_cache=True)
    >>> y, kv = gqa(np.ones((1, 1, 64)), use_cache=True, kv_cache=kv)
    >>> y.shape, kv.seq_len
    ((1, 1, 64), 4)
    """

    W_q = Matrix("qkv", 0)
    W_k = Matrix("qkv", 1)
    W_v = Matrix("qkv", 2)
    W_o = Matrix("o")
    b_q = Vector()
    b_k = Vector()
    b_v = Vector()
    b_o = Vector()

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, dropout: float = 0.0, bias: bool = False, *,
                 rope: RotaryPositionalEmbedding | RopeTable | None = None, head_dim: int | None = None,
                 causal: bool = False, seed: Seed = None) -> None:
        super().__init__()
        name = type(self).__name__
        if n_kv_heads < 1 or n_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(f"{name}: n_heads is {n_heads}, expected a multiple of n_kv_heads {n_kv_heads}")
        if head_dim is None and d_model % n_heads:
            raise ValueError(f"{name}: d_model is {d_model}, expected a multiple of n_heads {n_heads}")
        self.d_model, self.n_heads, self.n_kv_heads, self.causal = d_model, n_heads, n_kv_heads, causal
        self.head_dim = d_model // n_heads if head_dim is None else head_dim
        self.n_rep, self.dropout = n_heads // n_kv_heads, dropout
        self.attention_precision: Precision | None = None
        self.rope = RotaryPositionalEmbedding.from_table(rope) if isinstance(rope, RopeTable) else rope
        if self.rope is not None and self.rope.dim > self.head_dim:
            raise ValueError(f"{name}: rope has dim {self.rope.dim}, expected at most head_dim {self.head_dim}")
        rng = np.random.default_rng(seed)
        q, kv = n_heads * self.head_dim, n_kv_heads * self.head_dim
        self._pack("qkv", [uniform(rng, d_model, (d_model, width)) for width in (q, kv, kv)])
        self._pack("o", [uniform(rng, q, (q, d_model))])
        sizes = {"b_q": q, "b_k": kv, "b_v": kv, "b_o": d_model}
        self._hold_vectors(**{b: np.zeros(size, np.float32) if bias else None for b, size in sizes.items()})

    def repeat_kv(self, kv: ArrayLike) -> NDArray[Any]:
        """(batch, seq, n_kv_heads, head_dim) -> (batch, seq, n_heads, head_dim), each head n_rep times. The layer
        itself never does this: its queries read the shared heads."""
        return np.repeat(np.asarray(kv), self.n_rep, axis=2)

    @overload
    def forward(self, x: ArrayLike, mask: ArrayLike | None = None, use_cache: Literal[False] = False,
                kv_cache: None = None, *, residual: NDArray[Any] | None = None,
                positions: NDArray[np.integer[Any]] | None = None) -> NDArray[Any]: ...

    @overload
    def forward(self, x: ArrayLike, mask: ArrayLike | None = None, use_cache: bool = False,
                kv_cache: KVCache | None = None, *, residual: NDArray[Any] | None = None,
                positions: NDArray[np.integer[Any]] | None = None) -> Any: ...

    def forward(self, x: ArrayLike, mask: ArrayLike | None = None, use_cache: bool = False,
                kv_cache: KVCache | None = None, *, residual: NDArray[Any] | None = None,
                positions: NDArray[np.integer[Any]] | None = None) -> Any:
        """x (batch, seq, d_model) -> (batch, seq, d_model), plus `residual` where given.

        mask: bool (True = attend; integers count as bool) or float added to the scores, broadcastable to
        (batch, n_heads, seq, kv_len). With use_cache or a kv_cache the result is (y, kv_cache), see the class.
        positions (seq,) or (batch, seq): where x's tokens lie, ascending integers, and after what a cache holds; RoPE
        turns by them and causal attention follows them. By default they follow one another, after the cache's tokens.
        """
        a = cast_input(self, "x", x)
        if a.ndim != 3 or a.shape[2] != self.d_model:
            raise ValueError(f"{type(self).__name__}: x has shape {a.shape}, expected (batch, seq, {self.d_model})")
        placed = None if positions is None else self._placed(positions, a)
        if not use_cache and kv_cache is None:
            q, k, v = self._project(a, 0, placed)
            return self._output(functional.attention(q, k, v, causal=self.causal, mask=_mask(mask), q_positions=placed,
                                                     kv_positions=placed, precision=self.attention_precision), residual)
        cache = self._room(kv_cache, a)
        with cache.writing():
            past = cache.lengths
            q, k, v = self._project(a, past, placed)
            cache.append(k, v)
            try:
                heads = functional.attention(q, cache, causal=True, mask=_mask(mask),
                                             precision=self.attention_precision)
                return self._output(heads, residual), cache
            except BaseException:
                cache.truncate(past)
                raise

    if TYPE_CHECKING:
        __call__ = forward

    def _placed(self, positions: NDArray[np.integer[Any]], x: NDArray[Any]) -> NDArray[np.integer[Any]]:
        a = np.asarray(positions)
        if a.dtype.kind not in "iu" or a.shape not in (x.shape[1:2], x.shape[:2]):
            raise ValueError(f"{type(self).__name__}: positions has shape {a.shape} and dtype {a.dtype}, expected "
                             f"integers {x.shape[1:2]} or {x.shape[:2]}")
        return a

    def _project(self, x: NDArray[Any], past: int | NDArray[np.int64],
                 positions: NDArray[np.integer[Any]] | None) -> tuple[NDArray[Any], ...]:
        """q (batch, seq, n_heads, head_dim), k and v (.., n_kv_heads, ..) of tokens at these positions, or after
        `past` others."""
        batch, seq, _ = x.shape
        qkv = functional.linear(x, self._matrices["qkv"], self._joined("b_q", "b_k", "b_v"))
        heads = qkv.reshape(batch, seq, self.n_heads + 2 * self.n_kv_heads, self.head_dim)
        turned, v = heads[:, :, : -self.n_kv_heads], heads[:, :, -self.n_kv_heads:]
        if self.rope is not None:
            at = np.arange(seq) + np.reshape(past, (-1, 1)) if positions is None else np.atleast_2d(positions)
            self.rope.rotate(turned, positions=at if len(at) > 1 else at[0], out=turned)
        return turned[:, :, : self.n_heads], turned[:, :, self.n_heads:], v

    def _room(self, cache: KVCache | None, x: NDArray[Any]) -> KVCache:
        """The cache, or a larger copy of it, with room for x's tokens."""
        batch, seq, _ = x.shape
        if cache is None:
            held = "bfloat16" if x.dtype == ml_dtypes.bfloat16 else "float32"  # as attention holds plain keys
            return KVCache(batch, max(_FIRST_CACHE, 2 * seq), self.n_kv_heads, self.head_dim, dtype=held)
        if not isinstance(cache, KVCache):
            raise TypeError(f"{type(self).__name__}: kv_cache is a {type(cache).__name__}, expected a KVCache")
        sizes, expected = (cache.batch, cache.n_kv_heads, cache.head_dim), (batch, self.n_kv_heads, self.head_dim)
        if sizes != expected:
            raise ValueError(f"{type(self).__name__}: kv_cache has (batch, n_kv_heads, head_dim) {sizes}, "
                             f"expected {expected}")
        if cache.seq_len + seq > cache.max_seq_len:
            return cache.copy(max(2 * cache.max_seq_len, cache.seq_len + seq))
        return cache

    def _output(self, heads: NDArray[Any], residual: NDArray[Any] | None) -> NDArray[Any]:
        flat = heads.reshape(*heads.shape[:2], self.n_heads * self.head_dim)
        return functional.linear(flat, self._matrices["o"], self._vectors["b_o"], residual=residual)


def _mask(mask: ArrayLike | None) -> NDArray[Any] | None:
    if mask is None:
        return None
    a = np.asarray(mask)
    if a.dtype.kind in "iu":
        return a != 0
    return a.astype(np.float32) if a.dtype == np.float64 else a


class MultiQueryAttention(Layer):
    """Grouped-query attention with one key/value head; .gqa is that layer, takes the options and the calls.

    >>> MultiQueryAttention(64, n_heads=4, seed=0).gqa.n_rep
    4
    """

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0, bias: bool = False, **options: Any) -> None:
        super().__init__()
        self.gqa = GroupedQueryAttention(d_model, n_heads, 1, dropout, bias, **options)

    @overload
    def forward(self, x: ArrayLike, mask: ArrayLike | None = None, use_cache: Literal[False] = False,
                kv_cache: None = None, *, residual: NDArray[Any] | None = None,
                positions: NDArray[np.integer[Any]] | None = None) -> NDArray[Any]: ...

    @overload
    def forward(self, x: ArrayLike, mask: ArrayLike | None = None, use_cache: bool = False,
                kv_cache: KVCache | None = None, *, residual: NDArray[Any] | None = None,
                positions: NDArray[np.integer[Any]] | None = None) -> Any: ...

    def forward(self, x: ArrayLike, mask: ArrayLike | None = None, use_cache: bool = False,
                kv_cache: KVCache | None = None, *, residual: NDArray[Any] | None = None,
                positions: NDArray[np.integer[Any]] | None = None) -> Any:
        """As GroupedQueryAttention."""
        return self.gqa(x, mask, use_cache, kv_cache, residual=residual, positions=positions)

    if TYPE_CHECKING:
        __call__ = forward
