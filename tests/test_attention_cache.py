"""attention over a KVCache: the arrays in it, rings, rows, int8, chunks of a prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import DTYPES, check_close
from test_attention import BFLOAT16, INF, Array, bits, expected, multiplies_pairs, normal, qkv

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
            # Two roundings more for each scale: of a score, and of a weight.
            check_close("attention", got[0], want[0], magnitude=want[2], n=kv_len + 2, d=24 + 2, s=want[3])
            check_close("lse", got[1], want[1], magnitude=1 + np.abs(want[1]), n=kv_len, d=24 + 2, s=want[3][..., 0])


def test_float32_queries_on_a_bfloat16_cache(isa, rng):
    """Where the ISA multiplies pairs of bfloat16, queries are rounded as the keys were; elsewhere they are exact."""
    for q_len, kv_len in ((1, 700), (33, 300)):
        q, k, v = normal(rng, 1, q_len, 8, 64), normal(rng, 1, kv_len, 2, 64), normal(rng, 1, kv_len, 2, 64)
        kept = filled(k, v, 256, dtype="bfloat16")
        pairs = multiplies_pairs(next(iter(kept)))
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
