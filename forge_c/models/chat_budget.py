"""What rendering a chat template may cost: seconds of this thread, and bytes of the values that it makes.

A template comes with a model. The sandbox keeps it from everything outside; this keeps it from running for ever and
from filling the memory. No signal, thread or trace is used: whatever repeats calls `tick`, whatever makes a value pays
for its bytes, a large one before it is made, so that what lies between two calls is one operation on values of a
limited size.
"""
from __future__ import annotations

import re
from collections.abc import ItemsView, Iterable, KeysView, Mapping, Sequence, Set, ValuesView
from sys import getsizeof
from time import thread_time
from typing import Any

MAX_SECONDS = 2.0
MAX_MADE = 128 << 20  # bytes of all values together
MAX_VALUE = 32 << 20  # bytes of one, what it holds counted as often as it stands there
MAX_BITS = 1 << 14  # of an integer
MAX_COMPARED = 1 << 28  # characters with characters, in one search
MAX_WIDTH = 9999  # of a number in a format
ITEM = 64  # bytes that an item costs, its place in a list included

_CONTAINERS = (list, tuple, Mapping, Set, KeysView, ValuesView, ItemsView)
_WIDTHS = re.compile(r"[#0\- +]*(\*|\d*)(?:\.(\*|\d*))?")


class OverBudget(RuntimeError):
    """A limit of this file was passed. No ValueError: jinja2's filters take some of those for an answer."""


class Budget:
    """The costs of one rendering so far."""

    def __init__(self) -> None:
        self._end = thread_time() + MAX_SECONDS
        self._left = MAX_MADE
        self._weights: dict[int, tuple[Any, int]] = {}  # of containers, which nothing in the sandbox can change

    def tick(self) -> None:
        """Called by whatever may repeat."""
        if thread_time() > self._end:
            raise OverBudget(f"it takes more than {MAX_SECONDS:g} seconds")

    def ticked(self, value: Any) -> Any:
        self.tick()
        return value

    def release(self) -> None:
        """Let go of the values that were weighed."""
        self._weights.clear()

    def spend(self, nbytes: int) -> None:
        """Pay for a value of at most that many bytes."""
        self.tick()
        self.check_size(nbytes)
        self._left -= max(nbytes, 0)
        if self._left < 0:
            raise OverBudget(f"it makes more than {MAX_MADE} bytes")

    def made(self, value: Any) -> Any:
        """Pay for what there is already; the value."""
        self.spend(getsizeof(value))
        self.weigh(value)
        return value

    def weigh(self, value: Any) -> int:
        """Bytes of a value written out: an item that stands in it twice counts twice, as when it is printed."""
        if isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise OverBudget(f"it makes an integer of more than {MAX_BITS} bits")
            return ITEM
        if not isinstance(value, _CONTAINERS):
            return getsizeof(value) if isinstance(value, str | bytes) else ITEM
        known = self._weights.get(id(value))
        if known is None:
            self.tick()
            self.check_size(len(value) * ITEM)
            # The value is kept with its weight, so that no other one gets its id.
            known = self._weights[id(value)] = value, self.weigh_all(
                [*value.keys(), *value.values()] if isinstance(value, Mapping) else value)
        return known[1]

    def weigh_all(self, values: Iterable[Any]) -> int:
        """Together."""
        total = ITEM + sum(map(self.weigh, values))
        self.check_size(total)
        return total

    def check_size(self, nbytes: int) -> None:
        if nbytes > MAX_VALUE:
            raise OverBudget(f"it makes a value of more than {MAX_VALUE} bytes")

    def listed(self, values: Iterable[Any]) -> list[Any]:
        """list(values), paid item by item."""
        found = []
        for value in values:
            self.spend(ITEM)
            found.append(value)
        return found

    def text(self, value: Any) -> str:
        """str(value), paid."""
        if isinstance(value, str):
            return value
        self.weigh(value)
        text = str(value)
        self.spend(getsizeof(text))
        return text

    def joined(self, values: Iterable[Any], between: str = "") -> str:
        """The texts of values, joined and paid."""
        pieces = [self.text(value) for value in self.listed(values)]
        self.spend(joined_nbytes(pieces) + len(pieces) * len(between) * width(between))
        return between.join(pieces)

    def paid_product(self, left: Any, right: Any) -> bool:
        """Pay for left * right where a text or list is repeated; whether it was."""
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, Sequence) and isinstance(times, int):
                each = width(sequence) if isinstance(sequence, str) else ITEM
                self.spend(ITEM + each * len(sequence) * times)
                return True
        return False

    def check_power(self, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_BITS:
            raise OverBudget(f"it makes an integer of more than {MAX_BITS} bits")

    def check_replace(self, text: str, old: str, new: str) -> None:
        self.spend(joined_nbytes([text, new[:1]]) + text.count(old) * len(new) * max(width(new), width(text)))

    def check_search(self, text: str, wanted: Any) -> None:
        """A search from the right, or for any character of a set, which compares each with each."""
        if isinstance(wanted, str) and len(text) * len(wanted) > MAX_COMPARED:
            raise OverBudget(f"it searches {len(wanted)} characters in {len(text)}")

    def check_percent(self, text: str, values: Any) -> None:
        """text % values: a width can make a short text long, and a name can stand in it any number of times."""
        self.spend(ITEM * text.count("%") + joined_nbytes([text]))
        parts = text.split("%")[1:]
        for part in parts:
            self.tick()
            rest = _after_name(part) if part.startswith("(") else part
            self.check_widths(_WIDTHS.match(rest).groups())  # type: ignore[union-attr]
        self.spend(self.weigh(values) * (len(parts) if isinstance(values, Mapping) else 1))

    def check_widths(self, widths: Iterable[str | None]) -> None:
        for given in widths:
            if given == "*" or (given and (len(given) > 9 or int(given) > MAX_WIDTH)):
                raise OverBudget(f"a format has width {given[:20]}, expected at most {MAX_WIDTH}")
            self.spend(int(given or 0))


def _after_name(part: str) -> str:
    depth = 0
    for at, character in enumerate(part[:1000]):
        depth += (character == "(") - (character == ")")
        if not depth:
            return part[at + 1 :]
    raise OverBudget("a name in a format has no end within 1000 characters")


def width(text: str) -> int:
    """At most how many bytes a character takes; a short text is not looked at."""
    return 1 if text.isascii() else 4 if len(text) < 256 else -(-(getsizeof(text) - 56) // len(text))


def joined_nbytes(pieces: Sequence[str]) -> int:
    """Bytes of the texts joined: the widest character gives all of them its width."""
    return ITEM + sum(map(len, pieces)) * max(map(width, pieces), default=1)
