"""Rotary positions of 32 heads of 128 channels: one token, and prompts."""
from __future__ import annotations

import numpy as np
import pytest

DTYPES = {"float32": 4, "bfloat16": 2}


def tables(seq: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    angles = np.outer(np.arange(seq), 10000.0 ** (-np.arange(0, dim, 2) / dim))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq", [1, 512, 2048])
def test_rope(bench, normal, seq, dtype):
    nbytes = seq * 32 * 128 * DTYPES[dtype]
    bench("rope", normal(1, seq, 32, 128), *tables(seq, 128), case=f"rope L {seq}, 32 heads of 128", dtype=dtype,
          read=nbytes, written=nbytes, hot=seq == 1)
