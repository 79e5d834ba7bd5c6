"""Ring attention over ranks beside one rank's kernel: balance, what is waited for, memory, and when a link is fast
enough.

    for n in 1 2 4; do mpiexec -n $n python bench/ring.py steps --page; done      # each layout: a minute
    python bench/ring.py link --threads 2 --page      # simulated links on both sides of what the cost model asks for
    python bench/ring.py paper --page                 # the cost model alone, to 128 ranks

On one machine ranks share its cores and its memory: nothing here gets faster by them. What counts is that a rank spends
its time in the kernel. So its efficiency is what its score pairs would take by the kernel alone, while all other ranks
run that too, over what ring_attention takes; by the clock where each rank has a core, and by the time on cores. Rounds
take turns, the best of each counts; --page puts tables and figures into docs/distributed.md.
"""
from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from over_ranks import (
    DTYPES,
    add_arguments,
    forget_peak,
    memory,
    on_ranks,
    say,
    size_text,
    table,
    time_text,
    timed,
    tokens,
    where,
)
from report import put

import forge_c as fc
from forge_c.distributed import Comm, Stats, positions, ring_attention
from forge_c.distributed.layout import LAYOUTS
from forge_c.distributed.plan import RankPlan, piece_keys, plan, runs_of
from forge_c.distributed.predict import predict

PAGE = Path(__file__).resolve().parent.parent / "docs" / "distributed"
Array = np.ndarray[Any, Any]


# ---- each layout -------------------------------------------------------------------------------------


def link_rate(comm: Comm, nbytes: int = 8 << 20) -> float:
    """Bytes a second, all ranks sending to their next at once."""
    if comm.size == 1:
        return float("inf")
    there, here, rates = np.ones(nbytes, np.uint8), np.empty(nbytes, np.uint8), []
    for _ in range(4):
        comm.barrier()
        begin = time.perf_counter()
        arriving = comm.receive(here, (comm.rank - 1) % comm.size)
        comm.send(there, (comm.rank + 1) % comm.size).wait()
        arriving.wait()
        rates.append(nbytes / (time.perf_counter() - begin))
    return median(comm.all_gather(max(rates)))


def inputs(comm: Comm, layout: str, args: argparse.Namespace) -> tuple[Array, Array, Array]:
    at, dtype = positions(layout, args.tokens, comm), DTYPES[args.dtype]
    return tokens(1, at, (args.heads, args.dim)), *(tokens(i, at, (args.kv_heads, args.dim), dtype) for i in (2, 3))


def least(found: list[Any], *names: str) -> dict[str, float]:
    """Of several rounds: what others of the machine add is noise."""
    return {name: min(getattr(each, name) for each in found) for name in names}


def step(comm: Comm, layout: str, args: argparse.Namespace) -> dict[str, float]:
    """Of this rank, with one layout: the ring and, in turns, the kernel alone on as many queries and keys."""
    q, k, v = inputs(comm, layout, args)

    def ring(stats: Stats | None = None) -> object:
        return ring_attention(q, k, v, comm=comm, layout=layout, window=args.window, stats=stats)

    def kernel() -> object:
        return fc.attention(q, k, v)

    forget_peak()
    own, rings, kernels, stats = memory(), [], [], []
    timed(comm, ring)
    peak = memory("VmHWM")
    for _ in range(args.rounds):
        stats.append(Stats())
        rings.append(timed(comm, lambda: ring(stats[-1]))[1])
        kernels.append(timed(comm, kernel)[1])
    alone, pairs = least(kernels, "seconds", "cpu"), max(q.shape[1] * k.shape[1], 1)
    return {"pairs": sum(stats[0].pairs), "pair": alone["seconds"] / pairs, "pair_cpu": alone["cpu"] / pairs,
            "own": own, "grown": peak - own, **least(rings, "seconds", "cpu", "sent"),
            **least(stats, "received", "wait", "compute")}


def steps(comm: Comm, args: argparse.Namespace) -> dict[str, Any]:
    return {"link": link_rate(comm), **{layout: step(comm, layout, args) for layout in args.layouts}}


def steps_rows(ranks: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, list[str]]:
    """A row for each layout: of the slowest rank, of the largest memory, of the busiest link."""
    rows, cores = {}, os.cpu_count() or 1
    for layout in args.layouts:
        each = [r[layout] for r in ranks]
        seconds, mean = max(r["seconds"] for r in each), sum(r["pairs"] for r in each) / len(each)
        by_clock = mean * median(r["pair"] for r in each) / seconds
        by_cores = sum(r["pairs"] * r["pair_cpu"] for r in each) / sum(r["cpu"] for r in each)
        received, wait = (max(r[name] for r in each) for name in ("received", "wait"))
        rows[layout] = [
            str(len(each)), f"{args.tokens:,}", layout, time_text(seconds),
            f"{by_clock:.2f}" if len(each) <= cores else "–", f"{by_cores:.2f}",
            f"{max(r['pairs'] for r in each) / mean:.3f}", size_text(max(r["sent"] for r in each)),
            time_text(received / ranks[0]["link"]), time_text(wait), f"{max(r['own'] for r in each):.0f} MB",
            f"{max(r['grown'] for r in each):.1f} MB"]
    return rows


STEPS_HEAD = ["ranks", "tokens", "layout", "time", "efficiency", "of the cores", "most pairs over mean",
              "sent by a rank", "transfer alone", "waited", "memory of a rank", "more in the ring"]


