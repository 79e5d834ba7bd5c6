"""linear and gated_linear with int8 and int4 weights: against their integer arithmetic, and against x W in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product as pairs
from typing import Any

import numpy as np
import pytest
import reference
from conftest import DTYPES
from guard import guarded, guarded_copy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantized import (
    PRODUCTS,
    SMALL_PRODUCTS,
    STEPS,
    Array,
    activations_of,
    check_gated,
    check_product,
    chunk_of,
    from_parts,
    has_minimum,
    normal,
    packed_as,
    parts,
    steady,
)
from suite import case

import forge_c as fc
from forge_c import PackedWeight, gated_linear, linear

ROWS = (*range(1, 18), 23, 24, 25, 191, 192, 193, 385)
ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh")
WIDTHS = (1, 2, 15, 16, 17, 31, 33, 47, 48, 63, 64, 65, 70, 130)

pytestmark = pytest.mark.usefixtures("one_thread")


def sizes(group: int) -> Iterator[tuple[int, int]]:
    """(k, n): k on both sides of whole vectors, lines, groups and blocks, each with a third of the widths: four or
    five, and so with every dtype where neighbours have different ones."""
    near = (1, 2, 3, 4, 7, 8, 9, 31, 33, group - 1, group, group + 1, 2 * group - 5, 2 * group, 2 * group + 3)
    for i, k in enumerate(near if group < 8192 else (1, 33, 300)):
        yield from ((k, n) for n in WIDTHS[i % 3::3])


def gauss(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, np.float32)


# ---- against the reference --------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRODUCTS)
def test_sizes(isa, rng, name):
    for i, (k, n) in enumerate(sizes(PRODUCTS[name][2])):
        dtype = list(DTYPES.values())[i % 3]
        x, bias = normal(rng, 1 + i % 15, k, dtype=dtype), gauss(rng, n) if i % 2 else None
        residual = normal(rng, len(x), n, dtype=dtype) if i % 4 == 0 else None
        packed = packed_as(name, gauss(rng, k, n))
        y = linear(x, packed, bias, residual=residual)
        assert y.dtype == dtype and y.shape == (len(x), n)
        with case(k, n, dtype):
            check_product(y, x, parts(packed), bias, residual)


@pytest.mark.parametrize("name", SMALL_PRODUCTS)
def test_every_width(isa, rng, name):
    for n in range(1, 72):
        k = int(rng.integers(1, 2 * PRODUCTS[name][2] + 4))
        x, packed = normal(rng, ROWS[n % 17], k), packed_as(name, gauss(rng, k, n))
        check_product(linear(x, packed), x, parts(packed))


@pytest.mark.parametrize(("m", "k", "n"), [(385, 70, 17), (193, 200, 70), (7, 4097, 33), (3, 9000, 49), (1, 9000, 130),
                                           (25, 2049, 65)])
@pytest.mark.parametrize("name", PRODUCTS)
def test_sizes_beyond_the_blocks(isa, rng, name, m, k, n):
    x, bias, residual = normal(rng, m, k), gauss(rng, n), gauss(rng, m, n)
    packed = packed_as(name, gauss(rng, k, n))
    y = linear(x, packed, bias, residual=residual)
    check_product(y, x, parts(packed), bias, residual)
    fc.set_num_threads(3)
    assert linear(x, packed, bias, residual=residual).tobytes() == y.tobytes()


@pytest.mark.parametrize("name", SMALL_PRODUCTS)
def test_bias_residual_and_out(isa, dtype, rng, name):
    for m, k, n in ((1, 33, 70), (4, 64, 16), (9, 7, 1), (1, 300, 33), (9, 33, 70), (4, 300, 33)):
        x, packed = normal(rng, m, k, dtype=dtype), packed_as(name, gauss(rng, k, n))
        for bias_dtype, with_residual in pairs((None, *DTYPES.values()), (False, True)):
            bias = None if bias_dtype is None else gauss(rng, n).astype(bias_dtype)
            residual = gauss(rng, m, n).astype(dtype) if with_residual else None
            y = linear(x, packed, bias, residual=residual)
            check_product(y, x, parts(packed), bias, residual)
            wide = np.full((m, n + 5), 7, dtype)
            out = wide[::-1, 3:n + 3]
            assert linear(x, packed, bias, residual=residual, out=out) is out and out.tobytes() == y.tobytes()
            assert (wide[:, :3] == 7).all() and (wide[:, n + 3:] == 7).all()
            if with_residual:
                assert linear(x, packed, bias, residual=residual, out=residual) is residual
                assert residual.tobytes() == y.tobytes()


@pytest.mark.parametrize("name", PRODUCTS)
def test_no_inputs_no_outputs_no_rows(isa, dtype, rng, name):
    for m, k, n in ((3, 0, 5), (3, 0, 16), (0, 0, 5), (3, 7, 0), (0, 7, 5), (3, 0, 0)):
        x, w, bias, residual = (gauss(rng, *shape).astype(dtype) for shape in ((m, k), (k, n), (n,), (m, n)))
        y = linear(x, packed_as(name, w), bias, residual=residual)
        np.testing.assert_array_equal(y, (bias.astype(np.float32) + residual.astype(np.float32)).astype(dtype)[:m])
        assert (gated_linear(x, packed_as(name, w, w)) == np.zeros((m, n))).all()


@pytest.mark.parametrize("name", PRODUCTS)
def test_gated_sizes(isa, rng, name):
    for i, (k, n) in enumerate(sizes(PRODUCTS[name][2])):
        dtype = list(DTYPES.values())[i % 3]
        activation = ACTIVATIONS[i % 4]
        x, packed = normal(rng, 1 + i % 15, k, dtype=dtype), packed_as(name, gauss(rng, k, n), gauss(rng, k, n))
        bias = gauss(rng, 2, n) if i % 2 else None
        y = gated_linear(x, packed, bias, activation=activation)
        assert y.dtype == dtype and y.shape == (len(x), n)
        with case(k, n, dtype, activation):
            check_gated(y, x, parts(packed), parts(packed, 1), bias, activation)
        if i % 5 == 0:
            out = np.full(y.shape, np.nan, dtype)
            assert gated_linear(x, packed, bias, activation=activation, out=out) is out and out.tobytes() == y.tobytes()


@pytest.mark.parametrize(("m", "k", "n", "activation"), [(385, 40, 33, "silu"), (2, 9000, 17, "relu"),
                                                         (26, 2049, 65, "gelu"), (26, 300, 65, "gelu_tanh")])
@pytest.mark.parametrize("name", PRODUCTS)
def test_gated_beyond_the_blocks(isa, rng, name, m, k, n, activation):
    x, bias = normal(rng, m, k) / np.float32(k**0.5), gauss(rng, 2, n)
    packed = packed_as(name, gauss(rng, k, n), gauss(rng, k, n))
    y = gated_linear(x, packed, bias, activation=activation)
    check_gated(y, x, parts(packed), parts(packed, 1), bias, activation)


@settings(derandomize=True, database=None, deadline=None, max_examples=60,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_call(isa, data):
    draw = data.draw
    name, dtype = draw(st.sampled_from(list(PRODUCTS))), DTYPES[draw(st.sampled_from(list(DTYPES)))]
    m, k, n = draw(st.integers(0, 30)), draw(st.integers(1, 400)), draw(st.integers(0, 140))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x, packed = normal(rng, m, k, dtype=dtype), packed_as(name, gauss(rng, k, n) * np.exp(gauss(rng, k, n)))
    bias = gauss(rng, n) if draw(st.booleans()) else None
    residual = normal(rng, m, n, dtype=dtype) if draw(st.booleans()) else None
    y = linear(x, packed, bias, residual=residual)
    assert y.shape == (m, n) and y.dtype == dtype
    check_product(y, x, parts(packed), bias, residual)


# ---- x is rounded to the nearest of 127 or 2047 steps of a chunk, on either side --------------------------


def echo(k: int, activations: str) -> PackedWeight:
    """An identity whose scales are 1: linear gives each row of x as it was quantised, but for one rounding."""
    u = np.full((k, k), 128, np.uint8)
    np.fill_diagonal(u, 129)
    return from_parts("int8", 32, u, np.ones((k // 32, k)), activations=activations)


@pytest.mark.parametrize("activations", STEPS)
def test_x_is_rounded_to_the_nearest_step(isa, dtype, rng, activations):
    identity, steps = echo(96, activations), STEPS[activations]
    for power in (-20, 0, 9):
        x = (gauss(rng, 50, 96) * 2.0**power * np.repeat([1, 1 / 16, 4], 32)).astype(dtype)
        scale = np.repeat(reference.quantized(x, activations, 32)[1], 32, axis=1)
        wide = reference.f64(linear(x.astype(np.float32), identity))
        # Two roundings of x steps / max|x|, then those of the scale and of the product.
        assert (np.abs(wide - reference.f64(x)) <= scale * (0.5 + steps * 2.0**-22)).all()
        assert (np.abs(wide / scale - np.rint(wide / scale)) < steps * 2.0**-22).all()
        for chunk in np.split(np.arange(96), 3):
            largest = np.abs(reference.f64(x[:, chunk])).argmax(axis=1)
            assert (np.abs(np.rint(wide / scale))[:, chunk][np.arange(50), largest] == steps).all()


@pytest.mark.parametrize("activations", STEPS)
def test_a_tie_goes_to_the_even_step(isa, dtype, activations):
    x, steps = np.zeros((1, 96)), STEPS[activations]
    x[0, :11] = steps, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, -126.5, 125.5, 126.5
    y = linear((x / 2).astype(dtype).astype(np.float32), echo(96, activations))
    if (2 * (x / 2).astype(dtype) == x).all():  # bfloat16 has no 2047
        np.testing.assert_array_equal(2 * y[0, :11], [steps, 0, 2, 2, 4, 0, -2, -2, -126, 126, 126])


@pytest.mark.parametrize("activations", STEPS)
def test_what_is_large_takes_nothing_from_the_chunks_beside_it(isa, rng, activations):
    """Steps are as small as 32 values need, whatever the others are."""
    x, steps = gauss(rng, 20, 96), STEPS[activations]
    x[:, 40] = 1000
    error = np.abs(linear(x, echo(96, activations)) - x)
    beside, near = error[:, np.r_[:32, 64:96]], error[:, 32:64]
    assert beside.max() < 0.51 * 5 / steps and 0.4 * 1000 / steps < near.max() < 0.51 * 1000 / steps


@pytest.mark.parametrize("name", SMALL_PRODUCTS)
@pytest.mark.parametrize("factor", [100, 1000])
def test_a_channel_much_larger_than_the_others(isa, rng, name, factor):
    """As language models have them; its weights are small, so that it counts no more than any other. What is lost is
    its own chunk's: with one scale of 127 steps a row, a quarter of the product or nearly all of it. Values that are
    less than a step are lost, all of them at worst; others are off by a step / sqrt 12."""
    x, w = gauss(rng, 30, 2048), gauss(rng, 2048, 48)
    x[:, 777] = np.where(x[:, 777] < 0, -factor, factor)
    w[777] /= factor
    packed = packed_as(name, w)
    weight = np.float64(packed.unpack())
    exact = reference.linear(x, weight)
    chunk = chunk_of(packed.dtype, packed.group_size, packed.activations)
    first = 777 // chunk * chunk
    within = np.square(np.delete(weight[first:first + chunk], 777 - first, 0)).sum() / np.square(weight).sum()
    lost = min(1.1, factor / STEPS[packed.activations] / 12**0.5)
    error = np.linalg.norm(linear(x, packed) - exact) / np.linalg.norm(exact)
    assert error < 1.2 * lost * within**0.5 + 0.01


@pytest.mark.parametrize("name", SMALL_PRODUCTS)
def test_a_row_of_zeros_gives_bias_and_residual(isa, dtype, rng, name):
    packed, bias, residual = packed_as(name, gauss(rng, 150, 40)), gauss(rng, 40), gauss(rng, 7, 40).astype(dtype)
    x = normal(rng, 7, 150, dtype=dtype)
    x[[0, 4]] = 0
    y = linear(x, packed, bias, residual=residual)
    expected = (bias + residual[[0, 4]].astype(np.float32)).astype(dtype)
    assert y[[0, 4]].tobytes() == expected.tobytes()
    assert (linear(x, packed)[[0, 4]] == 0).all()


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", SMALL_PRODUCTS)
def test_a_row_with_a_nan_or_an_infinity_is_nan(isa, dtype, rng, name, special):
    k, n = 150, 35
    w, gate = gauss(rng, k, n), gauss(rng, k, n)
    w[:, 3] = 0
    calls: list[Callable[[Array], Array]] = [partial(linear, weight=packed_as(name, w))]
    pair = packed_as(name, gate, w)
    calls += [partial(gated_linear, weight=pair, activation=activation) for activation in ACTIVATIONS]
    clean = normal(rng, 9, k, dtype=dtype)
    for call, row, at in pairs(calls, (0, 6, 8), (0, 16, 149)):
        x = clean.copy()
        x[row, at] = special
        y = call(x)
        assert np.isnan(y[row].astype(np.float32)).all()
        assert np.delete(y, row, 0).tobytes() == np.delete(call(clean), row, 0).tobytes()


@pytest.mark.parametrize("name", SMALL_PRODUCTS)
def test_tiny_x(isa, rng, name):
    """A chunk whose largest value is under 2^-100 may count as zeros; every other is quantised as well as any."""
    packed = packed_as(name, gauss(rng, 150, 35))
    w = parts(packed)
    for power in (-85, -95):
        x = normal(rng, 5, 150) * np.float32(2.0**power)
        check_product(linear(x, packed), x, w)
    for power in (-98, -101, -110, -121, -126, -140, -149):
        x = normal(rng, 5, 150) * np.float32(2.0**power)
        lost = np.minimum(np.abs(x).astype(np.float64).max(axis=1, keepdims=True), 2.0**-100)
        steps = np.abs(x).astype(np.float64).max(axis=1, keepdims=True) / 127
        bound = np.maximum(lost, steps) * np.abs(w.weight).sum(axis=0) * (1 + 2.0**-15) + 2.0**-149
        assert (np.abs(linear(x, packed) - reference.linear(x, w.weight)) <= bound).all()
    subnormal = np.full((1, 150), 2.0**-24, np.float16)
    check_product(linear(subnormal.astype(np.float32), packed), subnormal, w)
    check_product(linear(subnormal, packed), subnormal, w)


@pytest.mark.parametrize("name", SMALL_PRODUCTS)
def test_huge_x(isa, rng, name):
    """Only sums that leave float32, or the sum of a group of x where W has minima, are not finite."""
    for size in (2.0**100, 2.0**115, 2.0**120, 2.0**126):
        packed, x = packed_as(name, gauss(rng, 200, 40)), steady(np.clip(normal(rng, 9, 200), -3, 3)) * np.float32(size)
        with np.errstate(over="ignore", invalid="ignore"):
            y = linear(x, packed)
        w = parts(packed)
        largest = np.abs(reference.f64(x)).sum(axis=1, keepdims=True) * max(1, np.abs(w.weight).max()) * 2
        fits = np.broadcast_to(largest < 2.0**128, y.shape)
        assert fits.all() == (size < 2.0**120) and np.isfinite(y[fits]).all()
        if fits.all():
            check_product(y, x, w)
    assert not np.isfinite(y).all()
    big = np.full((1, 100), 60000, np.float16)
    assert (linear(big, packed_as(name, np.full((100, 3), 100, np.float32))) == np.inf).all()


# ---- integers: the same on every ISA, and those of NumPy ------------------------------------------------


def each_isa() -> Iterator[str]:
    before = fc.isa()
    try:
        for name in fc.available_isas():
            fc.use_isa(name)
            yield name
    finally:
        fc.use_isa(before)


def chain(q: Array, ints: Array, scale: Array, minimum: Array, chunk: int) -> Array:
    """(rows, n) float32: chunk after chunk as the kernels add them, x's scale 1 and W's powers of 2, so that nothing is
    rounded but a sum of integers and the sum so far. scale, minimum (groups, n)."""
    (rows, k), n, group = q.shape, ints.shape[1], len(ints) // len(scale)
    y = np.zeros((rows, n), np.float32)
    for at in range(0, k, chunk):
        if at % group == 0:
            sums = q[:, at:at + group].astype(np.int64).reshape(rows, -1, chunk).sum(axis=2)
            whole = np.zeros(rows, np.float32)
            for part in sums.T:
                whole += part.astype(np.float32)
            y = (y + whole[:, None].astype(np.float64) * minimum[at // group]).astype(np.float32)
        exact = q[:, at:at + chunk].astype(np.int64) @ ints[at:at + chunk].astype(np.int64)
        assert np.abs(exact).max(initial=0) < 2**31
        y = (y + exact.astype(np.float32).astype(np.float64) * scale[at // group]).astype(np.float32)
    return y


def check_integers(dtype: str, group: int, activations: str, q: Array, u: Array, scale: Any = 1.0,
                   minimum: Any = 0.0) -> None:
    """x = q, whose largest magnitude is that of its steps in each chunk, against u."""
    groups, n = len(u) // group, u.shape[1]
    least = has_minimum(dtype, group)
    scales = np.broadcast_to(np.float64(scale), (groups, n))
    minima = np.broadcast_to(np.float64(minimum), (groups, n)) if least else np.zeros((groups, n))
    packed = from_parts(dtype, group, u, scales, minima if least else None, activations)
    ints = u.astype(np.int64) - (0 if least else 128 if dtype == "int8" else 8)
    expected = chain(q, ints, scales, minima, chunk_of(dtype, group, activations))
    for name in each_isa():
        for rows in (len(q), 2, 1):
            y = linear(q[:rows].astype(np.float32), packed)
            np.testing.assert_array_equal(y, expected[:rows], err_msg=f"{name}, {rows} rows")
            assert (y + np.float32(0)).tobytes() == (expected[:rows] + np.float32(0)).tobytes()


def whole(rng: np.random.Generator, m: int, k: int, steps: int) -> Array:
    """Rows of whole numbers up to `steps`, and that in each 32: x's scale is 1."""
    q = rng.integers(-steps, steps + 1, (m, k // 32, 32))
    np.put_along_axis(q, rng.integers(0, 32, (m, k // 32, 1)), steps, 2)
    return q.reshape(m, k)


@pytest.mark.parametrize("name", SMALL_PRODUCTS)
def test_the_same_integers_on_every_isa(rng, name):
    dtype, _, group = PRODUCTS[name]
    for m, groups, n in ((1, 1, 1), (7, 2, 17), (13, 4, 70), (6, 10 if group < 100 else 4, 64)):
        q = whole(rng, m, group * groups, STEPS[activations_of(name)])
        u = rng.integers(0, 256 if dtype == "int8" else 16, (group * groups, n))
        scale, minimum = 2.0 ** rng.integers(-1, 2, (groups, n)), rng.choice([-1.0, 1.0, 0.0], (groups, n))
        check_integers(dtype, group, activations_of(name), q, u, scale, minimum)


PATTERNS: dict[str, Callable[[Array], Array]] = {  # of 0, 1, 2, ...: where x or u has its other value
    "all": lambda i: i < 0, "every second": lambda i: i % 2 == 1, "pairs": lambda i: i // 2 % 2 == 1,
    "fours": lambda i: i // 4 % 2 == 1, "eights": lambda i: i // 8 % 2 == 1, "halves": lambda i: i >= len(i) // 2,
    "one": lambda i: i == 5, "every third": lambda i: i % 3 == 0,
}


@pytest.mark.parametrize("activations", STEPS)
@pytest.mark.parametrize(("dtype", "group"), [
    ("int8", 32), ("int8", 64), ("int8", 128), ("int8", 96), ("int8", 4096), ("int8", 4128), ("int8", 65536),
    ("int4", 32), ("int4", 64), ("int4", 128), ("int4", 8192)])
def test_sums_at_their_extremes(dtype, group, activations):
    """Every product as large as it can be, of one sign, or cancelling in each place where sums are narrower."""
    top, steps, i = 255 if dtype == "int8" else 15, STEPS[activations], np.arange(group)
    q = np.stack([np.where(of(i), other, first) for of in PATTERNS.values()
                  for first, other in ((steps, -steps), (-steps, steps), (steps, 0), (-steps, 1))])
    u = np.stack([np.where(of(i), other, first) for of in PATTERNS.values()
                  for first, other in ((top, 0), (0, top), (top, 1))], axis=1)
    q[:, ::32] = np.where(np.abs(q[:, ::32]) == steps, q[:, ::32], steps)
    check_integers(dtype, group, activations, q, u, 1.0, -8.0)


# ---- groups of W that are out of the ordinary -----------------------------------------------------------


def odd_weights(rng: np.random.Generator, k: int, n: int) -> dict[str, Array]:
    w, row = gauss(rng, k, n), np.arange(k)[:, None]
    huge = w * np.float32(1e-3)
    huge[rng.integers(0, k, n), np.arange(n)] = 5e3
    return {
        "all equal": np.full((k, n), 0.3, np.float32), "all equal, negative": np.full((k, n), -7.1, np.float32),
        "zeros": np.zeros((k, n), np.float32), "zero groups": np.where(row // 32 % 2 == 0, w, 0),
        "one huge value": huge, "alternating": np.where(row % 2 == 0, w.dtype.type(2.5), w.dtype.type(-2.5)) + 0 * w,
        "positive": np.abs(w) + 10, "negative": -np.abs(w) - 10, "tiny": w * np.float32(1e-7),
        "large": w * np.float32(5e3), "ramp": np.broadcast_to(np.float32(0.01) * row.astype(np.float32), (k, n)),
    }


@pytest.mark.parametrize("name", SMALL_PRODUCTS)
def test_odd_groups_of_weights(isa, dtype, rng, name):
    for k in (PRODUCTS[name][2], 300):
        for kind, w in odd_weights(rng, k, 37).items():
            packed = packed_as(name, w)
            rows = normal(rng, 8, k, dtype=dtype)
            rows[0], rows[1], rows[2] = 3, -3, np.where(np.arange(k) % 2 == 0, 3, -3)
            rows[3] = 0
            with case(kind):
                for x in (rows, rows.astype(np.float32)):
                    check_product(linear(x, packed), x, parts(packed))


# ---- the same bits ------------------------------------------------------------------------------------


def calls(rng: np.random.Generator, name: str, k: int, n: int) -> list[Callable[[Array], Array]]:
    w, gate, bias = gauss(rng, k, n), gauss(rng, k, n), gauss(rng, 2, n)
    return [partial(linear, weight=packed_as(name, w), bias=bias[0]),
            partial(gated_linear, weight=packed_as(name, gate, w), bias=bias)]


@pytest.mark.parametrize("name", SMALL_PRODUCTS)
def test_a_row_alone_is_the_row_in_any_batch(isa, dtype, rng, name):
    for k, n in ((1, 5), (150, 37), (2 * PRODUCTS[name][2] + 3, 70)):
        x = normal(rng, 385, k, dtype=dtype)
        for call in calls(rng, name, k, n):
            every = call(x)
            assert np.concatenate([call(x[i:i + 1]) for i in range(len(x))]).tobytes() == every.tobytes()
            for m in ROWS:
                assert call(x[:m]).tobytes() == every[:m].tobytes(), (k, n, m)
                assert call(x[385 - m:]).tobytes() == every[385 - m:].tobytes(), (k, n, m)


@pytest.mark.parametrize("k", [4097, 9000])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_row_alone_beyond_the_blocks(isa, rng, name, k):
    x = normal(rng, 31, k)
    for call in calls(rng, name, k, 33):
        every = call(x)
        for row in (0, 5, 13, 30):
            assert call(x[row:row + 1]).tobytes() == every[row:row + 1].tobytes(), row
            assert call(x[max(row - 4, 0):row + 1])[-1].tobytes() == every[row].tobytes(), row
        for m in (7, 8, 12, 14, 19):
            assert call(x[:m]).tobytes() == every[:m].tobytes(), m


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1000, 1000), (4, 300, 3000), (25, 1000, 300), (390, 300, 200)])
@pytest.mark.parametrize("name", PRODUCTS)
def test_any_thread_count_gives_the_same_bits(isa, rng, each_thread_count, name, m, k, n):
    x, both = normal(rng, m, k), calls(rng, name, k, n)
    seen = [[call(x).tobytes() for call in both] for _ in each_thread_count()]
    assert all(other == seen[0] for other in seen[1:])


def views(x: Array) -> Iterator[Array]:
    """Views of x (12, k) whose last axis is x's."""
    k = x.shape[-1]
    wide = np.full((12, k + 5), np.nan, x.dtype)
    wide[:, 3:k + 3] = x
    unaligned = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    unaligned[...] = x
    yield from (x[0], x[:0], x[None], x[::-1], x[::3], wide[:, 3:k + 3], unaligned, np.broadcast_to(x[:1], x.shape))
    cube = x.reshape(3, 4, k)
    yield from (cube, cube.transpose(1, 0, 2), cube[::-1, 1::2], x.reshape(3, 2, 2, k)[:, ::-1], x[:, None])


@pytest.mark.parametrize("name", SMALL_PRODUCTS)
def test_x_of_any_shape_and_stride(isa, dtype, rng, name):
    for k in (1, 33, 150):
        x = normal(rng, 12, k, dtype=dtype)
        for call, view in pairs(calls(rng, name, k, 21), views(x)):
            before = view.tobytes()
            y = call(view)
            assert y.shape == (*view.shape[:-1], 21) and view.tobytes() == before
            assert y.tobytes() == b"".join(call(row.copy()).tobytes() for row in view.reshape(-1, k))
            out = np.zeros((*view.shape[:-1], 26), dtype)[..., 2:23]
            assert call(view, out=out) is out and out.tobytes() == y.tobytes()


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("name", SMALL_PRODUCTS)
def test_arrays_between_forbidden_pages(isa, rng, name, at_end):
    for n in range(1, 36):
        for i, k in enumerate((1, n, 36 - n, 2 * PRODUCTS[name][2] + 3 - n)):
            x = normal(rng, (1, 3, 7)[(n // 3 + i) % 3], k, dtype=list(DTYPES.values())[(n + i) % 3])
            bias, residual = gauss(rng, 2, n), normal(rng, len(x), n, dtype=x.dtype)
            gated = (n + i) // 3 % 2 == 1
            packed = packed_as(name, *(gauss(rng, k, n) for _ in range(1 + gated)))

            def call(x, data, bias, residual, out, packed=packed):
                held = PackedWeight(data, packed.shape, packed.dtype, packed.gated, packed.group_size,
                                    packed.activations)
                return gated_linear(x, held, bias, out=out) if packed.gated else linear(
                    x, held, bias, residual=residual, out=out)

            arrays = (x, packed.data, bias if gated else bias[0], residual)
            plain = call(*arrays, None)
            out = guarded(plain.shape, plain.dtype, at_end=at_end)
            call(*(guarded_copy(a, at_end=at_end) for a in arrays), out)
            assert out.tobytes() == plain.tobytes(), (n, k, gated)
