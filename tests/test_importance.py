"""What the inputs of a model's matrices are like, and what load makes of it; formats of an int4 model's matrices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from model_folder import FAMILIES, STATE_SPACE, small, tensors, write
from numpy.typing import NDArray

from forge_c.models import collect_importance, inputs, load
from forge_c.models.mix import Formats
from forge_c.models.model import Model
from forge_c.models.spec import tensor_names
from forge_c.models.weights import Checkpoint

Array = NDArray[Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family -> a folder; made when asked for."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def of(family: str, **changes: Any):
        key = family + str(sorted(changes.items()))
        if key not in made:
            config = small(family, **changes)
            made[key] = write(root / str(len(made)), config, tensors(config))
        return made[key]
    return of


def seen_by(model: Model, folder: Any, ids: Array) -> list[Array]:
    """What goes into each layer, and comes out of the last, as `inputs` computes it."""
    through = inputs.Inputs(model.config, Checkpoint(folder, tensor_names(model.config.model_type)), [ids])
    found = [through._x[0]]
    for i in range(model.config.n_layers):
        through.layer(i)
        found.append(through._x[0])
    return found


@pytest.mark.parametrize("family", [*FAMILIES, *STATE_SPACE])
def test_a_text_goes_through_the_layers_as_in_the_model(folders, family):
    """Every family's: norms before and after, biases, fused matrices, windows, caps, scales."""
    folder = folders(family)
    model = load(folder, "float32")
    ids = np.random.default_rng(0).integers(0, 97, (1, 40))
    for layer, found in enumerate(seen_by(model, folder, ids)[:-1]):
        expected = model._decoder.hidden(ids, model.new_cache(1, 40), layer)
        assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max(), layer


