"""What each weight format costs in accuracy: relative Frobenius errors of one layer, as a markdown table.

    python tools/measure_accuracy.py [size]       # a size x size layer, 4096 by default

Weights are Gaussian or Student t with 4 degrees of freedom, x is 64 Gaussian rows. "weights" compares x W in float64
with W as unpacked, "layer" what `linear` computes, x rounded or quantised too.
"""
from __future__ import annotations

import sys

import numpy as np

import forge_c as fc

FORMATS: list[tuple[str, int | None, str | None]] = [
    ("float32", None, None), ("bfloat16", None, None), ("int8", 32, "int12"), ("int8", 128, "int12"),
    ("int8", 128, "int8"), ("int4", 32, "int8"), ("int4", 64, "int8"), ("int4", 128, "int8"), ("int4", 64, "int12")]


def relative(got: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def errors(x: np.ndarray, w: np.ndarray, exact: np.ndarray, dtype: str, group: int | None,
           activations: str | None) -> tuple[float, float]:
    """(weights only, the layer)"""
    packed = fc.pack(w, dtype, group_size=group, activations=activations)
    return relative(x.astype(np.float64) @ packed.unpack(), exact), relative(fc.linear(x, packed), exact)


def cell(error: float) -> str:
    if error < 1e-4:
        return f"{error:.1e}" if error else "0"
    return f"{100 * error:.{2 if error < 0.01 else 1}f} %"


def main() -> None:
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, size), np.float32)
    weights = [rng.standard_normal((size, size), np.float32), rng.standard_t(4, (size, size)).astype(np.float32)]
    exact = [x.astype(np.float64) @ w for w in weights]
    print("| format | group | bits | inputs | Gaussian: weights | layer | heavy tails: weights | layer |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype, group, activations in FORMATS:
        bits = fc.pack(weights[0], dtype, group_size=group).nbytes * 8 / size**2
        cells = [cell(e) for w, y in zip(weights, exact, strict=True)
                 for e in errors(x, w, y, dtype, group, activations)]
        print(f"| {dtype} | {group or ''} | {bits:g} | {activations or ''} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
