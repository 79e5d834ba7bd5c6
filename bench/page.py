"""make bench: this machine beside NumPy, torch, ONNX Runtime and llama.cpp, and its page in docs/benchmarks/.

    python bench/page.py                                       ten minutes: figures, page, pictures and index
    python bench/page.py --seconds 240 --out DIR               what fits into four minutes, into another folder
    python bench/page.py --sections rows,linear --seconds 60   these again, into the figures that are there
    python bench/page.py --draw docs/benchmarks/*.json         pages and index of what was measured before

The figures are kept as <machine>.json beside the page, and the page is made of them alone. torch, ONNX Runtime,
llama.cpp (--llama-bench, or LLAMA_BENCH in the environment), gguf, which writes its model files, and matplotlib, which
draws, may be missing. What does not fit into the time is left out and named.
"""
from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import machine
import machine_page
import turns
import whole_models
from cases import CASES
from turns import IMPLEMENTATIONS, Turn, Worker, measure, rates

HERE = Path(__file__).resolve().parent
# A section -> its share of the time; what one leaves over is the next ones'.
SECTIONS = {"linear": 2.5, "attention": 2.0, "rows": 1.2, "models": 2.5, "threads": 2.0, "states": 0.7}

_COUNT = 25  # seconds that a number of threads is worth at least


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="for all of it (default: %(default)s)")
    parser.add_argument("--sections", default=",".join(SECTIONS), metavar="NAME,...", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, help="default: 3, or 5 where there are ten minutes")
    parser.add_argument("--threads", type=int, help="default: as many as forge_c takes")
    parser.add_argument("--shape", default="llama-1.1b", help="of the whole model (default: %(default)s)")
    parser.add_argument("--only", action="append", metavar="TEXT", help="the cases and the whole models that start so")
    parser.add_argument("--llama-bench", default=os.environ.get("LLAMA_BENCH", "llama-bench"), metavar="PATH",
                        help="llama.cpp's, built for this machine (default: LLAMA_BENCH, or from the PATH)")
    parser.add_argument("--cache", type=Path, help="folder of llama.cpp's model files, 4 GB (default: a temporary one)")
    parser.add_argument("--name", help="of the page (default: the kind of core and how many)")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs", help="folder to write (default: docs)")
    parser.add_argument("--check", action="store_true", help="measure nothing: compare everyone's results with NumPy's")
    parser.add_argument("--draw", type=Path, nargs="+", metavar="FILE", help="make the pages of these figures again")
    args = parser.parse_args()
    unknown = set(args.sections.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"--sections: {', '.join(sorted(unknown))}: expected some of {', '.join(SECTIONS)}")
    return args


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _git(*arguments: str) -> str:
    """stdout; nothing where there is no checkout."""
    return subprocess.run(["git", "-C", str(HERE.parent), *arguments], capture_output=True, text=True).stdout.strip()


def _version() -> str:
    """forge_c's version, and the commit if this is a checkout or FORGE_C_COMMIT says it."""
    changed = "-dirty" if _git("status", "--porcelain", "--", "src_c", "forge_c", "setup.py") else ""
    commit = os.environ.get("FORGE_C_COMMIT") or _git("describe", "--always") + changed
    code = "import forge_c; print(forge_c.__version__)"
    version = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE)
    return version.stdout.strip() + (f" ({commit})" if commit else "")


