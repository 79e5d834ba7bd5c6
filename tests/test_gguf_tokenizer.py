"""Tokenizers from a GGUF file's metadata: ids as llama.cpp gives them, and what a file may say that is wrong."""
from __future__ import annotations

import sys
import unicodedata
import warnings
from collections.abc import Sequence
from itertools import product
from typing import Any

import gguf_vocabularies as vocabularies
import numpy as np
import pytest
from gguf_vocabularies import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED, metadata, pairs_of_letters, words
from pace import check_pace
from suite import case

from forge_c.models.gguf_tokenizer import gguf_tokenizer
from forge_c.models.pre_tokenizers import PRE_TOKENIZERS
from forge_c.models.score_merges import score_merges
from forge_c.models.tokenizer import HuggingFaceTokenizer, TextStream

pytestmark = pytest.mark.filterwarnings("ignore:the GGUF file. it does not say:UserWarning")


def tokenizer(keys: vocabularies.Metadata) -> HuggingFaceTokenizer:
    found, _ = gguf_tokenizer(keys)
    assert isinstance(found, HuggingFaceTokenizer)
    return found


def spelling(keys: vocabularies.Metadata, text: str, **options: Any) -> list[str]:
    found = tokenizer(keys)
    return [found.backend.id_to_token(i) for i in found.encode(text, **options)]


# ---- ids ---------------------------------------------------------------------------------------------

def test_ids_of_every_way_to_cut_words_are_those_of_llama_cpp():
    golden, compared = vocabularies.golden(), 0
    for name in PRE_TOKENIZERS.keys() & golden.keys():
        found = tokenizer(pairs_of_letters(name))
        for text, ids in zip(vocabularies.BYTE_TEXTS, golden[name], strict=True):
            compared += ids is not None
            with case(name, text):
                assert ids is None or found.encode(text) == ids
    same = {expressions: {n for n, e in PRE_TOKENIZERS.items() if e == expressions}
            for expressions in set(PRE_TOKENIZERS.values())}
    assert all(names & golden.keys() for names in same.values()) and compared > 900


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("control_tokens", [True, False])
def test_ids_of_words_are_those_of_llama_cpp(prefix, control_tokens):
    found = tokenizer(words(add_space_prefix=prefix))
    golden = vocabularies.golden()[f"words {prefix}" + " plain" * (not control_tokens)]
    for text, ids in zip(vocabularies.WORD_TEXTS, golden, strict=True):
        with case(text):
            assert found.encode(text, control_tokens=control_tokens) == ids


def test_ids_of_text_without_control_tokens_are_those_of_llama_cpp():
    found, golden = tokenizer(pairs_of_letters("smollm")), vocabularies.golden()["bytes plain"]
    for text, ids in zip(vocabularies.BYTE_TEXTS, golden, strict=True):
        assert found.encode(text, control_tokens=False) == ids


@pytest.mark.parametrize("keys", [pairs_of_letters("smollm"), pairs_of_letters("llama-bpe"), words(),
                                  words(add_space_prefix=False)], ids=["smollm", "llama", "words", "no prefix"])
def test_texts_come_back(keys):
    found = tokenizer(keys)
    for text in (*vocabularies.BYTE_TEXTS, *vocabularies.WORD_TEXTS, "é日本🎉\0\x7f"):
        if keys["tokenizer.ggml.model"] == "llama":
            text = text.replace("▁", " ")
            for token in ("\n\n", "[x]", "ab") if found.decode(found.encode("[x]a")) == "[x] a" else ():
                text = text.replace(token, "")  # a text after a token begins with a space, as if it were the first
        with case(text):
            ids = found.encode(text, control_tokens=False)
            assert found.decode(ids) == text
            stream = TextStream(found)
            assert "".join(stream.push(i) for i in ids) + stream.rest() == text


def joined_by_score(tokens: Sequence[str], scores: Sequence[float], text: str) -> list[str]:
    """SentencePiece, as its inventors describe it: join the neighbours whose union scores best, the first of equals."""
    best, pieces = dict(zip(tokens, scores, strict=True)), list(text)
    while True:
        unions = [(best[a + b], -i) for i, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False)) if a + b in best]
        if not unions:
            return pieces
        at = -max(unions)[1]
        pieces[at : at + 2] = ["".join(pieces[at : at + 2])]


