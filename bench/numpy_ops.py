"""The baseline: pure float32 NumPy as a practised NumPy user writes it. No temporaries where `out=` avoids them, BLAS
for products.

Every function prepares an operation over given float32 arrays and returns a call without arguments that runs it and
returns the result; what may be reused (outputs, scratch, converted weights) is made here, outside the timed call.
"""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches NumPy the name bfloat16, in which checkpoints are stored)
import numpy as np
from numpy_states import (  # noqa: F401
    gated_delta,
    gated_delta_chunked,
    gated_delta_step,
    rg_lru,
    rg_lru_by_tokens,
    s4d_kernel,
    s4d_scan,
    s4d_scan_fft,
    ssd_scan,
    ssd_scan_chunked,
    ssd_step,
)

Array = np.ndarray
Call = Callable[[], Any]
DTYPES = ("float32",)
_QUERIES = 128


def to_numpy(result: Any) -> Array:
    return np.asarray(result, np.float32)


def rms_norm(x: Array, weight: Array, *, dtype: str) -> Call:
    out = np.empty_like(x)
    return lambda: _rms_norm(x, weight, out)


def _rms_norm(x: Array, weight: Array, out: Array, eps: float = 1e-6) -> Array:
    scale = np.vecdot(x, x)[..., None]
    scale /= x.shape[-1]
    scale += eps
    np.sqrt(scale, out=scale)
    np.divide(x, scale, out=out)
    return np.multiply(out, weight, out=out)


def layer_norm(x: Array, weight: Array, bias: Array, *, dtype: str) -> Call:
    out = np.empty_like(x)

    def call() -> Array:
        np.subtract(x, x.mean(axis=-1, keepdims=True), out=out)
        scale = np.vecdot(out, out)[..., None]
        scale /= x.shape[-1]
        scale += 1e-5
        np.sqrt(scale, out=scale)
        np.divide(out, scale, out=out)
        np.multiply(out, weight, out=out)
        return np.add(out, bias, out=out)

    return call


def causal_conv1d(x: Array, weight: Array, bias: Array, *, activation: str | None, dtype: str) -> Call:
    """All tokens at once, tap by tap."""
    width, seq = weight.shape[1], x.shape[1]
    out, product, taps = np.empty_like(x), np.empty_like(x), np.ascontiguousarray(weight.T)
    padded = np.concatenate([np.zeros((len(x), width - 1, x.shape[2]), np.float32), x], axis=1)

    def call() -> Array:
        padded[:, width - 1:] = x
        np.multiply(padded[:, :seq], taps[0], out=out)
        for k in range(1, width):
            np.add(out, np.multiply(padded[:, k:k + seq], taps[k], out=product), out=out)
        np.add(out, bias, out=out)
        return out if activation is None else _silu(out, product)

    return call


def causal_conv1d_by_tokens(x: Array, weight: Array, bias: Array, *, activation: str | None, dtype: str) -> Call:
    """A loop over tokens, as a state is usually kept: the last inputs shifted by one."""
    taps = np.ascontiguousarray(weight.T)

    def call() -> Array:
        out, last = np.empty_like(x), np.zeros((len(x), *taps.shape), np.float32)
        for t in range(x.shape[1]):
            last[:, :-1] = last[:, 1:]
            last[:, -1] = x[:, t]
            out[:, t] = (last * taps).sum(axis=1) + bias
        return out if activation is None else _silu(out, np.empty_like(out))

    return call


