"""Ranks that are processes under MPI: `mpiexec -n 4 python program.py`, by mpi4py and the MPI that it finds.

A message is a head (its size and its first bytes, which arrive in the order of the sends) and a body in segments,
posted when the head has been checked; so a message of a wrong size is an error, and no segment lands in a wrong place.

MPI moves large messages only while somebody calls it. Whoever waits does; while a rank computes, a helper thread does,
if MPI allows calls from any thread (MPI_THREAD_MULTIPLE), else progress() must be called between pieces of work.
Neither spins: where nothing has come for t seconds, the next look is t / 4 later, at most 2 ms. A segment is so small
that those of a slow link too come often enough for the next look to be in time: with all in one, 10 Gbit/s became 1.

A process that ends says so, and a rank that waits for it raises. MPI_Finalize would wait for every process: one whose
communicator broke, or whose program ended in an error, lets the others raise theirs and then aborts them all.
"""
from __future__ import annotations

import atexit
import faulthandler
import os
import signal
import sys
import threading
import time
from abc import abstractmethod
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from forge_c.distributed.comm import CONTEXT_SHIFT, DEFAULT_TIMEOUT, Bytes, Comm, Pending, RankError

if TYPE_CHECKING:
    from mpi4py import MPI as MPITypes

_HEAD = 8 << 10      # payload bytes that travel with the size
_SEGMENT = 256 << 10
_NEWS_BYTES = 2048
_NEWS_TAG = (1 << 15) + 1
_HOT = 100e-6        # so long after something came, look again without sleeping
_LONGEST_SLEEP = 2e-3
_HELPER_DELAY = 5e-4  # who waits at once moves the message itself, and is not to share the GIL meanwhile
_LEAST_START = 10.0  # seconds that MPI has to start on a busy machine
_GRACE = 2.0         # between the news that a rank has gone and giving up what it may have sent before

FAILED, ENDED = 0, 1


