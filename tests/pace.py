"""Bounds on processor time that hold on a slow machine too, and on one whose time others steal."""
from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TRIES = 4
USUAL = 0.010  # seconds that WORK takes where the bounds were written
WORK = 100_000


def processor_time(call: Callable[[], Any]) -> float:
    """Seconds of this process, of all its threads."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def processor_time_of_children(call: Callable[[], Any]) -> float:
    """Seconds of the processes that `call` starts and sees end."""
    begin = os.times()
    call()
    end = os.times()
    return end.children_user - begin.children_user + end.children_system - begin.children_system


def processor_time_of(process: int) -> float:
    """Seconds of one that runs."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _work() -> None:
    found: dict[str, int] = {}
    for i in range(WORK // 2):
        found[str(i)] = i


def slowness() -> float:
    """How many times slower than usual the machine is just now, 1 at least."""
    return max(1.0, min(processor_time(_work) for _ in range(3)) / USUAL)


def check_pace(call: Callable[[], Any], seconds: float, *,
               clock: Callable[[Callable[[], Any]], float] = processor_time) -> None:
    """Fail if `call` takes more than these seconds of processor time of a usual machine, each time that it is tried."""
    taken = []
    for _ in range(TRIES):
        taken.append(clock(call) / slowness())
        if taken[-1] < seconds:
            return
    raise AssertionError(f"{', '.join(f'{each:.3g}' for each in taken)} s of a usual machine, expected under {seconds}")
