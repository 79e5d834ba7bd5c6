"""Packed weight formats: THE definition of each. The kernels stream these bytes; nobody else looks inside.

A weight W (in, out) is cut into panels of 16 columns, the last one padded with zeros. One 64-byte line of a panel
holds 16 columns at as many consecutive k as fit, so lanes are columns and no kernel ever adds across lanes:

    float32    panel[k][16]              line k:      W[k,0] W[k,1] ... W[k,15]
    bfloat16   panel[k/2][16][2]         line k/2:    W[k,0] W[k+1,0]  W[k,1] W[k+1,1] ... W[k,15] W[k+1,15]
    int8       panel[k/4][16][4]         line k/4:    u[k..k+3, 0]  u[k..k+3, 1]  ...  u[k..k+3, 15], a byte each
    int4       panel[k/8][16][4]         line k/8:    the same bytes: u[k..k+3] in the low nibbles, u[k+4..k+7] high

Integer formats quantise groups of consecutive k of a column. After the lines of its groups a block has one line with
what turns u back into W, 16 columns side by side:

    int8, group g (128)      | g/4 lines of u | scale float32                        |   W = scale (u - 128)
    int4, group 32           | 4 lines | 4 lines | scale float16 of each of the two   |   W = scale (u - 8)
    int4, group g (64)       | g/8 lines of u | scale float16 | minimum float16      |   W = scale u + minimum

    data:      panel 0 | panel 1 | ...   each as long as in_features, rounded up to whole lines or blocks, asks

int4 of group 32 holds the numbers of llama.cpp's Q4_0, and quantises by its rule; `from_q4_0` takes its bytes.

A gated pair (swished, linear), both (in, hidden), alternates their panels, so that one tile of the product holds
both sides of each output:      swished 0 | linear 0 | swished 1 | linear 1 | ...
"""
from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c.functional import PackedWeight, get_num_threads, pack_columns

