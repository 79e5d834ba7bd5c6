"""What ranks say to each other: the interface of every communicator, its collectives, and one for a single process.

A transport (SelfComm here, ThreadComm, MPIComm) starts sends and receives and passes news of a failure on; all the rest
is built upon these here, so that every transport reduces in the same order and fails in the same way. Not here: what is
sent when, and where tokens lie (layout.py).
"""
from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Bytes = NDArray[np.uint8]

DEFAULT_TIMEOUT = 60.0
# Tags below are the caller's, this one is the collectives'; communicators that share ranks differ in the bits above.
_COLLECTIVE = 1 << 15
CONTEXT_SHIFT = 16
# Up to so many bytes all_reduce gathers whole arrays; above, every rank adds a slice.
_SMALL_REDUCE = 32 << 10
_SMALL_VALUE = 512  # bytes of a value that is gathered at once; a longer one goes after its length


class RankError(RuntimeError):
    """Another rank failed: its number and its error are in the text."""


class Disagreement(ValueError):
    """Ranks called the same function with other values; every rank raises it, and the communicator can go on."""


class Pending(ABC):
    """A send or a receive under way; its array is the communicator's until wait() returns."""

    @abstractmethod
    def done(self) -> bool:
        """Whether it is finished: at once, without waiting."""

    @abstractmethod
    def wait(self, timeout: float | None = None) -> None:
        """Return when it is finished; RankError if a rank failed, TimeoutError after timeout (the communicator's)
        seconds. Either ends the communicator."""


