"""Fixtures: a tiny random model of each family, made once for a module's tests, and one that reads bytes."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from model_folder import BYTES, small, write

from forge_c.models import Model, load

DYNAMIC = {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
# Families and settings whose angles follow from a text's length; the original one is 16.
ANGLES_BY_LENGTH = [
    ("llama", DYNAMIC),
    ("phi3", {"max_position_embeddings": 128, "original_max_position_embeddings": 16, "rope_scaling": {
        "type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}})]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            config = small(**DYNAMIC) if name == "dynamic" else small(name)
            made[name] = load(write(tmp_path_factory.mktemp("model"), config))
        return made[name]

    return get


@pytest.fixture
def model(model_of) -> Model:
    return model_of("llama")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Model:
    return load(write(tmp_path_factory.mktemp("model"), small(vocab_size=256), tokenizer=BYTES))


@contextmanager
def interrupted(model: Model, after: int = 1,
                error: type[BaseException] = KeyboardInterrupt) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """The call of the model within the block ends in this error, after so many passes have written what they write."""
    real, calls = model._decoder._model, 0

    class Failing:
        def forward(self, *arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            found = real.forward(*arguments, **options)
            if calls == after:
                raise error
            return found

    with pytest.MonkeyPatch.context() as patched, pytest.raises(error) as caught:
        patched.setattr(model._decoder, "_model", Failing())
        yield caught
    assert calls == after
