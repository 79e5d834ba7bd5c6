"""What a layer with a router remembers (mixture of depths): keys and values of the tokens that went through, and where
those lie. How many a row holds does not follow from how many tokens it has read."""
from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from forge_c.files import read_file
from forge_c.state.file import open_pages
from forge_c.state.kv import KVCache
from forge_c.state.layer import Counts


class RoutedCache:
    """A forge_c.state.LayerState around the KVCache of a layer's attention, which owns its lengths.

    Memory is taken for pages that hold a token; there is room for the case that all tokens go through. Attributes:
        kv: keys and values of the tokens that went through, one after the other.
    """

    told_by_lengths: ClassVar[bool] = False

    def __init__(self, kv: KVCache) -> None:
        self.kv = kv
        self._positions = np.zeros((kv.batch, kv.max_seq_len), np.int64)
        self._chosen = np.zeros(kv.batch, np.int64)  # of a pass, which writes it
        self._written = kv._written.copy()  # as before the last reserve

    @property
    def lengths(self) -> Counts:
        """Tokens of each row that went through, (batch,); a copy."""
        return self.kv.lengths

    @property
    def positions(self) -> list[NDArray[np.int64]]:
        """Where they lie, (length,) ascending for each row; copies."""
        return [row[:n].copy() for row, n in zip(self._positions, self.kv._lengths.tolist(), strict=True)]

    @property
    def dtype(self) -> str:
        """Name of the dtype that keys and values are kept in."""
        return self.kv.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that it has room for, if all tokens go through."""
        return self.kv.nbytes + self._positions.nbytes

    @property
    def held_nbytes(self) -> int:
        """Bytes of the pages that hold a token, and of their positions."""
        pages = sum(self.kv._used_pages(b) for b in range(self.kv.batch))
        return pages * self.kv._pages.page_nbytes + 8 * int(self.kv._lengths.sum())

    def __repr__(self) -> str:
        return f"RoutedCache(lengths={self.lengths.tolist()}, kv={self.kv!r})"

    # ---- a pass over new tokens ----

    def reserve(self, start: Counts, stop: Counts) -> None:
        """Room for all tokens [start, stop) of each row, whoever is chosen."""
        held = self.kv._lengths
        upto = held + (stop - start)
        self.kv.reserve(held, upto)
        self._written[:] = self.kv._written
        np.maximum(self.kv._written, upto, out=self.kv._written)
        self._chosen[:] = 0

    def commit(self, stop: Counts) -> None:
        """Those that the pass has chosen are there."""
        self.kv._lengths += self._chosen
        np.maximum(self._written, self.kv._lengths, out=self.kv._written)
        self._chosen[:] = 0

    def rollback(self, start: Counts) -> None:
        """Nobody was chosen; which slots of a ring the pass has written to is not known."""
        self._chosen[:] = 0

    # ---- back, and apart ----

    def _kept(self, keep: Counts) -> Counts:
        """How many of those that went through are among the first keep tokens of each row."""
        return np.array([np.searchsorted(at, n) for at, n in zip(self.positions, keep.tolist(), strict=True)], np.int64)

    def check_truncate(self, keep: Counts) -> None:
        """ValueError if a ring cannot go back so far."""
        self.kv.check_truncate(self._kept(keep))

    def truncate(self, keep: Counts) -> None:
        """Go back to so many tokens, gone through or not."""
        self.kv.truncate(self._kept(keep))

    def row(self, i: int) -> RoutedCache:
        """Row i alone, sharing what it holds with this state."""
        one = slice(i, i + 1)
        return _made(self.kv.row(i), self._positions[one], self._chosen[one], self._written[one])

    def fork(self, n: int) -> RoutedCache:
        """n rows for each row, independent of it from now on."""
        return self._twin(self.kv.fork(n), n)

    def copy(self) -> RoutedCache:
        """An independent state that holds the same."""
        return self._twin(self.kv.copy(), 1)

    def _twin(self, kv: KVCache, n: int) -> RoutedCache:
        twin = RoutedCache(kv)
        twin._place([at for at in self.positions for _ in range(n)])
        return twin

    def _place(self, positions: list[NDArray[np.int64]]) -> None:
        for row, at in zip(self._positions, positions, strict=True):
            row[: len(at)] = at

    def __copy__(self) -> RoutedCache:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutedCache:
        return self.copy()

    def __reduce__(self) -> Any:
        return _unpickled, (self.kv, self.positions)

    # ---- in files ----

    def save(self, path: Path) -> None:
        """The KVCache's file, and one of the positions beside it."""
        self.kv.save(path)
        _positions_file(path).write_bytes(b"".join(at.astype("<i8").tobytes() for at in self.positions))

    def restore(self, path: Path) -> None:
        """Hold what `save` wrote of a state of the same sizes; ValueError if it is not."""
        header, _ = open_pages(path, None)
        positions = _read(_positions_file(path), header.lengths, self.kv.max_seq_len)
        self.kv.restore(path)
        self._place(positions)

    def is_within(self, lengths: Counts) -> bool:
        """Whether rows of so many tokens can have sent those through."""
        return all(len(at) == 0 or at[-1] < n for at, n in zip(self.positions, lengths.tolist(), strict=True))


def _made(kv: KVCache, positions: NDArray[np.int64], chosen: Counts, written: Counts) -> RoutedCache:
    state = object.__new__(RoutedCache)
    state.kv, state._positions, state._chosen, state._written = kv, positions, chosen, written
    return state


def _unpickled(kv: KVCache, positions: list[NDArray[np.int64]]) -> RoutedCache:
    state = RoutedCache(kv)
    state._place(positions)
    return state


def _positions_file(path: Path) -> Path:
    return path.with_suffix(".positions.i64")


def _read(path: Path, lengths: tuple[int, ...], room: int) -> list[NDArray[np.int64]]:
    """Each row's positions: so many, ascending, from 0 to room - 1; ValueError if they are not."""
    content = read_file(path, 8 * sum(lengths) + 8)
    if len(content) == 8 * sum(lengths):
        rows = np.split(np.frombuffer(content, "<i8").astype(np.int64), np.cumsum(lengths)[:-1])
        if all(len(at) == 0 or (at[0] >= 0 and at[-1] < room and (np.diff(at) > 0).all()) for at in rows):
            return rows
    raise ValueError(f"ModelCache.load: {path} is damaged: {len(content)} bytes, expected {8 * sum(lengths)} of "
                     f"positions that ascend, from 0 to {room - 1}")
