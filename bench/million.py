"""A million tokens over ranks, run and checked: what it takes of time, of the link and of each rank's memory.

    mpiexec -n 4 python bench/million.py mamba                     # Mamba's convolution and scan, in shards
    mpiexec -n 4 python bench/million.py decode --folder /tmp      # a token against a cache in mapped files
    mpiexec -n 4 python bench/million.py window                    # a prompt of a layer with a window
    mpiexec -n 4 python bench/million.py causal                    # one head, every key: minutes

Each says one row of a table in docs/distributed.md, and with --page puts it there. Results are compared with float64:
attention's rows at sampled places, whose keys every rank can make alone; Mamba's with float64 channels, and bit by bit
with those of one process. --threads N instead of mpiexec: ranks in one process.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from over_ranks import (
    DTYPES,
    Exact,
    KeyBlocks,
    add_arguments,
    forget_peak,
    memory,
    on_ranks,
    sample,
    say,
    size_text,
    table,
    timed,
    tokens,
    where,
)
from report import put

import forge_c as fc
from forge_c.distributed import Comm, positions, ring_attention, sharded_decode
from forge_c.distributed import causal_conv1d as conv_over_ranks
from forge_c.distributed import selective_scan as scan_over_ranks
from forge_c.distributed.layout import LAYOUTS

Array = np.ndarray[Any, Any]
PAGE = Path(__file__).resolve().parent.parent / "docs" / "distributed"
ORDER = ("decode", "window", "causal", "mamba")
STATES, WIDTH, PIECE = 16, 4, 8192


# ---- Mamba -------------------------------------------------------------------------------------------


def mamba_inputs(at: Array, args: argparse.Namespace) -> dict[str, Array]:
    """Of the tokens at these positions."""
    dtype, wide = DTYPES[args.dtype], (args.channels,)
    return {"x": tokens(1, at, wide, dtype), "delta": tokens(2, at, wide, dtype) - dtype.type(4),
            "z": tokens(3, at, wide, dtype), "B": tokens(4, at, (STATES,), dtype), "C": tokens(5, at, (STATES,), dtype)}


def mamba_weights(args: argparse.Namespace) -> dict[str, Array]:
    """Decays as a fresh Mamba has them."""
    rng = np.random.default_rng(0)
    a = -np.broadcast_to(np.arange(1, STATES + 1, dtype=np.float32), (args.channels, STATES))
    return {"weight": rng.standard_normal((args.channels, WIDTH), np.float32) / 2, "A": np.ascontiguousarray(a),
            "D": np.ones(args.channels, np.float32)}


def mixer(given: dict[str, Array], w: dict[str, Array], comm: Comm | None, before: Any) -> tuple[Array, Any]:
    """A Mamba's convolution, scan and gate; over ranks where there are any."""
    conv, scan, more = (fc.causal_conv1d, fc.selective_scan, {}) if comm is None else \
        (conv_over_ranks, scan_over_ranks, {"comm": comm})
    u, held = conv(given["x"], w["weight"], activation="silu", state=before[0], **more)  # type: ignore[operator]
    y, h = scan(u, given["delta"], w["A"], given["B"], given["C"], w["D"], z=given["z"],  # type: ignore[operator]
                delta_softplus=True, state=before[1], **more)
    return y, (held, h)


def digest(y: Array) -> str:
    return hashlib.blake2b(np.ascontiguousarray(y).view(np.uint8), digest_size=16).hexdigest()


