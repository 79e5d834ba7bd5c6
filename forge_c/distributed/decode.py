"""Attention of a few queries over keys that lie on many ranks: queries are everywhere, keys stay.

Each rank attends to its own keys; what it found, (lse, o) of a row and head, is summed over the ranks:

    m = max of lse,   w = e^(lse - m),   out = sum of w o / (sum of w + e^(sink - m))
"""
from __future__ import annotations

from time import perf_counter
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from forge_c.distributed.checks import as_said, check_array, check_said
from forge_c.distributed.comm import Array, Comm
from forge_c.distributed.stats import Stats
from forge_c.functional import attention
from forge_c.state.kv import KVCache

Floats = NDArray[np.float32]

_SMALL = 64 << 10  # partial results of so many bytes go to every rank, with what the ranks agree about: one message


@overload
def sharded_decode(q: Array, k_local: Array | KVCache, v_local: Array | None = None, *, comm: Comm,
                   causal: bool = False, window: int | None = None, scale: float | None = None,
                   softcap: float | None = None, sinks: Array | None = None, kv_lens: Array | None = None,
                   q_positions: Array | None = None, kv_positions: Array | None = None, precision: str | None = None,
                   return_lse: Literal[False] = False, stats: Stats | None = None) -> Array: ...
@overload
def sharded_decode(q: Array, k_local: Array | KVCache, v_local: Array | None = None, *, comm: Comm,
                   causal: bool = False, window: int | None = None, scale: float | None = None,
                   softcap: float | None = None, sinks: Array | None = None, kv_lens: Array | None = None,
                   q_positions: Array | None = None, kv_positions: Array | None = None, precision: str | None = None,
                   return_lse: Literal[True], stats: Stats | None = None) -> tuple[Array, Floats]: ...


def sharded_decode(q: Array, k_local: Array | KVCache, v_local: Array | None = None, *, comm: Comm,
                   causal: bool = False, window: int | None = None, scale: float | None = None,
                   softcap: float | None = None, sinks: Array | None = None, kv_lens: Array | None = None,
                   q_positions: Array | None = None, kv_positions: Array | None = None, precision: str | None = None,
                   return_lse: bool = False, stats: Stats | None = None) -> Array | tuple[Array, Floats]:
    """The attention of q, the same on every rank, over the keys of all ranks; every rank calls it and has the result.

    q (batch, q_len, heads, head_dim); k_local (batch, tokens, kv_heads, head_dim) and v_local are this rank's, any
    number of tokens, or none, in any order over the ranks; or k_local is a KVCache (without a window), whose rows may
    have different lengths. Options are those of forge_c.attention, kv_lens among them; sinks count once.

    By default a query sees every key: the next token of each row, whose key its rank has appended before. For a short
    prompt against a long sharded context, queries go to the keys: causal=True or window=W with q_positions and this
    rank's kv_positions, ascending.

    What travels is (heads (v_dim + 1)) floats for each row and query, whatever the number of keys. The sums over ranks
    are in the order of ranks, so that every rank has the same bits; they are not those of one process, which sums
    otherwise: float32 results differ by 2e-6 of the largest value at most.
    stats: a Stats, to which this call adds bytes and seconds.

    Raises ValueError on every rank if ranks differ in q's shape or an option; RankError or TimeoutError if another
    rank fails.

    >>> from forge_c.distributed import SelfComm, sharded_decode
    >>> q = np.zeros((1, 1, 1, 4), np.float32)
    >>> kv = np.arange(8, dtype=np.float32).reshape(1, 2, 1, 4)
    >>> sharded_decode(q, kv, kv, comm=SelfComm())
    array([[[[2., 3., 4., 5.]]]], dtype=float32)
    """
    name = "sharded_decode"
    with comm.guard():
        check_array(name, "q", q)
        _check_positions(k_local, causal or window is not None, q_positions, kv_positions)
        stats = Stats() if stats is None else stats
        options: dict[str, Any] = {"causal": bool(causal), "window": window, "scale": scale, "softcap": softcap,
                                   "precision": precision}
        begin = perf_counter()
        # In float32, so that the parts are not rounded; k and v say what is multiplied in.
        out, lse = attention(q.astype(np.float32, copy=False), k_local, v_local, kv_lens=kv_lens,
                             q_positions=q_positions, kv_positions=kv_positions, return_lse=True, **options)
        stats.compute += perf_counter() - begin
        own = {"q": (q.shape, q.dtype.name), "v_dim": out.shape[-1], **options, "sinks": as_said(sinks)}
        begin = perf_counter()
        total, weight, top = _sum_over_ranks(comm, own, out, lse, stats)
        stats.wait += perf_counter() - begin
        return _finished(total, weight, top, sinks, q.dtype, return_lse)


