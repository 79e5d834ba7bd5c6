"""Decoders in which most layers have a recurrent mixer and some attention: Bamba, Granite 4's dense models, LFM2,
Nemotron-H; and Falcon-H1, where each has both."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from forge_c.checks import short
from forge_c.models.spec import blocks
from forge_c.models.spec.kinds import (
    MLP,
    Attention,
    GatedMLP,
    LayerSpec,
    Mamba2,
    ModelSpec,
    Multipliers,
    Norm,
    Rope,
    ShortConv,
)
from forge_c.models.spec.mamba import UNREAD, expanded, state_space, time_step_limit
from forge_c.models.spec.reader import BIASES, COMMON, MAX_WIDTH, Reader, checked_number

_MAMBA = UNREAD | {
    "mamba_n_heads": 128, "mamba_d_head": "auto", "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_conv_bias": True, "mamba_proj_bias": False, "time_step_limit": None}
_BAMBA = COMMON | BIASES | _MAMBA | {
    "rms_norm_eps": 1e-5, "max_position_embeddings": 262144, "attn_layer_indices": None, "num_logits_to_keep": 1,
    "z_loss_coefficient": 0.0}
_FALCON = COMMON | BIASES | _MAMBA | {
    "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "num_logits_to_keep": 1, "mamba_d_ssm": 1024,
    "mamba_norm_before_gate": True, "mamba_rms_norm": False, "projectors_bias": False, "layers_block_type": None,
    "layer_types": None, "attn_layer_indices": None, "mamba_use_mlp": True, "mlp_expansion_factor": None,
    "mlp_multipliers": None, "ssm_multipliers": None} | dict.fromkeys("""
    lm_head_multiplier embedding_multiplier key_multiplier attention_out_multiplier attention_in_multiplier
    ssm_in_multiplier ssm_out_multiplier
""".split(), 1.0)
_GRANITE = COMMON | _MAMBA | {
    "attention_bias": False, "embedding_multiplier": 1.0, "attention_multiplier": 1.0, "residual_multiplier": 1.0,
    "logits_scaling": 1.0, "num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 1024,
    "position_embedding_type": None, "layer_types": None, "layers_block_type": None}
_LFM2 = COMMON | {
    "tie_word_embeddings": True, "max_position_embeddings": 128000, "norm_eps": 1e-5, "rope_theta": 1e6,
    "conv_bias": False, "conv_L_cache": 3, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True, "full_attn_idxs": None, "layer_types": None, "block_ff_dim": None,
    "tie_embedding": None, "block_dim": None, "conv_dim": None, "conv_dim_out": None, "conv_use_xavier_init": None,
    "block_mlp_init_scale": None, "block_out_init_scale": None, "block_norm_eps": None, "block_use_swiglu": True,
    "block_use_xavier_init": None, "use_pos_enc": True, "theta": None}
_NEMOTRON = COMMON | UNREAD | {
    "layers_block_type": None, "hybrid_override_pattern": None, "max_position_embeddings": 4096, "head_dim": 128,
    "attention_bias": False, "sliding_window": None, "mlp_hidden_act": "relu2", "mlp_bias": False,
    "use_mamba_kernels": None, "ssm_state_size": 128, "mamba_num_heads": 128, "mamba_head_dim": 64,
    "mamba_hidden_act": "silu", "n_groups": 8, "conv_kernel": 4, "expand": 2, "time_step_min": 0.001,
    "time_step_limit": None, "use_conv_bias": True, "mamba_proj_bias": False, "mamba_ssm_cache_dtype": None,
    "use_bias": False, "layer_norm_epsilon": 1e-5, "num_logits_to_keep": 1, "num_nextn_predict_layers": 0,
    "attention_head_dim": None, "rms_norm_eps": None} | dict.fromkeys("""
    n_routed_experts n_shared_experts moe_intermediate_size moe_shared_expert_intermediate_size moe_latent_size
    moe_shared_expert_overlap num_experts_per_tok routed_scaling_factor n_group topk_group norm_topk_prob
    mtp_layers_block_type mtp_hybrid_override_pattern
