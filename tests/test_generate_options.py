"""What generate is asked for beyond a text: samples, seeds, log-probabilities, hooks, settings of a model's makers."""
from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from model_folder import BYTES, small, tensors, write, write_json
from small_models import ANGLES_BY_LENGTH

from forge_c.models import Completion, Model, load
from forge_c.models.options import Wishes

SAMPLED = {"temperature": 1.0, "seed": 7}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    """Of ids only."""
    return load(write(tmp_path_factory.mktemp("model"), small()))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Model:
    """Of bytes."""
    return load(write(tmp_path_factory.mktemp("model"), small(vocab_size=256), tokenizer=BYTES))


def lists(found: Any) -> Any:
    return [lists(one) for one in found] if isinstance(found, list) else found.tolist()


def test_types_name_every_argument():
    """What decides the type of the result stands in the overloads, the rest in one list."""
    parameters = inspect.signature(Model.generate).parameters
    deciding = {"self", "prompt", "max_new_tokens", "n", "logprobs", "stream", "details"}
    assert set(Wishes.__annotations__) == parameters.keys() - deciding
    defaults = {"temperature": "0.0", "repetition_penalty": "1.0", "max_new_tokens": "128"}
    assert {name: repr(parameters[name].default) for name in defaults} == defaults


# ---- prompts ---------------------------------------------------------------------------------------


def test_arrays_of_other_libraries_are_prompts(model):
    torch = pytest.importorskip("torch")
    want = lists(model.generate(np.array([[1, 2, 3], [4, 5, 6]]), 5))
    for prompt in (torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32),
                   [torch.tensor([1, 2, 3]), np.array([4, 5, 6])], (memoryview(np.array([1, 2, 3])), [4, 5, 6])):
        assert lists(model.generate(prompt, 5)) == want
    assert lists(model.generate(torch.tensor([1, 2, 3]), 5)) == want[0]


class Series:
    """As pandas has it: an array that also has keys."""

    ndim = 1

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.array([1, 2, 3])

    def keys(self) -> range:
        return range(3)


def test_an_array_with_keys_is_an_array(model):
    assert lists(model.generate(Series(), 5)) == lists(model.generate([1, 2, 3], 5))


@pytest.mark.parametrize("kind", ["lists", "np", "pt"])
def test_what_a_hugging_face_tokenizer_returns_is_a_prompt(model, kind):
    transformers = pytest.importorskip("transformers")
    ids, mask = [[1, 2, 3], [9, 9, 4]], [[1, 1, 1], [0, 0, 1]]
    batch = transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask},
                                       tensor_type=None if kind == "lists" else kind)
    assert lists(model.generate(batch, 5)) == lists(model.generate([[1, 2, 3], [4]], 5))
    one = transformers.BatchEncoding({"input_ids": [1, 2]})
    assert lists(model.generate(one, 5)) == lists(model.generate([1, 2], 5))


def test_special_tokens_are_added_to_a_text_unless_told_not_to(texts):
    assert texts.generate("ab", 5) == texts.tokenizer.decode(texts.generate([0, 97, 98], 5))
    assert texts.generate("ab", 5, special_tokens=False) == texts.tokenizer.decode(texts.generate([97, 98], 5))


# ---- how many tokens -------------------------------------------------------------------------------


