"""Arrays of every layout that the border takes, in memory where a stray write shows and a stray read may kill."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from guard import guarded
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]

DTYPES = tuple(np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16))
KINDS = ("normal", "normal", "normal", "tiny", "denormal", "large", "huge", "zero", "constant", "nan", "inf", "mix")
MARGIN = 192  # canary bytes on both sides


class Subclass(np.ndarray):
    """A subclass that adds nothing."""


def values(rng: np.random.Generator, shape: tuple[int, ...], dtype: DTypeLike, kind: str = "normal") -> Array:
    """Numbers of a kind, rounded to dtype."""
    dtype = np.dtype(dtype)
    largest, least = float(ml_dtypes.finfo(dtype).max), float(ml_dtypes.finfo(dtype).smallest_subnormal)
    a = rng.standard_normal(shape)
    if kind == "mix":
        kinds = rng.integers(0, 6, shape)
        for i, other in enumerate(("tiny", "denormal", "large", "huge", "zero")):
            a = np.where(kinds == i, values(rng, shape, dtype, other).astype(np.float64), a)
    elif kind == "denormal":
        a = a * least * 100
    elif kind in ("tiny", "large", "huge"):
        a = a * {"tiny": 1e-6, "large": 300.0, "huge": largest / 4}[kind]
    elif kind in ("zero", "constant"):
        a = np.full(shape, 0.0 if kind == "zero" else rng.standard_normal())
    elif kind in ("nan", "inf"):
        at = rng.random(shape) < 0.05
        a = np.where(at, np.nan if kind == "nan" else np.where(rng.random(shape) < 0.5, np.inf, -np.inf), a)
    return np.asarray(np.clip(a, -largest, largest) if kind != "inf" else a).astype(dtype)


def strides_of(rng: np.random.Generator, shape: tuple[int, ...], item: int, *, last: bool, repeat: bool,
               ) -> tuple[list[int], int, int]:
    """(strides, offset of the first element, bytes) of a random layout.

    last: the last axis is contiguous, as most arguments ask; repeat: axes may have stride 0.
    """
    nd = len(shape)
    outer = list(range(nd - 1 if last else nd))
    rng.shuffle(outer)
    order = [*([nd - 1] if last and nd else []), *outer]  # from the innermost
    strides, offset, extent = [0] * nd, 0, item
    for axis in order:
        if repeat and axis in outer and rng.random() < 0.1:
            continue
        gap = int(rng.choice([0, 0, 0, item, 3 * item, 64, 1, 5])) if axis in outer else 0
        step, reach = extent + gap, (extent + gap) * max(shape[axis] - 1, 0)
        strides[axis] = step
        if axis in outer and rng.random() < 0.2:
            strides[axis], offset = -step, offset + reach
        extent += reach
    return strides, offset, extent if 0 not in shape else 0


class Arena:
    """Gives out arrays, and knows every byte around them."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.held: list[tuple[str, Array, bytes, Array | None]] = []

    def _memory(self, nbytes: int) -> Array:
        """Between guard pages, or between canaries at any alignment."""
        if self.rng.random() < 0.25:
            raw = guarded((nbytes,), np.uint8, at_end=bool(self.rng.random() < 0.5))
            raw[...] = 0xA5
            return raw
        shift = int(self.rng.choice([0, 0, 1, 2, 4, 7, 33]))
        return self.rng.integers(0, 256, nbytes + 2 * MARGIN + shift, np.uint8)[shift:]

    def _place(self, shape: tuple[int, ...], dtype: np.dtype[Any], *, last: bool, repeat: bool) -> tuple[Array, Array]:
        """(memory, an array in it)."""
        plain = self.rng.random() < 0.3
        strides, offset, nbytes = strides_of(self.rng, shape, dtype.itemsize, last=last, repeat=repeat)
        if plain:
            strides, offset, nbytes = list(np.empty(shape, dtype).strides), 0, int(np.prod(shape)) * dtype.itemsize
        raw = self._memory(nbytes)
        start = (len(raw) - nbytes) // 2 + offset
        return raw, np.ndarray(shape, dtype, raw, start if nbytes else 0, strides)

    def give(self, name: str, a: Array, *, last: bool = True, repeat: bool = True) -> Array:
        """An array of a's values (fewer where an axis repeats) in any layout; nothing may write to it."""
        raw, view = self._place(a.shape, a.dtype, last=last, repeat=repeat)
        view[...] = a
        if self.rng.random() < 0.2:
            view = view.view(Subclass)
        if self.rng.random() < 0.2:
            view.flags.writeable = False
        self.held.append((name, raw, raw.tobytes(), None))
        return view

    def out(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array full of junk to write to; nothing beside it may change."""
        raw, view = self._place(shape, dtype, last=True, repeat=False)
        inside = np.zeros(raw.size, bool)
        start = view.ctypes.data - raw.ctypes.data
        if view.size:
            np.ndarray((*shape, dtype.itemsize), bool, inside, start, (*view.strides, 1))[...] = True
        self.held.append((name, raw, raw.tobytes(), inside))
        return view

    def may_write(self, name: str, view: Array) -> None:
        """What give() gave under this name is an out now."""
        i = next(i for i, h in enumerate(self.held) if h[0] == name)
        raw, before = self.held[i][1:3]
        inside = np.zeros(raw.size, bool)
        if view.size:
            np.ndarray((*view.shape, view.itemsize), bool, inside, view.ctypes.data - raw.ctypes.data,
                       (*view.strides, 1))[...] = True
        self.held[i] = (name, raw, before, inside)

    def check(self) -> None:
        """Fail if a byte changed that no op had any business with."""
        for name, raw, before, inside in self.held:
            changed = raw != np.frombuffer(before, np.uint8)
            if inside is not None:
                changed &= ~inside
            if changed.any():
                raise AssertionError(f"{name}: {np.count_nonzero(changed)} bytes written that are not out's, "
                                     f"the first at {int(changed.argmax())} of {raw.size}")
