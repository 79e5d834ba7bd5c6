"""State-space ops over ranks: the bits of one process, the scan next to float64, shards of any length, errors on every
rank."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from math import ceil, log2
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference as ref
import test_causal_conv1d
import test_gated_delta
import test_rg_lru
import test_s4d
import test_selective_scan
import test_ssd_scan
from conftest import check_close
from ranks import needs_mpi, run_mpi, run_threads, run_threads_to_the_end
from suite import case

import forge_c as fc
from forge_c.distributed import Comm, RankError, SelfComm, scan

Arguments = dict[str, Any]
F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
TOKENS = {"causal_conv1d": ("x",), "selective_scan": ("u", "delta", "B", "C", "z"), "s4d_scan": ("u",),
          "ssd_scan": ("x", "dt", "B", "C", "z"), "rg_lru": test_rg_lru.TOKENS,
          "gated_delta": ("q", "k", "v", "g", "beta")}
SCANS = [name for name in TOKENS if name != "causal_conv1d"]
RANKS = (1, 2, 3, 4, 5, 6, 7, 8)
ROUNDING = 2.0**-24


def inputs(op: str, rng: np.random.Generator, seq: int, dtype: np.dtype[Any] = F32, **more: Any) -> Arguments:
    """With several blocks of channels or heads where there are many."""
    if op == "causal_conv1d":
        return test_causal_conv1d.inputs(rng, 2, seq, 21, more.get("width", 4), dtype)
    if op == "selective_scan":
        return {**test_selective_scan.inputs(rng, 2, seq, 270, 3, dtype), "delta_softplus": True}
    if op == "rg_lru":
        return test_rg_lru.inputs(rng, 2, seq, 300, dtype)
    if op == "s4d_scan":
        return test_s4d.inputs(rng, 1, seq, 150, 3, dtype)
    if op == "ssd_scan":
        return test_ssd_scan.inputs(rng, 1, seq, 6, 5, 2, 7, dtype)
    a = test_gated_delta.inputs(rng, more.pop("rule", "gated_delta"), 1, seq, 6, 5, 8, dtype=dtype,
                                **{"q_heads": 3, "k_heads": 3} | more)
    flags = a.get("g") is not None, a.get("beta") is not None
    names = {(False, False): "linear", (True, False): "gated", (False, True): "delta", (True, True): "gated_delta"}
    return a | {"rule": names[flags]}


def shard(op: str, a: Arguments, begin: int, end: int) -> Arguments:
    return a | {name: a[name][:, begin:end] for name in TOKENS[op] if a.get(name) is not None}


def over_ranks(op: str, a: Arguments, lengths: list[int], **options: Any) -> tuple[Any, list[Any]]:
    """y of all ranks together, and the state that each has."""
    bounds = [0, *itertools.accumulate(lengths)]

    def work(comm: Comm) -> Any:
        own = shard(op, a, bounds[comm.rank], bounds[comm.rank + 1])
        return getattr(scan, op)(**own, comm=comm, **options)

    results = run_threads(work, len(lengths))
    return np.concatenate([y for y, _ in results], axis=1), [state for _, state in results]


def lengths_of(seq: int, ranks: int, rng: np.random.Generator) -> list[list[int]]:
    """Equal but for one, any, all in one place, none at the ends."""
    equal = [seq * (r + 1) // ranks - seq * r // ranks for r in range(ranks)]
    cuts = [0, *np.sort(rng.integers(0, seq + 1, ranks - 1)).tolist(), seq]
    one = [0] * ranks
    one[ranks // 2] = seq
    return [equal, [int(b - a) for a, b in itertools.pairwise(cuts)], one]


def check_bits(op: str, a: Arguments, lengths: list[int], want: tuple[Any, Any], **options: Any) -> None:
    y, states = over_ranks(op, a, lengths, **options)
    assert y.dtype == want[0].dtype and y.tobytes() == want[0].tobytes()
    assert all(s.dtype == want[1].dtype and s.tobytes() == want[1].tobytes() for s in states)


# ---- the bits of one process -------------------------------------------------------------------------


@pytest.mark.parametrize("op", TOKENS)
def test_any_ranks_and_shards_have_the_bits_of_one_process(isa, rng, op):
    for dtype in (F32, BF16):
        a = inputs(op, rng, 43, dtype)
        want = getattr(fc, op)(**a)
        for ranks in RANKS:
            for lengths in lengths_of(43, ranks, rng):
                with case(dtype, lengths):
                    check_bits(op, a, lengths, want)


@pytest.mark.parametrize("op", TOKENS)
def test_without_options_and_without_tokens(rng, op):
    """The state begins as zeros; a text of no tokens leaves it as it is."""
    a = inputs(op, rng, 9)
    few = {name: value for name, value in a.items() if name not in ("state", "D", "z", "bias", "reset", "delta_bias",
                                                                     "dt_bias")}
    check_bits(op, few, [4, 0, 5], getattr(fc, op)(**few))
    nothing = shard(op, a, 0, 0)
    check_bits(op, nothing, [0, 0, 0], getattr(fc, op)(**nothing))


@pytest.mark.parametrize("op", TOKENS)
def test_a_text_goes_on_where_the_one_before_it_ended(rng, op):
    a = inputs(op, rng, 40)
    want = getattr(fc, op)(**a)
    first, states = over_ranks(op, shard(op, a, 0, 17), [5, 6, 6])
    rest, states = over_ranks(op, shard(op, a, 17, 40) | {"state": states[0]}, [8, 8, 7])
    assert np.concatenate([first, rest], axis=1).tobytes() == want[0].tobytes()
    assert all(state.tobytes() == want[1].tobytes() for state in states)


@pytest.mark.parametrize("width", [1, 2, 5, 33])
def test_a_convolution_reaches_over_shards_shorter_than_it(rng, width):
    a = inputs("causal_conv1d", rng, 40, width=width)
    for activation in (None, "silu"):
        want = fc.causal_conv1d(**a, activation=activation)
        for lengths in ([1] * 8 + [32], [0, 1, 0, 2, 0, 37], [3, 3, 3, 31], [40, 0, 0], [0, 0, 40], [38, 1, 1]):
            with case(lengths):
                check_bits("causal_conv1d", a, lengths, want, activation=activation)


@pytest.mark.parametrize("rule", ["linear", "gated", "delta", "gated_delta"])
def test_heads_that_are_shared_either_way(rng, rule):
    """q and k of fewer heads than v, of as many, q of more."""
    for heads in ((6, 6), (1, 1), (2, 2), (2, 3), (3, 1), (12, 3), (12, 6)):
        a = inputs("gated_delta", rng, 20, rule=rule, q_heads=heads[0], k_heads=heads[1])
        check_bits("gated_delta", a, [7, 7, 6], fc.gated_delta(**a))


def test_arrays_that_lie_apart(rng):
    """Views of one projection, as layers have them."""
    wide = rng.standard_normal((1, 30, 300), np.float32)
    a = inputs("selective_scan", rng, 30) | {"u": wide[..., :270], "B": wide[..., 270:273], "C": wide[..., 273:276]}
    a |= {"delta": a["delta"][:1], "z": a["z"][:1], "state": a["state"][:1]}
    check_bits("selective_scan", a, [11, 9, 10], fc.selective_scan(**a))


def test_blocks_cover_all_heads_and_cut_no_group():
    for units, shared, most in itertools.product((0, 1, 2, 6, 24, 80), ((), (1,), (2,), (2, 6), (3,), (1, 2)),
                                                 (1, 2, 3, 8, 64)):
        if any(units % length or length > units for length in shared):
            continue
        args = {"v": np.empty((1, 1, units))} | {"qk"[i]: np.empty((1, 1, n)) for i, n in enumerate(shared)}
        blocks = scan._blocks(scan._DELTA, args, units, most, 1)
        assert [b for _, b in blocks[:-1]] == [a for a, _ in blocks[1:]] and (blocks[0][0], blocks[-1][1]) == (0, units)
        for length, (begin, end) in itertools.product(shared, blocks):
            group = units // length
            assert (begin % group == 0 and end % group == 0) or begin // group == (end - 1) // group
        assert len(blocks) <= max(1, most + max(shared, default=1))


# ---- the scan, next to float64 -----------------------------------------------------------------------


def rounds(ranks: int) -> int:
    return 2 * ceil(log2(ranks)) if ranks > 1 else 0


def check_scanned(op: str, a: Arguments, y: Any, state: Any, ranks: int) -> None:
    """As the op's own tests do; each round of the scan is two roundings more of what a beginning brings."""
    given = {name: value for name, value in a.items() if name != "rule"}
    want = getattr(ref, op)(**given)
    if op in ("selective_scan", "rg_lru"):
        sizes = {"u": np.abs, "B": np.abs, "C": np.abs, "D": np.abs, "x": np.abs, "state": np.abs}
        whole = {name: sizes.get(name, lambda x: x)(value) for name, value in a.items()}
        bare = {name: value for name, value in whole.items() if name != "delta_softplus"}
        bounds = (test_selective_scan.magnitudes(bare, True) if op == "selective_scan"
                  else test_rg_lru.magnitudes(whole))
        more = getattr(ref, op)(**{name: None if name == "z" else value for name, value in whole.items()})
        gate = np.abs(ref.silu(a["z"])) if "z" in a else 1.0
        for got, expected, size, extra, by in zip((y, state), want, bounds, more, (gate, 1.0), strict=True):
            check_close(op, got, expected, magnitude=size, more=rounds(ranks) * ROUNDING * np.abs(extra) * by)
        return
    sizes = {"ssd_scan": test_ssd_scan, "s4d_scan": test_s4d, "gated_delta": test_gated_delta}[op].magnitudes(given)
    n = (a["u"].shape[1] if op == "s4d_scan" else a["B" if op == "ssd_scan" else "v"].shape[1]) + rounds(ranks)
    d = a["A"].shape[1] if op == "s4d_scan" else a["B" if op == "ssd_scan" else "q"].shape[-1]
    if a.get("rule") in ("delta", "gated_delta"):
        n = n * (1 + d**0.5)  # a matrix of columns that are off by e is off by e d^(1/2) at most
    s = test_ssd_scan.exponents(a) if op == "ssd_scan" else float(np.abs(ref.f64(a.get("g", 0.0))).max(initial=0))
    parts = (np.real, np.imag) if op == "s4d_scan" else (np.asarray,)
    check_close(op, y, want[0], magnitude=sizes[0], n=n, d=d, s=s)
    for part in parts:
        check_close(op, part(state), part(want[1]), magnitude=sizes[1], n=n, d=d, s=s)


