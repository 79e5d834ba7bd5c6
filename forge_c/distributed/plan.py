"""Which rank computes what when in ring_attention, and which keys travel for it: pure functions of where tokens lie.

A row's sums are folded in chunks of KV_CHUNK keys at absolute positions, in their order; so every rank takes keys in
their order, and the result has the bits of one process. Keys travel in pieces, whole chunks at absolute positions. A
rank's rows are cut into runs of neighbours (contiguous 1, striped 1, zigzag 2), and for each run it passes over the
pieces that the run sees, the late run first: late and early run of a zigzag rank see 2N + 1 blocks together, so that
all ranks work equally long, where both runs at once would make early keys cost twice as much as late ones. Of a run
behind a window, the rows that need no other rank's keys go first: the others' keys travel meanwhile.

The clock of the plan is the number of (query, key) pairs that a rank has computed, as if it never waited; a piece is
needed at a step's start. The part of a piece that one owner holds goes from rank to rank in the order of need, the
owner to the first, the first to the second, each passing on the buffer that it received into; a rank that needs it
later than that buffer can be spared gets it from the owner. Of ranks that need it at once the last goes first: its own
keys are asked for less often, and with contiguous parts it has the most to do. Nothing that is masked is sent or
computed.

That cannot deadlock. Transfers have one total order, `Transfer.key`: time of need, piece, owner, place in the chain.
What a transfer waits for comes before it in that order:
- a source that is not the owner received the part for a need no later, at an earlier place;
- the receiver's buffer is that of `depth` received pieces before, free when that step has been computed, for which
  earlier needs were met, and when its parts were passed on, which the plan does only to needs before this one;
- an owner copies parts into buffers in this order, so only earlier transfers hold them; and it does so while it waits
  itself (ring.py), for transfers no earlier than the first that is unfinished.
So the first unfinished transfer can always go on.
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from forge_c.distributed.layout import slices_of
from forge_c.functional import KV_CHUNK

Runs = tuple[range, ...]  # the positions of a rank's rows: runs of them, ascending

_PIECE_BYTES = 2 << 20  # so large that a transfer's latency is small beside its time
_PIECES = 16            # of a rank's keys at least, if chunks are that small: a chain of ranks begins a piece apart
_TAGS = 1 << 10
STAGES = 2  # buffers for own keys on their way, for each of those that receive


@dataclass(slots=True)
class Transfer:
    """A part of a piece on its way: rows [begin, end) of the owner's keys."""
    owner: int
    begin: int
    end: int
    to: int
    need: int  # the receiver's clock
    step: int  # the receiver's, in its list
    piece: int
    source: int = -1
    place: int = 0  # in the part's chain
    tag: int = 0
    onward: Transfer | None = None  # from the receiver to the next

    def key(self) -> tuple[int, int, int, int, int]:
        return self.need, self.piece, self.owner, self.begin, self.place


@dataclass(slots=True)
class Step:
    """A rank's rows [begin, end) against the keys at positions [first, last); they see those from `seen` on."""
    begin: int
    end: int
    first: int
    seen: int
    last: int
    pairs: int
    need: int  # the rank's clock before it
    own: tuple[int, int] = 0, 0  # its own rows at [first, last)
    receives: list[Transfer] = field(default_factory=list)


@dataclass(slots=True)
class Pass:
    """Rows [begin, end) of a rank, and the steps that give their result."""
    begin: int
    end: int
    steps: list[Step]


@dataclass(slots=True)
class RankPlan:
    passes: list[Pass]
    sends: list[Transfer] = field(default_factory=list)  # of its own keys, in total order

    def steps(self) -> list[Step]:
        return [step for each in self.passes for step in each.steps]


def runs_of(layout: str, seq_len: int, size: int) -> tuple[Runs, ...]:
    """Each rank's runs in a layout."""
    if size == 1:
        return ((range(seq_len),),)
    cut = (slices_of(layout, seq_len, size, rank) for rank in range(size))
    return tuple(tuple(run for each in slices if (run := range(*each.indices(seq_len)))) for slices in cut)


