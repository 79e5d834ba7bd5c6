"""attention_precision of whole models and of layers."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from test_attention import normal

import forge_c as fc

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_model_attends_in_a_precision(isa, tmp_path):
    ids = (np.arange(1, 400) * 7 % 250)[None]
    exact = fc.models.load()
    want = exact(ids)
    assert exact.attention_precision is None
    same = fc.models.load(attention_precision="float32")
    assert same.attention_precision == "float32" and same(ids).tobytes() == want.tobytes()
    for precision in ("bfloat16", "int8"):
        model = fc.models.load(attention_precision=precision)
        assert model.attention_precision == precision
        got = model(ids)
        assert got.tobytes() != want.tobytes() and np.abs(got - want).mean() < 0.2
        cache_ = model.new_cache(1, 400)
        parts = [model(ids[:, begin:end], cache_) for begin, end in ((0, 100), (100, 101), (101, 300), (300, 399))]
        assert np.concatenate(parts, axis=1).tobytes() == got.tobytes()
        assert pickle.loads(pickle.dumps(model)).attention_precision == precision
        model.save(tmp_path / precision)
        for said, kept in ((None, precision), ("float32", "float32")):
            loaded = fc.models.load(tmp_path / precision, attention_precision=said)
            assert loaded.attention_precision == kept
            assert loaded(ids).tobytes() == (got if said is None else want).tobytes()


def test_models_refuse_other_precisions():
    for function in (fc.models.load, lambda **options: fc.models.random_model("llama-tiny", **options)):
        with pytest.raises(ValueError, match="attention_precision is 'int4', expected None, float32, bfloat16, int8"):
            function(attention_precision="int4")
    assert fc.models.random_model("llama-tiny", attention_precision="int8").attention_precision == "int8"


def test_a_layer_attends_in_a_precision(isa, rng):
    layer = fc.nn.modern_attention.GroupedQueryAttention(64, 4, 2, causal=True, seed=0)
    x = normal(rng, 1, 40, 64)
    want = layer(x)
    layer.attention_precision = "int8"
    got, kept = layer(x, use_cache=True)
    assert got.tobytes() == layer(x).tobytes() != want.tobytes()
    np.testing.assert_allclose(got, want, atol=0.05)
    assert kept.seq_len == 40
