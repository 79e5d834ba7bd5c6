"""The key/value cache: sizes whose products pass 2**63, copies by copy, deepcopy and pickle."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_kv_cache import snapshot, tokens

import forge_c
from forge_c.functional import KV_CHUNK, KVPages
from forge_c.state.kv import KVCache

TOO_LARGE = [
    ((1, 256, 2**40, 2**13), {}, "n_kv_heads is 1099511627776, head_dim 8192 and v_dim 8192: a page of 256 tokens, "),
    ((1, 256, 2**40, 2**12), {}, "n_kv_heads is 1099511627776, head_dim 4096 and v_dim 4096: a page of 256 tokens, "),
    ((1, 256, 1, 2**54), {"v_dim": 16}, "n_kv_heads is 1, head_dim 18014398509481984 and v_dim 16: a page of 256 "),
    ((1, 256, 1, 16), {"v_dim": 2**62}, "n_kv_heads is 1, head_dim 16 and v_dim 4611686018427387904: a page of 256 "),
    ((1, 256, 2**63, 1), {}, "n_kv_heads is 9223372036854775808, expected at most 9223372036854775807"),
    ((1, 256, 1, 2**63), {}, "head_dim is 9223372036854775808, expected at most 9223372036854775807"),
    ((1, 256, 1, 1), {"v_dim": 2**70}, "v_dim is 1180591620717411303424, expected at most 9223372036854775807"),
    ((2**63, 256, 1, 1), {}, "batch is 9223372036854775808, expected at most 9223372036854775807"),
    ((2**58, 256, 1, 1), {}, "288230376151711744 pages of 17408 bytes cannot be addressed"),
    ((1, 2**63, 1, 1), {"window": 8}, "max_seq_len is 9223372036854775808, expected at most 9223372036854775807"),
    ((1, 256, 1, 1), {"window": 2**63}, "window is 9223372036854775808, expected at most 9223372036854775807"),
    ((1, 10**5000, 1, 1), {}, "max_seq_len is an integer of 16610 bits, expected at most 9223372036854775807"),
    ((1, 2**62, 1, 1), {"window": 2**62}, " pages of 17408 bytes cannot be addressed"),
]


@pytest.mark.parametrize(("sizes", "options", "message"), TOO_LARGE)
@pytest.mark.parametrize("where", ["memory", "file"])
def test_sizes_beyond_every_address_are_refused_by_name(tmp_path, sizes, options, message, where):
    path = {"path": tmp_path / "c.npy"} if where == "file" else {}
    with pytest.raises(ValueError, match=f"^KVCache: .*{re.escape(message)}"):
        KVCache(*sizes, **options, **path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_page_has_the_bytes_of_its_sizes_up_to_the_largest_that_is_taken(dtype):
    """What passes the check in Python's integers does not overflow C's."""
    size = {"float32": 4, "bfloat16": 2, "int8": 1}[dtype]
    taken = 0
    for heads in (1, 3, 2**20, 2**40):
        for bits in range(62):
            for dim in (2**bits - 1, 2**bits, 2**bits + 1):
                try:
                    KVCache(2**60, 1, heads, dim or 1, v_dim=1, dtype=dtype)  # never fits, but for another reason
                except ValueError as error:
                    found = re.search(r"pages of (\d+) bytes", str(error))
                    if not found:
                        assert "a page of 256 tokens" in str(error)
                        continue
                    exact = KV_CHUNK * heads * (dim + 1) * size
                    assert exact <= int(found[1]) <= exact + KV_CHUNK * heads * 128
                    taken += 1
    assert taken > 100


def test_a_window_without_end_is_no_window(rng):
    k, q = tokens(rng, 1, 300, 1, 8), tokens(rng, 1, 3, 2, 8)
    plain, endless = KVCache(1, 1000, 1, 8), KVCache(1, 1000, 1, 8, window=sys.maxsize)
    for begin in (0, 150):
        for cache in (plain, endless):
            cache.append(k[:, begin : begin + 150], k[:, begin : begin + 150])
    assert endless.window == sys.maxsize and snapshot(endless) == snapshot(plain)
    assert forge_c.attention(q, endless, causal=True).tobytes() == forge_c.attention(q, plain, causal=True).tobytes()


def test_numbers_of_forks_and_copies_beyond_every_address():
    cache = KVCache(1, 1000, 1, 4)
    with pytest.raises(ValueError, match="KVCache.fork: n is 4611686018427387904, .* cannot be addressed"):
        cache.fork(2**62)
    with pytest.raises(ValueError, match="KVCache.fork: n is 9223372036854775808, expected at most"):
        cache.fork(2**63)
    with pytest.raises(ValueError, match="KVCache.copy: max_seq_len is 9223372036854775808, expected at most"):
        cache.copy(2**63)
    with pytest.raises(ValueError, match="KVCache: .* pages of .* bytes cannot be addressed"):
        cache.copy(2**62)
    with pytest.raises(MemoryError):
        cache.fork(2**52)


# ---- copy, deepcopy, pickle ----


@pytest.mark.parametrize("made", [copy.copy, copy.deepcopy, lambda cache: copy.deepcopy({"a": [cache]})["a"][0],
                                  lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("options", [{}, {"dtype": "int8"}, {"window": 40}])
def test_copy_deepcopy_and_pickle_make_a_cache_of_its_own(rng, made, options):
    k = tokens(rng, 2, 250, 1, 4)
    cache = KVCache(2, 1000, 1, 4, **options)
    for _ in range(3):
        cache.append(k, -k, lens=[250, 100])
    want, twin = snapshot(cache), made(cache)
    assert type(twin) is KVCache and repr(twin) == repr(cache) and snapshot(twin) == want
    twin.append(k[:, :5], k[:, :5])
    assert snapshot(cache) == want and twin.seq_len == 755
    cache.truncate(0)
    assert twin.seq_len == 755


def test_a_deep_copy_of_a_row_or_a_mapped_cache_lies_in_memory(rng, tmp_path):
    k = tokens(rng, 2, 250, 1, 4)
    cache = KVCache(2, 1000, 1, 4, path=tmp_path / "c.npy")
    cache.append(k, k)
    for one, made in itertools.product((cache, cache.row(1)),
                                       (copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one)))):
        twin = made(one)
        assert snapshot(twin) == snapshot(one) and twin._file is None
        twin.append(k[: twin.batch], k[: twin.batch])
        assert cache.lengths.tolist() == [250, 250]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_holds_the_pages_in_use(rng, protocol):
    """Not the room for a million tokens; and an empty cache holds none."""
    cache = KVCache(2, 1 << 20, 1, 4)
    assert pickle.loads(pickle.dumps(cache, protocol)).seq_len == 0
    cache.append(tokens(rng, 2, 300, 1, 4), tokens(rng, 2, 300, 1, 4), lens=[300, 2])
    found = pickle.dumps(cache.fork(2), protocol)
    assert len(found) < 9 * cache._pages.page_nbytes  # the first protocols write a byte as two
    twin = pickle.loads(found)
    assert twin.lengths.tolist() == [300, 300, 2, 2] and snapshot(twin.row(1)) == snapshot(cache.row(0))


def test_a_cache_that_is_written_to_is_not_pickled(rng):
    cache = KVCache(1, 8, 1, 4)
    with ThreadPoolExecutor(1) as pool, cache.writing(), pytest.raises(RuntimeError, match="another thread"):
        pool.submit(pickle.dumps, cache).result()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pages_alone_are_not_pickled(protocol):
    pages = KVCache(1, 8, 1, 4)._pages
    for work in (lambda: pickle.dumps(pages, protocol), lambda: copy.copy(pages), lambda: copy.deepcopy(pages)):
        with pytest.raises(TypeError, match=r"KVPages: .*KVCache.copy\(\).*KVCache.save\(\)"):
            work()


def test_pages_without_a_table_are_an_error():
    pages = KVPages("float32", 1, 4, 4, False)
    k, one = np.ones((1, 1, 1, 4), np.float32), np.ones(1, np.int64)
    for work in (lambda: pages.read(0, 0, 1), lambda: pages.append(k, k, one, one)):
        with pytest.raises(ValueError, match="KVPages: there is no table of pages"):
            work()
    with pytest.raises(TypeError):
        pages.with_table(None)
    with pytest.raises(ValueError, match="KVPages: dtype is 'int4', expected one of float32, bfloat16, int8"):
        KVPages("int4", 1, 4, 4, False)
