"""What a layer of attention does in a pass over tokens of a sharded cache. k, v are this rank's, rotated, in float32.

Prompt    each rank has some of the tokens: their keys and values stay with it, and those of all ranks, rounded as the
          cache rounds them, pass by the queries in the order of the keys: the bits of one process.
Step      each rank has all of the tokens: keys and values go to one shard, and what the queries find in each is
          merged. Two sums in an order of their own: within 2e-6 of one process, and the same bits on every rank.
"""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from forge_c.distributed.cache import ShardedKV
from forge_c.distributed.comm import Comm
from forge_c.distributed.decode import sharded_decode
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
        self._places: dict[int, dict[str, Any]] = {}

    def attend(self, layer: ShardedKV, q: Floats, k: Floats, v: Floats, out: Floats) -> None:
        """Queries over the keys of all ranks, and those keys into the cache that are this rank's."""
        kind = layer.kind
        if self.most:
            if self.order is not None:
                k, v = np.take_along_axis(k, self.order, 1), np.take_along_axis(v, self.order, 1)
            layer.kv.append(k[:, : self.most], v[:, : self.most], lens=self.lens)
        out[...] = sharded_decode(q, layer.kv, comm=self.comm, scale=kind.scale, softcap=kind.softcap,
                                  precision=self.precision, **self._placed(layer))

    def _placed(self, layer: ShardedKV) -> dict[str, Any]:
        """Who sees whom; without a window a single new token sees all."""
        batch, tokens = self.mine.shape
        window = layer.kind.window
        if tokens == 1 and window is None:
            return {}
        if (window or 0) not in self._places:  # layers with the same window hold the same tokens
            at = self.start[:, None] + np.arange(tokens)
            keys = np.zeros((batch, layer.kv.seq_len), np.int64)
            for b in range(batch):
                held = np.concatenate([layer.positions(b), at[b][self.mine[b]]])
                keys[b, : len(held)] = held
            self._places[window or 0] = {"causal": True, "window": window, "q_positions": at, "kv_positions": keys}
        return self._places[window or 0]


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
