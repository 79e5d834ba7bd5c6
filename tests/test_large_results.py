"""Results larger than half of the last cache go past it: small ones' bits, wherever rows begin, nothing beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import forge_c as fc
from forge_c import functional

Array = np.ndarray[Any, np.dtype[Any]]
LARGE, REPEATED, UNTOUCHED = 64 << 10, 97, 0x5A
TABLE = fc.rope_table(32, REPEATED)


@pytest.fixture(autouse=True)
def small_caches() -> Iterator[None]:
    """For a last cache of which LARGE is half; so small that rows are asked for early, too."""
    functional._set_cache_bytes("last", 2 * LARGE)
    functional._set_cache_bytes("l2", LARGE)
    yield
    functional._set_cache_bytes("last", 0)
    functional._set_cache_bytes("l2", 0)


def weight(x: Array) -> Array:
    return np.linspace(0.5, 2.0, x.shape[-1], dtype=np.float32)


def turned(x: Array, out: Array | None) -> Array:
    """Heads of 32; positions begin again where the rows do."""
    positions = np.arange(len(x)) % REPEATED
    heads = (1, len(x), x.shape[1] // 32, 32)
    to = None if out is None else out.reshape(heads)
    assert to is None or np.shares_memory(to, out)
    return fc.rope(x.reshape(heads), TABLE, positions=positions, out=to).reshape(x.shape)


def convolved(x: Array, out: Array | None) -> Array:
    """Of width 2; before the first row stands the last of those that are repeated."""
    taps, before = np.stack([weight(x), 1 - weight(x)], axis=1), x[None, REPEATED - 1 : REPEATED].astype(np.float32)
    return fc.causal_conv1d(x[None], taps, state=before, out=None if out is None else (out[None], None))[0][0]


OPS: dict[str, Callable[[Array, Any], Any]] = {
    "rms_norm": lambda x, out: fc.rms_norm(x, weight(x), out=out),
    "rms_norm residual": lambda x, out: fc.rms_norm(x, weight(x), residual=x[:, ::-1].copy(), out=out),
    "layer_norm": lambda x, out: fc.layer_norm(x, weight(x), weight(x), out=out),
    "layer_norm residual": lambda x, out: fc.layer_norm(x, residual=x[:, ::-1].copy(), out=out),
    "softmax": lambda x, out: fc.softmax(x, out=out),
    "silu": lambda x, out: fc.silu(x, out=out),
    "geglu": lambda x, out: fc.geglu(x, x[:, ::-1].copy(), out=out),
    "rope": turned,
    "causal_conv1d": convolved,
}


def place(rows: int, n: int, dtype: np.dtype[Any], offset: int, gap: int) -> tuple[Array, Array]:
    """All the memory, and a matrix in it: `offset` elements after a cache line, its rows `gap` elements apart."""
    size = rows * (n + gap) * dtype.itemsize
    memory = np.full(size + 256, UNTOUCHED, np.uint8)
    start = -memory.ctypes.data % 64 + 64 + offset * dtype.itemsize
    return memory, memory[start : start + size].view(dtype).reshape(rows, n + gap)[:, :n]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("n", "offset", "gap"), [(4096, 0, 0), (1024, 4, 0), (352, 1, 0), (96, 3, 5), (7, 2, 0)])
def test_large_results_are_small_ones(isa, dtype, rng, op, n, offset, gap):
    if op == "rope" and (n % 32 or gap):
        n, gap = 32, 0
    rows = LARGE // (n * dtype.itemsize) + REPEATED
    some = rng.standard_normal((REPEATED, n), np.float32).astype(dtype)
    x = np.tile(some, (rows // REPEATED + 1, 1))[:rows]
    count = 2 if op.endswith("residual") else 1
    places = [place(rows, n, dtype, offset + i, gap) for i in range(count)]
    OPS[op](x, tuple(matrix for _, matrix in places) if count > 1 else places[0][1])
    want = OPS[op](some, None)
    for (memory, matrix), small in zip(places, want if count > 1 else (want,), strict=True):
        repeated = np.tile(small, (rows // REPEATED + 1, 1))[:rows]
        assert matrix.tobytes() == repeated.tobytes()
        matrix.view(f"u{dtype.itemsize}")[...] = 0
        assert np.count_nonzero(memory == UNTOUCHED) == memory.size - rows * n * dtype.itemsize


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm", "softmax", "silu", "rope"])
def test_large_results_in_place(isa, rng, op):
    rows, n = LARGE // 4096 + REPEATED, 1024
    some = rng.standard_normal((REPEATED, n), np.float32)
    x = np.tile(some, (rows // REPEATED + 1, 1))[:rows]
    want = np.tile(OPS[op](some, None), (rows // REPEATED + 1, 1))[:rows]
    OPS[op](x, x)
    assert x.tobytes() == want.tobytes()


@pytest.mark.parametrize("norm", [fc.rms_norm, fc.layer_norm])
def test_a_large_sum_in_place(isa, rng, norm):
    rows, n = LARGE // 4096 + REPEATED, 1024
    some, more = rng.standard_normal((2, REPEATED, n), np.float32)
    x, residual = (np.tile(a, (rows // REPEATED + 1, 1))[:rows] for a in (some, more))
    out = np.empty_like(x)
    norm(x, weight(x), residual=residual, out=(out, x))
    for got, small in zip((out, x), norm(some, weight(some), residual=more), strict=True):
        assert got.tobytes() == np.tile(small, (rows // REPEATED + 1, 1))[:rows].tobytes()
