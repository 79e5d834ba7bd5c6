"""How likely a model finds texts: which of two spellings is the right one, and the bits a token of files.

    python examples/score.py [MODEL [FILE ...]]
"""
from __future__ import annotations

import math
import sys
from pathlib import Path

import forge_c as fc

CHOICES = [("for i in range(10):", "for i on range(10):"), ("self.name = name", "self.name == nmae"),
           ("import os, sys\n", "imprt os, sys\n")]


def main() -> None:
    model = fc.models.load(sys.argv[1] if len(sys.argv) > 1 else None)
    for right, wrong in CHOICES:
        likely = [logprobs.sum() for _, logprobs in model.score([right, wrong])]
        times = math.exp(min(likely[0] - likely[1], 50))
        print(f"{right.strip()!r} is {times:.3g} times as likely as {wrong.strip()!r}")
    for path in sys.argv[2:] or [fc.__file__]:
        ids = model.tokenizer.encode(Path(path).read_text())[: model.config.max_position_embeddings]
        _, logprobs = model.score([ids])[0]
        print(f"{Path(path).name}, {len(ids)} tokens: {-logprobs.mean() / math.log(2):.3f} bits a token")


if __name__ == "__main__":
    main()
