"""One text over several ranks: attention, a token after it and Mamba's scan, each rank with its share of the tokens.

    python examples/long_context_ranks.py                          4 ranks that are threads of this process
    mpiexec -n 4 python examples/long_context_ranks.py --mpi       processes, on one machine or on many

No rank ever holds all keys. On one machine that saves nothing and is no faster; over many, the text may be as long as
their memory together allows. The results are compared with one process's, which a real text would not fit into.
"""
from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import forge_c as fc
from forge_c.distributed import (
    Comm,
    MPIComm,
    ThreadComm,
    positions,
    ring_attention,
    selective_scan,
    shard,
    sharded_decode,
    unshard,
)

HEADS, KV_HEADS, DIM, CHANNELS, STATES = 8, 2, 64, 256, 16
Array = np.ndarray


def text(tokens: int) -> dict[str, Array]:
    """What every rank makes here, and would read its share of from a file otherwise."""
    rng = np.random.default_rng(0)
    shapes = {"q": (HEADS, DIM), "k": (KV_HEADS, DIM), "v": (KV_HEADS, DIM), "u": (CHANNELS,), "delta": (CHANNELS,),
              "B": (STATES,), "C": (STATES,)}
    return {name: rng.standard_normal((1, tokens, *shape), np.float32) for name, shape in shapes.items()}


def attend(comm: Comm, whole: dict[str, Array]) -> str:
    """A prompt in the layout that gives each rank the same work, then one token more."""
    q, k, v = (shard(whole[name], "zigzag", comm) for name in "qkv")
    out = ring_attention(q, k, v, comm=comm, layout="zigzag", causal=True)
    alone = fc.attention(whole["q"], whole["k"], whole["v"], causal=True)
    same = unshard(out, "zigzag", comm).tobytes() == alone.tobytes()
    token = whole["q"][:, -1:]
    off = np.abs(sharded_decode(token, k, v, comm=comm) - alone[:, -1:]).max()
    return f"attention: the same bits: {same}; the last token again, by sharded_decode: {off:.1e} off"


def remember(comm: Comm, whole: dict[str, Array]) -> str:
    """Mamba's scan: tokens in order, a state from rank to rank."""
    rates = -np.broadcast_to(np.arange(1, STATES + 1, dtype=np.float32), (CHANNELS, STATES)).copy()
    mine = {name: shard(whole[name], "contiguous", comm) for name in ("u", "delta", "B", "C")}
    y, state = selective_scan(**mine, A=rates, delta_softplus=True, comm=comm)
    alone, end = fc.selective_scan(**{name: whole[name] for name in mine}, A=rates, delta_softplus=True)
    same = unshard(y, "contiguous", comm).tobytes() == alone.tobytes() and state.tobytes() == end.tobytes()
    return f"Mamba's scan: the same bits: {same}"


def run(comm: Comm, tokens: int) -> str:
    with comm:
        whole = text(tokens)
        held = len(positions("zigzag", tokens, comm))
        return "\n    ".join([f"rank {comm.rank} of {comm.size} holds {held} of {tokens} tokens", attend(comm, whole),
                             remember(comm, whole)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=3001)
    parser.add_argument("--ranks", type=int, default=4, help="threads, without --mpi")
    parser.add_argument("--mpi", action="store_true", help="ranks are the processes that mpiexec has started")
    args = parser.parse_args()
    if args.mpi:
        print(run(MPIComm(), args.tokens))
        return
    with ThreadPoolExecutor(args.ranks) as pool:
        print(*pool.map(run, ThreadComm(args.ranks), [args.tokens] * args.ranks), sep="\n")


if __name__ == "__main__":
    main()
