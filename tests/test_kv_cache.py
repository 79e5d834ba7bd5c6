"""The key/value cache: what comes out is what went in, full stops, rings, rows, and one writer."""

import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest

from forge_c.functional import KV_CHUNK
from forge_c.state.kv import KVCache, kv_cache_nbytes

GIB = 2**30
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def tokens(rng, batch: int, count: int, heads: int, dim: int, dtype="float32") -> np.ndarray:
    """Random keys or values (batch, count, heads, dim)."""
    return rng.standard_normal((batch, count, heads, dim), np.float32).astype(dtype)


def raw(cache: KVCache) -> bytes:
    """Everything in the memory of a cache that shares none."""
    return b"".join(memory.tobytes() for memory in cache._memory)


def slots(cache: KVCache, page: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values (heads, KV_CHUNK, dim) of one page of a cache that shares none, read as forge.h draws it."""
    heads, d, e, unit = cache.n_kv_heads, cache.head_dim, cache.v_dim, 1 if cache.dtype == "float32" else 2
    dtype = BFLOAT16 if cache.dtype == "bfloat16" else np.dtype(cache.dtype)
    (pages,) = cache._memory
    lines, panels = -(-d // unit), -(-e // 16)
    keys, values = (KV_CHUNK * n * dtype.itemsize for n in (lines * unit, panels * 16))
    head = pages[page].reshape(heads, -1)
    k = head[:, :keys].view(dtype).reshape(heads, KV_CHUNK // 16, lines, 16, unit).transpose(0, 1, 3, 2, 4)
    v = head[:, keys : keys + values].view(dtype).reshape(heads, panels, KV_CHUNK // unit, 16, unit)
    k, v = k.reshape(heads, KV_CHUNK, -1)[..., :d], v.transpose(0, 2, 4, 1, 3).reshape(heads, KV_CHUNK, -1)[..., :e]
    if cache.dtype == "int8":
        scales = head[:, keys + values :].view(np.float32).reshape(heads, 2, KV_CHUNK, 1)
        return k * scales[:, 0], v * scales[:, 1]
    return k, v


def snapshot(cache: KVCache) -> tuple[bytes, bytes, list[int]]:
    k, v = cache
    return k.tobytes(), v.tobytes(), cache.lengths.tolist()


@pytest.mark.parametrize(("n_kv_heads", "share"), [(12, "100.0"), (3, "25.0"), (2, "16.7"), (1, "8.3")])
def test_the_share_of_a_twelve_headed_cache(n_kv_heads, share):
    full = kv_cache_nbytes(1, 4096, 12, 64)
    assert f"{100 * kv_cache_nbytes(1, 4096, n_kv_heads, 64) / full:.1f}" == share


@pytest.mark.parametrize(
    ("dtype", "all_heads", "grouped"),
    [("float64", 16, 2), ("float32", 8, 1), ("bfloat16", 4, 0.5), ("float16", 4, 0.5), (BFLOAT16, 4, 0.5)],
)
def test_llama_2_70b_per_layer(dtype, all_heads, grouped):
    assert kv_cache_nbytes(32, 4096, 64, 128, dtype) == all_heads * GIB
    assert kv_cache_nbytes(32, 4096, 8, 128, dtype) == grouped * GIB


def test_nbytes_of_a_cache_that_no_computer_holds_is_exact():
    assert kv_cache_nbytes(2**20, 2**40, 2**10, 2**10, np.float32) == 2**83
    assert kv_cache_nbytes(0, 4096, 8, 128) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_nbytes_is_what_there_is_room_for(dtype):
    cache = KVCache(3, 50, 2, 24, dtype=dtype)
    assert cache.nbytes == kv_cache_nbytes(3, 50, 2, 24, dtype)
    scales = 3 * 50 * 2 * 8 if dtype == "int8" else 0
    assert KVCache(3, 50, 2, 24, v_dim=8, dtype=dtype).nbytes == (cache.nbytes - scales) * 32 // 48 + scales
    whole = KVCache(3, 512, 2, 48, dtype=dtype)
    assert whole.nbytes == whole._memory[0].nbytes


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("given", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("chunks", [(9,), (1,) * 9, (4, 0, 5)])
def test_what_comes_out_is_what_went_in(rng, stored, given, chunks):
    k, v = tokens(rng, 2, 9, 3, 5, given), tokens(rng, 2, 9, 3, 7, given)
    cache = KVCache(2, 9, 3, 5, v_dim=7, dtype=stored)
    begin = 0
    for count in chunks:
        cache.append(k[:, begin : begin + count], v[:, begin : begin + count])
        begin += count
        assert cache.seq_len == begin
    got_k, got_v = cache
    assert got_k.dtype == got_v.dtype == stored == cache.dtype
    np.testing.assert_array_equal(got_k, k.astype(stored))
    np.testing.assert_array_equal(got_v, v.astype(stored))


def test_attributes():
    cache = KVCache(2, 100, 3, 16, v_dim=8, dtype=np.dtype(np.float32))
    assert (cache.batch, cache.max_seq_len, cache.n_kv_heads) == (2, 100, 3)
    assert (cache.head_dim, cache.v_dim) == (16, 8)
    assert (cache.dtype, cache.window, cache.capacity, cache.seq_len) == ("float32", None, 100, 0)
    assert repr(cache) == (
        "KVCache(batch=2, seq_len=0, max_seq_len=100, n_kv_heads=3, head_dim=16, dtype='float32')"
    )
    assert repr(KVCache(1, 100, 3, 16, window=8)).endswith("dtype='float32', window=8)")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("d", "e"), [(16, 16), (5, 21), (64, 80)])
def test_pages_are_those_of_the_picture(rng, dtype, d, e):
    """The bytes in memory, read by NumPy alone: whole panels, lone tokens, pairs and halves of pairs."""
    k, v = tokens(rng, 1, 600, 3, d), tokens(rng, 1, 600, 3, e)
    cache = KVCache(1, 600, 3, d, v_dim=e, dtype=dtype)
    for begin, end in ((0, 1), (1, 40), (40, 43), (43, 300), (300, 301), (301, 600)):
        cache.append(k[:, begin:end], v[:, begin:end])
    for page in range(3):
        begin, end = page * KV_CHUNK, min(600, (page + 1) * KV_CHUNK)
        for got, given in zip(slots(cache, page), (k, v), strict=True):
            got, given = got[:, : end - begin].swapaxes(0, 1), given[0, begin:end]
            if dtype == "int8":
                step = np.abs(given).max(-1, keepdims=True) / 127
                assert (np.abs(got - given) <= step * (0.5 + 2**-16)).all()
            else:
                np.testing.assert_array_equal(got, given.astype(got.dtype))


def test_int8_is_what_its_scale_says(rng):
    k = tokens(rng, 2, 30, 2, 24)
    k[0, 3] = 0.0
    k[1, 4, 1, 7] = np.nan
    k[1, 5, 0, 2] = -np.inf
    cache = KVCache(2, 30, 2, 24, dtype="int8")
    cache.append(k, 3 * k)
    got_k, got_v = cache
    assert got_k.dtype == got_v.dtype == np.float32
    wrong = np.zeros((2, 30, 2), bool)
    wrong[1, 4, 1] = wrong[1, 5, 0] = True
    assert np.isnan(got_k[wrong]).any() and np.isnan(got_v[wrong]).any() and not np.isnan(got_k[~wrong]).any()
    assert (got_k[0, 3] == 0).all()
    scale = np.abs(k).max(-1, keepdims=True) / np.float32(127)
    most = np.maximum(np.abs(k).max(-1, keepdims=True), np.float32(1e-30))[~wrong]
    np.testing.assert_array_equal(got_k[~wrong], np.rint(k[~wrong] * (np.float32(127) / most)) * scale[~wrong])


def test_storage_begins_on_a_cache_line():
    for batch in range(1, 6):
        cache = KVCache(batch, 700, 3, 5, v_dim=9, dtype="bfloat16")
        assert cache._pages.table.shape == (batch, 3) and (cache._pages.table % 64 == 0).all()
        assert len(set(cache._pages.table.ravel().tolist())) == 3 * batch


def test_what_it_gives_is_a_read_only_copy(rng):
    cache = KVCache(2, 8, 1, 4)
    cache.append(tokens(rng, 2, 3, 1, 4), tokens(rng, 2, 3, 1, 4))
    k, v = cache
    assert k.shape == (2, 3, 1, 4) and not np.shares_memory(k, cache._memory[0])
    assert not k.flags.writeable and not v.flags.writeable
    cache.lengths[:] = 0
    assert cache.lengths.tolist() == [3, 3]


def test_strided_and_read_only_input(rng):
    wide = tokens(rng, 2, 6, 2, 8)
    k = wide[:, ::-2]
    k.flags.writeable = False
    cache = KVCache(2, 8, 2, 8)
    cache.append(k, np.asfortranarray(k))
    got_k, got_v = cache
    np.testing.assert_array_equal(got_k, k)
    np.testing.assert_array_equal(got_v, k)


def test_nan_and_infinity_are_kept_without_a_warning(recwarn):
    k = np.array([np.nan, np.inf, -np.inf, 3.4e38], np.float32).reshape(1, 1, 1, 4)
    cache = KVCache(1, 2, 1, 4, dtype="bfloat16")
    with np.errstate(all="raise"):
        cache.append(k, k)
    kept = next(iter(cache)).astype(np.float32).ravel()
    np.testing.assert_array_equal(kept, [np.nan, np.inf, -np.inf, np.inf])
    assert not recwarn.list


# ---- rows of different lengths ----------------------------------------------------------------------


def test_ragged_append(rng):
    k, v = tokens(rng, 3, 4, 2, 4), tokens(rng, 3, 4, 2, 4)
    cache = KVCache(3, 8, 2, 4)
    cache.append(k, v, lens=[4, 0, 2])
    assert cache.lengths.tolist() == [4, 0, 2] and cache.seq_len == 4
    cache.append(k[:, :1], v[:, :1])
    assert cache.lengths.tolist() == [5, 1, 3]
    for row, length in enumerate((4, 0, 2)):
        got_k, got_v = cache.row(row)
        np.testing.assert_array_equal(got_k[0], np.concatenate([k[row, :length], k[row, :1]]))
        np.testing.assert_array_equal(got_v[0], np.concatenate([v[row, :length], v[row, :1]]))


def test_a_row_shares_memory_and_length(rng):
    k = tokens(rng, 1, 5, 2, 4)
    cache = KVCache(3, 8, 2, 4)
    row = cache.row(1)
    row.append(k, 2 * k)
    assert cache.lengths.tolist() == [0, 5, 0] and row.batch == 1 and row.nbytes * 3 == cache.nbytes
    np.testing.assert_array_equal(next(iter(cache))[1], k[0])
    cache.truncate([0, 2, 0])
    assert row.seq_len == 2
    assert np.shares_memory(row._pages.table, cache._pages.table) and row._pages.table.shape == (1, 1)


def test_a_batch_of_rows_equals_caches_of_one_row(rng):
    k = tokens(rng, 3, 6, 1, 4)
    together = KVCache(3, 8, 1, 4)
    together.append(k, k, lens=[6, 2, 5])
    for row, length in enumerate((6, 2, 5)):
        alone = KVCache(1, 8, 1, 4)
        alone.append(k[row : row + 1, :length], k[row : row + 1, :length])
        assert snapshot(alone) == snapshot(together.row(row))


# ---- truncate ---------------------------------------------------------------------------------------


def test_truncate_and_append_again(rng):
    k = tokens(rng, 2, 6, 1, 4)
    cache, fresh = KVCache(2, 8, 1, 4), KVCache(2, 8, 1, 4)
    cache.append(k, k)
    cache.truncate(2)
    cache.append(-k[:, :3], k[:, :3])
    fresh.append(k[:, :2], k[:, :2])
    fresh.append(-k[:, :3], k[:, :3])
    assert snapshot(cache) == snapshot(fresh)


def test_truncate_leaves_shorter_rows_alone(rng):
    k = tokens(rng, 3, 6, 1, 4)
    cache = KVCache(3, 8, 1, 4)
    cache.append(k, k, lens=[6, 2, 4])
    cache.truncate(3)
    assert cache.lengths.tolist() == [3, 2, 3]
    cache.truncate(np.array([1, 2, 0]))
    assert cache.lengths.tolist() == [1, 2, 0]
    cache.truncate(0)
    assert cache.seq_len == 0


# ---- the ring ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_seq_len", "window", "capacity"),
    [
        (2**40, 1, 2 * KV_CHUNK),
        (2**40, KV_CHUNK, 2 * KV_CHUNK),
        (2**40, KV_CHUNK + 1, 3 * KV_CHUNK),
        (100, 4096, KV_CHUNK),
        (KV_CHUNK + 1, 4096, 2 * KV_CHUNK),
    ],
)
def test_ring_size(max_seq_len, window, capacity):
    cache = KVCache(1, max_seq_len, 1, 2, window=window)
    assert cache.capacity == capacity and cache.window == window
    assert cache.nbytes == kv_cache_nbytes(1, capacity, 1, 2)


@pytest.mark.parametrize("chunk", [1, 7, 100, KV_CHUNK])
@pytest.mark.parametrize("window", [1, 37, 300])
def test_the_ring_holds_the_last_window(rng, window, chunk):
    total = 1500
    k, v = tokens(rng, 2, total, 2, 3), tokens(rng, 2, total, 2, 5)
    cache = KVCache(2, 10**6, 2, 3, v_dim=5, window=window)
    for begin in range(0, total, chunk):
        cache.append(k[:, begin : begin + chunk], v[:, begin : begin + chunk])
    got_k, got_v = cache
    np.testing.assert_array_equal(got_k, k[:, total - window :])
    np.testing.assert_array_equal(got_v, v[:, total - window :])
    assert cache.seq_len == total and not got_k.flags.writeable
    assert not np.shares_memory(got_k, cache._memory[0])


@pytest.mark.parametrize("batch", [1, 2])
def test_position_p_lies_in_slot_p_modulo_capacity(rng, batch):
    window, total = 300, 1200
    k = tokens(rng, batch, total, 1, 2)
    cache = KVCache(batch, total, 1, 2, window=window)
    for begin in range(0, total, 200):
        cache.append(k[:, begin : begin + 200], k[:, begin : begin + 200])
    pages = cache.capacity // KV_CHUNK
    for b in range(batch):
        for p in range(total - window, total):
            page = slots(cache, b * pages + p // KV_CHUNK % pages)
            np.testing.assert_array_equal(page[0][0, p % KV_CHUNK], k[b, p, 0])


def test_before_a_whole_chunk_is_attended_its_whole_window_is_there(rng):
    window, total = 300, 1500
    k = tokens(rng, 1, total, 1, 2)
    cache = KVCache(1, total, 1, 2, window=window)
    for begin in range(0, total - KV_CHUNK, KV_CHUNK):
        cache.append(k[:, begin : begin + KV_CHUNK], k[:, begin : begin + KV_CHUNK])
        for p in range(max(0, begin - window + 1), begin + KV_CHUNK):
            page = slots(cache, p % cache.capacity // KV_CHUNK)
            assert page[0][0, p % KV_CHUNK, 0] == k[0, p, 0, 0]


def test_ring_rows_of_different_lengths(rng):
    k = tokens(rng, 2, 1000, 1, 2)
    cache = KVCache(2, 1000, 1, 2, window=50)
    for begin in range(0, 1000, 100):
        cache.append(k[:, begin : begin + 100], k[:, begin : begin + 100], lens=[100, 30])
    assert cache.lengths.tolist() == [1000, 300]
    short = np.concatenate([k[1, begin : begin + 30] for begin in range(0, 1000, 100)])
    np.testing.assert_array_equal(next(iter(cache.row(0)))[0], k[0, -50:])
    np.testing.assert_array_equal(next(iter(cache.row(1)))[0], short[-50:])


def test_ring_truncate_is_exact_or_refused(rng):
    """Against a model that remembers which position each slot holds."""
    window, total = 200, 3000
    k = np.arange(total, dtype=np.float32).reshape(1, total, 1, 1)
    cache = KVCache(1, total, 1, 1, window=window)
    length, slots = 0, {}
    refused = 0
    for _ in range(400):
        if length and rng.random() < 0.4:
            back = int(rng.integers(max(0, length - 600), length + 1))
            held = all(slots[p % cache.capacity] == p for p in range(max(0, back - window), back))
            if held:
                cache.truncate(back)
                length = back
            else:
                refused += 1
                with pytest.raises(ValueError, match="the ring holds only those from"):
                    cache.truncate(back)
        else:
            count = int(min(rng.integers(0, KV_CHUNK + 1), total - length))
            cache.append(k[:, length : length + count], k[:, length : length + count])
            slots.update({p % cache.capacity: p for p in range(length, length + count)})
            length += count
        assert cache.seq_len == length
        np.testing.assert_array_equal(next(iter(cache)).ravel(), range(max(0, length - window), length))
    assert refused > 10


def test_ring_can_always_go_back_one_chunk(rng):
    k = tokens(rng, 1, KV_CHUNK, 1, 2)
    cache = KVCache(1, 10**6, 1, 2, window=513)
    for _ in range(9):
        cache.append(k, k)
    cache.truncate(8 * KV_CHUNK)
    np.testing.assert_array_equal(next(iter(cache))[0, -KV_CHUNK:], k[0])


def test_an_emptied_ring_starts_afresh(rng):
    k = tokens(rng, 1, 200, 1, 2)
    cache = KVCache(1, 10**6, 1, 2, window=10)
    for _ in range(5):
        cache.append(k, k)
    cache.truncate(0)
    cache.append(k[:, :20], k[:, :20])
    cache.truncate(15)
    np.testing.assert_array_equal(next(iter(cache)), k[:, 5:15])


# ---- copies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 40, 300, 5000])
@pytest.mark.parametrize("larger", [None, 1000, 2000])
def test_a_copy_continues_like_the_original(rng, window, larger):
    k = tokens(rng, 2, 900, 2, 4)
    cache = KVCache(2, 1000, 2, 4, dtype="bfloat16", window=window)
    for begin in range(0, 800, 200):
        cache.append(k[:, begin : begin + 200], -k[:, begin : begin + 200], lens=[200, 150])
    twin = cache.copy(larger)
    assert snapshot(twin) == snapshot(cache) and twin.max_seq_len == (larger or 1000)
    twin.append(k[:, 800:], k[:, 800:])
    cache.append(k[:, 800:], k[:, 800:])
    assert snapshot(twin) == snapshot(cache)
    assert not np.shares_memory(twin._memory[0], cache._memory[0])
    before = snapshot(cache)
    twin.truncate(0)
    assert snapshot(cache) == before


def test_a_copy_of_a_row_is_a_cache_of_its_own(rng):
    k = tokens(rng, 3, 5, 1, 4)
    cache = KVCache(3, 8, 1, 4)
    cache.append(k, k)
    twin = cache.row(2).copy()
    twin.append(k[:1], k[:1], lens=[3])
    assert cache.lengths.tolist() == [5, 5, 5] and twin.lengths.tolist() == [8]


# ---- what is refused, and changes nothing -----------------------------------------------------------

GOOD = np.ones((2, 3, 2, 4), np.float32)

WRONG_APPENDS = [
    (GOOD[0], GOOD, None, ValueError, "k has shape (3, 2, 4), expected (2, tokens, 2, 4)"),
    (GOOD[:1], GOOD[:1], None, ValueError, "k has shape (1, 3, 2, 4), expected (2, tokens, 2, 4)"),
    (GOOD, GOOD[..., :3], None, ValueError, "v has shape (2, 3, 2, 3), expected (2, tokens, 2, 4)"),
    (GOOD, GOOD[:, :2], None, ValueError, "v has 2 tokens, expected 3 as k"),
    (
        GOOD.astype(np.float64),
        GOOD,
        None,
        TypeError,
        "k has dtype float64, expected float32, float16 or bfloat16: pass k.astype(np.float32)",
    ),
    (GOOD, GOOD.astype(int), None, TypeError, "v has dtype int64, expected float32, float16 or bfloat16"),
    (GOOD, GOOD, [1], ValueError, "lens has shape (1,) and dtype int64, expected (2,) integers"),
    (GOOD, GOOD, [1.0, 2.0], ValueError, "lens has shape (2,) and dtype float64, expected (2,) integers"),
    (GOOD, GOOD, [1, 4], ValueError, "lens is [1, 4], expected 0 to 3 each"),
    (GOOD, GOOD, [-1, 2], ValueError, "lens is [-1, 2], expected 0 to 3 each"),
    (GOOD, GOOD, None, ValueError, "row 1 has 4 tokens and 3 more do not fit, max_seq_len is 6"),
    (GOOD, GOOD, [0, 3], ValueError, "row 1 has 4 tokens and 3 more do not fit, max_seq_len is 6"),
]


@pytest.mark.parametrize(("k", "v", "lens", "error", "message"), WRONG_APPENDS)
def test_a_rejected_append_changes_nothing(k, v, lens, error, message):
    cache = KVCache(2, 6, 2, 4)
    cache.append(2 * GOOD, 3 * GOOD, lens=[1, 3])
    cache.append(4 * GOOD[:, :1], 5 * GOOD[:, :1])
    before, stored = snapshot(cache), raw(cache)
    with pytest.raises(error) as caught:
        cache.append(k, v, lens=lens)
    assert str(caught.value) == f"KVCache.append: {message}"
    assert snapshot(cache) == before and raw(cache) == stored


def test_a_ring_takes_one_chunk_at_once():
    cache = KVCache(1, 10**6, 1, 2, window=8)
    k = np.ones((1, KV_CHUNK + 1, 1, 2), np.float32)
    with pytest.raises(ValueError) as caught:
        cache.append(k, k)
    assert str(caught.value) == "KVCache.append: 257 tokens at once, expected at most 256 in a ring"
    assert cache.seq_len == 0


def test_a_ring_is_full_at_max_seq_len():
    cache = KVCache(1, 300, 1, 2, window=8)
    k = np.ones((1, 150, 1, 2), np.float32)
    cache.append(k, k)
    cache.append(k, k)
    with pytest.raises(ValueError, match="row 0 has 300 tokens and 1 more do not fit, max_seq_len is 300"):
        cache.append(k[:, :1], k[:, :1])


WRONG_TRUNCATES = [
    (5, ValueError, "n is 5, expected 0 to 4"),
    (-1, ValueError, "n is -1, expected 0 to 4"),
    ([4, 3], ValueError, "n is [4, 3], expected 0 to [4, 2]"),
    ([1, 1, 1], TypeError, "n is [1, 1, 1], expected an integer or 2 of them"),
    (1.0, TypeError, "n is 1.0, expected an integer or 2 of them"),
]


@pytest.mark.parametrize(("n", "error", "message"), WRONG_TRUNCATES)
def test_wrong_truncates(n, error, message):
    cache = KVCache(2, 6, 2, 4)
    cache.append(np.ones((2, 4, 2, 4), np.float32), np.ones((2, 4, 2, 4), np.float32), lens=[4, 2])
    with pytest.raises(error) as caught:
        cache.truncate(n)
    assert str(caught.value) == f"KVCache.truncate: {message}"
    assert cache.lengths.tolist() == [4, 2]


def test_wrong_ring_truncate():
    cache = KVCache(1, 10**6, 1, 2, window=100)
    k = np.ones((1, 250, 1, 2), np.float32)
    for _ in range(4):
        cache.append(k, k)
    cache.truncate(588)
    with pytest.raises(ValueError) as caught:
        cache.truncate(587)
    assert str(caught.value) == (
        "KVCache.truncate: row 0 cannot go back to 587 tokens, the ring holds only those from 488 on and a "
        "window of 100 needs more"
    )


WRONG_CACHES = [
    (dict(batch=0), ValueError, "batch is 0, expected at least 1"),
    (dict(max_seq_len=-4), ValueError, "max_seq_len is -4, expected at least 1"),
    (dict(n_kv_heads=2.0), TypeError, "n_kv_heads is 2.0, expected an integer"),
    (dict(head_dim="8"), TypeError, "head_dim is '8', expected an integer"),
    (dict(v_dim=0), ValueError, "v_dim is 0, expected at least 1"),
    (dict(window=0), ValueError, "window is 0, expected at least 1"),
    (dict(dtype="int4"), ValueError, "dtype is 'int4', expected one of float32, bfloat16, int8"),
    (dict(dtype=np.float16), ValueError, "dtype is 'float16', expected one of float32, bfloat16, int8"),
    (
        dict(max_seq_len=2**62),
        ValueError,
        "18014398509481984 pages of 24576 bytes cannot be addressed",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG_CACHES)
def test_wrong_caches(change, error, message):
    with pytest.raises(error) as caught:
        KVCache(**({"batch": 1, "max_seq_len": 4, "n_kv_heads": 1, "head_dim": 8} | change))
    assert str(caught.value) == f"KVCache: {message}"


def test_other_wrong_calls():
    cache = KVCache(2, 6, 2, 4)
    for i in (2, -1):
        with pytest.raises(IndexError, match=f"KVCache.row: i is {i}, expected 0 to 1"):
            cache.row(i)
    with pytest.raises(ValueError, match="KVCache.copy: max_seq_len is 5, expected at least 6"):
        cache.copy(5)
    with pytest.raises(ValueError, match="kv_cache_nbytes: dtype is 'int4', expected one of float64"):
        kv_cache_nbytes(1, 1, 1, 1, "int4")
    with pytest.raises(ValueError, match="kv_cache_nbytes: seq_len is -1, expected at least 0"):
        kv_cache_nbytes(1, -1, 1, 1)


def test_too_large_for_this_computer_is_a_memory_error():
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))\n"
        "from forge_c.state.kv import KVCache\n"
        "try: KVCache(32, 4096, 64, 128)\n"
        "except MemoryError: print('refused', KVCache(1, 16, 2, 8).nbytes)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["refused", "2048"], done.stderr


# ---- one writer -------------------------------------------------------------------------------------


def in_another_thread(work) -> BaseException | None:
    """What `work` raises there."""
    raised = []

    def run():
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


@pytest.mark.parametrize("shared", [lambda cache: cache, lambda cache: cache.row(1)])
def test_a_second_writer_is_told_so(shared):
    cache = KVCache(2, 6, 2, 4)
    other = shared(cache)
    k = np.ones((other.batch, 3, 2, 4), np.float32)
    with cache.writing():
        for work in (lambda: other.append(k, k), lambda: other.truncate(0), other.copy):
            error = in_another_thread(work)
            assert isinstance(error, RuntimeError)
            assert str(error) == "KVCache: another thread is writing to this cache"
        cache.append(GOOD, GOOD)
    assert in_another_thread(lambda: other.append(k, k)) is None
    assert other.seq_len == 6


def test_the_writer_is_free_again_after_an_error():
    cache = KVCache(2, 4, 2, 4)
    cache.append(GOOD, GOOD)
    with pytest.raises(ValueError, match="do not fit"):
        cache.append(GOOD, GOOD)
    assert in_another_thread(lambda: cache.truncate(0)) is None


def test_many_threads_append_whole_pieces_or_fail_cleanly():
    cache, done = KVCache(1, 4000, 1, 8), []

    def writer(value: int) -> None:
        piece = np.full((1, 5, 1, 8), value, np.float32)
        for _ in range(100):
            try:
                cache.append(piece, piece)
                done.append(value)
            except RuntimeError:
                pass

    threads = [threading.Thread(target=writer, args=(value,)) for value in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    k, _ = cache
    pieces = k.reshape(-1, 5 * 8)
    assert cache.seq_len == 5 * len(done) and len(pieces) == len(done)
    assert (pieces == pieces[:, :1]).all()
    assert sorted(pieces[:, 0].astype(int).tolist()) == sorted(done)
