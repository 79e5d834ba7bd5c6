"""The interface of a layer's state. The model owns how many tokens each row holds, a state what they left behind."""
from __future__ import annotations

from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]  # (batch,) tokens of each row


class LayerState(Protocol):
    """What one layer remembers of a batch of rows.

    A pass over new tokens is reserve(start, stop), the pass itself, then commit(stop), or rollback(start) if it did not
    come to its end. Where told_by_lengths is True, what a row holds follows from its number of tokens alone: such a
    state hears of reserve only when a row reaches memory that it has not reserved, of commit and rollback never.
    """

    told_by_lengths: bool

    @property
    def nbytes(self) -> int:
        """Bytes that it has room for."""

    def reserve(self, start: Counts, stop: Counts) -> None:
        """Make room for the tokens [start, stop) of each row, and keep what leads back to start. MemoryError, or
        whatever makes it impossible; then nothing has changed."""

    def commit(self, stop: Counts) -> None:
        """The tokens before stop are there."""

    def rollback(self, start: Counts) -> None:
        """Be as before the last reserve."""

    def check_truncate(self, keep: Counts) -> None:
        """ValueError if it cannot go back to so many tokens."""

    def truncate(self, keep: Counts) -> None:
        """Go back to so many tokens: exactly as if the others had never been."""

    def fork(self, n: int) -> Self:
        """n rows for each row, independent of it from now on."""

    def row(self, i: int) -> Self:
        """Row i alone, sharing what it holds with this state."""

    def copy(self) -> Self:
        """An independent state that holds the same."""

    def save(self, path: Path) -> None:
        """Write a new file."""

    def restore(self, path: Path) -> None:
        """Hold what `save` wrote of a state of the same sizes; ValueError if it is not."""
