"""In which format each matrix of a model is held.

An int4 model spends more bits where an error of a weight costs more. Measured on SmolLM2-135M and gemma-3-270m, all of
a role's matrices in 4 bits and the others in float32: KL divergence a million weights, beside that of q, see
docs/accuracy.md.

    v 17 - 25    k 2.6 - 4.9    down 1.9 - 2.4    up 1.6 - 3.3    o 1.0    gate 0.6 - 1.5    the head 2.3
    the last eighth of the layers 1.3 - 2.4 times the average, the first as the average

Formats whose blocks hold 256 weights of a column are smaller for what they keep, and padded where in_features is no
multiple of 256: then formats of 32 take their places, which have fewer weights to save on in models so small."""
from __future__ import annotations

from dataclasses import dataclass

from forge_c.formats.layout import PackDtype

_Pair = tuple[PackDtype, PackDtype]  # of in_features that are a multiple of 256, and of others
_FOUR: _Pair = "q4_k", "q4_1"  # 4.6 or 5 bits a weight
_FIVE: _Pair = "q5_k", "q5_1"  # 5.6 or 6
_MOST: _Pair = "q6_k", "q8_0"  # 6.6 or 8.5
_ROLES = {"v_proj": _MOST, "lm_head": _MOST, "k_proj": _FIVE, "qkv_proj": _FIVE, "down_proj": _FIVE, "up_proj": _FIVE,
          "gate_up_proj": _FIVE, "x_proj": _MOST, "input_gate": _MOST, "recurrent_gate": _MOST}
# Of a state space: what each token does to the state follows from it, by an exponential, and it is small.
_WHOLE: dict[str, PackDtype] = {"dt_proj": "bfloat16"}
MIXED = "int4"  # the dtype of a model that mixes
_UNWEIGHED = ("float32", "bfloat16", "int8", "q8_0")  # that keep what a weight is worth anyway


def weighs(dtype: str) -> bool:
    """Whether errors of such a model's weights are worth weighing."""
    return dtype not in _UNWEIGHED


@dataclass(frozen=True)
class Formats:
    """What a model of a dtype holds its matrices in; layer None: the last projection."""

    dtype: PackDtype
    layers: int

    def of(self, name: str, layer: int | None, in_features: int) -> PackDtype:
        """The format of a matrix, such as "self_attn.q_proj"."""
        role_name = name.rpartition(".")[2]
        if role_name in _WHOLE and self.dtype != "float32":
            return _WHOLE[role_name]
        if self.dtype != MIXED:
            return self.dtype
        role = _ROLES.get(role_name, _FOUR)
        if role is _FOUR and layer is not None and layer >= self.layers - self.layers // 8:
            role = _FIVE
        return role[in_features % 256 > 0]
