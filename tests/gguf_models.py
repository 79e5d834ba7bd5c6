"""Model folders' configs and weights as a GGUF converter writes them: the other direction than the library's."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf_files import Raw, Typed, gguf
from model_folder import Config, Tensors
from numpy.typing import NDArray

from forge_c.models.spec import tensor_names

Array = NDArray[Any]
ARCHITECTURES = {"llama": "llama", "mistral": "mistral3", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma",
                 "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3", "smollm3": "smollm3",
                 "granite": "granite", "mamba": "mamba", "falcon_mamba": "mamba", "mamba2": "mamba2", "lfm2": "lfm2",
                 "bamba": "granitehybrid", "granitemoehybrid": "granitehybrid", "nemotron_h": "nemotron_h"}
STATES = ("mamba", "mamba2", "lfm2", "granitehybrid", "nemotron_h")  # with recurrent layers
# Channels of their heads lie as pairs (2i, 2i + 1) in a GGUF
NEIGHBOURS = ("llama", "mistral3", "smollm3", "granite", "granitehybrid", "nemotron_h")
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
          "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
          "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.qkv_proj": "attn_qkv",
          "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
          "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.gate_up_proj": "ffn_up",
          "mlp.down_proj": "ffn_down"}
_BOTH = {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
         "post_feedforward_layernorm": "post_ffw_norm"}


def neighbours(weight: Array, heads: int, rotated: int) -> Array:
    """Rows of each head's rotated channels: of pairs (i, i + half) -> of pairs (2i, 2i + 1)."""
    w = weight.reshape(heads, -1, *weight.shape[1:]).copy()
    first, second = w[:, :rotated // 2].copy(), w[:, rotated // 2:rotated].copy()
    w[:, 0:rotated:2], w[:, 1:rotated:2] = first, second
    return w.reshape(weight.shape)


def head_dim(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def rotated_channels(config: Config) -> int:
    return int(head_dim(config) * config.get("partial_rotary_factor", 1.0))


def metadata(config: Config) -> dict[str, Any]:
    """What a converter says of such a config.json."""
    a = ARCHITECTURES[config["model_type"]]
    if a in STATES:
        keys = _state_keys(a, config)
        return {"general.architecture": a, "general.name": "test"} | {f"{a}.{key}": v for key, v in keys.items()}
    eps = config.get("rms_norm_eps", 1e-5 if a == "phi3" else 1e-6)
    keys: dict[str, Any] = {
        "context_length": config["max_position_embeddings"], "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"], "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"], "attention.layer_norm_rms_epsilon": eps,
        "rope.freq_base": config.get("rope_theta", 2e6 if a == "smollm3" else 1e6 if a == "gemma3" else 1e4)}
    if "head_dim" in config:
        keys |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    if rotated_channels(config) < head_dim(config):
        keys["rope.dimension_count"] = rotated_channels(config)
    if a in ("gemma2", "gemma3", "phi3"):
        keys["attention.sliding_window"] = config.get("sliding_window") or 0
    if a == "gemma3":
        keys["attention.sliding_window_pattern"] = config["sliding_window_pattern"]
    if a == "gemma2":
        keys |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    if a == "granite":
        keys |= {"embedding_scale": config["embedding_multiplier"], "residual_scale": config["residual_multiplier"],
                 "attention.scale": config["attention_multiplier"], "logit_scale": config["logits_scaling"]}
    return {"general.architecture": a, "general.name": "test"} | {f"{a}.{key}": value for key, value in keys.items()}


