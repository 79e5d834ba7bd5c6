"""merge_attention: against its definition, empty parts, and attention over split keys against attention over all."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from itertools import product
from typing import Any

import numpy as np
import pytest
import reference
from conftest import DTYPES, TOLERANCES, check_close
from guard import guarded_copy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray

from forge_c import attention, merge_attention

INF, NAN = np.inf, np.nan

Array = NDArray[Any]
Part = tuple[Array, Array]


def part(rng: np.random.Generator, *shape: int, dtype: DTypeLike = np.float32, spread: float = 3) -> Part:
    """Random out (*shape) and lse (*shape[:-1])."""
    out = rng.standard_normal(shape, np.float32).astype(dtype)
    return out, np.asarray(spread * rng.standard_normal(shape[:-1], np.float32))


def check(a: Part, b: Part) -> Part:
    """merge_attention(a, b), checked against the reference; the weights' errors act on the larger |out|."""
    out, lse = merge_attention(*a, *b)
    want_out, want_lse = reference.merge_attention(*a, *b)
    assert out.dtype == a[0].dtype and lse.dtype == np.float32
    check_close("merge_attention", out, want_out, magnitude=np.maximum(*(np.abs(reference.f64(p[0])) for p in (a, b))))
    check_close("lse", lse, want_lse, magnitude=1 + np.abs(want_lse))
    return out, lse


def bits(result: Part) -> bytes:
    return result[0].tobytes() + result[1].tobytes()


# ---- against the definition -------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0, 3, 60, 1e4])
def test_sizes(isa, dtype, rng, spread):
    for v_dim in range(0, 70):
        a, b = (part(rng, 2, 3, 2, v_dim, dtype=dtype, spread=spread) for _ in range(2))
        check(a, b)


