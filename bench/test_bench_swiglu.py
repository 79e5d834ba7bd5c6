"""SwiGLU: the product alone, and the whole gated MLP of a 1.1B LLaMA (2048 -> 5632 -> 2048)."""
from __future__ import annotations

import pytest

DTYPES = {"float32": 4, "bfloat16": 2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 512, pytest.param(4096, marks=pytest.mark.large)])
def test_swiglu(bench, normal, rows, dtype):
    nbytes = rows * 5632 * DTYPES[dtype]
    bench("swiglu", normal(rows, 5632), normal(rows, 5632), case=f"swiglu {rows} x 5632", dtype=dtype, read=2 * nbytes,
          written=nbytes, hot=rows == 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, pytest.param(512, marks=pytest.mark.large)])
def test_swiglu_mlp(bench, normal, rows, dtype):
    d, hidden = 2048, 5632
    up, gate = normal(d, hidden, scale=d ** -0.5), normal(d, hidden, scale=d ** -0.5)
    bench("swiglu_mlp", normal(rows, d), up, gate, normal(hidden, d, scale=hidden ** -0.5), dtype=dtype,
          case=f"SwiGLU MLP 2048 -> 5632, M {rows}", read=3 * d * hidden * DTYPES[dtype] + 4 * rows * d,
          written=4 * rows * d, flops=6 * rows * d * hidden)


@pytest.mark.large
def test_new_swiglu(bench, normal):
    nbytes = 4096 * 5632 * 4
    bench("new_swiglu", normal(4096, 5632), normal(4096, 5632), case="swiglu 4096 x 5632, new result",
          read=2 * nbytes, written=nbytes)
