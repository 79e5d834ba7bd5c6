"""The specification: every operation of forge_c in float64 NumPy, written for reading.

Nothing here is fast, blocked or numerically clever, and nothing here imports the library.
Letters: b batch, i query, j key, h query head, g key/value head, d channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]
erfc = np.vectorize(math.erfc, otypes=[np.float64])


def f64(a: Any) -> F64:
    """`a` as float64, bfloat16 included."""
    return np.asarray(np.asarray(a), dtype=np.float64)


# ---- norms: x, residual (..., d); weight, bias (d,) -------------------------------------------------

def rms_norm(x: ArrayLike, weight: ArrayLike | None = None, eps: float = 1e-6, *,
             weight_offset: float = 0.0, residual: ArrayLike | None = None) -> Any:
    """h / sqrt(mean(h^2) + eps) * (weight_offset + weight), h = x + residual; (y, h) given a residual."""
    h = f64(x) if residual is None else f64(x) + f64(residual)
    y = h / np.sqrt(np.mean(h * h, axis=-1, keepdims=True) + eps)
    y = y if weight is None else y * (weight_offset + f64(weight))
    return y if residual is None else (y, h)


def layer_norm(x: ArrayLike, weight: ArrayLike | None = None, bias: ArrayLike | None = None,
               eps: float = 1e-5, *, residual: ArrayLike | None = None) -> Any:
    """(h - mean) / sqrt(mean((h - mean)^2) + eps) * weight + bias; (y, h) if there is a residual."""
    h = f64(x) if residual is None else f64(x) + f64(residual)
    centred = h - np.mean(h, axis=-1, keepdims=True)
    y = centred / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps)
    y = y if weight is None else y * f64(weight)
    y = y if bias is None else y + f64(bias)
    return y if residual is None else (y, h)


# ---- rotary positions -------------------------------------------------------------------------------

def rope(x: ArrayLike, cos: ArrayLike, sin: ArrayLike, positions: ArrayLike, *,
         interleaved: bool = False) -> F64:
    """Each pair (a, b) of x (batch, seq, heads, head_dim) turns into (a cos - b sin, b cos + a sin).

    cos, sin (max_seq_len, dim/2); positions (seq,) or (batch, seq). Pairs are (m, m + dim/2) or, interleaved,
    (2m, 2m + 1); channels from dim on are copied.
    """
    y = f64(x).copy()
    at = np.broadcast_to(positions, y.shape[:2])
    c, s = f64(cos)[at][:, :, None], f64(sin)[at][:, :, None]
    half = c.shape[-1]
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    a, b = y[..., first].copy(), y[..., second].copy()
    y[..., first], y[..., second] = a * c - b * s, b * c + a * s
    return y


def rope_angles(inverse_frequency: ArrayLike, max_seq_len: int) -> F64:
    """position * inverse frequency, (max_seq_len, dim/2)."""
    return np.arange(max_seq_len, dtype=np.float64)[:, None] * f64(inverse_frequency)


def rope_frequency(dim: int, base: float = 10000.0) -> F64:
    """base^(-2m/dim) for pair m, (dim/2,)."""
    return float(base) ** (-np.arange(0, dim, 2) / dim)


def rope_dynamic(dim: int, base: float, factor: float, original: int, seq_len: int) -> F64:
    """NTK: the base grows so that a sequence of seq_len > original tokens fits."""
    length = max(seq_len, original)
    return rope_frequency(dim, base * (factor * length / original - (factor - 1)) ** (dim / (dim - 2)))


def rope_llama3(dim: int, base: float, s: Mapping[str, Any]) -> F64:
    """Long waves are divided by factor, short ones kept, those between are blended."""
    inv, original = rope_frequency(dim, base), s["original_max_position_embeddings"]
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    turns = original * inv / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * inv / s["factor"] + smooth * inv


def rope_yarn(dim: int, base: float, s: Mapping[str, Any]) -> F64:
    """Pairs that turn over beta_fast times in the original length are kept, under beta_slow divided."""
    inv, original = rope_frequency(dim, base), s["original_max_position_embeddings"]

    def pair_turning(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_turning(s.get("beta_fast", 32)), pair_turning(s.get("beta_slow", 1))
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return inv / s["factor"] * ramp + inv * (1 - ramp)


def rope_yarn_attention_factor(s: Mapping[str, Any]) -> float:
    """What yarn multiplies cos and sin by."""
    def gain(mscale: float) -> float:
        return 1.0 if s["factor"] <= 1 else 0.1 * mscale * math.log(s["factor"]) + 1.0

    if s.get("attention_factor") is not None:
        return float(s["attention_factor"])
    if s.get("mscale") and s.get("mscale_all_dim"):
        return gain(s["mscale"]) / gain(s["mscale_all_dim"])
    return gain(1.0)


def rope_longrope(dim: int, base: float, s: Mapping[str, Any], seq_len: int) -> tuple[F64, float]:
    """(inverse frequencies, attention factor): the long factors once seq_len passes the original length."""
    original, factor = s["original_max_position_embeddings"], s["factor"]
    stretch = f64(s["long_factor"] if seq_len > original else s["short_factor"])
    gain = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return rope_frequency(dim, base) / stretch, gain


def rope_proportional(dim: int, base: float, partial_rotary_factor: float, factor: float = 1.0) -> F64:
    """The first pairs turn with the exponents of the whole width, the rest stand still."""
    inv = rope_frequency(dim, base) / factor
    inv[int(partial_rotary_factor * dim // 2):] = 0.0
    return inv


# ---- elementwise and softmax ------------------------------------------------------------------------

def relu(x: ArrayLike) -> F64:
    """max(x, 0), NaN stays NaN."""
    return np.maximum(f64(x), 0.0)


def silu(x: ArrayLike) -> F64:
    """x / (1 + exp(-x)); NaN at -inf, as the formula says."""
    with np.errstate(over="ignore", invalid="ignore"):
        return f64(x) / (1 + np.exp(-f64(x)))


def gelu(x: ArrayLike, approximate: str = "none") -> F64:
    """x Phi(x); "tanh": x/2 (1 + tanh t) = x sigmoid(2t), t = sqrt(2/pi) (x + 0.044715 x^3)."""
    x = f64(x)
    with np.errstate(over="ignore", invalid="ignore"):
        if approximate == "none":
            return 0.5 * x * (erfc(-x / math.sqrt(2)) if x.size else x)
        return x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def swiglu(gate: ArrayLike, up: ArrayLike) -> F64:
    """silu(gate) * up."""
    with np.errstate(invalid="ignore"):
        return silu(gate) * f64(up)


def geglu(gate: ArrayLike, up: ArrayLike, approximate: str = "none") -> F64:
    """gelu(gate) * up."""
    with np.errstate(invalid="ignore"):
        return gelu(gate, approximate) * f64(up)


def softmax(x: ArrayLike) -> F64:
    """exp(x - max) / sum over the last axis; a row without a finite maximum is NaN."""
    x = f64(x)
    with np.errstate(invalid="ignore"):
        e = np.exp(x - np.max(x, axis=-1, keepdims=True, initial=-np.inf))
        return e / np.sum(e, axis=-1, keepdims=True)


# ---- matrices: weight (in, out) ---------------------------------------------------------------------

def linear(x: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None, *,
           residual: ArrayLike | None = None) -> F64:
    """x @ weight + bias + residual."""
    with np.errstate(invalid="ignore"):
        y = f64(x) @ f64(weight)
        y = y if bias is None else y + f64(bias)
        return y if residual is None else y + f64(residual)


def quantized(x: ArrayLike, activations: str, chunk: int) -> tuple[F64, F64]:
    """(q (rows, k), scale (rows, chunks)) of rows x (rows, k) ~ scale q, q the nearest whole number, ties to even.

    scale = max|x| / 127 of each chunk, "int12": max|x| / 2047.
    """
    rows, k = np.shape(x)
    chunks = -(-k // chunk)
    padded = np.zeros((rows, chunks, chunk))
    padded.reshape(rows, chunks * chunk)[:, :k] = f64(x)
    largest = np.max(np.abs(padded), axis=2, keepdims=True, initial=0.0)
    steps = {"int8": 127, "int12": 2047}[activations]
    q = np.rint(padded * steps / np.where(largest == 0, 1.0, largest))
    return q.reshape(rows, chunks * chunk)[:, :k], largest[:, :, 0] / steps


def group_terms(q: ArrayLike, ints: ArrayLike, scale: ArrayLike, minimum: ArrayLike) -> F64:
    """What each group adds to q W, W = scale ints + minimum: (2, groups, rows, n), scale sum(q ints), minimum sum(q).

    q (rows, k); ints (groups, group, n), of which those beyond k meet nothing; scale, minimum (groups, n).
    """
    (rows, k), group = np.shape(q), np.shape(ints)[1]
    groups, group = -(-k // group), min(k, group)
    padded = np.zeros((rows, groups * group))
    padded[:, :k] = q
    by_group = padded.reshape(rows, groups, group).transpose(1, 0, 2)
    return np.stack([f64(scale)[:groups, None] * (by_group @ f64(ints)[:groups, :group]),
                     f64(minimum)[:groups, None] * by_group.sum(axis=2, keepdims=True)])


def quantized_linear(x: ArrayLike, ints: ArrayLike, weight_scale: ArrayLike, minimum: ArrayLike,
                     bias: ArrayLike | None = None, *, activations: str, residual: ArrayLike | None = None) -> F64:
    """x W + bias + residual with x quantised and W in groups, which are x's chunks too, see group_terms."""
    q, scale = quantized(x, activations, np.shape(ints)[1])
    y = (scale.T[:, :, None] * group_terms(q, ints, weight_scale, minimum)).sum(axis=(0, 1))
    y = y if bias is None else y + f64(bias)
    return y if residual is None else y + f64(residual)


