"""ReLU and GELU."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import ArrayLike, NDArray

from forge_c import functional
from forge_c.nn.layer import Layer, cast_input


class ReLU(Layer):
    """max(x, 0), elementwise."""

    def forward(self, x: ArrayLike) -> NDArray[Any]:
        return functional.relu(cast_input(self, "x", x))

    if TYPE_CHECKING:
        __call__ = forward


class GELU(Layer):
    """x * Phi(x), elementwise; approximate="tanh" is the tanh form (arXiv 1606.08415)."""

    def __init__(self, approximate: Literal["none", "tanh"] = "none") -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ValueError(f"GELU: approximate is {approximate!r}, expected 'none' or 'tanh'")
        self.approximate = approximate

    def forward(self, x: ArrayLike) -> NDArray[Any]:
        return functional.gelu(cast_input(self, "x", x), self.approximate)

    if TYPE_CHECKING:
        __call__ = forward