""".split())  # of experts, which layers of a type of their own would have
_NEMOTRON_OLD = {"mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_expand": "expand",
                 "mamba_dt_min": "time_step_min", "mamba_dt_max": "time_step_max", "mamba_dt_limit": "time_step_limit",
                 "mamba_dt_init_floor": "time_step_floor", "mamba_conv_bias": "use_conv_bias"}
_NEMOTRON_TYPES = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "mamba": "linear_attention",
                   "attention": "full_attention"}
_NAMES_OF = {"mamba": "linear_attention", "attention": "full_attention"}  # what older files say


def bamba(config: Mapping[str, Any]) -> ModelSpec:
    """Mamba-2, and attention in the layers that attn_layer_indices names, which rotates half of each head."""
    c = Reader(config, _BAMBA)
    s, norm = blocks.sizes(c), blocks.rms_norm(c)
    given = {"partial_rotary_factor": 0.5} | c.mapping("rope_scaling") | c.mapping("rope_parameters")
    attention = _attention(c, s, blocks.rotation(c, s.head_dim, given, c.number("rope_theta", 10000.0)))
    mlp = blocks.gated_mlp(c, blocks.activation(c), bias=c.flag("mlp_bias"))
    named = _indices(c, "attn_layer_indices", s.layers) or ()
    space = _mamba2(c, norm)
    layers = [LayerSpec(attention if i in named else space, mlp, norm) for i in range(s.layers)]
    return blocks.decoder(c, layers, norm)


def falcon_h1(config: Mapping[str, Any]) -> ModelSpec:
    """Mamba-2 and attention side by side in every layer, with multipliers of nearly every product."""
    c = Reader(config, _FALCON)
    if c.value("attn_layer_indices") is not None or c.value("mamba_use_mlp") not in (None, True):
        raise ValueError("config.json: expected attn_layer_indices null and mamba_use_mlp true for model_type "
                         "falcon_h1: every layer has attention and an MLP")
    s, norm = blocks.sizes(c), blocks.rms_norm(c)
    for key in ("layer_types", "layers_block_type"):
        c.per_layer(key, s.layers, ("hybrid",))
    space = replace(_mamba2(c, norm if c.flag("mamba_rms_norm") else None, "mamba_d_ssm"),
                    norm_before_gate=c.flag("mamba_norm_before_gate"), out_bias=c.flag("projectors_bias"))
    mlp = blocks.gated_mlp(c, blocks.activation(c), bias=c.flag("mlp_bias"))
    attention = _attention(c, s, blocks.rope(c, s.head_dim))
    layer = LayerSpec(space, mlp, norm, beside=attention, multipliers=_multipliers(c))
    return blocks.decoder(c, [layer] * s.layers, norm, embedding_scale=c.number("embedding_multiplier", 1.0),
                          logits_scale=c.number("lm_head_multiplier", 1.0))


def _multipliers(c: Reader) -> Multipliers | None:
    """None where all are 1."""
    gate, down = _numbers(c, "mlp_multipliers", 2)
    singles = {name: c.number(f"{name}_multiplier", 1.0) for name in (
        "attention_in", "attention_out", "key", "ssm_in", "ssm_out")}
    found = Multipliers(**singles, ssm=_numbers(c, "ssm_multipliers", 5), gate=gate, down=down)
    return None if found == Multipliers() else found


def _numbers(c: Reader, key: str, count: int) -> tuple[float, ...]:
    given = c.value(key)
    if given is None:
        return (1.0,) * count
    if not isinstance(given, list) or len(given) != count:
        raise ValueError(f"config.json: {key} is {short(given)}, expected {count} numbers")
    return tuple(checked_number(key, one) for one in given)


def granitemoehybrid(config: Mapping[str, Any]) -> ModelSpec:
    """Mamba-2 and attention by layer_types, with Granite's multipliers; without experts."""
    c = Reader(config, _GRANITE)
    if c.value("num_local_experts"):
        raise ValueError(f"config.json: num_local_experts is {short(c.value('num_local_experts'))}, expected 0: "
                         "experts are not computed")
    position = c.value("position_embedding_type")
    if position not in (None, "nope", "rope"):
        raise ValueError(f"config.json: position_embedding_type is {short(position)}, expected null, nope or rope")
    s, norm = blocks.sizes(c), blocks.rms_norm(c)
    attention = replace(_attention(c, s, blocks.rope(c, s.head_dim) if position == "rope" else None),
                        scale=c.number("attention_multiplier"))
    mlp = GatedMLP(c.integer("shared_intermediate_size", MAX_WIDTH), blocks.activation(c), fused=True)
    space, scale = _mamba2(c, norm), c.number("residual_multiplier", 1.0)
    layers = [LayerSpec(attention if t == "full_attention" else space, mlp, norm, residual_scale=scale)
              for t in _types(c, s.layers)]
    return blocks.decoder(c, layers, norm, embedding_scale=c.number("embedding_multiplier", 1.0),
                          logits_scale=1.0 / c.number("logits_scaling", 1.0))


