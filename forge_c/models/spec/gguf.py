"""A GGUF's metadata as the config.json that Hugging Face would have, so that the families' functions read both.

What the converter has changed in the weights is undone here where it is a number (norms hold 1 + w already), and by
forge_c.models.weights.gguf where it is an order (rows of queries and keys).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np

from forge_c.checks import short
from forge_c.formats.gguf import GGUF, Strings
from forge_c.models.spec import gguf_states as states
from forge_c.models.spec.families import model_spec
from forge_c.models.spec.kinds import Attention, GatedMLP, LayerSpec, Mamba, Mamba2, ModelSpec, Norm, ShortConv
from forge_c.models.spec.reader import MAX_HEADS, MAX_LAYERS, MAX_VOCAB, MAX_WIDTH
from forge_c.rotary import rope_table

__all__ = ["ARCHITECTURES", "ROPE_TENSORS", "Architecture", "architecture_of", "gguf_spec"]

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_MOST_CONTEXT = 1 << 40
_OTHER_KINDS = {
    "adapter": "an adapter (LoRA), which changes a model and is none; merge it into its model first",
    "mmproj": "an image or audio encoder (mmproj); load the file of its text model",
    "imatrix": "an importance matrix for a quantiser and no model"}
# Keys of an architecture that say nothing about the maths, or nothing that the tensors' shapes do not say.
_WITHOUT_EFFECT = ("vocab_size", "tensor_data_layout", "pooling_type", "rope.scaling.finetuned", "expert_used_count")


class Keys:
    """The keys of a file's architecture: every value comes out checked, and those that nobody read are known."""

    def __init__(self, file: GGUF, architecture: str) -> None:
        self.file, self.architecture = file, architecture
        self._read: set[str] = set()

    def fail(self, what: str) -> NoReturn:
        raise ValueError(f"{self.file.path}: {what}")

    def name(self, key: str) -> str:
        """As it stands in the file."""
        return f"{self.architecture}.{key}"

    def value(self, key: str, default: Any = None) -> Any:
        self._read.add(self.name(key))
        return self.file.metadata.get(self.name(key), default)

    def integer(self, key: str, most: int, default: int | None = None, *, least: int = 1) -> int:
        return self._integer(key, self.value(key, default), most, least)

    def _integer(self, key: str, value: Any, most: int, least: int = 1) -> int:
        if value is None:
            self.fail(f"{self.name(key)} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.fail(f"{self.name(key)} is {short(value)}, expected an integer from {least} to {most}")
        return value

    def of_each(self, key: str, most: int, layers: int, default: int | None = None, *, least: int = 1) -> list[int]:
        """Of each layer: an integer for all, or an array of one a layer."""
        value = self.value(key, default)
        values = value.tolist() if isinstance(value, np.ndarray) else [value] * layers
        if len(values) != layers:
            self.fail(f"{self.name(key)} has {len(values)} values, expected {layers}, one a layer")
        return [self._integer(key, one, most, least) for one in values]

    def same_of_all(self, key: str, most: int, layers: int, default: int | None = None, *, absent: bool = False) -> int:
        """What all layers have. absent: some may have none, 0; 1 if none has any."""
        values = self.of_each(key, most, layers, default, least=0 if absent else 1)
        found = [value for value in dict.fromkeys(values) if value or not absent] or [1]
        if len(found) > 1:
            self.fail(f"{self.name(key)} is {short(values)}: layers that differ in it are not supported for "
                      f"{self.architecture}")
        return found[0]

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        value = self.value(key, default)
        if value is None:
            self.fail(f"{self.name(key)} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not (
                0 < value < math.inf or zero and value == 0):
            self.fail(f"{self.name(key)} is {short(value)}, expected a number {'>=' if zero else 'above'} 0")
        return float(value)

    def check_all_read(self, ignored: Collection[str]) -> None:
        """ValueError if a key of the architecture is left: it could change the maths."""
        known = self._read | {self.name(key) for key in _WITHOUT_EFFECT} | set(ignored)
        for key, value in self.file.metadata.items():
            if key.startswith(f"{self.architecture}.") and key not in known:
                self.fail(f"{key} is {short(value)}, which may change the maths and is not understood for "
                          f"{self.architecture}; load(..., ignore=({key!r},)) leaves it out")


Config = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """family: the model_type that reads the config. own: what this architecture adds to it, or says instead.
    interleaved: rows of queries and keys rotate as neighbours in the file; whole_heads: all of a head's rows lie so,
    also where only the first rotate. folded: its norms' weights are 1 + w. apart: gate and up of an MLP are two
    matrices, though the folder has one. states: some layers have no attention, or all; without_attention: all.
    rotates: those that have it rotate. norm: what the file calls the last norm. eps: keys of the norms', of which the
    first that is there counts."""

    family: str
    own: Callable[[Keys, Config], Config]
    interleaved: bool = False
    whole_heads: bool = False
    folded: bool = False
    apart: bool = False
    states: bool = False
    without_attention: bool = False
    rotates: bool = True
    norm: str = "output_norm"
    eps: tuple[str, ...] = ("attention.layer_norm_rms_epsilon",)


def gguf_spec(file: GGUF, ignored: Collection[str] = ()) -> ModelSpec:
    """The spec of a file's model; ignored: keys that are not understood and may stand there.

    Raises:
        ValueError: an architecture or a key that is not understood, a value out of range, or a file that is no model.
    """
    name = _architecture(file)
    keys, architecture = Keys(file, name), ARCHITECTURES[name]
    config = _common(keys) | {"model_type": architecture.family}
    if not architecture.without_attention:
        config |= _attention(keys, config, architecture)
    config |= architecture.own(keys, config)
    keys.check_all_read(ignored)
    try:
        spec = model_spec(config)
        for layer in spec.layers:
            for rope in (getattr(mixer, "rope", None) for mixer in layer.mixers):
                if rope is not None:  # an impossible rotation is refused before a weight is read
                    rope_table(rope.dim, 1, rope.theta, scaling=rope.scaling)
    except ValueError as error:
        keys.fail(str(error).removeprefix("config.json: "))
    layers = tuple(_as_stored(file, i, layer, architecture) for i, layer in enumerate(spec.layers))
    return replace(spec, layers=layers, head=replace(spec.head, norm=_norm(spec.head.norm, architecture.folded)))


def architecture_of(file: GGUF) -> Architecture:
    """Of a file that gguf_spec has read."""
    return ARCHITECTURES[_architecture(file)]


def _architecture(file: GGUF) -> str:
    """The name of one of ARCHITECTURES."""
    kind, name = file.metadata.get("general.type", "model"), file.metadata.get("general.architecture")
    for one in (kind, "mmproj" if name == "clip" else name):
        if isinstance(one, str) and one in _OTHER_KINDS:
            raise ValueError(f"{file.path}: it is {_OTHER_KINDS[one]}")
    if kind != "model":
        raise ValueError(f"{file.path}: general.type is {short(kind)}, expected model")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"{file.path}: general.architecture is {short(name)}, expected one of "
                         f"{', '.join(ARCHITECTURES)}")
    version = file.metadata.get("general.quantization_version", 2)
    if version != 2:
        raise ValueError(f"{file.path}: general.quantization_version is {short(version)}, expected 2")
    return name


