"""A conversation: each turn costs only its new tokens, because the cache keeps those before.

    python examples/chat.py MODEL "What is a heap?" "Show one in Python."    MODEL: a folder, a GGUF file, ORG/NAME
    python examples/chat.py --installed PACKAGE "Hello!"                     the GGUF file in an installed package
    python examples/chat.py                                                  the embedded model, which continues code
"""
from __future__ import annotations

import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import forge_c as fc


def gguf_of(package: str) -> str:
    """The GGUF file in an installed package, which need not be imported."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"chat.py: {package} is not installed")
    return str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


def load(name: str) -> fc.models.Model:
    """With activations in 12 bits where the file's matrices are integers: with those of 8, a small model in 4 bits says
    less sense."""
    if name.endswith(".gguf"):
        with suppress(ValueError):  # a file of floats, which is said before a weight is read; or a damaged one, again
            return fc.models.load(name, activations="int12")
    return fc.models.load(name or None)


def say(model: fc.models.Model, cache: fc.models.ModelCache, messages: list[dict[str, str]]) -> str:
    """The answer, printed as it comes; a model without a chat template continues the user's text."""
    begin, last = time.perf_counter(), messages[-1]["content"]
    template = getattr(model.tokenizer, "chat_template", None)
    asked = {"messages": messages} if template else {"prompt": last}
    print(f"\n> {last}")
    stream = model.generate(**asked, max_new_tokens=100, cache=cache, sampling="model", seed=0, stream=True)
    text = ""
    for piece in stream:
        text += piece
        print(piece, end="", flush=True)
    tokens = len(stream.completions[0].ids)
    print(f"\n[{tokens} tokens, {tokens / (time.perf_counter() - begin):.0f} tokens/s]")
    return text


def main() -> None:
    name, *questions = sys.argv[1:] or ["", "def add(a, b):\n", "\n\ndef subtract(a, b):\n"]
    if name == "--installed":
        if not questions:
            sys.exit("usage: chat.py [FILE | FOLDER | --installed PACKAGE] QUESTION...")
        package, *questions = questions
        name = gguf_of(package)
    model = load(name)
    cache, messages = model.new_cache(), []
    for question in questions:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": say(model, cache, messages)})


if __name__ == "__main__":
    main()
