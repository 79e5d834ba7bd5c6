"""Folders that transformers writes, read by forge_c: the same logits. Needs torch and transformers."""
from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hf_models import COMMON, PARITY, quiet, tiny  # noqa: E402, F401

from forge_c.models import Model, load  # noqa: E402

IDS = np.random.default_rng(1).integers(2, COMMON["vocab_size"], (2, 40))


def written(model: Any, folder: Path) -> Model:
    """What forge_c makes of the folder that `model` saves itself to."""
    model.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(folder)


def assert_same(got: Any, want: Any) -> None:
    want = want.numpy()
    assert got.shape == want.shape and np.abs(got - want).max() <= PARITY * np.abs(want).max()


def test_the_text_model_of_one_that_reads_images(tmp_path):
    torch.manual_seed(0)
    text = tiny("gemma3_text").config
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    want = model(torch.from_numpy(IDS)).logits
    assert_same(written(model, tmp_path)(IDS), want)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_model_saved_without_its_head(tmp_path, family):
    model = tiny(family, tie_word_embeddings=True)
    want = model(torch.from_numpy(IDS)).logits
    assert_same(written(model.base_model, tmp_path)(IDS), want)


@pytest.mark.filterwarnings("ignore:.*of its own")
def test_a_tied_model_with_a_head_of_its_own(tmp_path):
    tiny("llama", tie_word_embeddings=False).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert model.config.tie_word_embeddings
    assert_same(load(tmp_path)(IDS), model(torch.from_numpy(IDS)).logits)
