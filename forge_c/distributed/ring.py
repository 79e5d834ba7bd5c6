"""Attention where every rank holds some of the tokens: keys and values travel, queries and results stay.

plan.py says who computes what when; this file runs one rank's part of it. Between two steps everything moves that can:
what came is passed on, free buffers ask for the next pieces, own keys are sent. Where a step's keys have not come it
waits for any message at all, and moves things again: a rank that only waited for its own keys might be what they wait
for.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from forge_c.checks import checked_size
from forge_c.distributed.checks import check_call
from forge_c.distributed.comm import Array, Bytes, Comm, Pending
from forge_c.distributed.layout import Layout
from forge_c.distributed.plan import STAGES, Pass, RankPlan, Runs, Step, Transfer, piece_keys, plan, runs_of
from forge_c.distributed.stats import Stats
from forge_c.distributed.wire import Wire, WireFormat, check_wire
from forge_c.functional import KV_CHUNK, attention, fold_attention
from forge_c.state.kv import KVCache

T = TypeVar("T")


class Traffic:
    """One rank's messages: slots for `depth` received pieces, and stages for parts of its own keys."""

    def __init__(self, comm: Comm, mine: RankPlan, wire: Wire, k: Array, v: Array, depth: int, stats: Stats) -> None:
        self.comm, self.wire, self.k, self.v, self.depth, self.stats = comm, wire, k, v, depth, stats
        self.expected = deque(step for step in mine.steps() if step.receives)
        self.sends = deque(mine.sends)
        most = max((self._bytes(step.receives) for step in self.expected), default=0)
        self.free = [np.empty(most, np.uint8) for _ in range(min(depth, len(self.expected)))]
        self.open: deque[_Arrival] = deque()
        most = max((wire.capacity(each.end - each.begin) for each in self.sends), default=0)
        self.stages = [np.empty(most, np.uint8) for _ in range(min(STAGES * depth, len(self.sends)))]
        self.staged: list[tuple[Pending, Bytes]] = []

    def advance(self) -> None:
        """Move what can move."""
        self.comm.progress()
        for arrival in self.open:
            arrival.pass_on(self)
        while self.open and self.open[0].is_over():
            self.free.append(self.open.popleft().slot)
        while self.expected and self.free:
            self.open.append(_Arrival(self, self.expected.popleft(), self.free.pop()))
        gone, self.staged = _split(self.staged, lambda each: each[0].done())
        self.stages += [stage for _, stage in gone]
        while self.sends and self.stages:
            self._send_own(self.sends.popleft(), self.stages.pop())

    def parts(self, step: Step) -> list[tuple[Transfer, Bytes]]:
        """The parts of a step that others hold, when they have come."""
        if not step.receives:
            return []
        while (arrival := self._arrival(step)) is None or arrival.coming:
            self.comm.wait_any(self._under_way())
            self.advance()
        return arrival.parts

    def computed(self, step: Step) -> None:
        """A step's keys are no more needed here."""
        for each in self.open:
            each.computed = each.computed or each.step is step

    def drain(self) -> None:
        """Wait until everything has left."""
        self.advance()
        while self.sends or self._under_way():
            self.comm.wait_any(self._under_way())
            self.advance()

    def send(self, data: Bytes, transfer: Transfer) -> Pending:
        self.stats.sent += data.size
        return self.comm.send(data, transfer.to, transfer.tag)

    def message_bytes(self, transfer: Transfer) -> int:
        return self.wire.token_bytes * (transfer.end - transfer.begin)

    def _arrival(self, step: Step) -> _Arrival | None:
        """None before there was a slot for it."""
        return next((each for each in self.open if each.step is step), None)

    def _bytes(self, transfers: list[Transfer]) -> int:
        return sum(self.wire.capacity(each.end - each.begin) for each in transfers)

    def _send_own(self, transfer: Transfer, stage: Bytes) -> None:
        data = stage[:self.message_bytes(transfer)]
        rows = slice(transfer.begin, transfer.end)
        self.wire.encode(self.k[:, rows], self.v[:, rows], data)
        self.staged.append((self.send(data, transfer), stage))

    def _under_way(self) -> list[Pending]:
        coming = [each[2] for arrival in self.open for each in arrival.coming]
        leaving = [each for arrival in self.open for each in arrival.leaving]
        return coming + leaving + [each[0] for each in self.staged]


