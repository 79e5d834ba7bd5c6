"""How a file is refused: by exactly one kind of error, at once, without allocating what it merely claims."""
from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from pace import check_pace

SPARE = 4 << 20  # bytes


def refused(call: Callable[[], Any], kind: type[Exception], message: str, nbytes: int, seconds: float) -> str:
    """What the error says; nbytes: of the files, seconds: of a usual machine's processor."""
    errors = []

    def refuse() -> None:
        tracemalloc.start()
        try:
            with pytest.raises(kind, match=message) as caught:
                call()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 2 * nbytes + SPARE, f"{peak} bytes at the peak for {nbytes} bytes of files"
        assert caught.type is kind
        errors.append(str(caught.value))

    check_pace(refuse, seconds)
    return errors[0]
