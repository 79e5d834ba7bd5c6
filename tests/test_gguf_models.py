"""GGUF files as models: the same logits as the folder that they were made of, and what is refused says so at once."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from ggml_blocks import QUANTIZED, random_blocks
from gguf_files import Raw, Typed, gguf, write_shards
from gguf_models import ARCHITECTURES, STATES, metadata, neighbours, renamed, rotated_channels, vocabulary, write_gguf
from model_folder import Config, small, tensors, write
from numpy.typing import NDArray
from pace import check_pace

from forge_c.formats.ggml import TYPES, dequantize
from forge_c.formats.gguf import open_gguf
from forge_c.functional import PackedWeight
from forge_c.models import load
from forge_c.models.decoder import STORED
from forge_c.models.parts import StoredSource
from forge_c.models.spec import GatedMLP
from forge_c.models.spec.gguf import ARCHITECTURES as KNOWN
from forge_c.models.spec.gguf import gguf_spec
from forge_c.models.weights import Checkpoint, GGUFCheckpoint
from forge_c.packing import dtype_of_blocks, unpack

IDS = np.arange(24).reshape(2, 12)
LLAMA = small()
# Both sides compute the same in float32, but where a number of the file is the float32 of the folder's.
SAME = 2e-6
# What rounding activations to 8 bits may do to a logit of these small models, whose attention is strong. That the
# weights are exact is tested matrix by matrix.
ROUNDED = 0.15
PLAIN_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
GGUF_NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
              "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
              "mlp.down_proj": "ffn_down"}
SECONDS = 1.0


def config_of(family: str, **changes: Any) -> Config:
    """A small model of those that a GGUF can hold: it has no windows for these, and Gemma's scale is its heads'."""
    own: dict[str, Config] = {"mistral": {"sliding_window": None}, "qwen2": {"use_sliding_window": False},
                              "gemma2": {"query_pre_attn_scalar": 10}, "gemma3_text": {"query_pre_attn_scalar": 10},
                              "bamba": {"rms_norm_eps": 1e-5}, "falcon_h1": {"mamba_norm_before_gate": False}}
    return small(family, **own.get(family, {}) | changes)


def difference(file: Path, folder: Path, dtype: str = "float32", *, found: str | None = None) -> float:
    """Of the logits, relative to the largest, both in a dtype or the file's in another."""
    of_file, of_folder = load(file, found or dtype)(IDS), load(folder, dtype)(IDS)
    return float(np.abs(of_file - of_folder).max() / np.abs(of_folder).max())


def both(tmp_path: Path, config: Config, changes: dict[str, Any] | None = None,
         more: dict[str, Any] | None = None) -> tuple[Path, Path]:
    """The same random model as a file and as a folder."""
    weights = tensors(config)
    return write_gguf(tmp_path / "x.gguf", config, weights, changes, more), write(tmp_path / "folder", config, weights)


# ---- the same model --------------------------------------------------------------------------------------------------


def test_every_architecture_is_tested():
    assert set(ARCHITECTURES.values()) == set(KNOWN)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_logits_are_the_folders(tmp_path, family):
    """Requested as float32, and held as float32 because the file has that."""
    file, folder = both(tmp_path, config_of(family))
    assert difference(file, folder) <= SAME
    assert load(file).dtype == "float32" and load(file)(IDS).tobytes() == load(file, "float32")(IDS).tobytes()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_a_dtype_packs_what_the_folder_packs(tmp_path, family, dtype):
    file, folder = both(tmp_path, config_of(family))
    assert difference(file, folder, dtype) <= SAME and load(file, dtype).dtype == dtype


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_biases_of_any_part(tmp_path, family):
    """There is a bias where there is a tensor; q's and k's are in the order of their rows."""
    file, folder = both(tmp_path, config_of(family, attention_bias=True, mlp_bias=True))
    assert difference(file, folder) <= SAME


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma"])
def test_partial_rotation(tmp_path, family):
    """Only the first channels of a head lie as neighbours."""
    config = config_of(family, partial_rotary_factor=0.5, head_dim=... if family == "phi3" else 12)
    assert difference(*both(tmp_path, config)) <= SAME


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_one_matrix_of_queries_keys_and_values(tmp_path, family):
    """An option of the converter for any architecture; their biases may be one vector, or three."""
    config = config_of(family) | ({"attention_bias": True} if family == "llama" else {})
    weights = tensors(config)
    folder = write(tmp_path / "folder", config, weights)
    plain = renamed(config, weights)
    if family == "llama":
        for i in range(config["num_hidden_layers"]):
            plain.pop(f"blk.{i}.attn_output.bias")
            weights[f"model.layers.{i}.self_attn.o_proj.bias"][:] = 0
        folder = write(tmp_path / "folder", config, weights)
    for endings in (("weight",), ("weight", "bias")):
        fused = dict(plain)
        for i in range(config["num_hidden_layers"]):
            for ending in endings:
                if f"blk.{i}.attn_q.{ending}" in fused:
                    parts = [fused.pop(f"blk.{i}.attn_{p}.{ending}") for p in "qkv"]
                    fused[f"blk.{i}.attn_qkv.{ending}"] = np.concatenate(parts)
        file = tmp_path / "x.gguf"
        file.write_bytes(gguf(metadata(config), fused))
        assert difference(file, folder) <= SAME


