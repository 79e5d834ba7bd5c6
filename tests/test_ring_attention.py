"""ring_attention on ranks that are threads: the bits of attention over the whole in one process, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter, thread_time
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from ranks import needs_mpi, run_mpi, run_threads, run_threads_to_the_end
from ring_cases import FEW, LAYOUTS, check_bits, gathered
from test_attention import Array, check, normal, qkv

from forge_c import attention
from forge_c.distributed import Comm, RankError, SelfComm, Stats, ThreadComm, ring, ring_attention, shard
from forge_c.distributed.comm import Pending
from forge_c.distributed.plan import plan, runs_of, summary
from forge_c.distributed.wire import Wire

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the bits of one process ------------------------------------------------------------------------

@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_number_of_ranks_gives_the_bits_of_one(isa, dtype, rng, layout):
    for size, seq_len, options in FEW:
        check_bits(qkv(rng, 1, seq_len, seq_len, dtype=dtype), size, layout, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lengths_that_do_not_divide_and_ranks_without_tokens(rng, layout):
    for size in range(1, 9):
        for seq_len in (0, 1, 5, 8, 255, 700, 1030):
            for options in ({}, {"causal": False}, {"window": 100}, {"window": 1}, {"causal": False, "window": 300}):
                check_bits(qkv(rng, 1, seq_len, seq_len, 2, 1, 8, 4), size, layout, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", [None, "float32", "bfloat16", "int8"])
def test_every_option_of_attention(rng, layout, precision):
    for options in ({"softcap": 3.0, "scale": 0.3}, {"sinks": normal(rng, 6), "window": 290},
                    {"causal": False, "sinks": normal(rng, 6), "softcap": 2.0}, {"window": 2**70}):
        for dtype in (np.float32, ml_dtypes.bfloat16):
            inputs = qkv(rng, 2, 900, 900, 6, 2, 24, 40, dtype)
            check_bits(inputs, 3, layout, precision=precision, **options)


def test_pieces_and_buffers_change_no_bit(rng):
    inputs = qkv(rng, 1, 3000, 3000)
    for depth in (1, 2, 5):
        for piece in (None, 256, 1024, 2**20):
            for layout in LAYOUTS:
                check_bits(inputs, 4, layout, piece=piece, depth=depth)


def test_views_in_the_order_of_torch(rng):
    """(batch, heads, tokens, dim), transposed."""
    q, k, v = (np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in qkv(rng, 2, 800, 800))
    want = attention(q, k, v, causal=True)

    def rows(comm: Comm) -> Array:
        mine = slice(comm.rank * 400, comm.rank * 400 + 400)
        return ring_attention(q[:, mine], k[:, mine], v[:, mine], comm=comm, layout="contiguous")

    assert np.concatenate(run_threads(rows, 2), axis=1).tobytes() == want.tobytes()


def test_what_is_masked_may_be_anything(rng):
    """Keys after a row, and before its window, are not multiplied, nor sent."""
    q, k, v = qkv(rng, 1, 1200, 1200)
    for options, hidden in (({}, slice(700, None)), ({"window": 200}, slice(0, 501))):
        rows = slice(0, 700) if not options else slice(700, None)
        clean = gathered(q, k, v, 3, "zigzag", **options)[0][:, rows]
        k[:, hidden], v[:, hidden] = np.nan, np.inf
        for layout in LAYOUTS:
            assert gathered(q, k, v, 3, layout, **options)[0][:, rows].tobytes() == clean.tobytes()
        q, k, v = qkv(rng, 1, 1200, 1200)


def test_against_the_definition(isa, rng):
    q, k, v = qkv(rng, 1, 300, 300)
    want = check(q, k, v, causal=True, window=270)
    assert gathered(q, k, v, 3, "striped", window=270)[0].tobytes() == want[0].tobytes()


# ---- on the way -------------------------------------------------------------------------------------

@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_rounded_on_the_way(isa, dtype, rng, wire):
    """Every rank computes with what travels: the bits of attention over that, and errors as the docstring has them."""
    q, k, v = qkv(rng, 2, 900, 900, 4, 2, 24, 40, dtype)
    form = Wire(wire, k.dtype, 2, 2, 24, 40)
    rounded = [x.astype(k.dtype) for x in form.rounded(k, v)]
    want = attention(q, *rounded, causal=True, window=500, return_lse=True)
    for size, layout in ((1, "zigzag"), (3, "zigzag"), (2, "striped"), (4, "contiguous")):
        got = gathered(q, k, v, size, layout, window=500, wire=wire)
        assert [x.tobytes() for x in got] == [x.tobytes() for x in want]


@pytest.mark.parametrize(("wire", "token_bytes", "most"),
                         [(None, 1024, 0), ("bfloat16", 512, 0.003), ("int8", 272, 0.01)])
def test_bytes_and_error_of_the_wire(rng, wire, token_bytes, most):
    q, k, v = qkv(rng, 1, 2048, 2048, 4, 2, 64)
    want = attention(q, k, v, causal=True)[:, 1000:]
    error = gathered(q, k, v, 4, "zigzag", wire=wire)[0][:, 1000:] - want
    assert np.sqrt(np.mean(error**2)) <= most * np.sqrt(np.mean(want**2))
    assert Wire(wire, np.dtype(np.float32), 1, 2, 64, 64).token_bytes == token_bytes


def test_bytes_of_what_is_not_finite(rng):
    """A token's head with an infinity or a NaN is NaN; zeros stay zeros."""
    k = normal(rng, 1, 6, 2, 8)
    k[0, 1, 0, 3], k[0, 2, 1, 0], k[0, 3] = np.inf, np.nan, 0
    got, _ = Wire("int8", k.dtype, 1, 2, 8, 8).rounded(k, k)
    assert np.isnan(got[0, 1, 0]).all() and np.isnan(got[0, 2, 1]).all() and not got[0, 3].any()
    fine = np.isfinite(k).all(axis=-1)
    assert np.isfinite(got[fine]).all()
    assert (np.abs(got - k)[fine] <= np.abs(k[fine]).max(axis=-1, keepdims=True) / 253.9).all()


