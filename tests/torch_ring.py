"""torch's own ring attention, on CPU processes that talk by gloo: what ring_attention is compared with.

run_all() finds q, k and v (batch, heads, tokens, dim) of the whole in a folder, and every rank saves its rows there.
Importing torch takes seconds, so all ranks fork off one process that has done it.
"""

from __future__ import annotations

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

SIZES = (2, 3, 4)
# Layout, whether that is torch's load balance, causal.
CASES = (("zigzag", True, True), ("contiguous", False, True), ("contiguous", False, False))


def result_file(size: int, case: int, rank: int) -> str:
    return f"{size} ranks, case {case}, rank {rank}.npz"


def run_all(folder: Path) -> str | None:
    """Why it cannot be done here, or None when it is."""
    import torch

    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        return f"torch {torch.__version__} is without gloo"
    try:  # Not only a check: what this imports takes longer than torch, and is to be there before the ranks fork.
        import torch._dynamo
        import torch.distributed.tensor.experimental._attention as theirs
        _ = theirs._templated_ring_attention, theirs._HeadTailLoadBalancer, theirs._cp_options
    except (ImportError, AttributeError) as error:
        return f"torch {torch.__version__} has its ring attention elsewhere: {error}"
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo looks up this machine's name, which some networks do not know
    for size in SIZES:
        ranks = [fork_rank(folder, rank, size) for rank in range(size)]
        failed = [rank for rank, process in enumerate(ranks) if os.waitpid(process, 0)[1]]
        if failed:
            sys.exit(f"ranks {failed} of {size} failed")
    return None


def fork_rank(folder: Path, rank: int, size: int) -> int:
    process = os.fork()
    if process == 0:
        try:
            run_rank(folder, rank, size)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return process


def run_rank(folder: Path, rank: int, size: int) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.tensor.experimental._attention as theirs

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store of {size}", rank=rank, world_size=size,
                            timeout=timedelta(seconds=60))
    q, k, v = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in "qkv")
    group: Any = dist.group.WORLD
    for index, (_, balance, causal) in enumerate(CASES):
        seq_len = q.shape[2]
        order = theirs._HeadTailLoadBalancer(seq_len, size, "cpu")._generate_indices()[0]
        rows = (order if balance else torch.arange(seq_len)).chunk(size)[rank]
        theirs._cp_options.enable_load_balance = balance
        out, lse, *_ = theirs._templated_ring_attention(
            group, 2, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
            *(x[:, :, rows] for x in (q, k, v)), is_causal=causal)
        np.savez(folder / result_file(size, index, rank), positions=rows, out=out, lse=lse)
    dist.barrier()
    dist.destroy_process_group()
