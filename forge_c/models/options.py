"""The arguments of generate, checked before anything runs."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np

from forge_c.checks import warn
from forge_c.models.generation import Ids, LogitsProcessor, Options
from forge_c.models.sampling import Sampler, Unsaid, model_sampling
from forge_c.models.spec import Attention, ModelSpec
from forge_c.models.tokenizer import Tokenizer
from forge_c.state import ModelCache


class Wishes(TypedDict, total=False):
    """Arguments of generate that have no say in what it returns."""

    messages: Any
    tools: Any
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    sampling: Literal["model"] | None
    seed: int | Sequence[int] | None
    stop: str | Sequence[str] | None
    cache: ModelCache | None
    cache_dtype: str
    logits_processor: LogitsProcessor | None
    special_tokens: bool


_CACHE_DTYPES = ("float32", "bfloat16", "int8")


def sampler_of(settings: Mapping[str, Any], **given: Any) -> Sampler:
    """The Sampler of the arguments that are given, and of settings, a generation_config.json, for the others."""
    said = {name: value for name, value in given.items() if value is not None and not isinstance(value, Unsaid)}
    made = model_sampling(settings)
    if said.get("temperature") == 0:
        made = {name: value for name, value in made.items() if name == "repetition_penalty"}
    Sampler(**said)
    try:
        return Sampler(**(made | said))
    except ValueError as error:
        raise ValueError(f"{error}, in generation_config.json") from None


def checked_options(
    spec: ModelSpec, tokenizer: Tokenizer | None, eos: frozenset[int], prompts: Sequence[Ids], sampler: Sampler, *,
    max_new_tokens: int | None, seed: int | Sequence[int] | None, n: int, stop: str | Sequence[str] | None,
    cache: ModelCache | None, cache_dtype: str, logprobs: int, logits_processor: LogitsProcessor | None, whole: bool,
    answers: Sequence[bool]
) -> Options:
    """What Generation takes, whole and answers as there. A warning if the model was made for less."""
    check_samples(n, sampler, logits_processor)
    if cache is not None and cache.batch != len(prompts) * n:
        raise ValueError(f"generate: cache has {cache.batch} rows, expected {len(prompts) * n}, one for each "
                         f"{'sample' if n > 1 else 'prompt'}")
    if cache_dtype not in _CACHE_DTYPES:
        raise ValueError(f"generate: cache_dtype is {cache_dtype!r}, expected one of {', '.join(_CACHE_DTYPES)}")
    if not _is_count(logprobs):
        raise ValueError(f"generate: logprobs is {logprobs!r}, expected an integer >= 0")
    stops = _stops(stop, tokenizer)
    rows = [p for p in prompts for _ in range(n)]
    before = [0] * len(rows) if cache is None or whole else cache.lengths.tolist()
    most = _new_tokens(spec, max_new_tokens, [b + len(row) for b, row in zip(before, rows, strict=True)], cache)
    return Options(rows, sampler, _generators(seed, len(prompts), n), most, [a for a in answers for _ in range(n)], n,
                   stops, eos, cache, cache_dtype, int(logprobs), logits_processor, whole)


def check_samples(n: int, sampler: Sampler, processor: LogitsProcessor | None) -> None:
    """ValueError or TypeError unless there can be n different samples."""
    if not _is_count(n) or n < 1:
        raise ValueError(f"generate: n is {n!r}, expected an integer >= 1")
    if n > 1 and sampler.temperature == 0:
        raise ValueError(f"generate: n is {n} and temperature 0, expected a temperature above 0: the best token is the "
                         "same in every sample")
    if processor is not None and not callable(processor):
        raise TypeError(f"generate: logits_processor is a {type(processor).__name__}, expected a function")


def _stops(stop: Any, tokenizer: Tokenizer | None) -> Sequence[str]:
    if stop is not None and not isinstance(stop, str | list | tuple):
        raise TypeError(f"generate: stop is {stop!r}, expected a text or several")
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    if any(not isinstance(s, str) or not s for s in stops):
        raise ValueError(f"generate: stop is {stop!r}, expected texts that are not empty")
    if stops and tokenizer is None:
        raise ValueError("generate: stop needs a tokenizer, and the model's folder has none")
    return stops


def _new_tokens(spec: ModelSpec, asked: int | None, lengths: Sequence[int], cache: ModelCache | None) -> list[int]:
    """How many tokens each row may get that has lengths[i] of them with its prompt."""
    if asked is not None and not _is_count(asked):
        raise ValueError(f"generate: max_new_tokens is {asked!r}, expected an integer >= 0, or None for no limit")
    context = context_of(spec)
    room = context if cache is None else cache.max_seq_len
    longest = max(lengths, default=0)
    if asked is None:
        least = min(room, context)
        if longest >= least:
            raise ValueError(f"generate: {longest} tokens fill the {'context' if least == context else 'cache'} of "
                             f"{least}, and leave no room for another")
        return [least - length for length in lengths]
    if cache is not None and longest + asked > room:
        raise ValueError(f"generate: {longest} tokens and {asked} new ones exceed the cache's max_seq_len {room}")
    if longest + asked > context:
        warn(f"generate: {longest + asked} tokens exceed the {context} that the model was made for")
    return [int(asked)] * len(lengths)


def context_of(spec: ModelSpec) -> int:
    """How many tokens the model was made for, its position scaling included."""
    ropes = [m.rope for layer in spec.layers for m in layer.mixers if isinstance(m, Attention) and m.rope]
    scaling = ropes[0].scaling if ropes else {}
    if scaling.get("rope_type") in ("dynamic", "linear", "yarn"):
        return int(spec.max_position_embeddings * max(1.0, scaling.get("factor") or 1.0))
    return spec.max_position_embeddings


def _generators(seed: Any, prompts: int, n: int) -> list[np.random.Generator]:
    """One a row: of sample 0 by its prompt's seed itself, of sample j by SeedSequence(seed, spawn_key=(j,))."""
    seed = seed.item() if isinstance(seed, np.ndarray) and seed.ndim == 0 else seed
    if seed is None or _is_count(seed):
        seeds: list[Any] = [seed] * prompts
    elif isinstance(seed, list | tuple | np.ndarray | range) and all(_is_count(s) for s in seed):
        seeds = list(seed)
        if n > 1 and len(seeds) == prompts * n:
            return [np.random.default_rng(s) for s in seeds]
    else:
        raise ValueError(f"generate: seed is {seed!r}, expected an integer >= 0 or a list of them")
    if len(seeds) != prompts:
        raise ValueError(f"generate: seed has {len(seeds)} integers, expected {prompts}, one for each prompt"
                         f"{f', or {prompts * n}, one for each sample' if n > 1 else ''}")
    return [_generator(s, j) for s in seeds for j in range(n)]


def _generator(seed: int | None, sample: int) -> np.random.Generator:
    if seed is None or sample == 0:
        return np.random.default_rng(seed)
    return np.random.default_rng(np.random.SeedSequence(int(seed), spawn_key=(sample,)))


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= 0)
