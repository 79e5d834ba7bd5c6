"""Model folders: every way to store the same weights; hostile and damaged files are refused at once and cheaply."""
from __future__ import annotations

import json
import os
import re
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from model_folder import BYTES, FAMILIES, STATE_SPACE, container, small, tensors, write, write_json
from refusal import SPARE, refused
from safetensors.numpy import save_file

from forge_c.models import EMBEDDED, load

BF16 = ml_dtypes.bfloat16
IDS = np.arange(24).reshape(2, 12)
SECONDS = 5.0


def logits(folder: Path, **options: Any) -> bytes:
    return load(folder, **options)(IDS).tobytes()


def check_refused(folder: Path, kind: type[Exception], message: str) -> None:
    """Loading raises exactly this kind of error at once, without allocating what a file merely claims."""
    load(write(folder / "warm", small()))
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    refused(lambda: load(folder), kind, message, size, SECONDS)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", small(), tokenizer=BYTES)


# ---- the same weights, stored in several ways ------------------------------------------------------

@pytest.mark.parametrize("family", [*FAMILIES, *STATE_SPACE])
def test_shards_are_one_model(tmp_path, family):
    one, three = write(tmp_path / "1", small(family)), write(tmp_path / "3", small(family), shards=3)
    assert not (three / "model.safetensors").exists()
    assert logits(one) == logits(three)


@pytest.mark.parametrize("stored", [np.float16, BF16])
def test_half_precision_files_hold_what_they_hold(tmp_path, stored):
    rounded = {name: value.astype(stored).astype(np.float32) for name, value in tensors(small()).items()}
    half = write(tmp_path / "half", small(), {name: value.astype(stored) for name, value in rounded.items()})
    full = write(tmp_path / "full", small(), rounded)
    assert logits(half, dtype="float32") == logits(full) != logits(write(tmp_path / "exact", small()))


@pytest.mark.parametrize(("stored", "dtype"), [(np.float32, "float32"), (np.float16, "float32"), (BF16, "bfloat16")])
def test_auto_dtype(tmp_path, stored, dtype):
    model = load(write(tmp_path, small(), dtype=stored))
    assert model.dtype == dtype
    assert logits(tmp_path) == logits(tmp_path, dtype=dtype)


def test_one_wider_tensor_makes_it_float32(tmp_path):
    weights = tensors(small(), dtype=BF16)
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(np.float32)
    assert load(write(tmp_path, small(), weights)).dtype == "float32"


def test_bfloat16_packing_rounds_a_float32_file(tmp_path):
    weights = tensors(small())
    matrices = {name: value.astype(BF16) if value.ndim == 2 else value for name, value in weights.items()}
    full, rounded = write(tmp_path / "full", small(), weights), write(tmp_path / "rounded", small(), matrices)
    assert logits(full, dtype="bfloat16") == logits(rounded, dtype="bfloat16") != logits(full)
    assert load(full, "bfloat16").nbytes < 0.6 * load(full).nbytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tied_is_untied_with_the_embedding_as_head(tmp_path, dtype):
    weights = tensors(small(tie_word_embeddings=True))
    tied = write(tmp_path / "tied", small(tie_word_embeddings=True), weights)
    untied = write(tmp_path / "untied", small(), weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    assert logits(tied, dtype=dtype) == logits(untied, dtype=dtype)


def test_a_tied_model_may_store_its_head_too(tmp_path):
    config, weights = small(tie_word_embeddings=True), tensors(small(tie_word_embeddings=True))
    plain = write(tmp_path / "plain", config, weights)
    both = write(tmp_path / "both", config, weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    assert logits(plain) == logits(both)


def test_a_fused_checkpoint_is_the_same_model(tmp_path):
    """phi3 is llama with q, k, v and gate, up stored as one matrix each."""
    weights, fused = tensors(small()), {}
    for name, value in weights.items():
        layer = name.rsplit(".", 3)[0]
        if ".self_attn.q_proj" in name:
            parts = [weights[f"{layer}.self_attn.{p}_proj.weight"] for p in "qkv"]
            fused[f"{layer}.self_attn.qkv_proj.weight"] = np.concatenate(parts)
        elif ".mlp.gate_proj" in name:
            parts = [weights[f"{layer}.mlp.{p}_proj.weight"] for p in ("gate", "up")]
            fused[f"{layer}.mlp.gate_up_proj.weight"] = np.concatenate(parts)
        elif not re.search(r"\.(k|v|up)_proj", name):
            fused[name] = value
    phi3 = write(tmp_path / "phi3", small("phi3", rms_norm_eps=1e-6), fused)
    assert logits(phi3) == logits(write(tmp_path / "llama", small(), weights))


def test_buffers_of_older_exporters_are_ignored(tmp_path):
    weights = tensors(small())
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float64)}
    assert logits(write(tmp_path / "a", small(), weights | extra)) == logits(write(tmp_path / "b", small(), weights))


