"""Griffin's recurrence: prompts and a step at the width of recurrentgemma-2b, and a prompt of recurrentgemma-9b's."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

DTYPES = {"float32": 4, "bfloat16": 2}
SIZES = [(1, 2560), (512, 2560), pytest.param(8192, 2560, marks=pytest.mark.large),
         pytest.param(2048, 4096, marks=pytest.mark.large)]


def inputs(normal: Any, seq: int, channels: int) -> tuple[np.ndarray, ...]:
    """x, the gates' logits, param, the state."""
    return (normal(1, seq, channels), normal(1, seq, channels), normal(1, seq, channels), normal(channels) - 4,
            normal(1, channels))


def moved(seq: int, channels: int, size: int) -> dict[str, int]:
    """x, two gates and y; param and the state, which is also written."""
    tokens = seq * channels * size
    return {"read": 3 * tokens + 8 * channels, "written": tokens + 4 * channels}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seq", "channels"), SIZES)
def test_rg_lru(bench, normal, seq, channels, dtype):
    bench("rg_lru", *inputs(normal, seq, channels), case=f"rg_lru, {seq} x {channels}", dtype=dtype, hot=seq == 1,
          curve=f"{channels} channels", length=seq, **moved(seq, channels, DTYPES[dtype]))


def test_rg_lru_by_tokens(bench, normal):
    """NumPy as a loop over tokens."""
    bench("rg_lru_by_tokens", *inputs(normal, 512, 2560), case="rg_lru, 512 x 2560", variant="float32, token by token",
          **moved(512, 2560, 4))
