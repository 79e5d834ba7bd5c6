"""State-space layers over ranks: the ops of forge_c for a text that is cut, in rank order, into one shard a rank.

A shard's first state is the last one of the shard before it. Two schedules bring it there:

"pipeline"  A rank waits for the state of the rank before it, goes on from there and hands its own over, block of
            channels (or heads) by block: channels know nothing of each other, so rank r works at block b while rank
            r + 1 works at b - 1. K blocks on N ranks take (K + N - 1) / K times as long as a shard alone. The bits are
            those of one process, for any number of ranks and any cut, as every op goes through its tokens in order.
"scan"      What a shard does to a state is linear: s -> d s + e. All ranks find their d and e at once, from 1 and from
            0; log2(N) rounds combine them to the state before each shard; from there all go through their tokens
            again. Three passes whatever N and K are, and other bits: the carried state is rounded in another order.

So "pipeline" is the default: it is exact, and slower only where N > 2 K + 1. There a rank waits until a block has gone
through all shards before its own, which the communicator's timeout must allow. A product of decays that is too small
for a float is 0, which is right to within what a float holds; nothing is ever divided by one.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from forge_c import functional
from forge_c.distributed.comm import Comm

__all__ = ["causal_conv1d", "exclusive_scan", "gated_delta", "rg_lru", "s4d_scan", "selective_scan", "ssd_scan"]

Array = NDArray[Any]
Arguments = dict[str, Any]
Pair = tuple[Array, Array]

SCHEDULES = ("pipeline", "scan")
_BLOCKS = 8   # a rank: (8 N + N - 1) / 8 N, an eighth of the time is lost to filling the pipeline at most
_PIECE = 1024  # tokens of a call whose y nobody wants


# ---- what a scan over ranks needs to know of an op ---------------------------------------------------


@dataclass(frozen=True)
class _Op:
    """y (batch, seq, channels or heads, ...), state (batch, channels or heads, ...)."""

    name: str
    call: Callable[..., Pair]
    tokens: tuple[str, ...]  # arguments (batch, seq, ...), the first of which is what the state is made of
    cut: Mapping[str, int]   # the axis of channels or heads of those that have one
    least: int               # channels or heads of a block: what a thread of the op takes at once
    skipped: tuple[str, ...] = ()  # arguments of y alone


_SELECTIVE = _Op("selective_scan", functional.selective_scan, ("u", "delta", "B", "C", "z"),
                 {"u": 2, "delta": 2, "z": 2, "A": 0, "D": 0, "delta_bias": 0, "state": 1}, 128, ("D", "z"))
_SSD = _Op("ssd_scan", functional.ssd_scan, ("x", "dt", "B", "C", "z"),
           {"x": 2, "dt": 2, "B": 2, "C": 2, "z": 2, "A": 0, "D": 0, "dt_bias": 0, "state": 1}, 1, ("D", "z"))
_RG_LRU = _Op("rg_lru", functional.rg_lru, ("x", "input_gate", "recurrence_gate", "reset"),
              {"x": 2, "input_gate": 2, "recurrence_gate": 2, "param": 0, "state": 1}, 128)
_S4D = _Op("s4d_scan", functional.s4d_scan, ("u",),
           {"u": 2, "A": 0, "B": 0, "C": 0, "dt": 0, "D": 0, "state": 1}, 64, ("D",))
_DELTA = _Op("gated_delta", functional.gated_delta, ("v", "q", "k", "g", "beta"),
             {"v": 2, "q": 2, "k": 2, "g": 2, "beta": 2, "state": 1}, 1)


def _some_tokens(op: _Op, args: Arguments, begin: int, end: int) -> dict[str, Any]:
    def some(name: str, value: Any) -> Any:
        cut = name in op.tokens and isinstance(value, np.ndarray) and value.ndim > 1
        return value[:, begin:end] if cut else value
    return {name: some(name, value) for name, value in args.items()}


def _share(value: Array, axis: int, block: tuple[int, int], units: int) -> Array:
    """Of `units` channels or heads those of the block: of an axis that is `units` long, or has a part or multiple."""
    length = value.shape[axis]
    begin, end = length * block[0] // units, -(-length * block[1] // units)
    return value[(slice(None),) * axis + (slice(begin, end),)]


def _some_channels(op: _Op, args: Arguments, block: tuple[int, int], units: int) -> dict[str, Any]:
    return {name: _share(value, op.cut[name], block, units) if name in op.cut and value is not None else value
            for name, value in args.items()}


def _blocks(op: _Op, args: Arguments, units: int, most: int, threads: int) -> list[tuple[int, int]]:
    """At most about `most` blocks of `units` channels or heads, which cut no group of heads that share a k, q or B, or
    lie within one of each."""
    lengths = [args[name].shape[axis] for name, axis in op.cut.items() if args.get(name) is not None]
    shared = [length for length in lengths if length < units]
    groups = gcd(units, *shared) or 1
    of_group = units // groups
    count = max(1, min(most, units // (op.least * threads)))
    if count <= groups or any(length != groups for length in shared):
        count = min(count, groups)
        return [(i * groups // count * of_group, (i + 1) * groups // count * of_group) for i in range(count)]
    inner = min(-(-count // groups), of_group)
    cuts = [g * of_group + i * of_group // inner for g in range(groups) for i in range(inner)] + [units]
    return list(zip(cuts[:-1], cuts[1:], strict=True))


# ---- both schedules ----------------------------------------------------------------------------------


def _run(op: _Op, args: Arguments, comm: Comm, schedule: str) -> Pair:
    if schedule not in SCHEDULES:
        raise ValueError(f"{op.name}: schedule is {schedule!r}, expected one of {', '.join(SCHEDULES)}")
    if comm.size == 1:
        return op.call(**args)
    with comm.guard():
        y, state = op.call(**_some_tokens(op, args, 0, 0))  # checks everything but the numbers of tokens
        seq = _tokens(op, args)
        comm.agree(f"{op.name}: the result's dtype and shape but for tokens, state, schedule",
                   (y.dtype.name, y.shape[0], y.shape[2:], state.shape, args["state"] is not None, schedule))
        y = np.empty((y.shape[0], seq, *y.shape[2:]), y.dtype)
        end = (_pipeline if schedule == "pipeline" else _scan)(op, args, y, state, comm)
        comm.broadcast(end, comm.size - 1)
        return y, end


def _tokens(op: _Op, args: Arguments) -> int:
    seq = int(args[op.tokens[0]].shape[1])
    for name in op.tokens:
        if args[name] is not None and args[name].shape[1] != seq:
            raise ValueError(f"{op.name}: {name} has shape {args[name].shape}, expected {seq} tokens, as "
                             f"{op.tokens[0]} has")
    return seq


def _pipeline(op: _Op, args: Arguments, y: Array, state: Array, comm: Comm) -> Array:
    """The state after this rank's shard; y is written. `state` is that before the text."""
    units = state.shape[1]
    blocks = _blocks(op, args, units, _BLOCKS * comm.size, max(comm.all_gather(functional.get_num_threads())))
    before = [np.ascontiguousarray(_share(state, 1, block, units)) for block in blocks]
    after = [np.empty_like(part) for part in before]
    arriving = [comm.receive(part, comm.rank - 1) for part in before] if comm.rank else []
    leaving = []
    for i, block in enumerate(blocks):
        if arriving:
            arriving[i].wait()
        some = _some_channels(op, args, block, units)
        op.call(**some | {"state": before[i]}, out=(_share(y, 2, block, units), after[i]))
        if comm.rank < comm.size - 1:
            leaving.append(comm.send(after[i], comm.rank + 1))
        comm.progress()
    for sent in leaving:
        sent.wait()
    return np.concatenate(after, axis=1)


