"""Numbers into the lines of a format, and back out of them: what pack and unpack do to one matrix."""
from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from forge_c.formats import blocks
from forge_c.formats.layout import LINE, PANEL, Format
from forge_c.functional import get_num_threads, pack_columns

_STORED = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# Groups of int4 under 64 of float16's least steps get the best of the few scales that float16 has there.
_LEAST_HALF = np.float32(2.0**-24)
_TINY = 64 * _LEAST_HALF

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def fill(name: str, f: Format, panels: Bytes, weight: NDArray) -> None:
    """panels (n_panels, panel bytes) <- weight (in, out); panels may be strided. Pieces are filled by threads."""
    put = _PUT[f.name]

    def piece(first: int) -> None:
        put(name, f, panels[first:first + at_once], weight[:, first * PANEL:(first + at_once) * PANEL])

    if panels.size == 0:
        return
    threads = min(get_num_threads(), os.cpu_count() or 1)
    # Floats are moved by threads of their own, unless NumPy has to convert or transpose them first.
    at_once = max(1, (1 << 18) // max(1, PANEL * weight.shape[0])) if weight.size > 1 << 16 else len(panels)
    if put is _put_floats and weight.dtype == _STORED[f.dtype] and weight.strides[:1] == (weight.itemsize,):
        at_once = len(panels)
    starts = range(0, len(panels), max(at_once, 1))
    if threads == 1 or len(starts) < 2:
        for first in starts:
            piece(first)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(piece, starts))


def _put_floats(name: str, f: Format, out: Bytes, columns: NDArray) -> None:
    """out (panels, panel bytes)."""
    pack_columns(out, np.ascontiguousarray(columns.T, dtype=_STORED[f.dtype]))


def blocks_of(f: Format, out: Bytes, columns: NDArray) -> Bytes:
    """out (panels, panel bytes) as (panels, blocks, block bytes)."""
    return out.reshape(len(out), f.blocks(len(columns)), f.block_bytes)


