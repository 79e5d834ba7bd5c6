"""Tensors of layers that multiply what their products give (muP): the matrices and biases take the numbers over, so
that what computes knows nothing of them."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge_c.models.spec import LayerSpec, Mamba2
from forge_c.models.weights import Tensors


def multiplied(checkpoint: Tensors, prefix: str, layer: LayerSpec) -> Tensors:
    """The checkpoint, of which the tensors of the layer whose names begin with `prefix` are multiplied."""
    factors = {f"{prefix}{name}": np.float32(f) for name, f in _factors(layer).items() if np.any(np.not_equal(f, 1))}
    return _Multiplied(checkpoint, factors) if factors else checkpoint


class _Multiplied:
    """Tensors by name, in float32 where there are factors: one number, or one a row."""

    def __init__(self, checkpoint: Tensors, factors: Mapping[str, Any]) -> None:
        self._checkpoint, self._factors = checkpoint, factors

    def take(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """As Tensors.take."""
        tensor, factor = self._checkpoint.take(name, shape), self._factors.get(name)
        if factor is None:
            return tensor
        found = tensor.astype(np.float32)
        found *= factor.reshape(-1, *[1] * (len(shape) - 1))
        return found

    def check_all_taken(self, allowed: tuple[str, ...] = ()) -> None:
        """As Tensors.check_all_taken."""
        self._checkpoint.check_all_taken(allowed)


def _factors(layer: LayerSpec) -> dict[str, Any]:
    """By the names of tensors within the layer: what multiplies an input is the matrix's alone, what multiplies a
    result the bias's too."""
    m = layer.multipliers
    if m is None:
        return {}
    inputs = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), m.attention_in)
    results: dict[str, Any] = {"self_attn.k_proj": m.key, "self_attn.o_proj": m.attention_out, "mlp.gate_proj": m.gate,
                               "mlp.down_proj": m.down, "mixer.out_proj": m.ssm_out}
    for kind in layer.mixers:
        if isinstance(kind, Mamba2):
            inputs["mixer.in_proj"], shared = m.ssm_in, kind.groups * kind.state
            results["mixer.in_proj"] = np.repeat(m.ssm, (kind.inner, kind.inner, shared, shared, kind.heads))
    weights = {f"{name}.weight": inputs.get(name, 1.0) * results.get(name, 1.0) for name in {**inputs, **results}}
    return weights | {f"{name}.bias": factor for name, factor in results.items()}
