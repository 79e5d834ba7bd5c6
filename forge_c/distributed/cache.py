"""A cache of which each rank holds some tokens: every rank makes the same calls of it and is told the same.

A layer's keys and values lie in a KVCache of this rank's tokens, in the order of their positions, which Owners knows.
With a window, pages whose tokens no query will see again go to the end of the table, to be written anew. Recurrent
states are whole on every rank.
"""
from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from forge_c.distributed.owners import Owners
from forge_c.functional import KV_CHUNK, AttentionState
from forge_c.models.spec import Attention
from forge_c.state import ModelCache
from forge_c.state.angles import TableOf
from forge_c.state.kv import KVCache
from forge_c.state.layer import Counts

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Shard:
    """A kind of mixer of which a cache holds one rank's part."""

    kind: Any
    rank: int
    size: int


class ShardedKV:
    """One layer's keys and values of this rank's tokens, a forge_c.state.LayerState.

    dropped (batch,): how many of them, whole pages, are no longer here. floor (batch,): the position before which no
    rank has kept all tokens, the same on each.
    """

    told_by_lengths = False

    def __init__(self, kind: Attention, kv: KVCache, owners: Owners) -> None:
        self.kind, self.kv, self.owners = kind, kv, owners
        self.dropped, self.floor = (np.zeros(kv.batch, np.int64) for _ in range(2))

    @classmethod
    def new(cls, kind: Attention, batch: int, dtype: str, owners: Owners) -> ShardedKV:
        """An empty one. With a window there is room for it, for what a rank has of a pass, and for the page at which
        either ends, if all that were this rank's."""
        room = owners.room
        if kind.window is not None:
            room = min(room, kind.window + owners.most + 3 * KV_CHUNK)
        return cls(kind, KVCache(batch, room, kind.n_kv_heads, kind.head_dim, dtype=dtype), owners)

    def join(self, owners: Owners) -> None:
        """Share what another layer knows of the tokens."""
        self.owners = owners

    def bound(self, table_of: TableOf | None) -> AttentionState:
        """What the forward pass is given of it."""
        return AttentionState(self.kv._pages, None if table_of is None else table_of(1), self._attend)

    def _attend(self, q: Floats, k: Floats, v: Floats, out: Floats) -> None:
        self.owners.at_work.attend(self, q, k, v, out)

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes

    def positions(self, b: int) -> NDArray[np.int64]:
        """Of row b's tokens that lie here, without those that come."""
        return np.array(self.owners.mine[b][int(self.dropped[b]) :], np.int64)

    # ---- passes ----

    def reserve(self, start: Counts, stop: Counts) -> None:
        """KVCache.append sees to it."""

    def commit(self, stop: Counts) -> None:
        if self.kind.window is not None:
            self.floor[:] = np.maximum(self.floor, stop - self.kind.window - KV_CHUNK)
            for b, floor in enumerate(self.floor.tolist()):
                self._drop(b, bisect_left(self.owners.mine[b], floor))

    def _drop(self, b: int, tokens: int) -> None:
        """Row b's pages of none but its first so many tokens."""
        pages = (tokens - int(self.dropped[b])) // KV_CHUNK
        if pages > 0:
            table = self.kv._pages.table[b]
            table[:] = np.roll(table, -pages)
            for count in (self.kv._lengths, self.kv._written):
                count[b] -= pages * KV_CHUNK
            self.dropped[b] += pages * KV_CHUNK

    def rollback(self, start: Counts) -> None:
        self._hold()

    def _hold(self) -> None:
        """No tokens but those that the owners know."""
        self.kv._lengths[:] = self.owners.held - self.dropped

    def check_truncate(self, keep: Counts) -> None:
        if self.kind.window is None:
            return
        gone = (keep > 0) & (np.maximum(keep - self.kind.window, 0) < self.floor)
        if gone.any():
            row = int(gone.argmax())
            raise ValueError(f"truncate: row {row} cannot go back to {keep[row]} tokens: of those before "
                             f"{self.floor[row]}, ranks keep no more than a window of {self.kind.window} needs")

    def truncate(self, keep: Counts) -> None:
        self.dropped[keep == 0] = self.floor[keep == 0] = 0
        self._hold()

    # ---- rows ----

    def _over(self, kv: KVCache, rows: Any) -> ShardedKV:
        twin = ShardedKV(self.kind, kv, self.owners)
        twin.dropped, twin.floor = self.dropped[rows], self.floor[rows]
        return twin

    def row(self, i: int) -> ShardedKV:
        twin = self._over(self.kv.row(i), slice(i, i + 1))
        twin.owners = self.owners.row(i)
        return twin

    def fork(self, n: int) -> ShardedKV:
        rows = np.repeat(np.arange(self.kv.batch), n)
        twin = self._over(self.kv.fork(n) if self.kind.window is None else self._copied(rows), rows)
        twin.owners = self.owners.rows(rows)
        return twin

    def _copied(self, rows: NDArray[np.intp]) -> KVCache:
        """Those rows in pages of their own: which of shared ones are the last, would not stay so."""
        kv = self.kv
        twin = KVCache(len(rows), kv.max_seq_len, kv.n_kv_heads, kv.head_dim, dtype=kv.dtype)
        for i, b in enumerate(rows.tolist()):
            twin._copy_pages(i, kv, b, 0)
        twin._lengths[:], twin._written[:] = kv._lengths[rows], kv._written[rows]
        return twin

    def copy(self) -> ShardedKV:
        rows = np.arange(self.kv.batch)
        twin = self._over(self._copied(rows), rows)
        twin.owners = self.owners.rows(rows)
        return twin

    def save(self, path: Path) -> NoReturn:
        raise _scattered("ModelCache.save")

    restore = save