def test_without_a_limit_the_context_is_filled(tmp_path):
    model = load(write(tmp_path, small(max_position_embeddings=40)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = model.generate([[1, 2, 3], [4]], None, details=True)
        assert [len(one.ids) for one in found] == [37, 39] and {one.finish_reason for one in found} == {"length"}
        assert lists(model.generate([1, 2, 3], None)) == lists(model.generate([1, 2, 3], 37))
        cache = model.new_cache(1, 20)
        assert len(model.generate([1, 2, 3], None, cache=cache)) == 17 and cache.seq_len == 20
    for prompt, options, what in (([1] * 40, {}, "40 tokens fill the context of 40"),
                                  ([5], {"cache": cache}, "21 tokens fill the cache of 20")):
        with pytest.raises(ValueError, match=f"^generate: {what}, and leave no room for another$"):
            model.generate(prompt, None, **options)


def test_without_a_limit_the_end_token_ends_a_row(tmp_path):
    model = load(write(tmp_path, small(eos_token_id=list(range(0, 97, 3)))))
    one = model.generate([1, 2], None, details=True, temperature=1.0, seed=0)
    assert one.ids[-1] % 3 == 0 and all(i % 3 for i in one.ids[:-1]) and one.finish_reason == "stop"


# ---- samples and seeds -----------------------------------------------------------------------------


def test_the_first_sample_is_the_only_one_of_before(model):
    one = model.generate([1, 2], 12, **SAMPLED).tolist()
    assert lists(model.generate([1, 2], 12, n=1, **SAMPLED)) == one
    four = lists(model.generate([1, 2], 12, n=4, **SAMPLED))
    assert four[0] == one and len({tuple(ids) for ids in four}) == 4
    assert lists(model.generate([1, 2], 12, n=2, **SAMPLED)) == four[:2]


def test_samples_of_several_prompts(model):
    """Prompts of two chunks and of one, in rows that share pages."""
    rows = [np.arange(300) % 97, np.arange(5)]
    together = lists(model.generate(rows, 6, n=3, **SAMPLED))
    assert [len(samples) for samples in together] == [3, 3]
    assert together == [lists(model.generate(row, 6, n=3, **SAMPLED)) for row in rows]


@pytest.mark.parametrize(("family", "changes"), ANGLES_BY_LENGTH)
def test_samples_whose_angles_depend_on_their_length(tmp_path, family, changes):
    """Their prompts are shorter than the original length, and they outgrow it."""
    model = load(write(tmp_path, small(family, **changes)))
    rows = [np.arange(3), np.arange(20), np.arange(11)]
    together = lists(model.generate(rows, 12, n=2, cache_dtype="bfloat16", **SAMPLED))
    assert together == [lists(model.generate(row, 12, n=2, cache_dtype="bfloat16", **SAMPLED)) for row in rows]
    alone = [model.generate(row, 12, cache_dtype="bfloat16", **SAMPLED).tolist() for row in rows]
    assert alone == [samples[0] for samples in together]


def test_a_sample_draws_by_its_own_seed(model):
    """SeedSequence(seed, spawn_key=(j,)) is what sample j draws from; a list has a seed for each prompt or sample."""
    alone = [model.generate([1, 2], 12, temperature=1.0, seed=seed).tolist() for seed in (3, 5, 8)]
    assert lists(model.generate([[1, 2]] * 3, 12, temperature=1.0, seed=[3, 5, 8])) == alone
    assert lists(model.generate([1, 2], 12, n=3, temperature=1.0, seed=np.array([3, 5, 8]))) == alone
    first = [samples[0] for samples in lists(model.generate([[1, 2]] * 3, 12, n=2, temperature=1.0, seed=(3, 5, 8)))]
    assert first == alone
    one = model.generate([1, 2], 12, temperature=1.0, seed=np.array(5)).tolist()
    assert one == alone[1]


@pytest.mark.parametrize(("options", "message"), [
    ({"seed": [1, 2]}, "generate: seed has 2 integers, expected 1, one for each prompt"),
    ({"seed": [1, 2], "n": 3},
     "generate: seed has 2 integers, expected 1, one for each prompt, or 3, one for each sample"),
    ({"seed": [1, -2]}, "generate: seed is [1, -2], expected an integer >= 0 or a list of them"),
    ({"seed": 1.5}, "generate: seed is 1.5, expected an integer >= 0 or a list of them"),
    ({"n": 0}, "generate: n is 0, expected an integer >= 1"),
    ({"n": True}, "generate: n is True, expected an integer >= 1"),
    ({"n": 2, "temperature": 0.0},
     "generate: n is 2 and temperature 0, expected a temperature above 0: the best token is the same in every sample"),
    ({"logprobs": -1}, "generate: logprobs is -1, expected an integer >= 0"),
    ({"sampling": "greedy"}, "generate: sampling is 'greedy', expected None or 'model'"),
    ({"cache_dtype": "int4"}, "generate: cache_dtype is 'int4', expected one of float32, bfloat16, int8"),
])
def test_what_cannot_be_asked_for(model, options, message):
    with pytest.raises(ValueError) as caught:
        model.generate([1, 2], 4, **({"temperature": 1.0} | options))
    assert str(caught.value) == message


# ---- details ---------------------------------------------------------------------------------------


def test_details_say_what_there_is_and_why_it_ended(model, texts, tmp_path):
    one = texts.generate("ab", 6, details=True)
    assert isinstance(one, Completion) and one.text == texts.generate("ab", 6) and one.finish_reason == "length"
    assert texts.tokenizer.decode(one.ids) == one.text and one.logprobs is None and one.ids.dtype == np.int64
    with pytest.raises(AttributeError):
        one.text = ""
    several = model.generate([[1], [2, 3]], 4, details=True)
    assert [c.ids.tolist() for c in several] == lists(model.generate([[1], [2, 3]], 4))
    assert [c.text for c in several] == [None, None]
    stopped = texts.generate("ab", 40, stop=one.text[3:], details=True)
    assert (stopped.text, stopped.finish_reason) == (one.text[:3], "stop")
    assert model.generate([1], 0, details=True).finish_reason == "length"


def test_log_probabilities_are_those_of_the_models_logits(model):
    """Whatever is sampled from: the k best, best first, and the token's own."""
    ids = [3, 1, 4]
    for options in ({}, SAMPLED | {"top_k": 5, "repetition_penalty": 1.5}):
        one = model.generate(ids, 9, logprobs=3, details=True, **options)
        z = model([[*ids, *one.ids]])[0, 2:-1].astype(np.float64)
        want = z - np.log(np.exp(z).sum(-1, keepdims=True))
        assert len(one.logprobs) == 9
        for token, found, p in zip(one.ids, one.logprobs, want, strict=True):
            assert list(found)[:3] == np.argsort(-p)[:3].tolist() and set(found) == {*list(found)[:3], token}
            assert len(found) == 4 - (token in list(found)[:3])
            np.testing.assert_allclose(list(found.values()), p[list(found)], rtol=0, atol=1e-12)
        (_, scored), = model.score([[*ids, *one.ids]])
        assert [found[token] for token, found in zip(one.ids, one.logprobs, strict=True)] == scored[2:].tolist()
    assert isinstance(model.generate(ids, 2, logprobs=1), Completion)
    assert len(model.generate(ids, 2, logprobs=1000).logprobs[0]) == 97


def test_pieces_of_a_stream_may_be_completions(texts):
    pieces = list(texts.generate("ab", 6, stream=True, details=True, logprobs=2))
    whole = texts.generate("ab", 6, details=True, logprobs=2)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert np.concatenate([piece.ids for piece in pieces]).tolist() == whole.ids.tolist()
    assert tuple(d for piece in pieces for d in piece.logprobs) == whole.logprobs
    assert [piece.finish_reason for piece in pieces] == [None] * 5 + ["length"]
    rows = list(texts.generate("ab", 6, n=2, stream=True, temperature=1.0, seed=1))
    assert {row for row, _ in rows} == {0, 1}


def test_a_closed_stream_says_what_there_was(texts):
    stream = texts.generate("ab", 50, stream=True)
    assert stream.completions[0].text == "" and stream.completions[0].finish_reason is None
    text = next(stream) + next(stream)
    stream.close()
    (one,) = stream.completions
    assert one.finish_reason == "cancelled" and one.text.startswith(text) and list(stream) == []
    unread = texts.generate("ab", 50, stream=True)
    unread.close()
    assert unread.completions[0].finish_reason == "cancelled" and len(unread.completions[0].ids) == 0


# ---- logits_processor ------------------------------------------------------------------------------


def test_a_processor_sees_all_ids_and_a_copy_of_the_logits(model):
    calls: list[tuple[list[int], np.ndarray]] = []

    def processor(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        assert ids.dtype == np.int64 and logits.dtype == np.float32 and logits.shape == (97,)
        calls.append((ids.tolist(), logits.copy()))
        logits[:] = -np.inf
        logits[len(ids)] = 0
        return logits

    assert lists(model.generate([[50, 51], [60]], 3, logits_processor=processor)) == [[2, 3, 4], [1, 2, 3]]
    assert [ids for ids, _ in calls] == [[50, 51], [60], [50, 51, 2], [60, 1], [50, 51, 2, 3], [60, 1, 2]]
    for ids, logits in calls:
        assert logits.tobytes() == model([ids])[0, -1].tobytes()
    for options in (SAMPLED, {"temperature": 2.0, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3}):
        assert lists(model.generate([50, 51], 3, logits_processor=processor, **options)) == [2, 3, 4]


def test_a_processor_that_keeps_them_changes_nothing(model):
    for options in ({}, SAMPLED, SAMPLED | {"top_p": 0.9}):
        want = lists(model.generate([1, 2], 12, **options))
        for kept in (lambda ids, z: z, lambda ids, z: z.astype(np.float64), lambda ids, z: z.tolist()):
            assert lists(model.generate([1, 2], 12, logits_processor=kept, **options)) == want
    penalty = {"repetition_penalty": 1.4}
    assert lists(model.generate([1, 2], 12, logits_processor=lambda ids, z: z, **penalty)) == \
        lists(model.generate([1, 2], 12, **penalty))


def test_what_a_processor_forbids_never_comes(model):
    """Also not by rounding at the end of the cumulated probabilities."""
    def even(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        logits[1::2] = -np.inf
        return logits

    found = model.generate([1], 200, logits_processor=even, temperature=3.0, seed=1)
    assert (found % 2 == 0).all() and len(set(found.tolist())) > 20


def test_a_processor_may_keep_state_and_end_its_row(model):
    def processor(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        if len(ids) == 4:
            raise StopIteration
        return logits

    short, long = model.generate([[1, 2], [3] * 9], 5, logits_processor=processor, details=True)
    assert (len(short.ids), short.finish_reason) == (2, "cancelled")
    assert (len(long.ids), long.finish_reason) == (5, "length")
    assert len(list(model.generate([1, 2], 5, logits_processor=processor, stream=True))) == 2


class Hostile:
    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no")


@pytest.mark.parametrize(("returned", "kind", "message"), [
    (None, TypeError, "a NoneType of dtype object, expected logits (97,) of floats"),
    (np.zeros(97, int), TypeError, "a ndarray of dtype int64, expected logits (97,) of floats"),
    ("x", TypeError, "a str of dtype <U1, expected logits (97,) of floats"),
    (Hostile(), TypeError, "a Hostile that NumPy cannot view (no), expected logits (97,)"),
    (np.zeros(96, np.float32), ValueError, "shape (96,), expected (97,)"),
    (np.zeros((1, 97), np.float32), ValueError, "shape (1, 97), expected (97,)"),
    (1.0, ValueError, "shape (), expected (97,)"),
    (np.full(97, np.nan), ValueError, "a NaN or +inf, expected numbers or -inf"),
    (np.full(97, np.inf), ValueError, "a NaN or +inf, expected numbers or -inf"),
    (np.full(97, -np.inf), ValueError, "-inf for every token, expected one that may follow"),
])
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_what_a_processor_must_not_return(model, returned, kind, message, options):
    with pytest.raises(kind) as caught:
        model.generate([1], 3, logits_processor=lambda ids, logits: returned, **options)
    assert str(caught.value) == f"generate: logits_processor returned {message}"


def test_a_processors_own_errors_are_the_callers(model):
    with pytest.raises(ZeroDivisionError):
        model.generate([1], 3, logits_processor=lambda ids, logits: 1 / 0)
    with pytest.raises(TypeError, match="^generate: logits_processor is a int, expected a function$"):
        model.generate([1], 3, logits_processor=5)
    bfloat16 = model.generate([1], 3, logits_processor=lambda ids, z: z.astype(ml_dtypes.bfloat16))
    assert len(bfloat16) == 3


# ---- what a model's makers say ---------------------------------------------------------------------


def made(folder: Path, **settings: Any) -> Model:
    write(folder, small())
    write_json(folder / "generation_config.json", settings)
    return load(folder)


def test_the_models_own_sampling(tmp_path):
    settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.01,
                "repetition_penalty": 1.05, "eos_token_id": 96}
    model = made(tmp_path, **settings)
    assert model.generation_config == settings
    said = {key: settings[key] for key in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}

    def drawn(**options: Any) -> list[int]:
        return model.generate([1, 2], 16, seed=3, **options).tolist()

    assert drawn(sampling="model") == drawn(**said) != drawn()
    assert drawn(sampling="model", temperature=1.5, top_k=3) == drawn(**said | {"temperature": 1.5, "top_k": 3})
    assert drawn(sampling="model", repetition_penalty=1.0) == drawn(**said | {"repetition_penalty": 1.0})
    assert drawn(sampling="model", temperature=0.0) == drawn(repetition_penalty=1.05)


@pytest.mark.parametrize(("settings", "same"), [
    ({}, {}), ({"temperature": 0.6, "top_p": 0.9}, {}), ({"do_sample": False, "temperature": 0.6}, {}),
    ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
    ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
    ({"do_sample": True, "top_k": 0, "top_p": None, "temperature": None}, {"temperature": 1.0}),
    ({"do_sample": True, "top_k": None}, {"temperature": 1.0, "top_k": 50}),
    ({"do_sample": True, "top_k": 7, "num_beams": 1, "typical_p": 1.0}, {"temperature": 1.0, "top_k": 7})])
def test_without_do_sample_the_best_token_is_taken(tmp_path, settings, same):
    model = made(tmp_path, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = model.generate([1, 2], 16, seed=3, sampling="model").tolist()
    assert found == model.generate([1, 2], 16, seed=3, **same).tolist()


def test_settings_that_cannot_be_followed(tmp_path):
    model = made(tmp_path / "a", do_sample=True, num_beams=4, typical_p=0.9)
    with pytest.warns(UserWarning, match="^generate: generation_config.json has num_beams, typical_p, which") as caught:
        model.generate([1], 2, sampling="model")
    assert caught[0].filename == __file__
    model = made(tmp_path / "b", do_sample=True, top_p=7)
    assert len(model.generate([1], 2)) == 2
    with pytest.raises(ValueError, match="^generate: top_p is 7, expected .*, in generation_config.json$"):
        model.generate([1], 2, sampling="model")
    with pytest.raises(ValueError, match="^generate: min_p is 3, expected a number from 0 to 1, or None$"):
        model.generate([1], 2, sampling="model", min_p=3)


def test_nan_logits_are_the_models_fault_not_the_processors(tmp_path):
    weights = tensors(small())
    weights["model.norm.weight"][0] = np.nan
    model = load(write(tmp_path, small(), weights))
    with pytest.raises(FloatingPointError, match="the model's logits are NaN"):
        model.generate([1], 2, logits_processor=lambda ids, logits: np.zeros(97))