def _scan(op: _Op, args: Arguments, y: Array, state: Array, comm: Comm) -> Array:
    """Likewise."""
    quiet = args | dict.fromkeys(op.skipped)
    end = _end(op, quiet, state if comm.rank == 0 else np.zeros_like(state))
    unit, combine = _unit(op, args, state)
    first = args[op.tokens[0]]
    alone = np.zeros((1, 1, *first.shape[2:-1], unit.shape[-1] if combine is _matrices else first.shape[-1]),
                     first.dtype)
    nothing = np.broadcast_to(alone, (*first.shape[:2], *alone.shape[2:]))
    decay = _end(op, quiet | {op.tokens[0]: nothing}, unit)
    found = _exclusive((decay, end), combine, comm)
    _, end = op.call(**args | {"state": state if found is None else found[1]}, out=(y, None))
    return end


def _end(op: _Op, args: Arguments, state: Array) -> Array:
    """The state after all tokens."""
    for begin in range(0, args[op.tokens[0]].shape[1], _PIECE):
        _, state = op.call(**_some_tokens(op, args, begin, begin + _PIECE) | {"state": state})
    return state


def _unit(op: _Op, args: Arguments, state: Array) -> tuple[Array, Callable[[Pair, Pair], Pair]]:
    """The state that becomes what a shard multiplies states by, where nothing is added: ones; by the delta rule, which
    mixes the rows of a head's state, the identity."""
    if args.get("beta") is None:
        return np.ones_like(state), _numbers
    n = state.shape[2]
    return np.ascontiguousarray(np.broadcast_to(np.eye(n, dtype=np.float32), (*state.shape[:2], n, n))), _matrices


# ---- the scan over ranks -----------------------------------------------------------------------------


