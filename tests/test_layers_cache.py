"""Attention layers with a cache: the same bytes as without one, and a cache that a failed call leaves alone."""
import threading

import numpy as np
import pytest
from conftest import multiplies_pairs

from forge_c import KVCache, nn
from forge_c.nn.modern_attention import _FIRST_CACHE

ROPE = nn.RotaryPositionalEmbedding(8, 2048)

LAYERS = {
    "grouped": lambda: nn.GroupedQueryAttention(24, 3, 1, rope=ROPE, causal=True, seed=0),
    "biased": lambda: nn.GroupedQueryAttention(24, 4, 2, bias=True, causal=True, seed=0),
    "multi_query": lambda: nn.MultiQueryAttention(24, 3, causal=True, rope=ROPE, seed=0),
    "multi_head": lambda: nn.MultiHeadAttention(24, 4, causal=True, seed=0),
    "block": lambda: nn.ModernTransformerBlock(24, 4, 2, seed=0),
    "bfloat16": lambda: nn.ModernTransformerBlock(24, 4, 2, seed=0).astype("bfloat16"),
}
# What a layer's own cache holds for an input: what attention multiplies plain keys of that dtype as.
HELD = {"float32": "float32", "float16": "float32", "bfloat16": "bfloat16"}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]()


def tokens(rng, batch: int, seq: int, width: int = 24, dtype="float32"):
    return rng.standard_normal((batch, seq, width), np.float32).astype(dtype)


def fed(layer, x, chunk: int, kv=None):
    """The outputs for x given in chunks, end to end, and the cache."""
    parts = []
    for begin in range(0, x.shape[1], chunk):
        y, kv = layer(x[:, begin:begin + chunk], use_cache=True, kv_cache=kv)
        parts.append(y)
    return np.concatenate(parts, axis=1), kv


@pytest.mark.parametrize("chunk", [1, 3, 16, 300])
def test_cached_is_uncached_to_the_bit(rng, dtype, layer, chunk):
    x = tokens(rng, 2, 40 if chunk == 1 else 300, dtype=dtype)
    y, kv = fed(layer, x, chunk)
    assert y.tobytes() == layer(x).tobytes() and y.dtype == dtype
    assert kv.seq_len == x.shape[1]


def test_a_row_of_a_batch_is_the_row_alone(rng, dtype, layer):
    x = tokens(rng, 3, 20, dtype=dtype)
    together, _ = fed(layer, x, 4)
    for row in range(3):
        assert together[row].tobytes() == fed(layer, x[row:row + 1], 4)[0][0].tobytes()


