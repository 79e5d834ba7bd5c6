"""config.json -> ModelSpec: every family's defaults, both spellings of RoPE, windows, and what is refused."""
from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from model_folder import FAMILIES, small

from forge_c.models.spec import FAMILIES as MODEL_TYPES
from forge_c.models.spec import Attention, GatedMLP, ModelSpec, model_spec
from forge_c.models.spec.reader import MAX_HEADS, MAX_LAYERS, MAX_VOCAB, MAX_WIDTH

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2}
PLAIN = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2,
         "head_dim": 8, "max_position_embeddings": 2048, "norm_eps": 1e-6, "norm_weight_offset": 0.0,
         "post_norms": False, "qk_norm": False, "activation": "silu", "tied": False, "fused": False,
         "qkv_bias": False, "o_bias": False, "mlp_bias": False, "rope_dim": 8, "rope_theta": 10000.0,
         "rope_layers": (True,) * 4, "windows": (None,) * 4, "attention_scale": 8 ** -0.5, "attention_softcap": None,
         "embedding_scale": 1.0, "residual_scale": 1.0, "logits_scale": 1.0, "final_softcap": None,
         "eos_token_ids": (), "bos_token_id": None}
GEMMA = {"head_dim": 256, "rope_dim": 256, "attention_scale": 1 / 16, "tied": True, "activation": "gelu_tanh",
         "norm_weight_offset": 1.0, "embedding_scale": 32 ** 0.5, "max_position_embeddings": 8192}

# What transformers 5.23's configuration classes assume where the file says nothing.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"max_position_embeddings": 131072, "windows": (4096,) * 4},
    "qwen2": {"max_position_embeddings": 32768, "qkv_bias": True},
    "qwen3": {"max_position_embeddings": 32768, "qk_norm": True, "head_dim": 128, "rope_dim": 128,
              "attention_scale": 128 ** -0.5},
    "gemma": GEMMA,
    "gemma2": GEMMA | {"post_norms": True, "attention_softcap": 50.0, "final_softcap": 30.0,
                       "windows": (4096, None, 4096, None)},
    "gemma3_text": GEMMA | {"post_norms": True, "qk_norm": True, "max_position_embeddings": 131072,
                            "windows": (4096,) * 4},
    "phi3": {"max_position_embeddings": 4096, "norm_eps": 1e-5, "fused": True},
    "smollm3": {"max_position_embeddings": 32768, "tied": True, "rope_theta": 2e6,
                "rope_layers": (True, True, True, False)},
    "granite": {"attention_scale": 1.0},
}


def flat(spec: ModelSpec) -> dict[str, Any]:
    """What a spec says by one name each; layers of one model differ in windows and in whether they rotate."""
    attention, mlp, layer = spec.layers[0].mixer, spec.layers[0].mlp, spec.layers[0]
    mixers = [one.mixer for one in spec.layers]
    assert all(isinstance(m, Attention) for m in mixers) and isinstance(mlp, GatedMLP)
    assert all(replace(m, window=None, rope=None) == replace(attention, window=None, rope=None) for m in mixers)
    assert all(one == replace(layer, mixer=one.mixer) for one in spec.layers) and not layer.parallel
    assert spec.head.norm == layer.norm and layer.norm.kind == "rms" and attention.fused == mlp.fused
    assert attention.qk_norm in (None, layer.norm)
    rope = next(m.rope for m in mixers if m.rope)
    return {"model_type": spec.model_type, "vocab_size": spec.vocab_size, "hidden_size": spec.hidden_size,
            "intermediate_size": mlp.width, "n_layers": spec.n_layers, "n_heads": attention.n_heads,
            "n_kv_heads": attention.n_kv_heads, "head_dim": attention.head_dim,
            "max_position_embeddings": spec.max_position_embeddings, "norm_eps": layer.norm.eps,
            "norm_weight_offset": layer.norm.offset, "post_norms": {"pre": False, "both": True}[layer.norms],
            "qk_norm": attention.qk_norm is not None, "activation": mlp.activation, "tied": spec.head.tied,
            "fused": mlp.fused, "qkv_bias": attention.qkv_bias, "o_bias": attention.o_bias, "mlp_bias": mlp.bias,
            "rope_dim": rope.dim, "rope_theta": rope.theta, "rope_scaling": rope.scaling,
            "rope_layers": tuple(m.rope is not None for m in mixers), "windows": tuple(m.window for m in mixers),
            "attention_scale": attention.scale, "attention_softcap": attention.softcap,
            "embedding_scale": spec.embed.scale, "residual_scale": layer.residual_scale,
            "logits_scale": spec.head.logits_scale, "final_softcap": spec.head.softcap,
            "eos_token_ids": spec.eos_token_ids, "bos_token_id": spec.bos_token_id}


