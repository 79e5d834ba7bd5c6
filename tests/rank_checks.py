"""What holds of every communicator: each check takes one and is run by all of its ranks. Run under mpiexec, this file
goes through all of them."""
from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from forge_c.distributed import Comm, positions, shard, unshard
from forge_c.distributed.layout import LAYOUTS

# Around the head of an MPI message (8192 bytes) and its segments (256 KiB).
SIZES = (0, 1, 8191, 8192, 8193, 8192 + (1 << 18), 8193 + (1 << 18), (1 << 20) + 7)
DTYPES = (np.float32, np.int64, np.bool_, ml_dtypes.bfloat16)


def content(rank: int, size: int) -> np.ndarray:
    """Bytes that tell who sent them."""
    return (np.arange(size, dtype=np.int64) * 7 + 13 * rank + size).astype(np.uint8)


def messages_come_in_order(comm: Comm) -> None:
    """All sizes at once, of one tag, to every rank, the large ones to the next; waited for from the last."""
    def sizes(source: int, to: int) -> tuple[int, ...]:
        return SIZES if to == (source + 1) % comm.size else SIZES[:5]

    others = [r for r in range(comm.size) if r != comm.rank]
    into = {(r, n): np.zeros(n, np.uint8) for r in others for n in sizes(r, comm.rank)}
    receives = [comm.receive(x, r, 3) for (r, n), x in into.items()]
    sends = [comm.send(content(comm.rank, n), r, 3) for r in others for n in sizes(comm.rank, r)]
    for each in receives[::-1] + sends:
        each.wait()
        assert each.done()
    for (r, n), got in into.items():
        assert np.array_equal(got, content(r, n)), (r, n)


def tags_and_dtypes_stand_apart(comm: Comm) -> None:
    """Received in another order than sent, by tag."""
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    if comm.size == 1:
        return
    sent = [np.arange(6).reshape(2, 3).astype(d) for d in DTYPES]
    into = [np.zeros((2, 3), d) for d in DTYPES]
    sends = [comm.send(x, to, tag) for tag, x in enumerate(sent)]
    for tag in (2, 0, 3, 1):
        comm.receive(into[tag], source, tag).wait()
    for each in sends:
        each.wait()
    for x, got in zip(sent, into, strict=True):
        assert np.array_equal(got, x)


def values_are_gathered_in_rank_order(comm: Comm) -> None:
    said = comm.all_gather({"rank": comm.rank, "text": "x" * 10_000 * comm.rank})
    assert [s["rank"] for s in said] == list(range(comm.size))
    assert [len(s["text"]) for s in said] == [10_000 * r for r in range(comm.size)]


def parts_may_differ_in_length(comm: Comm) -> None:
    parts = [np.zeros((r, 5), np.int16) for r in range(comm.size)]
    comm.all_gather_arrays(np.full((comm.rank, 5), comm.rank, np.int16), parts)
    for r, part in enumerate(parts):
        assert (part == r).all()


def all_to_all_transposes(comm: Comm) -> None:
    send = [np.full(comm.rank + r, 10 * comm.rank + r) for r in range(comm.size)]
    receive = [np.zeros(comm.rank + r, np.int64) for r in range(comm.size)]
    comm.all_to_all(send, receive)
    for r, got in enumerate(receive):
        assert (got == 10 * r + comm.rank).all()


def broadcast_from_every_root(comm: Comm) -> None:
    for root in range(comm.size):
        x = np.full(40_000, comm.rank, np.float64)
        comm.broadcast(x, root)
        assert (x == root).all()
        comm.barrier()


def sums_are_in_rank_order(comm: Comm) -> None:
    """The same bits on every rank, whether slices or the whole travel."""
    for n in (0, 1, 5, 1000, 100_003):
        of_rank = [(np.random.default_rng(r).standard_normal(n) * 10.0 ** (r % 3)).astype(np.float32)
                   for r in range(comm.size)]
        total, largest = of_rank[0].copy(), np.max(of_rank, 0)
        for each in of_rank[1:]:
            total += each
        x, y = of_rank[comm.rank].copy(), of_rank[comm.rank].copy()
        comm.all_reduce(x)
        comm.all_reduce(y, "max")
        assert x.tobytes() == total.tobytes() and y.tobytes() == largest.tobytes(), n