# ---- what all architectures have ------------------------------------------------------------------------------------


def _common(keys: Keys) -> Config:
    if keys.integer("expert_count", MAX_WIDTH, 0, least=0):
        keys.fail(f"{keys.name('expert_count')} is {keys.value('expert_count')}: a mixture of experts, which is not "
                  "supported")
    return {
        "num_hidden_layers": keys.integer("block_count", MAX_LAYERS),
        "hidden_size": keys.integer("embedding_length", MAX_WIDTH),
        "vocab_size": _vocab_size(keys), "tie_word_embeddings": "output.weight" not in keys.file.tensors,
        "max_position_embeddings": keys.integer("context_length", _MOST_CONTEXT),
        "bos_token_id": _token_id(keys.file, "bos"), "eos_token_id": _token_id(keys.file, "eos")}


def _attention(keys: Keys, config: Config, architecture: Architecture) -> Config:
    """Of the layers that have it, and of their MLPs."""
    layers, hidden, some = config["num_hidden_layers"], config["hidden_size"], architecture.states
    heads = keys.same_of_all("attention.head_count", MAX_HEADS, layers, absent=some)
    kv_heads = keys.same_of_all("attention.head_count_kv", MAX_HEADS, layers, heads, absent=some)
    if keys.value("attention.key_length") is None and hidden % heads:
        keys.fail(f"{keys.name('embedding_length')} is {hidden}, expected a multiple of "
                  f"{keys.name('attention.head_count')} {heads}")
    head_dim = keys.integer("attention.key_length", MAX_WIDTH, hidden // heads)
    value_dim = keys.integer("attention.value_length", MAX_WIDTH, head_dim)
    if value_dim != head_dim:
        keys.fail(f"{keys.name('attention.value_length')} is {value_dim}, expected {head_dim} as the keys have")
    if keys.value("attention.causal", True) is not True:
        keys.fail(f"{keys.name('attention.causal')} is {short(keys.value('attention.causal'))}, expected true")
    present = [key for key in architecture.eps if keys.value(key) is not None]
    found = {"head_dim": head_dim, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
             "intermediate_size": keys.same_of_all("feed_forward_length", MAX_WIDTH, layers, absent=some),
             "rms_norm_eps": keys.number((present or architecture.eps)[0])}
    rotates = architecture.rotates
    return found | (_rotation(keys, head_dim, config["max_position_embeddings"]) if rotates else {})


def _vocab_size(keys: Keys) -> int:
    """Rows of the embedding, as many as there are tokens."""
    table, tokens = keys.file.tensors.get("token_embd.weight"), keys.file.metadata.get("tokenizer.ggml.tokens")
    if table is None or len(table.shape) != 2:
        keys.fail(f"tensor token_embd.weight {'is missing' if table is None else f'has shape {table.shape}'}, expected "
                  f"(tokens, {keys.name('embedding_length')}); a file with a vocabulary alone has no model")
    if tokens is not None and not isinstance(tokens, Strings):
        keys.fail(f"tokenizer.ggml.tokens is {short(tokens)}, expected an array of strings")
    if tokens is not None and len(tokens) != table.shape[0]:
        keys.fail(f"tensor token_embd.weight has {table.shape[0]} rows, expected {len(tokens)}, one a token")
    if table.shape[0] > MAX_VOCAB:
        keys.fail(f"tensor token_embd.weight has {table.shape[0]} rows, expected at most {MAX_VOCAB}")
    return table.shape[0]


def _token_id(file: GGUF, which: str) -> int | None:
    """A special token's id; one that the file gives for none, such as -1, is none."""
    value = file.metadata.get(f"tokenizer.ggml.{which}_token_id")
    most = len(file.metadata.get("tokenizer.ggml.tokens", ()))
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < most else None


def _rotation(keys: Keys, head_dim: int, context: int) -> Config:
    """rope_theta, rope_scaling and what else of a config.json the rotation depends on."""
    turned = keys.integer("rope.dimension_count", head_dim, head_dim, least=2)
    if turned % 2:
        keys.fail(f"{keys.name('rope.dimension_count')} is {turned}, expected an even number")
    config: Config = {"rope_theta": keys.number("rope.freq_base", 10000.0)}
    if turned < head_dim:  # the least fraction that gives so many channels when it is rounded down
        config["partial_rotary_factor"] = math.nextafter(turned / head_dim, 1.0)
    original = keys.integer("rope.scaling.original_context_length", _MOST_CONTEXT, context)
    scaling = _scaling(keys, turned, original)
    return config | ({"rope_scaling": scaling} if scaling else {})


def _scaling(keys: Keys, turned: int, original: int) -> Config:
    """As rope_scaling in a config.json; empty for none."""
    kind = keys.value("rope.scaling.type", "linear")
    given = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0, zero=True), zero=True)
    factor = 1.0 if kind == "none" or not given else given
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    freqs, long, short_ = (_divisors(keys, name, turned // 2) for name in ROPE_TENSORS)
    found: Config
    if kind == "longrope" or long is not None:
        if long is None or short_ is None:
            keys.fail(f"tensor {ROPE_TENSORS[1 if long is None else 2]} is missing, which longrope needs")
        found = {"rope_type": "longrope", "long_factor": long, "short_factor": short_,
                 "original_max_position_embeddings": original}
        has_attention = keys.value("rope.scaling.attn_factor") is not None
        return found | ({"attention_factor": attention} if has_attention else {})
    if attention != 1.0:
        keys.fail(f"{keys.name('rope.scaling.attn_factor')} is {attention}, expected 1 where there are no long factors")
    if kind == "yarn":
        found = _yarn(keys, factor, original)
    elif kind in ("none", "linear"):
        found = {} if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    else:
        keys.fail(f"{keys.name('rope.scaling.type')} is {short(kind)}, expected none, linear, yarn or longrope")
    if freqs is None:
        return found
    if found:
        keys.fail(f"tensor {ROPE_TENSORS[0]} stands beside {keys.name('rope.scaling.type')} {kind}, expected one")
    return {"rope_type": "divided", "divisors": freqs}


def _yarn(keys: Keys, factor: float, original: int) -> Config:
    found: Config = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for name, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow"),
                      ("attention_factor", "yarn_attn_factor")):
        if keys.value(f"rope.scaling.{key}") is not None:
            found[name] = keys.number(f"rope.scaling.{key}")
    extrapolated = keys.number("rope.scaling.yarn_ext_factor", 1.0)
    if extrapolated != 1.0:
        keys.fail(f"{keys.name('rope.scaling.yarn_ext_factor')} is {extrapolated}, expected 1")
    mscale = keys.number("rope.scaling.yarn_log_multiplier", 0.0, zero=True)
    return found | ({"mscale": 1.0, "mscale_all_dim": mscale} if mscale else {})


def _divisors(keys: Keys, name: str, n: int) -> list[float] | None:
    """What each pair's frequency is divided by, if the file has that tensor."""
    tensor = keys.file.tensors.get(name)
    if tensor is None:
        return None
    if tensor.type.name != "F32" or tensor.shape != (n,):
        keys.fail(f"tensor {name} has type {tensor.type.name} and shape {tensor.shape}, expected F32 and {(n,)}")
    values = tensor.read().view(np.float32)
    for i in np.flatnonzero(~((values > 0) & np.isfinite(values)))[:1]:
        keys.fail(f"tensor {name} holds {values[i]} at {i}, expected finite numbers above 0")
    return values.tolist()


# ---- what each has of its own ---------------------------------------------------------------------------------------


def _nothing(keys: Keys, config: Config) -> Config:
    return {}


def _mistral3(keys: Keys, config: Config) -> Config:
    """Without the temperature that grows with the position, which Ministral 3 has."""
    if keys.number("attention.temperature_scale", 0.0, zero=True):
        keys.fail(f"{keys.name('attention.temperature_scale')} is {keys.value('attention.temperature_scale')}: queries "
                  "scaled by their position are not supported")
    keys.value("attention.temperature_length")
    return {"sliding_window": None}


def _gemma2(keys: Keys, config: Config) -> Config:
    layers, window = config["num_hidden_layers"], keys.integer("attention.sliding_window", _MOST_CONTEXT, 4096)
    return {"sliding_window": window, "layer_types": _layer_types(keys, layers, 2),
            "query_pre_attn_scalar": _gemma_scalar(config, 46),
            "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0)}


def _gemma3(keys: Keys, config: Config) -> Config:
    layers, cap = config["num_hidden_layers"], keys.number("final_logit_softcapping", 0.0, zero=True)
    window = keys.integer("attention.sliding_window", _MOST_CONTEXT, 0, least=0)
    types = _layer_types(keys, layers, 6)
    return {"sliding_window": window or None, "layer_types": types if window else ["full_attention"] * layers,
            "rope_local_base_freq": keys.number("rope.freq_base_swa", 10000.0), "final_logit_softcapping": cap or None,
            "query_pre_attn_scalar": _gemma_scalar(config, 62)}


def _gemma_scalar(config: Config, layers_of_27b: int) -> int:
    """Queries are scaled by this ** -0.5. No file says it; it is the head's size, but for the models of 27B."""
    heads = config["num_attention_heads"]
    return config["hidden_size"] // heads if config["num_hidden_layers"] == layers_of_27b else config["head_dim"]


def _layer_types(keys: Keys, layers: int, every: int) -> list[str]:
    """Which layers have a window: a flag for each, or all but every n-th."""
    given = keys.value("attention.sliding_window_pattern", every)
    if isinstance(given, np.ndarray):
        if len(given) != layers:
            keys.fail(f"{keys.name('attention.sliding_window_pattern')} has {len(given)} values, expected {layers}, "
                      "one a layer")
        windowed = [bool(flag) for flag in given]
    else:
        every = keys.integer("attention.sliding_window_pattern", MAX_LAYERS, every)
        windowed = [i % every < every - 1 for i in range(layers)]
    return ["sliding_attention" if one else "full_attention" for one in windowed]


def _phi3(keys: Keys, config: Config) -> Config:
    return {"sliding_window": keys.integer("attention.sliding_window", _MOST_CONTEXT, 0, least=0) or None}


def _granite(keys: Keys, config: Config) -> Config:
    if keys.value("rope.scaling.finetuned", True) is not True:
        keys.fail(f"{keys.name('rope.scaling.finetuned')} is {short(keys.value('rope.scaling.finetuned'))}: a Granite "
                  "without rotation is not supported")
    return {"attention_multiplier": keys.number("attention.scale", 0.0, zero=True) or config["head_dim"] ** -0.5,
            "embedding_multiplier": keys.number("embedding_scale", 0.0, zero=True) or 1.0,
            "residual_multiplier": keys.number("residual_scale", 0.0, zero=True) or 1.0,
            "logits_scaling": keys.number("logit_scale")}


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", _nothing, interleaved=True),
    "mistral3": Architecture("mistral", _mistral3, interleaved=True),
    "qwen2": Architecture("qwen2", _nothing),
    "qwen3": Architecture("qwen3", _nothing),
    "gemma": Architecture("gemma", _nothing, folded=True),
    "gemma2": Architecture("gemma2", _gemma2, folded=True),
    "gemma3": Architecture("gemma3_text", _gemma3, folded=True),
    "phi3": Architecture("phi3", _phi3),
    "smollm3": Architecture("smollm3", _nothing, interleaved=True),
    "granite": Architecture("granite", _granite, interleaved=True),
    "mamba": Architecture("mamba", states.mamba, states=True, without_attention=True),
    "mamba2": Architecture("mamba2", states.mamba2, states=True, without_attention=True),
    "lfm2": Architecture("lfm2", states.lfm2, states=True, norm="token_embd_norm"),
    "falcon-h1": Architecture("falcon_h1", states.falcon_h1),
    "granitehybrid": Architecture("granitemoehybrid", states.granitehybrid, interleaved=True, whole_heads=True,
                                  apart=True, states=True),
    "nemotron_h": Architecture("nemotron_h", states.nemotron_h, interleaved=True, states=True, rotates=False,
                               eps=("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")),
}


# ---- what the tensors say -------------------------------------------------------------------------------------------


def _norm(norm: Norm, folded: bool) -> Norm:
    return replace(norm, offset=0.0) if folded else norm


def _as_stored(file: GGUF, i: int, layer: LayerSpec, architecture: Architecture) -> LayerSpec:
    """The layer as this file has it: there is a bias where there is a tensor of one, and q, k, v are one matrix where
    there is such a tensor. Nothing in the metadata says so."""
    def has(*names: str) -> bool:
        return any(f"blk.{i}.{name}" in file.tensors for name in names)

    mixer, beside = (_mixer_as_stored(one, has, architecture.folded) for one in (layer.mixer, layer.beside))
    mlp = layer.mlp
    if mlp is not None:
        mlp = replace(mlp, bias=has("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"))
    if isinstance(mlp, GatedMLP) and architecture.apart:
        mlp = replace(mlp, fused=False)
    return replace(layer, mixer=mixer, beside=beside, mlp=mlp, norm=_norm(layer.norm, architecture.folded))


def _mixer_as_stored(mixer: Any, has: Callable[..., bool], folded: bool) -> Any:
    if isinstance(mixer, Attention):
        return replace(mixer, fused=has("attn_qkv.weight"), o_bias=has("attn_output.bias"),
                       qkv_bias=mixer.qkv_bias or has("attn_qkv.bias", "attn_q.bias", "attn_k.bias", "attn_v.bias"),
                       qk_norm=None if mixer.qk_norm is None else _norm(mixer.qk_norm, folded))
    if isinstance(mixer, Mamba2) and mixer.out_bias is not None:
        return replace(mixer, bias=has("ssm_in.bias"), out_bias=has("ssm_out.bias"))
    if isinstance(mixer, Mamba | Mamba2):
        return replace(mixer, bias=has("ssm_in.bias", "ssm_out.bias"))
    if isinstance(mixer, ShortConv):
        return replace(mixer, bias=has(*(f"shortconv.{part}.bias" for part in ("conv", "in_proj", "out_proj"))))
    return mixer
