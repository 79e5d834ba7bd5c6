"""Wrong calls and the exact words they are answered with; what a rejected call was given stays as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from wrong_calls import BF16, BTSD, DTYPES_HINT, F16, F32, F64, SCANS, STATES, Wrong, a

import forge_c as fc
from forge_c import nn
from forge_c.formats.layout import ROWS_OF

HELD = ", ".join(ROWS_OF)  # formats of a PackedWeight


def ints(*values: int) -> NDArray[np.int64]:
    array = np.array(values)
    array.flags.writeable = False
    return array


class Unreadable:
    """An array that will not be one, as a torch tensor with a gradient."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise RuntimeError("call detach() first")


def interleaved() -> tuple[NDArray[Any], NDArray[Any]]:
    """Two views of one piece of memory of which it takes minutes to say whether they share a byte."""
    raw, shape = np.zeros(300_000_000, np.uint8), (600, 600, 600, 1)  # pages that nobody touches take no memory

    def view(start: int, *strides: int) -> NDArray[Any]:
        return np.ndarray(shape, F16, raw, start, (*strides, 2))

    return view(0, 73348, 122238, 171138), view(1000, 24446, 24448, 171142)


X, Q, KV = a(2, 4), a(1, 2, 4, 8), a(1, 5, 2, 8)
TABLE, W, PACKED = fc.rope_table(4, 8), a(4, 3), fc.pack(a(4, 3))
PAIR = fc.pack_gated(a(4, 3), a(4, 3))


def attend(out: Any, q: Any = Q, k: Any = KV, v: Any = KV, **options: Any) -> Any:
    return fc.attention(q, k, v, out=out, **options)


def cache(**options: Any) -> fc.KVCache:
    filled = fc.KVCache(1, 8, 2, 8, **options)
    filled.append(KV, KV)
    return filled


