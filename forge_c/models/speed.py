"""forge-c bench: tokens per second in llama-bench's columns, beside what this machine could do at most."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np

from forge_c.functional import get_num_threads, isa
from forge_c.models import Model
from forge_c.models.generation import prefill
from forge_c.runtime import roofline

_PEAK = {"float32": "fp32_gflops", "bfloat16": "bf16_gflops"}


def table(model: Model, prompt_tokens: int, new_tokens: int, repeats: int) -> Iterator[str]:
    """Markdown lines: one row for a prompt of prompt_tokens, one for new_tokens decoded one at a time.

    limit is the larger of two floors of time: multiply-adds of the weights over the peak rate, and their bytes over
    the read bandwidth of memory, both measured now. A model that fits in cache can decode faster than the second.
    """
    s, limits = model.config, roofline()
    head = s.hidden_size * s.vocab_size
    block = s.hidden_size * s.head_dim * 2 * (s.n_heads + s.n_kv_heads) + 3 * s.hidden_size * s.intermediate_size
    params = s.n_layers * block + head
    peak = limits[_PEAK[model.dtype]] or limits["fp32_gflops"]

    def floor(tokens: int, heads: int, passes: int) -> float:
        flops = 2 * (s.n_layers * block * tokens + head * heads)
        return max(flops / peak, passes * params * _ITEMSIZE[model.dtype] / limits["read_gbs"]) / 1e9

    yield f"| model | size | params | isa | threads | test | t/s | of limit |\n|{' --- |' * 8}"
    name = f"{s.model_type} {model.dtype}"
    columns = f"| {name} | {model.nbytes / 2**20:.2f} MiB | {params / 1e6:.2f} M | {isa()} | {get_num_threads()} |"
    for test, tokens, least, work in (
            (f"pp{prompt_tokens}", prompt_tokens, floor(prompt_tokens, 1, 1), _prompt(model, prompt_tokens)),
            (f"tg{new_tokens}", new_tokens, floor(new_tokens, new_tokens, new_tokens), _decode(model, new_tokens))):
        seconds = _times(work, repeats)
        rates = [tokens / t for t in seconds]
        spread = statistics.stdev(rates) if len(rates) > 1 else 0.0
        share = least / statistics.median(seconds)
        yield f"{columns} {test} | {statistics.mean(rates):.2f} ± {spread:.2f} | {100 * share:.0f} % |"


_ITEMSIZE = {"float32": 4, "bfloat16": 2}


def _times(work: Callable[[], None], repeats: int) -> list[float]:
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds


def _prompt(model: Model, tokens: int) -> Callable[[], None]:
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, tokens)
    cache = model.new_cache(1, tokens)

    def work() -> None:
        cache.truncate(0)
        prefill(model._decoder, ids, cache)

    return work


def _decode(model: Model, tokens: int) -> Callable[[], None]:
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (tokens, 1, 1))
    cache = model.new_cache(1, tokens)

    def work() -> None:
        cache.truncate(0)
        for token in ids:
            model(token, cache)

    return work
