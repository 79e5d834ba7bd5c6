"""Where the tokens of a sequence lie on N ranks: pure functions of (layout, length, N, rank), and the cut itself.

    contiguous   N blocks, rank r holds block r                       0011 2233
    striped      token i on rank i mod N                              0123 0123
    zigzag       2N blocks, rank r holds blocks r and 2N - 1 - r      0123 3210

Blocks differ by at most one token, the longer ones first, so any length goes, and ranks may hold unequal numbers or
none. Cuts need not fall on borders of the attention's key chunks: results have the same bits for every cut. A rank's
positions ascend.
"""
from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c.distributed.comm import Array, Comm, Disagreement

Layout = Literal["zigzag", "striped", "contiguous"]
LAYOUTS = ("zigzag", "striped", "contiguous")


def check_layout(function: str, layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"{function}: layout must be 'zigzag', 'striped' or 'contiguous', not {layout!r}")


def slices_of(layout: str, seq_len: int, size: int, rank: int) -> list[slice]:
    """The slices of the whole sequence that a rank holds, in the order in which it holds them."""
    check_layout("positions", layout)
    if seq_len < 0:
        raise ValueError(f"positions: seq_len must not be negative, not {seq_len}")
    if layout == "striped":
        return [slice(rank, seq_len, size)]
    if layout == "contiguous":
        return [_block(seq_len, size, rank)]
    return [_block(seq_len, 2 * size, rank), _block(seq_len, 2 * size, 2 * size - 1 - rank)]


def positions_of(layout: str, seq_len: int, size: int, rank: int) -> NDArray[np.int64]:
    """The positions (int64, ascending) of the tokens that a rank of size holds: what positions() says of its own."""
    return np.concatenate([np.arange(seq_len, dtype=np.int64)[each] for each in slices_of(layout, seq_len, size, rank)])


def length_of(layout: str, seq_len: int, size: int, rank: int) -> int:
    """How many tokens that is."""
    return sum(len(range(*each.indices(seq_len))) for each in slices_of(layout, seq_len, size, rank))


def positions(layout: Layout, seq_len: int, comm: Comm) -> NDArray[np.int64]:
    """The positions (int64, ascending) of this rank's tokens in a sequence of seq_len.

    >>> from forge_c.distributed import SelfComm, positions
    >>> positions("zigzag", 5, SelfComm())
    array([0, 1, 2, 3, 4])
    """
    return positions_of(layout, seq_len, comm.size, comm.rank)


def shard(x: ArrayLike, layout: Layout, comm: Comm, *, axis: int = 1) -> Array:
    """This rank's part of the whole x along axis (its tokens): an array of its own, contiguous, perhaps empty; nothing
    is sent. Raises ValueError if x has no such axis, or layout is unknown."""
    whole = np.asarray(x)
    axis = _axis("shard", "x", whole, axis)
    before = (slice(None),) * axis
    parts = [whole[(*before, each)] for each in slices_of(layout, whole.shape[axis], comm.size, comm.rank)]
    return np.concatenate(parts, axis)


def unshard(part: ArrayLike, layout: Layout, comm: Comm, *, axis: int = 1) -> Array:
    """The whole, on every rank, of which each rank gives its part: shard's inverse. Every rank calls it.

    Raises ValueError on every rank if parts differ in dtype or in a length other than axis's, or if their lengths are
    not those of the layout for any whole.
    """
    with comm.guard():
        mine = np.ascontiguousarray(part)
        check_layout("unshard", layout)
        axis = _axis("unshard", "part", mine, axis)
        rest = mine.shape[:axis] + mine.shape[axis + 1:]
        comm.agree("unshard: (layout, axis, other lengths, dtype)", (layout, axis, rest, mine.dtype.name))
        lengths = comm.all_gather(mine.shape[axis])
        total = sum(lengths)
        expected = [length_of(layout, total, comm.size, rank) for rank in range(comm.size)]
        if lengths != expected:
            raise Disagreement(f"unshard: parts have {lengths} tokens; {layout} parts of {total} have {expected}")
        parts = [np.empty((*mine.shape[:axis], n, *mine.shape[axis + 1:]), mine.dtype) for n in lengths]
        comm.all_gather_arrays(mine, parts)
        return _placed(parts, layout, axis, total)


def _placed(parts: list[Array], layout: str, axis: int, total: int) -> Array:
    whole = np.empty((*parts[0].shape[:axis], total, *parts[0].shape[axis + 1:]), parts[0].dtype)
    before = (slice(None),) * axis
    for rank, part in enumerate(parts):
        at = 0
        for each in slices_of(layout, total, len(parts), rank):
            target = whole[(*before, each)]
            target[...] = part[(*before, slice(at, at + target.shape[axis]))]
            at += target.shape[axis]
    return whole


def _block(seq_len: int, count: int, i: int) -> slice:
    """Block i of count: they differ by at most one, the longer ones first."""
    length, longer = divmod(seq_len, count)
    begin = i * length + min(i, longer)
    return slice(begin, begin + length + (i < longer))


def _axis(function: str, argument: str, array: NDArray[Any], axis: int) -> int:
    if not -array.ndim <= axis < array.ndim:
        raise ValueError(f"{function}: axis {axis} is none of {argument}, which has shape {array.shape}")
    return axis % array.ndim
