"""Implementations that take turns at the cases of cases.py: a process each, and within a round every variant of a case
by every one of them, so that what is compared lies seconds apart.

    python bench/turns.py --worker IMPL      answers lines of JSON on stdin until it closes
"""
from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib import import_module
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from cases import CASES, FORMATS, Case, Variant
from machine import FOOTPRINT

IMPLEMENTATIONS = ("forge_c", "numpy", "torch", "onnxruntime")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# Freed memory stays in the process: who makes new arrays at each call gets warm ones, as who writes into out= does.
WARM_MEMORY = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736:glibc.malloc.top_pad=67108864"
_PAUSE = 0.01      # seconds before a turn, so that the others' threads have stopped
_PR_SET_PDEATHSIG = 1
_LONG = 0.5        # seconds of a call that is not repeated to warm up
_HOPE = 3          # times as long a first call may seem to take, all processes preparing at once
_GRACE = 10        # seconds over the time in which a round may come to its end
_SAMPLE = 1e-4     # seconds of a sample at least: shorter calls are counted together
_COPY_WEIGHTS = ("forge_c", "onnxruntime")  # into packed arrays, into a graph
_SETS = 64         # copies of a case's buffers at most
# Of the largest value: what a format does to a product of random numbers, with room to spare; the first name that fits.
TOLERANCE = {"int4": 0.25, "int8": 0.05, "bfloat16": 0.05, "float32": 1e-3}
Call = Callable[[], Any]
Cell = dict[str, Any]


class Turn(NamedTuple):
    """How long an implementation works at a time, and how often."""
    seconds: float
    rounds: int


class Worker:
    """One implementation in a process of its own, which is stopped while others work: threads that wait for their next
    call by spinning, as ONNX Runtime's do for a while, would take a core from them."""

    def __init__(self, impl: str, threads: int, python: str = sys.executable) -> None:
        self.impl = impl
        self._environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads)),
                             "GLIBC_TUNABLES": WARM_MEMORY}
        self._command = [python, str(Path(__file__).resolve()), "--worker", impl]
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                         env=self._environment, cwd=Path(__file__).resolve().parent)

    def __call__(self, *command: Any) -> Any:
        """The answer; None if the process ended, and then there is a new one."""
        self.ask(*command)
        return self.answer()

    def ask(self, *command: Any) -> None:
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        with suppress(BrokenPipeError):  # then there is no answer
            print(json.dumps(command), file=self._process.stdin, flush=True)

    def answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            self._process.send_signal(signal.SIGSTOP)
            return json.loads(line)
        self._process.wait()
        self._start()
        return None

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.send_signal(signal.SIGCONT)
        self._process.wait()


# ---- in the worker -----------------------------------------------------------------------------------


