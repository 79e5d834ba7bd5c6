"""What each rank of ring_attention computes and sends: checked on the plan itself, which is data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest

from forge_c.distributed.layout import positions_of
from forge_c.distributed.passes import runs_at
from forge_c.distributed.plan import RankPlan, Step, Transfer, piece_keys, plan, rows_below, runs_of, summary
from forge_c.distributed.predict import predict

LAYOUTS = ("contiguous", "zigzag", "striped")
MASKS: tuple[dict[str, Any], ...] = ({"causal": True, "window": None}, {"causal": True, "window": 300},
                                     {"causal": False, "window": None}, {"causal": False, "window": 40},
                                     {"causal": True, "window": 1}, {"causal": True, "window": 2**70})
SIZES = ((0, 3), (1, 4), (5, 8), (300, 1), (257, 2), (1000, 3), (1024, 4), (1500, 7), (1100, 16))


def plans() -> Iterator[tuple[str, int, int, dict[str, Any], tuple[RankPlan, ...]]]:
    for layout, (seq_len, size), options in product(LAYOUTS, SIZES, MASKS):
        for piece, depth in ((256, 2), (512, 1)):
            yield layout, seq_len, size, options, plan(runs_of(layout, seq_len, size), **options, piece=piece,
                                                       depth=depth)


def visible(seq_len: int, causal: bool, window: int | None) -> np.ndarray:
    rows, keys = np.arange(seq_len)[:, None], np.arange(seq_len)
    return ((keys <= rows) | (not causal)) & (keys > rows - (seq_len + 1 if window is None else min(window, seq_len)))


def transfers(ranks: tuple[RankPlan, ...]) -> list[Transfer]:
    return [each for rank in ranks for step in rank.steps() for each in step.receives]


def test_every_pair_is_computed_once_and_nothing_masked():
    for layout, seq_len, size, options, ranks in plans():
        seen = visible(seq_len, **options)
        times = np.zeros((seq_len, seq_len), int)
        for rank, each in enumerate(ranks):
            places = positions_of(layout, seq_len, size, rank)
            clock = 0
            for step in each.steps():
                rows, keys = places[step.begin:step.end], slice(step.seen, step.last)
                block = seen[rows, keys]
                assert block.any(axis=1).all()
                if layout != "striped" or (options["window"] or size) >= size:  # else keys between its rows
                    assert block[:, 0].any() and block[:, -1].any()
                assert step.pairs == np.count_nonzero(block) and step.need == clock
                assert step.first % 256 == 0 and 0 <= step.seen - step.first < 256
                times[rows, keys] += block
                clock += step.pairs
        np.testing.assert_array_equal(times, seen, f"{layout}, {seq_len} on {size}, {options}")


def test_rows_that_are_not_all_of_the_keys_are_planned_as_in_the_whole():
    """The last tokens of a text that is read in passes, on ranks that hold more keys of it: what a rank computes for
    them it computes in a plan of all rows too, and no more."""
    rng = np.random.default_rng(0)
    for size, window in product((1, 2, 3, 5), (None, 1, 300)):
        owner, start = rng.integers(0, size, 1200), 700
        owner[:500] = np.repeat(np.arange(size), 500)[: 500 * size : size]
        keys = tuple(runs_at(np.flatnonzero(owner == rank)) for rank in range(size))
        rows = tuple(runs_at(start + np.flatnonzero(owner[start:] == rank)) for rank in range(size))
        ranks = plan(keys, causal=True, window=window, piece=256, queries=rows)
        seen = visible(1200, True, window)
        times = np.zeros((1200, 1200), int)
        for rank, each in enumerate(ranks):
            places, own = start + np.flatnonzero(owner[start:] == rank), np.flatnonzero(owner == rank)
            for step in each.steps():
                columns = slice(step.seen, step.last)
                times[places[step.begin : step.end], columns] += seen[places[step.begin : step.end], columns]
                assert own[slice(*step.own)].tolist() == own[(own >= step.first) & (own < step.last)].tolist()
        seen[:start] = False
        np.testing.assert_array_equal(times, seen)


def test_a_step_gets_exactly_the_keys_of_others_that_it_sees():
    for layout, seq_len, size, _, ranks in plans():
        places = [positions_of(layout, seq_len, size, rank) for rank in range(size)]
        for rank, each in enumerate(ranks):
            for step in each.steps():
                parts = [places[rank][slice(*step.own)]] + [places[t.owner][t.begin:t.end] for t in step.receives]
                found = np.sort(np.concatenate(parts))
                assert found[found >= step.seen].tolist() == list(range(step.seen, step.last))
                assert all(t.to == rank != t.owner and t.begin < t.end for t in step.receives)


def test_rows_come_in_passes_each_with_ascending_keys():
    """So a row's keys are folded in their order; late rows first."""
    for layout, seq_len, size, _, ranks in plans():
        for rank, each in enumerate(ranks):
            rows = [row for one in each.passes for row in range(one.begin, one.end)]
            assert sorted(rows) == list(range(len(positions_of(layout, seq_len, size, rank))))
            for one in each.passes:
                assert all(a.last == b.seen for a, b in zip(one.steps, one.steps[1:], strict=False))
    first, second = plan(runs_of("zigzag", 1024, 4), causal=True, window=None, piece=256)[1].passes
    assert (first.begin, second.begin) == (128, 0)


