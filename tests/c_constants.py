"""Sizes of blocks, read from the C sources: what a test calls an edge is one for as long as the code says so."""

from __future__ import annotations

import re
from pathlib import Path

SOURCES = Path(__file__).parent.parent / "src_c"


def c_constant(name: str, file: str) -> int:
    """The whole number that an enum of this file gives this name."""
    found = re.findall(rf"\b{name} = (\d+)(?: << (\d+))?(?=\s*[,}}/])", (SOURCES / file).read_text())
    assert len(found) == 1, f"src_c/{file} gives {name} {len(found)} values, expected one"
    number, shift = found[0]
    return int(number) << int(shift or 0)
