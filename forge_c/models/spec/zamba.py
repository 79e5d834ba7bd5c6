"""Zamba-2: layers of Mamba-2, some with attention and an MLP ahead, whose weights they share by turns."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forge_c.checks import short
from forge_c.models.spec import blocks
from forge_c.models.spec.kinds import Ahead, GatedMLP, JoinedAttention, LayerSpec, ModelSpec, Norm
from forge_c.models.spec.mamba import UNREAD, expanded, state_space
from forge_c.models.spec.reader import COMMON, MAX_HEADS, MAX_LAYERS, MAX_WIDTH, Reader

_TYPES = {"mamba": "linear_attention", "linear_attention": "linear_attention", "hybrid": "hybrid"}
_DERIVED = ("attention_hidden_size", "attention_head_dim", "mamba_headdim", "kv_channels", "num_query_groups",
            "hybrid_layer_ids")  # that follow from the others, and are said again
_ZAMBA2 = COMMON | UNREAD | {
    "hidden_act": "gelu", "tie_word_embeddings": True, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "layers_block_type": None, "layer_types": None, "mamba_d_state": 64, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_ngroups": 1, "time_step_min": 0.001, "n_mamba_heads": 8, "use_mamba_kernels": None, "use_conv_bias": True,
    "use_mem_eff_path": None, "add_bias_linear": False, "num_mem_blocks": 1, "use_shared_attention_adapter": False,
    "adapter_rank": 128, "use_mem_rope": False, "use_long_context": False, "num_logits_to_keep": 1} | dict.fromkeys(
        _DERIVED)


def zamba2(config: Mapping[str, Any]) -> ModelSpec:
    """Hybrid layers add mlp(attention(x | embeddings)) to the input of their state space."""
    c = Reader(config, _ZAMBA2)
    if c.flag("add_bias_linear") or c.flag("use_long_context") or not c.flag("use_conv_bias"):
        raise ValueError("config.json: expected add_bias_linear and use_long_context false and use_conv_bias true for "
                         "model_type zamba2")
    hidden, norm, types = c.integer("hidden_size", MAX_WIDTH), blocks.rms_norm(c), _types(c)
    heads, inner = c.integer("n_mamba_heads", MAX_WIDTH), expanded(c, "mamba_expand")
    if inner % heads:
        raise ValueError(f"config.json: n_mamba_heads is {heads}, expected a divisor of {inner}, mamba_expand times "
                         "hidden_size")
    _check_said(c, "mamba_headdim", inner // heads)
    other = Reader({**config, "hidden_act": "silu"}, _ZAMBA2)  # the file's is the MLP's
    space = state_space(other, heads, inner // heads, groups="mamba_ngroups", state="mamba_d_state",
                        conv="mamba_d_conv", bias="add_bias_linear", conv_bias="use_conv_bias",
                        limits=(c.number("time_step_min", zero=True), None), norm=Norm("rms", 1e-5))
    hybrid = [i for i, one in enumerate(types) if one == "hybrid"]
    ahead = dict(zip(hybrid, _ahead(c, hidden, hybrid), strict=True))
    return blocks.decoder(c, [LayerSpec(space, None, norm, ahead=ahead.get(i)) for i in range(len(types))], norm)


def _types(c: Reader) -> Sequence[str]:
    layers = c.integer("num_hidden_layers", MAX_LAYERS)
    key = "layer_types" if c.value("layer_types") is not None else "layers_block_type"
    found = c.per_layer(key, layers, tuple(_TYPES))
    if found is None:
        raise ValueError(f"config.json: layers_block_type is null, expected {layers} times linear_attention or hybrid")
    return [_TYPES[one] for one in found]


def _ahead(c: Reader, hidden: int, hybrid: Sequence[int]) -> list[Ahead]:
    """Of each hybrid layer; the first of them have the weights that the others share, by turns."""
    heads, turns = c.integer("num_attention_heads", MAX_HEADS), c.integer("num_mem_blocks", MAX_LAYERS)
    kv_heads, head_dim = c.integer("num_key_value_heads", MAX_HEADS, heads), 2 * hidden // heads
    if 2 * hidden % heads or heads % kv_heads:
        raise ValueError(f"config.json: num_attention_heads is {heads}, expected a divisor of {2 * hidden}, and a "
                         f"multiple of num_key_value_heads {kv_heads}")
    for key, expected in (("attention_hidden_size", 2 * hidden), ("attention_head_dim", head_dim),
                          ("hybrid_layer_ids", list(hybrid))):
        _check_said(c, key, expected)
    attention = JoinedAttention(heads, kv_heads, head_dim, (head_dim / 2) ** -0.5,
                                rope=blocks.rope(c, head_dim) if c.flag("use_mem_rope") else None)
    mlp = GatedMLP(c.integer("intermediate_size", MAX_WIDTH, 4 * hidden), blocks.activation(c), fused=True)
    rank, adapted = c.integer("adapter_rank", MAX_WIDTH), c.flag("use_shared_attention_adapter")
    return [Ahead(attention, mlp, hybrid[use % turns], use, rank, adapted) for use in range(len(hybrid))]


def _check_said(c: Reader, key: str, expected: Any) -> None:
    """What a file says again is what follows from the rest of it."""
    if c.value(key) not in (None, expected):
        raise ValueError(f"config.json: {key} is {short(c.value(key))}, expected {short(expected)}")
