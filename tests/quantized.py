"""int8 and int4 weights byte by byte, as formats/layout.py lays them out, and the products they must give."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import reference
from conftest import SMALLEST_NORMAL, check_close
from numpy.typing import ArrayLike, NDArray
from suite import once

from forge_c import PackedWeight, pack, pack_gated

Array = NDArray[Any]

# name -> (dtype, group_size, rows of a group)
FORMATS: dict[str, tuple[str, int | None, int]] = {
    "int8": ("int8", None, 128), "int8-32": ("int8", 32, 32), "int8-64": ("int8", 64, 64), "int8-96": ("int8", 96, 96),
    "int8-8192": ("int8", 8192, 8192), "int4": ("int4", None, 64), "int4-32": ("int4", 32, 32),
    "int4-128": ("int4", 128, 128), "int4-192": ("int4", 192, 192), "int4-8192": ("int4", 8192, 8192),
}
# The same with inputs rounded the other way, after the slash.
PRODUCTS = FORMATS | {name: FORMATS[name.partition("/")[0]] for name in (
    "int8/int8", "int8-96/int8", "int8-8192/int8", "int4/int12", "int4-32/int12", "int4-192/int12", "int4-8192/int12")}
SMALL_GROUPS = [name for name, (_, _, group) in FORMATS.items() if group < 8192]
SMALL_PRODUCTS = [name for name, (_, _, group) in PRODUCTS.items() if group < 8192]
ZERO = {"int8": 128, "int4": 8}
STEPS = {"int8": 127, "int12": 2047}


def activations_of(name: str) -> str:
    """Of a name in PRODUCTS."""
    return name.partition("/")[2] or ("int12" if name.startswith("int8") else "int8")


@once
def packed_as(name: str, *sides: Array) -> PackedWeight:
    """One matrix, or the two of a gated pair, in a format of PRODUCTS."""
    dtype, group_size, _ = PRODUCTS[name]
    return (pack if len(sides) == 1 else pack_gated)(*sides, dtype, group_size=group_size,
                                                     activations=name.partition("/")[2] or None)


def chunk_of(dtype: str, group: int, activations: str) -> int:
    """Rows that share a scale of x and of W, and an exact sum."""
    if activations == "int8" or dtype != "int8":
        return 32
    return group if group <= 4096 else math.gcd(group, 4096)


def has_minimum(dtype: str, group: int) -> bool:
    return dtype == "int4" and group != 32


@dataclass(frozen=True)
class Places:
    """Where a format keeps what belongs to row k and column n of a panel-after-panel weight, as byte offsets."""

    u: NDArray[np.int64]  # (rows, n), rows in whole blocks
    high: NDArray[np.bool_]  # (rows, 1): u is in the high nibble
    scale: NDArray[np.int64]  # (groups, n)
    minimum: NDArray[np.int64] | None
    nbytes: int


def places(dtype: str, group: int, k: int, n: int, *, sides: int = 1, side: int = 0) -> Places:
    k_per_line, twin = (4 if dtype == "int8" else 8), dtype == "int4" and group == 32
    block = 2 * group if twin else group
    blocks, panels = -(-k // block), -(-n // 16) * sides
    block_bytes = block // k_per_line * 64 + 64
    row, column = np.arange(blocks * block)[:, None], np.arange(n)[None]
    start = row // block * block_bytes
    panel = (column // 16 * sides + side) * blocks * block_bytes
    u = (start + row % block // k_per_line * 64 + row % 4) + (panel + column % 16 * 4)
    size = 4 if dtype == "int8" else 2
    params = start + block_bytes - 64 + (row % block // group * 32 if twin else 0)
    scale = params[::group] + (panel + column % 16 * size)
    minimum = scale + 32 if has_minimum(dtype, group) else None
    return Places(u, row % 8 >= 4 if dtype == "int4" else row < 0, scale, minimum, panels * blocks * block_bytes)


@dataclass(frozen=True)
class Parts:
    """W = scale ints + minimum, chunk of rows by chunk; ints (chunks, chunk, n), scale and minimum (chunks, n), all
    float64."""

    ints: Array
    scale: Array
    minimum: Array
    k: int
    activations: str

    @property
    def weight(self) -> Array:
        """(k, n), exact."""
        w = self.ints * self.scale[:, None] + self.minimum[:, None]
        return w.reshape(w.shape[0] * w.shape[1], w.shape[2])[:self.k]


@once
def parts(packed: PackedWeight, side: int = 0) -> Parts:
    """What the bytes of `packed` say, read one by one."""
    sides, group, dtype = (2 if packed.gated else 1), packed.group_size, packed.dtype
    k, n = packed.shape[0], packed.shape[1] // sides
    at, data = places(dtype, group, k, n, sides=sides, side=side), packed.data.reshape(-1).view(np.uint8)
    assert at.nbytes == packed.nbytes
    u, param = data[at.u], np.float32 if dtype == "int8" else np.float16
    if dtype == "int4":
        u = np.where(at.high, u >> 4, u & 15)

    def read(offsets: NDArray[np.int64]) -> Array:
        return data[offsets[..., None] + np.arange(param().itemsize)].view(param)[..., 0].astype(np.float64)

    scale = read(at.scale)
    minimum = np.zeros(scale.shape) if at.minimum is None else read(at.minimum)
    ints = u.astype(np.float64) - (ZERO[dtype] if at.minimum is None else 0)
    chunk = chunk_of(dtype, group, packed.activations)
    scale, minimum = (np.repeat(a, group // chunk, axis=0) for a in (scale, minimum))
    return Parts(ints.reshape(len(scale), chunk, n), scale, minimum, k, packed.activations)


def from_parts(dtype: str, group: int, u: ArrayLike, scale: ArrayLike, minimum: ArrayLike | None = None,
               activations: str | None = None) -> PackedWeight:
    """A weight of these bytes: u (k, n), k in whole groups; scale and minimum (groups, n)."""
    u, param = np.asarray(u, np.uint8), np.float32 if dtype == "int8" else np.float16
    k, n = u.shape
    at = places(dtype, group, k, n)
    data = np.zeros(at.nbytes, np.uint8)
    rows = np.zeros(at.u.shape, np.uint8)
    rows[:k] = u
    np.bitwise_or.at(data, at.u, np.where(at.high, rows << 4, rows))
    for offsets, values in ((at.scale, scale), (at.minimum, minimum)):
        if offsets is not None:
            held = np.zeros(offsets.shape, param)
            held[:k // group] = values
            data[offsets[..., None] + np.arange(param().itemsize)] = held[..., None].view(np.uint8)
    return PackedWeight(data, (k, n), dtype, False, group, activations)


@once
def steady(x: Array) -> Array:
    """x (..., k) without the values whose rounding the kernel's float32 may decide otherwise than the reference, with
    either rounding: x steps / max|x| is off by two roundings there, and those so close to halfway between whole numbers
    are 0. Where that was a chunk's maximum, the others are looked at again."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).copy()
    k = flat.shape[1]
    roundings = {("int8", min(32, k)), *(("int12", min(chunk, k)) for chunk in (32, 64, 96, 128, 4096))}
    while k:
        wide, close = np.abs(reference.f64(flat)), np.zeros(flat.shape, bool)
        for activations, chunk in roundings:
            scale = np.maximum.reduceat(wide, np.arange(0, k, chunk), axis=1) / STEPS[activations]
            q = wide / np.repeat(np.where(scale == 0, 1.0, scale), chunk, axis=1)[:, :k]
            close |= np.abs(q % 1 - 0.5) < STEPS[activations] * 2.0**-23
        if not close.any():
            break
        flat[close] = 0
    return flat.reshape(x.shape)