NORMS = [
    Wrong(lambda o: fc.rms_norm(a(2, 4, dtype=F64), out=o), TypeError,
          "rms_norm: x has dtype float64, " + DTYPES_HINT.format("x")),
    Wrong(lambda o: fc.rms_norm([1.0, 2.0], out=o), TypeError, "rms_norm: x is a list, expected a NumPy array"),
    Wrong(lambda o: fc.rms_norm(None, out=o), TypeError, "rms_norm: x is a NoneType, expected a NumPy array"),
    Wrong(lambda o: fc.rms_norm(a(), out=o), ValueError, "rms_norm: x has shape (), expected at least one axis"),
    Wrong(lambda o: fc.rms_norm(X.T, out=o), ValueError,
          "rms_norm: x has stride 16 bytes on its last axis, expected 4 (contiguous); pass np.ascontiguousarray(x)"),
    Wrong(lambda o: fc.rms_norm(X, a(3), out=o), ValueError, "rms_norm: weight has shape (3,), expected (4,)"),
    Wrong(lambda o: fc.rms_norm(X, a(1, 4), out=o), ValueError, "rms_norm: weight has shape (1, 4), expected (4,)"),
    Wrong(lambda o: fc.rms_norm(X, a(4, dtype=F64), out=o), TypeError,
          "rms_norm: weight has dtype float64, " + DTYPES_HINT.format("weight")),
    Wrong(lambda o: fc.rms_norm(X, eps=-1.0, out=o), ValueError, "rms_norm: eps is -1.0, expected a number >= 0"),
    Wrong(lambda o: fc.rms_norm(X, eps=float("nan"), out=o), ValueError,
          "rms_norm: eps is nan, expected a number >= 0"),
    Wrong(lambda o: fc.rms_norm(X, residual=a(2, 5), out=(o, o)), ValueError,
          "rms_norm: residual has shape (2, 5), expected (2, 4)"),
    Wrong(lambda o: fc.rms_norm(X, residual=a(2, 4, dtype=F16), out=(o, o)), TypeError,
          "rms_norm: residual has dtype float16, expected float32"),
    Wrong(lambda o: fc.rms_norm(X, residual=X, out=o), TypeError,
          "rms_norm: out is a ndarray, expected a pair (y, h) because residual is given"),
    Wrong(lambda o: fc.rms_norm(X, residual=X, out=(o, o[:1])), ValueError,
          "rms_norm: out[1] has shape (1, 4), expected (2, 4)"),
    Wrong(lambda o: fc.rms_norm(X, residual=X, out=(o, o)), ValueError,
          "rms_norm: out[1] overlaps out[0]; pass an array of its own"),
    Wrong(lambda o: fc.rms_norm(a(2, 3), out=o), ValueError, "rms_norm: out has shape (2, 4), expected (2, 3)"),
    Wrong(lambda o: fc.rms_norm(a(2, 4, dtype=BF16), out=o), TypeError,
          "rms_norm: out has dtype float32, expected bfloat16"),
    Wrong(lambda o: fc.rms_norm(X, out=o.tolist()), TypeError, "rms_norm: out is a list, expected a NumPy array"),
    Wrong(lambda o: fc.rms_norm(X, out=a(2, 4)), ValueError, "rms_norm: out is read-only"),
    Wrong(lambda o: fc.rms_norm(X, out=o.reshape(4, 2).T), ValueError,
          "rms_norm: out has stride 8 bytes on its last axis, expected 4 (contiguous); pass np.ascontiguousarray(out)"),
    Wrong(lambda o: fc.rms_norm(o.reshape(-1)[:4], out=o.reshape(-1)[2:6]), ValueError,
          "rms_norm: out overlaps x; pass an array of its own, or x itself"),
    Wrong(lambda o: fc.rms_norm(X[0], o[0], out=o[0]), ValueError,
          "rms_norm: out overlaps weight; pass an array of its own"),
    Wrong(lambda o: fc.layer_norm(a(2, 4, dtype=np.int64), out=o), TypeError,
          "layer_norm: x has dtype int64, " + DTYPES_HINT.format("x")),
    Wrong(lambda o: fc.layer_norm(X, a(4), a(5), out=o), ValueError, "layer_norm: bias has shape (5,), expected (4,)"),
    Wrong(lambda o: fc.layer_norm(X, eps=-0.5, out=o), ValueError, "layer_norm: eps is -0.5, expected a number >= 0"),
    Wrong(lambda o: fc.rms_norm(a(2, 4, dtype=F16), o[0].view(F16)[:4], out=o[0].view(F16).reshape(2, 4)), ValueError,
          "rms_norm: out overlaps weight; pass an array of its own"),
    Wrong(lambda o: fc.layer_norm(a(2, 4, dtype=BF16), None, o[0].view(BF16)[:4], out=o[0].view(BF16).reshape(2, 4)),
          ValueError, "layer_norm: out overlaps bias; pass an array of its own"),
    Wrong(lambda o: fc.rms_norm(np.ma.masked_array(X, X > 0), out=o), TypeError,
          "rms_norm: x is a MaskedArray, expected a NumPy array without a mask"),
    Wrong(lambda o: fc.rms_norm(X, np.ma.masked_array(a(4)), out=o), TypeError,
          "rms_norm: weight is a MaskedArray, expected a NumPy array without a mask"),
    Wrong(lambda o: fc.rms_norm(X, out=np.ma.masked_array(o)), TypeError,
          "rms_norm: out is a MaskedArray, expected a NumPy array without a mask"),
    Wrong(lambda o: fc.rms_norm(Unreadable(), out=o), TypeError,
          "rms_norm: x is a Unreadable that NumPy cannot view (call detach() first), expected a NumPy array"),
    Wrong(lambda o: fc.relu(*interleaved()), ValueError,
          "relu: out may overlap x; pass an array of its own, or x itself"),
    Wrong(lambda o: fc.softmax(a(), out=o), ValueError, "softmax: x has shape (), expected at least one axis"),
    Wrong(lambda o: fc.softmax(a(4), out=o), ValueError, "softmax: out has shape (2, 4), expected (4,)"),
]
ELEMENTWISE = [
    Wrong(lambda o: fc.relu("text", out=o), TypeError, "relu: x is a str, expected a NumPy array"),
    Wrong(lambda o: fc.relu(a(2, 4, dtype=bool), out=o), TypeError,
          "relu: x has dtype bool, " + DTYPES_HINT.format("x")),
    Wrong(lambda o: fc.silu(a(2, 4, dtype=">f4"), out=o), TypeError,
          "silu: x has dtype >f4, " + DTYPES_HINT.format("x")),
    Wrong(lambda o: fc.gelu(X, "fast", out=o), ValueError, "gelu: approximate is 'fast', expected 'none' or 'tanh'"),
    Wrong(lambda o: fc.swiglu(X, a(2, 5), out=o), ValueError, "swiglu: up has shape (2, 5), expected (2, 4)"),
    Wrong(lambda o: fc.swiglu(X, a(2, 4, dtype=F64), out=o), TypeError,
          "swiglu: up has dtype float64, expected float32"),
    Wrong(lambda o: fc.swiglu(a(2, 8)[:, ::2], X, out=o), ValueError,
          "swiglu: gate has stride 8 bytes on its last axis, expected 4 (contiguous); "
          "pass np.ascontiguousarray(gate)"),
    Wrong(lambda o: fc.geglu(X, X, "sigmoid", out=o), ValueError,
          "geglu: approximate is 'sigmoid', expected 'none' or 'tanh'"),
    Wrong(lambda o: fc.geglu(a(2, 4, dtype="c8"), X, out=o), TypeError,
          "geglu: gate has dtype complex64, " + DTYPES_HINT.format("gate")),
    Wrong(lambda o: fc.relu(a(2, 2), out=o[:, :2].T), ValueError,
          "relu: out has stride 16 bytes on its last axis, expected 4 (contiguous); pass np.ascontiguousarray(out)"),
]
ROPE = [
    Wrong(lambda o: fc.rope(X, TABLE, out=o), ValueError,
          "rope: x has shape (2, 4), expected (batch, seq, heads, head_dim) or (batch, seq, head_dim)"),
    Wrong(lambda o: fc.rope(a(1, 2, 4), (1, 2), out=o), TypeError, "rope: table is a tuple, expected a RopeTable"),
    Wrong(lambda o: fc.rope(a(1, 2, 2), TABLE, out=o[None, :, :2]), ValueError,
          "rope: table has dim 4, expected at most x's head_dim 2"),
    Wrong(lambda o: fc.rope(a(1, 2, 4), TABLE, start_pos=7, out=o[None]), IndexError,
          "rope: positions 7 to 8 are outside the table of 8 positions"),
    Wrong(lambda o: fc.rope(a(1, 2, 4), TABLE, start_pos=-1, out=o[None]), IndexError,
          "rope: positions -1 to 0 are outside the table of 8 positions"),
    Wrong(lambda o: fc.rope(a(1, 2, 4), TABLE, start_pos=2**63 - 1, out=o[None]), IndexError,
          "rope: positions 9223372036854775807 to 9223372036854775808 are outside the table of 8 positions"),
    Wrong(lambda o: fc.rope(a(1, 2, 4), TABLE, positions=ints(0, 8), out=o[None]), IndexError,
          "rope: position 8 is outside the table of 8 positions"),
    Wrong(lambda o: fc.rope(a(1, 2, 4), TABLE, positions=ints(0, -1), out=o[None]), IndexError,
          "rope: position -1 is outside the table of 8 positions"),
    Wrong(lambda o: fc.rope(a(1, 2, 4), TABLE, positions=np.array([0, 2**64 - 1], np.uint64), out=o[None]), IndexError,
          "rope: position 18446744073709551615 is outside the table of 8 positions"),
    Wrong(lambda o: fc.rope(a(1, 2, 4), TABLE, start_pos=0.5, out=o[None]), TypeError,
          "rope: start_pos is 0.5, expected an integer"),
    Wrong(lambda o: fc.rope(a(1, 2, 4), TABLE, positions=a(2), out=o[None]), TypeError,
          "rope: positions has dtype float32, expected integers"),
    Wrong(lambda o: fc.rope(a(1, 2, 4), TABLE, positions=ints(0, 1, 2), out=o[None]), ValueError,
          "rope: positions has shape (3,), expected (2,) or (1, 2)"),
    Wrong(lambda o: fc.rope_table(5, 8), ValueError, "rope_table: dim is 5, expected an even number"),
    Wrong(lambda o: fc.rope_table(4, 0), ValueError, "rope_table: max_seq_len is 0, expected at least 1"),
    Wrong(lambda o: fc.RopeTable(a(8, 2, dtype=F64), a(8, 2)), TypeError,
          "RopeTable: cos has dtype float64: pass cos.astype(np.float32)"),
    Wrong(lambda o: fc.RopeTable(a(8, 2), a(8, 3)), ValueError,
          "RopeTable: sin has shape (8, 3), expected (8, 2) as cos"),
]
LINEAR = [
    Wrong(lambda o: fc.linear(a(2, 5), W, out=o[:, :3]), ValueError,
          "linear: x has shape (2, 5), expected (..., 4) for a weight of shape (4, 3)"),
    Wrong(lambda o: fc.linear(a(), a(1, 3), out=o), ValueError,
          "linear: x has shape (), expected (..., 1) for a weight of shape (1, 3)"),
    Wrong(lambda o: fc.linear(X, a(4), out=o), ValueError,
          "linear: weight has shape (4,), expected (in_features, out_features)"),
    Wrong(lambda o: fc.linear(X, a(4, 3, dtype=F64), out=o), TypeError,
          "linear: weight has dtype float64, " + DTYPES_HINT.format("weight")),
    Wrong(lambda o: fc.linear(X, a(8, 6)[::2, ::2], out=o[:, :3]), ValueError,
          "linear: weight has strides (48, 8) bytes, expected 4 on one axis; pass np.ascontiguousarray(weight)"),
    Wrong(lambda o: fc.linear(X, W, a(4), out=o[:, :3]), ValueError, "linear: bias has shape (4,), expected (3,)"),
    Wrong(lambda o: fc.linear(X, PACKED, residual=a(2, 4), out=o[:, :3]), ValueError,
          "linear: residual has shape (2, 4), expected (2, 3)"),
    Wrong(lambda o: fc.linear(X, PACKED, residual=a(2, 3, dtype=F16), out=o[:, :3]), TypeError,
          "linear: residual has dtype float16, expected float32"),
    Wrong(lambda o: fc.linear(X, W, out=o), ValueError, "linear: out has shape (2, 4), expected (2, 3)"),
    Wrong(lambda o: fc.linear(o, a(4, 4), out=o), ValueError, "linear: out overlaps x; pass an array of its own"),
    Wrong(lambda o: fc.linear(a(2, 2), o[:, :2], out=o[:, :2]), ValueError,
          "linear: out overlaps weight; pass an array of its own"),
    Wrong(lambda o: fc.linear(X, PAIR, out=o[:, :3]), TypeError,
          "linear: weight is a pair from pack_gated, expected one matrix; use gated_linear"),
    Wrong(lambda o: fc.linear(X, "weight", out=o), TypeError, "linear: weight is a str, expected a NumPy array"),
    Wrong(lambda o: fc.gated_linear(X, PACKED, out=o[:, :3]), TypeError,
          "gated_linear: weight is a PackedWeight, expected a pair from pack_gated"),
    Wrong(lambda o: fc.gated_linear(X, W, out=o[:, :3]), TypeError,
          "gated_linear: weight is a ndarray, expected a pair from pack_gated"),
    Wrong(lambda o: fc.gated_linear(X, PAIR, activation="swish", out=o[:, :3]), ValueError,
          "gated_linear: activation is 'swish', expected one of relu, silu, gelu, gelu_tanh"),
    Wrong(lambda o: fc.gated_linear(a(2, 3), PAIR, out=o[:, :3]), ValueError,
          "gated_linear: x has shape (2, 3), expected (..., 4) for a weight of shape (4, 6)"),
    Wrong(lambda o: fc.gated_linear(X, PAIR, a(6), out=o[:, :3]), ValueError,
          "gated_linear: bias has shape (6,), expected (2, 3)"),
    Wrong(lambda o: fc.pack(a(4, 3, dtype=F64)), TypeError,
          "pack: weight has dtype float64, " + DTYPES_HINT.format("weight")),
    Wrong(lambda o: fc.pack(a(4)), ValueError, "pack: weight has shape (4,), expected (in_features, out_features)"),
    Wrong(lambda o: fc.pack_gated(W, a(4, 4)), ValueError, "pack_gated: up has shape (4, 4), expected (4, 3)"),
    Wrong(lambda o: fc.embedding([1, 4], X, out=o), IndexError,
          "embedding: id 4 at (1,) is outside the table of 2 rows"),
    Wrong(lambda o: fc.embedding([[0, -1]], X, out=o[None]), IndexError,
          "embedding: id -1 at (0, 1) is outside the table of 2 rows"),
    Wrong(lambda o: fc.embedding(5, X, out=o[0]), IndexError, "embedding: id 5 at () is outside the table of 2 rows"),
    Wrong(lambda o: fc.embedding(np.array([0, 2**64 - 1], np.uint64), X, out=o), IndexError,
          "embedding: id 18446744073709551615 at (1,) is outside the table of 2 rows"),
    Wrong(lambda o: fc.embedding(np.zeros((1,) * 64, int), X, out=o), ValueError,
          "embedding: ids has 64 axes, expected at most 63"),
    Wrong(lambda o: fc.embedding(np.ma.masked_array([0, 1]), X, out=o), TypeError,
          "embedding: ids is a MaskedArray, expected a NumPy array without a mask"),
    Wrong(lambda o: fc.embedding(Unreadable(), X, out=o), TypeError,
          "embedding: ids is a Unreadable that NumPy cannot view (call detach() first), expected a NumPy array "
          "or a list"),
    Wrong(lambda o: fc.linear(a(2, 4, dtype=F16), W, o[0].view(F16)[:3], out=o[0].view(F16)[:6].reshape(2, 3)),
          ValueError, "linear: out overlaps bias; pass an array of its own"),
    Wrong(lambda o: fc.gated_linear(a(1, 4, dtype=F16), PAIR, o[0].view(F16)[:6].reshape(2, 3),
                                    out=o[0].view(F16)[None, :3]),
          ValueError, "gated_linear: out overlaps bias; pass an array of its own"),
    Wrong(lambda o: fc.embedding([0.5, 1.0], X, out=o), TypeError,
          "embedding: ids has dtype float64, expected integers"),
    Wrong(lambda o: fc.embedding([0, 1], a(4), out=o), ValueError,
          "embedding: table has shape (4,), expected (num, dim)"),
    Wrong(lambda o: fc.embedding([0, 1], X, dtype=np.int8, out=o), TypeError,
          "embedding: dtype is int8, expected float32, float16 or bfloat16"),
    Wrong(lambda o: fc.embedding([0, 1], a(2, 3), out=o[:, :3]), ValueError, "embedding: out is not C-contiguous"),
]
ATTENTION = [
    Wrong(lambda o: attend(o, q=a(2, 4, 8)), ValueError,
          "attention: q has shape (2, 4, 8), expected 4 axes (batch, seq, heads, dim)", BTSD),
    Wrong(lambda o: attend(o, q=a(*BTSD, dtype=F64)), TypeError,
          "attention: q has dtype float64, " + DTYPES_HINT.format("q"), BTSD),
    Wrong(lambda o: attend(o, k=a(1, 5, 2, 7)), ValueError,
          "attention: k has shape (1, 5, 2, 7), expected (1, kv_len, kv_heads, 8)", BTSD),
    Wrong(lambda o: attend(o, k=a(2, 5, 2, 8)), ValueError,
          "attention: k has shape (2, 5, 2, 8), expected (1, kv_len, kv_heads, 8)", BTSD),
    Wrong(lambda o: attend(o, v=a(1, 4, 2, 8)), ValueError,
          "attention: v has shape (1, 4, 2, 8), expected (1, 5, 2, v_dim)", BTSD),
    Wrong(lambda o: attend(o, v=a(1, 5, 2, 8, dtype=BF16)), TypeError,
          "attention: v has dtype bfloat16, expected float32", BTSD),
    Wrong(lambda o: attend(o, k=a(1, 5, 3, 8), v=a(1, 5, 3, 8)), ValueError,
          "attention: q has 4 heads, expected a multiple of k's 3 heads", BTSD),
    Wrong(lambda o: attend(o, v=None), TypeError,
          "attention: v is None and k is a ndarray, expected arrays k and v, or a KVCache as k", BTSD),
    Wrong(lambda o: attend(o, window=0), ValueError, "attention: window is 0, expected at least 1", BTSD),
    Wrong(lambda o: attend(o, window=-2**70), ValueError,
          "attention: window is -1180591620717411303424, expected at least 1", BTSD),
    Wrong(lambda o: attend(o, window=1.5), TypeError, "attention: window is 1.5, expected an integer", BTSD),
    Wrong(lambda o: attend(o, softcap=0.0), ValueError, "attention: softcap is 0.0, expected a number > 0", BTSD),
    Wrong(lambda o: attend(o, softcap=float("nan")), ValueError,
          "attention: softcap is nan, expected a number > 0", BTSD),
    Wrong(lambda o: attend(o, mask=np.ones((3, 5), bool)), ValueError,
          "attention: mask has shape (3, 5), expected one that broadcasts to (batch, heads, q_len, kv_len) = "
          "(1, 4, 2, 5)", BTSD),
    Wrong(lambda o: attend(o, mask=ints(1, 1, 1, 1, 0)), TypeError,
          "attention: mask has dtype int64, expected bool, float32, float16 or bfloat16", BTSD),
    Wrong(lambda o: attend(o, sinks=a(2)), ValueError, "attention: sinks has shape (2,), expected (4,)", BTSD),
    Wrong(lambda o: attend(o, kv_lens=a(1)), TypeError,
          "attention: kv_lens has dtype float32, expected integers", BTSD),
    Wrong(lambda o: attend(o, kv_lens=ints(1, 2)), ValueError,
          "attention: kv_lens has shape (2,), expected (1,)", BTSD),
    Wrong(lambda o: attend(o, kv_lens=ints(6)), ValueError, "attention: kv_lens[0] is 6, expected 0 to 5", BTSD),
    Wrong(lambda o: attend(o, kv_lens=ints(-1)), ValueError, "attention: kv_lens[0] is -1, expected 0 to 5", BTSD),
    Wrong(lambda o: attend(o, kv_lens=np.array([2**64 - 1], np.uint64)), ValueError,
          "attention: kv_lens[0] is 18446744073709551615, expected 0 to 5", BTSD),
    Wrong(lambda o: attend(o.view(F16)[..., :8], q=a(*BTSD, dtype=F16), sinks=o.view(F16)[0, 0, 0, :4]), ValueError,
          "attention: out overlaps sinks; pass an array of its own", BTSD),
    Wrong(lambda o: attend(o, mask=o[0, :, 0, ::-1][:, :5]), ValueError,
          "attention: out overlaps mask; pass an array of its own", BTSD),
    Wrong(lambda o: attend(o[:, :, :3]), ValueError,
          "attention: out has shape (1, 2, 3, 8), expected (1, 2, 4, 8)", BTSD),
    Wrong(lambda o: attend(o, q=o), ValueError, "attention: out overlaps q; pass an array of its own", BTSD),
    Wrong(lambda o: attend(o, k=cache(), v=None, kv_lens=ints(5)), ValueError,
          "attention: kv_lens is given with a KVCache, which knows its own lengths", BTSD),
    Wrong(lambda o: attend(o, k=cache(window=3), v=None, window=4), ValueError,
          "attention: window is 4, expected at most the cache's 3", BTSD),
    Wrong(lambda o: fc.merge_attention(a(2, 4), a(2), a(2, 3), a(2)), ValueError,
          "merge_attention: out_b has shape (2, 3), expected (2, 4)"),
    Wrong(lambda o: fc.merge_attention(a(2, 4), a(2), a(2, 4, dtype=F16), a(2)), TypeError,
          "merge_attention: out_b has dtype float16, expected float32"),
    Wrong(lambda o: fc.merge_attention(a(2, 4), a(4), X, a(2)), ValueError,
          "merge_attention: lse_a has shape (4,), expected (2,)"),
    Wrong(lambda o: fc.merge_attention(a(2, 4), a(2), X, a(2, dtype=F64)), TypeError,
          "merge_attention: lse_b has dtype float64, expected float32"),
    Wrong(lambda o: fc.merge_attention(a(), a(), a(), a()), ValueError,
          "merge_attention: out_a has shape (), expected at least one axis"),
]
MASKED = np.ma.masked_array(np.ones((4, 4), np.float32), np.eye(4) > 0)
MASKS = [Wrong(call, TypeError, f"{name} is a MaskedArray, expected a NumPy array without a mask") for name, call in {
    "pack: weight": lambda o: fc.pack(MASKED), "pack_gated: up": lambda o: fc.pack_gated(X, MASKED[:, :X.shape[1]]),
    "pack: importance": lambda o: fc.pack(a(4, 4), "int4", importance=MASKED[0]),
    "KVCache.append: k": lambda o: cache().append(np.ma.masked_array(a(1, 1, 2, 8)), a(1, 1, 2, 8)),
    "KVCache.append: lens": lambda o: cache().append(a(1, 1, 2, 8), a(1, 1, 2, 8), lens=np.ma.masked_array([1])),
    "KVCache.truncate: n": lambda o: cache().truncate(np.ma.masked_array([1])),
    "Linear: x": lambda o: nn.Linear(4, 4)(MASKED), "RMSNorm: weight": lambda o: setattr(
        nn.RMSNorm(4), "weight", MASKED[0]),
    "model: ids": lambda o: fc.models.load()(np.ma.masked_array([[1]])),
    "generate: prompt": lambda o: fc.models.load().generate(np.ma.masked_array([1])),
    "score: prompt": lambda o: fc.models.load().score(np.ma.masked_array([[1, 2]])),
    "collect_importance: ids": lambda o: fc.models.collect_importance(None, [np.ma.masked_array([1])])}.items()]
