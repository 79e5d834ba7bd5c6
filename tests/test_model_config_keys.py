"""Keys of a config.json that a family does not know: which are refused, which change nothing, and how to override."""
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from model_folder import FAMILIES, small

from forge_c.models.spec import model_spec
from forge_c.rotary import rope_table

FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("key", "value"), [
    ("surprise", 1), ("num_experts", 8), ("rope_interleaved", True), ("logit_scale", 0.5), ("rotary_pct", 0.25),
    ("attention_chunk_size", 8192), ("clip_qkv", 8.0), ("use_qk_norm", True), ("use_bidirectional_attention", True),
    ("layer_norm_type", "default"), ("attn_output_gate", False),
])
def test_a_key_that_may_change_the_maths_is_refused(family, key, value):
    with pytest.raises(ValueError) as caught:
        model_spec(small(family, **{key: value}))
    assert str(caught.value) == (f"config.json: {key} is {value!r}, which may change the maths and is not understood "
                                 f"for model_type {family}; load(..., ignore=({key!r},)) loads the model without it")
    assert model_spec(small(family, **{key: value}), ignore=[key]) == model_spec(small(family))


@pytest.mark.parametrize(("family", "key", "value"), [
    ("llama", "sliding_window", 4096), ("llama", "layer_types", [FULL, FULL, SLIDING]),
    ("mistral", "attention_bias", True),
    ("qwen2", "attention_bias", True), ("qwen2", "mlp_bias", True), ("gemma", "query_pre_attn_scalar", 256),
    ("llama", "embedding_multiplier", 2.0), ("granite", "final_logit_softcapping", 30.0),
    ("llama", "surprise", "x" * 99),
])
def test_a_key_of_another_family_is_refused(family, key, value):
    with pytest.raises(ValueError, match=f"config.json: {key} is .*, which may change the maths"):
        model_spec(small(family, **{key: value}))


@pytest.mark.parametrize(("key", "value"), [
    ("surprise", None), ("rope_interleaved", False), ("attention_bias", False), ("mlp_bias", False),
    ("quantization_config", None), ("attention_dropout", 0.1), ("architectures", ["X"]), ("auto_map", {"a": "b.c"}),
    ("torch_dtype", "float16"), ("pretraining_tp", 2), ("rope_scaling", None), ("_name_or_path", "x"),
])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_without_effect_changes_nothing(family, key, value):
    assert model_spec(small(family, **{key: value})) == model_spec(small(family))


