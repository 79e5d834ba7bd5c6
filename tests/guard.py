"""Arrays between two pages that no one may touch: a byte read or written outside them kills the process."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

PAGE = mmap.PAGESIZE
PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def guarded(shape: tuple[int, ...], dtype: DTypeLike, *, at_end: bool) -> NDArray[Any]:
    """An uninitialised C-contiguous array that touches the forbidden page after it, or the one before it."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape))
    room = -(-max(count * dtype.itemsize, 1) // PAGE) * PAGE
    pages = mmap.mmap(-1, room + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for edge in (start, start + PAGE + room):
        if _libc.mprotect(edge, PAGE, PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + (room - count * dtype.itemsize if at_end else 0)
    return np.frombuffer(pages, np.uint8, count * dtype.itemsize, offset).view(dtype).reshape(shape)


def guarded_copy(a: NDArray[Any], *, at_end: bool) -> NDArray[Any]:
    """`a` in guarded memory."""
    copy = guarded(a.shape, a.dtype, at_end=at_end)
    copy[...] = a
    return copy