def lfm2(config: Mapping[str, Any]) -> ModelSpec:
    """Short convolutions, and attention with norms of queries' and keys' heads, by layer_types or full_attn_idxs."""
    tied = {} if config.get("tie_embedding") is None else {"tie_word_embeddings": config["tie_embedding"]}
    c = Reader({**config, **tied, "rms_norm_eps": config.get("norm_eps", _LFM2["norm_eps"])}, _LFM2)
    s, norm = blocks.sizes(c), blocks.rms_norm(c)
    attention = replace(_attention(c, s, blocks.rope(c, s.head_dim)), qk_norm=norm)
    conv = ShortConv(s.hidden, c.integer("conv_L_cache", MAX_WIDTH), c.flag("conv_bias"))
    named = _indices(c, "full_attn_idxs", s.layers)
    types = c.per_layer("layer_types", s.layers, ("conv", "full_attention")) or [
        "full_attention" if named is None or i in named else "conv" for i in range(s.layers)]
    mlp = GatedMLP(_adjusted(c), blocks.activation(c))
    layers = [LayerSpec(attention if t == "full_attention" else conv, mlp, norm) for t in types]
    return blocks.decoder(c, layers, norm)


def nemotron_h(config: Mapping[str, Any]) -> ModelSpec:
    """Layers of one part each: Mamba-2, attention that does not rotate, or an MLP; without experts."""
    old = {new: config[key] for key, new in _NEMOTRON_OLD.items() if key in config}
    c = Reader({**{key: v for key, v in config.items() if key not in _NEMOTRON_OLD}, **old}, _NEMOTRON)
    types = _nemotron_types(c)
    c = Reader({**c.given, "num_hidden_layers": len(types), "rms_norm_eps": c.value("layer_norm_epsilon")}, _NEMOTRON)
    s, norm = blocks.sizes(c), blocks.rms_norm(c)
    if c.value("mlp_hidden_act") != "relu2" or c.value("mamba_hidden_act") != "silu" or c.value("sliding_window"):
        raise ValueError("config.json: expected mlp_hidden_act relu2, mamba_hidden_act silu and no sliding_window for "
                         "model_type nemotron_h")
    heads, head_dim = c.integer("mamba_num_heads", MAX_WIDTH), c.integer("mamba_head_dim", MAX_WIDTH)
    space = state_space(c, heads, head_dim, groups="n_groups", state="ssm_state_size", conv="conv_kernel",
                        bias="use_bias", conv_bias="use_conv_bias", norm=norm,
                        limits=(c.number("time_step_min", zero=True), None))
    attention = Attention(s.heads, s.kv_heads, s.head_dim, s.head_dim ** -0.5)  # whatever attention_bias says
    parts = {"linear_attention": (space, None), "full_attention": (attention, None),
             "mlp": (None, MLP(c.integer("intermediate_size", MAX_WIDTH), "relu2", c.flag("mlp_bias")))}
    return blocks.decoder(c, [LayerSpec(*parts[t], norm, "alone") for t in types], norm)


