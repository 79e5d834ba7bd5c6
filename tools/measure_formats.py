"""What the packed weight formats do to the embedded model: bits per byte of the held-out modules, and its text.

    python tools/measure_formats.py [--files N]

Prints two markdown pieces for docs/accuracy.md. Every byte is predicted once, with a sliding window as its context, as
in the model's card; the modules are those of the running Python.
"""
from __future__ import annotations

import argparse
import json
import sysconfig
from pathlib import Path

import numpy as np

import forge_c as fc
from forge_c.packing import FORMATS

BOUNDARY, WINDOW, STRIDE = 0, 1024, 512
PROMPT = "import os\n\n\ndef read_lines(path"


def bits(model: fc.models.Model, source: bytes) -> float:
    """Code length of a file under the model."""
    ids = np.array([BOUNDARY, *source])
    total, done = 0.0, 1
    while done < len(ids):
        stop = min(len(ids), done + STRIDE if done > 1 else WINDOW)
        first = max(0, stop - WINDOW)
        logits = model(ids[None, first:stop - 1])[0, done - first - 1:].astype(np.float64)
        wanted = np.take_along_axis(logits, ids[done:stop, None], axis=1)[:, 0]
        top = logits.max(axis=1)
        total += float(np.sum(np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top - wanted)) / np.log(2)
        done = stop
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, help="only the first N modules")
    args = parser.parse_args()
    names = json.loads((fc.models.EMBEDDED / "heldout.json").read_text())["heldout"][:args.files]
    sources = [(Path(sysconfig.get_paths()["stdlib"]) / name).read_bytes() for name in names]
    size, base = sum(map(len, sources)), 0.0
    texts = []
    print("| format | weights | bits per byte | against float32 |\n| --- | --: | --: | --: |")
    for name in FORMATS:
        model = fc.models.load(dtype=name)
        rate = sum(bits(model, source) for source in sources) / size
        base = base or rate
        print(f"| {name} | {model.nbytes / 1e6:.2f} MB | {rate:.4f} | {100 * (rate / base - 1):+.2f} % |", flush=True)
        texts.append((name, model.generate(PROMPT, 200, temperature=0.6, seed=2)))
    for name, text in texts:
        print(f"\n{name}:\n\n" + "".join(f"    {line}\n" for line in (PROMPT + text).splitlines()), end="")


if __name__ == "__main__":
    main()
