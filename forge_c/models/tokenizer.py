"""Text to token ids and back: the bytes themselves for the embedded model, the tokenizers library for the others.

Two kinds of token are no text. *Special tokens* are what a tokenizer puts around a text, such as BOS; `special_tokens`
says whether encode does. *Control tokens* are what a text may spell, such as <|im_end|>; with `control_tokens=False`
none is made, and the text is read as the characters that it has: what a stranger wrote cannot end his turn.
"""
from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from forge_c.models.plain_text import PlainText

MAX_TEMPLATE = 1 << 18  # bytes
_MAX_ID = (1 << 32) - 1
_INCOMPLETE = "\ufffd"  # what a decoder shows for the first bytes of a character
_CONTEXT = 64  # tokens of a prompt that a stream decodes with the first new one
_CHOICES = ("add_generation_prompt", "chat_template", "continue_final_message")


class Tokenizer(Protocol):
    """What generate needs of a tokenizer."""

    def encode(self, text: str, special_tokens: bool = True, *, control_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class ChatPrompt(str):
    """A rendered conversation. Its template has written the special tokens that there are: encode adds none to it."""

    def __add__(self, more: str) -> ChatPrompt:
        return ChatPrompt(str.__add__(self, more))


class ByteTokenizer:
    """A token is a byte of UTF-8; byte 0 stands before and after every text.

    >>> ByteTokenizer().encode("hi")
    [0, 104, 105]
    """

    bos_token_id = 0

    def encode(self, text: str, special_tokens: bool = True, *, control_tokens: bool = True) -> list[int]:
        """Bytes of the text, after the byte 0 that begins every text. NUL characters are dropped."""
        check_text("encode: text", text)
        return [self.bos_token_id] * special_tokens + [b for b in text.encode() if b]

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD."""
        return bytes(i for i in _checked_ids(ids, 255) if i).decode("utf-8", errors="replace")


class NoText:
    """In the place of a tokenizer that is not to be had: ids go through a model all the same, text is an error."""

    def __init__(self, kind: type[Exception], reason: str) -> None:
        self._kind, self._reason = kind, reason

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise self._kind(self._reason)

    encode = decode = apply_chat_template = encode_chat = _refuse


class HuggingFaceTokenizer:
    """A tokenizer of the tokenizers library, with a model's chat templates in a sandbox.

    Attributes:
        backend: the tokenizers.Tokenizer.
        special: texts of the special tokens that have a name, {"bos_token": "<s>", ...}; chat templates see them.
        special_ids: texts and ids of all tokens that decode does not show.
        chat_template: the template, {name: template} where there are several, or None.
    """

    def __init__(self, source: str, backend: Any, special: Mapping[str, str],
                 chat_template: str | Mapping[str, str] | None = None) -> None:
        """`source` is the file that messages name."""
        backend.no_truncation()  # training may have left both in the file
        backend.no_padding()
        self._source, self.backend, self.special, self.chat_template = source, backend, dict(special), chat_template
        self._plain_texts: dict[str, PlainText] = {}
        added = backend.get_added_tokens_decoder()
        self.special_ids = {token.content: i for i, token in added.items() if token.special}
        # Added tokens that a byte-level decoder takes for bytes: DeepSeek has one that is the letter ü itself.
        self._literal = {i: token.content for i, token in added.items() if not token.special
                         and not token.content.isascii() and _is_bytes(token.content)
                         and type(backend.decoder).__name__ == "ByteLevel"}

    def encode(self, text: str, special_tokens: bool = True, *, control_tokens: bool = True) -> list[int]:
        """Token ids.

        Args:
            text: one that already begins with the BOS token gets no second one, and a prompt from apply_chat_template
                no special tokens at all.
            special_tokens: add those that the tokenizer puts around a text.
            control_tokens: what spells a control token becomes that token; False: nothing does.
        """
        check_text("encode: text", text)
        bos = self.special.get("bos_token")
        around = special_tokens and not isinstance(text, ChatPrompt) and not (
            bos and text.startswith(bos) and control_tokens and not self.backend.encode_special_tokens)
        with failures(f"encode: {self._source} cannot encode the text"):
            if control_tokens:
                return self.backend.encode(str(text), add_special_tokens=around).ids
            before, after = self._around if around else ([], [])
            return [*before, *self._plain_text().encode(str(text)), *after]

    def decode(self, ids: Sequence[int]) -> str:
        """The text, without special tokens."""
        numbers = _checked_ids(ids, _MAX_ID)
        with failures(f"decode: {self._source} cannot decode the ids"):
            if self._literal.keys().isdisjoint(numbers):
                return self.backend.decode(numbers, skip_special_tokens=True)
            runs = groupby(numbers, self._literal.get)
            return "".join(self.backend.decode(list(run), skip_special_tokens=True) if literal is None
                           else literal * len(list(run)) for literal, run in runs)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None = None,
                            documents: Sequence[Mapping[str, Any]] | None = None, chat_template: str | None = None,
                            add_generation_prompt: bool | None = None, continue_final_message: bool | str = False,
                            **variables: Any) -> ChatPrompt:
        """The prompt text of a conversation: [{"role": "user", "content": "..."}, ...].

        The template comes with the model and runs in jinja2's immutable sandbox, for two seconds at most and with 128
        MB of values: what it may not touch, and more than that, is a ValueError.

        Args:
            messages: dicts, or objects with such fields; a key that is None counts as missing.
            tools: JSON schemas, or Python functions with annotations and a docstring. If the model has a template
                named tool_use, it is taken for them.
            documents: dicts with title and text, for templates that quote them.
            chat_template: the name of one of the model's templates, or the text of another.
            add_generation_prompt: end with what begins an answer; by default unless a message is continued.
            continue_final_message: end within the last message, so that the model goes on with it; the name of a field
                such as "reasoning_content" continues that one.
            variables: what else the template reads, such as enable_thinking.
        """
        template = self._template(chat_template, tools)
        if continue_final_message and add_generation_prompt:
            raise ValueError("apply_chat_template: add_generation_prompt begins an answer, continue_final_message goes "
                             "on with one; expected one of them")
        try:
            import jinja2  # noqa: F401

            from forge_c.models.chat_template import render_chat
        except ImportError:
            raise ImportError("apply_chat_template needs jinja2: pip install jinja2") from None
        prompt = not continue_final_message if add_generation_prompt is None else add_generation_prompt
        return ChatPrompt(render_chat(template, messages, tools, documents, continue_final_message,
                                      {"add_generation_prompt": prompt, **self.special, **variables}))

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, control_tokens: bool | Collection[str] = True,
                    **options: Any) -> list[int]:
        """Token ids of a conversation; the options are those of apply_chat_template.

        control_tokens=False: the template alone writes control tokens. What stands in messages, tools, documents and
        variables is text, whatever it spells. A collection of roles: the same, but for messages of these roles.
        """
        if control_tokens is True:
            return self.encode(self.apply_chat_template(messages, **options))
        from forge_c.models.chat_messages import plain, plain_messages, plain_tools

        how = self._plain_text(options.get("chat_template") or "")
        trusted = control_tokens or ()
        turns = [how.mark(turn, control=turn.get("role") in trusted) for turn in plain_messages(messages)]
        given = options | {"tools": plain_tools(options.get("tools"))}
        prompt = self.apply_chat_template(turns, **{
            key: value if key in _CHOICES else how.mark(plain(value)) for key, value in given.items()})
        check_text("encode_chat: the prompt", prompt)
        with failures(f"encode_chat: {self._source} cannot encode the prompt"):
            return how.encode_marked(str(prompt))

    def _template(self, chosen: str | None, tools: Any) -> str:
        """The text of the template that is to be used."""
        have = self.chat_template
        if chosen is not None and not isinstance(chosen, str):
            raise TypeError(f"apply_chat_template: chat_template is {chosen!r}, expected a name or a template")
        if chosen is not None:
            return have.get(chosen, chosen) if isinstance(have, Mapping) else chosen
        if isinstance(have, Mapping):
            name = "tool_use" if tools is not None and "tool_use" in have else "default"
            if name not in have:
                raise ValueError(f"apply_chat_template: the model has the templates {', '.join(sorted(have))} and no "
                                 "default; choose one with chat_template=")
            return have[name]
        if have is None:
            raise ValueError("apply_chat_template: the model has no chat template")
        return have

    def _plain_text(self, template: str = "") -> PlainText:
        """How text is encoded that makes no control tokens, those of the template included."""
        found = self._plain_texts.get(template)
        if found is None:
            have = self.chat_template
            own = have.values() if isinstance(have, Mapping) else [have or ""]
            found = PlainText(self.backend, "\0".join([*own, template]))
            self._plain_texts = {template: found}  # one is enough: conversations go on with the same template
        return found

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """Ids of the special tokens before and after a text."""
        inner = self.backend.encode("a", add_special_tokens=False).ids
        outer = self.backend.encode("a", add_special_tokens=True).ids
        at = next(i for i in range(len(outer) - len(inner) + 1) if outer[i : i + len(inner)] == inner)
        return outer[:at], outer[at + len(inner) :]


class TextStream:
    """Text piece by piece: push(id) gives what a new token adds, and keeps back an unfinished character."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] | NDArray[np.int64] = ()) -> None:
        """`prompt` holds the ids before the first new one: a word has its space only after another."""
        self._tokenizer = tokenizer
        self._ids = self._context(prompt)
        self._from, self._shown = 0, len(self._ids)  # decode from here; tokens up to here are shown

    def push(self, token: int) -> str:
        """The text that `token` adds. A word decodes differently at the start of a text, so shown tokens go along."""
        self._ids.append(token)
        added = self._added()
        if not added or added.endswith(_INCOMPLETE):
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return added

    def rest(self) -> str:
        """What push kept back."""
        return self._added()

    def _added(self) -> str:
        before = self._tokenizer.decode(self._ids[self._from : self._shown])
        now = self._tokenizer.decode(self._ids[self._from :])
        if not now.startswith(before):  # the prompt ended within a character
            before = before.rstrip(_INCOMPLETE)
        return now[len(before) :]

    def _context(self, prompt: Sequence[int] | NDArray[np.int64]) -> list[int]:
        """The end of the prompt, from where a character begins."""
        tail = [int(i) for i in prompt[-_CONTEXT:]]
        starts = range(min(4, len(tail)) if len(prompt) > len(tail) else 0)
        return next((tail[i:] for i in starts if not self._tokenizer.decode(tail[i:]).startswith(_INCOMPLETE)), tail)


def text_stream(tokenizer: Tokenizer | None, prompt: Sequence[int] | NDArray[np.int64]) -> TextStream | None:
    """A stream of what follows the prompt, or None where there is no text to be had."""
    return None if tokenizer is None or isinstance(tokenizer, NoText) else TextStream(tokenizer, prompt)


def stop_ids(tokenizer: Tokenizer | None, stops: Sequence[str]) -> frozenset[int]:
    """Ids of the special tokens among stop texts: no decoded text shows them, so generation stops at the ids.

    A stop text that goes on after its special token, as "<|im_end|>\\n", stops at the token.
    """
    special: Mapping[str, int] = getattr(tokenizer, "special_ids", {})
    found = set()
    if stops and isinstance(tokenizer, NoText):
        tokenizer.decode([])  # raises what is missing
    for stop in stops:
        inside = [(stop.find(token), -len(token), token) for token in special if token and token in stop]
        if inside:
            at, _, token = min(inside)
            if at:
                raise ValueError(f"generate: stop {stop!r} has text before the special token {token!r}, which no text "
                                 "shows; expected the token alone, or the text alone")
            found.add(special[token])
    return frozenset(found)


@contextmanager
def failures(what: str) -> Iterator[None]:
    """The tokenizers library's errors as ValueError. It raises bare Exception, and a panic in it is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        problem = str(error).removeprefix(f"{what}: ")
        raise ValueError(f"{what}: {problem}") from None


def _is_bytes(token: str) -> bool:
    """Whether each of its characters is one that a byte-level vocabulary writes for a byte."""
    return all("!" <= c <= "~" or "\xa1" <= c <= "\u0143" and c != "\xad" for c in token)


def check_text(argument: str, text: Any) -> None:
    """TypeError unless it is a text, ValueError if it holds half a surrogate pair, which no tokenizer can encode."""
    if not isinstance(text, str):
        raise TypeError(f"{argument} is {text!r}, expected a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{argument} has {text[error.start]!r} at {error.start}, half of a surrogate pair; expected "
                         "whole characters") from None


def _checked_ids(ids: Any, most: int) -> list[int]:
    """The ids as Python's integers."""
    if hasattr(ids, "__array__"):
        try:
            ids = np.asarray(ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"decode: ids is a {type(ids).__name__} that NumPy cannot read: {error}") from None
        if ids.ndim != 1:
            raise ValueError(f"decode: ids has shape {ids.shape}, expected (n,)")
    for at, i in enumerate(ids):
        if isinstance(i, bool) or not isinstance(i, int | np.integer):
            raise TypeError(f"decode: ids[{at}] is {i!r}, expected an integer")
        if not 0 <= i <= most:
            raise ValueError(f"decode: ids[{at}] is {i}, expected 0 to {most}")
    return [int(i) for i in ids]
