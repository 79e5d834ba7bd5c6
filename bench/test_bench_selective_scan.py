"""Mamba's scan with 16 states: prompts of mamba-130m's and mamba-2.8b's channels, and one token."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

DTYPES = {"float32": 4, "bfloat16": 2}
LARGE, STATES = pytest.mark.large, 16
SIZES = [(1, 1536), (1, 5120), (512, 1536),
         pytest.param(8192, 1536, marks=LARGE), pytest.param(2048, 5120, marks=LARGE)]


def inputs(normal: Any, seq: int, channels: int) -> tuple[np.ndarray, ...]:
    a = -np.tile(np.arange(1, STATES + 1, dtype=np.float32), (channels, 1))
    return (normal(1, seq, channels), normal(1, seq, channels), a, normal(1, seq, STATES), normal(1, seq, STATES),
            normal(channels), normal(1, seq, channels), normal(channels) - 4, normal(1, channels, STATES))


def moved(seq: int, channels: int, size: int) -> dict[str, int]:
    """u, delta, z and y; B and C; A and the state, which is also written."""
    tokens, states = seq * channels * size, channels * STATES * 4
    return {"read": 3 * tokens + 2 * seq * STATES * size + 2 * states, "written": tokens + states}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seq", "channels"), SIZES)
def test_selective_scan(bench, normal, seq, channels, dtype):
    bench("selective_scan", *inputs(normal, seq, channels), case=f"selective_scan, {seq} x {channels}", dtype=dtype,
          hot=seq == 1, curve=f"{channels} channels", length=seq, **moved(seq, channels, DTYPES[dtype]))


def test_selective_scan_by_tokens(bench, normal):
    """NumPy as a loop over tokens."""
    bench("selective_scan_by_tokens", *inputs(normal, 512, 1536), case="selective_scan, 512 x 1536",
          variant="float32, token by token", **moved(512, 1536, 4))
