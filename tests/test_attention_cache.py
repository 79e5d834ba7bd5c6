"""attention over a KVCache: the arrays in it, rings, rows, int8, chunks of a prompt."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import reference
from conftest import DTYPES, check_close, multiplies_pairs
from suite import case, once
from test_attention import BFLOAT16, INF, Array, bits, expected, normal, qkv

import forge_c as fc
from forge_c import KVCache, attention

pytestmark = pytest.mark.usefixtures("one_thread")


def filled(k: Array, v: Array, chunk: int, **options: Any) -> KVCache:
    batch, kv_len, heads, dim = k.shape
    cache_ = KVCache(batch, kv_len + 5, heads, dim, v_dim=v.shape[3], **options)
    for begin in range(0, kv_len, chunk):
        cache_.append(k[:, begin:begin + chunk], v[:, begin:begin + chunk])
    return cache_


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_len", [1, 20, 256, 300, 700])
def test_a_cache_is_the_arrays_in_it(isa, dtype, rng, stored, kv_len):
    for q_len in {1, min(kv_len, 9)}:
        q = normal(rng, 2, q_len, 6, 24, dtype=dtype)
        k, v = normal(rng, 2, kv_len, 3, 24), normal(rng, 2, kv_len, 3, 20)
        kept = filled(k, v, 100, dtype=stored)
        held_k, held_v = k.astype(DTYPES[stored]), v.astype(DTYPES[stored])
        for options in ({}, {"causal": True}, {"causal": True, "window": 40},
                        {"mask": rng.random((2, 1, q_len, kv_len)) < 0.8, "sinks": normal(rng, 6), "softcap": 5.0}):
            want = bits(attention(q, held_k, held_v, return_lse=True, **options))
            assert bits(attention(q, kept, return_lse=True, **options)) == want
            assert bits(attention(q, *kept, return_lse=True, **options)) == want


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dim", [64, 72, 128])
def test_few_queries_have_the_bits_of_many(isa, rng, stored, dim):
    """Few rows take the panels of a page one after the other, many take several at once."""
    k, v = normal(rng, 1, 530, 1, dim), normal(rng, 1, 530, 1, dim)
    for ratio in range(1, 10):
        q = normal(rng, 1, 40, ratio, dim)
        kept = filled(k, v, 200, dtype=stored)
        whole = attention(q, kept)
        for begin, count in ((0, 1), (7, 1), (11, 2), (20, 3)):
            with case(f"{ratio} heads", f"{count} queries"):
                few = q[:, begin:begin + count]
                assert attention(few, kept).tobytes() == whole[:, begin:begin + count].tobytes()


@once
def integer_roundings(q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array]:
    """What an int8 cache's products may add to a score, and (b, i, h, v_dim) to the output by way of the weights.

    q is rounded to a multiple of max|q| / 32767; a weight times its token's scale, max|v| / 127, to one of the largest
    such product / 32767.
    """
    (_, _, heads, dim), kv_len = q.shape, k.shape[1]
    k, v = (np.repeat(np.asarray(a, np.float64), heads // a.shape[2], axis=2) for a in (k, v))
    length = np.abs(k).sum(axis=-1).max(axis=1)[:, None]
    score = np.abs(q.astype(np.float64)).max(axis=-1) * dim**-0.5 / 32767 / 2 * length
    each = np.broadcast_to(np.eye(kv_len)[None, :, None], (*k.shape[:3], kv_len))
    scale = np.moveaxis(np.abs(v).max(axis=-1) / 127, 1, -1)[:, None]
    weight = (reference.attention(q, k, each, **options)[0] * scale).max(axis=-1)
    integers = (np.abs(v) * 127 / np.abs(v).max(axis=-1, keepdims=True)).sum(axis=1)[:, None]
    return score, weight[..., None] / 32767 / 2 * integers


@pytest.mark.parametrize("kv_len", [1, 20, 256, 300, 700])
def test_an_int8_cache_is_the_numbers_that_it_gives(isa, dtype, rng, kv_len):
    for q_len in {1, min(kv_len, 40)}:
        q = normal(rng, 2, q_len, 6, 24, dtype=dtype)
        k, v = normal(rng, 2, kv_len, 3, 24), normal(rng, 2, kv_len, 3, 20)
        k[:, kv_len // 2] = 0
        kept = filled(k, v, 100, dtype="int8")
        for options in ({}, {"causal": True}, {"causal": True, "window": 40},
                        {"mask": rng.random((2, 1, q_len, kv_len)) < 0.8, "sinks": normal(rng, 6), "softcap": 5.0}):
            got = attention(q, kept, return_lse=True, **options)
            want = expected(q, *kept, **options)
            score, weights = integer_roundings(q, *kept, **options)
            # Two roundings more for each scale: of a score, and of a weight. An error e in scores is 2e in weights.
            check_close("attention", got[0], want[0], magnitude=want[2], n=kv_len + 2, d=24 + 2, s=want[3],
                        more=2 * score[..., None] * want[2] + weights)
            check_close("lse", got[1], want[1], magnitude=1 + np.abs(want[1]), n=kv_len, d=24 + 2, s=want[3][..., 0],
                        more=score)


@pytest.mark.parametrize("dim", [1, 15, 512, 1030])
def test_the_largest_integers_do_not_overflow(isa, rng, dim):
    """Every product of the same sign and as large as can be: over the channels of a key, and over 256 keys."""
    q, k, v = np.ones((1, 3, 2, dim), np.float32), np.ones((1, 600, 1, dim), np.float32), normal(rng, 1, 600, 1, dim)
    v[:, :256] = -2.0
    out, lse = attention(q, filled(k, v, 600, dtype="int8"), causal=True, return_lse=True, scale=1.0)
    np.testing.assert_allclose(lse[0, :, 0], dim + np.log([598, 599, 600]), rtol=2e-4)
    first = filled(k[:, :256], v[:, :256], 256, dtype="int8")
    np.testing.assert_allclose(attention(q, first, causal=True), -2, rtol=1e-5)


def test_a_nan_in_an_int8_cache_reaches_who_sees_it(isa, rng):
    k, v, q = normal(rng, 1, 300, 1, 16), normal(rng, 1, 300, 1, 16), normal(rng, 1, 10, 2, 16)
    clean = attention(q, filled(k, v, 300, dtype="int8"), causal=True, window=5)
    for broken in (k, v):
        kept = broken[0, 294, 0, 3]
        broken[0, 294, 0, 3] = np.nan
        got = attention(q, filled(k, v, 300, dtype="int8"), causal=True, window=5)
        broken[0, 294, 0, 3] = kept
        sees = np.arange(290, 300)
        sees = (sees >= 294) & (sees < 299)
        assert np.isnan(got[0, sees]).all() and got[0, ~sees].tobytes() == clean[0, ~sees].tobytes()
    q[0, 4, 1, 2] = np.inf
    got = attention(q, filled(k, v, 300, dtype="int8"), causal=True, window=5)
    assert np.isnan(got[0, 4, 1]).all() and np.isnan(got).sum() == 16


def test_float32_queries_on_a_bfloat16_cache(isa, rng):
    """Where the ISA multiplies pairs of bfloat16, queries are rounded as the keys were; elsewhere they are exact."""
    for q_len, kv_len in ((1, 700), (33, 300)):
        q, k, v = normal(rng, 1, q_len, 8, 64), normal(rng, 1, kv_len, 2, 64), normal(rng, 1, kv_len, 2, 64)
        kept = filled(k, v, 256, dtype="bfloat16")
        pairs = multiplies_pairs(next(iter(kept)).dtype)
        want = expected(q.astype(BFLOAT16) if pairs else q, *kept, causal=True)
        got = attention(q, kept, causal=True)
        op = "attention_pairs" if pairs else "attention"
        check_close(op, got, want[0], magnitude=want[2], n=kv_len, d=64, s=want[3])


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [1, 40, 256, 300])
def test_a_ring_is_the_window_of_the_whole(isa, rng, stored, window):
    k, v = normal(rng, 2, 1300, 2, 8), normal(rng, 2, 1300, 2, 20)
    ring = KVCache(2, 10**6, 2, 8, v_dim=20, dtype=stored, window=window)
    for end in (200, 256, 257, 500, 756, 1012, 1013, 1269, 1300):
        begin = ring.seq_len
        ring.append(k[:, begin:end], v[:, begin:end])
        q = normal(rng, 2, end - begin, 4, 8)
        held = k[:, :end].astype(DTYPES[stored]), v[:, :end].astype(DTYPES[stored])
        want = bits(attention(q, *held, causal=True, window=window, return_lse=True))
        assert bits(attention(q, ring, causal=True, return_lse=True)) == want
        assert bits(attention(q, ring, causal=True, window=window, return_lse=True)) == want
    narrower = attention(q, *held, causal=True, window=max(window // 2, 1))
    assert attention(q, ring, causal=True, window=max(window // 2, 1)).tobytes() == narrower.tobytes()


def test_rows_of_a_cache_have_their_own_lengths(isa, rng):
    k, v, q = normal(rng, 3, 300, 2, 8), normal(rng, 3, 300, 2, 8), normal(rng, 3, 2, 4, 8)
    kept, lens = KVCache(3, 300, 2, 8), np.array([300, 0, 57])
    kept.append(k, v, lens=lens)
    got = attention(q, kept, causal=True, return_lse=True)
    assert bits(got) == bits(attention(q, k, v, causal=True, kv_lens=lens, return_lse=True))
    assert (got[0][1] == 0).all() and (got[1][1] == -INF).all()
    for row in (0, 2):
        alone = attention(q[row:row + 1], kept.row(row), causal=True)
        assert alone.tobytes() == got[0][row].tobytes()


@pytest.mark.parametrize("chunk", [1, 3, 16, 100, 256])
@pytest.mark.parametrize("window", [None, 40, 300])
def test_a_prompt_in_chunks_is_the_whole_prompt(isa, rng, chunk, window):
    """From arrays, from a cache of everything, and from bfloat16 and int8 caches: rings, if there is a window."""
    fc.set_num_threads(3 if chunk == 100 else 1)
    total = 300 if chunk < 16 else 620
    q, k, v = qkv(rng, 1, total, total, 4, 2, 8, 20)
    k, v = (a.astype(BFLOAT16).astype(np.float32) for a in (k, v))
    options = {"causal": True, "sinks": normal(rng, 4), "softcap": 4.0}
    whole = attention(q, k, v, window=window, return_lse=True, **options)
    halves = attention(q, k.astype(BFLOAT16), v.astype(BFLOAT16), window=window, return_lse=True, **options)
    plain = KVCache(1, total, 2, 8, v_dim=20)
    stored = KVCache(1, total, 2, 8, v_dim=20, dtype="bfloat16", window=window)
    small = KVCache(1, total, 2, 8, v_dim=20, dtype="int8", window=window)
    everything = filled(k, v, 256, dtype="int8")
    bytes_ = attention(q, everything, window=window, return_lse=True, **options)
    for begin in range(0, total, chunk):
        new = slice(begin, min(begin + chunk, total))
        want = bits((whole[0][:, new], whole[1][:, new]))
        keys, values = k[:, :new.stop], v[:, :new.stop]
        assert bits(attention(q[:, new], keys, values, window=window, return_lse=True, **options)) == want, begin
        plain.append(k[:, new], v[:, new])
        stored.append(k[:, new], v[:, new])
        small.append(k[:, new], v[:, new])
        assert bits(attention(q[:, new], plain, window=window, return_lse=True, **options)) == want, begin
        for kept, all_ in ((stored, halves), (small, bytes_)):
            want = bits((all_[0][:, new], all_[1][:, new]))
            assert bits(attention(q[:, new], kept, return_lse=True, **options)) == want, begin


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
def test_a_cache_gives_the_same_bits_on_any_threads(isa, rng, stored, each_thread_count):
    k, v = normal(rng, 2, 3000, 2, 32), normal(rng, 2, 3000, 2, 40)
    kept = filled(k, v, 256, dtype=stored)
    for q_len in (1, 3, 40):
        q = normal(rng, 2, q_len, 8, 32)
        seen = [bits(attention(q, kept, causal=True, return_lse=True)) for _ in each_thread_count()]
        assert all(other == seen[0] for other in seen[1:])


# ---- a reader beside a writer -----------------------------------------------------------------------

class Growing(np.ndarray):
    """Lengths to which another thread appends whenever NumPy, and with it the GIL, is asked for something."""

    def max(self, *args: Any, **options: Any) -> Any:
        longest = super().max(*args, **options)
        self[...] += 200
        return longest

    def copy(self, order: Any = "C") -> Any:
        return np.array(self, subok=False)


def test_a_cache_that_grows_during_the_call_is_read_as_it_was_at_one_moment(rng):
    """Its length decides about the mask's size, and then how much of the mask is read."""
    cache = KVCache(1, 300, 1, 16)
    k = np.ones((1, 240, 1, 16), np.float32)
    cache.append(k, k)
    cache.truncate(10)
    cache._lengths = cache._lengths.view(Growing)
    _, lse = attention(k[:, :1], cache, mask=np.zeros(10, np.float32), return_lse=True)
    np.testing.assert_allclose(lse, 4 + np.log(10), rtol=1e-6)


def test_attention_beside_a_thread_that_appends_sees_the_tokens_there_were(rng):
    cache = KVCache(1, 20_000, 2, 16)
    k, q = np.ones((1, 50, 2, 16), np.float32), np.ones((1, 1, 2, 16), np.float32)
    cache.append(k, k)

    def write() -> None:
        while cache.seq_len + 50 <= 20_000:
            cache.append(k, k)

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        least = cache.seq_len
        out, lse = attention(q, cache, return_lse=True)
        seen = np.exp(lse.astype(np.float64) - 4)
        assert (np.abs(out - 1) <= 2.0**-23).all(), "n ones times 1 / n, both rounded"
        assert (seen > least - 1).all() and (seen < cache.seq_len + 1).all()
    writer.join()
