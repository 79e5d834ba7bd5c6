"""Depthwise causal convolution of width 4: prompts of mamba-130m's and mamba-2.8b's channels, and one token."""
from __future__ import annotations

import pytest

DTYPES = {"float32": 4, "bfloat16": 2}
LARGE = pytest.mark.large
SIZES = [(1, 1536), (1, 5120), (512, 1536),
         pytest.param(4096, 1536, marks=LARGE), pytest.param(2048, 5120, marks=LARGE)]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seq", "channels"), SIZES)
def test_causal_conv1d(bench, normal, seq, channels, dtype, activation):
    nbytes = seq * channels * DTYPES[dtype]
    bench("causal_conv1d", normal(1, seq, channels), normal(channels, 4), normal(channels), activation=activation,
          case=f"causal_conv1d{' and silu' if activation else ''}, {seq} x {channels}", dtype=dtype, read=nbytes,
          written=nbytes, hot=seq == 1)


@pytest.mark.parametrize("seq", [512])
def test_causal_conv1d_by_tokens(bench, normal, seq):
    """NumPy as a loop over tokens."""
    nbytes = seq * 1536 * 4
    bench("causal_conv1d_by_tokens", normal(1, seq, 1536), normal(1536, 4), normal(1536), activation=None,
          case=f"causal_conv1d, {seq} x 1536", variant="float32, token by token", read=nbytes, written=nbytes)
