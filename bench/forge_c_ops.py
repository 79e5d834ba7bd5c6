"""forge_c, as its users call it: out= where an op takes it, weights packed once. Functions as in numpy_ops."""
from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import forge_c as fc
from forge_c import distributed
from forge_c.distributed.layout import positions_of
from forge_c.nn import MixtureOfDepths, ModernTransformerBlock, SinusoidalPositionalEncoding

Array = np.ndarray
Call = Callable[[], Any]
DTYPES = ("float32", "bfloat16", "int8", "int8-128", "int4", "int4-32")
# Function, ids of weights, options -> the weights, which must not go while their ids stand here, and what was packed.
_packs: dict[Any, tuple[tuple[Array, ...], Any]] = {}
_STORED = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def _packed(pack: Callable[..., Any], *weights: Array, **options: Any) -> Any:
    """A copy of its own at each call: to pack takes far longer than to copy."""
    key = pack, *map(id, weights), *options.items()
    if key not in _packs:
        if len(_packs) > 1:
            _packs.clear()
        _packs[key] = weights, pack(*weights, **options)
    return copy.deepcopy(_packs[key][1])


def to_numpy(result: Any) -> Array:
    return np.asarray(result, np.float32)


def _cast(a: Array, dtype: str) -> Array:
    return np.ascontiguousarray(a, _STORED[dtype])


def rms_norm(x: Array, weight: Array, *, dtype: str) -> Call:
    x = _cast(x, dtype)
    out = np.empty_like(x)
    return lambda: fc.rms_norm(x, weight, out=out)


def layer_norm(x: Array, weight: Array, bias: Array, *, dtype: str) -> Call:
    x = _cast(x, dtype)
    out = np.empty_like(x)
    return lambda: fc.layer_norm(x, weight, bias, out=out)


def causal_conv1d(x: Array, weight: Array, bias: Array, *, activation: str | None, dtype: str) -> Call:
    x = _cast(x, dtype)
    out = np.empty_like(x), np.empty((len(x), weight.shape[1] - 1, x.shape[2]), np.float32)
    return lambda: fc.causal_conv1d(x, weight, bias, activation=activation, out=out)[0]


def selective_scan(u: Array, delta: Array, A: Array, B: Array, C: Array, D: Array, z: Array, delta_bias: Array,
                   state: Array, *, dtype: str) -> Call:
    u, delta, B, C, z = (_cast(a, dtype) for a in (u, delta, B, C, z))
    out = np.empty_like(u), np.empty_like(state)
    return lambda: fc.selective_scan(u, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=True,
                                     state=state, out=out)[0]


def rg_lru(x: Array, input_gate: Array, recurrence_gate: Array, param: Array, state: Array, *, dtype: str) -> Call:
    x, i, r = (_cast(a, dtype) for a in (x, input_gate, recurrence_gate))
    out = np.empty_like(x), np.empty_like(state)
    return lambda: fc.rg_lru(x, i, r, param, state=state, out=out)[0]


def rms_norm_residual(x: Array, residual: Array, weight: Array, *, dtype: str) -> Call:
    x, residual = _cast(x, dtype), _cast(residual, dtype)
    out = np.empty_like(x), np.empty_like(x)
    return lambda: fc.rms_norm(x, weight, residual=residual, out=out)[0]


def layer_norm_residual(x: Array, residual: Array, weight: Array, bias: Array, *, dtype: str) -> Call:
    x, residual = _cast(x, dtype), _cast(residual, dtype)
    out = np.empty_like(x), np.empty_like(x)
    return lambda: fc.layer_norm(x, weight, bias, residual=residual, out=out)[0]


def softmax(x: Array, *, dtype: str) -> Call:
    x = _cast(x, dtype)
    out = np.empty_like(x)
    return lambda: fc.softmax(x, out=out)


def rope(x: Array, cos: Array, sin: Array, *, dtype: str) -> Call:
    x, table = _cast(x, dtype), fc.RopeTable(cos, sin)
    out = np.empty_like(x)
    return lambda: fc.rope(x, table, out=out)