def test_mean_squares_and_products_of_what_the_first_layer_sees(folders):
    folder = folders("llama")
    model = load(folder, "float32")
    texts = [np.arange(1, 30), np.arange(50, 60)]
    found = collect_importance(folder, texts)
    weight = tensors(small("llama"))
    x = np.concatenate([weight["model.embed_tokens.weight"][t] for t in texts]).astype(np.float64)
    normed = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + model.config.layers[0].norm.eps)
    normed *= weight["model.layers.0.input_layernorm.weight"]
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_allclose(found[name], np.square(normed).mean(axis=0), rtol=1e-4)
    products = collect_importance(folder, texts, products=True)
    np.testing.assert_allclose(products[name], normed.T @ normed / len(normed), atol=1e-4 * np.abs(normed).max() ** 2)
    assert found.keys() == products.keys() == {
        f"model.layers.{i}.{m}.weight" for i in range(3)
        for m in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")}
    for each in found:
        np.testing.assert_allclose(np.diagonal(products[each]), found[each], rtol=1e-4)


def test_long_texts_are_read_in_pieces(folders):
    """Of 512 tokens, each from position 0."""
    ids = np.random.default_rng(1).integers(0, 97, 700)
    whole, cut = (collect_importance(folders("llama"), texts) for texts in ([ids], [ids[:512], ids[512:]]))
    for name, a in whole.items():
        np.testing.assert_array_equal(a, cut[name])


def test_texts_go_through_the_models_own_tokenizer():
    texts = ["import os\n", "def f(x):\n    return x\n"]
    ids = [load().tokenizer.encode(text) for text in texts]
    found, same = collect_importance(None, texts), collect_importance(None, ids)
    assert all((found[name] == same[name]).all() for name in found)
    assert load(None, "int4", importance=found).dtype == "int4"


@pytest.mark.parametrize(("texts", "error", "message"), [
    ([], ValueError, "texts hold no token"), ([[0.5]], TypeError, "ids have dtype float64 and shape"),
    ([[[1]]], TypeError, r"ids have dtype int64 and shape \(1, 1\)"),
    ([[97]], IndexError, "ids go from 97 to 97, expected 0 to 96"), ([[-1]], IndexError, "ids go from -1"),
    (["a"], ValueError, "texts need a tokenizer"),
])
def test_texts_that_are_none(folders, texts, error, message):
    with pytest.raises(error, match=f"^collect_importance: {message}"):
        collect_importance(folders("llama"), texts)


# ---- load ----


BASE, MORE, MOST = ("q4_k", "q4_1"), ("q5_k", "q5_1"), ("q6_k", "q8_0")


@pytest.mark.parametrize(("name", "layer", "expected"), [
    ("self_attn.v_proj", 3, MOST), ("lm_head", None, MOST), ("self_attn.k_proj", 3, MORE), ("mlp.down_proj", 3, MORE),
    ("mlp.up_proj", 3, MORE), ("self_attn.qkv_proj", 3, MORE), ("mlp.gate_up_proj", 3, MORE),
    ("self_attn.q_proj", 3, BASE), ("self_attn.o_proj", 0, BASE), ("mlp.gate_proj", 27, BASE),
    ("mlp.gate_proj", 28, MORE), ("self_attn.q_proj", 31, MORE), ("self_attn.v_proj", 31, MOST),
])
def test_which_format_a_matrix_of_an_int4_model_has(name, layer, expected):
    assert [Formats("int4", 32).of(name, layer, k) for k in (2048, 576)] == list(expected)
    assert Formats("int4", 7).of("mlp.gate_proj", 6, 256) == "q4_k"  # an eighth of seven layers is none
    for plain in ("float32", "int8", "q4_1", "q6_k"):
        assert Formats(plain, 32).of(name, layer, 576) == plain


@pytest.mark.parametrize("family", [*FAMILIES, *STATE_SPACE])
def test_every_family_loads_in_mixed_and_plain_formats(folders, family):
    """More bits are nearer to what it says in float32; random weights make much of every error."""
    ids = np.random.default_rng(0).integers(0, 97, (4, 30))
    exact, off = load(folders(family), "float32")(ids), {}
    for dtype in ("int8", "q6_k", "int4", "q4_1"):
        model = load(folders(family), dtype)
        assert model.dtype == dtype
        off[dtype] = np.linalg.norm(model(ids) - exact) / np.linalg.norm(exact)
    assert off["int8"] < off["q6_k"] < off["int4"] < off["q4_1"] < 1, off


def outliers(config: Any) -> Any:
    """Weights of a model with three channels far larger than the others, as trained ones have, in every layer."""
    found = tensors(config)
    found["model.embed_tokens.weight"][:, [3, 11, 20]] *= 40
    return found


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    config = small("llama", hidden_size=64, intermediate_size=160)
    return write(tmp_path_factory.mktemp("uneven"), config, outliers(config))


def off(folder: Any, **more: Any) -> float:
    ids = np.random.default_rng(5).integers(0, 97, (4, 50))
    exact, found = load(folder, "float32")(ids), load(folder, "q4_1", **more)(ids)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def test_random_tokens_show_which_channels_are_large(uneven):
    """Found while loading: better than to take all for the same, and not as good as knowing the texts."""
    texts = list(np.random.default_rng(6).integers(0, 97, (8, 60)))
    same, drawn = off(uneven, importance={}), off(uneven)
    products = off(uneven, importance=collect_importance(uneven, texts, products=True))
    assert drawn < 0.97 * same and products < 0.95 * drawn, (same, drawn, products)


def test_loading_again_gives_the_same_bits(uneven, each_thread_count):
    ids = np.arange(30)[None]
    assert len({load(uneven, "int4")(ids).tobytes() for _ in each_thread_count()}) == 1


def test_an_importance_on_disk(uneven, tmp_path):
    found = collect_importance(uneven, [np.arange(90)])
    np.savez(tmp_path / "importance.npz", **found)
    ids = np.arange(30)[None]
    with np.load(tmp_path / "importance.npz") as held:
        assert load(uneven, "int4", importance=held)(ids).tobytes() == load(uneven, "int4", importance=found)(
            ids).tobytes()


def test_an_importance_of_another_model(uneven, folders):
    found = collect_importance(folders("llama"), [np.arange(90)])
    with pytest.raises(ValueError, match=r"^load: model\.layers\.0\.self_attn\.q_proj\.weight: importance has "
                       r"shape \(32,\), expected \(64,\)"):
        load(uneven, "int4", importance=found)
    with pytest.raises(TypeError, match="^load: importance is a list, expected what collect_importance gives"):
        load(uneven, "int4", importance=[1])
    with pytest.raises(ValueError, match="^load: importance has no matrix of a layer, but 'foo'; expected"):
        load(uneven, "int4", importance={"foo": np.ones(3)})


def test_a_kind_from_outside_is_not_observed(uneven):
    spec = load(uneven, "float32").config
    assert inputs.can_observe(spec)
    assert not inputs.can_observe(replace(spec, layers=(replace(spec.layers[0], mixer="something"),)))
