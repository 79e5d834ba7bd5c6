"""Every component at length: every suite for every implementation, in turns, then
docs/benchmarks/<machine>-components.md.

    python bench/run.py                                 forge_c, NumPy, and torch and ONNX Runtime if installed
    python bench/run.py --python torch=VENV/bin/python  torch from another environment (with pytest-benchmark)
    python bench/run.py --quick                         a smoke run of the small cases: checks results, prints tables
"""
from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import report
import targets

HERE = Path(__file__).resolve().parent
IMPLEMENTATIONS = ("forge_c", "numpy", "torch", "onnxruntime")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the suites of all components and write their page.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a round of the small cases, forge_c and NumPy, no files")
    parser.add_argument("--python", action="append", default=[], metavar="IMPL=PATH", help="interpreter that has IMPL")
    parser.add_argument("--threads", type=int, help="for every implementation (default: as many as forge_c takes)")
    parser.add_argument("-k", dest="only", metavar="EXPRESSION", help="only the cases that pytest's -k selects")
    parser.add_argument("--page", default="components", metavar="NAME", help="<machine>-NAME.md (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=machine.PAGES, help="folder to write (default: docs/benchmarks)")
    return parser.parse_args()


def _interpreters(args: argparse.Namespace) -> dict[str, str]:
    """Which Python runs each implementation: those of them that are installed."""
    asked = dict(pair.split("=", 1) for pair in args.python)
    names = IMPLEMENTATIONS[:2] if args.quick else IMPLEMENTATIONS
    found = {}
    for name in names:
        python = asked.get(name, sys.executable)
        need = {"onnxruntime": "onnxruntime, onnx"}.get(name, name)
        if subprocess.run([python, "-c", f"import {need}"], capture_output=True, cwd=HERE).returncode == 0:
            found[name] = python
        elif name in asked or name in IMPLEMENTATIONS[:2]:
            sys.exit(f"run.py: {python} cannot import {need}")
    return found


def _suites(name: str, python: str, limits: Path, result: Path, args: argparse.Namespace) -> None:
    command = [python, "-m", "pytest", "-c", "../pyproject.toml", "--rootdir", "..", "-p", "no:cacheprovider", ".",
               "--impl", name, "--limits", str(limits), "--benchmark-only", "--benchmark-quiet",
               "--benchmark-disable-gc", "--benchmark-json", str(result), "--benchmark-max-time",
               "0.005" if args.quick else "0.3", "--benchmark-min-rounds", "1" if args.quick else "3",
               *(["--quick", "--check"] if args.quick else []), *(["-k", args.only] if args.only else [])]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    print(f"  {name}: {done.stdout.strip().splitlines()[-1] if done.stdout.strip() else 'no output'}", flush=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def _machine_line(limits: machine.Limits, versions: dict[str, str]) -> str:
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (f"{datetime.date.today()}: {machine.family()}: {machine.details()}; {limits['threads']} threads; forge_c's "
            f"kernels for {limits['isa']}; Python {sys.version.split()[0]}, {named}.")


def main() -> int:
    args = _arguments()
    pythons = _interpreters(args)
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    limits = machine.measure_limits(quick=args.quick)
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(limits["threads"])
    files: list[tuple[int, Path]] = []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "limits.json"
        for number in range(1 if args.quick else args.rounds):
            print(f"round {number + 1}, {time.strftime('%X')}", flush=True)
            if number:
                limits = machine.best_of(limits, machine.measure_limits())
            path.write_text(json.dumps(limits))
            for name, python in pythons.items():
                files.append((number, Path(scratch) / f"{name}-{number}.json"))
                _suites(name, python, path, files[-1][1], args)
        rows, versions = report.merge(files)
    if args.quick:
        print(_machine_line(limits, versions), *report.table(rows, limits), sep="\n")
        return 0
    extra = []
    if not args.only:
        lines, _ = targets.measure(args.rounds, limits)
        extra = ["## Targets", "", "`python bench/targets.py` measures these alone.", "", *lines]
    command = "python bench/run.py" + (f" --page {args.page} -k '{args.only}'" if args.only else "")
    written = report.write(rows, limits, f"Written by `{command}`. {_machine_line(limits, versions)}", extra, args.out,
                           machine.page(args.page).stem)
    print(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
