"""ONNX Runtime on the CPU: one graph per operation, its fused operators where it has one, buffers bound beforehand.
Functions as in numpy_ops; OMP_NUM_THREADS sets its threads."""
from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray
Call = Callable[[], Any]
DTYPES = ("float32", "int8-128", "int4-32")
_MS = "com.microsoft"
_last: list[Any] = []  # weights, bits, and what they became
_TYPES = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int32): TensorProto.INT32,
          np.dtype(np.int64): TensorProto.INT64, np.dtype(np.uint8): TensorProto.UINT8}


def to_numpy(result: Any) -> Array:
    return np.array(result.numpy())


def _call(nodes: list[Any], inputs: dict[str, Array], out: Array, weights: dict[str, Array] | None = None,
          shared: dict[str, str] | None = None, more: dict[str, Array] | None = None) -> Call:
    """Run the graph over bound buffers; its output is `y`, and there may be `more`.

    shared: further outputs that live in an input's buffer.
    """

    def info(name: str, a: Array) -> Any:
        return helper.make_tensor_value_info(name, _TYPES[a.dtype], a.shape)

    shared, more = shared or {}, more or {}
    graph = helper.make_graph(
        nodes, "bench", [info(name, a) for name, a in inputs.items()],
        [info("y", out), *(info(name, inputs[source]) for name, source in shared.items()),
         *(info(name, a) for name, a in more.items())],
        [numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in (weights or {}).items()])
    model = helper.make_model(graph, ir_version=10,
                              opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(_MS, 1)])
    options = ort.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    # The arrays live as long as these values, and nobody else keeps them.
    held = {name: ort.OrtValue.ortvalue_from_numpy(a) for name, a in inputs.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for name, a in ({"y": out} | more).items():
        held[name] = ort.OrtValue.ortvalue_from_numpy(a)
        binding.bind_ortvalue_output(name, held[name])
    for name, source in shared.items():
        binding.bind_ortvalue_output(name, held[source])

    def call() -> Any:
        session.run_with_iobinding(binding)
        return held["y"]

    return call


def rms_norm(x: Array, weight: Array, *, dtype: str) -> Call:
    node = helper.make_node("SimplifiedLayerNormalization", ["x", "w"], ["y"], axis=-1, epsilon=1e-6)
    return _call([node], {"x": x}, np.empty_like(x), {"w": weight})


def layer_norm(x: Array, weight: Array, bias: Array, *, dtype: str) -> Call:
    node = helper.make_node("LayerNormalization", ["x", "w", "b"], ["y"], axis=-1, epsilon=1e-5)
    return _call([node], {"x": x}, np.empty_like(x), {"w": weight, "b": bias})


def rms_norm_residual(x: Array, residual: Array, weight: Array, *, dtype: str) -> Call:
    node = helper.make_node("SkipSimplifiedLayerNormalization", ["x", "r", "w"], ["y", "", "", "h"], domain=_MS,
                            epsilon=1e-6)
    return _call([node], {"x": x, "r": residual}, np.empty_like(x), {"w": weight}, more={"h": np.empty_like(x)})


def layer_norm_residual(x: Array, residual: Array, weight: Array, bias: Array, *, dtype: str) -> Call:
    node = helper.make_node("SkipLayerNormalization", ["x", "r", "w", "b"], ["y", "", "", "h"], domain=_MS,
                            epsilon=1e-5)
    return _call([node], {"x": x, "r": residual}, np.empty_like(x), {"w": weight, "b": bias},
                 more={"h": np.empty_like(x)})


def softmax(x: Array, *, dtype: str) -> Call:
    return _call([helper.make_node("Softmax", ["x"], ["y"], axis=-1)], {"x": x}, np.empty_like(x))


def rope(x: Array, cos: Array, sin: Array, *, dtype: str) -> Call:
    batch, seq, heads, dim = x.shape
    flat = x.reshape(batch, seq, heads * dim)
    node = helper.make_node("RotaryEmbedding", ["x", "at", "cos", "sin"], ["y"], domain=_MS, num_heads=heads)
    at = np.tile(np.arange(seq, dtype=np.int64), (batch, 1))
    return _call([node], {"x": flat, "at": at}, np.empty_like(flat), {"cos": cos, "sin": sin})


def sinusoidal(x: Array, table: Array, *, dtype: str) -> Call:
    return _call([helper.make_node("Add", ["x", "t"], ["y"])], {"x": x}, np.empty_like(x), {"t": table[:x.shape[1]]})


def _silu_product(gate: str, up: str, out: str) -> list[Any]:
    return [helper.make_node("QuickGelu", [gate], ["silu"], domain=_MS, alpha=1.0),
            helper.make_node("Mul", ["silu", up], [out])]


def swiglu(gate: Array, up: Array, *, dtype: str) -> Call:
    return _call(_silu_product("a", "b", "y"), {"a": gate, "b": up}, np.empty_like(gate))


def silu(x: Array, *, dtype: str) -> Call:
    return _call([helper.make_node("QuickGelu", ["x"], ["y"], domain=_MS, alpha=1.0)], {"x": x}, np.empty_like(x))


def gelu(x: Array, *, dtype: str) -> Call:
    return _call([helper.make_node("Gelu", ["x"], ["y"])], {"x": x}, np.empty_like(x))


def gelu_tanh(x: Array, *, dtype: str) -> Call:
    return _call([helper.make_node("Gelu", ["x"], ["y"], approximate="tanh")], {"x": x}, np.empty_like(x))


def geglu(gate: Array, up: Array, *, dtype: str) -> Call:
    nodes = [helper.make_node("Gelu", ["a"], ["gelu"]), helper.make_node("Mul", ["gelu", "b"], ["y"])]
    return _call(nodes, {"a": gate, "b": up}, np.empty_like(gate))


def swiglu_mlp(x: Array, gate: Array, up: Array, down: Array, *, dtype: str) -> Call:
    nodes = [helper.make_node("MatMul", ["x", "wa"], ["a"]), helper.make_node("MatMul", ["x", "wb"], ["b"]),
             *_silu_product("a", "b", "hidden"), helper.make_node("MatMul", ["hidden", "wc"], ["y"])]
    return _call(nodes, {"x": x}, np.empty_like(x), {"wa": gate, "wb": up, "wc": down})


def mlp(x: Array, up: Array, down: Array, *, activation: str, dtype: str) -> Call:
    middle = (helper.make_node("Relu", ["a"], ["hidden"]) if activation == "relu" else
              helper.make_node("Gelu", ["a"], ["hidden"], approximate="tanh"))
    nodes = [helper.make_node("MatMul", ["x", "wa"], ["a"]), middle,
             helper.make_node("MatMul", ["hidden", "wb"], ["y"])]
    return _call(nodes, {"x": x}, np.empty_like(x), {"wa": up, "wb": down})


def linear(x: Array, weight: Array, *, dtype: str) -> Call:
    if dtype != "float32":
        return _quantised(x, weight, *map(int, dtype.removeprefix("int").split("-")))
    return _call([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": x},
                 np.empty((len(x), weight.shape[1]), np.float32), {"w": weight})


def _quantised(x: Array, weight: Array, bits: int, group: int) -> Call:
    """MatMulNBits over symmetric blocks, with its int8 arithmetic (accuracy level 4)."""
    k, n = weight.shape
    quantised, scale = _blocks(weight, bits, group)
    node = helper.make_node("MatMulNBits", ["x", "w", "scale"], ["y"], domain=_MS, K=k, N=n, bits=bits,
                            block_size=group, accuracy_level=4)
    return _call([node], {"x": x}, np.empty((len(x), n), np.float32), {"w": quantised, "scale": scale})


def _blocks(weight: Array, bits: int, group: int) -> tuple[Array, Array]:
    """(weights, of 4 bits two a byte; scales); remembered for the last weights, of which there may be copies."""
    if _last and _last[0] is weight and _last[1] == bits:
        return _last[2]
    k, n = weight.shape
    blocks = np.ascontiguousarray(weight.T).reshape(n, k // group, group)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)
    middle = 1 << (bits - 1)
    scale = largest / np.float32(-middle)
    u = np.clip(np.rint(blocks / np.where(scale == 0, 1, scale)) + middle, 0, 2 * middle - 1).astype(np.uint8)
    _last[:] = weight, bits, (u[..., 0::2] | (u[..., 1::2] << 4) if bits == 4 else u, scale.reshape(-1))
    return _last[2]


def attention(q: Array, k: Array, v: Array, *, dtype: str) -> Call:
    return _grouped_query(q, k, v, past=0)


def decode(q: Array, k: Array, v: Array, *, dtype: str) -> Call:
    """The last key and value come with the call, as this operator wants them; the others lie in its cache."""
    return _grouped_query(q, k[:, -1:], v[:, -1:], k.shape[1] - 1, (k, v))


def _grouped_query(q: Array, k: Array, v: Array, past: int, cache: tuple[Array, ...] | None = None) -> Call:
    seq, heads, dim = q.shape[1:]
    kv_heads, length = k.shape[2], past + seq
    flat = {name: np.ascontiguousarray(a.reshape(1, seq, -1)) for name, a in (("q", q), ("k", k), ("v", v))}
    stores = [np.zeros((1, kv_heads, length, dim), np.float32) for _ in range(2)]
    for store, held in zip(stores, cache or (), strict=False):
        store[...] = held.transpose(0, 2, 1, 3)
    inputs = flat | {"past_k": stores[0], "past_v": stores[1], "last": np.array([length - 1], np.int32),
                     "total": np.array(length, np.int32)}
    node = helper.make_node("GroupQueryAttention", list(inputs), ["y", "new_k", "new_v"], domain=_MS, num_heads=heads,
                            kv_num_heads=kv_heads)
    return _call([node], inputs, np.empty_like(flat["q"]), shared={"new_k": "past_k", "new_v": "past_v"})
