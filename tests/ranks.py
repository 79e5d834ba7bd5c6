"""Functions and scripts on several ranks: threads of this process, or processes under mpiexec."""
from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from child import PACKAGE_PARENT, TESTS

from forge_c.distributed import Comm, ThreadComm


def run_threads(function: Callable[[Comm], Any], n: int, *, timeout: float = 20.0, comms: list[Comm] | None = None,
                **link: Any) -> list[Any]:
    """What function(comm) returns on each of n ranks that are threads. An error of the first rank that raised one of
    its own (not RankError, which tells of another's) is raised here."""
    results, errors = run_threads_to_the_end(function, n, timeout=timeout, comms=comms, **link)
    own = [e for e in errors if e is not None and type(e).__name__ != "RankError"] or [e for e in errors if e]
    if own:
        raise own[0]
    return results


def run_threads_to_the_end(function: Callable[[Comm], Any], n: int, *, timeout: float = 20.0,
                           comms: list[Comm] | None = None, patience: float | None = None,
                           **link: Any) -> tuple[list[Any], list[BaseException | None]]:
    """What it returned and what it raised on each rank; an error leaves the rank as it leaves a `with comm`."""
    results: list[Any] = [None] * n
    errors: list[BaseException | None] = [None] * n

    def run(comm: Comm) -> None:
        try:
            with comm:
                results[comm.rank] = function(comm)
        except BaseException as error:
            errors[comm.rank] = error

    threads = [threading.Thread(target=run, args=(comm,), daemon=True)
               for comm in comms or ThreadComm(n, timeout=timeout, **link)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patience or 6 * timeout)
        assert not thread.is_alive(), "a rank hangs"
    return results, errors


@cache
def mpiexec() -> str | None:
    """Beside this Python, beside the site-packages that hold mpi4py, or in the PATH."""
    found = importlib.util.find_spec("mpi4py")
    if found is None or found.origin is None:
        return None
    beside = (Path(sys.executable).parent, Path(found.origin).parents[4] / "bin")
    return next((str(p / "mpiexec") for p in beside if (p / "mpiexec").exists()), None) or shutil.which("mpiexec")


needs_mpi = pytest.mark.skipif(mpiexec() is None, reason="mpi4py and an mpiexec are not installed: "
                                                         "pip install forge_c[mpi]")


@dataclass
class Done:
    """How a run under mpiexec ended; code is None where it had to be killed after the timeout."""
    code: int | None
    out: str
    err: str
    seconds: float


def run_mpi(script: str | Path, n: int, *arguments: str, timeout: float = 90, expect: int | None = 0,
            signal_after: str | None = None, options: tuple[str, ...] = (), **env: str) -> Done:
    """Run a script (its text, or its file) on n processes, one thread each, which import forge_c and what lies in
    tests/. Fails unless mpiexec exits with `expect` (None: with anything but 0). signal_after: a line of output at
    which Ctrl-C comes."""
    path = mpiexec()
    assert path is not None
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(script, str):
            file = Path(folder, "script.py")
            file.write_text(textwrap.dedent(script))
        else:
            file = script
        command = [path, *options, "-n", str(n), sys.executable, str(file), *arguments]
        done = _run(command, timeout, signal_after, _settings(path, env))
    text = f"exit status {done.code} after {done.seconds:.1f} s\n{done.out}{done.err}"
    assert done.code is not None, f"mpiexec did not end within {timeout} s\n{text}"
    assert done.code == expect if expect is not None else done.code != 0, text
    return done


def _settings(path: str, env: dict[str, str]) -> dict[str, str]:
    search = [str(PACKAGE_PARENT), str(TESTS), os.environ.get("PYTHONPATH", "")]
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search)), "OMP_NUM_THREADS": "1", **env}
    settings.pop("PYTHONUNBUFFERED", None)  # the words of a line would mingle with another rank's
    # Open MPI counts cores and looks who starts it; MPICH does neither.
    settings |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                 "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    # The wheel of MPICH lies beside its mpiexec, where mpi4py does not look if this environment only borrows both.
    library = Path(path).parents[1] / "lib" / "libmpi.so.12"
    if library.exists() and Path(sys.prefix) not in library.parents:
        settings.setdefault("MPI4PY_LIBMPI", str(library))
    return settings


def _run(command: list[str], timeout: float, signal_after: str | None, settings: dict[str, str]) -> Done:
    begin = time.monotonic()
    process = subprocess.Popen(command, env=settings, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True)
    before = ""
    try:
        while signal_after is not None and process.stdout is not None:
            line = process.stdout.readline()
            before += line
            if line.strip() == signal_after or not line:
                process.send_signal(signal.SIGINT)
                begin = time.monotonic()  # what matters is how long that takes
                break
        out, err = process.communicate(timeout=timeout)
        return Done(process.returncode, before + out, err, time.monotonic() - begin)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        return Done(None, before + out, err, time.monotonic() - begin)
