"""Hidden states, vectors and log-probabilities of given texts, against whole logits and against transformers."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from model_folder import FAMILIES, STATE_SPACE

from forge_c.functional import KV_CHUNK
from forge_c.models import Model, load
from forge_c.models.decoder import Decoder

LENGTHS = (5, 1, 300, 2, 40, 5, 270)


def rows_of(model: Model) -> list[np.ndarray]:
    return [np.random.default_rng(n).integers(0, model.config.vocab_size, n) for n in LENGTHS]


# ---- score -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES, *STATE_SPACE, "dynamic"])
def test_scores_are_the_log_softmax_of_whole_logits(model_of, name):
    model = model_of(name)
    rows = rows_of(model)
    found = model.score(rows)
    for row, (ids, logprobs) in zip(rows, found, strict=True):
        assert ids.tolist() == row.tolist() and logprobs.dtype == np.float64 and logprobs.shape == (len(row) - 1,)
        z = model(row[None])[0, :-1].astype(np.float64)
        want = z - np.log(np.exp(z).sum(-1, keepdims=True))
        np.testing.assert_allclose(logprobs, want[np.arange(len(row) - 1), row[1:]], rtol=0, atol=1e-12)
        assert model.score(row)[0][1].tobytes() == logprobs.tobytes(), "whatever else is scored with it"


def test_scores_of_texts(texts):
    (ids, logprobs), (_, other) = texts.score(["ab", "c"])
    assert ids.tolist() == [0, 97, 98] and texts.score("ab")[0][1].tobytes() == logprobs.tobytes()
    assert other.shape == (1,) and texts.score("")[0][1].shape == (0,) and texts.score([]) == []


@pytest.mark.parametrize("limit", [97, 97 * 3, 97 * 20])
def test_logits_never_stand_whole(model, monkeypatch, limit):
    rows = rows_of(model)
    want = [logprobs.tobytes() for _, logprobs in model.score(rows)]
    largest, forward = [0], Decoder.forward

    def measured(self, *arguments: Any, **options: Any) -> Any:
        found = forward(self, *arguments, **options)
        largest[0] = max(largest[0], found[0].size)
        return found

    monkeypatch.setattr("forge_c.models.scoring._LOGITS", limit)
    monkeypatch.setattr(Decoder, "forward", measured)
    assert [logprobs.tobytes() for _, logprobs in model.score(rows)] == want
    assert largest[0] <= max(limit, 97 * 7)


# ---- hidden ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_transformers(tmp_path, family):
    """Of every layer: what goes into it, and after the last norm."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import hf_models

    with torch.no_grad():
        reference = hf_models.tiny(family)
    reference.save_pretrained(tmp_path)
    model = load(tmp_path, "float32")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 19))
    with torch.no_grad():
        states = reference(torch.tensor(ids), output_hidden_states=True).hidden_states
    for layer in range(-len(states), len(states)):
        want = states[layer].numpy()
        np.testing.assert_allclose(model.hidden(ids, layer=layer), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("name", [*FAMILIES, *STATE_SPACE, "dynamic"])
def test_hidden_states_lead_to_the_logits(model_of, isa, name):
    """In chunks or whole, in a cache or without, for every layer the same bits."""
    model, step = model_of(name), KV_CHUNK // 2
    ids = np.stack([np.random.default_rng(i).integers(0, 97, KV_CHUNK + 30) for i in range(2)])
    for layer in (-1, 0, 1, model.config.n_layers - 1):
        whole = model.hidden(ids, layer=layer)
        assert whole.dtype == np.float32 and whole.shape == (2, KV_CHUNK + 30, 32)
        cache = model.new_cache(2, KV_CHUNK + 30)
        with cache.expecting(KV_CHUNK + 30):
            parts = [model.hidden(ids[:, at : at + step], cache, layer=layer) for at in range(0, KV_CHUNK + 30, step)]
        assert np.concatenate(parts, axis=1).tobytes() == whole.tobytes()
        assert [row.tolist() for row in cache.ids] == ids.tolist()
        assert whole[1].tobytes() == model.hidden(ids[1:], layer=layer)[0].tobytes()
    filled = model.new_cache(2, KV_CHUNK + 30)
    model(ids, filled)
    for one in (cache, filled):
        one.truncate(KV_CHUNK)
    assert model(ids[:, :9], cache).tobytes() == model(ids[:, :9], filled).tobytes(), "it fills a cache as a call"


def test_no_logits_are_made_for_hidden_states(model, monkeypatch):
    real = model._decoder._model

    class Watching:
        norm, head, embedding, held = real.norm, real.head, real.embedding, real.held

        def forward(self, *arguments: Any, logits: bool = True, **options: Any) -> Any:
            assert not logits
            return real.forward(*arguments, logits=False, **options)

    monkeypatch.setattr(model._decoder, "_model", Watching())
    assert model.hidden([[1, 2]]).shape == (1, 2, 32) and model.embed([[1, 2]]).shape == (1, 32)


@pytest.mark.parametrize(("call", "kind", "message"), [
    (lambda m: m.hidden([1, 2]), ValueError, "hidden: ids has shape (2,), expected (batch, seq)"),
    (lambda m: m.hidden([[97]]), IndexError, "hidden: id 97 at [0, 0] is outside the vocabulary of 97"),
    (lambda m: m.hidden([[1]], layer=4), IndexError, "hidden: layer is 4, expected -4 to 3"),
    (lambda m: m.hidden([[1]], layer=-5), IndexError, "hidden: layer is -5, expected -4 to 3"),
    (lambda m: m.hidden([[1]], layer=1.5), TypeError, "hidden: layer is 1.5, expected an integer"),
    (lambda m: m.hidden([[1]], m.new_cache(2)), ValueError, "hidden: ids has 1 rows, expected 2 as the cache"),
    (lambda m: m.hidden([[1, 2]], m.new_cache(1, 1)), ValueError,
     "hidden: 0 tokens in the cache and 2 more exceed its max_seq_len 1"),
    (lambda m: m.embed([[1]], pooling="max"), ValueError, "embed: pooling is 'max', expected 'mean' or 'last'"),
    (lambda m: m.embed([[1], []]), ValueError, "embed: text 1 is empty, expected at least one token"),
    (lambda m: m.embed("text"), ValueError, "embed: a text prompt needs a tokenizer, and the model's folder has none; "
     "pass ids"),
    (lambda m: m.score([[1], [98]]), IndexError, "score: id 98 at [0] is outside the vocabulary of 97"),
    (lambda m: m.score([]), None, ""), (lambda m: m.embed([]), None, ""),
])
def test_arguments_are_checked(model, call, kind, message):
    if kind is None:
        assert len(call(model)) == 0
        return
    with pytest.raises(kind) as caught:
        call(model)
    assert str(caught.value) == message


# ---- embed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "dynamic"])
def test_a_vector_is_the_pooled_hidden_states(model_of, name, pooling):
    model = model_of(name)
    rows = rows_of(model)
    found = model.embed(rows, pooling=pooling, normalize=False)
    unit = model.embed(rows, pooling=pooling)
    assert found.dtype == np.float32 and found.shape == (len(rows), 32)
    for row, vector, direction in zip(rows, found, unit, strict=True):
        h = model.hidden(row[None])[0].astype(np.float64)
        want = h.mean(0) if pooling == "mean" else h[-1]
        np.testing.assert_allclose(vector, want, rtol=0, atol=1e-6 * np.abs(h).max())
        np.testing.assert_allclose(direction, want / np.linalg.norm(want), rtol=0, atol=1e-6)
        assert model.embed(row, pooling=pooling, normalize=False).tobytes() == vector.tobytes()


def test_vectors_of_texts(texts):
    found = texts.embed(["ab", "c", ""])
    assert found.shape == (3, 32) and texts.embed("c").tobytes() == found[1].tobytes()
    assert texts.embed([[0, 97, 98]]).tobytes() == found[0].tobytes()
