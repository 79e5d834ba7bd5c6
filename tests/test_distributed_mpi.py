"""Communicators of processes under mpiexec: the same checks, and how all end when one does not go on."""
from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from child import TESTS
from rank_checks import CHECKS
from ranks import Done, needs_mpi, run_mpi

pytestmark = needs_mpi

BEGIN = """
import os, signal, sys, time
import numpy as np
import forge_c
from forge_c.distributed import MPIComm, RankError

print("process", os.getpid(), flush=True)

def tell(rank, error):
    print(f"rank {{rank}} raised {{type(error).__name__}}: {{error}}", flush=True)

try:
    comm = MPIComm(timeout={timeout})
except RankError as error:  # rank 1 may be through before this rank has heard from all
    from mpi4py import MPI
    tell(MPI.COMM_WORLD.rank, error)
    raise
x = np.zeros(3 << 20, np.uint8)

def wait_for_rank_1():
    try:
        comm.receive(x, 1).wait()
    except BaseException as error:
        tell(comm.rank, error)
        raise

"""
# Linear lets go of the GIL, as every kernel does.
KERNEL = """
w, rows = forge_c.pack(np.ones((512, 512), np.float32)), np.ones((256, 512), np.float32)
forge_c.set_num_threads(1)

def compute(seconds, until=lambda: False):
    begin = time.monotonic()
    while time.monotonic() - begin < seconds and not until():
        forge_c.linear(rows, w)

"""


def bad_rank_1(deed: str, *, timeout: float = 60.0, **run: object) -> Done:
    """Two ranks wait for rank 1, which does a deed instead; nobody hangs or stays, and mpiexec fails."""
    source = (BEGIN.format(timeout=60) + f"comm.timeout = {timeout}\n"
              f"if comm.rank == 1:\n    {deed}\nelse:\n    wait_for_rank_1()\n")
    done = run_mpi(source, 3, expect=None, timeout=90, **run)
    assert done.seconds < 45, done
    processes = [int(number) for number in re.findall(r"^process (\d+)$", done.out, re.M)]
    assert len(processes) == 3, done
    end = time.monotonic() + 30
    while any(lives(each) for each in processes):
        assert time.monotonic() < end, "a rank still runs"
        time.sleep(0.05)
    return done


