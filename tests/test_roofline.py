"""roofline(): figures that the hardware can reach, from work that is really done."""

from __future__ import annotations

import numpy as np

import forge_c as fc
from forge_c import functional


def test_rates_are_positive_and_grow_with_the_threads(isa: str) -> None:
    found = fc.roofline(seconds=0.02, size=8 << 20)
    assert found["threads"] == fc.get_num_threads() == len(found["by_threads"])
    for rates in found["by_threads"].values():
        assert rates["fp32_gflops"] > 1 and rates["read_gbs"] > 0.1 and rates["copy_gbs"] > 0.1
        assert rates["int8_gops"] > 1 and rates["int4_gops"] > 1
        if isa == "avx2":  # bytes, not pairs of int16
            assert rates["int4_gops"] > 1.3 * rates["int8_gops"]
        assert (rates["bf16_gflops"] > 0) == (isa in ("avx512_vnni_bf16", "avx512_amx"))


def test_the_bytes_are_copied_and_read(isa: str, rng: np.random.Generator) -> None:
    for size in (0, 1, 3, 63, 64, 65, 1000, (1 << 20) + 5, (3 << 20) + 77):
        for shift in (0, 4, 16):
            data = rng.integers(0, 255, size, np.uint8)
            out = np.zeros(size + shift + 8, np.uint8)
            functional._copy_bytes(out[shift : shift + size], data)
            assert np.array_equal(out[shift : shift + size], data)
            assert not out[shift + size :].any() and not out[:shift].any()
    ones = np.ones(1 << 19, np.float32)
    assert functional._read_bytes(ones) == len(ones)
