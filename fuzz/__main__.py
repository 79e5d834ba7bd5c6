"""python -m fuzz: each fuzzer for its share of the time, in a process of its own that may crash or hang."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import queue
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from fuzz import FUZZERS, ROOT
from fuzz.known import known

PATIENCE = 60.0  # seconds without a word from a worker: a case that does not return; a fuzzer may have its own
STARTING = 120.0


@dataclass
class Outcome:
    """What a fuzzer did, and what it found: (seed, why) of each new kind of failure."""

    name: str
    cases: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)
    expected: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    shows_all: bool = False  # known faults too
    shows_trace: bool = False

    def add(self, seed: int, why: str, trace: str = "") -> None:
        fault = None if self.shows_all else known(self.name, why)
        kind = fault or re.sub(r"[^A-Za-z_ ]+", "", ":".join(why.split(":")[:3]))
        self.seen[kind] += 1
        if fault:
            self.expected[fault] += 1
        elif self.seen[kind] == 1:
            self.failures.append((seed, why))
            print(f"\n{self.name}: {why}\n    python -m fuzz --only {self.name} --case {seed}", flush=True)
            if trace and self.shows_trace:
                print(trace, flush=True)


class Worker:
    """A running worker whose lines come through a queue, so that waiting for them can end."""

    def __init__(self, name: str, first: int, count: int, seconds: float, master: int) -> None:
        fuzzer: Any = importlib.import_module(f"fuzz.{name}")
        self.patience = getattr(fuzzer, "PATIENCE", PATIENCE)
        self.scratch = tempfile.TemporaryDirectory(prefix="fuzz-")
        self.errors = tempfile.TemporaryFile("w+")
        settings = {**os.environ, "FUZZ_SCRATCH": self.scratch.name, "PYTHONUNBUFFERED": "1",
                    **getattr(fuzzer, "environment", lambda folder: {})(self.scratch.name)}
        command = [sys.executable, "-m", "fuzz.worker", name, str(first), str(count), str(seconds), str(master)]
        command = getattr(fuzzer, "wrapped", lambda c, folder: c)(command, self.scratch.name)
        self.process = subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=self.errors, text=True,
                                        cwd=ROOT, start_new_session=True)
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.put(line)
        self.lines.put(None)

    def next(self, patience: float) -> dict[str, Any] | None:
        """The next event, or None at the end. queue.Empty: it says nothing."""
        line = self.lines.get(timeout=patience)
        return None if line is None else json.loads(line)

    def close(self) -> int:
        """Its exit status; it and what it started are gone afterwards."""
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        status = self.process.wait()
        self.scratch.cleanup()
        return status

    def last_words(self) -> str:
        self.errors.seek(0)
        return self.errors.read()[-3000:]


def follow(worker: Worker, outcome: Outcome, first: int) -> int:
    """Take down what a worker says until its end; the index of the case after the last one that it began."""
    seed, at, doing, finished, patience = 0, first, "", False, STARTING
    try:
        while (event := worker.next(patience)) is not None:
            patience = worker.patience
            if "case" in event:
                seed, outcome.cases, doing = event["case"], outcome.cases + 1, ""
            elif "failed" in event:
                outcome.add(event["failed"], event["why"], event["trace"])
            doing = event.get("doing", doing)
            at, finished = event.get("done", at), finished or "finished" in event
    except queue.Empty:
        os.killpg(worker.process.pid, signal.SIGABRT)  # faulthandler says where it hangs
        time.sleep(1)
        worker.close()
        outcome.add(seed, f"hang: {doing}: nothing for {patience:.0f} seconds", worker.last_words())
        return at + 1
    status = worker.close()
    if not finished:
        name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        outcome.add(seed, f"death: {name} {doing}: {last_frame(worker.last_words())}", worker.last_words())
        return at + 1
    return at


def last_frame(text: str) -> str:
    """The innermost Python line of what faulthandler wrote."""
    return next((line.strip() for line in text.splitlines() if line.strip().startswith("File ")), text[-200:])


def fuzz(outcome: Outcome, master: int, seconds: float) -> Outcome:
    """Run one fuzzer, and again from the next case on whenever its process died."""
    name, end, first = outcome.name, time.monotonic() + seconds, 0
    while (left := end - time.monotonic()) > 0 and sum(outcome.seen.values()) < 1000:
        first = follow(Worker(name, first, 0, left, master), outcome, first)
    return outcome


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for all of them together (default 60)")
    parser.add_argument("--seed", type=int, help="of the run (default: drawn and printed)")
    parser.add_argument("--only", choices=FUZZERS, action="append", help="this fuzzer; may be given several times")
    parser.add_argument("--case", type=int, help="one case of --only, by the seed that a report names")
    parser.add_argument("--all", action="store_true", help="report known faults too")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    master = secrets.randbelow(2**32) if given.seed is None else given.seed
    names = tuple(given.only or FUZZERS)
    outcomes = []
    if given.case is not None:
        outcomes = [Outcome(names[0], shows_all=True, shows_trace=True)]
        follow(Worker(names[0], 0, 1, 0.0, given.case), outcomes[0], 0)
    else:
        print(f"fuzz: --seed {master}, {given.seconds:.0f} s for {', '.join(names)}", flush=True)
        for name in names:
            outcomes.append(fuzz(Outcome(name, shows_all=given.all), master, given.seconds / len(names)))
    for o in outcomes:
        expected = "".join(f"; {n} times {what} (known)" for what, n in o.expected.items())
        print(f"fuzz {o.name}: {o.cases} cases, {len(o.failures)} failures{expected}")
    return any(o.failures for o in outcomes)


if __name__ == "__main__":
    sys.exit(main())
