"""The same GGUF files in llama.cpp and in forge_c: tokens per second of a prompt and of generation.

    python bench/files_vs_llama.py --llama-bench avx2=BUILD/bin/llama-bench model-Q4_0.gguf model-Q8_0.gguf

A build of llama.cpp is named by the ISA that forge_c's kernels are to use beside it: avx2 beside a build for Haswell,
avx512_vnni_bf16 beside one for Ice Lake. In each round every build and both ways of rounding activations run once, in a
process of their own and in turns; a ratio is the median over rounds of the ratio within a round.
"""
from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from pathlib import Path
from statistics import median

import machine
from processes import Measure, forge_c, llama_cpp, say

ACTIVATIONS = ("int8", "int12")
# (file, ISA, implementation) -> of each round: test -> (tokens per second, of the limit; 0: not known)
Rates = dict[tuple[str, str, str], list[dict[str, tuple[float, float]]]]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.gguf")
    parser.add_argument("--llama-bench", action="append", required=True, metavar="ISA=PATH", help="may be repeated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each test in a process; their median counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--page", type=Path, nargs="?", const=machine.page("files"),
                        metavar="FILE", help="write the table there too (default: docs/benchmarks/<machine>-files.md)")
    return parser.parse_args()


def _round(files: list[Path], builds: dict[str, str], sizes: Measure, rates: Rates) -> None:
    for path in files:
        for isa, build in builds.items():
            runs = {"llama.cpp": llama_cpp(build, path.absolute(), sizes)}
            for form in ACTIVATIONS:
                runs[form] = forge_c(["--model", str(path.absolute()), "--activations", form], sizes, isa)
            for name, tests in runs.items():
                found = {t["test"][:2]: (median(t["tokens_per_second"]), t.get("of_limit", 0.0)) for t in tests}
                rates.setdefault((path.stem, isa, name), []).append(found)
                say(f"  {path.name}, {isa}, {name}: {found['pp'][0]:.1f}, {found['tg'][0]:.1f}")


def _table(rates: Rates) -> list[str]:
    """Markdown: a row for each file and ISA."""
    lines = ["| file | kernels | test | llama.cpp | forge_c | of limit | ratio (rounds) | int12 | ratio (rounds) |",
             "| --- | --- | --- | --: | --: | --: | --: | --: | --: |"]
    for name, isa in dict.fromkeys((name, isa) for name, isa, _ in rates):
        for test in ("pp", "tg"):
            peer = [each[test][0] for each in rates[name, isa, "llama.cpp"]]
            cells = [f"{median(peer):.0f}"]
            for form in ACTIVATIONS:
                ours, shares = zip(*(each[test] for each in rates[name, isa, form]), strict=True)
                ratios = sorted(a / b for a, b in zip(ours, peer, strict=True))
                cells += [f"{median(ours):.0f}", f"{100 * median(shares):.0f} %"] if form == "int8" else [
                    f"{median(ours):.0f}"]
                cells.append(f"{median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})")
            lines.append(f"| {name} | {isa} | {test} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    args = _arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    builds = {isa: os.path.abspath(path) for isa, path in (each.split("=", 1) for each in args.llama_bench)}
    sizes = Measure(512, 128, args.repeats, args.threads)
    neighbours, rates = machine.Neighbours(), Rates()
    for number in range(args.rounds):
        say(f"round {number + 1}, {time.strftime('%X')}")
        _round(args.files, builds, sizes, rates)
    lines = [f"{datetime.date.today()}: {machine.family()} ({machine.cpu_model()}), {machine.cores()} CPUs, "
             f"{args.threads} threads; "
             f"{args.rounds} rounds; others took {100 * neighbours.share():.0f} % of the processors.", "",
             *_table(rates)]
    print(*lines, sep="\n")
    if args.page:
        head = ["# GGUF files beside llama.cpp", "",
                "Written by `python bench/files_vs_llama.py`: tokens per second of a prompt of 512 (pp, whose last "
                "token's logits are computed) and of 128 decoded tokens (tg), the same file in both. forge_c rounds "
                "the inputs of matrices to 8 bits, as llama.cpp does, or with `activations=\"int12\"` to 12; what "
                "that is worth is in [accuracy.md](../accuracy.md). *Of limit*: as `forge-c bench` says it, of the "
                "machine's multiply-adds or of the bandwidth of memory, measured in the same process.", ""]
        args.page.write_text("\n".join(head + lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