class MPIComm(Comm):
    """This process among those of an mpi4py communicator (COMM_WORLD); every process of it calls MPIComm(),
    first of all: the others wait timeout seconds for it.

    Raises ImportError if mpi4py or an MPI library is missing, TimeoutError if other ranks do not make theirs within
    timeout seconds, ValueError if they run another version of forge_c.
    """

    def __init__(self, comm: MPITypes.Intracomm | None = None, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        from forge_c.version import __version__

        self._mpi = mpi = _import_mpi(timeout)
        comm = mpi.COMM_WORLD if comm is None else comm
        super().__init__(comm.rank, comm.size, timeout)
        self._broken: str | None = None
        self._requests: list[Any] = []
        _watch_exit(self)
        self._heads, self._bodies = self._duplicate(comm), self._duplicate(comm)
        self._lock = threading.RLock()
        self._ended: dict[int, float] = {}
        self._told: list[_Send] = []
        self._last = 0.0
        self._waits = False
        self._awaiting: dict[tuple[int, int], deque[_Receive]] = defaultdict(deque)
        # What Testsome looks at, and beside each request whose it is; news of every rank are always awaited
        # (from each: of MPI_ANY_SOURCE, MPICH over TCP let some lie).
        self._owners: list[_MPIPending] = []
        for rank in self._others():
            self._await_news(_News(self, np.empty(_NEWS_BYTES, np.uint8), rank, _NEWS_TAG))
        self._max_contexts = (comm.Get_attr(mpi.TAG_UB) or 0) >> CONTEXT_SHIFT
        self._helper = _Helper(self) if mpi.Query_thread() >= mpi.THREAD_MULTIPLE and self.size > 1 else None
        self.agree("MPIComm: version of forge_c", __version__)

    @property
    def has_helper(self) -> bool:
        """Whether a thread moves messages while this rank computes; else call progress() between pieces of work."""
        return self._helper is not None

    def progress(self) -> None:
        """Move what is under way."""
        self._advance()

    def wait_any(self, pending: Sequence[Pending], timeout: float | None = None) -> None:
        messages = [each for each in pending if isinstance(each, _MPIPending)]
        timeout = self.timeout if timeout is None else timeout
        begin = last = time.monotonic()
        with self.guard():
            self._waits = True  # the helper lets this thread do the work
            try:
                while messages and not any(each._finished() for each in messages):
                    if self._advance():
                        last = time.monotonic()
                        continue
                    for each in messages:
                        if not each._finished():  # by the helper, meanwhile
                            self._check_others(each)
                    now = time.monotonic()
                    if now - begin > timeout:
                        first = messages[0]
                        raise TimeoutError(f"rank {self.rank} {first.what()}: nothing from rank {first.peer} "
                                           f"within {timeout:g} s")
                    _pause(now - last)
            finally:
                self._waits = False

    def _duplicate(self, comm: MPITypes.Intracomm) -> Any:
        """A communicator of our own, within the timeout."""
        duplicate, request = comm.Idup()
        begin = time.monotonic()
        self._broken = f"rank {self.rank} failed: not every rank has made its MPIComm"
        while not request.Test():
            idle = time.monotonic() - begin
            if idle > self.timeout:
                raise TimeoutError(f"MPIComm: rank {self.rank} of {self.size}: not every rank has made its own within "
                                   f"{self.timeout:g} s")
            _pause(idle)
        self._broken = None
        return duplicate

    def _start_send(self, data: Bytes, to: int, tag: int) -> Pending:
        pending = _Send(self, data, to, tag)
        with self._lock:
            self._post(pending, self._heads.Isend([pending.head, self._mpi.BYTE], to, tag))
            for part in _segments(data):
                self._post(pending, self._bodies.Isend([part, self._mpi.BYTE], to, tag))
        return self._begun(pending)

    def _start_receive(self, into: Bytes, source: int, tag: int) -> Pending:
        pending = _Receive(self, into, source, tag)
        with self._lock:
            self._awaiting[source, tag].append(pending)
            self._post(pending, self._heads.Irecv([pending.head, self._mpi.BYTE], source, tag))
        return self._begun(pending)

    def _begun(self, pending: _MPIPending) -> Pending:
        if self._helper is not None:
            self._helper.work.set()
        return pending

    def _post(self, pending: _MPIPending, request: Any) -> None:
        pending.open += 1
        self._requests.append(request)
        self._owners.append(pending)

    def _advance(self) -> bool:
        """Let MPI work, and take what is finished; whether anything was."""
        with self._lock:
            try:
                finished = self._mpi.Request.Testsome(self._requests)
            except self._mpi.Exception as error:
                self._broken = self._broken or f"rank {self.rank} failed: MPI: {error}"
                return False
            if not finished:
                return False
            owners = [self._owners[i] for i in sorted(finished)]
            gone = set(finished)
            kept = [i for i in range(len(self._requests)) if i not in gone]
            self._requests = [self._requests[i] for i in kept]
            self._owners = [self._owners[i] for i in kept]
            for owner in owners:
                owner.open -= 1
                owner.finish_one()
            self._last = time.monotonic()
            return True

    def _take_head(self, pending: _Receive) -> None:
        """A head has come: post the bodies of those at the front, in the order of the sends."""
        pending.arrived = True
        queue = self._awaiting[pending.peer, pending.tag]
        while queue and queue[0].arrived:
            first = queue.popleft()
            if first.accepts_head():
                for part in _segments(first.data):
                    self._post(first, self._bodies.Irecv([part, self._mpi.BYTE], first.peer, first.tag))
            first.waits_for_head = False

    def _await_news(self, news: _News) -> None:
        self._post(news, self._heads.Irecv([news.data, self._mpi.BYTE], news.peer, _NEWS_TAG))

    def _take_news(self, news: _News) -> None:
        size, rank, kind = news.data[:24].view(np.int64).tolist()
        if kind == ENDED:
            self._ended[rank] = time.monotonic()
        elif self._broken is None:
            self._broken = news.data[24:24 + size].tobytes().decode("utf-8", "replace")
        self._await_news(news)

    def _failure(self) -> str | None:
        return self._broken

    def _tell(self, error: str | None) -> None:
        with self._lock:
            if error is not None:
                error = self._broken = f"rank {self.rank} failed: {error}"
            text = (error or "").encode()[:_NEWS_BYTES - 24]
            kind = ENDED if error is None else FAILED
            news = np.concatenate([np.array([len(text), self.rank, kind], np.int64).view(np.uint8),
                                   np.frombuffer(text, np.uint8)])
            pending = _Send(self, news, 0, _NEWS_TAG)
            self._told.append(pending)
            for rank in self._others():
                self._post(pending, self._heads.Isend([news, self._mpi.BYTE], rank, _NEWS_TAG))

    def _check_others(self, pending: _MPIPending) -> None:
        if self._broken is not None:
            raise RankError(self._broken)
        ended = self._ended.get(pending.peer)
        if ended is not None and time.monotonic() - max(ended, self._last) > _GRACE:
            raise RankError(f"rank {pending.peer} has ended; rank {self.rank} still {pending.what()}")

    def _leave(self, failed: bool) -> None:
        """At the end of the process: say so, and see the others end before MPI_Finalize, which would spin and hang."""
        if not self._requests:
            raise RankError("not every rank has made its MPIComm")
        if self._helper is not None:
            self._helper.stop()
        self._tell(None)
        if self._see_others_end(failed):
            raise RankError("a rank failed")
        for request, owner in zip(self._requests, self._owners, strict=True):
            if isinstance(owner, _News):
                request.Cancel()
                request.Wait()

    def _see_others_end(self, failed: bool) -> bool:
        """Wait until every rank has said that it ends and this one's news have left, a failed one not for long;
        whether any failed."""
        begin = time.monotonic()
        while len(self._ended) < self.size - 1 or any(each.open for each in self._told):
            if self._broken is not None and not failed:
                failed, begin = True, time.monotonic()
            if failed and time.monotonic() - begin > _GRACE:
                break
            if not self._advance():
                _pause(time.monotonic() - begin)
        return failed or self._broken is not None


class _MPIPending(Pending):
    """A message under way: open counts its requests."""

    def __init__(self, comm: MPIComm, data: Bytes, peer: int, tag: int) -> None:
        self.comm, self.data, self.peer, self.tag = comm, data, peer, tag
        self.open = 0
        self.waits_for_head = False
        self.error: str | None = None

    @abstractmethod
    def what(self) -> str:
        """What this rank does of the message, for errors."""

    def finish_one(self) -> None:
        """One of its requests is finished."""

    def done(self) -> bool:
        if not self._finished():
            self.comm._advance()
        return self._finished()

    def wait(self, timeout: float | None = None) -> None:
        if not self._finished():
            self.comm.wait_any([self], timeout)

    def _finished(self) -> bool:
        if self.error is not None:
            raise ValueError(self.error)
        return self.open == 0 and not self.waits_for_head


class _Send(_MPIPending):
    def __init__(self, comm: MPIComm, data: Bytes, peer: int, tag: int) -> None:
        super().__init__(comm, data, peer, tag)
        self.head = np.concatenate([np.array([data.size], np.int64).view(np.uint8), data[:_HEAD]])

    def what(self) -> str:
        return f"sends it {self.data.size} bytes (tag {self.tag})"


class _Receive(_MPIPending):
    def __init__(self, comm: MPIComm, data: Bytes, peer: int, tag: int) -> None:
        super().__init__(comm, data, peer, tag)
        self.head = np.empty(8 + _HEAD, np.uint8)
        self.arrived = False
        self.waits_for_head = True

    def what(self) -> str:
        return f"awaits {self.data.size} bytes (tag {self.tag})"

    def finish_one(self) -> None:
        if not self.arrived:
            self.comm._take_head(self)

    def accepts_head(self) -> bool:
        """Copy what came with the size, if that is the size expected."""
        sent = int(self.head[:8].view(np.int64)[0])
        if sent != self.data.size:
            self.error = (f"rank {self.peer} sent {sent} bytes to rank {self.comm.rank} (tag {self.tag}), "
                          f"which expected {self.data.size}")
            return False
        first = self.data[:_HEAD]
        first[:] = self.head[8:8 + first.size]
        return True


class _News(_MPIPending):
    """That a rank has failed, or ended."""

    def what(self) -> str:
        return "awaits its news"

    def finish_one(self) -> None:
        self.comm._take_news(self)


class _Helper:
    """The thread that lets MPI work while this rank computes."""

    def __init__(self, comm: MPIComm) -> None:
        self.comm = comm
        self.work = threading.Event()
        self.ends = False
        self.thread = threading.Thread(target=self._run, name="forge_c-mpi", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.ends = True
        self.work.set()
        self.thread.join()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # nobody would see it here: whoever waits raises it
            self.comm._broken = self.comm._broken or f"rank {self.comm.rank} failed: {type(error).__name__}: {error}"

    def _work(self) -> None:
        comm = self.comm
        while not self.ends:
            self.work.wait()
            self.work.clear()
            time.sleep(_HELPER_DELAY)
            last = time.monotonic()
            while not self.ends and comm._broken is None and len(comm._requests) >= comm.size:
                if comm._waits:
                    time.sleep(_LONGEST_SLEEP)
                    last = time.monotonic()
                elif comm._advance():
                    last = time.monotonic()
                else:
                    _pause(time.monotonic() - last)


def _segments(data: Bytes) -> list[Bytes]:
    """What of a message follows its head."""
    return [data[i:i + _SEGMENT] for i in range(_HEAD, data.size, _SEGMENT)]


def _pause(idle: float) -> None:
    """Between two looks, where nothing has come for idle seconds."""
    if idle < _HOT:
        os.sched_yield()
    else:
        time.sleep(min(idle / 4, _LONGEST_SLEEP))


def _import_mpi(timeout: float) -> Any:
    """mpi4py.MPI, which starts MPI unless the program has."""
    try:
        with _ends_after(max(timeout, _LEAST_START)):
            from mpi4py import MPI  # which asks for MPI_THREAD_MULTIPLE, unless mpi4py.rc says otherwise
    except (ImportError, RuntimeError) as error:
        raise ImportError("MPIComm needs mpi4py and an MPI library: pip install forge_c[mpi], or mpi4py and the MPI of "
                          f"this machine ({error})") from error
    return MPI


@contextmanager
def _ends_after(timeout: float) -> Iterator[None]:
    """End this process, with a traceback, if the block takes longer: MPI_Init waits without end, and without letting
    Python run, for a rank that ended before its own."""
    try:
        faulthandler.dump_traceback_later(timeout, exit=True, file=sys.__stderr__ or sys.stderr)
    except (AttributeError, OSError, RuntimeError, ValueError):  # no file to write to
        yield
        return
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


_live: list[MPIComm] = []
_uncaught = False


def _watch_exit(comm: MPIComm) -> None:
    """See to it that the end of this process, good or bad, is known to the others."""
    if not _live:
        previous = sys.excepthook

        def on_uncaught(kind: Any, error: Any, trace: Any) -> None:
            global _uncaught
            _uncaught = True
            for each in _live:
                each.fail(error)
            previous(kind, error, trace)

        sys.excepthook = on_uncaught
        atexit.register(_at_exit)
    _live.append(comm)


def _at_exit() -> None:
    failed = _uncaught or any(comm._broken is not None for comm in _live)
    for comm in _live:
        if comm.size > 1 and not comm._mpi.Is_finalized():
            try:
                comm._leave(failed)
            except BaseException:  # Ctrl-C too
                _abort(comm._mpi)


def _abort(mpi: Any) -> None:
    """End every process of MPI, and this one even where MPI_Abort does not return."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(3)
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(0.2)  # until mpiexec has passed that on: it stops when all are ended
    mpi.COMM_WORLD.Abort(1)
    os._exit(1)
