"""What callers may give as prompts, as token ids: texts, ids in arrays and lists of any kind, conversations."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c.checks import unmasked
from forge_c.models.tokenizer import ChatPrompt, Tokenizer, check_text

Ids = NDArray[np.int64]


@dataclass
class Prompts:
    """rows: the ids of each prompt, (n,). several: whether the caller gave a list of them. is_text: whether the caller
    wants text back. whole: the rows are whole conversations, of which a cache may hold the beginning. answers: of
    each, whether what comes answers it, and does not go on within its last words."""

    rows: list[Ids]
    several: bool
    is_text: bool
    answers: Sequence[bool]
    whole: bool = False


def checked_ids(function: str, ids: ArrayLike, vocab: int, ndim: int) -> Ids:
    """ids as int64; TypeError, ValueError or IndexError if they are not integers, of ndim axes, of the vocabulary."""
    a = np.asarray(unmasked(function, "ids", ids))
    expected = "(batch, seq)" if ndim == 2 else "(n,)"
    if a.size and (a.dtype.kind not in "iu"):
        raise TypeError(f"{function}: ids has dtype {a.dtype}, expected integers")
    if a.ndim != ndim:
        raise ValueError(f"{function}: ids has shape {a.shape}, expected {expected}")
    outside = (a < 0) | (a >= vocab)
    if a.size and outside.any():
        at = tuple(int(i) for i in np.argwhere(outside)[0])
        raise IndexError(f"{function}: id {a[at]} at {list(at)} is outside the vocabulary of {vocab}")
    return a.astype(np.int64)


def texts_or_ids(function: str, prompt: Any, tokenizer: Tokenizer | None, vocab: int,
                 special_tokens: bool, held: Sequence[int] = ()) -> Prompts:
    """A text, a list of texts, ids (n,), a list of such, an array (batch, n), or what a Hugging Face tokenizer returns.

    special_tokens: whether they are added to a text, if none of its tokens are held yet.
    """
    if isinstance(prompt, str) or _all(prompt, str):
        several, texts = not isinstance(prompt, str), [prompt] if isinstance(prompt, str) else list(prompt)
        if tokenizer is None:
            raise ValueError(f"{function}: a text prompt needs a tokenizer, and the model's folder has none; pass ids")
        for text in texts:
            check_text(f"{function}: prompt", text)
        begun = [bool(n) for n in held] if len(held) == len(texts) else [False] * len(texts)
        encoded: list[Any] = [tokenizer.encode(text, bool(special_tokens) and not b)
                              for text, b in zip(texts, begun, strict=True)]
        rows = [checked_ids(function, ids, vocab, 1) for ids in encoded]
        return Prompts(rows, several, True, [isinstance(text, ChatPrompt) for text in texts])
    if _all(prompt, Mapping):
        raise TypeError(f"{function}: prompt is a list of {type(prompt[0]).__name__}, expected a text or ids; pass a "
                        "conversation as messages=")
    given, several = _id_lists(function, prompt)
    rows = [checked_ids(function, ids, vocab, 1) for ids in given]
    return Prompts(rows, several, False, [False] * len(rows))


def conversations(function: str, messages: Any, tools: Any, tokenizer: Tokenizer | None, vocab: int) -> Prompts:
    """messages: a conversation, a list of {"role": ..., "content": ...}, or a list of conversations."""
    if not isinstance(messages, list | tuple) or not messages:
        raise TypeError(f'{function}: messages is {messages!r}, expected a list of {{"role": ..., "content": ...}}')
    several = isinstance(messages[0], list | tuple)
    rows = []
    for chat in messages if several else [messages]:
        if not isinstance(chat, list | tuple) or not chat or any(isinstance(m, str | bytes | int) for m in chat):
            raise TypeError(f'{function}: messages holds {chat!r}, expected a list of {{"role": ..., "content": ...}}')
        rows.append(checked_ids(function, _rendered(function, chat, tools, tokenizer), vocab, 1))
    return Prompts(rows, several, True, [True] * len(rows), whole=True)


# Roles whose messages the program or the model wrote: they may spell control tokens, such as the <think> of an answer.
_TRUSTED = ("system", "developer", "assistant")


def _rendered(function: str, chat: Sequence[Mapping[str, Any]], tools: Any, tokenizer: Tokenizer | None) -> list[int]:
    """The ids of a conversation; its template writes the special tokens."""
    encode_chat: Any = getattr(tokenizer, "encode_chat", None)
    if encode_chat is None or getattr(tokenizer, "chat_template", "") is None:
        raise ValueError(f"{function}: messages need a tokenizer with a chat template, and the model has none")
    found: list[int] = encode_chat(chat, control_tokens=_TRUSTED, **({} if tools is None else {"tools": tools}))
    return found


def _id_lists(function: str, prompt: Any) -> tuple[list[Any], bool]:
    """(ids of each prompt, whether there may be several)."""
    if isinstance(prompt, Mapping):
        return _unpadded(function, prompt)
    unmasked(function, "prompt", prompt)
    if not isinstance(prompt, list | tuple) and np.ndim(prompt) > 1:
        return list(np.asarray(prompt)), True
    if isinstance(prompt, list | tuple) and any(np.ndim(p) > 0 for p in prompt):
        return list(prompt), True
    return [prompt], False


def _unpadded(function: str, batch: Any) -> tuple[list[Any], bool]:
    """What a Hugging Face tokenizer returns: input_ids, and where they are no padding."""
    if "input_ids" not in batch:
        raise TypeError(f"{function}: prompt is a {type(batch).__name__} without input_ids, expected a text, ids, or "
                        "what a Hugging Face tokenizer returns")
    rows, several = _id_lists(function, batch["input_ids"])
    if "attention_mask" not in batch:
        return rows, several
    masks, _ = _id_lists(function, batch["attention_mask"])
    if [np.shape(m) for m in masks] != [np.shape(r) for r in rows]:
        raise ValueError(f"{function}: prompt has an attention_mask of another shape than its input_ids")
    return [np.asarray(r)[np.asarray(m).astype(bool)] for r, m in zip(rows, masks, strict=True)], several


def _all(prompt: Any, kind: type) -> bool:
    return isinstance(prompt, list | tuple) and bool(prompt) and all(isinstance(p, kind) for p in prompt)
