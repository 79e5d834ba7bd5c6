"""Rope types dynamic and longrope: a token's angles follow from the length of its text, not from room or calls."""
from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from model_folder import small, write

from forge_c.functional import KV_CHUNK
from forge_c.models import Model, load
from forge_c.rotary import longest_short, rope_table, rope_table_by_position
from forge_c.state import ModelCache

BORDER = 32
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 8.0, 32.0], "factor": 8.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "dynamic": small(max_position_embeddings=BORDER, rope_scaling={"rope_type": "dynamic", "factor": 4.0}),
    "longrope": small("phi3", max_position_embeddings=256, original_max_position_embeddings=BORDER,
                      rope_scaling=FACTORS | {"rope_type": "longrope"}),
    "one type of layer": small("gemma3_text", head_dim=8, rope_scaling=FACTORS | {
        "rope_type": "longrope", "original_max_position_embeddings": BORDER}),
}
LONGROPES = ("longrope", "one type of layer")
pytestmark = pytest.mark.filterwarnings("ignore:generate")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: load(write(folder / name.replace(" ", "-"), config)) for name, config in CONFIGS.items()}


@pytest.fixture(params=CONFIGS)
def model(request, models):
    return models[request.param]


def ids(*lengths: int) -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(0, 97, n) for i, n in enumerate(lengths)]


def by_whole_calls(model: Model, prompt: np.ndarray, tokens: int) -> list[int]:
    """Greedy: every token from a call with all that is before it."""
    text = prompt.tolist()
    for _ in range(tokens):
        text.append(int(model([text], last_only=True)[0, 0].argmax()))
    return text[len(prompt):]


# ---- what chooses ----------------------------------------------------------------------------------

@pytest.mark.parametrize("length", [1, 20, BORDER, BORDER + 1, 70])
def test_the_room_changes_nothing(model, length):
    text = ids(length)[0][None]
    want = model(text).tobytes()
    for room in (length, BORDER, BORDER + 1, 300):
        if room >= length:
            assert model(text, model.new_cache(1, room)).tobytes() == want, room


@pytest.mark.parametrize("length", [5, 30, BORDER, 40])
def test_how_many_tokens_are_asked_for_changes_nothing(model, length):
    prompt = ids(length)[0]
    most = model.generate(prompt, 60).tolist()
    for tokens in (1, 2, 8, 30):
        assert model.generate(prompt, tokens).tolist() == most[:tokens]


@pytest.mark.parametrize("name", LONGROPES)
@pytest.mark.parametrize("length", [3, BORDER - 1, BORDER, BORDER + 1])
def test_a_text_that_outgrows_the_border_is_read_again(models, name, length):
    prompt = ids(length)[0]
    assert models[name].generate(prompt, 40).tolist() == by_whole_calls(models[name], prompt, 40)


@pytest.mark.parametrize("name", LONGROPES)
@pytest.mark.parametrize("cuts", [(20, 40), (BORDER, BORDER + 1), (31, 32, 33, 34), (40, 41, 60), (1, 2, 50)])
def test_a_call_gives_what_the_whole_text_gives_at_its_end(models, name, cuts):
    model, text = models[name], ids(60)[0][None]
    cache, at = model.new_cache(1, 60), 0
    for cut in cuts:
        assert model(text[:, at:cut], cache).tobytes() == model(text[:, :cut])[:, at:].tobytes(), cut
        at = cut


def test_dynamic_keeps_what_has_been_read(models):
    """As transformers does: only new tokens have the angles of the new length."""
    model, text = models["dynamic"], ids(60)[0][None]
    cache = model.new_cache(1, 60)
    model(text[:, :40], cache)
    keys = cache.copy().layers[0]
    found = model(text[:, 40:60], cache)
    assert found.tobytes() != model(text)[:, 40:].tobytes()
    expected = model.new_cache(1, 60)
    with expected.expecting(40):
        model(text[:, :7], expected)
        model(text[:, 7:40], expected)
    assert model(text[:, 40:], expected).tobytes() == found.tobytes()
    assert keys.lengths.tolist() == [40] and cache.lengths.tolist() == [60]


# ---- in pieces -------------------------------------------------------------------------------------

@pytest.mark.parametrize("chunk", [1, 3, 16, 39])
def test_pieces_that_are_told_the_whole_length_are_the_whole(model, chunk):
    texts = np.stack(ids(40, 40))
    cache = model.new_cache(2, 300)
    with cache.expecting(40):
        parts = [model(texts[:, at : at + chunk], cache) for at in range(0, 40, chunk)]
    assert np.concatenate(parts, 1).tobytes() == model(texts).tobytes()
    whole = model.new_cache(2, 40 + 9)
    model(texts, whole)
    more = np.stack(ids(9, 9))
    assert model(more, cache).tobytes() == model(more, whole).tobytes()


def test_chunks_within_a_call_are_told(model):
    text = ids(2 * KV_CHUNK + 40)[0][None]
    cache = model.new_cache(1, text.shape[1])
    with cache.expecting(text.shape[1]):
        parts = [model(text[:, at : at + 100], cache) for at in range(0, text.shape[1], 100)]
    whole = model(text)
    assert np.concatenate(parts, 1).tobytes() == whole.tobytes()
    assert model(text, last_only=True).tobytes() == whole[:, -1:].tobytes()
    assert int(model.generate(text[0], 1)[0]) == whole[0, -1].argmax()


def test_what_was_expected_and_did_not_come_is_forgotten(model):
    text, other = ids(12, 8)
    cache = model.new_cache(1, 300)
    with pytest.raises(KeyboardInterrupt), cache.expecting(200):
        model(text[None], cache)
        raise KeyboardInterrupt
    fresh = model.new_cache(1, 300)
    model(text[None], fresh)
    assert model(other[None], cache).tobytes() == model(other[None], fresh).tobytes()


