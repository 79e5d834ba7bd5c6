"""What attention in low precision loses and takes: the tables of docs/accuracy.md.

    python tools/measure_attention.py                        Gaussian inputs, and outlier channels
    python tools/measure_attention.py --text FILE FOLDER[:TOKENIZER] ...
                                                             also the keys, queries and values of these models
    python tools/measure_attention.py --speed                GFLOP/s and the share of the unit's peak, by turns

Errors are root mean squares relative to the result's, from float64; d 64 and 128, 2048 keys, causal. Those with parts
of int8 left out (no smoothing, no rotation) are computed in NumPy as kernels/attention_bytes.h does with 8 bits.
FOLDER: what transformers loads; its attention's inputs are taken on their way, of every layer without a window, for the
first 1024 tokens of FILE. TOKENIZER: a model that forge_c.models.load takes, where FOLDER has no tokenizer.json.
"""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import forge_c as fc

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import reference as ref

Array = NDArray[Any]
KEYS, TOKENS = 2048, 1024
QUERY, KEY, WEIGHT, BLOCK, CHUNK, PANEL = 127, 127, 255, 64, 256, 16


# ---- data -------------------------------------------------------------------------------------------


def synthetic() -> Iterator[tuple[str, tuple[Array, Array, Array]]]:
    """q, k, v (1, tokens, heads, d): normal numbers, and such with one channel 50 times as large, or 50 off zero."""
    for d in (64, 128):
        rng = np.random.default_rng(d)
        q, k, v = (rng.standard_normal((1, n, heads, d), np.float32) for n, heads in ((256, 4), (KEYS, 2), (KEYS, 2)))
        yield f"Gaussian, d {d}", (q, k, v)
        large = np.ones(d, np.float32)
        large[5] = 50
        yield f"a channel of k x 50, d {d}", (q, k * large, v)
        yield f"a channel of q, k and v x 50, d {d}", (q * large, k * large, v * large)
        added = np.where(np.isin(np.arange(d), (5, 9, 20, 33)), np.float32(50), np.float32(0))
        yield f"four channels of k + 50, d {d}", (q, k + added, v)


def of_model(folder: str, tokenizer: str, text: str) -> list[tuple[tuple[Array, Array, Array], float]]:
    """(q, k, v), scale of every layer without a window, as transformers' model computes them."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen: list[tuple[tuple[Array, Array, Array], float]] = []

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None,
               **_: Any) -> tuple[Any, None]:
        q, k, v = (np.ascontiguousarray(t.numpy().transpose(0, 2, 1, 3)) for t in (query, key, value))
        scale = q.shape[3] ** -0.5 if scaling is None else scaling
        window = getattr(module, "sliding_window", None)
        if not window:
            seen.append(((q, k, v), scale))
        return torch.from_numpy(fc.attention(q, k, v, causal=True, window=window, scale=scale)), None

    ALL_ATTENTION_FUNCTIONS.register("measured", attend)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="measured")
    ids = fc.models.load(tokenizer or folder).tokenizer.encode(text)[:TOKENS]
    with torch.no_grad():
        model(torch.tensor([ids]))
    return seen


# ---- arithmetic -------------------------------------------------------------------------------------


def exact(q: Array, k: Array, v: Array, scale: float) -> Array:
    """Causal attention in float64."""
    out = np.empty((*q.shape[:3], v.shape[3]))
    hidden = np.arange(k.shape[1]) > np.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    for h in range(q.shape[2]):
        g = h // (q.shape[2] // k.shape[2])
        s = q[0, :, h].astype(np.float64) @ k[0, :, g].T.astype(np.float64) * scale
        p = np.exp(np.where(hidden, -np.inf, s) - np.where(hidden, -np.inf, s).max(axis=1, keepdims=True))
        out[0, :, h] = p @ v[0, :, g] / p.sum(axis=1, keepdims=True)
    return out


def to_bytes(x: Array, largest: int) -> Array:
    """x, a scale for each last axis."""
    step = np.abs(x).max(axis=-1, keepdims=True) / largest
    step[step == 0] = 1
    return np.round(x / step) * step


def means(k: Array) -> Array:
    """For each key (tokens, d) the mean of the chunk's earlier panels."""
    m = np.zeros_like(k)
    for first, panel in product(range(0, len(k), CHUNK), range(PANEL, CHUNK, PANEL)):
        m[first + panel:min(first + panel + PANEL, first + CHUNK)] = k[first:first + panel].mean(axis=0)
    return m


