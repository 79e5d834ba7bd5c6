"""Faults that are known and not yet mended: what they look like. A failure that matches is counted, not reported.

An entry goes as soon as its fault does; `python -m fuzz --all` looks past the list.
"""

from __future__ import annotations

import re

# (fuzzer, pattern in the failure's text, the fault in words)
KNOWN: tuple[tuple[str, str, str], ...] = ()


def known(name: str, why: str) -> str | None:
    """The known fault that this failure shows."""
    return next((fault for fuzzer, pattern, fault in KNOWN if fuzzer == name and re.search(pattern, why)), None)
