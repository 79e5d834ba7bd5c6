"""Model calls and generate: the same bits however a text is fed, and exactly the text that the tokens spell."""
from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from model_folder import BYTES, FAMILIES, STATE_SPACE, small, tensors, write
from small_models import interrupted

from forge_c.functional import KV_CHUNK
from forge_c.models import Model, load
from forge_c.models.decoder import Decoder
from forge_c.models.sampling import Sampler

BF16 = ml_dtypes.bfloat16
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
LONGROPE = {"max_position_embeddings": 128, "original_max_position_embeddings": 16, "rope_scaling": {
    "type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}}
MODELS: dict[str, tuple[dict[str, Any], Any]] = {
    **{family: (small(family), np.float32) for family in (*FAMILIES, *STATE_SPACE)},
    "bfloat16": (small(), BF16), "gemma2 bfloat16": (small("gemma2"), BF16),
    "int8": (small(), BF16), "gemma2 int8": (small("gemma2"), BF16), "int4": (small(), np.float32),
    "dynamic": (small(**DYNAMIC), np.float32), "longrope": (small("phi3", **LONGROPE), np.float32),
    "biases": (small(attention_bias=True, mlp_bias=True), np.float32),
}
WIDE = {"hidden_size": 192, "intermediate_size": 320, "vocab_size": 257, "head_dim": 40}  # enough work for threads
WIDE_MODELS = {"wide": (small("mistral", **WIDE), np.float32), "wide bfloat16": (small(**WIDE), BF16),
               "wide int8": (small(**WIDE), BF16), "wide int4": (small("mistral", **WIDE), BF16)}
QUANTIZED = ("int8", "int4")  # a name that ends so is packed so
SAMPLED = {"temperature": 1.0, "top_k": 60, "top_p": 0.98, "repetition_penalty": 1.1, "seed": 7}
BUSY = "KVCache: another thread is writing to this cache"


@pytest.fixture(scope="module")
def model_of(tmp_path_factory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            config, stored = (MODELS | WIDE_MODELS)[name]
            folder = write(tmp_path_factory.mktemp("model"), config, dtype=stored)
            made[name] = load(folder, name.split()[-1] if name.endswith(QUANTIZED) else "auto")
        return made[name]

    return get


@pytest.fixture
def model(model_of):
    return model_of("llama")


@pytest.fixture
def seen_logits(monkeypatch) -> list[bytes]:
    """The bytes of every row of logits that a token is picked from."""
    found: list[bytes] = []
    pick = Sampler.pick

    def recorded(self, logits, *rest):
        found.append(logits.tobytes())
        return pick(self, logits, *rest)

    monkeypatch.setattr(Sampler, "pick", recorded)
    return found


def prompts(model: Model, *lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(lengths)
    return [rng.integers(0, model.config.vocab_size, n) for n in lengths]


def by_hand(model: Model, ids: np.ndarray, count: int) -> list[int]:
    """The best token, count times over, fed one by one into a cache."""
    cache = model.new_cache(1, len(ids) + count)
    logits, found = model(ids[None], cache), []
    for _ in range(count):
        found.append(int(logits[0, -1].argmax()))
        logits = model([[found[-1]]], cache) if len(found) < count else logits
    return found


def elsewhere(work: Callable[[], Any]) -> Any:
    """What `work` returns or raises in another thread."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


# ---- tokens ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:generate")
def test_greedy_is_the_best_token_again_and_again(model_of, name):
    model = model_of(name)
    for ids in prompts(model, 1, 9):
        found = model.generate(ids, 24)
        assert found.dtype == np.int64 and found.tolist() == by_hand(model, ids, 24)
    assert len(set(found.tolist())) > 3, "a model that repeats itself tests nothing"


@pytest.mark.parametrize("name", [*FAMILIES, *STATE_SPACE, "bfloat16"])
def test_greedy_without_a_cache(model_of, name):
    model = model_of(name)
    ids = prompts(model, 6)[0].tolist()
    found = model.generate(ids, 12).tolist()
    for token in found:
        assert int(model([ids])[0, -1].argmax()) == token
        ids.append(token)


def test_a_prompt_of_several_chunks(model_of):
    for name in ("llama", "gemma2"):
        model = model_of(name)
        ids = prompts(model, 2 * KV_CHUNK + 5)[0]
        assert model.generate(ids, 5).tolist() == by_hand(model, ids, 5)


@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:generate")
def test_a_row_does_not_depend_on_the_others(model_of, seen_logits, name, how):
    """Prompts of 1, 5, 23 and 270 tokens together: each step's logits have the bits of the prompt alone."""
    model = model_of(name)
    rows = prompts(model, 1, 5, 23, KV_CHUNK + 14)
    together = model.generate(rows, 10, **how)
    bits = [seen_logits[i :: len(rows)] for i in range(len(rows))]
    for row, ids in enumerate(rows):
        seen_logits.clear()
        assert model.generate(ids, 10, **how).tolist() == together[row].tolist()
        assert seen_logits == bits[row]


def test_rows_that_end_early_change_nothing(tmp_path):
    model = load(write(tmp_path, small(eos_token_id=list(range(0, 97, 5)))))
    rows = prompts(model, 3, 8, 5, 2, 9)
    together = model.generate(rows, 20, temperature=1.0, seed=3)
    for ids, found in zip(rows, together, strict=True):
        assert found.tolist() == model.generate(ids, 20, temperature=1.0, seed=3).tolist()
    lengths = {len(ids) for ids in together}
    assert len(lengths) > 2 and min(lengths) < 20
    for ids in together:
        assert all(token % 5 for token in ids[:-1]) and (len(ids) == 20 or ids[-1] % 5 == 0)


def test_generating_twice_is_the_same(model):
    ids = prompts(model, 7)[0]
    assert model.generate(ids, 20).tolist() == model.generate(ids, 20).tolist()


def test_seeds(model):
    def drawn(seed: int | None) -> tuple[int, ...]:
        return tuple(model.generate([1, 2, 3], 24, temperature=1.0, seed=seed))

    before = np.random.get_state()[1].tobytes()
    assert drawn(5) == drawn(5) == drawn(np.int64(5))
    assert len({drawn(seed) for seed in range(8)}) == 8
    assert drawn(None) != drawn(None)
    assert np.random.get_state()[1].tobytes() == before


@pytest.mark.parametrize("how", [
    {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-9}], ids=repr)
def test_sampling_from_one_token_is_greedy(model, how):
    assert model.generate([4, 5], 20, **({"temperature": 1.0} | how)).tolist() == model.generate([4, 5], 20).tolist()


def test_a_repetition_penalty_sees_prompt_and_answer(model):
    found = model.generate([1, 2, 3], 60, repetition_penalty=1e6).tolist()
    assert len({1, 2, 3, *found}) == 63


# ---- the same bits ---------------------------------------------------------------------------------

def fed(model: Model, ids: np.ndarray, chunk: int, **options: Any) -> bytes:
    cache = model.new_cache(*ids.shape, **options)
    with cache.expecting(ids.shape[1]):
        parts = [model(ids[:, at : at + chunk], cache) for at in range(0, ids.shape[1], chunk)]
    assert cache.lengths.tolist() == [ids.shape[1]] * len(ids)
    return np.concatenate(parts, axis=1).tobytes()


@pytest.mark.parametrize("name", MODELS)
def test_chunks_are_the_whole(model_of, isa, name):
    model = model_of(name)
    ids = np.stack(prompts(model, 40, 40))
    whole = model(ids).tobytes()
    for chunk in (1, 3, 16, 40):
        assert fed(model, ids, chunk) == whole


@pytest.mark.parametrize("name", ["llama", "dynamic", "longrope"])
def test_what_was_asked_before_changes_nothing(tmp_path, name):
    """Above all not the RoPE table, which depends on the longest text in some types."""
    folder = write(tmp_path, MODELS[name][0])
    used, fresh = load(folder), load(folder)
    ids = prompts(used, 12, 120)
    used(ids[1][None])
    assert used(ids[0][None]).tobytes() == fresh(ids[0][None]).tobytes()


@pytest.mark.parametrize("name", ["llama", "gemma2", "bfloat16"])
def test_long_chunks_are_the_whole(model_of, name):
    model = model_of(name)
    ids = prompts(model, 2 * KV_CHUNK + 70)[0][None]
    whole = model(ids).tobytes()
    for chunk in (100, KV_CHUNK, KV_CHUNK + 1):
        assert fed(model, ids, chunk) == whole


def test_a_bfloat16_cache_rounds_only_keys_and_values(model):
    ids = np.stack(prompts(model, 30, 30))
    whole = fed(model, ids, 30, dtype="bfloat16")
    assert fed(model, ids, 1, dtype="bfloat16") == fed(model, ids, 7, dtype="bfloat16") == whole
    exact = model(ids)
    assert whole != exact.tobytes()
    assert np.abs(np.frombuffer(whole, np.float32) - exact.ravel()).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("name", MODELS)
def test_a_row_of_a_batch_is_the_row_alone(model_of, isa, name):
    model = model_of(name)
    ids = np.stack(prompts(model, 19, 19, 19))
    together = model(ids)
    for row in range(3):
        assert together[row].tobytes() == model(ids[row : row + 1]).tobytes()


@pytest.mark.parametrize("name", WIDE_MODELS)
def test_any_thread_count_gives_the_same_bits(model_of, each_thread_count, name):
    model = model_of(name)
    ids = np.stack(prompts(model, 300, 300))
    found = {(model(ids).tobytes(), model.generate(ids[0], 8, **SAMPLED).tobytes()) for _ in each_thread_count()}
    assert len(found) == 1


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "qwen2", "bfloat16", "dynamic"])
def test_a_truncated_cache_continues_as_a_fresh_one(model_of, name):
    model = model_of(name)
    ids, other = np.stack(prompts(model, 30, 30)), np.stack(prompts(model, 11, 11))
    for kept in (0, 1, 12, 30):
        used, fresh = model.new_cache(2, 60), model.new_cache(2, 60)
        model(ids, used)
        used.truncate(kept)
        model(ids[:, :kept], fresh)
        assert used.seq_len == fresh.seq_len == kept
        assert model(other, used).tobytes() == model(other, fresh).tobytes()


def test_rows_are_truncated_each_to_its_length(model):
    ids, more = np.stack(prompts(model, 20, 20)), np.stack(prompts(model, 4, 4))
    cache = model.new_cache(2, 30)
    model(ids, cache)
    cache.truncate([5, 13])
    together = model(more, cache)
    assert cache.lengths.tolist() == [9, 17] and cache.seq_len == 17
    for row, kept in enumerate((5, 13)):
        whole = np.concatenate([ids[row, :kept], more[row]])[None]
        assert together[row].tobytes() == model(whole)[0, kept:].tobytes()


def test_a_truncation_that_a_window_forbids_changes_nothing(model_of):
    """gemma2 has windowed and full layers: all or none of them go back."""
    model = model_of("gemma2")
    ids = prompts(model, 800)[0][None]
    cache = model.new_cache(1, 900)
    model(ids, cache)
    with pytest.raises(ValueError, match=r"KVCache.truncate: row 0 cannot go back to 100 tokens"):
        cache.truncate(100)
    assert [layer.seq_len for layer in cache.layers] == [800] * 3
    assert model([[5]], cache).tobytes() == model(np.append(ids, [[5]], 1))[:, -1:].tobytes()


# ---- the cache -------------------------------------------------------------------------------------

def test_new_cache(model_of):
    model = model_of("gemma2")
    cache = model.new_cache()
    assert (cache.batch, cache.max_seq_len, cache.seq_len, cache.lengths.tolist()) == (1, 1024, 0, [0])
    assert model.new_cache(3, 50).lengths.tolist() == [0, 0, 0]
    full = 2 * 2 * 10 * 4  # keys and values of two heads of ten float32
    assert model.new_cache(1, 10_000).nbytes == full * (10_000 + 2 * 512), "a window's layer keeps two chunks"
    assert model.new_cache(1, 512, dtype="bfloat16").nbytes == full * 3 * 512 / 2


@pytest.mark.parametrize(("arguments", "kind", "message"), [
    ((0,), ValueError, "new_cache: batch is 0, expected at least 1"),
    ((1, 0), ValueError, "new_cache: max_seq_len is 0, expected at least 1"),
    ((1, -5), ValueError, "new_cache: max_seq_len is -5, expected at least 1"),
    ((1, 1.5), TypeError, "new_cache: max_seq_len is 1.5, expected an integer"),
    ((True, 5), TypeError, "new_cache: batch is True, expected an integer"),
    ((1, False), TypeError, "new_cache: max_seq_len is False, expected an integer"),
    ((1, 2 ** 62), ValueError, "KVCache: 18014398509481984 pages of 49152 bytes cannot be addressed"),
])
def test_new_cache_checks_its_arguments(model, arguments, kind, message):
    with pytest.raises(kind) as caught:
        model.new_cache(*arguments)
    assert str(caught.value) == message
    with pytest.raises(MemoryError):
        model.new_cache(1, 2 ** 44)
    with pytest.raises(ValueError, match="KVCache: dtype is 'int4', expected one of float32, bfloat16, int8"):
        model.new_cache(dtype="int4")


@pytest.mark.parametrize("ids", [np.zeros((1, 0), int), np.zeros((0, 3), int), [[]]], ids=["tokens", "rows", "list"])
def test_empty_ids_give_empty_logits(model, ids):
    assert model(ids).shape == (*np.shape(ids), 97)
    if len(ids):
        cache = model.new_cache(1, 4)
        model(ids, cache)
        assert cache.seq_len == 0


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64, ">i4"])
def test_any_integers_are_ids(model, dtype):
    ids = np.array([[1, 2, 96]])
    assert model(ids.astype(dtype)).tobytes() == model(ids).tobytes() == model(ids.tolist()).tobytes()
    assert model(np.asfortranarray(ids.repeat(2, 0)))[1].tobytes() == model(ids).tobytes()


