"""attention: against the float64 definition, and the promises that one row's bits depend on that row alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from c_constants import c_constant
from conftest import DTYPES, check_close, multiplies_pairs
from guard import guarded, guarded_copy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray

from forge_c import KVCache, attention

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HEAD_DIMS = (1, 5, 16, 17, 33, 40, 64, 80, 96, 112, 128, 256)
CHUNK = c_constant("FC_KV_CHUNK", "forge.h")
KV_LENS = (0, 1, 2, 15, 16, 17, 63, 64, 65, CHUNK - 1, CHUNK, CHUNK + 1, 600)
NAN, INF = np.nan, np.inf

Array = NDArray[Any]


pytestmark = pytest.mark.usefixtures("one_thread")


def normal(rng: np.random.Generator, *shape: int, dtype: DTypeLike = np.float32) -> Array:
    return rng.standard_normal(shape, np.float32).astype(dtype)


def qkv(rng: np.random.Generator, batch: int, q_len: int, kv_len: int, heads: int = 4, kv_heads: int = 2, dim: int = 16,
        v_dim: int | None = None, dtype: DTypeLike = np.float32) -> tuple[Array, Array, Array]:
    """q, k, v of random numbers."""
    return (normal(rng, batch, q_len, heads, dim, dtype=dtype), normal(rng, batch, kv_len, kv_heads, dim, dtype=dtype),
            normal(rng, batch, kv_len, kv_heads, dim if v_dim is None else v_dim, dtype=dtype))


def score_size(q: Array, k: Array, scale: float | None, mask: Array | None) -> Array:
    """The largest |q| |k| scale + |mask| of each row, (batch, q_len, heads, 1): what the scores' roundings act on.

    Keys whose mask is below -1e5 weigh nothing in either arithmetic and do not count.
    """
    dim, group = q.shape[3], q.shape[2] // k.shape[2]
    keys = np.repeat(np.abs(reference.f64(k)), group, axis=2)
    size = np.einsum("bihd,bjhd->bhij", np.abs(reference.f64(q)), keys) * abs(dim**-0.5 if scale is None else scale)
    if mask is not None:
        added = np.broadcast_to(reference.additive(mask), size.shape)
        size = np.where(added < -1e5, 0, size + np.abs(np.where(added < -1e5, 0, added)))
    size = np.where(np.isfinite(size), size, 0)
    return np.max(size, axis=-1, initial=0).transpose(0, 2, 1)[..., None]


def expected(q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array, Array, Array]:
    """The reference's out and lse, p @ |v|, and score_size."""
    both = np.concatenate([reference.f64(v), np.abs(reference.f64(v))], axis=-1)
    out, lse = reference.attention(q, k, both, **options)
    size = score_size(q, k, options.get("scale"), options.get("mask"))
    return out[..., :v.shape[-1]], lse, out[..., v.shape[-1]:], size


def check_pair(got: tuple[Array, Array], want: tuple[Array, Array, Array, Array], kv_len: int, dim: int,
               pairs: bool | None = None) -> None:
    """out and lse within the bounds of conftest; pairs is None: that of q, k and v of one dtype."""
    out, lse, magnitude, size = want
    pairs = multiplies_pairs(got[0].dtype) if pairs is None else pairs
    check_close("attention_pairs" if pairs else "attention", got[0], out, magnitude=magnitude, n=kv_len, d=dim, s=size)
    assert got[1].dtype == np.float32
    check_close("lse", got[1], lse, magnitude=1 + np.abs(lse), n=kv_len, d=dim, s=size[..., 0])


def check(q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array]:
    """attention, checked against the reference."""
    got = attention(q, k, v, return_lse=True, **options)
    assert got[0].dtype == q.dtype and got[0].shape == (*q.shape[:3], v.shape[3])
    pairs = multiplies_pairs(k.dtype)
    check_pair(got, expected(q.astype(BFLOAT16) if pairs else q, k, v, **options), k.shape[1], q.shape[3], pairs)
    return got


def bits(result: Array | tuple[Array, ...]) -> bytes:
    return b"".join(a.tobytes() for a in (result if isinstance(result, tuple) else (result,)))


# ---- against the reference; one float64 result serves every ISA -------------------------------------


