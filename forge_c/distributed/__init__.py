"""One context over several processes: communicators, the layout of tokens over ranks, and what runs on them.

See docs/distributed.md. Nothing here starts before a communicator is made; mpi4py is imported by MPIComm alone.
"""
from forge_c.distributed.comm import Comm, RankError, SelfComm
from forge_c.distributed.decode import sharded_decode
from forge_c.distributed.gathered import gathered_attention
from forge_c.distributed.layout import positions, shard, unshard
from forge_c.distributed.mpi import MPIComm
from forge_c.distributed.parallel import parallel
from forge_c.distributed.ring import ring_attention
from forge_c.distributed.stats import Stats
from forge_c.distributed.threads import ThreadComm
from forge_c.distributed.ulysses import ulysses_attention

__all__ = ["Comm", "MPIComm", "RankError", "SelfComm", "Stats", "ThreadComm", "gathered_attention", "parallel",
           "positions", "ring_attention", "shard", "sharded_decode", "ulysses_attention", "unshard"]


def __dir__() -> list[str]:
    """What is meant for users, for completion at a prompt."""
    return sorted(__all__)