@pytest.mark.parametrize("family", ["llama", "gemma", "smollm3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own_is_used(tmp_path, family, tied):
    config = config_of(family, tie_word_embeddings=tied)
    file, folder = both(tmp_path, config)
    assert difference(file, folder) <= SAME and load(file).config.head.tied is tied


@pytest.mark.parametrize("scaling", [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "beta_fast": 16.0, "beta_slow": 2.0,
     "attention_factor": 1.5},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "mscale": 1.0, "mscale_all_dim": 0.5},
])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma3_text"])
def test_scaled_rotation(tmp_path, family, scaling):
    keys = {"type": scaling["rope_type"], "factor": scaling["factor"],
            "original_context_length": scaling.get("original_max_position_embeddings"),
            "yarn_beta_fast": scaling.get("beta_fast"), "yarn_beta_slow": scaling.get("beta_slow"),
            "yarn_attn_factor": scaling.get("attention_factor"), "yarn_log_multiplier": scaling.get("mscale_all_dim")}
    changes = {f"{ARCHITECTURES[family]}.rope.scaling.{key}": value for key, value in keys.items()}
    assert difference(*both(tmp_path, config_of(family, rope_scaling=scaling), changes)) <= SAME


def test_the_old_key_of_a_linear_factor(tmp_path):
    config = config_of("llama", rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert difference(*both(tmp_path, config, {"llama.rope.scale_linear": 4.0})) <= SAME


def test_no_scaling_whatever_the_factor(tmp_path):
    changes = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}
    assert difference(*both(tmp_path, config_of("llama"), changes)) <= SAME


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_a_tensor_of_divisors_is_llama_3s_scaling(tmp_path, family):
    """Each pair's frequency is divided by its own number: what the converter makes of rope_type llama3."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}
    config = config_of(family, rope_scaling=scaling, head_dim=16)
    inv = 1e4 ** (-np.arange(0, 16, 2) / 16)
    keep = np.clip((64 * inv / (2 * np.pi) - 1) / 3, 0, 1)
    divisors = (1 / ((1 - keep) / 8 + keep)).astype(np.float32)
    assert 1.0 in divisors and 8.0 in divisors and len(set(divisors.tolist())) > 2
    file, folder = both(tmp_path, config, more={"rope_freqs.weight": divisors})
    assert difference(file, folder) <= SAME
    assert difference(write_gguf(file, config, tensors(config)), folder) > 1e-3


@pytest.mark.parametrize("original", [64, 8])
def test_longrope(tmp_path, original):
    """Up to the original length the short factors, beyond it the long ones; the file says what the angles grow by."""
    rng = np.random.default_rng(0)
    short, long = (rng.uniform(1, 4, 4).astype(np.float32) for _ in range(2))
    scaling = {"rope_type": "longrope", "short_factor": short.tolist(), "long_factor": long.tolist(),
               "attention_factor": 1.25}
    config = config_of("phi3", rope_scaling=scaling, original_max_position_embeddings=original,
                       max_position_embeddings=128)
    changes = {"phi3.rope.scaling.original_context_length": original, "phi3.rope.scaling.attn_factor": 1.25}
    more = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    file, folder = both(tmp_path, config, changes, more)
    assert difference(file, folder) <= SAME
    unlike = {"rope_factors_long.weight": long + (original < 12), "rope_factors_short.weight": short + (original > 12)}
    assert difference(write_gguf(tmp_path / "y.gguf", config, tensors(config), changes, unlike), folder) > 1e-3
    del changes["phi3.rope.scaling.attn_factor"]  # then it follows from the lengths
    scaling.pop("attention_factor")
    assert difference(*both(tmp_path, config, changes, more)) <= SAME


@pytest.mark.parametrize("pattern", [3, Typed(7, [True, False, True])])
def test_windows_by_number_or_by_layer(tmp_path, pattern):
    types = ["sliding_attention", "sliding_attention", "full_attention"]
    if isinstance(pattern, Typed):
        types[1:] = types[:0:-1]
    config = config_of("gemma3_text", layer_types=types)
    assert difference(*both(tmp_path, config, {"gemma3.attention.sliding_window_pattern": pattern})) <= SAME


def test_gemma_3_without_windows(tmp_path):
    config = config_of("gemma3_text", layer_types=["full_attention"] * 3)
    changes = {"gemma3.attention.sliding_window": None, "gemma3.attention.sliding_window_pattern": None}
    assert difference(*both(tmp_path, config, changes)) <= SAME


def test_gemmas_of_27b_scale_queries_by_their_width(tmp_path):
    config = config_of("gemma2", num_hidden_layers=46, query_pre_attn_scalar=8)
    assert difference(*both(tmp_path, config)) <= SAME


def test_gemma_2_scales_queries_by_the_heads_size(tmp_path):
    config = config_of("gemma2", query_pre_attn_scalar=10)
    changes = {f"gemma2.{key}_logit_softcapping": None for key in ("attn", "final")}
    assert difference(*both(tmp_path, config, changes)) <= SAME


def test_values_a_layer_and_of_any_integer_type(tmp_path):
    config = config_of("llama")
    changes = {"llama.attention.head_count": Typed(5, [4, 4, 4]), "llama.attention.head_count_kv": Typed(10, [2, 2, 2]),
               "llama.feed_forward_length": Typed(4, [40] * 3), "llama.context_length": Typed(10, 1024),
               "llama.block_count": Typed(2, 3), "llama.embedding_length": Typed(5, 32)}
    assert difference(*both(tmp_path, config, changes)) <= SAME


def test_keys_that_say_nothing_are_accepted(tmp_path):
    changes = {"llama.vocab_size": 97, "llama.tensor_data_layout": "Meta AI original pth", "llama.pooling_type": 0,
               "llama.attention.causal": True, "llama.expert_count": 0, "llama.expert_used_count": 0,
               "quantize.imatrix.file": "x", "tool.own.key": [1, 2], "general.file_type": 7,
               "general.quantization_version": 2}
    assert difference(*both(tmp_path, config_of("llama"), changes)) <= SAME


def test_shards(tmp_path):
    config = config_of("llama")
    weights = tensors(config)
    paths = write_shards(tmp_path, "m", metadata(config), renamed(config, weights), 4)
    folder = write(tmp_path / "folder", config, weights)
    assert difference(paths[0], folder) <= SAME and difference(paths[2], folder) <= SAME


def test_the_content_decides_not_the_name(tmp_path):
    file, folder = both(tmp_path, config_of("llama"))
    blob = file.rename(tmp_path / "sha256-0123456789abcdef")
    assert difference(blob, folder) <= SAME
    with pytest.raises(ValueError, match="a safetensors file; pass the folder that it lies in"):
        load(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"config\.json: it begins with b'\{\"mo', expected b'GGUF'"):
        load(folder / "config.json")


def test_text_goes_in_and_comes_out(tmp_path):
    """By the file's own vocabulary. What ends a text are the tokens that the file names, and others known for it."""
    config, n = config_of("llama"), 97
    words = vocabulary(n, bos=94, eos=95, eot=97)
    words["tokenizer.ggml.tokens"] = [*map(chr, range(33, 127)), "</s>", "<|im_end|>", "Ġ"]
    words["tokenizer.ggml.token_type"] = Typed(5, [1] * 94 + [1, 3, 1])
    words |= {"tokenizer.ggml.merges": Typed(8, []), "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.eos_token_id": 7}
    model = load(write_gguf(tmp_path / "x.gguf", config, tensors(config), words))
    assert model.eos_token_ids == {7, 95} and model.config.bos_token_id == 94 and model.config.eos_token_ids == (7,)
    assert model.tokenizer.encode("ab c") == [64, 65, 96, 66]
    assert model.tokenizer.decode([64, 65, 96, 66]) == "ab c"
    assert model.generate("ab", 3) == model.tokenizer.decode(model.generate([64, 65], 3))


