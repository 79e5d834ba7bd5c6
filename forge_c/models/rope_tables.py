"""The RoPE tables of a model, one for each rope of its spec, made as long as they are asked for."""
from __future__ import annotations

from functools import partial
from typing import Any

from forge_c.models.spec import Rope
from forge_c.rotary import DEPEND_ON_LENGTH, RopeTable, extend_rope_table, rope_table
from forge_c.state.model import TableOf


class RopeTables:
    """What it has made is not pickled: another process makes its own."""

    def __init__(self) -> None:
        self._held: list[tuple[Rope, RopeTable]] = []

    def __reduce__(self) -> Any:
        return RopeTables, ()

    def of(self, rope: Rope | None, room: int) -> TableOf | None:
        """What gives a cache with room for that many tokens its tables."""
        if rope is None:
            return None
        return partial(self._fixed, rope, room) if depends_on_length(rope) else partial(self.table, rope)

    def _fixed(self, rope: Rope, room: int, length: int) -> RopeTable:
        return self.table(rope, room)

    def table(self, rope: Rope, length: int) -> RopeTable:
        """A table for at least `length` positions, or exactly as many where the angles depend on it."""
        held = next((table for known, table in self._held if known == rope), None)
        exact = depends_on_length(rope)
        if held is not None and (held.max_seq_len == length if exact else held.max_seq_len >= length):
            return held
        rows = length if exact else 1 << (length - 1).bit_length()
        if held is None or exact:
            table = rope_table(rope.dim, rows, rope.theta, scaling=rope.scaling)
        else:
            table = extend_rope_table(held, rows, rope.theta, scaling=rope.scaling)
        self._held = [(known, t) for known, t in self._held if known != rope] + [(rope, table)]
        return table


def depends_on_length(rope: Rope) -> bool:
    """Whether its angles depend on how long the text will be."""
    return rope.scaling.get("rope_type") in DEPEND_ON_LENGTH
