"""Rope types dynamic and longrope against transformers: logits, and greedy texts that cross the original length."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from model_folder import small, write

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hf_models import PARITY, quiet  # noqa: E402, F401

from forge_c.models import load  # noqa: E402

BORDER = 32
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 8.0, 32.0], "factor": 8.0,
            "original_max_position_embeddings": BORDER}
CONFIGS: dict[str, dict[str, Any]] = {
    "dynamic": small(max_position_embeddings=BORDER, rope_scaling={"rope_type": "dynamic", "factor": 4.0}),
    "longrope": small("phi3", max_position_embeddings=256, original_max_position_embeddings=BORDER,
                      rope_scaling=LONGROPE, pad_token_id=0),
}


def pair(tmp_path, name: str) -> Any:
    folder = write(tmp_path, CONFIGS[name] | {"eos_token_id": None}, seed=2)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return load(folder), hf.eval()


@pytest.mark.parametrize("length", [20, BORDER, BORDER + 1, 60])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits(tmp_path, name, length):
    model, hf = pair(tmp_path, name)
    ids = np.random.default_rng(0).integers(3, 97, (1, length))
    want = hf(torch.from_numpy(ids)).logits.numpy()
    for got in (model(ids), model(ids, model.new_cache(1, length)), model(ids, model.new_cache(1, 250))):
        assert np.abs(got - want).max() <= PARITY * np.abs(want).max()


@pytest.mark.filterwarnings("ignore:generate")
@pytest.mark.parametrize("length", [20, BORDER - 1, BORDER, BORDER + 1, 50])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_texts(tmp_path, name, length):
    """Of 8 tokens, and of 100 that outgrow the original length. transformers' dynamic remembers the longest text that
    it has seen, so each has a model of its own. longrope turns all tokens by the factors of the whole length, which
    is why it goes without transformers' cache here: releases around 5.17 keep that past the original length, with
    keys turned by the short factors."""
    ids = np.random.default_rng(length).integers(3, 97, length)
    for tokens in (8, 100):
        model, hf = pair(tmp_path, name)
        want = hf.generate(torch.from_numpy(ids[None]), max_new_tokens=tokens, do_sample=False,
                           use_cache=name == "dynamic")[0, length:].tolist()
        assert model.generate(ids, tokens).tolist() == want


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_dynamic_text_goes_on_in_a_cache_as_in_transformers(tmp_path):
    model, hf = pair(tmp_path, "dynamic")
    hf = hf.double()  # in float32 it is itself 2.5e-5 off here
    ids, theirs = np.random.default_rng(3).integers(3, 97, (1, 70)), transformers.DynamicCache()
    cache = model.new_cache(1, 70)
    for start, stop in ((0, 20), (20, 45), (45, 46), (46, 70)):
        with torch.no_grad():
            out = hf(torch.from_numpy(ids[:, start:stop]), past_key_values=theirs, use_cache=True)
        got, want = model(ids[:, start:stop], cache), out.logits.numpy()
        assert np.abs(got - want).max() <= PARITY * np.abs(want).max(), (start, stop)
