"""What rounding costs a model, on the places that llama.cpp's own tool measures: mean KL divergence from float32.

    python tools/measure_quality.py TEXT MODEL [DTYPE[:ACTIVATIONS[:ATTENTION_PRECISION]] ...]

MODEL is whatever forge_c.models.load takes. The text is cut into pieces of 512 tokens, a BOS in the place of the first
where the tokenizer adds one; the second half of each counts, as in `llama-perplexity -c 512 -f TEXT`. The reference is
MODEL in float32; for llama.cpp's figure beside ours make it from the same file:

    llama-quantize --allow-requantize MODEL.gguf reference.gguf F32
    llama-perplexity -c 512 -f TEXT -m reference.gguf --kl-divergence-base base
    llama-perplexity -c 512 -f TEXT -m MODEL.gguf --kl-divergence-base base --kl-divergence
"""
from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import forge_c as fc

PIECE, FIRST = 512, 256

Floats = NDArray[np.float32]


def pieces(model: fc.models.Model, text: str) -> NDArray[np.int64]:
    """(n, PIECE) token ids."""
    ids = np.array(model.tokenizer.encode(text), np.int64)
    found = ids[:len(ids) // PIECE * PIECE].reshape(-1, PIECE).copy()
    added = model.tokenizer.encode("")
    if added:
        found[:, 0] = added[0]
    return found


def log_probabilities(model: fc.models.Model, ids: NDArray[np.int64]) -> Iterator[Floats]:
    """(PIECE - 1 - FIRST, vocab) of each piece: of the tokens after FIRST."""
    for row in ids:
        cache = model.new_cache(1, PIECE)
        model(row[None, :FIRST], cache, last_only=True)
        z = model(row[None, FIRST:-1], cache)[0]
        z -= z.max(axis=1, keepdims=True)
        yield z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def compare(model: fc.models.Model, ids: NDArray[np.int64], reference: list[Floats]) -> str:
    """KL and its standard error, the largest, the share of places with the same best token, perplexity, and MiB."""
    kl, same, nll = [], [], []
    for row, want, found in zip(ids, reference, log_probabilities(model, ids), strict=True):
        kl.append((np.exp(want.astype(np.float64)) * (want - found)).sum(axis=1))
        same.append(want.argmax(axis=1) == found.argmax(axis=1))
        nll.append(-np.take_along_axis(found, row[FIRST + 1:, None], axis=1))
    every = np.concatenate(kl)
    return (f"KL {every.mean():.2e} +- {every.std() / len(every) ** 0.5:.0e}, at most {every.max():.3f}, same token "
            f"{100 * np.mean(same):.1f} %, perplexity {np.exp(np.mean(nll)):.3f}, {model.nbytes / 2**20:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("model")
    parser.add_argument("formats", nargs="*", default=["auto", "auto:int12"])
    args = parser.parse_args()
    exact = fc.models.load(args.model, "float32")
    ids = pieces(exact, args.text.read_text())
    reference = list(log_probabilities(exact, ids))
    print(f"float32: {compare(exact, ids, reference)}; {len(ids) * (PIECE - 1 - FIRST)} places", flush=True)
    del exact
    for name in args.formats:
        dtype, activations, attention, *_ = [*name.split(":"), "", ""]
        model = fc.models.load(args.model, dtype, activations=activations or None,
                               attention_precision=attention or None)
        print(f"{name}: {compare(model, ids, reference)}", flush=True)


if __name__ == "__main__":
    main()
