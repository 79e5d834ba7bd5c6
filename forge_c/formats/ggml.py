"""ggml's blocks into the lines of the formats that bear their names, and back out of them; nothing is rounded.

A type is a row of TYPES: the size of its blocks, and two functions over columns of W as rows. `parse` turns blocks into
the numbers that the lines hold, `put` and `take` move those into blocks of lines (panels, blocks, block bytes).
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge_c.formats.layout import LINE, PANEL, Format

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class GgmlType:
    """A block of `block_k` weights is `block_bytes` in ggml. put(out (panels, blocks, block bytes), rows (panels * 16,
    ggml's blocks, block_bytes)) fills whole blocks of ours; take(lines) gives back (panels * 16, k) float32."""

    block_k: int
    block_bytes: int
    put: Callable[[Bytes, Bytes], None]
    take: Callable[[Bytes], Floats]
    padding: bytes  # a block of ggml's that is zero, for columns and rows of W that are not there


def fill(f: Format, panels: Bytes, rows: Bytes, k: int) -> None:
    """panels (n_panels, panel bytes) <- ggml's rows (n, row bytes) of k weights each."""
    kind, (n, _) = TYPES[f.dtype], rows.shape
    if panels.size == 0:
        return
    count = f.blocks(k) * f.block_k // kind.block_k
    padded = np.empty((len(panels) * PANEL, count, kind.block_bytes), np.uint8)
    padded[...] = np.frombuffer(kind.padding, np.uint8)
    padded[:n, :k // kind.block_k] = rows.reshape(n, -1, kind.block_bytes)
    kind.put(panels.reshape(len(panels), f.blocks(k), f.block_bytes), padded)


def take(f: Format, panels: Bytes) -> Floats:
    """(panels * 16, k in whole blocks): columns of W as rows, from panels (panels, blocks, block bytes)."""
    return TYPES[f.dtype].take(panels)


def put_u(lines: Bytes, u: Bytes) -> None:
    """u (panels * 16, k), or in blocks of k, into lines (panels, blocks, bytes): 4 k of each of 16 columns a line."""
    panels, blocks, size = lines.shape
    fours = np.ascontiguousarray(u).view(np.uint32).reshape(panels, PANEL, blocks, size // LINE)
    lines[...] = np.ascontiguousarray(fours.transpose(0, 2, 3, 1)).view(np.uint8).reshape(lines.shape)


def take_u(lines: Bytes) -> Bytes:
    """What put_u was given."""
    panels, blocks, size = lines.shape
    fours = np.ascontiguousarray(lines).view(np.uint32).reshape(panels, blocks, size // LINE, PANEL)
    by_column = np.ascontiguousarray(fours.transpose(0, 3, 1, 2)).view(np.uint8)
    return by_column.reshape(panels * PANEL, blocks * size // PANEL)


def put_columns(lines: Bytes, values: NDArray[Any]) -> None:
    """values (panels * 16, blocks * m): m values of each column and block, 16 columns side by side, then the next."""
    panels, blocks, size = lines.shape
    by_block = values.reshape(panels, PANEL, blocks, size // PANEL // values.itemsize).transpose(0, 2, 3, 1)
    lines[...] = np.ascontiguousarray(by_block).view(np.uint8).reshape(lines.shape)


def take_columns(lines: Bytes, dtype: type) -> NDArray[Any]:
    """What put_columns was given."""
    panels, blocks, size = lines.shape
    count = size // PANEL // np.dtype(dtype).itemsize
    values: NDArray[Any] = np.ascontiguousarray(lines).view(dtype).reshape(panels, blocks, count, PANEL)
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2)).reshape(panels * PANEL, blocks * count)


# ---- q8_0: float16 d, 32 int8 q:  W = d q ----

def _put_q8_0(out: Bytes, blocks: Bytes) -> None:
    put_u(out[:, :, :16 * LINE], blocks[:, :, 2:] ^ np.uint8(128))
    put_columns(out[:, :, 16 * LINE:], np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[:, :, 0])


def _take_q8_0(out: Bytes) -> Floats:
    d = take_columns(out[:, :, 16 * LINE:], np.float16).astype(np.float32)
    q = take_u(out[:, :, :16 * LINE]).astype(np.float32) - np.float32(128)
    return q * np.repeat(d, 32, axis=1)


TYPES = {"q8_0": GgmlType(32, 34, _put_q8_0, _take_q8_0, bytes(34))}
