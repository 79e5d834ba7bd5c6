"""What `mpiexec -n 4 forge-c generate --parallel` needs beside a model: all ranks run the command, rank 0 speaks.

Rank 0 alone reads what is piped in. A mistake that all ranks would make is told once; whatever one rank cannot do ends
all of them.
"""
from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

from forge_c.distributed.comm import Comm
from forge_c.threads import default_threads

T = TypeVar("T")


def on_all(comm: Comm, work: Callable[[], T]) -> T:
    """work() of this rank, once every rank's has come to its end; an error of one is an error of all."""
    result: Any = None
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    said = comm.all_gather(None if error is None else str(error) or type(error).__name__)
    failed = [rank for rank, each in enumerate(said) if each is not None]
    if error is not None and said[0] is not None:
        raise error
    if failed:
        raise ValueError(f"rank {failed[0]}: {said[failed[0]]}")
    return result  # type: ignore[no-any-return]


def from_first(comm: Comm, work: Callable[[], T]) -> T:
    """Rank 0's work(), on every rank."""
    return comm.all_gather(on_all(comm, lambda: work() if comm.rank == 0 else None))[0]  # type: ignore[no-any-return]


@contextmanager
def spoken(comm: Comm, to: TextIO) -> Iterator[TextIO]:
    """Where this rank writes: `to`, or nowhere."""
    if comm.rank == 0:
        yield to
    else:
        with open(os.devnull, "w") as nowhere:
            yield nowhere


def threads_a_rank(comm: Comm) -> int:
    """This rank's part of the cores that it shares with others."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    sharing = comm.all_gather((socket.gethostname(), cpus))
    if "OMP_NUM_THREADS" in os.environ:
        return default_threads()[0]
    return max(1, default_threads()[0] // sharing.count(sharing[comm.rank]))
