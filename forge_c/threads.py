"""How many threads this process deserves: cores, affinity, container quota, OMP_NUM_THREADS; the smallest wins."""
from __future__ import annotations

import math
import os
from collections.abc import Set
from pathlib import Path


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


def _physical_cores(cpus: Set[int]) -> int:
    """Distinct cores behind these CPUs: two hardware threads of one core share its vector units."""
    cores = set()
    for cpu in cpus:
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            return len(cpus)
    return len(cores)


def default_threads(bound: Set[int] = frozenset()) -> tuple[int, str]:
    """(count, why): the thread count chosen at import, and the limit that set it.

    bound: the CPUs that OpenMP binds its threads to, if it does. It read the process's affinity for them before it
    bound this thread to one, which is all that the affinity still says.
    """
    cpus = bound or (os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1)))
    limits = {"physical cores": _physical_cores(cpus), "affinity": len(cpus)}
    if len(cpus) < (os.cpu_count() or 1):  # the cores that are left are as many because of it
        limits = {"affinity": limits["affinity"], **limits}
    quota = cgroup_quota()
    if quota is not None:
        limits["cgroup quota"] = quota
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdigit() and int(asked) > 0:
        limits["OMP_NUM_THREADS"] = int(asked)
    why = min(limits, key=lambda name: limits[name])
    return limits[why], f"{why} = {limits[why]}"
