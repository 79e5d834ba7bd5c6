"""What this machine is and what it could do at most: caches, measured peaks, and the least time some work can take."""
from __future__ import annotations

import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

Limits = dict[str, float]
_ROOFLINE = """
import json, sys, forge_c
r = forge_c.roofline(float(sys.argv[1]), int(sys.argv[2]))
r.pop("by_threads")
print(json.dumps(r | {"isa": forge_c.isa()}))
"""
_BY_THREADS = """
import json, sys, forge_c
from forge_c import functional, runtime
import numpy as np
seconds, size, sizes = float(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
r = forge_c.roofline(seconds, size)
data = [np.ones(max(sizes) // 4, np.float32) for _ in range(2)]
memory = []
for size in sizes:
    a, b = (each[:size // 4] for each in data)
    memory.append([size, runtime._best_rate(lambda: (functional._read_bytes(a), size)[1], seconds),
                   runtime._best_rate(lambda: (functional._copy_bytes(b, a), 2 * size)[1], seconds)])
print(json.dumps({"isa": forge_c.isa(), "threads": r["threads"], "by_threads": r["by_threads"], "memory": memory}))
"""
PAGES = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
FOOTPRINT = 256 << 20  # bytes: the arrays over which memory is measured, and the buffers that a case rotates through


class Work(NamedTuple):
    """What one call must do at least."""
    read: int       # bytes of inputs
    written: int    # bytes of results
    flops: int      # of products; 0 where an operation is about moving bytes
    dtype: str      # of the products: which peak applies
    in_memory: bool  # whether the buffers of successive calls together exceed the last-level cache


def last_level_cache() -> int:
    """Bytes of the largest cache that cpu0 sees; 32 MiB where the system does not say."""
    sizes = []
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = size.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1], 1))
    return max(sizes, default=32 << 20)


