"""For how long a text each token's rotary angles are chosen, where that matters: dynamic NTK and longrope.

They follow from the length of the row after the call that reads the token. Where a text comes in several calls, the
first ones are told its whole length (`expecting`), so that a prompt has the same angles however it is cut.
"""
from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from forge_c.files import read_file
from forge_c.rotary import RopeTable
from forge_c.state.layer import Counts


class TableOf(Protocol):
    """A layer's tables; see forge_c.models.rope_tables."""

    def __call__(self, positions: int, length: int | None = None) -> RopeTable: ...

    @property
    def depends_on_length(self) -> bool: ...

    def chosen(self, length: int) -> int: ...

    def outdated(self, before: int, held: int, now: int) -> int | None: ...


class Angles:
    """of: for each row and token, the length for which its angles were chosen; of a row's last token negative, if the
    text of that length has been cut off behind it. expected (batch,): how long a row will
    be when all that is being read has been read. A cache and its rows' views share both."""

    def __init__(self, tables: Sequence[TableOf | None], of: list[array[int]], expected: Counts) -> None:
        self.tables = [t for t in dict.fromkeys(tables) if t is not None and t.depends_on_length]
        self.of, self.expected = of, expected

    def row(self, i: int) -> Angles:
        """Those of one row, in the same memory."""
        one = slice(i, i + 1)
        return Angles(self.tables, self.of[one], self.expected[one])

    @contextmanager
    def expecting(self, lengths: Counts, *, exactly: bool = False) -> Iterator[None]:
        """Rows become that long before the block ends; exactly: whatever a block around it expects."""
        before = self.expected.copy()
        self.expected[:] = lengths if exactly else np.maximum(before, lengths)
        try:
            yield
        finally:
            self.expected[:] = before

    def lengths(self, stop: Counts) -> Counts:
        """(batch,): the length for which each row's angles are chosen in a call after which it has `stop` tokens."""
        return np.maximum(stop, self.expected)

    def record(self, start: Counts, stop: Counts) -> None:
        """A call has read the rows' tokens from start to stop."""
        if self.tables:
            for of, a, b, length in zip(self.of, start.tolist(), stop.tolist(), self.lengths(stop).tolist(),
                                        strict=True):
                del of[a:]
                of.extend([0] * (a - len(of)) + [length] * (b - a))

    def truncate(self, kept: Counts) -> None:
        """Rows have that many tokens left."""
        for of, n, expected in zip(self.of, kept.tolist(), self.expected.tolist(), strict=True):
            del of[n:]
            if of and of[-1] > max(n, expected):
                of[-1] = -of[-1]

    def outdated(self, held: Counts, stop: Counts) -> dict[int, int]:
        """Rows whose `held` tokens must be read again before they become `stop` long, and for which length: those they
        were read for are not those of this text."""
        found: dict[int, int] = {}
        now = self.lengths(stop).tolist()
        for i, n in enumerate(held.tolist()):
            before = self.of[i][n - 1] if 0 < n <= len(self.of[i]) else 0
            for table in self.tables:
                length = table.outdated(before, n, now[i]) if n else None
                if length is not None:
                    found[i] = length
        return found

    def length_of_call(self, tokens: int, stop: Counts) -> int | None:
        """What to ask the tables for: a length, or None: each row has one new token, the last of its text."""
        lengths = self.lengths(stop)
        return None if tokens == 1 and (lengths == stop).all() else int(lengths[0])

    def tobytes(self, lengths: Counts) -> bytes:
        """For a file: the length of every token, row after row; 0 where it is not known."""
        rows = [np.array(of[:n], "<i8") for of, n in zip(self.of, lengths.tolist(), strict=True)]
        return b"".join(np.pad(row, (0, n - len(row))).tobytes() for row, n in zip(rows, lengths.tolist(), strict=True))

    def read(self, path: Path, lengths: Counts) -> None:
        """What `tobytes` wrote. ValueError unless it is of so many tokens."""
        count = sum(lengths.tolist())
        content = read_file(path, 8 * count)
        if len(content) != 8 * count:
            raise ValueError(f"ModelCache.load: {path} is damaged: {len(content)} bytes, expected {8 * count}")
        rows = np.split(np.frombuffer(content, "<i8").astype(np.int64), np.cumsum(lengths)[:-1])
        self.of = [array("q", row.tobytes()) for row in rows]

    def agree(self, tokens: int, stop: Counts) -> bool:
        """Whether one table serves all rows of a call."""
        lengths: NDArray[np.int64] = self.lengths(stop)
        return (tokens == 1 and bool((lengths == stop).all())) or all(
            len({t.chosen(n) for n in set(lengths.tolist())}) == 1 for t in self.tables)
