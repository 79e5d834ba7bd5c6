"""A million tokens through a Mamba: they come one piece at a time, and neither its memory nor its time a token grows.

    python examples/stream_million.py [--tokens 1000000] [--shape mamba-130m] [--dtype bfloat16]
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np

import forge_c as fc

PIECE = 1024  # tokens of a call


def stream(vocab: int) -> Iterator[np.ndarray]:
    """Pieces (1, PIECE) of a text without end, each made when it is asked for."""
    rng = np.random.default_rng(0)
    while True:
        yield rng.integers(0, vocab, (1, PIECE))


def resident() -> float:
    """Memory of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def rate(model: fc.models.Model, ids: np.ndarray, cache: fc.models.ModelCache) -> float:
    """Tokens a second."""
    start = time.perf_counter()
    model(ids, cache, last_only=True)
    return ids.size / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--shape", default="mamba-130m")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    model = fc.models.random_model(args.shape, args.dtype)
    pieces = stream(model.config.vocab_size)
    cache, young = model.new_cache(), model.new_cache()
    rate(model, next(pieces), young)  # the first call takes memory and wakes threads
    begin, before = time.perf_counter(), resident()
    print(f"{args.shape} in {args.dtype}, {fc.isa()}, threads: {fc.get_num_threads()}; weights of "
          f"{model.nbytes / 2**20:.1f} MB, state of {cache.nbytes / 2**20:.2f} MB\n")
    print("| tokens read | tokens/s | resident MB |\n|--:|--:|--:|")
    step, since = max(args.tokens // 10, PIECE), []
    while cache.seq_len < args.tokens:
        since.append(rate(model, next(pieces), cache))
        before = before if cache.seq_len > PIECE else resident()  # what a first piece touches is there for good
        if cache.seq_len == PIECE or cache.seq_len % step < PIECE or cache.seq_len >= args.tokens:
            print(f"| {cache.seq_len:,} | {median(since):.0f} | {resident():.1f} |", flush=True)
            since = []
    read, seconds, grown = cache.seq_len, time.perf_counter() - begin, resident() - before
    # What a machine gives changes over minutes, so the two ends take turns.
    first, last = [], []
    for _, ids in zip(range(16), pieces, strict=False):
        young.truncate(0)
        first.append(rate(model, ids, young))
        last.append(rate(model, ids, cache))
    ratio = median(b / a for a, b in zip(first, last, strict=True))
    print(f"\n{read:,} tokens in {seconds:.0f} s; memory grew by {grown:.1f} MB, of which the ids of the tokens are "
          f"{4 * read / 2**20:.1f}.\nIn turns: the first {PIECE} tokens of a text at {median(first):.0f} tokens/s, the "
          f"last at {median(last):.0f}; {ratio:.3f} times as fast.")


if __name__ == "__main__":
    main()