PANEL = 16
FORMATS = ("float32", "bfloat16", "int8", "int4")
_DEFAULT_GROUP = {"float32": None, "bfloat16": None, "int8": 128, "int4": 64}
_SYMMETRIC_INT4 = 32
# The sum over a group stays exact: 255 * 127 * 2^16 < 2^31, and 15 * 127 * 2^13 < 2^24, for ISAs that add up parts of
# it in float32.
_MAX_GROUP = {"int8": 1 << 16, "int4": 1 << 13}
_INPUTS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
_STORED = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Format:
    """A format's name and group, and the sizes that follow from them."""

    dtype: str
    group: int | None

    @property
    def has_minimum(self) -> bool:
        """int4 with a minimum beside the scale."""
        return self.dtype == "int4" and self.group != _SYMMETRIC_INT4

    @property
    def k_per_line(self) -> int:
        return {"float32": 1, "bfloat16": 2, "int8": 4, "int4": 8}[self.dtype]

    @property
    def block_k(self) -> int:
        """Rows of a block: a group, or two where scales are half a line."""
        if self.group is None:
            return self.k_per_line
        return 2 * self.group if self.group == _SYMMETRIC_INT4 and self.dtype == "int4" else self.group

    @property
    def block_bytes(self) -> int:
        return 64 * (self.block_k // self.k_per_line) + (0 if self.group is None else 64)

    def blocks(self, k: int) -> int:
        return -(-k // self.block_k)

    def panel_bytes(self, k: int) -> int:
        return self.blocks(k) * self.block_bytes


def _matrix(name: str, arg: str, weight: ArrayLike) -> NDArray:
    w = np.asarray(weight)
    if w.dtype not in _INPUTS:
        raise TypeError(f"{name}: {arg} has dtype {w.dtype}, expected float32, float16 or bfloat16; "
                        f"pass {arg}.astype(np.float32)")
    if w.ndim != 2:
        raise ValueError(f"{name}: {arg} has shape {w.shape}, expected (in_features, out_features)")
    return w


def _format(name: str, dtype: str, group_size: int | None) -> Format:
    """The format of these arguments, checked."""
    if dtype not in FORMATS:
        raise ValueError(f"{name}: dtype is {dtype!r}, expected one of {', '.join(FORMATS)}")
    default = _DEFAULT_GROUP[dtype]
    if group_size is None or default is None:
        if group_size is not None:
            raise ValueError(f"{name}: group_size is {group_size}, expected None for {dtype}")
        return Format(dtype, default)
    (unit, others), most = (32, "") if dtype == "int8" else (64, "32 or "), _MAX_GROUP[dtype]
    if isinstance(group_size, bool) or not isinstance(group_size, int | np.integer) or not (
            0 < group_size <= most and (group_size % unit == 0 or (others and group_size == _SYMMETRIC_INT4))):
        raise ValueError(f"{name}: group_size is {group_size}, expected {others}a multiple of {unit} up to "
                         f"{most} for {dtype}")
    return Format(dtype, int(group_size))


def _aligned(panels: int, panel_bytes: int) -> Bytes:
    """(panels, panel_bytes), uninitialised, on a 64-byte boundary: a line of a panel is then a cache line."""
    nbytes = panels * panel_bytes
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start:start + nbytes].reshape(panels, panel_bytes)


def _fill(name: str, f: Format, panels: Bytes, weight: NDArray) -> None:
    """panels (n_panels, panel bytes) <- weight (in, out); panels may be strided. Pieces are filled by threads."""
    put: Callable[..., None] = (_put_floats if f.group is None else _put_int8 if f.dtype == "int8" else
                                _put_int4z if f.has_minimum else _put_int4)

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


def _blocks(f: Format, out: Bytes, columns: NDArray) -> Bytes:
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


def _put_lines(f: Format, out: Bytes, u: Bytes) -> None:
    """u (panels * 16, groups, group) into the lines of out (panels, blocks, block bytes)."""
    panels, blocks = out.shape[:2]
    rows: Bytes = u.reshape(panels, PANEL, blocks, f.block_k)
    if f.dtype == "int4":
        eight = rows.reshape(panels, PANEL, blocks, f.block_k // 8, 2, 4)
        rows = (eight[..., 0, :] | (eight[..., 1, :] << np.uint8(4))).reshape(panels, PANEL, blocks, f.block_k // 2)
    fours = np.ascontiguousarray(rows).view(np.uint32)
    lines = out.view(np.uint32)[:, :, :-16].reshape(panels, blocks, f.block_k // f.k_per_line, PANEL)
    lines[...] = fours.transpose(0, 2, 3, 1)


def _per_group(f: Format, out: Bytes, values: NDArray) -> NDArray:
    """values (panels * 16, groups) as (panels, blocks, groups of a block, 16)."""
    panels, blocks = out.shape[:2]
    return values.reshape(panels, PANEL, blocks, f.block_k // (f.group or 1)).transpose(0, 2, 3, 1)


def _put_int8(name: str, f: Format, panels: Bytes, columns: NDArray) -> None:
    out = _blocks(f, panels, columns)
    w = _grouped(name, f, len(out), out.shape[1], columns)
    scale = np.abs(w).max(axis=2) / np.float32(127)
    q = np.rint(w * _inverse(scale)[:, :, None])
    np.clip(q, -127, 127, out=q)
    _put_lines(f, out, (q + np.float32(128)).astype(np.uint8))
    out[:, :, -64:].view(np.float32)[...] = _per_group(f, out, scale)[:, :, 0]


def _put_int4(name: str, f: Format, panels: Bytes, columns: NDArray) -> None:
    """As Q4_0: the value of largest magnitude becomes -8, the others are rounded half up."""
    out = _blocks(f, panels, columns)
    w = _grouped(name, f, len(out), out.shape[1], columns)
    largest = np.abs(w).argmax(axis=2)
    scale = np.take_along_axis(w, largest[:, :, None], axis=2)[:, :, 0] / np.float32(-8) + np.float32(0)  # no -0
    half = _scale(name, f, scale)
    u = w * _inverse(scale)[:, :, None] + np.float32(8.5)
    np.clip(u, 0, 15, out=u)
    _put_lines(f, out, u.astype(np.uint8))
    out[:, :, -64:].view(np.float16).reshape(*out.shape[:2], 2, PANEL)[...] = _per_group(f, out, half)


def _put_int4z(name: str, f: Format, panels: Bytes, columns: NDArray) -> None:
    out = _blocks(f, panels, columns)
    w = _grouped(name, f, len(out), out.shape[1], columns)
    minimum = _scale(name, f, w.min(axis=2))
    scale = _scale(name, f, (w.max(axis=2) - minimum.astype(np.float32)) / np.float32(15))
    wide = scale.astype(np.float32)
    u = np.rint((w - minimum.astype(np.float32)[:, :, None]) * _inverse(wide)[:, :, None])
    np.clip(u, 0, 15, out=u)
    _put_lines(f, out, u.astype(np.uint8))
    params = out[:, :, -64:].view(np.float16).reshape(*out.shape[:2], 2, PANEL)
    params[:, :, 0], params[:, :, 1] = _per_group(f, out, scale)[:, :, 0], _per_group(f, out, minimum)[:, :, 0]


def pack(weight: ArrayLike, dtype: str = "float32", *, group_size: int | None = None) -> PackedWeight:
    """Pack a weight (in_features, out_features) for `linear`.

    Args:
        weight: float32, float16 or bfloat16, any strides.
        dtype: the stored format: "float32", "bfloat16" (round to nearest even), "int8" or "int4".
        group_size: rows of a column that share a scale: for int8 a multiple of 32, by default 128; for int4 either 32,
            symmetric as llama.cpp's Q4_0, or a multiple of 64, by default 64, with a minimum beside the scale.

    Packing copies; the original is not kept. 8.25 bits a weight for int8, 4.5 for int4 of group 32 and 64.

    Raises:
        TypeError, ValueError: another dtype or shape; for the integer formats a weight that is not finite, or for int4
            a group whose scale float16 cannot hold.

    >>> pack(np.eye(3, dtype=np.float32), "bfloat16")
    PackedWeight(shape=(3, 3), dtype='bfloat16')
    >>> pack(np.eye(64, dtype=np.float32), "int4").nbytes
    2304
    """
    f = _format("pack", dtype, group_size)
    w = _matrix("pack", "weight", weight)
    panels = _aligned(-(-w.shape[1] // PANEL), f.panel_bytes(w.shape[0]))
    _fill("pack", f, panels, w)
    return PackedWeight(panels, w.shape, dtype, False, f.group)


def pack_gated(swished: ArrayLike, linear: ArrayLike, dtype: str = "float32", *,
               group_size: int | None = None) -> PackedWeight:
    """Pack the two matrices of a gated MLP, both (in_features, hidden), side by side for `gated_linear`.

    `swished` is the side that goes through the activation: LLaMA's gate_proj, transposed. The rest is as in `pack`.

    >>> w = np.eye(3, dtype=np.float32)
    >>> pack_gated(w, w)
    PackedWeight(shape=(3, 6), dtype='float32', gated=True)
    """
    f = _format("pack_gated", dtype, group_size)
    a, b = _matrix("pack_gated", "swished", swished), _matrix("pack_gated", "linear", linear)
    if a.shape != b.shape:
        raise ValueError(f"pack_gated: linear has shape {b.shape}, expected {a.shape}")
    panels = _aligned(-(-a.shape[1] // PANEL) * 2, f.panel_bytes(a.shape[0]))
    _fill("pack_gated", f, panels[0::2], a)
    _fill("pack_gated", f, panels[1::2], b)
    return PackedWeight(panels, (a.shape[0], 2 * a.shape[1]), dtype, True, f.group)


def from_q4_0(blocks: ArrayLike, shape: tuple[int, int]) -> PackedWeight:
    """A weight of `shape` (in_features, out_features) from llama.cpp's Q4_0 bytes, value for value.

    blocks: uint8 (out_features, in_features / 32, 18): a float16 scale, then 16 bytes whose low nibbles are the values
    0..15 of the block and whose high nibbles are 16..31 (ggml's block_q4_0).

    >>> from_q4_0(np.zeros((16, 2, 18), np.uint8), (64, 16)).dtype
    'int4'
    """
    b = np.asarray(blocks)
    k, n = shape
    if b.dtype != np.uint8 or b.shape != (n, k // 32, 18) or k % 32:
        raise ValueError(f"from_q4_0: blocks has dtype {b.dtype} and shape {b.shape}, expected uint8 "
                         f"({n}, {k} / 32, 18)")
    f = Format("int4", _SYMMETRIC_INT4)
    panels, count = -(-n // PANEL), f.blocks(k)
    u, scale = np.full((panels * PANEL, count * 2, 32), 8, np.uint8), np.zeros((panels * PANEL, count * 2), np.float16)
    u[:n, :k // 32, :16], u[:n, :k // 32, 16:] = b[:, :, 2:] & 15, b[:, :, 2:] >> 4
    scale[:n, :k // 32] = np.ascontiguousarray(b[:, :, :2]).view(np.float16)[:, :, 0]
    out = _aligned(panels, f.panel_bytes(k))
    lines = out.reshape(panels, count, f.block_bytes)
    _put_lines(f, lines, u)
    lines[:, :, -64:].view(np.float16).reshape(panels, count, 2, PANEL)[...] = _per_group(f, lines, scale)
    return PackedWeight(out, shape, "int4", False, f.group)


def unpack(packed: PackedWeight) -> Floats:
    """The matrix that the kernel multiplies by, (in, out) float32; for a gated pair swished beside linear."""
    f, (k, n) = Format(packed.dtype, packed.group_size), packed.shape
    panels = packed.data.view(np.uint8).reshape(len(packed.data), f.blocks(k), f.block_bytes)
    sides = [panels[0::2], panels[1::2]] if packed.gated else [panels]
    take = _taken_floats if f.group is None else _taken_ints
    return np.concatenate([take(f, side)[:n // len(sides), :k].T for side in sides], axis=1)


def _taken_floats(f: Format, panels: Bytes) -> Floats:
    """(panels * 16, k): columns of W as rows."""
    lines = panels.view(_STORED[f.dtype]).reshape(*panels.shape[:2], PANEL, f.k_per_line)
    width = panels.shape[1] * f.k_per_line
    return lines.transpose(0, 2, 1, 3).reshape(len(panels) * PANEL, width).astype(np.float32)


def _taken_ints(f: Format, panels: Bytes) -> Floats:
    """(panels * 16, k): columns of W as rows."""
    (count, blocks, _), group = panels.shape, f.group or 1
    lines = panels[:, :, :-64].reshape(count, blocks, f.block_k // f.k_per_line, PANEL, 4).transpose(0, 3, 1, 2, 4)
    if f.dtype == "int4":
        lines = np.stack([lines & 15, lines >> 4], axis=-2)
    per_block = f.block_k // group
    u = lines.reshape(count, PANEL, blocks, per_block, group).astype(np.float32)
    if f.dtype == "int8":
        params = panels[:, :, -64:].view(np.float32).reshape(count, blocks, 1, PANEL)
    else:
        params = panels[:, :, -64:].view(np.float16).reshape(count, blocks, 2, PANEL).astype(np.float32)
    by_column = params.transpose(0, 3, 1, 2)[..., None]
    if f.has_minimum:
        w = u * by_column[:, :, :, :1] + by_column[:, :, :, 1:]
    else:
        w = (u - np.float32(128 if f.dtype == "int8" else 8)) * by_column
    return w.reshape(count * PANEL, blocks * f.block_k)
