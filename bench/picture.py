"""docs/speed.svg, README's picture, from a page of models_vs_peers.py:

    python bench/picture.py [docs/benchmarks/sapphire-rapids-2cpus-models.md]     by default this machine's
"""
from __future__ import annotations

import sys
from pathlib import Path

import machine
import plots

TESTS = {"pp512": "prompt of 512", "tg128": "writing"}
WIDTHS = {"bfloat16": "bfloat16", "BF16": "bfloat16", "int8": "int8", "Q8_0": "int8", "int4": "int4", "Q4_0": "int4"}


def rates(page: str) -> list[tuple[str, str, str, float]]:
    """(test, implementation, width, tokens/s) of the table's rows that the picture shows."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    return [(TESTS[row[0]], row[1], WIDTHS[row[2]], float(row[3])) for row in rows
            if row[0] in TESTS and row[2] in WIDTHS]


if __name__ == "__main__":
    page = Path(sys.argv[1]) if len(sys.argv) > 1 else machine.page("models")
    plots.tokens(rates(page.read_text()), machine.PAGES.parent / "speed.svg")