@pytest.mark.parametrize("value", [-1, 1.5, "3", True])
def test_expecting_takes_a_number_of_tokens(model, value):
    with pytest.raises((TypeError, ValueError), match=r"^ModelCache.expecting: tokens is "), \
            model.new_cache().expecting(value):
        pass


# ---- back, apart, together -------------------------------------------------------------------------

@pytest.mark.parametrize("kept", [0, 1, 12, 31, 32, 33, 45])
@pytest.mark.parametrize("more", [1, 2, 11, 30])
def test_a_truncated_cache_is_as_if_the_rest_had_never_been(model, kept, more):
    text, other = ids(50, more)
    used, fresh = model.new_cache(1, 100), model.new_cache(1, 100)
    model(text[None], used)
    used.truncate(kept)
    if kept:
        model(text[None, :kept], fresh)
    assert model(other[None], used).tobytes() == model(other[None], fresh).tobytes()
    assert used.ids[0].tolist() == [*text[:kept], *other]


def test_rows_of_a_batch_are_the_rows_alone(model):
    prompts = ids(3, 31, 32, 33, 60)
    together = model.generate(prompts, 40, temperature=1.0, seed=3)
    for prompt, found in zip(prompts, together, strict=True):
        assert found.tolist() == model.generate(prompt, 40, temperature=1.0, seed=3).tolist()


@pytest.mark.parametrize("more", [1, 2, 20])
def test_rows_of_different_lengths_in_one_call(model, more):
    texts, other = np.stack(ids(50, 50, 50)), np.stack(ids(more, more, more))
    lengths = np.array([10, 30, 50])
    cache = model.new_cache(3, 100)
    model(texts, cache)
    cache.truncate(lengths)
    found = model(other, cache)
    for row, n in enumerate(lengths):
        alone = model.new_cache(1, 100)
        model(texts[row : row + 1, :n], alone)
        assert found[row].tobytes() == model(other[row : row + 1], alone)[0].tobytes()


def test_copies_forks_and_files_know_their_angles(model, tmp_path):
    text, other = ids(45, 8)
    cache = model.new_cache(1, 300)
    with cache.expecting(100):
        model(text[None], cache)
    cache.save(tmp_path / "cache")
    cache.truncate(40)
    twins = [copy.copy(cache), pickle.loads(pickle.dumps(cache)), cache.fork(2).row(1), cache.row(0)]
    want = {n: [] for n in (40, 45)}
    for twin in twins:
        want[40].append(model(other[None], twin.copy()).tobytes())
    for saved in (ModelCache.load(tmp_path / "cache", model), ModelCache.load(tmp_path / "cache", model)):
        want[45].append(model(other[None], saved).tobytes())
        saved.truncate(40)
        want[40].append(model(other[None], saved).tobytes())
    assert len(set(want[40])) == len(set(want[45])) == 1
    if (tmp_path / "cache" / "angles.i64").exists():
        (tmp_path / "cache" / "angles.i64").write_bytes(bytes(8))
        with pytest.raises(ValueError, match=r"angles.i64 is damaged: 8 bytes, expected 360$"):
            ModelCache.load(tmp_path / "cache", model)


@pytest.mark.parametrize("name", LONGROPES)
def test_a_row_whose_tokens_are_unknown_cannot_be_read_again(models, name):
    model = models[name]
    cache = model.new_cache(1, 100)
    model(ids(30)[0][None], cache)
    for layer in cache.layers:
        layer.append(*(np.zeros((1, 1, layer.n_kv_heads, layer.head_dim), np.float32),) * 2)
    assert cache.ids[0][-1] == -1
    before = cache.lengths
    with pytest.raises(ValueError, match="^ModelCache: row 0 must be read again, as its angles follow from its length"):
        model(ids(10)[0][None], cache)
    assert (cache.lengths == before).all()


@pytest.mark.parametrize("name", LONGROPES)
def test_an_interruption_while_reading_again_says_what_is_left(models, name, monkeypatch):
    model, (text, other) = models[name], ids(30, 10)
    cache = model.new_cache(1, 100)
    model(text[None], cache)
    real = model._decoder._model.forward

    def interrupted(*arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        raise KeyboardInterrupt

    class Watched:
        forward = staticmethod(interrupted)

    monkeypatch.setattr(model._decoder, "_model", Watched())
    with pytest.raises(KeyboardInterrupt) as caught:
        model(other[None], cache)
    assert model._decoder._model.forward == real
    assert caught.value.__notes__ == ["model: the cache holds [0] tokens: a row was being read again"]
    assert cache.lengths.tolist() == [0] and model(text[None], cache).tobytes() == model(text[None]).tobytes()


# ---- tables ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("scaling", "border"), [
    ({"rope_type": "dynamic", "factor": 4.0, "max_position_embeddings": 40}, 40),
    (FACTORS | {"rope_type": "longrope", "original_max_position_embeddings": 300}, 300),
])
def test_a_table_by_position_has_the_row_of_each_length(scaling, border):
    assert longest_short(scaling) == border
    table = rope_table_by_position(8, 700, 10000.0, scaling)
    for p in (0, 1, border - 1, border, border + 1, 255, 256, 511, 600, 699):
        whole = rope_table(8, p + 1, 10000.0, scaling=scaling)
        assert table.cos[p].tobytes() == whole.cos[p].tobytes() and table.sin[p].tobytes() == whole.sin[p].tobytes(), p
    for first in (1, border, border + 1, 257, 699):
        grown = rope_table_by_position(8, 700, 10000.0, scaling, rope_table_by_position(8, first, 10000.0, scaling))
        assert grown.cos.tobytes() == table.cos.tobytes() and grown.sin.tobytes() == table.sin.tobytes()
