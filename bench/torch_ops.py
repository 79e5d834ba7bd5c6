"""PyTorch on the CPU, results into memory that is there where an operation takes it (norms and attention do not; new_*:
as its users call it). Functions as in numpy_ops; OMP_NUM_THREADS sets its threads."""
from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

Array = np.ndarray
Call = Callable[[], Any]
DTYPES = ("float32", "bfloat16")
_C = torch._C._nn  # what torch.nn.functional calls, and takes out=
torch.set_grad_enabled(False)


def to_numpy(result: Any) -> Array:
    return result.float().numpy()


def _cast(a: Array, dtype: str) -> torch.Tensor:
    return torch.from_numpy(a).to(getattr(torch, dtype))


def _transposed(weight: Array, dtype: str) -> torch.Tensor:
    """(out, in), as torch keeps a linear layer's weight."""
    return _cast(weight, dtype).T.contiguous()


def rms_norm(x: Array, weight: Array, *, dtype: str) -> Call:
    t, w = _cast(x, dtype), _cast(weight, dtype)
    return lambda: F.rms_norm(t, w.shape, w, 1e-6)


new_rms_norm = rms_norm


def layer_norm(x: Array, weight: Array, bias: Array, *, dtype: str) -> Call:
    t, w, b = (_cast(a, dtype) for a in (x, weight, bias))
    return lambda: F.layer_norm(t, w.shape, w, b, 1e-5)


def causal_conv1d(x: Array, weight: Array, bias: Array, *, activation: str | None, dtype: str) -> Call:
    """As transformers' Mamba does: channels first, which is how it has them."""
    t, w, b = _cast(x.swapaxes(1, 2), dtype), _cast(weight[:, None], dtype), _cast(bias, dtype)
    width, seq = weight.shape[1], x.shape[1]

    def call() -> torch.Tensor:
        y = F.conv1d(t, w, b, padding=width - 1, groups=len(w))[..., :seq]
        return (y if activation is None else F.silu(y)).transpose(1, 2)

    return call


def selective_scan(u: Array, delta: Array, A: Array, B: Array, C: Array, D: Array, z: Array, delta_bias: Array,
                   state: Array, *, dtype: str) -> Call:
    """As transformers' Mamba does without kernels for CUDA."""
    x, dt, gate = (_cast(a.swapaxes(1, 2), dtype) for a in (u, delta, z))
    a, b, c, d, bias, first = (torch.from_numpy(p) for p in (A, B, C, D, delta_bias, state))

    def call() -> torch.Tensor:
        h, step = first.clone(), F.softplus(dt + bias[:, None])
        decay = torch.exp(a[None, :, None] * step[..., None])
        added = step[..., None] * b[:, None].float() * x[..., None].float()
        outputs = []
        for t in range(x.shape[-1]):
            h = decay[:, :, t] * h + added[:, :, t]
            outputs.append((h @ c[:, t, :, None])[..., 0])
        y = torch.stack(outputs, dim=-1) + x * d[None, :, None]
        return (y * F.silu(gate)).transpose(1, 2)

    return call


def rg_lru(x: Array, input_gate: Array, recurrence_gate: Array, param: Array, state: Array, *, dtype: str) -> Call:
    """As transformers' RecurrentGemma does: 1 - a^2 as it comes."""
    t, i, r = (_cast(a, dtype) for a in (x, input_gate, recurrence_gate))
    p, first = torch.from_numpy(param), torch.from_numpy(state)

    def call() -> torch.Tensor:
        log_a = -8.0 * torch.sigmoid(r) * F.softplus(p)
        a, factor = torch.exp(log_a), torch.sqrt(1 - torch.exp(2 * log_a))
        added, out, h = t * torch.sigmoid(i) * factor.type(t.dtype), torch.zeros_like(t), first
        for k in range(t.shape[1]):
            h = a[:, k].float() * h + added[:, k].float()
            out[:, k] = h.type(t.dtype)
        return out

    return call


