"""Activations, and the gated ones that are not SwiGLU, over a token's and many tokens' channels."""
from __future__ import annotations

import pytest

DTYPES = {"float32": 4, "bfloat16": 2}
ROWS = [1, 512, pytest.param(4096, marks=pytest.mark.large)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("op", ["silu", "gelu", "gelu_tanh"])
def test_activation(bench, normal, op, rows, dtype):
    nbytes = rows * 5632 * DTYPES[dtype]
    bench(op, normal(rows, 5632), case=f"{op} {rows} x 5632", dtype=dtype, read=nbytes, written=nbytes, hot=rows == 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_geglu(bench, normal, rows, dtype):
    nbytes = rows * 5632 * DTYPES[dtype]
    bench("geglu", normal(rows, 5632), normal(rows, 5632), case=f"geglu {rows} x 5632", dtype=dtype, read=2 * nbytes,
          written=nbytes, hot=rows == 1)


@pytest.mark.large
def test_new_gelu(bench, normal):
    nbytes = 4096 * 5632 * 4
    bench("new_gelu", normal(4096, 5632), case="gelu 4096 x 5632, new result", read=nbytes, written=nbytes)