def test_the_cache_that_a_layer_makes_holds_its_own_dtype(rng, dtype, layer):
    """And so does the larger one that takes its place."""
    _, kv = fed(layer, tokens(rng, 1, 2 * _FIRST_CACHE, dtype=dtype), _FIRST_CACHE // 2)
    assert kv.max_seq_len > _FIRST_CACHE and kv.dtype == HELD[dtype.name]


@pytest.mark.parametrize("held", ["float32", "bfloat16", "int8"])
def test_a_cache_of_another_dtype_is_that_choice_alone(rng, dtype, layer, held):
    """What multiplies follows from x's dtype and the cache's: not from chunks, rows or room."""
    x = tokens(rng, 2, 40, dtype=dtype)
    inner = getattr(layer, "gqa", getattr(layer, "attention", layer))
    whole, _ = fed(layer, x, 40, KVCache(2, 64, inner.n_kv_heads, inner.head_dim, dtype=held))
    for chunk in (1, 7):
        y, kv = fed(layer, x, chunk, KVCache(2, 16, inner.n_kv_heads, inner.head_dim, dtype=held))
        assert y.tobytes() == whole.tobytes() and y.dtype == dtype and kv.dtype == held
    alone, _ = fed(layer, x[1:], 40, KVCache(1, 64, inner.n_kv_heads, inner.head_dim, dtype=held))
    assert alone.tobytes() == whole[1:].tobytes()


def test_rows_of_different_lengths_continue_as_each_alone(rng, dtype, layer):
    """Prompts of 9 and 4 tokens fed row by row into one cache, then tokens for both at once."""
    prompts = [tokens(rng, 1, 9, dtype=dtype), tokens(rng, 1, 4, dtype=dtype)]
    more, inner = tokens(rng, 2, 5, dtype=dtype), getattr(layer, "gqa", getattr(layer, "attention", layer))
    cache = KVCache(2, 64, inner.n_kv_heads, inner.head_dim, dtype=HELD[dtype.name])
    for row, prompt in enumerate(prompts):
        layer(prompt, use_cache=True, kv_cache=cache.row(row))
    assert cache.lengths.tolist() == [9, 4]
    together, same = fed(layer, more, 2, cache)
    assert same is cache
    for row, prompt in enumerate(prompts):
        alone, _ = fed(layer, np.concatenate([prompt, more[row:row + 1]], axis=1), 3)
        assert together[row].tobytes() == alone[0, prompt.shape[1]:].tobytes()


def test_a_kv_cache_alone_asks_for_caching(rng, dtype, layer):
    x = tokens(rng, 1, 6, dtype=dtype)
    _, kv = layer(x[:, :5], use_cache=True)
    y, again = layer(x[:, 5:], kv_cache=kv)
    assert again is kv and kv.seq_len == 6
    assert y.tobytes() == layer(x)[:, 5:].tobytes()


def test_cached_attention_is_causal_whatever_the_layer_says(rng):
    x = tokens(rng, 2, 7)
    free, causal = (nn.GroupedQueryAttention(24, 4, 2, causal=causal, seed=0) for causal in (False, True))
    assert free(x).tobytes() != causal(x).tobytes()
    assert free(x, use_cache=True)[0].tobytes() == causal(x).tobytes()


def test_a_full_cache_is_replaced_by_a_larger_one(rng):
    layer = nn.GroupedQueryAttention(24, 3, 1, rope=ROPE, causal=True, seed=0)
    x = tokens(rng, 1, 5 * _FIRST_CACHE // 2)
    y, kv = fed(layer, x, _FIRST_CACHE // 2)
    assert kv.seq_len == x.shape[1] <= kv.max_seq_len
    assert y.tobytes() == layer(x).tobytes()


def test_growing_leaves_the_callers_cache_alone(rng):
    layer, x = nn.GroupedQueryAttention(24, 3, 1, seed=0), tokens(rng, 1, 6)
    cache = KVCache(1, 4, 1, 8, dtype="bfloat16")
    _, kept = layer(x[:, :4], kv_cache=cache)
    _, grown = layer(x[:, 4:], kv_cache=kept)
    assert kept is cache and cache.seq_len == 4
    assert (grown.max_seq_len, grown.seq_len, grown.dtype) == (8, 6, "bfloat16")


@pytest.mark.parametrize("window", [1, 5, 300])
def test_a_windowed_cache_is_a_windowed_mask(rng, window):
    layer, x = nn.GroupedQueryAttention(24, 3, 1, rope=ROPE, causal=True, seed=0), tokens(rng, 2, 700)
    y, kv = fed(layer, x, 100, KVCache(2, 700, 1, 8, window=window))
    distance = np.arange(700)[:, None] - np.arange(700)
    expected = layer(x, mask=distance < window)
    assert kv.nbytes < KVCache(2, 1024, 1, 8).nbytes
    np.testing.assert_allclose(y, expected, rtol=0, atol=2.0**-24 * 700 * np.abs(expected).max())


def test_a_bfloat16_cache_rounds_keys_and_values(rng):
    """Half a unit of 2^-8 in every value, and in every key of scores that stay below 2 in size, where an error is twice
    as large in a weight; where pairs of bfloat16 are multiplied, in every query and weight too."""
    layer, x = nn.GroupedQueryAttention(24, 3, 1, causal=True, seed=0), tokens(rng, 2, 30)
    exact = layer(x)
    y, _ = layer(x, kv_cache=KVCache(2, 64, 1, 8, dtype="bfloat16"))
    assert y.tobytes() != exact.tobytes()
    sides = 2 if multiplies_pairs("bfloat16") else 1
    np.testing.assert_allclose(y, exact, rtol=0, atol=2.0**-8 * sides * (1 + 2 * 2) * np.abs(exact).max())


def test_a_mask_over_the_cache(rng):
    layer, x = nn.GroupedQueryAttention(24, 4, 2, causal=True, seed=0), tokens(rng, 2, 9)
    mask = rng.random((2, 1, 9, 9)) < 0.7
    _, kv = layer(x[:, :6], mask[:, :, :6, :6], use_cache=True)
    y, _ = layer(x[:, 6:], mask[:, :, 6:], kv_cache=kv)
    assert y.tobytes() == layer(x, mask)[:, 6:].tobytes()


@pytest.mark.parametrize(("call", "error"), [
    (dict(mask=np.ones((3, 3), bool)), ValueError),
    (dict(mask=np.ones((2, 9), complex)), TypeError),
    (dict(residual=np.ones((2, 2, 23), np.float32)), ValueError),
])
@pytest.mark.parametrize("window", [None, 4])
def test_a_failed_call_leaves_the_cache_as_it_was(rng, call, error, window):
    layer, x = nn.GroupedQueryAttention(24, 3, 1, rope=ROPE, causal=True, seed=0), tokens(rng, 2, 700)
    cache, twin = KVCache(2, 4096, 1, 8, window=window), KVCache(2, 4096, 1, 8, window=window)
    for kv in (cache, twin):
        fed(layer, x[:, :600], 200, kv)
    with pytest.raises(error):
        layer(x[:, 600:602], kv_cache=cache, **call)
    assert cache.lengths.tolist() == [600, 600]
    assert layer(x[:, 600:602], kv_cache=cache)[0].tobytes() == layer(x[:, 600:602], kv_cache=twin)[0].tobytes()


def test_positions_beyond_the_rope_leave_the_cache_as_it_was(rng):
    block = nn.ModernTransformerBlock(24, 4, 2, max_seq_len=8, seed=0)
    _, kv = block(tokens(rng, 1, 7), use_cache=True)
    with pytest.raises(IndexError, match="rope: position 8 is outside the table of 8 positions"):
        block(tokens(rng, 1, 2), kv_cache=kv)
    assert kv.seq_len == 7
    block(tokens(rng, 1, 1), kv_cache=kv)
    assert kv.seq_len == 8


@pytest.mark.parametrize(("kv_cache", "error", "message"), [
    (KVCache(1, 8, 2, 6), ValueError, "kv_cache has (batch, n_kv_heads, head_dim) (1, 2, 6), expected (2, 2, 6)"),
    (KVCache(2, 8, 1, 6), ValueError, "kv_cache has (batch, n_kv_heads, head_dim) (2, 1, 6), expected (2, 2, 6)"),
    (KVCache(2, 8, 2, 8), ValueError, "kv_cache has (batch, n_kv_heads, head_dim) (2, 2, 8), expected (2, 2, 6)"),
    ((1, 2), TypeError, "kv_cache is a tuple, expected a KVCache"),
])
def test_wrong_caches(kv_cache, error, message):
    with pytest.raises(error) as caught:
        nn.GroupedQueryAttention(24, 4, 2)(np.ones((2, 3, 24)), kv_cache=kv_cache)
    assert str(caught.value) == f"GroupedQueryAttention: {message}"


def test_two_threads_on_one_cache_are_right_or_told_so(rng):
    layer, x = nn.GroupedQueryAttention(24, 4, 2, seed=0), tokens(rng, 1, 3)
    cache, told, done = KVCache(1, 3 * 400, 2, 6), [], []

    def work() -> None:
        for _ in range(100):
            try:
                layer(x, kv_cache=cache)
                done.append(1)
            except RuntimeError as error:
                told.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.seq_len == 3 * len(done) and len(done) + len(told) == 400
    assert set(told) <= {"KVCache: another thread is writing to this cache"}
    k, _ = cache
    assert all(k[0, i:i + 3].tobytes() == k[0, :3].tobytes() for i in range(0, cache.seq_len, 3))
