"""How far a state is off after a million tokens: each scan beside tests/reference.py in float64, as a markdown table.

    python tools/measure_drift.py [tokens]       # 1 000 000 by default; four minutes

An error is stated next to what the state sums up: the same scan in float64 over magnitudes, that is over |x|, |B| and
|state|. It is the largest of all numbers of the state. "half-life" is after how many tokens half of one is forgotten:
the longer, the more roundings a state remembers. A fresh Mamba's are 0.4 to 700. Inputs are Gaussian with steps that
vary, 0.75 to 1.5 of their mean, or everything is constant: then all roundings go one way, that of the decay too.
"""
from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import forge_c as fc

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import reference as ref

N = 4  # numbers of state for each channel
HALF_LIVES = 7, 700, 7_000, 700_000
DECAYS = [math.log(2) / tokens for tokens in HALF_LIVES]
Draw = Callable[..., np.ndarray]
Scan = tuple[Any, np.ndarray, np.ndarray]  # the state in float32, in float64, and of magnitudes


def steps(draw: Draw, *shape: int) -> np.ndarray:
    """Each channel's decay; where what is drawn varies, 0.75 to 1.5 of it."""
    return (np.array(DECAYS) * np.minimum(0.75 + 0.25 * draw(*shape) ** 2, 1.5)).astype(np.float32)


def selective_scan(seq: int, rng: np.random.Generator, draw: Draw) -> Scan:
    """A channel for each decay, A = -1."""
    channels = len(DECAYS)
    u, b, dt = draw(1, seq, channels), draw(1, seq, N), steps(draw, 1, seq, channels)
    A, c = -np.ones((channels, N), np.float32), np.zeros((1, seq, N), np.float32)
    want, size = (ref.selective_scan(f(u), dt, A, f(b), c)[1] for f in (ref.f64, np.abs))
    return fc.selective_scan(u, dt, A, b, c)[1][0], want[0], size[0]


def ssd_scan(seq: int, rng: np.random.Generator, draw: Draw) -> Scan:
    """A head of one channel for each decay."""
    heads = len(DECAYS)
    x, b, dt = draw(1, seq, heads, 1), draw(1, seq, 1, N), steps(draw, 1, seq, heads)
    A, c = -np.ones(heads, np.float32), np.zeros((1, seq, 1, N), np.float32)
    want, size = (ref.ssd_scan(f(x), dt, A, f(b), c)[1] for f in (ref.f64, np.abs))
    return fc.ssd_scan(x, dt, A, b, c)[1][0], want[0], size[0]


def s4d_scan(seq: int, rng: np.random.Generator, draw: Draw) -> Scan:
    """A channel for each decay, N frequencies. What it sums up: with |dA| and |dB u| in their place."""
    A = (-np.array(DECAYS)[:, None] + 1j * np.array([0, 1e-3, 0.1, 2])).astype(np.complex64)
    one, dt, u = np.ones_like(A), np.ones(len(DECAYS), np.float32), draw(1, seq, len(DECAYS))
    da, db = ref.s4d_system(A, one, dt)
    size = np.zeros(A.shape)
    for t in range(seq):
        size = np.abs(da) * size + np.abs(db) * np.abs(u[0, t])[:, None]
    return fc.s4d_scan(u, A, one, one, dt)[1][0], ref.s4d_scan(u, A, one, one, dt)[1][0], size


def gated(seq: int, rng: np.random.Generator, draw: Draw) -> Scan:
    """A head of n keys and one value for each decay, without the delta rule, so that magnitudes add up."""
    heads = len(DECAYS)
    k, v, g = draw(1, seq, heads, N), draw(1, seq, heads, 1), -steps(draw, 1, seq, heads)
    want, size = (ref.gated_delta(f(k), f(k), f(v), g)[1] for f in (ref.f64, np.abs))
    return fc.gated_delta(k, k, v, g, rule="gated")[1][0], want[0], size[0]


def gated_delta(seq: int, rng: np.random.Generator, draw: Draw) -> Scan:
    """With keys of length 1; next to the largest value, as it has no magnitudes that add up."""
    heads = len(DECAYS)
    k, v, g = draw(1, seq, heads, N), draw(1, seq, heads, 1), -steps(draw, 1, seq, heads)
    k, beta = k / np.linalg.norm(k, axis=-1, keepdims=True), rng.uniform(0, 1, (1, seq, heads)).astype(np.float32)
    want = ref.gated_delta(k, k, v, g, ref.f64(beta))[1][0]  # as float64, or each of its steps makes it so
    return fc.gated_delta(k, k, v, g, beta)[1][0], want, np.full(want.shape, np.abs(v).max())


def row(scan: Callable[[int, np.random.Generator, Draw], Scan], name: str, seq: int, constant: bool) -> str:
    """A line of the table: the largest error of each decay."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return np.ones(shape, np.float32) if constant else rng.standard_normal(shape, np.float32)

    got, want, size = scan(seq, rng, draw)
    errors = (np.abs(got - want) / size).reshape(len(DECAYS), -1).max(axis=1)
    return f"| {name} | {'constant' if constant else 'Gaussian'} | {' | '.join(f'{e:.1e}' for e in errors)} |"


def main() -> None:
    seq, begin = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000, time.perf_counter()
    print(f"| after {seq:,} tokens | inputs | {' | '.join(f'half-life {n:,}' for n in HALF_LIVES)} |")
    print(f"|---|---|{'--:|' * len(HALF_LIVES)}")
    for scan, name in ((selective_scan, "selective_scan"), (ssd_scan, "ssd_scan"), (s4d_scan, "s4d_scan"),
                       (gated, 'gated_delta, rule="gated"'), (gated_delta, "gated_delta")):
        for constant in (False, True):
            print(row(scan, name, seq, constant), flush=True)
    print(f"{fc.isa()}, {time.perf_counter() - begin:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