def bare(family: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": family} | SIZES | changes


def test_every_family_has_its_defaults_tested():
    assert set(DEFAULTS) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults(family):
    found = flat(model_spec(bare(family)))
    assert found.pop("rope_scaling")["rope_type"] == "default"
    assert found == PLAIN | DEFAULTS[family] | {"model_type": family}


def test_kv_heads_default_to_heads():
    assert flat(model_spec(small(num_key_value_heads=...)))["n_kv_heads"] == 4
    assert flat(model_spec(small(num_key_value_heads=None)))["n_kv_heads"] == 4


def hf(family: str, architecture: str, sizes: str, **more: Any) -> str:
    """config.json as a well-known model has it; sizes: vocab, hidden, inner, layers, heads, kv heads, context."""
    vocab, hidden, inner, layers, heads, kv_heads, longest = map(int, sizes.split())
    return json.dumps({
        "architectures": [architecture], "model_type": family, "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": longest, "attention_dropout": 0.0,
        "hidden_act": "silu", "initializer_range": 0.02, "torch_dtype": "bfloat16", "use_cache": True,
        "transformers_version": "4.45.0"} | more)


LONG_FACTORS = [1.0 + 0.5 * i for i in range(48)]

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.2-1B": (
        hf("llama", "LlamaForCausalLM", "128256 2048 8192 16 32 8 131072", attention_bias=False, bos_token_id=128000,
           eos_token_id=[128001, 128008, 128009], head_dim=64, mlp_bias=False, pretraining_tp=1, rms_norm_eps=1e-5,
           rope_scaling={"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
           rope_theta=500000.0, tie_word_embeddings=True),
        {"tied": True, "head_dim": 64, "rope_theta": 5e5, "norm_eps": 1e-5, "windows": (None,) * 16,
         "eos_token_ids": (128001, 128008, 128009), "attention_scale": 0.125}),
    "SmolLM2-135M": (
        hf("llama", "LlamaForCausalLM", "49152 576 1536 30 9 3 8192", attention_bias=False, bos_token_id=0,
           eos_token_id=0, is_llama_config=True, mlp_bias=False, pretraining_tp=1, rms_norm_eps=1e-5,
           rope_interleaved=False, rope_scaling=None, rope_theta=100000, tie_word_embeddings=True),
        {"tied": True, "head_dim": 64, "rope_theta": 1e5, "n_kv_heads": 3}),
    "Mistral-7B-v0.1": (
        hf("mistral", "MistralForCausalLM", "32000 4096 14336 32 32 8 32768", bos_token_id=1, eos_token_id=2,
           rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False),
        {"tied": False, "windows": (4096,) * 32, "head_dim": 128}),
    "Mistral-7B-v0.3": (
        hf("mistral", "MistralForCausalLM", "32768 4096 14336 32 32 8 32768", bos_token_id=1, eos_token_id=2,
           rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False),
        {"windows": (None,) * 32, "rope_theta": 1e6}),
    "Qwen2.5-0.5B": (
        hf("qwen2", "Qwen2ForCausalLM", "151936 896 4864 24 14 2 32768", bos_token_id=151643, eos_token_id=151643,
           max_window_layers=24, rms_norm_eps=1e-6, rope_theta=1000000.0, sliding_window=32768,
           tie_word_embeddings=True, use_mrope=False, use_sliding_window=False),
        {"tied": True, "qkv_bias": True, "o_bias": False, "windows": (None,) * 24, "head_dim": 64}),
    "Qwen2.5-0.5B saved by transformers 5": (
        hf("qwen2", "Qwen2ForCausalLM", "151936 896 4864 24 14 2 32768", dtype="bfloat16", pad_token_id=None,
           layer_types=["full_attention"] * 24, max_window_layers=24, rms_norm_eps=1e-6, sliding_window=None,
           rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"}, tie_word_embeddings=True,
           use_sliding_window=False),
        {"tied": True, "rope_theta": 1e6, "windows": (None,) * 24}),
    "Qwen3-0.6B": (
        hf("qwen3", "Qwen3ForCausalLM", "151936 1024 3072 28 16 8 40960", attention_bias=False, bos_token_id=151643,
           eos_token_id=151645, head_dim=128, max_window_layers=28, rms_norm_eps=1e-6, rope_scaling=None,
           rope_theta=1000000, sliding_window=None, tie_word_embeddings=True, use_sliding_window=False),
        {"tied": True, "qk_norm": True, "head_dim": 128, "qkv_bias": False, "rope_theta": 1e6}),
    "gemma-2b": (
        hf("gemma", "GemmaForCausalLM", "256000 2048 16384 18 8 1 8192", attention_bias=False, bos_token_id=2,
           eos_token_id=1, head_dim=256, hidden_act="gelu", hidden_activation="gelu_pytorch_tanh", pad_token_id=0,
           rms_norm_eps=1e-6, rope_scaling=None, rope_theta=10000.0),
        {"tied": True, "activation": "gelu_tanh", "norm_weight_offset": 1.0, "embedding_scale": 2048 ** 0.5,
         "post_norms": False, "attention_scale": 1 / 16}),
    "gemma-2-2b": (
        hf("gemma2", "Gemma2ForCausalLM", "256000 2304 9216 26 8 4 8192", attention_bias=False,
           attn_logit_softcapping=50.0, bos_token_id=2, cache_implementation="hybrid", eos_token_id=1,
           final_logit_softcapping=30.0, head_dim=256, hidden_act="gelu_pytorch_tanh",
           hidden_activation="gelu_pytorch_tanh", pad_token_id=0, query_pre_attn_scalar=256, rms_norm_eps=1e-6,
           rope_theta=10000.0, sliding_window=4096),
        {"tied": True, "post_norms": True, "windows": (4096, None) * 13, "attention_softcap": 50.0,
         "final_softcap": 30.0}),
    "gemma-3-270m": (
        hf("gemma3_text", "Gemma3ForCausalLM", "262144 640 2048 18 4 1 32768", attention_bias=False,
           attn_logit_softcapping=None, final_logit_softcapping=None, head_dim=256, bos_token_id=2, eos_token_id=1,
           hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, rms_norm_eps=1e-6,
           rope_local_base_freq=10000.0, rope_theta=1000000.0, sliding_window=512, _sliding_window_pattern=6,
           use_bidirectional_attention=False),
        {"tied": True, "post_norms": True, "windows": ((512,) * 5 + (None,)) * 3, "attention_softcap": None,
         "attention_scale": 1 / 16, "n_kv_heads": 1, "qk_norm": True}),
    "gemma-3-4b-it": (
        json.dumps({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
                    "boi_token_index": 255999, "eoi_token_index": 256000, "eos_token_id": [1, 106],
                    "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
                    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
                    "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                                    "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                                    "sliding_window": 1024},
                    "vision_config": {"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model"}}),
        {"vocab_size": 262208, "n_layers": 34, "n_heads": 8, "n_kv_heads": 4, "max_position_embeddings": 131072,
         "eos_token_ids": (1, 106), "windows": (((1024,) * 5 + (None,)) * 6)[:34], "model_type": "gemma3_text"}),
    "Phi-3-mini-4k": (
        hf("phi3", "Phi3ForCausalLM", "32064 3072 8192 32 32 32 4096", attention_bias=False,
           auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, bos_token_id=1, embd_pdrop=0.0,
           eos_token_id=32000, original_max_position_embeddings=4096, pad_token_id=32000, resid_pdrop=0.0,
           rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000.0, sliding_window=2047,
           tie_word_embeddings=False),
        {"fused": True, "windows": (2047,) * 32, "head_dim": 96, "rope_dim": 96}),
    "Phi-3-mini-128k": (
        hf("phi3", "Phi3ForCausalLM", "32064 3072 8192 32 32 32 131072", attention_bias=False, bos_token_id=1,
           embd_pdrop=0.0, eos_token_id=32000, original_max_position_embeddings=4096, pad_token_id=32000,
           resid_pdrop=0.0, rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=262144,
           rope_scaling={"long_factor": LONG_FACTORS, "short_factor": LONG_FACTORS, "type": "su"},
           tie_word_embeddings=False),
        {"fused": True, "windows": (262144,) * 32, "rope_scaling": {
            "long_factor": LONG_FACTORS, "short_factor": LONG_FACTORS, "rope_type": "longrope",
            "max_position_embeddings": 131072, "original_max_position_embeddings": 4096}}),
    "Phi-4-mini": (
        hf("phi3", "Phi3ForCausalLM", "200064 3072 8192 32 24 8 131072", attention_bias=False, bos_token_id=199999,
           embd_pdrop=0.0, eos_token_id=199999, full_attn_mod=1, interpolate_factor=1, lm_head_bias=False,
           mlp_bias=False, original_max_position_embeddings=4096, pad_token_id=199999, partial_rotary_factor=0.75,
           resid_pdrop=0.0, rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=262144,
           rope_scaling={"long_factor": LONG_FACTORS, "short_factor": LONG_FACTORS, "type": "longrope"},
           tie_word_embeddings=True),
        {"tied": True, "head_dim": 128, "rope_dim": 96, "n_kv_heads": 8}),
    "SmolLM3-3B": (
        hf("smollm3", "SmolLM3ForCausalLM", "128256 2048 11008 36 16 4 65536", attention_bias=False,
           bos_token_id=None, eos_token_id=128012, layer_types=["full_attention"] * 36, max_window_layers=28,
           mlp_bias=False, no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9, pad_token_id=128004,
           pretraining_tp=2, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=5000000.0, sliding_window=None,
           use_sliding_window=False),
        {"tied": True, "rope_layers": (True, True, True, False) * 9, "rope_theta": 5e6, "windows": (None,) * 36}),
    "granite-3.1-2b": (
        hf("granite", "GraniteForCausalLM", "49155 2048 8192 40 32 8 131072", attention_bias=False,
           attention_multiplier=0.015625, bos_token_id=0, embedding_multiplier=12.0, eos_token_id=0,
           logits_scaling=8.0, mlp_bias=False, pad_token_id=0, residual_multiplier=0.22, rms_norm_eps=1e-5,
           rope_scaling=None, rope_theta=5000000.0, tie_word_embeddings=True),
        {"tied": True, "attention_scale": 0.015625, "embedding_scale": 12.0, "residual_scale": 0.22,
         "logits_scale": 0.125}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_understood(name):
    config, expected = PUBLISHED[name]
    found = flat(model_spec(json.loads(config)))
    assert {key: found[key] for key in expected} == expected


OTHER_THETA = {"gemma3_text": {"rope_local_base_freq": 500}}  # of layers with a window, such as the first


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_file_says_wins(family):
    given = bare(family, max_position_embeddings=77, rms_norm_eps=1e-3, eos_token_id=[5, 6], bos_token_id=4,
                 tie_word_embeddings=False, rope_theta=500, **OTHER_THETA.get(family, {}))
    found = flat(model_spec(given))
    expected = {"max_position_embeddings": 77, "norm_eps": 1e-3, "eos_token_ids": (5, 6), "bos_token_id": 4,
                "tied": False, "rope_theta": 500.0}
    assert {key: found[key] for key in expected} == expected
    assert isinstance(found["rope_theta"], float)
    assert model_spec(given | {"tie_word_embeddings": True}).head.tied


@pytest.mark.parametrize(("family", "changes", "expected"), [
    ("llama", {"attention_bias": True}, {"qkv_bias": True, "o_bias": True, "mlp_bias": False}),
    ("llama", {"mlp_bias": True}, {"qkv_bias": False, "o_bias": False, "mlp_bias": True}),
    ("qwen3", {"attention_bias": True}, {"qkv_bias": True, "o_bias": True}),
    ("qwen2", {}, {"qkv_bias": True, "o_bias": False}),
    ("llama", {"head_dim": 20}, {"head_dim": 20, "rope_dim": 20, "attention_scale": 20 ** -0.5}),
    ("llama", {"head_dim": None}, {"head_dim": 8}),
    ("llama", {"head_dim": 6, "hidden_size": 33}, {"head_dim": 6, "hidden_size": 33}),
    ("llama", {"hidden_act": "gelu"}, {"activation": "gelu"}),
    ("llama", {"hidden_act": "gelu_new"}, {"activation": "gelu_tanh"}),
    ("llama", {"hidden_act": "swish"}, {"activation": "silu"}),
    ("llama", {"rms_norm_eps": 0}, {"norm_eps": 0.0}),
    ("gemma", {"hidden_act": "gelu"}, {"activation": "gelu_tanh"}),
    ("gemma", {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
    ("gemma", {"hidden_activation": None, "hidden_act": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
    ("gemma2", {"query_pre_attn_scalar": 144}, {"attention_scale": 1 / 12}),
    ("gemma2", {"query_pre_attn_scalar": None}, {"attention_scale": 10 ** -0.5}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None},
     {"attention_softcap": None, "final_softcap": None}),
    ("gemma2", {"attn_logit_softcapping": 20, "final_logit_softcapping": 9.5},
     {"attention_softcap": 20.0, "final_softcap": 9.5}),
    ("granite", {"embedding_multiplier": 12, "attention_multiplier": 0.015625, "residual_multiplier": 0.22,
                 "logits_scaling": 8.0},
     {"embedding_scale": 12.0, "attention_scale": 0.015625, "residual_scale": 0.22, "logits_scale": 0.125}),
    ("llama", {"eos_token_id": 2}, {"eos_token_ids": (2,)}),
    ("llama", {"eos_token_id": None}, {"eos_token_ids": ()}),
    ("llama", {"eos_token_id": [1, -1]}, {"eos_token_ids": (1,)}),
    ("llama", {"bos_token_id": -1}, {"bos_token_id": None}),
    ("llama", {"tie_word_embeddings": None}, {"tied": False}),
    ("llama", {"max_position_embeddings": 2 ** 31}, {"max_position_embeddings": 2 ** 31}),
])
def test_one_key(family, changes, expected):
    found = flat(model_spec(small(family, **changes)))
    assert {key: found[key] for key in expected} == expected


LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}


@pytest.mark.parametrize(("family", "old", "new"), [
    ("llama", {"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ("llama", {"rope_theta": 5e5, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 5e5}}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}},
     {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    ("llama", {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
     {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    ("qwen2", {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0,
                                                   "original_max_position_embeddings": 64}},
     {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
                          "original_max_position_embeddings": 64}}),
    ("llama", {"rope_theta": 5e5, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}},
     {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 64, "rope_theta": 5e5}}),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
     {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    ("phi3", {"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    ("phi3", {"rope_scaling": LONG | {"type": "su"}, "original_max_position_embeddings": 64},
     {"rope_parameters": LONG | {"rope_type": "longrope", "original_max_position_embeddings": 64},
      "original_max_position_embeddings": 64}),
    ("phi3", {"rope_scaling": LONG | {"type": "su"}, "original_max_position_embeddings": 64},
     {"rope_scaling": LONG | {"type": "longrope"}, "original_max_position_embeddings": 64}),
    ("smollm3", {"rope_theta": 5e6}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}),
])
def test_old_and_new_rope_settings_give_the_same_spec(family, old, new):
    assert model_spec(small(family, **old)) == model_spec(small(family, **new))
    assert model_spec(small(family, **old)) != model_spec(small(family, rope_theta=12345.0))


BY_TYPE = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
           "sliding_attention": {"rope_type": "default", "rope_theta": 5e3}}


@pytest.mark.parametrize(("changes", "full", "sliding"), [
    ({}, (1e6, {"rope_type": "default"}), (1e4, {"rope_type": "default"})),
    ({"rope_theta": 5e5, "rope_local_base_freq": 5e3, "rope_scaling": {"type": "linear", "factor": 8.0}},
     (5e5, {"rope_type": "linear", "factor": 8.0}), (5e3, {"rope_type": "default"})),
    ({"rope_parameters": BY_TYPE}, (1e6, {"rope_type": "linear", "factor": 8.0}), (5e3, {"rope_type": "default"})),
    ({"rope_parameters": {"full_attention": None, "sliding_attention": {"rope_theta": 7e3}}},
     (1e6, {"rope_type": "default"}), (7e3, {"rope_type": "default"})),
])
def test_gemma3_rotates_windowed_layers_by_angles_of_their_own(changes, full, sliding):
    spec = model_spec(small("gemma3_text", num_hidden_layers=3, **changes))
    found = [layer.mixer.rope for layer in spec.layers]
    for rope, (theta, scaling) in zip(found, (sliding, full, sliding), strict=True):
        assert (rope.theta, rope.scaling) == (theta, scaling | {"max_position_embeddings": 1024})


@pytest.mark.parametrize("given", [{"rope_theta": 1e6}, {"full_attention": 1}, {"chunked_attention": {}}, 5],
                         ids=repr)
def test_rope_parameters_of_another_form_are_refused_for_gemma3(given):
    with pytest.raises(ValueError, match="^config.json: rope_parameters"):
        model_spec(small("gemma3_text", rope_parameters=given))


def test_gemma3_has_a_full_layer_at_the_end_of_each_pattern():
    types = ["sliding_attention", "full_attention"]
    for changes, expected in (({"sliding_window_pattern": 3}, (7, 7, None, 7, 7)),
                              ({"sliding_window_pattern": 1}, (None,) * 5),
                              ({"layer_types": [*types, *types, types[0]]}, (7, None, 7, None, 7)),
                              ({"sliding_window": None}, (None,) * 5)):
        spec = model_spec(small("gemma3_text", num_hidden_layers=5, **changes))
        assert flat(spec)["windows"] == expected, changes


def test_a_text_config_is_read_as_if_it_stood_alone():
    alone = small("gemma3_text", eos_token_id=[1, 106], tie_word_embeddings=False)
    text = {key: value for key, value in alone.items() if key not in ("eos_token_id", "tie_word_embeddings")}
    outer = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "eos_token_id": [1, 106],
             "tie_word_embeddings": False, "mm_tokens_per_image": 256}
    assert model_spec(outer) == model_spec(alone)
    for key, value in (("surprise", 1), ("text_config", [1])):
        with pytest.raises(ValueError, match=f"^config.json: {key} is "):
            model_spec(outer | {key: value})
    with pytest.raises(ValueError, match="^config.json: surprise is 1, which"):
        model_spec(outer | {"text_config": text | {"surprise": 1}})


@pytest.mark.parametrize(("changes", "rope_dim"), [
    ({}, 16), ({"partial_rotary_factor": 0.5}, 8), ({"partial_rotary_factor": 1}, 16),
    ({"partial_rotary_factor": None}, 16), ({"rope_parameters": {"partial_rotary_factor": 0.25}}, 4),
    ({"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}}, 4),
    ({"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.25}}, 16),
])
def test_partial_rotation(changes, rope_dim):
    """A proportional fraction leaves the width of the table alone: the exponents run over the whole head."""
    rope = model_spec(small("phi3", head_dim=16, **changes)).layers[0].mixer.rope
    assert rope.dim == rope_dim
    proportional = rope.scaling["rope_type"] == "proportional"
    assert rope.scaling.get("partial_rotary_factor") == (0.25 if proportional else None)


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(("family", "changes", "windows"), [
    ("mistral", {"sliding_window": 5}, (5, 5, 5, 5)),
    ("mistral", {"sliding_window": None}, (None,) * 4),
    ("mistral", {"sliding_window": 5, "layer_types": [SLIDING, FULL, FULL, SLIDING]}, (5, None, None, 5)),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 5}, (None,) * 4),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}, (None, None, 5, 5)),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}, (5, 5, 5, 5)),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 28}, (None,) * 4),
    ("qwen2", {"use_sliding_window": True, "sliding_window": None}, (None,) * 4),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "layer_types": [FULL, SLIDING, FULL, FULL]},
     (None, 5, None, None)),
    ("qwen3", {"use_sliding_window": False, "sliding_window": None, "layer_types": [FULL] * 4}, (None,) * 4),
    ("gemma2", {"sliding_window": 5}, (5, None, 5, None)),
    ("gemma2", {"sliding_window": 5, "layer_types": [FULL, SLIDING, FULL, SLIDING]}, (None, 5, None, 5)),
    ("gemma2", {"sliding_window": None}, (None,) * 4),
    ("phi3", {"sliding_window": 5}, (5, 5, 5, 5)),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 5}, (None, None, None, 5)),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 5, "no_rope_layers": [0, 1, 0, 1]},
     (5, None, 5, None)),
    ("smollm3", {"use_sliding_window": True}, (None,) * 4),
])
def test_windows(family, changes, windows):
    given = bare(family, **changes)
    assert flat(model_spec(given))["windows"] == windows