def test_a_part_comes_from_its_owner_or_from_one_who_has_it():
    for *_, ranks in plans():
        for each in transfers(ranks):
            if each.source == each.owner:
                assert each in ranks[each.owner].sends
                continue
            (before,) = (t for t in transfers(ranks) if t.onward is each)
            part = each.owner, each.begin, each.end
            assert (before.to, before.owner, before.begin, before.end) == (each.source, *part)
            assert before.key() < each.key()
        assert sum(len(rank.sends) for rank in ranks) == sum(t.source == t.owner for t in transfers(ranks))


def receiving(rank: RankPlan) -> list[Step]:
    return [step for step in rank.steps() if step.receives]


def test_what_a_transfer_waits_for_comes_before_it():
    """The order that makes a deadlock impossible: a buffer is free when what it held has been passed on."""
    for layout, seq_len, size, options, _ in plans():
        for depth in (1, 2, 3):
            ranks = plan(runs_of(layout, seq_len, size), **options, piece=256, depth=depth)
            for rank in ranks:
                steps = receiving(rank)
                for held, later in zip(steps, steps[depth:], strict=False):
                    gone = [t.onward.key() for t in held.receives if t.onward is not None]
                    assert all(key < each.key() for key in gone for each in later.receives)
                keys = [each.key() for step in steps for each in step.receives]
                assert keys == sorted(keys)
                assert [each.key() for each in rank.sends] == sorted(each.key() for each in rank.sends)


def test_messages_of_a_pair_of_ranks_have_tags_of_their_own():
    for *_, ranks in plans():
        tags: dict[tuple[int, int], list[int]] = defaultdict(list)
        for each in sorted(transfers(ranks), key=Transfer.key):
            tags[each.source, each.to].append(each.tag)
        assert all(found == [i % 1024 for i in range(len(found))] for found in tags.values())


@pytest.mark.parametrize("link", [{}, {"bandwidth": 1e5}, {"bandwidth": 3e3, "latency": 0.5}, {"latency": 40.0}])
def test_it_ends_on_any_link(link):
    for layout, seq_len, size, options, _ in plans():
        for depth in (1, 2, 3):
            ranks = plan(runs_of(layout, seq_len, size), **options, piece=256, depth=depth)
            got = predict(ranks, token_bytes=8, pair_seconds=1e-3, depth=depth, **link)
            assert sum(got.sent) == 8 * sum(summary(ranks)["keys"])


def test_negative_control_a_cycle_of_waiting_ranks_is_found():
    ranks = plan(runs_of("zigzag", 2048, 2), causal=True, window=None, piece=256)
    ranks[0].sends.reverse()
    plan.cache_clear()
    with pytest.raises(RuntimeError, match="wait for each other"):
        predict(ranks, token_bytes=8, pair_seconds=1e-3, depth=1)


# ---- bytes and balance ------------------------------------------------------------------------------

