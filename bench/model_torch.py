"""Times transformers' model of a config with random weights: one JSON object a test, as forge-c bench --json.

    python bench/model_torch.py CONFIG PROMPT NEW REPEATS THREADS [DTYPE]     CONFIG is a config.json as text
"""
from __future__ import annotations

import inspect
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.initialization import no_init_weights

_WARM_UP = 8  # tokens decoded before the clock starts
_ONES = ("norm.weight", "norm_f.weight", ".D")  # as transformers sets them


def random_model(config: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """With random weights; attention, where there is some, by sdpa."""
    attention = {"attn_implementation": "sdpa"} if "num_attention_heads" in config else {}
    with no_init_weights():  # theirs takes half a minute
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype, **attention)
    block = 0.02 * torch.randn(1 << 22)
    drawn = (p.data for name, p in model.named_parameters() if not name.endswith(_ONES))
    for piece in (part for weight in drawn for part in weight.view(-1).split(block.numel() // 2)):
        start = int(torch.randint(block.numel() // 2, ()))
        piece.copy_(block[start:start + piece.numel()])
    return model.eval()


def held(model: PreTrainedModel, cache: DynamicCache) -> dict[str, DynamicCache]:
    """The cache by the name that forward has for it."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def _rates(tokens: int, work: Callable[[], None], repeats: int) -> list[float]:
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        rates.append(tokens / (time.perf_counter() - start))
    return rates


@torch.inference_mode()
def main(config: dict[str, Any], prompt: int, new: int, repeats: int, threads: int, dtype: str) -> None:
    torch.set_num_threads(threads)
    model = random_model(config, getattr(torch, dtype))
    ids = torch.randint(config["vocab_size"], (1, max(prompt, new)))

    def prefill() -> None:
        model(ids[:, :prompt], logits_to_keep=1, **held(model, DynamicCache(config=model.config)))

    def decode(tokens: int) -> None:
        cache = held(model, DynamicCache(config=model.config))
        for i in range(tokens):
            model(ids[:, i:i + 1], **cache)

    about = {"step_bytes": sum(p.nbytes for p in model.parameters())}  # of the embedding a row, unless it is the head
    if not model.config.tie_word_embeddings:
        about["step_bytes"] -= model.get_input_embeddings().weight.nbytes
    prefill()
    rates = _rates(prompt, prefill, repeats)
    print(json.dumps({"test": f"pp{prompt}", "tokens_per_second": rates, **about}), flush=True)
    decode(min(new, _WARM_UP))
    rates = _rates(new, lambda: decode(new), repeats)
    print(json.dumps({"test": f"tg{new}", "tokens_per_second": rates, **about}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), *map(int, sys.argv[2:6]), *(sys.argv[6:] or ["bfloat16"]))
