"""RMSNorm: one row as in decoding, a prompt's rows, and more rows than any cache holds."""
from __future__ import annotations

import pytest

DTYPES = {"float32": 4, "bfloat16": 2}
SIZES = [(1, 768), (1, 4096), (512, 4096), pytest.param(8192, 4096, marks=pytest.mark.large)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), SIZES)
def test_rms_norm(bench, normal, rows, dim, dtype):
    nbytes = rows * dim * DTYPES[dtype]
    bench("rms_norm", normal(rows, dim), normal(dim), case=f"rms_norm {rows} x {dim}", dtype=dtype, read=nbytes,
          written=nbytes, hot=rows == 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), SIZES)
def test_rms_norm_residual(bench, normal, rows, dim, dtype):
    nbytes = rows * dim * DTYPES[dtype]
    bench("rms_norm_residual", normal(rows, dim), normal(rows, dim), normal(dim),
          case=f"rms_norm of a sum, {rows} x {dim}", dtype=dtype, read=2 * nbytes, written=2 * nbytes, hot=rows == 1)


@pytest.mark.large
def test_new_rms_norm(bench, normal):
    nbytes = 8192 * 4096 * 4
    bench("new_rms_norm", normal(8192, 4096), normal(4096), case="rms_norm 8192 x 4096, new result", read=nbytes,
          written=nbytes)
