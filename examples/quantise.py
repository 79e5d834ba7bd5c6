"""What fewer bits cost: bytes, and how far the distribution of the next token moves; then the model as a folder.

    python examples/quantise.py [MODEL [FILE [FOLDER]]]
"""
from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

import forge_c as fc


def log_softmax(logits: np.ndarray) -> np.ndarray:
    z = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def main() -> None:
    name, file, folder = (*sys.argv[1:], None, None, None)[:3]
    exact = fc.models.load(name or None, "float32")
    ids = np.array([exact.tokenizer.encode(Path(file or fc.__file__).read_text())[:512]])
    right = log_softmax(exact(ids))
    for dtype in ("bfloat16", "int8", "int4"):
        model = fc.models.load(name or None, dtype)
        got = log_softmax(model(ids))
        moved = (np.exp(right) * (right - got)).sum(axis=-1).mean()
        same = (got.argmax(axis=-1) == right.argmax(axis=-1)).mean()
        print(f"{dtype:9} {model.nbytes / 2**20:7.2f} MiB  KL to float32 {moved:.1e}  same best token {same:.0%}")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(folder or Path(scratch, "packed"))
        model.save(path)
        again = fc.models.load(path)
        print(f"saved and mapped again: {again}; the same bits: {np.array_equal(again(ids), model(ids))}")


if __name__ == "__main__":
    main()
