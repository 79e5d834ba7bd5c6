"""The process that runs cases: python -m fuzz.worker NAME FIRST COUNT SECONDS MASTER, one JSON line an event on stdout.

A case is a function of its seed alone. Before each one a line says which, so that whoever reads knows what was running
when the process died or hung.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from hashlib import blake2b
from typing import Any

from fuzz import listeners

MEMORY = 4 << 30  # beyond what the process has when it starts
PR_SET_PDEATHSIG = 1


def seed_of(master: int, name: str, i: int) -> int:
    """The seed of case i of a run."""
    return int.from_bytes(blake2b(f"{master}/{name}/{i}".encode(), digest_size=6).digest(), "little")


def die_with_parent() -> None:
    """A worker that hangs does not outlive a driver that was killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def limit_memory() -> None:
    """What asks for more gets a MemoryError, which few cases allow. AddressSanitizer reserves terabytes."""
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        return
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def described(error: BaseException) -> str:
    """Type and message, and the innermost of our lines that it passed."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}fuzz{os.sep}" in f.filename]
    where = f" [{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}]" if frames else ""
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}{notes}{where}"


class Reports:
    """One JSON object a line, where nothing else prints."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **event: Any) -> None:
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()


def run_case(fuzzer: Any, seed: int, reports: Reports) -> None:
    reports.say(case=seed)
    try:
        fuzzer.case(seed)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # pytest's failures are BaseExceptions, and so are panics of Rust libraries
        reports.say(failed=seed, why=described(error), trace=traceback.format_exc()[-4000:])


def main(name: str, first: int, count: int, seconds: float, master: int) -> None:
    """Cases first, first + 1, ... of a run until the time is over; with count 1 the case whose seed is `master`."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with_parent()
    reports = Reports()
    listeners.append(lambda text: reports.say(doing=text))
    fuzzer = importlib.import_module(f"fuzz.{name}")
    limit_memory()
    end, i = time.monotonic() + seconds, first
    if count:
        run_case(fuzzer, master, reports)
    while not count and time.monotonic() < end:
        run_case(fuzzer, seed_of(master, name, i), reports)
        i += 1
        reports.say(done=i)
    reports.say(finished=i)
    os._exit(0)  # threads that are still waiting do not matter any more


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
