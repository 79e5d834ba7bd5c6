"""linear, gated_linear and packed weights: against the float64 product, layout against layout, row against batch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from conftest import DTYPES, check_close, flushed
from guard import guarded, guarded_copy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray
from suite import case

import forge_c as fc
from forge_c import PackedWeight, gated_linear, linear, pack, pack_gated

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ROWS = (0, 1, 2, 3, 5, 8, 13, 14, 17, 33, 65, 130)
SIDES = (0, 1, 15, 16, 17, 31, 33, 48, 100, 257)
ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh")
# One past each block of ops/linear.c: rows, tile columns, streamed columns and k, unpacked k, packed float32 and
# bfloat16 k; even and odd.
BEYOND_BLOCKS = ((385, 33, 17), (769, 5, 70), (7, 33, 65), (7, 33, 129), (4, 65, 1025), (1, 129, 2050), (5, 65, 1025),
                 (7, 513, 33), (5, 1025, 80), (3, 2049, 33), (50, 2049, 17), (3, 4097, 33), (9, 4098, 17))

Array = NDArray[Any]


pytestmark = pytest.mark.usefixtures("one_thread")


def normal(rng: np.random.Generator, *shape: int, dtype: DTypeLike = np.float32) -> Array:
    return rng.standard_normal(shape, np.float32).astype(dtype)


def sizes() -> list[tuple[int, int, int]]:
    """(m, k, n): every pair of k and n, every pair of m and n."""
    triples = {(ROWS[(i + j) % len(ROWS)], k, n) for (i, k), (j, n) in product(enumerate(SIDES), repeat=2)}
    for (i, m), (j, n) in product(enumerate(ROWS), enumerate(SIDES)):
        triples.add((m, SIDES[(3 * i + j) % len(SIDES)], n))
    return sorted(triples)


def misaligned(a: Array) -> Array:
    copied = np.empty(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    copied[...] = a
    return copied


def inside(a: Array, before: int = 3, after: int = 2) -> Array:
    """`a` as columns of a wider array of NaN: rows that are not neighbours, and every stray read shows."""
    wide = np.full((*a.shape[:-1], before + a.shape[-1] + after), np.nan, a.dtype)
    wide[..., before:before + a.shape[-1]] = a
    return wide[..., before:before + a.shape[-1]]


def read_only(a: Array) -> Array:
    copied = a.copy()
    copied.flags.writeable = False
    return copied


# Ways to lay out one float32 matrix, all of which multiply to the same bits.
LAYOUTS: dict[str, Callable[[Array], Any]] = {
    "rows": np.ascontiguousarray,
    "columns": lambda w: np.ascontiguousarray(w.T).T,
    "fortran": np.asfortranarray,
    "packed": pack,
    "strided_rows": inside,
    "strided_columns": lambda w: inside(w.T).T,
    "reversed_rows": lambda w: w[::-1].copy()[::-1],
    "reversed_columns": lambda w: w.T[::-1].copy()[::-1].T,
    "misaligned_rows": misaligned,
    "misaligned_columns": lambda w: misaligned(w.T).T,
    "read_only": read_only,
}


FORMATS = ("float32", "bfloat16", "int8", "int4")


def laid_out(fmt: str, w: Array) -> Any:
    """A layout of LAYOUTS, or a packed format."""
    return pack(w, fmt) if fmt in FORMATS else LAYOUTS[fmt](w)


def check_linear(got: Array, x: Array, w: Array, bias: Array | None = None, residual: Array | None = None) -> None:
    """`got` against the reference; the magnitude is the sum of the absolute values of all terms."""
    size = [None if a is None else np.abs(reference.f64(a)) for a in (x, w, bias, residual)]
    check_close("linear", got, reference.linear(x, w, bias, residual=residual),
                magnitude=reference.linear(size[0], size[1], size[2], residual=size[3]), n=x.shape[-1])


def rounded(x: Array) -> Array:
    """What a bfloat16 weight multiplies: on every ISA x is rounded to bfloat16 first, then accumulated in float32."""
    return x.astype(BFLOAT16)


# ---- against the reference --------------------------------------------------------------------------


def test_sizes(isa, dtype, rng):
    for m, k, n in sizes():
        x, w = normal(rng, m, k, dtype=dtype), normal(rng, k, n)
        y = linear(x, w)
        assert y.dtype == dtype and y.shape == (m, n)
        check_linear(y, x, w)
        assert linear(x, np.asfortranarray(w)).tobytes() == y.tobytes(), (m, k, n)
        assert linear(x, pack(w)).tobytes() == y.tobytes(), (m, k, n)


def test_sizes_of_a_bfloat16_pack(isa, dtype, rng):
    for m, k, n in sizes():
        x, w = normal(rng, m, k, dtype=dtype), normal(rng, k, n)
        y = linear(x, pack(w, "bfloat16"))
        assert y.dtype == dtype
        check_linear(y, rounded(x), w.astype(BFLOAT16))


@pytest.mark.parametrize(("m", "k", "n"), BEYOND_BLOCKS)
def test_sizes_beyond_the_blocks(isa, rng, m, k, n):
    x, w, bias, residual = normal(rng, m, k), normal(rng, k, n), normal(rng, n), normal(rng, m, n)
    for threads in (1, 3):
        fc.set_num_threads(threads)
        with case(threads, "threads"):
            y = linear(x, w, bias, residual=residual)
            check_linear(y, x, w, bias, residual)
            for layout in ("columns", "packed"):
                assert linear(x, LAYOUTS[layout](w), bias, residual=residual).tobytes() == y.tobytes(), layout
            y = linear(x, pack(w, "bfloat16"), bias, residual=residual)
            check_linear(y, rounded(x), w.astype(BFLOAT16), bias, residual)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sixteen_bit_array_is_its_float32_values(isa, rng, layout, stored):
    """Unlike a bfloat16 pack, a plain 16-bit weight leaves x as it is."""
    for m, k, n in ((1, 33, 70), (3, 16, 17), (4, 1, 1), (7, 100, 31), (33, 530, 48)):
        x, w = normal(rng, m, k), normal(rng, k, n, dtype=DTYPES[stored])
        y = linear(x, LAYOUTS[layout](w))
        assert y.tobytes() == linear(x, w.astype(np.float32)).tobytes()
        check_linear(y, x, w)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_bits(isa, dtype, rng, layout):
    for m, k, n in product((1, 4, 5, 40), (1, 2, 17, 100), (1, 2, 16, 70)):
        x, w, bias = normal(rng, m, k, dtype=dtype), normal(rng, k, n), normal(rng, n)
        assert linear(x, LAYOUTS[layout](w), bias).tobytes() == linear(x, w, bias).tobytes(), (m, k, n)


@settings(derandomize=True, database=None, deadline=None, max_examples=60,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_call(isa, data):
    draw = data.draw
    dtype, layout = DTYPES[draw(st.sampled_from(list(DTYPES)))], draw(st.sampled_from([*LAYOUTS, "bfloat16"]))
    lead = draw(st.lists(st.integers(0, 5), max_size=3))
    k, n = draw(st.integers(0, 140)), draw(st.integers(0, 140))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x, w = normal(rng, *lead, k, dtype=dtype), normal(rng, k, n)
    bias = normal(rng, n, dtype=DTYPES[draw(st.sampled_from(list(DTYPES)))]) if draw(st.booleans()) else None
    residual = normal(rng, *lead, n, dtype=dtype) if draw(st.booleans()) else None
    weight = pack(w, "bfloat16") if layout == "bfloat16" else LAYOUTS[layout](w)
    y = linear(x, weight, bias, residual=residual)
    if layout == "bfloat16":
        x, w = rounded(x), w.astype(BFLOAT16)
    assert y.shape == (*lead, n) and y.dtype == dtype
    check_linear(y, x, w, bias, residual)


# ---- bias, residual, out, and the shapes of x -------------------------------------------------------


@pytest.mark.parametrize("fmt", ["rows", "packed", "bfloat16"])
def test_bias_residual_and_out(isa, dtype, rng, fmt):
    biases = (None, np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
    for m, (k, n) in product((1, 4, 9), ((33, 70), (64, 16), (0, 5), (7, 1))):
        x, w = normal(rng, m, k, dtype=dtype), normal(rng, k, n)
        weight = pack(w, "bfloat16") if fmt == "bfloat16" else LAYOUTS[fmt](w)
        used_x, used_w = (rounded(x), w.astype(BFLOAT16)) if fmt == "bfloat16" else (x, w)
        for bias_dtype, with_residual in product(biases, (False, True)):
            bias = None if bias_dtype is None else normal(rng, n, dtype=bias_dtype)
            residual = normal(rng, m, n, dtype=dtype) if with_residual else None
            y = linear(x, weight, bias, residual=residual)
            check_linear(y, used_x, used_w, bias, residual)
            out = np.full((m, n), np.nan, dtype)
            assert linear(x, weight, bias, residual=residual, out=out) is out and out.tobytes() == y.tobytes()
            if with_residual:
                assert linear(x, weight, bias, residual=inside(residual)).tobytes() == y.tobytes()
                assert linear(x, weight, bias, residual=residual, out=residual) is residual
                assert residual.tobytes() == y.tobytes()


def test_a_strided_out_keeps_its_surroundings(isa, dtype, rng):
    x, w, residual = normal(rng, 2, 5, 33, dtype=dtype), normal(rng, 33, 19), normal(rng, 2, 5, 19, dtype=dtype)
    for weight in (w, np.asfortranarray(w), pack(w), pack(w, "int8"), pack(w, "int4")):
        expected = linear(x, weight, residual=residual)
        wide = np.full((5, 2, 24), 7, dtype)
        out = wide.transpose(1, 0, 2)[:, ::-1, 3:22]
        assert linear(x, weight, residual=residual, out=out) is out
        assert out.tobytes() == expected.tobytes()
        assert (wide[..., :3] == 7).all() and (wide[..., 22:] == 7).all()


def shapes_of_x(x: Array) -> Iterator[Array]:
    """Views whose last axis is x's."""
    k = x.shape[-1]
    yield x[0]
    yield x.reshape(1, *x.shape)
    yield x[:0]
    yield x.reshape(3, 2, 2, k)
    yield x.reshape(3, 0, k) if k == 0 else np.empty((3, 0, k), x.dtype)
    yield x.reshape(3, 4, k).transpose(1, 0, 2)
    yield x[::-1]
    yield x[::3]
    yield x.reshape(3, 4, k)[::-1, 1::2]
    yield np.broadcast_to(x[:1], x.shape)
    yield np.broadcast_to(x[:, None], (12, 3, k))
    yield inside(x)
    yield misaligned(x)
    yield read_only(x)