def test_header_padding_and_metadata(folder):
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length]) | {"__metadata__": {"format": "pt", "x": "y"}}
    before = logits(folder)
    (folder / "model.safetensors").write_bytes(container(json.dumps(header).encode() + b" " * 7, data[8 + length :]))
    assert logits(folder) == before


def test_what_a_model_says_of_itself(folder):
    model = load(str(folder))
    assert model.config.model_type == "llama" and model.dtype == "float32"
    assert repr(model) == ("Model(model_type='llama', layers=3, hidden_size=32, heads=4/2, vocab_size=97, "
                           "dtype='float32')")
    matrices = 97 * 32 * 2 + 3 * (64 * 32 + 32 * 32 + 3 * 32 * 40)
    assert 4 * matrices <= model.nbytes <= 4 * matrices * 1.5


def test_the_embedded_model_is_a_folder_too():
    model = load()
    ids = np.arange(8)[None]
    assert model(ids).tobytes() == load(EMBEDDED)(ids).tobytes()
    assert model.tokenizer is not None and model.config.vocab_size == 256


@pytest.mark.parametrize(("settings", "expected"), [
    (None, {5}), ({"eos_token_id": 7}, {7}), ({"eos_token_id": [7, 8]}, {7, 8}), ({"eos_token_id": None}, {5}),
    ({"eos_token_id": "x"}, {5}), ({"eos_token_id": [True, -1]}, {5}), ([1], {5}), ({}, {5}),
])
def test_generation_config_knows_the_end_of_text(tmp_path, settings, expected):
    write(tmp_path, small(eos_token_id=5))
    if settings is not None:
        write_json(tmp_path / "generation_config.json", settings)
    assert load(tmp_path).eos_token_ids == expected


def test_a_context_of_two_billion_tokens_costs_nothing(tmp_path):
    write(tmp_path, small(max_position_embeddings=2 ** 31))
    tracemalloc.start()
    try:
        model = load(tmp_path)
        assert model.new_cache().max_seq_len == 4096
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


# ---- what is missing or does not fit ---------------------------------------------------------------

@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "phi3", "qwen2", "qwen3"])
def test_every_tensor_is_needed_and_checked(tmp_path, family):
    config = small(family, num_hidden_layers=1)
    weights = tensors(config)
    for name, value in weights.items():
        rest = {other: tensor for other, tensor in weights.items() if other != name}
        with pytest.raises(ValueError) as caught:
            load(write(tmp_path, config, rest))
        assert str(caught.value) == f"{tmp_path}: tensor {name} is missing"
        longer = np.concatenate([value, value[:1]])
        with pytest.raises(ValueError) as caught:
            load(write(tmp_path, config, weights | {name: longer}))
        assert str(caught.value) == (f"{tmp_path / 'model.safetensors'}: {name} has shape {longer.shape}, expected "
                                     f"{value.shape} from config.json")


@pytest.mark.parametrize("name", ["model.layers.3.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias",
                                  "model.layers.0.self_attn.q_norm.weight", "lm_head.bias", "x"])
def test_a_tensor_without_a_place_is_refused(tmp_path, name):
    """Ignoring it would compute another model."""
    extra = {name: np.ones(32, np.float32), "zzz": np.ones(1, np.float32)}
    with pytest.raises(ValueError) as caught:
        load(write(tmp_path, small(), tensors(small()) | extra))
    assert str(caught.value) == f"{tmp_path}: 2 tensors have no place in this model, the first is {name}"


@pytest.mark.parametrize("dtype", [np.int64, np.float64, np.int8, np.uint8, np.bool_, np.int32])
def test_other_dtypes_are_refused(tmp_path, dtype):
    name = "model.layers.1.mlp.up_proj.weight"
    weights = tensors(small())
    weights[name] = weights[name].astype(dtype)
    check_refused(write(tmp_path, small(), weights), ValueError,
            rf"model.safetensors: {name} has dtype \w+, expected one of F32, F16, BF16$")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F99", "", "f32"])
