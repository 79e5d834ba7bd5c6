"""The tokenizer in a GGUF file's metadata, built with the tokenizers library: texts give the ids that llama.cpp gives.

One exception: Qwen's own tokenizers compose accents (NFC) before anything else, which the file does not say; here they
do, so that the ids are those of the model's makers.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from forge_c.checks import short, warn
from forge_c.models.pre_tokenizers import PRE_TOKENIZERS
from forge_c.models.score_merges import score_merges
from forge_c.models.tokenizer import MAX_TEMPLATE, HuggingFaceTokenizer, NoText, Tokenizer, failures

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # token_type
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
_SPACE = "▁"
_MAX_TEXT = 1 << 24  # characters of all tokens together
_MAX_SCORED, _MAX_TOKEN = 1 << 22, 512  # the same, and those of one token, where merges come from scores
_COMPOSED = ("qwen2", "qwen35")
_ALIASES = {"unk_token": "unknown", "sep_token": "seperator", "pad_token": "padding"}  # as the keys are spelt
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LAST = ("eos_token", "eot_token", "eom_token")  # the ends of a text, a turn and a message
# Control tokens that end an answer in some model or other; files name one of them, if that.
_ENDS = frozenset("""<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|>
    </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response>
    <｜end▁of▁sentence｜>""".split())
# Ids that hold where a file names none, by its kind of vocabulary.
_DEFAULT_IDS = {"llama": {"bos_token": 1, "eos_token": 2, "unk_token": 0}, "gpt2": {"bos_token": 11, "eos_token": 11}}
_NOT_HERE = {"t5": "T5's Unigram", "bert": "BERT's WordPiece", "rwkv": "RWKV's trie", "plamo2": "PLaMo's",
             "hybriddna": "for DNA", "whitespace": "whole words"}


class Vocabulary(NamedTuple):
    """What a file says of its tokens. `special` has the names of special tokens and their ids."""

    source: str
    kind: str
    pre: str
    tokens: list[str]
    types: NDArray[np.int64]
    metadata: Mapping[str, Any]
    special: dict[str, int]

    def of_type(self, *types: int) -> list[int]:
        """Ids of the tokens of these types, ascending."""
        return np.flatnonzero(np.isin(self.types, types)).tolist()

    def flag(self, name: str, default: bool) -> bool:
        """A bool of the file."""
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{self.source}: tokenizer.ggml.{name} is {short(value)}, expected a bool")
        return bool(value)


def gguf_tokenizer(metadata: Mapping[str, Any], source: str = "the GGUF file") -> tuple[
        Tokenizer | None, frozenset[int]]:
    """(the tokenizer, ids of the tokens that end a text) of a file's metadata.

    Args:
        metadata: values by key; arrays are NumPy arrays or sequences.
        source: how messages call the file.

    A file without vocabulary has no tokenizer. Where the vocabulary is of a kind that cannot be used here, or the
    tokenizers library is missing, the tokenizer raises that at its first use, so that ids go through the model.

    Raises:
        ValueError: a vocabulary that contradicts itself; it says where.
    """
    kind = _text(metadata, "tokenizer.ggml.model", source)
    if kind in (None, "none", "no_vocab"):
        return None, frozenset()
    if kind not in ("gpt2", "llama", "gemma4"):
        what = _NOT_HERE.get(kind, "unknown here")
        return NoText(ValueError, f"models: {source} has a tokenizer of the kind {kind!r} ({what}), expected gpt2, "
                      "llama or gemma4; pass ids"), frozenset()
    vocabulary = _vocabulary(metadata, source, kind)
    ends = _ends(vocabulary)
    if kind == "gpt2" and vocabulary.pre not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        return NoText(ValueError, f"models: {source} cuts texts as {vocabulary.pre!r} does (tokenizer.ggml.pre), "
                      f"expected one of {known}; pass ids"), ends
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        return NoText(ImportError, "models: text needs the tokenizers library: pip install tokenizers"), ends
    build = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _sentencepiece_with_merges}[kind]
    with failures(source):
        backend = build(vocabulary)
        backend.add_tokens(_added(vocabulary))
        _add_around(backend, vocabulary)
    names = {name: vocabulary.tokens[i] for name, i in vocabulary.special.items()}
    return HuggingFaceTokenizer(source, backend, names, _chat_templates(metadata, source)), ends


# ---- what the file says ----------------------------------------------------------------------------

def _text(metadata: Mapping[str, Any], key: str, source: str) -> str | None:
    value = metadata.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{source}: {key} is {short(value)}, expected a text")
    return value


def _texts(metadata: Mapping[str, Any], key: str, source: str) -> list[str]:
    value = metadata.get(key)
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise ValueError(f"{source}: {key} is {'missing' if value is None else short(value)}, expected texts")
    found = list(value)
    if not all(isinstance(text, str) for text in found):
        raise ValueError(f"{source}: {key} holds a {type(found[0]).__name__}, expected texts")
    return found


def _numbers(metadata: Mapping[str, Any], key: str, source: str, n: int, kinds: str) -> NDArray[Any] | None:
    """At least n numbers, of which the first n count."""
    value = metadata.get(key)
    if value is None:
        return None
    found = np.asarray(value)
    if found.ndim != 1 or found.dtype.kind not in kinds:
        raise ValueError(f"{source}: {key} is {short(value)}, expected {n} numbers")
    if len(found) < n:
        raise ValueError(f"{source}: {key} has {len(found)} numbers, expected one for each of {n} tokens")
    return found[:n]


def _vocabulary(metadata: Mapping[str, Any], source: str, kind: str) -> Vocabulary:
    tokens = _texts(metadata, "tokenizer.ggml.tokens", source)
    if not tokens:
        raise ValueError(f"{source}: tokenizer.ggml.tokens is empty")
    if "" in tokens:
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if len(set(tokens)) < len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        raise ValueError(f"{source}: tokenizer.ggml.tokens has {short(twice)} twice")
    most = _MAX_SCORED if kind == "llama" else _MAX_TEXT
    if sum(map(len, tokens)) > most:
        raise ValueError(f"{source}: tokenizer.ggml.tokens has more than {most} characters")
    given = _numbers(metadata, "tokenizer.ggml.token_type", source, len(tokens), "iu")
    types = np.full(len(tokens), _NORMAL) if given is None else given.astype(np.int64)
    special = _special_ids(metadata, source, kind, types)
    for i in {special[name] for name in _LAST if name in special}:
        if types[i] == _NORMAL and tokens[i] in _ENDS:  # as old converters wrote it
            types[i] = _CONTROL
    pre = _text(metadata, "tokenizer.ggml.pre", source) or "default"
    return Vocabulary(source, kind, pre, tokens, types, metadata, special)


def _special_ids(metadata: Mapping[str, Any], source: str, kind: str, types: NDArray[np.int64]) -> dict[str, int]:
    """Ids of the special tokens by name. What is outside the vocabulary is not there, as in llama.cpp."""
    n = len(types)
    found = {name: i for name, i in _DEFAULT_IDS.get(kind, {}).items() if i < n and types[i] in (_UNKNOWN, _CONTROL)}
    if metadata.get("tokenizer.ggml.pre") in ("chatglm-bpe", "glm4", "glm5"):
        found.pop("bos_token", None)
    for name in (*_NAMES, *_LAST[1:]):
        key = f"tokenizer.ggml.{_ALIASES.get(name, name.removesuffix('_token'))}_token_id"
        value = metadata.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
            raise ValueError(f"{source}: {key} is {short(value)}, expected the id of a token")
        if value < n:
            found[name] = int(value)
    return found


def _ends(vocabulary: Vocabulary) -> frozenset[int]:
    """Ids of the tokens that end a text: those that the file names, and control tokens known for it."""
    named = {vocabulary.special[name] for name in _LAST if name in vocabulary.special}
    known = {vocabulary.tokens[i]: i for i in vocabulary.of_type(_CONTROL) if vocabulary.tokens[i] in _ENDS}
    if "<|call|>" in known and "<|return|>" in known or "<|calls|>" in known and "<|flush|>" in known:
        named.discard(known.pop("<|end|>", -1))  # gpt-oss, Solar Open: it ends a part of an answer
    return frozenset({*named, *known.values()})


def _chat_templates(metadata: Mapping[str, Any], source: str) -> str | dict[str, str] | None:
    """The template, or several by name."""
    found = {"default": _text(metadata, "tokenizer.chat_template", source)}
    names = metadata.get("tokenizer.chat_templates")
    for name in [] if names is None else _texts(metadata, "tokenizer.chat_templates", source):
        found[name] = _text(metadata, f"tokenizer.chat_template.{name}", source)
    templates = {name: text for name, text in found.items() if text is not None}
    for name, text in templates.items():
        if len(text.encode()) > MAX_TEMPLATE:
            raise ValueError(f"{source}: the chat template {name!r} has {len(text.encode())} bytes, expected at most "
                             f"{MAX_TEMPLATE}")
    return templates["default"] if templates.keys() == {"default"} else templates or None


# ---- backends --------------------------------------------------------------------------------------

def _pairs(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Merges, each the two tokens before and after the first space that is not its first character."""
    merges = _texts(vocabulary.metadata, "tokenizer.ggml.merges", vocabulary.source)
    found = []
    for merge in merges:
        at = merge.find(" ", 1)
        if at < 0:
            raise ValueError(f"tokenizer.ggml.merges has {short(merge)}, expected two tokens with a space between")
        found.append((merge[:at], merge[at + 1 :]))
    return found


