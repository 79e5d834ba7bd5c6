"""Memory for pages of keys and values, and tables of their addresses."""
from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np

# Not from numpy lazily: an interrupt in the middle of that import would leave the import lock held.
from numpy.ctypeslib import as_array
from numpy.typing import NDArray

CACHE_LINE = 64

Table = NDArray[np.uintp]  # (rows, pages a row) addresses


def check_addressable(count: int, page_nbytes: int) -> None:
    if count * page_nbytes > sys.maxsize - CACHE_LINE:
        raise ValueError(f"KVCache: {count} pages of {page_nbytes} bytes cannot be addressed")


def new_pages(rows: int, pages_a_row: int, page_nbytes: int) -> tuple[list[Any], Table]:
    """Pages of zeros, which the system hands out when they are first written; (what they lie in, their table)."""
    count = rows * pages_a_row
    check_addressable(count, page_nbytes)
    memory = np.zeros(count * page_nbytes + CACHE_LINE, np.uint8)
    offset = -memory.ctypes.data % CACHE_LINE
    return pages_of(memory[offset : offset + count * page_nbytes].reshape(count, page_nbytes), rows)


def pages_of(pages: NDArray[np.uint8], rows: int) -> tuple[list[Any], Table]:
    """pages (rows * pages_a_row, page_nbytes), contiguous."""
    table = pages.ctypes.data + np.arange(len(pages), dtype=np.uintp) * np.uintp(pages.shape[1])
    return [pages], table.astype(np.uintp).reshape(rows, -1)


def page_at(address: int, nbytes: int) -> NDArray[np.uint8]:
    return as_array((ctypes.c_uint8 * nbytes).from_address(address))
