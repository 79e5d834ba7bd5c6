"""attention with explicit positions: against float64, and bit for bit where they say what the default does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_attention import Array, bits, check, qkv

import forge_c as fc
from forge_c import KVCache, attention, merge_attention

pytestmark = pytest.mark.usefixtures("one_thread")

VISIBILITY: tuple[dict[str, Any], ...] = (
    {}, {"causal": True}, {"window": 9}, {"causal": True, "window": 70}, {"causal": True, "window": 2**70})


# ---- positions that say what the default does -------------------------------------------------------

@pytest.mark.parametrize("start", [0, 1000, -700, 2**62, -2**63])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 20), (1, 1500), (5, 600), (97, 97), (130, 300), (3, 270)])
def test_a_run_of_positions_gives_the_bits_of_the_default(isa, dtype, rng, q_len, kv_len, start):
    q, k, v = qkv(rng, 2, q_len, kv_len, dtype=dtype)
    keys = start + np.arange(kv_len)
    for options in VISIBILITY:
        want = bits(attention(q, k, v, return_lse=True, **options))
        for given in ({"q_positions": keys[kv_len - q_len:], "kv_positions": keys},
                      {"q_positions": np.stack([keys[kv_len - q_len:]] * 2), "kv_positions": np.stack([keys] * 2)},
                      {"kv_positions": keys}):
            assert bits(attention(q, k, v, return_lse=True, **options, **given)) == want
        if start == 0:
            given = {"q_positions": keys[kv_len - q_len:].astype(np.uint32)}
            assert bits(attention(q, k, v, return_lse=True, **options, **given)) == want


def test_valid_keys_and_positions(isa, rng):
    """The queries are the last of each row's valid keys, and what lies beyond those need not ascend."""
    q, k, v = qkv(rng, 3, 4, 300)
    lens = np.array([300, 256, 4])
    for options in VISIBILITY:
        want = bits(attention(q, k, v, kv_lens=lens, return_lse=True, **options))
        positions = np.where(np.arange(300) < lens[:, None], np.arange(300) + 5, -1)
        queries = lens[:, None] + np.arange(5 - 4, 5)
        for given in ({"kv_positions": positions}, {"kv_positions": positions, "q_positions": queries}):
            assert bits(attention(q, k, v, kv_lens=lens, return_lse=True, **given, **options)) == want


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
def test_a_cache_lies_at_0_1_2(isa, rng, stored):
    q, k, v = qkv(rng, 2, 3, 600)
    cache = KVCache(2, 600, 2, 16, dtype=stored)
    cache.append(k, v, lens=[600, 300])
    for options in VISIBILITY:
        want = bits(attention(q, cache, return_lse=True, **options))
        for given in ({"q_positions": np.array([[597, 598, 599], [297, 298, 299]])}, {"kv_positions": np.arange(600)}):
            assert bits(attention(q, cache, return_lse=True, **given, **options)) == want


# ---- against the definition -------------------------------------------------------------------------