def test_statistics_are_those_of_the_plan(rng):
    q, k, v = qkv(rng, 1, 2050, 2050)
    for layout in LAYOUTS:
        def run(comm: Comm, layout: Any = layout) -> Stats:
            stats = Stats()
            for _ in range(2):
                ring_attention(*(shard(x, layout, comm) for x in (q, k, v)), comm=comm, layout=layout, stats=stats,
                               piece=512)
            return stats

        ranks = plan(runs_of(layout, 2050, 4), causal=True, window=None, piece=512)
        found = run_threads(run, 4)
        for got, mine, keys in zip(found, ranks, summary(ranks)["keys"], strict=True):
            assert got.received == 2 * keys * 256
            assert got.pairs == 2 * [step.pairs for step in mine.steps()]
            assert got.pieces == 2 * sum(bool(step.receives) for step in mine.steps())
            assert got.compute > 0 and got.wait >= 0
        assert sum(got.sent for got in found) == sum(got.received for got in found)


# ---- what is refused, and failures ------------------------------------------------------------------

def small(comm: Comm, **changes: Any) -> Any:
    x = np.ones((1, 3, 2, 4), np.float32)
    given: dict[str, Any] = {"q": x, "k": x, "v": x, "layout": "contiguous", **changes}
    return ring_attention(given.pop("q"), given.pop("k"), given.pop("v"), comm=comm, **given)


