"""Sizes as callers give them, checked."""
from __future__ import annotations

import sys
from operator import index


def integer(function: str, name: str, value: int) -> int:
    try:
        return index(value)
    except TypeError:
        raise TypeError(f"{function}: {name} is {value!r}, expected an integer") from None


def checked_size(function: str, name: str, value: int, *, least: int = 1, most: float = sys.maxsize) -> int:
    size = integer(function, name, value)
    if size < least:
        raise ValueError(f"{function}: {name} is {size}, expected at least {least}")
    if size > most:
        raise ValueError(f"{function}: {name} is {size}, expected at most {most}")
    return size
