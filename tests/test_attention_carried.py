"""Attention over pieces of its keys, with what rows carry between them: the bits of one call over all keys."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from guard import guarded_copy
from test_attention import CHUNK, Array, bits, normal, qkv

from forge_c import attention
from forge_c.functional import fold_attention, fold_parts

pytestmark = pytest.mark.usefixtures("one_thread")

VISIBILITY: tuple[dict[str, Any], ...] = (
    {}, {"causal": True}, {"window": 9}, {"causal": True, "window": 300}, {"causal": True, "window": 2**70})


def begun(q: Array, v: Array) -> Array:
    """What rows carry before their first key; o is not read."""
    carried = np.full((*q.shape[:3], v.shape[3] + 2), np.nan, np.float32)
    carried[..., -2], carried[..., -1] = -np.inf, 0
    return carried


def in_pieces(q: Array, k: Array, v: Array, positions: Array, cuts: list[int], *, at_end: bool = True,
              sinks: Array | None = None, **options: Any) -> tuple[Array, Array]:
    """(out, lse) over keys cut at `cuts` and at the end, or with the end as a call of its own."""
    carried, edges = begun(q, v), [0, *cuts, k.shape[1]]
    out, lse = np.empty((*q.shape[:3], v.shape[3]), q.dtype), np.empty(q.shape[:3], np.float32)
    ends = {"sinks": sinks, "out": out, "lse": lse}
    for x, y in zip(edges, edges[1:], strict=False):
        last = ends if at_end and y == k.shape[1] else {}
        fold_attention(q, k[:, x:y], v[:, x:y], carried, positions - x, **options, **last)
    if not at_end:
        fold_attention(q, k[:, :0], v[:, :0], carried, positions, **options, **ends)
    return out, lse


def whole(q: Array, k: Array, v: Array, positions: Array, **options: Any) -> tuple[Array, Array]:
    return attention(q, k, v, q_positions=positions, return_lse=True, **options)


def test_chunks_apart_fold_to_the_bits_of_the_whole(isa, dtype, rng, each_thread_count):
    """Each chunk from an empty beginning, anywhere; an empty one, and none at all, change nothing."""
    for heads, kv_heads, v_dim in ((4, 2, 20), (3, 1, 16), (2, 2, 5)):
        q, k, v = qkv(rng, 1, 3, 3 * CHUNK + 10, heads, kv_heads, 24, v_dim, dtype)
        places = np.array([CHUNK, 2 * CHUNK + 5, 3 * CHUNK + 9])
        folded, parts = begun(q, v), []
        for x in range(0, k.shape[1], CHUNK):
            parts.append(begun(q, v))
            fold_attention(q, k[:, x : x + CHUNK], v[:, x : x + CHUNK], parts[-1], places - x, causal=True)
        folded[..., :-2] = 0
        want = folded.copy()
        fold_attention(q, k, v, want, places, causal=True)
        rows = folded.reshape(-1, v_dim + 2)
        for some in (parts[:1], [], parts[1:]):
            fold_parts(rows, np.array([np.nan_to_num(p, nan=0.0, neginf=-np.inf) for p in some],
                                      np.float32).reshape(len(some), *rows.shape))
        assert rows.tobytes() == want.tobytes()
    for wrong in (np.zeros((2, len(rows), 6), np.float32), np.zeros((2, 1, v_dim + 2), np.float32)):
        with pytest.raises(ValueError, match="fold_parts: parts has shape"):
            fold_parts(rows, wrong)


@pytest.mark.parametrize("precision", [None, "bfloat16", "int8"])
def test_pieces_have_the_bits_of_the_whole(isa, dtype, rng, precision):
    """Every cut at chunks, for few queries and many, at ascending positions with gaps."""
    for q_len, kv_len, heads, kv_heads, v_dim in ((1, 3 * CHUNK, 4, 2, 20), (97, 2 * CHUNK + 100, 2, 2, 16),
                                                  (60, 4 * CHUNK - 1, 6, 2, 33), (5, CHUNK + 1, 3, 1, 8)):
        q, k, v = qkv(rng, 2, q_len, kv_len, heads, kv_heads, 24, v_dim, dtype)
        places = np.sort(rng.integers(0, kv_len, q_len))
        for options in VISIBILITY:
            options = {**options, "precision": precision}
            want = bits(whole(q, k, v, places, **options))
            for cuts in ([CHUNK], list(range(CHUNK, kv_len, CHUNK)), [(kv_len - 1) // CHUNK * CHUNK]):
                for at_end in (True, False):
                    assert bits(in_pieces(q, k, v, places, cuts, at_end=at_end, **options)) == want, (options, cuts)


def test_scale_softcap_and_sinks(isa, rng):
    q, k, v = qkv(rng, 2, 50, 700)
    places, sinks = np.arange(650, 700), normal(rng, 4)
    for options in ({"softcap": 3.0}, {"scale": 0.7, "sinks": sinks}, {"softcap": 2.0, "sinks": sinks, "causal": True}):
        assert bits(in_pieces(q, k, v, places, [512], **options)) == bits(whole(q, k, v, places, **options))


def test_rows_that_see_nothing_of_a_piece_stay_as_they_are(isa, rng):
    """Not even a NaN among its keys reaches them; rows that see no key at all give 0, sinks or not."""
    q, k, v = qkv(rng, 1, 200, 2 * CHUNK)
    carried = begun(q, v)
    carried[:, :100] = normal(rng, 1, 100, 4, 18)
    before = carried.copy()
    fold_attention(q, np.full_like(k, np.nan), v, carried, np.arange(-200, 0), causal=True)
    fold_attention(q, k, np.full_like(v, np.inf), carried, np.arange(10**6, 10**6 + 200), window=20)
    assert carried.tobytes() == before.tobytes()
    places = np.arange(-100, 100)
    for options in ({"causal": True}, {"causal": True, "sinks": normal(rng, 4)}):
        got = in_pieces(q, k, v, places, [CHUNK], **options)
        assert not got[0][:, :100].any() and bits(got) == bits(whole(q, k, v, places, **options))


def test_infinite_and_nan_scores(isa, rng):
    q, k, v = qkv(rng, 1, 40, 700)
    k[0, 3, 0, 0], k[0, 600, 1, 0], v[0, 300, 0, 0] = np.inf, np.nan, np.inf
    places = np.arange(660, 700)
    for options in ({}, {"causal": True, "window": 350}):
        assert bits(in_pieces(q, k, v, places, [256, 512], **options)) == bits(whole(q, k, v, places, **options))


def test_any_thread_count_gives_the_same_bits(isa, rng, each_thread_count):
    for q_len in (1, 150):
        q, k, v = qkv(rng, 2, q_len, 4 * CHUNK, 6, 2, 32, 40)
        seen = {bits(in_pieces(q, k, v, np.arange(4 * CHUNK - q_len, 4 * CHUNK), [512], causal=True))
                for _ in each_thread_count()}
        assert len(seen) == 1


def test_a_slice_of_what_more_rows_carry(isa, rng):
    """carried may lie apart from batch to batch, and at its end nothing is touched."""
    q, k, v = qkv(rng, 2, 30, CHUNK, dtype=ml_dtypes.bfloat16)
    want, every = begun(q, v), begun(np.repeat(q, 3, axis=1), v)
    fold_attention(q, k, v, want, np.arange(30), causal=True)
    before = every.copy()
    fold_attention(q, k, v, every[:, 20:50], np.arange(30), causal=True)
    assert every[:, 20:50].tobytes() == want.tobytes()
    assert every[:, :20].tobytes() == before[:, :20].tobytes() and every[:, 50:].tobytes() == before[:, 50:].tobytes()
    for at_end in (False, True):
        tight = guarded_copy(begun(q, v), at_end=at_end)
        fold_attention(q, k, v, tight, np.arange(30), causal=True)
        assert tight.tobytes() == want.tobytes()


def test_what_it_is_given_is_checked():
    q, k = np.ones((1, 2, 2, 4), np.float32), np.ones((1, 3, 1, 4), np.float32)
    carried, places = np.zeros((1, 2, 2, 6), np.float32), np.arange(2)
    for wrong, message in ((carried[..., :5], "carried has shape"), (carried.astype(np.float64), "carried has dtype"),
                           (np.zeros((1, 2, 2, 12), np.float32)[..., ::2], "not C-contiguous")):
        with pytest.raises((TypeError, ValueError), match=message):
            fold_attention(q, k, k, wrong, places)
    with pytest.raises(ValueError, match="out has shape"):
        fold_attention(q, k, k, carried, places, out=np.zeros((1, 2, 2, 5), np.float32))
