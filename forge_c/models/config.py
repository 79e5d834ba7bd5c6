"""Hugging Face config.json -> one typed spec. Every family's quirks end here: the decoder knows only the spec.

A key that this file does not know is an error, because it could change the maths; so is a known key with a value
that the decoder cannot compute.
"""
from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_LAYERS, MAX_HEADS, MAX_VOCAB, MAX_WIDTH = 1024, 1024, 1 << 22, 1 << 20


@dataclass(frozen=True)
class ModelSpec:
    """A decoder of RMSNorm, RoPE, grouped-query attention and a gated MLP."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    norm_weight_offset: float  # 1 where the checkpoint holds w and the norm multiplies by 1 + w
    post_norms: bool  # normalise also what attention and MLP return
    qk_norm: bool  # normalise each head of q and k before RoPE
    activation: str  # as in forge_c.gated_linear
    tied: bool  # the embedding is also the output matrix
    fused: bool  # the checkpoint holds q, k, v as qkv_proj and gate, up as gate_up_proj
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    rope_dim: int
    rope_theta: float
    rope_scaling: Mapping[str, Any]
    rope_layers: tuple[bool, ...]
    windows: tuple[int | None, ...]
    attention_scale: float
    attention_softcap: float | None
    embedding_scale: float
    residual_scale: float
    logits_scale: float
    final_softcap: float | None
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


# What a key means if config.json does not have it: the defaults of the Hugging Face configuration classes.
_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 2048}
_WINDOWED = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
_BIASES = {"attention_bias": False, "mlp_bias": False}
_GEMMA = {"head_dim": 256, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": None,
          "attention_bias": False, "max_position_embeddings": 8192}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON | _BIASES | {"head_dim": None},
    "mistral": _COMMON | {"max_position_embeddings": 131072, "sliding_window": 4096, "head_dim": None,
                          "layer_types": None},
    "qwen2": _COMMON | _WINDOWED | {"max_position_embeddings": 32768},
    "qwen3": _COMMON | _WINDOWED | {"max_position_embeddings": 32768,
                                    "attention_bias": False, "head_dim": 128},
    "gemma": _COMMON | _GEMMA,
    "gemma2": _COMMON | _GEMMA | {"query_pre_attn_scalar": 256, "sliding_window": 4096, "layer_types": None,
                                  "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    "phi3": _COMMON | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None,
                       "original_max_position_embeddings": None, "head_dim": None},
    "smollm3": _COMMON | _BIASES | _WINDOWED | {"max_position_embeddings": 32768, "sliding_window": None,
                                                "tie_word_embeddings": True, "no_rope_layers": None,
                                                "no_rope_layer_interval": 4, "rope_theta": 2e6, "head_dim": None},
    "granite": _COMMON | _BIASES | {"embedding_multiplier": 1.0, "attention_multiplier": 1.0, "head_dim": None,
                                    "residual_multiplier": 1.0, "logits_scaling": 1.0},
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL = ("num_key_value_heads", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")

# Keys about training, text, other software or output shapes: none of them changes a logit.
_WITHOUT_EFFECT = frozenset("""
    model_type architectures auto_map transformers_version torch_dtype dtype use_cache initializer_range _name_or_path
    attention_dropout attn_dropout resid_pdrop embd_pdrop hidden_dropout bos_token_id eos_token_id pad_token_id
    unk_token_id sep_token_id decoder_start_token_id output_attentions output_hidden_states return_dict
    chunk_size_feed_forward is_encoder_decoder is_decoder id2label label2id problem_type pretraining_tp
    _attn_implementation _attn_implementation_autoset attn_implementation torchscript use_bfloat16 finetuning_task
    task_specific_params tokenizer_class prefix unsloth_version unsloth_fixed is_llama_config cache_implementation
    transformers.js_config max_length min_length do_sample temperature top_k top_p typical_p repetition_penalty
    num_beams num_return_sequences chat_template add_cross_attention tie_encoder_decoder cross_attention_hidden_size
    pruned_heads remove_invalid_values begin_suppress_tokens suppress_tokens forced_bos_token_id forced_eos_token_id
    output_scores return_dict_in_generate num_beam_groups diversity_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids exponential_decay_length_penalty early_stopping tf_legacy_loss
    _commit_hash router_aux_loss_coef output_router_logits
