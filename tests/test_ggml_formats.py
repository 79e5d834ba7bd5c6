"""Formats that bear ggml's names: W value for value as ggml has it, and products as those of any other format."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from forge_c import linear
from forge_c.formats import ggml
from forge_c.packing import from_ggml

SHAPES = [(32, 1), (64, 16), (96, 5), (160, 33), (32, 0), (0, 16)]


def decoded_q8_0(block: bytes) -> list[float]:
    """32 weights from 34 bytes: a float16 scale, 32 int8."""
    scale, = struct.unpack_from("<e", block)
    return [scale * q for q in struct.unpack_from("<32b", block, 2)]


DECODED = {"q8_0": decoded_q8_0}


def random_blocks(rng: np.random.Generator, name: str, k: int, n: int) -> np.ndarray:
    kind = ggml.TYPES[name]
    blocks = rng.integers(0, 256, (n, k // kind.block_k, kind.block_bytes), np.uint8)
    blocks[..., :2] = rng.standard_normal((n, k // kind.block_k, 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(n, k // kind.block_k * kind.block_bytes)


@pytest.mark.parametrize("name", DECODED)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_w_is_ggmls_value_for_value(rng, name, k, n):
    blocks, kind = random_blocks(rng, name, k, n), ggml.TYPES[name]
    packed = from_ggml(name, blocks, (k, n))
    assert (packed.shape, packed.dtype, packed.gated) == ((k, n), name, False)
    expected = np.array([[w for i in range(0, len(row), kind.block_bytes)
                          for w in DECODED[name](row[i:i + kind.block_bytes].tobytes())] for row in blocks])
    np.testing.assert_array_equal(packed.unpack(), expected.reshape(n, k).T)


@pytest.mark.parametrize("name", DECODED)
def test_a_product_is_that_of_its_numbers(isa, rng, name):
    for k, n in SHAPES:
        x, packed = rng.standard_normal((7, k), np.float32), from_ggml(name, random_blocks(rng, name, k, n), (k, n))
        y, w = linear(x, packed), packed.unpack()
        bound = np.abs(w).sum(axis=0) * np.abs(x).max(axis=1, initial=0)[:, None] / 250
        assert (np.abs(y - x @ w) <= bound).all(), (k, n)
        assert linear(x[2:3], packed).tobytes() == y[2:3].tobytes()


def test_blocks_that_do_not_fit():
    for blocks, shape in ((np.zeros((5, 34), np.int8), (32, 5)), (np.zeros((5, 33), np.uint8), (32, 5)),
                          (np.zeros((5, 34), np.uint8), (33, 5)), (np.zeros((4, 34), np.uint8), (32, 5))):
        with pytest.raises(ValueError, match=r"^from_ggml: blocks has dtype u?int8 and shape .*expected uint8 \(5, "):
            from_ggml("q8_0", blocks, shape)
    with pytest.raises(ValueError, match="^from_ggml: name is 'q9_0', expected one of q8_0"):
        from_ggml("q9_0", np.zeros((5, 34), np.uint8), (32, 5))
