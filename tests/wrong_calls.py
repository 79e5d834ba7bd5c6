"""Calls that are wrong, and what they say: what tables of them are made of, and those of state spaces."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import forge_c as fc

F32, F16, BF16, F64 = np.float32, np.float16, ml_dtypes.bfloat16, np.float64
DTYPES_HINT = "expected float32, float16 or bfloat16; pass {}.astype(np.float32)"


def a(*shape: int, dtype: Any = F32) -> NDArray[Any]:
    """Read-only, so that a call which writes to its input fails in another way than the table says."""
    array = np.ones(shape, dtype)
    array.flags.writeable = False
    return array


@dataclass(frozen=True)
class Wrong:
    """call(out) raises error(message); out is an array of out_shape, which the call must leave alone."""

    call: Callable[[Any], Any]
    error: type[Exception]
    message: str
    out_shape: tuple[int, ...] = (2, 4)


X, BTSD = a(2, 4), (1, 2, 4, 8)
HEADS, HEAD_STEPS, BC = a(1, 2, 4, 8), a(1, 2, 4), a(1, 2, 2, 3)
MODES = np.ones((8, 3), np.complex64)


def ssd(out: Any, x: Any = HEADS, dt: Any = HEAD_STEPS, B: Any = BC, **options: Any) -> Any:
    return fc.ssd_scan(x, dt, a(4), B, BC, out=(out, None), **options)


STATES = [
    Wrong(lambda o: ssd(o, x=a(2, 4, 8)), ValueError,
          "ssd_scan: x has shape (2, 4, 8), expected (batch, seq, heads, p)", BTSD),
    Wrong(lambda o: ssd(o, x=a(*BTSD, dtype=F64)), TypeError,
          "ssd_scan: x has dtype float64, " + DTYPES_HINT.format("x"), BTSD),
    Wrong(lambda o: ssd(o, dt=a(1, 2, 3)), ValueError, "ssd_scan: dt has shape (1, 2, 3), expected (1, 2, 4)", BTSD),
    Wrong(lambda o: ssd(o, B=a(1, 2, 3, 3)), ValueError,
          "ssd_scan: x has 4 heads, expected a multiple of B's 3 groups", BTSD),
    Wrong(lambda o: ssd(o, dt_limit=(2, 1)), ValueError,
          "ssd_scan: dt_limit is (2, 1), expected the smaller number first", BTSD),
    Wrong(lambda o: ssd(o, state=a(1, 4, 8, 3, dtype=F16)), TypeError,
          "ssd_scan: state has dtype float16, expected float32", BTSD),
    Wrong(lambda o: ssd(o, dt=o[..., 0]), ValueError, "ssd_scan: out overlaps dt; pass an array of its own", BTSD),
    Wrong(lambda o: fc.gated_delta(HEADS, HEADS, HEADS, rule="linear", out=o), TypeError,
          "gated_delta: out is a ndarray, expected a pair (y, state)", BTSD),
    Wrong(lambda o: fc.gated_delta(HEADS, HEADS, HEADS, HEAD_STEPS, out=(o, None)), ValueError,
          "gated_delta: beta is None, expected an array with rule='gated_delta'", BTSD),
    Wrong(lambda o: fc.gated_delta(o, HEADS, HEADS, rule="linear", out=(o, None)), ValueError,
          "gated_delta: out overlaps q; pass an array of its own", BTSD),
    Wrong(lambda o: fc.s4d_scan(a(1, 2, 8), MODES, MODES, MODES, a(7), out=(o[None], None)), ValueError,
          "s4d_scan: dt has shape (7,), expected (8,)", (2, 8)),
    Wrong(lambda o: fc.s4d_scan(a(1, 2, 8), MODES.real, MODES, MODES, a(8), out=(o[None], None)), TypeError,
          "s4d_scan: A has dtype float32, expected complex64; pass A.astype(np.complex64)", (2, 8)),
]


X3, STEPS, A43, B23 = a(1, 2, 4), (1, 2, 4), a(4, 3), a(1, 2, 3)


def lru(out: Any, x: Any = X3, i: Any = X3, r: Any = X3, param: Any = X[0], **options: Any) -> Any:
    return fc.rg_lru(x, i, r, param, out=out if isinstance(out, tuple | list) else (out, None), **options)


def scan(out: Any, u: Any = X3, delta: Any = X3, A: Any = A43, B: Any = B23, C: Any = B23, **options: Any) -> Any:
    return fc.selective_scan(u, delta, A, B, C, out=out if isinstance(out, tuple | list) else (out, None), **options)


SCANS = [
    Wrong(lambda o: fc.causal_conv1d(X, a(4, 3), out=(o, None)), ValueError,
          "causal_conv1d: x has shape (2, 4), expected (batch, seq, channels)"),
    Wrong(lambda o: fc.causal_conv1d(a(*STEPS, dtype=F64), a(4, 3), out=(o, None)), TypeError,
          "causal_conv1d: x has dtype float64, " + DTYPES_HINT.format("x"), STEPS),
    Wrong(lambda o: fc.causal_conv1d(X3.swapaxes(1, 2), a(2, 3), out=(o, None)), ValueError,
          "causal_conv1d: x has stride 16 bytes on its last axis, expected 4 (contiguous); "
          "pass np.ascontiguousarray(x)", STEPS),
    Wrong(lambda o: fc.causal_conv1d(X3, a(3, 4), out=(o, None)), ValueError,
          "causal_conv1d: weight has shape (3, 4), expected (4, width)", STEPS),
    Wrong(lambda o: fc.causal_conv1d(X3, a(4, 1, 3), out=(o, None)), ValueError,
          "causal_conv1d: weight has shape (4, 1, 3), expected (4, width)", STEPS),
    Wrong(lambda o: fc.causal_conv1d(X3, a(4, 0), out=(o, None)), ValueError,
          "causal_conv1d: weight has shape (4, 0), expected (4, width) with a width of 1 or more", STEPS),
    Wrong(lambda o: fc.causal_conv1d(X3, a(4, 3, dtype=F64), out=(o, None)), TypeError,
          "causal_conv1d: weight has dtype float64, " + DTYPES_HINT.format("weight"), STEPS),
    Wrong(lambda o: fc.causal_conv1d(X3, a(4, 3), a(3), out=(o, None)), ValueError,
          "causal_conv1d: bias has shape (3,), expected (4,)", STEPS),
    Wrong(lambda o: fc.causal_conv1d(X3, a(4, 3), activation="gelu", out=(o, None)), ValueError,
          "causal_conv1d: activation is 'gelu', expected None or 'silu'", STEPS),
    Wrong(lambda o: fc.causal_conv1d(X3, a(4, 3), state=a(1, 3, 4), out=(o, None)), ValueError,
          "causal_conv1d: state has shape (1, 3, 4), expected (1, 2, 4)", STEPS),
    Wrong(lambda o: fc.causal_conv1d(X3, a(4, 3), state=a(1, 2, 4, dtype=F16), out=(o, None)), TypeError,
          "causal_conv1d: state has dtype float16, expected float32", STEPS),
    Wrong(lambda o: fc.causal_conv1d(X3, a(4, 3), out=o), TypeError,
          "causal_conv1d: out is a ndarray, expected a pair (y, state)", STEPS),
    Wrong(lambda o: fc.causal_conv1d(X3, a(4, 4), out=(None, o)), ValueError,
          "causal_conv1d: out[1] has shape (1, 2, 4), expected (1, 3, 4)", STEPS),
    Wrong(lambda o: fc.causal_conv1d(o, a(4, 4), out=(o, None)), ValueError,
          "causal_conv1d: out overlaps x; pass an array of its own", STEPS),
    Wrong(lambda o: fc.causal_conv1d(X3, a(4, 3), out=(o, o)), ValueError,
          "causal_conv1d: out[1] overlaps out[0]; pass an array of its own", STEPS),
    Wrong(lambda o: fc.causal_conv1d(X3, a(4, 3), state=o.reshape(-1)[:8].reshape(1, 2, 4),
                                     out=(None, o.reshape(-1)[4:].reshape(1, 2, 4))), ValueError,
          "causal_conv1d: out[1] overlaps state; pass an array of its own, or state itself", (1, 3, 4)),
    Wrong(lambda o: scan(o, X), ValueError, "selective_scan: u has shape (2, 4), expected (batch, seq, channels)"),
    Wrong(lambda o: scan(o, a(*STEPS, dtype=F64)), TypeError,
          "selective_scan: u has dtype float64, " + DTYPES_HINT.format("u"), STEPS),
    Wrong(lambda o: scan(o, delta=a(1, 2, 1)), ValueError,
          "selective_scan: delta has shape (1, 2, 1), expected (1, 2, 4)", STEPS),
    Wrong(lambda o: scan(o, delta=a(*STEPS, dtype=BF16)), TypeError,
          "selective_scan: delta has dtype bfloat16, expected float32", STEPS),
    Wrong(lambda o: scan(o, A=a(3, 4)), ValueError, "selective_scan: A has shape (3, 4), expected (4, n)", STEPS),
    Wrong(lambda o: scan(o, A=a(4, 3, dtype=F64)), TypeError,
          "selective_scan: A has dtype float64, " + DTYPES_HINT.format("A"), STEPS),
    Wrong(lambda o: scan(o, B=a(1, 2, 4)), ValueError,
          "selective_scan: B has shape (1, 2, 4), expected (1, 2, 3)", STEPS),
    Wrong(lambda o: scan(o, C=a(1, 3, 2).swapaxes(1, 2)), ValueError,
          "selective_scan: C has stride 8 bytes on its last axis, expected 4 (contiguous); "
          "pass np.ascontiguousarray(C)", STEPS),
    Wrong(lambda o: scan(o, D=a(3)), ValueError, "selective_scan: D has shape (3,), expected (4,)", STEPS),
    Wrong(lambda o: scan(o, z=a(2, 4)), ValueError, "selective_scan: z has shape (2, 4), expected (1, 2, 4)", STEPS),
    Wrong(lambda o: scan(o, delta_bias=a(1, 4)), ValueError,
          "selective_scan: delta_bias has shape (1, 4), expected (4,)", STEPS),
    Wrong(lambda o: scan(o, delta_softplus=a(2)), TypeError,
          "selective_scan: delta_softplus is array([1., 1.], dtype=float32), expected True or False", STEPS),
    Wrong(lambda o: scan(o, state=a(1, 3, 4)), ValueError,
          "selective_scan: state has shape (1, 3, 4), expected (1, 4, 3)", STEPS),
    Wrong(lambda o: scan(o, state=a(1, 4, 3, dtype=F64)), TypeError,
          "selective_scan: state has dtype float64, expected float32", STEPS),
    Wrong(lambda o: scan([o, None]), TypeError,
          "selective_scan: out is a list, expected a pair (y, state)", STEPS),
    Wrong(lambda o: scan(o, a(1, 3, 4), a(1, 3, 4), B=a(1, 3, 3), C=a(1, 3, 3)), ValueError,
          "selective_scan: out has shape (1, 2, 4), expected (1, 3, 4)", STEPS),
    Wrong(lambda o: scan(o[:, :2], o[:, 1:]), ValueError,
          "selective_scan: out overlaps u; pass an array of its own, or u itself", (1, 3, 4)),
    Wrong(lambda o: scan(o, A=a(4, 4), B=o, C=a(*STEPS)), ValueError,
          "selective_scan: out overlaps B; pass an array of its own", STEPS),
    Wrong(lambda o: scan((None, o), state=a(1, 4, 3)), ValueError,
          "selective_scan: out[1] has shape (1, 4, 4), expected (1, 4, 3)", (1, 4, 4)),
    Wrong(lambda o: scan((None, o), A=o[0]), ValueError,
          "selective_scan: out[1] overlaps A; pass an array of its own", (1, 4, 3)),
    Wrong(lambda o: lru(o, X), ValueError, "rg_lru: x has shape (2, 4), expected (batch, seq, channels)"),
    Wrong(lambda o: lru(o, a(*STEPS, dtype=F64)), TypeError, "rg_lru: x has dtype float64, " + DTYPES_HINT.format("x"),
          STEPS),
    Wrong(lambda o: lru(o, i=a(1, 2, 3)), ValueError, "rg_lru: input_gate has shape (1, 2, 3), expected (1, 2, 4)",
          STEPS),
    Wrong(lambda o: lru(o, i=None), TypeError, "rg_lru: input_gate is a NoneType, expected a NumPy array", STEPS),
    Wrong(lambda o: lru(o, r=a(*STEPS, dtype=BF16)), TypeError,
          "rg_lru: recurrence_gate has dtype bfloat16, expected float32", STEPS),
    Wrong(lambda o: lru(o, r=a(1, 4, 2).swapaxes(1, 2)), ValueError,
          "rg_lru: recurrence_gate has stride 8 bytes on its last axis, expected 4 (contiguous); "
          "pass np.ascontiguousarray(recurrence_gate)", STEPS),
    Wrong(lambda o: lru(o, param=a(1, 4)), ValueError, "rg_lru: param has shape (1, 4), expected (4,)", STEPS),
    Wrong(lambda o: lru(o, param=None), TypeError, "rg_lru: param is a NoneType, expected a NumPy array", STEPS),
    Wrong(lambda o: lru(o, reset=a(1, 2)), TypeError, "rg_lru: reset has dtype float32, expected bool", STEPS),
    Wrong(lambda o: lru(o, reset=True), TypeError, "rg_lru: reset is a bool, expected a NumPy array", STEPS),
    Wrong(lambda o: lru(o, reset=a(2, dtype=bool)), ValueError, "rg_lru: reset has shape (2,), expected (1, 2)", STEPS),
    Wrong(lambda o: lru(o, state=a(1, 3)), ValueError, "rg_lru: state has shape (1, 3), expected (1, 4)", STEPS),
    Wrong(lambda o: lru(o, state=a(1, 4, dtype=F16)), TypeError, "rg_lru: state has dtype float16, expected float32",
          STEPS),
    Wrong(lambda o: lru([o, None]), TypeError, "rg_lru: out is a list, expected a pair (y, state)", STEPS),
    Wrong(lambda o: lru((None, o)), ValueError, "rg_lru: out[1] has shape (2, 4), expected (1, 4)"),
    Wrong(lambda o: lru((None, o), param=o[0]), ValueError,
          "rg_lru: out[1] overlaps param; pass an array of its own", (1, 4)),
    Wrong(lambda o: lru(o[:, :2], o[:, 1:]), ValueError,
          "rg_lru: out overlaps x; pass an array of its own, or x itself", (1, 3, 4)),
    Wrong(lambda o: lru(o, reset=o.view(bool)[:, :, 0]), ValueError,
          "rg_lru: out overlaps reset; pass an array of its own", STEPS),
]
