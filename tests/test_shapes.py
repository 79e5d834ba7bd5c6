"""Models without a checkpoint: random weights that are neither zeros nor the same everywhere."""
from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from pace import check_pace

import forge_c as fc
from forge_c.models.spec import Attention, model_spec
from forge_c.models.weights.random import SHAPES, RandomCheckpoint, shape_config


@pytest.fixture(scope="module")
def checkpoint() -> RandomCheckpoint:
    return RandomCheckpoint()


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_a_model(name):
    spec = model_spec(shape_config(name))
    mixer = spec.layers[0].mixer
    attention = next((m for m in spec.layers[0].mixers if isinstance(m, Attention)), None)
    if attention is None:
        assert mixer.inner == 2 * spec.hidden_size and spec.head.tied
        return
    assert attention.n_heads * attention.head_dim == spec.hidden_size and not spec.head.tied


def test_the_sizes_of_a_llama_of_1_1_billion():
    s = model_spec(shape_config("llama-1.1b"))
    a, mlp = s.layers[0].mixer, s.layers[0].mlp
    assert (s.hidden_size, s.n_layers, a.n_heads, a.n_kv_heads, a.head_dim) == (2048, 22, 32, 4, 64)
    assert (mlp.width, s.vocab_size, a.rope.theta) == (5632, 32000, 10000.0)
    assert s.max_position_embeddings >= 2048


@pytest.mark.parametrize("shape", [(3, 5), (2048, 2048), (2500, 2048)])
def test_a_matrix(checkpoint, shape):
    """The largest is longer than the block that it is cut from."""
    drawn = checkpoint.take("a.weight", shape)
    assert drawn.shape == shape and drawn.dtype == ml_dtypes.bfloat16
    values = drawn.astype(np.float32)
    assert len(np.unique(values)) > 10 and np.abs(values).max() < 0.2
    if values.size > 1000:
        assert abs(values.std() - 0.02) < 1e-3 and abs(values.mean()) < 1e-4
        assert not (values[0] == values[1:]).all(axis=1).any()


def test_names_differ_and_calls_do_not(checkpoint):
    a, b = (checkpoint.take(name, (64, 64)) for name in ("a.weight", "b.weight"))
    assert (a != b).any() and (a == checkpoint.take("a.weight", (64, 64))).all()
    assert (a == RandomCheckpoint().take("a.weight", (64, 64))).all()


def test_a_norm_is_near_one(checkpoint):
    weight = checkpoint.take("model.norm.weight", (2048,)).astype(np.float32)
    assert abs(weight.mean() - 1) < 0.01 and 0.01 < weight.std() < 0.03


def test_it_has_whatever_is_asked_for(checkpoint):
    assert "anything" in checkpoint and checkpoint.dtypes() == {"BF16"}
    checkpoint.check_all_taken()


@pytest.mark.slow
def test_gigabytes_in_seconds(checkpoint):
    """A tenth of the 2.2 GB of a llama-1.1b, in processor time."""
    check_pace(lambda: checkpoint.take("a.weight", (110, 1_000_000)), 1.0)


@pytest.mark.parametrize(("dtype", "packed"), [("auto", "bfloat16"), ("bfloat16", "bfloat16"), ("float32", "float32")])
def test_a_random_model_runs(dtype, packed):
    model = fc.models.random_model("llama-tiny", dtype)
    assert model.dtype == packed and model.tokenizer is None and not model.eos_token_ids
    logits = model([[1, 2, 3]])
    assert np.isfinite(logits).all() and logits.std() > 1e-3
    assert len(model.generate(np.array([5, 6]), 4)) == 4


@pytest.mark.parametrize(("arguments", "reason"), [
    (("llama-2b",), "random_model: shape is 'llama-2b', expected one of llama-1.1b, "),
    (("llama-tiny", "int3"), "random_model: dtype is 'int3', expected auto, "),
])
def test_mistakes(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        fc.models.random_model(*arguments)
