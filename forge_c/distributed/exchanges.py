"""What ranks that share weights tell each other in a pass: sums of what each gives, or the columns of each."""
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from forge_c.distributed.comm import Comm
from forge_c.distributed.cuts import Ranges, cut_anyhow
from forge_c.functional import Ranks
from forge_c.models.spec import ModelSpec

Floats = NDArray[np.float32]


class Exchanges:
    """Of one model on one rank. vocabulary: each rank's tokens; columns: each rank's of the residual stream, of a model
    that is exact; sum: as Ranks."""

    def __init__(self, comm: Comm, spec: ModelSpec, exact: bool) -> None:
        self._comm, self._made = comm, dict[tuple[Ranges, int], Ranks]()
        self.vocabulary = cut_anyhow(f"the vocabulary has {spec.vocab_size} tokens", spec.vocab_size, comm.size)
        hidden = spec.hidden_size
        self.columns = cut_anyhow(f"the residual stream has {hidden} channels", hidden, comm.size) if exact else None
        self.sum = Ranks(self._summed)

    def over(self, inner: Ranges) -> tuple[Ranks | None, Ranks]:
        """As parts take it: inner are each rank's of the channels that the part's last matrix takes in."""
        return (None, self.sum) if self.columns is None else (self._beside(inner), self._beside(self.columns))

    def logits(self, mine: Floats) -> Floats:
        """Of all tokens, (..., vocab), from each rank's."""
        found = self._joined(mine.reshape(-1, mine.shape[-1]), self.vocabulary)
        return found.reshape(*mine.shape[:-1], found.shape[1])

    def _summed(self, y: Floats) -> Floats:
        self._comm.all_reduce(y)
        return y

    def _beside(self, ranges: Ranges) -> Ranks:
        """Always the same for the same ranges: parts that have one in common exchange once."""
        known = ranges, ranges[-1].stop
        if known not in self._made:
            self._made[known] = Ranks(lambda y: self._joined(y, ranges), ranges[self._comm.rank], ranges[-1].stop)
        return self._made[known]

    def _joined(self, mine: Floats, ranges: Ranges) -> Floats:
        """Columns (rows, n) from each rank's."""
        parts = [np.empty((len(mine), len(some)), np.float32) for some in ranges]
        self._comm.all_gather_arrays(mine, parts)
        return np.concatenate(parts, axis=1)
