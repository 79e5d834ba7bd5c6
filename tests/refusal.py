"""How a file is refused: by exactly one kind of error, at once, without allocating what it merely claims."""
from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

SPARE = 4 << 20  # bytes


def refused(call: Callable[[], Any], kind: type[Exception], message: str, nbytes: int, seconds: float,
            clock: Callable[[], float] = time.perf_counter) -> str:
    """What the error says; nbytes: of the files."""
    tracemalloc.start()
    start = clock()
    try:
        with pytest.raises(kind, match=message) as caught:
            call()
        taken, peak = clock() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.type is kind
    assert taken < seconds
    assert peak < 2 * nbytes + SPARE, f"{peak} bytes at the peak for {nbytes} bytes of files"
    return str(caught.value)
