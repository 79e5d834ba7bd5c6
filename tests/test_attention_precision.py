"""attention(precision=): what it is of the arrays rounded, what bytes may lose, and that a row's bits stay its own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import reference
from conftest import check_close
from guard import guarded, guarded_copy
from suite import once
from test_attention import (
    BFLOAT16,
    EMPTY,
    HIDDEN,
    INF,
    NAN,
    OPTIONS,
    Array,
    bits,
    dirtied,
    expected,
    masks_hiding,
    normal,
    qkv,
    random_mask,
)
from test_attention_cache import filled

import forge_c
from forge_c import KVCache, attention

pytestmark = pytest.mark.usefixtures("one_thread")

PRECISIONS = ("float32", "bfloat16", "int8")
WIDE = ("vnni", "amx")  # in names of ISAs that multiply bytes by bytes: queries and weights have 8 bits, else 7


def levels(isa: str) -> tuple[int, int]:
    """The largest byte of a query, and of a weight."""
    return (127, 255) if any(word in isa for word in WIDE) else (127, 127) if isa == "base" else (63, 127)


# ---- float32 and bfloat16: the arrays in that dtype -------------------------------------------------


@pytest.mark.parametrize("kv_len", [1, 20, 300, 700])
def test_a_precision_is_that_of_keys_and_values_in_that_dtype(isa, dtype, rng, kv_len):
    q, k, v = qkv(rng, 2, min(kv_len, 30), kv_len, 6, 3, 24, 20, dtype)
    for options in ({}, {"causal": True}, {"causal": True, "window": 40},
                    {"mask": rng.random((2, 1, q.shape[1], kv_len)) < 0.8, "sinks": normal(rng, 6), "softcap": 5.0}):
        for precision, held in (("float32", np.float32), ("bfloat16", BFLOAT16)):
            want = bits(attention(q, k.astype(held), v.astype(held), return_lse=True, **options))
            assert bits(attention(q, k, v, precision=precision, return_lse=True, **options)) == want
        natural = "bfloat16" if dtype == BFLOAT16 else "float32"
        want = bits(attention(q, k, v, return_lse=True, **options))
        assert bits(attention(q, k, v, precision=natural, return_lse=True, **options)) == want
        assert bits(attention(q, k, v, precision=None, return_lse=True, **options)) == want


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
def test_a_cache_in_any_precision_is_the_arrays_in_it(isa, rng, precision, stored):
    for q_len, kv_len in ((1, 1), (1, 700), (9, 20), (200, 700)):
        q, k, v = qkv(rng, 2, q_len, kv_len, 6, 3, 24, 20)
        kept = filled(k, v, 100, dtype=stored)
        for options in ({"causal": True}, {"causal": True, "window": 40},
                        {"mask": rng.random((2, 1, q_len, kv_len)) < 0.8, "sinks": normal(rng, 6), "softcap": 5.0}):
            want = bits(attention(q, *kept, precision=precision, return_lse=True, **options))
            assert bits(attention(q, kept, precision=precision, return_lse=True, **options)) == want


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
def test_a_ring_in_any_precision_is_the_window_of_the_whole(isa, rng, precision, stored):
    k, v = normal(rng, 2, 1100, 2, 8), normal(rng, 2, 1100, 2, 20)
    ring, whole = (KVCache(2, 10**6, 2, 8, v_dim=20, dtype=stored, window=w) for w in (40, None))
    for end in (200, 256, 257, 500, 756, 1012, 1013, 1100):
        begin = ring.seq_len
        for each in (ring, whole):
            each.append(k[:, begin:end], v[:, begin:end])
        q = normal(rng, 2, end - begin, 4, 8)
        want = bits(attention(q, whole, causal=True, window=40, precision=precision, return_lse=True))
        assert bits(attention(q, ring, causal=True, precision=precision, return_lse=True)) == want


# ---- int8 -------------------------------------------------------------------------------------------


@once
def byte_roundings(q: Array, k: Array, v: Array, query: int, weight: int, **options: Any) -> tuple[Array, Array]:
    """What bytes may add to a score, and to the output: (b, i, h) each.

    H q is rounded to a multiple of its largest / query, H k - m to one of its largest / 127, where |H k - m| is no more
    than twice the largest H k; H v to one of its largest / 127, a weight times that to one of the largest / weight. The
    output's error is rotated: no channel gets more than the error's length.
    """
    heads, scale = q.shape[2], abs(options.get("scale", q.shape[3] ** -0.5))
    q, k, v = (reference.rotated(reference.f64(a)) for a in (q, k, v))
    k, v = (np.repeat(a, heads // a.shape[2], axis=2) for a in (k, v))
    largest, length = (2 * f(np.abs(k), axis=-1).max(axis=1)[:, None] for f in (np.max, np.sum))
    q_step, k_step = np.abs(q).max(axis=-1) / query / 2, largest / 127 / 2
    score = scale * (np.abs(q).sum(axis=-1) * k_step + length * q_step + q.shape[3] * q_step * k_step)
    each = np.broadcast_to(np.eye(k.shape[1])[None, :, None], (*k.shape[:3], k.shape[1]))
    p = reference.attention(q, k, each, **options)[0]
    v_scale = np.moveaxis(np.abs(v).max(axis=-1) / 127, 1, -1)[:, None]
    size = np.einsum("bihj,bjhe->bihe", p, np.abs(v)).max(axis=-1)
    most = np.abs(v).max(axis=-1, keepdims=True)
    integers = (np.abs(v) * 127 / np.where(most == 0, 1, most)).sum(axis=1).max(axis=-1)[:, None]
    errors = 2 * score * size + (p * v_scale).sum(axis=-1) / 2 + (p * v_scale).max(axis=-1) / weight / 2 * integers
    return score, errors * (v.shape[-1] & -v.shape[-1]) ** 0.5


def check_bytes(isa: str, q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array]:
    got = attention(q, k, v, precision="int8", return_lse=True, **options)
    check_byte_pair(isa, got, q, k, v, **options)
    return got


def check_byte_pair(isa: str, got: tuple[Array, Array], q: Array, k: Array, v: Array, **options: Any) -> None:
    """out and lse of precision="int8" within what bytes may do to them."""
    want = expected(q, k, v, **options)
    score, more = byte_roundings(q, k, v, *levels(isa), **options)
    kv_len, dim = k.shape[1], q.shape[3]
    check_close("attention_bytes", got[0], want[0], magnitude=want[2], n=kv_len, d=dim, s=want[3],
                more=more[..., None] + 2 * score[..., None] * want[2])
    check_close("lse_bytes", got[1], want[1], magnitude=1 + np.abs(want[1]), n=kv_len, d=dim, s=want[3][..., 0],
                more=score)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_in_bytes(isa, dtype, rng, name):
    for kv_len in (20, 270):
        q, k, v = qkv(rng, 2, 7, kv_len, dtype=dtype)
        check_bytes(isa, q, k, v, **OPTIONS[name](rng, kv_len))


@pytest.mark.parametrize("dim", [1, 3, 15, 16, 24, 40, 64, 96, 128])
def test_head_dims_in_bytes(isa, rng, dim):
    for v_dim, q_len, kv_len in ((dim, 3, 1), (17, 2, 65), (1, 40, 300), (64, 1, 600)):
        q, k, v = qkv(rng, 1, q_len, kv_len, 6, 2, dim, v_dim)
        check_bytes(isa, q, k, v, causal=q_len > 1)


def test_positions_in_bytes(isa, rng):
    q, k, v = qkv(rng, 2, 5, 400)
    at = np.sort(rng.integers(0, 900, (2, 400)))
    check_bytes(isa, q, k, v, causal=True, q_positions=np.array([3, 100, 400, 500, 899]), kv_positions=at)
    plain = attention(q, k, v, causal=True, precision="int8")
    said = attention(q, k, v, causal=True, precision="int8", q_positions=np.arange(395, 400),
                     kv_positions=np.arange(400))
    assert said.tobytes() == plain.tobytes()


@cache
def gaussian() -> tuple[Any, ...]:
    inputs = qkv(np.random.default_rng(5), 1, 32, 2048, 2, 1, 64)
    return inputs, reference.attention(*inputs)[0]


def test_the_error_is_that_of_eight_bits(isa):
    """Root mean square, relative: a number with the step s is off by s / 12^0.5. The largest of 64 normal numbers is
    2.6, of 64 weights 13.5 where their root mean square is 2.7; a score has two errors, an output two more."""
    (q, k, v), want = gaussian()
    query, weight = levels(isa)
    value, steps = 2.6 / 127 / 12**0.5, np.array([2.6 / query, 13.5 / 2.7 / weight]) / 12**0.5
    most = np.sqrt(2 * value**2 + (steps**2).sum())
    got = attention(q, k, v, precision="int8")
    error = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
    assert 0.8 * most < error < 1.1 * most


@pytest.mark.parametrize("which", ["q and k", "v", "bias of k"])
def test_outlier_channels_cost_little(isa, rng, which):
    """A channel 50 times as large: without rotation a scale would leave 50 times less of the others."""
    q, k, v = qkv(rng, 1, 16, 700, 2, 1, 64)
    if which == "q and k":
        q[..., 5] *= 50 / 8
        k[..., 5] *= 50
    elif which == "v":
        v[..., 9] *= 50
    else:
        k[..., 3:7] += 50
    want = reference.attention(q, k, v, causal=True, scale=0.02)[0]
    got = attention(q, k, v, causal=True, scale=0.02, precision="int8")
    rest = np.delete(got - want, 9, -1) if which == "v" else got - want
    wanted = np.delete(want, 9, -1) if which == "v" else want
    error = np.sqrt(np.mean(rest**2) / np.mean(wanted**2))
    assert error < (0.06 if which == "bias of k" else 0.2) * 127 / levels(isa)[0]


# ---- a row's bits are its own -----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"window": 300}, {"softcap": 20.0}])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_prompt_whole_in_pieces_and_token_by_token(isa, rng, precision, options):
    q, k, v = qkv(rng, 1, 600, 600, 6, 2, 24, 20)
    k += 3
    whole = attention(q, k, v, causal=True, precision=precision, **options)
    for ends in ([100, 101, 256, 270, 500, 600], [1, 2, 15, 16, 17, 255, 256, 257, 272, 599, 600]):
        begin, kept = 0, KVCache(1, 600, 2, 24, v_dim=20)
        for end in ends:
            kept.append(k[:, begin:end], v[:, begin:end])
            part = attention(q[:, begin:end], kept, causal=True, precision=precision, **options)
            assert part.tobytes() == whole[:, begin:end].tobytes(), (begin, end)
            arrays = attention(q[:, begin:end], k[:, :end], v[:, :end], causal=True, precision=precision, **options)
            assert arrays.tobytes() == part.tobytes()
            begin = end


def test_a_row_alone_is_the_row_in_any_batch_of_bytes(isa, rng):
    q, k, v = qkv(rng, 3, 40, 330, 4, 2, 40)
    lens = np.array([330, 17, 256])
    mask = random_mask(rng, 3, 1, 40, 330)
    for options in ({"causal": True}, {"mask": mask}):
        together = attention(q, k, v, kv_lens=lens, precision="int8", return_lse=True, **options)
        for b in range(3):
            own = {"mask": mask[b:b + 1]} if "mask" in options else options
            alone = attention(*(a[b:b + 1] for a in (q, k, v)), kv_lens=lens[b:b + 1], precision="int8",
                              return_lse=True, **own)
            assert bits(alone) == bits(tuple(a[b:b + 1] for a in together))


def test_any_thread_count_gives_the_same_bytes(isa, rng, each_thread_count):
    calls = [(qkv(rng, 2, 150, 500, 6, 2, 32, 40), {"causal": True}), (qkv(rng, 1, 1, 2048, 6, 2, 32), {}),
             (qkv(rng, 1, 5, 2048, 6, 2, 32), {"causal": True, "window": 1000})]
    seen = [[bits(attention(*inputs, precision="int8", return_lse=True, **options)) for inputs, options in calls]
            for _ in each_thread_count()]
    assert all(other == seen[0] for other in seen[1:])


# ---- NaN, infinity, nothing to see ------------------------------------------------------------------


@pytest.mark.parametrize("special", [NAN, INF, -INF])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_a_key_that_the_mask_hides_counts_for_nothing_in_bytes(isa, rng, special, hidden):
    q, k, v = qkv(rng, 1, 3, 600, 4, 2, 8, 20)
    dirty = dirtied(k, v, hidden, special)
    for options, mask in masks_hiding(hidden):
        want, got = (bits(attention(q, *kv, mask=mask, precision="int8", return_lse=True, **options))
                     for kv in ((k, v), dirty))
        assert got == want


@pytest.mark.parametrize("special", [NAN, INF])
def test_what_a_row_may_not_see_does_not_reach_it_in_bytes(isa, rng, special):
    q, k, v = qkv(rng, 1, 4, 300, dim=8)
    for keys, options in ((slice(290, 300), {"kv_lens": np.array([290])}),
                          (slice(0, 200), {"window": 80, "causal": True}), (slice(0, 217), {"window": 80})):
        dirty_k, dirty_v = k.copy(), v.copy()
        dirty_k[:, keys], dirty_v[:, keys] = special, special
        want, got = (bits(attention(q, *kv, precision="int8", **options)) for kv in ((k, v), (dirty_k, dirty_v)))
        assert got == want
    for at in (5, 16, 255, 299):
        q, (dirty_k, dirty_v) = normal(rng, 1, 300, 4, 8), (k.copy(), v.copy())
        clean = attention(q, k, v, causal=True, precision="int8")
        for broken in (dirty_k, dirty_v):
            kept = broken[0, at].copy()
            broken[0, at, :, 3] = special
            got = attention(q, dirty_k, dirty_v, causal=True, precision="int8")
            assert got[:, :at].tobytes() == clean[:, :at].tobytes() and np.isnan(got[:, at:]).all()
            broken[0, at] = kept


def test_a_nan_in_a_query_is_its_own(isa, rng):
    q, k, v = qkv(rng, 1, 10, 300, 2, 1)
    clean = attention(q, k, v, causal=True, precision="int8")
    for special in (NAN, INF):
        q[0, 4, 1, 2] = special
        got = attention(q, k, v, causal=True, precision="int8")
        assert np.isnan(got[0, 4, 1]).all() and np.isnan(got).sum() == 16
        assert np.delete(got[0], 4, 0).tobytes() == np.delete(clean[0], 4, 0).tobytes()


@pytest.mark.parametrize("name", EMPTY)
def test_a_row_that_sees_no_key_is_zero_in_bytes(isa, dtype, rng, name):
    q, k, v = qkv(rng, 2, 3, 300, dtype=dtype)
    sinks = np.array([1.5, 0, -2, 88], np.float32)
    out, lse = attention(q, k, v, return_lse=True, precision="int8", **EMPTY[name])
    assert (out == 0).all() and (lse == -INF).all()
    out, lse = attention(q, k, v, return_lse=True, sinks=sinks, precision="int8", **EMPTY[name])
    assert (out == 0).all()
    np.testing.assert_array_equal(lse, np.broadcast_to(sinks, lse.shape))


@pytest.mark.parametrize("dim", [1, 15, 512, 1030])
def test_the_largest_bytes_do_not_overflow(isa, dim):
    """Every product of the same sign and as large as can be, over channels and over 256 keys: rotated, a constant is
    one channel of each block; here the blocks are of one or two."""
    rng = np.random.default_rng(7)
    q, k, v = np.ones((1, 3, 2, dim), np.float32), np.ones((1, 600, 1, dim), np.float32), normal(rng, 1, 600, 1, dim)
    v[:, :256] = -2.0
    lse = attention(q, k, v, causal=True, return_lse=True, scale=1.0, precision="int8")[1]
    np.testing.assert_allclose(lse[0, :, 0], dim + np.log([598, 599, 600]), rtol=2e-3)
    masked = attention(q, k, v, mask=np.ones((3, 600), bool), return_lse=True, scale=1.0, precision="int8")[1]
    np.testing.assert_allclose(masked[0, :, 0], dim + np.log(600), rtol=2e-3)
    first = attention(q, k[:, :256], v[:, :256], causal=True, precision="int8")
    np.testing.assert_allclose(first, -2, rtol=1e-2)


def test_large_scores_in_bytes(isa, rng):
    q, k, v = qkv(rng, 1, 5, 300)
    for size in (100.0, 1e4):
        out, lse = attention(q * np.float32(size), k, v, causal=True, return_lse=True, precision="int8")
        assert np.isfinite(out).all() and np.isfinite(lse).all() and np.abs(out).max() <= 1.1 * np.abs(v).max()
    mask = np.full((5, 300), np.finfo(np.float32).min, np.float32)
    out = attention(q, k, v, mask=mask, precision="int8")
    np.testing.assert_allclose(out[0, 0, 0], v[0, :, 0].mean(axis=0), atol=0.02)


# ---- many rows at a time ----------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "v_dim", "special"), [(64, 64, 1.0), (32, 96, INF), (128, 32, NAN)])
def test_a_bfloat16_prompt_has_the_bits_of_its_tokens(isa, rng, dim, v_dim, special):
    """Rows are multiplied 32 at a time beside the softmax of others, also those that end inside a group of 32 keys,
    after which values are infinite or no numbers; a token alone is not. 342 tokens end inside a group, too."""
    q, k, v = qkv(rng, 1, 342, 342, 3, 1, dim, v_dim, BFLOAT16)
    v[:, 300:] *= special
    whole, lse = attention(q, k, v, causal=True, return_lse=True)
    for i in (0, 1, 9, 10, 31, 32, 84, 85, 86, 255, 256, 257, 298, 299, 300, 341):
        alone, alone_lse = attention(q[:, i:i + 1], k[:, :i + 1], v[:, :i + 1], return_lse=True)
        assert alone.tobytes() == whole[:, i:i + 1].tobytes(), i
        assert alone_lse.tobytes() == lse[:, i:i + 1].tobytes()
        assert (i >= 300 and special != 1.0) or np.isfinite(np.float32(alone)).all()
    for begin, end in ((0, 40), (40, 171), (171, 342)):
        piece = attention(q[:, begin:end], k[:, :end], v[:, :end], causal=True)
        assert piece.tobytes() == whole[:, begin:end].tobytes(), begin


STRIPS: list[tuple[int, int, float, dict[str, Any]]] = [
    (64, 64, 1.0, {}), (128, 48, INF, {}), (192, 16, NAN, {}), (64, 80, 1.0, {"softcap": 15.0}),
    (128, 128, NAN, {"window": 70})]


@pytest.mark.parametrize(("dim", "v_dim", "special", "options"), STRIPS)
def test_a_prompt_in_bytes_has_the_bits_of_its_tokens(isa, rng, dim, v_dim, special, options):
    """As above, of bytes: 3 rows a token, so that strips of 32 end inside of one, and 130 tokens more than one call of
    128 rows; keys that a strip does not see in whole panels or blocks, of which later values are no numbers."""
    q, k, v = qkv(rng, 1, 342, 342, 3, 1, dim, v_dim)
    k, v[:, 300:] = k + 2, v[:, 300:] * special
    whole, lse = attention(q, k, v, causal=True, return_lse=True, precision="int8", **options)
    for i in (0, 1, 9, 10, 31, 32, 42, 43, 84, 85, 86, 255, 256, 257, 298, 299, 300, 341):
        alone, alone_lse = attention(q[:, i:i + 1], k[:, :i + 1], v[:, :i + 1], causal=True, return_lse=True,
                                     precision="int8", **options)
        assert alone.tobytes() == whole[:, i:i + 1].tobytes(), i
        assert alone_lse.tobytes() == lse[:, i:i + 1].tobytes()
        assert (i >= 300 and special != 1.0) or np.isfinite(alone).all()
    for begin, end in ((0, 5), (5, 12), (12, 171), (171, 342)):
        piece = attention(q[:, begin:end], k[:, :end], v[:, :end], causal=True, precision="int8", **options)
        assert piece.tobytes() == whole[:, begin:end].tobytes(), begin


@pytest.fixture
def best() -> Iterator[str]:
    before = forge_c.isa()
    yield before
    forge_c.use_isa(before)


@pytest.mark.skipif("avx512_amx" not in forge_c.available_isas(), reason="no tiles on this CPU")
@pytest.mark.parametrize(("dim", "v_dim", "special", "options"), STRIPS)
def test_tiles_multiply_bytes_to_the_bits_of_vectors(best, rng, dim, v_dim, special, options):
    q, k, v = qkv(rng, 2, 150, 600, 6, 2, dim, v_dim)
    v[:, 500:] *= special
    for more in ({}, {"causal": True}, {"kv_lens": np.array([600, 301])}):
        seen = []
        for isa in ("avx512_amx", "avx512_vnni"):
            forge_c.use_isa(isa)
            seen.append(bits(attention(q, k, v, return_lse=True, precision="int8", **more, **options)))
        assert seen[0] == seen[1], more


@pytest.mark.skipif("avx512_amx" not in forge_c.available_isas(), reason="no tiles on this CPU")
@pytest.mark.parametrize(("dim", "v_dim", "group", "kv_len"), [(64, 64, 4, 700), (80, 48, 2, 300), (128, 128, 8, 1030),
                                                              (40, 24, 6, 90)])
def test_tiles_multiply_pages_of_bytes_to_the_bits_of_vectors(best, rng, dim, v_dim, group, kv_len):
    q, k, v = qkv(rng, 1, 90, kv_len, 2 * group, 2, dim, v_dim)
    kept = KVCache(1, kv_len, 2, dim, v_dim=v_dim, dtype="int8")
    kept.append(k, v)
    for rows, window in ((1, None), (4, None), (9, 77), (90, None), (90, 77)):
        seen = []
        for isa in ("avx512_amx", "avx512_vnni"):
            forge_c.use_isa(isa)
            seen.append(attention(q[:, :rows], kept, causal=True, window=window).tobytes())
        assert seen[0] == seen[1], (rows, window)


# ---- nothing outside the arrays; what is refused ----------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("at_end", [False, True])
def test_arrays_between_forbidden_pages_in_any_precision(isa, dtype, rng, precision, at_end):
    for kv_len in (1, 2, 3, 15, 17, 35, 255, 257, 271):
        for i, (dim, v_dim) in enumerate(((1, 3), (kv_len % 37 + 1, 16), (33, 1))):
            q, k, v = qkv(rng, 1, (1, 2, 7)[(kv_len + i) % 3], kv_len, 2, 1, dim, v_dim, dtype)
            mask = rng.random((1, 1, q.shape[1], kv_len)) < 0.8 if i % 2 else None
            options: dict[str, Any] = {"causal": i == 0, "window": kv_len if i == 2 else None, "precision": precision}
            want = attention(q, k, v, mask=mask, **options)
            q, k, v = (guarded_copy(a, at_end=at_end) for a in (q, k, v))
            mask = mask if mask is None else guarded_copy(mask, at_end=at_end)
            out = guarded(want.shape, dtype, at_end=at_end)
            attention(q, k, v, mask=mask, out=out, **options)
            assert out.tobytes() == want.tobytes(), (kv_len, dim, v_dim)


@pytest.mark.parametrize(("precision", "error"), [("float16", ValueError), ("INT8", ValueError), ("", ValueError),
                                                  (8, TypeError), (np.float32, TypeError)])
def test_a_precision_that_is_none(precision, error):
    q, out = np.ones((1, 3, 2, 8), np.float32), np.full((1, 3, 2, 8), 7, np.float32)
    with pytest.raises(error, match="attention: precision is .* expected None.* float32, bfloat16"):
        attention(q, q, q, precision=precision, out=out)
    assert (out == 7).all()
