"""Tiny random model folders, as Hugging Face would write them: config.json, safetensors, tokenizer_config.json."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors.numpy import save_file

Config = dict[str, Any]
Tensors = dict[str, NDArray[Any]]

_SIZES: Config = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
                  "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
_OWN: dict[str, Config] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": {"head_dim": 12},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 10, "sliding_window": 7, "query_pre_attn_scalar": 11},
    "gemma3_text": {"head_dim": 10, "sliding_window": 7, "sliding_window_pattern": 2, "query_pre_attn_scalar": 11},
    "phi3": {},
    "smollm3": {"num_hidden_layers": 4},
    "granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5,
                "logits_scaling": 0.25},
}
FAMILIES = tuple(_OWN)
_GEMMAS = ("gemma", "gemma2", "gemma3_text")
_TIED = (*_GEMMAS, "smollm3")
BYTES = {"tokenizer_class": "ByteTokenizer"}


def small(family: str = "llama", **changes: Any) -> Config:
    """A small config.json of a family; a change to `...` drops the key."""
    merged = {"model_type": family} | _SIZES | _OWN[family] | changes
    return {key: value for key, value in merged.items() if value is not ...}


def tensors(config: Mapping[str, Any], seed: int = 0, dtype: DTypeLike = np.float32) -> Tensors:
    """Random weights under Hugging Face names; matrices are (out, in), and attention is strong enough to matter."""
    rng, family = np.random.default_rng(seed), config["model_type"]
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, config["num_key_value_heads"] * head_dim
    found: Tensors = {}

    def matrix(name: str, rows: int, columns: int, bias: bool = False) -> None:
        gain = 3.0 if name.endswith(("qkv_proj", "q_proj", "k_proj", "o_proj")) else 1.0
        found[f"{name}.weight"] = rng.standard_normal((rows, columns)) * gain * columns ** -0.5
        if bias:
            found[f"{name}.bias"] = rng.standard_normal(rows) * 0.3

    def norm(name: str, n: int = hidden) -> None:
        found[f"{name}.weight"] = rng.uniform(0.6, 1.4, n) - (family in _GEMMAS)

    # Small next to what the layers add, so that a tied model does not just repeat its last token.
    found["model.embed_tokens.weight"] = rng.standard_normal((config["vocab_size"], hidden)) * 0.1
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        norm(f"{layer}.input_layernorm")
        norm(f"{layer}.post_attention_layernorm")
        if family in ("gemma2", "gemma3_text"):
            norm(f"{layer}.pre_feedforward_layernorm")
            norm(f"{layer}.post_feedforward_layernorm")
        if family == "phi3":
            matrix(f"{layer}.self_attn.qkv_proj", queries + 2 * keys, hidden)
            matrix(f"{layer}.mlp.gate_up_proj", 2 * inner, hidden)
        else:
            biased = config.get("attention_bias", family == "qwen2")
            for name, rows in (("q", queries), ("k", keys), ("v", keys)):
                matrix(f"{layer}.self_attn.{name}_proj", rows, hidden, biased)
            for name in ("gate", "up"):
                matrix(f"{layer}.mlp.{name}_proj", inner, hidden, config.get("mlp_bias", False))
        if family in ("qwen3", "gemma3_text"):
            norm(f"{layer}.self_attn.q_norm", head_dim)
            norm(f"{layer}.self_attn.k_norm", head_dim)
        matrix(f"{layer}.self_attn.o_proj", hidden, queries, config.get("attention_bias", False))
        matrix(f"{layer}.mlp.down_proj", hidden, inner, config.get("mlp_bias", False))
    norm("model.norm")
    if not config.get("tie_word_embeddings", family in _TIED):
        matrix("lm_head", config["vocab_size"], hidden)
    return {name: np.ascontiguousarray(value.astype(dtype)) for name, value in found.items()}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write(folder: Path, config: Mapping[str, Any], weights: Tensors | None = None, *, seed: int = 0,
          dtype: DTypeLike = np.float32, shards: int = 1, tokenizer: Mapping[str, Any] | None = None) -> Path:
    """Write a model folder; weights are drawn from the seed unless given. The folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    if tokenizer is not None:
        write_json(folder / "tokenizer_config.json", tokenizer)
    weights = tensors(config, seed, dtype) if weights is None else weights
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    home = {name: names[i % shards] for i, name in enumerate(sorted(weights))}
    for shard in names:
        save_file({name: weights[name] for name in home if home[name] == shard}, folder / shard)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 0}, "weight_map": home})
    return folder


def write_chain(folder: Path, following: Mapping[int, int], *, vocab: int = 256, eos: int | None = None,
                tokenizer: Mapping[str, Any] | None = BYTES) -> Path:
    """A model that after token t is sure of following[t], whatever came before, and of t itself where t is no key.

    Its layer adds nothing: every state is a token's own unit vector, and the output matrix says what follows.
    """
    config = small(vocab_size=vocab, hidden_size=vocab, intermediate_size=16, num_hidden_layers=1, head_dim=4,
                   num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=1 << 20, eos_token_id=eos)
    weights = {name: np.zeros_like(value) for name, value in tensors(config).items()}
    weights["model.embed_tokens.weight"] = np.eye(vocab, dtype=np.float32)
    weights["model.norm.weight"] = np.ones(vocab, np.float32)
    for token in range(vocab):
        weights["lm_head.weight"][following.get(token, token), token] = 1.0
    return write(folder, config, weights, tokenizer=tokenizer)


def following(tokens: Sequence[int]) -> dict[int, int]:
    """What follows what in a text that has no token twice."""
    assert len(set(tokens)) == len(tokens)
    return dict(zip(tokens, tokens[1:], strict=False))


def container(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a safetensors file, with any header and any claim about the header's length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data
