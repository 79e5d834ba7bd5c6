"""LayerNorm, at the sizes of RMSNorm."""
from __future__ import annotations

import pytest

DTYPES = {"float32": 4, "bfloat16": 2}
SIZES = [(1, 768), (1, 4096), (512, 4096), pytest.param(8192, 4096, marks=pytest.mark.large)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), SIZES)
def test_layer_norm(bench, normal, rows, dim, dtype):
    nbytes = rows * dim * DTYPES[dtype]
    bench("layer_norm", normal(rows, dim), normal(dim), normal(dim), case=f"layer_norm {rows} x {dim}", dtype=dtype,
          read=nbytes, written=nbytes, hot=rows == 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), SIZES)
def test_layer_norm_residual(bench, normal, rows, dim, dtype):
    nbytes = rows * dim * DTYPES[dtype]
    bench("layer_norm_residual", normal(rows, dim), normal(rows, dim), normal(dim), normal(dim),
          case=f"layer_norm of a sum, {rows} x {dim}", dtype=dtype, read=2 * nbytes, written=2 * nbytes, hot=rows == 1)
