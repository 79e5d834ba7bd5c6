"""Text to token ids and back: the bytes themselves for the embedded model, tokenizer.json for the others."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from forge_c.files import check_values, read_file, read_json

# tokenizer.json: the largest of those that people publish has 262 144 tokens and 515 000 merges, 33 MB in all.
_MAX_TOKENIZER = 64 << 20
_MAX_ENTRIES, _MAX_KEYS = 5 << 19, 1 << 19
_MAX_TEMPLATE = 1 << 18
_MAX_ID = (1 << 32) - 1
_INCOMPLETE = "\ufffd"  # what a decoder shows for the first bytes of a character


class Tokenizer(Protocol):
    """What generate needs of a tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """A token is a byte of UTF-8; byte 0 stands before and after every text.

    >>> ByteTokenizer().encode("hi")
    [0, 104, 105]
    """

    bos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Bytes of the text, after the byte 0 that begins every text. NUL characters are dropped."""
        check_text("encode: text", text)
        return [self.bos_token_id] * add_special_tokens + [b for b in text.encode() if b]

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD."""
        _check_ids(ids, 255)
        return bytes(i for i in ids if i).decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """tokenizer.json by the tokenizers library, and the folder's chat template in a sandbox."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise ImportError("models: text needs the tokenizers library: pip install 'forge_c[hf]'") from None
        self._path = path = folder / "tokenizer.json"
        document = read_file(path, _MAX_TOKENIZER)
        check_values(path, document, _MAX_ENTRIES)
        if document.count(b":") > _MAX_KEYS:
            raise ValueError(f"{path}: more than {_MAX_KEYS} keys")
        with _failures(str(path)):
            self.backend = Backend.from_buffer(document)
        self.special = {key: _content(value) for key, value in config.items() if key.endswith("_token")
                        and _content(value) is not None}
        self.chat_template = _chat_template(folder, config)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. A text that already begins with the BOS token, as chat templates make it, gets no second one."""
        check_text("encode: text", text)
        bos = self.special.get("bos_token")
        special = add_special_tokens and not (bos and text.startswith(bos))
        with _failures(f"encode: {self._path} cannot encode the text"):
            return self.backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text, without special tokens."""
        _check_ids(ids, _MAX_ID)
        with _failures(f"decode: {self._path} cannot decode the ids"):
            return self.backend.decode(list(ids), skip_special_tokens=True)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True,
                            **variables: Any) -> str:
        """The prompt text of a conversation: [{"role": "user", "content": "..."}, ...].

        The template comes with the model and runs in jinja2's immutable sandbox, for two seconds at most and with 128
        MB of values: what it may not touch, and more than that, is a ValueError.
        """
        if self.chat_template is None:
            raise ValueError("apply_chat_template: the model's folder has no chat template")
        try:
            import jinja2  # noqa: F401

            from forge_c.models.chat_template import render
        except ImportError:
            raise ImportError("apply_chat_template needs jinja2: pip install 'forge_c[hf]'") from None
        return render(self.chat_template, {"messages": list(messages), "add_generation_prompt": add_generation_prompt,
                                           **self.special, **variables})


class TextStream:
    """Text piece by piece: push(ids) gives what the new tokens add, and keeps back an unfinished character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._from, self._shown = 0, 0  # decode from here; tokens up to here are shown

    def push(self, token: int) -> str:
        """The text that `token` adds. A word decodes differently at the start of a text, so shown tokens go along."""
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[self._from : self._shown])
        now = self._tokenizer.decode(self._ids[self._from :])
        if len(now) <= len(before) or now.endswith(_INCOMPLETE):
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def rest(self) -> str:
        """What push kept back."""
        before = self._tokenizer.decode(self._ids[self._from : self._shown])
        return self._tokenizer.decode(self._ids[self._from :])[len(before) :]


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The folder's tokenizer, or None if it has no tokenizer.json."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object")
    if config.get("tokenizer_class") == "ByteTokenizer":
        return ByteTokenizer()
    return HuggingFaceTokenizer(folder, config) if (folder / "tokenizer.json").exists() else None


def _content(token: Any) -> str | None:
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return _decoded(path, read_file(path, _MAX_TEMPLATE))
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _decoded(path: Path, text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None


@contextmanager
def _failures(what: str) -> Iterator[None]:
    """The tokenizers library's errors as ValueError. It raises bare Exception, and a panic in it is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {error}") from None


def check_text(argument: str, text: Any) -> None:
    """TypeError unless it is a text, ValueError if it holds half a surrogate pair, which no tokenizer can encode."""
    if not isinstance(text, str):
        raise TypeError(f"{argument} is {text!r}, expected a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{argument} has {text[error.start]!r} at {error.start}, half of a surrogate pair; expected "
                         "whole characters") from None


def _check_ids(ids: Sequence[int], most: int) -> None:
    for at, i in enumerate(ids):
        if isinstance(i, bool) or not isinstance(i, int | np.integer):
            raise TypeError(f"decode: ids[{at}] is {i!r}, expected an integer")
        if not 0 <= i <= most:
            raise ValueError(f"decode: ids[{at}] is {i}, expected 0 to {most}")
