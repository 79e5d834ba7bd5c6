"""sharded_decode: keys on ranks that are threads, against attention over all of them, and float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import multiplies_pairs
from ranks import run_threads, run_threads_to_the_end
from test_attention import Array, expected, normal, qkv

from forge_c import KVCache, attention
from forge_c.distributed import Comm, RankError, SelfComm, Stats, sharded_decode
from forge_c.distributed.layout import positions_of

pytestmark = pytest.mark.usefixtures("one_thread")

MOST = 2e-6  # of the largest value, as the docstring says


def everywhere(q: Array, parts: list[dict[str, Any]], **options: Any) -> tuple[Array, Array]:
    """out and lse, the same bits on every rank; parts: what each rank has."""
    found = run_threads(lambda comm: sharded_decode(q, comm=comm, return_lse=True, **parts[comm.rank], **options),
                        len(parts))
    assert all(a.tobytes() == b.tobytes() for other in found for a, b in zip(found[0], other, strict=True))
    return found[0]  # type: ignore[no-any-return]


def cut(k: Array, v: Array, cuts: list[int]) -> list[dict[str, Any]]:
    edges = [0, *cuts, k.shape[1]]
    return [{"k_local": k[:, a:b], "v_local": v[:, a:b]} for a, b in zip(edges, edges[1:], strict=False)]


def check(got: tuple[Array, Array], want: tuple[Array, Array], v: Array, weighed: Any = 0) -> None:
    """weighed: weights |v| summed, where weights are rounded to bfloat16, a chunk's beside its largest."""
    most = 2 * 2**-9 * weighed + MOST * np.abs(v.astype(np.float64)).max(initial=1)
    if got[0].dtype != np.float32:
        most += np.abs(want[0].astype(np.float64)) * (2**-8 if got[0].dtype == ml_dtypes.bfloat16 else 2**-10)
    assert got[0].dtype == want[0].dtype and got[0].shape == want[0].shape
    assert (np.abs(got[0].astype(np.float64) - want[0].astype(np.float64)) <= most).all()
    np.testing.assert_array_equal(np.isneginf(got[1]), np.isneginf(want[1]))
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}, {"scale": 0.2}, {"precision": "float32"}])
def test_any_cut_gives_the_attention_over_all_keys(isa, dtype, rng, options):
    for q_len, cuts in ((1, [300]), (1, [1, 1, 600]), (3, [0, 256, 700]), (1, [100, 200, 300, 400, 500, 600, 699])):
        q, k, v = qkv(rng, 2, q_len, 700, dtype=dtype)
        weighed = attention(q, k, np.abs(v), **options).astype(np.float64)
        check(everywhere(q, cut(k, v, cuts), **options), attention(q, k, v, return_lse=True, **options), v,
              weighed if multiplies_pairs(dtype) and "precision" not in options else 0)


def test_against_float64(rng):
    q, k, v = qkv(rng, 1, 1, 3000, 4, 2, 32)
    out, lse, *_ = expected(q, k, v)
    got = everywhere(q, cut(k, v, [1000, 1700, 2900]))
    assert np.abs(got[0] - out).max() < 2e-6 and np.abs(got[1] - lse).max() < 1e-5


def test_sinks_count_once(rng):
    q, k, v = qkv(rng, 2, 2, 500)
    for sinks in (normal(rng, 4), np.array([-np.inf, 0, 50, -50], np.float32)):
        check(everywhere(q, cut(k, v, [100, 400]), sinks=sinks), attention(q, k, v, sinks=sinks, return_lse=True), v)
        check(everywhere(q, cut(k[:, :0], v[:, :0], [0]), sinks=sinks),
              attention(q, k[:, :0], v[:, :0], sinks=sinks, return_lse=True), v)


def test_rows_that_see_nothing_give_0(rng):
    q, k, v = qkv(rng, 1, 2, 300)
    out, lse = everywhere(q, cut(k[:, :0], v[:, :0], [0, 0]))
    assert not out.any() and np.isneginf(lse).all()
    positions = [{"kv_positions": np.arange(100, 250)}, {"kv_positions": np.arange(250, 400)}]
    parts = [{**a, **b} for a, b in zip(cut(k, v, [150]), positions, strict=True)]
    out, lse = everywhere(q, parts, causal=True, q_positions=np.array([99, 100]))
    assert not out[:, 0].any() and np.isneginf(lse[:, 0]).all()
    np.testing.assert_allclose(out[:, 1], np.repeat(v[:, 0], 2, axis=1), rtol=1e-6)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
