"""Text to token ids and back: the bytes themselves for the embedded model, tokenizer.json for the others."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from forge_c.models.loading import read_json

_MAX_TOKENIZER = 256 << 20
_MAX_RENDERED = 64 << 20
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
        return [self.bos_token_id] * add_special_tokens + [b for b in text.encode() if b]

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD."""
        return bytes(i for i in ids if i).decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """tokenizer.json by the tokenizers library, and the folder's chat template in a sandbox."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise ImportError("models: text needs the tokenizers library: pip install 'forge_c[hf]'") from None
        path = folder / "tokenizer.json"
        if path.stat().st_size > _MAX_TOKENIZER:
            raise ValueError(f"{path}: {path.stat().st_size} bytes, expected at most {_MAX_TOKENIZER}")
        try:
            self.backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: {error}") from None
        self.special = {key: _content(value) for key, value in config.items() if key.endswith("_token")
                        and _content(value) is not None}
        self.chat_template = _chat_template(folder, config)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. A text that already begins with the BOS token, as chat templates make it, gets no second one."""
        bos = self.special.get("bos_token")
        return self.backend.encode(
            text, add_special_tokens=add_special_tokens and not (bos and text.startswith(bos))).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text, without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True,
                            **variables: Any) -> str:
        """The prompt text of a conversation: [{"role": "user", "content": "..."}, ...].

        The template comes with the model and runs in jinja2's immutable sandbox: what it may not touch is a ValueError.
        """
        if self.chat_template is None:
            raise ValueError("apply_chat_template: the model's folder has no chat template")
        try:
            from jinja2 import TemplateError
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise ImportError("apply_chat_template needs jinja2: pip install 'forge_c[hf]'") from None

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            stream = environment.from_string(self.chat_template).generate(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self.special, **variables)
            return _joined(stream)
        except (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
                ValueError) as error:
            raise ValueError(f"apply_chat_template: {error}") from None


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
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _tojson(value: Any, indent: int | None = None, **_: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, indent=indent)


def _strftime_now(pattern: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(pattern)


def _joined(pieces: Any) -> str:
    found, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size > _MAX_RENDERED:
            raise ValueError(f"the prompt exceeds {_MAX_RENDERED} characters")
        found.append(piece)
    return "".join(found)
