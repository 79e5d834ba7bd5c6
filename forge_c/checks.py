"""Numbers as callers and files give them, checked, values as errors show them, and warnings at the caller's line."""
from __future__ import annotations

import sys
import warnings
from operator import index
from pathlib import Path
from typing import Any

import numpy as np

_PACKAGE = str(Path(__file__).parent) + "/"


def integer(function: str, name: str, value: int) -> int:
    """TypeError if it is no integer; True and False are none."""
    try:
        if not isinstance(value, bool):
            return index(value)
    except TypeError:
        pass
    raise TypeError(f"{function}: {name} is {short(value)}, expected an integer")


def checked_size(function: str, name: str, value: int, *, least: int = 1, most: float = sys.maxsize) -> int:
    """TypeError if it is no integer, ValueError if it is not from `least` to `most`."""
    size = integer(function, name, value)
    if size < least:
        raise ValueError(f"{function}: {name} is {short(size)}, expected at least {least}")
    if size > most:
        raise ValueError(f"{function}: {name} is {short(size)}, expected at most {most}")
    return size


def unmasked(function: str, name: str, value: Any) -> Any:
    """The value; TypeError if it is a masked array: no kernel knows of a mask, it would be lost without a word."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{function}: {name} is a {type(value).__name__}, expected a NumPy array without a mask")
    return value


def dtype_name(dtype: Any) -> Any:
    """A dtype's name, from its name or from what NumPy takes for one; anything else comes back as it is."""
    if isinstance(dtype, str) or dtype is None:
        return dtype
    try:
        return np.dtype(dtype).name
    except (TypeError, ValueError):
        return dtype


def short(value: Any) -> str:
    """Its repr, cut to what a message can hold; of an integer with many digits, which may have no repr, its size."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def warn(message: str) -> None:
    """A UserWarning at the line that called this package, however deep in it this is."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
