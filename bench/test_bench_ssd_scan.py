"""Mamba-2's scan: prompts and a step at the sizes of mamba2-130m (24 heads of 64, n 128) and mamba2-2.7b (80 heads)."""
from __future__ import annotations

import numpy as np
import pytest

P, N, CHUNK = 64, 128, 64
LARGE = pytest.mark.large


def inputs(normal, seq: int, heads: int) -> tuple[np.ndarray, ...]:
    dt = np.abs(normal(1, seq, heads, scale=0.1))
    return normal(1, seq, heads, P), dt, -np.exp(normal(heads)), normal(1, seq, 1, N), normal(1, seq, 1, N)


def least_flops(seq: int, heads: int) -> int:
    """Of the chunked form, which has fewer than token after token: C B^T once for all heads, and for each head that
    times x, C h and the chunk's share of h."""
    chunk = min(CHUNK, seq)
    return seq * (heads * (4 * N * P + chunk * P) + chunk * N)


@pytest.mark.parametrize(("seq", "heads"), [(512, 24), pytest.param(2048, 24, marks=LARGE),
                                            pytest.param(512, 80, marks=LARGE)])
def test_prompt(bench, normal, seq, heads):
    given = inputs(normal, seq, heads)
    bench("ssd_scan", *given, case=f"ssd_scan L {seq}, {heads} heads of 64, n 128", hot=True, read=given[0].nbytes,
          written=given[0].nbytes, flops=least_flops(seq, heads), curve=f"{heads} heads", length=seq)


@pytest.mark.parametrize("seq", [512, pytest.param(2048, marks=LARGE)])
def test_prompt_in_chunks(bench, normal, seq):
    """NumPy with the chunked form written by hand."""
    given = inputs(normal, seq, 24)
    bench("ssd_scan_chunked", *given, case=f"ssd_scan L {seq}, 24 heads of 64, n 128", variant="float32, in chunks",
          hot=True, read=given[0].nbytes, written=given[0].nbytes, flops=least_flops(seq, 24))


@pytest.mark.parametrize("heads", [24, pytest.param(80, marks=LARGE)])
def test_step(bench, normal, heads):
    state = normal(1, heads, P, N)
    bench("ssd_step", *inputs(normal, 1, heads), state, case=f"ssd_scan, one token, {heads} heads of 64, n 128",
          read=state.nbytes, written=state.nbytes, flops=5 * heads * N * P)
