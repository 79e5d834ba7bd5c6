"""Weights into the formats that the kernels stream, and back: formats/layout.py has the bytes, formats/quantize.py the
numbers in them."""
from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c.formats import ggml
from forge_c.formats.layout import FORMATS, LINE, PANEL, Format
from forge_c.formats.quantize import Bytes, Floats, fill, per_group, put_lines, take
from forge_c.functional import PackedWeight

__all__ = ["FORMATS", "Format", "from_ggml", "from_q4_0", "pack", "pack_gated", "unpack"]

_INPUTS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def _matrix(name: str, arg: str, weight: ArrayLike) -> NDArray:
    w = np.asarray(weight)
    if w.dtype not in _INPUTS:
        raise TypeError(f"{name}: {arg} has dtype {w.dtype}, expected float32, float16 or bfloat16; "
                        f"pass {arg}.astype(np.float32)")
    if w.ndim != 2:
        raise ValueError(f"{name}: {arg} has shape {w.shape}, expected (in_features, out_features)")
    return w


def _aligned(panels: int, panel_bytes: int) -> Bytes:
    """(panels, panel_bytes), uninitialised, on a 64-byte boundary: a line of a panel is then a cache line."""
    nbytes = panels * panel_bytes
    raw = np.empty(nbytes + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    return raw[start:start + nbytes].reshape(panels, panel_bytes)


def pack(weight: ArrayLike, dtype: str = "float32", *, group_size: int | None = None,
         activations: str | None = None) -> PackedWeight:
    """Pack a weight (in_features, out_features) for `linear`.

    Args:
        weight: float32, float16 or bfloat16, any strides.
        dtype: the stored format: "float32", "bfloat16" (round to nearest even), "int8" or "int4".
        group_size: rows of a column that share a scale: for int8 a multiple of 32, by default 128; for int4 either 32,
            symmetric as llama.cpp's Q4_0, or a multiple of 64, by default 64, with a minimum beside the scale.
        activations: of int8 and int4, how `linear` rounds its input: "int8", to 127 steps on either side of zero, or
            "int12", to 2047; their size is chosen for each 32 values, with int12 before int8 for each group of the
            weight. By default int12 for int8, int8 for int4. int12 is the more accurate, and slower for many rows where
            the processor multiplies bytes.

    Packing copies; the original is not kept. 8.25 bits a weight for int8, 4.5 for int4 of group 32 and 64.

    Raises:
        TypeError, ValueError: another dtype or shape; for the integer formats a weight that is not finite, or for int4
            a group whose scale float16 cannot hold.

    >>> pack(np.eye(3, dtype=np.float32), "bfloat16")
    PackedWeight(shape=(3, 3), dtype='bfloat16')
    >>> pack(np.eye(64, dtype=np.float32), "int4").nbytes
    2304
    """
    f = Format.checked("pack", dtype, group_size)
    activations = f.checked_activations("pack", activations)
    w = _matrix("pack", "weight", weight)
    panels = _aligned(-(-w.shape[1] // PANEL), f.panel_bytes(w.shape[0]))
    fill("pack", f, panels, w)
    return PackedWeight(panels, w.shape, dtype, False, f.group, activations)


def pack_gated(gate: ArrayLike, up: ArrayLike, dtype: str = "float32", *, group_size: int | None = None,
               activations: str | None = None) -> PackedWeight:
    """Pack the two matrices of a gated MLP, both (in_features, hidden), side by side for `gated_linear`.

    `gate` is the side that goes through the activation: LLaMA's gate_proj, transposed. The rest is as in `pack`.

    >>> w = np.eye(3, dtype=np.float32)
    >>> pack_gated(w, w)
    PackedWeight(shape=(3, 6), dtype='float32', gated=True)
    """
    f = Format.checked("pack_gated", dtype, group_size)
    activations = f.checked_activations("pack_gated", activations)
    a, b = _matrix("pack_gated", "gate", gate), _matrix("pack_gated", "up", up)
    if a.shape != b.shape:
        raise ValueError(f"pack_gated: up has shape {b.shape}, expected {a.shape}")
    panels = _aligned(-(-a.shape[1] // PANEL) * 2, f.panel_bytes(a.shape[0]))
    fill("pack_gated", f, panels[0::2], a)
    fill("pack_gated", f, panels[1::2], b)
    return PackedWeight(panels, (a.shape[0], 2 * a.shape[1]), dtype, True, f.group, activations)


def from_q4_0(blocks: ArrayLike, shape: tuple[int, int], *, activations: str | None = None) -> PackedWeight:
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
    f = Format("int4", 32)
    panels, count = -(-n // PANEL), f.blocks(k)
    u = np.full((panels * PANEL, count * 2, 32), f.row.zero, np.uint8)
    scale = np.zeros((panels * PANEL, count * 2), np.float16)
    u[:n, :k // 32, :16], u[:n, :k // 32, 16:] = b[:, :, 2:] & 15, b[:, :, 2:] >> 4
    scale[:n, :k // 32] = np.ascontiguousarray(b[:, :, :2]).view(np.float16)[:, :, 0]
    out = _aligned(panels, f.panel_bytes(k))
    lines = out.reshape(panels, count, f.block_bytes)
    put_lines(f, lines, u)
    lines[:, :, -LINE:].view(np.float16).reshape(panels, count, 2, PANEL)[...] = per_group(f, lines, scale)
    return PackedWeight(out, shape, "int4", False, f.group, activations)


def from_ggml(name: str, blocks: ArrayLike, shape: tuple[int, int], *, activations: str | None = None) -> PackedWeight:
    """A weight of `shape` (in_features, out_features) from ggml's bytes of the format `name`, value for value.

    blocks: uint8 (out_features, bytes of a row). activations: as in pack.

    >>> from_ggml("q8_0", np.zeros((16, 68), np.uint8), (64, 16)).dtype
    'q8_0'
    """
    b, (k, n) = np.asarray(blocks), shape
    if name not in ggml.TYPES:
        raise ValueError(f"from_ggml: name is {name!r}, expected one of {', '.join(ggml.TYPES)}")
    kind = ggml.TYPES[name]
    row_bytes = k // kind.block_k * kind.block_bytes
    if b.dtype != np.uint8 or b.shape != (n, row_bytes) or k % kind.block_k:
        raise ValueError(f"from_ggml: blocks has dtype {b.dtype} and shape {b.shape}, expected uint8 "
                         f"({n}, {k} / {kind.block_k} * {kind.block_bytes})")
    f = Format.checked("from_ggml", name, None, ggml.TYPES)
    panels = _aligned(-(-n // PANEL), f.panel_bytes(k))
    ggml.fill(f, panels, b, k)
    return PackedWeight(panels, shape, name, False, f.group, activations)


def unpack(packed: PackedWeight) -> Floats:
    """The matrix that the kernel multiplies by, (in, out) float32; for a gated pair gate beside up."""
    f, (k, n) = Format(packed.dtype, packed.group_size), packed.shape
    panels = packed.data.view(np.uint8).reshape(len(packed.data), f.blocks(k), f.block_bytes)
    sides = [panels[0::2], panels[1::2]] if packed.gated else [panels]
    return np.concatenate([take(f, side)[:n // len(sides), :k].T for side in sides], axis=1)