def selective_scan(u: Array, delta: Array, A: Array, B: Array, C: Array, D: Array, z: Array, delta_bias: Array,
                   state: Array, *, dtype: str) -> Call:
    """Whatever does not wait for the token before, for 32 tokens at a time; a loop only for h = decay h + added."""
    chunk, (batch, seq, channels) = 32, u.shape
    decay, added = np.empty((2, batch, min(chunk, seq), channels, A.shape[1]), np.float32)
    out, gate = np.empty_like(u), np.empty_like(u)

    def call() -> Array:
        h = state.copy()
        dt = np.logaddexp(0, delta + delta_bias)
        scaled = dt * u
        for first in range(0, seq, chunk):
            some = slice(first, min(first + chunk, seq))
            n = some.stop - first
            np.exp(np.multiply(dt[:, some, :, None], A, out=decay[:, :n]), out=decay[:, :n])
            np.multiply(scaled[:, some, :, None], B[:, some, None], out=added[:, :n])
            for t in range(n):
                h = np.add(np.multiply(decay[:, t], h, out=decay[:, t]), added[:, t], out=added[:, t])
            np.matvec(added[:, :n], C[:, some], out=out[:, some])
            h = h.copy()
        np.add(out, D * u, out=out)
        return np.multiply(out, _silu(z, gate), out=out)

    return call


def scan_over_ranks(*given: Array, ranks: int, schedule: str, dtype: str) -> Call:
    """NumPy has no ranks: the whole, at once."""
    return selective_scan(*given, dtype=dtype)


def selective_scan_by_tokens(u: Array, delta: Array, A: Array, B: Array, C: Array, D: Array, z: Array,
                             delta_bias: Array, state: Array, *, dtype: str) -> Call:
    """A loop over tokens."""
    def call() -> Array:
        h, out = state.copy(), np.empty_like(u)
        for t in range(u.shape[1]):
            dt = np.logaddexp(0, delta[:, t] + delta_bias)
            h = np.exp(dt[..., None] * A) * h + (dt * u[:, t])[..., None] * B[:, t, None]
            y = np.matvec(h, C[:, t]) + D * u[:, t]
            out[:, t] = y * (z[:, t] / (1 + np.exp(-z[:, t])))
        return out

    return call


def rms_norm_residual(x: Array, residual: Array, weight: Array, *, dtype: str) -> Call:
    h, out = np.empty_like(x), np.empty_like(x)
    return lambda: _rms_norm(np.add(x, residual, out=h), weight, out)


def layer_norm_residual(x: Array, residual: Array, weight: Array, bias: Array, *, dtype: str) -> Call:
    h = np.empty_like(x)
    normed = layer_norm(h, weight, bias, dtype=dtype)

    def call() -> Array:
        np.add(x, residual, out=h)
        return normed()

    return call


def softmax(x: Array, *, dtype: str) -> Call:
    out = np.empty_like(x)

    def call() -> Array:
        np.subtract(x, x.max(axis=-1, keepdims=True), out=out)
        np.exp(out, out=out)
        return np.divide(out, out.sum(axis=-1, keepdims=True), out=out)

    return call


