"""Several prompts at once, streamed, from the embedded model or a folder.

    python examples/generate.py [FOLDER]
"""
from __future__ import annotations

import argparse

import forge_c as fc

PROMPTS = ["import os\n\n\ndef ", "class Queue:\n    def __init__(self", '"""Tools for ']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="a Hugging Face folder or a GGUF file (default: the embedded model)")
    model = fc.models.load(parser.parse_args().folder)
    texts = list(PROMPTS)
    for row, piece in model.generate(PROMPTS, 96, temperature=0.7, top_p=0.95, seed=7, stop="\n\n\n", stream=True):
        texts[row] += piece
    print("\n---\n".join(texts))


if __name__ == "__main__":
    main()
