"""Tiny random model folders, as Hugging Face would write them: config.json, safetensors, tokenizer_config.json."""
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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
_NO_HEADS: Config = dict.fromkeys(("intermediate_size", "num_attention_heads", "num_key_value_heads",
                                   "max_position_embeddings"), ...) | {"state_size": 6}
_STATE_SPACE: dict[str, Config] = {
    "mamba": _NO_HEADS | {"time_step_rank": 3},
    "falcon_mamba": _NO_HEADS | {"time_step_rank": "auto", "conv_kernel": 3},
    "mamba2": _NO_HEADS | {"num_heads": 4, "head_dim": 16, "n_groups": 2},
}
_HEADS: Config = {"mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_d_state": 6}
_HYBRIDS: dict[str, Config] = {
    "bamba": _HEADS | {"attn_layer_indices": [1]},
    "falcon_h1": _HEADS | {"mamba_d_ssm": 48, "mamba_rms_norm": True, "ssm_multipliers": [0.5, 0.8, 1.5, 0.6, 0.7],
                           "key_multiplier": 0.6, "ssm_out_multiplier": 0.9, "attention_out_multiplier": 1.2,
                           "embedding_multiplier": 3.0, "lm_head_multiplier": 0.5, "mlp_multipliers": [0.9, 0.7]},
    "granitemoehybrid": _HEADS | _OWN["granite"] | {
        "num_local_experts": 0, "shared_intermediate_size": 40, "position_embedding_type": "rope",
        "layer_types": ["mamba", "attention", "mamba"]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8},
    "nemotron_h": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "mlp", "full_attention",
                                                                 "linear_attention"],
                   "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 6, "head_dim": 8},
    "recurrent_gemma": {"attention_window_size": 9, "lru_width": 24, "intermediate_size": 80,
                        "block_types": ["recurrent", "attention"]},
}
_HYBRIDS["zamba2"] = {"layers_block_type": ["hybrid", "linear_attention", "hybrid"], "num_key_value_heads": 4,
                      "n_mamba_heads": 4, "mamba_ngroups": 2, "mamba_d_state": 6, "adapter_rank": 4,
                      "use_shared_attention_adapter": True, "use_mem_rope": True}
_STATE_SPACE |= _HYBRIDS
STATE_SPACE = tuple(_STATE_SPACE)  # families whose layers have recurrent states, all or some
_OWN |= _STATE_SPACE
_GEMMAS = ("gemma", "gemma2", "gemma3_text")
_TIED = (*_GEMMAS, "smollm3", "mamba", "falcon_mamba", "lfm2", "recurrent_gemma", "zamba2")
BYTES = {"tokenizer_class": "ByteTokenizer"}


def small(family: str = "llama", **changes: Any) -> Config:
    """A small config.json of a family; a change to `...` drops the key."""
    merged = {"model_type": family} | _SIZES | _OWN[family] | changes
    return {key: value for key, value in merged.items() if value is not ...}


def tensors(config: Mapping[str, Any], seed: int = 0, dtype: DTypeLike = np.float32) -> Tensors:
    """Random weights under Hugging Face names; matrices are (out, in), and attention is strong enough to matter."""
    rng, family = np.random.default_rng(seed), config["model_type"]
    if family in STATE_SPACE:
        return _state_space(config, rng, dtype)
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


def _state_space(config: Mapping[str, Any], rng: np.random.Generator, dtype: DTypeLike) -> Tensors:
    """Of families with recurrent layers, by the shapes of their tensors."""
    found: Tensors = {}
    for name, shape in _shapes(config):
        last = name.rpartition(".")[2]
        if last in ("D", "A_log"):
            found[name] = rng.uniform(0.5, 1.5, shape) if last == "D" else rng.uniform(-3, 1, shape)
        elif "norm" in name:
            found[name] = rng.uniform(0.6, 1.4, shape)
        elif len(shape) == 1:
            found[name] = rng.standard_normal(shape) * 0.3 - ("dt" in name) - 3 * ("recurrent_param" in name)
        else:
            # What is shared has norms of its own, which would make much of every error.
            gain = 0.5 if ".shared_transformer." in name or ".linear." in name else 2.0
            found[name] = rng.standard_normal(shape) * (0.1 if "embed" in name else gain * shape[-1] ** -0.5)
    return {name: np.ascontiguousarray(value.astype(dtype)) for name, value in found.items()}


