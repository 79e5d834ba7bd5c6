"""Attention over ranks beside attention in one process: on threads, and in each process of an mpiexec."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from ranks import run_threads

from forge_c import attention
from forge_c.distributed import (
    Comm,
    gathered_attention,
    ring_attention,
    shard,
    sharded_decode,
    ulysses_attention,
    unshard,
)

Array = NDArray[Any]

LAYOUTS = ("contiguous", "zigzag", "striped")
FEW: tuple[tuple[int, int, dict[str, Any]], ...] = (
    (1, 600, {}), (2, 1030, {}), (3, 1000, {"window": 300}), (5, 1283, {"causal": False}), (8, 2100, {}))


def gathered(q: Array, k: Array, v: Array, size: int, layout: Any, **options: Any) -> tuple[Array, Array]:
    """out and lse of the whole, from ranks that are threads; every rank puts together the same."""
    found = run_threads(lambda comm: of_the_whole(comm, q, k, v, layout, **options), size)
    assert all(a.tobytes() == b.tobytes() for other in found for a, b in zip(found[0], other, strict=True))
    return found[0]  # type: ignore[no-any-return]


def of_the_whole(comm: Comm, q: Array, k: Array, v: Array, layout: Any, **options: Any) -> tuple[Array, Array]:
    parts = (shard(x, layout, comm) for x in (q, k, v))
    out, lse = ring_attention(*parts, comm=comm, layout=layout, return_lse=True, **options)  # type: ignore[misc]
    return unshard(out, layout, comm), unshard(lse, layout, comm)


def in_one(q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array]:
    """attention, causal unless said otherwise, with the options that it has."""
    known = {"causal", "window", "scale", "softcap", "sinks", "precision"}
    options = {"causal": True, **{name: value for name, value in options.items() if name in known}}
    return attention(q, k, v, return_lse=True, **options)


def check_bits(inputs: tuple[Array, Array, Array], size: int, layout: Any, **options: Any) -> None:
    got, want = gathered(*inputs, size, layout, **options), in_one(*inputs, **options)
    assert [x.tobytes() for x in got] == [x.tobytes() for x in want], (size, layout, inputs[0].shape, options)


def check_on_every_rank(comm: Comm) -> None:
    """Each process makes the same inputs, and compares."""
    rng = np.random.default_rng(3)
    for layout in LAYOUTS:
        for _, seq_len, options in FEW:
            shapes = ((1, seq_len, 12, 16), (1, seq_len, 1, 16), (1, seq_len, 1, 24))
            q, k, v = (rng.standard_normal(shape, np.float32) for shape in shapes)
            want = in_one(q, k, v, **options)[0].tobytes()
            for way in (ring_attention, gathered_attention, ulysses_attention):
                parts = [shard(x, layout, comm) for x in (q, k, v)]
                got = way(*parts, comm=comm, layout=layout, **options)  # type: ignore[operator]
                assert unshard(got, layout, comm).tobytes() == want, (way, layout, seq_len, options)
            got = sharded_decode(q[:, -1:], *parts[1:], comm=comm)
            assert np.abs(got - attention(q[:, -1:], k, v)).max() < 2e-6 * np.abs(v).max()
            assert len({each.tobytes() for each in comm.all_gather(got)}) == 1
    print("same bits", flush=True)
