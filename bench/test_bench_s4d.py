"""S4D with 512 channels of 32 modes: the recurrence over prompts and a token, and the kernel of the convolution."""
from __future__ import annotations

import numpy as np
import pytest

CHANNELS, MODES = 512, 32
LARGE = pytest.mark.large


def system(normal) -> tuple[np.ndarray, ...]:
    a = np.tile(-0.5 + 1j * np.pi * np.arange(MODES), (CHANNELS, 1)).astype(np.complex64)
    c = (normal(CHANNELS, MODES) + 1j * normal(CHANNELS, MODES)).astype(np.complex64)
    dt = np.exp(np.random.default_rng(1).uniform(np.log(1e-3), np.log(0.1), CHANNELS)).astype(np.float32)
    return a, np.ones_like(a), c, dt


@pytest.mark.parametrize("seq", [1, 1024, pytest.param(8192, marks=LARGE)])
def test_scan(bench, normal, seq):
    u = normal(1, seq, CHANNELS)
    bench("s4d_scan", u, *system(normal), case=f"s4d_scan L {seq}, 512 channels, 32 modes", hot=True, read=u.nbytes,
          written=u.nbytes, flops=14 * u.size * MODES, curve="s4d_scan", length=seq)


@pytest.mark.parametrize("seq", [1024, pytest.param(8192, marks=LARGE)])
def test_scan_by_fft(bench, normal, seq):
    """NumPy with the convolution in the place of the recurrence."""
    u = normal(1, seq, CHANNELS)
    bench("s4d_scan_fft", u, *system(normal), case=f"s4d_scan L {seq}, 512 channels, 32 modes", hot=True,
          variant="float32, by FFT", read=u.nbytes, written=u.nbytes, flops=14 * u.size * MODES)


def test_kernel(bench, normal):
    bench("s4d_kernel", *system(normal), taps=1024, case="s4d_kernel of 1024, 512 channels, 32 modes", hot=True,
          written=CHANNELS * 1024 * 4, flops=8 * CHANNELS * MODES * 1024)
