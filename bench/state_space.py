"""Figures and pictures of three pages: what a text's length costs attention and Mamba, what a router saves, and a
million tokens through a whole model.

    python bench/state_space.py lengths          # docs/state_space.md: two minutes
    python bench/state_space.py capacity         # docs/mixture_of_depths.md: a minute
    python bench/state_space.py million [--tokens 1000000] [--shape mamba-130m] [--dtype bfloat16]
                                                 # docs/long_contexts.md: twenty minutes on two cores

What is compared takes turns, and medians count. What was measured is kept beside the pictures, as JSON; --draw makes
pictures and tables of that again.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import plots
from report import put

import forge_c as fc
from forge_c import nn

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
WIDTH, HEADS, KV_HEADS = 1024, 16, 4
LENGTHS = [1 << i for i in range(10, 18)]
PIECE = 256  # tokens of a prompt in a call
TOKENS, CAPACITIES = 2048, (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
Calls = Mapping[str, Callable[[], object]]


def in_turns(calls: Calls, rounds: int) -> dict[str, float]:
    """Median seconds of each call; the first of each does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(taken[1:]) for name, taken in seconds.items()}


def machine() -> str:
    """Where this was measured."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    threads = fc.get_num_threads()
    model = found[1].strip() if found else "this machine"
    return f"{threads} thread{'s' if threads > 1 else ''} of {model}, {fc.isa()}"


def figure(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# ---- attention beside Mamba --------------------------------------------------------------------------


def lengths() -> dict[str, Any]:
    """One layer of each, of WIDTH channels, weights and keys in bfloat16, after texts of LENGTHS tokens."""
    rng = np.random.default_rng(0)
    dim, most = WIDTH // HEADS, LENGTHS[-1] + PIECE
    rope = nn.RotaryPositionalEmbedding(dim, most)
    attention = nn.GroupedQueryAttention(WIDTH, HEADS, KV_HEADS, rope=rope, causal=True, seed=0).astype("bfloat16")
    mamba = nn.Mamba(WIDTH, seed=0).astype("bfloat16")
    cache, state, read = fc.KVCache(1, most, KV_HEADS, dim, dtype="bfloat16"), None, 0
    pieces = {"step": rng.standard_normal((1, 1, WIDTH), np.float32),
              "prompt": rng.standard_normal((1, PIECE, WIDTH), np.float32)}
    found: dict[str, Any] = {"machine": machine(), "width": WIDTH, "length": LENGTHS}
    found |= {name: {"bytes": [], "step": [], "prompt": []} for name in ("attention", "mamba")}

    def attend(x: np.ndarray) -> None:
        attention(x, kv_cache=cache)
        cache.truncate(read)

    for length in LENGTHS:
        for start in range(read, length, PIECE):
            cache.append(*rng.standard_normal((2, 1, PIECE, KV_HEADS, dim), np.float32))
            _, state = mamba(rng.standard_normal((1, PIECE, WIDTH), np.float32), use_cache=True, state=state)
            read = start + PIECE
        found["attention"]["bytes"].append(fc.kv_cache_nbytes(1, read, KV_HEADS, dim, "bfloat16"))
        found["mamba"]["bytes"].append(state.conv.nbytes + state.h.nbytes)
        for name, x in pieces.items():
            calls = {"attention": lambda x=x: attend(x), "mamba": lambda x=x, state=state: mamba(x, state=state)}
            for layer, seconds in in_turns(calls, 60 if name == "step" else 9).items():
                found[layer][name].append(seconds / x.shape[1])
    return found


def draw_lengths(found: dict[str, Any]) -> None:
    plots.against_length(found, DOCS / "state_space" / "lengths.svg")
    rows = ["| tokens before | state: attention | Mamba | step: attention | Mamba | a prompt's token: attention "
            "| Mamba |", "|--:|--:|--:|--:|--:|--:|--:|"]
    for i, length in enumerate(found["length"]):
        cells = [f"{figure(found[layer]['bytes'][i] / 2**20)} MB" for layer in ("attention", "mamba")]
        cells += [f"{figure(1e6 * found[layer][what][i])} us" for what in ("step", "prompt")
                  for layer in ("attention", "mamba")]
        rows.append(f"| {length:,} | {' | '.join(cells)} |")
    put(DOCS / "state_space.md", "lengths", f"{found['machine']}:\n\n" + "\n".join(rows) + "\n")


# ---- routed depth ------------------------------------------------------------------------------------


def capacity() -> dict[str, Any]:
    """A block of WIDTH channels over TOKENS tokens, with a router of each capacity and without, weights in bfloat16."""
    block = nn.ModernTransformerBlock(WIDTH, HEADS, KV_HEADS, max_seq_len=TOKENS, seed=0).astype("bfloat16")
    x = np.random.default_rng(0).standard_normal((1, TOKENS, WIDTH), np.float32)
    layers = {str(c): nn.MixtureOfDepths(block, WIDTH, c, seed=1) for c in CAPACITIES}
    calls: Calls = {"dense": lambda: block(x)} | {c: lambda layer=layer: layer(x) for c, layer in layers.items()}
    seconds = in_turns(calls, 9)
    return {"machine": machine(), "width": WIDTH, "tokens": TOKENS, "capacity": CAPACITIES, "dense": seconds["dense"],
            "routed": [seconds[str(c)] for c in CAPACITIES]}


def draw_capacity(found: dict[str, Any]) -> None:
    plots.against_capacity(found, DOCS / "mixture_of_depths" / "capacity.svg")
    rows = ["| capacity | time of the block | beside the dense block's |", "|--:|--:|--:|"]
    rows += [f"| {100 * c:g} % | {figure(1e3 * t)} ms | {t / found['dense']:.3f} |"
             for c, t in zip(found["capacity"], found["routed"], strict=True)]
    put(DOCS / "mixture_of_depths.md", "capacity",
        f"{found['machine']}; the dense block {figure(1e3 * found['dense'])} ms:\n\n" + "\n".join(rows) + "\n")


# ---- a million tokens --------------------------------------------------------------------------------


def million(arguments: list[str]) -> None:
    """What the example says goes into the page."""
    command = [sys.executable, str(ROOT / "examples" / "stream_million.py"), *arguments]
    lines = []
    environment = os.environ | {"PYTHONPATH": str(Path(fc.__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT / "bench") as process:
        for line in process.stdout or ():
            print(line, end="", file=sys.stderr, flush=True)
            lines.append(line)
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}")
    put(DOCS / "long_contexts.md", "million", "".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("lengths", "capacity", "million"))
    parser.add_argument("--draw", action="store_true", help="of what was measured before")
    args, rest = parser.parse_known_args()
    if args.what == "million":
        return million(rest)
    measure, draw, page = {"lengths": (lengths, draw_lengths, "state_space"),
                           "capacity": (capacity, draw_capacity, "mixture_of_depths")}[args.what]
    data = DOCS / page / f"{args.what}.json"
    if not args.draw:
        found = measure()
        data.parent.mkdir(exist_ok=True)
        data.write_text(json.dumps(found, indent=1) + "\n")
    draw(json.loads(data.read_text()))


if __name__ == "__main__":
    main()
