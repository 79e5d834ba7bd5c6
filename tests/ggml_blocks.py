"""Random blocks of ggml's types, and what they stand for: each weight by its formula, one after the other."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge_c.formats.ggml import FP4_VALUES, IQ4_VALUES, TYPES

Array = NDArray[Any]
F = np.float32

QUANTIZED = [name for name, t in TYPES.items() if not t.is_float]
# Where a block has float16 numbers.
HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
          "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,),
          "TQ2_0": (64,), "MXFP4": (), "NVFP4": ()}


def random_blocks(rng: np.random.Generator, name: str, rows: int, k: int, spread: float = 0.02) -> Array:
    """(rows, bytes): any bits, but scales about `spread`."""
    t = TYPES[name]
    b = rng.integers(0, 256, (rows, k // t.weights, t.nbytes), dtype=np.uint8)
    for at in HALVES[name]:
        d = (rng.standard_normal(b.shape[:2]) * spread).astype(np.float16)
        b[:, :, at:at + 2] = d[..., None].view(np.uint8)
    if name == "MXFP4":
        b[:, :, 0] = rng.integers(110, 122, b.shape[:2])
    return b.reshape(rows, k // t.weights * t.nbytes)


def _half(b: bytes, at: int) -> np.float32:
    return F(struct.unpack_from("<e", b, at)[0])


def _six(b: bytes, s: int) -> tuple[int, int]:
    """Scale and minimum of sub-block s of Q4_K and Q5_K, from their 12 bytes."""
    if s < 4:
        return b[s] & 63, b[s + 4] & 63
    return b[s + 4] & 15 | b[s - 4] >> 6 << 4, b[s + 4] >> 4 | b[s] >> 6 << 4


def _nibble(b: bytes, start: int, i: int) -> int:
    return b[start + i % 16] >> 4 * (i // 16) & 15


def _fifth(b: bytes, at: int, i: int) -> int:
    return (struct.unpack_from("<I", b, at)[0] >> i & 1) << 4


def _q2(b: bytes, start: int, i: int) -> int:
    return b[start + 32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3


def _q4_k(b: bytes, start: int, i: int) -> int:
    return b[start + 32 * (i // 64) + i % 32] >> 4 * (i % 64 // 32) & 15


def _affine_k(b: bytes, i: int, q: int) -> np.float32:
    sc, mn = _six(b[4:16], i // 32)
    return _half(b, 0) * F(sc) * F(q) - _half(b, 2) * F(mn)


def _q3_k(b: bytes, i: int) -> np.float32:
    s = i // 16
    sc = (b[96 + s % 8] >> 4 * (s // 8) & 15 | (b[104 + s % 4] >> 2 * (s // 4) & 3) << 4) - 32
    return _half(b, 108) * F(sc) * F(_q2(b, 32, i) + 4 * (b[i % 32] >> i // 32 & 1) - 4)


def _q6_k(b: bytes, i: int) -> np.float32:
    q = b[64 * (i // 128) + i % 64] >> 4 * (i % 128 // 64) & 15
    q |= (b[128 + 32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3) << 4
    return _half(b, 208) * F(struct.unpack_from("b", b, 192 + i // 16)[0]) * F(q - 32)


def _iq4_xs(b: bytes, i: int) -> np.float32:
    s = i // 32
    sc = (b[4 + s // 2] >> 4 * (s % 2) & 15 | (struct.unpack_from("<H", b, 2)[0] >> 2 * s & 3) << 4) - 32
    return _half(b, 0) * F(sc) * F(IQ4_VALUES[_nibble(b, 8 + 16 * s, i % 32)])


def _tq1_0(b: bytes, i: int) -> np.float32:
    if i < 160:
        byte, j = b[i % 32], i // 32
    elif i < 240:
        byte, j = b[32 + i % 16], (i - 160) // 16
    else:
        byte, j = b[48 + i % 4], (i - 240) // 4
    return _half(b, 52) * F((byte * 3**j % 256 * 3 >> 8) - 1)


def _mxfp4(b: bytes, i: int) -> np.float32:
    return F(2.0 ** (b[0] - 128)) * F(FP4_VALUES[_nibble(b, 1, i)])


def _nvfp4(b: bytes, i: int) -> np.float32:
    x = b[i // 16]
    scale = (x & 7) * 2.0**-10 if x >> 3 & 15 == 0 else (8 + (x & 7)) * 2.0 ** ((x >> 3 & 15) - 11)
    q = b[4 + 8 * (i // 16) + i % 8] >> 4 * (i % 16 // 8) & 15
    return F(0 if x in (0, 127) else scale) * F(FP4_VALUES[q])


WEIGHT: dict[str, Callable[[bytes, int], np.float32]] = {
    "Q4_0": lambda b, i: _half(b, 0) * F(_nibble(b, 2, i) - 8),
    "Q4_1": lambda b, i: _half(b, 0) * F(_nibble(b, 4, i)) + _half(b, 2),
    "Q5_0": lambda b, i: _half(b, 0) * F((_nibble(b, 6, i) | _fifth(b, 2, i)) - 16),
    "Q5_1": lambda b, i: _half(b, 0) * F(_nibble(b, 8, i) | _fifth(b, 4, i)) + _half(b, 2),
    "Q8_0": lambda b, i: _half(b, 0) * F(struct.unpack_from("b", b, 2 + i)[0]),
    "Q2_K": lambda b, i: _half(b, 80) * F(b[i // 16] & 15) * F(_q2(b, 16, i)) - _half(b, 82) * F(b[i // 16] >> 4),
    "Q3_K": _q3_k,
    "Q4_K": lambda b, i: _affine_k(b, i, _q4_k(b, 16, i)),
    "Q5_K": lambda b, i: _affine_k(b, i, _q4_k(b, 48, i) | (b[16 + i % 32] >> i // 32 & 1) << 4),
    "Q6_K": _q6_k,
    "IQ4_NL": lambda b, i: _half(b, 0) * F(IQ4_VALUES[_nibble(b, 2, i)]),
    "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0,
    "TQ2_0": lambda b, i: _half(b, 64) * F(_q2(b, 0, i) - 1),
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}


def weights(name: str, raw: Array) -> Array:
    """(rows, bytes) -> (rows, k) float32: WEIGHT of every one."""
    t = TYPES[name]
    out = np.empty((len(raw), raw.shape[1] // t.nbytes * t.weights), F)
    for row, values in zip(raw, out, strict=True):
        for first in range(0, len(values), t.weights):
            block = row[first // t.weights * t.nbytes:][:t.nbytes].tobytes()
            values[first:first + t.weights] = [WEIGHT[name](block, i) for i in range(t.weights)]
    return out