def copies(moved: int) -> int:
    """How many sets of buffers of `moved` bytes to rotate through, so that each comes from memory when its turn comes:
    four times the last-level cache, but no more than 2 GiB."""
    return max(1, min(-(-4 * last_level_cache() // moved), (2 << 30) // moved))


def measure_limits(python: str = sys.executable, quick: bool = False) -> Limits:
    """forge_c.roofline() in a process of its own, so that its threads do not stay in this one; started in this folder,
    because python -c in the repository's would import the tree that is not built."""
    seconds, size = ("0.03", 64 << 20) if quick else ("0.1", 256 << 20)
    done = subprocess.run([python, "-c", _ROOFLINE, seconds, str(size)], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).resolve().parent)
    return json.loads(done.stdout)


def measure_by_threads(seconds: float = 0.05) -> dict[str, Any]:
    """{"isa", "threads", "by_threads": {"1": Limits, ...}, "memory": [[bytes of an array, read, copy], ...]}: limits at
    every number of threads, and memory's rates at all of them against the size of the arrays, in GB/s."""
    sizes = [size << 20 for size in (1, 4, 16, 64, 256, 1024) if size << 23 < available_memory()]
    done = subprocess.run([sys.executable, "-c", _BY_THREADS, str(seconds), str(FOOTPRINT), json.dumps(sizes)],
                          capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parent)
    return json.loads(done.stdout)


def best_of(a: Limits | None, b: Limits) -> Limits:
    """The higher of each figure: a limit that was reached once is a limit."""
    return b if a is None else {key: max(a.get(key, 0.0), b[key]) if isinstance(b[key], float) else b[key] for key in b}


def compute_seconds(work: Work, limits: Limits) -> float:
    keys = {"int4": "int4_gops", "int8": "int8_gops", "bfloat16": "bf16_gflops"}
    peak = limits[keys.get(work.dtype.split("-")[0], "fp32_gflops")]
    return work.flops / max(peak, limits["fp32_gflops"]) / 1e9  # whatever has fewer bits can be widened


def memory_seconds(work: Work, limits: Limits) -> float:
    """Equal shares of reads and writes go at the copy rate, the rest at the read rate; 0 for what stays in cache."""
    both = 2 * min(work.read, work.written)
    rest = work.read + work.written - both
    return (both / limits["copy_gbs"] + rest / limits["read_gbs"]) / 1e9 if work.in_memory else 0.0


def share(work: Work, seconds: float, limits: Limits) -> float | None:
    """Of this machine's limit; None where no limit was measured for such work."""
    least = max(compute_seconds(work, limits), memory_seconds(work, limits))
    return least / seconds if least else None


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes that can be had without swapping; 4 GiB where the system does not say."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _read("/proc/meminfo"), re.M)
    return int(found[1]) << 10 if found else 4 << 30


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


# Of what a processor has, the first that fits: virtual machines hide names and model numbers, not instructions.
_INTEL = (("amx_fp16", "Granite Rapids"), ("amx_tile", "Sapphire Rapids"), ("avx512_fp16", "Sapphire Rapids"),
          ("avx512_vbmi2", "Ice Lake"), ("avx512_bf16", "Cooper Lake"), ("avx512_vnni", "Cascade Lake"),
          ("avx512f", "Skylake server"), ("avx_vnni", "Alder Lake"), ("avx2", "Haswell"))
_AMD = (("avx512_vp2intersect", "Zen 5"), ("avx_vnni", "Zen 5"), ("avx512f", "Zen 4"), ("vaes", "Zen 3"),
        ("avx2", "Zen 2"))
_ARM = {"0xd0c": "Neoverse N1", "0xd40": "Neoverse V1", "0xd49": "Neoverse N2", "0xd4f": "Neoverse V2"}


def family() -> str:
    """The kind of core by what it can do, such as "Sapphire Rapids"; later ones that can no more are called so too."""
    text = _read("/proc/cpuinfo")
    flags = re.search(r"^flags\s*: (.*)", text, re.M)
    table = _INTEL if "GenuineIntel" in text else _AMD if "AuthenticAMD" in text else ()
    have = set(flags[1].split()) if flags else set()
    named = next((name for flag, name in table if flag in have), "")
    part = re.search(r"^CPU part\s*: (\S+)", text, re.M)
    return named or (_ARM.get(part[1], "") if part else "") or platform.machine()


def kind() -> str:
    """What a page of this machine is called: the kind of core, how many CPUs, and the ISA if one is asked for."""
    asked = os.environ.get("FORGE_C_ISA", "")
    return "-".join([*family().lower().split(), f"{cores()}cpus", *([asked] if asked else [])])


def page(what: str = "") -> Path:
    """docs/benchmarks/<this machine>[-<what>].md."""
    return PAGES / ("-".join([kind(), *([what] if what else [])]) + ".md")


def details() -> str:
    """The processor as the system names it, its caches and the memory."""
    text = _read("/proc/cpuinfo")
    ids = [found[1] for key in ("cpu family", "model", "stepping")
           if (found := re.search(rf"^{key}\s*: (\d+)$", text, re.M))]
    caches = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, what, size = (_read(str(index / name)).strip() for name in ("level", "type", "size"))
        if what != "Instruction":
            caches.append(f"L{level} {size}")
    total = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.M)
    return ", ".join([cpu_model() + (f" (family, model, stepping {'/'.join(ids)})" if ids else ""), f"{cores()} CPUs",
                      *caches, *([f"{int(total[1]) / 2**20:.0f} GiB of memory"] if total else []),
                      f"Linux {platform.release().split('-')[0]}"])


class Neighbours:
    """How much of the processors went to others than this process's children since it was made."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: of the clock, of processors at work or taken by the host, and of children that have ended."""
        user, nice, system, _, _, irq, soft_irq, stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return (time.monotonic(), (user + nice + system + irq + soft_irq + stolen) / os.sysconf("SC_CLK_TCK"),
                children.ru_utime + children.ru_stime)

    def share(self) -> float:
        """0 to 1 of all processors' time."""
        wall, busy, own = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return max(0.0, busy - own) / wall / (os.cpu_count() or 1)
