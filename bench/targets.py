"""The speeds that forge_c promises against pure NumPy doing the same work; exit status 1 if one is missed.

Each side has a process of its own, and the two take turns: a ratio is between neighbours in time, and the median over
rounds counts. Threads: as many as forge_c takes by default, for both.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from machine import Limits, Work, best_of, copies, last_level_cache, measure_limits, share

Array = np.ndarray
SAME_BUFFERS = "FORGE_C_BENCH_SAME_BUFFERS"  # in the environment: no rotation, so that a table takes minutes
_TURN = 0.3    # seconds of work in one turn, and two calls at least
_PAUSE = 0.05  # before a turn, so that the other side's threads have gone to sleep


class Target(NamedTuple):
    name: str
    at_least: float  # times NumPy; 0 where nothing is promised
    op: str
    dtype: str
    inputs: Callable[[], tuple[Array, ...]]
    read: int
    written: int
    flops: int = 0
    rotate: bool = True  # through buffers that together exceed the last-level cache
    numpy_op: str = ""  # NumPy's operation, if not op


def _normal(*shape: int, scale: float = 1.0) -> Array:
    return np.float32(scale) * np.random.default_rng(len(shape) + shape[0]).standard_normal(shape, np.float32)


def _rope_inputs(seq: int, heads: int, dim: int) -> tuple[Array, ...]:
    angles = np.outer(np.arange(seq), 10000.0 ** (-np.arange(0, dim, 2) / dim))
    return _normal(1, seq, heads, dim), np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _mlp_inputs(rows: int, d: int, hidden: int) -> tuple[Array, ...]:
    both = _normal(2, d, hidden, scale=d ** -0.5)
    return _normal(rows, d), both[0], both[1], _normal(hidden, d, scale=hidden ** -0.5)


def _heads_inputs(q_len: int, kv_len: int) -> tuple[Array, ...]:
    kv = _normal(2, 1, kv_len, 8, 128)
    return _normal(1, q_len, 32, 128), kv[0], kv[1]


def _mlp(dtype: str, size: int, at_least: float) -> Target:
    weights, x = 3 * 2048 * 5632, 512 * 2048 * 4
    return Target(f"SwiGLU MLP 2048 -> 5632, M 512, {dtype} weights", at_least, "swiglu_mlp", dtype,
                  lambda: _mlp_inputs(512, 2048, 5632), weights * size + x, x, 2 * 512 * weights)


def _rms_norm(rows: int, rotate: bool = True) -> Target:
    size = 4 * rows * 4096
    return Target(f"rms_norm {rows} x 4096" + ("" if rotate else ", same buffers"), 4.0, "rms_norm", "float32",
                  lambda: (_normal(rows, 4096), _normal(4096)), size, size, rotate=rotate)


_TOKEN, _KV = 4 * 32 * 128, 2 * 4 * 8 * 128  # bytes of a query's heads, and of a key and a value


def _prefill(name: str, at_least: float, numpy_op: str) -> Target:
    return Target(f"causal GQA, L 2048, 32/8 heads of 128{name}", at_least, "attention", "float32",
                  lambda: _heads_inputs(2048, 2048), 2048 * (_TOKEN + _KV), 2048 * _TOKEN,
                  4 * 32 * 128 * 2048 * 2049 // 2, rotate=False, numpy_op=numpy_op)


TARGETS = (
    _rms_norm(512),
    _rms_norm(512, rotate=False),
    _rms_norm(8192),
    Target("rope L 2048, 32 heads of 128", 5.0, "rope", "float32", lambda: _rope_inputs(2048, 32, 128), 2048 * _TOKEN,
           2048 * _TOKEN),
    _mlp("float32", 4, 1.0),
    _mlp("bfloat16", 2, 1.7),
    _prefill("", 3.0, "attention"),
    _prefill(", against NumPy blocked by hand", 0.0, "attention_blocked"),
    Target("GQA, one token against 4096 keys", 4.0, "decode", "float32", lambda: _heads_inputs(1, 4096), 4096 * _KV,
           _TOKEN, 4 * 32 * 128 * 4096),
)
ROW_LIMIT = 1e-6  # seconds of rms_norm(x, weight, out=out) on a row of 768


class Worker:
    """One implementation in its own process; it works while we wait for it, and sleeps otherwise."""

    def __init__(self, impl: str, python: str = sys.executable, script: str = __file__) -> None:
        self.process = subprocess.Popen([python, str(Path(script).resolve()), "--worker", impl],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, command: str, index: int = 0) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([command, index]), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def _sets(target: Target) -> int:
    rotates = target.rotate and not os.environ.get(SAME_BUFFERS)
    return copies(target.read + target.written) if rotates else 1


def _serve(impl: str) -> None:
    """Answer lines [command, index] on stdin until it closes."""
    operations = import_module(f"{impl}_ops")
    calls: list[Callable[[], Any]] = []
    for line in sys.stdin:
        command, index = json.loads(line)
        answer: Any = None
        if command == "prepare":
            target, calls = TARGETS[index], []
            dtype = target.dtype if target.dtype in operations.DTYPES else "float32"
            op = impl == "numpy" and target.numpy_op or target.op
            calls = [getattr(operations, op)(*target.inputs(), dtype=dtype) for _ in range(_sets(target))]
            for call in calls:
                call()
        elif command == "time":
            answer = _time(calls)
        elif command == "row":
            answer = _time_row()
        print(json.dumps(answer), flush=True)


def _time(calls: list[Callable[[], Any]]) -> float:
    """Median seconds of a call, over one turn."""
    time.sleep(_PAUSE)
    calls[0]()
    times: list[float] = []
    while sum(times) < _TURN or len(times) < 2:
        call = calls[(len(times) + 1) % len(calls)]
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


def _time_row() -> float:
    """Median over batches of one call's seconds, as timeit counts: the loop is in the figure."""
    import timeit

    from forge_c import rms_norm

    x, weight = _normal(1, 768), _normal(768)
    timer = timeit.Timer("rms_norm(x, weight, out=out)",
                         globals={"rms_norm": rms_norm, "x": x, "weight": weight, "out": np.empty_like(x)})
    timer.timeit(20000)
    return median(timer.repeat(15, 5000)) / 5000


