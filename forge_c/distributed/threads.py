"""Ranks that are threads of one process: for tests and notebooks, where kernels release the GIL.

A message is copied once, from the sender's array into the receiver's, when both have asked for it; a send is finished
when the receiver has it, as a large one of MPI is: what relies on more deadlocks here first. The copy comes when the
simulated link would have ended it, so that whoever reads too early, or writes too early, finds wrong bytes.
"""
from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Condition, Lock

from forge_c.distributed.comm import DEFAULT_TIMEOUT, Bytes, Comm, Pending, RankError


def ThreadComm(n: int, *, latency: float = 0.0, bandwidth: float | None = None,
               timeout: float = DEFAULT_TIMEOUT) -> list[Comm]:
    """n communicators, each for a thread of its own. latency (seconds a message) and bandwidth (bytes a second out of,
    and into, each rank) simulate a link; without them a message takes as long as its copy.

    Ctrl-C is raised in the main thread alone. If that is a rank whose block `with comm` the error leaves, the others
    hear of it; if it is none, it must tell them before it waits for their threads, as a pool does at its end:
    `except KeyboardInterrupt as error: comms[0].fail(error)`. Else they go on until they are finished.

    >>> import numpy as np
    >>> from concurrent.futures import ThreadPoolExecutor
    >>> from forge_c.distributed import ThreadComm
    >>> def total(comm):
    ...     x = np.full(2, comm.rank + 1.0)
    ...     comm.all_reduce(x)
    ...     return x.tolist()
    >>> with ThreadPoolExecutor(3) as pool:
    ...     list(pool.map(total, ThreadComm(3)))
    [[6.0, 6.0], [6.0, 6.0], [6.0, 6.0]]
    """
    if n < 1:
        raise ValueError(f"ThreadComm: n must be at least 1, not {n}")
    if latency < 0 or (bandwidth is not None and bandwidth <= 0):
        raise ValueError(f"ThreadComm: latency must not be negative, bandwidth positive; not {latency}, {bandwidth}")
    group = _Group(n, latency, bandwidth)
    return [_ThreadComm(group, rank, timeout) for rank in range(n)]


@dataclass
class _Transfer:
    """A send and the receive that it met."""
    source: Bytes
    into: Bytes
    ends: float
    claimed: bool = False
    done: bool = False


class _Group:
    """What the ranks share: all of it under one lock, but the copies."""

    def __init__(self, n: int, latency: float, bandwidth: float | None) -> None:
        self.lock = Lock()
        self.news = [Condition(self.lock) for _ in range(n)]
        self.latency, self.bandwidth = latency, bandwidth
        self.out_free, self.in_free = [0.0] * n, [0.0] * n
        self.sends: dict[tuple[int, int, int], deque[_ThreadPending]] = defaultdict(deque)
        self.receives: dict[tuple[int, int, int], deque[_ThreadPending]] = defaultdict(deque)
        self.failure: str | None = None
        self.ended: set[int] = set()

    def match(self, key: tuple[int, int, int]) -> None:
        """Let the first send and the first receive of (source, to, tag) meet. Called with the lock."""
        sends, receives = self.sends[key], self.receives[key]
        if not (sends and receives):
            return
        send, receive = sends.popleft(), receives.popleft()
        if send.data.size != receive.data.size:
            send.error = receive.error = (f"rank {key[0]} sent {send.data.size} bytes to rank {key[1]} (tag {key[2]}), "
                                          f"which expected {receive.data.size}")
        else:
            ends = self.link(key[0], key[1], send.data.size)
            send.transfer = receive.transfer = _Transfer(send.data, receive.data, ends)
        self.news[key[0]].notify_all()
        self.news[key[1]].notify_all()

    def link(self, source: int, to: int, nbytes: int) -> float:
        """When a message that begins now has arrived; a rank sends, and receives, one after the other."""
        if not self.latency and self.bandwidth is None:
            return 0.0
        begin = max(time.monotonic(), self.out_free[source], self.in_free[to])
        free = begin + (nbytes / self.bandwidth if self.bandwidth else 0.0)
        self.out_free[source] = self.in_free[to] = free
        return free + self.latency

    def wake_all(self) -> None:
        for each in self.news:
            each.notify_all()