@pytest.mark.parametrize(("changes", "rope_layers"), [
    ({}, (True, True, True, False)),
    ({"no_rope_layer_interval": 2}, (True, False, True, False)),
    ({"no_rope_layers": [1, 0, 0, 1]}, (True, False, False, True)),
    ({"no_rope_layers": None}, (True, True, True, False)),
])
def test_layers_without_rope(changes, rope_layers):
    """In no_rope_layers a 1 is a layer with RoPE."""
    assert flat(model_spec(small("smollm3", **changes)))["rope_layers"] == rope_layers


SHORT = {"vocab_size": MAX_VOCAB, "hidden_size": MAX_WIDTH, "intermediate_size": MAX_WIDTH,
         "num_hidden_layers": MAX_LAYERS, "num_attention_heads": MAX_HEADS, "num_key_value_heads": MAX_HEADS,
         "head_dim": MAX_WIDTH, "max_position_embeddings": 1 << 40, "sliding_window": 1 << 40}
NO_INTEGERS = [True, False, 0, -1, 1.5, 8.0, "8", 2 ** 70, math.nan, math.inf, [], {}, [8]]


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
@pytest.mark.parametrize("key", SHORT)
def test_integers_are_checked(key, value):
    with pytest.raises(ValueError) as caught:
        model_spec(small("mistral", **{key: value}))
    assert str(caught.value) == f"config.json: {key} is {value!r}, expected an integer from 1 to {SHORT[key]}"


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                 "num_attention_heads"])
@pytest.mark.parametrize("value", [None, ...], ids=["null", "absent"])
def test_sizes_are_required(key, value):
    with pytest.raises(ValueError) as caught:
        model_spec(small(**{key: value}))
    assert str(caught.value) == f"config.json: {key} is None, expected an integer from 1 to {SHORT[key]}"