@dataclass
class _Arrival:
    """The parts of one piece in a slot: those that come, those that came, and where those go on to."""
    traffic: Traffic
    step: Step
    slot: Bytes
    coming: list[tuple[Transfer, Bytes, Pending]] = field(default_factory=list)
    leaving: list[Pending] = field(default_factory=list)
    parts: list[tuple[Transfer, Bytes]] = field(default_factory=list)
    computed: bool = False

    def __post_init__(self) -> None:
        at, traffic = 0, self.traffic
        for transfer in self.step.receives:
            data = self.slot[at:at + traffic.message_bytes(transfer)]
            self.coming.append((transfer, data, traffic.comm.receive(data, transfer.source, transfer.tag)))
            at += traffic.wire.capacity(transfer.end - transfer.begin)
            traffic.stats.received += data.size
        traffic.stats.pieces += 1

    def pass_on(self, traffic: Traffic) -> None:
        came, self.coming = _split(self.coming, lambda each: each[2].done())
        for transfer, data, _ in came:
            self.parts.append((transfer, data))
            if transfer.onward is not None:
                self.leaving.append(traffic.send(data, transfer.onward))
        self.leaving = [each for each in self.leaving if not each.done()]

    def is_over(self) -> bool:
        return self.computed and not self.coming and not self.leaving


def _split(items: list[T], is_first: Callable[[T], bool]) -> tuple[list[T], list[T]]:
    """Those for which it is so, and the others; asked once of each: a message may be finished between two looks."""
    sides: tuple[list[T], list[T]] = [], []
    for each in items:
        sides[not is_first(each)].append(each)
    return sides