def _shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    family, hidden, vocab = config["model_type"], config["hidden_size"], config["vocab_size"]
    if family == "zamba2":
        yield from _zamba2_shapes(config)
        return
    backbone = family in ("mamba", "falcon_mamba", "mamba2", "nemotron_h")
    root = "backbone" if backbone else "model"
    yield f"{root}.{'embeddings' if backbone else 'embed_tokens'}.weight", (vocab, hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"{root}.layers.{i}"
        kind = _kind(config, i)
        if backbone:
            yield f"{layer}.norm.weight", (hidden,)
        else:
            names = {**dict.fromkeys(("bamba", "falcon_h1"), ("input_layernorm", "pre_ff_layernorm")),
                     "lfm2": ("operator_norm", "ffn_norm"),
                     "recurrent_gemma": ("temporal_pre_norm", "channel_pre_norm")}
            for name in names.get(family, ("input_layernorm", "post_attention_layernorm")):
                yield f"{layer}.{name}.weight", (hidden,)
        if family == "recurrent_gemma":
            yield from ((f"{layer}.{name}", shape) for name, shape in _griffin_shapes(config, kind))
            continue
        for one in ("mamba2", "attention") if kind == "both" else (kind,):
            mixer = "mixer" if backbone else {"attention": "self_attn", "conv": "conv"}.get(one, "mamba")
            for name, shape in _mixer_shapes(config, one):
                yield f"{layer}.{mixer}.{name}", shape
        inner = config.get("intermediate_size")
        if family == "granitemoehybrid":
            yield f"{layer}.shared_mlp.input_linear.weight", (2 * config["shared_intermediate_size"], hidden)
            yield f"{layer}.shared_mlp.output_linear.weight", (hidden, config["shared_intermediate_size"])
        elif not backbone:
            inner = -(-int(2 * inner / 3) // 8) * 8 if family == "lfm2" else inner
            gate, up, down = ("w1", "w3", "w2") if family == "lfm2" else ("gate_proj", "up_proj", "down_proj")
            for name, shape in ((gate, (inner, hidden)), (up, (inner, hidden)), (down, (hidden, inner))):
                yield f"{layer}.feed_forward.{name}.weight", shape
    last = {"bamba": "final_layernorm", "falcon_h1": "final_layernorm", "lfm2": "embedding_norm",
            "recurrent_gemma": "final_norm"}.get(
        family, "norm_f" if backbone else "norm")
    yield f"{root}.{last}.weight", (hidden,)
    if not config.get("tie_word_embeddings", family in _TIED):
        yield "lm_head.weight", (vocab, hidden)


def _zamba2_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """All hybrid layers share the first one's block; adapters are one a layer."""
    hidden, inner, rank = config["hidden_size"], config["intermediate_size"], config["adapter_rank"]
    hybrid = [i for i, one in enumerate(config["layers_block_type"]) if one == "hybrid"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        if i in hybrid:
            yield f"{layer}.linear.weight", (hidden, hidden)
        decoder = f"{layer}.mamba_decoder" if i in hybrid else layer
        yield f"{decoder}.input_layernorm.weight", (hidden,)
        for name, shape in _mixer_shapes(config, "mamba2"):
            yield f"{decoder}.mamba.{name}", shape
    block = f"model.layers.{hybrid[0]}.shared_transformer"
    yield f"{block}.input_layernorm.weight", (2 * hidden,)
    yield f"{block}.pre_ff_layernorm.weight", (hidden,)
    for name in "qkv":
        yield f"{block}.self_attn.{name}_proj.weight", (2 * hidden, 2 * hidden)
    yield f"{block}.self_attn.o_proj.weight", (hidden, 2 * hidden)
    yield f"{block}.feed_forward.gate_up_proj.weight", (2 * inner, hidden)
    yield f"{block}.feed_forward.down_proj.weight", (hidden, inner)
    for i in range(len(hybrid)):
        for name, rows, columns in (*((f"self_attn.linear_{p}", 2 * hidden, 2 * hidden) for p in "qkv"),
                                    ("feed_forward.gate_up_proj", 2 * inner, hidden)):
            yield f"{block}.{name}_adapter_list.{i}.0.weight", (rank, columns)
            yield f"{block}.{name}_adapter_list.{i}.1.weight", (rows, rank)
    yield "model.final_layernorm.weight", (hidden,)


def _kind(config: Mapping[str, Any], i: int) -> str:
    types = config.get("layer_types") or config.get("layers_block_type") or config.get("block_types")
    if config["model_type"] == "recurrent_gemma":
        return str(types[i % len(types)])
    if config["model_type"] == "bamba":
        return "attention" if i in config["attn_layer_indices"] else "mamba2"
    if config["model_type"] == "falcon_h1":
        return "both"
    if types is None:
        return "mamba2" if config["model_type"] == "mamba2" else "mamba"
    return {"mamba": "mamba2", "linear_attention": "mamba2", "full_attention": "attention"}.get(types[i], types[i])


def _griffin_shapes(config: Mapping[str, Any], kind: str) -> list[tuple[str, tuple[int, ...]]]:
    hidden, heads, width = config["hidden_size"], config["num_attention_heads"], config["lru_width"]
    inner, block = config["intermediate_size"] // 2, config["lru_width"] // config["num_attention_heads"]
    mlp = [(f"mlp_block.{side}_proj", rows, columns) for side, rows, columns in (
        ("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner))]
    if kind == "attention":
        kept = [(f"temporal_block.{name}", shape) for name, shape in _mixer_shapes(config, kind)]
        biased = [*mlp, ("temporal_block.o_proj", hidden, None)]
    else:
        kept = [("temporal_block.conv_1d.weight", (width, 1, 4)), ("temporal_block.conv_1d.bias", (width,)),
                ("temporal_block.rg_lru.recurrent_param", (width,))]
        for gate in ("input", "recurrent"):
            kept += [(f"temporal_block.rg_lru.{gate}_gate_weight", (heads, block, block)),
                     (f"temporal_block.rg_lru.{gate}_gate_bias", (heads, block))]
        biased = [*mlp, *((f"temporal_block.linear_{name}", *shape) for name, shape in (
            ("y", (width, hidden)), ("x", (width, hidden)), ("out", (hidden, width))))]
    for name, rows, columns in biased:
        kept += [(f"{name}.bias", (rows,))] + ([] if columns is None else [(f"{name}.weight", (rows, columns))])
    return kept


def _mixer_shapes(config: Mapping[str, Any], kind: str) -> list[tuple[str, tuple[int, ...]]]:
    hidden, inner = config["hidden_size"], config.get("mamba_d_ssm", 2 * config["hidden_size"])
    if kind == "attention":
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        d, lfm = config.get("head_dim") or hidden // heads, config["model_type"] == "lfm2"
        return [("q_proj.weight", (heads * d, hidden)), ("k_proj.weight", (kv_heads * d, hidden)),
                ("v_proj.weight", (kv_heads * d, hidden)),
                ("out_proj.weight" if lfm else "o_proj.weight", (hidden, heads * d)),
                *([("q_layernorm.weight", (d,)), ("k_layernorm.weight", (d,))] if lfm else [])]
    if kind == "conv":
        return [("conv.weight", (hidden, 1, 3)), ("in_proj.weight", (3 * hidden, hidden)),
                ("out_proj.weight", (hidden, hidden))]
    if kind == "mlp":
        width = config["intermediate_size"]
        return [("up_proj.weight", (width, hidden)), ("down_proj.weight", (hidden, width))]

    def of(*keys: str) -> int:
        return int(next(config[key] for key in keys if key in config))

    n = of("state_size", "mamba_d_state", "ssm_state_size")
    width = config.get("conv_kernel", 4)
    if kind == "mamba":
        rank = config["time_step_rank"]
        rank = -(-hidden // 16) if rank == "auto" else rank
        return [("in_proj.weight", (2 * inner, hidden)), ("conv1d.weight", (inner, 1, width)),
                ("conv1d.bias", (inner,)), ("x_proj.weight", (rank + 2 * n, inner)), ("dt_proj.weight", (inner, rank)),
                ("dt_proj.bias", (inner,)), ("A_log", (inner, n)), ("D", (inner,)),
                ("out_proj.weight", (hidden, inner))]
    heads, groups = of("num_heads", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), of(
        "n_groups", "mamba_n_groups", "mamba_ngroups")
    channels = inner + 2 * groups * n
    return [("in_proj.weight", (inner + channels + heads, hidden)), ("conv1d.weight", (channels, 1, width)),
            ("conv1d.bias", (channels,)), ("dt_bias", (heads,)), ("A_log", (heads,)), ("D", (heads,)),
            ("norm.weight", (inner,)), ("out_proj.weight", (hidden, inner))]


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