def test_no_more_travels_than_in_a_ring():
    """(N - 1) / N of all keys to each rank; of a causal mask's, with contiguous parts, those before the rank's."""
    for size in (2, 3, 4, 8):
        block = 512
        for layout in LAYOUTS:
            keys = summary(plan(runs_of(layout, 2 * size * block, size), causal=True, window=None, piece=256))["keys"]
            want = {"contiguous": [2 * block * r for r in range(size)], "zigzag": [(2 * size - 2) * block] * size}
            assert keys == want[layout] if layout in want else max(keys) <= (2 * size - 2) * block
        keys = summary(plan(runs_of("contiguous", 4096 * size, size), causal=True, window=300, piece=1024))["keys"]
        assert keys == [0] + [299] * (size - 1)


# The most that a rank computes, over the mean. The classical ring, in lock-step, has 1.495, 1.660 and 1.742
# (contiguous), 1.000 (zigzag), 1.01 to 1.03 (striped); with the window 1.11, 1.48 (zigzag) and 1.02.
BALANCE = {("contiguous", 2, None): 1.495, ("contiguous", 3, None): 1.660, ("contiguous", 4, None): 1.742,
           ("zigzag", 2, None): 1.0, ("zigzag", 3, None): 1.0, ("zigzag", 4, None): 1.0,
           ("striped", 2, None): 1.010, ("striped", 4, None): 1.031,
           ("contiguous", 4, 20): 1.110, ("zigzag", 4, 20): 1.110, ("striped", 4, 20): 1.017}


@pytest.mark.parametrize(("layout", "size", "window"), BALANCE)
def test_balance(layout, size, window):
    pairs = summary(plan(runs_of(layout, 96, size), causal=True, window=window, piece=256))["pairs"]
    assert round(max(pairs) * size / sum(pairs), 3) == BALANCE[layout, size, window]
    # and no rank waits for another: a token is now a chunk, and keys travel in no time
    wide = None if window is None else 256 * window
    ranks = plan(runs_of(layout, 256 * 96, size), causal=True, window=wide, piece=256)
    ideal = sum(summary(ranks)["pairs"]) / size
    assert max(predict(ranks, token_bytes=1, pair_seconds=1.0).finish) / ideal < BALANCE[layout, size, window] + 0.012


@pytest.mark.parametrize(("layout", "size"), [("contiguous", 4), ("contiguous", 8), ("zigzag", 2), ("zigzag", 4),
                                              ("zigzag", 8), ("striped", 2)])
def test_little_is_left_to_wait_for(layout, size):
    """Under a tenth of the transfers' time, where a rank's computation takes eight times that: the first piece on its
    way along the chain."""
    seq_len = 128 * 256
    runs = runs_of(layout, seq_len, size)
    ranks = plan(runs, causal=True, window=None, piece=piece_keys(runs, 1024))
    found = summary(ranks)
    bandwidth = 8 * 1024 * max(found["keys"]) / (sum(found["pairs"]) / size)
    got = predict(ranks, token_bytes=1024, pair_seconds=1.0, bandwidth=bandwidth)
    assert sum(got.wait) < 0.1 * 1024 * sum(found["keys"]) / bandwidth


def test_pieces():
    """Whole chunks, small enough for the bytes, and for sixteen of each rank's keys where there are as many."""
    for layout, size in product(LAYOUTS, (2, 4)):
        for seq_len in (0, 100, 5000, 2**16, 2**20):
            piece = piece_keys(runs_of(layout, seq_len, size), 4096)
            assert piece % 256 == 0 and 256 <= piece <= 512
    assert piece_keys(runs_of("contiguous", 2**16, 4), 64) == 1024
    assert piece_keys(runs_of("striped", 2**16, 4), 64) == 4096
    assert piece_keys(runs_of("zigzag", 1000, 1), 64) == 1024


def test_rows_below():
    for layout, size in product(LAYOUTS, (1, 3)):
        for rank, runs in enumerate(runs_of(layout, 50, size)):
            places = positions_of(layout, 50, size, rank)
            assert [rows_below(runs, p) for p in range(60)] == [int((places < p).sum()) for p in range(60)]
