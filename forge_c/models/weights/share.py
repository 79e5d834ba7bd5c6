"""A share of a checkpoint's tensors: some rows of some, some columns of others; of large ones no more is read."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from forge_c.models.weights.source import Tensors, decay

Index = NDArray[np.intp]


class Cut(NamedTuple):
    """Which part of a tensor: `ranges` along an axis that has n in the whole; end to end. across: what the other axis
    of a matrix has, where it is asked for by less."""

    axis: int
    n: int
    ranges: tuple[range, ...]
    across: int = 0

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor of which one of `shape` is asked for."""
        after = (self.across,) if self.across and len(shape) == 2 and self.axis == 0 else shape[self.axis + 1 :]
        return *shape[: self.axis], self.n, *after

    def of(self, tensor: NDArray[Any]) -> NDArray[Any]:
        """The part, a copy."""
        before = (slice(None),) * self.axis
        return np.concatenate([tensor[(*before, slice(some.start, some.stop))] for some in self.ranges], self.axis)


class Kept(NamedTuple):
    """All of a tensor, or, where it is not here, zeros: a term of a sum of which one holds it."""

    here: bool


@runtime_checkable
class ReadsParts(Protocol):
    """Tensors of which parts can be read."""

    def take_rows(self, name: str, shape: tuple[int, ...], rows: Index) -> NDArray[Any]:
        """These rows of a matrix that has `shape`, as take."""

    def take_columns(self, name: str, shape: tuple[int, ...], columns: range) -> NDArray[Any]:
        """These columns, likewise."""


class SharedTensors:
    """The tensors of `cuts` in part, by the names that Hugging Face gives them, the others whole. A matrix of a source
    that cannot read parts is there as a whole for a moment."""

    def __init__(self, tensors: Tensors, cuts: Mapping[str, Cut | Kept]) -> None:
        self._tensors, self._cuts = tensors, cuts

    def take(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """As Tensors.take; the shape is the part's."""
        cut = self._cuts.get(name)
        if cut is None:
            return self._tensors.take(name, shape)
        if isinstance(cut, Kept):
            found = self._tensors.take(name, shape)
            return found if cut.here else np.zeros_like(found)
        if len(shape) == 2 and isinstance(self._tensors, ReadsParts):
            if cut.axis == 0:
                return self._tensors.take_rows(name, cut.whole(shape), _index(cut.ranges))
            return self.columns(name, cut.whole(shape), cut.ranges[0])
        return cut.of(self._tensors.take(name, cut.whole(shape)))

    def columns(self, name: str, shape: tuple[int, ...], columns: range) -> NDArray[Any]:
        """These columns of a matrix of that shape, whatever the cut."""
        if isinstance(self._tensors, ReadsParts):
            return self._tensors.take_columns(name, shape, columns)
        return self._tensors.take(name, shape)[:, columns.start : columns.stop].copy()

    def cut_of(self, name: str) -> Cut | None:
        """Where a tensor is cut."""
        cut = self._cuts.get(name)
        return cut if isinstance(cut, Cut) else None

    def take_decay(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """As HoldsDecay.take_decay, of any tensors."""
        cut = self._cuts.get(name)
        if isinstance(cut, Cut):
            return cut.of(decay(self._tensors, name, cut.whole(shape)))
        return decay(self._tensors, name, shape)

    def check_all_taken(self, allowed: tuple[str, ...] = ()) -> None:
        """As Tensors.check_all_taken."""
        self._tensors.check_all_taken(allowed)


class SharedBlocks(SharedTensors):
    """The same of tensors that can be had as ggml's blocks."""

    _tensors: Any

    def take_raw(self, name: str, shape: tuple[int, ...]) -> tuple[str, NDArray[np.uint8]]:
        """As StoredTensors.take_raw; columns are cut between blocks."""
        cut = self._cuts.get(name)
        if not isinstance(cut, Cut):
            return self._tensors.take_raw(name, shape)
        if cut.axis == 0:
            return self._tensors.take_raw_rows(name, cut.whole(shape), _index(cut.ranges))
        return self._tensors.take_raw_columns(name, cut.whole(shape), cut.ranges[0])

    def mostly(self) -> str:
        """As StoredTensors.mostly."""
        return self._tensors.mostly()


def _index(ranges: Sequence[range]) -> Index:
    return np.concatenate([np.arange(some.start, some.stop) for some in ranges])
