"""Which rank holds which token of a sharded cache: every rank knows it of all, so that none has to ask.

Chunks of KV_CHUNK positions are whole, so that what a chunk gives can be computed where it lies. A prompt's chunks are
cut by the layout, what is generated goes on in the last chunk, and then to the shortest shard. Every rank has room for
a little more than its part of the longest text; where a cut would not fit, ranks take blocks as large as what they
have left.
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
    chunks = -(-max_seq_len // KV_CHUNK)
    return min(chunks, -(-chunks // size) + 1) * KV_CHUNK


def cut(layout: str, tokens: int, of: array[int], held: Counts, room: int) -> Ranks:
    """The owner of each of so many new tokens behind those whose owners `of` names: by the layout, or, where a rank
    that holds held (size,) has no room for its part, in blocks of what they have room for. The caller has seen to it
    that there is enough in all."""
    owner = np.empty(tokens, np.int16)
    begun = min(-len(of) % KV_CHUNK, tokens)
    held = held.copy()
    if begun:
        owner[:begun] = of[-1]
        held[of[-1]] += begun
    ranks = np.argsort(held, kind="stable").astype(np.int16)  # who holds least has the blocks that may be longer
    if layout == "contiguous":  # a rank's tokens are one block, with those that it has already begun with
        ranks = (np.arange(len(held), dtype=np.int16) + (of[-1] if begun else 0)) % len(held)
    chunks = _by_layout(layout, -(-(tokens - begun) // KV_CHUNK), (room - held[ranks]) // KV_CHUNK)
    owner[begun:] = np.repeat(ranks[chunks], KV_CHUNK)[: tokens - begun]
    return owner


def by_tokens(layout: str, tokens: int, size: int) -> Ranks:
    """The same where nothing is kept of tokens but states."""
    return _by_layout(layout, tokens, np.full(size, tokens))


def _by_layout(layout: str, count: int, free: Counts) -> Ranks:
    """The owners of so many units; free (size,): how many more each rank has room for."""
    size = len(free)
    parts = [positions_of(layout, count, size, r) for r in range(size)]
    owner = np.empty(count, np.int16)
    if any(len(part) > free[r] for r, part in enumerate(parts)):
        return np.repeat(np.arange(size, dtype=np.int16), _blocks(count, free))
    for r, part in enumerate(parts):
        owner[part] = r
    return owner


def _blocks(count: int, free: Counts) -> Counts:
    """Lengths (size,), as even as `free` allows, of `count` in all."""
    lengths, size = np.zeros_like(free), len(free)
    for done, r in enumerate(np.argsort(free, kind="stable")):
        lengths[r] = min(free[r], -(-(count - lengths.sum()) // (size - done)))
    return lengths


def appended(tokens: int, of: array[int], held: Counts) -> Ranks:
    """The same as cut of tokens that every rank computes: to the chunk that is begun, then to the shortest shard."""
    owner, held, done = np.empty(tokens, np.int16), held.copy(), 0
    while done < tokens:
        at = len(of) + done
        n = min(KV_CHUNK - at % KV_CHUNK, tokens - done)
        r = int(held.argmin()) if at % KV_CHUNK == 0 else int(owner[done - 1] if done else of[-1])
        owner[done : done + n] = r
        held[r] += n
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