def _check_positions(k: Array | KVCache, masked: bool, q_positions: Array | None, kv_positions: Array | None) -> None:
    if isinstance(k, KVCache) and k.window is not None:
        raise ValueError(f"sharded_decode: k_local is a KVCache with a window of {k.window} of its own tokens, "
                         "expected one without: pass window, q_positions and kv_positions")
    if masked and (q_positions is None or kv_positions is None):
        raise ValueError("sharded_decode: causal or window is given without q_positions and kv_positions, expected "
                         "both: a rank's keys lie anywhere")


def _sum_over_ranks(comm: Comm, own: dict[str, Any], out: Floats, lse: Floats,
                    stats: Stats) -> tuple[Floats, Floats, Floats]:
    """Sums of w o (B, S, H, E) and of w (B, S, H), and the largest lse."""
    small = out.nbytes + lse.nbytes <= _SMALL
    said = comm.all_gather((own, (lse, out) if small else None))
    check_said("sharded_decode", [each for each, _ in said])
    moved = (comm.size - 1) * (out.nbytes + lse.nbytes)
    stats.sent += moved if small else 2 * moved // comm.size
    stats.received += moved if small else 2 * moved // comm.size
    if small:
        parts = [part for _, part in said]
        top = parts[0][0]
        for each, _ in parts[1:]:
            top = np.maximum(top, each)
        weights = [_weights(each, top) for each, _ in parts]
        total, weight = weights[0][..., None] * parts[0][1], weights[0]
        for w, (_, o) in zip(weights[1:], parts[1:], strict=True):
            total, weight = total + w[..., None] * o, weight + w
        return total, weight, top
    top = np.ascontiguousarray(lse).copy()
    comm.all_reduce(top, "max")
    weight = _weights(lse, top)
    both = np.concatenate([weight[..., None] * out, weight[..., None]], axis=-1)
    comm.all_reduce(both)
    return both[..., :-1], both[..., -1], top


def _weights(lse: Floats, top: Floats) -> Floats:
    """e^(lse - top), and 0 for rows that see no key on any rank."""
    with np.errstate(invalid="ignore"):
        return np.where(top == -np.inf, np.float32(0), np.exp(lse - top)).astype(np.float32, copy=False)


def _finished(total: Floats, weight: Floats, top: Floats, sinks: Array | None, dtype: np.dtype[Any],
              return_lse: bool) -> Array | tuple[Array, Floats]:
    """out and lse; a sink is one more logit of its head, whose value is 0."""
    if sinks is not None:
        sink = np.broadcast_to(np.asarray(sinks, np.float32), top.shape)
        higher = np.maximum(top, sink)
        keep = _weights(top, higher)
        total, weight, top = total * keep[..., None], weight * keep + _weights(sink, higher), higher
    with np.errstate(invalid="ignore", divide="ignore"):
        out = np.where(weight[..., None] == 0, np.float32(0), total / weight[..., None]).astype(dtype)
        return (out, (top + np.log(weight)).astype(np.float32)) if return_lse else out
