"""Tensors that differ from the checkpoint's, so that what computes knows nothing of it: of layers that multiply what
their products give (muP), matrices and biases that take the numbers over; of layers that share weights and add to them
or multiply them by matrices of their own, what comes of that."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge_c.functional import linear
from forge_c.models.spec import Ahead, LayerSpec, Mamba2
from forge_c.models.weights import Tensors


def folded(checkpoint: Tensors, prefix: str, layer: LayerSpec) -> Tensors:
    """The checkpoint with the tensors of the layer whose names begin with `prefix` as the layer's parts take them."""
    if layer.ahead is not None:
        return _Shared(checkpoint, prefix, layer.ahead)
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


class _Shared:
    """Tensors by name, of which the layer's attention and mlp are another's with its own folded in."""

    def __init__(self, checkpoint: Tensors, prefix: str, ahead: Ahead) -> None:
        self._checkpoint, self._prefix, self._ahead = checkpoint, prefix, ahead

    def take(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """As Tensors.take."""
        own = name.removeprefix(self._prefix)
        if not own.startswith(("ahead.", "self_attn.", "mlp.")):
            return self._checkpoint.take(name, shape)
        found = self._of_block(own.removeprefix("ahead."), shape)
        if own == "mlp.down_proj.weight":  # what follows it
            last = self._checkpoint.take(f"{self._prefix}linear.weight", (shape[0], shape[0]))
            return linear(last.astype(np.float32), found.astype(np.float32))
        low = self._low_rank(own)
        if low is None:
            return found
        down, up = (self._of_block(f"{low}.{i}.weight", size).astype(np.float32) for i, size in enumerate((
            (self._ahead.rank, shape[1]), (shape[0], self._ahead.rank))))
        return linear(up, down) + found.astype(np.float32)

    def _of_block(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        return self._checkpoint.take(f"model.layers.{self._ahead.of}.shared_transformer.{name}", shape)

    def _low_rank(self, name: str) -> str | None:
        """Where the matrices lie that are multiplied and added to the one of that name."""
        if name == "mlp.gate_up_proj.weight":
            return f"mlp.gate_up_proj_adapter_list.{self._ahead.use}"
        role = name.removeprefix("self_attn.").removesuffix("_proj.weight")
        is_adapted = self._ahead.adapted and role in ("q", "k", "v")
        return f"self_attn.linear_{role}_adapter_list.{self._ahead.use}" if is_adapted else None

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
