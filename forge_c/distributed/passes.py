"""What a layer of attention does in a pass over tokens of a sharded cache. k, v are this rank's, rotated, in float32.

Prompt    each rank has some of the tokens: their keys and values stay with it, and those of all ranks, rounded as the
          cache rounds them, pass by the queries in the order of the keys: the bits of one process.
Step      each rank has all of the tokens: keys and values go to the shard of their chunk, and what the queries find in
          each chunk is folded in the order of the keys: the bits of one process, too.
"""
from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from forge_c.distributed.cache import ShardedKV
from forge_c.distributed.chunks import Chunks, attend_chunks
from forge_c.distributed.comm import Comm
from forge_c.distributed.owners import Owners
from forge_c.distributed.plan import Runs
from forge_c.distributed.ring import Ring
from forge_c.distributed.wire import Wire
from forge_c.formats.layout import Precision
from forge_c.functional import KV_CHUNK
from forge_c.state.kv import KVCache

Floats = NDArray[np.float32]
Positions = NDArray[np.int64]


class Places:
    """first: the first key's position, a multiple of KV_CHUNK; behind it, of each rank, where keys and queries lie;
    held: how many of the keys are this rank's."""

    def __init__(self, keys: list[Positions], queries: list[Positions], rank: int) -> None:
        first = min(int(at[0]) for at in keys if len(at))
        self.keys, self.queries = (tuple(runs_at(at - first) for at in of) for of in (keys, queries))
        self.held = len(keys[rank])


class Prompt:
    """queries: of all ranks, where their tokens of the pass lie."""

    def __init__(self, comm: Comm, owners: Owners | None, start: int, queries: list[Positions],
                 precision: Precision | None) -> None:
        self.comm, self.owners, self.start, self.queries, self.precision = comm, owners, start, queries, precision
        self._places: dict[int, Places] = {}

    def serve(self, layers: Iterable[Any]) -> None:
        """The pass of a rank that has no tokens, whose keys others may need."""
        for layer in layers:
            if isinstance(layer, ShardedKV):
                kind = layer.kind
                q, k = (np.empty((1, 0, n, kind.head_dim), np.float32) for n in (kind.n_heads, kind.n_kv_heads))
                self.attend(layer, q, k, k, q)

    def attend(self, layer: ShardedKV, q: Floats, k: Floats, v: Floats, out: Floats) -> None:
        """Queries at their positions over the keys of all ranks, and these keys into the cache."""
        kind, kv, at = layer.kind, layer.kv, self._placed(layer.kind.window)
        if k.shape[1]:
            kv.append(k, v)
        n = int(kv._lengths[0])
        k, v = held_by(kv, n - at.held, n)
        options: dict[str, Any] = {"causal": True, "window": kind.window, "scale": kind.scale,
                                   "softcap": kind.softcap, "precision": self.precision}
        wire = Wire("int8" if kv.dtype == "int8" else None, k.dtype, 1, k.shape[2], k.shape[3], v.shape[3])
        ring = Ring(self.comm, at.keys, wire, 2, None, None, q, k, v, options, None, queries=at.queries, kept=kv.dtype)
        ring.run()
        out[...] = ring.out

    def _placed(self, window: int | None) -> Places:
        """The keys from the first chunk on that some query may see, those of the pass included."""
        first = 0 if window is None else max(0, self.start - window + 1) // KV_CHUNK * KV_CHUNK
        if first not in self._places:
            assert self.owners is not None  # there are keys
            keys = [np.concatenate([self.owners.positions(r, first), at]) for r, at in enumerate(self.queries)]
            self._places[first] = Places(keys, self.queries, self.comm.rank)
        return self._places[first]