def rms_norm_residual(x: Array, residual: Array, weight: Array, *, dtype: str) -> Call:
    t, r, w = (_cast(a, dtype) for a in (x, residual, weight))
    h = torch.zeros_like(t)
    return lambda: F.rms_norm(torch.add(t, r, out=h), w.shape, w, 1e-6)


def layer_norm_residual(x: Array, residual: Array, weight: Array, bias: Array, *, dtype: str) -> Call:
    t, r, w, b = (_cast(a, dtype) for a in (x, residual, weight, bias))
    h = torch.zeros_like(t)
    return lambda: F.layer_norm(torch.add(t, r, out=h), w.shape, w, b, 1e-5)


def softmax(x: Array, *, dtype: str) -> Call:
    t = _cast(x, dtype)
    out = torch.zeros_like(t)
    return lambda: torch.softmax(t, -1, out=out)


def route_tokens(x: Array, weight: Array, *, dtype: str) -> Call:
    t, w = _cast(x, dtype), _cast(weight, dtype)

    def call() -> Any:
        r = (t @ w).float()
        return r.gather(1, r.topk(r.shape[1] // 8, dim=1).indices.sort(dim=1).values)

    return call


def new_softmax(x: Array, *, dtype: str) -> Call:
    t = _cast(x, dtype)
    return lambda: F.softmax(t, dim=-1)


def rope(x: Array, cos: Array, sin: Array, *, dtype: str) -> Call:
    t = _cast(x, dtype)
    c, s = (_cast(np.concatenate([a, a], axis=-1)[:x.shape[1], None], dtype) for a in (cos, sin))
    return lambda: _rope(t, c, s)


def _rope(t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The usual x cos + rotate_half(x) sin."""
    a, b = t.chunk(2, dim=-1)
    return t * cos + torch.cat((-b, a), dim=-1) * sin


def sinusoidal(x: Array, table: Array, *, dtype: str) -> Call:
    t, added = _cast(x, dtype), _cast(table[:x.shape[1]], dtype)
    out = torch.zeros_like(t)
    return lambda: torch.add(t, added, out=out)


def swiglu(gate: Array, up: Array, *, dtype: str) -> Call:
    a, b = _cast(gate, dtype), _cast(up, dtype)
    out = torch.zeros_like(a)
    return lambda: torch.mul(_C.silu(a, out=out), b, out=out)


def new_swiglu(gate: Array, up: Array, *, dtype: str) -> Call:
    a, b = _cast(gate, dtype), _cast(up, dtype)
    return lambda: F.silu(a) * b


def silu(x: Array, *, dtype: str) -> Call:
    t = _cast(x, dtype)
    out = torch.zeros_like(t)
    return lambda: _C.silu(t, out=out)


def gelu(x: Array, *, dtype: str) -> Call:
    t = _cast(x, dtype)
    out = torch.zeros_like(t)
    return lambda: _C.gelu(t, out=out)


def new_gelu(x: Array, *, dtype: str) -> Call:
    t = _cast(x, dtype)
    return lambda: F.gelu(t)


def gelu_tanh(x: Array, *, dtype: str) -> Call:
    t = _cast(x, dtype)
    out = torch.zeros_like(t)
    return lambda: _C.gelu(t, approximate="tanh", out=out)


def geglu(gate: Array, up: Array, *, dtype: str) -> Call:
    a, b = _cast(gate, dtype), _cast(up, dtype)
    out = torch.zeros_like(a)
    return lambda: torch.mul(_C.gelu(a, out=out), b, out=out)


def swiglu_mlp(x: Array, gate: Array, up: Array, down: Array, *, dtype: str) -> Call:
    t, a, b, c = _cast(x, dtype), *(_transposed(w, dtype) for w in (gate, up, down))
    return lambda: F.linear(F.silu(F.linear(t, a)) * F.linear(t, b), c)


def mlp(x: Array, up: Array, down: Array, *, activation: str, dtype: str) -> Call:
    t, a, b = _cast(x, dtype), _transposed(up, dtype), _transposed(down, dtype)
    if activation == "relu":
        return lambda: F.linear(F.relu(F.linear(t, a)), b)
    return lambda: F.linear(F.gelu(F.linear(t, a), approximate="tanh"), b)


def linear(x: Array, weight: Array, *, dtype: str) -> Call:
    t, w = _cast(x, dtype), _transposed(weight, dtype)
    out = torch.zeros((len(t), len(w)), dtype=t.dtype)
    return lambda: torch.mm(t, w.T, out=out)


def attention(q: Array, k: Array, v: Array, *, dtype: str) -> Call:
    heads_first = [_cast(a, dtype).transpose(1, 2) for a in (q, k, v)]
    return lambda: F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)


def decode(q: Array, k: Array, v: Array, *, dtype: str) -> Call:
    heads_first = [_cast(a, dtype).transpose(1, 2).contiguous() for a in (q, k, v)]
    return lambda: F.scaled_dot_product_attention(*heads_first, enable_gqa=True).transpose(1, 2)


def kv_append(k: Array, v: Array, *, past: int, room: int, dtype: str) -> Call:
    new = [_cast(a, dtype).transpose(1, 2) for a in (k, v)]
    tokens, at = k.shape[1], past
    stores = [torch.zeros((1, k.shape[2], past + room, k.shape[3]), dtype=getattr(torch, dtype)) for _ in range(2)]

    def call() -> None:
        nonlocal at
        if at + tokens > past + room:
            at = past
        for store, added in zip(stores, new, strict=True):
            store[:, :, at:at + tokens] = added
        at += tokens

    return call


def block(x: Array, weights: dict[str, Any], *, past: tuple[Array, Array] | None = None, dtype: str) -> Call:
    w = {name: _transposed(a, dtype) if a.ndim == 2 else _cast(a, dtype)
         for name, a in weights.items() if isinstance(a, Array) and name not in ("cos", "sin")}
    seq, before, dim = x.shape[1], 0 if past is None else past[0].shape[1], w["q"].shape[0] // weights["heads"]
    c, s = (_cast(np.concatenate([weights[n]] * 2, axis=-1)[before:before + seq, None], dtype) for n in ("cos", "sin"))
    t = _cast(x, dtype)
    stores = [torch.zeros((1, weights["kv_heads"], before + seq, dim), dtype=t.dtype) for _ in range(2)]
    for store, old in zip(stores, past or (), strict=False):
        store[:, :, :before] = _cast(old, dtype).transpose(1, 2)

    def call() -> torch.Tensor:
        h = F.rms_norm(t, w["norm1"].shape, w["norm1"], weights["eps"])
        q, k, v = (F.linear(h, w[name]).view(1, seq, -1, dim) for name in "qkv")
        stores[0][:, :, before:] = _rope(k, c, s).transpose(1, 2)
        stores[1][:, :, before:] = v.transpose(1, 2)
        heads = F.scaled_dot_product_attention(_rope(q, c, s).transpose(1, 2), *stores, is_causal=before == 0,
                                               enable_gqa=True)
        y = t + F.linear(heads.transpose(1, 2).reshape(1, seq, -1), w["o"])
        h = F.rms_norm(y, w["norm2"].shape, w["norm2"], weights["eps"])
        return y + F.linear(F.silu(F.linear(h, w["gate"])) * F.linear(h, w["up"]), w["down"])

    return call


if find_spec("transformers"):
    def _llama(folder: Path, dtype: str) -> Any:
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def model_prefill(folder: Path, ids: Array, *, dtype: str) -> Call:
        model, t = _llama(folder, dtype), torch.from_numpy(ids)[None]
        return lambda: model(t, use_cache=True).logits[0]

    def model_decode(folder: Path, ids: Array, *, dtype: str) -> Call:
        from transformers import DynamicCache

        model, steps = _llama(folder, dtype), torch.from_numpy(ids).view(-1, 1, 1)

        def call() -> torch.Tensor:
            cache = DynamicCache(config=model.config)
            for step in steps:
                logits = model(step, past_key_values=cache, use_cache=True).logits
            return logits[0]

        return call
