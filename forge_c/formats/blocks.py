"""ggml's blocks into lines of panels, and back out of them: numbers move, none changes.

A block of lines holds as many of ggml's as fill its lines; the numbers of 16 columns lie in it as LINES says, each in
whole lines of 64 bytes or side by side in the last one:

    low plane     the lowest bits of u, row.bits of them, k_step rows of W a line: byte i of a column holds
                  k = i, i + 4, i + 8, .. in its bits from the lowest on
    upper plane   the bits above them, in the same way
    scales, minima, d, m      16 columns side by side, then the next sub-block's or ggml block's
"""
from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forge_c.formats import ggml
from forge_c.formats.layout import LINE, PANEL, Format
from forge_c.functional import get_num_threads

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Lines:
    """How a block of lines holds the numbers of a ggml type: the bits of u in the upper plane, and what follows it."""

    type: str
    upper: int
    rest: tuple[str, ...]

    @property
    def of(self) -> ggml.BlockType:
        return ggml.TYPES[self.type]


# dtype of a PackedWeight -> its lines
LINES = {
    "int4": Lines("Q4_0", 0, ("d",)),
    "q4_1": Lines("Q4_1", 0, ("d", "m")),
    "q5_0": Lines("Q5_0", 1, ("d",)),
    "q5_1": Lines("Q5_1", 1, ("d", "m")),
    "q8_0": Lines("Q8_0", 0, ("d",)),
    "q2_k": Lines("Q2_K", 0, ("scales", "d", "m")),
    "q3_k": Lines("Q3_K", 1, ("scales", "d")),
    "q4_k": Lines("Q4_K", 0, ("scales", "minima", "d", "m")),
    "q5_k": Lines("Q5_K", 1, ("scales", "minima", "d", "m")),
    "q6_k": Lines("Q6_K", 2, ("scales", "d")),
    "iq4_nl": Lines("IQ4_NL", 0, ("d",)),
    "iq4_xs": Lines("IQ4_XS", 0, ("scales", "d")),
    "mxfp4": Lines("MXFP4", 0, ("d",)),
}
DTYPE_OF = {lines.type: dtype for dtype, lines in LINES.items()}


def fill(name: str, f: Format, panels: Bytes, raw: Bytes) -> None:
    """panels (n_panels, panel bytes), which may be strided <- raw (out, ggml blocks, bytes). Pieces are filled by
    threads. ValueError, which begins with `name`, for a scale that is not finite."""
    k = raw.shape[1] * LINES[f.dtype].of.weights
    at_once = panels_at_once(k)

    def piece(first: int) -> None:
        rows = raw[first * PANEL:(first + at_once) * PANEL]
        _put(name, f, panels[first:first + at_once], rows)

    if panels.size == 0:
        return
    in_threads(range(0, len(panels), at_once), piece)


def panels_at_once(k: int) -> int:
    """Panels of k rows that a thread converts at once: with what that takes meanwhile, 12 bytes a weight, they stay in
    its cache, and all threads' together under 16 MB."""
    return max(1, min(1 << 18, (1 << 20) // _threads()) // max(1, PANEL * k))


def _threads() -> int:
    """As many as an operation may use."""
    return min(get_num_threads(), os.cpu_count() or 1)


def in_threads(pieces: range, work: Callable[[int], None]) -> None:
    """work(piece) of each."""
    threads = _threads()
    if threads == 1 or len(pieces) < 2:
        for piece in pieces:
            work(piece)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, pieces))


def _put(name: str, f: Format, panels: Bytes, rows: Bytes) -> None:
    """panels (n, panel bytes) <- rows (out, ggml blocks, bytes); columns and k that are not there become zeros."""
    lines, (n, k, _) = LINES[f.dtype], rows.shape
    blocks = panels.shape[1] // f.block_bytes
    columns, count = len(panels) * PANEL, blocks * f.block_k // lines.of.weights
    if (n, k) != (columns, count):
        rows, given = np.zeros((columns, count, lines.of.nbytes), np.uint8), rows
        rows[:n, :k] = given
    flat = rows.reshape(columns * count, lines.of.nbytes)
    ggml.check_scales(name, lines.of, flat)
    numbers = ggml.numbers(lines.of, flat)
    u = numbers.u.reshape(columns, count, lines.of.weights)
    u[n:], u[:, k:] = lines.of.zero, lines.of.zero
    put_numbers(f, panels, numbers)


