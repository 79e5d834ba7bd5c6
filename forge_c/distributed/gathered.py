"""Attention over ranks where keys and values are gathered whole, some heads at a time: one exchange a group of heads.

The next group travels while this one is computed, so a rank holds two groups of what it sees of the whole sequence.
"""
from __future__ import annotations

from time import perf_counter
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from forge_c.checks import checked_size
from forge_c.distributed.checks import check_call
from forge_c.distributed.comm import Array, Bytes, Comm, Pending
from forge_c.distributed.layout import Layout, positions_of
from forge_c.distributed.plan import Runs, rows_below, runs_of
from forge_c.distributed.ring import place
from forge_c.distributed.stats import Stats
from forge_c.distributed.wire import Wire, WireFormat, check_wire
from forge_c.functional import KV_CHUNK, attention

_GROUP_BYTES = 64 << 20


def seen_by(runs: Runs, seq_len: int, causal: bool, window: int | None) -> tuple[int, int]:
    """The keys [first, last) that rows of these runs see between them, from a whole chunk on."""
    if not any(runs):
        return 0, 0
    low = 0 if window is None else max(runs[0][0] - window + 1, 0) // KV_CHUNK * KV_CHUNK
    return low, runs[-1][-1] + 1 if causal else seq_len


class Exchange:
    """Keys and values of some heads: this rank's to all who see them, theirs to this rank."""

    def __init__(self, comm: Comm, runs: tuple[Runs, ...], seen: list[tuple[int, int]], wire: Wire, k: Array,
                 v: Array, stats: Stats) -> None:
        self.comm, self.runs, self.seen, self.wire, self.stats = comm, runs, seen[comm.rank], wire, stats
        self.pending: list[Pending] = []
        self.parts: list[tuple[int, int, Bytes, int]] = []  # owner, its first row, message, tokens
        me = comm.rank
        for rank in range(comm.size):
            begin, end = (rows_below(runs[rank], at) for at in self.seen)
            data = np.empty(wire.token_bytes * (end - begin), np.uint8)
            self.parts.append((rank, begin, data, end - begin))
            if rank != me and begin < end:
                self.pending.append(comm.receive(data, rank))
                stats.received += data.size
        for i in range(comm.size):
            rank = (me + i) % comm.size
            begin, end = (rows_below(runs[me], at) for at in seen[rank])
            data = self.parts[me][2] if rank == me else np.empty(wire.token_bytes * (end - begin), np.uint8)
            wire.encode(k[:, begin:end], v[:, begin:end], data)
            if rank != me and begin < end:
                self.pending.append(comm.send(data, rank))
                stats.sent += data.size

    def result(self) -> tuple[Array, Array]:
        """Keys and values at the positions that this rank sees."""
        begin = perf_counter()
        for each in self.pending:
            each.wait()
        came = perf_counter()
        first, last = self.seen
        wire = self.wire
        whole = tuple(np.empty((wire.batch, last - first, wire.heads, dim), wire.read)
                      for dim in (wire.head_dim, wire.v_dim))
        for owner, row, data, tokens in self.parts:
            for x, y in zip(whole, wire.decode(data, tokens), strict=True):
                place(x, y, self.runs[owner], row, first)
        self.parts.clear()
        self.stats.wait += came - begin
        self.stats.move += perf_counter() - came
        return whole[0], whole[1]