def _state_keys(a: str, config: Config) -> dict[str, Any]:
    """Of an architecture with recurrent layers: those have no key-value heads."""
    keys: dict[str, Any] = {
        "context_length": config.get("max_position_embeddings", 1 << 20), "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"], "attention.layer_norm_rms_epsilon": 1e-5}
    if a in ("mamba", "mamba2"):
        keys |= {"feed_forward_length": 0, "attention.head_count": 0}
    else:
        attends = attention_layers(config)
        keys |= {"feed_forward_length": config["intermediate_size"], "attention.head_count": 4,
                 "attention.head_count_kv": Typed(5, [2 * one for one in attends]), "rope.dimension_count": 8,
                 "rope.freq_base": 1e6 if a == "lfm2" else 1e4}
    if a == "lfm2":
        width = -(-int(2 * config["intermediate_size"] / 3) // 8) * 8
        return keys | {"shortconv.l_cache": 3, "vocab_size": config["vocab_size"], "feed_forward_length": width}
    heads = next((config[key] for key in ("num_heads", "mamba_n_heads", "mamba_num_heads") if key in config), None)
    rank = config.get("time_step_rank")
    keys |= {"ssm.conv_kernel": config.get("conv_kernel", 4), "ssm.inner_size": 2 * config["hidden_size"],
             "ssm.state_size": 6, "ssm.time_step_rank": heads or (2 if rank == "auto" else rank)}
    if a == "mamba":
        return keys | {"ssm.dt_b_c_rms": config["model_type"] == "falcon_mamba"}
    keys["ssm.group_count"] = _groups(config)
    if a == "granitehybrid":
        keys |= {"rope.scaling.finetuned": config.get("position_embedding_type", "rope") == "rope"}
    if config["model_type"] == "bamba":
        keys["rope.dimension_count"] = 4
    if config["model_type"] == "granitemoehybrid":
        keys |= {"embedding_scale": config["embedding_multiplier"], "residual_scale": config["residual_multiplier"],
                 "attention.scale": config["attention_multiplier"], "logit_scale": config["logits_scaling"],
                 "attention.layer_norm_rms_epsilon": config.get("rms_norm_eps", 1e-6), "expert_count": 0,
                 "expert_shared_feed_forward_length": config["shared_intermediate_size"]}
    if a == "nemotron_h":
        types, width = config["layers_block_type"], config["intermediate_size"]
        keys |= {"attention.key_length": 8, "attention.value_length": 8, "rope.scaling.finetuned": False,
                 "feed_forward_length": Typed(5, [width if t == "mlp" else 0 for t in types])}
    return keys


def _groups(config: Config) -> int:
    return next(config[key] for key in ("n_groups", "mamba_n_groups") if key in config)


def attention_layers(config: Config) -> list[bool]:
    layers, types = config["num_hidden_layers"], config.get("layer_types") or config.get("layers_block_type")
    if config["model_type"] == "bamba":
        return [i in config["attn_layer_indices"] for i in range(layers)]
    return [t in ("attention", "full_attention") for t in types]


def renamed(config: Config, weights: Mapping[str, Array]) -> dict[str, Array]:
    """Weights of a folder by a GGUF's names, in its order of rows, with 1 folded into Gemma's norms."""
    a = ARCHITECTURES[config["model_type"]]
    names = _NAMES | (_BOTH if a in ("gemma2", "gemma3") else {})
    usual = tensor_names(config["model_type"])
    found = {}
    for name, weight in weights.items():
        stem, ending = usual(name).rsplit(".", 1)
        block = ""
        if stem.startswith("model.layers."):
            _, _, i, stem = stem.split(".", 3)
            block = f"blk.{i}."
        if stem == "mixer" or stem.startswith("mixer."):
            found |= {block + theirs: w for theirs, w in _mixer(config, f"{stem}.{ending}", weight).items()}
            continue
        if a == "granitehybrid" and stem == "mlp.gate_up_proj":
            found |= dict(zip((f"{block}ffn_gate.weight", f"{block}ffn_up.weight"), np.split(weight, 2), strict=True))
            continue
        if a in NEIGHBOURS and names[stem] in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if stem.endswith("q_proj") else "num_key_value_heads"]
            rotated = head_dim(config) if a in STATES else rotated_channels(config)
            weight = neighbours(weight, heads, rotated)
        if a.startswith("gemma") and stem.endswith("norm"):
            weight = weight + np.float32(1)
        last = "token_embd_norm" if a == "lfm2" and stem == "model.norm" else names[stem]
        found[f"{block}{last}.{ending}"] = weight
    return found


def _mixer(config: Config, name: str, weight: Array) -> dict[str, Array]:
    """A recurrent mixer's tensor: A itself, a convolution without the axis of 1, a norm by groups."""
    name = name.removeprefix("mixer.")
    heads = config["model_type"] not in ("mamba", "falcon_mamba")
    if config["model_type"] == "lfm2":
        name = name.replace("conv1d", "conv")
        return {f"shortconv.{name}": weight[:, 0] if name == "conv.weight" else weight}
    if name in ("A_log", "D"):
        a = weight if name == "D" else -np.exp(weight)
        return {"ssm_d" if name == "D" else "ssm_a": a[:, None] if heads else a}
    if name == "conv1d.weight":
        return {"ssm_conv1d.weight": weight[:, 0]}
    if name == "norm.weight":
        return {"ssm_norm.weight": weight.reshape(_groups(config), -1)}
    stem, ending = name.replace("dt_bias", "dt.bias").rsplit(".", 1)
    return {f"ssm_{stem.removesuffix('_proj')}.{ending}": weight}


def write_gguf(path: Path, config: Config, weights: Tensors, changes: Mapping[str, Any] | None = None,
               more: Mapping[str, Array | Raw] | None = None) -> Path:
    """A model's file; changes to keys replace, `None` drops; changes and `more` tensors come last."""
    keys = metadata(config) | dict(changes or {})
    tensors = renamed(config, weights) | dict(more or {})
    path.write_bytes(gguf({k: v for k, v in keys.items() if v is not None}, tensors))
    return path


def vocabulary(n: int, **ids: int) -> dict[str, Any]:
    """Tokens that mean nothing, and special ones."""
    special = {f"tokenizer.ggml.{name}_token_id": Typed(5, i) for name, i in ids.items()}
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [f"t{i}" for i in range(n)],
            "tokenizer.ggml.token_type": Typed(5, [1] * n)} | special
