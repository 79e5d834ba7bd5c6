"""The C program and the Cython module of examples/ compute what is right, built against the forge_c under test."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import reference as ref
from child import PACKAGE_PARENT
from numpy.typing import NDArray
from suite import built_once

import forge_c as fc

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"
# Of decode.c.
LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, TOKENS = 4, 256, 688, 8, 2, 32, 64
SHAPES = [((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN), (HIDDEN, HEADS * HEAD_DIM), (INNER, HIDDEN), (INNER, HIDDEN),
          (HIDDEN, INNER)]


def run(folder: Path, *command: str | Path) -> str:
    """The output of a command in `folder`, where Python finds the forge_c under test."""
    path = os.pathsep.join(filter(None, [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def built(config: pytest.Config, example: str, files: list[str], *command: str) -> Path:
    """The folder of these files of an example, where this command has been run, once for all workers."""
    def build(folder: Path) -> None:
        for file in files:
            shutil.copy(EXAMPLES / example / file, folder)
        run(folder, *command)

    return built_once(config, example, build)


@pytest.fixture(scope="session")
def c_pipeline(pytestconfig: pytest.Config) -> Path:
    """The folder of the built program."""
    return built(pytestconfig, "c_pipeline", ["Makefile", "decode.c"], "make", f"PYTHON={sys.executable}",
                 "CFLAGS=-O2 -Wall -Wextra -Wconversion -Werror")


@pytest.fixture(scope="session")
def cython_pipeline(pytestconfig: pytest.Config) -> Path:
    """The folder of the built module."""
    return built(pytestconfig, "cython_pipeline", ["block.pyx", "run.py", "setup.py"], sys.executable, "setup.py",
                 "build_ext", "--inplace")


@pytest.fixture
def pipeline(cython_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """run.py, which imports the built module into this process."""
    monkeypatch.syspath_prepend(cython_pipeline)
    return importlib.import_module("run")


def numbers(count: int) -> NDArray[np.float64]:
    """The first `count` of decode.c's random numbers from -1 to 1: state n is a^n + c (1 + a + ... + a^(n-1))."""
    powers = np.cumprod(np.full(count, 6364136223846793005, np.uint64))
    below = np.cumsum(np.concatenate([np.ones(1, np.uint64), powers[:-1]]))
    states = powers + np.uint64(1442695040888963407) * below
    return (states >> np.uint64(40)) / 2.0**23 - 1


def blocks_in_float64(x: NDArray[np.float64], layers: list[list[NDArray[np.float32]]]) -> NDArray[np.float64]:
    """x (seq, HIDDEN) through blocks of weights (out, in), each token after those before it."""
    h, at = x[None], np.arange(len(x))
    angles = ref.rope_angles(ref.rope_frequency(HEAD_DIM), len(x))
    for qkv, out, gate, up, down in layers:
        heads = ref.linear(ref.rms_norm(h), qkv.T).reshape(1, len(x), -1, HEAD_DIM)
        turned = ref.rope(heads[:, :, :-KV_HEADS], np.cos(angles), np.sin(angles), at)
        seen, _ = ref.attention(turned[:, :, :HEADS], turned[:, :, HEADS:], heads[:, :, -KV_HEADS:], causal=True)
        h = ref.linear(seen.reshape(1, len(x), -1), out.T, residual=h)
        h = ref.linear(ref.gated_linear(ref.rms_norm(h), gate.T, up.T), down.T, residual=h)
    return h[0]


def test_the_c_program_computes_what_the_reference_says(c_pipeline):
    said = run(c_pipeline, "./decode", "tokens")
    got = np.fromfile(c_pipeline / "tokens", np.float32).reshape(TOKENS, HIDDEN)
    isa = os.environ.get("FORGE_C_ISA") or fc.available_isas()[0]
    found = re.fullmatch(rf"{isa}, \d+ threads: 64 tokens at \d+ a second, checksum (.*)\n", said)
    assert found and float(found[1]) == pytest.approx(got.sum(dtype=float), abs=1e-6)

    sizes = [n * k for n, k in SHAPES]
    parts = np.split(numbers(LAYERS * sum(sizes) + HIDDEN), np.cumsum(LAYERS * sizes))
    weights = [(part * np.sqrt(3 / k)).astype(np.float32).reshape(n, k)
               for part, (n, k) in zip(parts[:-1], LAYERS * SHAPES, strict=True)]
    layers = [weights[i:i + len(SHAPES)] for i in range(0, len(weights), len(SHAPES))]
    # Its own outputs are the inputs of the reference: each token is judged by itself.
    expected = blocks_in_float64(np.concatenate([parts[-1][None], ref.rms_norm(got[:-1])]), layers)
    # As in test_layers_formulas: as many roundings of the result as the chain of reductions is long.
    chain = HIDDEN + LAYERS * (3 * HIDDEN + HEAD_DIM + TOKENS + HEADS * HEAD_DIM + INNER)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2.0**-24 * chain * np.abs(expected).max())


def test_the_c_program_gives_the_same_bits_on_more_threads(c_pipeline, monkeypatch):
    checksums = set()
    for threads in "13":
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        checksums.add(run(c_pipeline, "./decode").split()[-1])
    assert len(checksums) == 1


def test_the_cython_module_and_python_agree_to_the_bit(pipeline, isa, rng):
    weights, x = pipeline.random_weights(), rng.standard_normal((1, pipeline.HIDDEN), np.float32)
    expected, _ = pipeline.through_python(x, *weights)
    assert pipeline.new_block(weights).decode(x[0], pipeline.TOKENS).tobytes() == expected.tobytes()

    block = pipeline.new_block(weights)
    first = block.decode(x[0], 20)
    rest = block.decode(fc.rms_norm(first[-1]), pipeline.TOKENS - 20)
    assert np.concatenate([first, rest]).tobytes() == expected.tobytes()
    with pytest.raises(ValueError, match="1 tokens after 64, expected at most 64 in all"):
        block.decode(x[0], 1)


def test_the_cython_module_and_python_share_isa_and_threads(pipeline, isa, each_thread_count):
    from block import isa_and_threads
    for threads in each_thread_count():
        assert isa_and_threads() == (isa, fc.get_num_threads())
        assert fc.get_num_threads() in (threads, 1)


def test_the_cython_module_runs_by_itself(cython_pipeline):
    assert run(cython_pipeline, sys.executable, "run.py").endswith("the same bits: True\n")