class Gathered:
    """One call: groups of key/value heads, one after the other."""

    def __init__(self, comm: Comm, runs: tuple[Runs, ...], wire: WireFormat | None, options: dict[str, Any],
                 heads: int | None, stats: Stats | None, k: Array, v: Array) -> None:
        self.comm, self.runs, self.format, self.k, self.v = comm, runs, wire, k, v
        self.stats = Stats() if stats is None else stats
        seq_len, one = sum(len(run) for each in runs for run in each), self._wire(1)
        self.seen = [seen_by(each, seq_len, options["causal"], options["window"]) for each in runs]
        some = max(_GROUP_BYTES // max(one.token_bytes * seq_len, 1), 1) if heads is None else heads
        self.groups = [slice(g, min(g + some, k.shape[2])) for g in range(0, k.shape[2], some)]
        self.options = {**options, "precision": one.precision(options["precision"])}

    def attend(self, q: Array, places: NDArray[np.int64], sinks: Array | None, out: Array,
               lse: NDArray[np.float32]) -> None:
        ratio, places = q.shape[2] // self.k.shape[2], places - self.seen[self.comm.rank][0]
        coming = self._start(0)
        for i, group in enumerate(self.groups):
            keys, values = coming.result()
            if i + 1 < len(self.groups):
                coming = self._start(i + 1)
            mine = slice(group.start * ratio, group.stop * ratio)
            begin = perf_counter()
            _, lse[:, :, mine] = attention(q[:, :, mine], keys, values, q_positions=places,
                                           sinks=None if sinks is None else sinks[mine], return_lse=True,
                                           out=out[:, :, mine], **self.options)
            self.stats.compute += perf_counter() - begin
            self.comm.progress()

    def _wire(self, heads: int) -> Wire:
        return Wire(self.format, self.k.dtype, self.k.shape[0], heads, self.k.shape[3], self.v.shape[3])

    def _start(self, i: int) -> Exchange:
        begin, group = perf_counter(), self.groups[i]
        exchange = Exchange(self.comm, self.runs, self.seen, self._wire(group.stop - group.start),
                            self.k[:, :, group], self.v[:, :, group], self.stats)
        self.stats.move += perf_counter() - begin
        return exchange


@overload
def gathered_attention(q: Array, k: Array, v: Array, *, comm: Comm, layout: Layout = "zigzag", causal: bool = True,
                       window: int | None = None, scale: float | None = None, softcap: float | None = None,
                       sinks: Array | None = None, wire: WireFormat | None = None, precision: str | None = None,
                       return_lse: Literal[False] = False, heads: int | None = None,
                       stats: Stats | None = None) -> Array: ...
@overload
def gathered_attention(q: Array, k: Array, v: Array, *, comm: Comm, layout: Layout = "zigzag", causal: bool = True,
                       window: int | None = None, scale: float | None = None, softcap: float | None = None,
                       sinks: Array | None = None, wire: WireFormat | None = None, precision: str | None = None,
                       return_lse: Literal[True], heads: int | None = None,
                       stats: Stats | None = None) -> tuple[Array, NDArray[np.float32]]: ...


def gathered_attention(q: Array, k: Array, v: Array, *, comm: Comm, layout: Layout = "zigzag", causal: bool = True,
                       window: int | None = None, scale: float | None = None, softcap: float | None = None,
                       sinks: Array | None = None, wire: WireFormat | None = None, precision: str | None = None,
                       return_lse: bool = False, heads: int | None = None,
                       stats: Stats | None = None) -> Array | tuple[Array, NDArray[np.float32]]:
    """This rank's rows of the attention over all ranks' tokens, as ring_attention gives them, by another way: the keys
    and values of `heads` key/value heads at a time (by default as many as take 64 MB, at least 1) come from all ranks
    at once, those that some row of this rank sees.

    Few, large messages and one call of the kernel a group: for sequences that are short, or windows, where a ring's
    pieces are small. A rank holds all that it sees of 2 groups, which grows with the sequence. Arguments, dtypes, wire
    and bits are those of ring_attention.

    Raises as ring_attention does.

    >>> from forge_c.distributed import SelfComm, gathered_attention
    >>> q = np.zeros((1, 1, 1, 4), np.float32)
    >>> gathered_attention(q, q, np.arange(4, dtype=np.float32).reshape(1, 1, 1, 4), comm=SelfComm())
    array([[[[0., 1., 2., 3.]]]], dtype=float32)
    """
    name = "gathered_attention"
    with comm.guard():
        check_wire(name, wire)
        if heads is not None:
            checked_size(name, "heads", heads)
        options: dict[str, Any] = {"causal": causal, "window": window, "scale": scale, "softcap": softcap,
                                   "precision": precision}
        sizes, seq_len = check_call(comm, name, q, k, v, layout, sinks, options, wire=wire, heads=heads)
        gathered = Gathered(comm, runs_of(layout, seq_len, comm.size), wire, options, heads, stats, k, v)
        out, lse = np.empty((*q.shape[:3], sizes.v_dim), q.dtype), np.empty(q.shape[:3], np.float32)
        places = positions_of(layout, seq_len, comm.size, comm.rank)
        gathered.attend(q, places, sinks, out, lse)
        return (out, lse) if return_lse else out