class Ring:
    """One rank's part of a call: its rows against all pieces that they see. queries: as in plan; kept: the dtype of
    a cache that the keys come from, "int8" where they are to be multiplied as its bytes are."""

    def __init__(self, comm: Comm, runs: tuple[Runs, ...], wire: Wire, depth: int, piece: int | None,
                 stats: Stats | None, q: Array, k: Array, v: Array, options: dict[str, Any],
                 sinks: Array | None, *, queries: tuple[Runs, ...] | None = None, kept: str | None = None) -> None:
        self.q, self.k, self.v, self.wire, self.runs, self.rank = q, k, v, wire, runs, comm.rank
        self.kept = kept
        self.options, self.sinks = options, sinks
        self.stats = Stats() if stats is None else stats
        keys = piece_keys(runs, wire.token_bytes) if piece is None else piece
        self.plan = plan(runs, causal=options["causal"], window=options["window"], piece=keys, depth=depth,
                         queries=queries)[comm.rank]
        self.traffic = Traffic(comm, self.plan, wire, k, v, depth, self.stats)
        rows = (queries or runs)[comm.rank]
        self.positions = np.concatenate([np.arange(0), *(np.arange(r.start, r.stop, r.step) for r in rows)])
        self.whole: tuple[Array, Array] | None = None  # a piece of several parts, in the order of its keys
        self.out = np.empty((*q.shape[:3], v.shape[3]), q.dtype)
        self.lse = np.empty(q.shape[:3], np.float32)

    def run(self) -> None:
        for each in self.plan.passes:
            rows = slice(each.begin, each.end)
            if len(each.steps) == 1 and (each.steps[0].begin, each.steps[0].end) == (each.begin, each.end):
                self._attend(each.steps[0])
            else:
                self._finish(rows, self._carry(each))
        begin = perf_counter()
        self.traffic.drain()
        self.stats.drain += perf_counter() - begin

    def _attend(self, step: Step) -> None:
        """Rows whose keys are all in one step need not carry anything."""
        rows = slice(step.begin, step.end)
        with self._step(step) as (k, v):
            _, self.lse[:, rows] = attention(self.q[:, rows], k, v, q_positions=self.positions[rows] - step.first,
                                             sinks=self.sinks, return_lse=True, out=self.out[:, rows], **self.options)

    def _carry(self, each: Pass) -> NDArray[np.float32]:
        batch, _, heads, v_dim = self.out.shape
        carried = np.zeros((batch, each.end - each.begin, heads, v_dim + 2), np.float32)
        carried[..., -2] = -np.inf
        for step in each.steps:
            rows = slice(step.begin, step.end)
            with self._step(step) as (k, v):
                fold_attention(self.q[:, rows], k, v, carried[:, step.begin - each.begin:step.end - each.begin],
                               self.positions[rows] - step.first, **self.options)
        return carried

    def _finish(self, rows: slice, carried: NDArray[np.float32]) -> None:
        lse = np.empty(carried.shape[:3], np.float32)
        k, v = self._as_kept(self.k[:, :0], self.v[:, :0])
        fold_attention(self.q[:, rows], k, v, carried, self.positions[rows], sinks=self.sinks, out=self.out[:, rows],
                       lse=lse, **self.options)
        self.lse[:, rows] = lse

    @contextmanager
    def _step(self, step: Step) -> Iterator[tuple[Array | KVCache, Array | None]]:
        """Around a step's computation: its keys and values, and the time of both."""
        begin = perf_counter()
        self.traffic.advance()
        moved = perf_counter()
        parts = self.traffic.parts(step)
        came = perf_counter()
        keys = self._as_kept(*self._keys(step, parts))
        ready = perf_counter()
        yield keys
        self.stats.compute += perf_counter() - ready
        self.stats.move += ready - came + moved - begin
        self.stats.wait += came - moved
        self.stats.pairs.append(step.pairs)
        self.traffic.computed(step)

    def _as_kept(self, k: Array, v: Array) -> tuple[Array | KVCache, Array | None]:
        """What is multiplied. The bytes and scales of a value that was a byte times a scale are those again."""
        if self.kept != "int8":
            return k, v
        cache = KVCache(k.shape[0], max(k.shape[1], 1), k.shape[2], k.shape[3], v_dim=v.shape[3], dtype="int8")
        cache.append(k, v)
        return cache, None

    def _keys(self, step: Step, parts: list[tuple[Transfer, Bytes]]) -> tuple[Array, Array]:
        """Keys and values at positions [first, last), in that order."""
        own = slice(*step.own)
        if step.own[1] - step.own[0] == step.last - step.first:
            return self._own(own)
        if len(parts) == 1 and parts[0][0].end - parts[0][0].begin == step.last - step.first:
            return self.wire.decode(parts[0][1], step.last - step.first)
        whole = self._whole(step)
        for x in whole:
            x[:, :step.seen - step.first] = 0  # a window hides them, and they may not have been sent
        known = [(self.rank, step.own[0], self._own(own))]
        known += [(t.owner, t.begin, self.wire.decode(data, t.end - t.begin)) for t, data in parts]
        for owner, begin, part in known:
            for x, y in zip(whole, part, strict=True):
                place(x, y, self.runs[owner], begin, step.first)
        return whole

    def _own(self, rows: slice) -> tuple[Array, Array]:
        k, v = self.k[:, rows], self.v[:, rows]
        return (k, v) if self.wire.format is None else self.wire.rounded(k, v)

    def _whole(self, step: Step) -> tuple[Array, Array]:
        count = step.last - step.first
        if self.whole is None or self.whole[0].shape[1] < count:
            sizes = ((each.last - each.first, each.own[1] - each.own[0]) for each in self.plan.steps())
            most = max(keys for keys, own in sizes if own < keys)
            batch, heads = self.wire.batch, self.wire.heads
            self.whole = (np.empty((batch, most, heads, self.wire.head_dim), self.wire.read),
                          np.empty((batch, most, heads, self.wire.v_dim), self.wire.read))
        return self.whole[0][:, :count], self.whole[1][:, :count]


def place(whole: Array, part: Array, runs: Runs, begin: int, first: int) -> None:
    """whole (B, n, ..), which begins at position `first`, <- rows of an owner, from its row `begin` on, at theirs."""
    count, at = part.shape[1], 0
    for run in runs:
        some = run[max(begin - at, 0):max(begin + count - at, 0)]
        if some:
            row = at + run.index(some[0]) - begin
            whole[:, some[0] - first:some[-1] - first + 1:some.step] = part[:, row:row + len(some)]
        at += len(run)


@overload
def ring_attention(q: Array, k: Array, v: Array, *, comm: Comm, layout: Layout = "zigzag", causal: bool = True,
                   window: int | None = None, scale: float | None = None, softcap: float | None = None,
                   sinks: Array | None = None, wire: WireFormat | None = None, precision: str | None = None,
                   return_lse: Literal[False] = False, depth: int = 2, piece: int | None = None,
                   stats: Stats | None = None) -> Array: ...
