"""The RoPE tables of a model, one for each rope of its spec, made as long as they are asked for."""
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from forge_c.models.spec import Rope
from forge_c.rotary import (
    DEPEND_ON_LENGTH,
    RopeTable,
    extend_rope_table,
    longest_short,
    rope_table,
    rope_table_by_position,
)


class RopeTables:
    """What it has made is not pickled: another process makes its own."""

    def __init__(self) -> None:
        self._held: dict[tuple[Rope, int | None], RopeTable] = {}  # length: for which its angles are chosen

    def __reduce__(self) -> Any:
        return RopeTables, ()

    def of(self, rope: Rope | None) -> TableOf | None:
        """What gives a cache its tables."""
        return None if rope is None else TableOf(self, rope)

    def table(self, rope: Rope, positions: int, length: int | None) -> RopeTable:
        """A table for at least so many positions of a text of that length; None: see TableOf."""
        key = (rope, length)
        held = self._held.get(key)
        if held is None or held.max_seq_len < positions:
            held = self._held[key] = _made(rope, 1 << (positions - 1).bit_length(), length, held)
        if length is not None and rope.scaling.get("rope_type") == "dynamic":  # one for each length: keep the last
            for other in list(self._held):
                if other[0] == rope and other[1] not in (None, length):
                    self._held.pop(other, None)
        return held


@dataclass(frozen=True)
class TableOf:
    """A rope's tables: table_of(positions, length), for at least so many positions of a text of that length. Without
    length every position has the angles of a text that ends with it; where they do not depend on it, all have the same.
    """

    tables: RopeTables
    rope: Rope

    def __call__(self, positions: int, length: int | None = None) -> RopeTable:
        chosen = self.chosen(length) if length is not None and self.depends_on_length else None
        return self.tables.table(self.rope, positions, chosen)

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's angles depend on how long its text is."""
        return depends_on_length(self.rope)

    def chosen(self, length: int) -> int:
        """A length with the same angles, the same for all that have them."""
        border = self._longest_short
        return max(length, border) if self.rope.scaling["rope_type"] == "dynamic" else border + (length > border)

    @cached_property
    def _longest_short(self) -> int:
        return longest_short(self.rope.scaling)

    def outdated(self, before: int, held: int, now: int) -> int | None:
        """For which length the `held` tokens of a row must be read again, or None. before: for which the last of them
        was, negative if the text of that length has been cut off behind it; now: for which those are that come.

        longrope: all tokens of a text have the same angles, as in transformers' generate. dynamic: those that are there
        keep what they have, as in transformers; only after a truncation they are read as if the rest had never been.
        """
        if self.rope.scaling["rope_type"] == "longrope":
            return None if before and self.chosen(abs(before)) == self.chosen(now) else now
        read_for = (self.chosen(held), self.chosen(now) if before > 0 else 0)
        return None if before and self.chosen(abs(before)) in read_for else held


def _made(rope: Rope, rows: int, length: int | None, held: RopeTable | None) -> RopeTable:
    if length is None and depends_on_length(rope):
        return rope_table_by_position(rope.dim, rows, rope.theta, rope.scaling, held)
    if held is None:
        return rope_table(rope.dim, rows, rope.theta, scaling=rope.scaling, seq_len=length)
    return extend_rope_table(held, rows, rope.theta, scaling=rope.scaling, seq_len=length)


def depends_on_length(rope: Rope) -> bool:
    """Whether its angles depend on how long the text is."""
    return rope.scaling.get("rope_type") in DEPEND_ON_LENGTH
