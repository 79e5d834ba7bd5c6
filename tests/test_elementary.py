"""The errors in ulp that docs/accuracy.md states, at every 4099th float32; tools/measure_ulp.sh looks at every one."""

from __future__ import annotations

import functools
import platform
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import reference as ref
from child import compile_c
from conftest import DTYPES

import forge_c as fc

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "accuracy.md").read_text()


def softmax_of_two(x):
    """The share of x beside 0, which is e^x itself where 1 + e^x is 1."""
    return fc.softmax(np.stack([x, np.zeros_like(x)], axis=-1))[:, 0]


def capped_score(x):
    """tanh(x): over one key the log of the denominator is its score, here x capped at 1."""
    one = np.ones((1, 1, 1, 1), np.float32)
    return fc.attention(x.reshape(1, -1, 1, 1), one, one, scale=1.0, softcap=1.0, return_lse=True)[1].ravel()


def decay(x):
    """2^x: what is left of a state of 1. log 2 times the kernel's log2(e) is 1 as a float32; A is x."""
    one = np.ones((1, len(x), 1), np.float32)
    step = np.full((1, 1, len(x)), np.log(2), np.float32)
    return fc.selective_scan(0 * step, step, x[:, None], one[:, :1], one[:, :1], state=one)[1].ravel()


def step(x):
    """softplus(x): the state after an input of 1."""
    one = np.ones((1, 1, len(x)), np.float32)
    key = one[:, :, :1]
    return fc.selective_scan(one, x.reshape(one.shape), -one.reshape(-1, 1), key, key, delta_softplus=True)[1].ravel()


# Up to which x the public function shows the elementary one; the function; the formula.
CASES = {
    "exp": (-17.5, softmax_of_two, np.exp),
    "exp2": (np.inf, decay, np.exp2),
    "softplus": (np.inf, step, lambda x: np.logaddexp(0, x)),
    "softmax": (np.inf, softmax_of_two, lambda x: 1 / (1 + np.exp(-x))),
    "tanh": (np.inf, capped_score, np.tanh),
    "silu": (np.inf, fc.silu, ref.silu),
    "gelu": (np.inf, fc.gelu, ref.gelu),
    "gelu_tanh": (np.inf, lambda x: fc.gelu(x, approximate="tanh"), lambda x: ref.gelu(x, approximate="tanh")),
}


def figures(name):
    """The page's figures for a function: the columns of its row, each one or two numbers, base's being the second."""
    row = re.search(rf"^\| {name} \| (.*) \|$", PAGE, re.MULTILINE)[1].replace("%", "")
    return [[float(figure) for figure in cell.split("/")] for cell in row.split("|")]


@functools.cache
def numbers(name):
    """Every 4099th float32, and where the page says that the error is largest; the exact results."""
    x = np.append(np.arange(0, 2**32, 4099).astype(np.uint32).view(np.float32), np.float32(figures(name)[1]))
    x = x[np.isfinite(x) & (x <= CASES[name][0])]
    with np.errstate(over="ignore"):
        return x, CASES[name][2](x.astype(np.float64))


@pytest.mark.parametrize("name", CASES)
def test_errors_are_those_of_the_page(isa, name):
    x, y = numbers(name)
    got, size = CASES[name][1](x), abs(y)
    per_ulp = 2.0 ** (24 - np.frexp(np.clip(size, 2.0**-126, 2.0**127))[1])
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.where(got == y.astype(np.float32), 0, abs(got - y) * per_ulp)
    normal, _, small, subnormal, _ = (max(cell) if isa == "base" else cell[0] for cell in figures(name))
    limit = np.where(size >= 2.0**-119, normal, np.where(size >= 2.0**-126, small, subnormal))
    at = np.flatnonzero(~(error <= limit))
    assert not at.size, f"{name}({x[at[0]]!r}) is {error[at[0]]:.4g} ulp off, {limit[at[0]]} in docs/accuracy.md"


# ---- of 16 bits -------------------------------------------------------------------------------------

OF_16_BITS = ("softmax", "silu", "gelu", "gelu_tanh")
# The exponent of the smallest normal number, and the digits.
FORMATS = {"bfloat16": (-126, 8), "float16": (-14, 11)}


@pytest.mark.parametrize("name", OF_16_BITS)
def test_errors_of_16_bits_are_those_of_the_page(isa, name):
    """All finite numbers. Under 2^-126 a result may be 0 that has an exponential which float32 does not hold."""
    for column, (dtype, (exponent, digits)) in enumerate(FORMATS.items()):
        x = np.arange(1 << 16).astype(np.uint16).view(DTYPES[dtype])
        x = x[np.isfinite(x.astype(np.float32))]
        with np.errstate(over="ignore"):
            y = CASES[name][2](x.astype(np.float64))
        got, size = CASES[name][1](x).astype(np.float64), abs(y)
        ulp = 2.0 ** (np.maximum(np.frexp(size)[1] - 1, exponent) - digits + 1)
        limit = figures(f"{name} of 16 bits")[column][isa.startswith("avx512")] * ulp
        if name in ("softmax", "gelu"):
            limit = np.where(size < 2.0**-126, np.maximum(limit, size), limit)
        at = np.flatnonzero(~(abs(got - y) <= limit))
        assert not at.size, f"{name}({x[at[0]]}) is {got[at[0]]}, exactly {y[at[0]]}, {dtype}; {at.size} are off"


BEFORE_ROUNDING = ("exp_negative_short", "gelu_bf16")


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64" or "avx2" not in fc.available_isas(), reason="this CPU has no AVX2")
@pytest.mark.parametrize("nbytes", (32, 64))
def test_errors_before_the_rounding_to_16_bits_are_those_of_the_page(tmp_path, nbytes):
    """By tools/measure_ulp.c at every 997th thousand of floats; AVX-512 in software where the CPU has none."""
    software = [] if nbytes == 32 or any(isa.startswith("avx512") for isa in fc.available_isas()) else [
        "-DFC_SOFTWARE_AVX512", "-Wno-psabi", f"-I{ROOT / 'tools' / 'avx512_in_software'}"]
    compile_c("-std=gnu11", "-O1", "-fno-math-errno", "-ffp-contract=off", f"-DFC_BYTES={nbytes}", *software,
              f"-I{ROOT / 'src_c'}", ROOT / "tools" / "measure_ulp.c", "-lm", "-o", tmp_path / "measure")
    told = subprocess.run([tmp_path / "measure", "997", *BEFORE_ROUNDING], capture_output=True, text=True, check=True)
    for name in BEFORE_ROUNDING:
        cells = re.search(rf"^\| {name} \| (.*) \|$", told.stdout, re.M)[1].split("|")
        normal, _, of_x = (cell[-1 if nbytes == 64 else 0] for cell in figures(name))
        assert float(cells[1]) <= normal, (name, cells)
        assert name != "gelu_bf16" or float(cells[7]) <= of_x, (name, cells)