def test_gaps(isa, dtype, rng):
    """Tokens that were routed past a layer: each row has positions of its own, and some queries see nothing."""
    for q_len, kv_len in ((1, 40), (7, 300), (60, 520)):
        q, k, v = qkv(rng, 2, q_len, kv_len, dtype=dtype)
        keys, queries = (np.sort(rng.integers(-50, 1000, (2, n)), axis=1) for n in (kv_len, q_len))
        for options in VISIBILITY[:4]:
            check(q, k, v, q_positions=queries, kv_positions=keys, **options)
            check(q, k, v, q_positions=queries[0], kv_positions=keys[1], kv_lens=np.array([kv_len // 2, 0]), **options)


def test_queries_between_keys_far_apart(isa, rng):
    """Positions at both ends of what an int64 holds."""
    least, most = -2**63, 2**63 - 1
    q, k, v = qkv(rng, 1, 4, 5)
    keys, queries = np.array([least, -1, 0, 1, most]), np.array([least, 0, 2, most])
    for options in ({"causal": True}, {"causal": True, "window": 2}, {"window": most}, {"causal": True, "window": most},
                    {"causal": True, "window": 2**70}):
        check(q, k, v, q_positions=queries, kv_positions=keys, **options)


def shards(seq: int, ranks: int) -> list[Array]:
    """A ring's zigzag: rank r has the pieces r and 2 ranks - 1 - r of the sequence."""
    pieces = np.array_split(np.arange(seq), 2 * ranks)
    return [np.concatenate([pieces[r], pieces[-1 - r]]) for r in range(ranks)]


@pytest.mark.parametrize("options", VISIBILITY[:4])
def test_the_shards_of_a_ring_make_the_whole(isa, rng, assert_close, options):
    q, k, v = qkv(rng, 1, 700, 700)
    whole, lse = attention(q, k, v, return_lse=True, **options)
    for own in shards(700, 3):
        out, sums = np.zeros_like(q[:, own]), np.full((1, len(own), 4), -np.inf, np.float32)
        for other in shards(700, 3):
            part = check(q[:, own], k[:, other], v[:, other], q_positions=own, kv_positions=other, **options)
            out, sums = merge_attention(out, sums, *part)
        assert_close("attention", out, whole[:, own].astype(np.float64), n=700, d=16, s=30, magnitude=3)
        assert_close("lse", sums, lse[:, own].astype(np.float64), n=700, d=16, s=30, magnitude=1 + np.abs(sums))


def test_a_packed_batch_of_documents(isa, rng):
    """Documents 1000 apart under a window of 500: no query sees another document, and each is as alone."""
    lens = (300, 1, 256, 90)
    places = np.concatenate([1000 * i + np.arange(n) for i, n in enumerate(lens)])
    q, k, v = qkv(rng, 1, len(places), len(places))
    out, _ = check(q, k, v, q_positions=places, kv_positions=places, causal=True, window=500)
    start = 0
    for n in lens:
        one = slice(start, start + n)
        alone = attention(q[:, one], k[:, one], v[:, one], causal=True)
        np.testing.assert_allclose(out[:, one], alone, rtol=0, atol=1e-5)
        start += n


def test_a_tree_of_guesses(isa, rng):
    """Siblings share a position, so that causal lets them see each other; the mask says who is whose ancestor."""
    parents, depth = [-1, 0, 0, 1, 1, 2], [0, 1, 1, 2, 2, 2]
    seen = np.zeros((6, 300 + 6), bool)
    seen[:, :300] = True
    for i in range(6):
        j = i
        while j >= 0:
            seen[i, 300 + j], j = True, parents[j]
    q, k, v = qkv(rng, 1, 6, 306)
    places = 300 + np.array(depth)
    options = {"causal": True, "window": 200, "mask": seen}
    out, _ = check(q, k, v, q_positions=places, kv_positions=np.concatenate([np.arange(300), places]), **options)
    for leaf in (3, 4, 5):
        path = [*range(300), *(300 + j for j in range(6) if seen[leaf, 300 + j])]
        alone = attention(q[:, leaf:leaf + 1], k[:, path], v[:, path], causal=True, window=200)
        np.testing.assert_allclose(out[:, leaf:leaf + 1], alone, rtol=0, atol=1e-5)


def test_any_thread_count_gives_the_same_bits(isa, rng, each_thread_count):
    for q_len, kv_len in ((1, 4096), (150, 500)):
        q, k, v = qkv(rng, 2, q_len, kv_len, 6, 2, 32, 40)
        keys, queries = (np.sort(rng.integers(0, 6000, (2, n)), axis=1) for n in (kv_len, q_len))
        given = {"q_positions": queries, "kv_positions": keys, "causal": True, "window": 2000, "return_lse": True}
        seen = {bits(attention(q, k, v, **given)) for _ in each_thread_count()}
        assert len(seen) == 1


# ---- what is refused --------------------------------------------------------------------------------

Q, KV = np.ones((2, 3, 4, 8), np.float32), np.ones((2, 5, 2, 8), np.float32)
RING = KVCache(2, 9, 2, 8, window=4)
AT = np.arange(5)
WRONG = {
    "floats": ({"q_positions": np.ones(3)}, TypeError, "q_positions has dtype float64, expected integers"),
    "a list": ({"q_positions": [1, 2, 3]}, TypeError, "q_positions is a list, expected a NumPy array"),
    "too few": ({"q_positions": AT[:2]}, ValueError,
                "q_positions has shape (2,), expected (q_len,) = (3,) or (batch, q_len) = (2, 3)"),
    "heads": ({"kv_positions": np.ones((2, 2, 5), int)}, ValueError,
              "kv_positions has shape (2, 2, 5), expected (kv_len,) = (5,) or (batch, kv_len) = (2, 5)"),
    "back": ({"q_positions": np.array([3, 4, 2])}, ValueError,
             "q_positions[2] is 2 after 4, expected positions that ascend"),
    "back in a row": ({"q_positions": AT[:3], "kv_positions": np.stack([AT, AT[::-1]])}, ValueError,
                      "kv_positions[1, 1] is 3 after 4, expected positions that ascend"),
    "beyond": ({"q_positions": np.array([1, 2, 2**63], np.uint64)}, ValueError,
               "q_positions holds 9223372036854775808, expected at most 9223372036854775807"),
    "no last": ({"kv_positions": AT, "kv_lens": np.array([5, 2])}, ValueError,
                "kv_positions is given without q_positions, and a row of 2 keys has no last 3: pass q_positions"),
    "ring": ({"k": RING, "v": None, "q_positions": AT[:3]}, ValueError,
             "q_positions or kv_positions is given with a KVCache that has a window"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_refused_call_says_why_and_writes_nothing(case):
    options, error, message = WRONG[case]
    out = np.full(Q.shape, 7, np.float32)
    with pytest.raises(error) as caught:
        attention(**{"q": Q, "k": KV, "v": KV, "out": out, **options})
    assert str(caught.value).startswith("attention: " + message)
    assert (out == 7).all()


def test_an_out_over_the_positions_is_refused():
    raw = np.zeros(Q.size, np.float32)
    for name in ("q_positions", "kv_positions"):
        n = 3 if name == "q_positions" else 5
        with pytest.raises(ValueError, match=f"attention: out overlaps {name}"):
            fc.attention(Q, KV, KV, out=raw.reshape(Q.shape), **{name: raw.view(np.int64)[:n]})
    assert not raw.any()
