"""A whole model of a known size with random weights: forge_c against llama.cpp and transformers on torch.

    python bench/models_vs_peers.py --llama-bench BUILD/bin/llama-bench --python VENV/bin/python
    python bench/models_vs_peers.py --quick --only forge_c --only "llama.cpp Q8_0"

VENV has torch, transformers and gguf; a peer that is not there is left out. In each round every implementation runs
once in a process of its own, between two measurements of the machine's limits; a ratio is the median over rounds of
the ratio within a round. Decoding starts from an empty cache, as llama-bench does it. GGUF files (4 GB) stay in
--cache. What others take of the processors meanwhile is told: a ratio from a busy machine says little.
"""
from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import machine
import peers_table
from model_files import gguf_file
from peers_table import Entry, Sizes
from processes import Measure, Test, forge_c, llama_cpp, output, say, transformers

from forge_c.models.weights.random import SHAPES

_BATCH = 8
ENTRIES = (
    *(Entry("forge_c", form) for form in ("bfloat16", "int8", "int4")), Entry("forge_c", "int4", _BATCH),
    *(Entry("llama.cpp", form) for form in ("BF16", "Q8_0", "Q4_0")), Entry("torch", "bfloat16"),
)


class Run(NamedTuple):
    """What every implementation is asked for."""
    config: dict[str, Any]
    shape: str
    prompt: int
    new: int
    repeats: int
    threads: int


class Peers(NamedTuple):
    """Where they are: the interpreter for torch and gguf, llama-bench, and its model files."""
    python: str
    llama_bench: str
    files: dict[str, Path]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="has torch, transformers and gguf")
    parser.add_argument("--llama-bench", default="llama-bench", metavar="PATH", help="llama.cpp's, built")
    parser.add_argument("--shape", choices=SHAPES, help="default: llama-1.1b")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--repeats", type=int, help="runs of each test in a process; their median counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one short round of two layers: a smoke run")
    parser.add_argument("--only", action="append", metavar="TEXT", help="entries whose name starts so; may be repeated")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "forge_c_gguf", metavar="DIR")
    parser.add_argument("--clean", action="store_true", help="remove the GGUF files of this run at its end")
    parser.add_argument("--out", type=Path, metavar="FILE", help="every figure, as JSON")
    parser.add_argument("--page", type=Path, nargs="?", const=machine.page("models"),
                        metavar="FILE", help="write the table there too (default: docs/benchmarks/<machine>-models.md)")
    args = parser.parse_args()
    for name in ("python", "llama_bench"):  # children run in another folder
        found = shutil.which(getattr(args, name))
        setattr(args, name, os.path.abspath(found) if found else getattr(args, name))
    args.cache = args.cache.absolute()
    args.shape = args.shape or ("llama-1.1b-short" if args.quick else "llama-1.1b")
    args.rounds = args.rounds or (1 if args.quick else 5)
    args.repeats = args.repeats or (1 if args.quick else 2)
    return args


def _prepare(args: argparse.Namespace, sizes: Sizes) -> tuple[list[Entry], Peers, dict[str, str]]:
    """(the entries that can run, where the peers are, versions); says why another cannot."""
    found: list[Entry] = []
    files: dict[str, Path] = {}
    versions = {"forge_c": output([sys.executable, "-c", "import forge_c; print(forge_c.__version__)"]).strip()}
    for entry in ENTRIES:
        if args.only and not any(entry.name.startswith(text) for text in args.only):
            continue
        try:
            if entry.implementation == "llama.cpp":
                files[entry.form] = gguf_file(entry.form, args.shape, args.cache, args.llama_bench, args.python)
            elif entry.implementation == "torch":
                code = "import torch, transformers as t; print(torch.__version__ + ', transformers ' + t.__version__)"
                versions["torch"] = output([args.python, "-c", code]).strip()
        except RuntimeError as error:
            say(f"{entry.name}: skipped: {error}")
        else:
            found.append(entry)
    return found, Peers(args.python, args.llama_bench, files), versions


def _forge_c(entry: Entry, run: Run) -> list[Test]:
    prompt = 1 if entry.batch > 1 else run.prompt  # prompts are fed one by one: that row exists already
    sizes = Measure(prompt, run.new, run.repeats, run.threads)
    tests = forge_c(["--shape", run.shape, "--dtype", entry.form, "--batch", str(entry.batch)], sizes)
    return tests[1 if entry.batch > 1 else 0:]