def splits_are_communicators(comm: Comm) -> None:
    """Rows, columns, and a split of a split, with messages of one tag under way in several at once."""
    rows, columns = comm.split(comm.rank // 2), comm.split(comm.rank % 2)
    assert rows.all_gather(comm.rank) == [r for r in range(comm.size) if r // 2 == comm.rank // 2]
    assert columns.all_gather(comm.rank) == list(range(comm.rank % 2, comm.size, 2))
    alone = rows.split(comm.rank)
    assert (alone.rank, alone.size, alone.timeout) == (0, 1, comm.timeout)
    if rows.size == 2:
        got = [np.zeros(1), np.zeros(1)]
        other = comm.rank ^ 1
        pending = [comm.receive(got[0], other), rows.receive(got[1], 1 - rows.rank),
                   rows.send(np.full(1, 2.0), 1 - rows.rank), comm.send(np.full(1, 1.0), other)]
        for each in pending:
            each.wait()
        assert (got[0], got[1]) == (1, 2)


def disagreement_is_an_error_on_all(comm: Comm) -> None:
    """And the communicator goes on."""
    comm.agree("check: shape", (1, 2))
    if comm.size > 1:
        with pytest.raises(ValueError, match=rf"^check: shape: .* rank 0: \(1, 0\); .*rank {comm.size - 1}: \(1, 9\)"):
            comm.agree("check: shape", (1, 9 if comm.rank == comm.size - 1 else 0))
    comm.barrier()


def unshard_is_the_inverse_of_shard(comm: Comm) -> None:
    for layout in LAYOUTS:
        for length in (0, 1, comm.size - 1, 2 * comm.size, 4 * comm.size + 3, 1000):
            for axis in (0, 1, -2, 2):
                shape = [2, 3, 2]
                shape[axis] = length
                whole = np.arange(np.prod(shape)).reshape(shape).astype(ml_dtypes.bfloat16)
                part = shard(whole, layout, comm, axis=axis)
                assert part.flags.c_contiguous and not np.shares_memory(part, whole)
                assert np.array_equal(part, whole.take(positions(layout, length, comm), axis))
                again = unshard(part, layout, comm, axis=axis)
                assert again.dtype == whole.dtype and again.tobytes() == whole.tobytes(), (layout, length, axis)


def parts_that_do_not_fit_are_an_error_on_all(comm: Comm) -> None:
    last = comm.rank == comm.size - 1
    if comm.size > 1:
        with pytest.raises(ValueError, match=r"unshard: parts have \[.*2\] tokens; zigzag parts of"):
            unshard(np.zeros((1, 2 if last else 0)), "zigzag", comm)
        with pytest.raises(ValueError, match="unshard: .*ranks do not agree.*float64.*float32"):
            unshard(np.zeros((1, 2), np.float32 if last else np.float64), "zigzag", comm)
        with pytest.raises(ValueError, match="unshard: .*ranks do not agree.*'zigzag'.*'striped'"):
            unshard(np.zeros((1, 2)), "striped" if last else "zigzag", comm)
    comm.barrier()


def wrong_calls_move_nothing(comm: Comm) -> None:
    x = np.zeros((4, 4))
    for call, words in (
            (lambda: comm.send(x, comm.rank), "send: to must be another rank"),
            (lambda: comm.receive(x, comm.size), "receive: source must be another rank"),
            (lambda: comm.all_reduce(x, "mean"), "all_reduce: op must be 'sum' or 'max', not 'mean'"),
            (lambda: comm.all_reduce(x[:, 1:]), "all_reduce: array must be C-contiguous"),
            (lambda: comm.broadcast(x, comm.size), "broadcast: root must be"),
            (lambda: shard(x, "ring", comm), "layout must be 'zigzag', 'striped' or 'contiguous', not 'ring'"),
            (lambda: shard(x, "zigzag", comm, axis=2), r"shard: axis 2 is none of x, which has shape \(4, 4\)"),
            (lambda: positions("zigzag", -1, comm), "seq_len must not be negative, not -1")):
        with pytest.raises(ValueError, match=words):
            call()
    if comm.size > 1:
        other = (comm.rank + 1) % comm.size
        frozen = np.zeros(2)
        frozen.flags.writeable = False
        for call, error, words in (
                (lambda: comm.send(x.T[1:], other), ValueError, "send: array must be C-contiguous"),
                (lambda: comm.send(x, other, 1 << 15), ValueError, "send: tag must be in"),
                (lambda: comm.send([1], other), TypeError, "send: array must be an array, not list"),
                (lambda: comm.send(np.array([None]), other), TypeError, "dtype object, which cannot be sent"),
                (lambda: comm.receive(frozen, other), ValueError, "receive: into must be writable")):
            with pytest.raises(error, match=words):
                call()
    comm.barrier()


CHECKS: tuple[Callable[[Comm], None], ...] = (
    messages_come_in_order, tags_and_dtypes_stand_apart, values_are_gathered_in_rank_order,
    parts_may_differ_in_length, all_to_all_transposes, broadcast_from_every_root, sums_are_in_rank_order,
    splits_are_communicators, disagreement_is_an_error_on_all, unshard_is_the_inverse_of_shard,
    parts_that_do_not_fit_are_an_error_on_all, wrong_calls_move_nothing)


if __name__ == "__main__":
    from forge_c.distributed import MPIComm

    world = MPIComm(timeout=20)
    for check in CHECKS:
        check(world)
    world.barrier()
    print(f"rank {world.rank} of {world.size} went through {len(CHECKS)} checks", flush=True)
