"""Products by ggml's block formats: exact integers, the same bits for every M, and nothing read beyond the weight."""

from __future__ import annotations

import ggml_blocks as blocks
import numpy as np
import pytest
from guard import guarded_copy
from suite import case, once

import forge_c as fc
from forge_c import PackedWeight
from forge_c.formats.blocks import DTYPE_OF
from forge_c.formats.ggml import TYPES
from forge_c.packing import pack_blocks, pack_gated_blocks

NATIVE = list(DTYPE_OF)
ACTIVATIONS = {"int8": 127, "int12": 2047}


def sizes(name: str) -> tuple[int, ...]:
    """k that fill blocks of lines, and that do not."""
    return (256, 768) if TYPES[name].weights == 256 else (32, 96, 192, 544)


def with_scales(name: str, raw: blocks.Array, *values: float) -> blocks.Array:
    """Every float16 of the blocks one of these, in turn; of MXFP4 the power of two that is the first."""
    t = TYPES[name]
    b = raw.reshape(len(raw), -1, t.nbytes)
    for at in blocks.HALVES[name]:
        chosen = np.resize(np.array(values, np.float16), b.shape[:2])
        b[:, :, at:at + 2] = chosen[..., None].view(np.uint8)
    if name == "MXFP4":
        b[:, :, 0] = 128 + int(np.log2(abs(values[0])))
    return raw