def gated_linear(x: ArrayLike, gate: ArrayLike, up: ArrayLike, bias: ArrayLike | None = None, *,
                 activation: str = "silu") -> F64:
    """act(x @ gate + bias[0]) * (x @ up + bias[1])."""
    b = np.zeros(2) if bias is None else f64(bias)
    g, u = linear(x, gate) + b[0], linear(x, up) + b[1]
    if activation == "silu":
        return swiglu(g, u)
    return geglu(g, u, {"gelu": "none", "gelu_tanh": "tanh"}[activation])


def embedding(ids: ArrayLike, table: ArrayLike, *, scale: float = 1.0) -> F64:
    """scale * table[ids]."""
    return scale * f64(table)[np.asarray(ids)]


# ---- mixture of depths: x (batch, seq, d), weight (d,) -----------------------------------------------

def route_tokens(x: ArrayLike, weight: ArrayLike, capacity: float = 0.125) -> tuple[NDArray[np.int64], F64]:
    """(indices, gate) (batch, c): the c = max(1, int(capacity * seq)) largest of x . weight, ascending by index; of
    equal ones the lower index, and NaN is less than any number."""
    r = f64(x) @ f64(weight)
    count = min(r.shape[1], max(1, int(capacity * r.shape[1])))
    indices = np.sort(np.argsort(-r, axis=1, kind="stable")[:, :count], axis=1)  # NumPy sorts NaN to the end
    return indices, np.take_along_axis(r, indices, axis=1)


