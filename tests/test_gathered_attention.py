"""gathered_attention and ulysses_attention: the same rows as ring_attention by other ways, with the same bits."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from ranks import run_threads, run_threads_to_the_end
from ring_cases import FEW, LAYOUTS, Array, in_one
from test_attention import normal, qkv

from forge_c.distributed import (
    Comm,
    RankError,
    SelfComm,
    Stats,
    gathered_attention,
    ring_attention,
    shard,
    ulysses_attention,
    unshard,
)

pytestmark = pytest.mark.usefixtures("one_thread")

WAYS = {"gathered": gathered_attention, "ulysses": ulysses_attention}


def check_bits(way: str, inputs: tuple[Array, Array, Array], size: int, layout: Any, **options: Any) -> None:
    def run(comm: Comm) -> list[bytes]:
        parts = (shard(x, layout, comm) for x in inputs)
        out, lse = WAYS[way](*parts, comm=comm, layout=layout, return_lse=True, **options)
        return [unshard(x, layout, comm).tobytes() for x in (out, lse)]

    want = [x.tobytes() for x in in_one(*inputs, **options)]
    assert all(got == want for got in run_threads(run, size)), (way, size, layout, options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_number_of_ranks_gives_the_bits_of_one(isa, dtype, rng, way, layout):
    for size, seq_len, options in FEW:
        heads = 4 if size < 5 and size != 3 else 2 * size
        check_bits(way, qkv(rng, 1, seq_len, seq_len, heads, 2 if heads == 4 else size, 16, 24, dtype), size, layout,
                   **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lengths_and_options(rng, way, layout):
    for size in (1, 2, 4):
        for seq_len in (0, 1, 3, 300, 777):
            for options in ({}, {"causal": False}, {"window": 100}, {"sinks": normal(rng, 8), "softcap": 3.0},
                            {"precision": "int8", "scale": 0.1}):
                check_bits(way, qkv(rng, 2, seq_len, seq_len, 8, 4, 12, 8, ml_dtypes.bfloat16), size, layout, **options)


def test_groups_of_heads_change_no_bit(rng):
    for heads in (1, 2, 3, 9):
        check_bits("gathered", qkv(rng, 1, 700, 700, 10, 5), 3, "zigzag", heads=heads, sinks=normal(rng, 10))


def test_fewer_key_heads_than_ranks_are_shared(rng):
    for heads, kv_heads, size in ((8, 2, 8), (8, 1, 4), (4, 2, 4), (6, 3, 3)):
        check_bits("ulysses", qkv(rng, 1, 400, 400, heads, kv_heads), size, "striped", window=150)


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_rounded_on_the_way_as_in_the_ring(rng, wire):
    inputs = qkv(rng, 1, 600, 600)

    def run(comm: Comm) -> bool:
        parts = [shard(x, "zigzag", comm) for x in inputs]
        ways = (way(*parts, comm=comm, wire=wire).tobytes()  # type: ignore[operator]
                for way in (ring_attention, gathered_attention))
        return len(set(ways)) == 1

    assert all(run_threads(run, 3))


def test_only_keys_that_are_seen_are_gathered(rng):
    q, k, v = qkv(rng, 1, 4096, 4096, 2, 1, 8)

    def received(comm: Comm, **options: Any) -> int:
        stats = Stats()
        gathered_attention(*(shard(x, "contiguous", comm) for x in (q, k, v)), comm=comm, layout="contiguous",
                           stats=stats, **options)
        return stats.received // 64

    assert run_threads(received, 4) == [0, 1024, 2048, 3072]
    assert run_threads(lambda comm: received(comm, window=256), 4) == [0, 256, 256, 256]
    assert run_threads(lambda comm: received(comm, causal=False), 4) == [3072] * 4


def test_ulysses_moves_each_number_once(rng):
    q, k, v = qkv(rng, 1, 1000, 1000, 4, 4, 8)

    def sent(comm: Comm) -> int:
        stats = Stats()
        ulysses_attention(*(shard(x, "striped", comm) for x in (q, k, v)), comm=comm, layout="striped", stats=stats)
        return stats.sent

    assert run_threads(sent, 4) == [250 * 3 * 8 * 4 * 3 + 750 * 8 * 4] * 4


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 3), (6, 2, 3), (2, 1, 4)])
def test_heads_that_ranks_cannot_share_are_refused(heads, kv_heads, size):
    q, k = np.ones((1, 2, heads, 4), np.float32), np.ones((1, 2, kv_heads, 4), np.float32)

    def run(comm: Comm) -> str:
        with pytest.raises(ValueError) as caught:
            ulysses_attention(*(shard(x, "striped", comm) for x in (q, k, k)), comm=comm, layout="striped")
        comm.barrier()  # the communicator goes on
        return str(caught.value)

    said = f"ulysses_attention: q has {heads} heads and k {kv_heads} on {size} ranks, expected heads a multiple"
    assert all(each.startswith(said) for each in run_threads(run, size))


@pytest.mark.parametrize("way", WAYS)
def test_ranks_that_differ_or_fail(way):
    x = np.ones((1, 3, 4, 4), np.float32)

    def differ(comm: Comm) -> str:
        with pytest.raises(ValueError, match=f"^{way}_attention: ranks do not agree: ") as caught:
            WAYS[way](x, x, x, comm=comm, causal=comm.rank == 0)
        WAYS[way](x, x, x, comm=comm)
        return str(caught.value)

    assert all("causal is True on rank 0 and False on rank 1" in said for said in run_threads(differ, 2))
    with pytest.raises(ValueError, match=f"{way}_attention: window is 0"):
        WAYS[way](x, x, x, comm=SelfComm(), window=0)
    _, errors = run_threads_to_the_end(lambda comm: WAYS[way](x, x, x if comm.rank else x[0], comm=comm), 2)
    assert [type(each) for each in errors] == [ValueError, RankError]