class ShardedCache(ModelCache):
    """A ModelCache of which each rank holds some tokens; lengths, ids and the rest are of all of them. It is neither
    saved nor pickled.

    together: within `expecting`, whether every rank runs all tokens of the text that is being read; chosen: what says
    so of a number of tokens after so many.
    """

    together: bool | None = None
    owners: Owners | None = None
    chosen: Callable[[int, int], bool]

    def _bind(self) -> None:
        shards = [s for s in self.layers if isinstance(s, ShardedKV)]
        self.owners = shards[0].owners if shards else None
        for shard in shards[1:]:
            shard.join(shards[0].owners)
        super()._bind()
        if self.owners is not None:
            self._live = [self.owners, *self._live]  # first: layers ask it

    def _bound(self, state: Any, table_of: TableOf | None) -> Any:
        return state.bound(table_of) if isinstance(state, ShardedKV) else super()._bound(state, table_of)

    def row(self, i: int) -> ModelCache:
        twin = super().row(i)
        assert isinstance(twin, ShardedCache)
        twin.together, twin.chosen = self.together, self.chosen
        return twin

    def reads_together(self, tokens: int) -> bool:
        """Whether every rank runs all of so many tokens that come next."""
        return self.chosen(tokens, int(self._lengths.min())) if self.together is None else self.together

    @contextmanager
    def expecting(self, tokens: int) -> Iterator[None]:
        before = self.together
        self.together = self.reads_together(tokens)
        try:
            with super().expecting(tokens):
                yield
        finally:
            self.together = before

    def _twin(self, layers: list[Any], rows: NDArray[np.intp]) -> ModelCache:
        twin = super()._twin(layers, rows)
        assert isinstance(twin, ShardedCache)
        twin.chosen = self.chosen
        return twin

    def save(self, path: Any) -> NoReturn:
        raise _scattered("ModelCache.save")

    def __reduce__(self) -> NoReturn:
        raise _scattered("ModelCache")


def _scattered(function: str) -> ValueError:
    return ValueError(f"{function}: each rank holds a part of the cache, expected one of a model in one process")
