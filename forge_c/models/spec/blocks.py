"""Pieces of a config.json that families share: sizes, the attention's rotation and windows, the gated MLP, the rest."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forge_c.checks import short
from forge_c.models.spec.kinds import Embedding, GatedMLP, Head, LayerSpec, ModelSpec, Norm, Rope
from forge_c.models.spec.reader import (
    MAX_HEADS,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    Reader,
    checked_mapping,
    checked_number,
)

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
               "gelu_new": "gelu_tanh", "relu": "relu"}
LAYER_TYPES = ("full_attention", "sliding_attention")
_ROPE_NAMES = {"su": "longrope"}  # the name in the first Phi-3 files


@dataclass(frozen=True)
class Sizes:
    """Of the residual stream and of attention."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int


def sizes(c: Reader) -> Sizes:
    """Sizes that every decoder has; head_dim is hidden / heads where it is not given."""
    layers = c.integer("num_hidden_layers", MAX_LAYERS)
    heads = c.integer("num_attention_heads", MAX_HEADS)
    kv_heads = c.integer("num_key_value_heads", MAX_HEADS, heads)
    hidden = c.integer("hidden_size", MAX_WIDTH)
    if heads % kv_heads:
        raise ValueError(f"config.json: num_attention_heads is {heads}, expected a multiple of num_key_value_heads "
                         f"{kv_heads}")
    if c.value("head_dim") is None and hidden % heads:
        raise ValueError(f"config.json: hidden_size is {hidden}, expected a multiple of num_attention_heads {heads}")
    return Sizes(layers, hidden, heads, kv_heads, c.integer("head_dim", MAX_WIDTH, hidden // heads))


def activation(c: Reader, instead: Mapping[str, str] | None = None) -> str:
    """The MLP's function by forge_c's name; `instead`: what a name of the file stands for in this family."""
    name = c.value("hidden_activation") or c.value("hidden_act")
    name = (instead or {}).get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act is {short(name)}, expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def gated_mlp(c: Reader, function: str, *, bias: bool = False, fused: bool = False) -> GatedMLP:
    """intermediate_size wide."""
    return GatedMLP(c.integer("intermediate_size", MAX_WIDTH), function, bias, fused)


def decoder(c: Reader, layers: Sequence[LayerSpec], norm: Norm, *, embedding_scale: float = 1.0,
            logits_scale: float = 1.0, softcap: float | None = None) -> ModelSpec:
    """Layers between an embedding and a head."""
    bos = c.token_ids("bos_token_id")
    embed = Embedding(c.integer("vocab_size", MAX_VOCAB), c.integer("hidden_size", MAX_WIDTH), embedding_scale)
    head = Head(norm, c.flag("tie_word_embeddings"), logits_scale, softcap)
    return ModelSpec(c.model_type, embed, tuple(layers), head, c.integer("max_position_embeddings", 1 << 40),
                     c.token_ids("eos_token_id"), bos[0] if bos else None)


def rms_norm(c: Reader, offset: float = 0.0) -> Norm:
    """RMSNorm of rms_norm_eps."""
    return Norm("rms", c.number("rms_norm_eps", zero=True), offset)


def windows(c: Reader, layers: int, sliding: Sequence[bool] | None = None) -> tuple[int | None, ...]:
    """Each layer's sliding window: how many keys a token sees, itself included. sliding: which layers have one, where
    neither layer_types nor max_window_layers says so."""
    if c.value("sliding_window") is None or ("use_sliding_window" in c.defaults and not c.flag("use_sliding_window")):
        return (None,) * layers
    window = c.integer("sliding_window", 1 << 40)
    types = c.per_layer("layer_types", layers, LAYER_TYPES)
    if types is not None:
        sliding = [t == "sliding_attention" for t in types]
    elif sliding is None and "max_window_layers" in c.defaults:
        first = c.value("max_window_layers")
        if first is not None and (isinstance(first, bool) or not isinstance(first, int) or first < 0):
            raise ValueError(f"config.json: max_window_layers is {short(first)}, expected an integer >= 0")
        sliding = [i >= (first or 0) for i in range(layers)]
    return tuple(window if s else None for s in sliding or [True] * layers)


def rope(c: Reader, head_dim: int) -> Rope:
    """The rotation of heads of head_dim channels, from rope_parameters or the older rope_theta and rope_scaling."""
    given = c.mapping("rope_scaling") | c.mapping("rope_parameters")
    return rotation(c, head_dim, given, c.number("rope_theta", 10000.0))


def rope_by_type(c: Reader, head_dim: int) -> dict[str, Rope]:
    """One rotation for each layer type: an object each in rope_parameters, or the older rope_theta and rope_scaling of
    full_attention and rope_local_base_freq of sliding_attention."""
    given = c.mapping("rope_parameters")
    unknown = given.keys() - set(LAYER_TYPES)
    if unknown:
        raise ValueError(f"config.json: rope_parameters has {min(unknown)}, expected an object for each of "
                         f"{', '.join(LAYER_TYPES)}")
    scaling = {"full_attention": c.mapping("rope_scaling"), "sliding_attention": {}}
    theta = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
    own = {name: checked_mapping(f"rope_parameters[{name!r}]", given.get(name)) for name in LAYER_TYPES}
    return {name: rotation(c, head_dim, own[name] | scaling[name], c.number(theta[name])) for name in LAYER_TYPES}


def rotation(c: Reader, head_dim: int, given: dict[str, Any], theta: float) -> Rope:
    """The rotation of heads of head_dim channels that the settings `given` say; theta where they have none."""
    own_theta = given.pop("rope_theta", None)
    theta = theta if own_theta is None else checked_number("rope_theta", own_theta)
    fraction = given.pop("partial_rotary_factor", c.given.get("partial_rotary_factor"))
    fraction = checked_number("partial_rotary_factor", 1.0 if fraction is None else fraction, most=1.0)
    rope_type = given.pop("rope_type", None) or given.get("type") or "default"
    given.pop("type", None)
    rope_type = _ROPE_NAMES.get(rope_type, rope_type) if isinstance(rope_type, str) else rope_type
    if not isinstance(rope_type, str):
        raise ValueError(f"config.json: rope_type is {short(rope_type)}, expected a name")
    if rope_type == "proportional" and fraction != 1.0:
        given["partial_rotary_factor"], fraction = fraction, 1.0
    for key in ("max_position_embeddings", "original_max_position_embeddings"):
        if c.value(key) is not None:
            given.setdefault(key, c.value(key))
    return Rope(int(head_dim * fraction), theta, given | {"rope_type": rope_type})