@pytest.mark.parametrize("k", [1, 16, 33])
@pytest.mark.parametrize("fmt", ["rows", "columns", *FORMATS])
def test_x_of_any_shape_and_stride(isa, dtype, rng, fmt, k):
    x, w, bias = normal(rng, 12, k, dtype=dtype), normal(rng, k, 21), normal(rng, 21)
    weight = laid_out(fmt, w)
    for view in shapes_of_x(x):
        before = view.tobytes()
        y = linear(view, weight, bias)
        rows = [linear(row.copy(), weight, bias) for row in view.reshape(-1, k)]
        assert y.shape == (*view.shape[:-1], 21)
        assert y.tobytes() == b"".join(row.tobytes() for row in rows)
        assert view.tobytes() == before


# ---- the same bits ----------------------------------------------------------------------------------


def multiplications(k: int, rng: np.random.Generator) -> dict[str, Callable[[Array], Array]]:
    """x -> y for every kind of weight (k, 70)."""
    w, gate, bias = normal(rng, k, 70), normal(rng, k, 70), normal(rng, 2, 70)
    weights = {name: layout(w) for name, layout in LAYOUTS.items()} | {
        "float16_rows": w.astype(np.float16),
        "bfloat16_columns": np.asfortranarray(w.astype(BFLOAT16)),
        **{packed: pack(w, packed) for packed in FORMATS},
    }
    calls = {name: partial(linear, weight=weight, bias=bias[0]) for name, weight in weights.items()}
    for packed in FORMATS:
        calls[f"gated_{packed}"] = partial(gated_linear, weight=pack_gated(gate, w, packed), bias=bias)
    return calls