def lives(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def raised(done: Done) -> dict[int, str]:
    return {int(rank): text for rank, text in re.findall(r"^rank (\d) raised (.*)$", done.out, re.M)}


@pytest.mark.parametrize("n", (1, 2, 3, 4))
def test_checks(n: int) -> None:
    done = run_mpi(TESTS / "rank_checks.py", n, timeout=60)
    for rank in range(n):
        assert f"rank {rank} of {n} went through {len(CHECKS)} checks" in done.out


def test_a_rank_that_raises_ends_all() -> None:
    done = bad_rank_1("raise KeyError('lost')")
    assert raised(done) == dict.fromkeys((0, 2), "RankError: rank 1 failed: KeyError: 'lost'"), done
    assert "KeyError: 'lost'" in done.err


def test_a_killed_rank_ends_all() -> None:
    done = bad_rank_1("os.kill(os.getpid(), signal.SIGKILL)")
    assert done.code != 0 and set(raised(done)) <= {0, 2}, done  # mpiexec may be faster than their errors


def test_a_rank_that_hangs_is_awaited_for_the_timeout() -> None:
    """One rank's time is over first; it tells the others."""
    texts = raised(bad_rank_1("time.sleep(100)", timeout=1.0)).values()
    assert len(texts) == 2
    assert all(re.search(r"TimeoutError: rank \d awaits 3145728 bytes .tag 0.: nothing from rank 1 within 1 s", text)
               for text in texts), texts


def test_a_rank_that_is_gone_is_not_awaited() -> None:
    texts = raised(bad_rank_1("sys.exit(0)"))
    assert set(texts) == {0, 2}
    assert all("rank 1 has ended" in text for text in texts.values()), texts


def test_what_was_sent_before_the_end_arrives() -> None:
    """Ranks may end at different times; the last keeps nobody from it."""
    done = run_mpi(BEGIN.format(timeout=60) + """if comm.rank == 1:
    x[:] = 7
    for each in [comm.send(x, 0), comm.send(x, 2)]:
        each.wait()
else:
    wait_for_rank_1()
    print(f"rank {comm.rank} has {x.min()} to {x.max()}", flush=True)
    time.sleep(0.3 * comm.rank)
""", 3)
    assert set(re.findall(r"^rank \d has .*$", done.out, re.M)) == {"rank 0 has 7 to 7", "rank 2 has 7 to 7"}


def test_another_size_is_an_error_that_names_both() -> None:
    texts = raised(bad_rank_1("comm.send(x[:5], 0).wait(); comm.send(x, 2).wait()"))
    assert texts[0] == "ValueError: rank 1 sent 5 bytes to rank 0 (tag 0), which expected 3145728"


def test_ctrl_c_ends_all() -> None:
    done = bad_rank_1("comm.send(x, 0).wait(); print('ready', flush=True); time.sleep(100)", signal_after="ready")
    assert done.code != 0 and "ready" in done.out.splitlines(), done


def test_a_rank_without_a_communicator() -> None:
    done = run_mpi("""
        import time
        from mpi4py import MPI
        from forge_c.distributed import MPIComm
        if MPI.COMM_WORLD.rank == 0:
            time.sleep(100)
        MPIComm(timeout=0.5)
        """, 2, expect=None)
    assert "TimeoutError: MPIComm: rank 1 of 2: not every rank has made its own within 0.5 s" in done.err


def test_a_rank_that_ends_before_it_has_started_mpi() -> None:
    """MPI_Init of the others would wait for ever; it has ten seconds at least."""
    done = run_mpi("""
        import os, sys
        from forge_c.distributed import MPIComm
        if os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK")) == "1":
            sys.exit(1)
        MPIComm(timeout=1.0)
        """, 2, expect=None, timeout=90)
    assert done.seconds < 60


def test_messages_move_while_a_kernel_computes() -> None:
    """By the helper thread: no rank calls the communicator until both have all of it."""
    done = run_mpi(BEGIN.format(timeout=60) + KERNEL + """
into, other = np.ones_like(x), 1 - comm.rank
compute(0.05)
comm.barrier()
pending = [comm.receive(into, other), comm.send(x, other)]
finished = lambda: all(each._finished() for each in pending)
compute(30.0, finished)
print("finished", finished(), comm.has_helper, not into.any())
comm.barrier()
""", 2)
    assert done.out.count("finished True True True") == 2, done.out


def test_without_threads_progress_is_called() -> None:
    """Where MPI refuses calls from several threads: nothing moves by itself, and all of it by progress()."""
    done = run_mpi(BEGIN.format(timeout=60) + KERNEL + """
into, other = np.ones_like(x), 1 - comm.rank
pending = [comm.receive(into, other), comm.send(x, other)]
finished = lambda: all(each._finished() for each in pending)
compute(0.2)
before = finished()
compute(30.0, lambda: comm.progress() or finished())
print("finished", before, finished(), comm.has_helper)
comm.barrier()
""", 2, MPI4PY_RC_THREAD_LEVEL="single")
    assert done.out.count("finished False True False") == 2, done.out


def test_who_waits_does_not_spin() -> None:
    """Nor does the helper, with a receive that nobody answers; a fifth of a core is far above what they take."""
    done = run_mpi(BEGIN.format(timeout=60) + """
if comm.rank == 0:
    time.sleep(2)
    comm.send(x, 1).wait()
    comm.send(x, 1).wait()
else:
    second = np.empty_like(x)
    later = [comm.receive(x, 0), comm.receive(second, 0)]
    begin = time.process_time()
    time.sleep(1)
    print("helper", time.process_time() - begin < 0.2)
    begin = time.process_time()
    later[0].wait()
    print("waiting", time.process_time() - begin < 0.2)
    later[1].wait()
""", 2)
    assert "helper True" in done.out and "waiting True" in done.out, done.out
