"""One context over several processes: communicators, the layout of tokens over ranks, and what runs on them.

Which attention of tokens that lie on ranks, for H query heads, G key/value heads and N ranks; the first three give the
same bits, those of one process:
- ring_attention, unless one of these holds. Any heads, any length; memory of two pieces of keys beside the rank's own.
- ulysses_attention, where it takes the heads, N > H / G + 1 (it then sends less than a ring) and a rank can hold the
  whole sequence of H / N heads. Equal work for any layout and mask.
- gathered_attention, for sequences under some 4096 N tokens, where a ring's pieces would be small, or with a window
  that is short beside a rank's part; a rank holds what it sees of two groups of heads.
- sharded_decode, for new tokens, or a short prompt, against keys that stay where they are.

See docs/distributed.md. Nothing here starts before a communicator is made; mpi4py is imported by MPIComm alone.
"""
from forge_c.distributed.comm import Comm, RankError, SelfComm
from forge_c.distributed.decode import sharded_decode
from forge_c.distributed.gathered import gathered_attention
from forge_c.distributed.layout import positions, shard, unshard
from forge_c.distributed.mpi import MPIComm
from forge_c.distributed.parallel import parallel
from forge_c.distributed.ring import ring_attention
from forge_c.distributed.scan import (
    causal_conv1d,
    exclusive_scan,
    gated_delta,
    rg_lru,
    s4d_scan,
    selective_scan,
    ssd_scan,
)
from forge_c.distributed.stats import Stats
from forge_c.distributed.threads import ThreadComm
from forge_c.distributed.ulysses import ulysses_attention

__all__ = ["Comm", "MPIComm", "RankError", "SelfComm", "Stats", "ThreadComm", "causal_conv1d", "exclusive_scan",
           "gated_delta", "gathered_attention", "parallel", "positions", "rg_lru", "ring_attention", "s4d_scan",
           "selective_scan", "shard", "sharded_decode", "ssd_scan", "ulysses_attention", "unshard"]


def __dir__() -> list[str]:
    """What is meant for users, for completion at a prompt."""
    return sorted(__all__)
