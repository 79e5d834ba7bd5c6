"""Attention of a few queries that every rank has, over chunks of keys that lie on many ranks: one process's bits.

What a chunk of KV_CHUNK keys gives a row, (o, max, sum), is the same wherever it is computed, and a row's result is its
chunks folded in the order of their positions. So each rank computes its chunks; rows are dealt out to the ranks, each
folds all chunks of its rows, and all rows are given to every rank. Of S tokens that moves S / KV_CHUNK H (E + 2) / N
floats to a rank for each query, 1 or 2 % of the bytes of the keys and values that are read meanwhile. sharded_decode
moves H (E + 1), whatever S is, and rounds in an order of its own.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge_c.distributed.comm import Comm
from forge_c.functional import KV_CHUNK, KVPages, fold_attention, fold_parts

Floats = NDArray[np.float32]
Counts = NDArray[np.int64]

_SEGMENT_BYTES = 8 << 20  # of parts of all chunks that go through at once


@dataclass
class Pages:
    """A page a row, as fold_attention takes a KVCache: _lengths (pages,) tokens in each."""

    _pages: KVPages
    _lengths: Counts
    window: int | None = None


@dataclass
class Chunks:
    """A row's keys from chunk `first` on. owner (chunks,): which rank has each; lengths (chunks,): tokens in each;
    pages: this rank's, a page a row."""

    first: int
    owner: NDArray[np.int16]
    lengths: Counts
    pages: KVPages


def attend_chunks(q: Floats, at: Counts, chunks: Chunks, comm: Comm, out: Floats, options: dict[str, Any]) -> None:
    """out (1, n, H, E) <- the attention of q (1, n, H, D), at positions at (n,), over chunks of keys at every position;
    options: fold_attention's. Every rank calls it with the same but for its pages."""
    heads, e = q.shape[2], out.shape[3]
    rows = q.shape[1] * heads
    dealt = np.array_split(np.arange(rows), comm.size)
    mine = _empty(len(dealt[comm.rank]), e)
    step = max(_SEGMENT_BYTES // (rows * (e + 2) * 4), comm.size)
    for begin in range(0, len(chunks.owner), step):
        some = slice(begin, begin + step)
        parts = _parts(q, at, chunks, some, comm.rank, e, options)
        fold_parts(mine, _exchanged(parts, chunks.owner[some], dealt, comm))
    carried = np.empty((rows, e + 2), np.float32)
    comm.all_gather_arrays(mine, [carried[r[0] : r[-1] + 1] if len(r) else carried[:0] for r in dealt])
    none = np.empty((1, 0, chunks.pages.kv_heads, q.shape[3]), np.float32)
    fold_attention(q, none, none if e == q.shape[3] else np.empty((1, 0, chunks.pages.kv_heads, e), np.float32),
                   carried.reshape(1, -1, heads, e + 2), at, out=out, **options)


def _empty(*shape: int) -> Floats:
    """(..., e + 2) that carries nothing yet."""
    carried = np.zeros((*shape[:-1], shape[-1] + 2), np.float32)
    carried[..., -2] = -np.inf
    return carried


def _parts(q: Floats, at: Counts, chunks: Chunks, some: slice, rank: int, e: int, options: dict[str, Any]) -> Floats:
    """(chunks, rows, e + 2) of those that this rank has."""
    held = np.flatnonzero(chunks.owner == rank)
    which = np.flatnonzero(chunks.owner[some] == rank) + some.start
    parts = _empty(len(which), q.shape[1], q.shape[2], e)
    if len(which):
        first = int(np.searchsorted(held, which[0]))
        table = chunks.pages.table[first : first + len(which)]
        fold_attention(np.broadcast_to(q, (len(which), *q.shape[1:])),
                       Pages(chunks.pages.with_table(table), chunks.lengths[which]), None, parts,
                       at - (which[:, None] + chunks.first) * KV_CHUNK, **options)
    return parts.reshape(len(which), q.shape[1] * q.shape[2], e + 2)


def _exchanged(parts: Floats, owner: NDArray[np.int16], dealt: list[NDArray[np.intp]], comm: Comm) -> Floats:
    """(chunks, rows, e + 2) of all chunks, in their order, for the rows dealt to this rank."""
    given = [np.ascontiguousarray(parts[:, rows]) for rows in dealt]
    shape = len(dealt[comm.rank]), parts.shape[2]
    taken = [np.empty((int((owner == r).sum()), *shape), np.float32) for r in range(comm.size)]
    comm.all_to_all(given, taken)
    whole = np.empty((len(owner), *shape), np.float32)
    for r, each in enumerate(taken):
        whole[owner == r] = each
    return whole
