"""The block formats of ggml, which GGUF files hold: bytes of blocks, taken apart and as float32.

A row of a matrix is a sequence of blocks, each of `weights` numbers and `nbytes` bytes. A block has small integers u in
planes of bits, a float16 scale d of its own, perhaps a float16 minimum m, and the types of 256 weights ("K") an integer
scale and perhaps an integer minimum for each sub-block:

    W = d (u - zero)          W = d u + m          W = (d scale) (u - zero)          W = (d scale) u - (m minimum)

where IQ4 and MXFP4 look u up in a table first. All of it in float32, each product and sum rounded, in this order.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

__all__ = ["TYPES", "BlockType", "Numbers", "check_scales", "dequantize", "numbers", "raw_rows", "type_named",
           "weights"]

Bytes = NDArray[np.uint8]

_AT_ONCE = 1 << 17  # weights that are taken apart at a time: what that needs stays in the caches

# The values of IQ4_NL and IQ4_XS, and those of MXFP4 and NVFP4, doubled, by their nibbles.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


class Numbers(NamedTuple):
    """What n blocks hold, one number after the other."""

    u: Bytes  # (n, weights), not looked up
    scales: NDArray[Any] | None = None  # (n, sub-blocks) uint8 or int8; of Q2_K the minima too, in the upper nibbles
    minima: Bytes | None = None  # (n, sub-blocks)
    d: NDArray[Any] | None = None  # (n, 1) float16, or the bytes that stand for it
    m: NDArray[np.float16] | None = None  # (n, 1)


@dataclass(frozen=True)
class BlockType:
    """A type of tensor in a GGUF file."""

    name: str
    id: int
    weights: int
    nbytes: int
    integers: Callable[[Bytes], Numbers] | None = None  # all but d and m; None: the weights are floats
    zero: int = 0
    table: tuple[int, ...] = ()
    sub: int = 0  # weights of a sub-block; 0: the whole block
    d: int = 0  # byte of the float16 scale
    m: int | None = None  # and of the minimum
    d_bytes: int = 0  # where d is so many bytes, not float16,
    d_of: Callable[[Bytes], NDArray[np.float32]] | None = None  # and what they stand for

    @property
    def is_float(self) -> bool:
        return self.integers is None

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of k weights, a multiple of `weights`."""
        return k // self.weights * self.nbytes


def planes(b: Bytes, width: int, bits: int) -> Bytes:
    """(n, bytes) -> (n, bytes * 8 / bits): bits 0.. of `width` bytes, then the next bits of these, and so on."""
    if width == 1 and bits == 1:
        return np.unpackbits(b, axis=1, bitorder="little")
    steps, few = 8 // bits, b.reshape(len(b), -1, width)
    out = np.empty((len(b), few.shape[1], steps, width), np.uint8)
    for s in range(steps):
        np.right_shift(few, np.uint8(bits * s), out=out[:, :, s])
    out &= np.uint8((1 << bits) - 1)
    return out.reshape(len(b), -1)


def _fours(b: Bytes, start: int) -> Bytes:
    """The nibbles of blocks of 32."""
    return planes(b[:, start:start + 16], 16, 4)


def _fives(b: Bytes, start: int) -> Bytes:
    u, fifth = _fours(b, start + 4), planes(b[:, start:start + 4], 1, 1)
    fifth <<= np.uint8(4)
    u |= fifth
    return u