@pytest.mark.parametrize("op", SCANS)
def test_the_scan_is_the_recurrence(isa, rng, op):
    a = inputs(op, rng, 43)
    for ranks in (2, 3, 5, 8):
        for lengths in lengths_of(43, ranks, rng):
            with case(lengths):
                y, states = over_ranks(op, a, lengths, schedule="scan")
                check_scanned(op, a, y, states[0], ranks)
                assert all(state.tobytes() == states[0].tobytes() for state in states)


@pytest.mark.parametrize("rule", ["linear", "gated", "delta", "gated_delta"])
def test_the_scan_of_each_rule(rng, rule):
    for each_n in (False, True) if "gated" in rule else (False,):
        a = inputs("gated_delta", rng, 43, rule=rule, each_n=each_n)
        y, states = over_ranks("gated_delta", a, [10, 11, 0, 12, 10], schedule="scan")
        check_scanned("gated_delta", a, y, states[0], 5)


def test_decays_that_no_float_holds(rng):
    """exp(-60) a token: the product of three is 0, by which nothing is divided."""
    a = inputs("selective_scan", rng, 40)
    a["A"] = np.full_like(a["A"], -60)
    a["delta"] = np.ones_like(a["delta"])
    del a["delta_bias"]
    y, states = over_ranks("selective_scan", a, [10, 10, 10, 10], schedule="scan")
    assert np.isfinite(y).all()
    check_scanned("selective_scan", a, y, states[0], 4)