def _grouped(name: str, f: Format, panels: int, blocks: int, columns: NDArray) -> Floats:
    """(panels * 16, groups, group) float32, padded: columns of W as rows. ValueError if a value is not finite."""
    k, n = columns.shape
    group = f.group or 1
    wide = np.zeros((panels * PANEL, blocks * f.block_k), np.float32)
    wide[:n, :k] = columns.T
    if f.has_minimum and k:
        wide[:n, k:] = wide[:n, k - 1:k]  # what pads a group must not widen its range
    if not np.isfinite(wide).all():
        raise ValueError(f"{name}: weight holds a NaN or an infinity, which {f.dtype} cannot")
    return wide.reshape(panels * PANEL, blocks * f.block_k // group, group)


def _scale(name: str, f: Format, wanted: Floats) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = wanted.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError(f"{name}: weight needs a scale of {np.abs(wanted).max():.3g}, more than int4's float16 holds")
    return half


def _inverse(scale: Floats) -> Floats:
    """1 / scale, 0 where that is not finite."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    inverse[~np.isfinite(inverse)] = 0
    return inverse


def _tiny(w: Floats) -> NDArray[np.bool_]:
    """Which groups of w (panels * 16, groups, group) are so small, and not zero."""
    largest = np.abs(w).max(axis=2)
    return (largest > 0) & (largest < _TINY)


def _whole_steps(w: Floats, widest: Floats) -> tuple[Floats, Floats]:
    """w (groups, group) ~ 2^-24 step q: q nearest, so no value moves further than to zero; step (groups, 1).

    The step is the one from 1 to 10 of least squared error, `widest` (groups, 1) at least: then q is in its range.
    """
    fine = w / _LEAST_HALF
    step, least = np.ones_like(widest), np.full_like(widest, np.inf)
    for candidate in np.arange(1, 11, dtype=np.float32):
        error = np.square(fine - candidate * np.rint(fine / candidate)).sum(axis=1, keepdims=True)
        better = (candidate * _LEAST_HALF >= widest) & (error < least)
        step[better], least[better] = candidate, error[better]
    return step, np.rint(fine / step)


def put_lines(f: Format, out: Bytes, u: Bytes) -> None:
    """u (panels * 16, groups, group) into the lines of out (panels, blocks, block bytes)."""
    panels, blocks = out.shape[:2]
    rows: Bytes = u.reshape(panels, PANEL, blocks, f.block_k)
    if f.row.bits == 4:
        eight = rows.reshape(panels, PANEL, blocks, f.block_k // 8, 2, 4)
        rows = (eight[..., 0, :] | (eight[..., 1, :] << np.uint8(4))).reshape(panels, PANEL, blocks, f.block_k // 2)
    fours = np.ascontiguousarray(rows).view(np.uint32)
    lines = out.view(np.uint32)[:, :, :-LINE // 4].reshape(panels, blocks, f.block_k // f.k_per_line, PANEL)
    lines[...] = fours.transpose(0, 2, 3, 1)


def per_group(f: Format, out: Bytes, values: NDArray) -> NDArray:
    """values (panels * 16, groups) as (panels, blocks, groups of a block, 16)."""
    panels, blocks = out.shape[:2]
    return values.reshape(panels, PANEL, blocks, f.block_k // (f.group or 1)).transpose(0, 2, 3, 1)


def _put_int8(name: str, f: Format, panels: Bytes, columns: NDArray) -> None:
    out = blocks_of(f, panels, columns)
    w = _grouped(name, f, len(out), out.shape[1], columns)
    scale = np.abs(w).max(axis=2) / np.float32(127)
    q = np.rint(w * _inverse(scale)[:, :, None])
    np.clip(q, -127, 127, out=q)
    put_lines(f, out, (q + np.float32(f.row.zero)).astype(np.uint8))
    out[:, :, -LINE:].view(np.float32)[...] = per_group(f, out, scale)[:, :, 0]


def _put_int4(name: str, f: Format, panels: Bytes, columns: NDArray) -> None:
    """As Q4_0: the value of largest magnitude becomes -8, the others are rounded half up."""
    out = blocks_of(f, panels, columns)
    w = _grouped(name, f, len(out), out.shape[1], columns)
    largest = np.abs(w).argmax(axis=2)
    scale = np.take_along_axis(w, largest[:, :, None], axis=2)[:, :, 0] / np.float32(-8) + np.float32(0)  # no -0
    half = _scale(name, f, scale)
    u = w * _inverse(scale)[:, :, None] + np.float32(8.5)
    np.clip(u, 0, 15, out=u)
    tiny = _tiny(w)
    if tiny.any():
        sign = np.where(scale[tiny] < 0, np.float32(-1), np.float32(1))[:, None]
        turned = w[tiny] * sign
        widest = np.maximum(turned.min(axis=1) / np.float32(-8), turned.max(axis=1) / np.float32(7))
        step, q = _whole_steps(turned, widest[:, None])
        half[tiny], u[tiny] = (step * sign * _LEAST_HALF)[:, 0], q + 8
    put_lines(f, out, u.astype(np.uint8))
    out[:, :, -LINE:].view(np.float16).reshape(*out.shape[:2], 2, PANEL)[...] = per_group(f, out, half)


def _put_int4z(name: str, f: Format, panels: Bytes, columns: NDArray) -> None:
    out = blocks_of(f, panels, columns)
    w = _grouped(name, f, len(out), out.shape[1], columns)
    minimum = _scale(name, f, w.min(axis=2))
    scale = _scale(name, f, (w.max(axis=2) - minimum.astype(np.float32)) / np.float32(15))
    wide = scale.astype(np.float32)
    u = np.rint((w - minimum.astype(np.float32)[:, :, None]) * _inverse(wide)[:, :, None])
    np.clip(u, 0, 15, out=u)
    tiny = _tiny(w)
    if tiny.any():
        step, q = _whole_steps(w[tiny], np.ptp(w[tiny], axis=1, keepdims=True) / np.float32(15))
        first = q.min(axis=1, keepdims=True)
        scale[tiny], minimum[tiny] = (step * _LEAST_HALF)[:, 0], (first * step * _LEAST_HALF)[:, 0]
        u[tiny] = np.minimum(q - first, 15)  # 16 where both ends were halfway
    put_lines(f, out, u.astype(np.uint8))
    params = out[:, :, -LINE:].view(np.float16).reshape(*out.shape[:2], 2, PANEL)
    params[:, :, 0], params[:, :, 1] = per_group(f, out, scale)[:, :, 0], per_group(f, out, minimum)[:, :, 0]


_PUT: dict[str, Callable[[str, Format, Bytes, NDArray], None]] = {
    "float32": _put_floats, "bfloat16": _put_floats, "int8": _put_int8, "int4 symmetric": _put_int4,
    "int4 affine": _put_int4z,
}


def take(f: Format, panels: Bytes) -> Floats:
    """(panels * 16, k in whole blocks): columns of W as rows, from panels (panels, blocks, block bytes)."""
    if f.dtype in blocks.LINES and f.dtype != "int4":
        return blocks.take(f, panels)
    return _taken_floats(f, panels) if f.group is None else _taken_ints(f, panels)


def _taken_floats(f: Format, panels: Bytes) -> Floats:
    """(panels * 16, k): columns of W as rows."""
    lines = panels.view(_STORED[f.dtype]).reshape(*panels.shape[:2], PANEL, f.k_per_line)
    width = panels.shape[1] * f.k_per_line
    return lines.transpose(0, 2, 1, 3).reshape(len(panels) * PANEL, width).astype(np.float32)


def _taken_ints(f: Format, panels: Bytes) -> Floats:
    """(panels * 16, k): columns of W as rows."""
    (count, blocks, _), group = panels.shape, f.group or 1
    lines = panels[:, :, :-LINE].reshape(count, blocks, f.block_k // f.k_per_line, PANEL, 4).transpose(0, 3, 1, 2, 4)
    if f.row.bits == 4:
        lines = np.stack([lines & 15, lines >> 4], axis=-2)
    per_block = f.block_k // group
    u = lines.reshape(count, PANEL, blocks, per_block, group).astype(np.float32)
    if f.row.scale_bytes == 4:
        params = panels[:, :, -LINE:].view(np.float32).reshape(count, blocks, 1, PANEL)
    else:
        params = panels[:, :, -LINE:].view(np.float16).reshape(count, blocks, 2, PANEL).astype(np.float32)
    by_column = params.transpose(0, 3, 1, 2)[..., None]
    if f.has_minimum:
        w = u * by_column[:, :, :, :1] + by_column[:, :, :, 1:]
    else:
        w = (u - np.float32(f.row.zero)) * by_column
    return w.reshape(count * PANEL, blocks * f.block_k)
