"""The state of layers whose memory does not grow: after any number of tokens so many floats, which each token changes.

What a token did cannot be undone, so going back means having kept what was there. Each row has SLOTS slots: a pass
reads one and writes another, and nothing is ever copied. Which slot holds the state after how many tokens is the
History, one for all layers of a model, since they read the same tokens. Before the first token the state is zeros,
which no slot holds. A prompt is a pass of more than one token, with those after it that go on where it was as long as
a pass can be. Never overwritten are

    the current slot, so that a pass that fails changes nothing;
    the state before the last prompt, so that one of several passes can be taken back;
    the state after the last prompt, from which an answer can be drawn again;

which leaves one to write to: steps take turns between two slots, and these stay in the caches. So a row can go back to
its beginning, to before or after its last prompt, by its last pass, and to what is left of older ones: `nearest` and
the error of `check_truncate` say to where.
"""
from __future__ import annotations

import os
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from forge_c.files import open_regular
from forge_c.functional import KV_CHUNK, RecurrentSlots
from forge_c.state.layer import Counts

SLOTS = 4  # the three that are kept, and one to write to
_MAGIC = b"forge_c.recurrent 1\n"
_MOST = 1 << 40  # bytes of a file, tokens of a row

Slots = NDArray[np.int64]


class History:
    """Which slot of each row holds the state after how many tokens. It goes through passes in the place of all layers.

    held (batch, SLOTS): tokens, -1 for an empty slot. written (batch, SLOTS): larger for what was written later. The
    others (batch,): current and those before and after the last prompt, begin and prompt, are slots, -1 for zeros or
    none; target: the one that a pass writes; whole: whether the last pass read as many tokens as a pass can.
    """

    def __init__(self, batch: int) -> None:
        self.held = np.full((batch, SLOTS), -1, np.int64)
        self.written = np.zeros((batch, SLOTS), np.int64)
        self.current, self.prompt, self.begin = (np.full(batch, -1, np.int64) for _ in range(3))
        self.target, self.whole = np.zeros(batch, np.int64), np.zeros(batch, np.bool_)

    def _map(self, of: object) -> History:
        twin = object.__new__(History)
        for name, value in vars(self).items():
            setattr(twin, name, value[of])
        return twin

    def row(self, i: int) -> History:
        """Row i alone, in the same memory."""
        return self._map(slice(i, i + 1))

    def rows(self, rows: NDArray[np.intp]) -> History:
        """Those rows, in memory of their own."""
        return self._map(rows)

    @property
    def lengths(self) -> Counts:
        """(batch,): tokens that the current state has seen."""
        found = np.take_along_axis(self.held, self.current[:, None], 1)[:, 0]
        return np.where(self.current < 0, 0, found)

    # ---- a pass ----

    def reserve(self, start: Counts, stop: Counts) -> None:
        """Choose the slots that tokens [start, stop) end in."""
        np.copyto(self.begin, self.current, where=(stop - start > 1) & ~self.whole)
        worth = np.where(self.held < 0, np.iinfo(np.int64).max, self.written)  # of being overwritten
        rows = np.arange(len(worth))
        for kept in (self.current, self.prompt, self.begin):
            worth[rows[kept >= 0], kept[kept >= 0]] = -1
        self.target[:] = worth.argmax(1)
        self.held[rows, self.target] = -1  # from now on it holds nothing whole

    def commit(self, stop: Counts) -> None:
        """The pass has come to its end."""
        tokens = stop - self.lengths
        rows = np.flatnonzero(tokens)  # of none, the slot was not written
        target = self.target[rows]
        self.held[rows, target] = stop[rows]
        self.written[rows, target] = self.written[rows].max(1) + 1
        self.current[rows] = target
        np.copyto(self.prompt, self.current, where=tokens > 1)
        self.whole[rows] = tokens[rows] == KV_CHUNK

    def rollback(self, start: Counts) -> None:
        """Nothing to do: what is current stays so until commit."""

    # ---- back ----

    def nearest(self, keep: Counts) -> Counts:
        """(batch,): the most tokens, up to `keep`, to which each row can go back."""
        return np.where(self.held <= keep[:, None], self.held, -1).max(1).clip(0)

    def check_truncate(self, keep: Counts) -> None:
        """ValueError if a slot is gone."""
        missing = np.flatnonzero(self.nearest(keep) != keep)
        if len(missing):
            row = int(missing[0])
            there = sorted({0, *self.held[row][self.held[row] >= 0].tolist()})
            raise ValueError(f"truncate: row {row} cannot go back to {keep[row]} tokens: its recurrent state is kept "
                             f"after {', '.join(map(str, there))}")

    def truncate(self, keep: Counts) -> None:
        """Go back to so many tokens, for which check_truncate has been asked."""
        self.held[self.held > keep[:, None]] = -1
        self.current[:] = np.where(keep > 0, (self.held == keep[:, None]).argmax(1), -1)
        for kept in (self.prompt, self.begin):
            gone = (kept >= 0) & (np.take_along_axis(self.held, kept[:, None], 1)[:, 0] < 0)
            kept[gone] = -1
        self.whole[:] = False


