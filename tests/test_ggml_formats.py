"""Blocks of GGUF files: dequantised bit for bit."""

from __future__ import annotations

import importlib
import pickle
import struct

import ggml_blocks as blocks
import ml_dtypes
import numpy as np
import pytest

from forge_c import PackedWeight
from forge_c.formats.blocks import DTYPE_OF
from forge_c.formats.ggml import TYPES, dequantize
from forge_c.packing import pack, pack_blocks, pack_gated_blocks

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


# ---- packed --------------------------------------------------------------------------------------------------------

NATIVE = list(DTYPE_OF)


def several(name: str, numbers: tuple[int, ...]) -> int:
    """k of so many blocks."""
    return numbers[1 if TYPES[name].weights == 256 else 0] * TYPES[name].weights


@pytest.mark.parametrize("n", [0, 1, 16, 37])
@pytest.mark.parametrize("blocks_of", [(0, 0), (1, 1), (2, 2), (7, 3)])
@pytest.mark.parametrize("name", NATIVE)
def test_unpacked_is_dequantized(rng, name, blocks_of, n):
    raw = blocks.random_blocks(rng, name, n, several(name, blocks_of))
    packed = pack_blocks(name, raw)
    assert (packed.shape, packed.dtype, packed.gated) == (raw_shape(name, raw)[::-1], DTYPE_OF[name], False)
    assert packed.unpack().tobytes() == dequantize(name, raw).T.copy().tobytes()


def raw_shape(name: str, raw: blocks.Array) -> tuple[int, int]:
    return len(raw), raw.shape[1] // TYPES[name].nbytes * TYPES[name].weights


@pytest.mark.parametrize("name", NATIVE)
def test_several_matrices_side_by_side_and_pairs(rng, name, each_thread_count):
    """Whether or not each of them fills its last panel."""
    k = several(name, (3, 1))
    for sizes in ((32, 16, 5), (7, 20), (16,)):
        raw = [blocks.random_blocks(rng, name, n, k) for n in sizes]
        whole = np.concatenate([dequantize(name, r) for r in raw]).T
        assert pack_blocks(name, *raw).unpack().tobytes() == whole.copy().tobytes()
    raw = [blocks.random_blocks(rng, name, 600, several(name, (33, 5))) for _ in range(2)]
    pairs = [pack_gated_blocks(name, *raw) for _ in each_thread_count()]
    assert pairs[0].gated and pairs[0].shape == (raw_shape(name, raw[0])[1], 1200)
    assert pairs[0].unpack().tobytes() == np.concatenate([dequantize(name, r) for r in raw]).T.copy().tobytes()
    assert all(pair.data.tobytes() == pairs[0].data.tobytes() for pair in pairs)


BITS = {"Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q5_1": 6, "Q8_0": 8.5, "Q2_K": 2.625, "Q3_K": 3.625, "Q4_K": 4.625,
        "Q5_K": 5.625, "Q6_K": 6.625, "IQ4_NL": 4.5, "IQ4_XS": 4.375, "MXFP4": 4.25}


@pytest.mark.parametrize("name", NATIVE)
def test_bits_a_weight(name):
    packed = pack_blocks(name, np.zeros((16, 1024 // TYPES[name].weights * TYPES[name].nbytes), np.uint8))
    assert packed.nbytes * 8 / (1024 * 16) == BITS[name]


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "TQ2_0", "NVFP4"])
def test_what_has_no_format_of_its_own(rng, name):
    """Floats are held exactly, the others rounded to bfloat16."""
    sides = [(rng.standard_normal((5, 64)).astype(FLOATS[name]).view(np.uint8) if name in FLOATS
              else blocks.random_blocks(rng, name, 5, 512)) for _ in range(2)]
    dtype = "float32" if name in ("F32", "F16") else "bfloat16"
    exact = np.concatenate([dequantize(name, side) for side in sides]).T.astype(dtype)
    for packed in (pack_blocks(name, *sides), pack_gated_blocks(name, *sides)):
        assert packed.dtype == dtype and packed.unpack().tobytes() == exact.astype(np.float32).copy().tobytes()


def test_what_cannot_be_packed():
    rows = np.zeros((4, 36), np.uint8)
    for call in (lambda: pack_blocks("Q4_0", rows, np.zeros((4, 54), np.uint8)), lambda: pack_blocks("Q4_0")):
        with pytest.raises(ValueError, match="^pack_blocks: raw has rows of .*expected one or more matrices"):
            call()
    with pytest.raises(ValueError, match="^pack_blocks: raw has dtype uint8 and shape .4, 36., expected uint8"):
        pack_blocks("Q4_1", rows)
    with pytest.raises(ValueError, match="^pack_gated_blocks: up has 3 rows, expected 4"):
        pack_gated_blocks("Q4_0", rows, rows[:3])
    with pytest.raises(ValueError, match="^pack_blocks: type is 'IQ1_S', expected one of"):
        pack_blocks("IQ1_S", rows)
    bad = rows.copy()
    bad[3, 18:20] = 0, 0x7c
    with pytest.raises(ValueError, match="^pack_blocks: block 7 of Q4_0 has a scale that is not finite"):
        pack_blocks("Q4_0", bad)
    with pytest.raises(ValueError, match="^pack: dtype is 'q2_k', expected one of float32"):
        pack(np.zeros((4, 4), np.float32), "q2_k")


@pytest.mark.parametrize("name", NATIVE)
def test_pickle_and_the_bytes_alone(rng, name):
    packed = pack_blocks(name, blocks.random_blocks(rng, name, 20, several(name, (3, 1))), activations="int12")
    group, rounded = 16 if TYPES[name].sub == 16 else 32, "" if name == "Q8_0" else ", activations='int12'"
    assert repr(packed) == (f"PackedWeight(shape={packed.shape}, dtype='{DTYPE_OF[name]}', group_size={group}"
                            f"{rounded})")
    twin = pickle.loads(pickle.dumps(packed))
    assert (twin.shape, twin.dtype, twin.group_size) == (packed.shape, packed.dtype, packed.group_size)
    again = PackedWeight(np.array(packed.data), packed.shape, packed.dtype, group_size=packed.group_size)
    assert twin.unpack().tobytes() == again.unpack().tobytes() == packed.unpack().tobytes()
    with pytest.raises(ValueError, match="^PackedWeight: data has .* bytes, expected those that pack"):
        PackedWeight(np.array(packed.data)[:, 64:].copy(), packed.shape, packed.dtype, group_size=packed.group_size)
    with pytest.raises(ValueError, match="^PackedWeight: group_size is 48, expected"):
        PackedWeight(np.array(packed.data), packed.shape, packed.dtype, group_size=48)
