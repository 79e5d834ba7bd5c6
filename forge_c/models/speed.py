"""forge-c bench: tokens per second in llama-bench's columns, beside what this machine could do at most."""
from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from forge_c.functional import get_num_threads, isa
from forge_c.models import Model
from forge_c.models.generation import prefill
from forge_c.runtime import limits_now
from forge_c.state import ModelCache
from forge_c.state.routed import RoutedCache

_PEAK = {"float32": "fp32_gflops", "bfloat16": "bf16_gflops",  # every other format multiplies integers
         **dict.fromkeys(("int4", "q4_0", "q4_1", "q4_k"), "int4_gops")}
_WARM_UP = 8  # tokens decoded before the clock starts


@dataclass(frozen=True)
class Measured:
    """One row: `tokens` in each run, the seconds of the runs, the seconds that a run takes at the limits, and the bytes
    of weights that a step of it reads."""

    name: str
    tokens: int
    seconds: list[float]
    floor: float
    read: float

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
    cache can decode faster than the second. Of layers with routers what the tokens of the last run went through counts.
    """
    limits = _limits()
    yield f"| model | size | params | isa | threads | test | t/s | of limit |\n|{' --- |' * 8}"
    name = f"{model.config.model_type} {model.dtype}"
    columns = (f"| {name} | {model.nbytes / 2**20:.2f} MiB | {_params(model) / 1e6:.2f} M | {isa()} "
               f"| {get_num_threads()} |")
    for test in _tests(model, limits, prompt_tokens, new_tokens, repeats, batch):
        spread = statistics.stdev(test.rates) if repeats > 1 else 0.0
        yield f"{columns} {test.name} | {statistics.median(test.rates):.2f} ± {spread:.2f} | {100 * test.share:.0f} % |"


def json_lines(model: Model, prompt_tokens: int, new_tokens: int, repeats: int, batch: int = 1) -> Iterator[str]:
    """The tests of `table`, each as one JSON object; step_bytes are the weights that one step reads at most, read_bytes
    those that it read, on an average, where layers have routers."""
    limits = _limits()
    about = {"model": model.config.model_type, "dtype": model.dtype, "params": _params(model), "bytes": model.nbytes,
             "step_bytes": model._decoder.step_nbytes, "isa": isa(), "threads": get_num_threads()}
    measured = {name: value for name, value in limits.items() if isinstance(value, float)}
    for test in _tests(model, limits, prompt_tokens, new_tokens, repeats, batch):
        yield json.dumps({"test": test.name, "tokens_per_second": test.rates, "of_limit": test.share, **about,
                          "read_bytes": round(test.read), "limits": measured})


def _limits() -> Mapping[str, Any]:
    """Of this machine; a terminal says why nothing is seen meanwhile."""
    with tqdm(desc="measuring this machine", bar_format="{desc}", disable=None, leave=False):
        return limits_now()


def _tests(model: Model, limits: Mapping[str, Any], prompt_tokens: int, new_tokens: int, repeats: int,
           batch: int) -> Iterator[Measured]:
    peak = limits[_PEAK.get(model.dtype, "int8_gops")] or limits["fp32_gflops"]

    def measured(name: str, work: _Work, warm_up: _Work, heads: int, passes: int) -> Measured:
        seconds, tokens = _times(name, work.run, warm_up.run, repeats), int(work.cache.lengths.sum())
        products, read = _used(model, work.cache, heads, passes)
        floor = max(2 * products / peak, read / limits["read_gbs"]) / 1e9
        return Measured(name, tokens, seconds, floor, read / passes)

    prompt = _prompt(model, prompt_tokens)
    yield measured(f"pp{prompt_tokens}", prompt, prompt, 1, 1)
    yield measured(f"tg{new_tokens}" + (f"x{batch}" if batch > 1 else ""), _decode(model, new_tokens, batch),
                   _decode(model, min(new_tokens, _WARM_UP), batch), new_tokens * batch, new_tokens)


def _used(model: Model, cache: ModelCache, heads: int, passes: int) -> tuple[int, int]:
    """(multiply-adds, bytes of weights read) for the tokens in the cache, which came in so many passes, and logits of
    `heads` of them. A layer with a router is read in a pass in which a token goes through it."""
    m, tokens = model._decoder._model, int(cache.lengths.sum())
    products, read = _head_params(model) * heads + model._decoder.layer_params * tokens, model._decoder.step_nbytes
    read *= passes
    for layer, state in zip(m.held, cache.layers, strict=True):
        if isinstance(state, RoutedCache):
            behind = [part for part in layer[:2] if part is not None]
            in_passes = min(passes, len(np.unique(np.concatenate(state.positions))))
            products -= sum(part.params for part in behind) * (tokens - int(state.lengths.sum()))
            read -= sum(part.nbytes for part in behind) * (passes - in_passes)
    return products, read


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


class _Work(NamedTuple):
    """What is timed, and where it leaves its tokens."""

    run: Callable[[], None]
    cache: ModelCache


def _prompt(model: Model, tokens: int) -> _Work:
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, tokens)
    cache = model.new_cache(1, tokens)

    def work() -> None:
        cache.truncate(0)
        prefill(model._decoder, ids, cache)

    return _Work(work, cache)


def _decode(model: Model, tokens: int, batch: int) -> _Work:
    """Steps from an empty cache, of one token in each of `batch` rows."""
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (tokens, batch, 1))
    cache = model.new_cache(batch, tokens)

    def work() -> None:
        cache.truncate(0)
        for step in ids:
            model(step, cache)

    return _Work(work, cache)