def sinusoidal(x: Array, table: Array, *, dtype: str) -> Call:
    layer = SinusoidalPositionalEncoding(x.shape[-1], len(table))
    return lambda: layer(x)


def swiglu(gate: Array, up: Array, *, dtype: str) -> Call:
    gate, up = _cast(gate, dtype), _cast(up, dtype)
    out = np.empty_like(gate)
    return lambda: fc.swiglu(gate, up, out=out)


def silu(x: Array, *, dtype: str) -> Call:
    x = _cast(x, dtype)
    out = np.empty_like(x)
    return lambda: fc.silu(x, out=out)


def gelu(x: Array, *, dtype: str) -> Call:
    x = _cast(x, dtype)
    out = np.empty_like(x)
    return lambda: fc.gelu(x, out=out)


def gelu_tanh(x: Array, *, dtype: str) -> Call:
    x = _cast(x, dtype)
    out = np.empty_like(x)
    return lambda: fc.gelu(x, "tanh", out=out)


def geglu(gate: Array, up: Array, *, dtype: str) -> Call:
    gate, up = _cast(gate, dtype), _cast(up, dtype)
    out = np.empty_like(gate)
    return lambda: fc.geglu(gate, up, out=out)


def new_rms_norm(x: Array, weight: Array, *, dtype: str) -> Call:
    x = _cast(x, dtype)
    return lambda: fc.rms_norm(x, weight)


def new_softmax(x: Array, *, dtype: str) -> Call:
    x = _cast(x, dtype)
    return lambda: fc.softmax(x)


def new_gelu(x: Array, *, dtype: str) -> Call:
    x = _cast(x, dtype)
    return lambda: fc.gelu(x)


def new_swiglu(gate: Array, up: Array, *, dtype: str) -> Call:
    gate, up = _cast(gate, dtype), _cast(up, dtype)
    return lambda: fc.swiglu(gate, up)


def swiglu_mlp(x: Array, gate: Array, up: Array, down: Array, *, dtype: str) -> Call:
    both, last = _packed(fc.pack_gated, gate, up, dtype=dtype), _packed(fc.pack, down, dtype=dtype)
    hidden, out = np.empty((len(x), gate.shape[1]), np.float32), np.empty_like(x)
    return lambda: fc.linear(fc.gated_linear(x, both, out=hidden), last, out=out)


def mlp(x: Array, up: Array, down: Array, *, activation: str, dtype: str) -> Call:
    first, last = fc.pack(up, dtype), fc.pack(down, dtype)
    hidden, out = np.empty((len(x), up.shape[1]), np.float32), np.empty_like(x)

    def call() -> Array:
        fc.linear(x, first, out=hidden)
        if activation == "relu":
            fc.relu(hidden, out=hidden)
        else:
            fc.gelu(hidden, "tanh", out=hidden)
        return fc.linear(hidden, last, out=out)

    return call


def linear(x: Array, weight: Array, *, activations: str | None = None, dtype: str) -> Call:
    name, _, group = dtype.partition("-")
    packed = _packed(fc.pack, weight, dtype=name, group_size=int(group) if group else None, activations=activations)
    out = np.empty((len(x), weight.shape[1]), np.float32)
    return lambda: fc.linear(x, packed, out=out)


def attention(q: Array, k: Array, v: Array, *, precision: str | None = None, dtype: str) -> Call:
    q, k, v = (_cast(a, dtype) for a in (q, k, v))
    out, options = np.empty_like(q), {} if precision is None else {"precision": precision}
    return lambda: fc.attention(q, k, v, causal=True, out=out, **options)


def decode(q: Array, k: Array, v: Array, *, dtype: str) -> Call:
    q, cache = _cast(q, "float32" if dtype == "int8" else dtype), _cache(k, v, k.shape[1], dtype)
    out = np.empty_like(q)
    return lambda: fc.attention(q, cache, causal=True, out=out)


