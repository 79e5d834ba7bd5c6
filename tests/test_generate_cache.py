"""generate with a cache: a conversation costs only its new tokens, and says what it would have said without one."""
from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from model_folder import FAMILIES, STATE_SPACE, small, write

from forge_c.functional import KV_CHUNK
from forge_c.models import Model, ModelCache, load
from forge_c.models.decoder import Decoder

SAMPLED = {"temperature": 1.0, "seed": 7, "repetition_penalty": 1.2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
TEMPLATE = ("{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
            "{% if add_generation_prompt %}<bot> {% endif %}")
WORDS = ["</s>", "<s>", "<user>", "<bot>", "<system>"]


def chatting(folder: Path, **changes: Any) -> Model:
    """A model of words w5 .. w96 with a chat template, of a random mind."""
    write(folder, small(eos_token_id=0, **changes), tokenizer={"chat_template": TEMPLATE})
    vocab = {word: i for i, word in enumerate([*WORDS, *(f"w{i}" for i in range(5, 97))])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="</s>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    return load(folder)


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """Tokens of each pass of the decoder."""
    found: list[int] = []
    forward = Decoder.forward

    def counted(self, ids, *arguments, **options):
        found.append(ids.shape[1])
        return forward(self, ids, *arguments, **options)

    monkeypatch.setattr(Decoder, "forward", counted)
    return found


def held(cache: ModelCache) -> list[list[int]]:
    return [row.tolist() for row in cache.ids]


# ---- ids and texts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", [*FAMILIES, *STATE_SPACE])
@pytest.mark.filterwarnings("ignore:generate")
def test_turns_are_the_whole(model_of, read, name, options):
    """Each turn is what a call with everything before it gives, and reads no token twice."""
    model, rng = model_of(name), np.random.default_rng(3)
    cache, before = model.new_cache(1, 700), []
    for tokens, most in ((5, 4), (300, 7), (1, 1), (40, 0), (2, 3)):
        prompt = rng.integers(0, 97, tokens)
        fresh = model.new_cache(1, 700)
        want = model.generate([*before, *prompt], most, cache=fresh, **options).tolist()
        read.clear()
        found = model.generate(prompt, most, cache=cache, **options).tolist()
        assert found == want and sum(read) == tokens + most
        before += [*prompt.tolist(), *found]
        assert held(cache) == [before] == held(fresh) and cache.lengths.tolist() == [len(before)]


def test_a_cache_that_was_filled_by_calls_and_one_that_was_saved(model, tmp_path):
    ids = np.arange(20)
    cache = model.new_cache(1, 60)
    model(ids[None], cache)
    cache.save(tmp_path / "cache")
    want = model.generate([*ids, 3], 8, **SAMPLED).tolist()
    for one in (ModelCache.load(tmp_path / "cache", model), copy.deepcopy(cache), cache.fork(1), cache):
        assert model.generate([3], 8, cache=one, **SAMPLED).tolist() == want


def test_rows_of_different_lengths_that_end_at_different_times(tmp_path, isa):
    """A row that has ended waits, and is not changed by it: also where it ended with its prompt in a shared page."""
    model = load(write(tmp_path, small("gemma2", eos_token_id=list(range(0, 97, 4)))))
    rng = np.random.default_rng(0)
    first, second = ([rng.integers(0, 97, n) for n in lengths] for lengths in ((KV_CHUNK, 3, 600, 9), (4, 1, 30, 2)))
    cache, alone = model.new_cache(4, 1000), [model.new_cache(1, 1000) for _ in range(4)]
    ended = []
    for prompts in (first, second):
        together = model.generate(prompts, 25, cache=cache, temperature=1.0, seed=5)
        ended += [len(ids) for ids in together]
        for i, prompt in enumerate(prompts):
            assert model.generate(prompt, 25, cache=alone[i], temperature=1.0, seed=5).tolist() == together[i].tolist()
        assert held(cache) == [held(one)[0] for one in alone]
    assert len(set(ended)) > 4 and 1 in ended
    again = np.array([[7], [8], [9], [10]])
    rows = [model(again[i][None], one) for i, one in enumerate(alone)]
    assert model(again, cache).tobytes() == np.concatenate(rows).tobytes()


def test_samples_of_a_cache(model):
    """A row for each sample, and forks are such rows: what they share stays as it was."""
    cache = model.new_cache(1, 400)
    model(np.arange(KV_CHUNK)[None] % 97, cache)
    before = held(cache)
    want = model.generate([*before[0], 5], 9, n=3, temperature=1.0, seed=2)
    fork = cache.fork(3)
    found = model.generate([5], 9, n=3, temperature=1.0, seed=2, cache=fork)
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in want] and held(cache) == before
    assert held(fork) == [[*before[0], 5, *ids.tolist()] for ids in found]


def test_a_text_goes_on_without_special_tokens(texts):
    """The byte 0 begins a text, and stands only there."""
    cache = texts.new_cache(1, 60)
    first = texts.generate("ab", 4, cache=cache, details=True)
    second = texts.generate("cd", 4, cache=cache, details=True)
    ids = [0, 97, 98, *first.ids.tolist(), 99, 100]
    assert held(cache) == [[*ids, *second.ids.tolist()]]
    assert second.ids.tolist() == texts.generate(ids, 4).tolist()
    without = texts.new_cache(1, 60)
    texts.generate("ab", 1, cache=without, special_tokens=False)
    assert held(without)[0][:2] == [97, 98]


def test_no_new_tokens_read_the_prompt(model, read):
    cache = model.new_cache(2, 20)
    assert [ids.tolist() for ids in model.generate([[1, 2], [3]], 0, cache=cache)] == [[], []]
    assert held(cache) == [[1, 2], [3]]


def test_a_stream_that_is_closed_leaves_a_beginning(model):
    cache = model.new_cache(1, 50)
    stream = model.generate([1, 2, 3], 20, cache=cache, stream=True)
    assert held(cache) == [[]], "nothing is read before the first piece is asked for"
    ids = [next(stream) for _ in range(5)]
    stream.close()
    assert held(cache) == [[1, 2, 3, *ids[:4]]]
    assert model.generate([ids[4]], 3, cache=cache).tolist() == model.generate([1, 2, 3, *ids], 3).tolist()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("call", [1, 2, 4])
def test_an_interrupt_leaves_a_beginning(model, monkeypatch, call, stream):
    """In the prompt's second chunk, after it, and among the new tokens; what is there can be gone on with."""
    ids = np.arange(KV_CHUNK + 9) % 97
    whole = [*ids, *model.generate(ids, 8).tolist()]
    cache, left, forward = model.new_cache(1, 400), [call], Decoder.forward

    def interrupted(self, *arguments, **options):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return forward(self, *arguments, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Decoder, "forward", interrupted)
        found = model.generate(ids, 8, cache=cache, stream=stream)
        list(found)
    assert held(cache) == [whole[: KV_CHUNK if call == 1 else KV_CHUNK + 7 + call]]
    rest = whole[len(held(cache)[0]) :]
    assert model.generate(rest[:1], len(rest) - 1, cache=cache).tolist() == rest[1:] or call == 1


def test_the_reading_of_prompts_can_be_watched(tmp_path):
    """Samples share their prompt; of a conversation only what is new is read."""
    model, seen = chatting(tmp_path), []

    def watched(*arguments: Any, **options: Any) -> list[tuple[int, int]]:
        seen.clear()
        stream = model.generate(*arguments, stream=True, max_new_tokens=2, **options)
        stream.run.progress = lambda done, total: seen.append((done, total))
        list(stream)
        return seen

    long = np.arange(2 * KV_CHUNK + 10) % 97
    assert watched([long, [1, 2, 3]], n=2, temperature=1.0) == [(256, 525), (512, 525), (522, 525), (525, 525)]
    cache, chat = model.new_cache(1, 100), [{"role": "user", "content": "w5 w6"}]
    assert watched(messages=chat, cache=cache) == [(5, 5)]
    chat += [{"role": "bot", "content": "w7"}, {"role": "user", "content": "w8"}]
    assert watched(messages=chat, cache=cache) == [(6, 6)]


def test_a_cache_that_something_else_uses_is_noticed(model):
    cache = model.new_cache(1, 50)
    stream = model.generate([1, 2, 3], 20, cache=cache, stream=True)
    next(stream)
    model([[5, 6]], cache)
    with pytest.raises(RuntimeError, match=r"^generate: the cache holds \[5\] tokens, expected \[4\]"):
        next(stream)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_dtype_of_the_cache_that_is_made(model, dtype):
    ids = np.arange(40)
    want = model.generate(ids, 12, cache=model.new_cache(1, 60, dtype=dtype)).tolist()
    assert model.generate(ids, 12, cache_dtype=dtype).tolist() == want


def test_a_cache_that_does_not_fit_is_left_alone(model_of):
    model, cache = model_of("llama"), model_of("llama").new_cache(1, 10)
    model([[1, 2, 3]], cache)
    for prompt, options, message in (
            ([5], {"cache": 3}, "cache is a int, expected one from new_cache()"),
            ([5], {"cache": model_of("gemma2").new_cache()},
             "cache is one of another model, whose layers differ; expected one from new_cache()"),
            ([[5], [6]], {}, "cache has 1 rows, expected 2, one for each prompt"),
            ([5], {"n": 3, "temperature": 1.0}, "cache has 1 rows, expected 3, one for each sample"),
            ([5], {"max_new_tokens": 7}, "4 tokens and 7 new ones exceed the cache's max_seq_len 10"),
            ([5, 99], {}, "id 99 at [1] is outside the vocabulary of 97"),
            ([], {}, "prompt 0 is empty, expected at least one token"),
            ([5], {"max_new_tokens": 6, "stop": ""}, "stop is '', expected texts that are not empty")):
        with pytest.raises((TypeError, ValueError, IndexError)) as caught:
            model.generate(prompt, **({"cache": cache, "max_new_tokens": 2} | options))
        assert str(caught.value) == f"generate: {message}"
        assert held(cache) == [[1, 2, 3]]
    assert len(model.generate([5], 6, cache=cache)) == 6 and cache.seq_len == 10
    embedded = load()
    with pytest.raises(ValueError, match="^generate: cache has 1 rows, expected 2, one for each prompt$"):
        embedded.generate(["a", "b"], 2, cache=embedded.new_cache(1))


def test_a_cache_of_a_larger_vocabulary(tmp_path):
    large, little = (load(write(tmp_path / str(n), small(vocab_size=n))) for n in (97, 40))
    cache = large.new_cache(1, 10)
    large([[96]], cache)
    with pytest.raises(ValueError, match="^generate: cache holds the token 96, which is outside the vocabulary of 40"):
        little.generate([1], 2, cache=cache)


# ---- conversations ---------------------------------------------------------------------------------


def test_a_conversation_reads_only_what_is_new(tmp_path, read):
    model = chatting(tmp_path)
    cache, messages = model.new_cache(1, 300), [{"role": "system", "content": "w9 w8"}]
    for turn, question in enumerate(("w5 w6 w7", "w20 w21", "w30")):
        messages.append({"role": "user", "content": question})
        want = model.generate(messages=messages, max_new_tokens=6, cache_dtype="float32")
        read.clear()
        answer = model.generate(messages=messages, max_new_tokens=6, cache=cache)
        assert answer == want and isinstance(answer, str)
        new = 1 + len(question.split()) + 1 + 1  # the role, the words, their end, and the answer's beginning
        assert read[0] == new + (4 if turn == 0 else 1), "and the end of the answer before"
        messages.append({"role": "bot", "content": answer})
    rendered = model.tokenizer.encode(model.tokenizer.apply_chat_template(messages[:-1]), False)
    assert held(cache)[0][: len(rendered)] == rendered and 1 not in rendered


@pytest.mark.parametrize("window", [None, 8])
def test_a_conversation_that_was_changed(tmp_path, window, read):
    """What both begin with stays. A layer with a window that cannot go back so far reads everything again."""
    model = chatting(tmp_path, **({} if window is None else {"model_type": "mistral", "sliding_window": window}))
    words = " ".join(f"w{5 + i % 90}" for i in range(600))
    cache = model.new_cache(1, 1400)
    long = [{"role": "user", "content": "w5 w6"}, {"role": "bot", "content": words}, {"role": "user", "content": "w7"}]
    other = [*long[:1], {"role": "bot", "content": "w10 w11"}, *long[2:]]
    model.generate(messages=long, max_new_tokens=4, cache=cache)
    read.clear()
    found = model.generate(messages=other, max_new_tokens=4, cache=cache)
    assert read[0] == (7 if window is None else 12)
    assert found == model.generate(messages=other, max_new_tokens=4)
    read.clear()
    assert model.generate(messages=other, max_new_tokens=4, cache=cache) == found
    assert read[0] == 1, "the last token of a prompt is always read, for its logits"


def test_several_conversations_and_samples(tmp_path):
    model = chatting(tmp_path)
    chats = [[{"role": "user", "content": "w5"}], [{"role": "user", "content": "w8 w9 w10"}]]
    one = [model.generate(messages=chat, max_new_tokens=5) for chat in chats]
    cache = model.new_cache(2, 100)
    assert model.generate(messages=chats, max_new_tokens=5) == one
    assert model.generate(messages=chats, max_new_tokens=5, cache=cache) == one
    assert model.generate(messages=tuple(chats[:1]), max_new_tokens=5) == one[:1]
    many = model.generate(messages=chats[0], max_new_tokens=5, n=3, temperature=1.0, seed=1)
    assert len(many) == 3 and all(isinstance(text, str) for text in many)


def test_a_conversation_for_a_model_without_a_template(model, texts):
    for one in (model, texts):
        with pytest.raises(ValueError, match="^generate: messages need a tokenizer with a chat template, and"):
            one.generate(messages=[{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("messages", [[], "hi", {"role": "user", "content": "hi"}, ["hi"], [["hi"]], [5]], ids=repr)
def test_what_is_no_conversation(tmp_path, messages):
    model = chatting(tmp_path)
    with pytest.raises(TypeError, match=r'^generate: messages (is|holds) .*, expected a list of \{"role": ...'):
        model.generate(messages=messages)


def test_tools_reach_the_template(tmp_path):
    model = chatting(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for t in tools %}{{ t.name }} {% endfor %}" + TEMPLATE)
    model = load(tmp_path)
    cache, chat = model.new_cache(1, 50), [{"role": "user", "content": "w5"}]
    model.generate(messages=chat, tools=[{"name": "w30"}, {"name": "w31"}], max_new_tokens=1, cache=cache)
    assert held(cache)[0][:3] == [30, 31, 2]