def normal(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> Array:
    """Steady normal numbers."""
    return steady(rng.standard_normal(shape, np.float32).astype(dtype)).copy()


@dataclass(frozen=True)
class Product:
    """x W + bias + residual with x quantised: its value, the size of what its roundings act on, steps of its chain."""

    value: Array
    magnitude: Array
    steps: int


@once
def product(x: Array, w: Parts, bias: Array | None = None, residual: Array | None = None) -> Product:
    q, scale = reference.quantized(x, w.activations, w.ints.shape[1])
    terms = scale.T[:, :, None] * np.abs(reference.group_terms(q, w.ints, w.scale, w.minimum))
    magnitude = terms.sum(axis=(0, 1)) + scale.max(axis=1, initial=0, keepdims=True) * SMALLEST_NORMAL
    for term in (bias, residual):
        magnitude = magnitude if term is None else magnitude + np.abs(reference.f64(term))
    value = reference.quantized_linear(x, w.ints, w.scale, w.minimum, bias, activations=w.activations,
                                       residual=residual)
    return Product(value, magnitude, len(w.ints) * (2 if w.minimum.any() else 1))


@once
def unrounded(x: Array, w: Parts, bias: Array | None = None, residual: Array | None = None) -> Product:
    """As product, with x as it came."""
    y, chunk = product(x, w, bias, residual), w.ints.shape[1]
    # Half a step for each value of x; as magnitude, in roundings of 2^-24.
    step = np.repeat(reference.quantized(x, w.activations, chunk)[1], chunk, axis=1)[:, :w.k]
    half_step = 0.5 * step @ np.abs(w.weight) * (1 + STEPS[w.activations] * 2.0**-22)
    return Product(reference.linear(x, w.weight, bias, residual=residual),
                   y.magnitude + half_step * 2.0**24 / (y.steps + 6), y.steps)


def check_product(got: Array, x: Array, w: Parts, bias: Array | None = None, residual: Array | None = None, *,
                  case: str = "") -> None:
    """`got` against the exact arithmetic of x's and W's integers, and against x W with x as it came."""
    for y in (product(x, w, bias, residual), unrounded(x, w, bias, residual)):
        check_close("quantized_linear", got, y.value, magnitude=y.magnitude, n=y.steps, case=case)


def check_gated(got: Array, x: Array, a: Parts, b: Parts, bias: Array | None, activation: str) -> None:
    """As test_linear.check_gated: the errors of both products go through the activation and meet the other factor."""
    bias_a, bias_b = (None, None) if bias is None else reference.f64(bias)
    g, u = product(x, a, bias_a), product(x, b, bias_b)
    f = {"relu": reference.relu, "silu": reference.silu, "gelu": reference.gelu,
         "gelu_tanh": lambda t: reference.gelu(t, "tanh")}[activation](g.value)
    magnitude = g.magnitude * np.abs(u.value) + np.abs(f) * u.magnitude
    magnitude += 2.0**-24 * (g.steps + 6) * g.magnitude * u.magnitude
    check_close("quantized_gated_linear", got, f * u.value, magnitude=magnitude, n=max(g.steps, u.steps))