def put_numbers(f: Format, panels: Bytes, numbers: ggml.Numbers) -> None:
    """panels (n, panel bytes) <- the numbers of all their ggml blocks, those of a column one after the other."""
    lines, blocks = LINES[f.dtype], panels.shape[1] // f.block_bytes
    out = panels.reshape(len(panels), blocks, f.block_bytes)
    at = _put_plane(out, 0, numbers.u, f.row.bits, 0)
    at = _put_plane(out, at, numbers.u, lines.upper, f.row.bits)
    for of in lines.rest:
        values = getattr(numbers, of)
        size = values.size * values.itemsize // (out.shape[0] * out.shape[1])
        by_block = values.reshape(len(out), PANEL, blocks, -1).transpose(0, 2, 3, 1)
        out[:, :, at:at + size] = np.ascontiguousarray(by_block).view(np.uint8).reshape(len(out), blocks, size)
        at += size
    out[:, :, at:] = 0


def _mask(bits: int) -> np.uint32:
    """So many bits of each byte."""
    return np.uint32(0x01010101 * ((1 << bits) - 1))


def _put_plane(out: Bytes, at: int, u: Bytes, bits: int, above: int) -> int:
    """Bits `above`.. of u, so many, into lines of `out` from byte `at` on; where they end."""
    if bits == 0:
        return at
    steps, (panels, blocks, _) = 8 // bits, out.shape
    fours = u.view(np.uint32).reshape(panels, PANEL, blocks, -1, steps)
    plane = fours[..., 0] if bits == 8 else fours[..., 0] >> np.uint32(above) & _mask(bits)
    for step in range(1, steps):
        few = fours[..., step] >> np.uint32(above)
        few &= _mask(bits)
        few <<= np.uint32(bits * step)
        plane |= few
    end = at + plane.shape[3] * LINE
    out[:, :, at:end].view(np.uint32).reshape(panels, blocks, -1, PANEL)[...] = plane.transpose(0, 2, 3, 1)
    return end


def _take_plane(lines: Bytes, at: int, u: NDArray[np.uint32], bits: int, above: int) -> int:
    """The inverse of _put_plane, into u (panels, 16, blocks, 4 k) uint32."""
    if bits == 0:
        return at
    steps, (panels, blocks, _) = 8 // bits, lines.shape
    fours = u.reshape(panels, PANEL, blocks, -1, steps)
    end = at + fours.shape[3] * LINE
    plane = np.ascontiguousarray(lines[:, :, at:end]).view(np.uint32).reshape(panels, blocks, -1, PANEL)
    for step in range(steps):
        few = plane.transpose(0, 3, 1, 2) >> np.uint32(bits * step) & _mask(bits)
        fours[..., step] |= few << np.uint32(above)
    return end


def take(f: Format, panels: Bytes) -> Floats:
    """(panels * 16, k in whole blocks): columns of W as rows, from panels (panels, blocks, block bytes)."""
    count, blocks, _ = panels.shape
    w = np.empty((count * PANEL, blocks * f.block_k), np.float32)
    at_once = max(1, (1 << 18) // max(1, PANEL * w.shape[1]))
    if w.size == 0:
        return w
    for first in range(0, count, at_once):
        some = panels[first:first + at_once]
        ggml.weights(LINES[f.dtype].of, _numbers(f, some), w[first * PANEL:(first + len(some)) * PANEL])
    return w


def _kind(of: ggml.BlockType, name: str) -> tuple[np.dtype, int]:
    """dtype and numbers a block of one of the lists in Numbers."""
    if name in ("d", "m"):
        return np.dtype(np.uint8 if name == "d" and of.d_bytes else np.float16), 1
    return np.dtype(np.int8 if of.m is None else np.uint8), of.weights // of.sub


def _numbers(f: Format, panels: Bytes) -> ggml.Numbers:
    """What _put was given."""
    lines, (count, blocks, _) = LINES[f.dtype], panels.shape
    of = lines.of
    n = count * PANEL * blocks * f.block_k // of.weights
    u = np.zeros((count, PANEL, blocks, f.block_k // 4), np.uint32)
    at = _take_plane(panels, 0, u, f.row.bits, 0)
    at = _take_plane(panels, at, u, lines.upper, f.row.bits)
    found = {}
    for name in lines.rest:
        dtype, each = _kind(of, name)
        size = f.block_k // of.weights * each * PANEL * dtype.itemsize
        values = np.ascontiguousarray(panels[:, :, at:at + size]).view(dtype).reshape(count, blocks, -1, PANEL)
        found[name] = np.ascontiguousarray(values.transpose(0, 3, 1, 2)).reshape(n, each)
        at += size
    return ggml.Numbers(u.reshape(n, -1).view(np.uint8), **found)
