"""What the calls on one rank took: filled by ring_attention and its kin where they are given one."""
from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Stats:
    """Totals over the calls that it was given to, of one rank.

    sent, received: bytes of keys, values, queries and partial results. compute: seconds in kernels. move: seconds
    between them, in which messages were begun, passed on and put in order. wait: seconds without work, because what the
    next step needs had not come. drain: seconds at the end, until the other ranks had taken what this one sends. pairs:
    (query, key) pairs of each step. pieces: received.
    """
    sent: int = 0
    received: int = 0
    pieces: int = 0
    compute: float = 0.0
    move: float = 0.0
    wait: float = 0.0
    drain: float = 0.0
    pairs: list[int] = field(default_factory=list)