def _on_threads(ranks: int, work: Callable[[Any], None]) -> Callable[[], None]:
    """work(comm) on each of so many ranks, which share the threads between them."""
    comms, pool = distributed.ThreadComm(ranks), ThreadPoolExecutor(ranks)

    def call() -> None:
        threads = fc.get_num_threads()
        fc.set_num_threads(max(threads // ranks, 1))
        try:
            list(pool.map(work, comms))
        finally:
            fc.set_num_threads(threads)

    return call


def over_ranks(q: Array, k: Array, v: Array, *, way: str, ranks: int, layout: str, dtype: str) -> Call:
    """Each rank's rows by <way>_attention, put where they belong."""
    whole, out = [_cast(a, dtype) for a in (q, k, v)], _cast(np.empty_like(q), dtype)
    places = [positions_of(layout, q.shape[1], ranks, rank) for rank in range(ranks)]
    parts = [[np.ascontiguousarray(a[:, at]) for a in whole] for at in places]
    attend = getattr(distributed, f"{way}_attention")

    def rows(comm: Any) -> None:
        out[:, places[comm.rank]] = attend(*parts[comm.rank], comm=comm, layout=layout)

    run = _on_threads(ranks, rows)
    return lambda: run() or out


def decode_over_ranks(q: Array, k: Array, v: Array, *, ranks: int, dtype: str) -> Call:
    q, out = _cast(q, "float32" if dtype == "int8" else dtype), [np.empty(0)]
    caches = [_cache(*part, part[0].shape[1], dtype)
              for part in zip(*(np.array_split(a, ranks, axis=1) for a in (k, v)), strict=True)]

    def attend(comm: Any) -> None:
        result = distributed.sharded_decode(q, caches[comm.rank], comm=comm)
        if comm.rank == 0:
            out[0] = result

    run = _on_threads(ranks, attend)
    return lambda: run() or out[0]


def scan_over_ranks(u: Array, delta: Array, A: Array, B: Array, C: Array, D: Array, z: Array, delta_bias: Array,
                    state: Array, *, ranks: int, schedule: str, dtype: str) -> Call:
    """Each rank's tokens by selective_scan, put where they belong."""
    whole, out = [_cast(a, dtype) for a in (u, delta, B, C, z)], np.empty_like(u, _STORED[dtype])
    places = [slice(at[0], at[-1] + 1) for at in np.array_split(np.arange(u.shape[1]), ranks)]

    def tokens(comm: Any) -> None:
        u, delta, B, C, z = (a[:, places[comm.rank]] for a in whole)
        out[:, places[comm.rank]], _ = distributed.selective_scan(
            u, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=True, state=state, comm=comm,
            schedule=schedule)

    run = _on_threads(ranks, tokens)
    return lambda: run() or out


def verify(q: Array, k: Array, v: Array, *, dtype: str) -> Call:
    return decode(q, k, v, dtype=dtype)


def windowed(q: Array, k: Array, v: Array, *, window: int, dtype: str) -> Call:
    q, k, v = (_cast(a, dtype) for a in (q, k, v))
    out = np.empty_like(q)
    return lambda: fc.attention(q, k, v, causal=True, window=window, out=out)


def uneven(q: Array, k: Array, v: Array, *, lens: tuple[int, ...], dtype: str) -> Call:
    cache = fc.KVCache(*k.shape, dtype=dtype)
    cache.append(k, v, lens=np.array(lens))
    q = _cast(q, "float32" if dtype == "int8" else dtype)
    out = np.empty_like(q)
    return lambda: fc.attention(q, cache, causal=True, out=out)


def _cache(k: Array, v: Array, length: int, dtype: str) -> fc.KVCache:
    cache = fc.KVCache(1, length, k.shape[2], k.shape[3], dtype=dtype)
    cache.append(k, v)
    return cache


def kv_append(k: Array, v: Array, *, past: int, room: int, dtype: str) -> Call:
    tokens = k.shape[1]
    cache = _cache(*(np.zeros((1, past, *k.shape[2:]), np.float32),) * 2, past + room, dtype)
    left = room // tokens

    def call() -> None:
        nonlocal left
        if left == 0:
            cache.truncate(past)
            left = room // tokens
        left -= 1
        cache.append(k, v)

    return call


def _block(weights: dict[str, Any], d_model: int, dtype: str) -> ModernTransformerBlock:
    w = weights
    layer = ModernTransformerBlock(d_model, w["heads"], w["kv_heads"], hidden_dim=w["down"].shape[0],
                                   max_seq_len=len(w["cos"]), eps=w["eps"])
    layer.norm1.weight, layer.norm2.weight = w["norm1"], w["norm2"]
    a, ffn = layer.attention, layer.ffn
    a.W_q, a.W_k, a.W_v, a.W_o = (w[name] for name in "qkvo")
    ffn.W_up, ffn.W_gate, ffn.W_down = w["gate"], w["up"], w["down"]
    return layer.astype(dtype)


def block(x: Array, weights: dict[str, Any], *, past: tuple[Array, Array] | None = None, dtype: str) -> Call:
    layer = _block(weights, x.shape[-1], dtype)
    if past is None:
        return lambda: layer(x)
    before = past[0].shape[1]
    cache = _cache(*past, before + x.shape[1], "float32")

    def call() -> Array:
        y, _ = layer(x, use_cache=True, kv_cache=cache)
        cache.truncate(before)
        return y

    return call


def route_tokens(x: Array, weight: Array, *, dtype: str) -> Call:
    t = x.astype(dtype)
    return lambda: fc.route_tokens(t, weight)[1]


def routed_block(x: Array, weights: dict[str, Any], router: Array, *, dtype: str) -> Call:
    layer = MixtureOfDepths(_block(weights, x.shape[-1], dtype), x.shape[-1])
    layer.router = router
    return lambda: layer(x)


def ssd_scan(x: Array, dt: Array, A: Array, B: Array, C: Array, *, dtype: str) -> Call:
    x, B, C = _cast(x, dtype), _cast(B, dtype), _cast(C, dtype)
    out = np.empty_like(x), np.empty((x.shape[0], *x.shape[2:], B.shape[3]), np.float32)
    return lambda: fc.ssd_scan(x, dt, A, B, C, out=out)[0]


def ssd_step(x: Array, dt: Array, A: Array, B: Array, C: Array, state: Array, *, dtype: str) -> Call:
    state = state.copy()
    out = np.empty_like(x), state
    return lambda: fc.ssd_scan(x, dt, A, B, C, state=state, out=out)[0]


def gated_delta(q: Array, k: Array, v: Array, g: Array, beta: Array, *, dtype: str) -> Call:
    q, k, v = _cast(q, dtype), _cast(k, dtype), _cast(v, dtype)
    out = np.empty_like(v), np.empty((*v.shape[::2], q.shape[3], v.shape[3]), np.float32)
    return lambda: fc.gated_delta(q, k, v, g, beta, out=out)[0]


def gated_delta_step(q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array, *, dtype: str) -> Call:
    state = state.copy()
    out = np.empty_like(v), state
    return lambda: fc.gated_delta(q, k, v, g, beta, state=state, out=out)[0]


def s4d_scan(u: Array, A: Array, B: Array, C: Array, dt: Array, *, dtype: str) -> Call:
    u = _cast(u, dtype)
    out = np.empty_like(u), None
    return lambda: fc.s4d_scan(u, A, B, C, dt, out=out)[0]


def s4d_kernel(A: Array, B: Array, C: Array, dt: Array, *, taps: int, dtype: str) -> Call:
    return lambda: fc.s4d_kernel(A, B, C, dt, taps)


def model_prefill(folder: Path, ids: Array, *, dtype: str) -> Call:
    model = fc.models.load(folder, dtype)
    cache = model.new_cache(1, len(ids))

    def call() -> Array:
        cache.truncate(0)
        return model(ids[None], cache)[0]

    return call


def model_decode(folder: Path, ids: Array, *, dtype: str) -> Call:
    model = fc.models.load(folder, dtype)
    cache, steps = model.new_cache(1, len(ids)), ids.reshape(-1, 1, 1)

    def call() -> Array:
        cache.truncate(0)
        for step in steps:
            logits = model(step, cache)
        return logits[0]

    return call


