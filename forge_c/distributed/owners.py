"""Which rank holds which token of a sharded cache: every rank knows it of all, so that none has to ask.

A prompt's tokens are cut by the layout, what is generated goes to the shortest shard. Every rank has room for a little
more than its part of the longest text; where a cut would not fit, ranks take blocks as large as what they have left.
"""
from __future__ import annotations

from array import array
from bisect import bisect_left
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge_c.distributed.layout import positions_of
from forge_c.functional import KV_CHUNK
from forge_c.state.layer import Counts

Ranks = NDArray[np.int16]  # of each token


def room_of(max_seq_len: int, size: int) -> int:
    """Tokens that a rank has room for: of size ranks, together, at least max_seq_len."""
    return min(max_seq_len, -(-max_seq_len // size) + KV_CHUNK)


def cut(layout: str, tokens: int, held: Counts, room: int) -> Ranks:
    """The owner of each of so many new tokens: by the layout, or, where a rank that holds held (size,) has no room for
    its part, in blocks of what they have room for. The caller has seen to it that there is enough in all."""
    size = len(held)
    owner = np.empty(tokens, np.int16)
    parts = [positions_of(layout, tokens, size, r) for r in range(size)]
    if all(held[r] + len(part) <= room for r, part in enumerate(parts)):
        for r, part in enumerate(parts):
            owner[part] = r
        return owner
    return np.repeat(np.arange(size, dtype=np.int16), _blocks(tokens, room - held))


def _blocks(tokens: int, free: Counts) -> Counts:
    """Lengths (size,), as even as `free` allows, of `tokens` in all."""
    lengths, size = np.zeros_like(free), len(free)
    for done, r in enumerate(np.argsort(free, kind="stable")):
        lengths[r] = min(free[r], -(-(tokens - lengths.sum()) // (size - done)))
    return lengths


def appended(tokens: int, held: Counts, room: int) -> Ranks:
    """The same of tokens that every rank computes: all to the shortest shard, as far as they fit."""
    owner, done = np.empty(tokens, np.int16), 0
    for r in np.argsort(held, kind="stable"):
        n = min(tokens - done, room - int(held[r]))
        owner[done : done + n] = r
        done += n
    return owner


class Owners:
    """of: for each row the owners of its tokens; mine: the positions of this rank's; counts (batch, size): how many
    each rank has. It goes through passes as a layer's state does, before all of them; coming (batch, tokens): of the
    tokens of the pass at hand; at_work: what attends in it; most: how many tokens a rank may have of a pass."""

    told_by_lengths = False

    def __init__(self, batch: int, rank: int, size: int, room: int, most: int) -> None:
        self.rank, self.size, self.room, self.most = rank, size, room, most
        self.of = [array("h") for _ in range(batch)]
        self.mine = [array("q") for _ in range(batch)]
        self.counts = np.zeros((batch, size), np.int64)
        self.coming: Ranks = np.empty((batch, 0), np.int16)
        self.at_work: Any = None

    @property
    def held(self) -> Counts:
        """(batch,) tokens that this rank holds."""
        return self.counts[:, self.rank]

    def positions(self, rank: int, first: int = 0) -> NDArray[np.int64]:
        """Of the only row's tokens from position `first` on, those that a rank holds; without those that come."""
        if rank == self.rank:
            return np.array(self.mine[0][bisect_left(self.mine[0], first) :], np.int64)
        return np.flatnonzero(np.array(self.of[0][first:], np.int16) == rank) + first

    def reserve(self, start: Counts, stop: Counts) -> None:
        """There is room, or `coming` would not say so."""

    def commit(self, stop: Counts) -> None:
        """The tokens that came are held."""
        for b, new in enumerate(self.coming):
            before = len(self.of[b])
            self.of[b].extend(new.tolist())
            self.mine[b].extend((np.flatnonzero(new == self.rank) + before).tolist())
            self.counts[b] += np.bincount(new, minlength=self.size)

    def rollback(self, start: Counts) -> None:
        self.truncate(start)

    def truncate(self, keep: Counts) -> None:
        """Rows have that many tokens left."""
        for b, n in enumerate(keep.tolist()):
            if n < len(self.of[b]):
                del self.of[b][n:]
                found = np.bincount(np.array(self.of[b], np.int16), minlength=self.size)
                self.counts[b] = found
                del self.mine[b][int(found[self.rank]) :]

    def row(self, i: int) -> Owners:
        """Row i alone, in the same memory."""
        return self._map(slice(i, i + 1), self.of[i : i + 1], self.mine[i : i + 1])

    def rows(self, rows: NDArray[np.intp]) -> Owners:
        """Those rows, in memory of their own."""
        return self._map(rows, [self.of[b][:] for b in rows], [self.mine[b][:] for b in rows])

    def _map(self, rows: Any, of: list[array[int]], mine: list[array[int]]) -> Owners:
        twin = object.__new__(Owners)
        twin.rank, twin.size, twin.room, twin.most, twin.of, twin.mine = (
            self.rank, self.size, self.room, self.most, of, mine)
        twin.counts, twin.coming, twin.at_work = self.counts[rows], np.empty((len(of), 0), np.int16), None
        return twin
