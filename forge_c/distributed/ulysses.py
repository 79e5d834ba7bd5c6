"""Attention over ranks that exchange heads for tokens: each computes some heads over the whole sequence."""
from __future__ import annotations

from time import perf_counter
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from forge_c.distributed.checks import Sizes, check_call
from forge_c.distributed.comm import Array, Comm, Disagreement
from forge_c.distributed.layout import Layout
from forge_c.distributed.plan import Runs, runs_of
from forge_c.distributed.ring import place
from forge_c.distributed.stats import Stats
from forge_c.functional import attention


@overload
def ulysses_attention(q: Array, k: Array, v: Array, *, comm: Comm, layout: Layout = "zigzag", causal: bool = True,
                      window: int | None = None, scale: float | None = None, softcap: float | None = None,
                      sinks: Array | None = None, precision: str | None = None, return_lse: Literal[False] = False,
                      stats: Stats | None = None) -> Array: ...
@overload
def ulysses_attention(q: Array, k: Array, v: Array, *, comm: Comm, layout: Layout = "zigzag", causal: bool = True,
                      window: int | None = None, scale: float | None = None, softcap: float | None = None,
                      sinks: Array | None = None, precision: str | None = None, return_lse: Literal[True],
                      stats: Stats | None = None) -> tuple[Array, NDArray[np.float32]]: ...


def ulysses_attention(q: Array, k: Array, v: Array, *, comm: Comm, layout: Layout = "zigzag", causal: bool = True,
                      window: int | None = None, scale: float | None = None, softcap: float | None = None,
                      sinks: Array | None = None, precision: str | None = None, return_lse: bool = False,
                      stats: Stats | None = None) -> Array | tuple[Array, NDArray[np.float32]]:
    """This rank's rows of the attention over all ranks' tokens, as ring_attention gives them, by another way: every
    rank gets q, k and v of heads / N heads for all tokens, computes those, and sends each rank its rows.

    The ranks' number N must divide heads, and either divide kv_heads or be a multiple of them: then ranks share a
    key/value head, which each of them receives. All ranks do the same work whatever the layout and the mask, and each
    number of q, k, v and out travels once, against N - 1 times in a ring for k and v; but nothing is computed
    meanwhile, and each rank holds the whole sequence of its heads. Arguments, dtypes and bits are those of
    ring_attention.

    Raises as ring_attention does, and ValueError where head counts do not allow it.

    >>> from forge_c.distributed import SelfComm, ulysses_attention
    >>> q = np.zeros((1, 1, 1, 4), np.float32)
    >>> ulysses_attention(q, q, np.arange(4, dtype=np.float32).reshape(1, 1, 1, 4), comm=SelfComm())
    array([[[[0., 1., 2., 3.]]]], dtype=float32)
    """
    name = "ulysses_attention"
    with comm.guard():
        options: dict[str, Any] = {"causal": causal, "window": window, "scale": scale, "softcap": softcap,
                                   "precision": precision}
        sizes, seq_len = check_call(comm, name, q, k, v, layout, sinks, options)
        shares = [_share(sizes, comm.size, rank) for rank in range(comm.size)]
        runs, mine = runs_of(layout, seq_len, comm.size), shares[comm.rank]
        stats = Stats() if stats is None else stats
        whole = [_by_heads(comm, x, [share[i] for share in shares], runs, stats)
                 for x, i in ((q, 0), (k, 1), (v, 1))]
        begin = perf_counter()
        out, lse = attention(*whole, q_positions=np.arange(seq_len), return_lse=True,
                             sinks=None if sinks is None else sinks[mine[0]], **options)
        stats.compute += perf_counter() - begin
        rows = _by_rows(comm, out, [share[0] for share in shares], sizes.heads, runs, stats)
        if not return_lse:
            return rows
        return rows, _by_rows(comm, lse[..., None], [share[0] for share in shares], sizes.heads, runs, stats)[..., 0]


def _share(sizes: Sizes, size: int, rank: int) -> tuple[slice, slice]:
    """A rank's query heads, and the key/value heads that they read."""
    heads, kv_heads = sizes.heads, sizes.kv_heads
    if heads % size or (kv_heads % size and size % kv_heads):
        raise Disagreement(f"ulysses_attention: q has {heads} heads and k {kv_heads} on {size} ranks, expected heads a "
                           "multiple of the ranks and kv_heads a multiple or a divisor; ring_attention takes any")
    each, ratio = heads // size, heads // kv_heads
    first = rank * each
    return slice(first, first + each), slice(first // ratio, (first + each - 1) // ratio + 1)


def _by_heads(comm: Comm, x: Array, shares: list[slice], runs: tuple[Runs, ...], stats: Stats) -> Array:
    """This rank's heads of all tokens, from this rank's tokens of all heads."""
    begin = perf_counter()
    batch, _, _, dim = x.shape
    count = shares[comm.rank].stop - shares[comm.rank].start
    send = [np.ascontiguousarray(x[:, :, share]) for share in shares]
    parts = [np.empty((batch, sum(map(len, each)), count, dim), x.dtype) for each in runs]
    _exchange(comm, send, parts, stats, begin)
    whole = np.empty((batch, sum(part.shape[1] for part in parts), count, dim), x.dtype)
    for part, each in zip(parts, runs, strict=True):
        place(whole, part, each, 0, 0)
    return whole


def _by_rows(comm: Comm, x: Array, shares: list[slice], heads: int, runs: tuple[Runs, ...], stats: Stats) -> Array:
    """This rank's tokens of all heads, from this rank's heads of all tokens."""
    begin = perf_counter()
    batch, _, _, dim = x.shape
    send = [np.concatenate([x[:, :0], *(x[:, run.start:run.stop:run.step] for run in each)], axis=1) for each in runs]
    tokens = sum(map(len, runs[comm.rank]))
    parts = [np.empty((batch, tokens, share.stop - share.start, dim), x.dtype) for share in shares]
    _exchange(comm, send, parts, stats, begin)
    return np.concatenate(parts, axis=2)


def _exchange(comm: Comm, send: list[Array], receive: list[Array], stats: Stats, begin: float) -> None:
    ready = perf_counter()
    comm.all_to_all(send, receive)
    stats.move += ready - begin
    stats.wait += perf_counter() - ready
    stats.sent += sum(x.nbytes for rank, x in enumerate(send) if rank != comm.rank)
    stats.received += sum(x.nbytes for rank, x in enumerate(receive) if rank != comm.rank)
