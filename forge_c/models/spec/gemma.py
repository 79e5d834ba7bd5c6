"""Gemma and Gemma 2: norms that multiply by 1 + w, a scaled embedding, the tanh form of gelu."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forge_c.models.spec import blocks
from forge_c.models.spec.kinds import Attention, LayerSpec, ModelSpec
from forge_c.models.spec.reader import COMMON, Reader

_GEMMA = COMMON | {"head_dim": 256, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh",
                   "hidden_activation": None, "attention_bias": False, "max_position_embeddings": 8192}
_GEMMA2 = _GEMMA | {"query_pre_attn_scalar": 256, "sliding_window": 4096, "layer_types": None,
                    "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
# The first files say "gelu" and mean its tanh form, which the models were trained with.
_GELU = {"gelu": "gelu_pytorch_tanh"}


def gemma(config: Mapping[str, Any]) -> ModelSpec:
    """Pre-norm layers."""
    c = Reader(config, _GEMMA)
    s = blocks.sizes(c)
    norm = blocks.rms_norm(c, offset=1.0)
    attention, mlp = _attention(c, s, scale=s.head_dim ** -0.5), blocks.gated_mlp(c, blocks.activation(c, _GELU))
    layer = LayerSpec(attention, mlp, norm)
    return blocks.decoder(c, [layer] * s.layers, norm, embedding_scale=_embedding_scale(s))


def gemma2(config: Mapping[str, Any]) -> ModelSpec:
    """Norms before and after each part, softcaps, a window in every second layer."""
    c = Reader(config, _GEMMA2)
    s = blocks.sizes(c)
    norm, mlp = blocks.rms_norm(c, offset=1.0), blocks.gated_mlp(c, blocks.activation(c, _GELU))
    scale = c.number("query_pre_attn_scalar", s.head_dim) ** -0.5
    softcap = c.optional_number("attn_logit_softcapping")
    layers = [LayerSpec(_attention(c, s, scale=scale, softcap=softcap, window=w), mlp, norm, "both")
              for w in blocks.windows(c, s.layers, [i % 2 == 0 for i in range(s.layers)])]
    return blocks.decoder(c, layers, norm, embedding_scale=_embedding_scale(s),
                          softcap=c.optional_number("final_logit_softcapping"))


def _attention(c: Reader, s: blocks.Sizes, **choices: Any) -> Attention:
    bias = c.flag("attention_bias")
    return Attention(s.heads, s.kv_heads, s.head_dim, rope=blocks.rope(c, s.head_dim), qkv_bias=bias, o_bias=bias,
                     **choices)


def _embedding_scale(s: blocks.Sizes) -> float:
    """Hugging Face rounds sqrt(hidden) to the checkpoint's dtype; in float32 that is this."""
    return s.hidden ** 0.5