def test_a_row_alone_is_the_row_in_any_batch(isa, dtype, rng):
    for k in (1, 2, 17, 100):
        x = normal(rng, 40, k, dtype=dtype)
        for name, call in multiplications(k, rng).items():
            whole = call(x)
            for m in range(1, 41):
                assert call(x[:m]).tobytes() == whole[:m].tobytes(), (name, k, m)
                assert call(x[m - 1:m]).tobytes() == whole[m - 1:m].tobytes(), (name, k, m)


@pytest.mark.parametrize(("k", "m"), [(513, 12), (2049, 12), (4097, 12), (17, 390)])
def test_a_row_alone_beyond_the_blocks(isa, rng, k, m):
    x = normal(rng, m, k)
    for name, call in multiplications(k, rng).items():
        whole = call(x)
        for row in (0, 5, m - 7, m - 1):
            assert call(x[row:row + 1]).tobytes() == whole[row:row + 1].tobytes(), (name, row)
            assert call(x[max(row - 4, 0):row + 1])[-1].tobytes() == whole[row].tobytes(), (name, row)


def test_any_thread_count_gives_the_same_bits(isa, dtype, rng, each_thread_count):
    calls = multiplications(257, rng)
    for m in (1, 4, 5, 130):
        x = normal(rng, m, 257, dtype=dtype)
        seen = [{name: call(x).tobytes() for name, call in calls.items()} for _ in each_thread_count()]
        assert all(other == seen[0] for other in seen[1:]), m


