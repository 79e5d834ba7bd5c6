"""The guard pages of guard.py do kill: a process that reads or writes one element too far does not survive it."""

from __future__ import annotations

import mmap
import signal
import sys

import numpy as np
import pytest
from child import run_script
from guard import guarded, guarded_copy

pytestmark = pytest.mark.slow

KILLED = -(signal.SIGBUS if sys.platform == "darwin" else signal.SIGSEGV)

SCRIPT = """
import ctypes, resource
import numpy as np
import forge_c as fc
from guard import guarded

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
inside = guarded((5,), np.float32, at_end={at_end})
inside[...] = 1
first = inside.ctypes.data - (0 if {at_end} else 4 * {beyond})
a = np.frombuffer((ctypes.c_float * (5 + {beyond})).from_address(first), np.float32)
ordinary = np.ones(5 + {beyond}, np.float32)
print("made", flush=True)
{action}
print("survived")
"""
READ, WRITE = "fc.rms_norm(a, ordinary, out=ordinary.copy())", "fc.rms_norm(ordinary, out=a)"


@pytest.mark.parametrize("action", [READ, WRITE], ids=["read", "write"])
@pytest.mark.parametrize("at_end", [False, True], ids=["before", "after"])
def test_one_element_too_far_kills_the_process(action, at_end):
    assert "survived" in run_script(SCRIPT.format(action=action, at_end=at_end, beyond=0))
    output = run_script(SCRIPT.format(action=action, at_end=at_end, beyond=1), expect=KILLED)
    assert "made" in output and "survived" not in output


@pytest.mark.parametrize("at_end", [False, True])
def test_a_guarded_array_is_ordinary_inside_and_touches_its_edge(dtype, at_end):
    for shape in ((), (0,), (1,), (7,), (3, 5), (2, 0, 4), (mmap.PAGESIZE // dtype.itemsize,), (3, mmap.PAGESIZE)):
        a = guarded(shape, dtype, at_end=at_end)
        a[...] = 1
        assert a.shape == shape and a.dtype == dtype
        assert a.flags.c_contiguous and a.flags.writeable and (a == 1).all()
        assert (a.ctypes.data + (a.nbytes if at_end else 0)) % mmap.PAGESIZE == 0 or a.size == 0
        copy = guarded_copy(np.zeros(shape, dtype), at_end=at_end)
        assert copy.shape == shape and (copy == 0).all()