X = np.ones((1, 3, 2, 4), np.float32)
DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "layout": ({"layout": "zigzag"}, "layout is 'contiguous' on rank 0 and 'zigzag' on rank 1"),
    "causal": ({"causal": False}, "causal is True on rank 0 and False on rank 1"),
    "window": ({"window": 7}, "window is None on rank 0 and 7 on rank 1"),
    "wire": ({"wire": "int8"}, "wire is None on rank 0 and 'int8' on rank 1"),
    "sinks": ({"sinks": np.ones(2, np.float32)}, "sinks is None on rank 0"),
    "dtype": ({"q": X.astype(np.float16)}, "q's dtype is 'float32' on rank 0 and 'float16' on rank 1"),
    "v_dim": ({"v": np.ones((1, 3, 2, 8), np.float32)}, "v_dim is 4 on rank 0 and 8 on rank 1"),
    "length": ({"q": X[:, :1], "k": X[:, :1], "v": X[:, :1]}, "ranks hold [3, 1] tokens, expected [2, 2]"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_ranks_that_differ_are_told_before_anything_moves(case):
    changes, message = DIFFERENT[case]

    def run(comm: Comm) -> str:
        with pytest.raises(ValueError, match="^ring_attention: ") as caught:
            small(comm, **(changes if comm.rank == 1 else {}))
        small(comm)  # the communicator goes on
        return str(caught.value)

    assert all(message in said for said in run_threads(run, 2))


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "layout": ({"layout": "ring"}, ValueError, "layout must be 'zigzag', 'striped' or 'contiguous', not 'ring'"),
    "wire": ({"wire": "float16"}, ValueError, "wire is 'float16', expected None, 'bfloat16' or 'int8'"),
    "window": ({"window": 0}, ValueError, "window is 0, expected at least 1"),
    "piece": ({"piece": 100}, ValueError, "piece is 100, expected a multiple of 256"),
    "depth": ({"depth": 0}, ValueError, "depth is 0, expected at least 1"),
    "list": ({"k": [1.0]}, TypeError, "k is a list, expected a NumPy array"),
    "float64": ({"q": X.astype(np.float64)}, TypeError, "q has dtype float64, expected float32, float16 or bfloat16"),
    "axes": ({"q": X[0]}, ValueError, "q has shape (3, 2, 4), expected 4 axes"),
    "heads": ({"q": np.ones((1, 3, 3, 4), np.float32)}, ValueError, "q has 3 heads, expected a multiple of k's 2"),
    "tokens": ({"q": X[:, :2]}, ValueError, "q has 2 tokens and k 3, expected as many"),
    "types": ({"v": X.astype(np.float16)}, TypeError, "v has dtype float16, expected float32 as k"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_names_itself_and_breaks_the_other_ranks_off(case):
    changes, error, message = WRONG[case]
    with pytest.raises(error) as caught:
        small(SelfComm(), **changes)
    assert str(caught.value).startswith("ring_attention: " + message)

    def run(comm: Comm) -> Any:
        return small(comm, **(changes if comm.rank == 1 else {}))

    _, errors = run_threads_to_the_end(run, 3)
    assert [type(each) for each in errors] == [RankError, error, RankError]


def failing(fails: Callable[[], None]) -> Callable[[Comm], Any]:
    """Rank 1 fails when its second message is to be sent."""
    def run(comm: Comm) -> Any:
        if comm.rank == 1:
            messages, send = [], comm.send

            def counted(*given: Any) -> Any:
                messages.append(given)
                if len(messages) > 1:
                    fails()
                return send(*given)

            comm.send = counted  # type: ignore[method-assign]
        x = np.ones((1, 1024, 2, 4), np.float32)
        return ring_attention(x, x, x, comm=comm, piece=256)
    return run


def test_a_rank_that_fails_in_the_middle_ends_the_others_at_once():
    def fails() -> None:
        raise MemoryError("no room")

    begin = perf_counter()
    _, errors = run_threads_to_the_end(failing(fails), 3, timeout=60.0)
    assert perf_counter() - begin < 30
    assert type(errors[1]) is MemoryError
    assert all(type(errors[i]) is RankError and "rank 1 failed: MemoryError: no room" in str(errors[i]) for i in (0, 2))


def test_a_rank_that_never_comes_is_waited_for_no_longer_than_the_timeout():
    comms = ThreadComm(2, timeout=0.3)
    with pytest.raises(TimeoutError, match="nothing from rank 1 within 0.3 s"):
        small(comms[0])


class SeenLate(Pending):
    """Finished only at every second look."""

    def __init__(self, inner: Pending) -> None:
        self.inner, self.looks = inner, 0

    def done(self) -> bool:
        self.looks += 1
        return self.looks % 2 == 0 and self.inner.done()

    def wait(self, timeout: float | None = None) -> None:
        self.inner.wait(timeout)


def test_a_message_may_be_finished_between_two_looks(rng):
    """Its buffer is given back all the same: a rank without buffers would send no more."""
    q, k, v = qkv(rng, 1, 4096, 4096, 2, 1, 8)

    def run(comm: Comm) -> Array:
        send, receive, wait_any = comm.send, comm.receive, comm.wait_any
        comm.send = lambda *given: SeenLate(send(*given))  # type: ignore[method-assign]
        comm.receive = lambda *given: SeenLate(receive(*given))  # type: ignore[method-assign]
        comm.wait_any = lambda pending, timeout=None: wait_any(  # type: ignore[method-assign]
            [getattr(each, "inner", each) for each in pending], timeout)
        return ring_attention(*(shard(x, "striped", comm) for x in (q, k, v)), comm=comm, layout="striped", piece=256)

    want = attention(q, k, v, causal=True)
    for rank, out in enumerate(run_threads(run, 3)):
        assert out.tobytes() == want[:, rank::3].tobytes()


# ---- time -------------------------------------------------------------------------------------------

@pytest.mark.alone
@pytest.mark.slow
def test_transfers_go_under_the_computation(rng):
    """On a link that takes a tenth of the computation's time, under a tenth of that is left to wait for."""
    q, k, v = qkv(rng, 1, 8192, 8192, 4, 2, 64)
    begin = perf_counter()
    attention(q, k, v, causal=True)
    bandwidth = 10 * 4096 * 1024 / ((perf_counter() - begin) / 2)

    def run(comm: Comm) -> Stats:
        stats = Stats()
        ring_attention(*(shard(x, "zigzag", comm) for x in (q, k, v)), comm=comm, stats=stats)
        return stats

    left = [1.0]
    while min(left) >= 0.1 and len(left) < 8:
        found = run_threads(run, 2, bandwidth=bandwidth)
        left.append(sum(each.wait for each in found) / sum(each.received / bandwidth for each in found))
    assert min(left) < 0.1, left


@pytest.mark.alone
@pytest.mark.slow
def test_steps_are_nearly_as_fast_as_one_call(rng, monkeypatch):
    """Seconds of CPU in kernels of all ranks together, beside those of one process."""
    q, k, v = qkv(rng, 1, 8192, 8192, 2, 1, 64)
    monkeypatch.setattr(ring, "perf_counter", thread_time)

    def seconds(size: int, layout: Any) -> float:
        def run(comm: Comm) -> Stats:
            stats = Stats()
            ring_attention(*(shard(x, layout, comm) for x in (q, k, v)), comm=comm, layout=layout, stats=stats)
            return stats
        return sum(each.compute for each in run_threads(run, size))

    for size, layout in ((1, "zigzag"), (2, "zigzag"), (2, "striped")):
        ratios = [0.0]
        while max(ratios) <= 0.9 and len(ratios) < 8:
            begin = thread_time()
            attention(q, k, v, causal=True)
            ratios.append((thread_time() - begin) / seconds(size, layout))
        assert max(ratios) > 0.9, (size, layout, ratios)


# ---- processes --------------------------------------------------------------------------------------

@needs_mpi
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_processes(size):
    done = run_mpi("""
        import numpy as np
        from ring_cases import check_on_every_rank
        from forge_c.distributed import MPIComm
        check_on_every_rank(MPIComm())
        """, size)
    assert done.out.count("same bits") == size