@pytest.mark.parametrize(("m", "n"), [(1, 3000), (4, 3000), (390, 200)])
def test_any_thread_count_with_many_outputs(isa, rng, each_thread_count, m, n):
    x, w, residual = normal(rng, m, 300), normal(rng, 300, n), normal(rng, m, n)
    weights = (w, np.asfortranarray(w), *(pack(w, packed) for packed in FORMATS))
    seen = [[linear(x, weight, residual=residual).tobytes() for weight in weights] for _ in each_thread_count()]
    assert all(other == seen[0] for other in seen[1:])


# ---- nothing outside the arrays ---------------------------------------------------------------------


def check_on_guarded_pages(call: Callable[..., Array], at_end: bool, *arrays: Array | None) -> Array:
    """call(*arrays, out) with all of them between forbidden pages."""
    copies = [None if a is None else guarded_copy(a, at_end=at_end) for a in arrays]
    plain = call(*arrays, None)
    out = guarded(plain.shape, plain.dtype, at_end=at_end)
    assert call(*copies, out).tobytes() == plain.tobytes(), plain.shape
    return out


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("at_end", [False, True])
def test_arrays_between_forbidden_pages(isa, rng, at_end, stored):
    for n in range(1, 36):
        for i, k in enumerate((1, n, 36 - n)):
            dtype = list(DTYPES.values())[(n + i) % 3]
            m = (1, 3, 7)[(n // 3 + i) % 3]
            x, w = normal(rng, m, k, dtype=dtype), normal(rng, k, n, dtype=DTYPES[stored])
            bias, residual = normal(rng, n), normal(rng, m, n, dtype=dtype)
            for turned in (False, True):
                def call(x, w, bias, residual, out, turned=turned):
                    return linear(x, w.T if turned else w, bias, residual=residual, out=out)
                check_on_guarded_pages(call, at_end, x, w.T.copy() if turned else w, bias, residual)


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("at_end", [False, True])
def test_packs_between_forbidden_pages(isa, rng, at_end, stored):
    for n in range(1, 36):
        for i, k in enumerate((1, n, 36 - n)):
            dtype = list(DTYPES.values())[(n + i) % 3]
            x, bias = normal(rng, (1, 3, 7)[(n // 3 + i) % 3], k, dtype=dtype), normal(rng, 2, n)
            one = pack(normal(rng, k, n), stored)
            pair = pack_gated(normal(rng, k, n), normal(rng, k, n), stored)
            for packed, multiply, b in ((one, linear, bias[0]), (pair, gated_linear, bias)):
                def call(x, data, bias, out, p=packed, multiply=multiply):
                    held = PackedWeight(data, p.shape, p.dtype, p.gated, p.group_size)
                    return multiply(x, held, bias, out=out)
                check_on_guarded_pages(call, at_end, x, packed.data, b)


# ---- NaN and infinity -------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("fmt", ["rows", "columns", "packed", "bfloat16"])
def test_nan_and_infinity_go_where_the_formula_sends_them(isa, dtype, rng, fmt, special):
    m, k, n = 9, 37, 35
    clean_x, clean_w = normal(rng, m, k, dtype=dtype), normal(rng, k, n)
    clean_w[:, 4] = 0

    def multiply(x, w, bias=None):
        weight = pack(w, "bfloat16") if fmt == "bfloat16" else LAYOUTS[fmt](w)
        y = linear(x, weight, bias)
        used_x, used_w = (rounded(x), w.astype(BFLOAT16)) if fmt == "bfloat16" else (x, w)
        check_close("linear", y, reference.linear(used_x, used_w, bias), n=k,
                    magnitude=np.nan_to_num(np.abs(clean_x.astype(np.float64))) @ np.abs(clean_w) + 1)
        return y

    clean = multiply(clean_x, clean_w)
    for row, at in product((0, 6, 8), (0, 16, 36)):
        x = clean_x.copy()
        x[row, at] = special
        y = multiply(x, clean_w)
        assert not np.isfinite(y[row].astype(np.float32)).any() and np.isnan(y[row, 4])
        assert np.delete(y, row, 0).tobytes() == np.delete(clean, row, 0).tobytes()
    for at, column in product((0, 16, 36), (0, 20, 34)):
        w = clean_w.copy()
        w[at, column] = special
        y = multiply(clean_x, w)
        assert not np.isfinite(y[:, column].astype(np.float32)).any()
        assert np.delete(y, column, 1).tobytes() == np.delete(clean, column, 1).tobytes()
    bias = np.zeros(n, np.float32)
    bias[[0, 34]] = special
    np.testing.assert_array_equal(multiply(clean_x, clean_w, bias)[:, [0, 34]].astype(np.float32), special)


def test_infinities_that_cancel_are_nan(isa, rng):
    x = np.ones((2, 20), np.float32)
    x[0, [3, 17]] = np.inf, -np.inf
    for weight in (np.ones((20, 18), np.float32), pack(np.ones((20, 18)).astype(np.float32), "bfloat16")):
        y = linear(x, weight)
        assert np.isnan(y[0]).all() and (y[1] == 20).all()


def test_a_result_too_large_for_float16_is_infinite(isa):
    x = np.full((1, 100), 60000, np.float16)
    w = np.full((100, 3), 100, np.float32)
    for weight in (w, *(pack(w, fmt) for fmt in FORMATS)):
        assert (linear(x, weight) == np.inf).all()


# ---- packed weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_unpack_is_what_was_packed(rng, stored):
    for k, n in product(SIDES, SIDES):
        w = normal(rng, k, n)
        w.flat[:3] = (np.nan, -0.0, np.inf)[:w.size]
        packed = pack(w, stored)
        back = packed.unpack()
        assert back.dtype == np.float32 and back.shape == packed.shape == (k, n)
        assert back.tobytes() == w.astype(DTYPES[stored]).astype(np.float32).tobytes()
        assert pack(back, stored).data.tobytes() == packed.data.tobytes()
        lines = k if stored == "float32" else -(-k // 2)
        assert packed.nbytes == -(-n // 16) * lines * 64
        assert packed.nbytes == 0 or packed.data.ctypes.data % 64 == 0


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_unpack_of_a_pair_is_both_sides(rng, stored):
    for k, n in product((0, 1, 17, 33), (0, 1, 16, 31, 100)):
        a, b = normal(rng, k, n), normal(rng, k, n)
        packed = pack_gated(a, b, stored)
        assert packed.gated and packed.shape == (k, 2 * n)
        assert packed.unpack().tobytes() == np.hstack([a, b]).astype(DTYPES[stored]).astype(np.float32).tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pack_takes_any_strides_and_dtype(rng, dtype, layout):
    w = normal(rng, 19, 37, dtype=dtype)
    laid = w if layout == "packed" else LAYOUTS[layout](w)
    for stored in ("float32", "bfloat16"):
        packed = pack(laid, stored)
        assert packed.data.tobytes() == pack(w, stored).data.tobytes()
        assert packed.unpack().tobytes() == w.astype(DTYPES[stored]).astype(np.float32).tobytes()


def test_packing_rounds_to_nearest_even():
    ulp = 2.0**-7
    w = np.array([[1 + ulp / 2, 1 + 1.5 * ulp, 1 + 0.501 * ulp, -1 - 0.499 * ulp, 3.4e38]], np.float32)
    np.testing.assert_array_equal(pack(w, "bfloat16").unpack(), [[1, 1 + 2 * ulp, 1 + ulp, -1, np.inf]])


def test_a_pack_is_a_read_only_copy(rng):
    w = normal(rng, 16, 16)
    packed = pack(w)
    kept = packed.unpack()
    w[:] = 0
    assert packed.unpack().tobytes() == kept.tobytes() and not packed.data.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        packed.data[...] = 0
    with pytest.raises(AttributeError):
        packed.shape = (8, 32)
    assert repr(packed) == "PackedWeight(shape=(16, 16), dtype='float32')"


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("gated", [False, True])
def test_pickle_and_copy(isa, rng, stored, gated):
    a, b, x = normal(rng, 33, 21), normal(rng, 33, 21), normal(rng, 5, 33)
    packed = pack_gated(a, b, stored) if gated else pack(a, stored)
    multiply = gated_linear if gated else linear
    twins = [pickle.loads(pickle.dumps(packed, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for twin in [*twins, copy.copy(packed), copy.deepcopy(packed)]:
        assert (twin.shape, twin.dtype, twin.gated, twin.nbytes) == (packed.shape, stored, gated, packed.nbytes)
        assert twin.unpack().tobytes() == packed.unpack().tobytes() and not twin.data.flags.writeable
        assert multiply(x, twin).tobytes() == multiply(x, packed).tobytes()


# ---- the gated pair ---------------------------------------------------------------------------------


def check_gated(got: Array, x: Array, a: Array, b: Array, bias: Array | None, activation: str) -> None:
    """y = f(g) u, where g and u are sums of terms of total size G and U.

    f' <= 1.13 carries g's error (k + 2) eps G into y times |u|; u's error (k + 2) eps U comes times |f(g)|, and
    |f(g)| <= |g| <= G bounds f's own roundings. The last term is the product of both errors.
    """
    k, (bias_a, bias_b) = x.shape[-1], (None, None) if bias is None else bias
    g, u = reference.linear(x, a, bias_a), reference.linear(x, b, bias_b)
    sizes_of = [None if t is None else np.abs(reference.f64(t)) for t in (x, a, bias_a, b, bias_b)]
    big_g, big_u = reference.linear(*sizes_of[:3]), reference.linear(sizes_of[0], *sizes_of[3:])
    if activation == "relu":
        f, expected = reference.relu(g), reference.relu(g) * u
    else:
        expected = reference.gated_linear(x, a, b, None if bias is None else bias[:, None, :], activation=activation)
        f = reference.silu(g) if activation == "silu" else reference.gelu(g, {"gelu": "none"}.get(activation, "tanh"))
    magnitude = big_g * np.abs(u) + np.abs(f) * big_u + 2.0**-24 * (k + 2) * big_g * big_u
    more = 0 if a.dtype != BFLOAT16 else 1.13 * flushed(x, a) * np.abs(u) + np.abs(f) * flushed(x, b)
    check_close("gated_linear", got, expected, magnitude=magnitude, n=k, more=more)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_gated_sizes(isa, dtype, rng, stored, activation):
    for i, (first, n) in enumerate(product(range(4), SIDES)):
        m, k = ROWS[(5 * i + i // 10) % 9], SIDES[(i + 3 * first + ACTIVATIONS.index(activation)) % len(SIDES)]
        x, a, b = normal(rng, m, k, dtype=dtype), normal(rng, k, n), normal(rng, k, n)
        bias = normal(rng, 2, n) if i % 2 else None
        y = gated_linear(x, pack_gated(a, b, stored), bias, activation=activation)
        assert y.shape == (m, n) and y.dtype == dtype
        if stored == "bfloat16":
            x, a, b = rounded(x), a.astype(BFLOAT16), b.astype(BFLOAT16)
        check_gated(y, x, a, b, bias, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("m", "k", "n"), [(385, 5, 33), (3, 2049, 17), (2, 4097, 17), (130, 40, 65)])
def test_gated_beyond_the_blocks(isa, rng, activation, m, k, n):
    x, a, b, bias = normal(rng, m, k), normal(rng, k, n), normal(rng, k, n), normal(rng, 2, n)
    check_gated(gated_linear(x, pack_gated(a, b), bias, activation=activation), x, a, b, bias, activation)
    y = gated_linear(x, pack_gated(a, b, "bfloat16"), bias, activation=activation)
    check_gated(y, rounded(x), a.astype(BFLOAT16), b.astype(BFLOAT16), bias, activation)


def test_gated_x_of_any_shape_bias_of_any_dtype_and_out(isa, dtype, rng):
    x, a, b = normal(rng, 12, 33, dtype=dtype), normal(rng, 33, 21), normal(rng, 33, 21)
    packed = pack_gated(a, b)
    for bias in (normal(rng, 2, 21, dtype=dtype), np.asfortranarray(normal(rng, 2, 21))):
        rows = np.stack([gated_linear(row, packed, bias) for row in x])
        check_gated(rows, x, a, b, reference.f64(bias), "silu")
        for view in shapes_of_x(x):
            y = gated_linear(view, packed, bias)
            out = inside(np.zeros((*view.shape[:-1], 21), dtype))
            assert gated_linear(view, packed, bias, out=out) is out
            assert out.tobytes() == y.tobytes() == gated_linear(view.copy(), packed, bias).tobytes()
        assert gated_linear(x, packed, bias).tobytes() == rows.tobytes()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_nan_stays_in_its_row_and_column(isa, rng, activation):
    x, a, b = normal(rng, 8, 20), normal(rng, 20, 35), normal(rng, 20, 35)
    clean = gated_linear(x, pack_gated(a, b), activation=activation)
    x[3, 19], a[0, 33], b[19, 16] = np.nan, np.nan, np.nan
    y = gated_linear(x, pack_gated(a, b), activation=activation)
    expected = np.zeros(y.shape, bool)
    expected[3], expected[:, [33, 16]] = True, True
    np.testing.assert_array_equal(np.isnan(y), expected)
    assert y[~expected].tobytes() == clean[~expected].tobytes()


# ---- what is refused --------------------------------------------------------------------------------

X, W = np.ones((3, 4), np.float32), np.ones((4, 5), np.float32)
WRONG: dict[str, tuple[Callable[[Array], Any], type[Exception], str]] = {
    "inner": (lambda out: linear(X, W[:3], out=out), ValueError, "linear: x has shape (3, 4), expected (..., 3)"),
    "0-d x": (lambda out: linear(np.float32(1), W, out=out), ValueError, "linear: x has shape ()"),
    "1-d weight": (lambda out: linear(X, W[0], out=out), ValueError, "linear: weight has shape (5,)"),
    "strides": (lambda out: linear(X, np.ones((8, 10), np.float32)[::2, ::2], out=out), ValueError, "has strides"),
    "float64": (lambda out: linear(X.astype(np.float64), W, out=out), TypeError, "pass x.astype(np.float32)"),
    "bias": (lambda out: linear(X, W, np.ones(4, np.float32), out=out), ValueError, "bias has shape (4,)"),
    "residual": (lambda out: linear(X, W, residual=X, out=out), ValueError, "residual has shape (3, 4)"),
    "residual dtype": (lambda out: linear(X, W, residual=np.ones((3, 5), np.float16), out=out), TypeError, "residual"),
    "pair": (lambda out: linear(X, pack_gated(W, W), out=out), TypeError, "use gated_linear"),
    "no pair": (lambda out: gated_linear(X, pack(W), out=out), TypeError, "expected a pair from pack_gated"),
    "array": (lambda out: gated_linear(X, W, out=out), TypeError, "gated_linear: weight is a ndarray"),
    "activation": (lambda out: gated_linear(X, pack_gated(W, W), activation="swish", out=out), ValueError, "'swish'"),
    "gated bias": (lambda out: gated_linear(X, pack_gated(W, W), W[0], out=out), ValueError, "expected (2, 5)"),
    "overlap": (lambda out: linear(out[:, :4], W, out=out), ValueError, "linear: out overlaps x"),
    "overlapping weight": (lambda out: linear(X[:, :3], out, out=out), ValueError, "linear: out overlaps weight"),
    "shifted residual": (lambda out: linear(X, W, residual=out[::-1], out=out), ValueError, "out overlaps residual"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_refused_call_says_why_and_writes_nothing(case):
    call, error, message = WRONG[case]
    out = np.full((3, 5), 7, np.float32)
    with pytest.raises(error) as caught:
        call(out)
    assert message in str(caught.value)
    assert (out == 7).all()


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: pack(W, "int3"), ValueError, "pack: dtype is 'int3'"),
    (lambda: pack(W.astype(np.float64)), TypeError, "pack: weight has dtype float64"),
    (lambda: pack(W[0]), ValueError, "pack: weight has shape (5,)"),
    (lambda: pack(W, group_size=32), ValueError, "pack: group_size is 32"),
    (lambda: pack_gated(W, W[:3]), ValueError, "pack_gated: up has shape (3, 5), expected (4, 5)"),
])
def test_what_cannot_be_packed(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