CACHE = [
    Wrong(lambda o: fc.KVCache(0, 8, 2, 8), ValueError, "KVCache: batch is 0, expected at least 1"),
    Wrong(lambda o: fc.KVCache(1, 8.0, 2, 8), TypeError, "KVCache: max_seq_len is 8.0, expected an integer"),
    Wrong(lambda o: fc.KVCache(1, 8, 2, 8, dtype="float64"), ValueError,
          "KVCache: dtype is 'float64', expected one of float32, bfloat16, int8"),
    Wrong(lambda o: fc.KVCache(1, 2**62, 2, 8), ValueError,
          "KVCache: 18014398509481984 pages of 49152 bytes cannot be addressed"),
    Wrong(lambda o: fc.kv_cache_nbytes(1, -1, 2, 8), ValueError,
          "kv_cache_nbytes: seq_len is -1, expected at least 0"),
    Wrong(lambda o: cache().append(a(1, 4, 2, 8), a(1, 4, 2, 8)), ValueError,
          "KVCache.append: row 0 has 5 tokens and 4 more do not fit, max_seq_len is 8"),
    Wrong(lambda o: cache().append(a(1, 1, 2, 8), a(1, 2, 2, 8)), ValueError,
          "KVCache.append: v has 2 tokens, expected 1 as k"),
    Wrong(lambda o: cache().append(a(1, 1, 2, 9), a(1, 1, 2, 8)), ValueError,
          "KVCache.append: k has shape (1, 1, 2, 9), expected (1, tokens, 2, 8)"),
    Wrong(lambda o: cache().append(a(1, 1, 2, 8, dtype=F64), a(1, 1, 2, 8)), TypeError,
          "KVCache.append: k has dtype float64, expected float32, float16 or bfloat16: pass k.astype(np.float32)"),
    Wrong(lambda o: cache().truncate(6), ValueError, "KVCache.truncate: n is 6, expected 0 to 5"),
    Wrong(lambda o: cache().truncate(1.0), TypeError,
          "KVCache.truncate: n is 1.0, expected an integer or 1 of them"),
    Wrong(lambda o: cache().row(1), IndexError, "KVCache.row: i is 1, expected 0 to 0"),
]
GQA = nn.GroupedQueryAttention(8, 4, 2, seed=0)
LAYERS = [
    Wrong(lambda o: nn.RMSNorm(4)(a(2, 5)), ValueError, "rms_norm: weight has shape (4,), expected (5,)"),
    Wrong(lambda o: nn.Linear(4, 3)(a(2, 5)), ValueError,
          "linear: x has shape (2, 5), expected (..., 4) for a weight of shape (4, 3)"),
    Wrong(lambda o: nn.Linear(4, 3)(a(2, 4, dtype="c8")), TypeError, "Linear: x has dtype complex64, expected numbers"),
    Wrong(lambda o: setattr(nn.Linear(4, 3), "weight", a(3, 4)), ValueError,
          "Linear: weight has shape (3, 4), expected (4, 3)"),
    Wrong(lambda o: setattr(nn.Linear(4, 3, bias=False), "bias", a(3)), AttributeError,
          "Linear: bias is None, this layer was made without it"),
    Wrong(lambda o: nn.Embedding(4, 3)([4]), IndexError, "embedding: id 4 at (0,) is outside the table of 4 rows"),
    Wrong(lambda o: nn.GELU("fast"), ValueError, "GELU: approximate is 'fast', expected 'none' or 'tanh'"),
    Wrong(lambda o: nn.GeGLU(4, 3, approximate="fast"), ValueError,
          "GeGLU: approximate is 'fast', expected 'none' or 'tanh'"),
    Wrong(lambda o: nn.SwiGLU(4).astype("float64"), ValueError,
          "SwiGLU.astype: dtype is 'float64', expected one of float32, bfloat16, int8, int4"),
    Wrong(lambda o: nn.SwiGLU.from_llama(a(5, 3), a(5, 4), a(3, 5)), ValueError,
          "SwiGLU: up_proj has shape (5, 4), expected (5, 3)"),
    Wrong(lambda o: nn.GroupedQueryAttention(8, 4, 3), ValueError,
          "GroupedQueryAttention: n_heads is 4, expected a multiple of n_kv_heads 3"),
    Wrong(lambda o: nn.MultiHeadAttention(9, 4), ValueError,
          "MultiHeadAttention: d_model is 9, expected a multiple of n_heads 4"),
    Wrong(lambda o: GQA(a(2, 8)), ValueError,
          "GroupedQueryAttention: x has shape (2, 8), expected (batch, seq, 8)"),
    Wrong(lambda o: GQA(a(1, 2, 8), kv_cache=object()), TypeError,
          "GroupedQueryAttention: kv_cache is a object, expected a KVCache"),
    Wrong(lambda o: GQA(a(1, 2, 8), kv_cache=fc.KVCache(1, 8, 2, 4)), ValueError,
          "GroupedQueryAttention: kv_cache has (batch, n_kv_heads, head_dim) (1, 2, 4), expected (1, 2, 2)"),
    Wrong(lambda o: nn.RotaryPositionalEmbedding(4, 8)(a(1, 9, 4), a(1, 9, 4)), IndexError,
          "rope: positions 0 to 8 are outside the table of 8 positions"),
    Wrong(lambda o: nn.SinusoidalPositionalEncoding(4, 8)(a(1, 2, 4), start_pos=7), IndexError,
          "SinusoidalPositionalEncoding: positions 7 to 8 are outside the table of 8 positions"),
    Wrong(lambda o: nn.ModernTransformerBlock(8, 4, 2, max_seq_len=4)(a(1, 5, 8)), IndexError,
          "rope: position 4 is outside the table of 4 positions"),
]
RUNTIME = [
    Wrong(lambda o: fc.set_num_threads(0), ValueError, "set_num_threads: n is 0, expected 1 to 4096"),
    Wrong(lambda o: fc.set_num_threads(4097), ValueError, "set_num_threads: n is 4097, expected 1 to 4096"),
    Wrong(lambda o: fc.set_num_threads(2**70), ValueError,
          "set_num_threads: n is 1180591620717411303424, expected 1 to 4096"),
    Wrong(lambda o: fc.set_num_threads(1.5), TypeError, "set_num_threads: n is 1.5, expected an integer"),
    Wrong(lambda o: fc.use_isa(fc.isa() + "\0junk"), ValueError,
          f"use_isa: {fc.isa() + chr(0) + 'junk'!r} does not run here, expected one of "
          f"{', '.join(fc.available_isas())}"),
    Wrong(lambda o: fc.PackedWeight(np.zeros(512, np.uint8), (16, 16), "int8", False, 0), ValueError,
          "PackedWeight: group_size is 0, expected a multiple of 32 up to 65536 for int8"),
    Wrong(lambda o: fc.PackedWeight(np.zeros(512, np.uint8), (16, 16), "int5"), ValueError,
          f"PackedWeight: dtype is 'int5', expected one of {HELD}"),
    Wrong(lambda o: fc.use_isa("mmx"), ValueError,
          f"use_isa: 'mmx' does not run here, expected one of {', '.join(fc.available_isas())}"),
]

