"""A Hugging Face model with random weights in LLaMA's 1.1 billion shape: torch's sdpa against accelerate(), in turns.

    python bench/transformers_generate.py                                       bfloat16, prompt of 512, 64 new tokens
    python bench/transformers_generate.py --dtype float32 --layers 2 --prompt 64 --new 8 --rounds 2
    python bench/transformers_generate.py --variants none bfloat16 int8 int4    what pack= is to try

All variants hold the same torch weights; packed copies come on top. In each round every variant reads the prompt into
an empty cache and then decodes, and the order turns. A ratio is the median over rounds of the ratio within a round.
"""
from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from statistics import median
from typing import Any

import machine
import torch
from model_torch import held, random_model
from transformers import DynamicCache, PreTrainedModel

import forge_c
from forge_c.integrations.transformers import accelerate
from forge_c.models.weights.random import SHAPES

_SDPA = "torch sdpa"
_WARM_UP = 4  # tokens decoded before the clock starts
Times = dict[str, list[float]]


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    p.add_argument("--variants", nargs="+", choices=("none", "float32", "bfloat16", "int8", "int4"),
                   help="values of pack=; by default none and the model's dtype")
    p.add_argument("--layers", type=int, default=22)
    p.add_argument("--prompt", type=int, default=512)
    p.add_argument("--new", type=int, default=64)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--threads", type=int, default=forge_c.get_num_threads())
    args = p.parse_args()
    args.variants = args.variants or ["none", args.dtype]
    return args


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """Modules of its own over the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _times(model: PreTrainedModel, ids: torch.Tensor, new: int) -> tuple[float, float, torch.Tensor]:
    """Seconds of the prompt, seconds of the new tokens, logits after the prompt."""
    cache = held(model, DynamicCache(config=model.config))
    start = time.perf_counter()
    logits = model(ids, logits_to_keep=1, **cache).logits
    prompt, token = time.perf_counter() - start, ids[:, -1:]
    start = time.perf_counter()
    for _ in range(new):
        model(token, **cache)
    return prompt, time.perf_counter() - start, logits.float()


def _rate(times: list[float], tokens: int) -> str:
    return f"{tokens / median(times):.4g}"


def _ratio(mine: list[float], theirs: list[float]) -> str:
    return f"{median(a / b for a, b in zip(theirs, mine, strict=True)):.2f}"


@torch.inference_mode()
def main() -> int:
    args = _arguments()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    forge_c.set_num_threads(args.threads)
    stock = random_model(dict(SHAPES["llama-1.1b"]) | {"num_hidden_layers": args.layers}, getattr(torch, args.dtype))
    models: dict[str, Any] = {_SDPA: stock}
    for form in args.variants:
        start = time.perf_counter()
        name = "forge_c, torch's weights" if form == "none" else f"forge_c, pack {form}"
        models[name] = accelerate(_twin(stock), pack=None if form == "none" else form)
        print(f"{name}: {models[name].forge_c_swaps}, {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    ids = torch.randint(SHAPES["llama-1.1b"]["vocab_size"], (1, args.prompt))
    prompt: Times = {name: [] for name in models}
    decode: Times = {name: [] for name in models}
    logits: dict[str, torch.Tensor] = {}
    limits = machine.measure_limits(quick=True)
    for name, model in models.items():
        logits[name] = _times(model, ids, min(args.new, _WARM_UP))[2]
    neighbours, wall, own = machine.Neighbours(), time.monotonic(), time.process_time()
    for number in range(args.rounds):
        order = list(models)[number % len(models):] + list(models)[:number % len(models)]
        for name in order:
            seconds = _times(models[name], ids, args.new)
            prompt[name].append(seconds[0])
            decode[name].append(seconds[1])
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
    mine = (time.process_time() - own) / (time.monotonic() - wall) / (os.cpu_count() or 1)
    others = max(0.0, neighbours.share() - mine)
    weights = sum(p.nbytes for name, p in stock.named_parameters() if "embed_tokens" not in name)
    print(f"{machine.cpu_model()}, {args.threads} threads, {forge_c.isa()}; torch {torch.__version__}; "
          f"{args.layers} layers, {args.dtype}, {weights / 1e9:.2f} GB read a token; {args.rounds} rounds; others took "
          f"{100 * others:.0f} % of the processors; limits: {limits['fp32_gflops']:.0f} GFLOP/s float32, "
          f"{limits['bf16_gflops']:.0f} bfloat16, {limits['read_gbs']:.0f} GB/s reading.\n")
    print(f"| | prompt of {args.prompt}, tokens/s | times sdpa | {args.new} new, tokens/s | times sdpa | "
          "logits apart | memory on top |")
    print("|---|---|---|---|---|---|---|")
    for name in models:
        apart = float((logits[name] - logits[_SDPA]).norm() / logits[_SDPA].norm())
        extra = models[name].forge_c_swaps.packed_nbytes if name != _SDPA else 0
        print(f"| {name} | {_rate(prompt[name], args.prompt)} | {_ratio(prompt[name], prompt[_SDPA])} | "
              f"{_rate(decode[name], args.new)} | {_ratio(decode[name], decode[_SDPA])} | {apart:.1e} | "
              f"{extra / 1e9:.2f} GB |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
