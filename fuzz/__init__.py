"""Programs that try to break forge_c with inputs drawn from a seed; `python -m fuzz`, see README.md."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FUZZERS = ("ops", "cache", "files", "mallocs", "threads")

# The references and folders of the suite are ours too. The root goes last, or an installed forge_c would be hidden by
# a source tree that nobody has built.
if "FUZZ_MORE" in os.environ:  # a test's own fuzzer
    __path__.append(os.environ["FUZZ_MORE"])
sys.path[:] = [str(ROOT / "tests"), *(p for p in sys.path if Path(p or ".").resolve() != ROOT), str(ROOT)]

listeners: list[Callable[[str], None]] = []


def doing(text: str) -> None:
    """Say what comes next: the report of a death or a hang will name it."""
    for listener in listeners:
        listener(text)