NO_NUMBERS = [True, 0, -1.0, "1", math.nan, math.inf, -math.inf, [], {}]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize(("family", "key"), [
    ("gemma2", "query_pre_attn_scalar"), ("gemma2", "attn_logit_softcapping"), ("gemma2", "final_logit_softcapping"),
    ("granite", "embedding_multiplier"), ("granite", "attention_multiplier"), ("granite", "residual_multiplier"),
    ("granite", "logits_scaling"), ("llama", "rope_theta"),
])
def test_numbers_are_checked(family, key, value):
    with pytest.raises(ValueError) as caught:
        model_spec(small(family, **{key: value}))
    assert str(caught.value) == f"config.json: {key} is {value!r}, expected a number above 0"


@pytest.mark.parametrize("value", [True, -1e-6, "1e-6", math.nan, math.inf, None, [], {}], ids=repr)
def test_eps_is_checked(value):
    with pytest.raises(ValueError, match="^config.json: rms_norm_eps is .*, expected a number"):
        model_spec(small(rms_norm_eps=value))


@pytest.mark.parametrize(("key", "family"), [
    ("rms_norm_eps", "llama"), ("rope_theta", "llama"), ("logits_scaling", "granite"),
    ("final_logit_softcapping", "gemma2"),
])
def test_an_integer_beyond_any_float_is_refused(key, family):
    with pytest.raises(ValueError, match=f"^config.json: {key} is an integer of 1329 bits, expected"):
        model_spec(small(family, **{key: 10 ** 400}))


