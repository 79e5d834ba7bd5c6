"""Weights into the formats that the kernels stream, and back: formats/layout.py has the bytes, formats/quantize.py the
numbers in them."""
from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c.checks import unmasked
from forge_c.formats import ggml
from forge_c.formats.blocks import DTYPE_OF
from forge_c.formats.blocks import fill as fill_blocks
from forge_c.formats.layout import FORMATS, LINE, PACKED, PANEL, ROWS_OF, Activations, Format, NumPyDtype, PackDtype
from forge_c.formats.quantize import Bytes, Floats, fill, take
from forge_c.formats.rounding import Importance
from forge_c.functional import PackedWeight
from forge_c.pages import empty

__all__ = ["FORMATS", "Format", "from_q4_0", "pack", "pack_blocks", "pack_gated", "pack_gated_blocks", "unpack"]

_INPUTS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def _matrix(name: str, arg: str, weight: ArrayLike) -> NDArray:
    w = np.asarray(unmasked(name, arg, weight))
    if w.dtype not in _INPUTS:
        raise TypeError(f"{name}: {arg} has dtype {w.dtype}, expected float32, float16 or bfloat16; "
                        f"pass {arg}.astype(np.float32)")
    if w.ndim != 2:
        raise ValueError(f"{name}: {arg} has shape {w.shape}, expected (in_features, out_features)")
    return w


