"""Times transformers' LlamaForCausalLM in bfloat16, random weights: one JSON object a test, as forge-c bench --json.

    python bench/model_torch.py CONFIG PROMPT NEW REPEATS THREADS       CONFIG is a config.json as text
"""
from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

_WARM_UP = 8  # tokens decoded before the clock starts


def random_model(config: dict[str, Any], dtype: torch.dtype) -> LlamaForCausalLM:
    """With random weights, attention by sdpa."""
    with no_init_weights():  # theirs takes half a minute
        model = LlamaForCausalLM._from_config(LlamaConfig(**config), dtype=dtype, attn_implementation="sdpa")
    block = 0.02 * torch.randn(1 << 22)
    for weight in (p.data for p in model.parameters() if p.dim() == 2):
        for piece in weight.view(-1).split(block.numel() // 2):
            start = int(torch.randint(block.numel() // 2, ()))
            piece.copy_(block[start:start + piece.numel()])
    return model.eval()


def _rates(tokens: int, work: Callable[[], None], repeats: int) -> list[float]:
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        rates.append(tokens / (time.perf_counter() - start))
    return rates


@torch.inference_mode()
def main(config: dict[str, Any], prompt: int, new: int, repeats: int, threads: int) -> None:
    torch.set_num_threads(threads)
    model = random_model(config, torch.bfloat16)
    ids = torch.randint(config["vocab_size"], (1, max(prompt, new)))

    def prefill() -> None:
        model(ids[:, :prompt], past_key_values=DynamicCache(config=model.config), logits_to_keep=1)

    def decode(tokens: int) -> None:
        cache = DynamicCache(config=model.config)
        for i in range(tokens):
            model(ids[:, i:i + 1], past_key_values=cache)

    prefill()
    print(json.dumps({"test": f"pp{prompt}", "tokens_per_second": _rates(prompt, prefill, repeats)}), flush=True)
    decode(min(new, _WARM_UP))
    print(json.dumps({"test": f"tg{new}", "tokens_per_second": _rates(new, lambda: decode(new), repeats)}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), *map(int, sys.argv[2:6]))
