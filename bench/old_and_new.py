"""Two builds of forge_c in turns: whether a change of structure cost speed. Exit status 1 if it did.

    python bench/old_and_new.py --old ../before/.venv/bin/python [--new .venv/bin/python] [--threads 1 2]

The work is that of targets.py, steps of the embedded model, and prompt and steps of 1.1 billion random weights. A ratio
is between neighbours in time, in a process each; the median over rounds counts, and must be 0.98 or more.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from targets import TARGETS, Worker

AT_LEAST = 0.98
_EMBEDDED_TOKENS, _PROMPT, _STEPS = 100, 256, 8


def _embedded() -> Callable[[], Any]:
    from forge_c.models import load

    model = load()
    return lambda: model.generate("import os\n", _EMBEDDED_TOKENS)


def _shape(dtype: str, prompt: bool) -> Callable[[], Any]:
    import numpy as np

    from forge_c.models import random_model

    model = random_model("llama-1.1b", dtype)
    cache = model.new_cache(1, 512)
    ids = np.random.default_rng(0).integers(0, 32000, (1, _PROMPT if prompt else 1))

    def work() -> None:
        cache.truncate(0)
        for _ in range(1 if prompt else _STEPS):
            model(ids, cache)

    return work


MODELS: dict[str, Callable[[], Callable[[], Any]]] = {
    f"embedded model, {_EMBEDDED_TOKENS} tokens": _embedded,
    **{f"1.1B {dtype}, {'prompt of ' + str(_PROMPT) if prompt else str(_STEPS) + ' steps'}":
       lambda dtype=dtype, prompt=prompt: _shape(dtype, prompt)  # type: ignore[misc]
       for dtype in ("bfloat16", "int8", "int4") for prompt in (True, False)}}


def _serve() -> None:
    """Answer lines [command, index] on stdin until it closes."""
    work: Callable[[], Any] | None = None
    for line in sys.stdin:
        command, index = json.loads(line)
        answer: Any = None
        if command == "prepare":
            work = None
            work = list(MODELS.values())[index]()
            work()
        elif command == "time":
            assert work is not None
            time.sleep(0.05)
            start = time.perf_counter()
            work()
            answer = time.perf_counter() - start
        print(json.dumps(answer), flush=True)


def compare(names: list[str], old: Worker, new: Worker, rounds: int) -> list[float]:
    """Median ratios old / new, one line each."""
    found = []
    for i, name in enumerate(names):
        for side in (old, new):
            side("prepare", i)
        pairs = [(old("time"), new("time")) for _ in range(rounds)]
        ratios = sorted(a / b for a, b in pairs)
        best = min(a for a, _ in pairs) / min(b for _, b in pairs)
        found.append(median(ratios))
        print(f"| {name} | {found[-1]:.3f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) | {best:.3f} | "
              f"{1e3 * median(b for _, b in pairs):.3f} ms |", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", required=False, help="the python whose forge_c is the old one")
    parser.add_argument("--new", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[len(os.sched_getaffinity(0))])
    parser.add_argument("--only", choices=["targets", "models"])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        _serve()
        return 0
    found: list[float] = []
    for threads in args.threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        print(f"\n| {threads} threads | old / new, median (range) | best / best | new |\n|---|---|---|---|")
        if args.only != "models":
            with Worker("forge_c", args.old) as old, Worker("forge_c", args.new) as new:
                found += compare([t.name for t in TARGETS], old, new, args.rounds)
        if args.only != "targets":
            with Worker("models", args.old, __file__) as old, Worker("models", args.new, __file__) as new:
                found += compare(list(MODELS), old, new, args.rounds)
    print(f"\nmedian of the medians {median(found):.3f}, the least {min(found):.3f}")
    return 0 if min(found) >= AT_LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
