"""Blocks of GGUF files: dequantised bit for bit."""

from __future__ import annotations

import importlib
import struct

import ggml_blocks as blocks
import ml_dtypes
import numpy as np
import pytest

from forge_c.formats.ggml import TYPES, dequantize

FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("name", blocks.QUANTIZED)
def test_dequantized_is_every_weight_by_its_formula(rng, name):
    raw = blocks.random_blocks(rng, name, 3, 1024 if TYPES[name].weights == 256 else 320)
    assert dequantize(name, raw).tobytes() == blocks.weights(name, raw).tobytes()


@pytest.mark.parametrize("name", list(TYPES))
def test_dequantized_is_what_the_reference_package_gives(rng, name):
    """Over several pieces of the work."""
    gguf = pytest.importorskip("gguf")
    quants, number = importlib.import_module("gguf.quants"), gguf.GGMLQuantizationType[name]
    t = TYPES[name]
    assert (t.id, t.weights, t.nbytes) == (number, *gguf.GGML_QUANT_SIZES[number])
    k = 3 << 10
    if t.is_float:
        raw = rng.standard_normal((67, k)).astype(FLOATS[name]).view(np.uint8)
    else:
        raw = blocks.random_blocks(rng, name, 67, k)
    assert dequantize(name, raw).tobytes() == np.asarray(quants.dequantize(raw, number), np.float32).tobytes()


def test_every_byte_of_a_scale_without_float16():
    """The least powers of two are subnormal; 0 and 127 are both NVFP4's zero."""
    mxfp4 = np.full((253, 17), 0x21, np.uint8)
    mxfp4[:, 0] = np.arange(253)
    assert dequantize("MXFP4", mxfp4)[:, 0].tobytes() == np.ldexp(np.float32(1), np.arange(253) - 128).tobytes()
    nvfp4 = np.full((256, 36), 0x21, np.uint8)
    nvfp4[:, :4] = np.arange(256)[:, None]
    got = dequantize("NVFP4", nvfp4)
    assert got.tobytes() == blocks.weights("NVFP4", nvfp4).tobytes()
    assert not got[[0, 127]].any() and got[1, 0] == 2.0**-10


@pytest.mark.parametrize("name", ["F32", "BF16", "Q8_0", "Q6_K"])
def test_another_dtype_is_rounded_once(rng, name):
    raw = (rng.standard_normal((9, 512)).astype(FLOATS[name]).view(np.uint8) if name in FLOATS
           else blocks.random_blocks(rng, name, 300, 1024))
    got = dequantize(name, raw, dtype=ml_dtypes.bfloat16)
    assert got.tobytes() == dequantize(name, raw).astype(ml_dtypes.bfloat16).tobytes()


@pytest.mark.parametrize("name", [n for n in blocks.QUANTIZED if n != "NVFP4"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_scale_that_is_not_finite_is_named(rng, name, bad):
    for at in blocks.HALVES[name] or (0,):
        raw = blocks.random_blocks(rng, name, 300, 1024)
        size = TYPES[name].nbytes
        last = raw[-1, -size:]
        last[at:at + 2] = np.frombuffer(struct.pack("<e", bad), np.uint8) if name != "MXFP4" else (253, 0)
        with pytest.raises(ValueError, match=f"^blk.0: block .* of {name} has a scale that is not finite"):
            dequantize(name, raw, name="blk.0")


@pytest.mark.parametrize("name", list(FLOATS))
def test_a_float_that_is_not_finite_is_named(name):
    raw = np.array([[1, 2, np.nan, 4]], FLOATS[name]).view(np.uint8)
    with pytest.raises(ValueError, match=f"^blk.0: block 2 of {name} has a number that is not finite"):
        dequantize(name, raw, name="blk.0")


def test_what_is_no_row_of_blocks_is_refused():
    with pytest.raises(ValueError, match=r"^dequantize: type is 'Q9_9', expected one of F32, F16"):
        dequantize("Q9_9", np.zeros((1, 18), np.uint8))
    for raw in (np.zeros((2, 19), np.uint8), np.zeros(18, np.uint8), np.zeros((1, 18), np.int8)):
        with pytest.raises(ValueError, match=r"^dequantize: raw has dtype .*, expected uint8 \(rows, bytes\)"):
            dequantize("Q4_0", raw)
    assert dequantize("Q4_0", np.zeros((0, 36), np.uint8)).shape == (0, 64)
    assert dequantize("Q4_K", np.zeros((3, 0), np.uint8)).shape == (3, 0)