def test_dtypes_numpy_does_not_know_are_refused(folder, dtype):
    change_header(folder, lambda header: header["model.norm.weight"].update(dtype=dtype, shape=[128]))
    check_refused(folder, ValueError, "model.safetensors")


def test_transposed_matrices_are_refused(tmp_path):
    name = "model.layers.0.mlp.down_proj.weight"
    weights = tensors(small())
    weights[name] = np.ascontiguousarray(weights[name].T)
    check_refused(write(tmp_path, small(), weights), ValueError, r"has shape \(40, 32\), expected \(32, 40\)")


def test_scalars_and_extra_axes_are_refused(tmp_path):
    for value in (np.array(1.0, np.float32), np.ones((1, 32), np.float32), np.ones((0,), np.float32)):
        check_refused(write(tmp_path, small(), tensors(small()) | {"model.norm.weight": value}), ValueError,
                re.escape(f"model.norm.weight has shape {value.shape}, expected (32,)"))


def test_sizes_of_the_config_are_not_allocated(tmp_path):
    write(tmp_path, small(hidden_size=1 << 20, num_attention_heads=1024, num_key_value_heads=1024,
                          vocab_size=1 << 22, num_hidden_layers=1024), tensors(small()))
    check_refused(tmp_path, ValueError, r"has shape \(97, 32\), expected \(4194304, 1048576\) from config.json")


@pytest.mark.parametrize(("settings", "message"), [
    ({"rope_scaling": {"rope_type": "magic"}}, "unknown rope_type 'magic'"),
    ({"rope_scaling": {"rope_type": 5}}, "rope_type"),
    ({"rope_scaling": {"rope_type": ["yarn"], "factor": 2.0}}, "rope_type"),
    ({"rope_parameters": {"rope_type": {"a": 1}}}, "rope_type"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "surprise": 1}}, "surprise"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor"),
    ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"rope_theta": 0.5}, "base"), ({"head_dim": 7}, "dim is 7"),
    ({"rope_scaling": {"type": "linear", "factor": 1e308}}, "factor"),
    ({"rope_scaling": {"type": "dynamic", "factor": 1e308}}, "factor"),
    ({"rope_scaling": {"type": "linear", "factor": 10 ** 400}}, "factor"), ({"rope_theta": 1e308}, "base is 1e.308"),
], ids=repr)
def test_impossible_rope_settings_are_errors_of_the_load(tmp_path, settings, message):
    write(tmp_path, small(**settings))
    (tmp_path / "model.safetensors").unlink()  # refused before anything else is read
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_key_that_is_refused_can_be_ignored(tmp_path):
    plain, folder = write(tmp_path / "plain", small()), write(tmp_path / "model", small(surprise=1))
    (tmp_path / "none").mkdir()
    write_json(tmp_path / "none" / "config.json", small(surprise=1))
    with pytest.raises(ValueError, match="^config.json: surprise is 1"):
        load(tmp_path / "none")
    for names in ("surprise", ["surprise"], {"other", "surprise"}):
        assert logits(folder, ignore=names) == logits(plain)
    for names in (5, None, [5], b"surprise"):
        with pytest.raises(TypeError) as caught:
            load(folder, ignore=names)
        assert str(caught.value) == f'load: ignore is {names!r}, expected names, such as ("key",)'


# ---- folders ---------------------------------------------------------------------------------------

def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load(tmp_path / "none")
    assert str(caught.value) == (f"load: {tmp_path / 'none'} is not a folder; "
                                 "`hf download ORG/NAME --local-dir DIR` makes one")


