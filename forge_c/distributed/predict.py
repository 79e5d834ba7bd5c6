"""How long a plan takes, by the clock of a model: ranks that compute pairs at one speed, links of one bandwidth.

The rules are those by which ring.py moves messages: between two steps, and while a rank waits. A rank sends, and
receives, one message after the other.
"""
from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush

from forge_c.distributed.plan import STAGES, RankPlan, Step, Transfer


@dataclass
class Prediction:
    """Of each rank: when it has computed all, seconds that it waited for keys, and bytes that it sent."""
    finish: list[float]
    wait: list[float]
    sent: list[int]


@dataclass
class _Link:
    """A message: when each side has asked for it, and when it has come."""
    asked: list[float] = field(default_factory=list)
    ends: float | None = None


@dataclass
class _Rank:
    steps: deque[Step]
    expected: deque[Step]
    sends: deque[Transfer]
    slots: int
    stages: int
    open: list[tuple[Step, list[Transfer], list[Transfer]]] = field(default_factory=list)  # coming, leaving
    staged: list[Transfer] = field(default_factory=list)
    computed: set[int] = field(default_factory=set)
    busy: float = 0.0
    since: float = 0.0  # it is ready for its next step


def predict(ranks: tuple[RankPlan, ...], *, token_bytes: int, pair_seconds: float, bandwidth: float = float("inf"),
            latency: float = 0.0, depth: int = 2) -> Prediction:
    """What a plan takes, for all pairs of a call at pair_seconds each (all heads). RuntimeError if it would never end.

    >>> from forge_c.distributed.plan import plan, runs_of
    >>> ranks = plan(runs_of("zigzag", 8192, 4), causal=True, window=None, piece=256)
    >>> [round(each, 2) for each in predict(ranks, token_bytes=1024, pair_seconds=1e-6, bandwidth=1e9).finish]
    [8.39, 8.39, 8.39, 8.39]
    """
    return _Clock(ranks, token_bytes, pair_seconds, bandwidth, latency, depth).run()


class _Clock:
    def __init__(self, ranks: tuple[RankPlan, ...], token_bytes: int, pair_seconds: float, bandwidth: float,
                 latency: float, depth: int) -> None:
        self.token_bytes, self.pair_seconds, self.bandwidth, self.latency = (token_bytes, pair_seconds, bandwidth,
                                                                            latency)
        self.ranks = [_Rank(deque(each.steps()), deque(s for s in each.steps() if s.receives), deque(each.sends),
                            depth, STAGES * depth) for each in ranks]
        self.links: dict[int, _Link] = {}
        self.out_free, self.in_free = [0.0] * len(ranks), [0.0] * len(ranks)
        self.wakes: list[tuple[float, int]] = [(0.0, rank) for rank in range(len(ranks))]
        self.result = Prediction([0.0] * len(ranks), [0.0] * len(ranks), [0] * len(ranks))

    def run(self) -> Prediction:
        while self.wakes:
            now, rank = heappop(self.wakes)
            if now >= self.ranks[rank].busy:
                self._wake(rank, now)
        if any(each.steps or each.sends or each.staged or each.open for each in self.ranks):
            raise RuntimeError("predict: the ranks wait for each other")
        return self.result

    def _wake(self, rank: int, now: float) -> None:
        me = self.ranks[rank]
        self._advance(rank, now)
        if not me.steps:
            return
        step = me.steps[0]
        if step.receives and not any(s is step and not coming for s, coming, _ in me.open):
            return
        self.result.wait[rank] += now - me.since
        me.steps.popleft()
        me.computed.add(id(step))
        me.busy = me.since = now + step.pairs * self.pair_seconds
        self.result.finish[rank] = me.busy
        heappush(self.wakes, (me.busy, rank))

    def _advance(self, rank: int, now: float) -> None:
        me = self.ranks[rank]
        for _, coming, leaving in me.open:
            for transfer in [each for each in coming if self._done(each, now)]:
                coming.remove(transfer)
                if transfer.onward is not None:
                    leaving.append(transfer.onward)
                    self._ask(transfer.onward, rank, now)
            leaving[:] = [each for each in leaving if not self._done(each, now)]
        while me.open and not me.open[0][1] and not me.open[0][2] and id(me.open[0][0]) in me.computed:
            me.open.pop(0)
        while me.expected and len(me.open) < me.slots:
            step = me.expected.popleft()
            me.open.append((step, list(step.receives), []))
            for transfer in step.receives:
                self._ask(transfer, rank, now)
        me.staged = [each for each in me.staged if not self._done(each, now)]
        while me.sends and len(me.staged) < me.stages:
            me.staged.append(me.sends.popleft())
            self._ask(me.staged[-1], rank, now)

    def _done(self, transfer: Transfer, now: float) -> bool:
        ends = self.links[id(transfer)].ends
        return ends is not None and ends <= now

    def _ask(self, transfer: Transfer, rank: int, now: float) -> None:
        """One side of a message is there; it begins when both are, and both links are free."""
        link = self.links.setdefault(id(transfer), _Link())
        link.asked.append(now)
        if rank == transfer.source:
            self.result.sent[rank] += self.token_bytes * (transfer.end - transfer.begin)
        if len(link.asked) < 2:
            return
        begin = max(*link.asked, self.out_free[transfer.source], self.in_free[transfer.to])
        free = begin + self.token_bytes * (transfer.end - transfer.begin) / self.bandwidth
        self.out_free[transfer.source] = self.in_free[transfer.to] = free
        link.ends = free + self.latency
        for each in (transfer.source, transfer.to):
            heappush(self.wakes, (max(link.ends, self.ranks[each].busy), each))
