"""What a chat template is given: messages, tools and documents as plain data.

Templates come with models. So that no method of a caller's object is in their reach, all they see is rebuilt from
texts, numbers, lists and dicts, in the form that published templates are written for.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from forge_c.models.tool_schema import tool_schema

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's reasoning, the common one first
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # ends in a space, which a template that trims takes away
_FIELDS = "a list of {'role': ..., 'content': ...}"

Messages = list[dict[str, Any]]


def plain(value: Any) -> Any:
    """The value as texts, numbers, None, lists, tuples and dicts; what is none of these becomes its type's name."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):  # pydantic's
        return plain(dump())
    return f"<{type(value).__name__}>"


def plain_messages(messages: Any) -> Messages:
    """A conversation as templates expect it: no key that is None, and reasoning under each of its usual names."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise TypeError(f"apply_chat_template: messages is {_shown(messages)}, expected {_FIELDS}")
    found: Messages = []
    for at, message in enumerate(plain(list(messages))):
        if not isinstance(message, dict):
            raise TypeError(f"apply_chat_template: messages[{at}] is {_shown(message)}, expected a dict with role and "
                            "content")
        given = {key: item for key, item in message.items() if item is not None}
        reasoning = next((given[key] for key in _REASONING if key in given), None)
        found.append(given if reasoning is None else {"thinking": reasoning} | given
                     | {"reasoning_content": reasoning})
    return found


def plain_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tools as JSON schemas; a Python function is described by its annotations and docstring."""
    if tools is None:
        return None
    _check_list("tools", tools, "a list of JSON schemas and functions")
    return [plain(tool) if isinstance(tool, Mapping) else tool_schema(tool, f"apply_chat_template: tools[{at}]")
            for at, tool in enumerate(tools)]


def plain_documents(documents: Any) -> list[dict[str, Any]] | None:
    """Documents as dicts."""
    if documents is None:
        return None
    _check_list("documents", documents, "a list of {'title': ..., 'text': ...}")
    for at, document in enumerate(documents):
        if not isinstance(document, Mapping):
            raise TypeError(f"apply_chat_template: documents[{at}] is {_shown(document)}, expected a dict with title "
                            "and text")
    return plain(list(documents))


def _check_list(name: str, value: Any, expected: str) -> None:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise TypeError(f"apply_chat_template: {name} is {_shown(value)}, expected {expected}")


class Continued:
    """The last message left open, so that the model goes on with it: its text is tagged, and the prompt ends there."""

    def __init__(self, messages: Messages, field: str, template: str) -> None:
        """Tag the last message's field in place."""
        if not messages:
            raise ValueError("apply_chat_template: continue_final_message needs a message, and messages is empty")
        last, text = messages[-1], messages[-1].get(field)
        if text is None:
            raise ValueError(f"apply_chat_template: continue_final_message: the last message has no {field!r}")
        # Reasoning stands there under several names, and the template reads one of them.
        fields = [f for f in _REASONING if last.get(f) == text] if field in _REASONING else [field]
        if not any(f in template for f in fields):
            raise ValueError(f"apply_chat_template: continue_final_message: the chat template does not read {field!r}")
        if isinstance(text, list):
            block = next((b for b in reversed(text) if isinstance(b, dict) and isinstance(b.get("text"), str)), None)
            if block is None:
                raise ValueError(f"apply_chat_template: continue_final_message: the last message's {field!r} has no "
                                 "text")
            self.text, block["text"] = block["text"], block["text"] + _TAG
        elif isinstance(text, str):
            self.text = text
            last.update(dict.fromkeys(fields, text + _TAG))
        else:
            raise TypeError(f"apply_chat_template: continue_final_message: the last message's {field!r} is "
                            f"{_shown(text)}, expected a text")

    def cut(self, rendered: str) -> str:
        """The prompt up to the end of that text."""
        at = rendered.rfind(_TAG.strip())
        if at < 0 or self.text.strip() not in rendered:
            raise ValueError("apply_chat_template: continue_final_message: the chat template changes the last message, "
                             "so that its end cannot be found in the prompt")
        return rendered[:at] if rendered.startswith(_TAG, at) else rendered[:at].rstrip()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... (a {type(value).__name__})"
