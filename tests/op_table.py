"""Every public operation once, with arguments for it: what test_arrays, test_threads and others run through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import forge_c as fc
from forge_c import nn

Arrays = dict[str, NDArray[Any]]

ROPE_POSITIONS = 70


@dataclass(frozen=True)
class Arg:
    """One array argument. role says which arrays the operation takes there, see test_arrays.REFUSED."""

    role: str
    shape: tuple[int, ...]
    big: tuple[int, ...] = ()
    below: int = 0  # integers 0 .. below - 1 instead of normal numbers
    dtype: str = ""  # instead of the operation's
    scale: float = 1.0

    def make(self, rng: np.random.Generator, dtype: Any, big: bool) -> NDArray[Any]:
        shape = self.big if big else self.shape
        if self.below:
            return rng.integers(0, self.below, shape)
        if self.dtype == "bool":
            return rng.random(shape) < 0.7
        return (rng.standard_normal(shape, np.float32) * np.float32(self.scale)).astype(self.dtype or dtype)


@dataclass(frozen=True)
class Op:
    """call(**arrays, out=...) -> array or tuple of arrays. outs: how many arrays out= is; alias: what it may be."""

    name: str
    call: Callable[..., Any]
    args: dict[str, Arg]
    outs: int = 0
    alias: frozenset[str] = frozenset()

    @property
    def splits(self) -> bool:
        """Whether the big arguments are work for several threads."""
        return all(arg.big or not arg.shape for arg in self.args.values())

    def make(self, rng: np.random.Generator, dtype: Any = np.float32, *, big: bool = False) -> Arrays:
        return {name: arg.make(rng, dtype, big) for name, arg in self.args.items()}

    def run(self, arrays: Arrays, out: Any = None) -> tuple[NDArray[Any], ...]:
        result = self.call(**arrays) if out is None else self.call(**arrays, out=out)
        return result if isinstance(result, tuple) else (result,)


def rows(shape: tuple[int, ...], big: tuple[int, ...] = ()) -> Arg:
    return Arg("rows", shape, big)


def vector(n: int, big: int = 0) -> Arg:
    return Arg("vector", (n,), (big,) if big else ())


def numpy_only(*shape: int) -> Arg:
    return Arg("asarray", shape)


def _rope(x: Any, cos: Any, sin: Any, positions: Any, interleaved: bool = False, out: Any = None) -> Any:
    return fc.rope(x, fc.RopeTable(cos, sin), positions=positions, interleaved=interleaved, out=out)


def _packed(dtype: str) -> Callable[..., Any]:
    return lambda x, weight, bias, residual, out=None: fc.linear(x, fc.pack(weight, dtype), bias, residual=residual,
                                                                 out=out)


def _gated(activation: str, dtype: str) -> Callable[..., Any]:
    return lambda x, gate, up, bias, out=None: fc.gated_linear(
        x, fc.pack_gated(gate, up, dtype), bias, activation=activation, out=out)


def _cached(q: Any, k: Any, v: Any, out: Any = None) -> Any:
    cache = fc.KVCache(2, 300, 2, 16)
    cache.append(k, v)
    return fc.attention(q, cache, causal=True, out=out)


def _append(k: Any, v: Any, lens: Any) -> Any:
    cache = fc.KVCache(2, 9, 2, 16, dtype="bfloat16")
    cache.append(k, v, lens=lens)
    return *cache, cache.lengths


def _s4d(u: Any, dt: Any, D: Any, out: Any = None) -> Any:
    modes = np.tile(-0.5 + 1j * np.arange(3), (20, 1)).astype(np.complex64)
    return fc.s4d_scan(u, modes, modes, modes, dt, D, out=None if out is None else (out, None))[0]


_X = rows((3, 5, 33), (64, 16, 512))
_SIZES = {"x": rows((3, 7, 20), (2, 48, 256)), "bias": vector(35, 200), "residual": rows((3, 7, 35), (2, 48, 200))}
_ATTENTION = {"q": rows((2, 3, 4, 16), (2, 150, 4, 32)), "k": rows((2, 7, 2, 16), (2, 300, 2, 32)),
              "v": rows((2, 7, 2, 24), (2, 300, 2, 40))}
_SSD = {"x": rows((2, 5, 4, 20), (2, 64, 8, 64)), "dt": Arg("copied", (2, 5, 4), (2, 64, 8)), "A": vector(4, 8),
        "B": rows((2, 5, 2, 17), (2, 64, 2, 32)), "C": rows((2, 5, 2, 17), (2, 64, 2, 32)), "D": vector(4, 8),
        "z": rows((2, 5, 4, 20), (2, 64, 8, 64)), "dt_bias": vector(4, 8),
        "state": Arg("rows", (2, 4, 20, 17), (2, 8, 64, 32), dtype="float32")}
_DELTA = {"q": rows((2, 5, 2, 17), (2, 8, 4, 32)), "k": rows((2, 5, 2, 17), (2, 8, 4, 32)),
          "v": rows((2, 5, 4, 20), (2, 8, 8, 64)), "g": Arg("copied", (2, 5, 4), (2, 8, 8)),
          "beta": Arg("copied", (2, 5, 4), (2, 8, 8)),
          "state": Arg("rows", (2, 4, 17, 20), (2, 8, 32, 64), dtype="float32")}
_ROPE = {"cos": Arg("asarray", (ROPE_POSITIONS, 8), (ROPE_POSITIONS, 16), dtype="float32"),
         "sin": Arg("asarray", (ROPE_POSITIONS, 8), (ROPE_POSITIONS, 16), dtype="float32"),
         "positions": Arg("positions", (2, 5), (2, 64), below=ROPE_POSITIONS)}
_CHANNELS = rows((2, 5, 33), (2, 40, 512))
_SCAN = {"u": _CHANNELS, "delta": _CHANNELS, "A": Arg("copied", (33, 5), (512, 16), scale=0.1),
         "B": rows((2, 5, 5), (2, 40, 16)), "C": rows((2, 5, 5), (2, 40, 16))}
_GATED = {"x": _SIZES["x"], "gate": Arg("asarray", (20, 35), (256, 200)),
          "up": Arg("asarray", (20, 35), (256, 200)), "bias": Arg("copied", (2, 35), (2, 200))}

OPS = {op.name: op for op in (
    Op("rms_norm", fc.rms_norm, {"x": _X, "weight": vector(33, 512)}, 1, frozenset({"x"})),
    Op("rms_norm_residual", fc.rms_norm, {"x": _X, "weight": vector(33, 512), "residual": _X}, 2,
       frozenset({"x", "residual"})),
    Op("layer_norm", fc.layer_norm, {"x": _X, "weight": vector(33, 512), "bias": vector(33, 512)}, 1, frozenset({"x"})),
    Op("layer_norm_residual", fc.layer_norm,
       {"x": _X, "weight": vector(33, 512), "bias": vector(33, 512), "residual": _X}, 2, frozenset({"x", "residual"})),
    Op("softmax", fc.softmax, {"x": _X}, 1, frozenset({"x"})),
    Op("relu", fc.relu, {"x": _X}, 1, frozenset({"x"})),
    Op("silu", fc.silu, {"x": _X}, 1, frozenset({"x"})),
    Op("gelu", fc.gelu, {"x": _X}, 1, frozenset({"x"})),
    Op("gelu_tanh", lambda x, out=None: fc.gelu(x, "tanh", out=out), {"x": _X}, 1, frozenset({"x"})),
    Op("swiglu", fc.swiglu, {"gate": _X, "up": _X}, 1, frozenset({"gate", "up"})),
    Op("geglu", fc.geglu, {"gate": _X, "up": _X}, 1, frozenset({"gate", "up"})),
    Op("rope", _rope, {"x": rows((2, 5, 3, 20), (2, 64, 32, 64)), **_ROPE}, 1, frozenset({"x"})),
    Op("rope_interleaved", lambda **a: _rope(**a, interleaved=True),
       {"x": rows((2, 5, 16), (2, 64, 512)), **_ROPE}, 1, frozenset({"x"})),
    Op("embedding", fc.embedding, {"ids": Arg("ids", (2, 5), (4, 64), below=9), "table": rows((9, 33), (9, 512))}, 1),
    Op("linear", fc.linear, {**_SIZES, "weight": Arg("weight", (20, 35), (256, 200))}, 1, frozenset({"residual"})),
    Op("linear_few_rows", fc.linear,
       {"x": rows((2, 20), (2, 512)), "weight": Arg("weight", (20, 35), (512, 1000)), "bias": vector(35, 1000)}, 1),
    Op("linear_packed", _packed("float32"), {**_SIZES, "weight": Arg("asarray", (20, 35), (256, 200))}, 1,
       frozenset({"residual"})),
    Op("linear_packed_bf16", _packed("bfloat16"), {**_SIZES, "weight": Arg("asarray", (20, 35), (256, 200))}, 1,
       frozenset({"residual"})),
    Op("linear_packed_int8", _packed("int8"), {**_SIZES, "weight": Arg("asarray", (20, 35), (256, 200))}, 1,
       frozenset({"residual"})),
    Op("linear_packed_int4", _packed("int4"), {**_SIZES, "weight": Arg("asarray", (20, 35), (256, 200))}, 1,
       frozenset({"residual"})),
    Op("gated_linear", _gated("silu", "float32"), _GATED, 1),
    Op("gated_linear_bf16", _gated("gelu", "bfloat16"), _GATED, 1),
    Op("gated_linear_int8", _gated("gelu_tanh", "int8"), _GATED, 1),
    Op("gated_linear_int4", _gated("relu", "int4"), _GATED, 1),
    Op("attention", fc.attention,
       {**_ATTENTION, "mask": Arg("mask", (2, 4, 3, 7), (2, 4, 150, 300)), "sinks": vector(4, 4),
        "kv_lens": Arg("positions", (2,), (2,), below=8)}, 1),
    Op("attention_bool_mask", lambda **a: fc.attention(**a, causal=True, window=5, softcap=3.0),
       {**_ATTENTION, "mask": Arg("mask", (2, 4, 3, 7), (2, 4, 150, 300), dtype="bool")}, 1),
    Op("attention_lse", lambda **a: fc.attention(**a, causal=True, return_lse=True), _ATTENTION),
    Op("attention_decode", lambda **a: fc.attention(**a, return_lse=True),
       {"q": rows((2, 1, 4, 16), (1, 1, 8, 64)), "k": rows((2, 7, 2, 16), (1, 1500, 2, 64)),
        "v": rows((2, 7, 2, 24), (1, 1500, 2, 64))}),
    Op("attention_cache", _cached,
       {"q": rows((2, 3, 4, 16), (2, 150, 4, 16)), "k": Arg("asarray", (2, 7, 2, 16), (2, 300, 2, 16)),
        "v": Arg("asarray", (2, 7, 2, 16), (2, 300, 2, 16))}, 1),
    Op("route_tokens", lambda x, weight: fc.route_tokens(x, weight, capacity=0.5),
       {"x": rows((3, 5, 33), (64, 48, 512)), "weight": vector(33, 512)}),
    Op("merge_attention", fc.merge_attention,
       {"out_a": Arg("copied", (2, 3, 16), (4, 256, 64)), "lse_a": Arg("copied", (2, 3), (4, 256), dtype="float32"),
        "out_b": Arg("copied", (2, 3, 16), (4, 256, 64)), "lse_b": Arg("copied", (2, 3), (4, 256), dtype="float32")}),
    Op("ssd_scan", lambda **a: fc.ssd_scan(**a, dt_softplus=True, dt_limit=(0.0, 0.01)), _SSD, 2,
       frozenset({"x", "z"})),
    Op("gated_delta", lambda **a: fc.gated_delta(**a, scale=1e-6), _DELTA, 2, frozenset({"v"})),
    Op("gated_delta_of_rows", lambda **a: fc.gated_delta(**a, rule="gated"),
       {name: arg for name, arg in _DELTA.items() if name != "beta"} | {"g": rows((2, 5, 4, 17), (2, 8, 8, 32))}, 2,
       frozenset({"v"})),
    Op("s4d_scan", _s4d, {"u": rows((2, 5, 20)), "dt": vector(20), "D": vector(20)}, 1, frozenset({"u"})),
    Op("causal_conv1d", fc.causal_conv1d,
       {"x": rows((2, 5, 33), (2, 300, 512)), "weight": Arg("copied", (33, 4), (512, 4)), "bias": vector(33, 512),
        "state": Arg("rows", (2, 3, 33), (2, 3, 512), dtype="float32")}, 2),
    Op("causal_conv1d_silu", lambda **a: fc.causal_conv1d(**a, activation="silu"),
       {"x": rows((2, 5, 33), (2, 300, 512)), "weight": Arg("copied", (33, 7), (512, 7))}, 2),
    Op("selective_scan", fc.selective_scan, {**_SCAN, "state": Arg("rows", (2, 33, 5), (2, 512, 16), dtype="float32")},
       2, frozenset({"u", "delta"})),
    Op("selective_scan_gated", lambda **a: fc.selective_scan(**a, delta_softplus=True),
       {**_SCAN, "D": vector(33, 512), "z": _CHANNELS, "delta_bias": vector(33, 512)}, 2,
       frozenset({"u", "delta", "z"})),
    Op("rg_lru", fc.rg_lru,
       {"x": _CHANNELS, "input_gate": _CHANNELS, "recurrence_gate": _CHANNELS, "param": vector(33, 512),
        "reset": Arg("mask", (2, 5), (2, 40), dtype="bool"),
        "state": Arg("rows", (2, 33), (2, 512), dtype="float32")}, 2,
       frozenset({"x", "input_gate", "recurrence_gate"})),
    Op("KVCache.append", _append, {"k": numpy_only(2, 5, 2, 16), "v": numpy_only(2, 5, 2, 16),
                                   "lens": Arg("lens", (2,), below=6)}),
    Op("pack", lambda weight: fc.pack(weight).unpack(), {"weight": numpy_only(20, 35)}),
    Op("pack_int8", lambda weight: fc.pack(weight, "int8").unpack(), {"weight": numpy_only(20, 35)}),
    Op("pack_int4", lambda weight: fc.pack(weight, "int4", group_size=32).unpack(), {"weight": numpy_only(20, 35)}),
    Op("pack_gated", lambda gate, up: fc.pack_gated(gate, up, "bfloat16").unpack(),
       {"gate": numpy_only(20, 35), "up": numpy_only(20, 35)}),
)}

_ROPE_LAYER = nn.RotaryPositionalEmbedding(16, 32)
LAYERS = {op.name: op for op in (
    Op("RMSNorm", nn.RMSNorm(32), {"x": Arg("layer", (3, 5, 32))}),
    Op("LayerNorm", nn.LayerNorm(32), {"x": Arg("layer", (3, 5, 32))}),
    Op("ReLU", nn.ReLU(), {"x": Arg("layer", (3, 5, 32))}),
    Op("GELU", nn.GELU(), {"x": Arg("layer", (3, 5, 32))}),
    Op("Swish", nn.Swish(), {"x": Arg("layer", (3, 5, 32))}),
    Op("Linear", nn.Linear(32, 9, seed=0), {"x": Arg("layer", (3, 5, 32))}),
    Op("SwiGLU", nn.SwiGLU(32, 40, seed=0), {"x": Arg("layer", (3, 5, 32))}),
    Op("GeGLU", nn.GeGLU(32, 40, seed=0).astype("bfloat16"), {"x": Arg("layer", (3, 5, 32))}),
    Op("Linear_int8", nn.Linear(32, 9, seed=0).astype("int8"), {"x": Arg("layer", (3, 5, 32))}),
    Op("SwiGLU_int4", nn.SwiGLU(32, 40, seed=0).astype("int4"), {"x": Arg("layer", (3, 5, 32))}),
    Op("GroupedQueryAttention", nn.GroupedQueryAttention(32, 4, 2, causal=True, seed=0),
       {"x": Arg("layer", (3, 5, 32))}),
    Op("ModernTransformerBlock", nn.ModernTransformerBlock(32, 4, 2, max_seq_len=16, seed=0),
       {"x": Arg("layer", (3, 5, 32))}),
    Op("MixtureOfDepths", nn.MixtureOfDepths(nn.SwiGLU(32, 40, seed=0), 32, 0.5, seed=0),
       {"x": Arg("layer", (3, 5, 32))}),
    Op("RotaryPositionalEmbedding", _ROPE_LAYER,
       {"query": Arg("layer", (2, 5, 4, 16)), "key": Arg("layer", (2, 5, 2, 16))}),
    Op("SinusoidalPositionalEncoding", nn.SinusoidalPositionalEncoding(32, 16), {"x": Arg("numpy_layer", (3, 5, 32))}),
    Op("Embedding", nn.Embedding(9, 8, seed=0), {"ids": Arg("ids", (3, 5), below=9)}),
)}


def same_bits(got: tuple[NDArray[Any], ...], expected: tuple[NDArray[Any], ...]) -> bool:
    """Whether two results agree in shape, dtype and every byte."""
    return len(got) == len(expected) and all(
        g.shape == e.shape and g.dtype == e.dtype and g.tobytes() == e.tobytes()
        for g, e in zip(got, expected, strict=True))