class _ThreadPending(Pending):
    def __init__(self, comm: _ThreadComm, data: Bytes, peer: int, key: tuple[int, int, int]) -> None:
        self.comm, self.data, self.peer, self.key = comm, data, peer, key
        self.transfer: _Transfer | None = None
        self.error: str | None = None

    def done(self) -> bool:
        with self.comm.group.lock:
            return self._advance()

    def wait(self, timeout: float | None = None) -> None:
        if self.transfer is None or not self.transfer.done:
            self.comm.wait_any([self], timeout)

    def _advance(self) -> bool:
        """Copy if it is time, and say whether that is done. Called with the lock, which the copy lets go."""
        if self.error is not None:
            raise ValueError(self.error)
        transfer = self.transfer
        if transfer is None or transfer.done:
            return transfer is not None
        if transfer.claimed or time.monotonic() < transfer.ends:
            return False
        transfer.claimed = True
        group = self.comm.group
        group.lock.release()
        try:
            transfer.into[:] = transfer.source
        finally:
            group.lock.acquire()
        transfer.done = True
        group.news[self.key[0]].notify_all()
        group.news[self.key[1]].notify_all()
        return True

    def _check_others(self) -> None:
        if self.comm.group.failure is not None:
            raise RankError(self.comm.group.failure)
        if self.transfer is None and self.peer in self.comm.group.ended:
            raise RankError(f"rank {self.peer} has ended; rank {self.comm.rank} still {self._what()}")

    def _what(self) -> str:
        verb = "sends it" if self.key[0] == self.comm.rank else "awaits"
        return f"{verb} {self.data.size} bytes (tag {self.key[2]})"

    def _late(self, timeout: float) -> str:
        return f"rank {self.comm.rank} {self._what()}: nothing from rank {self.peer} within {timeout:g} s"


class _ThreadComm(Comm):
    def __init__(self, group: _Group, rank: int, timeout: float) -> None:
        super().__init__(rank, len(group.news), timeout)
        self.group = group

    def __repr__(self) -> str:
        return f"ThreadComm(rank={self.rank}, size={self.size})"

    def wait_any(self, pending: Sequence[Pending], timeout: float | None = None) -> None:
        messages = [each for each in pending if isinstance(each, _ThreadPending)]
        timeout = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        with self.guard(), self.group.lock:
            while messages and not any(each._advance() for each in messages):
                for each in messages:
                    each._check_others()
                now = time.monotonic()
                if now >= deadline:
                    raise TimeoutError(messages[0]._late(timeout))
                ends = [each.transfer.ends for each in messages if each.transfer and each.transfer.ends > now]
                self.group.news[self.rank].wait(min([*ends, deadline]) - now)

    def _start_send(self, data: Bytes, to: int, tag: int) -> Pending:
        return self._start(self.group.sends, data, to, (self.rank, to, tag))

    def _start_receive(self, into: Bytes, source: int, tag: int) -> Pending:
        return self._start(self.group.receives, into, source, (source, self.rank, tag))

    def _start(self, queue: dict[tuple[int, int, int], deque[_ThreadPending]], data: Bytes, peer: int,
               key: tuple[int, int, int]) -> Pending:
        pending = _ThreadPending(self, data, peer, key)
        with self.group.lock:
            queue[key].append(pending)
            self.group.match(key)
        return pending

    def _failure(self) -> str | None:
        return self.group.failure

    def _tell(self, error: str | None) -> None:
        with self.group.lock:
            if error is None:
                self.group.ended.add(self.rank)
            elif self.group.failure is None:
                self.group.failure = f"rank {self.rank} failed: {error}"
            self.group.wake_all()