@cache
def head_dim_cases(dtype: str) -> list[tuple[Any, ...]]:
    rng, cases = np.random.default_rng(1), []
    for i, (dim, kv_len) in enumerate(product(HEAD_DIMS, KV_LENS)):
        v_dim, q_len, causal = HEAD_DIMS[(i + i // 13) % len(HEAD_DIMS)], (1, 3, 2)[i % 3], i % 2 == 0
        inputs = qkv(rng, 1, q_len, kv_len, 2, 1, dim, v_dim, DTYPES[dtype])
        cases.append((inputs, causal, expected(*inputs, causal=causal)))
    return cases


def test_head_dims_and_lengths(isa, dtype):
    for (q, k, v), causal, want in head_dim_cases(dtype.name):
        check_pair(attention(q, k, v, causal=causal, return_lse=True), want, k.shape[1], q.shape[3])


# (heads, kv_heads, q_len, kv_len): one past a block of rows for each group, and a whole one; q_len on both sides of
# kv_len; more heads to a group than a block has rows.
BLOCK = c_constant("BLOCK_ROWS", "ops/attention/attention.c")
GROUPS = ((1, 1, BLOCK + 1, BLOCK + 2), (2, 2, 7, 5), (4, 2, BLOCK // 2 + 1, 300), (3, 1, BLOCK // 3 + 1, CHUNK + 1),
          (6, 2, BLOCK // 3 + 1, 20), (4, 1, BLOCK // 4 + 1, 2 * CHUNK + 8), (8, 1, BLOCK // 8 + 1, 64),
          (8, 1, BLOCK // 8, 600), (16, 2, 5, CHUNK), (BLOCK + 2, 1, 2, 20), (4, 2, 1, 16 * CHUNK))
VISIBILITY = ({}, {"causal": True}, {"window": 9}, {"causal": True, "window": 70})


@cache
def group_cases(dtype: str) -> list[tuple[Any, ...]]:
    rng, cases = np.random.default_rng(2), []
    for heads, kv_heads, q_len, kv_len in GROUPS:
        inputs = qkv(rng, 1, q_len, kv_len, heads, kv_heads, 12, 20, DTYPES[dtype])
        cases += [(inputs, options, expected(*inputs, **options)) for options in VISIBILITY]
    return cases


def test_groups_and_blocks_of_queries(isa, dtype):
    for (q, k, v), options, want in group_cases(dtype.name):
        check_pair(attention(q, k, v, return_lse=True, **options), want, k.shape[1], q.shape[3])


def random_mask(rng: np.random.Generator, *shape: int, dtype: DTypeLike = np.float32) -> Array:
    """Numbers to add to the scores, a fifth of them -inf."""
    mask = normal(rng, *shape)
    mask[rng.random(shape) < 0.2] = -INF
    return mask.astype(dtype)


BATCH, QUERIES = 2, 7
OPTIONS: dict[str, Callable[[np.random.Generator, int], dict[str, Any]]] = {
    "causal": lambda rng, t: {"causal": True},
    "window 1": lambda rng, t: {"window": 1},
    "window over all": lambda rng, t: {"window": 10**9},
    "causal window 1": lambda rng, t: {"causal": True, "window": 1},
    "causal window 18": lambda rng, t: {"causal": True, "window": 18},
    "scale": lambda rng, t: {"scale": -0.7},
    "scale 0": lambda rng, t: {"scale": 0.0},
    "softcap": lambda rng, t: {"softcap": 0.9, "scale": 1.0},
    "softcap 50": lambda rng, t: {"softcap": 50.0, "causal": True},
    "sinks": lambda rng, t: {"sinks": np.array([0, 3, -INF, -40], np.float32)},
    "sinks bfloat16": lambda rng, t: {"sinks": normal(rng, 4, dtype=BFLOAT16), "causal": True},
    "kv_lens": lambda rng, t: {"kv_lens": np.array([t - 3, 0])},
    "kv_lens int32 causal": lambda rng, t: {"kv_lens": np.array([4, t], np.int32), "causal": True},
    "kv_lens window": lambda rng, t: {"kv_lens": np.array([t - 1, 2], np.uint8 if t < 256 else np.uint16), "window": 5},
    "bool mask": lambda rng, t: {"mask": rng.random((BATCH, 4, QUERIES, t)) < 0.7},
    "bool mask of queries": lambda rng, t: {"mask": rng.random((QUERIES, t)) < 0.7, "causal": True},
    "bool mask of keys": lambda rng, t: {"mask": rng.random((BATCH, 1, 1, t)) < 0.7},
    "sparse bool mask": lambda rng, t: {"mask": rng.random((BATCH, 1, QUERIES, t)) < 0.01},
    "float mask": lambda rng, t: {"mask": random_mask(rng, BATCH, 4, QUERIES, t)},
    "float mask of heads": lambda rng, t: {"mask": random_mask(rng, 4, 1, 1)},
    "float16 mask": lambda rng, t: {"mask": random_mask(rng, 1, 1, QUERIES, t, dtype=np.float16), "window": 6},
    "bfloat16 mask": lambda rng, t: {"mask": random_mask(rng, BATCH, 4, 1, t, dtype=BFLOAT16)},
    "everything": lambda rng, t: {
        "mask": random_mask(rng, BATCH, 1, QUERIES, t), "causal": True, "window": 11, "softcap": 2.0, "scale": 0.4,
        "sinks": normal(rng, 4), "kv_lens": np.array([t, t // 2]),
    },
}


@cache
def option_case(name: str, kv_len: int, dtype: str) -> tuple[Any, ...]:
    rng = np.random.default_rng(3)
    inputs, options = qkv(rng, BATCH, QUERIES, kv_len, dtype=DTYPES[dtype]), OPTIONS[name](rng, kv_len)
    return inputs, options, expected(*inputs, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_options(isa, dtype, name):
    for kv_len in (20, 270):
        (q, k, v), options, want = option_case(name, kv_len, dtype.name)
        got = attention(q, k, v, return_lse=True, **options)
        check_pair(got, want, kv_len, q.shape[3])
        assert attention(q, k, v, **options).tobytes() == got[0].tobytes()


@settings(derandomize=True, database=None, deadline=None, max_examples=50,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_call(isa, data):
    draw = data.draw
    batch, q_len, kv_len = draw(st.integers(0, 3)), draw(st.integers(0, 9)), draw(st.integers(0, 300))
    kv_heads, group, dim, v_dim = (draw(st.integers(1, most)) for most in (3, 5, 40, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    q_dtype, kv_dtype = (DTYPES[draw(st.sampled_from(list(DTYPES)))] for _ in range(2))
    q, k, v = qkv(rng, batch, q_len, kv_len, kv_heads * group, kv_heads, dim, v_dim)
    options: dict[str, Any] = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["window"] = draw(st.integers(1, 300))
    if draw(st.booleans()):
        options["kv_lens"] = rng.integers(0, kv_len + 1, batch)
    if draw(st.booleans()):
        shape = [draw(st.sampled_from([1, n])) for n in (batch, kv_heads * group, q_len, kv_len)]
        options["mask"] = rng.random(shape) < 0.6 if draw(st.booleans()) else random_mask(rng, *shape)
    if draw(st.booleans()):
        options["sinks"] = normal(rng, kv_heads * group)
    if draw(st.booleans()):
        options["softcap"] = draw(st.floats(0.5, 100))
    got = check(q.astype(q_dtype), k.astype(kv_dtype), v.astype(kv_dtype), **options)
    assert np.isfinite(got[0].astype(np.float32)).all()


# ---- rows that see nothing, NaN, infinity, large scores ---------------------------------------------

EMPTY: dict[str, dict[str, Any]] = {
    "bool mask": {"mask": np.zeros((1, 1), bool)},
    "float mask": {"mask": np.full((300,), -INF, np.float32)},
    "kv_lens": {"kv_lens": np.array([0, 0])},
    "window": {"kv_lens": np.array([0, 0]), "window": 2, "causal": True},
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_row_that_sees_no_key_is_zero(isa, dtype, rng, name):
    q, k, v = qkv(rng, 2, 3, 300, dtype=dtype)
    sinks = np.array([1.5, 0, -2, 88], np.float32)
    out, lse = attention(q, k, v, return_lse=True, **EMPTY[name])
    assert (out == 0).all() and (lse == -INF).all()
    out, lse = attention(q, k, v, return_lse=True, sinks=sinks, **EMPTY[name])
    assert (out == 0).all()
    np.testing.assert_array_equal(lse, np.broadcast_to(sinks, lse.shape))


@pytest.mark.parametrize("name", EMPTY)
def test_a_sink_of_minus_infinity_is_none(isa, rng, name):
    q, k, v = qkv(rng, 2, 3, 300)
    sinks = np.full(4, -INF, np.float32)
    assert bits(attention(q, k, v, sinks=sinks, return_lse=True)) == bits(attention(q, k, v, return_lse=True))
    want = bits(attention(q, k, v, return_lse=True, **EMPTY[name]))
    assert bits(attention(q, k, v, sinks=sinks, return_lse=True, **EMPTY[name])) == want


def test_no_keys_at_all_and_more_queries_than_keys(isa, dtype, rng):
    q, k, v = qkv(rng, 2, 5, 3, dtype=dtype)
    out, lse = attention(q, k[:, :0], v[:, :0], return_lse=True)
    assert (out == 0).all() and (lse == -INF).all()
    out, lse = check(q, k, v, causal=True)
    assert (out[:, :2] == 0).all() and (lse[:, :2] == -INF).all() and np.isfinite(lse[:, 2:]).all()
    for empty in (q[:0], q[:, :0], q[:, :, :0]):
        keys = k[:len(empty)]
        assert attention(empty, keys, keys).shape == empty.shape


def test_a_mask_of_the_lowest_finite_numbers_is_the_mean(isa, dtype, rng):
    """Added to a score they absorb it, so that all keys weigh the same; a key without it takes all the weight."""
    q, k, v = qkv(rng, 1, 3, 40)
    mask = np.full((3, 40), ml_dtypes.finfo(dtype).min, dtype)
    mask[1, 7] = 0
    out, _ = check(q, k, v, mask=mask)
    if dtype != np.float16:
        np.testing.assert_allclose(out[0, 0], np.repeat(v[0].mean(axis=0), 2, axis=0), atol=40 * 2.0**-22)
    assert out[0, 1].tobytes() == np.repeat(v[0, 7], 2, axis=0).tobytes()


@pytest.mark.parametrize("hidden", [(0, 256), (256, 512), (512, 600), (0, 512), (0, 3), (250, 260)])
def test_hidden_chunks_of_keys_change_nothing(isa, rng, hidden):
    """Whole chunks of -inf scores, also the first, whatever large scores they would have had."""
    q, k, v = qkv(rng, 1, 2, 600, dim=8)
    k[:, slice(*hidden)] *= 1000
    keep = np.ones(600, bool)
    keep[slice(*hidden)] = False
    out, lse = attention(q, k, v, mask=keep, return_lse=True)
    check_pair((out, lse), expected(q, k[:, keep], v[:, keep]), 600, 8)
    float_mask = np.where(keep, 0, -INF).astype(np.float32)
    assert bits(attention(q, k, v, mask=float_mask, return_lse=True)) == bits((out, lse))


@pytest.mark.parametrize("special", [NAN, INF, -INF])
@pytest.mark.parametrize("at", [0, 17, 255, 256, 299])
def test_nan_and_infinity_in_the_inputs(isa, dtype, rng, special, at):
    q, k, v = qkv(rng, 1, 3, 300, 4, 2, 5, 18, dtype)
    clean, channel = attention(q, k, v), at % 18
    for name, index in (("q", (0, 1, 3, at % 5)), ("k", (0, at, 1, 4)), ("v", (0, at, 1, channel))):
        inputs = {"q": q.copy(), "k": k.copy(), "v": v.copy()}
        inputs[name][index] = special
        out, _ = check(**inputs)
        assert out[:, :, :2].tobytes() == clean[:, :, :2].tobytes()
        if name == "q":
            assert np.isnan(out[0, 1, 3]).all() and out[0, [0, 2]].tobytes() == clean[0, [0, 2]].tobytes()
        elif name == "v":
            np.testing.assert_array_equal(out[0, :, 2:, channel].astype(np.float32), special)
            assert np.delete(out, channel, 3).tobytes() == np.delete(clean, channel, 3).tobytes()


HIDDEN = (slice(5, 6), slice(0, 256), slice(256, 512), slice(250, 300), slice(511, 600, 2))


def dirtied(k: Array, v: Array, hidden: slice, special: float) -> tuple[Array, Array]:
    """Keys and values of two heads, `special` in some of the hidden ones."""
    k, v = k.copy(), v.copy()
    k[:, hidden, 1, 3], v[:, hidden, 0, 7] = special, special
    return k, v


def masks_hiding(hidden: slice) -> Iterator[tuple[dict[str, Any], Array]]:
    """Options and masks of 3 queries, 4 heads and 600 keys."""
    keep = np.ones(600, bool)
    keep[hidden] = False
    for options in ({}, {"causal": True, "window": 590}, {"softcap": 3.0, "sinks": np.zeros(4, np.float32)}):
        for mask in (keep, np.where(keep, 0.5, -INF).astype(np.float32), np.broadcast_to(keep, (4, 3, 600)).copy()):
            yield options, mask


@pytest.mark.parametrize("special", [NAN, INF, -INF])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_a_key_that_the_mask_hides_counts_for_nothing(isa, dtype, rng, special, hidden):
    """Whatever it and its value hold, alone or with all of its chunk: 0 times infinity is not looked at."""
    q, k, v = qkv(rng, 1, 3, 600, 4, 2, 8, 20, dtype)
    dirty_k, dirty_v = dirtied(k, v, hidden, special)
    for options, mask in masks_hiding(hidden):
        want = bits(attention(q, k, v, mask=mask, return_lse=True, **options))
        assert bits(attention(q, dirty_k, dirty_v, mask=mask, return_lse=True, **options)) == want
        for stored in ("float32", "int8"):
            clean, dirty = (KVCache(1, 600, 2, 8, v_dim=20, dtype=stored) for _ in range(2))
            clean.append(k, v)
            dirty.append(dirty_k, dirty_v)
            want_cached = bits(attention(q, clean, mask=mask, **options))
            assert bits(attention(q, dirty, mask=mask, **options)) == want_cached


@pytest.mark.parametrize("special", [NAN, INF, -INF])
def test_what_a_masked_row_sees_does_reach_it(isa, dtype, rng, special):
    """Beside hidden keys with the same value: infinity stays infinity."""
    q, k, v = qkv(rng, 2, 2, 300, 4, 2, 8, 18, dtype)
    v[:, [7, 8, 40], :, 3] = special
    for mask in (np.arange(300) != 7, rng.random((2, 1, 2, 300)) < 0.5):
        check(q, k, v, mask=mask)


@pytest.mark.parametrize("special", [NAN, INF])
def test_what_a_row_may_not_see_does_not_reach_it(isa, rng, special):
    q, k, v = qkv(rng, 1, 4, 300, dim=8)
    dirty_k, dirty_v = k.copy(), v.copy()
    dirty_k[:, 290:], dirty_v[:, 290:] = special, special
    options = {"kv_lens": np.array([290])}
    assert bits(attention(q, dirty_k, dirty_v, **options)) == bits(attention(q, k, v, **options))
    dirty_k[:, :200], dirty_v[:, :200] = special, special
    options |= {"window": 80, "causal": True}
    assert bits(attention(q, dirty_k, dirty_v, **options)) == bits(attention(q, k, v, **options))
    dirty_k, dirty_v = k.copy(), v.copy()
    dirty_k[:, 299], dirty_v[:, 299] = special, special
    causal = attention(q, dirty_k, dirty_v, causal=True)
    assert causal[:, :3].tobytes() == attention(q, k, v, causal=True)[:, :3].tobytes()
    assert np.isnan(causal[:, 3]).all()


@pytest.mark.parametrize("size", [100.0, 1e4])
def test_large_scores(isa, dtype, rng, size):
    """Scores up to +-size: exp would overflow without the running maximum, in whatever chunk that is.

    They are small multiples of a power of two, so that float32 holds them exactly and adds no error.
    """
    q, k, v = (a.astype(dtype) for a in qkv(rng, 1, 2, 597, 4, 2, 8))
    q, k = np.sign(q), (np.sign(k) * dtype.type(2.0 ** np.floor(np.log2(size / 8)))).astype(dtype)
    score = k[0, :, 0].astype(np.float32) @ q[0, 0, 0].astype(np.float32)
    for order, mask in product((np.arange(597), np.argsort(score), np.argsort(-score)), (None, np.float32(-3 * size))):
        options = {"scale": 1.0, "mask": mask}
        got = attention(q, k[:, order], v[:, order], return_lse=True, **options)
        out, lse, magnitude, score_sizes = expected(q, k[:, order], v[:, order], **options)
        check_pair(got, (out, lse, magnitude, 0 * score_sizes), 597, 8)
        assert (lse > size / 4).all() if mask is None else (lse < -size).all()


@pytest.mark.parametrize("window", [2**31, 2**62, 2**63 - 1, 2**63, 2**70])
def test_a_window_over_everything_is_none(isa, rng, window):
    """sys.maxsize is a usual "no window"; with more queries than keys its distance to a position passes 2^63."""
    for q_len in (3, 6, 40):
        q, k, v = qkv(rng, 1, q_len, 5)
        for causal in (False, True):
            want = attention(q, k, v, causal=causal, return_lse=True)
            assert bits(attention(q, k, v, causal=causal, window=window, return_lse=True)) == bits(want)


# ---- dtypes and layouts: the same bits --------------------------------------------------------------

@pytest.mark.parametrize("v_dim", [16, 21])
def test_sixteen_bit_inputs_are_their_float32_values(isa, dtype, rng, v_dim):
    """Any dtype of q with any dtype of k and v: arithmetic is float32, the result is rounded once. Where the ISA
    multiplies pairs of bfloat16, queries are rounded to it against such keys."""
    for q_len, options in product((1, 9), (*VISIBILITY, {"softcap": 3.0, "scale": 0.3})):
        q, k, v = qkv(rng, 2, q_len, 300, dim=24, v_dim=v_dim)
        for stored in DTYPES.values():
            rounded = [q.astype(dtype), k.astype(stored), v.astype(stored)]
            wide = [a.astype(np.float32) for a in rounded]
            if multiplies_pairs(rounded[1].dtype):
                wide = [rounded[0].astype(BFLOAT16).astype(np.float32), *rounded[1:]]
            wide = attention(*wide, return_lse=True, **options)
            assert bits(attention(*rounded, return_lse=True, **options)) == bits((wide[0].astype(dtype), wide[1]))


def misaligned(a: Array) -> Array:
    copied = np.empty(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    copied[...] = a
    return copied


def in_order(a: Array, *axes: int) -> Array:
    """`a` stored with its axes in another order."""
    return a.transpose(axes).copy().transpose(np.argsort(axes))


def inside(a: Array) -> Array:
    """`a` as a part of a larger array of NaN, on every axis."""
    larger = np.full([n + 3 for n in a.shape], NAN, a.dtype)
    view = larger[tuple(slice(1, 1 + n) for n in a.shape)]
    view[...] = a
    return view


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "torch order": lambda a: in_order(a, 0, 2, 1, 3),
    "sequence first": lambda a: in_order(a, 1, 0, 2, 3),
    "misaligned": misaligned,
    "misaligned torch order": lambda a: misaligned(a.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3),
    "reversed": lambda a: a[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1],
    "inside": inside,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_and_alignment(isa, dtype, rng, layout):
    lay = LAYOUTS[layout]
    for dim, v_dim, q_len in ((16, 16, 1), (5, 21, 1), (17, 32, 9)):
        q, k, v = qkv(rng, 2, q_len, 270, 6, 2, dim, v_dim, dtype)
        want = attention(q, k, v, causal=True, return_lse=True)
        laid = [lay(a) for a in (q, k, v)]
        before = bits(tuple(laid))
        assert bits(attention(*laid, causal=True, return_lse=True)) == bits(want)
        assert bits(tuple(laid)) == before
        out = lay(np.zeros_like(want[0]))
        assert attention(q, k, v, causal=True, out=out) is out and out.tobytes() == want[0].tobytes()
        if layout == "inside":
            assert np.count_nonzero(np.isnan(out.base.astype(np.float32))) == out.base.size - out.size


def test_broadcast_inputs(isa, rng):
    q, k, v = qkv(rng, 1, 5, 30, 1, 1)
    wide = [np.broadcast_to(a, (3, a.shape[1], heads, 16)) for a, heads in ((q, 4), (k, 2), (v, 2))]
    assert bits(attention(*wide, return_lse=True)) == bits(attention(*(a.copy() for a in wide), return_lse=True))


MASK_VIEWS: dict[str, Callable[[Array], Array]] = {
    "transposed": lambda m: in_order(m, 0, 1, 3, 2),
    "heads last": lambda m: in_order(m, 0, 2, 3, 1),
    "reversed": lambda m: m[::-1, ::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1, ::-1],
    "every other": lambda m: np.repeat(m, 2, axis=-1)[..., ::2],
    "wider": lambda m: np.concatenate([m, m], axis=-1)[..., :m.shape[-1]],
    "misaligned": misaligned,
}


@pytest.mark.parametrize("kind", ["bool", "float32", "float16", "bfloat16"])
def test_masks_of_any_shape_and_strides(isa, rng, kind):
    q, k, v = qkv(rng, 2, 3, 270)
    full = (2, 4, 3, 270)
    for shape in product(*((1, n) for n in full)):
        mask = rng.random(shape) < 0.6 if kind == "bool" else random_mask(rng, *shape, dtype=DTYPES[kind])
        spread = np.broadcast_to(mask, full)
        want = bits(attention(q, k, v, mask=spread.copy(), return_lse=True))
        assert bits(attention(q, k, v, mask=np.where(spread, 0, -INF).astype(np.float32) if kind == "bool"
                              else spread.astype(np.float32), return_lse=True)) == want
        for name, view in MASK_VIEWS.items():
            assert bits(attention(q, k, v, mask=view(mask), return_lse=True)) == want, name
        while True:
            assert bits(attention(q, k, v, mask=mask, return_lse=True)) == want, mask.shape
            if mask.shape[:1] != (1,):
                break
            mask = mask[0]


# ---- one row's bits: chunks, batch, threads ---------------------------------------------------------


def test_a_row_alone_is_the_row_in_any_batch(isa, dtype, rng):
    for q_len, kv_len in ((1, 700), (9, 300), (70, 70)):
        q, k, v = qkv(rng, 4, q_len, kv_len, dtype=dtype)
        lens = np.array([kv_len, kv_len // 2, 0, 1])
        mask = rng.random((4, 1, q_len, kv_len)) < 0.9
        together = attention(q, k, v, causal=True, kv_lens=lens, mask=mask, return_lse=True)
        for row, length in enumerate(lens):
            one, seen = slice(row, row + 1), slice(0, length)
            want = bits((together[0][one], together[1][one]))
            options = {"causal": True, "return_lse": True}
            assert bits(attention(q[one], k[one], v[one], kv_lens=lens[one], mask=mask[one], **options)) == want
            alone = attention(q[one], k[one, seen], v[one, seen], mask=mask[one, ..., seen], **options)
            assert bits(alone) == want


def test_a_query_alone_is_the_query_among_others(isa, rng):
    """Without causal too: whoever shares its block of rows, a query's bits are its own."""
    q, k, v = qkv(rng, 1, 70, 300, 6, 2, 9, 21)
    whole = attention(q, k, v)
    for i in range(70):
        assert attention(q[:, i:i + 1], k, v).tobytes() == whole[:, i].tobytes()
    for head in range(6):
        alone = attention(q[:, :, head:head + 1], k[:, :, head // 3:head // 3 + 1], v[:, :, head // 3:head // 3 + 1])
        assert alone.tobytes() == whole[:, :, head:head + 1].tobytes()


# Prompts in blocks; one token, and five, against keys that are split over threads.
THREADED = ((2, 150, 150, {}), (2, 150, 500, {"causal": True}), (1, 300, 300, {"causal": True, "window": 50}),
            (1, 1, 4096, {}), (1, 5, 4096, {"causal": True}), (2, 1, 4096, {"causal": True, "window": 1000}))


@pytest.mark.parametrize(("batch", "q_len", "kv_len", "options"), THREADED)
def test_any_thread_count_gives_the_same_bits(isa, dtype, rng, each_thread_count, batch, q_len, kv_len, options):
    q, k, v = qkv(rng, batch, q_len, kv_len, 6, 2, 32, 40, dtype)
    mask = random_mask(rng, batch, 1, q_len, kv_len)
    mask[..., 256:512] = -INF
    more = {"mask": mask, "sinks": normal(rng, 6), "kv_lens": np.array([kv_len, kv_len // 3 + 1][:batch])}
    seen = [[bits(attention(q, k, v, return_lse=True, **options, **extra)) for extra in ({}, more)]
            for _ in each_thread_count()]
    assert all(other == seen[0] for other in seen[1:])


# ---- nothing outside the arrays ---------------------------------------------------------------------


@pytest.mark.parametrize("at_end", [False, True])
def test_arrays_between_forbidden_pages(isa, dtype, rng, at_end):
    for kv_len in range(1, 36):
        for i, dim in enumerate((1, kv_len, 36 - kv_len)):
            v_dim, q_len = (36 - kv_len, 3, kv_len)[i], (1, 2, 7)[(kv_len + i) % 3]
            q, k, v = qkv(rng, 1, q_len, kv_len, 2, 1, dim, v_dim, dtype)
            mask = rng.random((1, 1, q_len, kv_len)) < 0.8 if i % 2 else random_mask(rng, 2, q_len, kv_len, dtype=dtype)
            options = {"causal": i == 0, "window": kv_len if i == 1 else None}
            want = attention(q, k, v, mask=mask, sinks=np.ones(2, np.float32), **options)
            q, k, v, mask, sinks = (guarded_copy(a, at_end=at_end) for a in (q, k, v, mask, np.ones(2, np.float32)))
            out = guarded(want.shape, dtype, at_end=at_end)
            attention(q, k, v, mask=mask, sinks=sinks, out=out, **options)
            assert out.tobytes() == want.tobytes(), (kv_len, dim, v_dim)


@pytest.mark.parametrize("at_end", [False, True])
def test_lengths_around_a_chunk_between_forbidden_pages(isa, rng, at_end):
    for kv_len, (dim, v_dim) in product((255, 256, 257, 271, 512), ((3, 5), (16, 16), (17, 33))):
        q, k, v = qkv(rng, 1, 9, kv_len, 2, 1, dim, v_dim)
        want = attention(q, k, v, causal=True)
        laid = [guarded_copy(a.transpose(0, 2, 1, 3), at_end=at_end).transpose(0, 2, 1, 3) for a in (q, k, v)]
        out = guarded(want.shape, want.dtype, at_end=at_end)
        assert attention(*laid, causal=True, out=out).tobytes() == want.tobytes()


# ---- what is refused --------------------------------------------------------------------------------

Q, K = np.ones((2, 3, 4, 8), np.float32), np.ones((2, 5, 2, 8), np.float32)
WRONG: dict[str, tuple[Callable[[Array], Any], type[Exception], str]] = {
    "k": (lambda out: attention(Q, K[:1], K, out=out), ValueError, "k has shape (1, 5, 2, 8), expected (2, kv_len"),
    "heads": (lambda out: attention(Q[:, :, :3], K, K, out=out), ValueError, "q has 3 heads"),
    "no v": (lambda out: attention(Q, K, out=out), TypeError, "v is None and k is a ndarray"),
    "two dtypes": (lambda out: attention(Q, K, K.astype(np.float16), out=out), TypeError, "v has dtype float16"),
    "mask": (lambda out: attention(Q, K, K, mask=np.ones((3, 4), bool), out=out), ValueError, "has shape (3, 4)"),
    "softcap": (lambda out: attention(Q, K, K, softcap=NAN, out=out), ValueError, "softcap is nan"),
    "sinks": (lambda out: attention(Q, K, K, sinks=K[0, 0, 0], out=out), ValueError, "sinks has shape (8,)"),
    "long": (lambda out: attention(Q, K, K, kv_lens=np.array([5, 6]), out=out), ValueError, "kv_lens[1] is 6"),
    "overlap": (lambda out: attention(out, K, K, out=out), ValueError, "attention: out overlaps q"),
    "ring": (lambda out: attention(Q, KVCache(2, 9, 2, 8, window=2), window=3, out=out), ValueError, "window is 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_refused_call_says_why_and_writes_nothing(case):
    call, error, message = WRONG[case]
    out = np.full(Q.shape, 7, np.float32)
    with pytest.raises(error) as caught:
        call(out)
    assert message in str(caught.value)
    assert (out == 7).all()


# ---- memory -----------------------------------------------------------------------------------------

LONG_PROMPT = """
import resource
import numpy as np
import forge_c as fc

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, 32768, heads, 16), np.float32) for heads in (2, 1, 1))
fc.attention(q[:, :64], k[:, :64], v[:, :64], causal=True)
before, out = peak(), np.zeros_like(q)
fc.attention(q, k, v, causal=True, out=out)
print(peak() - before)
"""


@pytest.mark.slow
def test_a_prompt_of_32768_tokens_takes_no_memory_of_its_square():
    """Scores would be 8 GiB, one bit for each 256 MiB; a copy of keys and values is 4 MiB, the result too."""
    done = subprocess.run([sys.executable, "-c", LONG_PROMPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 24