def test_merges_from_scores_join_as_sentencepiece_does(rng):
    for n in (1, 2, 30, 400):
        letters = "abcé日🎉"[: 2 + n % 5]
        words_ = ("".join(rng.choice(list(letters), rng.integers(2, 9))) for _ in range(n))
        tokens = list(dict.fromkeys([*letters, *words_]))
        scores = rng.permutation(len(tokens)).astype(np.float32) - 100
        keys = metadata("llama", tokens, [NORMAL] * len(tokens), scores=scores, add_space_prefix=False,
                        add_bos_token=False)
        found = tokenizer(keys)
        for _ in range(40):
            text = "".join(rng.choice(list(letters), 20))
            with case(tokens, text):
                assert [tokens[i] for i in found.encode(text)] == joined_by_score(tokens, scores, text)


def test_merges_from_scores():
    tokens, scores = ["a", "b", "ab", "aba", "ba", "x"], np.array([0, 0, -1, -3, -2, -9], np.float32)
    everyone = np.arange(6)
    assert score_merges(tokens, scores, everyone) == [("a", "b"), ("b", "a"), ("a", "ba"), ("ab", "a")]
    assert score_merges(tokens, scores, everyone[[0, 1, 2, 3]]) == [("a", "b"), ("ab", "a")]
    assert score_merges(tokens, scores, everyone[:0]) == [] and score_merges(["a"], scores[:1], everyone[:1]) == []


@pytest.mark.alone
@pytest.mark.slow
def test_a_vocabulary_of_the_largest_size_takes_a_moment():
    """262 144 tokens, nearly all of which two merges make."""
    letters = [chr(i) for i in range(0x4E00, 0x4E00 + 64)]
    tokens = ["".join(token) for n in (1, 2, 3) for token in product(letters, repeat=n)][: 1 << 18]
    keys = metadata("llama", tokens, [NORMAL] * len(tokens), scores=-np.arange(len(tokens), dtype=np.float32))
    check_pace(lambda: tokenizer(keys), 3.0)


# ---- what stands around a text, and ends it ---------------------------------------------------------------

@pytest.mark.parametrize(("keys", "expected"), [
    (pairs_of_letters("gpt-2"), ["a"]), (pairs_of_letters("llama-bpe"), ["<s>", "a"]),
    (pairs_of_letters("tekken"), ["<s>", "a"]), (pairs_of_letters("gpt-2", add_bos_token=True), ["<s>", "a"]),
    (pairs_of_letters("gpt-2", add_eos_token=True), ["a", "</s>"]),
    (pairs_of_letters("llama-bpe", add_bos_token=False), ["a"]),
    (pairs_of_letters("llama-bpe", bos_token_id=10 ** 6), ["a"]), (pairs_of_letters("glm4"), ["a"]),
    (words(), ["<s>", "▁a"]), (words(add_bos_token=False), ["▁a"]), (words(add_space_prefix=False), ["<s>", "a"]),
    (words(add_eos_token=True), ["<s>", "▁a", "</s>"]), (words(bos_token_id=None), ["<s>", "▁a"]),
], ids=lambda v: "-".join(map(str, v)) if isinstance(v, list) else "")
def test_special_tokens_around_a_text(keys, expected):
    assert spelling(keys, "a") == expected
    assert spelling(keys, "a", control_tokens=False) == expected
    assert spelling(keys, "a", special_tokens=False) == [t for t in expected if t not in ("<s>", "</s>")]
    if expected[0] == "<s>":
        assert spelling(keys, "<s>a", special_tokens=True)[:2] != ["<s>", "<s>"]


def ends_of(kind: str, added: dict[str, int], **more: Any) -> list[str]:
    tokens = ["a", "<unk>", *added]
    _, ends = gguf_tokenizer(metadata(kind, tokens, [NORMAL, 2, *added.values()], merges=[], pre="gpt-2", **more))
    return sorted(tokens[i] for i in ends)


@pytest.mark.parametrize(("added", "more", "expected"), [
    ({"</s>": CONTROL}, {"eos_token_id": 2}, ["</s>"]), ({"</s>": CONTROL}, {}, ["</s>"]),
    ({"<|endoftext|>": CONTROL, "<|im_end|>": CONTROL}, {"eos_token_id": 2}, ["<|endoftext|>", "<|im_end|>"]),
    ({"[end]": CONTROL, "<|im_end|>": NORMAL}, {"eot_token_id": 2}, ["[end]"]),
    ({"[end]": CONTROL}, {"eom_token_id": 2}, ["[end]"]), ({"<|x|>": CONTROL}, {}, []), ({}, {"eos_token_id": 99}, []),
    ({"<|end|>": CONTROL, "<|return|>": CONTROL}, {}, ["<|end|>", "<|return|>"]),
    ({"<|end|>": CONTROL, "<|return|>": CONTROL, "<|call|>": CONTROL}, {}, ["<|call|>", "<|return|>"]),
], ids=str)
def test_what_ends_a_text(added, more, expected):
    assert ends_of("gpt2", added, **more) == expected


