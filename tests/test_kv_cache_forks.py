"""The key/value cache: keys that turn on their way in, and forks."""

import numpy as np
import pytest
from conftest import DTYPES
from test_kv_cache import raw, snapshot, tokens

import forge_c
from forge_c.state.kv import KVCache

# ---- RoPE on the way --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [16, 12])
def test_append_turns_keys_as_rope_does(rng, isa, dtype, interleaved, dim):
    """Bit for bit, for whole panels of tokens and lone ones, and channels beyond the table untouched."""
    table = forge_c.rope_table(dim, 400)
    k, v = tokens(rng, 2, 300, 2, 16), tokens(rng, 2, 300, 2, 16)
    fused, apart = KVCache(2, 400, 2, 16, dtype=dtype), KVCache(2, 400, 2, 16, dtype=dtype)
    for begin, end in ((0, 5), (5, 100), (100, 101), (101, 300)):
        lens = [end - begin, (end - begin) // 2]
        positions = apart.lengths[:, None] + np.arange(end - begin)
        fused.append(k[:, begin:end], v[:, begin:end], lens=lens, rope=table, interleaved=interleaved)
        turned = forge_c.rope(k[:, begin:end], table, positions=positions, interleaved=interleaved)
        apart.append(turned, v[:, begin:end], lens=lens)
    for row in range(2):
        assert snapshot(fused.row(row)) == snapshot(apart.row(row))


@pytest.mark.parametrize("held", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("values", DTYPES.values(), ids=str)
def test_keys_are_rounded_to_their_dtype_as_they_turn(rng, isa, dtype, values, held):
    """As attention without a cache gets them: rope's result has its input's dtype, whatever holds it afterwards."""
    table, k, v = forge_c.rope_table(16, 64), tokens(rng, 2, 40, 2, 16).astype(dtype), tokens(rng, 2, 40, 2, 16)
    v, fused, apart = v.astype(values), KVCache(2, 64, 2, 16, dtype=held), KVCache(2, 64, 2, 16, dtype=held)
    for begin, end in ((0, 5), (5, 38), (38, 40)):
        lens, positions = [end - begin, (end - begin) // 2], apart.lengths[:, None] + np.arange(end - begin)
        fused.append(k[:, begin:end], v[:, begin:end], lens=lens, rope=table)
        apart.append(forge_c.rope(k[:, begin:end], table, positions=positions), v[:, begin:end], lens=lens)
    assert [snapshot(fused.row(row)) for row in range(2)] == [snapshot(apart.row(row)) for row in range(2)]


@pytest.mark.parametrize(("rope", "error", "message"), [
    (forge_c.rope_table(8, 4), IndexError, "position 5 is outside the table of 4"),
    (forge_c.rope_table(32, 100), ValueError, "rope turns 32 channels, expected at most 16"),
    (np.ones((4, 4)), TypeError, "rope is a ndarray, expected a RopeTable"),
])
def test_append_with_a_wrong_table_changes_nothing(rng, rope, error, message):
    cache = KVCache(1, 100, 1, 16)
    cache.append(tokens(rng, 1, 3, 1, 16), tokens(rng, 1, 3, 1, 16))
    before = raw(cache)
    with pytest.raises(error) as caught:
        cache.append(tokens(rng, 1, 3, 1, 16), tokens(rng, 1, 3, 1, 16), rope=rope)
    assert str(caught.value) == f"KVCache.append: {message}"
    assert raw(cache) == before and cache.seq_len == 3


# ---- forks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 700])
def test_forks_continue_on_their_own(rng, length, window, dtype):
    """Children and parent append, truncate below what they share and append again: each like a copy of its own."""
    cache = KVCache(2, 1500, 1, 4, dtype=dtype, window=window)
    for begin in range(0, length, 128):
        k = tokens(rng, 2, min(128, length - begin), 1, 4)
        cache.append(k, -k, lens=[k.shape[1], (k.shape[1] + 1) // 2])
    twins = [cache.row(b // 3).copy() for b in range(6)]
    fork, parent = cache.fork(3), cache.copy()
    assert fork.batch == 6 and fork.lengths.tolist() == np.repeat(cache.lengths, 3).tolist()
    for back in (0, 100):
        if back:
            stop = np.maximum(fork.lengths - back, 0)
            fork.truncate(stop)
            for one in (cache, parent):
                one.truncate(np.maximum(one.lengths - back, 0))
            for b, twin in enumerate(twins):
                twin.truncate(stop[b : b + 1])
        k, own = tokens(rng, 6, 150, 1, 4), tokens(rng, 2, 40, 1, 4)
        fork.append(k, 2 * k)
        cache.append(own, own)
        parent.append(own, own)
        for b, twin in enumerate(twins):
            twin.append(k[b : b + 1], 2 * k[b : b + 1])
            assert snapshot(fork.row(b)) == snapshot(twin)
        for b in range(2):
            assert snapshot(cache.row(b)) == snapshot(parent.row(b))


def test_a_fork_shares_full_pages_and_no_others(rng):
    k = tokens(rng, 1, 600, 1, 4)
    cache = KVCache(1, 4096, 1, 4)
    cache.append(k, k)
    fork = cache.fork(2)
    np.testing.assert_array_equal(fork._pages.table[:, :2], cache._pages.table[[0, 0], :2])
    mine, theirs = set(cache._pages.table[0, 2:].tolist()), set(fork._pages.table[:, 2:].ravel().tolist())
    assert not mine & theirs and len(theirs) == 2 * 14
    again = fork.fork(1)
    again.truncate(10)
    again.append(k[:, :1].repeat(2, 0), k[:, :1].repeat(2, 0))
    assert snapshot(fork.row(1)) == snapshot(cache)


def test_a_fork_outlives_its_parent(rng):
    k = tokens(rng, 1, 600, 1, 4)
    cache = KVCache(1, 1024, 1, 4)
    cache.append(k, k)
    fork, before = cache.fork(1), snapshot(cache)
    del cache
    noise = [KVCache(1, 1024, 1, 4) for _ in range(4)]
    for other in noise:
        other.append(-k, -k)
    assert snapshot(fork) == before


def test_a_row_of_a_forked_cache_leaves_shared_pages_alone(rng):
    k = tokens(rng, 2, 300, 1, 4)
    cache = KVCache(2, 1024, 1, 4)
    cache.append(k, k)
    fork, row = cache.fork(1), cache.row(1)
    before = snapshot(fork)
    row.truncate(0)
    row.append(-k[:1], -k[:1])
    assert snapshot(fork) == before
    np.testing.assert_array_equal(next(iter(cache))[1], -k[0])


def test_wrong_forks():
    cache = KVCache(1, 8, 1, 4)
    wrong = ((0, ValueError, "n is 0, expected at least 1"), (1.5, TypeError, "n is 1.5, expected an integer"))
    for n, error, message in wrong:
        with pytest.raises(error) as caught:
            cache.fork(n)
        assert str(caught.value) == f"KVCache.fork: {message}"
