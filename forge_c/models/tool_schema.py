"""The JSON schema of a Python function that a model may call, from its annotations and a Google-style docstring."""
from __future__ import annotations

import enum
import inspect
import json
import re
import types
from collections.abc import Callable
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

Schema = dict[str, Any]

_SCALARS: dict[type, str] = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_KNOWN: dict[Any, Schema] = {kind: {"type": name} for kind, name in _SCALARS.items()} | {
    list: {"type": "array"}, tuple: {"type": "array"}, dict: {"type": "object"}, Any: {}}
_SECTION = r"(?:Args|Returns|Raises):"
_ARGUMENT = re.compile(r"([ \t]*)(\w+)(?:[ \t]*\([^()\n]*\))?:\s*(.*)")  # indentation, name, description
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def tool_schema(function: Any, what: str = "tool_schema: function") -> Schema:
    """{"type": "function", "function": {"name", "description", "parameters"}} of a function or method.

    Every argument needs an annotation and a line in the docstring's Args section; `(choices: ["a", "b"])` at the end
    of such a line lists the values it may have.

    Raises:
        TypeError: not a function; an argument without annotation, or with one that JSON has no type for.
        ValueError: no docstring, or an argument that it does not describe.
    """
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        raise TypeError(f"{what} is a {type(function).__name__}, expected a JSON schema (a dict) or a function")
    name, text = function.__name__, inspect.getdoc(function)
    if not text:
        raise ValueError(f"{what}: {name} has no docstring, expected one that says what it does")
    description, arguments, result = _docstring(text.strip())
    parameters, returned = _parameters(function, f"{what}: {name}")
    for argument, schema in parameters["properties"].items():
        if argument not in arguments:
            raise ValueError(f"{what}: {name}: the docstring's Args section does not describe {argument!r}")
        said = arguments[argument]
        if choices := _CHOICES.search(said):
            schema["enum"] = _choices(choices.group(1), f"{what}: {name}: {argument}")
            said = said[: choices.start()].strip()
        schema["description"] = said
    found: Schema = {"name": name, "description": description, "parameters": parameters}
    if returned is not None:
        found["return"] = returned | ({} if result is None else {"description": result})
    return {"type": "function", "function": found}


def _choices(text: str, what: str) -> list[Any]:
    try:
        return [c.strip() if isinstance(c, str) else c for c in json.loads(text)]
    except (ValueError, TypeError):
        raise ValueError(f"{what}: choices is {text}, expected a JSON list") from None


def _docstring(text: str) -> tuple[str, dict[str, str], str | None]:
    """(what it does, what each argument is, what it returns or None)."""
    parts = re.split(rf"(?:^|\n)[ \t]*({_SECTION})", text)
    sections = {name: body for name, body in zip(parts[1::2], parts[2::2], strict=True)}
    returned = sections.get("Returns:")
    return parts[0].strip(), _arguments(sections.get("Args:", "")), returned.strip() if returned else None


def _arguments(text: str) -> dict[str, str]:
    """Descriptions by name. A line that is indented deeper than an argument's goes on with it."""
    found: dict[str, str] = {}
    indent, name = "", None
    for line in filter(str.strip, text.split("\n")):
        match = _ARGUMENT.fullmatch(line)
        if match and (name is None or not line.startswith((indent + " ", indent + "\t"))):
            indent, name, said = match.groups()
            found[name] = said.strip()
        elif name is not None:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def _parameters(function: Callable[..., Any], what: str) -> tuple[Schema, Schema | None]:
    """(schema of the arguments, schema of the result or None)."""
    hints, signature = get_type_hints(function), inspect.signature(function)
    required = []
    for at, parameter in enumerate(signature.parameters.values()):
        missing = parameter.annotation is parameter.empty
        if missing and at == 0 and parameter.name in ("self", "cls"):
            continue
        if missing:
            raise TypeError(f"{what}: argument {parameter.name!r} has no annotation")
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    returned = None
    try:
        returned = _schema(hints.pop("return"), what) if "return" in hints else None
    except TypeError:
        pass  # nothing that the model writes has this type
    properties = {name: _schema(hint, f"{what}: argument {name!r}") for name, hint in hints.items()}
    return {"type": "object", "properties": properties} | ({"required": required} if required else {}), returned


def _schema(hint: Any, what: str) -> Schema:
    """Of an annotation."""
    origin, inner = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and origin is None and issubclass(hint, enum.Enum):
        return _values([member.value for member in hint], hint, what)
    if origin is Literal:
        return _values(list(inner), hint, what)
    if origin in (Union, types.UnionType):
        return _union([_schema(t, what) for t in inner if t is not type(None)], type(None) in inner)
    if origin is list:
        return {"type": "array", "items": _schema(inner[0], what)}
    if origin is tuple and len(inner) > 1 and ... not in inner:
        return {"type": "array", "prefixItems": [_schema(t, what) for t in inner]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(inner[1], what)}
    if origin is None and hint in _KNOWN:
        return dict(_KNOWN[hint])
    _refuse(hint, what)


def _union(schemas: list[Schema], nullable: bool) -> Schema:
    if len(schemas) == 1:
        found = schemas[0]
    elif all(s.keys() == {"type"} and isinstance(s["type"], str) for s in schemas):
        names = sorted({s["type"] for s in schemas})
        found = {"type": names[0] if len(names) == 1 else names}
    else:
        found = {"anyOf": schemas}
    return found | ({"nullable": True} if nullable else {})


def _values(values: list[Any], hint: Any, what: str) -> Schema:
    if not values or any(type(value) not in _SCALARS for value in values):
        _refuse(hint, what)
    kinds = list(dict.fromkeys(_SCALARS[type(value)] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _refuse(hint: Any, what: str) -> NoReturn:
    raise TypeError(f"{what} has the annotation {hint!r}, expected one of int, float, str, bool, Enum, Literal, list, "
                    "tuple, dict and unions of them; or give the tool as a JSON schema")
