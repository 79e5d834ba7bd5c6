"""docs/speed.svg, README's picture, from the table of docs/benchmarks-models.md: `python bench/picture.py`."""
from __future__ import annotations

from pathlib import Path

import plots

DOCS = Path(__file__).resolve().parent.parent / "docs"
TESTS = {"pp512": "prompt of 512", "tg128": "writing"}
WIDTHS = {"bfloat16": "bfloat16", "BF16": "bfloat16", "int8": "int8", "Q8_0": "int8", "int4": "int4", "Q4_0": "int4"}


def rates(page: str) -> list[tuple[str, str, str, float]]:
    """(test, implementation, width, tokens/s) of the table's rows that the picture shows."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    return [(TESTS[row[0]], row[1], WIDTHS[row[2]], float(row[3])) for row in rows
            if row[0] in TESTS and row[2] in WIDTHS]


if __name__ == "__main__":
    plots.tokens(rates((DOCS / "benchmarks-models.md").read_text()), DOCS / "speed.svg")