def mamba(comm: Comm, args: argparse.Namespace) -> dict[str, Any]:
    at, w = positions("contiguous", args.tokens, comm), mamba_weights(args)
    given = mamba_inputs(at, args)
    forget_peak()
    own = memory()
    (y, state), tally = timed(comm, lambda: mixer(given, w, comm, (None, None)))
    return {"rows": len(at), "digest": digest(y), "state": digest(state[1]), "own": own, "peak": memory("VmHWM"),
            "sampled": y[0, ::args.every, ::args.channels // 4].astype(np.float64), **vars(tally)}


class ExactMamba:
    """Four channels in float64, from inputs as they are rounded."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.some, self.dtype = slice(None, None, args.channels // 4), DTYPES[args.dtype]
        self.w = {name: value[self.some].astype(np.float64) for name, value in mamba_weights(args).items()}
        self.tail, self.h = np.zeros((WIDTH - 1, 4)), np.zeros((4, STATES))

    def __call__(self, given: dict[str, Array]) -> Array:
        """The next tokens, (tokens, 4)."""
        x, delta, z = (given[name][0, :, self.some].astype(np.float64) for name in ("x", "delta", "z"))
        b, c = (given[name][0].astype(np.float64) for name in "BC")
        seen = np.concatenate([self.tail, x])
        u = sum(seen[k:k + len(x)] * self.w["weight"][:, k] for k in range(WIDTH))
        u = (u / (1 + np.exp(-u))).astype(self.dtype).astype(np.float64)  # as it is between the two ops
        step = np.log1p(np.exp(delta))[..., None]
        decay, added, y = np.exp(step * self.w["A"]), step * u[..., None] * b[:, None], np.empty_like(x)
        for t in range(len(x)):
            self.h = decay[t] * self.h + added[t]
            y[t] = self.h @ c[t]
        self.tail = seen[len(x):]
        return (y + self.w["D"] * u) * z / (1 + np.exp(-z))


def mamba_alone(args: argparse.Namespace, lengths: list[int]) -> dict[str, Any]:
    """One process, in pieces: the bits of each shard, the seconds, and float64."""
    w, state, seconds, digests, exact, at = mamba_weights(args), (None, None), 0.0, [], ExactMamba(args), 0
    rows = [np.empty((0, 4))]
    for length in lengths:
        parts = [np.empty((1, 0, args.channels), DTYPES[args.dtype])]
        for begin in range(at, at + length, PIECE):
            given = mamba_inputs(np.arange(begin, min(begin + PIECE, at + length)), args)
            clock = time.perf_counter()
            y, state = mixer(given, w, None, state)
            seconds += time.perf_counter() - clock
            parts.append(y)
            rows.append(exact(given))
        digests.append(digest(np.concatenate(parts, axis=1)))
        at += length
    return {"seconds": seconds, "digests": digests, "state": digest(state[1]), "exact": np.concatenate(rows)}


def report_mamba(ranks: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    fc.set_num_threads(os.cpu_count() or 1)
    alone, starts = mamba_alone(args, [r["rows"] for r in ranks]), np.cumsum([0, *(r["rows"] for r in ranks)])
    exact = alone["exact"]
    off = max(np.abs(r["sampled"] - exact[a:b:args.every]).max(initial=0) for r, a, b in
              zip(ranks, starts[:-1], starts[1:], strict=True))
    same = [r["digest"] for r in ranks] == alone["digests"] and all(r["state"] == alone["state"] for r in ranks)
    return {"what": f"Mamba's convolution and scan, {args.channels} channels of {STATES} states, {args.dtype}",
            "rate": f"{args.tokens / max(r['seconds'] for r in ranks) / 1e3:,.0f}k tokens/s; one process "
                    f"{args.tokens / alone['seconds'] / 1e3:,.0f}k",
            "checked": f"{'the bits' if same else 'NOT THE BITS'} of one process; {off / np.abs(exact).max():.1e} of "
                       f"the largest y, rounded to {args.dtype}, from float64"}


# ---- attention ---------------------------------------------------------------------------------------


def keys(begin: int, end: int, args: argparse.Namespace) -> tuple[Array, Array, Array]:
    at, shape = np.arange(begin, end), (args.kv_heads, args.dim)
    return at, *(tokens(seed, at, shape, DTYPES[args.dtype])[0] for seed in (2, 3))


def keys_at(at: Array, args: argparse.Namespace) -> KeyBlocks:
    """Of neighbouring positions."""
    end = int(at[-1]) + 1
    for begin in range(int(at[0]), end, PIECE):
        yield keys(begin, min(begin + PIECE, end), args)


def seen_blocks(at: Array, args: argparse.Namespace) -> KeyBlocks:
    """What the queries at these positions see any of."""
    for begin in range(0, int(at.max()) + 1, PIECE):
        end = min(begin + PIECE, args.tokens)
        if args.window is None or ((at >= begin) & (at - args.window < end)).any():
            yield keys(begin, end, args)


def prompt(comm: Comm, args: argparse.Namespace) -> dict[str, Any]:
    """Queries in float32, so that no rounding of the result hides an error."""
    at = positions(args.layout, args.tokens, comm)
    q = tokens(1, at, (args.heads, args.dim))
    k, v = (tokens(seed, at, (args.kv_heads, args.dim), DTYPES[args.dtype]) for seed in (2, 3))
    forget_peak()
    own = memory()
    out, tally = timed(comm, lambda: ring_attention(q, k, v, comm=comm, layout=args.layout, window=args.window))
    found = {"own": own, "peak": memory("VmHWM"), **vars(tally)}
    picked = sample(at, -(-args.rows // comm.size))
    exact, largest = Exact.of([Exact(q[0, picked], at[picked], seen_blocks(at[picked], args), args.window)])
    return {"picked": len(picked), "off": float(np.abs(out[0, picked] - exact).max()) / largest, **found}


def report_prompt(ranks: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    s, w = args.tokens, args.tokens if args.window is None else min(args.window, args.tokens)
    flops = 4 * args.heads * args.dim * (w * (w + 1) / 2 + (s - w) * w)
    sees = "every key before it" if args.window is None else f"a window of {args.window}"
    return {"what": f"a prompt, {heads_text(args)}, {sees}, {args.layout}",
            "rate": f"{flops / max(r['seconds'] for r in ranks) / 1e9:.0f} GFLOP/s",
            "checked": f"{sum(r['picked'] for r in ranks)} rows, {max(r['off'] for r in ranks):.1e} max\\|v\\|"}


def heads_text(args: argparse.Namespace) -> str:
    return f"{args.heads} query and {args.kv_heads} key heads of {args.dim}, {args.dtype}"


def decode(comm: Comm, args: argparse.Namespace) -> dict[str, Any]:
    """The best of a few tokens, against a cache whose file has been read once. A file's pages are not the rank's own
    memory: the system takes them back when it likes."""
    at, path = positions("contiguous", args.tokens, comm), args.folder / f"million.{comm.rank}.npy"
    try:
        cache = fc.KVCache.load(path, "r") if args.keep and path.exists() else filled(path, at, args)
        q = tokens(1, np.arange(1), (args.heads, args.dim))
        own, tallies = memory("RssAnon"), []
        for _ in range(args.steps):
            out, tally = timed(comm, lambda: sharded_decode(q, cache, comm=comm))
            tallies.append(tally)
        peak, nbytes = memory("RssAnon"), cache.nbytes
    finally:
        if not args.keep:
            path.unlink(missing_ok=True)
    some = slice(None, None, max(1, args.kv_heads // 2))  # of key heads, with all queries of each
    heads = np.arange(args.heads).reshape(args.kv_heads, -1)[some].reshape(-1)
    blocks = ((there, k[:, some], v[:, some]) for there, k, v in keys_at(at, args))
    mine = Exact(q[0][:, heads], np.full(1, args.tokens), blocks)
    exact, largest = Exact.of(comm.all_gather(mine))
    off = float(np.abs(out[0][:, heads] - exact).max()) / largest
    best = min(range(1, args.steps), key=lambda i: tallies[i].seconds)
    return {"off": off, "first": tallies[0].seconds, "own": own, "peak": peak, "nbytes": nbytes,
            **vars(tallies[best])}


def filled(path: Path, at: Array, args: argparse.Namespace) -> fc.KVCache:
    path.unlink(missing_ok=True)
    cache = fc.KVCache(1, len(at), args.kv_heads, args.dim, dtype=args.dtype, path=path)
    for _, k, v in keys_at(at, args):
        cache.append(k[None].astype(np.float32), v[None].astype(np.float32))
    cache.flush()
    del cache
    return fc.KVCache.load(path, "r")


def report_decode(ranks: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    total, seconds = sum(r["nbytes"] for r in ranks), max(r["seconds"] for r in ranks)
    fc.set_num_threads(os.cpu_count() or 1)
    limit = fc.roofline(0.5)["read_gbs"]
    return {"what": f"a token against {total / 2**30:.1f} GB in mapped files, {heads_text(args)}", "read_gbs": limit,
            "rate": f"{total / seconds / 1e9:.1f} GB/s of {limit:.1f}",
            "checked": f"queries of two key heads, {ranks[0]['off']:.1e} max\\|v\\|"}


# ---- what is said ------------------------------------------------------------------------------------

RUNS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "decode": (decode, report_decode, {"heads": 32, "kv_heads": 8, "dim": 128}),
    "window": (prompt, report_prompt, {"heads": 4, "window": 4096, "layout": "contiguous"}),
    "causal": (prompt, report_prompt, {"layout": "zigzag"}),
    "mamba": (mamba, report_mamba, {}),
}
HEAD = ["run", "ranks", "time", "rate", "bytes on the wire, a rank", "waited", "memory of a rank: its own, at most",
        "checked"]


def row(found: dict[str, Any]) -> list[str]:
    return [found["what"], str(found["ranks"]), f"{found['seconds']:.4g} s", found["rate"], size_text(found["sent"]),
            f"{found['waited']:.3g} s", f"{found['own']:.0f}, {found['peak']:.0f} MB", found["checked"]]


def write(path: Path, name: str, found: dict[str, Any]) -> None:
    """Into the JSON file and the table of the page beside it."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[name] = found
    path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    rows = [row(kept[name]) for name in ORDER if name in kept]
    put(path.parent.with_suffix(".md"), "million", f"{found['where']}:\n\n{table(HEAD, rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=RUNS)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--channels", type=int, default=512, help="of Mamba")
    parser.add_argument("--every", type=int, default=997, help="so many tokens a sampled one, of Mamba")
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--window", type=int)
    parser.add_argument("--layout", choices=LAYOUTS, default="zigzag")
    parser.add_argument("--rows", type=int, default=64, help="that are compared with float64")
    parser.add_argument("--steps", type=int, default=6, help="tokens of decode")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="of the cache's files")
    parser.add_argument("--keep", action="store_true", help="leave them there, and take those that are")
    parser.add_argument("--page", action="store_true", help="put the result into docs/distributed.md")
    add_arguments(parser)
    name = parser.parse_args().what
    work, report, usual = RUNS[name]
    parser.set_defaults(**usual)
    args = parser.parse_args()
    ranks = on_ranks(args, lambda comm: work(comm, args))
    if ranks is None:
        return
    found = {"ranks": len(ranks), "tokens": args.tokens, "where": where(),
             **{name: max(r[name] for r in ranks) for name in ("seconds", "sent", "waited", "own", "peak")},
             **report(ranks, args)}
    say(table(HEAD, [row(found)]))
    if args.page:
        write(PAGE / "million.json", name, found)


if __name__ == "__main__":
    main()
