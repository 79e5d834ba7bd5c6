"""Rows by index: gathered inputs, scattered outputs, and products that are added to rows named any number of times."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from conftest import DTYPES, check_close
from numpy.typing import NDArray

import forge_c as fc
from forge_c.functional import _linear_rows

Array = NDArray[Any]
WEIGHTS: dict[str, Callable[[Array], Any]] = {
    "rows": np.ascontiguousarray, "columns": np.asfortranarray,
    **{name: lambda w, name=name: fc.pack(w, name) for name in ("float32", "bfloat16", "int8", "int4")},
}
SIZES = ((1, 33, 17), (3, 70, 40), (5, 64, 1030), (30, 100, 70), (70, 600, 33), (400, 40, 17))


def drawn(rng: np.random.Generator, m: int, k: int, n: int, dtype: Any = np.float32) -> tuple[Array, Array, Array]:
    x, w, bias = (rng.standard_normal(shape, np.float32) for shape in ((m + 7, k), (k, n), (n,)))
    return x.astype(dtype), w, bias


@pytest.mark.parametrize("kind", WEIGHTS)
def test_gathered_rows_are_the_rows(isa, dtype, rng, kind):
    for m, k, n in SIZES:
        x, w, bias = drawn(rng, m, k, n, dtype)
        index, weight = rng.integers(0, len(x), m), WEIGHTS[kind](w)
        assert _linear_rows(x, weight, bias, x_rows=index).tobytes() == fc.linear(x[index], weight, bias).tobytes()
        wide = np.repeat(x, 2, axis=0)[::-2]  # rows that are not neighbours, backwards
        assert _linear_rows(wide, weight, x_rows=index).tobytes() == fc.linear(wide[index], weight).tobytes()


@pytest.mark.parametrize("packed", ["float32", "bfloat16", "int8", "int4"])
def test_gathered_rows_of_a_gated_pair(isa, rng, packed):
    for m, k, n in SIZES:
        x, w, _ = drawn(rng, m, k, n)
        index, pair, bias = rng.integers(0, len(x), m), fc.pack_gated(w, w[::-1], packed), rng.standard_normal((2, n))
        got = _linear_rows(x, pair, bias.astype(np.float32), x_rows=index, activation="silu")
        assert got.tobytes() == fc.gated_linear(x[index], pair, bias.astype(np.float32)).tobytes()


def added(out: Array, at: Array, y: Array) -> Array:
    """out[at[i]] += y[i], i after i, rounded each time."""
    want = out.copy()
    for row, value in zip(at, y, strict=True):
        want[row] = (want[row].astype(np.float32) + value).astype(want.dtype)
    return want


@pytest.mark.parametrize("kind", WEIGHTS)
def test_scattered_rows_are_added_in_their_order(isa, dtype, rng, kind):
    """Rows that are named once, several times and never; for every number of threads the same bits."""
    before = fc.get_num_threads()
    for m, k, n in SIZES:
        x, w, bias = drawn(rng, m, k, n, dtype)
        weight, scale = WEIGHTS[kind](w), rng.standard_normal(m).astype(np.float32)
        taken, to = rng.integers(0, len(x), m), rng.integers(0, m // 2 + 3, m)
        old = rng.standard_normal((m // 2 + 5, n), np.float32).astype(dtype)
        y = fc.linear(x[taken].astype(np.float32), weight, bias)
        for factor in (None, scale):
            want = added(old, to, y if factor is None else y * factor[:, None])
            for threads in (1, 3):
                fc.set_num_threads(threads)
                out = old.copy()
                assert _linear_rows(x, weight, bias, x_rows=taken, out_rows=to, out_scale=factor, out=out) is out
                assert out.tobytes() == want.tobytes(), (m, k, n, threads)
    fc.set_num_threads(before)


def test_scattered_products_are_those_of_the_reference(isa, rng):
    """Two experts, each a part of the tokens: what a mixture computes."""
    x, w, bias = drawn(rng, 60, 96, 48)
    old, scale = rng.standard_normal((len(x), 48), np.float32), rng.random(len(x)).astype(np.float32) + np.float32(0.5)
    out = old.copy()
    for part in np.array_split(rng.permutation(len(x)), 2):
        _linear_rows(x, w, bias, x_rows=part, out_rows=part, out_scale=scale[part], out=out)
    # A scaled sum is the sum of scaled terms: the reference's x and bias a row carry the scale.
    wide = reference.f64(scale)[:, None]
    exact, size = (wide * reference.linear(*args) + r for args, r in (
        ((x, w, bias), reference.f64(old)), ((np.abs(x), np.abs(w), np.abs(bias)), np.abs(reference.f64(old)))))
    check_close("linear", out, exact, magnitude=size, n=x.shape[1] + 1)


@pytest.mark.parametrize(("change", "error", "named"), [
    ({"x_rows": [0, 9]}, IndexError, "x_rows holds 9, expected 0 to 8"),
    ({"x_rows": [-1, 0]}, IndexError, "x_rows holds -1"),
    ({"x_rows": [[0, 1]]}, TypeError, "x_rows has"), ({"x_rows": [0.0, 1.0]}, TypeError, "x_rows has dtype float64"),
    ({"out_rows": [0, 4]}, IndexError, "out_rows holds 4, expected 0 to 3"),
    ({"out_rows": [0]}, ValueError, "expected 2 rows"),
    ({"out_scale": np.ones(3, np.float32)}, ValueError, r"out_scale has shape \(3,\)"),
    ({"out": None}, TypeError, "out_rows is given"), ({"activation": "silu"}, TypeError, "weight is"),
    ({"out_rows": None, "out": np.ones((2, 5), np.float32)}, ValueError, "out_rows is None"),
])
def test_refused_calls_write_nothing(rng, change, error, named):
    x, w, _ = drawn(rng, 2, 3, 5)
    out = np.full((4, 5), 7, np.float32)
    call = {"x_rows": [0, 1], "out_rows": [3, 3], "out_scale": np.ones(2, np.float32), "out": out}
    with pytest.raises(error, match=named):
        _linear_rows(x, w, **(call | change))
    assert (out == 7).all()


# ---- the other ops over rows, which take the same fc_rows: through the C API -----------------------------


class Rows(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("ndim", ctypes.c_int),
                ("shape", ctypes.c_ssize_t * 32), ("stride", ctypes.c_ssize_t * 32 * 4),
                ("index", ctypes.c_void_p * 4))


def one_axis(count: int, strides: list[int], index: list[Array | None]) -> Rows:
    rows = Rows(size=ctypes.sizeof(Rows), ndim=1)
    rows.shape[0] = count
    for i, (stride, places) in enumerate(zip(strides, index, strict=True)):
        rows.stride[i][0], rows.index[i] = stride, None if places is None else places.ctypes.data
    return rows


@pytest.mark.parametrize("op", ["softmax", "silu"])
def test_ops_over_rows_gather_and_scatter(isa, dtype, rng, op):
    library = ctypes.CDLL(str(Path(fc.get_library_dir(), "libforge_c.so")))
    x, m, n = rng.standard_normal((50, 70), np.float32).astype(dtype), 30, 70
    taken, to = rng.integers(0, 50, m), rng.permutation(40)[:m]
    out = np.full((40, n), 7, dtype)
    rows, size = one_axis(m, [n * dtype.itemsize] * 2, [to, taken]), ctypes.c_ssize_t(n)
    pointers = out.ctypes.data_as(ctypes.c_void_p), x.ctypes.data_as(ctypes.c_void_p), ctypes.byref(rows), size
    kind = list(DTYPES.values()).index(dtype)
    status = library.fc_softmax(kind, *pointers) if op == "softmax" else library.fc_activate(1, kind, *pointers)
    assert status == 0
    want = np.full((40, n), 7, dtype)
    want[to] = getattr(fc, op)(x[taken])
    assert out.tobytes() == want.tobytes()


def test_a_norm_gathers_and_scatters(isa, rng):
    library = ctypes.CDLL(str(Path(fc.get_library_dir(), "libforge_c.so")))
    x, weight, m, n = rng.standard_normal((50, 70), np.float32), rng.standard_normal(70, np.float32), 30, 70
    taken, to = rng.integers(0, 50, m), rng.permutation(40)[:m]
    out = np.full((40, n), 7, np.float32)
    rows = one_axis(m, [n * 4, 0, n * 4, 0], [to, None, taken, None])
    assert library.fc_rms_norm(0, out.ctypes.data_as(ctypes.c_void_p), None, x.ctypes.data_as(ctypes.c_void_p), None,
                               weight.ctypes.data_as(ctypes.c_void_p), ctypes.byref(rows), ctypes.c_ssize_t(n),
                               ctypes.c_float(1e-5), ctypes.c_float(0)) == 0
    want = np.full((40, n), 7, np.float32)
    want[to] = fc.rms_norm(x[taken], weight, eps=1e-5)
    assert out.tobytes() == want.tobytes()
