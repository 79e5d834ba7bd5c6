"""What callers ask of rows' lengths, checked: for a layer's state and for a model's."""
from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c.checks import integer, unmasked
from forge_c.state.layer import Counts


def lengths_after(function: str, lengths: Counts, added: int | NDArray[np.int64], most: int) -> Counts:
    """Lengths (batch,) after `added` more tokens; ValueError if they do not fit."""
    stop: Counts = lengths + added
    if stop.max() > most:
        row = int(stop.argmax())
        raise ValueError(f"{function}: row {row} has {lengths[row]} tokens and {stop[row] - lengths[row]} more do not "
                         f"fit, max_seq_len is {most}")
    return stop


def lengths_kept(function: str, lengths: Counts, n: ArrayLike) -> Counts:
    """What is left of lengths (batch,) when n tokens are kept: of all rows (a shorter one keeps what it has), or of
    each. TypeError if n is neither, ValueError if it is negative or more than there are."""
    keep = np.asarray(unmasked(function, "n", n))
    if keep.dtype.kind not in "iu" or keep.shape not in ((), lengths.shape):
        raise TypeError(f"{function}: n is {n!r}, expected an integer or {len(lengths)} of them")
    most = lengths if keep.ndim else lengths.max()
    if (keep < 0).any() or (keep > most).any():
        raise ValueError(f"{function}: n is {keep.tolist()}, expected 0 to {most.tolist()}")
    return np.minimum(keep, lengths).astype(np.int64)


def checked_row(function: str, i: int, lengths: Counts) -> int:
    """TypeError if i is no integer, IndexError if there is no such row."""
    row = integer(function, "i", i)
    if not 0 <= row < len(lengths):
        raise IndexError(f"{function}: i is {row}, expected 0 to {len(lengths) - 1}")
    return row
