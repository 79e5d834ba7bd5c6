"""What a modern component costs beside the one it replaces; each pair is one group."""
from __future__ import annotations

import numpy as np
import pytest
from test_bench_rope import tables


@pytest.mark.parametrize("rows", [1, 512])
@pytest.mark.parametrize("norm", ["RMSNorm", "LayerNorm"])
def test_norms(bench, normal, norm, rows):
    x, weight, bias = normal(rows, 4096), normal(4096), normal(4096)
    op, inputs = ("rms_norm", (x, weight)) if norm == "RMSNorm" else ("layer_norm", (x, weight, bias))
    bench(op, *inputs, case=f"RMSNorm or LayerNorm, {rows} x 4096", variant=norm, read=x.nbytes, written=x.nbytes,
          hot=rows == 1)


@pytest.mark.parametrize("kind", ["RoPE", "sinusoidal"])
def test_positions(bench, normal, kind):
    """RoPE turns a layer's queries; a sinusoidal encoding is added to the embeddings once, before all layers."""
    x = normal(1, 2048, 32, 64)
    added = np.stack(tables(2048, 2048)[::-1], axis=-1).reshape(2048, 2048)
    op, inputs = ("rope", (x, *tables(2048, 64))) if kind == "RoPE" else (
        "sinusoidal", (x.reshape(1, 2048, 2048), added))
    bench(op, *inputs, case="RoPE or sinusoidal, L 2048, 2048 channels", variant=kind, read=x.nbytes, written=x.nbytes)


@pytest.mark.parametrize("rows", [1, 512])
@pytest.mark.parametrize("kind", ["SwiGLU", "gelu", "relu"])
def test_mlps(bench, normal, kind, rows):
    """Three matrices 768 x 2048 against two of 768 x 3072: as many parameters, as many operations."""
    d, hidden = 768, 2048 if kind == "SwiGLU" else 3072
    ups = [normal(d, hidden, scale=d ** -0.5) for _ in range(2 if kind == "SwiGLU" else 1)]
    down, options = normal(hidden, d, scale=hidden ** -0.5), {} if kind == "SwiGLU" else {"activation": kind}
    size = sum(w.size for w in ups) + down.size
    bench("swiglu_mlp" if kind == "SwiGLU" else "mlp", normal(rows, d), *ups, down,
          case=f"SwiGLU, GELU or ReLU MLP of 4.7 M parameters, M {rows}", read=4 * (size + rows * d),
          written=4 * rows * d, flops=2 * rows * size, **options,
          variant={"SwiGLU": "SwiGLU", "gelu": "GELU", "relu": "ReLU"}[kind])


def cache_note(impl: str, kv_heads: int) -> str:
    if impl != "forge_c":
        return ""
    from forge_c import kv_cache_nbytes

    size, full = (kv_cache_nbytes(1, 4096, heads, 64) for heads in (kv_heads, 12))
    return f"KV cache {size / 2**20:.1f} MiB a layer, {100 * size / full:.1f} %"


@pytest.mark.parametrize("kv_heads", [12, 3, 2, 1])
@pytest.mark.parametrize("seq", [1, 512])
def test_heads(bench, normal, impl, kv_heads, seq):
    """12 query heads of 64 channels; as many key/value heads (MHA), fewer (GQA), one (MQA)."""
    keys = 4096 if seq == 1 else seq
    q, (k, v) = normal(1, seq, 12, 64), normal(2, 1, keys, kv_heads, 64)
    name = {12: "MHA", 1: "MQA"}.get(kv_heads, "GQA")
    pairs = keys if seq == 1 else seq * (seq + 1) // 2
    bench("decode" if seq == 1 else "attention", q, k, v, variant=f"{name}, {kv_heads} KV heads",
          case=f"GQA or MHA, {'one token against 4096 keys' if seq == 1 else 'a prompt of 512'}", hot=seq > 1,
          read=k.nbytes + v.nbytes + q.nbytes, written=q.nbytes, flops=4 * 12 * 64 * pairs,
          note=cache_note(impl, kv_heads))