def mixture_of_depths(x: ArrayLike, weight: ArrayLike, block: Callable[[F64, Any], F64], chosen: ArrayLike) -> F64:
    """x + r (block(X, their positions) - X) where chosen (batch, seq), r = x . weight; x elsewhere."""
    x, y = f64(x), f64(x).copy()
    for b, at in enumerate(map(np.flatnonzero, np.asarray(chosen))):
        y[b, at] += (x[b, at] @ f64(weight))[:, None] * (block(x[b, at], at) - x[b, at])
    return y


# ---- attention: q (b, i, h, d), k (b, j, g, d), v (b, j, g, v_dim) ----------------------------------

def visible(b: int, i: int, q_len: int, kv_len: int, *, causal: bool = False, window: int | None = None,
            kv_lens: ArrayLike | None = None, q_positions: ArrayLike | None = None,
            kv_positions: ArrayLike | None = None) -> NDArray[np.intp]:
    """The keys that query i of batch row b may look at; by default the queries are the last q_len of the row's keys."""
    def of_row(positions: ArrayLike) -> NDArray[Any]:
        return np.asarray(positions) if np.ndim(positions) == 1 else np.asarray(positions)[b]

    valid = kv_len if kv_lens is None else int(np.asarray(kv_lens)[b])
    key = np.arange(kv_len) if kv_positions is None else of_row(kv_positions)
    query = valid - q_len + i if q_positions is None else int(of_row(q_positions)[i])
    seen = (np.arange(kv_len) < valid) & (not causal or key <= query) & (window is None or key > query - window)
    return np.flatnonzero(seen)


