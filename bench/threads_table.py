"""forge_c beside NumPy and, where they are installed, PyTorch and ONNX Runtime, at 1, 2, 4, ... threads, in turns.

    python bench/threads_table.py [--seconds 120] [--rounds 2]

For a machine seen for the first time: a table in minutes, not the one that README quotes. Each implementation has a
process of its own and works on the same buffers again and again; the machine's limits are measured at the same number
of threads. Ratios are medians over rounds.
"""
from __future__ import annotations

import argparse
import os
import sys
import time
from importlib.util import find_spec
from statistics import median

from machine import Limits, Work, cores, cpu_model, last_level_cache, measure_limits, share
from targets import SAME_BUFFERS, TARGETS, Target, Worker

IMPLEMENTATIONS = ("forge_c", "numpy", "torch", "onnxruntime")
ROWS = [i for i, target in enumerate(TARGETS) if target.at_least and target.name != "rms_norm 512 x 4096"]
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def thread_counts() -> list[int]:
    """1, 2, 4, ... and all cores."""
    powers = [2**i for i in range(cores().bit_length()) if 2**i < cores()]
    return [*powers, cores()]


def of_limit(target: Target, seconds: float, limits: Limits) -> str:
    in_memory = target.read + target.written > last_level_cache()
    reached = share(Work(target.read, target.written, target.flops, target.dtype, in_memory), seconds, limits)
    return "–" if reached is None else f"{100 * reached:.0f} %"


def row(target: Target, index: int, workers: dict[str, Worker], rounds: int, limits: Limits) -> str:
    for worker in workers.values():
        worker("prepare", index)
    times = [{name: worker("time") for name, worker in workers.items()} for _ in range(rounds)]
    mine = median(each["forge_c"] for each in times)
    cells = [f"{1e3 * mine:.3g} ms", of_limit(target, mine, limits)]
    for name in IMPLEMENTATIONS[1:]:
        ratios = [each[name] / each["forge_c"] for each in times if name in each]
        cells.append(f"{median(ratios):.2f} x" if ratios else "–")
    return f"| {target.name} | {' | '.join(cells)} |"


def at(threads: int, names: list[str], rounds: int) -> None:
    """Prints the table of one number of threads."""
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)), **{SAME_BUFFERS: "1"})
    limits = measure_limits(quick=True)
    print(f"\n**{threads} threads**, {limits['isa']}: float32 {limits['fp32_gflops']:.0f} GFLOP/s, read "
          f"{limits['read_gbs']:.0f} and copy {limits['copy_gbs']:.0f} GB/s\n")
    print("| work | forge_c | of limit | " + " | ".join(f"over {name}" for name in IMPLEMENTATIONS[1:]) + " |")
    print("| --- |" + " --: |" * (len(IMPLEMENTATIONS) + 1), flush=True)
    workers = {name: Worker(name) for name in names}
    try:
        for index in ROWS:
            print(row(TARGETS[index], index, workers, rounds, limits), flush=True)
    finally:
        for worker in workers.values():
            worker.__exit__()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120, help="no further number of threads after so long")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    names = [name for name in IMPLEMENTATIONS if find_spec(name)]
    print(f"{cpu_model()}, {cores()} cores; {', '.join(names)}")
    start = time.monotonic()
    for threads in reversed(thread_counts()):
        if time.monotonic() - start > args.seconds:
            print(f"\n{threads} threads: left out, {args.seconds:.0f} s are over")
        else:
            at(threads, names, args.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
