"""Arrays in pages of their own: what a tensor takes goes back to the system with it, and huge pages hold it.

malloc keeps what is freed below something that is still in use, in blocks of up to 32 MB: after loading, a model's
process was larger by a third."""
from __future__ import annotations

import mmap
from contextlib import suppress
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_LINE = 64
_HUGE = 2 << 20
_LEAST = 1 << 20


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """As np.empty, from the start of a cache line on; of 1 MiB or more, from the start of a huge page on."""
    nbytes = prod(shape) * np.dtype(dtype).itemsize
    if nbytes < _LEAST:
        room = np.empty(nbytes + _LINE, np.uint8)
        start = -room.ctypes.data % _LINE
    else:
        room, start = _mapped(nbytes)
    found: NDArray[Any] = room[start : start + nbytes].view(dtype).reshape(shape)
    return found


def _mapped(nbytes: int) -> tuple[NDArray[np.uint8], int]:
    """Pages of this process alone, and where the first huge one begins, with room for so many bytes after it."""
    try:
        pages = mmap.mmap(-1, nbytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        raise MemoryError(f"{nbytes} bytes are not to be had") from None
    room = np.frombuffer(pages, np.uint8)
    start = -room.ctypes.data % _HUGE
    end = start + nbytes // _HUGE * _HUGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # refused, they are as the system likes them
            # The rest is in small ones also where huge ones are the rule: each array would fill up its last.
            pages.madvise(mmap.MADV_NOHUGEPAGE, end)
            if end > start:
                pages.madvise(mmap.MADV_HUGEPAGE, start, end - start)
    return room, start