def _sixes(b: Bytes) -> tuple[Bytes, Bytes]:
    """The 8 scales and 8 minima of 6 bits in the 12 bytes of Q4_K and Q5_K."""
    first, second, mixed = b[:, 0:4], b[:, 4:8], b[:, 8:12]
    scales = np.concatenate([first & 63, (mixed & 15) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([second & 63, (mixed >> 4) | (second >> 6 << 4)], axis=1)
    return scales, minima


def _q3_k(b: Bytes) -> Numbers:
    u, third = planes(b[:, 32:96], 32, 2), planes(b[:, :32], 32, 1)
    third <<= np.uint8(2)
    u |= third
    scales = planes(b[:, 96:104], 8, 4) | planes(b[:, 104:108], 4, 2) << 4
    return Numbers(u, (scales - np.uint8(32)).view(np.int8))


def _q5_k(b: Bytes) -> Numbers:
    u, fifth = planes(b[:, 48:176], 32, 4), planes(b[:, 16:48], 32, 1)
    fifth <<= np.uint8(4)
    u |= fifth
    return Numbers(u, *_sixes(b[:, 4:16]))


def _q6_k(b: Bytes) -> Numbers:
    u, high = planes(b[:, :128], 64, 4), planes(b[:, 128:192], 32, 2)
    high <<= np.uint8(4)
    u |= high
    return Numbers(u, b[:, 192:208].view(np.int8))


def _iq4_xs(b: Bytes) -> Numbers:
    scales = planes(b[:, 4:8], 1, 4) | planes(b[:, 2:4], 1, 2) << 4
    return Numbers(planes(b[:, 8:136], 16, 4), (scales - np.uint8(32)).view(np.int8))


def _tq1_0(b: Bytes) -> Numbers:
    """Five digits of base 3 to a byte, as a fraction: the first digit is what 3 times it has over 256."""
    parts = []
    for start, end, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        power = np.array([3**j for j in range(digits)], np.uint8)[:, None]
        parts.append((b[:, None, start:end] * power).reshape(len(b), -1))
    return Numbers((np.concatenate(parts, axis=1).astype(np.uint16) * 3 >> 8).astype(np.uint8))


def _powers(b: Bytes) -> NDArray[np.float32]:
    """2^(b - 128), what MXFP4's first byte stands for."""
    e = b.astype(np.uint32)
    return np.where(e < 2, np.uint32(0x00200000) << e, (e - 1) << np.uint32(23)).astype(np.uint32).view(np.float32)


def _small_floats(b: Bytes) -> NDArray[np.float32]:
    """Half of NVFP4's scales: 4 bits of exponent, 3 of mantissa, no sign; 127 stands for 0."""
    x = b.astype(np.int32)
    exponent, mantissa = x >> 3 & 15, (x & 7).astype(np.float32)
    value = np.where(exponent == 0, mantissa * np.float32(2.0**-9),
                     np.ldexp(1 + mantissa / 8, exponent - 7)).astype(np.float32)
    return np.where((x == 0) | (x == 127), np.float32(0), value * np.float32(0.5)).astype(np.float32)


TYPES = {t.name: t for t in (
    BlockType("F32", 0, 1, 4),
    BlockType("F16", 1, 1, 2),
    BlockType("BF16", 30, 1, 2),
    BlockType("Q4_0", 2, 32, 18, lambda b: Numbers(_fours(b, 2)), 8),
    BlockType("Q4_1", 3, 32, 20, lambda b: Numbers(_fours(b, 4)), m=2),
    BlockType("Q5_0", 6, 32, 22, lambda b: Numbers(_fives(b, 2)), 16),
    BlockType("Q5_1", 7, 32, 24, lambda b: Numbers(_fives(b, 4)), m=2),
    BlockType("Q8_0", 8, 32, 34, lambda b: Numbers(b[:, 2:] ^ np.uint8(128)), 128),
    BlockType("Q2_K", 10, 256, 84, lambda b: Numbers(planes(b[:, 16:80], 32, 2), b[:, :16]), sub=16, d=80, m=82),
    BlockType("Q3_K", 11, 256, 110, _q3_k, 4, sub=16, d=108),
    BlockType("Q4_K", 12, 256, 144, lambda b: Numbers(planes(b[:, 16:], 32, 4), *_sixes(b[:, 4:16])), sub=32, m=2),
    BlockType("Q5_K", 13, 256, 176, _q5_k, sub=32, m=2),
    BlockType("Q6_K", 14, 256, 210, _q6_k, 32, sub=16, d=208),
    BlockType("IQ4_NL", 20, 32, 18, lambda b: Numbers(_fours(b, 2)), table=IQ4_VALUES),
    BlockType("IQ4_XS", 23, 256, 136, _iq4_xs, table=IQ4_VALUES, sub=32),
    BlockType("TQ1_0", 34, 256, 54, _tq1_0, 1, d=52),
    BlockType("TQ2_0", 35, 256, 66, lambda b: Numbers(planes(b[:, :64], 32, 2)), 1, d=64),
    BlockType("MXFP4", 39, 32, 17, lambda b: Numbers(_fours(b, 1)), table=FP4_VALUES, d_bytes=1, d_of=_powers),
    BlockType("NVFP4", 40, 64, 36, lambda b: Numbers(planes(b[:, 4:], 8, 4)), table=FP4_VALUES, sub=16,
              d_bytes=4, d_of=_small_floats),
)}
_FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


def type_named(name: str, of: str) -> BlockType:
    """The type called `of`; ValueError of the function `name` if there is none."""
    if not isinstance(of, str) or of not in TYPES:
        raise ValueError(f"{name}: type is {of!r}, expected one of {', '.join(TYPES)}")
    return TYPES[of]


def raw_rows(name: str, t: BlockType, raw: ArrayLike) -> Bytes:
    """(rows, blocks, bytes of a block), from rows of whole blocks (rows, bytes); ValueError of the function `name`."""
    b = np.asarray(raw)
    if b.dtype != np.uint8 or b.ndim != 2 or b.shape[1] % t.nbytes:
        raise ValueError(f"{name}: raw has dtype {b.dtype} and shape {b.shape}, expected uint8 (rows, bytes), whole "
                         f"blocks of {t.nbytes} bytes as {t.name} has")
    return b.reshape(len(b), b.shape[1] // t.nbytes, t.nbytes)


def half_at(blocks: Bytes, offset: int) -> NDArray[np.float16]:
    """(n, 1) from blocks (n, bytes)."""
    return np.ascontiguousarray(blocks[:, offset:offset + 2]).view(np.float16)


def check_scales(name: str, t: BlockType, blocks: Bytes) -> None:
    """ValueError of `name` if some block (n, bytes) has a scale that is not finite or makes weights that are not."""
    if t.is_float:
        values = np.ascontiguousarray(blocks).view(_FLOATS[t.name])
        sound = np.isfinite(values)
        what = "number"
    elif t.name == "MXFP4":
        sound, what = blocks[:, :1] <= 252, "scale"
    elif t.d_of is not None:
        return
    else:
        offsets = [t.d] if t.m is None else [t.d, t.m]
        sound, what = np.isfinite(np.concatenate([half_at(blocks, at) for at in offsets], axis=1)), "scale"
    if not sound.all():
        at = int(np.flatnonzero(~sound.all(axis=1))[0])
        raise ValueError(f"{name}: block {at} of {t.name} has a {what} that is not finite")


def numbers(t: BlockType, blocks: Bytes) -> Numbers:
    """Of blocks (n, bytes) of a type that is no float."""
    if t.integers is None:
        raise TypeError(f"numbers: {t.name} has floats, expected a type of blocks")
    d = blocks[:, t.d:t.d + t.d_bytes] if t.d_bytes else half_at(blocks, t.d)
    return t.integers(blocks)._replace(d=d, m=None if t.m is None else half_at(blocks, t.m))


def weights(t: BlockType, n: Numbers, out: NDArray[np.float32]) -> None:
    """out (n, weights) <- what the numbers stand for."""
    signed = np.take(np.array(t.table, np.int8), n.u) if t.table else (n.u - np.uint8(t.zero)).view(np.int8)
    scales, minima = n.scales, n.minima
    if t.name == "Q2_K" and scales is not None:
        scales, minima = scales & np.uint8(15), scales >> np.uint8(4)
    d = np.asarray(n.d).astype(np.float32) if t.d_of is None else t.d_of(np.asarray(n.d))
    if scales is not None:
        d = d * scales.astype(np.float32)
    w = out.reshape(len(n.u), t.weights // (t.sub or t.weights), t.sub or t.weights)
    np.multiply(signed.reshape(w.shape), d[:, :, None], out=w, dtype=np.float32)
    if n.m is not None:
        m = n.m.astype(np.float32)
        w += (m if minima is None else -(m * minima.astype(np.float32)))[:, :, None]


def dequantize(type_name: str, raw: ArrayLike, *, dtype: DTypeLike = np.float32, name: str = "dequantize") -> NDArray:
    """Rows of whole blocks, uint8 (rows, bytes) -> (rows, weights) float32, or rounded to `dtype`.

    ValueError, which begins with `name`, for an unknown type, rows that are no whole blocks, and a scale or a number
    that is not finite.

    >>> dequantize("Q8_0", np.array([[0, 0x3c, *range(32)]], np.uint8))[0, :4]
    array([0., 1., 2., 3.], dtype=float32)
    """
    t = type_named(name, type_name)
    rows = raw_rows(name, t, raw)
    blocks = rows.reshape(rows.shape[0] * rows.shape[1], t.nbytes)
    if t.is_float:
        check_scales(name, t, blocks)
        values = np.ascontiguousarray(blocks).view(_FLOATS[t.name]).reshape(rows.shape[:2])
        return values.astype(dtype)
    out = np.empty((len(blocks), t.weights), dtype)
    step = _AT_ONCE // t.weights
    w = np.empty((min(step, len(blocks)), t.weights), np.float32) if out.dtype != np.float32 else None
    for first in range(0, len(blocks), step):
        some, to = blocks[first:first + step], out[first:first + step]
        check_scales(name, t, some)
        weights(t, numbers(t, some), to if w is None else w[:len(some)])
        if w is not None:
            to[...] = w[:len(some)]
    return out.reshape(len(rows), rows.shape[1] * t.weights)