@settings(derandomize=True, database=None, deadline=None, max_examples=60,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_call(isa, data):
    shape = data.draw(st.lists(st.integers(0, 5), max_size=4)) + [data.draw(st.integers(0, 80))]
    dtype = DTYPES[data.draw(st.sampled_from(list(DTYPES)))]
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    spread = data.draw(st.sampled_from([0.1, 5, 300]))
    a, b = (part(rng, *shape, dtype=dtype, spread=spread) for _ in range(2))
    for _, lse in (a, b):
        lse[rng.random(lse.shape) < 0.3] = -INF
    out, lse = check(a, b)
    assert out.shape == tuple(shape) and lse.shape == tuple(shape[:-1])


def test_one_row_without_outer_axes(isa, rng):
    out, lse = check(part(rng, 5), part(rng, 5))
    assert out.shape == (5,) and lse.shape == ()


# ---- empty parts, NaN, infinity ---------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [NAN, INF, 7])
def test_an_empty_part_leaves_the_other_as_it_is(isa, dtype, rng, garbage):
    for v_dim in (1, 16, 37):
        full = part(rng, 3, 4, v_dim, dtype=dtype, spread=1e4)
        empty = np.full((3, 4, v_dim), garbage, dtype), np.full((3, 4), -INF, np.float32)
        assert bits(merge_attention(*full, *empty)) == bits(full)
        assert bits(merge_attention(*empty, *full)) == bits(full)
        out, lse = merge_attention(*empty, *empty)
        assert (out == 0).all() and (lse == -INF).all()


SPECIAL = (NAN, INF, -INF, 0, 3, -1e4)


def test_nan_and_infinity_in_lse(isa, rng):
    """A NaN on either side wins, also over an empty part; an empty part hides what is in its out."""
    pairs = list(product(SPECIAL, SPECIAL))
    for v_dim in (1, 8, 21):
        a, b = part(rng, len(pairs), v_dim), part(rng, len(pairs), v_dim)
        a[1][:], b[1][:] = np.array(pairs, np.float32).T
        out, lse = check(a, b)
        lost = np.isnan(np.array(pairs)).any(axis=1) | (np.array(pairs) == INF).any(axis=1)
        assert np.isnan(out[lost]).all() and np.isnan(lse[lost]).all()
        assert np.isfinite(out[~lost]).all()


@pytest.mark.parametrize("special", [NAN, INF, -INF])
def test_nan_and_infinity_in_out(isa, dtype, rng, special):
    for v_dim, at in ((1, 0), (16, 15), (37, 36), (37, 5)):
        a, b = part(rng, 4, v_dim, dtype=dtype), part(rng, 4, v_dim, dtype=dtype)
        clean, _ = merge_attention(*a, *b)
        a[0][1, at], b[0][2, at] = special, special
        out, _ = check(a, b)
        np.testing.assert_array_equal(out[[1, 2], at].astype(np.float32), special)
        out[[1, 2], at] = clean[[1, 2], at]
        assert out.tobytes() == clean.tobytes()


# ---- the same bits ----------------------------------------------------------------------------------


def test_a_row_alone_is_the_row_among_others(isa, dtype, rng):
    a, b = part(rng, 40, 21, dtype=dtype), part(rng, 40, 21, dtype=dtype)
    out, lse = merge_attention(*a, *b)
    for row in range(40):
        alone = merge_attention(*(p[row:row + 1] for p in (*a, *b)))
        assert bits(alone) == bits((out[row:row + 1], lse[row:row + 1]))


def test_any_thread_count_gives_the_same_bits(isa, dtype, rng, each_thread_count):
    a, b = part(rng, 4000, 40, dtype=dtype), part(rng, 4000, 40, dtype=dtype)
    seen = [bits(merge_attention(*a, *b)) for _ in each_thread_count()]
    assert all(other == seen[0] for other in seen[1:])


def test_any_strides_and_alignment(isa, dtype, rng):
    a, b = part(rng, 4, 6, 2, 10, dtype=dtype), part(rng, 4, 6, 2, 10, dtype=dtype)
    want = bits(merge_attention(*a, *b))
    views: tuple[Callable[[Array], Array], ...] = (
        np.asfortranarray,
        lambda x: x[::-1].copy()[::-1],
        lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        lambda x: np.frombuffer(b"." + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape),
    )
    for view in views:
        before = [x.copy() for x in (*a, *b)]
        assert bits(merge_attention(*(view(x) for x in (*a, *b)))) == want
        assert all(x.tobytes() == y.tobytes() for x, y in zip((*a, *b), before, strict=True))


@pytest.mark.parametrize("at_end", [False, True])
def test_arrays_between_forbidden_pages(isa, dtype, rng, at_end):
    for v_dim in range(1, 70):
        a, b = part(rng, 3, v_dim, dtype=dtype), part(rng, 3, v_dim, dtype=dtype)
        got = merge_attention(*(guarded_copy(x, at_end=at_end) for x in (*a, *b)))
        assert bits(got) == bits(merge_attention(*a, *b))


# ---- attention over parts of the keys ---------------------------------------------------------------


def merged(parts: list[Part]) -> Part:
    return reduce(lambda a, b: merge_attention(*a, *b), parts)


def check_split(got: Part, q: Array, k: Array, v: Array, merges: int, **options: Any) -> None:
    """The merge of attention over parts of the keys against the reference over all of them, float32.

    Each part's out is off by attention's bound A p @ |v|, and the parts' weights average that to A times the whole's.
    Each part's lse is off by L (1 + |lse|) absolutely, which is relative in its weight, above and below; every merge
    adds its own M roundings and those of its lse. Parts with a smaller lse weigh less by as much as it is smaller.
    """
    n, d = k.shape[1], q.shape[3]
    both = np.concatenate([reference.f64(v), np.abs(reference.f64(v))], axis=-1)
    out, lse = reference.attention(q, k, both, **options)
    out, magnitude = np.split(out, 2, axis=-1)
    scale = np.sqrt((reference.f64(q) ** 2).sum(-1).max() * (reference.f64(k) ** 2).sum(-1).max() / d)
    a, l_, m = (TOLERANCES[op, "float32"].roundings(n, d, scale) for op in ("attention", "lse", "merge_attention"))
    height = 1 + np.where(np.isinf(lse), 0, np.abs(lse))[..., None] + scale
    extra = 2 * l_ * height + merges * (m + 2 * height)
    check_close("attention", got[0], out, magnitude=magnitude * (a + extra) / a, n=n, d=d, s=scale)
    check_close("lse", got[1], lse, magnitude=(1 + merges) * (1 + np.abs(lse)), n=n, d=d, s=scale)


def inputs(rng: np.random.Generator, batch: int, q_len: int, kv_len: int) -> tuple[Array, Array, Array]:
    shapes = (batch, q_len, 4, 8), (batch, kv_len, 2, 8), (batch, kv_len, 2, 12)
    q, k, v = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("cut", [0, 1, 100, 255, 256, 257, 299, 300])
def test_two_parts_of_the_keys(isa, rng, cut):
    q, k, v = inputs(rng, 2, 3, 300)
    parts = [attention(q, k[:, some], v[:, some], return_lse=True) for some in (slice(cut), slice(cut, None))]
    check_split(merged(parts), q, k, v, 1)
    check_split(merged(parts[::-1]), q, k, v, 1)
    if cut in (0, 300):
        assert bits(merged(parts)) == bits(attention(q, k, v, return_lse=True))


@pytest.mark.parametrize("count", [2, 3, 7, 40])
def test_many_parts_in_any_order(isa, rng, count):
    """Parts of random keys, some of them empty, folded one by one and in a tree."""
    q, k, v = inputs(rng, 1, 2, 60)
    owner = rng.integers(0, count, 60)
    parts = [attention(q, k[:, owner == i], v[:, owner == i], return_lse=True) for i in range(count)]
    check_split(merged(parts), q, k, v, count)
    check_split(merged(parts[::-1]), q, k, v, count)
    while len(parts) > 1:
        parts = [merged(parts[i:i + 2]) for i in range(0, len(parts), 2)]
    check_split(parts[0], q, k, v, count)


def test_causal_blocks_as_a_ring_passes_them(isa, rng):
    """40 tokens on 4 ranks: earlier blocks in full, the own one causal, later ones empty."""
    q, k, v = inputs(rng, 1, 40, 40)
    for rank in range(4):
        own = slice(10 * rank, 10 * rank + 10)
        blocks = [slice(10 * i, 10 * i + 10) for i in range(4)]
        parts = [attention(q[:, own], k[:, b], v[:, b], causal=i == rank, return_lse=True,
                           kv_lens=np.array([10 if i <= rank else 0])) for i, b in enumerate(blocks)]
        check_split(merged(parts), q[:, own], k[:, :own.stop], v[:, :own.stop], 3, causal=True)


def test_masked_halves_and_rows_that_see_one_half_only(isa, rng):
    q, k, v = inputs(rng, 2, 6, 30)
    mask = rng.random((2, 1, 6, 30)) < 0.5
    mask[:, :, 1, :15], mask[:, :, 2, 15:], mask[:, :, 3] = False, False, False
    parts = [attention(q, k[:, h], v[:, h], mask=mask[..., h], return_lse=True) for h in (slice(15), slice(15, None))]
    out, lse = merged(parts)
    check_split((out, lse), q, k, v, 1, mask=mask)
    assert (out[:, 3] == 0).all() and (lse[:, 3] == -INF).all()
    assert out[:, 1].tobytes() == parts[1][0][:, 1].tobytes() and out[:, 2].tobytes() == parts[0][0][:, 2].tobytes()


def test_sinks_belong_to_one_part(isa, rng):
    q, k, v = inputs(rng, 1, 3, 30)
    sinks = np.array([-2, 0, 1, 5], np.float32)
    first = attention(q, k[:, :9], v[:, :9], sinks=sinks, return_lse=True)
    rest = attention(q, k[:, 9:], v[:, 9:], return_lse=True)
    check_split(merge_attention(*first, *rest), q, k, v, 1, sinks=sinks)
    none = attention(q, k[:, :0], v[:, :0], sinks=sinks, return_lse=True)
    check_split(merge_attention(*none, *attention(q, k, v, return_lse=True)), q, k, v, 1, sinks=sinks)


# ---- what is refused --------------------------------------------------------------------------------

OUT, LSE = np.ones((2, 3, 4), np.float32), np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: merge_attention(OUT, LSE, OUT[:1], LSE), ValueError, "out_b has shape (1, 3, 4), expected (2, 3, 4)"),
    (lambda: merge_attention(OUT, LSE, OUT, LSE[..., None]), ValueError, "lse_b has shape (2, 3, 1), expected (2, 3)"),
    (lambda: merge_attention(OUT, LSE[:1], OUT, LSE), ValueError, "lse_a has shape (1, 3), expected (2, 3)"),
    (lambda: merge_attention(OUT, LSE, OUT.astype(np.float16), LSE), TypeError, "out_b has dtype float16"),
    (lambda: merge_attention(OUT, LSE.astype(np.float16), OUT, LSE), TypeError, "lse_a has dtype float16"),
    (lambda: merge_attention(OUT.astype(np.float64), LSE, OUT, LSE), TypeError, "pass out_a.astype(np.float32)"),
    (lambda: merge_attention(np.float32(1), LSE, OUT, LSE), ValueError, "out_a has shape ()"),
])
def test_a_refused_call_says_why(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith("merge_attention: ") and message in str(caught.value)