@overload
def ring_attention(q: Array, k: Array, v: Array, *, comm: Comm, layout: Layout = "zigzag", causal: bool = True,
                   window: int | None = None, scale: float | None = None, softcap: float | None = None,
                   sinks: Array | None = None, wire: WireFormat | None = None, precision: str | None = None,
                   return_lse: Literal[True], depth: int = 2, piece: int | None = None,
                   stats: Stats | None = None) -> tuple[Array, NDArray[np.float32]]: ...


def ring_attention(q: Array, k: Array, v: Array, *, comm: Comm, layout: Layout = "zigzag", causal: bool = True,
                   window: int | None = None, scale: float | None = None, softcap: float | None = None,
                   sinks: Array | None = None, wire: WireFormat | None = None, precision: str | None = None,
                   return_lse: bool = False, depth: int = 2, piece: int | None = None,
                   stats: Stats | None = None) -> Array | tuple[Array, NDArray[np.float32]]:
    """This rank's rows of the attention over all ranks' tokens; every rank calls it.

    q (batch, tokens, heads, head_dim), k (batch, tokens, kv_heads, head_dim) and v (batch, tokens, kv_heads, v_dim) are
    this rank's: the tokens at positions(layout, S, comm), S being the sum over ranks, some of which may have none.
    RoPE, if any, is applied to them before. Options and dtypes are those of forge_c.attention, and so are the bits: the
    rows are those of attention over the whole sequence in one process, for every layout and number of ranks.

    Keys and values go from rank to rank in pieces while the ranks compute; each holds `depth` pieces that it received,
    twice as many parts of its own on their way, and for the rows at work their (max, sum, o) in float32. piece: keys a
    piece, a multiple of 256, by default 2 MB of them or less. Nothing that causal or a window hides is sent or
    computed. zigzag gives every rank the same work; striped nearly so, in smaller messages; with contiguous the last
    rank has 2 - 1/N times the mean, but behind a window much shorter than a rank's part it has the shortest messages.

    wire: the dtype of k and v on their way, which every rank computes with, the owner too: the result has the bits of
    attention over keys and values so rounded, and does not depend on the ranks either. "bfloat16": 2 bytes a number,
    relative error 2^-9 each; "int8": 1, and 4 a token and head, errors of 1/254 of the head's largest channel. With
    normally distributed heads of 64 or 128 channels the result is off by 0.25 % and 0.9 % of its size (rms).
    stats: a Stats, to which this call adds bytes and seconds.

    Raises ValueError on every rank, before data moves, if ranks differ in anything but the number of tokens or if
    those are not the layout's; RankError or TimeoutError if another rank fails.

    >>> from forge_c.distributed import SelfComm, ring_attention
    >>> q = np.zeros((1, 2, 1, 4), np.float32)
    >>> ring_attention(q, q, np.arange(8, dtype=np.float32).reshape(1, 2, 1, 4), comm=SelfComm())
    array([[[[0., 1., 2., 3.]],
    <BLANKLINE>
            [[2., 3., 4., 5.]]]], dtype=float32)
    """
    name = "ring_attention"
    with comm.guard():
        check_wire(name, wire)
        check_piece(name, piece)
        checked_size(name, "depth", depth)
        options = {"causal": causal, "window": window, "scale": scale, "softcap": softcap, "precision": precision}
        sizes, seq_len = check_call(comm, name, q, k, v, layout, sinks, options, wire=wire, depth=depth, piece=piece)
        runs = runs_of(layout, seq_len, comm.size)
        form = Wire(wire, k.dtype, sizes.batch, sizes.kv_heads, sizes.head_dim, sizes.v_dim)
        options["precision"] = form.precision(precision)
        ring = Ring(comm, runs, form, depth, piece, stats, q, k, v, options, sinks)
        ring.run()
        return (ring.out, ring.lse) if return_lse else ring.out


def check_piece(function: str, piece: int | None) -> None:
    if piece is not None and checked_size(function, "piece", piece) % KV_CHUNK:
        raise ValueError(f"{function}: piece is {piece}, expected a multiple of {KV_CHUNK}")
