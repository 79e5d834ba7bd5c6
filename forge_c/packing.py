"""Packed weight formats: THE definition of each. The kernels stream these bytes; nobody else looks inside.

A weight W (in, out) is cut into panels of 16 columns, the last one padded with zeros. One 64-byte line of a panel
holds 16 columns at as many consecutive k as fit, so lanes are columns and no kernel ever adds across lanes:

    float32    panel[k][16]              line k:      W[k,0] W[k,1] ... W[k,15]
    bfloat16   panel[k/2][16][2]         line k/2:    W[k,0] W[k+1,0]  W[k,1] W[k+1,1] ... W[k,15] W[k+1,15]

    data:      panel 0 | panel 1 | ...   each as long as in_features (rounded up to whole lines) asks

A gated pair (swished, linear), both (in, hidden), alternates their panels, so that one tile of the product holds
both sides of each output:      swished 0 | linear 0 | swished 1 | linear 1 | ...
"""
from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c.functional import PackedWeight

PANEL = 16
_K_PER_LINE = {"float32": 1, "bfloat16": 2}
_STORED = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_INPUTS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def _matrix(name: str, arg: str, weight: ArrayLike) -> NDArray:
    w = np.asarray(weight)
    if w.dtype not in _INPUTS:
        raise TypeError(f"{name}: {arg} has dtype {w.dtype}, expected float32, float16 or bfloat16; "
                        f"pass {arg}.astype(np.float32)")
    if w.ndim != 2:
        raise ValueError(f"{name}: {arg} has shape {w.shape}, expected (in_features, out_features)")
    return w


def _check_dtype(name: str, dtype: str, group_size: int | None) -> None:
    if dtype not in _STORED:
        raise ValueError(f"{name}: dtype is {dtype!r}, expected one of {', '.join(_STORED)}")
    if group_size is not None:
        raise ValueError(f"{name}: group_size is {group_size}, expected None for {dtype}")


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> NDArray:
    """Uninitialised, on a 64-byte boundary: a line of a panel is then a cache line."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start:start + nbytes].view(dtype).reshape(shape)


def _fill(panels: NDArray, weight: NDArray) -> None:
    """panels (n_panels, lines, 16, k per line) <- weight (in, out); panels may be strided."""
    k, n = weight.shape
    per_line = panels.shape[3]
    for first in range(0, panels.shape[0], 64):
        block = panels[first:first + 64]
        columns = weight[:, first * PANEL:(first + len(block)) * PANEL]
        padded = np.zeros((panels.shape[1] * per_line, len(block) * PANEL), panels.dtype)
        padded[:k, :columns.shape[1]] = columns
        block[...] = padded.reshape(panels.shape[1], per_line, len(block), PANEL).transpose(2, 0, 3, 1)


def pack(weight: ArrayLike, dtype: str = "float32", *, group_size: int | None = None) -> PackedWeight:
    """Pack a weight (in_features, out_features) for `linear`.

    weight: float32, float16 or bfloat16, any strides. dtype: the stored format, "float32" or "bfloat16" (round to
    nearest even). group_size belongs to the quantised formats. Packing copies; the original is not kept.

    >>> pack(np.eye(3, dtype=np.float32), "bfloat16")
    PackedWeight(shape=(3, 3), dtype='bfloat16')
    """
    _check_dtype("pack", dtype, group_size)
    w = _matrix("pack", "weight", weight)
    per_line = _K_PER_LINE[dtype]
    panels = _aligned((-(-w.shape[1] // PANEL), -(-w.shape[0] // per_line), PANEL, per_line), _STORED[dtype])
    _fill(panels, w)
    return PackedWeight(panels, w.shape, dtype)


def pack_gated(swished: ArrayLike, linear: ArrayLike, dtype: str = "float32", *,
               group_size: int | None = None) -> PackedWeight:
    """Pack the two matrices of a gated MLP, both (in_features, hidden), side by side for `gated_linear`.

    `swished` is the side that goes through the activation: LLaMA's gate_proj, transposed.

    >>> w = np.eye(3, dtype=np.float32)
    >>> pack_gated(w, w)
    PackedWeight(shape=(3, 6), dtype='float32', gated=True)
    """
    _check_dtype("pack_gated", dtype, group_size)
    a, b = _matrix("pack_gated", "swished", swished), _matrix("pack_gated", "linear", linear)
    if a.shape != b.shape:
        raise ValueError(f"pack_gated: linear has shape {b.shape}, expected {a.shape}")
    per_line = _K_PER_LINE[dtype]
    panels = _aligned((-(-a.shape[1] // PANEL), 2, -(-a.shape[0] // per_line), PANEL, per_line), _STORED[dtype])
    _fill(panels[:, 0], a)
    _fill(panels[:, 1], b)
    return PackedWeight(panels, (a.shape[0], 2 * a.shape[1]), dtype, True)


def unpack(packed: PackedWeight) -> NDArray[np.float32]:
    """The matrix that the kernel multiplies by, (in, out) float32; for a gated pair swished beside linear."""
    k, n = packed.shape
    sides = [packed.data[:, 0], packed.data[:, 1]] if packed.gated else [packed.data]
    columns = n // len(sides)
    rows, width = sides[0].shape[1] * sides[0].shape[3], sides[0].shape[0] * PANEL
    return np.concatenate([side.transpose(1, 3, 0, 2).reshape(rows, width)[:k, :columns].astype(np.float32)
                           for side in sides], axis=1)