def rope(x: Array, cos: Array, sin: Array, *, dtype: str) -> Call:
    out, scratch = np.empty_like(x), np.empty((*x.shape[:-1], x.shape[-1] // 2), x.dtype)
    return lambda: _rope(x, cos[:x.shape[1], None], sin[:x.shape[1], None], out, scratch)


def _rope(x: Array, cos: Array, sin: Array, out: Array, scratch: Array) -> Array:
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    np.multiply(a, cos, out=out[..., :half])
    np.multiply(b, sin, out=scratch)
    out[..., :half] -= scratch
    np.multiply(b, cos, out=out[..., half:])
    np.multiply(a, sin, out=scratch)
    out[..., half:] += scratch
    return out


def sinusoidal(x: Array, table: Array, *, dtype: str) -> Call:
    out = np.empty_like(x)
    return lambda: np.add(x, table[:x.shape[1]], out=out)


def swiglu(gate: Array, up: Array, *, dtype: str) -> Call:
    out = np.empty_like(gate)
    return lambda: _swiglu(gate, up, out)


def _swiglu(gate: Array, up: Array, out: Array) -> Array:
    return np.multiply(_silu(gate, out), up, out=out)


def silu(x: Array, *, dtype: str) -> Call:
    out = np.empty_like(x)
    return lambda: _silu(x, out)


def _silu(x: Array, out: Array) -> Array:
    np.negative(x, out=out)
    np.exp(out, out=out)
    out += 1
    return np.divide(x, out, out=out)


def gelu(x: Array, *, dtype: str) -> Call:
    out, t, p = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    return lambda: _gelu(x, out, t, p)


def _gelu(x: Array, out: Array, t: Array, p: Array) -> Array:
    """x Phi(x); NumPy has no erf: a polynomial in t = 1 / (1 + p |x|), Abramowitz and Stegun 7.1.26, to 1.5e-7."""
    np.abs(x, out=out)
    np.multiply(out, 0.3275911 * 0.5 ** 0.5, out=t)
    t += 1
    np.reciprocal(t, out=t)
    np.multiply(t, 1.061405429, out=p)
    for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p += c
        p *= t
    np.multiply(out, out, out=out)
    out *= -0.5
    np.exp(out, out=out)
    out *= p
    out *= 0.5
    np.subtract(1, out, out=out, where=x > 0)
    return np.multiply(out, x, out=out)


def geglu(gate: Array, up: Array, *, dtype: str) -> Call:
    out, t, p = (np.empty_like(gate) for _ in range(3))
    return lambda: np.multiply(_gelu(gate, out, t, p), up, out=out)


def gelu_tanh(x: Array, *, dtype: str) -> Call:
    out = np.empty_like(x)

    def call() -> Array:
        np.multiply(x, x, out=out)
        np.multiply(out, 0.044715, out=out)
        np.add(out, 1, out=out)
        np.multiply(out, x, out=out)
        np.multiply(out, np.float32((2 / np.pi) ** 0.5), out=out)
        np.tanh(out, out=out)
        np.add(out, 1, out=out)
        np.multiply(out, x, out=out)
        return np.multiply(out, 0.5, out=out)

    return call


def new_rms_norm(x: Array, weight: Array, *, dtype: str) -> Call:
    return lambda: _rms_norm(x, weight, np.empty_like(x))


def new_softmax(x: Array, *, dtype: str) -> Call:
    return lambda: softmax(x, dtype=dtype)()


def new_gelu(x: Array, *, dtype: str) -> Call:
    return lambda: _gelu(x, np.empty_like(x), np.empty_like(x), np.empty_like(x))


def new_swiglu(gate: Array, up: Array, *, dtype: str) -> Call:
    return lambda: _swiglu(gate, up, np.empty_like(gate))


def swiglu_mlp(x: Array, gate: Array, up: Array, down: Array, *, dtype: str) -> Call:
    a, b, hidden = (np.empty((len(x), gate.shape[1]), np.float32) for _ in range(3))
    out = np.empty_like(x)

    def call() -> Array:
        np.matmul(x, gate, out=a)
        np.matmul(x, up, out=b)
        return np.matmul(_swiglu(a, b, hidden), down, out=out)

    return call


def mlp(x: Array, up: Array, down: Array, *, activation: str, dtype: str) -> Call:
    hidden, scratch = (np.empty((len(x), up.shape[1]), np.float32) for _ in range(2))
    out = np.empty_like(x)

    def call() -> Array:
        np.matmul(x, up, out=hidden)
        if activation == "relu":
            np.maximum(hidden, 0, out=hidden)
        else:
            np.multiply(hidden, hidden, out=scratch)
            np.multiply(scratch, 0.044715, out=scratch)
            np.add(scratch, 1, out=scratch)
            np.multiply(scratch, hidden, out=scratch)
            np.multiply(scratch, 0.7978845608, out=scratch)
            np.tanh(scratch, out=scratch)
            np.add(scratch, 1, out=scratch)
            np.multiply(hidden, 0.5, out=hidden)
            np.multiply(hidden, scratch, out=hidden)
        return np.matmul(hidden, down, out=out)

    return call


def linear(x: Array, weight: Array, *, dtype: str) -> Call:
    out = np.empty((len(x), weight.shape[1]), np.float32)
    return lambda: np.matmul(x, weight, out=out)


def attention(q: Array, k: Array, v: Array, *, dtype: str) -> Call:
    """A head at a time, all its scores at once, causal mask added."""
    out, rep, scale = np.empty_like(q), q.shape[2] // k.shape[2], np.float32(q.shape[-1] ** -0.5)
    s = np.empty((q.shape[1], k.shape[1]), np.float32)
    later = np.triu(np.full(s.shape, -np.inf, np.float32), 1 + k.shape[1] - q.shape[1])

    def call() -> Array:
        for h in range(q.shape[2]):
            np.matmul(q[0, :, h] * scale, k[0, :, h // rep].T, out=s)
            np.add(s, later, out=s)
            np.subtract(s, s.max(axis=1, keepdims=True), out=s)
            np.exp(s, out=s)
            total = s.sum(axis=1, keepdims=True)
            o = s @ v[0, :, h // rep]
            np.divide(o, total, out=out[0, :, h])
        return out

    return call


def attention_blocked(q: Array, k: Array, v: Array, *, dtype: str) -> Call:
    """As far as NumPy goes: blocks of queries whose scores stay in cache, keys that no query of a block sees left out.
    That halves the work of a long prompt."""
    out = np.empty_like(q)
    scores = np.empty(q.shape[2] // k.shape[2] * min(_QUERIES, q.shape[1]) * k.shape[1], np.float32)
    heads_first = (0, 2, 1, 3)

    def call() -> Array:
        for qb, kb, vb, ob in zip(*(a.transpose(heads_first) for a in (q, k, v, out)), strict=True):
            _attend(qb, kb, vb, ob, scores)
        return out

    return call


def _attend(q: Array, k: Array, v: Array, out: Array, scores: Array) -> None:
    """Causal: q, out (heads, seq, dim) are the last positions of k, v (kv_heads, kv_len, dim)."""
    heads, seq, dim = q.shape
    rep, past = heads // len(k), k.shape[1] - seq
    scale = np.float32(dim ** -0.5)
    for start in range(0, seq, _QUERIES):
        stop = min(start + _QUERIES, seq)
        rows, seen = stop - start, past + stop
        later = np.triu(np.full((rows, rows), -np.inf, np.float32), 1)
        for g in range(len(k)):
            mine = slice(g * rep, (g + 1) * rep)
            s = scores[:rep * rows * seen].reshape(rep * rows, seen)
            np.matmul((q[mine, start:stop] * scale).reshape(-1, dim), k[g, :seen].T, out=s)
            s.reshape(rep, rows, seen)[:, :, past + start:] += later
            s -= s.max(axis=1, keepdims=True)
            np.exp(s, out=s)
            total = s.sum(axis=1, keepdims=True)
            o = s @ v[g, :seen]
            o /= total
            out[mine, start:stop] = o.reshape(rep, rows, dim)


def windowed(q: Array, k: Array, v: Array, *, window: int, dtype: str) -> Call:
    """A prompt of which each position sees the last `window`: blocks of queries, and the keys that a block sees."""
    queries, keys, values = (np.ascontiguousarray(a[0].transpose(1, 0, 2)) for a in (q, k, v))
    out, rep, seq = np.empty_like(q), q.shape[2] // k.shape[2], q.shape[1]
    queries *= np.float32(q.shape[-1] ** -0.5)

    def call() -> Array:
        for start in range(0, seq, _QUERIES):
            stop, first = min(start + _QUERIES, seq), max(0, start - window + 1)
            behind = np.arange(start, stop)[:, None] - np.arange(first, stop)
            hidden = np.where((behind >= 0) & (behind < window), np.float32(0), np.float32(-np.inf))
            for h in range(len(queries)):
                s = queries[h, start:stop] @ keys[h // rep, first:stop].T
                s += hidden
                s -= s.max(axis=1, keepdims=True)
                np.exp(s, out=s)
                out[0, start:stop, h] = s @ values[h // rep, first:stop] / s.sum(axis=1, keepdims=True)
        return out

    return call


def over_ranks(q: Array, k: Array, v: Array, *, way: str, ranks: int, layout: str, dtype: str) -> Call:
    """NumPy has no ranks: the whole, at once."""
    return attention_blocked(q, k, v, dtype=dtype)


def decode_over_ranks(q: Array, k: Array, v: Array, *, ranks: int, dtype: str) -> Call:
    return decode(q, k, v, dtype=dtype)


def decode(q: Array, k: Array, v: Array, *, dtype: str) -> Call:
    keys, values = (np.ascontiguousarray(a[0].transpose(1, 0, 2)) for a in (k, v))
    out = np.empty_like(q)
    return lambda: _attend_one(q, keys, values, out)


def _attend_one(q: Array, k: Array, v: Array, out: Array) -> Array:
    """q, out (1, 1, heads, dim); k, v (kv_heads, kv_len, dim): every product in one batched call."""
    grouped = q.reshape(len(k), -1, q.shape[-1]) * np.float32(q.shape[-1] ** -0.5)
    s = grouped @ k.transpose(0, 2, 1)
    s -= s.max(axis=-1, keepdims=True)
    np.exp(s, out=s)
    total = s.sum(axis=-1, keepdims=True)
    o = np.matmul(s, v, out=out.reshape(grouped.shape))
    o /= total
    return out


def verify(q: Array, k: Array, v: Array, *, dtype: str) -> Call:
    """Several tokens: the causal mask matters among the last keys."""
    queries, keys, values = (np.ascontiguousarray(a[0].transpose(1, 0, 2)) for a in (q, k, v))
    out, scores = np.empty_like(q), np.empty(q.shape[2] // k.shape[2] * q.shape[1] * k.shape[1], np.float32)

    def call() -> Array:
        _attend(queries, keys, values, out[0].transpose(1, 0, 2), scores)
        return out

    return call


def uneven(q: Array, k: Array, v: Array, *, lens: tuple[int, ...], dtype: str) -> Call:
    """A row at a time, over as many keys as it has."""
    rows = [tuple(np.ascontiguousarray(a[b, :n].transpose(1, 0, 2)) for a in (k, v)) for b, n in enumerate(lens)]
    out = np.empty_like(q)

    def call() -> Array:
        for b, (keys, values) in enumerate(rows):
            _attend_one(q[b:b + 1], keys, values, out[b:b + 1])
        return out

    return call


def kv_append(k: Array, v: Array, *, past: int, room: int, dtype: str) -> Call:
    tokens = k.shape[1]
    stores = [np.zeros((1, k.shape[2], past + room, k.shape[3]), np.float32) for _ in range(2)]
    at = past

    def call() -> None:
        nonlocal at
        if at + tokens > past + room:
            at = past
        for store, new in zip(stores, (k, v), strict=True):
            store[:, :, at:at + tokens] = new.transpose(0, 2, 1, 3)
        at += tokens

    return call


def block(x: Array, weights: dict[str, Any], *, past: tuple[Array, Array] | None = None, dtype: str) -> Call:
    seq, before = x.shape[1], 0 if past is None else past[0].shape[1]
    cache = _Cache(weights, before + seq)
    if past is not None:
        cache.k[:, :before], cache.v[:, :before] = (a[0].transpose(1, 0, 2) for a in past)
    return lambda: _layer(x[0], weights, cache, before)[None]


class _Cache:
    def __init__(self, w: dict[str, Any], length: int) -> None:
        self.k, self.v = (np.zeros((w["kv_heads"], length, w["k"].shape[1] // w["kv_heads"]), np.float32)
                          for _ in range(2))


def _layer(x: Array, w: dict[str, Any], cache: _Cache, past: int) -> Array:
    """A pre-norm decoder layer on x (seq, d_model); its keys and values join the cache at `past`."""
    seq = len(x)
    dim = cache.k.shape[2]
    cos, sin = w["cos"][past:past + seq, None], w["sin"][past:past + seq, None]
    h = _rms_norm(x, w["norm1"], np.empty_like(x), w["eps"])
    q, k, v = ((h @ w[name]).reshape(seq, -1, dim) for name in "qkv")
    q, k = (_rope(a, cos, sin, np.empty_like(a), np.empty((*a.shape[:2], dim // 2), np.float32)) for a in (q, k))
    cache.k[:, past:past + seq], cache.v[:, past:past + seq] = k.transpose(1, 0, 2), v.transpose(1, 0, 2)
    heads, keys, values = np.empty_like(q), cache.k[:, :past + seq], cache.v[:, :past + seq]
    if seq == 1:
        _attend_one(q[None], keys, values, heads[None])
    else:
        scores = np.empty(w["heads"] // w["kv_heads"] * min(_QUERIES, seq) * (past + seq), np.float32)
        _attend(q.transpose(1, 0, 2), keys, values, heads.transpose(1, 0, 2), scores)
    x = heads.reshape(seq, -1) @ w["o"] + x
    h = _rms_norm(x, w["norm2"], np.empty_like(x), w["eps"])
    hidden = h @ w["gate"]
    return _swiglu(hidden, h @ w["up"], np.empty_like(hidden)) @ w["down"] + x


def route_tokens(x: Array, weight: Array, *, dtype: str) -> Call:
    """An eighth of the tokens, the fastest way that NumPy has; the gates come in the order of the tokens."""
    def call() -> Array:
        r = x @ weight
        count = r.shape[1] // 8
        return np.take_along_axis(r, np.sort(np.argpartition(r, -count, axis=1)[:, -count:], axis=1), axis=1)

    return call


def routed_block(x: Array, weights: dict[str, Any], router: Array, *, dtype: str) -> Call:
    def call() -> Array:
        out, r = x.copy(), x[0] @ router
        at = np.sort(np.argpartition(r, -(len(r) // 8))[-(len(r) // 8):])
        placed = weights | {"cos": weights["cos"][at], "sin": weights["sin"][at]}
        y = _layer(x[0, at], placed, _Cache(weights, len(at)), 0)
        out[0, at] += r[at, None] * (y - x[0, at])
        return out

    return call


_NAMES = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "q": "self_attn.q_proj",
          "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj",
          "up": "mlp.up_proj", "down": "mlp.down_proj"}


class _Llama:
    """A LLaMA checkpoint with tied embeddings, in float32."""

    def __init__(self, folder: Path, length: int) -> None:
        from safetensors.numpy import load_file

        c = json.loads((folder / "config.json").read_text())
        tensors = {name: t.astype(np.float32) for name, t in load_file(folder / "model.safetensors").items()}
        dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        angles = np.outer(np.arange(length), c["rope_theta"] ** (-np.arange(0, dim, 2) / dim))
        shared = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32),
                  "eps": c["rms_norm_eps"], "heads": c["num_attention_heads"], "kv_heads": c["num_key_value_heads"]}
        self.layers = [{name: np.ascontiguousarray(tensors[f"model.layers.{i}.{theirs}.weight"].T)
                        for name, theirs in _NAMES.items()} | shared for i in range(c["num_hidden_layers"])]
        self.caches = [_Cache(w, length) for w in self.layers]
        self.embed, self.norm = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
        self.eps = c["rms_norm_eps"]

    def __call__(self, ids: Array, past: int) -> Array:
        x = self.embed[ids]
        for w, cache in zip(self.layers, self.caches, strict=True):
            x = _layer(x, w, cache, past)
        return _rms_norm(x, self.norm, np.empty_like(x), self.eps) @ self.embed.T


def model_prefill(folder: Path, ids: Array, *, dtype: str) -> Call:
    model = _Llama(folder, len(ids))
    return lambda: model(ids, 0)


def model_decode(folder: Path, ids: Array, *, dtype: str) -> Call:
    model = _Llama(folder, len(ids))

    def call() -> Array:
        for i in range(len(ids)):
            logits = model(ids[i:i + 1], i)
        return logits

    return call