def test_caches_with_rows_of_different_lengths(isa, rng, stored):
    q, k, v = qkv(rng, 3, 1, 640)
    lens = np.array([[256, 100, 0], [256, 0, 7], [128, 300, 30]])  # of each rank, each row
    whole, parts, at = KVCache(3, 1024, 2, 16, dtype=stored), [], np.zeros(3, int)
    for each in lens:
        cache = KVCache(3, 512, 2, 16, dtype=stored)
        rows = np.minimum(at[:, None] + np.arange(each.max()), 639)
        given = [np.take_along_axis(x, rows[:, :, None, None], axis=1) for x in (k, v)]
        cache.append(*given, lens=each)
        whole.append(*given, lens=each)
        parts.append({"k_local": cache})
        at += each
    weighed = 0 if stored == "float32" else attention(q, k, np.abs(v), kv_lens=lens.sum(axis=0))
    check(everywhere(q, parts), attention(q, whole, return_lse=True), v, weighed)


def test_valid_keys_of_each_row(rng):
    q, k, v = qkv(rng, 2, 1, 400)
    parts = [{**each, "kv_lens": np.array(lens)} for each, lens in zip(cut(k, v, [200]), ([200, 150], [30, 0]),
                                                                       strict=True)]
    want = attention(q, k, v, kv_lens=np.array([230, 150]), return_lse=True)
    check(everywhere(q, parts), want, v)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_a_short_prompt_goes_to_the_keys(rng, layout):
    """Queries at their positions over keys at theirs, causal and behind a window, the prompt's own keys among them."""
    q, k, v = qkv(rng, 2, 9, 1000)
    for options in ({"causal": True}, {"causal": True, "window": 300}, {"window": 5}):
        want = attention(q, k, v, return_lse=True, **options)
        places = [positions_of(layout, 1000, 3, rank) for rank in range(3)]
        parts = [{"k_local": k[:, at], "v_local": v[:, at], "kv_positions": at} for at in places]
        check(everywhere(q, parts, q_positions=np.arange(991, 1000), **options), want, v)


def test_large_results_are_reduced(rng):
    """More than every rank could send to every other at once."""
    q, k, v = qkv(rng, 2, 60, 500, 8, 2, 16, 32)
    for sinks in (None, np.zeros(8, np.float32)):
        want = attention(q, k, v, sinks=sinks, return_lse=True)
        check(everywhere(q, cut(k, v, [100, 300]), sinks=sinks), want, v)


def test_nan_and_infinity_are_where_one_process_has_them(rng):
    q, k, v = qkv(rng, 1, 1, 600)
    k[0, 450, 1, 0] = np.nan
    got, want = everywhere(q, cut(k, v, [300])), attention(q, k, v, return_lse=True)
    np.testing.assert_array_equal(np.isnan(got[0]), np.isnan(want[0]))
    np.testing.assert_array_equal(np.isnan(got[1]), np.isnan(want[1]))


def test_what_travels_does_not_grow_with_the_keys(rng):
    q = normal(rng, 1, 1, 4, 16)

    def moved(tokens: int) -> list[int]:
        k, v = qkv(rng, 1, 1, tokens)[1:]

        def run(comm: Comm) -> int:
            stats = Stats()
            sharded_decode(q, k, v, comm=comm, stats=stats)
            return stats.sent
        return run_threads(run, 3)

    assert moved(10) == moved(5000) == [2 * 4 * 4 * 17] * 3


def test_ranks_that_differ_are_told():
    q, k = np.ones((1, 1, 2, 4), np.float32), np.ones((1, 3, 2, 4), np.float32)

    def run(comm: Comm) -> str:
        with pytest.raises(ValueError, match="^sharded_decode: ") as caught:
            sharded_decode(q, k, k, comm=comm, softcap=2.0 + comm.rank)
        sharded_decode(q, k, k, comm=comm)
        return str(caught.value)

    assert all("softcap is 2.0 on rank 0 and 3.0 on rank 1" in said for said in run_threads(run, 2))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "causal": ({"causal": True}, "causal or window is given without q_positions and kv_positions"),
    "window": ({"window": 3, "q_positions": np.array([4])}, "causal or window is given without"),
    "ring": ({"k_local": KVCache(1, 8, 2, 4, window=4), "v_local": None}, "k_local is a KVCache with a window of 4"),
    "axes": ({"q": np.ones((1, 2, 4), np.float32)}, "q has shape (1, 2, 4), expected 4 axes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_names_itself_and_breaks_the_other_ranks_off(case):
    changes, message = WRONG[case]
    x = np.ones((1, 1, 2, 4), np.float32)
    given = {"q": x, "k_local": x, "v_local": x}
    with pytest.raises(ValueError) as caught:
        sharded_decode(**{**given, **changes}, comm=SelfComm())
    assert str(caught.value).startswith("sharded_decode: " + message)
    _, errors = run_threads_to_the_end(
        lambda comm: sharded_decode(**{**given, **(changes if comm.rank else {})}, comm=comm), 2)
    assert [type(each) for each in errors] == [RankError, ValueError]
