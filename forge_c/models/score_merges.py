"""The merges of a SentencePiece vocabulary, which has scores in their place.

SentencePiece joins, again and again, the two neighbours whose union is the token of the highest score. That is BPE with
a merge for each way of cutting a token in two tokens, in the order of their unions' scores. A large vocabulary has half
a million of them among a million cuts, so arrays find them: a substring's hash is a difference of two prefix sums,

    h(a, b) = B^-a sum_{a <= i < b} text[i] B^i   mod 2^64,

and a table with open addresses knows which token has it.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse
_INVERSE = pow(_BASE, -1, 1 << 64)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_EMPTY = -1
_MAX_ROUNDS = 4096  # hundreds of times what chance needs

Ids = NDArray[np.int64]
Hashes = NDArray[np.uint64]


def score_merges(tokens: Sequence[str], scores: NDArray[np.float32], taking_part: Ids) -> list[tuple[str, str]]:
    """(left, right) of every cut of a token in two, best first; `taking_part` are the ids of the tokens that count."""
    text = np.frombuffer("".join(tokens).encode("utf-32-le"), np.uint32)
    stops = np.cumsum(np.fromiter(map(len, tokens), np.int64, len(tokens)))
    starts = np.concatenate([np.zeros(1, np.int64), stops[:-1]])
    with np.errstate(over="ignore"):
        substrings = _Substrings(text)
        table = _Table(taking_part, substrings.hashes(starts[taking_part], stops[taking_part]))
        whole, cut = _cuts(taking_part, starts, stops)
        left = table.ids(substrings.hashes(starts[whole], cut))
        found = left != _EMPTY
        whole, cut, left = whole[found], cut[found], left[found]
        right = table.ids(substrings.hashes(cut, stops[whole]))
    found = right != _EMPTY
    whole, cut, left, right = whole[found], cut[found], left[found], right[found]
    order = np.lexsort((cut, whole, -scores[whole]))
    pair = map(tokens.__getitem__, left[order].tolist()), map(tokens.__getitem__, right[order].tolist())
    return list(zip(*pair, strict=True))


def _cuts(ids: Ids, starts: Ids, stops: Ids) -> tuple[Ids, Ids]:
    """(token, place in the text) of every place within a token."""
    ways = np.maximum(stops[ids] - starts[ids] - 1, 0)
    before = np.cumsum(ways) - ways
    return np.repeat(ids, ways), np.arange(ways.sum()) + np.repeat(starts[ids] + 1 - before, ways)


class _Substrings:
    """Hashes of a text's substrings. Two different ones of the same length may share one, as seldom as 1 in 2^64."""

    def __init__(self, text: NDArray[np.uint32]) -> None:
        n = len(text)
        self._powers = np.cumprod(np.full(n + 1, _INVERSE, np.uint64)) * np.uint64(_BASE)  # B^-a
        self._sums = np.zeros(n + 1, np.uint64)
        np.cumsum((text + np.uint64(1)) * np.cumprod(np.full(n, _BASE, np.uint64)), out=self._sums[1:])

    def hashes(self, starts: Ids, stops: Ids) -> Hashes:
        found = (self._sums[stops] - self._sums[starts]) * self._powers[starts]
        found ^= found >> np.uint64(31)
        return found * _MIX


class _Table:
    """Ids by hash, at most half full; a hash whose slot is taken goes to the next one."""

    def __init__(self, ids: Ids, hashes: Hashes) -> None:
        bits = max(2 * len(ids), 16).bit_length()
        self._shift, self._mask = np.uint64(64 - bits), (1 << bits) - 1
        self._hashes, self._ids = np.zeros(1 << bits, np.uint64), np.full(1 << bits, _EMPTY)
        slots = self._slots(hashes)
        for _ in range(_MAX_ROUNDS):
            free = self._ids[slots] == _EMPTY
            self._ids[slots[free]] = ids[free]  # of several ids for one slot, the last has it
            left = self._ids[slots] != ids
            placed = ~left
            self._hashes[slots[placed]] = hashes[placed]
            ids, hashes, slots = ids[left], hashes[left], (slots[left] + 1) & self._mask
            if not len(ids):
                return
        raise ValueError("the tokens are chosen so that their hashes meet")

    def _slots(self, hashes: Hashes) -> Ids:
        return (hashes >> self._shift).astype(np.int64)

    def ids(self, hashes: Hashes) -> Ids:
        """The id of each hash, or -1."""
        found = np.full(len(hashes), _EMPTY)
        open_, slots = np.arange(len(hashes)), self._slots(hashes)
        while len(open_):
            there, wanted = self._ids[slots], hashes[open_]
            same = (self._hashes[slots] == wanted) & (there != _EMPTY)
            found[open_[same]] = there[same]
            go_on = ~same & (there != _EMPTY)
            open_, slots = open_[go_on], (slots[go_on] + 1) & self._mask
        return found