@pytest.mark.parametrize("value", [1, 0, "true", [], 0.0, {}], ids=repr)
@pytest.mark.parametrize(("family", "key"), [
    ("llama", "tie_word_embeddings"), ("llama", "attention_bias"), ("llama", "mlp_bias"),
    ("qwen2", "use_sliding_window"),
])
def test_flags_are_checked(family, key, value):
    with pytest.raises(ValueError) as caught:
        model_spec(small(family, **{key: value}))
    assert str(caught.value) == f"config.json: {key} is {value!r}, expected true or false"


@pytest.mark.parametrize("value", ["2", True, -1, 1.5, math.nan, [2], {}], ids=repr)
def test_max_window_layers_is_checked(value):
    with pytest.raises(ValueError, match="^config.json: max_window_layers is "):
        model_spec(small("qwen2", max_window_layers=value))


FAMILY_NAMES = ", ".join(MODEL_TYPES)
A_SHARE = "expected a number above 0 and at most 1"
ACTIVATIONS = "silu, swish, gelu, gelu_pytorch_tanh, gelu_new, relu"


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "rwkv"}, f"config.json: model_type is 'rwkv', expected one of {FAMILY_NAMES}"),
    ({"model_type": ...}, f"config.json: model_type is None, expected one of {FAMILY_NAMES}"),
    ({"model_type": ["llama"]}, f"config.json: model_type is ['llama'], expected one of {FAMILY_NAMES}"),
    ({"model_type": "Llama"}, f"config.json: model_type is 'Llama', expected one of {FAMILY_NAMES}"),
    ({"num_key_value_heads": 3}, "config.json: num_attention_heads is 4, expected a multiple of num_key_value_heads 3"),
    ({"num_key_value_heads": 8}, "config.json: num_attention_heads is 4, expected a multiple of num_key_value_heads 8"),
    ({"hidden_size": 30}, "config.json: hidden_size is 30, expected a multiple of num_attention_heads 4"),
    ({"hidden_act": "relu2"}, f"config.json: hidden_act is 'relu2', expected one of {ACTIVATIONS}"),
    ({"hidden_act": None}, f"config.json: hidden_act is None, expected one of {ACTIVATIONS}"),
    ({"hidden_act": ["silu"]}, f"config.json: hidden_act is ['silu'], expected one of {ACTIVATIONS}"),
    ({"eos_token_id": "</s>"}, "config.json: eos_token_id is '</s>', expected token ids"),
    ({"eos_token_id": [1, True]}, "config.json: eos_token_id is [1, True], expected token ids"),
    ({"eos_token_id": 1.0}, "config.json: eos_token_id is 1.0, expected token ids"),
    ({"bos_token_id": {}}, "config.json: bos_token_id is {}, expected token ids"),
    ({"rope_scaling": "linear"}, "config.json: rope_scaling is 'linear', expected an object"),
    ({"rope_parameters": [1]}, "config.json: rope_parameters is [1], expected an object"),
    ({"rope_parameters": {"rope_theta": "1e4"}}, "config.json: rope_theta is '1e4', expected a number above 0"),
    ({"rope_parameters": {"rope_theta": True}}, "config.json: rope_theta is True, expected a number above 0"),
    ({"partial_rotary_factor": 1.5}, f"config.json: partial_rotary_factor is 1.5, {A_SHARE}"),
    ({"partial_rotary_factor": 0}, f"config.json: partial_rotary_factor is 0, {A_SHARE}"),
    ({"partial_rotary_factor": math.nan}, f"config.json: partial_rotary_factor is nan, {A_SHARE}"),
])
def test_messages(changes, message):
    with pytest.raises(ValueError) as caught:
        model_spec(small(**changes))
    assert str(caught.value) == message


