"""What the library believes about the machine: its caches, which choose blocks and streaming, never a bit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import forge_c as fc
from forge_c import functional

KB, MB = 1 << 10, 1 << 20


@pytest.fixture(autouse=True)
def caches_as_found() -> Iterator[None]:
    yield
    for which in ("l2", "last"):
        functional._set_cache_bytes(which, 0)


def cache_of_linux(level: int) -> int:
    """Bytes of the first core's cache of this level, 0 if Linux does not tell."""
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if int((folder / "level").read_text()) == level:
            return int((folder / "size").read_text().strip().rstrip("K")) * KB
    return 0


@pytest.mark.parametrize(("which", "level", "least"), [("l2", 2, 64 * KB), ("last", 3, MB)])
def test_caches_are_those_of_the_machine(which, level, least):
    """Of an EPYC of which a virtual machine has two cores, sysconf says 384 MB where these share 32."""
    size = functional._cache_bytes(which)
    assert least <= size <= 16 << 30
    told = cache_of_linux(level)
    assert size == told or told < least


@pytest.mark.parametrize("which", ["l2", "last"])
def test_a_cache_of_another_size_until_it_is_restored(which):
    found = functional._cache_bytes(which)
    functional._set_cache_bytes(which, 12345)
    assert functional._cache_bytes(which) == 12345
    functional._set_cache_bytes(which, 0)
    assert functional._cache_bytes(which) == found
    with pytest.raises(ValueError, match="size is -1, expected 0 or more"):
        functional._set_cache_bytes(which, -1)


@pytest.mark.usefixtures("one_thread")  # restores the count
@pytest.mark.parametrize("threads", [1, 3])
def test_no_bit_depends_on_the_caches(isa, rng, threads):
    """Blocks of rows from one tile's to all that there are, whole and cut, for every format of weights."""
    fc.set_num_threads(threads)
    k, n = 700, 300
    w = rng.standard_normal((k, n), np.float32)
    weights = [w, np.asfortranarray(w), *(fc.pack(w, f) for f in ("float32", "bfloat16", "int8", "int4"))]
    for m, weight in product((5, 65, 200), weights):
        x = rng.standard_normal((m, k), np.float32)
        want = fc.linear(x, weight).tobytes()
        for size in (1, 64 * KB, 200 * KB, 512 * KB, 64 * MB):
            functional._set_cache_bytes("l2", size)
            assert fc.linear(x, weight).tobytes() == want, (m, size)
        functional._set_cache_bytes("l2", 0)
