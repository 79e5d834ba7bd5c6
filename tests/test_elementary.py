"""The errors in ulp that docs/accuracy.md states, at every 4099th float32; tools/measure_ulp.sh looks at every one."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
import pytest
import reference as ref

import forge_c as fc

PAGE = (Path(__file__).parent.parent / "docs" / "accuracy.md").read_text()


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