def test_a_file_without_a_vocabulary_takes_ids(tmp_path):
    config = config_of("llama")
    model = load(write_gguf(tmp_path / "x.gguf", config, tensors(config), {"tokenizer.ggml.model": "none"}))
    assert model.tokenizer is None and model.eos_token_ids == set() and len(model.generate([1, 2], 3)) == 3


# ---- stored types ----------------------------------------------------------------------------------------------------


def quantised(rng: np.random.Generator, kind: str, shape: tuple[int, int]) -> tuple[Raw, NDArray[np.float32]]:
    """A random matrix in blocks, or in floats, and its numbers."""
    if kind in PLAIN_TYPES:
        w = (rng.standard_normal(shape) * 0.05).astype(PLAIN_TYPES[kind])
        return Raw(TYPES[kind].id, shape, w.tobytes()), w.astype(np.float32)
    raw = random_blocks(rng, kind, *shape, spread=0.004 if TYPES[kind].sub else 0.02)
    return Raw(TYPES[kind].id, shape, raw.tobytes()), dequantize(kind, raw)


BLOCKS = small(hidden_size=256, intermediate_size=512, num_hidden_layers=2, head_dim=64)


def of_blocks(tmp_path: Path, rng: np.random.Generator, config: Config, kinds: dict[str, str]) -> tuple[Path, Path]:
    """A file whose matrices are blocks of the types that their names say, and the folder with their numbers."""
    weights, raws = tensors(config), {}
    for name, weight in renamed(config, weights).items():
        if weight.ndim == 2:
            stem = name.split(".")[-2]
            raws[name], numbers = quantised(rng, kinds.get(stem, kinds["other"]), weight.shape)
            back = {"attn_q": 4, "attn_k": 2}.get(stem)
            weights[hf_name(name)] = numbers if back is None else halves(numbers, back)
    return (write_gguf(tmp_path / "x.gguf", config, weights, more=raws),
            write(tmp_path / "folder", config, weights))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_every_type_of_block(tmp_path, rng, kind):
    """Rows of queries and keys change places as whole blocks; what is not asked for in a dtype is held as it is."""
    file, folder = of_blocks(tmp_path, rng, BLOCKS, {"other": kind})
    assert difference(file, folder) <= SAME
    model = load(file)
    assert model.dtype == dtype_of_blocks(kind)
    assert difference(file, folder, found="auto") < ROUNDED
    assert model.nbytes < load(folder, "bfloat16").nbytes or model.dtype == "bfloat16"


