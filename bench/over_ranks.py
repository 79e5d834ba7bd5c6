"""What the benchmarks over ranks share: the ranks themselves, what each of them sends and waits for, its memory, inputs
that every rank can make alone, and rows of attention in float64.

Ranks are threads (--threads N) or the processes that mpiexec started; one alone, if it did not.
"""
from __future__ import annotations

import argparse
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import forge_c as fc
from forge_c.distributed import Comm, MPIComm, SelfComm, ThreadComm

Array = np.ndarray[Any, Any]
BLOCK = 4096  # tokens that are made at once
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


# ---- ranks -------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help="N ranks in this process, instead of mpiexec's")
    parser.add_argument("--latency", type=float, default=0.0, help="of a simulated link between threads, seconds")
    parser.add_argument("--bandwidth", type=float, help="of a simulated link between threads, bytes a second")
    parser.add_argument("--cores", type=int, help="of one rank (default: this machine's over the number of ranks)")


def on_ranks(args: argparse.Namespace, work: Callable[[Comm], Any]) -> list[Any] | None:
    """What each rank returns, in their order; None on all processes but the first."""
    if args.threads is None:
        launched = any(name in os.environ for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))
        with MPIComm(timeout=3600) if launched else SelfComm() as comm:
            use_cores(args, comm.size)
            found = comm.all_gather(work(comm))
            return found if comm.rank == 0 else None
    use_cores(args, args.threads)
    results: list[Any] = [None] * args.threads
    failed: list[BaseException] = []

    def one(comm: Comm) -> None:
        try:
            with comm:
                results[comm.rank] = work(comm)
        except BaseException as error:
            failed.append(error)

    comms = ThreadComm(args.threads, latency=args.latency, bandwidth=args.bandwidth, timeout=3600)
    ranks = [threading.Thread(target=one, args=(comm,)) for comm in comms]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    if failed:
        raise failed[0]
    return results


def use_cores(args: argparse.Namespace, ranks: int) -> None:
    fc.set_num_threads(args.cores or max(1, (os.cpu_count() or 1) // ranks))


# ---- what a rank does --------------------------------------------------------------------------------


@dataclass
class Tally:
    """Of one rank: bytes that it sent, seconds that it waited for others, the clock's and its process's on cores."""
    sent: int = 0
    waited: float = 0.0
    seconds: float = 0.0
    cpu: float = 0.0


def timed(comm: Comm, work: Callable[[], Any]) -> tuple[Any, Tally]:
    """What work() returns and what it took here, all ranks having begun together."""
    send, wait, tally = comm._start_send, comm.wait_any, Tally()

    def counted(data: Any, to: int, tag: int) -> Any:
        tally.sent += data.size
        return send(data, to, tag)

    def waited(*given: Any) -> None:
        begin = time.perf_counter()
        wait(*given)
        tally.waited += time.perf_counter() - begin

    comm.barrier()
    comm._start_send, comm.wait_any = counted, waited  # type: ignore[method-assign]
    begin, cpu = time.perf_counter(), time.process_time()
    try:
        result = work()
    finally:
        del comm._start_send, comm.wait_any
    tally.seconds, tally.cpu = time.perf_counter() - begin, time.process_time() - cpu
    return result, tally


def memory(name: str = "VmRSS") -> float:
    """A line of /proc/self/status, in MB; VmHWM is the peak since the last forget_peak()."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def forget_peak() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # else what is free is in use already
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")


# ---- inputs and exact rows ---------------------------------------------------------------------------


def tokens(seed: int, positions: Array, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
    """(1, len(positions), *shape) of a Gaussian text: the same at each position, whoever makes it; ascending."""
    out = np.empty((1, len(positions), *shape), dtype)
    for block in np.unique(positions // BLOCK):
        at = slice(*np.searchsorted(positions, (block * BLOCK, (block + 1) * BLOCK)))
        made = np.random.default_rng([seed, int(block)]).standard_normal((BLOCK, *shape), np.float32)
        out[0, at] = made[positions[at] - block * BLOCK]
    return out


def sample(positions: Array, count: int, seed: int = 0) -> Array:
    """So many places of a rank's tokens, ascending, the first and the last among them."""
    chosen = np.random.default_rng([seed, len(positions)]).integers(0, max(len(positions), 1), count)
    return np.unique([*chosen, 0, len(positions) - 1]) if len(positions) else np.empty(0, np.int64)


KeyBlocks = Iterator[tuple[Array, Array, Array]]  # positions (n,), k (n, kv_heads, d), v (n, kv_heads, d)


class Exact:
    """Causal attention in float64 of rows q (rows, heads, d) at these positions, over the keys that it was shown."""

    def __init__(self, q: Array, at: Array, blocks: KeyBlocks, window: int | None = None) -> None:
        rows, heads, d = q.shape
        self.top, self.total, self.out = np.full((heads, rows), -np.inf), np.zeros((heads, rows)), np.zeros(
            (heads, rows, d))
        self.largest = 0.0  # |v|
        for positions, k, v in blocks:
            seen = positions[None] <= at[:, None]
            seen &= True if window is None else positions[None] > at[:, None] - window
            for g in range(k.shape[1]):
                self._add(q, g, k[:, g].astype(np.float64), v[:, g].astype(np.float64), seen, heads // k.shape[1])

    def _add(self, q: Array, g: int, k: Array, v: Array, seen: Array, group: int) -> None:
        self.largest = max(self.largest, float(np.abs(v).max()))
        for h in range(g * group, (g + 1) * group):
            score = np.where(seen, q[:, h].astype(np.float64) @ k.T * q.shape[2]**-0.5, -np.inf)
            new = np.maximum(self.top[h], score.max(axis=1))
            safe = np.where(new == -np.inf, 0.0, new)
            p, keep = np.exp(score - safe[:, None]), np.exp(self.top[h] - safe)
            self.total[h], self.top[h] = self.total[h] * keep + p.sum(axis=1), new
            self.out[h] = self.out[h] * keep[:, None] + p @ v

    @staticmethod
    def of(parts: list[Exact]) -> tuple[Array, float]:
        """(rows, heads, d) over the keys of all parts, and the largest |v|."""
        top = np.max([part.top for part in parts], axis=0)
        weights = [np.exp(part.top - top) for part in parts]
        total = sum(w * part.total for w, part in zip(weights, parts, strict=True))
        out = sum(w[..., None] * part.out for w, part in zip(weights, parts, strict=True))
        return (out / total[..., None]).transpose(1, 0, 2), max(part.largest for part in parts)


# ---- what is said ------------------------------------------------------------------------------------


def where() -> str:
    """Where this was measured."""
    model = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), "this machine")
    return f"{os.cpu_count()} cores of {model}, {fc.isa()}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["--:"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def size_text(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def time_text(seconds: float) -> str:
    for unit, size, least in (("d", 86400, 2), ("h", 3600, 2), ("min", 60, 2), ("s", 1, 1), ("ms", 1e-3, 1)):
        if seconds >= least * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