def piece_keys(runs: tuple[Runs, ...], key_bytes: int) -> int:
    """Keys a piece: whole chunks, of _PIECE_BYTES at most, as many as leave a rank's keys _PIECES pieces."""
    seq_len, size = sum(map(_length, runs)), len(runs)
    if size == 1:
        return max(-(-seq_len // KV_CHUNK), 1) * KV_CHUNK
    step = max((run.step for each in runs for run in each), default=1)
    few = min(_PIECE_BYTES // max(key_bytes, 1), seq_len * step // (_PIECES * size))
    return max(few // KV_CHUNK, 1) * KV_CHUNK


@lru_cache(maxsize=64)
def plan(runs: tuple[Runs, ...], *, causal: bool, window: int | None, piece: int, depth: int = 2,
         queries: tuple[Runs, ...] | None = None) -> tuple[RankPlan, ...]:
    """What each rank does. piece: keys, a multiple of KV_CHUNK; depth: pieces that a rank has buffers for; queries:
    where the rows lie, among the keys of the same rank, if not all of these have one."""
    seq_len = sum(map(_length, runs))
    ranks = tuple(RankPlan(_passes(each, seq_len, causal, window, piece)) for each in queries or runs)
    parts: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    chains: dict[tuple[int, int, int], list[Transfer]] = defaultdict(list)
    for rank, each in enumerate(ranks):
        for index, step in enumerate(each.steps()):
            span = step.seen, step.last
            if span not in parts:
                parts[span] = _parts(runs, *span)
            step.own = rows_below(runs[rank], step.first), rows_below(runs[rank], step.last)
            for owner, begin, end in parts[span]:
                if owner != rank:
                    transfer = Transfer(owner, begin, end, rank, step.need, index, step.first // piece)
                    step.receives.append(transfer)
                    chains[owner, begin, end].append(transfer)
    _choose_sources(chains.values(), ranks, depth)
    _order(ranks, [transfer for chain in chains.values() for transfer in chain])
    return ranks


def rows_below(runs: Runs, position: int) -> int:
    """How many of a rank's rows lie below a position."""
    return sum(_below(run, position) for run in runs)


def _length(runs: Runs) -> int:
    return sum(map(len, runs))


def _below(run: range, position: int) -> int:
    return min(max(-((run.start - position) // run.step), 0), len(run))


def _parts(runs: tuple[Runs, ...], first: int, last: int) -> list[tuple[int, int, int]]:
    """(owner, begin, end): whose rows lie at positions [first, last)."""
    found = ((rank, rows_below(each, first), rows_below(each, last)) for rank, each in enumerate(runs))
    return [part for part in found if part[1] < part[2]]


# ---- a rank's passes and steps ----

def _passes(runs: Runs, seq_len: int, causal: bool, window: int | None, piece: int) -> list[Pass]:
    """Rows that see their own run alone, in blocks, each against all of its keys at once; then the others."""
    alone: list[tuple[int, range, int]] = []  # row, positions, keys a step
    others: list[tuple[int, range, int]] = []
    begin, block = 0, max(piece, window or 0)
    for run in runs:
        first = _first_alone(run, causal, window)
        others.insert(0, (begin, run[:first], piece))
        alone += [(begin + i, run[i:i + block], seq_len + piece) for i in range(first, len(run), block)]
        begin += len(run)
    passes, clock = [], 0
    for row, rows, keys in alone + others:
        steps = _steps(row, rows, seq_len, causal, window, keys, clock) if rows else []
        clock += sum(step.pairs for step in steps)
        if rows:
            passes.append(Pass(row, row + len(rows), steps))
    return passes


def _first_alone(run: range, causal: bool, window: int | None) -> int:
    """The first row of a run from which on rows see whole chunks of this run alone, if a window says so; else its
    length."""
    if not causal or window is None or run.step > 1 or run.start == 0:
        return len(run)
    return min(-(-run.start // KV_CHUNK) * KV_CHUNK - run.start + window - 1, len(run))


def _steps(row: int, rows: range, seq_len: int, causal: bool, window: int | None, piece: int, clock: int) -> list[Step]:
    """The pieces that some of these rows see, for the rows that see them; `row` is the first, among the rank's."""
    seen = 0 if window is None else max(rows[0] - window + 1, 0)
    top = rows[-1] + 1 if causal else seq_len
    steps: list[Step] = []
    while seen < top:
        first, last = seen // KV_CHUNK * KV_CHUNK, min(seen // piece * piece + piece, top)
        begin = _below(rows, seen) if causal else 0
        end = len(rows) if window is None else _below(rows, last - 1 + window)
        if begin < end:
            pairs = _pairs(rows[begin:end], seen, last, causal, window)
            steps.append(Step(row + begin, row + end, first, seen, last, pairs, clock))
            clock += pairs
        seen = last
    return steps


def _pairs(rows: range, first: int, last: int, causal: bool, window: int | None) -> int:
    """How many pairs of these rows and the keys [first, last) count: those up to each row, less those before its
    window."""
    count = last - first
    upto = _clipped(rows, first - 1, count) if causal else count * len(rows)
    return upto - (0 if window is None else _clipped(rows, first + window - 1, count))


def _clipped(rows: range, zero: int, most: int) -> int:
    """The sum of min(max(p - zero, 0), most) over positions p."""
    a, b = _below(rows, zero + 1), _below(rows, zero + most)
    return (b - a) * (rows.start - zero) + rows.step * (a + b - 1) * (b - a) // 2 + most * (len(rows) - b)


# ---- transfers ----

def _choose_sources(chains: Iterable[list[Transfer]], ranks: tuple[RankPlan, ...], depth: int) -> None:
    spare = [_spared(each, depth) for each in ranks]
    for chain in chains:
        chain.sort(key=lambda transfer: (transfer.need, -transfer.to))
        before: Transfer | None = None
        for place, transfer in enumerate(chain):
            transfer.place, transfer.source = place, transfer.owner
            if before is not None and before.to != transfer.to and transfer.need <= spare[before.to][before.step]:
                before.onward, transfer.source = transfer, before.to
            before = transfer


def _spared(rank: RankPlan, depth: int) -> dict[int, int]:
    """Step -> until when its buffer can be spared: when the next piece but depth - 2 is needed, to be received into it
    the one after is asked for. With a single buffer nothing is passed on to a later need than one's own."""
    steps = rank.steps()
    receiving = [i for i, step in enumerate(steps) if step.receives]
    end = steps[-1].need + steps[-1].pairs if steps else 0
    needs = [steps[i].need for i in receiving] + [end] * depth
    return {step: needs[i + depth - 1] for i, step in enumerate(receiving)}


def _order(ranks: tuple[RankPlan, ...], transfers: list[Transfer]) -> None:
    """Tags, each rank's sends, and the parts of each step, in total order."""
    sent: dict[tuple[int, int], int] = defaultdict(int)
    for transfer in sorted(transfers, key=Transfer.key):
        pair = transfer.source, transfer.to
        transfer.tag = sent[pair] % _TAGS
        sent[pair] += 1
        if transfer.source == transfer.owner:
            ranks[transfer.owner].sends.append(transfer)
    for each in ranks:
        for step in each.steps():
            step.receives.sort(key=Transfer.key)


def summary(ranks: tuple[RankPlan, ...]) -> dict[str, Any]:
    """Pairs that each rank computes, and keys that it receives."""
    return {"pairs": [sum(step.pairs for step in each.steps()) for each in ranks],
            "keys": [sum(t.end - t.begin for step in each.steps() for t in step.receives) for each in ranks]}