class Comm(ABC):
    """A rank among size ranks: SelfComm, ThreadComm, MPIComm or a split of one. For one thread at a time.

    send() and receive() return at once what is under way: .wait() ends it, .done() says whether it has ended. The other
    methods are for all ranks together, in the same order. timeout: the seconds after which waiting for another rank is
    an error. A rank that fails in any of them makes the others raise RankError, at once, and every later call too.

    As a context manager it tells the other ranks of an error that leaves the block, and at its end that this rank is
    gone, so that nobody waits for it.
    """

    def __init__(self, rank: int, size: int, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.rank, self.size = rank, size
        self.timeout = timeout
        self._contexts, self._max_contexts = 0, 1 << 15

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, size={self.size})"

    # What a transport has of its own

    @abstractmethod
    def _start_send(self, data: Bytes, to: int, tag: int) -> Pending:
        """As send, which has checked the arguments."""

    @abstractmethod
    def _start_receive(self, into: Bytes, source: int, tag: int) -> Pending:
        """As receive, which has checked the arguments."""

    @abstractmethod
    def _failure(self) -> str | None:
        """Why this communicator is broken, or None."""

    @abstractmethod
    def _tell(self, error: str | None) -> None:
        """Let the other ranks know that this one failed, or has ended (None)."""

    # Messages

    def send(self, array: Array, to: int, tag: int = 0) -> Pending:
        """Start sending array (C-contiguous, any dtype) to a rank; it must not change until wait()."""
        self._check_peer("send", "to", to, tag)
        return self._start_send(as_bytes("send", "array", array), to, tag)

    def receive(self, into: Array, source: int, tag: int = 0) -> Pending:
        """Start receiving into an array (C-contiguous, writable) what rank source sends; a message of another size is
        a ValueError. Messages of one source and tag arrive in the order of their sends."""
        self._check_peer("receive", "source", source, tag)
        return self._start_receive(as_bytes("receive", "into", into, writable=True), source, tag)

    def progress(self) -> None:  # noqa: B027 (most transports need none)
        """Move what is under way: for transports without a thread of their own, between two pieces of work."""

    def _check_peer(self, function: str, argument: str, peer: int, tag: int) -> None:
        if not 0 <= peer < self.size or peer == self.rank:
            raise ValueError(f"{function}: {argument} must be another rank of {self.size}, not {peer} "
                             f"(this is rank {self.rank})")
        if not 0 <= tag < _COLLECTIVE:
            raise ValueError(f"{function}: tag must be in [0, {_COLLECTIVE}), not {tag}")
        self._check()

    def _check(self) -> None:
        failure = self._failure()
        if failure is not None:
            raise RankError(failure)

    @abstractmethod
    def wait_any(self, pending: Sequence[Pending], timeout: float | None = None) -> None:
        """Return when one of them is finished; errors as those of Pending.wait."""

    # Failures

    def fail(self, error: BaseException) -> None:
        """Break this communicator and let every other rank raise RankError with this error's text."""
        if self._failure() is None:
            self._tell(f"{type(error).__name__}: {error}".removesuffix(": "))

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around whatever ranks do together: an error of this rank becomes a RankError on the others, at once."""
        try:
            yield
        except (RankError, Disagreement):
            raise
        except BaseException as error:
            self.fail(error)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if error is not None and not isinstance(error, RankError | Disagreement):
            self.fail(error)
        elif self._failure() is None:
            self._tell(None)

    # Collectives: every rank calls the same ones in the same order

    def all_to_all(self, send: Sequence[Array], receive: Sequence[Array]) -> None:
        """send[r] to every rank r, and receive[r] from it; sizes may differ, and be 0."""
        with self.guard():
            self._check()
            self._check_count("all_to_all", "send", send)
            self._check_count("all_to_all", "receive", receive)
            outgoing = [as_bytes("all_to_all", f"send[{r}]", a) for r, a in enumerate(send)]
            incoming = [as_bytes("all_to_all", f"receive[{r}]", a, writable=True) for r, a in enumerate(receive)]
            if outgoing[self.rank].size != incoming[self.rank].size:
                raise ValueError(f"all_to_all: send[{self.rank}] has {outgoing[self.rank].size} bytes, "
                                 f"receive[{self.rank}] has {incoming[self.rank].size}")
            pending = [self._start_receive(incoming[r], r, _COLLECTIVE) for r in self._others()]
            pending += [self._start_send(outgoing[r], r, _COLLECTIVE) for r in self._others()]
            incoming[self.rank][:] = outgoing[self.rank]
            for each in pending:
                each.wait()

    def all_gather_arrays(self, part: Array, into: Sequence[Array]) -> None:
        """into[r] becomes rank r's part; parts may differ in length, and be empty."""
        self.all_to_all([part] * self.size, into)

    def all_gather(self, value: object) -> list[Any]:
        """The small Python values of all ranks, in their order."""
        text = np.frombuffer(pickle.dumps(value), np.uint8)
        block = np.zeros(_SMALL_VALUE, np.uint8)
        block[:8] = np.array([text.size], np.int64).view(np.uint8)
        block[8:8 + text.size] = text[:_SMALL_VALUE - 8]
        blocks = self._gather_blocks(block)
        lengths = blocks[:, :8].copy().view(np.int64)[:, 0]
        if lengths.max() <= _SMALL_VALUE - 8:
            return [pickle.loads(blocks[r, 8:8 + n].tobytes()) for r, n in enumerate(lengths)]
        texts = [np.empty(n, np.uint8) for n in lengths]
        self.all_gather_arrays(text, texts)
        return [pickle.loads(each.tobytes()) for each in texts]

    def _gather_blocks(self, block: Bytes) -> Bytes:
        """(n,) of every rank -> (size, n): from each to each, since a second hop costs more than a few messages."""
        blocks = np.empty((self.size, block.size), np.uint8)
        self.all_gather_arrays(block, list(blocks))
        return blocks

    def all_reduce(self, array: Array, op: str = "sum") -> None:
        """array becomes the sum or the max over all ranks, in place: added in rank order, in array's own dtype, and so
        the same bits on every rank."""
        if op not in ("sum", "max"):
            raise ValueError(f"all_reduce: op must be 'sum' or 'max', not {op!r}")
        add = np.add if op == "sum" else np.maximum
        data = as_bytes("all_reduce", "array", array, writable=True)
        flat = array.reshape(-1)
        if self.size == 1:
            self._check()
        elif array.nbytes <= _SMALL_REDUCE:
            _fold(add, self._gather_blocks(data).view(array.dtype), flat)
        else:
            slices = np.array_split(flat, self.size)
            parts = [np.empty_like(slices[self.rank]) for _ in range(self.size)]
            self.all_to_all(slices, parts)
            mine = np.empty_like(parts[0])
            _fold(add, parts, mine)
            self.all_gather_arrays(mine, slices)

    def broadcast(self, array: Array, root: int = 0) -> None:
        """array becomes rank root's, on every rank; handed on in a tree."""
        if not 0 <= root < self.size:
            raise ValueError(f"broadcast: root must be a rank of {self.size}, not {root}")
        with self.guard():
            self._check()
            data = as_bytes("broadcast", "array", array, writable=self.rank != root)
            me = (self.rank - root) % self.size
            step = 1
            sent: list[Pending] = []
            while step < self.size:
                if me < step and me + step < self.size:
                    sent.append(self._start_send(data, (me + step + root) % self.size, _COLLECTIVE))
                elif step <= me < 2 * step:
                    self._start_receive(data, (me - step + root) % self.size, _COLLECTIVE).wait()
                step *= 2
            for each in sent:
                each.wait()

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self._gather_blocks(np.empty(0, np.uint8))

    def agree(self, what: str, value: object) -> None:
        """Every rank calls it: a ValueError on all of them, before anything else moves, if a value differs from
        rank 0's."""
        values = self.all_gather(value)
        differ = [r for r in range(self.size) if values[r] != values[0]]
        if differ:
            others = "; ".join(f"rank {r}: {values[r]!r}" for r in differ[:8]) + ("; ..." if len(differ) > 8 else "")
            raise Disagreement(f"{what}: ranks do not agree: rank 0: {values[0]!r}; {others}")

    def split(self, color: int) -> Comm:
        """The communicator of the ranks that give this color, in the order of their ranks here; every rank calls it.
        A failure in one is a failure in all."""
        root = self._root()
        said = self.all_gather((color, root._contexts))
        context = root._contexts = 1 + max(used for _, used in said)
        if context >= root._max_contexts:
            raise Disagreement(f"split: this transport has tags for {root._max_contexts - 1} splits, and all are taken")
        return SubComm(self, [r for r in range(self.size) if said[r][0] == color], context)

    def _root(self) -> Comm:
        return self

    def _others(self) -> list[int]:
        """The other ranks, each rank beginning with its next, so that not all send to one."""
        return [(self.rank + i) % self.size for i in range(1, self.size)]

    def _check_count(self, function: str, argument: str, arrays: Sequence[Array]) -> None:
        if len(arrays) != self.size:
            raise ValueError(f"{function}: {argument} must hold one array for each of {self.size} ranks, "
                             f"not {len(arrays)}")