def attend(score: F64, v: F64, sink: float = -math.inf) -> tuple[F64, float]:
    """softmax(score (j,)) @ v (j, v_dim), and log of the denominator; no key at all gives 0 and -inf."""
    peak = max(np.max(score, initial=-np.inf), sink) if not np.isnan(score).any() else np.nan
    if peak == -np.inf:
        return np.zeros(v.shape[-1]), -math.inf
    with np.errstate(invalid="ignore"):
        p = np.exp(score - peak)
        denominator = p.sum() + np.exp(sink - peak)
        return p @ v / denominator, float(peak + np.log(denominator))


def attention(q: ArrayLike, k: ArrayLike, v: ArrayLike, *, causal: bool = False, scale: float | None = None,
              mask: ArrayLike | None = None, window: int | None = None, softcap: float | None = None,
              sinks: ArrayLike | None = None, kv_lens: ArrayLike | None = None, q_positions: ArrayLike | None = None,
              kv_positions: ArrayLike | None = None) -> tuple[F64, F64]:
    """(out (b, i, h, v_dim), lse (b, i, h)); score = cap(q.k scale) + mask; only keys that are seen exist."""
    q, k, v = f64(q), f64(k), f64(v)
    (batch, q_len, heads, head_dim), kv_len, group = q.shape, k.shape[1], max(q.shape[2] // k.shape[2], 1)
    bias = np.broadcast_to(additive(mask), (batch, heads, q_len, kv_len))
    out, lse = np.zeros((batch, q_len, heads, v.shape[-1])), np.full((batch, q_len, heads), -np.inf)
    for b, i, h in np.ndindex(batch, q_len, heads):
        seen: Any = visible(b, i, q_len, kv_len, causal=causal, window=window, kv_lens=kv_lens, q_positions=q_positions,
                       kv_positions=kv_positions)
        seen = seen[bias[b, h, i, seen] != -np.inf]
        if len(seen) and seen[-1] - seen[0] == len(seen) - 1:
            seen = slice(seen[0], seen[-1] + 1)  # the same keys, without copies of them
        score = k[b, seen, h // group] @ q[b, i, h] * (head_dim ** -0.5 if scale is None else scale)
        score = (score if softcap is None else softcap * np.tanh(score / softcap)) + bias[b, h, i, seen]
        sink = -math.inf if sinks is None else f64(sinks)[h]
        out[b, i, h], lse[b, i, h] = attend(score, v[b, seen, h // group], sink)
    return out, lse


def additive(mask: ArrayLike | None) -> F64:
    """A mask as what is added to the scores: bool True is 0 and False is -inf."""
    if mask is None:
        return np.zeros(1)
    mask = np.asarray(mask)
    return np.where(mask, 0.0, -np.inf) if mask.dtype == bool else f64(mask)


def merge_attention(out_a: ArrayLike, lse_a: ArrayLike, out_b: ArrayLike,
                    lse_b: ArrayLike) -> tuple[F64, F64]:
    """Attention over the keys of both parts; a part with lse -inf is empty and its out is not looked at."""
    out, lse = np.stack([f64(out_a), f64(out_b)]), np.stack([f64(lse_a), f64(lse_b)])
    peak = np.max(lse, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        weight = np.where(lse == -np.inf, 0.0, np.exp(lse - peak))
        total = weight.sum(axis=0)
        parts = np.where(weight[..., None] == 0, 0.0, weight[..., None] * out)
        merged = parts.sum(axis=0) / np.where(total == 0, 1.0, total)[..., None]
        return merged, np.where(peak == -np.inf, -np.inf, peak + np.log(total))


# ---- state spaces and linear attention, token after token -------------------------------------------


# ---- state-space models: x, u, delta, z (batch, seq, channels) --------------------------------------

def causal_conv1d(x: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None, *, activation: str | None = None,
                  state: ArrayLike | None = None) -> tuple[F64, F64]:
    """y[t] = bias + sum of weight[:, k] x[t - width + 1 + k], the state what lies before x; and the next state."""
    x, weight = f64(x), f64(weight)
    (batch, seq, channels), width = x.shape, weight.shape[1]
    before = np.zeros((batch, width - 1, channels)) if state is None else f64(state)
    seen = np.concatenate([before, x], axis=1)
    with np.errstate(invalid="ignore"):
        y = sum(weight[:, k] * seen[:, k:k + seq] for k in range(width)) + (0 if bias is None else f64(bias))
    return y if activation is None else silu(y), seen[:, seq:]


def softplus(x: ArrayLike) -> F64:
    """log(1 + exp(x))."""
    x = f64(x)
    return np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20))))


def ssd_scan(x: ArrayLike, dt: ArrayLike, A: ArrayLike, B: ArrayLike, C: ArrayLike, D: ArrayLike | None = None, *,
             z: ArrayLike | None = None, dt_bias: ArrayLike | None = None, dt_softplus: bool = False,
             dt_limit: tuple[float, float] = (0.0, math.inf), state: ArrayLike | None = None) -> tuple[F64, F64]:
    """h = exp(dt A) h + dt x B, y = (h C + D x) silu(z); h (b, h, p, n), x (b, i, h, p), B, C (b, i, g, n)."""
    x, step = f64(x), f64(dt) + (0 if dt_bias is None else f64(dt_bias))
    step = np.clip(softplus(step) if dt_softplus else step, *dt_limit)[..., None, None]
    b, c = (np.repeat(f64(a), x.shape[2] // np.shape(a)[2], axis=2)[..., None, :] for a in (B, C))
    h = np.zeros((len(x), *x.shape[2:], b.shape[-1])) if state is None else f64(state)
    y = np.zeros(x.shape) if D is None else f64(D)[:, None] * x
    with np.errstate(all="ignore"):
        for t in range(x.shape[1]):
            h = np.exp(step[:, t] * f64(A)[:, None, None]) * h + step[:, t] * x[:, t, ..., None] * b[:, t]
            y[:, t] += np.sum(h * c[:, t], axis=-1)
        return y if z is None else y * silu(z), h


def gated_delta(q: ArrayLike, k: ArrayLike, v: ArrayLike, g: ArrayLike | None = None, beta: ArrayLike | None = None, *,
                scale: float | None = None, state: ArrayLike | None = None) -> tuple[F64, F64]:
    """S = exp(g) S, u = v or beta (v - S k), S = S + k u, y = scale S q; S (b, h, n, p), q, k (b, i, .., n)."""
    q, k, v, g = f64(q), f64(k), f64(v), np.zeros(np.shape(v)[:3]) if g is None else f64(g)
    (batch, seq, heads, p), n, most = v.shape, q.shape[-1], max(v.shape[2], q.shape[2])
    q, k = np.repeat(q, most // q.shape[2], axis=2), np.repeat(k, heads // k.shape[2], axis=2)
    decay, y = np.exp(g if g.ndim == 4 else g[..., None])[..., None], np.zeros((batch, seq, most, p))
    s = np.zeros((batch, heads, n, p)) if state is None else f64(state)
    with np.errstate(all="ignore"):
        for t in range(seq):
            s = delta_step(decay[:, t] * s, k[:, t, ..., None], v[:, t], None if beta is None else f64(beta)[:, t])
            y[:, t] = np.sum(np.repeat(s, most // heads, axis=1) * q[:, t, ..., None], axis=2)
        return y * (max(n, 1) ** -0.5 if scale is None else scale), s


def delta_step(s: F64, k: F64, v: F64, beta: F64 | None) -> F64:
    """S + k u, u = v or, by the delta rule, beta (v - S k)."""
    u = v if beta is None else beta[..., None] * (v - np.sum(s * k, axis=2))
    return s + k * u[:, :, None]


def s4d_system(A: ArrayLike, B: ArrayLike, dt: ArrayLike, method: str = "zoh") -> tuple[Any, Any]:
    """(dA, dB) complex (channels, n): exp(dt A), (dA - 1) / A B; bilinear (1 + dt A/2) / (1 - dt A/2), dt / (..) B."""
    a, b, step = np.asarray(A, np.complex128), np.asarray(B, np.complex128), f64(dt)[:, None]
    with np.errstate(all="ignore"):
        if method == "bilinear":
            return (1 + step * a / 2) / (1 - step * a / 2), step / (1 - step * a / 2) * b
        return np.exp(step * a), np.where(a == 0, step, np.expm1(step * a) / np.where(a == 0, 1, a)) * b


def s4d_kernel(A: ArrayLike, B: ArrayLike, C: ArrayLike, dt: ArrayLike, length: int, *, method: str = "zoh") -> F64:
    """K[l] = sum of 2 real(C dA^l dB), (channels, length)."""
    da, db = s4d_system(A, B, dt, method)
    powers = da[..., None] ** np.arange(length)
    return np.sum(2 * np.real((np.asarray(C, np.complex128) * db)[..., None] * powers), axis=1)


def s4d_scan(u: ArrayLike, A: ArrayLike, B: ArrayLike, C: ArrayLike, dt: ArrayLike, D: ArrayLike | None = None, *,
             method: str = "zoh", state: ArrayLike | None = None) -> tuple[F64, Any]:
    """x = dA x + dB u, y = sum of 2 real(C x) + D u; u (b, i, channels), x (b, channels, n) complex."""
    u, (da, db) = f64(u), s4d_system(A, B, dt, method)
    x = np.zeros((len(u), *da.shape), np.complex128) if state is None else np.asarray(state, np.complex128)
    y = np.zeros(u.shape) if D is None else f64(D) * u
    with np.errstate(all="ignore"):
        for t in range(u.shape[1]):
            x = da * x + db * u[:, t, :, None]
            y[:, t] += np.sum(2 * np.real(np.asarray(C, np.complex128) * x), axis=-1)
        return y, x


def selective_scan(u: ArrayLike, delta: ArrayLike, A: ArrayLike, B: ArrayLike, C: ArrayLike, D: ArrayLike | None = None,
                   *, z: ArrayLike | None = None, delta_bias: ArrayLike | None = None, delta_softplus: bool = False,
                   state: ArrayLike | None = None) -> tuple[F64, F64]:
    """h = exp(delta A) h + delta B u, y = (<h, C> + D u) silu(z); (y, h after the last token)."""
    u, dt, b, c = f64(u), f64(delta) + (0 if delta_bias is None else f64(delta_bias)), f64(B), f64(C)
    dt = softplus(dt) if delta_softplus else dt
    h = np.zeros((len(u), *np.shape(A))) if state is None else f64(state)
    y = np.zeros(u.shape) if D is None else f64(D) * u
    with np.errstate(all="ignore"):
        for t in range(u.shape[1]):
            step = dt[:, t, :, None]
            h = np.exp(step * f64(A)) * h + step * b[:, t, None] * u[:, t, :, None]
            y[:, t] += np.sum(h * c[:, t, None], axis=-1)
        return y if z is None else y * silu(z), h


def sigmoid(x: ArrayLike) -> F64:
    """1 / (1 + exp(-x))."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-f64(x)))


def rg_lru(x: ArrayLike, input_gate: ArrayLike, recurrence_gate: ArrayLike, param: ArrayLike, *,
           reset: ArrayLike | None = None, state: ArrayLike | None = None) -> tuple[F64, F64]:
    """h = a h + sqrt(1 - a^2) sigmoid(input_gate) x, log a = -8 sigmoid(recurrence_gate) softplus(param); (h, last)."""
    with np.errstate(all="ignore"):
        y, log_a = sigmoid(input_gate) * f64(x), -8 * sigmoid(recurrence_gate) * softplus(param)
        h = np.zeros((len(y), y.shape[2])) if state is None else f64(state)
        for t in range(y.shape[1]):
            going_on = np.exp(log_a[:, t]) * h + np.sqrt(-np.expm1(2 * log_a[:, t])) * y[:, t]
            y[:, t] = h = going_on if reset is None else np.where(np.asarray(reset)[:, t, None], y[:, t], going_on)
        return y, h


def rotated(x: Any) -> Any:
    """The last axis, in blocks of the largest power of two that divides it, times Hadamard's matrix."""
    n = x.shape[-1]
    block, h = n & -n, np.ones((1, 1))
    while len(h) < block:
        h = np.block([[h, h], [h, -h]])
    return (x.reshape(*x.shape[:-1], -1, block) @ h / block**0.5).reshape(x.shape)