def _ids(tokens: Iterable[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def _byte_level(vocabulary: Vocabulary) -> Any:
    """GPT-2's kind: bytes as letters, words cut by expressions, merges in the file."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = PRE_TOKENIZERS[vocabulary.pre]
    if vocabulary.pre == "default":
        warn(f"{vocabulary.source}: it does not say how its tokenizer cuts words (tokenizer.ggml.pre), so "
             "that ids and answers may be worse than they should be; a newer conversion says it")
    backend = Tokenizer(models.BPE(_ids(vocabulary.tokens), _pairs(vocabulary), ignore_merges=pre.whole_words))
    if vocabulary.pre in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(expression), "isolated") for expression in pre.expressions),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(vocabulary: Vocabulary) -> Any:
    """LLaMA 2's kind: spaces as ▁, scores in the place of merges, bytes for what has no token."""
    from tokenizers import Tokenizer, decoders, normalizers

    source, tokens = vocabulary.source, vocabulary.tokens
    scores = _numbers(vocabulary.metadata, "tokenizer.ggml.scores", source, len(tokens), "fiu")
    scores = np.zeros(len(tokens), np.float32) if scores is None else scores.astype(np.float32)
    if np.isnan(scores).any():
        raise ValueError(f"tokenizer.ggml.scores[{int(np.isnan(scores).argmax())}] is NaN")
    taking_part = np.array(vocabulary.of_type(_NORMAL, _USER_DEFINED, _UNUSED), np.int64)
    long = next((i for i in taking_part.tolist() if len(tokens[i]) > _MAX_TOKEN), None)
    if long is not None:
        raise ValueError(f"tokenizer.ggml.tokens[{long}] has {len(tokens[long])} characters, expected at most "
                         f"{_MAX_TOKEN}")
    backend = Tokenizer(_byte_fallback(vocabulary, score_merges(tokens, scores, taking_part)))
    prefix = vocabulary.flag("add_space_prefix", True)
    backend.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(_SPACE)] if prefix else []), normalizers.Replace(" ", _SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
         *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return backend


def _sentencepiece_with_merges(vocabulary: Vocabulary) -> Any:
    """Gemma 4's kind: as SentencePiece, but the merges are in the file, and none crosses a line end."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    backend = Tokenizer(_byte_fallback(vocabulary, _pairs(vocabulary)))
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|[\n]+"), "isolated")
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _byte_fallback(vocabulary: Vocabulary, merges: list[tuple[str, str]]) -> Any:
    from tokenizers import models

    for i in vocabulary.of_type(_BYTE):
        if not _BYTE_TOKEN.fullmatch(vocabulary.tokens[i]):
            raise ValueError(f"tokenizer.ggml.tokens[{i}] is {short(vocabulary.tokens[i])}, expected <0x00> to <0xFF> "
                             "for a token of the type byte")
    unknown = vocabulary.special.get("unk_token")
    return models.BPE(_ids(vocabulary.tokens), merges, byte_fallback=True, fuse_unk=True,
                      unk_token=None if unknown is None else vocabulary.tokens[unknown])


def _added(vocabulary: Vocabulary) -> list[Any]:
    """Tokens that a text may spell and that no merge makes: control tokens, and those that the user defined."""
    from tokenizers import AddedToken

    # In Phi 3's tokenizer they take the spaces after them along, which the file says by the model's name alone.
    name = (_text(vocabulary.metadata, "general.name", vocabulary.source) or "").lower()
    strips = "phi-3" in name or "phi3" in name
    return [AddedToken(text := vocabulary.tokens[i], special=vocabulary.types[i] != _USER_DEFINED, normalized=False,
                       rstrip=strips and text not in ("<unk>", "<s>", "<|endoftext|>"))
            for i in vocabulary.of_type(_UNKNOWN, _CONTROL, _USER_DEFINED)]


def _add_around(backend: Any, vocabulary: Vocabulary) -> None:
    """Have the backend put BOS before a text, and EOS after it, if the file asks for it."""
    from tokenizers import processors

    by_default = {"llama": True, "gemma4": True}.get(vocabulary.kind) or PRE_TOKENIZERS[vocabulary.pre].adds_bos
    adds_bos = vocabulary.flag("add_bos_token", by_default)
    wanted = {"bos_token": adds_bos or vocabulary.kind == "gemma4",
              "eos_token": vocabulary.flag("add_eos_token", False)}
    ids = {name: vocabulary.special[name] for name, adds in wanted.items() if adds and name in vocabulary.special}
    if not ids:
        return
    texts = {name: vocabulary.tokens[i] for name, i in ids.items()}
    before, after = ([texts[name]] if name in texts else [] for name in wanted)
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after], pair=[*before, "$A", "$B:1", *after],
        special_tokens=[(texts[name], i) for name, i in ids.items()])