@pytest.mark.parametrize(("family", "changes", "message"), [
    ("mistral", {"layer_types": [FULL] * 2},
     f"layer_types is ['{FULL}', '{FULL}'], expected 3 times {FULL} or {SLIDING}"),
    ("mistral", {"layer_types": FULL}, f"layer_types is '{FULL}', expected 3 times {FULL} or {SLIDING}"),
    ("mistral", {"layer_types": ["x", 1, {}]}, f"layer_types is ['x', 1, {{}}], expected 3 times {FULL} or {SLIDING}"),
    ("smollm3", {"no_rope_layers": [1, 0, 2, 1]}, "no_rope_layers is [1, 0, 2, 1], expected 4 times 0 or 1"),
    ("smollm3", {"no_rope_layers": []}, "no_rope_layers is [], expected 4 times 0 or 1"),
    ("smollm3", {"no_rope_layer_interval": 0},
     f"no_rope_layer_interval is 0, expected an integer from 1 to {MAX_LAYERS}"),
])
def test_messages_about_layers(family, changes, message):
    with pytest.raises(ValueError) as caught:
        model_spec(small(family, **changes))
    assert str(caught.value) == f"config.json: {message}"


@pytest.mark.parametrize("value", [[], None, 5, "llama", [["model_type", "llama"]]], ids=repr)
def test_a_config_is_an_object(value):
    with pytest.raises(ValueError) as caught:
        model_spec(value)
    assert str(caught.value) == "config.json: expected a JSON object"


def test_long_values_are_cut_in_messages():
    with pytest.raises(ValueError) as caught:
        model_spec(small(hidden_size="9" * 10 ** 6))
    assert len(str(caught.value)) < 200


def test_the_spec_cannot_be_changed():
    spec = model_spec(small())
    with pytest.raises(AttributeError):
        spec.layers[0].mixer.n_heads = 8
    assert spec.layers[0].mixer.n_heads == 4
