"""Does a second thread ever hurt? Times each op from far below to far above the threshold of src_c/threads.c.

    python tools/measure_small_ops.py       # prints, for each op and size, microseconds at 1 and 2 threads

One thread and two alternate within a round; a row is the median over rounds.
"""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

import forge_c as fc

ROUNDS = 15


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def cases() -> dict[str, Callable[[], object]]:
    """One call for each op and size; sizes double."""
    found: dict[str, Callable[[], object]] = {}
    for rows in (1, 4, 16, 32, 64, 128, 256, 1024):
        x, weight, other = floats(rows, 1024), floats(1024), floats(rows, 1024)
        out = np.empty_like(x)
        found[f"rms_norm {rows}x1024"] = lambda x=x, w=weight, o=out: fc.rms_norm(x, w, out=o)
        found[f"swiglu {rows}x1024"] = lambda x=x, y=other, o=out: fc.swiglu(x, y, out=o)
        found[f"softmax {rows}x1024"] = lambda x=x, o=out: fc.softmax(x, out=o)
        heads = floats(1, rows, 8, 64)
        turned, table = np.empty_like(heads), fc.rope_table(64, 2048)
        found[f"rope {rows}x8x64"] = lambda x=heads, t=table, o=turned: fc.rope(x, t, out=o)
    for k in (32, 64, 128, 256, 512, 1024):
        for m in (1, 8):
            x, packed, out = floats(m, k), fc.pack(floats(k, k)), np.empty((m, k), np.float32)
            found[f"linear {m}x{k}x{k}"] = lambda x=x, w=packed, o=out: fc.linear(x, w, out=o)
    for keys in (16, 64, 128, 256, 512, 1024):
        q, k, v = floats(1, 1, 8, 64), floats(1, keys, 2, 64), floats(1, keys, 2, 64)
        out = np.empty_like(q)
        found[f"decode {keys} keys"] = lambda q=q, k=k, v=v, o=out: fc.attention(q, k, v, out=o)
        q, out = floats(1, keys // 8, 8, 64), np.empty((1, keys // 8, 8, 64), np.float32)
        found[f"prefill {keys // 8} of {keys}"] = lambda q=q, k=k, v=v, o=out: fc.attention(q, k, v, causal=True, out=o)
    return found


def microseconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats * 1e6


def main() -> None:
    print(f"{'call':24} {'1 thread us':>12} {'2 threads us':>12} {'ratio':>7}")
    worst = 0.0
    for name, call in cases().items():
        fc.set_num_threads(1)
        repeats = max(5, min(2000, int(2e3 / microseconds(call, 5))))
        times: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(ROUNDS):
            for threads, found in times.items():
                fc.set_num_threads(threads)
                call()
                found.append(microseconds(call, repeats))
        one, two = (statistics.median(t) for t in times.values())
        worst = max(worst, two / one)
        print(f"{name:24} {one:12.2f} {two:12.2f} {two / one:7.2f}")
    print(f"worst ratio {worst:.2f}")


if __name__ == "__main__":
    main()
