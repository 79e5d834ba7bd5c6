"""Linear and Embedding."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c import functional
from forge_c.formats.layout import Activations, Dtype, NumPyDtype
from forge_c.nn.layer import Layer, Matrix, Seed, Vector, cast_input, parameter_array, read_only, uniform

# Rows are looked up, not multiplied: next to quantised matrices the table is kept in bfloat16.
_TABLE_DTYPES = {"float32": np.dtype(np.float32)} | dict.fromkeys(("bfloat16", "int8", "int4"),
                                                                  np.dtype(ml_dtypes.bfloat16))


class Linear(Layer):
    """x @ weight + bias; weight (in_features, out_features), bias (out_features,) or None.

    Both start uniform in +-1/sqrt(in_features).

    >>> Linear(3, 5, seed=0)(np.ones((2, 3))).shape
    (2, 5)
    """

    weight = Matrix("weight")
    bias = Vector()

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, seed: Seed = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        rng = np.random.default_rng(seed)
        self._pack("weight", [uniform(rng, in_features, (in_features, out_features))])
        self._hold_vectors(bias=uniform(rng, in_features, (out_features,)) if bias else None)

    def forward(self, x: ArrayLike, *, residual: NDArray[Any] | None = None) -> NDArray[Any]:
        """x (..., in_features) -> (..., out_features), plus `residual` where given."""
        return functional.linear(cast_input(self, "x", x), self._matrices["weight"], self._vectors["bias"],
                                 residual=residual)

    if TYPE_CHECKING:
        __call__ = forward


class _Table:
    """Embedding.weight: checked and rounded when assigned, read-only when read."""

    def __get__(self, layer: Embedding | None, owner: type) -> Any:
        return self if layer is None else read_only(layer._table.view())

    def __set__(self, layer: Embedding, value: ArrayLike) -> None:
        table = parameter_array(layer, "weight", value, layer._table.shape)
        layer._table = read_only(table.astype(layer._table.dtype))


class Embedding(Layer):
    """weight[ids] as float32; weight (num_embeddings, dim) starts as N(0, 1). An id outside it is an IndexError.

    >>> Embedding(10, 4, seed=0)([[1, 2, 3]]).shape
    (1, 3, 4)
    """

    weight = _Table()

    def __init__(self, num_embeddings: int, dim: int, *, seed: Seed = None) -> None:
        super().__init__()
        self.num_embeddings, self.dim = num_embeddings, dim
        rng = np.random.default_rng(seed)
        self._table: NDArray[Any] = read_only(rng.standard_normal((num_embeddings, dim), np.float32))

    def parameters(self) -> dict[str, NDArray[Any]]:
        return {"weight": self.weight}

    def astype(self, dtype: Dtype | NumPyDtype, *, activations: Activations | None = None) -> Self:
        other = super().astype(dtype, activations=activations)
        other._table = read_only(self._table.astype(_TABLE_DTYPES[other.dtype]))
        return other

    def forward(self, ids: ArrayLike) -> NDArray[np.float32]:
        """ids, integers of any shape -> ids.shape + (dim,)."""
        return functional.embedding(ids, self._table, dtype=np.float32)

    if TYPE_CHECKING:
        __call__ = forward
