"""Text that makes no control tokens: what a stranger wrote cannot end his turn, whatever it spells.

Control tokens are the tokens that decoding does not show, and the added tokens that a chat template writes, such as
<think>. Other added tokens, runs of spaces for instance, are found in a text as ever.
"""
from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_MARK, _UNMARK = "\ufdd0", "\ufdd1"  # stand around what is to be text. No character has these codes
_MARKED = re.compile(f"{_MARK}([^{_MARK}{_UNMARK}]*){_UNMARK}|[{_MARK}{_UNMARK}]")


def _any_of(expressions: Iterable[str]) -> re.Pattern[str]:
    """Any of them, the longest first; nothing if there is none."""
    return re.compile("|".join(sorted(expressions, key=len, reverse=True)) or "(?!)")


class PlainText:
    """A backend's encoding of such text; `written` is what its chat templates hold."""

    def __init__(self, backend: Any, written: str) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        control = {i for i, token in added.items() if token.content and (
            token.special or (token.content in written and not token.content.isspace()))}
        kept = {i: token for i, token in added.items() if i not in control and token.content}
        self._control = control
        self._spelt = _any_of(re.escape(added[i].content) for i in control)
        self._kept = _any_of(map(_expression, kept.values()))
        self._kept_ids = {token.content: i for i, token in kept.items()}
        self._normalizes = backend.normalizer is not None and any(added[i].normalized for i in control)

    def encode(self, text: str) -> list[int]:
        """Ids of a whole text."""
        ids, at = [], 0
        for match in self._kept.finditer(text):
            ids += self._pieces(text[at : match.start()])
            at, token = match.end(), match[0]
            ids.append(self._kept_ids[token if token in self._kept_ids else token.strip()])
        return ids + self._pieces(text[at:])

    def mark(self, value: Any, *, control: bool = False) -> Any:
        """Plain data with marks around each control token in its texts, unless they may write some; keys stay as they
        are."""
        if isinstance(value, str):
            text = value.replace(_MARK, "").replace(_UNMARK, "")
            if control:
                return text
            found = self._spelt.sub(rf"{_MARK}\g<0>{_UNMARK}", text)
            if self._normalizes and found == text:
                # A normalizer may spell one: where capitals do not count, it makes </s> of </S>.
                ids = self._backend.encode(text, add_special_tokens=False).ids
                return text if self._control.isdisjoint(ids) else f"{_MARK}{text}{_UNMARK}"
            return found
        if isinstance(value, dict):
            return {key: self.mark(item, control=control) for key, item in value.items()}
        return [self.mark(item, control=control) for item in value] if isinstance(value, list | tuple) else value

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text that is made of such data and others, which make control tokens as ever."""
        first, *more = _MARKED.split(text)
        ids: list[int] = self._backend.encode(first, add_special_tokens=False).ids
        for at, piece in enumerate(more):
            if piece:
                ids += self._later(piece, is_text=at % 2 == 0)
        return ids

    def _later(self, piece: str, is_text: bool) -> list[int]:
        """Ids of a piece from within a text: a line end before it keeps away the space that begins a text."""
        def encode(text: str) -> list[int]:
            return self._pieces(text) if is_text else self._backend.encode(text, add_special_tokens=False).ids

        line_end = self._backend.encode("\n", add_special_tokens=False).ids
        ids = encode("\n" + piece)
        return ids[len(line_end) :] if ids[: len(line_end)] == line_end else encode(piece)

    def _pieces(self, text: str) -> list[int]:
        """Ids of a text by the vocabulary alone. One that merges a control token has to do without merges."""
        backend = self._backend
        normal = backend.normalizer.normalize_str(text) if backend.normalizer is not None and text else text
        splits = [normal] if backend.pre_tokenizer is None else [
            part for part, _ in backend.pre_tokenizer.pre_tokenize_str(normal)]
        for parts in splits, (character for part in splits for character in part):
            ids = [token.id for part in parts if part for token in backend.model.tokenize(part)]
            if self._control.isdisjoint(ids):
                return ids
        raise ValueError(f"{text!r} is nothing but a control token to this vocabulary")


def _expression(token: Any) -> str:
    """What an AddedToken is found by."""
    found = re.escape(token.content)
    if token.single_word:
        found = rf"(?<!\w){found}(?!\w)"
    return (r"\s*" if token.lstrip else "") + found + (r"\s*" if token.rstrip else "")
