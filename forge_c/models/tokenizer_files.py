"""A folder's tokenizer, read and written: tokenizer.json, files that say more about its tokens, and chat templates."""
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from forge_c.checks import warn
from forge_c.files import check_values, read_file, read_json
from forge_c.models.tokenizer import MAX_TEMPLATE, ByteTokenizer, HuggingFaceTokenizer, NoText, Tokenizer, failures

# tokenizer.json: the largest of those that people publish has 262 144 tokens and 515 000 merges, 33 MB in all.
_MAX_TOKENIZER = 64 << 20
_MAX_ENTRIES, _MAX_KEYS = 5 << 19, 1 << 19

_MAX_TEMPLATES = 64
# What save_tokenizer says: tokenizer.json has all added tokens, and a name of a special token makes none of a word.
_COMPLETE = "tokenizer_json_is_complete"
_OTHER_FORMATS = ("tokenizer.model", "tokenizer.model.v3", "tekken.json", "spiece.model", "sentencepiece.bpe.model",
                  "tiktoken.model", "vocab.json", "vocab.txt")


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The folder's tokenizer, or None if it has none. One that cannot be read here raises only when it is used."""
    config = _object(folder / "tokenizer_config.json")
    if config.get("tokenizer_class") == "ByteTokenizer":
        return ByteTokenizer()
    if (folder / "tokenizer.json").exists():
        try:
            return _tokenizer(folder, config)
        except ImportError:
            return NoText(ImportError, "models: text needs the tokenizers library: pip install tokenizers")
    other = next((name for name in _OTHER_FORMATS if (folder / name).exists()), None)
    if other is None:
        return None
    return NoText(ValueError, f"models: {folder} has {other}, and text needs tokenizer.json; get it from the model's "
                  "page, or write it with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)")


def save_tokenizer(tokenizer: Tokenizer | None, folder: Path) -> None:
    """Files from which load_tokenizer makes the same one. ValueError if it is of another kind than it makes."""
    if isinstance(tokenizer, ByteTokenizer):
        settings: dict[str, Any] = {"tokenizer_class": "ByteTokenizer"}
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        (folder / "tokenizer.json").write_text(tokenizer.backend.to_str(), encoding="utf-8")
        have = tokenizer.chat_template
        template = have if have is None or isinstance(have, str) else [
            {"name": name, "template": text} for name, text in have.items()]
        settings = {_COMPLETE: True, "added_tokens_decoder": {},
                    "split_special_tokens": tokenizer.backend.encode_special_tokens,
                    "chat_template": template, **tokenizer.special}
    elif tokenizer is None or isinstance(tokenizer, NoText):
        return
    else:
        raise ValueError(f"Model.save: the model has a {type(tokenizer).__name__} for a tokenizer, which no file holds")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _tokenizer(folder: Path, config: Mapping[str, Any]) -> HuggingFaceTokenizer:
    from tokenizers import Tokenizer as Backend

    path = folder / "tokenizer.json"
    document = read_file(path, _MAX_TOKENIZER)
    check_values(path, document, _MAX_ENTRIES)
    if document.count(b":") > _MAX_KEYS:
        raise ValueError(f"{path}: more than {_MAX_KEYS} keys")
    # What transformers has written since 2023 tells all of it in tokenizer_config.json.
    is_old = "added_tokens_decoder" not in config
    settings = {**config, **(_object(folder / "special_tokens_map.json") if is_old else {})}
    special = dict(_named(settings))
    with failures(str(path)):
        backend = Backend.from_buffer(document)
        backend.encode_special_tokens = settings.get("split_special_tokens") is True
    if config.get(_COMPLETE) is not True:
        _add_tokens(backend, folder, settings, special)
    return HuggingFaceTokenizer(str(path), backend, special, _chat_templates(folder, config))


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no file."""
    found = read_json(path) if path.exists() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object")
    return found


def _content(token: Any) -> str | None:
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _named(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, text) of special tokens: those of a key that ends in _token, and extra ones that have names."""
    extra = settings.get("extra_special_tokens")
    for key, value in {**settings, **(extra if isinstance(extra, dict) else {})}.items():
        text = _content(value)
        if text and (key.endswith("_token") or (isinstance(extra, dict) and key in extra)):
            yield key, text


# ---- added tokens ----------------------------------------------------------------------------------

def _add_tokens(backend: Any, folder: Path, settings: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Give the backend the tokens that the other files know and tokenizer.json does not."""
    from tokenizers import AddedToken

    known = backend.get_added_tokens_decoder()
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    names = [*special.values(), *filter(None, map(_content, extra if isinstance(extra, list) else []))]
    listed = {i: fields | {"special": fields["special"] or fields["content"] in special.values()}
              for i, fields in _listed_tokens(folder, settings, names).items() if i not in known}
    texts = {token.content for token in known.values()} | {fields["content"] for fields in listed.values()}
    with failures(str(folder / "tokenizer_config.json")):
        backend.add_tokens([AddedToken(**listed[i]) for i in sorted(listed)])
        backend.add_tokens([AddedToken(text, special=True) for text in dict.fromkeys(names) if text not in texts])
    for i, fields in listed.items():
        if (got := backend.token_to_id(fields["content"])) != i:
            warn(f"{folder}: the token {fields['content']!r} has id {i} in tokenizer_config.json, and the "
                 f"first free one after those of tokenizer.json is {got}")


def _listed_tokens(folder: Path, settings: Mapping[str, Any], special: list[str]) -> dict[int, dict[str, Any]]:
    """Fields of AddedToken by id: from tokenizer_config.json, or from the older added_tokens.json."""
    found: dict[int, dict[str, Any]] = {}
    path, listed = folder / "tokenizer_config.json", settings.get("added_tokens_decoder")
    if listed is None:
        path = folder / "added_tokens.json"
        listed = {str(i): {"content": text, "special": text in special} for text, i in _object(path).items()}
    for key, token in listed.items() if isinstance(listed, dict) else [("added_tokens_decoder", listed)]:
        if not (key.isdecimal() and key.isascii() and len(key) <= 10 and isinstance(token, dict) and _content(token)):
            raise ValueError(f"{path}: {key!r} is {str(token)[:80]}, expected the content and flags of a token by id")
        flags = {name: token.get(name) is True for name in ("single_word", "lstrip", "rstrip", "special")}
        normalized = token.get("normalized", not flags["special"]) is True
        found[int(key)] = {"content": _content(token), "normalized": normalized, **flags}
    return found


# ---- chat templates --------------------------------------------------------------------------------

def _chat_templates(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The template, or several by name: those in files of their own if there are any, else tokenizer_config.json's."""
    found = {}
    path = folder / "chat_template.jinja"
    if path.exists():
        found["default"] = _text(path)
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if len(more) > _MAX_TEMPLATES:
        raise ValueError(f"{more[0].parent}: {len(more)} templates, expected at most {_MAX_TEMPLATES}")
    found |= {path.name.removesuffix(".jinja"): _text(path) for path in more}
    if not found:
        given = config.get("chat_template")
        if isinstance(given, str):
            return given
        if isinstance(given, list):
            given = {t.get("name"): t.get("template") for t in given if isinstance(t, dict)}
        found = {name: text for name, text in (given.items() if isinstance(given, dict) else ())
                 if isinstance(name, str) and isinstance(text, str)}
    return found["default"] if found.keys() == {"default"} else found or None


def _text(path: Path) -> str:
    try:
        return read_file(path, MAX_TEMPLATE).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None
