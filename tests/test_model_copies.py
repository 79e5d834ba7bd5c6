"""Copies and pickles of models: the same weights, here or loaded from where they came."""
from __future__ import annotations

import copy
import multiprocessing
import pickle

import pytest
from model_folder import BYTES, small, write

from forge_c.models import Model, load, random_model


@pytest.fixture
def model(tmp_path) -> Model:
    return load(write(tmp_path / "model", small()))


@pytest.mark.parametrize("remake", [copy.copy, copy.deepcopy])
def test_a_copied_model_has_the_same_weights(model, remake):
    other = remake(model)
    assert other is not model and other._decoder is model._decoder
    assert other([[1, 2]]).tobytes() == model([[1, 2]]).tobytes()


@pytest.mark.parametrize("made", [copy.copy, lambda model: model])
def test_a_pickled_model_is_loaded_where_it_came_from(tmp_path, monkeypatch, made):
    write(tmp_path / "m", small(vocab_size=256), tokenizer=BYTES)
    monkeypatch.chdir(tmp_path)
    model = made(load("m", "int8"))
    text = pickle.dumps(model)
    monkeypatch.chdir("/")
    other = pickle.loads(text)
    assert len(text) < 1000 and other.dtype == "int8" and other.tokenizer is not None
    assert other([[1, 2]]).tobytes() == model([[1, 2]]).tobytes()
    embedded = load()
    assert pickle.loads(pickle.dumps(embedded)).generate("def ", 4) == embedded.generate("def ", 4)


def test_a_model_from_nowhere_is_not_pickled():
    for model in (random_model("llama-tiny"), copy.deepcopy(random_model("llama-tiny"))):
        with pytest.raises(TypeError, match=r"^Model: a model that was not loaded from a path is not pickled"):
            pickle.dumps(model)


@pytest.mark.slow
def test_models_and_caches_go_to_processes_that_are_spawned():
    """As joblib, Ray and Dask do it."""
    model = load()
    cache = model.new_cache(1, 100)
    model.generate("import ", 4, cache=cache)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(model.generate, ("a", 5), {"cache": cache})
        assert pool.map(model.generate, ["def a"]) == [model.generate("def a")]
    assert found == model.generate("a", 5, cache=cache)
