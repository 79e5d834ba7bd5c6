"""Softmax over the last axis: the logits of one token, and rows of scores."""
from __future__ import annotations

import pytest

DTYPES = {"float32": 4, "bfloat16": 2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 32000), (4096, 2048)])
def test_softmax(bench, normal, rows, dim, dtype):
    nbytes = rows * dim * DTYPES[dtype]
    bench("softmax", normal(rows, dim), case=f"softmax {rows} x {dim}", dtype=dtype, read=nbytes, written=nbytes,
          hot=rows == 1)


@pytest.mark.large
def test_new_softmax(bench, normal):
    nbytes = 4096 * 2048 * 4
    bench("new_softmax", normal(4096, 2048), case="softmax 4096 x 2048, new result", read=nbytes, written=nbytes)