def _llama_cpp(entry: Entry, run: Run, peers: Peers) -> list[Test]:
    return llama_cpp(peers.llama_bench, peers.files[entry.form],
                     Measure(run.prompt, run.new, run.repeats, run.threads))


def _measure(entry: Entry, run: Run, peers: Peers) -> list[Test]:
    """One process of one implementation: its tests, as forge-c bench --json says them."""
    if entry.implementation == "forge_c":
        return _forge_c(entry, run)
    if entry.implementation == "llama.cpp":
        return _llama_cpp(entry, run, peers)
    return transformers(peers.python, run.config, Measure(run.prompt, run.new, run.repeats, run.threads), entry.form)


def _rounds(entries: list[Entry], run: Run, peers: Peers, args: argparse.Namespace,
            versions: dict[str, str]) -> tuple[list[peers_table.Row], list[machine.Limits]]:
    """Every entry once in each round. One that fails says why and is left out from there on."""
    rows: dict[tuple[Entry, str], peers_table.Row] = {}
    limits: list[machine.Limits] = []
    for number in range(args.rounds):
        say(f"round {number + 1}, {time.strftime('%X')}")
        before = machine.measure_limits(quick=args.quick)
        for entry in list(entries):
            neighbours = machine.Neighbours()
            try:
                tests = _measure(entry, run, peers)
            except RuntimeError as error:
                say(f"  {entry.name}: skipped: {error}")
                entries.remove(entry)
                continue
            others = neighbours.share()
            for test in tests:
                row = rows.setdefault((entry, test["test"]), peers_table.Row(entry, test["test"]))
                row.samples[number], row.others[number] = test["tokens_per_second"], others
                row.step_bytes = test.get("step_bytes")
                if "version" in test:
                    versions[entry.implementation] = test["version"]
            rates = ", ".join(f"{t['test']} {median(t['tokens_per_second']):.1f}" for t in tests)
            say(f"  {entry.name}: {rates}; others took {100 * others:.0f} % of the processors")
        limits.append(machine.best_of(before, machine.measure_limits(quick=args.quick)))
        say(f"  limits: {peers_table.limits_text(limits[-1:])}")
    return list(rows.values()), limits


def _page(args: argparse.Namespace, lines: list[str]) -> list[str]:
    return ["# A whole model against its peers", "",
            f"Written by `python bench/models_vs_peers.py`: the shape {args.shape}, random weights. "
            "[The index](../benchmarks.md) names other machines.", "", *lines, "",
            *peers_table.EXPLANATION]


def main() -> int:
    args = _arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    sizes = Sizes.of(SHAPES[args.shape])
    prompt, new = (64, 16) if args.quick else (512, 128)
    run = Run(dict(SHAPES[args.shape]), args.shape, prompt, new, args.repeats, args.threads)
    entries, peers, versions = _prepare(args, sizes)
    if not entries:
        sys.exit("models_vs_peers.py: nothing to run")
    try:
        rows, limits = _rounds(entries, run, peers, args, versions)
    finally:
        for path in peers.files.values() if args.clean else ():
            path.unlink(missing_ok=True)
    if not rows:
        sys.exit("models_vs_peers.py: nothing has run")
    about = (f"{datetime.date.today()}: {machine.family()} ({machine.cpu_model()}), {machine.cores()} CPUs, "
             f"{args.threads} threads; "
             f"{', '.join(f'{name} {version}' for name, version in versions.items())}; {args.rounds} rounds; "
             f"others took up to {100 * max(max(row.others.values()) for row in rows):.0f} % of the processors; "
             f"{peers_table.limits_text(limits)}; forge_c's kernels for {limits[0]['isa']}.")
    lines = [about, "", *peers_table.table(rows, limits, sizes)]
    print(*lines, sep="\n")
    if args.out:
        args.out.write_text(json.dumps({"about": about, "shape": args.shape, "limits": limits, "results": [
            row.as_json(limits, sizes) for row in rows]}, indent=1) + "\n")
    if args.page:
        args.page.write_text("\n".join(_page(args, lines)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
