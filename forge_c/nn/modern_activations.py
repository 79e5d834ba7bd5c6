"""Gated MLPs (arXiv 2002.05202) and Swish.

The swish is on the `up` side: SwiGLU(x) = ((x W_gate + b_gate) * swish(x W_up + b_up)) W_down + b_down.
LLaMA checkpoints name the two sides the other way round; `from_llama` does the swap.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c import functional
from forge_c.nn.layer import Layer, Matrix, Seed, Vector, cast_input, parameter_array, uniform


class Swish(Layer):
    """x / (1 + exp(-x)), elementwise; also called SiLU."""

    def forward(self, x: ArrayLike) -> NDArray[Any]:
        return functional.silu(cast_input(self, "x", x))

    if TYPE_CHECKING:
        __call__ = forward


class _GatedMLP(Layer):
    """((x W_gate) * f(x W_up)) W_down: two packed matrices, two functional calls."""

    W_up = Matrix("up_gate", 0)
    W_gate = Matrix("up_gate", 1)
    W_down = Matrix("down")
    b_up = Vector()
    b_gate = Vector()
    b_down = Vector()

    def __init__(self, input_dim: int, hidden_dim: int | None = None, bias: bool = True, *, seed: Seed = None) -> None:
        hidden_dim = int(8 * input_dim / 3) if hidden_dim is None else hidden_dim
        rng = np.random.default_rng(seed)
        up, gate = (uniform(rng, input_dim, (input_dim, hidden_dim)) for _ in range(2))
        self._hold(up, gate, uniform(rng, hidden_dim, (hidden_dim, input_dim)), bias)

    def _hold(self, up: NDArray[np.float32], gate: NDArray[np.float32], down: NDArray[np.float32], bias: bool) -> None:
        Layer.__init__(self)
        self._activation = "silu"
        self.input_dim, self.hidden_dim = up.shape
        self._pack("up_gate", [up, gate], gated=True)
        self._pack("down", [down])
        sizes = {"b_up": self.hidden_dim, "b_gate": self.hidden_dim, "b_down": self.input_dim}
        self._hold_vectors(**{name: np.zeros(size, np.float32) if bias else None for name, size in sizes.items()})

    @classmethod
    def from_llama(cls, gate_proj: ArrayLike, up_proj: ArrayLike, down_proj: ArrayLike) -> Self:
        """A layer without biases from an MLP's weights as Hugging Face stores them, (out_features, in_features).

        gate_proj, up_proj (hidden, in); down_proj (in, hidden). Their gate_proj is the side that goes through the
        activation, our W_up; their up_proj is our W_gate.

        >>> layer = SwiGLU.from_llama(np.full((5, 3), 1.0), np.full((5, 3), 2.0), np.zeros((3, 5)))
        >>> float(layer.W_up[0, 0]), float(layer.W_gate[0, 0])
        (1.0, 2.0)
        """
        layer = cls.__new__(cls)
        if np.ndim(gate_proj) != 2:
            raise ValueError(f"{cls.__name__}: gate_proj has shape {np.shape(gate_proj)}, expected (hidden, in)")
        hidden, width = np.shape(gate_proj)
        gate = parameter_array(layer, "gate_proj", gate_proj, (hidden, width))
        up = parameter_array(layer, "up_proj", up_proj, (hidden, width))
        layer._hold(gate.T, up.T, parameter_array(layer, "down_proj", down_proj, (width, hidden)).T, bias=False)
        layer._sealed = True
        return layer

    def forward(self, x: ArrayLike, *, residual: NDArray[Any] | None = None) -> NDArray[Any]:
        """x (..., input_dim) -> (..., input_dim), plus `residual` where given."""
        bias = self._joined("b_up", "b_gate")
        hidden = functional.gated_linear(cast_input(self, "x", x), self._matrices["up_gate"],
                                         None if bias is None else bias.reshape(2, -1), activation=self._activation)
        return functional.linear(hidden, self._matrices["down"], self._vectors["b_down"], residual=residual)

    if TYPE_CHECKING:
        __call__ = forward


class SwiGLU(_GatedMLP):
    """((x W_gate + b_gate) * swish(x W_up + b_up)) W_down + b_down; hidden_dim defaults to int(8 * input_dim / 3).

    The names are not LLaMA's: what goes through the activation is called W_up here, gate_proj in LLaMA and in
    Hugging Face, and `gate` in `forge_c.swiglu` and `pack_gated`; W_gate is their up_proj. `from_llama` takes theirs.

    W_gate, W_up (input_dim, hidden_dim) and W_down (hidden_dim, input_dim) start uniform in +-1/sqrt(in), biases at
    zero; with bias=False they are None.

    >>> SwiGLU(input_dim=768).hidden_dim
    2048
    """


class GeGLU(_GatedMLP):
    """((x W_gate + b_gate) * gelu(x W_up + b_up)) W_down + b_down; parameters as in SwiGLU.

    approximate: "none" for the exact gelu, "tanh" for its tanh form, which Gemma uses.
    """

    def __init__(self, input_dim: int, hidden_dim: int | None = None, bias: bool = True, approximate: str = "none", *,
                 seed: Seed = None) -> None:
        super().__init__(input_dim, hidden_dim, bias, seed=seed)
        self._activation = _gelu(approximate)

    @classmethod
    def from_llama(cls, gate_proj: ArrayLike, up_proj: ArrayLike, down_proj: ArrayLike,
                   approximate: str = "none") -> Self:
        """As SwiGLU.from_llama."""
        layer = super().from_llama(gate_proj, up_proj, down_proj)
        layer._activation = _gelu(approximate)
        return layer


def _gelu(approximate: str) -> str:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"GeGLU: approximate is {approximate!r}, expected 'none' or 'tanh'")
    return "gelu" if approximate == "none" else "gelu_tanh"