def test_no_config(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load(tmp_path)
    assert str(caught.value) == f"load: {tmp_path} has no config.json"


@pytest.mark.parametrize("dtype", ["int3", "float16", "", None, 32])
def test_unknown_packing(folder, dtype):
    with pytest.raises(ValueError) as caught:
        load(folder, dtype)
    assert str(caught.value) == f"load: dtype is {dtype!r}, expected auto, float32, bfloat16, int8, int4, q4_1, "\
        "q5_0, q5_1, q8_0, q4_k, q5_k, q6_k"


@pytest.mark.parametrize("dtype", [np.float32, np.dtype(np.float32), ml_dtypes.bfloat16, np.int8])
def test_numpys_dtypes_are_dtypes(folder, dtype):
    assert load(folder, dtype).dtype == np.dtype(dtype).name


def test_the_package_lists_what_is_meant_for_users():
    import forge_c.models

    assert dir(forge_c.models) == sorted(forge_c.models.__all__) and "np" not in dir(forge_c.models)


def test_how_inputs_of_integer_matrices_are_rounded(folder):
    """By default as pack has it, so the last projection of an int4 model, which is int8, to 12 bits."""
    exact = load(folder)(IDS)
    found = {(dtype, a): load(folder, dtype, activations=a)(IDS) for dtype in ("int8", "int4")
             for a in (None, "int8", "int12")}
    assert found["int8", None].tobytes() == found["int8", "int12"].tobytes()
    assert len({found["int4", a].tobytes() for a in (None, "int8", "int12")}) == 3
    rough, fine = (np.linalg.norm(found["int8", a] - exact) for a in ("int8", "int12"))
    assert 0 < fine < rough < 0.1 * np.linalg.norm(exact)


def test_a_rounding_that_does_not_fit(folder):
    with pytest.raises(ValueError, match="^load: activations is 'int9', expected one of int8, int12$"):
        load(folder, "int8", activations="int9")
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ValueError, match=f"^load: activations is 'int8', expected None for {dtype}$"):
            load(folder, dtype, activations="int8")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_not_opened(folder, tmp_path, name):
    trace = tmp_path / "executed"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(f"cbuiltins\nopen\n(V{trace}\nVw\ntR.".encode())
    check_refused(folder, FileNotFoundError,
            rf"model.safetensors: no such file; {name} is not read: only safetensors is safe to open; transformers ")
    assert not trace.exists()


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    check_refused(folder, FileNotFoundError, "model.safetensors: no such file$")


def test_code_in_the_folder_is_not_executed(folder, tmp_path, monkeypatch):
    trace = tmp_path / "executed"
    names = ("modeling_x", "configuration_x", "tokenization_x", "config", "model", "tokenizer", "sitecustomize",
             "__init__", "tokenizers", "jinja2")
    for name in names:
        (folder / f"{name}.py").write_text(f"open({str(trace)!r}, 'w').write('{name}')\n")
    write_json(folder / "config.json", small() | {
        "auto_map": {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M"},
        "architectures": ["modeling_x.M"], "_name_or_path": str(folder / "modeling_x.py")})
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "tokenization_x.T", "auto_map": {
        "AutoTokenizer": ["tokenization_x.T", None]}})
    monkeypatch.chdir(folder)
    model = load(folder)
    model.generate([1, 2], 2)
    assert not trace.exists()
    assert not {"modeling_x", "configuration_x", "tokenization_x"} & sys.modules.keys()


# ---- the index -------------------------------------------------------------------------------------

@pytest.fixture
def sharded(tmp_path):
    return write(tmp_path / "model", small(), shards=2)


SHARDS = [f"model-{i}-of-00002.safetensors" for i in ("00001", "00002")]


def change_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    document = json.loads(path.read_text())
    change(document["weight_map"])
    write_json(path, document)


def test_a_missing_shard(sharded):
    (sharded / SHARDS[1]).unlink()
    check_refused(sharded, FileNotFoundError, f"{SHARDS[1]}: no such file, which the index names$")


@pytest.mark.parametrize("where", ["../other.safetensors", "../../x.safetensors", "{parent}/other.safetensors",
                                   "sub/other.safetensors", "./other.safetensors", "link/other.safetensors", "..", "",
                                   "other.bin", "other.safetensors/", None, 5, ["other.safetensors"]], ids=repr)
def test_an_index_cannot_point_outside(sharded, where):
    weights = {"model.norm.weight": np.ones(32, np.float32)}
    (sharded / "sub").mkdir()
    (sharded / "link").symlink_to(sharded.parent, target_is_directory=True)
    for place in (sharded.parent, sharded.parent.parent, sharded / "sub", sharded):
        save_file(weights, place / "other.safetensors")
    if isinstance(where, str):
        where = where.format(parent=sharded.parent)
    change_index(sharded, lambda home: home.update({"model.norm.weight": where}))
    check_refused(sharded, ValueError, re.escape(
        f"model.safetensors.index.json: model.norm.weight is in {where!r}, expected a .safetensors file of the folder"))


