"""The embedded model at its own settings: what it writes is Python more often than not."""
from __future__ import annotations

import ast
import codeop
import json
import warnings

import pytest

from forge_c.models import EMBEDDED, load

PROMPTS = ["def ", "class ", "def fibonacci(n):\n", "for i in range(10):\n", "import json\n\ndef load(path):\n",
           "import os\nimport sys\n\nclass Stack:\n"]


def is_valid_so_far(text: str) -> bool:
    """Whether its complete lines are a module or the beginning of one."""
    flags = ast.PyCF_ONLY_AST | codeop.PyCF_ALLOW_INCOMPLETE_INPUT | codeop.PyCF_DONT_IMPLY_DEDENT
    try:
        compile(text[: text.rfind("\n") + 1], "sample", "exec", flags)
    except (SyntaxError, ValueError) as error:
        return "incomplete input" in str(error)
    return True


@pytest.mark.parametrize("text, valid", [
    ("x = (1,\n", True), ("def f():\n    if x:\n", True), ("def f():\n    return 1\n\ndef g(", True),
    ('"""not ended\n', True), ("def f(x):\n  return x)\n", False), ("def f(a, a):\n x y\n", False), ("", True),
])
def test_valid_so_far_is_what_a_reader_calls_it(text: str, valid: bool) -> None:
    assert is_valid_so_far(text) == valid


def test_the_embedded_model_writes_python_more_often_than_not() -> None:
    model, texts = load(), []
    for seed in range(3):
        drawn = model.generate(PROMPTS, 200, sampling="model", seed=seed)
        texts += [prompt + text for prompt, text in zip(PROMPTS, drawn, strict=True)]
    with warnings.catch_warnings(action="ignore"):
        valid = [is_valid_so_far(text) for text in texts]
    assert sum(valid) > len(texts) / 2
    assert len(set(texts)) > len(PROMPTS)  # a seed draws its own


def test_its_settings_sample() -> None:
    settings = json.loads((EMBEDDED / "generation_config.json").read_text())
    assert settings["do_sample"] and 0 < settings["temperature"] <= 1
