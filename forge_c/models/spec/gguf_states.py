"""What architectures whose layers have recurrent states say in a GGUF's metadata, as keys of a config.json.

A layer without key-value heads is recurrent. What a token's step is clipped to, and the eps of Falcon Mamba's inner
norms, no file says: they are those of the families.
"""
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from forge_c.checks import short
from forge_c.models.spec.mamba import ANY_LENGTH
from forge_c.models.spec.reader import MAX_HEADS, MAX_WIDTH

if TYPE_CHECKING:
    from forge_c.models.spec.gguf import Keys

Config = dict[str, Any]

# Of rotations and experts, which the converter writes of models that have none, too.
_UNUSED = ("rope.dimension_count", "rope.freq_base", "rope.scaling.finetuned", "expert_group_count",
           "expert_group_used_count")


def mamba(keys: Keys, config: Config) -> Config:
    """Mamba, or Falcon Mamba where dt, B and C have norms."""
    _check_no_attention(keys)
    normed = keys.value("ssm.dt_b_c_rms", False)
    if not isinstance(normed, bool):
        keys.fail(f"{keys.name('ssm.dt_b_c_rms')} is {short(normed)}, expected true or false")
    return {"model_type": "falcon_mamba" if normed else "mamba", "max_position_embeddings": ANY_LENGTH,
            "layer_norm_epsilon": _eps(keys), "expand": _expand(keys, config, _inner(keys)),
            "state_size": keys.integer("ssm.state_size", MAX_WIDTH),
            "conv_kernel": keys.integer("ssm.conv_kernel", MAX_WIDTH),
            "time_step_rank": keys.integer("ssm.time_step_rank", MAX_WIDTH)}


def mamba2(keys: Keys, config: Config) -> Config:
    """time_step_rank is the number of heads."""
    _check_no_attention(keys)
    heads, head_dim = _heads(keys)
    return {"max_position_embeddings": ANY_LENGTH, "layer_norm_epsilon": _eps(keys), "num_heads": heads,
            "head_dim": head_dim, "expand": _expand(keys, config, heads * head_dim),
            "n_groups": keys.integer("ssm.group_count", MAX_WIDTH, 1),
            "state_size": keys.integer("ssm.state_size", MAX_WIDTH),
            "conv_kernel": keys.integer("ssm.conv_kernel", MAX_WIDTH)}


def lfm2(keys: Keys, config: Config) -> Config:
    """feed_forward_length is the width as it is."""
    attends = _attending(keys, config["num_hidden_layers"])
    return {"layer_types": ["full_attention" if one else "conv" for one in attends],
            "conv_L_cache": keys.integer("shortconv.l_cache", MAX_WIDTH), "norm_eps": config["rms_norm_eps"],
            "block_auto_adjust_ff_dim": False}


def granitehybrid(keys: Keys, config: Config) -> Config:
    """Granite 4 without experts, and Bamba, which rotates and has no multipliers."""
    attends = _attending(keys, config["num_hidden_layers"])
    rotates = keys.value("rope.scaling.finetuned", True)
    if not isinstance(rotates, bool):
        keys.fail(f"{keys.name('rope.scaling.finetuned')} is {short(rotates)}, expected true or false")
    keys.value("expert_shared_feed_forward_length")  # of layers with experts
    heads, head_dim = _heads(keys)

    def multiplier(key: str, absent: float = 1.0) -> float:
        return keys.number(key, 0.0, zero=True) or absent

    return {"layer_types": ["attention" if one else "mamba" for one in attends], "num_local_experts": 0,
            "position_embedding_type": "rope" if rotates else "nope", "mamba_n_heads": heads, "mamba_d_head": head_dim,
            "mamba_expand": _expand(keys, config, heads * head_dim),
            "mamba_n_groups": keys.integer("ssm.group_count", MAX_WIDTH, 1),
            "mamba_d_state": keys.integer("ssm.state_size", MAX_WIDTH),
            "mamba_d_conv": keys.integer("ssm.conv_kernel", MAX_WIDTH),
            "shared_intermediate_size": config["intermediate_size"],
            "attention_multiplier": multiplier("attention.scale", config["head_dim"] ** -0.5),
            "embedding_multiplier": multiplier("embedding_scale"),
            "residual_multiplier": multiplier("residual_scale"), "logits_scaling": multiplier("logit_scale")}


def nemotron_h(keys: Keys, config: Config) -> Config:
    """Layers of one part each: with key-value heads attention, with a width an MLP, with neither Mamba-2."""
    for key in _UNUSED:
        keys.value(key)
    layers = config["num_hidden_layers"]
    attends = _attending(keys, layers)
    widths = keys.of_each("feed_forward_length", MAX_WIDTH, layers, least=0)
    both = [i for i in range(layers) if attends[i] and widths[i]]
    if both:
        keys.fail(f"{keys.name('feed_forward_length')} of layer {both[0]} is {widths[both[0]]}, expected 0 where "
                  f"{keys.name('attention.head_count_kv')} is not")
    types = ["full_attention" if attends[i] else "mlp" if widths[i] else "linear_attention" for i in range(layers)]
    heads, head_dim = _heads(keys)
    return {"layers_block_type": types, "layer_norm_epsilon": config["rms_norm_eps"], "mamba_num_heads": heads,
            "mamba_head_dim": head_dim, "n_groups": keys.integer("ssm.group_count", MAX_WIDTH, 1),
            "ssm_state_size": keys.integer("ssm.state_size", MAX_WIDTH),
            "conv_kernel": keys.integer("ssm.conv_kernel", MAX_WIDTH)}


def _check_no_attention(keys: Keys) -> None:
    for key, most in (("attention.head_count", MAX_HEADS), ("feed_forward_length", MAX_WIDTH)):
        keys.integer(key, most, 0, least=0)  # asked for by llama.cpp, and not used


def _eps(keys: Keys) -> float:
    return keys.number("attention.layer_norm_rms_epsilon")


def _attending(keys: Keys, layers: int) -> list[bool]:
    """Which layers have key-value heads."""
    return [n > 0 for n in keys.of_each("attention.head_count_kv", MAX_HEADS, layers, 1, least=0)]


def _inner(keys: Keys) -> int:
    return keys.integer("ssm.inner_size", MAX_WIDTH)


def _heads(keys: Keys) -> tuple[int, int]:
    """Of Mamba-2: (number, channels)."""
    inner, heads = _inner(keys), keys.integer("ssm.time_step_rank", MAX_WIDTH)
    if inner % heads:
        keys.fail(f"{keys.name('ssm.inner_size')} is {inner}, expected a multiple of {keys.name('ssm.time_step_rank')} "
                  f"{heads}")
    return heads, inner // heads


def _expand(keys: Keys, config: Config, inner: int) -> float:
    """The least number whose product with hidden_size is `inner` when it is rounded down."""
    hidden: int = config["hidden_size"]
    return inner // hidden if inner % hidden == 0 else math.nextafter(inner / hidden, math.inf)
