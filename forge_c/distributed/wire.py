"""How keys and values travel: as they are, as bfloat16, or as bytes with a scale for each token and head.

A message of n tokens lies in one block of bytes: K (B, n, G, D), V (B, n, G, E), and for int8 before them the scales of
both, (B, n, G) float32 each. Every rank computes with what the message says, the owner too, so that a result does not
depend on who holds which tokens.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from forge_c.distributed.comm import Array, Bytes

WireFormat = Literal["bfloat16", "int8"]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_ALIGN = 64


def check_wire(function: str, wire: object) -> None:
    if wire not in (None, "bfloat16", "int8"):
        raise ValueError(f"{function}: wire is {wire!r}, expected None, 'bfloat16' or 'int8'")


@dataclass(frozen=True)
class Wire:
    """The messages of keys (B, n, G, D) and values (B, n, G, E) of a dtype."""
    format: WireFormat | None
    dtype: np.dtype[Any]
    batch: int
    heads: int
    head_dim: int
    v_dim: int

    def __post_init__(self) -> None:
        """bfloat16 as bfloat16 is as it is."""
        if self.format == "bfloat16" and self.dtype == BFLOAT16:
            object.__setattr__(self, "format", None)

    @property
    def sent(self) -> np.dtype[Any]:
        """The dtype that a number travels in."""
        return {None: self.dtype, "bfloat16": BFLOAT16, "int8": np.dtype(np.int8)}[self.format]

    @property
    def read(self) -> np.dtype[Any]:
        """The dtype that a rank computes from."""
        return self.dtype if self.format == "int8" else self.sent

    @property
    def token_bytes(self) -> int:
        numbers, scales = self.head_dim + self.v_dim, 8 if self.format == "int8" else 0
        return self.batch * self.heads * (numbers * self.sent.itemsize + scales)

    def capacity(self, tokens: int) -> int:
        """Bytes of a message, and to where the next may begin."""
        return -(-self.token_bytes * tokens // _ALIGN) * _ALIGN

    def precision(self, given: str | None) -> str | None:
        """What is multiplied in: the dtype on the way changes nothing about it."""
        return "float32" if given is None and self.read != self.dtype else given

    def encode(self, k: Array, v: Array, out: Bytes) -> None:
        """out <- the message of k (B, n, G, D) and v (B, n, G, E)."""
        for x, numbers, scales in zip((k, v), self._numbers(out, k.shape[1]), self._scales(out, k.shape[1]),
                                      strict=True):
            if self.format == "int8":
                _quantize(x, numbers, scales)
            else:
                numbers[...] = x

    def decode(self, data: Bytes, tokens: int) -> tuple[Array, Array]:
        """k and v of a message: views where they travel as they are read."""
        k, v = self._numbers(data, tokens)
        if self.format != "int8":
            return k, v
        with np.errstate(invalid="ignore", over="ignore"):
            first, second = (np.multiply(x, s[..., None], dtype=np.float32).astype(self.dtype, copy=False)
                             for x, s in zip((k, v), self._scales(data, tokens), strict=True))
        return first, second

    def rounded(self, k: Array, v: Array) -> tuple[Array, Array]:
        """What ranks compute with where k and v travel."""
        data = np.empty(self.capacity(k.shape[1]), np.uint8)
        self.encode(k, v, data)
        return self.decode(data, k.shape[1])

    def _scales(self, data: Bytes, tokens: int) -> list[NDArray[np.float32]]:
        shape = (self.batch, tokens, self.heads) if self.format == "int8" else (0, 0, 0)
        count = int(np.prod(shape))
        both = data[:8 * count].view(np.float32)
        return [both[:count].reshape(shape), both[count:].reshape(shape)]

    def _numbers(self, data: Bytes, tokens: int) -> list[Array]:
        found, at = [], 8 * self.batch * tokens * self.heads if self.format == "int8" else 0
        for dim in (self.head_dim, self.v_dim):
            shape = (self.batch, tokens, self.heads, dim)
            size = int(np.prod(shape)) * self.sent.itemsize
            found.append(data[at:at + size].view(self.sent).reshape(shape))
            at += size
        return found


def _quantize(x: Array, numbers: Array, scales: NDArray[np.float32]) -> None:
    """numbers (B, n, G, D) int8, scales (B, n, G): x ~ numbers scale, |numbers| <= 127. An infinity or a NaN makes its
    token and head NaN."""
    values = x.astype(np.float32, copy=False)
    largest = np.max(np.abs(values), axis=-1, initial=0)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        scales[...] = np.where(np.isfinite(largest), largest / np.float32(127), np.float32(np.nan))
        inverse = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
        exact = np.nan_to_num(values * inverse[..., None], nan=0, posinf=127, neginf=-127)
    np.rint(np.clip(exact, -127, 127), out=exact)
    numbers[...] = exact.astype(np.int8)
