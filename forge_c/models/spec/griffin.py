"""RecurrentGemma, which is Griffin: linear recurrences with gates, and attention in windows."""
from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle, islice
from typing import Any

import ml_dtypes

from forge_c.checks import short
from forge_c.models.spec import blocks
from forge_c.models.spec.kinds import RGLRU, Attention, GatedMLP, LayerSpec, ModelSpec
from forge_c.models.spec.mamba import ANY_LENGTH
from forge_c.models.spec.reader import MAX_WIDTH, Reader

_RECURRENT_GEMMA = {
    "vocab_size": 256000, "hidden_size": 2560, "intermediate_size": 7680, "num_hidden_layers": 26,
    "num_attention_heads": 10, "lru_width": None, "attention_window_size": 2048, "conv1d_width": 4,
    "logits_soft_cap": 30.0, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False,
    "block_types": ["recurrent", "recurrent", "attention"], "tie_word_embeddings": True, "partial_rotary_factor": 0.5,
    "max_position_embeddings": ANY_LENGTH, "embeddings_scale_by_sqrt_dim": True,
    "w_init_variance_scale": None, "final_w_init_variance_scale": None}  # how the weights were drawn


def recurrent_gemma(config: Mapping[str, Any]) -> ModelSpec:
    """Gemma's layers, two of three with a recurrence in attention's place; every matrix but q, k and v has biases."""
    c = Reader(config, _RECURRENT_GEMMA)
    s, norm, function = blocks.sizes(c), blocks.rms_norm(c, offset=1.0), blocks.activation(c)
    if s.head_dim * s.heads != s.hidden:
        raise ValueError(f"config.json: head_dim is {s.head_dim}, expected {s.hidden} / {s.heads}, hidden_size by "
                         "num_attention_heads, for model_type recurrent_gemma")
    if not c.flag("embeddings_scale_by_sqrt_dim"):
        raise ValueError("config.json: embeddings_scale_by_sqrt_dim is False, expected true for model_type "
                         "recurrent_gemma")
    parts = {"recurrent": _recurrence(c, s, function), "attention": _attention(c, s)}
    mlp = GatedMLP(c.integer("intermediate_size", MAX_WIDTH) // 2, function, bias=True)
    layers = [LayerSpec(parts[t], mlp, norm) for t in islice(cycle(_block_types(c)), s.layers)]
    # In bfloat16 whatever the model's dtype, as transformers multiplies.
    return blocks.decoder(c, layers, norm, embedding_scale=float(ml_dtypes.bfloat16(s.hidden ** 0.5)),
                          softcap=c.number("logits_soft_cap"))


def _recurrence(c: Reader, s: blocks.Sizes, function: str) -> RGLRU:
    width = c.integer("lru_width", MAX_WIDTH, s.hidden)
    if width % s.heads:
        raise ValueError(f"config.json: lru_width is {width}, expected a multiple of num_attention_heads {s.heads}")
    return RGLRU(width, s.heads, c.integer("conv1d_width", MAX_WIDTH), function)


def _attention(c: Reader, s: blocks.Sizes) -> Attention:
    given = {"partial_rotary_factor": c.value("partial_rotary_factor")} | c.mapping("rope_parameters")
    rope = blocks.rotation(c, s.head_dim, given, c.number("rope_theta", 10000.0))
    kind = rope.scaling["rope_type"]
    if kind != "default" or c.value("rope_scaling") is not None:
        raise ValueError(f"config.json: rope_type is {short(kind)} and rope_scaling {short(c.value('rope_scaling'))}, "
                         "expected default and null for model_type recurrent_gemma")
    return Attention(s.heads, s.kv_heads, s.head_dim, s.head_dim ** -0.5, rope=rope, o_bias=True,
                     window=c.integer("attention_window_size", 1 << 40), qkv_bias=c.flag("attention_bias"))


def _block_types(c: Reader) -> list[str]:
    """What layers are in turn."""
    given = c.value("block_types")
    if not isinstance(given, list | tuple) or not given or any(t not in ("recurrent", "attention") for t in given):
        raise ValueError(f"config.json: block_types is {short(given)}, expected a list of recurrent and attention")
    return list(given)
