"""Several prompts at once, streamed, from the embedded model or a folder.

    python examples/generate.py [FOLDER]
"""
from __future__ import annotations

import sys

import forge_c as fc

PROMPTS = ["import os\n\n\ndef ", "class Queue:\n    def __init__(self", '"""Tools for ']


def main() -> None:
    model = fc.models.load(sys.argv[1] if len(sys.argv) > 1 else None)
    texts = list(PROMPTS)
    for row, piece in model.generate(PROMPTS, 96, temperature=0.7, top_p=0.95, seed=7, stop="\n\n\n", stream=True):
        texts[row] += piece
    print("\n---\n".join(texts))


if __name__ == "__main__":
    main()