THREE, DTYPE = np.ones(3), "expected float32, float16 or bfloat16"
OPTIONS = [
    Wrong(lambda o: fc.rms_norm(X, eps="x", out=o), TypeError, "rms_norm: eps is 'x', expected a number"),
    Wrong(lambda o: fc.rms_norm(X, eps=None, out=o), TypeError, "rms_norm: eps is None, expected a number"),
    Wrong(lambda o: fc.rms_norm(X, weight_offset=[1], out=o), TypeError,
          "rms_norm: weight_offset is [1], expected a number"),
    Wrong(lambda o: fc.rms_norm(X, weight_offset=10**400, out=o), ValueError,
          f"rms_norm: weight_offset is {10**400}, expected a number that a double holds"),
    Wrong(lambda o: fc.layer_norm(X, eps=1j, out=o), TypeError, "layer_norm: eps is 1j, expected a number"),
    Wrong(lambda o: fc.gelu(X, THREE, out=o), ValueError,
          "gelu: approximate is array([1., 1., 1.]), expected 'none' or 'tanh'"),
    Wrong(lambda o: fc.geglu(X, X, THREE, out=o), ValueError,
          "geglu: approximate is array([1., 1., 1.]), expected 'none' or 'tanh'"),
    Wrong(lambda o: fc.rope(a(1, 2, 4), TABLE, start_pos=0.5, out=o[None]), TypeError,
          "rope: start_pos is 0.5, expected an integer"),
    Wrong(lambda o: fc.rope(a(1, 2, 4), TABLE, interleaved=THREE, out=o[None]), TypeError,
          "rope: interleaved is array([1., 1., 1.]), expected True or False"),
    Wrong(lambda o: fc.rope_table(4, 8, scaling=THREE), TypeError,
          "rope_table: scaling is ndarray, expected a dict or None"),
    Wrong(lambda o: fc.embedding([0, 1], X, scale="2", out=o), TypeError, "embedding: scale is '2', expected a number"),
    Wrong(lambda o: fc.embedding([0, 1], X, dtype=3, out=o), TypeError, "embedding: dtype is 3, " + DTYPE),
    Wrong(lambda o: fc.embedding([0, 1], X, dtype="\ud800", out=o), TypeError,
          "embedding: dtype is '\\ud800', " + DTYPE),
    Wrong(lambda o: fc.gated_linear(X, PAIR, activation=["silu"], out=o[:, :3]), ValueError,
          "gated_linear: activation is ['silu'], expected one of relu, silu, gelu, gelu_tanh"),
    Wrong(lambda o: fc.pack(W, THREE), ValueError,
          "pack: dtype is array([1., 1., 1.]), expected one of float32, bfloat16, int8, int4, q4_1, q5_0, q5_1, q8_0, "
          "q4_k, q5_k, q6_k"),
    Wrong(lambda o: fc.PackedWeight(3, (4, 3), "float32"), TypeError,
          "PackedWeight: data is a int, expected a NumPy array"),
    Wrong(lambda o: fc.PackedWeight(PACKED.data, 4, "float32"), TypeError,
          "PackedWeight: shape is 4, expected (in_features, out_features)"),
    Wrong(lambda o: fc.PackedWeight(PACKED.data, (4, 2**64), "float32"), ValueError,
          f"PackedWeight: shape is (4, {2**64}), which cannot be addressed"),
    Wrong(lambda o: fc.PackedWeight(PACKED.data, (4, 3), None), ValueError,
          f"PackedWeight: dtype is None, expected one of {HELD}"),
    Wrong(lambda o: fc.PackedWeight(PACKED.data, (4, 3), "float32", THREE), TypeError,
          "PackedWeight: gated is array([1., 1., 1.]), expected True or False"),
    Wrong(lambda o: attend(o, scale="x"), TypeError, "attention: scale is 'x', expected a number", BTSD),
    Wrong(lambda o: attend(o, softcap="x"), TypeError, "attention: softcap is 'x', expected a number", BTSD),
    Wrong(lambda o: attend(o, softcap=1e-50), ValueError,
          "attention: softcap is 1e-50, expected a finite number that float32 does not round to 0", BTSD),
    Wrong(lambda o: attend(o, softcap=np.inf), ValueError,
          "attention: softcap is inf, expected a finite number that float32 does not round to 0", BTSD),
    Wrong(lambda o: attend(o, window="x"), TypeError, "attention: window is 'x', expected an integer", BTSD),
    Wrong(lambda o: attend(o, causal=THREE), TypeError,
          "attention: causal is array([1., 1., 1.]), expected True or False", BTSD),
    Wrong(lambda o: attend(o, return_lse=THREE), TypeError,
          "attention: return_lse is array([1., 1., 1.]), expected True or False", BTSD),
    Wrong(lambda o: fc.KVCache(1, 8, 2, 8, dtype=3), TypeError, "KVCache: dtype is 3, expected a dtype or its name"),
    Wrong(lambda o: fc.kv_cache_nbytes(1, 2, 3, 4, dtype=3), TypeError,
          "kv_cache_nbytes: dtype is 3, expected a dtype or its name"),
    Wrong(lambda o: cache().row("x"), TypeError, "KVCache.row: i is 'x', expected an integer"),
]

