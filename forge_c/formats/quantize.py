"""Numbers into the lines of a format, and back out of them: what pack and unpack do to one matrix."""
from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from forge_c.formats import blocks, ggml
from forge_c.formats.layout import LINE, PANEL, Format
from forge_c.formats.rounding import Importance, half, inverse, rounded, up_to_whole_steps
from forge_c.functional import pack_columns

_STORED = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def fill(name: str, f: Format, panels: Bytes, weight: NDArray, importance: Importance | None = None) -> None:
    """panels (n_panels, panel bytes) <- weight (in, out); panels may be strided. Pieces are filled by threads."""
    put = _PUT[f.name]

    def piece(first: int) -> None:
        put(name, f, panels[first:first + at_once], weight[:, first * PANEL:(first + at_once) * PANEL], importance)

    if panels.size == 0:
        return
    # Floats are moved by threads of their own, unless NumPy has to convert or transpose them first.
    at_once = blocks.panels_at_once(weight.shape[0]) if weight.size > 1 << 16 else len(panels)
    if put is _put_floats and weight.dtype == _STORED[f.dtype] and weight.strides[:1] == (weight.itemsize,):
        at_once = len(panels)
    if importance is not None and importance.feedback is not None:
        at_once = 64  # the most of the work is products of matrices, which NumPy's library splits
    blocks.in_threads(range(0, len(panels), max(at_once, 1)), piece)


def _put_floats(name: str, f: Format, out: Bytes, columns: NDArray, importance: Importance | None) -> None:
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


def _put_int8(name: str, f: Format, panels: Bytes, columns: NDArray, importance: Importance | None) -> None:
    out = blocks_of(f, panels, columns)
    w = _grouped(name, f, len(out), out.shape[1], columns)
    scale = np.abs(w).max(axis=2) / np.float32(127)
    q = np.rint(w * inverse(scale)[:, :, None])
    np.clip(q, -127, 127, out=q)
    put_lines(f, out, (q + np.float32(f.row.zero)).astype(np.uint8))
    out[:, :, -LINE:].view(np.float32)[...] = per_group(f, out, scale)[:, :, 0]


def _put_q8_0(name: str, f: Format, panels: Bytes, columns: NDArray, importance: Importance | None) -> None:
    out = blocks_of(f, panels, columns)
    w = _grouped(name, f, len(out), out.shape[1], columns)
    scale = half(name, up_to_whole_steps(np.abs(w).max(axis=2) / np.float32(127)))
    q = np.rint(w * inverse(scale.astype(np.float32))[:, :, None])
    np.clip(q, -127, 127, out=q)
    u = (q + np.float32(f.row.zero)).astype(np.uint8)
    blocks.put_numbers(f, panels, ggml.Numbers(u.reshape(-1, 32), d=scale.reshape(-1, 1)))


def _put_int4(name: str, f: Format, panels: Bytes, columns: NDArray, importance: Importance | None) -> None:
    out = blocks_of(f, panels, columns)
    w = _grouped(name, f, len(out), out.shape[1], columns)
    u, found = rounded(name, f, w.reshape(len(w), -1), len(columns), importance)
    put_lines(f, out, u)
    params = out[:, :, -LINE:].view(np.float16).reshape(*out.shape[:2], 2, PANEL)
    if f.has_minimum:
        params[:, :, 0], params[:, :, 1] = (per_group(f, out, a)[:, :, 0] for a in (found.scales, found.minima))
    else:
        params[...] = per_group(f, out, found.scales)


def _put_blocks(name: str, f: Format, panels: Bytes, columns: NDArray, importance: Importance | None) -> None:
    """Into the lines of ggml's block formats."""
    w = _grouped(name, f, len(panels), f.blocks(len(columns)), columns)
    u, found = rounded(name, f, w.reshape(len(w), -1), len(columns), importance)
    of = blocks.LINES[f.dtype].of
    u = u.reshape(-1, of.weights)
    if found.d is None or found.m is None:
        numbers = ggml.Numbers(u, d=found.scales.reshape(-1, 1), m=found.minima.reshape(-1, 1))
    else:
        each = of.weights // of.sub
        numbers = ggml.Numbers(u, found.scales.reshape(-1, each), found.minima.reshape(-1, each),
                               found.d.reshape(-1, 1), found.m.reshape(-1, 1))
    blocks.put_numbers(f, panels, numbers)


_PUT: dict[str, Callable[[str, Format, Bytes, NDArray, Importance | None], None]] = {
    "float32": _put_floats, "bfloat16": _put_floats, "int8": _put_int8, "q8_0": _put_q8_0,
    "int4 symmetric": _put_int4, "int4 affine": _put_int4,
    **dict.fromkeys(("q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"), _put_blocks),
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
