"""Communicators of threads and of one process, and the layouts: what they do, and how they fail."""
from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from child import run_script
from rank_checks import CHECKS
from ranks import run_threads, run_threads_to_the_end

from forge_c.distributed import Comm, RankError, SelfComm, ThreadComm, positions
from forge_c.distributed.layout import LAYOUTS, length_of, positions_of


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("n", range(1, 9))
def test_threads(n: int, check: Callable[[Comm], None]) -> None:
    run_threads(check, n)


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_one_process(check: Callable[[Comm], None]) -> None:
    check(SelfComm())


# Layouts

@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_are_a_partition(layout: str) -> None:
    for size in (1, 2, 3, 4, 7, 16):
        for length in (0, 1, size - 1, size, 2 * size - 1, 2 * size, 5 * size + 3, 1000):
            parts = [positions_of(layout, length, size, rank) for rank in range(size)]
            assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(length)), (size, length)
            lengths = [len(p) for p in parts]
            assert max(lengths) - min(lengths) <= 1 and lengths == [length_of(layout, length, size, r)
                                                                    for r in range(size)]
            assert all((np.diff(p) > 0).all() and p.dtype == np.int64 for p in parts)


def test_positions_of_the_layouts() -> None:
    def of(layout: str, length: int) -> list[list[int]]:
        return [positions_of(layout, length, 2, rank).tolist() for rank in range(2)]

    assert of("contiguous", 5) == [[0, 1, 2], [3, 4]]
    assert of("striped", 5) == [[0, 2, 4], [1, 3]]
    assert of("zigzag", 8) == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert of("zigzag", 3) == [[0], [1, 2]]


def test_positions_are_this_ranks() -> None:
    for rank, mine in enumerate(run_threads(lambda comm: positions("zigzag", 11, comm), 3)):
        assert np.array_equal(mine, positions_of("zigzag", 11, 3, rank))


# Failures

def wait_for_all(comm: Comm) -> None:
    comm.barrier()


def check_others(n: int, bad: int, deed: Callable[[Comm], object], words: str, kind: type = RankError,
                 timeout: float = 60.0, within: float = 30.0) -> BaseException:
    """Rank bad does something else than the others, who wait for all: what they raise, and what it raised itself."""
    begin = time.monotonic()
    comms = ThreadComm(n, timeout=timeout)
    _, errors = run_threads_to_the_end(lambda comm: deed(comm) if comm.rank == bad else wait_for_all(comm), n,
                                       comms=comms)
    assert time.monotonic() - begin < within
    for rank in set(range(n)) - {bad}:
        assert isinstance(errors[rank], (kind, RankError)), errors
    assert any(isinstance(e, kind) for r, e in enumerate(errors) if r != bad)
    assert any(words in str(e) for r, e in enumerate(errors) if r != bad), errors
    return errors[bad]


def raises(error: BaseException) -> Callable[[Comm], None]:
    def deed(comm: Comm) -> None:
        raise error
    return deed


@pytest.mark.parametrize("n", (2, 3, 8))
def test_a_rank_that_raises_ends_all(n: int) -> None:
    check_others(n, n - 1, raises(KeyError("lost")), f"rank {n - 1} failed: KeyError: 'lost'")
    check_others(n, 0, raises(KeyboardInterrupt()), "rank 0 failed: KeyboardInterrupt")


@pytest.mark.parametrize("n", (2, 3, 8))
def test_a_rank_that_is_gone_is_not_awaited(n: int) -> None:
    check_others(n, 0, lambda comm: None, "rank 0 has ended")


def test_a_rank_that_hangs_is_awaited_for_the_timeout() -> None:
    over = threading.Event()

    def run(comm: Comm) -> None:
        try:
            over.wait(30.0) if comm.rank == 1 else wait_for_all(comm)
        finally:
            over.set()

    begin = time.monotonic()
    _, errors = run_threads_to_the_end(run, 3, timeout=0.3, patience=60.0)
    assert 0.3 <= time.monotonic() - begin < 30.0
    assert all(isinstance(errors[rank], TimeoutError | RankError) for rank in (0, 2)), errors
    assert any(isinstance(errors[rank], TimeoutError) for rank in (0, 2)), errors
    assert any("nothing from rank 1 within 0.3 s" in str(errors[rank]) for rank in (0, 2)), errors


def test_the_timeout_can_be_set() -> None:
    a, _ = ThreadComm(2)
    assert a.timeout == SelfComm().timeout == 60.0
    a.timeout = 0.05
    with pytest.raises(TimeoutError, match="rank 0 awaits 8 bytes .tag 4.: nothing from rank 1 within 0.05 s"):
        a.receive(np.zeros(1), 1, 4).wait()
    with pytest.raises(TimeoutError, match="within 0.01 s"):
        ThreadComm(2)[0].send(np.zeros(1), 1).wait(timeout=0.01)


def test_another_size_is_an_error_that_names_both() -> None:
    def run(comm: Comm) -> None:
        if comm.rank == 0:
            comm.send(np.zeros(3, np.uint8), 1, 7).wait()
        else:
            comm.receive(np.zeros(4, np.uint8), 0, 7).wait()

    _, errors = run_threads_to_the_end(run, 2)
    for error in errors:
        assert "rank 0 sent 3 bytes to rank 1 (tag 7), which expected 4" in str(error)


