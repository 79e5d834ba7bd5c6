"""From logits to a token: the usual rules, in the order of Hugging Face transformers."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge_c.checks import warn


@dataclass(frozen=True)
class Sampler:
    """repetition_penalty, temperature, top_k, top_p, min_p, one after the other; temperature 0 takes the best token.

    Attributes:
        temperature: logits are divided by it; 0 is greedy.
        top_k: keep the k best tokens (and what ties with the last of them).
        top_p: keep the smallest set of best tokens with at least this probability (arXiv 1904.09751).
        min_p: keep tokens at least this likely relative to the best one (arXiv 2407.01082).
        repetition_penalty: divides positive and multiplies negative logits of tokens seen before (arXiv 1909.05858).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, math.inf, "a number >= 0")
        _check("repetition_penalty", self.repetition_penalty, 1e-6, math.inf, "a number > 0")
        if self.top_k is not None and (isinstance(self.top_k, bool) or not isinstance(self.top_k, int | np.integer)
                                       or self.top_k < 1):
            raise ValueError(f"generate: top_k is {self.top_k!r}, expected an integer >= 1, or None for all tokens")
        if self.top_p is not None:
            _check("top_p", self.top_p, 1e-300, 1.0, "a number above 0 and at most 1, or None for all tokens")
        if self.min_p is not None:
            _check("min_p", self.min_p, 0.0, 1.0, "a number from 0 to 1, or None")

    def pick(self, logits: NDArray[np.float32], seen: NDArray[np.bool_], rng: np.random.Generator,
             process: Callable[[NDArray[np.float32]], Any] | None = None) -> int:
        """One token id; logits (vocab,), seen (vocab,) True for tokens of the prompt and the text so far. process:
        what a caller makes of the logits, after the penalty and before the temperature."""
        z = logits.astype(np.float64)
        if self.repetition_penalty != 1.0:
            z[seen] = np.where(z[seen] > 0, z[seen] / self.repetition_penalty, z[seen] * self.repetition_penalty)
        if np.isnan(z).any():
            raise FloatingPointError("generate: the model's logits are NaN")
        if process is not None:
            z = _processed(process(z.astype(np.float32)), len(z))
        if self.temperature == 0.0:
            return int(z.argmax())
        if np.isinf(z.max()):
            raise FloatingPointError("generate: the model's logits are infinite")
        z -= z.max()
        ids, p = self._candidates(z / self.temperature)
        cumulative = np.cumsum(p)
        at = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
        return int(ids[at if at < len(ids) else np.flatnonzero(p)[-1]])

    def _candidates(self, z: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Token ids in ascending order and their weights, which need not sum to 1; z (vocab,), 0 at the best."""
        ids = np.arange(len(z))
        if self.top_k is not None and self.top_k < len(z):
            ids = np.flatnonzero(z >= np.partition(z, -self.top_k)[-self.top_k])
        p = np.exp(z[ids])
        p /= p.sum()
        if self.top_p is not None and self.top_p < 1.0:
            # Tokens under (1 - top_p) / n have together less than 1 - top_p: none is in the set, so none is sorted.
            likely = np.flatnonzero(p >= (1.0 - self.top_p) / len(p))
            order = likely[np.argsort(-p[likely], kind="stable")]
            kept = np.sort(order[: 1 + np.searchsorted(np.cumsum(p[order]), self.top_p)])
            ids, p = ids[kept], p[kept]
        if self.min_p is not None:
            kept = np.flatnonzero(p >= self.min_p * p.max())
            ids, p = ids[kept], p[kept]
        return ids, p


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """log softmax over the last axis, in float64."""
    z = logits.astype(np.float64)
    z -= z.max(axis=-1, keepdims=True)
    z -= np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return z


def most_likely(logprobs: NDArray[np.float64], k: int, token: int) -> dict[int, float]:
    """The k largest of logprobs (vocab,) by their ids, best first, the first of equals before the others; and the
    token's own."""
    k = min(k, len(logprobs))
    least = np.partition(logprobs, -k)[-k]
    candidates = np.flatnonzero(logprobs >= least)
    best = candidates[np.argsort(-logprobs[candidates], kind="stable")][:k]
    return {int(i): float(logprobs[i]) for i in (*best, token)}


def _processed(found: Any, vocab: int) -> NDArray[np.float64]:
    """What a logits_processor returned, checked."""
    try:
        z = np.asarray(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"generate: logits_processor returned a {type(found).__name__} that NumPy cannot view "
                        f"({error}), expected logits ({vocab},)") from None
    if z.dtype.kind not in "fV" or z.dtype.names:  # V: bfloat16
        raise TypeError(f"generate: logits_processor returned a {type(found).__name__} of dtype {z.dtype}, expected "
                        f"logits ({vocab},) of floats")
    if z.shape != (vocab,):
        raise ValueError(f"generate: logits_processor returned shape {z.shape}, expected ({vocab},)")
    z = z.astype(np.float64)
    if np.isnan(z).any() or np.isposinf(z).any():
        raise ValueError("generate: logits_processor returned a NaN or +inf, expected numbers or -inf")
    if np.isneginf(z).all():
        raise ValueError("generate: logits_processor returned -inf for every token, expected one that may follow")
    return z


# ---- what a model's makers say ----

_OFF: Mapping[str, Any] = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "no_repeat_ngram_size": 0,
                           "num_beams": 1, "penalty_alpha": None, "encoder_repetition_penalty": 1.0, "top_h": None,
                           "bad_words_ids": None, "sequence_bias": None, "suppress_tokens": None}


class Unsaid(float):
    """The default of an argument, told apart from the same number when a caller gives it."""


def model_sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The Sampler's arguments in a generation_config.json, by the rules of transformers: without do_sample the best
    token is taken, with it temperature is 1 and top_k 50 unless it says others; a top_k of 0, and null elsewhere, is
    off. What else would change the text is a warning."""
    left = sorted(key for key, off in _OFF.items() if settings.get(key, off) not in (off, None))
    if left:
        warn(f"generate: generation_config.json has {', '.join(left)}, which sampling=\"model\" ignores")
    found: dict[str, Any] = {}
    if settings.get("repetition_penalty") is not None:
        found["repetition_penalty"] = settings["repetition_penalty"]
    if settings.get("do_sample") is True:
        found["temperature"] = 1.0 if settings.get("temperature") is None else settings["temperature"]
        found |= {key: settings[key] for key in ("top_p", "min_p") if settings.get(key) not in (None, 0)}
        top_k = 50 if settings.get("top_k") is None else settings["top_k"]
        found |= {"top_k": top_k} if top_k != 0 else {}
    return found


def _check(name: str, value: Any, least: float, most: float, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not least <= value <= most:
        raise ValueError(f"generate: {name} is {value!r}, expected {expected}")
    if math.isinf(value):
        raise ValueError(f"generate: {name} is {value!r}, expected {expected}")
