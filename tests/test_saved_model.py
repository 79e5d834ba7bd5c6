"""Model.save and what load makes of it: the same model, mapped; nothing of what is damaged or was packed otherwise."""
from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from ggml_blocks import QUANTIZED
from model_folder import BYTES, FAMILIES, STATE_SPACE, small, write, write_json
from test_gguf_models import BLOCKS, of_blocks

from forge_c.functional import CalledPart
from forge_c.models import Model, ModelCache, collect_importance, load, random_model
from forge_c.models.decoder import Decoder
from forge_c.models.saved import HEADER, WEIGHTS
from forge_c.models.spec.document import from_document, to_document

IDS = np.random.default_rng(0).integers(0, 97, (2, 40))
EVERY_OPTION: dict[str, dict[str, Any]] = {
    **{family: {} for family in (*FAMILIES, *STATE_SPACE)}, "llama biases": {"attention_bias": True, "mlp_bias": True},
    "llama dynamic": {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "llama ends": {"eos_token_id": [3, 5], "bos_token_id": 1}, "llama tied": {"tie_word_embeddings": True},
}


def saved(model: Model, folder: Path) -> Model:
    model.save(folder)
    return load(folder)


@pytest.mark.parametrize("name", EVERY_OPTION)
def test_a_saved_model_is_the_same(tmp_path, name):
    model = load(write(tmp_path / "m", small(name.split()[0], **EVERY_OPTION[name])))
    found = saved(model, tmp_path / "s")
    assert found.config == model.config and found.eos_token_ids == model.eos_token_ids
    assert (repr(found), found.dtype, found.nbytes) == (repr(model), model.dtype, model.nbytes)
    assert found(IDS).tobytes() == model(IDS).tobytes()
    cache, other = model.new_cache(2, 60), found.new_cache(2, 60)
    assert found(IDS, cache).tobytes() == model(IDS, other).tobytes(), "also by the other's cache"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_every_format(tmp_path, isa, dtype):
    model = load(write(tmp_path / "m", small(vocab_size=256, hidden_size=64, intermediate_size=192)), dtype)
    found = saved(model, tmp_path / "s")
    assert found.dtype == dtype and found(IDS).tobytes() == model(IDS).tobytes()
    assert found.generate([1, 2], 9).tolist() == model.generate([1, 2], 9).tolist()


@pytest.mark.parametrize("kinds", [{"other": kind} for kind in QUANTIZED] + [
    {"other": "Q4_K", "attn_v": "Q6_K", "ffn_up": "Q8_0", "output": "Q6_K"},
    {"other": "Q4_0", "attn_k": "F16", "ffn_down": "BF16", "token_embd": "Q8_0"}])
def test_files_in_blocks(tmp_path, rng, kinds):
    """Matrices that lie apart, each in a format of its own; what the file stored is still known."""
    file, _ = of_blocks(tmp_path, rng, BLOCKS, kinds)
    model = load(file)
    found = saved(model, tmp_path / "s")
    assert (found.dtype, found.nbytes, found.info) == (model.dtype, model.nbytes, model.info)
    assert found.config == model.config
    assert found(IDS[:, :12]).tobytes() == model(IDS[:, :12]).tobytes()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("activations", ["int8", "int12"])
def test_how_inputs_are_rounded(tmp_path, dtype, activations):
    model = load(write(tmp_path / "m", small(hidden_size=64, intermediate_size=192)), dtype, activations=activations)
    found = saved(model, tmp_path / "s")
    assert found(IDS).tobytes() == model(IDS).tobytes()
    for options in ({"activations": "int8"}, {"ignore": "key"}, {"importance": {}}):
        with pytest.raises(ValueError, match=f"^load: {next(iter(options))} is .* packed already; expected nothing"):
            load(tmp_path / "s", **options)
    with pytest.raises(ValueError, match="^collect_importance: .* was packed already; give it the files that were$"):
        collect_importance(tmp_path / "s", [[1, 2]])


def test_a_random_model_and_one_that_was_loaded(tmp_path):
    model = random_model("llama-tiny", "int4")
    once = saved(model, tmp_path / "a")
    twice = saved(once, tmp_path / "b")
    assert once(IDS).tobytes() == twice(IDS).tobytes() == model(IDS).tobytes()
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    assert pickle.loads(pickle.dumps(once))(IDS).tobytes() == model(IDS).tobytes()


def test_weights_are_mapped_and_read_only(tmp_path):
    """A matrix that is used twice is stored once; nothing is copied."""
    model = saved(random_model("llama-tiny"), tmp_path / "s")
    for part in model._decoder._model.parts:
        for weight in part.arguments.values():
            data = getattr(weight, "data", None)
            assert data is None or (not data.flags.writeable and not data.flags.owndata and data.ctypes.data % 64 == 0)
    assert model.nbytes <= (tmp_path / "s" / WEIGHTS).stat().st_size < model.nbytes + 64 * 100


def test_tokenizer_and_settings_go_along(tmp_path):
    write(tmp_path / "bytes", small(vocab_size=256), tokenizer=BYTES)
    write_json(tmp_path / "bytes" / "generation_config.json", {"do_sample": True, "top_k": 5, "eos_token_id": [7, 9]})
    model = load(tmp_path / "bytes")
    found = saved(model, tmp_path / "b")
    assert found.generate("abc", 6) == model.generate("abc", 6) and found.eos_token_ids == {7, 9}
    assert found.generation_config == model.generation_config
    write(tmp_path / "words", small(), tokenizer={
        "bos_token": "<s>", "eos_token": {"content": "</s>"}, "split_special_tokens": True, "chat_template": [
            {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"},
            {"name": "tool_use", "template": "t{{ tools | length }}"}]})
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<s>": 2, "</s>": 3}, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(tmp_path / "words" / "tokenizer.json"))
    model = load(tmp_path / "words")
    found = saved(model, tmp_path / "w")
    assert found.tokenizer.special == model.tokenizer.special and found.tokenizer.special_ids == {"<s>": 2, "</s>": 3}
    for text in ("a b <s> x", "</s>"):
        assert found.tokenizer.encode(text) == model.tokenizer.encode(text)
    chat = [{"role": "user", "content": "b"}]
    for options in ({}, {"tools": [{}]}):
        assert found.tokenizer.apply_chat_template(chat, **options) == \
            model.tokenizer.apply_chat_template(chat, **options)


def test_a_cache_goes_from_one_to_the_other(tmp_path):
    model = load(write(tmp_path / "m", small()))
    cache = model.new_cache(2, 60)
    model(IDS, cache)
    cache.save(tmp_path / "c")
    found = saved(model, tmp_path / "s")
    assert found(IDS[:, :9], ModelCache.load(tmp_path / "c", found)).tobytes() == model(IDS[:, :9], cache).tobytes()


def test_where_a_model_may_be_saved(tmp_path, monkeypatch):
    """A new folder or an empty one; not over anything, and nothing is left of what did not come to its end."""
    model = random_model("llama-tiny")
    (tmp_path / "empty").mkdir()
    model.save(tmp_path / "empty")
    monkeypatch.chdir(tmp_path)
    model.save("here")
    assert load("here").nbytes == model.nbytes
    (tmp_path / "file").write_text("x")
    for taken in ("here", "file"):
        with pytest.raises(FileExistsError, match="^Model.save: "):
            model.save(taken)
    with pytest.raises(FileNotFoundError):
        model.save(tmp_path / "no" / "such")
    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr("forge_c.models.saved.save_tokenizer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save(tmp_path / "half")
    assert sorted(os.listdir(tmp_path)) == before


def test_what_no_file_holds(tmp_path):
    model = load(write(tmp_path / "m", small()))
    made = model._decoder._model
    layers = [(CalledPart(32, lambda x, state, start: x), *made.held[0][1:]), *made.held[1:]]
    from forge_c.functional import LayeredModel

    other = Model(Decoder.of(model.config, "float32", LayeredModel(made.embedding, layers, made.norm, made.head)), None,
                  frozenset())
    with pytest.raises(ValueError, match="^Model.save: the model has a CalledPart, which no file holds"):
        other.save(tmp_path / "s")
    model.tokenizer = object()
    with pytest.raises(ValueError, match="^Model.save: the model has a object for a tokenizer, which no file holds"):
        model.save(tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_dtype_that_the_folder_has_not(tmp_path):
    random_model("llama-tiny", "int8").save(tmp_path / "s")
    assert load(tmp_path / "s", "int8").dtype == "int8"
    with pytest.raises(ValueError, match="holds 'int8', not 'int4'; load the model that it was made of"):
        load(tmp_path / "s", "int4")


# ---- folders that are not to be trusted ------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "s"
    load(write(folder.parent / "m", small("gemma2")), "int8").save(folder)
    return folder


def put(document: Any, path: str, value: Any) -> None:
    """document["a"][3]["b"] = value for "a.3.b"; ... deletes."""
    *way, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
    for key in way:
        document = document[key]
    if value is ...:
        del document[last]
    else:
        document[last] = value


def first_of(document: Any, name: str) -> str:
    return f"objects.{next(i for i, one in enumerate(document['objects']) if one['class'] == name)}.arguments"


DAMAGE: list[tuple[str, Any]] = [
    ("format", "x"), ("version", 2), ("version", None), ("layout.panel", 32), ("layout.line", 128), ("layout.rows", {}),
    ("layout.rows.int8.zero", 0), ("layout.rows.int8.k_step", 8), ("spec", None), ("spec.layers", []),
    ("spec.layers", [None]), ("spec.layers.0.mixer", None), ("spec.layers.0.mixer.kind", "Mamba"),
    ("spec.layers.0.mixer.kind", ["Attention"]), ("spec.layers.0.mlp.kind", "Attention"),
    ("spec.layers.0.mixer.n_heads", 0), ("spec.layers.0.mixer.n_heads", -4), ("spec.layers.0.mixer.n_heads", 3),
    ("spec.layers.0.mixer.n_heads", 8), ("spec.layers.0.mixer.n_heads", "4"), ("spec.layers.0.mixer.n_heads", True),
    ("spec.layers.0.mixer.n_kv_heads", 0), ("spec.layers.0.mixer.n_kv_heads", 2 ** 70),
    ("spec.layers.0.mixer.head_dim", 2 ** 40), ("spec.layers.0.mixer.head_dim", 0), ("spec.layers.0.mixer.window", 0),
    ("spec.layers.0.mixer.window", 9), ("spec.layers.0.mixer.window", None), ("spec.layers.0.mixer.scale", "x"),
    ("spec.layers.0.mixer.scale", float("nan")), ("spec.layers.0.mixer.rope.dim", 2 ** 20),
    ("spec.layers.0.mixer.rope.dim", 7), ("spec.layers.0.mixer.rope.theta", -1.0),
    ("spec.layers.0.mixer.rope.scaling", {"rope_type": "x"}), ("spec.layers.0.mixer.rope.scaling", 3),
    ("spec.layers.0.mixer.more", 1), ("spec.layers.0.mixer.scale", ...), ("spec.layers.0.norms", "around"),
    ("spec.layers.0.parallel", 1), ("spec.embed.vocab_size", 96), ("spec.embed.vocab_size", 2 ** 50),
    ("spec.embed.width", 33), ("spec.max_position_embeddings", 0), ("spec.eos_token_ids", [-1]), ("spec.head", []),
    ("dtype", 3), ("eos_token_ids", None), ("eos_token_ids", ["a"]), ("generation_config", []), ("model", None),
    ("stored", None), ("stored", [["Q4_K", "a", 3, "q4_k"]]), ("stored", [[1]]),
    ("model", []), ("model.1", []), ("model.1.0", []), ("model.1.0.0", None), ("model.1.0.3", 0.5), ("model.3", None),
    ("model.3", {"object": 10 ** 9}), ("model.3", {"object": -1}), ("model.3", {"object": "0"}),
    ("model.3", {"array": 0}), ("model.3", {"object": 0, "array": 0}), ("model.3", {"file": 0}), ("model.2", 5),
    ("model.0", {"array": 10 ** 6}), ("objects", None), ("objects", []), ("objects.0.class", "Popen"),
    ("objects.0.class", "LayeredModel"), ("objects.0.class", "Norm"), ("objects.0.arguments", ...),
    ("objects.0.arguments", "x"), ("arrays", None), ("arrays", []), ("arrays.0.0", "object"), ("arrays.0.0", "float64"),
    ("arrays.0.1", [2 ** 62, 2 ** 62]), ("arrays.0.1", [-1, -1]), ("arrays.0.1", [0]), ("arrays.0.1", [1] * 70),
    ("arrays.0.1", "ab"), ("PackedWeight.1", [32, 2 ** 40]), ("PackedWeight.1", [-1, 8]), ("PackedWeight.1", None),
    ("PackedWeight.2", "int4"), ("PackedWeight.2", "int3"), ("PackedWeight.3", "yes"), ("PackedWeight.4", 64),
    ("PackedWeight.0", {"object": 0}), ("Norm.n", 2 ** 50), ("Norm.kind", "batch"), ("Norm.weight", {"array": 0}),
    ("Norm.eps", "x"), ("AttentionPart.heads", 1), ("AttentionPart.heads", -2), ("AttentionPart.kv_heads", 4),
    ("AttentionPart.head_dim", 5), ("AttentionPart.window", 10 ** 30), ("AttentionPart.window", None),
    ("AttentionPart.scale", 0.5), ("AttentionPart.more", 1), ("AttentionPart.out", ...), ("AttentionPart.out", None),
    ("AttentionPart.norm", None), ("MLPPart.activation", "relu6"), ("MLPPart.activation", None), ("MLPPart.down", None)]


@pytest.mark.parametrize(("path", "value"), DAMAGE, ids=[f"{p}={str(v)[:30]}" for p, v in DAMAGE])
def test_a_header_that_was_changed_is_an_error(sound, tmp_path, path, value):
    """Or what it changes is something that the model may be: then it runs."""
    shutil.copytree(sound, tmp_path / "s")
    document = json.loads((sound / HEADER).read_text())
    name, _, rest = path.partition(".")
    put(document, f"{first_of(document, name)}.{rest}" if name[0].isupper() else path, value)
    (tmp_path / "s" / HEADER).write_text(json.dumps(document))
    if (path, value) in (("spec.eos_token_ids", []), ("AttentionPart.norm", None)):
        assert load(tmp_path / "s")(IDS).shape == (2, 40, 97)
        return
    with pytest.raises(ValueError, match="^load: .*"):
        load(tmp_path / "s")


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", "[" * 100_000, '{"format": "forge_c.Model"}', "\xff"],
                         ids=lambda c: c[:20])
def test_a_header_that_is_none(sound, tmp_path, content):
    shutil.copytree(sound, tmp_path / "s")
    (tmp_path / "s" / HEADER).write_text(content, encoding="latin1")
    with pytest.raises(ValueError, match="forge_c.json|format"):
        load(tmp_path / "s")


@pytest.mark.parametrize("cut", [0, 64, -64, -1])
def test_weights_that_are_cut_or_longer(sound, tmp_path, cut):
    shutil.copytree(sound, tmp_path / "s")
    content = (sound / WEIGHTS).read_bytes()
    (tmp_path / "s" / WEIGHTS).write_bytes(b"" if cut == 0 else content + bytes(cut) if cut > 0 else content[:cut])
    with pytest.raises(ValueError, match=f"weights.bin has .* bytes, expected {len(content)}"):
        load(tmp_path / "s")
    (tmp_path / "s" / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "s")
    os.mkfifo(tmp_path / "s" / WEIGHTS)
    with pytest.raises(ValueError, match="not a regular file"):
        load(tmp_path / "s")


@pytest.mark.parametrize("name", EVERY_OPTION)
def test_a_spec_goes_through_json(tmp_path, name):
    spec = load(write(tmp_path, small(name.split()[0], **EVERY_OPTION[name]))).config
    assert from_document(json.loads(json.dumps(to_document(spec)))) == spec
    other = replace(spec, max_position_embeddings=spec.max_position_embeddings + 1)
    assert from_document(json.loads(json.dumps(to_document(other)))) == other != spec
