"""docs/api.md from the docstrings of every public name: `python tools/make_api_reference.py`, from another folder than
the source if it is not built in place; --check only says whether the page is current."""
from __future__ import annotations

import inspect
import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import forge_c
from forge_c.models.tokenizer import ByteTokenizer, HuggingFaceTokenizer

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"
WIDTH = 118
FUNCTIONS = {
    "Norms, positions, activations": "rms_norm layer_norm rope rope_table RopeTable relu silu gelu swiglu geglu "
                                     "softmax",
    "Products": "pack pack_gated PackedWeight linear gated_linear embedding packing.from_q4_0",
    "Attention and its cache": "attention merge_attention KVCache kv_cache_nbytes",
    "State spaces and linear attention": "causal_conv1d selective_scan ssd_scan gated_delta s4d_scan s4d_kernel "
                                        "rg_lru",
    "The machine": "isa available_isas use_isa get_num_threads set_num_threads show_config roofline get_include "
                   "get_library_dir",
}


def signature(value: Any) -> str:
    """(arguments), without types: the docstring says more of them, and the stubs all."""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    bare = [p.replace(annotation=inspect.Parameter.empty) for name, p in found.parameters.items() if name != "self"]
    text = str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return re.sub(r"<object object at 0x\w+>|<forge_c[^>]*>|Unsaid\([^)]*\)", "...", text)


def entry(title: str, value: Any) -> list[str]:
    """A name with its signature and docstring, in a block as they are."""
    callable_ = inspect.isroutine(value) or inspect.isclass(value)
    head = textwrap.fill(title + (signature(value) if callable_ else ""), WIDTH, subsequent_indent="    ",
                         break_long_words=False, break_on_hyphens=False)
    return [head, textwrap.indent(inspect.getdoc(value) or "", "    "), ""]


def members(cls: type, told: type | None = None) -> list[str]:
    """The public methods and properties that a class or its bases here define, but for those of a base told already."""
    lines: list[str] = []
    bases = [c for c in cls.__mro__ if c.__module__.startswith("forge_c") and (c is cls or c is not told)]
    for name in dict.fromkeys(n for c in bases for n in vars(c)):
        value = inspect.getattr_static(cls, name)
        if isinstance(value, classmethod | staticmethod):
            value = getattr(cls, name)
        documented = getattr(value, "__doc__", None)
        described = inspect.isroutine(value) or isinstance(value, property) or inspect.isgetsetdescriptor(value)
        if documented and described and (not name.startswith("_") or name == "__call__"):
            lines += entry(f".{name}", value)
    return lines


def section(title: str, named: dict[str, Any], told: type | None = None) -> list[str]:
    lines = ["", f"## {title}"]
    for name, value in named.items():
        body = entry(name, value) + (members(value, told) if inspect.isclass(value) else [])
        lines += ["", f"### {name.rsplit('.', 1)[-1]}", "", "```text", *"\n".join(body).rstrip().splitlines(), "```"]
    return lines


def under(prefix: str, package: ModuleType) -> dict[str, Any]:
    return {f"{prefix}.{name}": getattr(package, name) for name in package.__all__ if name != "EMBEDDED"}


def page() -> str:
    lines = ["# API reference", "",
             "Written by `tools/make_api_reference.py` from the docstrings, which `help()` shows too; `fc` is "
             "`forge_c`.",
             "[models.md](models.md) shows models at work, [mission.md](mission.md) functions and layers, and",
             "[conventions.md](conventions.md) says what holds of all of them. Types are in the stubs."]
    for title, names in FUNCTIONS.items():
        found = {}
        for name in names.split():
            value: Any = forge_c
            for part in name.split("."):
                value = getattr(value, part)
            found[f"fc.{name}"] = value
        lines += section(title, found)
    lines += section("Models", under("fc.models", forge_c.models))
    lines += section("Tokenizers", {"ByteTokenizer": ByteTokenizer, "HuggingFaceTokenizer": HuggingFaceTokenizer})
    lines += section("Layers", under("fc.nn", forge_c.nn))
    lines += section("Several processes", under("fc.distributed", forge_c.distributed),
                     told=forge_c.distributed.Comm)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        return int(not PAGE.exists() or PAGE.read_text() != text)
    PAGE.write_text(text)
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