def test_ids_that_hold_where_a_file_names_none():
    keys = words(bos_token_id=None, eos_token_id=None, unknown_token_id=None)
    found, ends = gguf_tokenizer(keys)
    assert found.special == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} and ends == {2}
    letters = [chr(i) for i in range(97, 117)]
    _, ends = gguf_tokenizer(metadata("gpt2", letters, [NORMAL] * 20, merges=[], pre="gpt-2"))
    assert not ends, "token 11 is the end of text in GPT-2's vocabulary alone"


def test_an_end_that_an_old_file_marks_as_text():
    keys = metadata("gpt2", ["a", "<|endoftext|>", "</s>"], [NORMAL] * 3, merges=[], pre="gpt-2", eos_token_id=1)
    assert spelling(keys, "<|endoftext|>a") == ["<|endoftext|>", "a"]
    assert tokenizer(keys).special_ids == {"<|endoftext|>": 1}


# ---- tokens by their type --------------------------------------------------------------------------------

def test_types_of_tokens():
    keys = words()
    assert spelling(keys, "<turn>[x]unused<s>", special_tokens=False) == [
        "<turn>", "[x]", "▁", "<0x75>", "n", "<0x75>", "s", "<0x65>", "d", "<s>"]
    found = tokenizer(keys)
    assert found.decode(found.encode("<turn>[x]a\n\n</s>")) == "[x] a\n\n"
    assert set(found.special_ids) == {"<unk>", "<s>", "</s>", "<turn>"}
    assert spelling(keys, "<turn>[x]<0x0A>", special_tokens=False, control_tokens=False) == [
        "▁", "<", *(f"<0x{b:02X}>" for b in b"tur"), "n", ">", "[x]", "▁", "<", *(f"<0x{b:02X}>" for b in b"0x0A"), ">"]


def test_a_byte_level_vocabulary_with_letters_as_added_tokens():
    """DeepSeek's reads ü as the token that is written like it, and stands for a byte that no text has."""
    keys = pairs_of_letters("gpt-2")
    for letter in "üý":
        keys["tokenizer.ggml.token_type"][keys["tokenizer.ggml.tokens"].index(letter)] = USER_DEFINED
    found = tokenizer(keys)
    assert found.encode("ü") == [found.backend.token_to_id("ü")]
    assert found.decode(found.encode("aüüý €ü")) == "aüüý €ü"
    stream = TextStream(found)
    assert "".join(map(stream.push, found.encode("aüüý €ü"))) + stream.rest() == "aüüý €ü"


@pytest.mark.parametrize("name", ["Phi-3-mini", "microsoft phi3", "x", None])
def test_phi_3_takes_the_spaces_after_its_tokens(name):
    keys = words(**{"general.name": name})
    strips = name not in ("x", None)
    assert spelling(keys, "<turn> a", special_tokens=False) == (["<turn>", "▁a"] if strips else ["<turn>", "▁▁", "a"])
    assert spelling(keys, "a<s> a", special_tokens=False) == ["▁a", "<s>", "▁▁", "a"]


@pytest.mark.parametrize("pre", ["qwen2", "qwen35", "deepseek-r1-qwen"])
def test_qwen_composes_accents(pre):
    found = tokenizer(pairs_of_letters(pre))
    composed = found.encode("e\u0301") == found.encode("\u00e9")
    assert composed == (pre != "deepseek-r1-qwen")
    assert found.decode(found.encode("e\u0301")) == (unicodedata.normalize("NFC", "e\u0301") if composed else "e\u0301")


def test_gemma_4():
    tokens = ["<unk>", "<bos>", "<eos>", *(f"<0x{b:02X}>" for b in range(256)), *"▁ab\n", "▁a", "\n\n", "a\n"]
    types = [2, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 7]
    keys = metadata("gemma4", tokens, types, merges=["▁ a", "a \n", "\n \n"], bos_token_id=1, eos_token_id=2,
                    unknown_token_id=0, add_bos_token=False)
    assert spelling(keys, "a a\n\nbé") == ["<bos>", "a", "▁a", "\n\n", "b", "<0xC3>", "<0xA9>"]
    assert tokenizer(keys).decode(tokenizer(keys).encode(" a\né")) == " a\né"


# ---- chat templates --------------------------------------------------------------------------------------

