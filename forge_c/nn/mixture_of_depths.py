"""Mixture of depths (arXiv 2404.02258): a router sends some tokens through a block, the others pass by it."""
from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any, Literal, Self, get_args, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c import functional
from forge_c.checks import unmasked
from forge_c.formats.layout import Activations, Dtype, NumPyDtype
from forge_c.nn.layer import Layer, Matrix, Seed, Vector, cast_input, uniform
from forge_c.state.lengths import lengths_kept

Mode = Literal["topk", "threshold", "predictor"]


class Predictor(Layer):
    """Whether a token goes through: silu(x W_up + b_up) . w_down + b_down, above 0 for those that do.

    Stays float32 whatever `astype` makes of the layers around it: which tokens go through is no matter of formats.
    """

    W_up = Matrix("up")
    b_up = Vector()
    w_down = Vector()
    b_down = Vector()

    def __init__(self, d_model: int, hidden_dim: int, *, seed: Seed = None) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        self.d_model, self.hidden_dim = d_model, hidden_dim
        self._pack("up", [uniform(rng, d_model, (d_model, hidden_dim))])
        self._hold_vectors(b_up=np.zeros(hidden_dim, np.float32), w_down=uniform(rng, hidden_dim, (hidden_dim,)),
                           b_down=np.zeros(1, np.float32))

    def astype(self, dtype: Dtype | NumPyDtype, *, activations: Activations | None = None) -> Self:
        return super().astype("float32")

    def forward(self, x: ArrayLike) -> NDArray[np.float32]:
        """x (batch, seq, d_model) -> scores (batch, seq)."""
        a = cast_input(self, "x", x).astype(np.float32, copy=False)
        hidden = functional.linear(a, self._matrices["up"], self._vectors["b_up"])
        scores = functional._router_logits(functional.silu(hidden, out=hidden), self.w_down)
        return scores + self.b_down

    if TYPE_CHECKING:
        __call__ = forward


class RaggedCache:
    """What a routed block remembers: of each row the block's cache of the tokens that went through, and where they lie.

    Attributes:
        caches: the block's own, of one row each; None for a row of which nothing has gone through.
        positions: of each row the positions (n,) of the tokens that went through, ascending.
        seen (batch,): tokens of each row, those that passed by included.
    """

    def __init__(self, batch: int) -> None:
        self.caches: list[Any] = [None] * batch
        self.positions: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * batch
        self.seen = np.zeros(batch, np.int64)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.seen)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row that went through, (batch,)."""
        return np.array([len(p) for p in self.positions], np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes that the block's caches have room for."""
        return sum(cache.nbytes for cache in self.caches if cache is not None)

    def __repr__(self) -> str:
        return f"RaggedCache(batch={self.batch}, seen={self.seen.tolist()}, lengths={self.lengths.tolist()})"

    def truncate(self, n: ArrayLike) -> None:
        """Forget every token from position n on, gone through or not; n as KVCache.truncate takes it.

        Raises:
            TypeError, ValueError: n is not an integer, is negative or is more than there are, or a cache of the block
                cannot go back so far. Then nothing changes.
        """
        keep = lengths_kept("RaggedCache.truncate", self.seen, n)
        left = [int(np.searchsorted(p, tokens)) for p, tokens in zip(self.positions, keep.tolist(), strict=True)]
        shorter = [(cache, count) for cache, count, p in zip(self.caches, left, self.positions, strict=True)
                   if cache is not None and count < len(p)]
        for cache, count in shorter:
            cache.check_truncate(np.array([count]))
        for cache, count in shorter:
            cache.truncate(count)
        self.positions = [p[:count] for p, count in zip(self.positions, left, strict=True)]
        self.seen = keep

    def copy(self) -> RaggedCache:
        """An independent cache that holds the same."""
        twin = RaggedCache(self.batch)
        twin.caches = [copy.copy(cache) for cache in self.caches]
        twin.positions, twin.seen = list(self.positions), self.seen.copy()
        return twin

    def __copy__(self) -> RaggedCache:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> RaggedCache:
        return self.copy()