def in_bytes(q: Array, k: Array, v: Array, scale: float, *, rotate: bool, smooth: bool) -> Array:
    """int8 as kernels/attention_bytes.h has it, or without a part of it."""
    turn: Callable[[Array], Array] = ref.rotated if rotate else lambda x: x
    out = np.empty((*q.shape[:3], v.shape[3]))
    hidden = np.arange(k.shape[1]) > np.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    for h in range(q.shape[2]):
        g = h // (q.shape[2] // k.shape[2])
        query, key, value = (turn(x.astype(np.float64)) for x in (q[0, :, h], k[0, :, g], v[0, :, g]))
        m = means(key) if smooth else np.zeros_like(key)
        s = (to_bytes(query, QUERY) @ to_bytes(key - m, KEY).T + query @ m.T) * scale
        s = np.where(hidden, -np.inf, s)
        p = np.exp(s - s.max(axis=1, keepdims=True))
        v_scale = np.abs(value).max(axis=1) / KEY
        pad = -len(key) % BLOCK
        w = np.pad(p * v_scale, ((0, 0), (0, pad))).reshape(len(p), -1, BLOCK)
        w = to_bytes(w, WEIGHT).reshape(len(p), -1)[:, :len(key)]
        out[0, :, h] = turn(w @ np.round(value / np.where(v_scale, v_scale, 1)[:, None]) / p.sum(axis=1, keepdims=True))
    return out


def errors(q: Array, k: Array, v: Array, scale: float) -> dict[str, float]:
    want = exact(q, k, v, scale)
    size = np.sqrt(np.mean(want**2))
    got = {name: fc.attention(q, k, v, causal=True, scale=scale, precision=name) for name in ("bfloat16", "int8")}
    got |= {name: in_bytes(q, k, v, scale, rotate=rotate, smooth=smooth) for name, rotate, smooth in
            (("int8, plain", False, False), ("smoothed", False, True), ("rotated", True, False))}
    return {name: float(np.sqrt(np.mean((out - want) ** 2)) / size) for name, out in got.items()}


def show(name: str, found: dict[str, float]) -> None:
    print(f"| {name} | " + " | ".join(f"{100 * value:.2f} %" for value in found.values()) + " |", flush=True)


# ---- time -------------------------------------------------------------------------------------------


def speed(lengths: list[int]) -> None:
    """Causal, 32 query and 8 key/value heads: the least of several rounds, each precision in its turn."""
    precisions, limits = ("float32", "bfloat16", "int8"), fc.roofline(size=1 << 24)
    peaks = [limits["fp32_gflops"], limits["bf16_gflops"] or limits["fp32_gflops"], limits["int8_gops"]]
    for length, d in product(lengths, (64, 128)):
        rng = np.random.default_rng(0)
        q, k, v = (rng.standard_normal((1, length, heads, d), np.float32) for heads in (32, 8, 8))
        out, best = np.empty_like(q), dict.fromkeys(precisions, np.inf)
        for _, precision in product(range(max(3, 8192 // length)), precisions):
            start = time.perf_counter()
            fc.attention(q, k, v, causal=True, precision=precision, out=out)
            best[precision] = min(best[precision], time.perf_counter() - start)
        rates = [64 * d * length * (length + 1) / seconds / 1e9 for seconds in best.values()]
        print(f"| {length} | {d} | " + " | ".join(f"{rate:.0f}, {rate / peak:.2f}" for rate, peak in
                                                  zip(rates, peaks, strict=True)) +
              f" | {rates[2] / rates[0]:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="FOLDER[:TOKENIZER]")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    args = parser.parse_args()
    print(f"{fc.isa()}, {fc.get_num_threads()} threads\n")
    if args.speed:
        print("| L | d | float32 | bfloat16 | int8 | int8 to float32 |\n|---|---|---|---|---|---|")
        speed(args.lengths)
        return
    print("| inputs | bfloat16 | int8 | int8 without both | smoothed only | rotated only |\n|---|---|---|---|---|---|")
    for name, (q, k, v) in synthetic():
        show(name, errors(q, k, v, q.shape[3] ** -0.5))
    for name in args.models:
        folder, _, tokenizer = name.partition(":")
        layers = [errors(q[:, -256:], k, v, scale) for (q, k, v), scale in
                  of_model(folder, tokenizer, args.text.read_text())]
        for said, of in (("mean", np.mean), ("worst layer", np.max)):
            show(f"{Path(folder).name}, {said}", {key: float(of([one[key] for one in layers])) for key in layers[0]})


if __name__ == "__main__":
    main()