def test_chat_templates():
    turn = [{"role": "user", "content": "hi"}]
    one = {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"}
    assert tokenizer(words(**one)).apply_chat_template(turn) == "<s>hi</s>"
    assert tokenizer(words(**one)).encode_chat(turn)[0] == 1 != tokenizer(words(**one)).encode_chat(turn)[1]
    several = one | {"tokenizer.chat_templates": ["tool_use", "rag"], "tokenizer.chat_template.tool_use": "T",
                     "tokenizer.chat_template.rag": "R"}
    found = tokenizer(words(**several))
    assert found.apply_chat_template(turn, tools=[]) == "T"
    assert found.apply_chat_template(turn, chat_template="rag") == "R"
    assert found.apply_chat_template(turn) == "<s>hi</s>"
    with pytest.raises(ValueError, match="the model has no chat template"):
        tokenizer(words()).apply_chat_template(turn)
    with pytest.raises(ValueError, match="the chat template 'default' has 262145 bytes, expected at most 262144"):
        gguf_tokenizer(words(**{"tokenizer.chat_template": "x" * (262144 + 1)}))


# ---- what cannot be used ---------------------------------------------------------------------------------

@pytest.mark.parametrize(("keys", "message"), [
    (metadata("t5", ["a"], [1]), "models: x.gguf has a tokenizer of the kind 't5' (T5's Unigram), expected gpt2, llama "
     "or gemma4; pass ids"),
    (metadata("new", ["a"], [1]), "models: x.gguf has a tokenizer of the kind 'new' (unknown here), expected"),
    (pairs_of_letters("newer"), "models: x.gguf cuts texts as 'newer' does (tokenizer.ggml.pre), expected one of a."),
], ids=["t5", "new", "pre"])
def test_a_tokenizer_that_is_not_for_us_is_an_error_where_there_is_text(keys, message):
    found, _ = gguf_tokenizer(keys, "x.gguf")
    for use in (lambda: found.encode("a"), lambda: found.decode([0]), lambda: found.apply_chat_template([])):
        with pytest.raises(ValueError) as caught:
            use()
        assert str(caught.value).startswith(message)


def test_without_the_library_ids_go_through(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    found, ends = gguf_tokenizer(words())
    assert ends == {2}
    with pytest.raises(ImportError) as caught:
        found.encode("a")
    assert str(caught.value) == "models: text needs the tokenizers library: pip install tokenizers"


@pytest.mark.parametrize("keys", [{}, {"tokenizer.ggml.model": "none"}, {"tokenizer.ggml.model": "no_vocab"}])
def test_no_vocabulary(keys):
    assert gguf_tokenizer(keys) == (None, frozenset())


def test_a_file_that_does_not_say_how_to_cut_words():
    with pytest.warns(UserWarning, match="^x.gguf: it does not say how its tokenizer cuts words") as caught:
        gguf_tokenizer(pairs_of_letters(None), "x.gguf")
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gguf_tokenizer(pairs_of_letters("gpt-2"))


def changed(keys: vocabularies.Metadata, **more: Any) -> vocabularies.Metadata:
    return keys | {f"tokenizer.ggml.{key}": value for key, value in more.items()}


@pytest.mark.parametrize(("keys", "message"), [
    (changed(words(), model=5), "tokenizer.ggml.model is 5, expected a text"),
    (changed(words(), tokens=None), "tokenizer.ggml.tokens is missing, expected texts"),
    (changed(words(), tokens="abc"), "tokenizer.ggml.tokens is 'abc', expected texts"),
    (changed(words(), tokens=[5]), "tokenizer.ggml.tokens holds a int, expected texts"),
    (changed(words(), tokens=[]), "tokenizer.ggml.tokens is empty"),
    (changed(words(), tokens=words()["tokenizer.ggml.tokens"] + ["a"]), "tokenizer.ggml.tokens has 'a' twice"),
    (changed(words(), token_type=np.ones(5, np.int32)), "tokenizer.ggml.token_type has 5 numbers, expected one for "
     "each of 300 tokens"),
    (changed(words(), token_type=np.ones(900)), "tokenizer.ggml.token_type is array("),
    (changed(words(), scores=np.ones(5, np.float32)), "tokenizer.ggml.scores has 5 numbers, expected one for each of "
     "300 tokens"),
    (changed(words(), scores=np.full(300, np.nan, np.float32)), "tokenizer.ggml.scores[0] is NaN"),
    (changed(words(), scores=[["a"]]), "tokenizer.ggml.scores is [['a']], expected 300 numbers"),
    (changed(words(), eos_token_id=-1), "tokenizer.ggml.eos_token_id is -1, expected the id of a token"),
    (changed(words(), eos_token_id=True), "tokenizer.ggml.eos_token_id is True, expected the id of a token"),
    (changed(words(), bos_token_id="a"), "tokenizer.ggml.bos_token_id is 'a', expected the id of a token"),
    (changed(words(), add_bos_token=1), "tokenizer.ggml.add_bos_token is 1, expected a bool"),
    (changed(words(), add_space_prefix="no"), "tokenizer.ggml.add_space_prefix is 'no', expected a bool"),
    (changed(pairs_of_letters("gpt-2"), pre=5), "tokenizer.ggml.pre is 5, expected a text"),
    (changed(pairs_of_letters("gpt-2"), merges=None), "tokenizer.ggml.merges is missing, expected texts"),
    (changed(pairs_of_letters("gpt-2"), merges=["ab"]), "tokenizer.ggml.merges has 'ab', expected two tokens with"),
    (changed(pairs_of_letters("gpt-2"), merges=[" ab"]), "tokenizer.ggml.merges has ' ab', expected two tokens"),
    (changed(pairs_of_letters("gpt-2"), merges=["a zz"]), "Error while initializing BPE: Token `zz` out of vocabulary"),
    (words() | {"tokenizer.chat_template": 5}, "tokenizer.chat_template is 5, expected a text"),
    (words() | {"tokenizer.chat_templates": "a"}, "tokenizer.chat_templates is 'a', expected texts"),
    (words() | {"general.name": 5}, "general.name is 5, expected a text"),
    (metadata("llama", ["a" * 513], [NORMAL]), "tokenizer.ggml.tokens[0] has 513 characters, expected at most 512"),
    (metadata("llama", ["<0xZZ>"], [BYTE]), "tokenizer.ggml.tokens[0] is '<0xZZ>', expected <0x00> to <0xFF> for a"),
    (metadata("llama", ["<0x0a>"], [BYTE]), "tokenizer.ggml.tokens[0] is '<0x0a>', expected <0x00> to <0xFF> for a"),
    (metadata("gpt2", ["a" * (1 << 24) + "b"], [NORMAL]), "tokenizer.ggml.tokens has more than 16777216 characters"),
    (metadata("llama", ["a" * (1 << 22) + "b"], [CONTROL]), "tokenizer.ggml.tokens has more than 4194304 characters"),
], ids=lambda v: v[:50] if isinstance(v, str) else "")
def test_a_vocabulary_that_contradicts_itself_is_named(keys, message):
    with pytest.raises(ValueError) as caught:
        gguf_tokenizer(keys, "x.gguf")
    assert caught.type is ValueError and str(caught.value).startswith(f"x.gguf: {message}")


def test_what_llama_cpp_forgives():
    """Empty tokens, ids of special tokens beyond the vocabulary, more types and scores than tokens."""
    keys = words()
    tokens = keys["tokenizer.ggml.tokens"] + ["", "."][:1]
    n = len(tokens)
    keys = changed(keys, tokens=tokens, token_type=np.append(keys["tokenizer.ggml.token_type"], [UNUSED, 1, 1]),
                   scores=np.append(keys["tokenizer.ggml.scores"], [0, 0, 0]), seperator_token_id=n)
    found = tokenizer(keys)
    assert found.backend.token_to_id(f"[EMPTY_{n - 1}]") == n - 1 and "sep_token" not in found.special
    assert found.encode("banana") == tokenizer(words()).encode("banana")


def test_tokens_whose_hashes_meet_are_found_all_the_same(rng):
    """Those of one length differ in as few as two places, by turns: what sums of powers tell apart worst."""
    turns = {0: "ab", 1: "ba"}
    tokens = ["a", "b"]
    for size in (1, 2, 4, 8, 16, 32):
        tokens += ["".join(turns[bin(i).count("1") % 2 ^ flip] for i in range(size)) for flip in (0, 1)]
    scores = -np.arange(len(tokens), dtype=np.float32)
    merges = score_merges(tokens, scores, np.arange(len(tokens)))
    known = set(tokens)
    assert merges == [(t[:i], t[i:]) for t in tokens for i in range(1, len(t)) if t[:i] in known and t[i:] in known]


def test_tokens_that_are_made_to_meet_take_no_time(monkeypatch):
    monkeypatch.setattr("forge_c.models.score_merges._Substrings.hashes",
                        lambda self, starts, stops: np.zeros(len(starts), np.uint64))
    tokens = [chr(0x4E00 + i) for i in range(5000)]
    with pytest.raises(ValueError) as caught:
        gguf_tokenizer(metadata("llama", tokens, [NORMAL] * 5000), "x.gguf")
    assert str(caught.value) == "x.gguf: the tokens are chosen so that their hashes meet"