class MixtureOfDepths(Layer):
    """x + r (block(X) - X) for the tokens X that a router chooses, x for the others, bit for bit.

    r = x . router is a token's logit. The chosen ones see only each other, at their own positions: as many numbers of
    RoPE and of causal attention as without a router, and `block` does capacity of the work. It is any layer of
    (batch, seq, d_model) whose forward takes positions=, as ModernTransformerBlock's, or needs none. Where r is 1 a
    token gets the block's own bits.

    mode says who is chosen:
        "topk": of each sequence the int(capacity * seq) tokens of the largest logits, see forge_c.route_tokens. That
            is how such models are trained, and it is not causal: what comes later in a sequence decides. A sequence
            has to be there as a whole, and there is no cache.
        "threshold": every token whose logit is above `threshold`; 0 is sigmoid(r) > 0.5, for routers that were trained
            to it by a loss of their own.
        "predictor": every token for which .predictor, a small MLP of predictor_dim inner channels, is above 0.
    The last two look at a token alone: a prompt, its pieces and its tokens one by one give the same bits.

    mod(x) -> y;  mod(x, use_cache=True) -> (y, cache): pass the RaggedCache back with the next tokens. It holds only
    what went through. A call that raises leaves it as it was. mask=, broadcastable to (batch, heads, seq, seq), or with
    a cache (.., all tokens so far), is that of the block over the whole text, which sees its rows and columns of the
    tokens that go through; who goes through it does not change.

    router (d_model,) starts uniform in +-1/sqrt(d_model). It and the predictor stay float32, see Predictor.

    >>> from forge_c.nn import ModernTransformerBlock
    >>> block = ModernTransformerBlock(d_model=64, n_heads=4, n_kv_heads=2, seed=0)
    >>> mod = MixtureOfDepths(block, 64, mode="threshold", seed=0)
    >>> x = np.random.default_rng(0).standard_normal((1, 40, 64))
    >>> y, cache = mod(x[:, :30], use_cache=True)
    >>> z, cache = mod(x[:, 30:], kv_cache=cache)
    >>> bool((np.concatenate([y, z], axis=1) == mod(x)).all()), cache.lengths < 40
    (True, array([ True]))
    """

    router = Vector()

    def __init__(self, block: Layer, d_model: int, capacity: float = 0.125, mode: Mode = "topk", *,
                 threshold: float = 0.0, predictor_dim: int | None = None, seed: Seed = None) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise ValueError(f"MixtureOfDepths: mode is {mode!r}, expected one of {', '.join(get_args(Mode))}")
        if not isinstance(block, Layer):
            raise TypeError(f"MixtureOfDepths: block is a {type(block).__name__}, expected a layer of forge_c.nn")
        if not 0 < capacity <= 1:
            raise ValueError(f"MixtureOfDepths: capacity is {capacity!r}, expected a number above 0 and at most 1")
        self.d_model, self.capacity, self.mode, self.threshold = d_model, float(capacity), mode, float(threshold)
        rng = np.random.default_rng(seed)
        self._hold_vectors(router=uniform(rng, d_model, (d_model,)))
        self.block = block
        self._dtype, self._activations = block._dtype, block._activations
        self.predictor: Predictor | None = None
        if mode == "predictor":
            hidden = max(16, d_model // 16) if predictor_dim is None else predictor_dim
            self.predictor = Predictor(d_model, hidden, seed=rng)
        taken = inspect.signature(block.forward).parameters
        self._takes_positions, self._remembers = "positions" in taken, "use_cache" in taken
        self._takes_mask = "mask" in taken

    @overload
    def forward(self, x: ArrayLike, use_cache: Literal[False] = False, kv_cache: None = None, *,
                mask: ArrayLike | None = None) -> NDArray[Any]: ...

    @overload
    def forward(self, x: ArrayLike, use_cache: bool = False, kv_cache: RaggedCache | None = None, *,
                mask: ArrayLike | None = None) -> Any: ...

    def forward(self, x: ArrayLike, use_cache: bool = False, kv_cache: RaggedCache | None = None, *,
                mask: ArrayLike | None = None) -> Any:
        """x (batch, seq, d_model) -> the same shape, with use_cache or a kv_cache (y, kv_cache), see the class."""
        a = cast_input(self, "x", x)
        if a.ndim != 3 or a.shape[2] != self.d_model:
            raise ValueError(f"MixtureOfDepths: x has shape {a.shape}, expected (batch, seq, {self.d_model})")
        if not use_cache and kv_cache is None:
            seen = self._mask(mask, a, 0)
            return self._largest(a, seen) if self.mode == "topk" else self._each(a, RaggedCache(len(a)), False, seen)
        if self.mode == "topk":
            raise ValueError("MixtureOfDepths: mode 'topk' chooses among all tokens of a sequence, which no cache has; "
                             "expected 'threshold' or 'predictor' for use_cache")
        cache = RaggedCache(len(a)) if kv_cache is None else kv_cache
        if not isinstance(cache, RaggedCache):
            raise TypeError(f"MixtureOfDepths: kv_cache is a {type(cache).__name__}, expected a RaggedCache")
        if cache.batch != len(a):
            raise ValueError(f"MixtureOfDepths: kv_cache has {cache.batch} rows, expected {len(a)} as x")
        return self._each(a, cache, True, self._mask(mask, a, int(cache.seen.max(initial=0)))), cache

    if TYPE_CHECKING:
        __call__ = forward

    def _mask(self, mask: ArrayLike | None, x: NDArray[Any], past: int) -> NDArray[Any] | None:
        """mask as an array of four axes."""
        if mask is None:
            return None
        if not self._takes_mask:
            raise TypeError(f"MixtureOfDepths: mask is given, and the block, {type(self.block).__name__}, takes none; "
                            "expected None")
        a = np.asarray(unmasked("MixtureOfDepths", "mask", mask))
        (batch, seq, _), shape = x.shape, (*(1,) * (4 - a.ndim), *a.shape)
        if a.ndim > 4 or shape[0] not in (1, batch) or shape[2] not in (1, seq) or shape[3] not in (1, past + seq):
            raise ValueError(f"MixtureOfDepths: mask has shape {a.shape}, expected one that broadcasts to ({batch}, "
                             f"heads, {seq}, {past + seq})")
        return a.reshape(shape)

    def _largest(self, x: NDArray[Any], mask: NDArray[Any] | None) -> NDArray[Any]:
        """The tokens of the largest logits through the block, as many of each sequence."""
        out = np.array(x, order="C")
        if not x.shape[0] or not x.shape[1]:
            return out
        indices, gate = functional.route_tokens(x, self.router, capacity=self.capacity)
        rows = indices + x.shape[1] * np.arange(len(x))[:, None]
        tokens = functional.embedding(rows, out.reshape(-1, self.d_model))
        if mask is not None:
            mask = np.concatenate([_chosen(mask, b, at, at) for b, at in enumerate(indices)])
        self._update(out, self._through(tokens, indices, False, None, mask)[0], gate, rows)
        return out

    def _each(self, x: NDArray[Any], cache: RaggedCache, remember: bool, mask: NDArray[Any] | None) -> NDArray[Any]:
        """The tokens that are chosen one by one through the block, row after row, behind those of the cache."""
        gate = functional._router_logits(x, self.router)
        chosen = gate > np.float32(self.threshold) if self.predictor is None else self.predictor(x) > 0
        out, held = np.array(x, order="C"), cache.lengths
        caches, positions = list(cache.caches), list(cache.positions)
        try:
            for b in range(len(x)):
                rows = np.flatnonzero(chosen[b])
                if len(rows):
                    at = cache.seen[b] + rows
                    tokens = functional.embedding(rows, out[b])
                    positions[b] = np.concatenate([positions[b], at])
                    keys = positions[b] if remember and self._remembers else at
                    visible = None if mask is None else _chosen(mask, b, rows, keys)
                    y, caches[b] = self._through(tokens[None], at, remember, caches[b], visible)
                    self._update(out[b], y, gate[b, rows], rows)
        except BaseException:
            for old, new, count in zip(cache.caches, caches, held.tolist(), strict=True):
                if old is not None and old is new:
                    old.truncate(count)
            raise
        cache.caches, cache.positions, cache.seen = caches, positions, cache.seen + x.shape[1]
        return out

    def _through(self, tokens: NDArray[Any], positions: NDArray[np.int64], remember: bool, cache: Any,
                 mask: NDArray[Any] | None) -> Any:
        """(the block's result, its cache) of tokens (batch, n, d_model) at positions (batch, n) or (n,)."""
        placed: dict[str, Any] = {"positions": positions} if self._takes_positions else {}
        if mask is not None:
            placed["mask"] = mask
        if not remember or not self._remembers:
            return self.block(tokens, **placed), None
        return self.block(tokens, use_cache=True, kv_cache=cache, **placed)

    def _update(self, out: NDArray[Any], y: NDArray[Any], gate: NDArray[np.float32], rows: NDArray[np.int64]) -> None:
        """out's rows <- (1 - gate) out's + gate y's."""
        functional._gate_update(out.reshape(-1, self.d_model), y.reshape(-1, self.d_model), gate.reshape(-1),
                                rows.reshape(-1))


def _chosen(mask: NDArray[Any], b: int, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[Any]:
    """Sequence b of mask (batch, heads, seq, kv_len), each of which may be 1: (1, heads, n, m)."""
    found = mask[b : b + 1] if len(mask) > 1 else mask
    found = found[:, :, rows] if found.shape[2] > 1 else found
    return found[..., columns] if found.shape[3] > 1 else found