""".split())
# Keys that change the maths unless they hold the value that means "off".
_ONLY_IF = {"rope_interleaved": False, "use_bidirectional_attention": None, "quantization_config": None,
            "use_qk_norm": False, "use_mrope": False, "lm_head_bias": False, "full_attn_mod": 1,
            "interpolate_factor": 1, "attention_chunk_size": None, "layer_norm_type": None, "clip_qkv": None}

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
                "gelu_new": "gelu_tanh", "relu": "relu"}
_ROPE_NAMES = {"su": "longrope"}  # the name in the first Phi-3 files


class _Reader:
    """One config.json and the defaults of its family; every number comes out checked."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        if not isinstance(config, Mapping):
            raise ValueError("config.json: expected a JSON object")
        family = config.get("model_type")
        if not isinstance(family, str) or family not in _DEFAULTS:
            raise ValueError(f"config.json: model_type is {family!r}, expected one of {', '.join(_DEFAULTS)}")
        self.model_type = family
        self.given, self.defaults = config, _DEFAULTS[self.model_type]
        self._reject_unknown()

    def _reject_unknown(self) -> None:
        known = _WITHOUT_EFFECT | set(self.defaults) | set(_REQUIRED) | set(_OPTIONAL) | {"head_dim"}
        for key, value in self.given.items():
            if key in known or (key in _ONLY_IF and (value == _ONLY_IF[key] or value is False)) or value is None:
                continue
            if key in _BIASES and value is False:
                continue
            raise ValueError(f"config.json: {key} is {_short(value)}, which may change the maths and is not understood "
                             f"for model_type {self.model_type}")

    def value(self, key: str) -> Any:
        """What the file says, else the family's default. A JSON null is a value of its own."""
        return self.given[key] if key in self.given else self.defaults.get(key)

    def integer(self, key: str, most: int, default: int | None = None) -> int:
        value = self.value(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"config.json: {key} is {_short(value)}, expected an integer from 1 to {most}")
        return value

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        value = self.value(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value <= sys.float_info.max or (
                zero and value == 0)):
            raise ValueError(f"config.json: {key} is {_short(value)}, expected a number {'>=' if zero else 'above'} 0")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.value(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        value = self.value(key)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"config.json: {key} is {_short(value)}, expected true or false")
        return bool(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.given.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise ValueError(f"config.json: {key} is {_short(value)}, expected token ids")
        return tuple(i for i in ids if i >= 0)

    def per_layer(self, key: str, layers: int, allowed: tuple[Any, ...]) -> list[Any] | None:
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != layers or any(v not in allowed for v in value):
            expected = " or ".join(map(str, allowed))
            raise ValueError(f"config.json: {key} is {_short(value)}, expected {layers} times {expected}")
        return value


def model_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a config.json.

    Raises:
        ValueError: an unknown model_type, a key that is not understood, or a value out of range.
    """
    c = _Reader(config)
    family = c.model_type
    gemma = family in ("gemma", "gemma2")
    layers = c.integer("num_hidden_layers", MAX_LAYERS)
    heads = c.integer("num_attention_heads", MAX_HEADS)
    kv_heads = c.integer("num_key_value_heads", MAX_HEADS, heads)
    hidden = c.integer("hidden_size", MAX_WIDTH)
    if heads % kv_heads:
        raise ValueError(f"config.json: num_attention_heads is {heads}, expected a multiple of num_key_value_heads "
                         f"{kv_heads}")
    if c.value("head_dim") is None and hidden % heads:
        raise ValueError(f"config.json: hidden_size is {hidden}, expected a multiple of num_attention_heads {heads}")
    head_dim = c.integer("head_dim", MAX_WIDTH, hidden // heads)
    rope_layers = _rope_layers(c, layers)
    theta, scaling, rope_dim = _rope(c, head_dim)
    scalar = c.number("query_pre_attn_scalar", head_dim) if family == "gemma2" else head_dim
    bos = c.token_ids("bos_token_id")
    return ModelSpec(
        model_type=family, vocab_size=c.integer("vocab_size", MAX_VOCAB), hidden_size=hidden,
        intermediate_size=c.integer("intermediate_size", MAX_WIDTH), n_layers=layers, n_heads=heads,
        n_kv_heads=kv_heads, head_dim=head_dim,
        max_position_embeddings=c.integer("max_position_embeddings", 1 << 40),
        norm_eps=c.number("rms_norm_eps", zero=True), norm_weight_offset=1.0 if gemma else 0.0,
        post_norms=family == "gemma2", qk_norm=family == "qwen3", activation=_activation(c, gemma),
        tied=c.flag("tie_word_embeddings"), fused=family == "phi3",
        qkv_bias=family == "qwen2" or c.flag("attention_bias"), o_bias=c.flag("attention_bias"),
        mlp_bias=c.flag("mlp_bias"), rope_dim=rope_dim, rope_theta=theta, rope_scaling=scaling,
        rope_layers=rope_layers, windows=_windows(c, layers, rope_layers),
        attention_scale=c.number("attention_multiplier") if family == "granite" else scalar ** -0.5,
        attention_softcap=c.optional_number("attn_logit_softcapping"),
        # Hugging Face rounds sqrt(hidden) to the checkpoint's dtype; in float32 that is this.
        embedding_scale=hidden ** 0.5 if gemma else c.number("embedding_multiplier", 1.0),
        residual_scale=c.number("residual_multiplier", 1.0), logits_scale=1.0 / c.number("logits_scaling", 1.0),
        final_softcap=c.optional_number("final_logit_softcapping"), eos_token_ids=c.token_ids("eos_token_id"),
        bos_token_id=bos[0] if bos else None,
    )


def _activation(c: _Reader, gemma: bool) -> str:
    name = c.value("hidden_activation") or c.value("hidden_act")
    if gemma and name == "gelu":
        # The first Gemma files say "gelu" and mean its tanh form, which the models were trained with.
        name = "gelu_pytorch_tanh"
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act is {_short(name)}, expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _rope_layers(c: _Reader, layers: int) -> tuple[bool, ...]:
    if c.model_type != "smollm3":
        return (True,) * layers
    given = c.per_layer("no_rope_layers", layers, (0, 1))  # 1 is a layer *with* RoPE, despite the key's name
    interval = c.integer("no_rope_layer_interval", MAX_LAYERS)
    return tuple(bool(v) for v in given) if given else tuple((i + 1) % interval != 0 for i in range(layers))


def _windows(c: _Reader, layers: int, rope_layers: tuple[bool, ...]) -> tuple[int | None, ...]:
    """Each layer's sliding window: how many keys a token sees, itself included."""
    if c.value("sliding_window") is None or ("use_sliding_window" in c.defaults and not c.flag("use_sliding_window")):
        return (None,) * layers
    window = c.integer("sliding_window", 1 << 40)
    types = c.per_layer("layer_types", layers, ("full_attention", "sliding_attention"))
    if types is not None:
        sliding = [t == "sliding_attention" for t in types]
    elif c.model_type == "gemma2":
        sliding = [i % 2 == 0 for i in range(layers)]
    elif c.model_type == "smollm3":
        sliding = [not with_rope for with_rope in rope_layers]
    elif "max_window_layers" in c.defaults:
        first = c.value("max_window_layers")
        if first is not None and (isinstance(first, bool) or not isinstance(first, int) or first < 0):
            raise ValueError(f"config.json: max_window_layers is {_short(first)}, expected an integer >= 0")
        sliding = [i >= (first or 0) for i in range(layers)]
    else:
        sliding = [True] * layers
    return tuple(window if s else None for s in sliding)


def _rope(c: _Reader, head_dim: int) -> tuple[float, dict[str, Any], int]:
    """(theta, scaling, rotated channels) from `rope_parameters` or from the older rope_theta and rope_scaling."""
    given: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = c.given.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"config.json: {key} is {_short(value)}, expected an object")
        given |= {k: v for k, v in (value or {}).items() if v is not None}
    theta = given.pop("rope_theta", None)
    theta = c.number("rope_theta", 10000.0) if theta is None else theta
    fraction = given.pop("partial_rotary_factor", c.given.get("partial_rotary_factor"))
    fraction = 1.0 if fraction is None else fraction
    for name, value, most in (("rope_theta", theta, sys.float_info.max), ("partial_rotary_factor", fraction, 1.0)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            raise ValueError(f"config.json: {name} is {_short(value)}, expected a number above 0")
    rope_type = given.pop("rope_type", None) or given.get("type") or "default"
    given.pop("type", None)
    rope_type = _ROPE_NAMES.get(rope_type, rope_type) if isinstance(rope_type, str) else rope_type
    if not isinstance(rope_type, str):
        raise ValueError(f"config.json: rope_type is {_short(rope_type)}, expected a name")
    if rope_type == "proportional" and fraction != 1.0:
        given["partial_rotary_factor"], fraction = fraction, 1.0
    for key in ("max_position_embeddings", "original_max_position_embeddings"):
        if c.value(key) is not None:
            given.setdefault(key, c.value(key))
    return float(theta), given | {"rope_type": rope_type}, int(head_dim * fraction)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