class RecurrentState:
    """A layer's recurrent state of `batch` rows, a forge_c.state.LayerState; see above.

    memory (batch, SLOTS, floats) float32. history: its own, or the one that all such layers of a model share (`join`).
    """

    told_by_lengths = False

    def __init__(self, batch: int, floats: int) -> None:
        self._hold(np.zeros((batch, SLOTS, floats), np.float32), History(batch))

    def _hold(self, memory: NDArray[np.float32], history: History) -> None:
        self.memory, self.history = memory, history

    @classmethod
    def _of(cls, memory: NDArray[np.float32], history: History) -> Self:
        state = object.__new__(cls)
        state._hold(memory, history)
        return state

    def join(self, history: History) -> None:
        """Share the history of another layer, which has read the same tokens."""
        self.history = history

    def bound(self) -> RecurrentSlots:
        """What the forward pass is given of it."""
        return RecurrentSlots(self.memory, self.history.current, self.history.target)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.memory.nbytes

    # ---- the history's ----

    def reserve(self, start: Counts, stop: Counts) -> None:
        self.history.reserve(start, stop)

    def commit(self, stop: Counts) -> None:
        self.history.commit(stop)

    def rollback(self, start: Counts) -> None:
        self.history.rollback(start)

    def nearest(self, keep: Counts) -> Counts:
        """(batch,): the most tokens, up to `keep`, to which each row can go back."""
        return self.history.nearest(keep)

    def check_truncate(self, keep: Counts) -> None:
        self.history.check_truncate(keep)

    def truncate(self, keep: Counts) -> None:
        self.history.truncate(keep)

    # ---- rows ----

    def row(self, i: int) -> Self:
        return self._of(self.memory[i : i + 1], self.history.row(i))

    def fork(self, n: int) -> Self:
        rows = np.repeat(np.arange(len(self.memory)), n)
        return self._of(self.memory[rows], self.history.rows(rows))

    def copy(self) -> Self:
        return self.fork(1)

    # ---- files: _MAGIC, then int64 batch, SLOTS, floats and the history, then the slots that hold something ----

    def save(self, path: Path) -> None:
        h = self.history
        numbers = [np.array(self.memory.shape), h.held, h.written, h.current, h.prompt, h.begin, h.whole]
        with open(path, "xb") as file:
            file.write(_MAGIC)
            for array in numbers:
                file.write(array.astype("<i8").tobytes())
            for row, held in zip(self.memory, h.held, strict=True):
                for slot in np.flatnonzero(held >= 0):
                    file.write(row[slot].astype("<f4", copy=False).data)

    def restore(self, path: Path) -> None:
        batch, slots, floats = self.memory.shape
        count = batch * (2 * slots + 4)
        with open_regular(path) as file:
            content = file.read(len(_MAGIC) + 8 * (3 + count))
            numbers = np.frombuffer(content[len(_MAGIC) :][: 8 * (3 + count)].ljust(8 * (3 + count), b"\0"), "<i8")
            if content[: len(_MAGIC)] != _MAGIC or numbers[:3].tolist() != [batch, slots, floats]:
                raise ValueError(f"RecurrentState: {path} holds no state of {batch} rows of {floats} floats")
            history = _read_history(path, numbers[3:], batch)
            kept = history.held >= 0
            size = os.fstat(file.fileno()).st_size - len(content)
            if size != int(kept.sum()) * floats * 4:
                raise ValueError(f"RecurrentState: {path} is damaged: {size} bytes of states, expected "
                                 f"{int(kept.sum())} states of {floats * 4}")
            found = np.empty(floats, "<f4")
            for b, slot in np.argwhere(kept):
                file.readinto(found.view(np.uint8).data)  # type: ignore[attr-defined]
                self.memory[b, slot] = found
        for name, value in vars(history).items():
            getattr(self.history, name)[:] = value


def saved_rows(path: Path) -> int:
    """How many rows the state in a file has. ValueError if it is none."""
    with open_regular(path) as file:
        content = file.read(len(_MAGIC) + 8)
    if content[: len(_MAGIC)] != _MAGIC or len(content) != len(_MAGIC) + 8:
        raise ValueError(f"RecurrentState: {path} holds no recurrent state")
    return int.from_bytes(content[-8:], "little", signed=True)


def _read_history(path: Path, numbers: NDArray[np.int64], batch: int) -> History:
    """ValueError unless it could have come about."""
    history = History(batch)
    pieces = np.split(numbers, np.cumsum([batch * SLOTS] * 2 + [batch] * 3))
    for name, piece in zip(("held", "written", "current", "prompt", "begin", "whole"), pieces, strict=True):
        held = getattr(history, name)
        held[:] = piece.reshape(held.shape)
    h, rows = history, np.arange(batch)
    slots = np.stack([h.current, h.prompt, h.begin])
    sound = bool(((slots >= -1) & (slots < SLOTS)).all() and ((h.held >= -1) & (h.held <= _MOST)).all() and (
        (h.written >= 0) & (h.written <= _MOST)).all())
    # A slot that is pointed at holds something, and what is current is what has seen most.
    sound = sound and all((h.held[rows[one >= 0], one[one >= 0]] >= 0).all() for one in slots)
    if not sound or (h.held.max(1).clip(0) != h.lengths).any():
        raise ValueError(f"RecurrentState: {path} is damaged: its slots hold {h.held.tolist()} tokens, the current are "
                         f"{h.current.tolist()}")
    return history
