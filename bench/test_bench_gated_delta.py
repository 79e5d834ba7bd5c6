"""The gated delta rule at the sizes of Qwen3-Next (32 heads of v, keys and values of 128): prompts and a step."""
from __future__ import annotations

import numpy as np
import pytest

HEADS, N, P = 32, 128, 128
LARGE = pytest.mark.large


def inputs(normal, seq: int) -> tuple[np.ndarray, ...]:
    q, k, v = normal(1, seq, HEADS, N), normal(1, seq, HEADS, N), normal(1, seq, HEADS, P)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = np.random.default_rng(1).random((1, seq, HEADS), np.float32)
    return q, k, v, -np.abs(normal(1, seq, HEADS, scale=0.1)), beta


@pytest.mark.parametrize("seq", [512, pytest.param(2048, marks=LARGE)])
def test_prompt(bench, normal, seq):
    given = inputs(normal, seq)
    bench("gated_delta", *given, case=f"gated_delta L {seq}, 32 heads of 128", hot=True,
          read=sum(a.nbytes for a in given[:3]), written=given[2].nbytes, flops=7 * seq * HEADS * N * P,
          curve="gated delta rule", length=seq)


@pytest.mark.parametrize("seq", [512, pytest.param(2048, marks=LARGE)])
def test_prompt_in_chunks(bench, normal, seq):
    """NumPy with the chunked form written by hand."""
    given = inputs(normal, seq)
    bench("gated_delta_chunked", *given, case=f"gated_delta L {seq}, 32 heads of 128", variant="float32, in chunks",
          hot=True, read=sum(a.nbytes for a in given[:3]), written=given[2].nbytes, flops=7 * seq * HEADS * N * P)


def test_step(bench, normal):
    state = normal(1, HEADS, N, P)
    bench("gated_delta_step", *inputs(normal, 1), state, case="gated_delta, one token, 32 heads of 128",
          read=state.nbytes, written=state.nbytes, flops=7 * HEADS * N * P)
