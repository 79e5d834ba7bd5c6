"""Arrays in pages of their own: where they begin, and where they go."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from child import run_script

from forge_c.pages import empty

MIB = 1 << 20


@pytest.mark.parametrize(("nbytes", "start"), [(4, 64), (MIB - 4, 64), (MIB, 2 * MIB), (7 * MIB + 4, 2 * MIB)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_an_array_begins_with_a_cache_line_and_a_large_one_with_a_huge_page(nbytes, start, dtype):
    a = empty((nbytes // np.dtype(dtype).itemsize, 1), dtype)
    assert a.dtype == dtype and a.shape == (nbytes // a.itemsize, 1) and a.flags.writeable and a.flags.c_contiguous
    assert a.ctypes.data % start == 0
    a[...] = 7
    assert a.sum(dtype=np.int64) == 7 * a.size


def test_what_an_array_took_goes_back_to_the_system_though_a_later_one_stays():
    """malloc would keep all but the last."""
    before, full, after = map(int, run_script("""
        import numpy as np
        from forge_c.pages import empty
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096
        empty((5 << 20,), np.uint8)[...] = 1
        before, held = resident(), [empty((3 << 20,), np.uint8) for _ in range(20)]
        for a in held:
            a[...] = 1
        full, held = resident(), held[-1:]
        print(before, full, resident())
    """).split())
    assert full - before >= 60 * MIB and after - before <= 4 * MIB


def flags_at(address: int) -> set[str]:
    """What Linux says of the mapping at an address: hg, huge pages are asked for, nh, they are refused."""
    for mapping in re.split(r"\n(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text()):
        begin, end = (int(number, 16) for number in mapping.split(None, 1)[0].split("-"))
        if begin <= address < end:
            return set(re.search(r"VmFlags: (.*)", mapping)[1].split())
    raise LookupError(hex(address))


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this Linux has no huge pages")
def test_whole_huge_pages_are_asked_for_and_none_for_the_rest():
    """An array's last part would else fill up a huge page where these are the rule: a megabyte each."""
    small, large = empty((MIB + 4096,), np.uint8), empty((5 * MIB,), np.uint8)
    assert "nh" in flags_at(small.ctypes.data)
    assert "hg" in flags_at(large.ctypes.data) and "hg" in flags_at(large.ctypes.data + 4 * MIB - 1)
    assert "nh" in flags_at(large.ctypes.data + 4 * MIB) and "nh" in flags_at(large.ctypes.data + 5 * MIB - 1)


def test_memory_that_is_not_there_is_a_memory_error():
    with pytest.raises(MemoryError, match="not to be had"):
        empty((1 << 62,), np.uint8)


def test_a_child_that_is_forked_off_writes_to_pages_of_its_own():
    assert run_script("""
        import os
        import numpy as np
        from forge_c.pages import empty
        a = empty((2 << 20,), np.uint8)
        a[...] = 1
        child = os.fork()
        if not child:
            a[...] = 2
            os._exit(0)
        os.waitpid(child, 0)
        print(a.max())
    """).strip() == "1"