class SubComm(Comm):
    """Some ranks of another communicator, by another number; what it sends, the other carries."""

    def __init__(self, parent: Comm, ranks: Sequence[int], context: int) -> None:
        self._parent, self._ranks, self._context = parent, list(ranks), context << CONTEXT_SHIFT
        super().__init__(self._ranks.index(parent.rank), len(ranks), parent.timeout)

    @property
    def timeout(self) -> float:  # type: ignore[override]
        return self._parent.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._parent.timeout = seconds

    def _start_send(self, data: Bytes, to: int, tag: int) -> Pending:
        return self._root()._start_send(data, self._root_rank(to), self._context | tag)

    def _start_receive(self, into: Bytes, source: int, tag: int) -> Pending:
        return self._root()._start_receive(into, self._root_rank(source), self._context | tag)

    def _failure(self) -> str | None:
        return self._parent._failure()

    def _tell(self, error: str | None) -> None:
        if error is not None:
            self._parent._tell(error)

    def progress(self) -> None:
        self._parent.progress()

    def wait_any(self, pending: Sequence[Pending], timeout: float | None = None) -> None:
        self._parent.wait_any(pending, timeout)

    def _root(self) -> Comm:
        return self._parent._root()

    def _root_rank(self, rank: int) -> int:
        rank = self._ranks[rank]
        return self._parent._root_rank(rank) if isinstance(self._parent, SubComm) else rank


class SelfComm(Comm):
    """The communicator of a process alone: rank 0 of 1, where every collective is a copy.

    >>> import numpy as np
    >>> from forge_c.distributed import SelfComm
    >>> comm = SelfComm()
    >>> comm.rank, comm.size, comm.all_gather("here")
    (0, 1, ['here'])
    """

    def __init__(self, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        super().__init__(0, 1, timeout)

    def _start_send(self, data: Bytes, to: int, tag: int) -> Pending:
        raise ValueError(f"SelfComm: there is no rank {to} to send to")

    def _start_receive(self, into: Bytes, source: int, tag: int) -> Pending:
        raise ValueError(f"SelfComm: there is no rank {source} to receive from")

    def wait_any(self, pending: Sequence[Pending], timeout: float | None = None) -> None:
        """At once: nothing is ever under way."""

    def _failure(self) -> str | None:
        return None

    def _tell(self, error: str | None) -> None:
        """There is nobody to tell."""


def as_bytes(function: str, argument: str, array: Array, *, writable: bool = False) -> Bytes:
    """The bytes of a C-contiguous array, which stay its own memory; bfloat16 has no buffer, but bytes have."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{function}: {argument} must be an array, not {type(array).__name__}")
    if array.dtype.hasobject:
        raise TypeError(f"{function}: {argument} has dtype {array.dtype}, which cannot be sent")
    if not array.flags.c_contiguous:
        raise ValueError(f"{function}: {argument} must be C-contiguous, not of strides {array.strides}")
    if writable and not array.flags.writeable:
        raise ValueError(f"{function}: {argument} must be writable")
    return array.reshape(-1).view(np.uint8)


def _fold(add: np.ufunc, parts: Sequence[Array] | Array, out: Array) -> None:
    """out = parts[0] + parts[1] + ..., from the left; out is none of them."""
    out[:] = parts[0]
    for part in parts[1:]:
        add(out, part, out=out)
