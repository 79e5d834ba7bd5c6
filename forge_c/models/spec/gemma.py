"""Gemma, Gemma 2 and Gemma 3: norms that multiply by 1 + w, a scaled embedding, the tanh form of gelu."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forge_c.models.spec import blocks
from forge_c.models.spec.kinds import Attention, LayerSpec, ModelSpec
from forge_c.models.spec.reader import COMMON, MAX_LAYERS, Reader

_GEMMA = COMMON | {"head_dim": 256, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh",
                   "hidden_activation": None, "attention_bias": False, "max_position_embeddings": 8192}
_GEMMA2 = _GEMMA | {"query_pre_attn_scalar": 256, "sliding_window": 4096, "layer_types": None,
                    "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
# Published files of the larger models hold little more than what differs from the 2B model's sizes.
_GEMMA3 = _GEMMA | {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
                    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072,
                    "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 6,
                    "_sliding_window_pattern": None, "layer_types": None, "rope_theta": 1e6,
                    "rope_local_base_freq": 1e4, "final_logit_softcapping": None, "attn_logit_softcapping": None}
# What a file with an image encoder says of it: nothing of that is read, nor needed for texts.
_GEMMA3_IMAGES = {"text_config": None, "vision_config": None, "mm_tokens_per_image": None, "boi_token_index": None,
                  "eoi_token_index": None, "image_token_index": None}
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


def gemma3(config: Mapping[str, Any]) -> ModelSpec:
    """Gemma 2 with norms of queries' and keys' heads in the place of attention's softcap (attn_logit_softcapping is not
    read, as in transformers), five windowed layers before each full one, and a rotation of their own for those."""
    c = Reader(config, _GEMMA3)
    s = blocks.sizes(c)
    norm, mlp = blocks.rms_norm(c, offset=1.0), blocks.gated_mlp(c, blocks.activation(c, _GELU))
    pattern = c.integer("sliding_window_pattern", MAX_LAYERS)
    types = c.per_layer("layer_types", s.layers, blocks.LAYER_TYPES) or [
        "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(s.layers)]
    windows = blocks.windows(c, s.layers, [t == "sliding_attention" for t in types])
    ropes = blocks.rope_by_type(c, s.head_dim)
    scale = c.number("query_pre_attn_scalar", s.head_dim) ** -0.5
    layers = [LayerSpec(_attention(c, s, scale=scale, window=w, qk_norm=norm, rope=ropes[t]), mlp, norm, "both")
              for w, t in zip(windows, types, strict=True)]
    return blocks.decoder(c, layers, norm, embedding_scale=_embedding_scale(s),
                          softcap=c.optional_number("final_logit_softcapping"))


def gemma3_with_images(config: Mapping[str, Any]) -> ModelSpec:
    """The text model of a Gemma 3 that also reads images; what the file says outside text_config serves where that is
    silent."""
    outer = Reader(config, COMMON | _GEMMA3_IMAGES)
    shared = {key: config[key] for key in ("eos_token_id", "bos_token_id", "tie_word_embeddings") if key in config}
    return gemma3(shared | {"model_type": "gemma3_text"} | outer.mapping("text_config"))


def _attention(c: Reader, s: blocks.Sizes, **choices: Any) -> Attention:
    bias = c.flag("attention_bias")
    if "rope" not in choices:
        choices["rope"] = blocks.rope(c, s.head_dim)
    return Attention(s.heads, s.kv_heads, s.head_dim, qkv_bias=bias, o_bias=bias, **choices)


def _embedding_scale(s: blocks.Sizes) -> float:
    """Hugging Face rounds sqrt(hidden) to the checkpoint's dtype; in float32 that is this."""
    return s.hidden ** 0.5