def test_an_index_that_promises_too_much(sharded):
    change_index(sharded, lambda home: home.update({"model.extra": SHARDS[0]}))
    check_refused(sharded, ValueError, f"{SHARDS[0]}: tensor model.extra is missing, which the index promises")


def test_an_index_that_is_wrong_about_a_shard(sharded):
    change_index(sharded, lambda home: home.update({"model.norm.weight": next(
        s for s in SHARDS if s != home["model.norm.weight"])}))
    check_refused(sharded, ValueError, "tensor model.norm.weight is missing, which the index promises")


def test_a_tensor_in_two_shards(sharded):
    for shard in SHARDS:
        path = sharded / shard
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        header["twice"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
        path.write_bytes(container(header, body + bytes(4)))
    check_refused(sharded, ValueError, f"{SHARDS[1]}: tensor twice stands also in {SHARDS[0]}")


@pytest.mark.parametrize("document", [[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": None}, 5, None],
                         ids=repr)
def test_an_index_of_another_form(sharded, document):
    write_json(sharded / "model.safetensors.index.json", document)
    check_refused(sharded, ValueError, "model.safetensors.index.json: expected an object with a weight_map$")


# ---- JSON ------------------------------------------------------------------------------------------

HOSTILE_JSON = {
    "empty": (b"", "not valid JSON"), "cut": (b'{"model_type": "lla', "not valid JSON"),
    "twice": (b'{"model_type": "llama", "a": 1, "a": 1}', "a key stands twice in one object"),
    "twice inside": (b'{"rope_scaling": {"factor": 1, "factor": 2}}', "a key stands twice in one object"),
    "lists": (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
    "objects": (b'{"a": ' * 200_000, "nested too deeply"),
    "closed lists": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "digits": (b'{"a": ' + b"9" * 1_000_000 + b"}", "not valid JSON"),
    "no UTF-8": (b'{"a": "\xff\xfe"}', "not valid JSON"), "NUL": (bytes(64), "not valid JSON"),
    "after": (b'{"a": 1} x', "not valid JSON"), "many lists": (b'{"a": [' + b"[]," * 600_000 + b"[]]}", ""),
    "many objects": (b'{"a": [' + b"{}," * 600_000 + b"{}]}", ""),
    "many keys": (b"{" + b",".join(b'"%d":1' % i for i in range(1_100_000)) + b"}", ""),
}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json",
                                  "model.safetensors.index.json"])
@pytest.mark.parametrize("case", HOSTILE_JSON)
def test_hostile_json(folder, case, name):
    text, message = HOSTILE_JSON[case]
    (folder / name).write_bytes(text)
    check_refused(folder, ValueError, f"{name}.*{message}")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_json_beyond_16_mib_is_not_read(folder, name):
    with open(folder / name, "wb") as file:
        file.truncate((16 << 20) + 1)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as caught:
            load(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value) == f"{folder / name}: 16777217 bytes, expected at most 16777216"
    assert peak < SPARE


# ---- safetensors headers ---------------------------------------------------------------------------

def change_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    path.write_bytes(container(header, data[8 + length :]))


def test_a_file_cut_anywhere(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    ends = sorted(start + info["data_offsets"][1] for name, info in json.loads(data[8:start]).items()
                  if name != "__metadata__")
    cuts = {0, 1, 7, 8, 9, 8 + (start - 8) // 2, start - 1, start, start + 1, len(data) - 1, ends[0] - 1, ends[-2] + 1}
    for cut in sorted(cuts | set(ends[:-1]) | {end - 64 for end in ends}):
        path.write_bytes(data[:cut])
        check_refused(folder, ValueError, re.escape(str(path)))
    path.write_bytes(data)
    assert load(folder).dtype == "float32"


def test_bytes_after_the_last_tensor(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    check_refused(folder, ValueError, re.escape(str(path)))


@pytest.mark.parametrize("length", [2 ** 64 - 1, 2 ** 63, 2 ** 63 - 1, 2 ** 32, 2 ** 31, 100 << 20, 10 ** 6, 0, 1, 2],
                         ids=str)
def test_a_header_length_that_lies(folder, length):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(length.to_bytes(8, "little") + data[8:])
    check_refused(folder, ValueError, re.escape(str(path)))


def test_a_header_longer_than_the_file_is_not_read(folder):
    path = folder / "model.safetensors"
    path.write_bytes(container(b"{}", length=2 ** 64 - 1))
    with pytest.raises(ValueError) as caught:
        load(folder)
    assert str(caught.value) == f"{path}: the header claims {2 ** 64 - 1} bytes of a file of 10"


HOSTILE_HEADERS: dict[str, Any] = {case: text for case, (text, _) in HOSTILE_JSON.items()} | {
    "list": [], "number": 5, "null": None, "no tensors": {}, "only metadata": {"__metadata__": {}},
    "metadata of numbers": {"__metadata__": {"a": 1}}, "tensor is a list": {"a": []}, "tensor is null": {"a": None},
    "same tensor twice": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                         b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "same field twice": b'{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}',
    "NaN": b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("case", HOSTILE_HEADERS)
def test_hostile_headers(folder, case):
    (folder / "model.safetensors").write_bytes(container(HOSTILE_HEADERS[case], bytes(4)))
    check_refused(folder, ValueError, re.escape(str(folder)))


NORM = "model.norm.weight"
HOSTILE_TENSORS: dict[str, dict[str, Any]] = {
    "no dtype": {"dtype": ...}, "no shape": {"shape": ...}, "no offsets": {"data_offsets": ...},
    "one offset": {"data_offsets": [0]}, "three offsets": {"data_offsets": [0, 128, 256]},
    "offsets back to front": {"data_offsets": [128, 0]}, "offsets outside": {"data_offsets": [2 ** 40, 2 ** 40 + 128]},
    "negative offsets": {"data_offsets": [-128, 0]}, "fractional offsets": {"data_offsets": [0.5, 128.5]},
    "offsets of 2^63": {"data_offsets": [2 ** 63, 2 ** 63 + 128]},
    "offsets that wrap": {"data_offsets": [2 ** 64 - 64, 64]},
    "offsets over another": {"data_offsets": [0, 128]}, "empty offsets": {"data_offsets": [0, 0]},
    "too many elements": {"shape": [33]}, "too few elements": {"shape": [31]}, "negative shape": {"shape": [-32]},
    "negative twice": {"shape": [-4, -8]}, "fractional shape": {"shape": [32.0]}, "text shape": {"shape": "32"},
    "text in shape": {"shape": ["32"]}, "null shape": {"shape": None}, "scalar shape": {"shape": 32},
    "product overflows": {"shape": [2 ** 42 + 1, 2 ** 22]}, "product wraps to 32": {"shape": [2 ** 59 + 1, 32]},
    "product wraps to 0": {"shape": [2 ** 32, 2 ** 32]}, "bytes wrap": {"shape": [2 ** 62]},
    "huge and none": {"shape": [2 ** 64 - 1, 0]}, "over 2^64": {"shape": [2 ** 64]}, "many axes": {"shape": [1] * 5000},
    "dtype null": {"dtype": None}, "dtype list": {"dtype": ["F32"]}, "another width": {"dtype": "F16"},
    "offsets beyond 2^64": {"data_offsets": [10 ** 30, 10 ** 30]},
}


@pytest.mark.parametrize("case", HOSTILE_TENSORS)
def test_hostile_tensors(folder, case):
    def change(header: dict[str, Any]) -> None:
        header[NORM] = {k: v for k, v in (header[NORM] | HOSTILE_TENSORS[case]).items() if v is not ...}

    change_header(folder, change)
    check_refused(folder, ValueError, re.escape(str(folder)))


def test_tensors_that_share_bytes(folder):
    def change(header: dict[str, Any]) -> None:
        header["model.layers.0.input_layernorm.weight"] = header["model.layers.1.input_layernorm.weight"]

    change_header(folder, change)
    check_refused(folder, ValueError, re.escape(str(folder / "model.safetensors")))


def test_bytes_that_belong_to_no_tensor(folder):
    change_header(folder, lambda header: header.pop("model.layers.1.input_layernorm.weight"))
    check_refused(folder, ValueError, re.escape(str(folder)))


def test_tensors_in_any_order(folder):
    before = logits(folder)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    path.write_bytes(container(dict(sorted(header.items(), reverse=True)), data[8 + length :]))
    assert logits(folder) == before


def test_a_config_that_is_a_device(folder):
    (folder / "config.json").unlink()
    os.symlink("/dev/null", folder / "config.json")
    check_refused(folder, FileNotFoundError, "has no config.json")