def pack(weight: ArrayLike, dtype: PackDtype | NumPyDtype = "float32", *, group_size: int | None = None,
         activations: Activations | None = None, importance: ArrayLike | None = None) -> PackedWeight:
    """Pack a weight (in_features, out_features) for `linear`.

    Args:
        weight: float32, float16 or bfloat16, any strides.
        dtype: the stored format: "float32", "bfloat16" (round to nearest even), "int8" or "int4"; or one of ggml's that
            GGUF files hold, of 4 to 8 bits: "q4_1", "q5_0", "q5_1", "q8_0" and, best where in_features is a multiple of
            256, "q4_k", "q5_k", "q6_k". np.float32 and the like are taken for their names.
        group_size: rows of a column that share a scale: for int8 a multiple of 32, by default 128; for int4 either 32,
            symmetric as llama.cpp's Q4_0, or a multiple of 64, by default 64, with a minimum beside the scale.
        activations: of int8 and int4, how `linear` rounds its input: "int8", to 127 steps on either side of zero, or
            "int12", to 2047; their size is chosen for each 32 values, with int12 before int8 for each group of the
            weight. By default int12 for int8, int8 for int4. int12 is the more accurate, and slower for many rows where
            the processor multiplies bytes.
        importance: what an error of a weight costs, for formats of under 8 bits: (in_features,) the mean square of each
            input, or (in_features, in_features) the mean product of each two, with which errors make up for each other.

    Packing copies; the original is not kept. 8.25 bits a weight for int8, 4.5 for int4 of group 32 and 64. Scales of
    under 8 bits are searched for a small squared error.

    Raises:
        TypeError, ValueError: another dtype or shape; for the integer formats a weight that is not finite, or for int4
            a group whose scale float16 cannot hold.

    >>> pack(np.eye(3, dtype=np.float32), "bfloat16")
    PackedWeight(shape=(3, 3), dtype='bfloat16')
    >>> pack(np.eye(64, dtype=np.float32), "int4").nbytes
    2304
    """
    f = Format.checked("pack", dtype, group_size, PACKED)
    rounded = f.checked_activations("pack", activations)
    w = _matrix("pack", "weight", weight)
    weighed = Importance.checked("pack", importance, len(w))
    panels = empty((-(-w.shape[1] // PANEL), f.panel_bytes(w.shape[0])), np.uint8)
    fill("pack", f, panels, w, weighed)
    return PackedWeight(panels, w.shape, f.dtype, False, f.group, rounded)


def pack_gated(gate: ArrayLike, up: ArrayLike, dtype: PackDtype | NumPyDtype = "float32", *,
               group_size: int | None = None, activations: Activations | None = None,
               importance: ArrayLike | None = None) -> PackedWeight:
    """Pack the two matrices of a gated MLP, both (in_features, hidden), side by side for `gated_linear`.

    `gate` is the side that goes through the activation: LLaMA's gate_proj, transposed. The rest is as in `pack`.

    >>> w = np.eye(3, dtype=np.float32)
    >>> pack_gated(w, w)
    PackedWeight(shape=(3, 6), dtype='float32', gated=True)
    """
    f = Format.checked("pack_gated", dtype, group_size, PACKED)
    rounded = f.checked_activations("pack_gated", activations)
    a, b = _matrix("pack_gated", "gate", gate), _matrix("pack_gated", "up", up)
    if a.shape != b.shape:
        raise ValueError(f"pack_gated: up has shape {b.shape}, expected {a.shape}")
    weighed = Importance.checked("pack_gated", importance, len(a))
    panels = empty((-(-a.shape[1] // PANEL) * 2, f.panel_bytes(a.shape[0])), np.uint8)
    fill("pack_gated", f, panels[0::2], a, weighed)
    fill("pack_gated", f, panels[1::2], b, weighed)
    return PackedWeight(panels, (a.shape[0], 2 * a.shape[1]), f.dtype, True, f.group, rounded)


def from_q4_0(blocks: ArrayLike, shape: tuple[int, int], *, activations: Activations | None = None) -> PackedWeight:
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
    return _from_blocks("from_q4_0", "Q4_0", [b], activations)


def pack_blocks(type_name: str, *raw: ArrayLike, activations: Activations | None = None) -> PackedWeight:
    """A weight from ggml's bytes, value for value: of one matrix, or of several side by side along out_features.

    Args:
        type_name: the ggml type, such as "Q4_K". Floats become "float32" or "bfloat16", which hold them. Types whose
            blocks no format holds (TQ1_0, TQ2_0, NVFP4) are rounded to "bfloat16", nothing else is.
        raw: uint8 (out_features, bytes of a row), as a GGUF file has them.
        activations: as in pack, of types of integers; floats take no notice.

    Raises:
        ValueError: an unknown type, rows that are no whole blocks or of different lengths, a scale that is not finite.

    >>> pack_blocks("Q8_0", np.zeros((16, 68), np.uint8))
    PackedWeight(shape=(64, 16), dtype='q8_0', group_size=32)
    """
    t, sides = _raw_sides("pack_blocks", type_name, raw)
    if t.name not in DTYPE_OF:
        return pack(np.concatenate([_floats(t, side) for side in raw]).T, dtype_of_blocks(t.name))
    return _from_blocks("pack_blocks", t.name, sides, activations)


def pack_gated_blocks(type_name: str, gate: ArrayLike, up: ArrayLike, *,
                      activations: Activations | None = None) -> PackedWeight:
    """A pair for `gated_linear` from ggml's bytes, as pack_gated and pack_blocks.

    >>> rows = np.zeros((16, 68), np.uint8)
    >>> pack_gated_blocks("Q8_0", rows, rows)
    PackedWeight(shape=(64, 32), dtype='q8_0', group_size=32, gated=True)
    """
    t, sides = _raw_sides("pack_gated_blocks", type_name, (gate, up))
    if sides[0].shape != sides[1].shape:
        raise ValueError(f"pack_gated_blocks: up has {len(sides[1])} rows, expected {len(sides[0])}")
    if t.name not in DTYPE_OF:
        return pack_gated(_floats(t, gate).T, _floats(t, up).T, dtype_of_blocks(t.name))
    return _from_blocks("pack_gated_blocks", t.name, sides, activations, True)


def dtype_of_blocks(type_name: str) -> Any:
    """The dtype of what pack_blocks makes of that type."""
    return DTYPE_OF.get(type_name) or _FLOATS_IN.get(type_name, "bfloat16")


_FLOATS_IN = {"F32": "float32", "F16": "float32", "BF16": "bfloat16"}  # formats that hold ggml's floats


def _floats(t: ggml.BlockType, raw: ArrayLike) -> NDArray:
    dtype = np.float32 if _FLOATS_IN.get(t.name) == "float32" else ml_dtypes.bfloat16
    return ggml.dequantize(t.name, raw, dtype=dtype, name="pack_blocks")


def _raw_sides(name: str, type_name: str, raw: Sequence[ArrayLike]) -> tuple[ggml.BlockType, list[Bytes]]:
    """The type, and each matrix as (out, blocks, bytes of a block); all rows are equally long."""
    t = ggml.type_named(name, type_name)
    sides = [ggml.raw_rows(name, t, side) for side in raw]
    if not sides or any(side.shape[1] != sides[0].shape[1] for side in sides):
        raise ValueError(f"{name}: raw has rows of {[side.shape[1] * t.nbytes for side in sides]} bytes, expected one "
                         "or more matrices with equally long rows")
    return t, sides


def _from_blocks(name: str, type_name: str, sides: Sequence[Bytes], activations: Activations | None,
                 gated: bool = False) -> PackedWeight:
    """sides (out, blocks, bytes of a block) side by side, or the two of a gated pair panel by panel."""
    t, dtype = ggml.TYPES[type_name], DTYPE_OF[type_name]
    f = Format.checked(name, dtype, 32 if dtype == "int4" else None, ROWS_OF)
    rounded = f.checked_activations(name, activations)
    k, n = sides[0].shape[1] * t.weights, sum(len(side) for side in sides)
    if gated:
        panels = empty((-(-len(sides[0]) // PANEL) * 2, f.panel_bytes(k)), np.uint8)
        for i, side in enumerate(sides):
            fill_blocks(name, f, panels[i::2], side)
        return PackedWeight(panels, (k, n), f.dtype, True, f.group, rounded)
    panels = empty((-(-n // PANEL), f.panel_bytes(k)), np.uint8)
    if any(len(side) % PANEL for side in sides[:-1]):
        sides = [np.concatenate(list(sides))]
    first = 0
    for side in sides:
        some = -(-len(side) // PANEL)
        fill_blocks(name, f, panels[first:first + some], side)
        first += some
    return PackedWeight(panels, (k, n), f.dtype, False, f.group, rounded)


def rows_of(packed: PackedWeight, rows: range) -> PackedWeight:
    """Some of a weight's rows (in_features), number by number: whole blocks, or of int8 from one multiple of 32 to
    another, since its groups can be made smaller; to the last row in any case."""
    f, (k, n) = Format(packed.dtype, packed.group_size), packed.shape
    panels = packed.data.view(np.uint8).reshape(len(packed.data), f.blocks(k), f.block_bytes)
    if f.dtype == "int8":
        f, panels = _finer_groups(f, panels, gcd(f.group or 1, rows.start, 0 if rows.stop == k else rows.stop))
    some = panels[:, rows.start // f.block_k : f.blocks(rows.stop)]
    out = empty((len(some), f.panel_bytes(len(rows))), np.uint8)
    out[...] = some.reshape(len(some), -1)
    return PackedWeight(out, (len(rows), n), f.dtype, packed.gated, f.group, packed.activations)


def _finer_groups(f: Format, panels: Bytes, group: int) -> tuple[Format, Bytes]:
    """int8's panels (n, blocks, bytes of a block) in smaller groups, each with the scale of that it was part of."""
    n, blocks, _ = panels.shape
    lines = panels.reshape(n, blocks, -1, LINE)
    finer = (f.group or group) // group
    u = lines[:, :, :-1].reshape(n, blocks, finer, group // f.k_per_line, LINE)
    scale = np.broadcast_to(lines[:, :, -1:, None], (n, blocks, finer, 1, LINE))
    return Format(f.dtype, group), np.concatenate([u, scale], axis=3).reshape(n, blocks * finer, -1)


def unpack(packed: PackedWeight) -> Floats:
    """The matrix that the kernel multiplies by, (in, out) float32; for a gated pair gate beside up."""
    f, (k, n) = Format(packed.dtype, packed.group_size), packed.shape
    panels = packed.data.view(np.uint8).reshape(len(packed.data), f.blocks(k), f.block_bytes)
    sides = [panels[0::2], panels[1::2]] if packed.gated else [panels]
    return np.concatenate([take(f, side)[:n // len(sides), :k].T for side in sides], axis=1)