def _numbers(first: Pair, then: Pair) -> Pair:
    """(d1, s1), (d2, s2) = (d1 d2, d2 s1 + s2)"""
    return first[0] * then[0], then[0] * first[1] + then[1]


def _matrices(first: Pair, then: Pair) -> Pair:
    """The same of matrices of each head, d (.., n, n) and s (.., n, p)."""
    return then[0] @ first[0], then[0] @ first[1] + then[1]


def _exclusive(own: Pair, combine: Callable[[Pair, Pair], Pair], comm: Comm) -> Pair | None:
    """What all ranks before this one combine to; None on the first.

    After a round of distance D, `whole` is of the 2 D ranks up to this one, `before` of those but this one.
    """
    whole, before = own, None
    distance = 1
    while distance < comm.size:
        taken = (np.empty_like(own[0]), np.empty_like(own[1]))
        arriving = [comm.receive(part, comm.rank - distance) for part in taken] if comm.rank >= distance else []
        there = comm.rank + distance
        parts = [np.ascontiguousarray(part) for part in whole] if there < comm.size else []
        pending = arriving + [comm.send(part, there) for part in parts]
        for each in pending:
            each.wait()
        if arriving:
            before = taken if before is None else combine(taken, before)
            whole = combine(taken, whole)
        distance *= 2
    return before


def exclusive_scan(decay: Array, state: Array, *, comm: Comm) -> Array:
    """The state at the beginning of this rank's shard; zeros on the first rank.

    A shard takes a state s to decay * s + state: `decay` is the product of its tokens' factors, `state` what is left
    after it of a beginning in zeros, both float32 or both complex64, and decay of any shape that state's takes. On the
    first rank `state` may be what is left of any beginning. Pairs of neighbours become (d1 d2, d2 s1 + s2), in log2 of
    the number of ranks rounds, each of which sends both arrays once; the bits depend on that number alone.

    >>> from forge_c.distributed import SelfComm
    >>> exclusive_scan(np.ones(2, np.float32), np.ones(2, np.float32), comm=SelfComm())
    array([0., 0.], dtype=float32)
    """
    with comm.guard():
        _check_pair(decay, state)
        comm.agree("exclusive_scan: dtype and shapes of decay and state", (state.dtype.name, decay.shape, state.shape))
        found = _exclusive((decay, state), _numbers, comm)
        return np.zeros_like(state) if found is None else found[1]


def _check_pair(decay: Array, state: Array) -> None:
    for name, value in (("decay", decay), ("state", state)):
        if not isinstance(value, np.ndarray) or value.dtype not in (np.float32, np.complex64):
            found = f"dtype {value.dtype}" if isinstance(value, np.ndarray) else f"type {type(value).__name__}"
            raise TypeError(f"exclusive_scan: {name} has {found}, expected an array of float32 or complex64")
    if decay.dtype != state.dtype:
        raise TypeError(f"exclusive_scan: decay has dtype {decay.dtype}, expected state's, {state.dtype}")
    sizes = zip(decay.shape[::-1], state.shape[::-1], strict=False)
    if decay.ndim > state.ndim or any(n not in (1, m) for n, m in sizes):
        raise ValueError(f"exclusive_scan: decay has shape {decay.shape}, expected one that broadcasts to state's, "
                         f"{state.shape}")


# ---- the ops -----------------------------------------------------------------------------------------


def causal_conv1d(x: Array, weight: Array, bias: Array | None = None, *, comm: Comm,
                  activation: Literal["silu"] | None = None, state: Array | None = None) -> Pair:
    """forge_c.causal_conv1d of a text in shards: (y of this rank's tokens, state after the whole text on every rank).

    The width - 1 tokens before a shard come from the rank before it, or, where its shard is shorter than that, from as
    many ranks as hold them; no rank waits for another's result. `state` is what lies before the whole text, the same
    on every rank. The bits are those of one process.
    """
    with comm.guard():
        some = x[:, :0] if isinstance(x, np.ndarray) and x.ndim > 1 else x
        y, held = functional.causal_conv1d(some, weight, bias, activation=activation, state=state)  # a check
        comm.agree("causal_conv1d: x's dtype, shapes but for tokens, activation, state",
                   (y.dtype.name, y.shape[0], y.shape[2], held.shape, activation, state is not None))
        halo = _halo(x, held, comm.all_gather(x.shape[1]), comm)
        y, end = functional.causal_conv1d(x, weight, bias, activation=activation, state=halo)
        comm.broadcast(end, comm.size - 1)
        return y, end