def measure(rounds: int, limits: Limits) -> tuple[list[str], bool]:
    """(Markdown lines, whether every target was met); `limits` rises to what is measured between targets."""
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(limits["threads"])
    lines = ["| work | target | measured (rounds) | forge_c | NumPy | rate | of limit | |",
             "| --- | --: | --: | --: | --: | --: | --: | --- |"]
    results: list[tuple[Target, list[tuple[float, float]]]] = []
    with Worker("forge_c") as ours, Worker("numpy") as theirs:
        for i, target in enumerate(TARGETS):
            limits.update(best_of(limits, measure_limits()))
            for side in (ours, theirs):
                side("prepare", i)
            results.append((target, [(ours("time"), theirs("time")) for _ in range(rounds)]))
        rows = sorted(ours("row") for _ in range(rounds))
    all_met = met = median(rows) <= ROW_LIMIT
    for target, pairs in results:
        ratios = sorted(b / a for a, b in pairs)
        mine, other = (median(times) for times in zip(*pairs, strict=True))
        moved = target.read + target.written
        work = Work(target.read, target.written, target.flops, target.dtype,
                    moved * _sets(target) > last_level_cache())
        reached, reaches = share(work, mine, limits), median(ratios) >= target.at_least
        all_met &= reaches
        rate = (f"{target.flops / mine / 1e9:.0f} GFLOP/s" if target.flops > 100 * moved else
                f"{moved / mine / 1e9:.1f} GB/s")
        promise = f"≥ {target.at_least:.1f} x" if target.at_least else "–"
        verdict = ("met" if reaches else "MISSED") if target.at_least else ""
        lines.append(f"| {target.name} | {promise} | {median(ratios):.2f} x "
                     f"({ratios[0]:.2f}–{ratios[-1]:.2f}) | {1e3 * mine:.2f} ms | {1e3 * other:.2f} ms | {rate} | "
                     f"{'–' if reached is None else f'{100 * reached:.0f} %'} | {verdict} |")
    lines.append(f"| rms_norm of a 1 x 768 row, out= | ≤ {1e6 * ROW_LIMIT:.0f} µs | {1e6 * median(rows):.2f} µs "
                 f"({1e6 * rows[0]:.2f}–{1e6 * rows[-1]:.2f}) | | | | | {'met' if met else 'MISSED'} |")
    return lines, all_met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        _serve(args.worker)
        return 0
    limits = measure_limits()
    lines, met = measure(args.rounds, limits)
    print(f"{limits['threads']} threads, {limits['isa']}; float32 {limits['fp32_gflops']:.0f} and bfloat16 "
          f"{limits['bf16_gflops']:.0f} GFLOP/s, read {limits['read_gbs']:.0f} and copy {limits['copy_gbs']:.0f} GB/s")
    print("", *lines, sep="\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
