"""forge-c bench: tokens per second in llama-bench's columns, beside what this machine could do at most."""
from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from forge_c.functional import get_num_threads, isa
from forge_c.models import Model
from forge_c.models.generation import prefill
from forge_c.runtime import roofline

_PEAK = {"float32": "fp32_gflops", "bfloat16": "bf16_gflops", "int8": "int8_gops", "int4": "int8_gops"}
_WARM_UP = 8  # tokens decoded before the clock starts


@dataclass(frozen=True)
class Measured:
    """One row: `tokens` in each run, the seconds of the runs, and the seconds that a run takes at the limits."""

    name: str
    tokens: int
    seconds: list[float]
    floor: float

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each run."""
        return [self.tokens / t for t in self.seconds]

    @property
    def share(self) -> float:
        """Of the limit, of the median run."""
        return self.floor / statistics.median(self.seconds)


def table(model: Model, prompt_tokens: int, new_tokens: int, repeats: int, batch: int = 1) -> Iterator[str]:
    """Markdown lines: one row for a prompt of prompt_tokens, one for new_tokens steps of `batch` texts at a time.

    Rates are the median of the repeats ± their standard deviation, and count the tokens of all texts. Of limit: the
    larger of two floors of time, multiply-adds of the weights over the peak rate, and the bytes of weights that the
    steps read over the read bandwidth of memory, both measured now; divided by the median time. A model that fits in
    cache can decode faster than the second.
    """
    limits = roofline()
    yield f"| model | size | params | isa | threads | test | t/s | of limit |\n|{' --- |' * 8}"
    name = f"{model.config.model_type} {model.dtype}"
    columns = (f"| {name} | {model.nbytes / 2**20:.2f} MiB | {_params(model) / 1e6:.2f} M | {isa()} "
               f"| {get_num_threads()} |")
    for test in _tests(model, limits, prompt_tokens, new_tokens, repeats, batch):
        spread = statistics.stdev(test.rates) if repeats > 1 else 0.0
        yield f"{columns} {test.name} | {statistics.median(test.rates):.2f} ± {spread:.2f} | {100 * test.share:.0f} % |"


def json_lines(model: Model, prompt_tokens: int, new_tokens: int, repeats: int, batch: int = 1) -> Iterator[str]:
    """The tests of `table`, each as one JSON object; step_bytes are the weights that one step reads."""
    limits = roofline()
    about = {"model": model.config.model_type, "dtype": model.dtype, "params": _params(model), "bytes": model.nbytes,
             "step_bytes": model._decoder.step_nbytes, "isa": isa(), "threads": get_num_threads()}
    measured = {name: value for name, value in limits.items() if isinstance(value, float)}
    for test in _tests(model, limits, prompt_tokens, new_tokens, repeats, batch):
        yield json.dumps({"test": test.name, "tokens_per_second": test.rates, "of_limit": test.share, **about,
                          "limits": measured})


def _tests(model: Model, limits: Mapping[str, Any], prompt_tokens: int, new_tokens: int, repeats: int,
           batch: int) -> Iterator[Measured]:
    head = _head_params(model)
    blocks = _params(model) - head
    peak = limits[_PEAK[model.dtype]] or limits["fp32_gflops"]

    def floor(tokens: int, heads: int, passes: int) -> float:
        flops = 2 * (blocks * tokens + head * heads)
        return max(flops / peak, passes * model._decoder.step_nbytes / limits["read_gbs"]) / 1e9

    prompt = _prompt(model, prompt_tokens)
    name = f"pp{prompt_tokens}"
    yield Measured(name, prompt_tokens, _times(name, prompt, prompt, repeats), floor(prompt_tokens, 1, 1))
    name, decoded = f"tg{new_tokens}" + (f"x{batch}" if batch > 1 else ""), new_tokens * batch
    seconds = _times(name, _decode(model, new_tokens, batch), _decode(model, min(new_tokens, _WARM_UP), batch), repeats)
    yield Measured(name, decoded, seconds, floor(decoded, decoded, new_tokens))


def _params(model: Model) -> int:
    """Weights that a token is multiplied by."""
    return model._decoder.layer_params + _head_params(model)


def _head_params(model: Model) -> int:
    return model.config.hidden_size * model.config.vocab_size


def _times(name: str, work: Callable[[], None], warm_up: Callable[[], None], repeats: int) -> list[float]:
    """Seconds of each run of `work`; a progress bar on a terminal, once that takes two."""
    seconds = []
    bar = tqdm(range(repeats + 1), desc=name, unit="run", disable=None, delay=2.0, leave=False)
    for i in bar:
        if i == 0:
            warm_up()
            continue
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


def _decode(model: Model, tokens: int, batch: int) -> Callable[[], None]:
    """Steps from an empty cache, of one token in each of `batch` rows."""
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (tokens, batch, 1))
    cache = model.new_cache(batch, tokens)

    def work() -> None:
        cache.truncate(0)
        for step in ids:
            model(step, cache)

    return work
