"""Contexts of 100K tokens and more, run and checked: time, GB/s or GFLOP/s, peak memory, and sampled rows in float64.

    python bench/long_context.py [--prefill 131072] [--decode 1048576] [--folder /tmp]

One layer's attention of the 1.1B LLaMA shape: 32 query and 4 key/value heads of 64. Prefill goes in chunks of 512
tokens through a bfloat16 KVCache; decode attends to a bfloat16 cache in a memory-mapped file, keys turned by RoPE at
positions up to a million.
"""
from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

import forge_c as fc

HEADS, KV_HEADS, DIM, CHUNK, BLOCK = 32, 4, 64, 512, 8192


def memory(name: str) -> float:
    """A line of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def row_error(q: np.ndarray, out: np.ndarray, cache: fc.KVCache, position: int) -> float:
    """Largest error of one query's heads (heads, dim) against float64 over what the cache holds, next to max|v|.

    Block by block of keys, so that no copy of the cache is needed: a sum of exponentials, shifted by a running maximum.
    """
    group, scale = HEADS // KV_HEADS, DIM**-0.5
    top, total, acc = np.full(HEADS, -np.inf), np.zeros(HEADS), np.zeros((HEADS, DIM))
    most = 0.0
    for start in range(0, position + 1, BLOCK):
        stop = min(start + BLOCK, position + 1)
        k, v = (part.astype(np.float64) for part in cache._pages.read(0, start, stop - start))
        most = max(most, float(np.abs(v).max()))
        heads = q.astype(np.float64).reshape(KV_HEADS, group, DIM)
        scores = np.einsum("ghd,tgd->ght", heads, k).reshape(HEADS, -1) * scale
        new = np.maximum(top, scores.max(axis=1))
        p, keep = np.exp(scores - new[:, None]), np.exp(top - new)
        total, top = total * keep + p.sum(axis=1), new
        acc = acc * keep[:, None] + np.einsum("ght,tgd->ghd", p.reshape(KV_HEADS, group, -1), v).reshape(HEADS, DIM)
    return float(np.abs(out - acc / total[:, None]).max()) / most


def prefill(tokens: int, rng: np.random.Generator, table: fc.RopeTable) -> None:
    cache = fc.KVCache(1, tokens, KV_HEADS, DIM, dtype="bfloat16")
    checked = set(rng.integers(0, tokens, 6).tolist()) | {tokens - 1}
    worst, seconds, before = 0.0, 0.0, memory("VmRSS")
    out = np.empty((1, CHUNK, HEADS, DIM), np.float32)
    for start in range(0, tokens, CHUNK):
        q, k, v = (rng.standard_normal((1, CHUNK, h, DIM), np.float32) for h in (HEADS, KV_HEADS, KV_HEADS))
        clock = time.perf_counter()
        q = fc.rope(q, table, start_pos=start)
        cache.append(k, v, rope=table)
        fc.attention(q, cache, causal=True, out=out)
        seconds += time.perf_counter() - clock
        for position in checked & set(range(start, start + CHUNK)):
            worst = max(worst, row_error(q[0, position - start], out[0, position - start], cache, position))
    flops = 4 * HEADS * DIM * tokens * (tokens + 1) / 2
    print(f"prefill of {tokens} tokens in chunks of {CHUNK}: {seconds:.1f} s, {flops / seconds / 1e9:.0f} GFLOP/s; "
          f"cache {cache.nbytes / 2**20:.0f} MB, memory grown by {memory('VmRSS') - before:.0f} MB; "
          f"error of {len(checked)} rows {worst:.1e} max|v|", flush=True)


def decode(tokens: int, rng: np.random.Generator, folder: Path, table: fc.RopeTable) -> None:
    path = folder / "long_context.npy"
    cache = fc.KVCache(1, tokens, KV_HEADS, DIM, dtype="bfloat16", path=path)
    clock = time.perf_counter()
    for start in range(0, tokens - 1, BLOCK):
        count = min(BLOCK, tokens - 1 - start)
        k, v = (rng.standard_normal((1, count, KV_HEADS, DIM), np.float32) for _ in range(2))
        cache.append(k, v, rope=table)
    cache.flush()
    filled = time.perf_counter() - clock
    del cache
    cache = fc.KVCache.load(path, "r+")
    clock = time.perf_counter()
    steps, anonymous = [], memory("RssAnon")
    q = fc.rope(rng.standard_normal((1, 1, HEADS, DIM), np.float32), table, start_pos=tokens - 1)
    k, v = (rng.standard_normal((1, 1, KV_HEADS, DIM), np.float32) for _ in range(2))
    cache.append(k, v, rope=table)
    for _ in range(4):
        clock = time.perf_counter()
        out = fc.attention(q, cache, causal=True)
        steps.append(time.perf_counter() - clock)
    grown, limit = memory("RssAnon") - anonymous, fc.roofline(0.1)["read_gbs"]
    error = row_error(q[0, 0], out[0, 0], cache, tokens - 1)
    best = min(steps[1:])
    print(f"decode against {tokens} tokens in a mapped file of {cache.nbytes / 2**20:.0f} MB: first "
          f"{steps[0] * 1e3:.0f} ms, then {best * 1e3:.1f} ms, {cache.nbytes / best / 1e9:.1f} GB/s (read limit "
          f"{limit:.1f}); private memory grown by {grown:.0f} MB; error {error:.1e} max|v|; filling the file took "
          f"{filled:.0f} s", flush=True)
    del cache
    path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefill", type=int, default=131072)
    parser.add_argument("--decode", type=int, default=1048576)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    print(f"{fc.isa()}, {fc.get_num_threads()} threads")
    table = fc.rope_table(DIM, max(args.prefill, args.decode))
    if args.prefill:
        prefill(args.prefill // CHUNK * CHUNK, rng, table)
    if args.decode:
        decode(args.decode, rng, args.folder, table)
    print(f"peak memory of all {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
