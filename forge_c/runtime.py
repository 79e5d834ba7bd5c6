"""What runs here: the default thread count and why, show_config(), roofline()."""
from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from forge_c import functional
from forge_c.functional import get_num_threads, set_num_threads


def cgroup_quota(root: Path | str = "/sys/fs/cgroup", membership: str | None = None) -> int | None:
    """CPUs that the tightest cgroup quota on this process's path allows, at least 1; None without a quota.

    root: where the hierarchy is mounted; membership: the text of /proc/self/cgroup.
    """
    if membership is None:
        try:
            membership = Path("/proc/self/cgroup").read_text()
        except OSError:
            return None
    quotas: list[float] = []
    for line in membership.splitlines():
        fields = line.split(":", 2)
        if len(fields) != 3:
            continue
        unified = fields[1] == ""
        if not unified and "cpu" not in fields[1].split(","):
            continue
        base = Path(root) if unified else Path(root) / fields[1]
        parts = [p for p in fields[2].split("/") if p not in ("", ".", "..")]
        for depth in range(len(parts) + 1):
            quota = _quota_v2(base.joinpath(*parts[:depth])) if unified else _quota_v1(base.joinpath(*parts[:depth]))
            if quota is not None:
                quotas.append(quota)
    return max(1, math.ceil(min(quotas))) if quotas else None


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period) if quota != "max" else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
        return quota / period if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _physical_cores(cpus: set[int]) -> int:
    """Distinct cores behind these CPUs: two hardware threads of one core share its vector units."""
    cores = set()
    for cpu in cpus:
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            return len(cpus)
    return len(cores)


def default_threads() -> tuple[int, str]:
    """The thread count chosen at import, and why."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    limits = {"physical cores": _physical_cores(cpus), "affinity": len(cpus)}
    quota = cgroup_quota()
    if quota is not None:
        limits["cgroup quota"] = quota
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdigit() and int(asked) > 0:
        limits["OMP_NUM_THREADS"] = int(asked)
    why = min(limits, key=lambda name: limits[name])
    return limits[why], f"{why} = {limits[why]}"


_default, _why = default_threads()
set_num_threads(_default)


def _cpu_flags() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                names = line.split(":", 1)[1].split()
                return " ".join(n for n in names if n.startswith(("avx", "fma", "f16c", "sse4", "asimd", "bf16", "i8mm")))
    except OSError:
        pass
    return ""


def show_config() -> dict[str, object]:
    """Print and return what this build is and what it found: version, ISA, CPU features, threads, OpenMP, flags."""
    from forge_c import __version__
    from forge_c._build import FLAGS

    config: dict[str, object] = {
        "version": __version__,
        "isa": functional.isa(),
        "available_isas": functional.available_isas(),
        "cpu": platform.machine(),
        "cpu_features": _cpu_flags(),
        "threads": get_num_threads(),
        "threads_default": f"{_default} ({_why})",
        "openmp": functional._openmp(),
        "build_flags": FLAGS,
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


def _limits(seconds: float, size: int) -> dict[str, float]:
    data, copy = np.ones(size // 4, np.float32), np.zeros(size // 4, np.float32)

    def read() -> float:
        functional._read_bytes(data)
        return size

    def write() -> float:
        functional._copy_bytes(copy, data)
        return 2 * size

    rates = {f"{name}_{unit}": _best_rate(lambda name=name: functional._peak_ops(name, 200_000), seconds)
             for name, unit in (("fp32", "gflops"), ("bf16", "gflops"), ("int8", "gops"))}
    rates["read_gbs"] = _best_rate(read, seconds)
    rates["copy_gbs"] = _best_rate(write, seconds)
    return rates


def roofline(seconds: float = 0.2, size: int = 256 << 20) -> dict[str, object]:
    """This machine's limits, measured here and now with the ISA in use.

    Returns {"threads", "fp32_gflops", "bf16_gflops", "int8_gops", "read_gbs", "copy_gbs", "by_threads"}: multiply-add
    peaks (0 where the ISA has no such unit), DRAM read bandwidth and copy bandwidth (read plus written bytes) over
    arrays of `size` bytes; by_threads has the same for 1 .. threads. Each figure is the best of repeats that fill
    `seconds`.
    """
    threads = get_num_threads()
    by_threads = {}
    try:
        for count in range(1, threads + 1):
            set_num_threads(count)
            by_threads[count] = _limits(seconds, size)
    finally:
        set_num_threads(threads)
    return {"threads": threads, **by_threads[threads], "by_threads": by_threads}
