"""LayerNorm, at the sizes of RMSNorm."""
from __future__ import annotations

import pytest

DTYPES = {"float32": 4, "bfloat16": 2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 768), (1, 4096), (512, 4096),
                                           pytest.param(8192, 4096, marks=pytest.mark.large)])
def test_layer_norm(bench, normal, rows, dim, dtype):
    nbytes = rows * dim * DTYPES[dtype]
    bench("layer_norm", normal(rows, dim), normal(dim), normal(dim), case=f"layer_norm {rows} x {dim}", dtype=dtype,
          read=nbytes, written=nbytes, hot=rows == 1)