def exact_rows(rng: np.random.Generator, m: int, k: int, most: int) -> blocks.Array:
    """Whole numbers that rounding leaves as they are: in each 16 a `most`, the others small, so that all sums of a
    product are whole multiples of one power of two; with 8 bits, below 2^24 of them."""
    x = rng.integers(-2, 3, (m, k // 16, 16)).astype(np.float32)
    np.put_along_axis(x, rng.integers(0, 16, (m, k // 16, 1)), np.float32(most), axis=2)
    return x.reshape(m, k) * np.where(rng.integers(0, 2, (m, k)), 1, -1).astype(np.float32)


@once
def product(x: blocks.Array, w: blocks.Array) -> blocks.Array:
    return x.astype(np.float64) @ w.astype(np.float64)


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("name", NATIVE)
def test_sums_are_exact(isa, rng, name, activations):
    """Scales that are powers of two: the result is that of whole numbers."""
    k = sizes(name)[0]
    raw = with_scales(name, blocks.random_blocks(rng, name, 37, k), 2.0**-6, -(2.0**-6))
    packed = pack_blocks(name, raw, activations=activations)
    x = exact_rows(rng, 7, k, ACTIVATIONS[activations])
    exact = product(x, packed.unpack())
    size = np.abs(product(np.abs(x), np.abs(packed.unpack())))
    sums = 1 if activations == "int8" else k // 16  # that float32 may round: 12 bits of x leave it 12
    assert (np.abs(fc.linear(x, packed) - exact) <= sums * size * 2.0**-24 * (size > 2.0**17)).all()


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("name", NATIVE)
def test_the_largest_integers(isa, name, activations):
    """Every bit of u and of the scales set, or none, or alternate ones, times the largest inputs."""
    most = ACTIVATIONS[activations]
    for k in sizes(name):
        for byte in (0xff, 0x00, 0x7f, 0x80, 0xaa, 0x55):
            raw = np.full((17, k // TYPES[name].weights * TYPES[name].nbytes), byte, np.uint8)
            packed = pack_blocks(name, with_scales(name, raw, 2.0**-9), activations=activations)
            x = np.array([[most], [-most]], np.float32) * np.ones((2, k), np.float32)
            x[1, ::2] *= -1
            exact, size = product(x, packed.unpack()), product(np.abs(x), np.abs(packed.unpack()) + 1)
            with case(k, hex(byte)):
                assert (np.abs(fc.linear(x, packed) - exact) <= size * 2.0**-20).all()


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("name", NATIVE)
def test_a_row_has_the_same_bits_alone_and_among_others(isa, rng, name, activations, each_thread_count):
    for k in sizes(name):
        packed = pack_blocks(name, blocks.random_blocks(rng, name, 85, k), activations=activations)
        x = rng.standard_normal((70, k), np.float32)
        whole = {fc.linear(x, packed).tobytes() for _ in each_thread_count()}
        assert len(whole) == 1
        y = np.frombuffer(whole.pop(), np.float32).reshape(70, -1)
        for rows in (slice(0, 1), slice(3, 5), slice(10, 19), slice(69, 70)):
            assert fc.linear(x[rows], packed).tobytes() == y[rows].tobytes()
        rounded = np.abs(x).max(axis=1, keepdims=True) / ACTIVATIONS[activations]
        bound = 0.51 * rounded * np.abs(packed.unpack()).sum(axis=0) + 1e-5
        assert (np.abs(y - product(x, packed.unpack())) <= bound * 1.01).all()


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("name", NATIVE)
def test_few_rows_have_the_bits_of_many_where_k_comes_in_pieces(isa, rng, name, activations):
    """A panel of so many k is more than the caches' share of one."""
    k = 8192
    packed = pack_blocks(name, blocks.random_blocks(rng, name, 16, k), activations=activations)
    x = rng.standard_normal((13, k), np.float32)
    whole = fc.linear(x, packed)
    for m in (1, 2, 3, 4, 7, 12):
        with case(m):
            assert fc.linear(x[:m], packed).tobytes() == whole[:m].tobytes()


@pytest.mark.parametrize("name", NATIVE)
def test_a_gated_pair(isa, rng, name):
    k = sizes(name)[-1]
    gate, up = (blocks.random_blocks(rng, name, 33, k) for _ in range(2))
    x = rng.standard_normal((5, k), np.float32)
    both = fc.linear(x, pack_blocks(name, gate)), fc.linear(x, pack_blocks(name, up))
    got = fc.gated_linear(x, pack_gated_blocks(name, gate, up), activation="silu")
    np.testing.assert_allclose(got, fc.swiglu(*both), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("name", NATIVE)
def test_no_byte_beyond_x_and_w_is_read(isa, rng, name, at_end):
    for k in sizes(name):
        made = pack_blocks(name, blocks.random_blocks(rng, name, 37, k))
        packed = PackedWeight(guarded_copy(made.data, at_end=at_end), made.shape, made.dtype, False, made.group_size)
        for m in (1, 7, 50):
            x = rng.standard_normal((m, k), np.float32)
            assert fc.linear(guarded_copy(x, at_end=at_end), packed).tobytes() == fc.linear(x, made).tobytes()


@pytest.mark.parametrize("name", [n for n in NATIVE if n != "MXFP4"])
def test_scales_at_the_ends_of_float16(isa, rng, name):
    k = sizes(name)[-1]
    for values in ((65504.0, -65504.0), (2.0**-24, -(2.0**-24)), (0.0, -0.0), (65504.0, 2.0**-24, 0.0)):
        packed = pack_blocks(name, with_scales(name, blocks.random_blocks(rng, name, 16, k), *values))
        x = rng.standard_normal((3, k), np.float32)
        w = packed.unpack()
        assert np.isfinite(w).all()
        size = np.abs(x).max() * np.abs(w).sum(axis=0)
        assert (np.abs(fc.linear(x, packed) - product(x, w)) <= size / 127).all()


def test_every_power_of_two(isa):
    """From the subnormal 2^-128 on; W is what it unpacks to in each product too."""
    raw = np.full((253, 17), 0x21, np.uint8)
    raw[:, 0] = np.arange(253)
    packed = pack_blocks("MXFP4", raw, activations="int12")
    x = np.zeros((1, 32), np.float32)
    x[0, 0] = 1
    exact = np.ldexp(1.0, np.arange(253) - 128)
    np.testing.assert_allclose(fc.linear(x, packed)[0], exact, rtol=2e-3, atol=2.0**-149)


@pytest.mark.parametrize("name", NATIVE)
def test_a_row_that_is_not_finite_spoils_only_itself(isa, rng, name):
    k = sizes(name)[-1]
    packed, x = pack_blocks(name, blocks.random_blocks(rng, name, 20, k)), rng.standard_normal((4, k), np.float32)
    clean = fc.linear(x, packed)
    x[1, 5], x[2, k - 1] = np.nan, np.inf
    got = fc.linear(x, packed)
    assert np.isnan(got[1:3]).all() and got[[0, 3]].tobytes() == clean[[0, 3]].tobytes()
