"""What runs here and how fast it could go: show_config() and roofline()."""
from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from forge_c import functional
from forge_c.functional import get_num_threads, set_num_threads
from forge_c.threads import default_threads
from forge_c.version import __version__


def _cpu_flags() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                wanted = ("avx", "fma", "f16c", "sse4", "asimd", "bf16", "i8mm")
                return " ".join(n for n in line.split(":", 1)[1].split() if n.startswith(wanted))
    except OSError:
        pass
    return ""


def _cpu_name() -> str:
    """As its makers call it, and the instruction set."""
    try:
        found = re.search(r"^(?:model name|Model)\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return f"{found[1].strip()}, {platform.machine()}" if found else platform.machine()


def show_config() -> dict[str, object]:
    """Print and return what this build is and what it found: version, ISA, CPU features, threads, OpenMP, flags."""
    count, why = default_threads(functional._bound_cpus())
    config: dict[str, object] = {
        "version": __version__,
        "isa": functional.isa(),
        "available_isas": functional.available_isas(),
        "cpu": _cpu_name(),
        "cpu_features": _cpu_flags(),
        "threads": get_num_threads(),
        "threads_default": f"{count} ({why})",
        "openmp": functional._openmp(),
        "build": functional._build(),
        "numpy": np.__version__,
    }
    for key, value in config.items():
        print(f"{key:16} {value}")
    return config


def _best_rate(work: Callable[[], float], seconds: float) -> float:
    """Highest work per nanosecond over repeats that fill `seconds`."""
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter_ns()
        amount = work()
        best = max(best, amount / (time.perf_counter_ns() - start))
    return best


def limits_now(seconds: float = 0.2, size: int = 256 << 20) -> dict[str, float]:
    """What roofline() measures, at this number of threads only."""
    data, copy = np.ones(size // 4, np.float32), np.ones(size // 4, np.float32)

    def read() -> float:
        functional._read_bytes(data)
        return size

    def write() -> float:
        functional._copy_bytes(copy, data)
        return 2 * size

    rates = {f"{name}_{unit}": _best_rate(partial(functional._peak_ops, name, 200_000), seconds)
             for name, unit in (("fp32", "gflops"), ("bf16", "gflops"), ("int8", "gops"), ("int4", "gops"))}
    rates["read_gbs"] = _best_rate(read, seconds)
    rates["copy_gbs"] = _best_rate(write, seconds)
    return rates


def roofline(seconds: float = 0.2, size: int = 256 << 20) -> dict[str, Any]:
    """This machine's limits, measured here and now with the ISA in use.

    Returns {"threads", "fp32_gflops", "bf16_gflops", "int8_gops", "int4_gops", "read_gbs", "copy_gbs", "by_threads"}:
    multiply-add peaks (0 where the ISA has no such unit; int4 is nibbles by bytes, which AVX2 multiplies faster), DRAM
    read bandwidth and copy bandwidth (read plus written bytes) over arrays of `size` bytes; by_threads has the same
    for 1 .. threads. Each figure is the best of repeats that fill `seconds`.
    """
    threads = get_num_threads()
    by_threads = {}
    try:
        for count in range(1, threads + 1):
            set_num_threads(count)
            by_threads[count] = limits_now(seconds, size)
    finally:
        set_num_threads(threads)
    return {"threads": threads, **by_threads[threads], "by_threads": by_threads}
