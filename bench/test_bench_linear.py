"""linear with the weight of a 7B LLaMA's MLP, 4096 -> 11008: from one token to a prompt."""
from __future__ import annotations

import pytest

DTYPES = {"float32": 4, "bfloat16": 2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, *(pytest.param(rows, marks=pytest.mark.large) for rows in (4, 128, 512))])
def test_linear(bench, normal, rows, dtype):
    k, n = 4096, 11008
    bench("linear", normal(rows, k), normal(k, n, scale=k ** -0.5), case=f"linear 4096 -> 11008, M {rows}", dtype=dtype,
          read=k * n * DTYPES[dtype] + 4 * rows * k, written=4 * rows * n, flops=2 * rows * k * n)