GROUPS = {"norms": NORMS, "elementwise": ELEMENTWISE, "rope": ROPE, "linear": LINEAR, "attention": ATTENTION,
          "masks": MASKS, "states": STATES, "scans": SCANS, "cache": CACHE, "layers": LAYERS, "runtime": RUNTIME,
          "options": OPTIONS}
CASES = [pytest.param(wrong, id=f"{group}-{i}") for group, cases in GROUPS.items() for i, wrong in enumerate(cases)]


@pytest.mark.parametrize("wrong", CASES)
def test_a_wrong_call_says_what_came_and_what_was_expected_and_writes_nothing(wrong):
    out = np.full(wrong.out_shape, 7, F32)
    with pytest.raises(wrong.error) as caught:
        wrong.call(out)
    assert type(caught.value) is wrong.error
    assert str(caught.value) == wrong.message
    assert (out == 7).all()


@pytest.mark.parametrize("i", range(9))
def test_a_cache_is_as_before_after_a_wrong_call(i):
    held = cache()
    before = [part.tobytes() for part in held] + [held.lengths.tolist()]
    calls = [
        lambda: held.append(a(1, 4, 2, 8), a(1, 4, 2, 8)), lambda: held.append(a(1, 1, 2, 8), a(1, 2, 2, 8)),
        lambda: held.append(a(1, 1, 2, 8), a(1, 1, 2, 9)), lambda: held.append([[[[0.5] * 8] * 2]], a(1, 1, 2, 8)),
        lambda: held.append(a(1, 1, 2, 8), a(1, 1, 2, 8), lens=[2]), lambda: held.truncate(9),
        lambda: held.truncate(-1), lambda: GQA(a(1, 2, 8), kv_cache=held), lambda: fc.attention(a(1, 2, 3, 8), held),
    ]
    with pytest.raises((TypeError, ValueError)):
        calls[i]()
    assert [part.tobytes() for part in held] + [held.lengths.tolist()] == before