def write_steps(ranks: list[dict[str, Any]], args: argparse.Namespace) -> None:
    rows = steps_rows(ranks, args)
    say(table(STEPS_HEAD, list(rows.values())))
    if not args.page:
        return
    kept = load()
    found = kept.setdefault("steps", {}).setdefault(f"{where()}; {of(args)}", {})
    found |= {f"{len(ranks):03d} {args.tokens:09d} {layout}": row for layout, row in rows.items()}
    save(kept)
    tables = [f"{name}:\n\n{table(STEPS_HEAD, [rows[key] for key in sorted(rows)])}"
              for name, rows in kept["steps"].items()]
    put(PAGE.with_suffix(".md"), "steps", "\n".join(tables))


def of(args: argparse.Namespace) -> str:
    return f"causal, {args.heads} query and {args.kv_heads} key heads of {args.dim}, keys in {args.dtype}"


def load() -> dict[str, Any]:
    path = PAGE / "ring.json"
    return json.loads(path.read_text()) if path.exists() else {}


def save(kept: dict[str, Any]) -> None:
    PAGE.mkdir(exist_ok=True)
    (PAGE / "ring.json").write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


# ---- links, as fast as they must be and slower -------------------------------------------------------


def link(args: argparse.Namespace) -> None:
    """Shards of one size, links around what hides the transfers: the clock beside the plan's."""
    args.threads, args.window, rows = args.threads or 2, None, []
    layout, token_bytes = args.layouts[0], 2 * args.kv_heads * args.dim * DTYPES[args.dtype].itemsize
    ranks = planned(layout, args.tokens, args.threads, token_bytes)

    def work(comm: Comm) -> dict[str, float]:
        return step(comm, layout, args)

    free = gathered(on_ranks(args, work))
    pair = median(r["compute"] / r["pairs"] for r in free)
    compute, received = pair * max(r["pairs"] for r in free), max(r["received"] for r in free)
    for times in (8, 4, 2, 1, 0.5, 0.25):
        args.bandwidth = received / compute * times
        found = gathered(on_ranks(args, work))
        seconds, wait = (max(r[name] for r in found) for name in ("seconds", "wait"))
        said = predict(ranks, token_bytes=token_bytes, pair_seconds=pair, bandwidth=args.bandwidth)
        transfer = received / args.bandwidth
        rows.append([f"{args.bandwidth / 1e6:.1f} MB/s", time_text(compute), time_text(transfer),
                     time_text(max(said.finish)), time_text(seconds), time_text(max(said.wait)), time_text(wait),
                     f"{100 * wait / transfer:.0f} %"])
    head = ["link", "products of a rank", "its transfers", "predicted", "measured", "waited: predicted", "measured",
            "of the transfers"]
    text = table(head, rows)
    say(text)
    if args.page:
        title = f"{where()}; {args.threads} ranks, {of(args)}, {args.tokens:,} tokens, {layout}"
        put(PAGE.with_suffix(".md"), "link", f"{title}:\n\n{text}")


def planned(layout: str, tokens_: int, ranks: int, token_bytes: int) -> tuple[RankPlan, ...]:
    """What ring_attention does with causal=True."""
    runs = runs_of(layout, tokens_, ranks)
    return plan(runs, causal=True, window=None, piece=piece_keys(runs, token_bytes))


def gathered(found: list[Any] | None) -> list[Any]:
    if found is None:
        raise RuntimeError("links are simulated between threads: use --threads, not mpiexec")
    return found


# ---- on paper ----------------------------------------------------------------------------------------

MODELS = {"Qwen3-0.6B": (28, 16, 8, 128), "Llama-3-8B": (32, 32, 8, 128), "Llama-3-70B": (80, 64, 8, 128)}
TOKENS, FLOPS, READ, NUMBER = 1 << 20, 1e12, 100e9, 2  # of a rank; bfloat16 on the wire and in caches
LINKS = (1.25e9, 0.125e9)  # 10 and 1 Gbit/s


def paper_row(name: str, ranks: int) -> list[str]:
    layers, heads, kv_heads, dim = MODELS[name]
    shard, token_bytes, pair = TOKENS // ranks, 2 * kv_heads * dim * NUMBER, 4 * heads * dim / FLOPS
    clocks = [predict(planned("zigzag", TOKENS, ranks, token_bytes), token_bytes=token_bytes, pair_seconds=pair,
                      bandwidth=each, latency=50e-6) for each in LINKS]
    ideal = TOKENS * (TOKENS + 1) / 2 / ranks * pair
    cache = shard * layers * token_bytes
    return [name, str(ranks), f"{shard:,}", time_text(ideal), size_text(max(clocks[0].sent)),
            *(f"{ideal / max(each.finish):.3f}" for each in clocks), time_text(layers * max(clocks[0].finish)),
            size_text(cache), time_text(cache / READ)]


def paper(args: argparse.Namespace) -> None:
    head = ["model", "ranks", "tokens of a rank", "products of a layer", "sent by a rank", "efficiency at 10 Gbit/s",
            "at 1 Gbit/s", "attention of the prompt", "cache of a rank", "reading it, a token"]
    text = table(head, [paper_row(name, ranks) for name in MODELS for ranks in (8, 32, 128)])
    say(text)
    if args.page:
        put(PAGE.with_suffix(".md"), "paper", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "link", "paper"))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--window", type=int)
    parser.add_argument("--layouts", type=lambda text: text.split(","), default=[*LAYOUTS], metavar="NAME,...")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--page", action="store_true", help="put the result into docs/distributed.md")
    add_arguments(parser)
    args = parser.parse_args()
    calls: dict[str, Callable[[argparse.Namespace], None]] = {"link": link, "paper": paper}
    if args.what in calls:
        return calls[args.what](args)
    ranks = on_ranks(args, lambda comm: steps(comm, args))
    if ranks is not None:
        write_steps(ranks, args)


if __name__ == "__main__":
    main()
