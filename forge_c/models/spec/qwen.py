"""Qwen2 and Qwen3."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forge_c.models.spec import blocks
from forge_c.models.spec.kinds import Attention, LayerSpec, ModelSpec
from forge_c.models.spec.reader import COMMON, WINDOWED, Reader

_QWEN2 = COMMON | WINDOWED | {"max_position_embeddings": 32768}
_QWEN3 = _QWEN2 | {"attention_bias": False, "head_dim": 128}


def qwen2(config: Mapping[str, Any]) -> ModelSpec:
    """LLaMA with biases on queries, keys and values, and windows from some layer on."""
    c = Reader(config, _QWEN2)
    return _decoder(c, qkv_bias=True)


def qwen3(config: Mapping[str, Any]) -> ModelSpec:
    """Qwen2 with norms of queries' and keys' heads in the place of the biases."""
    c = Reader(config, _QWEN3)
    bias = c.flag("attention_bias")
    return _decoder(c, qk_norm=blocks.rms_norm(c), qkv_bias=bias, o_bias=bias)


def _decoder(c: Reader, **choices: Any) -> ModelSpec:
    s, norm = blocks.sizes(c), blocks.rms_norm(c)
    rope, mlp = blocks.rope(c, s.head_dim), blocks.gated_mlp(c, blocks.activation(c))
    layers = [LayerSpec(Attention(s.heads, s.kv_heads, s.head_dim, s.head_dim ** -0.5, window=w, rope=rope, **choices),
                        mlp, norm) for w in blocks.windows(c, s.layers)]
    return blocks.decoder(c, layers, norm)