@pytest.mark.parametrize("kinds", [
    {"other": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q6_K"},
    {"other": "Q5_0", "attn_q": "Q4_0", "ffn_up": "Q8_0"},
    {"other": "Q4_1", "attn_q": "Q8_0", "attn_k": "IQ4_NL", "attn_v": "Q5_1", "token_embd": "Q6_K", "output": "Q3_K"},
    {"other": "MXFP4", "attn_k": "TQ2_0", "ffn_gate": "IQ4_XS", "token_embd": "TQ1_0"},
])
def test_parts_of_different_types(tmp_path, rng, kinds):
    file, folder = of_blocks(tmp_path, rng, BLOCKS, kinds)
    assert difference(file, folder) <= SAME and difference(file, folder, found="auto") < ROUNDED
    assert load(file).dtype == dtype_of_blocks(kinds["other"])


@pytest.mark.parametrize("kinds", [{"other": kind} for kind in QUANTIZED] + [
    {"other": "Q4_K", "attn_v": "Q6_K", "ffn_up": "Q8_0"}, {"other": "Q4_0", "attn_k": "F16", "ffn_down": "BF16"}])
def test_matrices_are_held_number_by_number(tmp_path, rng, kinds):
    """What a model multiplies by is what the folder holds, to the bit; only types that no format has are rounded."""
    file, folder = of_blocks(tmp_path, rng, BLOCKS, kinds)
    opened, hf = open_gguf(file), Checkpoint(folder)
    source = StoredSource(GGUFCheckpoint(opened, gguf_spec(opened)), "model.layers.1.", 256, STORED)

    def numbers(name: str, rows: int, columns: int) -> NDArray[np.float32]:
        w = hf.take(f"model.layers.1.{name}.weight", (rows, columns))
        kind = opened.tensors[f"blk.1.{GGUF_NAMES[name]}.weight"].type.name
        rounded = kind not in PLAIN_TYPES and dtype_of_blocks(kind) == "bfloat16"
        return w.astype(ml_dtypes.bfloat16).astype(np.float32) if rounded else w

    def held(packed: Any) -> NDArray[np.float32]:
        several = [packed] if isinstance(packed, PackedWeight) else packed
        return np.concatenate([unpack(one) for one in several], axis=1).T

    sizes = {"self_attn.q_proj": 256, "self_attn.k_proj": 128, "self_attn.v_proj": 128}
    expected = np.concatenate([numbers(name, rows, 256) for name, rows in sizes.items()])
    assert held(source.side_by_side(sizes, 256)).tobytes() == expected.tobytes()
    sides = [numbers(f"mlp.{side}_proj", 512, 256) for side in ("gate", "up")]
    assert held(source.pair(GatedMLP(512, "silu"))).tobytes() == np.concatenate(sides).tobytes()
    assert held(source.packed("mlp.down_proj", 256, 512)).tobytes() == numbers("mlp.down_proj", 256, 512).tobytes()


def test_a_model_says_what_its_file_stores(tmp_path, rng):
    file, _ = of_blocks(tmp_path, rng, BLOCKS, {"other": "Q4_K", "attn_v": "Q6_K", "token_embd": "TQ2_0"})
    layer, table = 2 * (2 * 256 * 256 + 128 * 256 + 3 * 256 * 512), 97 * 256
    assert load(file).info == (
        ("Q4_K", 13, (layer + table) // 256 * 144, "q4_k"), ("Q6_K", 2, 2 * 128 * 210, "q6_k"),
        ("TQ2_0", 1, 97 * 66, "bfloat16"), ("F32", 5, 5 * 256 * 4, "float32"))
    assert [row.held for row in load(file, "int8").info] == ["int8", "int8", "int8", "float32"]
    assert load().info == ()


def test_a_key_may_be_ignored(tmp_path):
    file = write_gguf(tmp_path / "x.gguf", LLAMA, tensors(LLAMA), {"llama.attention.sinks": 4})
    with pytest.raises(ValueError, match=re.escape("load(..., ignore=('llama.attention.sinks',)) leaves it out")):
        load(file)
    plain = write_gguf(tmp_path / "plain.gguf", LLAMA, tensors(LLAMA))
    assert load(file, ignore="llama.attention.sinks")(IDS).tobytes() == load(plain)(IDS).tobytes()


def test_a_tied_table_is_held_once(tmp_path, rng):
    sizes = {}
    for tied in (True, False):
        config = small(vocab_size=4096, hidden_size=256, intermediate_size=32, num_hidden_layers=1, head_dim=8,
                       tie_word_embeddings=tied)
        weights = tensors(config)
        raw, numbers = quantised(rng, "Q6_K", (4096, 256))
        for name in ("model.embed_tokens.weight", "lm_head.weight")[:2 - tied]:
            weights[name] = numbers
        more = {name: raw for name in ("token_embd.weight", "output.weight")[:2 - tied]}
        file = write_gguf(tmp_path / "x.gguf", config, weights, more=more)
        folder = write(tmp_path / "folder", config, weights)
        assert difference(file, folder, found="auto") < ROUNDED
        sizes[tied] = load(file).nbytes
    table = 4096 * 53 * 64 // 16  # 53 lines for 256 k of 16 columns
    assert sizes[False] - sizes[True] == table


def hf_name(name: str) -> str:
    parts = {theirs: ours for ours, theirs in GGUF_NAMES.items()}
    if not name.startswith("blk."):
        return {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight"}[name]
    _, i, stem, ending = name.split(".")
    return f"model.layers.{i}.{parts[stem]}.{ending}"


def halves(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """What `neighbours` undoes."""
    w = weight.reshape(heads, -1, weight.shape[1])
    return np.concatenate([w[:, 0::2], w[:, 1::2]], axis=1).reshape(weight.shape)


def test_halves_and_neighbours(rng):
    w = rng.standard_normal((24, 3))
    assert (neighbours(halves(w, 3), 3, 8) == w).all() and (halves(w, 3) != w).any()


@pytest.mark.parametrize(("stored", "dtype"), [(np.float32, "float32"), (np.float16, "float32"),
                                               (ml_dtypes.bfloat16, "bfloat16")])
def test_auto_holds_floats_as_they_are(tmp_path, stored, dtype):
    config = config_of("llama")
    weights = {n: w.astype(stored).astype(np.float32) if w.ndim == 2 else w for n, w in tensors(config).items()}
    halved = {n: w.astype(stored) for n, w in renamed(config, weights).items() if w.ndim == 2}
    file = write_gguf(tmp_path / "x.gguf", config, weights, more=halved)
    folder = write(tmp_path / "folder", config, weights)
    model = load(file)
    assert model.dtype == dtype and difference(file, folder, dtype) <= SAME


# ---- refused ---------------------------------------------------------------------------------------------------------


def check_refused(path: Path, message: str, kind: type[Exception] = ValueError) -> None:
    def refuse() -> None:
        with pytest.raises(kind, match=message) as caught:
            load(path)
        text = str(caught.value)
        assert caught.type is kind and text.startswith(str(path)) and len(text) < 600 + len(str(path))

    check_pace(refuse, SECONDS)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no architecture": ({"general.architecture": None},
                        "general.architecture is None, expected one of llama, mistral3, "),
    "an unknown architecture": ({"general.architecture": "rwkv7"},
                                "general.architecture is 'rwkv7', expected one of llama"),
    "an adapter": ({"general.type": "adapter"}, r"it is an adapter \(LoRA\), which changes a model .* merge it"),
    "an image encoder": ({"general.architecture": "clip"},
                         "an image or audio encoder .* load the file of its text model"),
    "an image encoder by type": ({"general.type": "mmproj"}, "an image or audio encoder"),
    "an importance matrix": ({"general.type": "imatrix", "general.architecture": None}, "an importance matrix"),
    "another type": ({"general.type": "vocab"}, "general.type is 'vocab', expected model"),
    "an old quantisation": ({"general.quantization_version": 1}, "quantization_version is 1, expected 2"),
    "an unknown key": ({"llama.attention.sinks": 4},
                       "llama.attention.sinks is 4, which may change the maths and is not un"),
    "a window that llama does not have": ({"llama.attention.sliding_window": 8}, "llama.attention.sliding_window is 8"),
    "not causal": ({"llama.attention.causal": False}, "llama.attention.causal is False, expected true"),
    "experts": ({"llama.expert_count": 8, "llama.expert_used_count": 2},
                "llama.expert_count is 8: a mixture of experts"),
    "block_count missing": ({"llama.block_count": None}, "llama.block_count is missing"),
    "block_count 2^31": ({"llama.block_count": 2**31},
                         "llama.block_count is 2147483648, expected an integer from 1 to 1024"),
    "block_count 0": ({"llama.block_count": 0}, "llama.block_count is 0"),
    "block_count a text": ({"llama.block_count": "3"}, "llama.block_count is '3'"),
    "block_count true": ({"llama.block_count": True}, "llama.block_count is True"),
    "fewer layers than the file has": ({"llama.block_count": 2},
                                       r"tensor blk\.2\.\w+\.weight has no place in this model of 2"),
    "more layers than the file has": ({"llama.block_count": 4}, r"tensor blk\.3\.\w+\.weight is missing"),
    "no heads": ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0, expected an integer from 1"),
    "heads of two layers": ({"llama.attention.head_count": [4, 4]},
                            "llama.attention.head_count has 2 values, expected 3"),
    "heads that differ": ({"llama.attention.head_count_kv": [2, 4, 2]},
                          "head_count_kv is .2, 4, 2.: layers that differ"),
    "heads that are no multiple": ({"llama.attention.head_count_kv": 3},
                                   "num_attention_heads is 4, expected a multiple"),
    "3 heads": ({"llama.attention.head_count": 3}, "embedding_length is 32, expected a multiple"),
    "heads of 2^16 channels": ({"llama.attention.key_length": 2**16, "llama.attention.value_length": 2**16,
                                "llama.attention.head_count": 1024, "llama.attention.head_count_kv": 1024},
                               r"tensor blk.0.attn_q.weight has shape \(32, 32\), expected 67108864 rows"),
    "other values than keys": ({"llama.attention.value_length": 4}, "value_length is 4, expected 8 as the keys have"),
    "wider": ({"llama.embedding_length": 64, "llama.attention.key_length": 8, "llama.attention.value_length": 8},
              r"tensor token_embd.weight has shape \(97, 32\), expected \(97, 64\)"),
    "a narrower MLP": ({"llama.feed_forward_length": 39},
                       r"tensor blk.0.ffn_gate.weight has shape \(40, 32\), expected \(39"),
    "rotation of 7": ({"llama.rope.dimension_count": 7}, "rope.dimension_count is 7, expected an even number"),
    "rotation of 16 of 8": ({"llama.rope.dimension_count": 16},
                            "rope.dimension_count is 16, expected an integer from 2 to 8"),
    "sections": ({"llama.rope.dimension_sections": [1, 2]}, "rope.dimension_sections is"),
    "rope theta NaN": ({"llama.rope.freq_base": float("nan")}, "rope.freq_base is nan, expected a number above 0"),
    "rope theta 0": ({"llama.rope.freq_base": 0.0}, "rope.freq_base is 0.0, expected a number above 0"),
    "rope theta 1": ({"llama.rope.freq_base": 1.0}, "base is 1.0, expected more than 1"),
    "eps missing": ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
    "eps infinite": ({"llama.attention.layer_norm_rms_epsilon": float("inf")}, "layer_norm_rms_epsilon is inf"),
    "a rotation of another kind": ({"llama.rope.scaling.type": "ntk"},
                                   "rope.scaling.type is 'ntk', expected none, linear"),
    "longrope without factors": ({"llama.rope.scaling.type": "longrope"}, "tensor rope_factors_long.weight is missing"),
    "angles that grow": ({"llama.rope.scaling.attn_factor": 1.5},
                         "attn_factor is 1.5, expected 1 where there are no long"),
    "tokens fewer than rows": (vocabulary(96), "tensor token_embd.weight has 97 rows, expected 96, one a token"),
    "tokens that are numbers": ({"tokenizer.ggml.tokens": [1, 2]},
                                "tokenizer.ggml.tokens is .*, expected an array of str"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(tmp_path, name):
    changes, message = REFUSED[name]
    check_refused(write_gguf(tmp_path / "x.gguf", LLAMA, tensors(LLAMA), changes), message)


ZEROS = np.zeros((4, 4), np.float32)


@pytest.mark.parametrize(("more", "message"), [
    ({"blk.0.attn_sinks.weight": ZEROS},
     r"tensor blk\.0\.attn_sinks\.weight has no place in this model .*blk\.N\. with "),
    ({"blk.00.attn_q.weight": ZEROS}, r"tensor blk\.00\.attn_q\.weight has no place"),
    ({"cls.output.weight": ZEROS}, r"tensor cls\.output\.weight has no place"),
    ({"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}, r"1 tensors have no place .* first is blk\.0\.attn_q_norm"),
    ({"blk.0.attn_q.bias": np.ones(8, np.float32)}, r"tensor blk\.0\.attn_q\.bias has shape \(8,\), expected 32 rows"),
    ({"blk.0.attn_q.bias": np.ones(32, np.float32)}, r"tensor blk\.0\.attn_k\.bias is missing"),
    ({"blk.0.attn_qkv.weight": ZEROS}, r"tensor blk\.0\.attn_qkv\.weight has shape \(4, 4\), expected 64 rows"),
    ({"rope_freqs.weight": np.ones(3, np.float32)},
     r"tensor rope_freqs.weight has type F32 and shape \(3,\), expected F32"),
    ({"rope_freqs.weight": np.zeros(4, np.float32)}, "tensor rope_freqs.weight holds 0.0 at 0, expected finite"),
    ({"rope_factors_long.weight": np.float32([1, -2, 4, 8])}, "rope_factors_long.weight holds -2.0 at 1, expected"),
    ({"rope_factors_short.weight": np.float32([1, 2, 4, np.nan])}, "rope_factors_short.weight holds nan at 3, expec"),
    ({"token_embd.weight": np.zeros(97, np.float32)},
     r"tensor token_embd.weight has shape \(97,\), expected \(tokens, "),
    ({"output_norm.weight": np.full(32, np.nan, np.float32)}, "tensor output_norm.weight: .*is not finite"),
    ({"blk.1.ffn_up.weight": Raw(26, (40, 32), bytes(5120))},
     r"tensor blk\.1\.ffn_up\.weight has type I32, which is not"),
])
def test_tensors_without_a_place_or_a_number_are_refused(tmp_path, more, message):
    check_refused(write_gguf(tmp_path / "x.gguf", LLAMA, tensors(LLAMA), more=more), message)


@pytest.mark.parametrize("kind", [t for t in QUANTIZED if t not in ("MXFP4", "NVFP4")])
def test_an_infinite_scale_is_refused(tmp_path, rng, kind):
    """It would make logits of NaN; one in one block of one matrix."""
    config = small(hidden_size=256, intermediate_size=256, num_hidden_layers=1, head_dim=16)
    raw, _ = quantised(rng, kind, (256, 256))
    data = bytearray(raw.data)
    d = 3 * TYPES[kind].row_bytes(256) + TYPES[kind].d
    data[d:d + 2] = np.float16(np.inf).tobytes()
    more = {"blk.0.ffn_up.weight": Raw(raw.type, raw.shape, bytes(data))}
    check_refused(write_gguf(tmp_path / "x.gguf", config, tensors(config), more=more),
                  rf"tensor blk\.0\.ffn_up\.weight: block \d+ of {kind} has a scale that is not finite")


def test_types_that_are_not_read_are_named(tmp_path):
    raw = Raw(16, (40, 256), bytes(40 * 66))
    config = small(hidden_size=256)
    more = {"blk.0.ffn_up.weight": raw}
    check_refused(write_gguf(tmp_path / "x.gguf", config, tensors(config), more=more),
                  r"tensor blk\.0\.ffn_up\.weight has type IQ2_XXS, which is not read; get another quantisation")


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_missing_tensor_is_named_as_the_file_would(tmp_path, family):
    """Any of them but the output, without which the model is tied."""
    config = config_of(family) if ARCHITECTURES[family] in STATES else config_of(family, num_hidden_layers=1)
    found = renamed(config, tensors(config))
    for name in found.keys() - {"output.weight"}:
        path = tmp_path / "x.gguf"
        path.write_bytes(gguf(metadata(config), {n: w for n, w in found.items() if n != name}))
        wanted = name.replace("attn_qkv", "attn_q")  # which a file may have instead
        with pytest.raises(ValueError, match=re.escape(f"{path}: tensor {wanted} ")) as caught:
            load(path)
        assert "missing" in str(caught.value) or "no place" in str(caught.value)


def test_a_qwen2_without_its_biases_is_refused(tmp_path):
    config = config_of("qwen2")
    plain = {name: w for name, w in tensors(config).items() if not name.endswith("q_proj.bias")}
    check_refused(write_gguf(tmp_path / "x.gguf", config, plain),
                  r"tensor blk\.0\.attn_q\.bias is missing")


def test_divisors_beside_another_scaling_are_refused(tmp_path):
    changes = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    more = {"rope_freqs.weight": np.ones(4, np.float32)}
    file = write_gguf(tmp_path / "x.gguf", LLAMA, tensors(LLAMA), changes, more)
    check_refused(file, re.escape("tensor rope_freqs.weight stands beside llama.rope.scaling.type yarn"))


@pytest.mark.parametrize(("family", "changes", "message"), [
    ("mistral", {"mistral3.attention.temperature_scale": 0.1}, "queries scaled by their position are not supported"),
    ("granite", {"granite.rope.scaling.finetuned": False}, "a Granite without rotation is not supported"),
    ("granite", {"granite.logit_scale": None}, "granite.logit_scale is missing"),
    ("granite", {"granite.logit_scale": 0.0}, "granite.logit_scale is 0.0, expected a number above 0"),
    ("gemma2", {"gemma2.attention.sliding_window": 0},
     "gemma2.attention.sliding_window is 0, expected an integer from 1"),
    ("gemma2", {"gemma2.attention.sliding_window_pattern": Typed(7, [True])}, "has 1 values, expected 3, one a layer"),
    ("gemma3_text", {"gemma3.attn_logit_softcapping": 50.0}, "gemma3.attn_logit_softcapping is 50.0, which may change"),
    ("qwen2", {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0,
               "qwen2.rope.scaling.yarn_ext_factor": 4.0}, "yarn_ext_factor is 4.0, expected 1"),
])
def test_what_a_family_does_not_have_is_refused(tmp_path, family, changes, message):
    config = config_of(family)
    check_refused(write_gguf(tmp_path / "x.gguf", config, tensors(config), changes), message)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.gguf"):
        load(tmp_path / "x.gguf")


def test_the_rotated_channels_of_a_config():
    assert rotated_channels(config_of("phi3", partial_rotary_factor=0.5)) == 4
