"""Recurrent layers of a pass of which each rank has some tokens: a wavefront over ranks and layers.

Tokens lie on ranks in blocks, one after the other. A rank begins a layer's recurrence with the state after the block
before, which it receives when it needs it, and sends its own on as soon as that is whole: the bits of one process, and
while a rank is in one layer, the next one is in the layer before. After the pass every rank has the state after all.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from forge_c.distributed.comm import Comm, Pending
from forge_c.functional import RecurrentSlots
from forge_c.state.recurrent import RecurrentState

_TAG = 1 << 14  # in order, layer after layer


class Relay:
    """chain: the ranks that have tokens, in the order of these."""

    def __init__(self, comm: Comm, chain: list[int]) -> None:
        self.comm, self.chain = comm, chain
        self.layers: list[tuple[RecurrentState, Any]] = []
        self._sent: list[Pending] = []
        at = chain.index(comm.rank) if comm.rank in chain else -1
        self._before = chain[at - 1] if at > 0 else None
        self._after = chain[at + 1] if 0 <= at < len(chain) - 1 else None

    def slots(self, state: RecurrentState) -> RecurrentSlots:
        """What the pass is given of a layer's state, of one row: slot 0 is what it begins with, slot 1 where it ends.
        """
        memory = np.zeros((1, 2, state.memory.shape[2]), np.float32)
        current = int(state.history.current[0])
        if self._before is None and current >= 0:
            memory[0, 0] = state.memory[0, current]
        self.layers.append((state, memory))
        begins = self._before is None and current < 0

        def relay(written: bool) -> None:
            if written and self._after is not None:
                self._sent.append(self.comm.send(memory[0, 1], self._after, _TAG))
            elif not written and self._before is not None:
                self.comm.receive(memory[0, 0], self._before, _TAG).wait()

        return RecurrentSlots(memory, np.array([-1 if begins else 0]), np.array([1]), relay)

    def end(self) -> None:
        """Every rank has the last one's states."""
        for pending in self._sent:
            pending.wait()
        if not self.layers:
            return
        ends = np.concatenate([memory[0, 1] for _, memory in self.layers])
        self.comm.broadcast(ends, self.chain[-1])
        at = 0
        for state, memory in self.layers:
            n = memory.shape[2]
            state.memory[0, int(state.history.target[0])] = ends[at : at + n]
            at += n