class Step:
    """The owners know which rank keeps each of the tokens (batch, n)."""

    def __init__(self, comm: Comm, owners: Owners, start: NDArray[np.int64], precision: Precision | None) -> None:
        self.comm, self.owners, self.start, self.precision = comm, owners, start, precision
        self.mine = owners.coming == comm.rank  # (batch, tokens)
        counts = self.mine.sum(1)
        self.most = int(counts.max())
        self.lens = None if (counts == self.most).all() else counts
        self.order: NDArray[np.intp] | None = None  # each row's own to its front
        if not self.mine[:, : self.most].all():
            self.order = np.argsort(~self.mine, axis=1, kind="stable")[:, : self.most, None, None]
        self._seen: dict[int, list[tuple[int, NDArray[np.int16], NDArray[np.int64]]]] = {}

    def attend(self, layer: ShardedKV, q: Floats, k: Floats, v: Floats, out: Floats) -> None:
        """Queries over the keys of all ranks, and those keys into the cache that are this rank's."""
        kind = layer.kind
        if self.most:
            if self.order is not None:
                k, v = np.take_along_axis(k, self.order, 1), np.take_along_axis(v, self.order, 1)
            layer.kv.append(k[:, : self.most], v[:, : self.most], lens=self.lens)
        options = {"causal": True, "window": kind.window, "scale": kind.scale, "softcap": kind.softcap,
                   "precision": self.precision}
        for b, (first, owner, lengths) in enumerate(self._chunks(kind.window)):
            held = self._pages_before(b, first) - int(layer.dropped[b]) // KV_CHUNK
            table = layer.kv._pages.table[b, held : held + int((owner == self.comm.rank).sum()), None]
            chunks = Chunks(first, owner, lengths, layer.kv._pages.with_table(np.ascontiguousarray(table)))
            at = self.start[b] + np.arange(q.shape[1])
            attend_chunks(q[b : b + 1], at, chunks, self.comm, out[b : b + 1], options)

    def _chunks(self, window: int | None) -> list[tuple[int, NDArray[np.int16], NDArray[np.int64]]]:
        """Of each row: the first chunk that some query sees, and from there on the rank and the tokens of each."""
        if (window or 0) not in self._seen:  # layers with the same window see the same
            self._seen[window or 0] = [self._row_chunks(b, window) for b in range(len(self.mine))]
        return self._seen[window or 0]

    def _row_chunks(self, b: int, window: int | None) -> tuple[int, NDArray[np.int16], NDArray[np.int64]]:
        start, stop = int(self.start[b]), int(self.start[b]) + self.mine.shape[1]
        first = 0 if window is None else max(start - window + 1, 0) // KV_CHUNK
        begins = np.arange(first * KV_CHUNK, stop, KV_CHUNK)
        known = np.array(self.owners.of[b][first * KV_CHUNK : start : KV_CHUNK], np.int16)
        new = begins[len(known) :] - start
        return first, np.concatenate([known, self.owners.coming[b, new]]), np.minimum(stop - begins, KV_CHUNK)

    def _pages_before(self, b: int, chunk: int) -> int:
        """How many chunks before this one are this rank's."""
        return -(-bisect_left(self.owners.mine[b], chunk * KV_CHUNK) // KV_CHUNK)


def held_by(kv: KVCache, start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """k, v (1, n, heads, dim) of its only row's tokens from start to stop, as it holds them; of int8 in float32."""
    dtype = np.dtype(ml_dtypes.bfloat16 if kv.dtype == "bfloat16" else np.float32)
    k, v = kv._pages.read(0, start, stop - start)
    return k[None].astype(dtype, copy=False), v[None].astype(dtype, copy=False)


def runs_at(at: Positions) -> Runs:
    """Ascending positions as evenly spaced runs."""
    steps = np.diff(at)
    changes = np.append(np.flatnonzero(np.diff(steps)) + 1, len(steps))
    runs, begin = [], 0
    while begin < len(at):
        step = int(steps[begin]) if begin < len(steps) else 1
        end = min(int(changes[np.searchsorted(changes, begin, side="right")]) if begin < len(steps) else begin,
                  len(steps))
        runs.append(range(int(at[begin]), int(at[end]) + 1, step))
        begin = end + 1
    return tuple(runs)
