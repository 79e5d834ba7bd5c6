"""Folders that are not quite a model: loaded if it is clear what they mean, else told what to get instead."""
from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from model_folder import small, tensors, write, write_json

from forge_c.models import load

IDS = np.arange(24).reshape(2, 12)
INSTEAD = ('which is not read: get the model that they were made from (bfloat16, float16 or float32; dtype="int8" or '
           "\"int4\" quantises it as it loads), or a GGUF file")


def refused(folder: Path, kind: type[Exception] = ValueError, **options: Any) -> str:
    """The message; nothing may be read of a weight, so that none needs to be there."""
    with pytest.raises(kind) as caught:
        load(folder, **options)
    assert caught.type is kind
    return str(caught.value)


# ---- heads -----------------------------------------------------------------------------------------

def test_a_head_of_its_own_is_used_though_the_file_says_that_it_is_tied(tmp_path):
    weights = tensors(small())
    assert not np.array_equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    said, untied = small(tie_word_embeddings=True), write(tmp_path / "untied", small(), weights)
    folder = write(tmp_path / "tied", said, weights, shards=2)
    with pytest.warns(UserWarning, match=r"holds an lm_head.weight of its own, which is used, though config.json has "
                                         "tie_word_embeddings true$") as caught:
        model = load(folder)
    assert caught[0].filename == __file__ and not model.config.head.tied
    assert model(IDS).tobytes() == load(untied)(IDS).tobytes()


@pytest.mark.parametrize("change", [0, -1], ids=["first", "last"])
def test_a_head_that_differs_in_one_value_is_its_own(tmp_path, change):
    weights = tensors(small(tie_word_embeddings=True))
    head = weights["model.embed_tokens.weight"].copy()
    head.flat[change] += 1
    folder = write(tmp_path, small(tie_word_embeddings=True), weights | {"lm_head.weight": head})
    with pytest.warns(UserWarning, match="of its own"):
        load(folder)


def test_a_copy_of_the_embedding_as_head_says_nothing(tmp_path):
    weights = tensors(small(tie_word_embeddings=True))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(write(tmp_path, small(tie_word_embeddings=True), weights)).config.head.tied


def test_a_model_saved_without_its_head_gives_hidden_states_and_no_logits(tmp_path):
    weights = {name.removeprefix("model."): value for name, value in tensors(small()).items() if "lm_head" not in name}
    model = load(write(tmp_path / "bare", small(), weights))
    with pytest.raises(ValueError, match="^model: the checkpoint has no lm_head.weight, .* gives hidden states alone$"):
        model(IDS)
    with pytest.raises(ValueError, match=r"^model: the checkpoint has no lm_head.weight"):
        model.generate([1, 2], 2)
    whole, hidden = load(write(tmp_path / "whole", small())), []
    for one in (model, whole):
        hidden.append(one._decoder.forward(IDS, one.new_cache(2, 12), logits=False, hidden=True)[1])
    assert hidden[0].tobytes() == hidden[1].tobytes()


# ---- adapters and other formats --------------------------------------------------------------------

@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_alone(tmp_path, with_config):
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": "org/base", "peft_type": "LORA"})
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    if with_config:
        write_json(tmp_path / "config.json", small())
    message = refused(tmp_path, FileNotFoundError)
    assert message.startswith(f"load: {tmp_path} is an adapter of org/base, and no model: merge the two with peft ")
    assert "merge_and_unload().save_pretrained(DIR)" in message
    for damaged in ({}, [], {"base_model_name_or_path": 5}):
        write_json(tmp_path / "adapter_config.json", damaged)
        assert "is an adapter of another model, " in refused(tmp_path, FileNotFoundError)


def test_a_merged_model_may_keep_its_adapter_config(tmp_path):
    write_json(write(tmp_path, small()) / "adapter_config.json", {"base_model_name_or_path": "org/base"})
    assert load(tmp_path)(IDS).shape == (2, 12, 97)