class Measuring:
    """A run: the figures so far, and the time left."""

    def __init__(self, args: argparse.Namespace, path: Path) -> None:
        self.args, self.path = args, path
        self.end = time.monotonic() + args.seconds
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.found.update({"name": path.stem, "family": machine.family(), "details": machine.details(),
                           "cpus": machine.cores(), "asked": os.environ.get("FORGE_C_ISA", "")})
        for key, empty in (("cells", []), ("models", []), ("runs", {}), ("versions", {})):
            self.found.setdefault(key, empty)
        self._limits()
        self.threads = args.threads or self.found["limits"]["threads"]
        self.implementations = _installed()

    def _limits(self) -> None:
        """Measured in each run; a limit that was reached once is one."""
        now = machine.measure_by_threads()
        old = self.found.get("limits", {}).get("by_threads", {})
        for count, limits in now["by_threads"].items():
            now["by_threads"][count] = machine.best_of(old.get(count), limits)
        memory = {size: rates for size, *rates in self.found.get("limits", {}).get("memory", [])}
        now["memory"] = [[size, *map(max, rates, memory.get(size, rates))] for size, *rates in now["memory"]]
        self.found["limits"] = {**now, "by_threads": {**old, **now["by_threads"]}}

    def run(self) -> None:
        names = [name for name in SECTIONS if name in self.args.sections.split(",")]
        for at, name in enumerate(names):
            left = self.end - time.monotonic()
            end = time.monotonic() + left * SECTIONS[name] / sum(SECTIONS[each] for each in names[at:])
            say(f"{name}: {end - time.monotonic():.0f} of {left:.0f} s")
            neighbours, before = machine.Neighbours(), time.monotonic()
            left_out = self._section(name, lambda end=end: end - time.monotonic())
            self.found["runs"][name] = {
                "date": str(datetime.date.today()), "version": _version(), "threads": self.threads,
                "others": neighbours.share(),
                "seconds": time.monotonic() - before,
                "left_out": left_out + (self.found["runs"].get(name, {}).get("left_out", []) if self.args.only else [])}
            self.write()

    def _section(self, name: str, left: Callable[[], float]) -> list[str]:
        """Measures it, and says what was left out."""
        if name == "models":
            return whole_models.measure(self.found, self.args, self.counts(), left, say)
        if name != "threads":
            return self._cases([i for i, case in enumerate(CASES) if case.section == name], self.threads, left)
        left_out, counts = [], self.counts()[:-1]
        while len(counts) > 1 and left() < _COUNT * len(counts):
            counts = counts[::2]
        for at, count in enumerate(counts):
            end = time.monotonic() + left() / (len(counts) - at)
            left_out += self._cases([i for i, case in enumerate(CASES) if case.threads], count,
                                    lambda end=end: end - time.monotonic())
        return left_out

    def counts(self) -> list[int]:
        """1, 2, 4, ... and all."""
        return [*(2**i for i in range(self.threads.bit_length()) if 2**i < self.threads), self.threads]

    def _cases(self, indices: list[int], threads: int, left: Callable[[], float]) -> list[str]:
        long = self.args.seconds >= 600
        turn = Turn(0.15 if long else 0.06, self.args.rounds or (5 if long else 3))
        workers = [Worker(name, threads) for name in self.implementations]
        left_out = []
        try:
            for worker in workers:
                self.found["versions"][worker.impl] = worker("version")
            for index in sorted(indices, key=lambda i: CASES[i].rank):
                case = CASES[index]
                if self.args.only and not any(case.name.startswith(text) for text in self.args.only):
                    continue
                if left() <= 0 or machine.available_memory() < _memory(index):
                    left_out.append(f"{case.name}, threads {threads}")
                    continue
                cells = measure(index, workers, threads, turn, left, say, brief=threads != self.threads)
                say(f"  {threads} threads, {case.name}, ms: {rates(cells)}")
                if not cells:
                    left_out.append(f"{case.name}, threads {threads}")
                self._keep(cells)
        finally:
            for worker in workers:
                worker.close()
        return left_out

    def _keep(self, cells: list[dict[str, Any]]) -> None:
        """In the place of those of the same case and threads."""
        gone = {(cell["case"], cell["threads"]) for cell in cells}
        self.found["cells"] = [c for c in self.found["cells"] if (c["case"], c["threads"]) not in gone] + cells

    def write(self) -> None:
        order = {case.name: i for i, case in enumerate(CASES)}
        self.found["cells"].sort(key=lambda c: (c["threads"], order.get(c["case"], len(order))))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.found, separators=(",", ":"))
        self.path.write_text(text.replace('{"section"', '\n{"section"') + "\n")


def check() -> bool:
    """Whether everyone makes the same of every case."""
    workers = [Worker(name, machine.cores()) for name in _installed()]
    try:
        return all([turns.check(index, workers, say) for index, case in enumerate(CASES) if case.rank < 2])
    finally:
        for worker in workers:
            worker.close()


def _installed() -> list[str]:
    return [name for name in IMPLEMENTATIONS if find_spec(name) and (name != "onnxruntime" or find_spec("onnx"))]


def _memory(index: int) -> int:
    """Bytes that all implementations may hold of a case together, generously."""
    return 16 * max(max(variant.read + variant.written, machine.FOOTPRINT) for variant in CASES[index].variants)


def main() -> int:
    args = _arguments()
    if args.check:
        return 0 if check() else 1
    paths = args.draw or [args.out / "benchmarks" / f"{args.name or machine.kind()}.json"]
    if not args.draw:
        args.llama_bench = os.path.abspath(found) if (found := shutil.which(args.llama_bench)) else args.llama_bench
        Measuring(args, paths[0].absolute()).run()
    for path in paths:
        print(machine_page.write(json.loads(path.read_text()), path.parent))
    index = paths[0].parent.parent / "benchmarks.md"
    if index.exists():
        machine_page.put_index(index)
    return 0


if __name__ == "__main__":
    sys.exit(main())
