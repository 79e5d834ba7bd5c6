"""The same array in other places of memory: what an op takes must not depend on where it lies."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def _unaligned(x: Array) -> Array:
    return np.frombuffer(b"." + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape)


def _padded(x: Array) -> Array:
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(2, 3)])[..., 2:-3]


# For arrays of two or more axes; "unaligned" for any.
LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "reversed": lambda x: x[::-1].copy()[::-1], "padded": _padded, "unaligned": _unaligned,
    "swapped": lambda x: x.swapaxes(0, 1).copy().swapaxes(0, 1)}