def test_longer_than_a_call_of_the_first_pass(rng):
    seq = 3 * scan._PIECE + 100
    a = {"x": rng.standard_normal((1, seq, 2), np.float32), "input_gate": np.zeros((1, seq, 2), np.float32),
         "recurrence_gate": np.zeros((1, seq, 2), np.float32), "param": np.full(2, -9, np.float32)}
    y, states = over_ranks("rg_lru", a, [scan._PIECE + 50, 2 * scan._PIECE + 50], schedule="scan")
    check_scanned("rg_lru", a, y, states[0], 2)


# ---- exclusive_scan ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_exclusive_scan_is_the_fold_of_the_ranks_before(rng, dtype):
    for ranks in RANKS:
        shape = (ranks, 2, 5, 3)
        decay = np.exp(-rng.random((ranks, 1, 5, 1))).astype(dtype)
        state = rng.standard_normal(shape).astype(dtype)
        if dtype == np.complex64:
            decay = decay * np.exp(1j * rng.random(decay.shape)).astype(dtype)
        got = run_threads(lambda comm, d=decay, s=state: scan.exclusive_scan(d[comm.rank], s[comm.rank], comm=comm),
                          ranks)
        want, size = np.zeros(shape[1:], np.complex128), np.zeros(shape[1:])
        for rank in range(ranks):
            assert got[rank].dtype == dtype and got[rank].shape == shape[1:]
            assert (np.abs(got[rank] - want) <= 4 * (1 + rounds(ranks)) * ROUNDING * size).all()
            want = decay[rank].astype(np.complex128) * want + state[rank]
            size = np.abs(decay[rank]) * size + np.abs(state[rank])