def _halo(x: Array, state: Array, lengths: list[int], comm: Comm) -> Array:
    """(batch, width - 1, channels) float32: the inputs before this rank's first."""
    width = state.shape[1]
    starts = [sum(lengths[:rank]) for rank in range(comm.size)]

    def parts(of: int) -> list[tuple[int, int, int]]:
        """(rank, first, last token there) of what lies within `width` tokens before rank `of`."""
        found = [(rank, max(starts[of] - width, starts[rank]) - starts[rank], lengths[rank]) for rank in range(of)]
        return [(rank, begin, end) for rank, begin, end in found if begin < end]

    pending = [comm.send(x[:, begin:end].astype(np.float32, order="C"), there)
               for there in range(comm.rank + 1, comm.size)
               for rank, begin, end in parts(there) if rank == comm.rank]
    mine = parts(comm.rank)
    arrived = [np.empty((len(x), end - begin, x.shape[2]), np.float32) for _, begin, end in mine]
    pending += [comm.receive(part, rank) for part, (rank, _, _) in zip(arrived, mine, strict=True)]
    for each in pending:
        each.wait()
    return np.concatenate([state, *arrived], axis=1)[:, sum(part.shape[1] for part in arrived):]


def selective_scan(u: Array, delta: Array, A: Array, B: Array, C: Array, D: Array | None = None, *, comm: Comm,
                   z: Array | None = None, delta_bias: Array | None = None, delta_softplus: bool = False,
                   state: Array | None = None, schedule: str = "pipeline") -> Pair:
    """forge_c.selective_scan of a text in shards: (y of this rank's tokens, state after the whole text on every rank).

    u, delta, B, C and z are of this rank's tokens, any number of them; all else, `state` before the whole text
    included, is the same on every rank. schedule "pipeline": the bits of one process; "scan": all ranks at once.
    """
    return _run(_SELECTIVE, {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias,
                             "delta_softplus": delta_softplus, "state": state}, comm, schedule)


def ssd_scan(x: Array, dt: Array, A: Array, B: Array, C: Array, D: Array | None = None, *, comm: Comm,
             z: Array | None = None, dt_bias: Array | None = None, dt_softplus: bool = False,
             dt_limit: tuple[float, float] | None = None, state: Array | None = None,
             schedule: str = "pipeline") -> Pair:
    """forge_c.ssd_scan of a text in shards: (y of this rank's tokens, state after the whole text on every rank).

    x, dt, B, C and z are of this rank's tokens, any number of them; all else, `state` before the whole text included,
    is the same on every rank. schedule "pipeline": the bits of one process; "scan": all ranks at once.
    """
    return _run(_SSD, {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias,
                       "dt_softplus": dt_softplus, "dt_limit": dt_limit, "state": state}, comm, schedule)


def rg_lru(x: Array, input_gate: Array, recurrence_gate: Array, param: Array, *, comm: Comm,
           reset: Array | None = None, state: Array | None = None, schedule: str = "pipeline") -> Pair:
    """forge_c.rg_lru of a text in shards: (y of this rank's tokens, state after the whole text on every rank).

    x, both gates and reset are of this rank's tokens, any number of them; all else, `state` before the whole text
    included, is the same on every rank. schedule "pipeline": the bits of one process; "scan": all ranks at once.
    """
    return _run(_RG_LRU, {"x": x, "input_gate": input_gate, "recurrence_gate": recurrence_gate, "param": param,
                          "reset": reset, "state": state}, comm, schedule)


def s4d_scan(u: Array, A: Array, B: Array, C: Array, dt: Array, D: Array | None = None, *, comm: Comm,
             method: str = "zoh", state: Array | None = None, schedule: str = "pipeline") -> Pair:
    """forge_c.s4d_scan of a text in shards: (y of this rank's tokens, state after the whole text on every rank).

    u is of this rank's tokens, any number of them; all else, `state` before the whole text included, is the same on
    every rank. schedule "pipeline": the bits of one process; "scan": all ranks at once, with complex decays.
    """
    return _run(_S4D, {"u": u, "A": A, "B": B, "C": C, "dt": dt, "D": D, "method": method, "state": state}, comm,
                schedule)


def gated_delta(q: Array, k: Array, v: Array, g: Array | None = None, beta: Array | None = None, *, comm: Comm,
                rule: str = "gated_delta", scale: float | None = None, state: Array | None = None,
                schedule: str = "pipeline") -> Pair:
    """forge_c.gated_delta of a text in shards: (y of this rank's tokens, state after the whole text on every rank).

    q, k, v, g and beta are of this rank's tokens, any number of them; all else, `state` before the whole text
    included, is the same on every rank. schedule "pipeline": the bits of one process; "scan": all ranks at once, which
    by the delta rule needs the product of all tokens' matrices (n, n) of each head, as costly as a scan with p = n.
    """
    return _run(_DELTA, {"q": q, "k": k, "v": v, "g": g, "beta": beta, "rule": rule, "scale": scale, "state": state},
                comm, schedule)
