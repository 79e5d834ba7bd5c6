"""A whole model of random weights in a page's time: forge_c, transformers on torch, and llama.cpp, in turns."""
from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import machine
from model_files import gguf_file
from peers_table import Entry, Sizes
from processes import Measure, Test, forge_c, llama_cpp, transformers

from forge_c.models.weights.random import SHAPES

# By width, so that what is compared lies side by side in time.
ENTRIES = (Entry("forge_c", "bfloat16"), Entry("torch", "bfloat16"), Entry("llama.cpp", "BF16"),
           Entry("forge_c", "int8"), Entry("llama.cpp", "Q8_0"), Entry("forge_c", "int4"), Entry("llama.cpp", "Q4_0"))
_PROMPT, _NEW = 512, 64
_LEAST = 5.0   # seconds of a process at least
_FIRST = 60.0  # seconds that an entry is taken for before it has run


def _tests(entry: Entry, args: argparse.Namespace, threads: int, limit: float) -> list[Test]:
    """One process of one implementation, of so many seconds at most."""
    sizes = Measure(_PROMPT, _NEW, 1, threads, limit)
    if entry.implementation == "forge_c":
        return forge_c(["--shape", args.shape, "--dtype", entry.form], sizes)
    if entry.implementation == "torch":
        return transformers(sys.executable, SHAPES[args.shape], sizes, entry.form)
    folder = args.cache or Path(tempfile.gettempdir()) / "forge_c_gguf"
    return llama_cpp(args.llama_bench, gguf_file(entry.form, args.shape, folder.absolute(), args.llama_bench), sizes)


def measure(found: dict[str, Any], args: argparse.Namespace, counts: Sequence[int], left: Callable[[], float],
            say: Callable[[str], None]) -> list[str]:
    """Every entry in two rounds at the last of the counts, once at the others, and in a third round, while there is
    time, into found["models"]; says what was left out."""
    sizes = Sizes.of(SHAPES[args.shape])
    if machine.available_memory() < 3 * sizes.file_bytes("BF16"):
        return [f"whole models: {args.shape} takes {3 * sizes.file_bytes('BF16') / 2**30:.0f} GiB of memory"]
    entries = [e for e in ENTRIES if not args.only or any(e.name.startswith(text) for text in args.only)]
    cost = dict.fromkeys(entries, min(_FIRST, args.seconds / 8))
    left_out: list[str] = []
    most = counts[-1]
    turns = [(most, 0), (most, 1), *((count, 0) for count in reversed(counts[:-1])), (most, 2)]
    for threads, number in turns:
        slower = most / threads
        for entry in list(entries):
            if left() < slower * cost[entry]:
                if number == 0:
                    left_out.append(f"{entry.name}, threads {threads}")
                continue
            start = time.monotonic()
            try:
                tests = _tests(entry, args, threads, max(left(), _LEAST))
            except (RuntimeError, OSError) as error:
                say(f"  {entry.name}: skipped: {error}")
                left_out.append(f"{entry.name}: {error}")
                entries.remove(entry)
                continue
            cost[entry] = (time.monotonic() - start) / slower
            say(f"  {threads} threads, {entry.name}: "
                + ", ".join(f"{t['test']} {median(t['tokens_per_second']):.1f}" for t in tests))
            _keep(found, entry, args.shape, threads, tests, number)
    return left_out


def _keep(found: dict[str, Any], entry: Entry, shape: str, threads: int, tests: list[Test], number: int) -> None:
    """A round more of what is there, or the first in the place of what was measured before."""
    for test in tests:
        key = {"shape": shape, "implementation": entry.implementation, "format": entry.form, "threads": threads,
               "test": test["test"]}
        same = [row for row in found["models"] if {name: row[name] for name in key} == key]
        rounds = same[0]["tokens_per_second"] if same and number else []
        found["models"] = [row for row in found["models"] if row not in same]
        found["models"].append({**key, "tokens_per_second": [*rounds, median(test["tokens_per_second"])],
                                "step_bytes": test.get("step_bytes")})
        if "version" in test:
            found["versions"][entry.implementation] = test["version"]