def _calls(case: Case, variant: Variant, impl: str, operations: Any, inputs: tuple[Any, ...]) -> list[Call]:
    """As many as there are sets of buffers, each with arrays of its own."""
    options = {**case.options, **(variant.options if impl == "forge_c" else {})}
    op = getattr(operations, impl == "numpy" and case.numpy_op or case.op)
    sets = 1 if case.hot else max(1, min(-(-FOOTPRINT // (variant.read + variant.written)), _SETS))
    shared = case.weights if impl in _COPY_WEIGHTS else ()
    calls = []
    for i in range(sets):
        mine = inputs if i == 0 else tuple(a if at in shared else a.copy() for at, a in enumerate(inputs))
        calls.append(op(*mine, dtype=variant.dtype, **options))
    return calls


def _offers(impl: str, operations: Any, case: Case, variant: Variant) -> bool:
    op = impl == "numpy" and case.numpy_op or case.op
    return (impl not in case.without and hasattr(operations, op) and variant.dtype in operations.DTYPES
            and (impl == "forge_c" or not variant.options or variant.shared))


def _prepare(impl: str, operations: Any, case: Case, brief: bool) -> tuple[dict[str, list[Call]], dict[str, Any]]:
    """(calls of each variant, seconds of a first call, or what was said against it)."""
    inputs, calls, answer = case.inputs(), {}, {}
    for variant in case.variants:
        if not _offers(impl, operations, case, variant) or (brief and variant.name not in FORMATS):
            continue
        try:
            calls[variant.name] = _calls(case, variant, impl, operations, inputs)
            for call in calls[variant.name]:
                start = time.perf_counter()
                call()
            answer[variant.name] = time.perf_counter() - start
        except Exception as error:  # whatever a version of a library does not do is left out
            calls.pop(variant.name, None)
            answer[variant.name] = f"{type(error).__name__}: {error}"
    return calls, answer


def _time(calls: list[Call], once: float, seconds: float) -> float:
    """Median seconds of a call over one turn."""
    time.sleep(_PAUSE)
    if once < _LONG:
        calls[0]()
    together = max(1, round(_SAMPLE / max(once, 1e-7)))
    times: list[float] = []
    following = cycle(calls[1:] + calls[:1])
    while not times or sum(times) * together < seconds:
        start = time.perf_counter()
        for call in islice(following, together):
            call()
        times.append((time.perf_counter() - start) / together)
    return median(times)


def serve(impl: str) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # who is stopped would not see that stdin is closed
    operations = import_module(f"{impl}_ops")
    calls: dict[str, list[Call]] = {}
    once: dict[str, Any] = {}
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        answer: Any = None
        if command == "version":
            answer = import_module(impl).__version__
        elif command == "prepare":
            calls = {}  # their memory, before there is more
            calls, once = _prepare(impl, operations, CASES[arguments[0]], arguments[1])
            answer = once
        elif command == "time":
            name, seconds = arguments
            answer = _time(calls[name], once[name], seconds)
        elif command == "save":  # what each variant makes of a case
            for name, prepared in calls.items():
                np.save(Path(arguments[0]) / f"{name}.npy", operations.to_numpy(prepared[0]()))
        elif command == "drop":
            calls = {}
        print(json.dumps(answer), flush=True)


# ---- around the workers ------------------------------------------------------------------------------


def measure(index: int, workers: Iterable[Worker], threads: int, turn: Turn, left: Callable[[], float],
            say: Callable[[str], None], brief: bool = False) -> list[Cell]:
    """Cells of one case: of each variant and implementation, its median in each round. A round is not begun when it
    would not end in the time left; [] if not even the first would. brief: the formats alone."""
    case, workers = CASES[index], list(workers)
    ready: dict[Worker, dict[str, float]] = {}
    for worker in workers:
        worker.ask("prepare", index, brief)
    for worker in workers:
        said = worker.answer()
        said = {"all of it": "the process ended"} if said is None else said
        ready[worker] = {name: value for name, value in said.items() if not isinstance(value, str)}
        for name, value in said.items():
            if isinstance(value, str):
                say(f"  {case.name}, {name}, {worker.impl}: {value.splitlines()[0]}")
    cost = sum(_PAUSE + (1 if value > _LONG else 2) * max(value, turn.seconds)
               for names in ready.values() for value in names.values())
    found: dict[tuple[str, str], list[float]] = {}
    for number in range(turn.rounds):
        if cost > (left() if number else _HOPE * left()):
            break
        for variant, worker in ((v, w) for v in case.variants for w in workers if v.name in ready[w]):
            seconds = worker("time", variant.name, turn.seconds) if left() > -_GRACE else None
            if seconds is None:
                ready[worker].clear()
            else:
                found.setdefault((variant.name, worker.impl), []).append(seconds)
    for worker in workers:
        worker("drop")
    if not found:
        say(f"  {case.name}: left out, a round takes {cost:.0f} s")
    return [_cell(case, variant, impl, threads, found[variant.name, impl]) for variant in case.variants
            for impl in IMPLEMENTATIONS if (variant.name, impl) in found]


def check(index: int, workers: Iterable[Worker], say: Callable[[str], None]) -> bool:
    """Whether every variant by everyone makes what NumPy makes in float32, as far as its format goes."""
    case, right = CASES[index], True
    with tempfile.TemporaryDirectory() as folder:
        for worker in workers:
            mine = Path(folder) / worker.impl
            mine.mkdir()
            worker("prepare", index, False)
            worker("save", str(mine))
            worker("drop")
        numpy = Path(folder) / "numpy" / "float32.npy"
        if not numpy.exists():
            say(f"  {case.name}: NumPy does not do it")
            return True
        expected = np.load(numpy)
        scale = np.abs(expected).max()
        for path in sorted(Path(folder).glob("*/*.npy")):
            got = np.load(path).reshape(expected.shape)
            error = float(np.abs(got - expected).max() / scale)
            allowed = next(most for name, most in TOLERANCE.items() if name in path.stem)
            if not error <= allowed:
                right = False
                say(f"  {case.name}, {path.stem}, {path.parent.name}: {error:.2g} of the largest value off")
    return right


def _cell(case: Case, variant: Variant, impl: str, threads: int, rounds: list[float]) -> Cell:
    return {"section": case.section, "case": case.name, "variant": variant.name, "impl": impl, "threads": threads,
            "seconds": rounds, "read": variant.read, "written": variant.written, "flops": variant.flops,
            "dtype": variant.dtype, "in_memory": not case.hot, "beside": variant.beside, "curve": case.curve,
            "length": case.length}


def rates(cells: Iterable[Mapping[str, Any]]) -> str:
    """A line of what was found, for who watches."""
    return ", ".join(f"{c['impl']} {c['variant']} {1e3 * median(c['seconds']):.4g}" for c in cells)


if __name__ == "__main__":
    serve(sys.argv[sys.argv.index("--worker") + 1])
