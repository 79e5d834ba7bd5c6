"""LLaMA and what differs from it in a few numbers: Mistral, SmolLM3, Granite."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forge_c.models.spec import blocks
from forge_c.models.spec.kinds import Attention, LayerSpec, ModelSpec
from forge_c.models.spec.reader import BIASES, COMMON, MAX_LAYERS, Reader

_LLAMA = COMMON | BIASES
_MISTRAL = COMMON | {"max_position_embeddings": 131072, "sliding_window": 4096, "layer_types": None}
_SMOLLM3 = COMMON | BIASES | {
    "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28, "layer_types": None,
    "max_position_embeddings": 32768, "tie_word_embeddings": True, "no_rope_layers": None, "no_rope_layer_interval": 4,
    "rope_theta": 2e6}
_GRANITE = COMMON | BIASES | {"embedding_multiplier": 1.0, "attention_multiplier": 1.0,
                              "residual_multiplier": 1.0, "logits_scaling": 1.0}


def llama(config: Mapping[str, Any]) -> ModelSpec:
    """Pre-norm layers of grouped-query attention and SwiGLU."""
    return llama_as(config, {})[0]


def llama_as(config: Mapping[str, Any], more: Mapping[str, Any]) -> tuple[ModelSpec, Reader]:
    """(the spec, the config) of a family that is LLaMA and has keys `more` besides, with their defaults."""
    c = Reader(config, _LLAMA | dict(more))
    layer = _layer(c)
    return blocks.decoder(c, [layer] * blocks.sizes(c).layers, layer.norm), c


def mistral(config: Mapping[str, Any]) -> ModelSpec:
    """LLaMA with a sliding window."""
    c = Reader(config, _MISTRAL)
    windows = blocks.windows(c, blocks.sizes(c).layers)
    return blocks.decoder(c, [_layer(c, window=w) for w in windows], blocks.rms_norm(c))


def smollm3(config: Mapping[str, Any]) -> ModelSpec:
    """LLaMA with layers that do not rotate; those are the ones with a window, if there is one."""
    c = Reader(config, _SMOLLM3)
    s = blocks.sizes(c)
    given = c.per_layer("no_rope_layers", s.layers, (0, 1))  # 1 is a layer *with* RoPE, despite the key's name
    interval = c.integer("no_rope_layer_interval", MAX_LAYERS)
    rotated = [bool(v) for v in given] if given else [(i + 1) % interval != 0 for i in range(s.layers)]
    windows, rope = blocks.windows(c, s.layers, [not r for r in rotated]), blocks.rope(c, s.head_dim)
    layers = [_layer(c, window=w, rope=rope if r else None) for w, r in zip(windows, rotated, strict=True)]
    return blocks.decoder(c, layers, blocks.rms_norm(c))


def granite(config: Mapping[str, Any]) -> ModelSpec:
    """LLaMA with multipliers."""
    c = Reader(config, _GRANITE)
    layer = _layer(c, scale=c.number("attention_multiplier"), residual_scale=c.number("residual_multiplier", 1.0))
    return blocks.decoder(c, [layer] * blocks.sizes(c).layers, layer.norm,
                          embedding_scale=c.number("embedding_multiplier", 1.0),
                          logits_scale=1.0 / c.number("logits_scaling", 1.0))


def _layer(c: Reader, *, residual_scale: float = 1.0, **attention: Any) -> LayerSpec:
    s = blocks.sizes(c)
    bias = c.flag("attention_bias")
    shared: dict[str, Any] = {"scale": s.head_dim ** -0.5, "rope": blocks.rope(c, s.head_dim), "qkv_bias": bias,
                              "o_bias": bias}
    mixer = Attention(s.heads, s.kv_heads, s.head_dim, **(shared | attention))
    mlp = blocks.gated_mlp(c, blocks.activation(c), bias=c.flag("mlp_bias"))
    return LayerSpec(mixer, mlp, blocks.rms_norm(c), residual_scale=residual_scale)