def test_a_wrong_argument_on_one_rank_ends_all() -> None:
    """The others are inside the collective."""
    error = check_others(3, 1, lambda comm: comm.all_gather_arrays(np.zeros(1), [np.zeros(1)]),
                         "rank 1 failed: ValueError: all_to_all: receive must hold one array")
    assert isinstance(error, ValueError)


def test_a_broken_communicator_stays_broken() -> None:
    """For the splits of it too, and whoever calls fail(): the main thread at Ctrl-C, say."""
    comms = ThreadComm(2)
    halves = run_threads(lambda comm: comm.split(comm.rank), 2, comms=[*comms])
    comms[0].fail(KeyboardInterrupt())
    for comm in (*comms, *halves):
        for call in (lambda c=comm: c.barrier(), lambda c=comm: c.agree("x", 1), lambda c=comm: c.split(0),
                     lambda c=comm: c.all_reduce(np.zeros(3)), lambda c=comm: c.broadcast(np.zeros(3))):
            with pytest.raises(RankError, match="rank 0 failed: KeyboardInterrupt"):
                call()


# The simulated link

def test_ctrl_c_in_a_main_thread_that_is_no_rank() -> None:
    """fail() reaches ranks that wait for a message, and the pool's end need not wait for the timeout."""
    begin = time.monotonic()
    out = run_script("""
        import os, signal, threading
        from concurrent.futures import ThreadPoolExecutor
        import numpy as np
        from forge_c.distributed import ThreadComm

        begun = threading.Barrier(3)

        def wait(comm):
            begun.wait()
            comm.receive(np.empty(1), 1 - comm.rank).wait()

        comms = ThreadComm(2)
        with ThreadPoolExecutor(2) as pool:
            ranks = [pool.submit(wait, comm) for comm in comms]
            try:
                begun.wait()
                threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
                ranks[0].result()
            except KeyboardInterrupt as error:
                comms[0].fail(error)
        print([repr(rank.exception()) for rank in ranks])
        """)
    assert out.count("RankError('rank 0 failed: KeyboardInterrupt") == 2, out
    assert time.monotonic() - begin < 30


def test_a_link_takes_its_time() -> None:
    """0.1 s of latency and 0.2 s for the bytes of a message; the second goes after the first. Until then nothing is
    seen of them, and work meanwhile hides them."""
    def run(comm: Comm) -> tuple[float, ...]:
        x = np.full(20_000, comm.rank + 1, np.uint8)
        if comm.rank == 0:
            begin = time.monotonic()
            for each in [comm.send(x, 1), comm.send(x, 1)]:
                each.wait()
            return (begin,)
        into = [np.zeros_like(x), np.zeros_like(x)]
        pending = [comm.receive(each, 0) for each in into]
        pending[0].wait()
        first = time.monotonic()
        seen = into[1].any() or pending[1].done()
        looked = time.monotonic()
        pending[1].wait()
        assert (into[0] == 1).all() and (into[1] == 1).all()
        return first, seen, looked, time.monotonic()

    for _ in range(8):
        (begin,), (first, seen, looked, second) = run_threads(run, 2, latency=0.1, bandwidth=1e5)
        assert first - begin > 0.29 and second - begin > 0.49
        if looked - begin < 0.5:  # in time to see that the second had not come
            assert not seen
            return
    raise AssertionError("this thread never ran between the two messages")


def test_work_hides_a_link() -> None:
    def run(comm: Comm) -> float:
        x = np.zeros(1000, np.uint8)
        pending = [comm.send(x, 1 - comm.rank), comm.receive(np.zeros_like(x), 1 - comm.rank)]
        time.sleep(0.5)
        begin = time.monotonic()
        for each in pending:
            each.wait()
        return time.monotonic() - begin

    left = [1.0]
    while left[-1] >= 0.1 and len(left) < 8:  # a thread may get no processor meanwhile, but not each time
        left.append(max(run_threads(run, 2, latency=0.2)))
    assert left[-1] < 0.1, left


def test_links_that_cannot_be() -> None:
    for arguments in ({"n": 0}, {"n": 2, "latency": -1.0}, {"n": 2, "bandwidth": 0.0}):
        with pytest.raises(ValueError, match="^ThreadComm: "):
            ThreadComm(**arguments)


# The package

def test_import_starts_nothing() -> None:
    run_script("""
        import sys, threading
        import forge_c, forge_c.models
        assert "forge_c.distributed" not in sys.modules
        import forge_c.distributed as distributed
        assert distributed is forge_c.distributed and "mpi4py" not in sys.modules
        assert threading.active_count() == 1
        """)


def test_without_mpi4py() -> None:
    run_script("""
        import sys
        sys.modules["mpi4py"] = None
        from forge_c.distributed import MPIComm
        try:
            MPIComm()
        except ImportError as error:
            assert "pip install forge_c[mpi]" in str(error), error
        else:
            raise AssertionError("no error")
        """)