CALLS: dict[str, tuple[Callable[[Model], Any], type[Exception], str]] = {
    "flat": (lambda m: m([1, 2]), ValueError, "model: ids has shape (2,), expected (batch, seq)"),
    "scalar": (lambda m: m(5), ValueError, "model: ids has shape (), expected (batch, seq)"),
    "floats": (lambda m: m([[1.0]]), TypeError, "model: ids has dtype float64, expected integers"),
    "bools": (lambda m: m([[True]]), TypeError, "model: ids has dtype bool, expected integers"),
    "text": (lambda m: m("ab"), TypeError, "model: ids has dtype <U2, expected integers"),
    "negative": (lambda m: m([[1, -1]]), IndexError, "model: id -1 at [0, 1] is outside the vocabulary of 97"),
    "too large": (lambda m: m([[1], [97]]), IndexError, "model: id 97 at [1, 0] is outside the vocabulary of 97"),
    "unsigned": (lambda m: m(np.array([[2 ** 63]], np.uint64)), IndexError,
                 "model: id 9223372036854775808 at [0, 0] is outside the vocabulary of 97"),
    "no cache": (lambda m: m([[1]], 5), TypeError, "model: cache is a int, expected one from new_cache()"),
    "rows": (lambda m: m([[1]], m.new_cache(2)), ValueError, "model: ids has 1 rows, expected 2 as the cache"),
    "room": (lambda m: m([[1, 2]], m.new_cache(1, 1)), ValueError,
             "model: 0 tokens in the cache and 2 more exceed its max_seq_len 1"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_check_their_arguments(model, case):
    call, kind, message = CALLS[case]
    with pytest.raises(kind) as caught:
        call(model)
    assert str(caught.value) == message


def test_the_last_logits_alone_are_the_last_of_all(model):
    for seq in (1, 5, KV_CHUNK, KV_CHUNK + 1, 2 * KV_CHUNK + 40):
        ids = np.stack([prompts(model, seq)[0], prompts(model, seq)[0][::-1]])
        caches = [model.new_cache(2, seq + 1) for _ in range(2)]
        whole, last = model(ids, caches[0]), model(ids, caches[1], last_only=True)
        assert last.tobytes() == whole[:, -1:].tobytes()
        assert model([[1], [2]], caches[0]).tobytes() == model([[1], [2]], caches[1], last_only=True).tobytes()
    assert model(np.zeros((2, 0), int), last_only=True).shape == (2, 0, model.config.vocab_size)


def test_a_rejected_call_leaves_the_cache_alone(model):
    cache = model.new_cache(1, 5)
    before = model([[1, 2, 3]], cache)
    for ids in ([[4, 5, 6]], [[4, 97]], [[4], [5]]):
        with pytest.raises((ValueError, IndexError)):
            model(ids, cache)
        assert cache.seq_len == 3
    cache.truncate(0)
    assert model([[1, 2, 3]], cache).tobytes() == before.tobytes()


# ---- failures and threads --------------------------------------------------------------------------

@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_an_error_in_the_middle_leaves_the_cache_usable(model_of, name, error):
    model = model_of(name)
    ids = prompts(model, 2 * KV_CHUNK + 40)[0][None]
    whole = model(ids)
    for call in (1, 2, 3):  # of three chunks
        cache = model.new_cache(1, ids.shape[1])
        model(ids[:, :10], cache)
        with interrupted(model, call, error) as caught:
            model(ids[:, 10:], cache)
        held = cache.seq_len
        assert {layer.seq_len for layer in cache.layers} == {held}
        assert held == 10 or (name == "gemma2" and "a layer with a window could not go back to [10]" in
                              "".join(caught.value.__notes__))
        assert model(ids[:, held:], cache).tobytes() == whole[:, held:].tobytes()


def test_an_interrupted_generate_leaves_the_model_as_it_was(model, monkeypatch):
    before = model.generate([1, 2], 8).tolist()
    real, calls = Decoder.forward, [0]

    def interrupted(self, *arguments, **options):
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    monkeypatch.setattr(Decoder, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.generate([1, 2], 8)
    assert model.generate([1, 2], 8).tolist() == before


def test_a_second_thread_on_the_same_cache_is_refused(model, monkeypatch):
    """Before the layers as well as between the chunks of one long call: its tokens must not end up in the middle."""
    ids = prompts(model, KV_CHUNK + 30)[0][None]
    expected = model(ids).tobytes()
    cache, outcomes = model.new_cache(1, 400), []

    def intruding(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments, **options):
            if threading.current_thread() is threading.main_thread() and cache.seq_len < ids.shape[1]:
                outcomes.append(elsewhere(lambda: model([[5]], cache)))
            return real(*arguments, **options)
        return wrapped

    monkeypatch.setattr(Decoder, "forward", intruding(Decoder.forward))
    monkeypatch.setattr(Decoder, "_finished", intruding(Decoder._finished))
    found = model(ids, cache)
    assert len(outcomes) == 3  # before each of two chunks, and between them
    assert [str(outcome) if isinstance(outcome, RuntimeError) else "it got in" for outcome in outcomes] == \
        [BUSY] * len(outcomes)
    assert found.tobytes() == expected


def test_truncate_while_another_thread_writes_changes_no_layer(model):
    cache = model.new_cache(1, 40)
    model([[1, 2, 3, 4]], cache)
    for layer in cache.layers:
        with layer.writing():
            outcome = elsewhere(lambda: cache.truncate(1))
        assert isinstance(outcome, RuntimeError) and str(outcome) == BUSY
        assert [layer.seq_len for layer in cache.layers] == [4, 4, 4]


@pytest.mark.parametrize("name", ["llama", "gemma2", "wide bfloat16"])
def test_four_threads_share_a_model(model_of, name):
    model = model_of(name)
    rows = prompts(model, 3, 30, 7, 270, 12, 1, 60, 5)
    how = [SAMPLED | {"seed": seed} if seed % 2 else {} for seed in range(len(rows))]
    expected = [model.generate(ids, 12, **options).tolist() for ids, options in zip(rows, how, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            found = pool.map(lambda i: model.generate(rows[i], 12, **how[i]).tolist(), range(len(rows)))
            assert list(found) == expected


def test_nan_logits_are_an_error_not_a_token(tmp_path):
    weights = tensors(small())
    weights["model.embed_tokens.weight"][7, 3] = np.nan
    model = load(write(tmp_path, small(), weights))
    assert np.isnan(model([[7]])).all() and np.isfinite(model([[6]])).all()
    for how in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}):
        with pytest.raises(FloatingPointError) as caught:
            model.generate([[6], [7]], 4, **how)
        assert str(caught.value) == "generate: the model's logits are NaN"
    with pytest.raises(FloatingPointError):
        list(model.generate([7], 4, stream=True))


def test_a_text_beyond_the_context_is_a_warning(tmp_path):
    plain = load(write(tmp_path / "plain", small(max_position_embeddings=16)))
    yarn = load(write(tmp_path / "yarn", small(max_position_embeddings=16, rope_scaling=YARN)))
    for model, context in ((plain, 16), (yarn, 64)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.generate([1, 2, 3], context - 3)
        for stream in (False, True):
            with pytest.warns(UserWarning) as caught:
                model.generate([[1], [1, 2, 3]], context - 2, stream=stream)
            assert [str(warning.message) for warning in caught] == [
                f"generate: {context + 1} tokens exceed the {context} that the model was made for"]
            assert caught[0].filename == __file__


# ---- arguments -------------------------------------------------------------------------------------

def test_what_comes_back(model, tmp_path):
    texts = load(write(tmp_path, small(vocab_size=256), tokenizer=BYTES))
    for prompt in ([1, 2], (1, 2), np.array([1, 2], np.int32), np.array([1, 2])[::-1][::-1]):
        one = model.generate(prompt, 3)
        assert isinstance(one, np.ndarray) and one.dtype == np.int64 and one.shape == (3,)
    for prompt in ([[1, 2], [3]], ([1, 2], [3]), [np.array([1, 2]), (3,)]):
        several = model.generate(prompt, 3)
        assert isinstance(several, list) and [len(ids) for ids in several] == [3, 3]
    assert len(model.generate(np.ones((2, 3), int), 3)) == 2 and model.generate(np.ones((0, 3), int), 3) == []
    assert len(model.generate([[1, 2]], 3)) == 1
    assert isinstance(texts.generate("ab", 3), str)
    assert [type(text) for text in texts.generate(["ab"], 3)] == [str]
    assert [type(text) for text in texts.generate(("ab", "c"), 3)] == [str, str]


@pytest.mark.parametrize("prompt", [[1], [[1], [2, 3]]], ids=["one", "several"])
def test_no_new_tokens(model, monkeypatch, prompt):
    """Then the model is not even run."""
    monkeypatch.setattr(Decoder, "forward", None)
    found = model.generate(prompt, 0)
    rows = found if isinstance(found, list) else [found]
    assert all(ids.dtype == np.int64 and ids.shape == (0,) for ids in rows)
    assert list(model.generate(prompt, 0, stream=True)) == []


NO_TOKENIZER = "needs a tokenizer, and the model's folder has none"
ARGUMENTS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([97], {}, IndexError, "generate: id 97 at [0] is outside the vocabulary of 97"),
    ([[1], [2, -3]], {}, IndexError, "generate: id -3 at [1] is outside the vocabulary of 97"),
    ([2 ** 63], {}, IndexError, "generate: id 9223372036854775808 at [0] is outside the vocabulary of 97"),
    ([], {}, ValueError, "generate: prompt 0 is empty, expected at least one token"),
    ([[1], []], {}, ValueError, "generate: prompt 1 is empty, expected at least one token"),
    (np.zeros((2, 0), int), {}, ValueError, "generate: prompt 0 is empty, expected at least one token"),
    (5, {}, ValueError, "generate: ids has shape (), expected (n,)"),
    (np.array(5), {}, ValueError, "generate: ids has shape (), expected (n,)"),
    ([1, [2]], {}, ValueError, "generate: ids has shape (), expected (n,)"),
    (np.zeros((1, 1, 1), int), {}, ValueError, "generate: ids has shape (1, 1), expected (n,)"),
    ([1.0], {}, TypeError, "generate: ids has dtype float64, expected integers"),
    ([True], {}, TypeError, "generate: ids has dtype bool, expected integers"),
    (None, {}, TypeError, "generate: neither prompt nor messages given, expected one of them"),
    ([1], {"messages": [{"role": "user", "content": "hi"}]}, TypeError,
     "generate: both prompt and messages given, expected one of them"),
    ([1], {"tools": []}, TypeError, "generate: tools are given without messages, whose template would name them"),
    ([{"role": "user", "content": "hi"}], {}, TypeError,
     "generate: prompt is a list of dict, expected a text or ids; pass a conversation as messages="),
    ({"ids": [1]}, {}, TypeError, "generate: prompt is a dict without input_ids, expected a text, ids, or what a "
     "Hugging Face tokenizer returns"),
    ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, {}, ValueError,
     "generate: prompt has an attention_mask of another shape than its input_ids"),
    (["a", 1], {}, TypeError, "generate: ids has dtype <U21, expected integers"),
    ("text", {}, ValueError, f"generate: a text prompt {NO_TOKENIZER}; pass ids"),
    (["a", "b"], {}, ValueError, f"generate: a text prompt {NO_TOKENIZER}; pass ids"),
    ([1], {"stop": "x"}, ValueError, f"generate: stop {NO_TOKENIZER}"),
    ([1], {"stop": ""}, ValueError, "generate: stop is '', expected texts that are not empty"),
    ([1], {"stop": ["a", ""]}, ValueError, "generate: stop is ['a', ''], expected texts that are not empty"),
    ([1], {"stop": [b"a"]}, ValueError, "generate: stop is [b'a'], expected texts that are not empty"),
    *(([1], {"max_new_tokens": most}, ValueError,
       f"generate: max_new_tokens is {most}, expected an integer >= 0, or None for no limit")
      for most in (-1, True, 1.0)),
    ([1], {"temperature": -0.1}, ValueError, "generate: temperature is -0.1, expected a number >= 0"),
    ([1], {"top_k": 0}, ValueError, "generate: top_k is 0, expected an integer >= 1, or None for all tokens"),
    ([1], {"top_p": 1.1}, ValueError, "generate: top_p is 1.1, expected a number above 0 and at most 1, or None for "
     "all tokens"),
    ([1], {"min_p": 2}, ValueError, "generate: min_p is 2, expected a number from 0 to 1, or None"),
    ([1], {"repetition_penalty": 0}, ValueError, "generate: repetition_penalty is 0, expected a number > 0"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("prompt", "options", "kind", "message"), ARGUMENTS, ids=[a[3] for a in ARGUMENTS])
def test_arguments_are_checked_before_anything_runs(model, prompt, options, kind, message, stream):
    with pytest.raises(kind) as caught:
        model.generate(prompt, **({"stream": stream} | options))
    assert caught.type is kind and str(caught.value) == message


@pytest.mark.parametrize(("options", "name"), [
    ({"seed": -1}, "seed"), ({"seed": "x"}, "seed"), ({"seed": 1.5}, "seed"), ({"stop": 5}, "stop")], ids=repr)
def test_an_error_names_the_function_and_the_argument(model, options, name):
    with pytest.raises((ValueError, TypeError), match=f"^generate: {name} is "):
        model.generate([1], 2, temperature=1.0, **options)