@pytest.mark.parametrize(("name", "content", "method"), [
    ("hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}, "FP8"),
    ("hf_quant_config.json", {}, "ModelOpt"), ("hf_quant_config.json", [], "ModelOpt"),
    ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": False}, "GPTQ"),
    ("quant_config.json", {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}, "AWQ"),
])
def test_a_file_beside_config_json_that_says_quantised(tmp_path, name, content, method):
    write_json(write(tmp_path, small()) / name, content)
    assert refused(tmp_path) == (f"{tmp_path / name}: the weights are quantised by {method}, {INSTEAD}; if the "
                                 'folder\'s tensors are none of that, load(..., ignore=("quantization_config",))')
    assert load(tmp_path, ignore="quantization_config")(IDS).shape == (2, 12, 97)


Q = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(("extra", "named", "method"), [
    ({f"{Q}.weight": np.zeros((40, 32), ml_dtypes.float8_e4m3fn)}, f"{Q}.weight is F8_E4M3", "FP8"),
    ({f"{Q}.weight_scale": np.ones(1, np.float32)}, f"{Q}.weight_scale is F32", "FP8 or INT8"),
    ({f"{Q}.weight_scale_inv": np.ones((1, 1), np.float32)}, f"{Q}.weight_scale_inv is F32", "FP8"),
    ({f"{Q}.qweight": np.ones((4, 40), np.int32)}, f"{Q}.qweight is I32", "AWQ or GPTQ"),
    ({f"{Q}.weight.absmax": np.ones(20, np.uint8)}, f"{Q}.weight.absmax is U8", "bitsandbytes"),
    ({f"{Q}.SCB": np.ones(40, np.float32)}, f"{Q}.SCB is F32", "bitsandbytes"),
    ({f"{Q}.weight_packed": np.ones((40, 4), np.int32)}, f"{Q}.weight_packed is I32", "compressed-tensors"),
    ({f"{Q}.scales": np.ones((40, 1), np.float16)}, f"{Q}.scales is F16", "MLX"),
])
def test_tensors_of_another_format_are_named_before_any_is_read(tmp_path, monkeypatch, extra, named, method):
    monkeypatch.setattr("forge_c.models.weights.hf.Checkpoint.take", lambda *_: pytest.fail("a weight was read"))
    weights = tensors(small()) | extra
    folder = write(tmp_path, small(), weights)
    expected = f"{tmp_path / 'model.safetensors'}: tensor {named}: the weights are quantised by {method}, {INSTEAD}"
    assert refused(folder) == expected


@pytest.mark.parametrize("config", [False, True], ids=["alone", "with config.json"])
def test_a_folder_of_another_format_names_what_to_load_or_get(tmp_path, config):
    cases = {"model-Q4_0.gguf": rf"; it holds model-Q4_0.gguf: load that file, load\('{tmp_path}/model-Q4_0.gguf'\)$",
             "consolidated.safetensors": "; params.json and consolidated.* are its makers' own format: get the ",
             "consolidated.00.pth": "; params.json and consolidated.* are its makers' own format: get the ",
             "params.json": "; params.json and consolidated.* are its makers' own format: get the "}
    if config:
        write_json(tmp_path / "config.json", small())
    what = "model.safetensors: no such file" if config else "has no config.json"
    assert refused(tmp_path, FileNotFoundError).endswith(what)
    for name, expected in cases.items():
        (tmp_path / name).write_bytes(b"")
        assert re.search(what + expected, refused(tmp_path, FileNotFoundError)), name
        (tmp_path / name).unlink()


def test_a_lost_index(tmp_path):
    write(tmp_path, small(), shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert refused(tmp_path, FileNotFoundError) == (
        f"{tmp_path / 'model.safetensors'}: no such file; model-00001-of-00002.safetensors is a part of it, and "
        "model.safetensors.index.json, which names them all, is missing")
