"""Large key biases and int8 caches: channels are balanced, and nothing else changes."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from model_folder import small, tensors, write

from forge_c.functional import AttentionPart
from forge_c.models import Model, load
from forge_c.models import parts as parts_of_models
from forge_c.models.balance import balance
from forge_c.models.spec import model_spec

IDS = np.random.default_rng(0).integers(0, 97, (2, 60))
CONFIGS = {"half rotated": {"model_type": "llama", "attention_bias": True, "partial_rotary_factor": 0.5},
           "qwen2": {"model_type": "qwen2", "use_sliding_window": False}, "no rotation": {
               "model_type": "smollm3", "attention_bias": True, "no_rope_layers": [0, 1, 0], "num_hidden_layers": 3}}


def config(name: str) -> dict[str, Any]:
    return small(**CONFIGS[name] | {"head_dim": 32, "hidden_size": 64} if name != "qwen2" else CONFIGS[name] | {
        "hidden_size": 128})


@pytest.fixture(params=CONFIGS)
def biased(request, tmp_path):
    """A folder whose keys have biases of up to 300, and the same one without balance."""
    settings = config(request.param)
    weights, rng = tensors(settings), np.random.default_rng(1)
    for name, value in weights.items():
        if name.endswith("k_proj.bias"):
            value[rng.choice(value.size, 5, replace=False)] = [300.0, -210.0, 90.0, 40.0, -17.0]
    return write(tmp_path, settings, weights)


def unbalanced(folder, monkeypatch) -> Model:
    with monkeypatch.context() as patched:
        patched.setattr(parts_of_models, "balance", lambda *_: None)
        return load(folder)


def logits(model: Model, dtype: str, step: int = 60) -> np.ndarray:
    cache = model.new_cache(2, 60, dtype=dtype)
    return np.concatenate([model(IDS[:, at : at + step], cache) for at in range(0, 60, step)], 1)


def test_an_int8_cache_is_closer(biased, monkeypatch, isa):
    model, plain = load(biased), unbalanced(biased, monkeypatch)
    exact = logits(model, "float32")
    off = [float(np.linalg.norm(logits(m, "int8") - exact) / np.linalg.norm(exact)) for m in (plain, model)]
    assert off[1] < 0.6 * off[0], off


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_caches_keep_their_bits(biased, monkeypatch, isa, dtype):
    assert logits(load(biased), dtype).tobytes() == logits(unbalanced(biased, monkeypatch), dtype).tobytes()


def test_pieces_rows_and_threads_keep_their_bits(biased, each_thread_count):
    model = load(biased)
    whole = logits(model, "int8").tobytes()
    for _ in each_thread_count():
        assert logits(model, "int8", 7).tobytes() == whole


def attention(name: str, **changes: Any) -> Any:
    return model_spec(config(name) | changes).layers[1].mixer


def test_the_factors_are_powers_of_two_that_pairs_share():
    kind = attention("half rotated")
    bias = np.zeros((kind.n_heads + 2 * kind.n_kv_heads) * 32, np.float32)
    heads, keys = kind.n_heads * 32, bias[kind.n_heads * 32 :].reshape(-1, 32)
    keys[0, 3], keys[1, 20], keys[1, 31], bias[0], keys[2, 5] = -300.0, 33.0, 15.9, 1e6, 1e6  # of q and v: no matter
    found = balance(kind, bias)
    q, k = found[:heads].reshape(-1, 32), found[heads:].reshape(-1, 32)
    assert found.dtype == np.float32 and k.shape == (2, 32)
    expected = np.ones((2, 32))
    expected[0, [3, 3 + 8]], expected[1, 20] = 1 / 32, 1 / 4  # 16 of 32 channels rotate, in pairs 8 apart
    np.testing.assert_array_equal(k, expected)
    np.testing.assert_array_equal(q, np.repeat(1 / expected, kind.n_heads // 2, axis=0))


def test_where_there_is_nothing_to_balance():
    kind = attention("qwen2")
    bias = np.full((kind.n_heads + 2 * kind.n_kv_heads) * kind.head_dim, 11.0, np.float32)
    assert balance(kind, bias) is None and balance(kind, None) is None  # pairs of 11: less than 16
    bias[kind.n_heads * kind.head_dim] = np.nan
    assert balance(kind, bias) is None
    normed = model_spec(small("qwen3", attention_bias=True)).layers[0].mixer
    assert balance(normed, np.full(500, 300.0, np.float32)) is None, "norms of heads come after the biases"


def test_a_balance_of_another_size_is_refused():
    from forge_c import pack
    qkv, out = pack(np.zeros((8, 32), np.float32)), pack(np.zeros((16, 8), np.float32))
    with pytest.raises(ValueError, match="^AttentionPart: balance has 3 values, expected 24$"):
        AttentionPart(qkv, out, heads=2, kv_heads=1, head_dim=8, balance=np.ones(3, np.float32))


def test_a_saved_model_is_balanced_too(biased, tmp_path):
    model = load(biased)
    model.save(tmp_path / "saved")
    assert logits(load(tmp_path / "saved"), "int8").tobytes() == logits(model, "int8").tobytes()