def _nemotron_types(c: Reader) -> list[str]:
    """Each layer's part, by layers_block_type or the older string of letters."""
    given = c.value("layers_block_type")
    if given is None and isinstance(c.value("hybrid_override_pattern"), str):
        given = list(c.value("hybrid_override_pattern"))
    types = [_NEMOTRON_TYPES.get(t, t) if isinstance(t, str) else t for t in given] if isinstance(given, list) else []
    wrong = [t for t in types if t not in ("linear_attention", "full_attention", "mlp")]
    if wrong or not types:
        raise ValueError(f"config.json: layers_block_type is {short(given)}, expected linear_attention, full_attention "
                         "or mlp for each layer; experts are not computed")
    return types


def _attention(c: Reader, s: blocks.Sizes, rope: Rope | None) -> Attention:
    bias = c.flag("attention_bias") if "attention_bias" in c.defaults else False
    return Attention(s.heads, s.kv_heads, s.head_dim, s.head_dim ** -0.5, rope=rope, qkv_bias=bias, o_bias=bias)


def _mamba2(c: Reader, norm: Norm | None, inner_key: str | None = None) -> Mamba2:
    """inner_key: of the channels of all heads, where the file may say them."""
    heads, head_dim = c.integer("mamba_n_heads", MAX_WIDTH), c.value("mamba_d_head")
    if inner_key is not None and c.value(inner_key) is not None:
        inner, why = c.integer(inner_key, MAX_WIDTH), inner_key
    else:
        inner, why = expanded(c, "mamba_expand"), "mamba_expand times hidden_size"
    head_dim = inner // heads if head_dim in ("auto", None) else c.integer("mamba_d_head", MAX_WIDTH)
    if heads * head_dim != inner:
        raise ValueError(f"config.json: mamba_n_heads is {heads} and mamba_d_head {head_dim}, expected a product of "
                         f"{inner}, {why}")
    return state_space(c, heads, head_dim, groups="mamba_n_groups", state="mamba_d_state", conv="mamba_d_conv",
                       bias="mamba_proj_bias", conv_bias="mamba_conv_bias", limits=time_step_limit(c), norm=norm)


def _types(c: Reader, layers: int) -> Sequence[str]:
    key = "layer_types" if c.value("layer_types") is not None else "layers_block_type"
    found = c.per_layer(key, layers, (*_NAMES_OF, *_NAMES_OF.values()))
    return ["linear_attention"] * layers if found is None else [_NAMES_OF.get(t, t) for t in found]


def _indices(c: Reader, key: str, layers: int) -> Sequence[int] | None:
    given = c.value(key)
    if given is None:
        return None
    if not isinstance(given, list) or any(type(i) is not int or not 0 <= i < layers for i in given):
        raise ValueError(f"config.json: {key} is {short(given)}, expected numbers of layers, 0 to {layers - 1}")
    return given


def _adjusted(c: Reader) -> int:
    """The width of the gated MLP: two thirds of what is said, multiplied and rounded up, unless it is said as it is."""
    width = c.integer("intermediate_size" if c.value("block_ff_dim") is None else "block_ff_dim", MAX_WIDTH)
    if c.flag("block_auto_adjust_ff_dim"):
        unit = c.integer("block_multiple_of", MAX_WIDTH)
        width = math.ceil(int(c.number("block_ffn_dim_multiplier", 1.0) * int(2 * width / 3)) / unit) * unit
    return width