# Beside a whole config.json: what published files and the programs that wrote them left there.
LEFT_BEHIND: dict[str, dict[str, Any]] = {
    "gemma-2-9b-it, gemma-2-27b": {"model_type": "gemma2", "sliding_window_size": 4096},
    "llama-65b, 2023": {"max_sequence_length": 2048, "pad_token_id": -1, "architectures": ["LLaMAForCausalLM"]},
    "ALLaM-7B": {"internal_version": "7b-alpha-v2.33.0.30"},
    "a llama of qwen's makers": {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 80},
    "a llama saved by transformers 5": {"layer_types": ["full_attention"] * 3, "dtype": "bfloat16"},
    "transformers 4.3x": {"_flash_attn_2_enabled": True, "output_past": True, "num_labels": 2, "torchscript": False},
    "transformers' attention": {"_attn_implementation_internal": "sdpa", "_experts_implementation": "eager"},
    "a trainer": {"neftune_noise_alpha": 5, "gradient_checkpointing": True, "model_max_length": 4096, "bf16": True},
    "LLaMA-Factory": {"group_size_ratio": 0.25, "use_flash_attn": True, "neftune_noise_alpha": 5.0},
    "unsloth": {"unsloth_version": "2025.3.19", "unsloth_fixed": True, "_name_or_path": "x"},
    "PaddleNLP": {"alibi": False, "paddlenlp_version": None, "rope_scaling_factor": 1.0, "rope_scaling_type": None,
                  "use_recompute": False, "virtual_pp_degree": 1, "use_fused_rope": True, "fused_rms_norm": True,
                  "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "use_flash_attention": True},
    "FastChat": {"max_sequence_length": 4096, "pad_token": "<unk>", "tokenizer_padding_side": "right"},
    "exporters": {"author": "x", "license": "mit", "_comment": "y", "onnx_version": "1.17", "neuron": {"a": [1]}},
    "generation settings": {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "min_p": 0.1, "stop_strings": ["x"]},
    "null": {"rope_scaling_type": None, "quantization": None, "quantization_config": None, "surprise": None},
    "off": {"num_local_experts": 0, "use_qk_norm": False, "lm_head_bias": False, "rotary_pct": 1.0, "is_causal": True},
}


@pytest.mark.parametrize("case", LEFT_BEHIND)
def test_what_programs_leave_behind_changes_nothing(case):
    given = dict(LEFT_BEHIND[case])
    family = given.pop("model_type", "llama")
    assert model_spec(small(family, **given)) == model_spec(small(family))


@pytest.mark.parametrize("changes", [
    {"sliding_window": 4096}, {"sliding_window": 4096, "use_sliding_window": True}, {"max_window_layers": 3},
    {"alibi": True}, {"rope_scaling_factor": 2.0}, {"num_local_experts": 8}, {"is_causal": False},
    {"layer_types": ["full_attention", "linear_attention", "full_attention"]}, {"layer_types": 5},
], ids=repr)
def test_the_same_keys_are_refused_where_they_say_something(changes):
    with pytest.raises(ValueError, match=r"may change the maths .*; load\(..., ignore="):
        model_spec(small(**changes))


QUANTIZED = [
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config", "GPTQ"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config", "AWQ"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "quantization_config", "FP8"),
    ({"quantization_config": {"load_in_4bit": True}}, "quantization_config", "bitsandbytes"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quantization_config", "compressed-tensors"),
    ({"quantization": {"group_size": 64, "bits": 4}}, "quantization", "MLX"),
    ({"quantization_config": {}}, "quantization_config", "{}"),
    ({"quantization_config": 7}, "quantization_config", "7"),
]


@pytest.mark.parametrize(("changes", "key", "name"), QUANTIZED, ids=repr)
def test_weights_of_another_format_are_refused_with_what_to_get(changes, key, name):
    with pytest.raises(ValueError) as caught:
        model_spec(small(**changes))
    assert str(caught.value) == (
        f"config.json: {key}: the weights are quantised by {name}, which is not read: get the model that they were "
        'made from (bfloat16, float16 or float32; dtype="int8" or "int4" quantises it as it loads), or a GGUF file; '
        f"if the file's tensors are none of that, load(..., ignore=({key!r},))")
    assert model_spec(small(**changes), ignore={key}) == model_spec(small())


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("extra", [{"finetuned": True}, {"attn_factor": 0.8782488562869419},
                                   {"extrapolation_factor": 1.0}], ids=repr)
def test_yarn_has_keys_that_are_not_read(extra):
    """As in transformers, whose attention factor is 0.1 ln(factor) + 1 whatever attn_factor says."""
    with_it, without = (model_spec(small("qwen3", rope_scaling=s)).layers[0].mixer.rope for s in (YARN | extra, YARN))
    tables = [rope_table(r.dim, 8, r.theta, scaling=r.scaling) for r in (with_it, without)]
    assert tables[0].cos.tobytes() == tables[1].cos.tobytes() and tables[0].sin.tobytes() == tables[1].sin.tobytes()
    assert tables[0].cos[0, 0] == np.float32(0.1 * math.log(4.0) + 1)


def test_a_rotation_that_cannot_be_is_an_error_of_the_file():
    for settings, message in (({"type": "linear"}, "needs factor"), (YARN | {"surprise": 1}, "scaling has surprise"),
                              ({"type": "magic"}, "unknown rope_type 'magic'")):
        with pytest.raises(ValueError, match=f"^config.json: rope_table: .*{message}"):
            model_spec(small(rope_scaling=settings))
    assert model_spec(small(rope_scaling=YARN | {"surprise": 1}), ignore=("surprise",)) == model_spec(
        small(rope_scaling=YARN))


def test_ignored_keys_count_as_absent_within_objects_too():
    text = small("gemma3_text") | {"surprise": 1}
    assert model_spec({"model_type": "gemma3", "text_config": text, "other": 2}, ignore=("surprise", "other")
                      ) == model_spec(small("gemma3_text"))
    with pytest.raises(ValueError, match="^config.json: hidden_size is None"):
        model_spec(small(), ignore=("hidden_size", "never seen"))
