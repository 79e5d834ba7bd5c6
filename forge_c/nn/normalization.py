"""RMSNorm and LayerNorm."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c import functional
from forge_c.nn.layer import Layer, Vector, cast_input


class RMSNorm(Layer):
    """x / sqrt(mean(x**2) + eps) * weight over the last axis (arXiv 1910.07467). weight (dim,) starts at one.

    >>> print(RMSNorm(2, eps=0.0)([3.0, 4.0]).round(4))
    [0.8485 1.1314]
    """

    weight = Vector()

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self._hold_vectors(weight=np.ones(dim, np.float32))

    def forward(self, x: ArrayLike) -> NDArray[Any]:
        return functional.rms_norm(cast_input(self, "x", x), self._vectors["weight"], self.eps)

    if TYPE_CHECKING:
        __call__ = forward


class LayerNorm(Layer):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis (arXiv 1607.06450); they start at 1 and 0.

    >>> LayerNorm(2, eps=0.0)([1.0, 3.0])
    array([-1.,  1.], dtype=float32)
    """

    weight = Vector()
    bias = Vector()

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self._hold_vectors(weight=np.ones(dim, np.float32), bias=np.zeros(dim, np.float32))

    def forward(self, x: ArrayLike) -> NDArray[Any]:
        return functional.layer_norm(cast_input(self, "x", x), self._vectors["weight"], self._vectors["bias"], self.eps)

    if TYPE_CHECKING:
        __call__ = forward
