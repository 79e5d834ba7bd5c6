"""Write tests/golden/: small models of every family, and the logits that transformers computes for them; and
tests/templates/prompts.json: conversations as it renders them.

    python tools/make_golden.py [CASE ...]       # needs transformers and torch

float32, eager attention, weights as tests/golden_models.py draws them. The transformers_version in a file's config is
the one that made it, 5.23 or 5.24; torch 2.13.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import chat_cases
import golden_models

SMALL = {"vocab_size": 67, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
         "pad_token_id": 0}


def heads(q: int, kv: int, **more: Any) -> dict[str, Any]:
    return {"num_attention_heads": q, "num_key_value_heads": kv, **more}


def scaled(rope_type: str, theta: float = 10000.0, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **parameters}}


def layers(types: str) -> dict[str, Any]:
    return {"layer_types": [f"{name}_attention" for name in types.split()]}


LLAMA3 = scaled("llama3", 5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=32)
LONGROPE = scaled("longrope", short_factor=[1.0 + 0.1 * i for i in range(6)],
                  long_factor=[1.5 + 0.4 * i for i in range(6)], factor=4.0, original_max_position_embeddings=32)

BY_TYPE = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
           "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}

# Families without attention have no sizes of it.
NO_HEADS = {"intermediate_size": ..., "num_attention_heads": ..., "num_key_value_heads": ...,
            "max_position_embeddings": ...}


def mamba(**changes: Any) -> dict[str, Any]:
    return NO_HEADS | {"state_size": 7, "time_step_rank": 5} | changes


def mamba2(**changes: Any) -> dict[str, Any]:
    return NO_HEADS | {"state_size": 9, "num_heads": 8, "head_dim": 12, "n_groups": 2} | changes


def mamba_in_a_hybrid(**changes: Any) -> dict[str, Any]:
    return {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_n_groups": 2, "mamba_d_state": 9} | changes


def nemotron(types: str, **changes: Any) -> dict[str, Any]:
    return {"layers_block_type": types.split(), "num_hidden_layers": ..., "head_dim": 20, "mamba_num_heads": 8,
            "mamba_head_dim": 12, "n_groups": 4, "ssm_state_size": 9} | changes


def zamba(types: str, **changes: Any) -> dict[str, Any]:
    found = [{"m": "linear_attention", "h": "hybrid"}[one] for one in types]
    return {"layers_block_type": found, "num_hidden_layers": len(types), "num_key_value_heads": 4, "mamba_d_state": 9,
            "adapter_rank": 6, "hidden_act": "gelu"} | changes


def griffin(types: str, **changes: Any) -> dict[str, Any]:
    return {"block_types": types.split(), "attention_window_size": 9, "max_position_embeddings": ...} | changes


def conv_layers(types: str) -> dict[str, Any]:
    return {"layer_types": types.split()}


MUP = {"embedding_multiplier": 5.5, "lm_head_multiplier": 0.3, "attention_in_multiplier": 1.3,
       "attention_out_multiplier": 0.9, "key_multiplier": 0.4, "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.6,
       "ssm_multipliers": [0.35, 0.25, 1.5, 0.5, 0.7], "mlp_multipliers": [0.9, 0.6]}

DENSE = {"num_local_experts": 0, "shared_intermediate_size": 56, "embedding_multiplier": 3.0, "logits_scaling": 5.0,
         "residual_multiplier": 0.3, "attention_multiplier": 0.2}

# name: (family, what differs from SMALL, prompt length)
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("Llama", {}, 37),
    "llama_mha_tied": ("Llama", heads(4, 4, tie_word_embeddings=True), 37),
    "llama_gqa3_odd": ("Llama", heads(6, 2, hidden_size=54, head_dim=18, intermediate_size=77, vocab_size=61), 37),
    "llama_gqa4_biases": ("Llama", heads(8, 2, attention_bias=True, mlp_bias=True), 37),
    "llama_mqa8": ("Llama", heads(8, 1, head_dim=10, rms_norm_eps=1e-5), 37),
    "llama3": ("Llama", LLAMA3, 70),
    "llama_long_prompt": ("Llama", {"num_hidden_layers": 2, "vocab_size": 33}, 530),
    "llama_linear": ("Llama", scaled("linear", factor=4.0), 37),
    "llama_dynamic": ("Llama", scaled("dynamic", factor=2.0) | {"max_position_embeddings": 24}, 37),
    "llama_yarn": ("Llama", scaled("yarn", factor=4.0, original_max_position_embeddings=32), 70),
    "mistral_window": ("Mistral", heads(4, 1, sliding_window=7), 37),
    "mistral_window_long": ("Mistral", {"sliding_window": 90, "vocab_size": 33, "num_hidden_layers": 2}, 530),
    "mistral_full": ("Mistral", heads(4, 2, sliding_window=None, head_dim=20), 37),
    "qwen2": ("Qwen2", heads(6, 3), 37),
    "qwen2_window_tied": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1,
                                    "tie_word_embeddings": True}, 37),
    "qwen3": ("Qwen3", heads(6, 2, head_dim=20), 37),
    "qwen3_mqa": ("Qwen3", heads(3, 1, head_dim=16, attention_bias=True, tie_word_embeddings=True), 37),
    "gemma_mqa": ("Gemma", heads(8, 1, head_dim=24), 37),
    "gemma_mha": ("Gemma", heads(2, 2, head_dim=32), 37),
    "gemma2": ("Gemma2", {"head_dim": 24, "sliding_window": 6, "query_pre_attn_scalar": 17}, 37),
    "gemma2_no_softcap": ("Gemma2", heads(4, 4, head_dim=16, sliding_window=11, attn_logit_softcapping=None,
                                          final_logit_softcapping=None, num_hidden_layers=4), 37),
    "gemma3": ("Gemma3", {"head_dim": 24, "sliding_window": 6, "query_pre_attn_scalar": 17}
               | layers("sliding full sliding"), 37),
    "gemma3_scaled_softcap": ("Gemma3", heads(4, 1, head_dim=20, sliding_window=9, num_hidden_layers=4,
                                              final_logit_softcapping=30.0, attn_logit_softcapping=5.0,
                                              rope_parameters=BY_TYPE) | layers("sliding sliding full sliding"), 70),
    "phi3": ("Phi3", {}, 37),
    "phi3_partial_window": ("Phi3", {"sliding_window": 8} | scaled("default", partial_rotary_factor=0.5), 37),
    "phi3_longrope_short": ("Phi3", LONGROPE | {"original_max_position_embeddings": 32,
                                                "max_position_embeddings": 128}, 30),
    "phi3_longrope_long": ("Phi3", LONGROPE | {"original_max_position_embeddings": 32,
                                               "max_position_embeddings": 128}, 37),
    "smollm3": ("SmolLM3", heads(8, 2, num_hidden_layers=4), 37),
    "smollm3_window_untied": ("SmolLM3", {"no_rope_layers": [1, 0, 1], "use_sliding_window": True,
                                          "sliding_window": 5, "tie_word_embeddings": False}, 37),
    "granite": ("Granite", heads(4, 4, embedding_multiplier=3.0, logits_scaling=5.0, residual_multiplier=0.3,
                                 attention_multiplier=0.2, attention_bias=True), 37),
    "granite_tied": ("Granite", heads(6, 2, hidden_size=60, embedding_multiplier=12.0, logits_scaling=8.0,
                                      residual_multiplier=0.22, attention_multiplier=0.0625,
                                      tie_word_embeddings=True), 37),
    "mamba": ("Mamba", mamba(), 37),
    "mamba_biases_untied": ("Mamba", mamba(use_bias=True, use_conv_bias=False, tie_word_embeddings=False,
                                           conv_kernel=3, state_size=16, time_step_rank="auto", expand=3), 37),
    "mamba_long_prompt": ("Mamba", mamba(num_hidden_layers=2, vocab_size=33), 530),
    "falcon_mamba": ("FalconMamba", mamba(mixer_rms_eps=1e-3, conv_kernel=5), 37),
    "mamba2": ("Mamba2", mamba2(), 37),
    "mamba2_limits_biases_tied": ("Mamba2", mamba2(use_bias=True, time_step_limit=(0.6, 0.8), n_groups=1,
                                                   tie_word_embeddings=True, conv_kernel=3), 37),
    "bamba": ("Bamba", mamba_in_a_hybrid(attn_layer_indices=[1]), 37),
    "bamba_biases": ("Bamba", mamba_in_a_hybrid(
        attn_layer_indices=[0, 2], attention_bias=True, mlp_bias=True, mamba_proj_bias=True, mamba_conv_bias=False,
        mamba_n_groups=4, tie_word_embeddings=True), 37),
    "falcon_h1": ("FalconH1", mamba_in_a_hybrid(**MUP, mamba_d_ssm=96), 37),
    "falcon_h1_norm_before_gate_biases": ("FalconH1", mamba_in_a_hybrid(
        **MUP, mamba_d_ssm=None, mamba_rms_norm=True, attention_bias=True, mlp_bias=True, mamba_proj_bias=True,
        projectors_bias=True, mamba_n_groups=4, head_dim=10), 37),
    "falcon_h1_norm_after_gate_tied": ("FalconH1", mamba_in_a_hybrid(
        mamba_n_heads=6, mamba_d_ssm=72, mamba_rms_norm=True, mamba_norm_before_gate=False, mamba_conv_bias=False,
        projectors_bias=True, key_multiplier=0.4, mlp_multipliers=[0.9, 0.6], tie_word_embeddings=True,
        mamba_d_conv=3), 37),
    "granitemoehybrid": ("GraniteMoeHybrid", mamba_in_a_hybrid(**DENSE, position_embedding_type="rope") | layers(
        "linear full linear"), 37),
    "granitemoehybrid_without_rope": ("GraniteMoeHybrid", mamba_in_a_hybrid(
        **DENSE, attention_bias=True, tie_word_embeddings=True, mamba_d_conv=3) | layers("full linear linear"), 37),
    "lfm2": ("Lfm2", {"block_multiple_of": 16} | conv_layers("conv full_attention conv"), 37),
    "lfm2_biases_untied": ("Lfm2", {"block_auto_adjust_ff_dim": False, "conv_bias": True, "conv_L_cache": 5,
                                    "tie_word_embeddings": False} | conv_layers("full_attention conv conv"), 37),
    "nemotron_h": ("NemotronH", nemotron("linear_attention mlp full_attention linear_attention mlp"), 37),
    "nemotron_h_biases": ("NemotronH", nemotron("full_attention linear_attention mlp", use_bias=True, mlp_bias=True,
                                                n_groups=1, use_conv_bias=False, time_step_min=0.7), 37),
    "zamba2": ("Zamba2", zamba("mhhmh", num_mem_blocks=2, mamba_ngroups=2), 37),
    "zamba2_adapted_rope": ("Zamba2", zamba(
        "mhmh", use_shared_attention_adapter=True, use_mem_rope=True, time_step_min=0.7, mamba_d_conv=3), 37),
    "recurrent_gemma": ("RecurrentGemma", griffin("recurrent recurrent attention", num_hidden_layers=4), 37),
    "recurrent_gemma_wide_untied": ("RecurrentGemma", griffin(
        "attention recurrent", **heads(6, 1), intermediate_size=75, lru_width=66, conv1d_width=3, attention_bias=True,
        hidden_activation="gelu", logits_soft_cap=12.0, tie_word_embeddings=False, attention_window_size=20), 37),
    "recurrent_gemma_long_prompt": ("RecurrentGemma", griffin(
        "recurrent attention", num_hidden_layers=3, vocab_size=33, attention_window_size=90), 530),
    "mamba2_long_prompt": ("Mamba2", mamba2(num_hidden_layers=2, vocab_size=33, n_groups=4), 530),
}


def config_class(family: str) -> Any:
    """Of the text model alone, where a family has others too."""
    return getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")


@torch.no_grad()
def make(name: str, family: str, changes: dict[str, Any], seq_len: int) -> None:
    sizes = {key: value for key, value in (SMALL | changes).items() if value is not ...}
    config = config_class(family)(**sizes, attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().float()
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    for parameter_name, parameter in model.named_parameters():
        drawn = golden_models.weight(parameter_name, shapes[parameter_name])
        # Gemma's norms multiply by 1 + weight; the same draw serves, it is only larger.
        parameter.copy_(torch.from_numpy(drawn))
    batch = 1 if seq_len > 100 else 2
    ids = np.random.RandomState(seq_len).randint(0, config.vocab_size, (batch, seq_len))
    logits = model(torch.from_numpy(ids)).logits.numpy()
    saved = json.loads(config.to_json_string(use_diff=True))
    document = {"config": saved, "shapes": {n: list(s) for n, s in shapes.items()}}
    (golden_models.FOLDER / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    np.savez(golden_models.FOLDER / f"{name}.npz", ids=ids.astype(np.int64), logits=logits)
    print(f"{name}: logits {logits.shape}, scale {np.abs(logits).max():.3f}")


def make_chats() -> None:
    """Each conversation by each template; None where transformers raises an error."""
    found: dict[str, dict[str, str | None]] = {}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(
        tokenizers.models.BPE()), **chat_cases.SPECIAL)
    for name, template in chat_cases.TEMPLATES.items():
        found[name] = {}
        for what, (messages, options) in chat_cases.CONVERSATIONS.items():
            try:
                text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
            except Exception as error:
                print(f"{name}, {what}: {type(error).__name__}: {str(error)[:90]}")
                text = None
            found[name][what] = text
    chat_cases.GOLDEN.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    golden_models.FOLDER.mkdir(exist_ok=True)
    make_chats()
    for case, (family_name, difference, length) in CASES.items():
        if sys.argv[1:] and case not in sys.argv[1:]:
            continue
        make(case, family_name, difference, length)