def test_a_call_of_a_layer_that_fails_late_leaves_the_cache_as_it_was():
    held = fc.KVCache(1, 8, 2, 2)
    _, held = GQA(a(1, 3, 8), kv_cache=held)
    before = [part.tobytes() for part in held]
    with pytest.raises(ValueError, match="attention: mask has shape"):
        GQA(a(1, 2, 8), np.ones((7, 7), bool), kv_cache=held)
    assert held.seq_len == 3 and [part.tobytes() for part in held] == before


def test_the_wrong_calls_are_wrong_because_of_what_they_say():
    """The same calls with the complaint met go through, so that no message hides another mistake."""
    out = np.empty((2, 4), F32)
    assert fc.rms_norm(X, a(4), eps=0.0, residual=X, out=(out, np.empty_like(out)))[0] is out
    assert fc.swiglu(X, X, out=out) is fc.gelu(X, "tanh", out=out) is fc.softmax(X, out=out) is out
    assert fc.rope(a(1, 2, 4), TABLE, start_pos=6, out=out[None]).shape == (1, 2, 4)
    assert fc.linear(X, PACKED, a(3), residual=a(2, 3), out=out[:, :3]).shape == (2, 3)
    assert fc.gated_linear(X, PAIR, a(2, 3), activation="silu", out=out[:, :3]).shape == (2, 3)
    assert fc.embedding([1, 0], X, dtype=F32, out=out) is out
    heads = np.empty(BTSD, F32)
    options = dict(window=1, softcap=1.0, mask=np.ones((2, 5), bool), sinks=a(4), kv_lens=ints(5))
    assert attend(heads, **options) is attend(heads, k=cache(window=3), v=None, window=3) is heads
    assert GQA(a(1, 2, 8), kv_cache=fc.KVCache(1, 8, 2, 2))[1].seq_len == 2