def test_exclusive_scan_takes_log2_rounds(rng):
    """A rank sends at most twice in a round."""
    for ranks, most in ((2, 1), (3, 2), (4, 2), (5, 3), (8, 3)):
        def count(comm: Comm) -> int:
            calls = []
            send = comm.send
            comm.send = lambda *args: (calls.append(1), send(*args))[1]  # type: ignore[method-assign, assignment]
            scan.exclusive_scan(np.ones(3, np.float32), np.ones(3, np.float32), comm=comm)
            return len(calls)

        assert max(run_threads(count, ranks)) == 2 * most


# ---- errors ------------------------------------------------------------------------------------------


def failures(work: Callable[[Comm], Any], ranks: int) -> list[BaseException | None]:
    return run_threads_to_the_end(work, ranks)[1]


def test_one_process_is_the_op(rng):
    for op in TOKENS:
        a = inputs(op, rng, 12)
        y, state = getattr(scan, op)(**a, comm=SelfComm())
        want = getattr(fc, op)(**a)
        assert y.tobytes() == want[0].tobytes() and state.tobytes() == want[1].tobytes()


@pytest.mark.parametrize("op", TOKENS)
def test_what_one_rank_cannot_take_ends_all(rng, op):
    a = inputs(op, rng, 12)
    name = TOKENS[op][0]

    def work(comm: Comm) -> Any:
        own = shard(op, a, 4 * comm.rank, 4 * comm.rank + 4)
        return getattr(scan, op)(**own | ({name: own[name].astype(np.int32)} if comm.rank == 1 else {}), comm=comm)

    got = failures(work, 3)
    assert isinstance(got[1], TypeError) and name in str(got[1]) and op in str(got[1])
    assert all(isinstance(got[i], RankError) and "rank 1" in str(got[i]) for i in (0, 2))


@pytest.mark.parametrize("op", TOKENS)
def test_ranks_that_do_not_agree(rng, op):
    a, other = inputs(op, rng, 12), inputs(op, rng, 12, BF16)
    without = {name: value for name, value in a.items() if name != "state"}
    for wrong in (other, without):
        def work(comm: Comm, wrong: Arguments = wrong) -> None:
            with pytest.raises(ValueError, match=f"^{op}: .*rank 2"):
                getattr(scan, op)(**(wrong if comm.rank == 2 else a), comm=comm)

        run_threads(work, 3)


def test_wrong_calls(rng):
    a = inputs("selective_scan", rng, 12)
    got = failures(lambda comm: scan.selective_scan(**a, comm=comm, schedule="ring"), 2)
    assert all(isinstance(each, ValueError | RankError) and "schedule is 'ring'" in str(each) for each in got)
    got = failures(lambda comm: scan.selective_scan(**a | {"z": a["z"][:, 1:]}, comm=comm), 2)
    assert all("z has shape (2, 11, 270), expected 12 tokens" in str(each) for each in got)
    one = np.ones(3, np.float32)
    for decay, state, error, text in ((one.astype(np.float64), one, TypeError, "decay has dtype float64"),
                                      (one, [1.0], TypeError, "state has type list"),
                                      (one.astype(np.complex64), one, TypeError, "decay has dtype complex64"),
                                      (np.ones(2, np.float32), one, ValueError, r"decay has shape \(2,\)"),
                                      (np.ones((1, 3), np.float32), one, ValueError, r"decay has shape \(1, 3\)")):
        with pytest.raises(error, match=f"exclusive_scan: {text}"):
            scan.exclusive_scan(decay, state, comm=SelfComm())


# ---- processes ---------------------------------------------------------------------------------------


@needs_mpi
def test_every_op_on_processes(rng):
    """Each sends its states as messages of MPI; the seed makes the same inputs in all of them."""
    assert sorted(run_mpi(PROCESSES, 3, timeout=60).out.split()) == ["0", "1", "2"]


PROCESSES = """
    import numpy as np
    import test_distributed_scan as test
    import forge_c as fc
    from forge_c.distributed import MPIComm, scan

    with MPIComm() as comm:
        for op in test.TOKENS:
            a = test.inputs(op, np.random.default_rng(3), 43)
            begin, end = ([0, 20, 22, 43][comm.rank + i] for i in (0, 1))
            y, state = getattr(scan, op)(**test.shard(op, a, begin, end), comm=comm)
            want = getattr(fc, op)(**a)
            right = (y.tobytes() == want[0][:, begin:end].tobytes()) and (state.tobytes() == want[1].tobytes())
            assert right, op
            if op != "causal_conv1d":
                y, state = getattr(scan, op)(**test.shard(op, a, begin, end), comm=comm, schedule="scan")
                assert np.abs(state - want[1]).max() < 1e-4, op
        print(comm.rank)
"""
