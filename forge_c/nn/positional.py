"""Rotary (arXiv 2104.09864) and sinusoidal (arXiv 1706.03762) positions."""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c import functional
from forge_c.nn.layer import Layer, cast_input, read_only
from forge_c.rotary import RopeTable, cos_sin, rope_table


class RotaryPositionalEmbedding(Layer):
    """Turns queries and keys (batch, seq, heads, head_dim) or (batch, seq, head_dim) by their positions.

    dim: channels that turn, at most head_dim; scaling: a Hugging Face rope_scaling dict; interleaved: pairs
    (2i, 2i + 1) instead of (i, i + dim/2). A position at or beyond max_seq_len is an IndexError.
    .table is the RopeTable.

    >>> rope = RotaryPositionalEmbedding(64)
    >>> q, k = rope(np.ones((1, 5, 8, 64)), np.ones((1, 5, 2, 64)))
    >>> q.shape, k.shape
    ((1, 5, 8, 64), (1, 5, 2, 64))
    """

    def __init__(self, dim: int, max_seq_len: int = 2048, base: float = 10000.0,
                 scaling: Mapping[str, Any] | None = None, interleaved: bool = False) -> None:
        self._hold(rope_table(dim, max_seq_len, base, scaling=scaling), interleaved)

    @classmethod
    def from_table(cls, table: RopeTable, interleaved: bool = False) -> Self:
        """The layer over a table that exists already."""
        layer = cls.__new__(cls)
        layer._hold(table, interleaved)
        layer._sealed = True
        return layer

    def _hold(self, table: RopeTable, interleaved: bool) -> None:
        Layer.__init__(self)
        self.table, self.dim, self.max_seq_len, self.interleaved = table, table.dim, table.max_seq_len, interleaved

    def forward(self, query: ArrayLike, key: ArrayLike, start_pos: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
        """(query, key), both turned as positions start_pos, start_pos + 1, ..."""
        q, k = cast_input(self, "query", query), cast_input(self, "key", key)
        return self.rotate(q, start_pos), self.rotate(k, start_pos)

    if TYPE_CHECKING:
        __call__ = forward

    def rotate(self, x: NDArray[Any], start_pos: int = 0, *, positions: NDArray[np.int64] | None = None,
               out: NDArray[Any] | None = None) -> NDArray[Any]:
        """One array turned; positions (batch, seq) or (seq,) instead of start_pos."""
        return functional.rope(x, self.table, start_pos=start_pos, positions=positions, interleaved=self.interleaved,
                               out=out)


class SinusoidalPositionalEncoding(Layer):
    """x + table[:seq]: sin(p / 10000^(2i/d)) in the even channels, cos in the odd ones; x (batch, seq, d_model).

    A position at or beyond max_len is an IndexError.

    >>> SinusoidalPositionalEncoding(4)(np.zeros((1, 1, 4)))
    array([[[0., 1., 0., 1.]]], dtype=float32)
    """

    def __init__(self, d_model: int, max_len: int = 5000) -> None:
        super().__init__()
        self.d_model, self.max_len = d_model, max_len
        cos, sin = cos_sin(10000.0 ** (-np.arange(0, d_model, 2) / d_model), max_len)
        self.table = np.empty((max_len, d_model), np.float32)
        self.table[:, 0::2], self.table[:, 1::2] = sin, cos[:, : d_model // 2]
        read_only(self.table)

    def forward(self, x: ArrayLike, start_pos: int = 0) -> NDArray[Any]:
        a = cast_input(self, "x", x)
        if a.ndim != 3 or a.shape[2] != self.d_model:
            raise ValueError(f"SinusoidalPositionalEncoding: x has shape {a.shape}, expected "
                             f"(batch, seq, {self.d_model})")
        stop = start_pos + a.shape[1]
        if start_pos < 0 or stop > self.max_len:
            raise IndexError(f"SinusoidalPositionalEncoding: positions {start_pos} to {stop - 1} are outside the "
                             f"table of {self.max_len} positions")
        return (a + self.table[start_pos:stop]).astype(a.dtype, copy=False)

    if TYPE_CHECKING:
        __call__ = forward
