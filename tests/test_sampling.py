"""Sampler against the rules written out naively in float64, and against chance."""
from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest

from forge_c.models.sampling import Sampler

Probabilities = list[tuple[int, float]]


def softmax(z: dict[int, float]) -> dict[int, float]:
    best = max(z.values())
    weight = {i: math.exp(v - best) for i, v in z.items()}
    total = math.fsum(weight.values())
    return {i: w / total for i, w in weight.items()}


def reference(logits: np.ndarray, seen: np.ndarray, s: Sampler) -> Probabilities:
    """[(token, probability)] by ascending token: penalty, temperature, top_k, top_p, min_p, one after the other."""
    z = {i: float(v) for i, v in enumerate(logits)}
    for i in np.flatnonzero(seen):
        z[i] = z[i] / s.repetition_penalty if z[i] > 0 else z[i] * s.repetition_penalty
    z = {i: v / s.temperature for i, v in z.items()}
    if s.top_k is not None:
        least = sorted(z.values(), reverse=True)[: s.top_k][-1]
        z = {i: v for i, v in z.items() if v >= least}
    p = softmax(z)
    if s.top_p is not None and s.top_p < 1.0:
        kept, total = {}, 0.0
        for i in sorted(p, key=lambda i: (-p[i], i)):
            if total >= s.top_p:
                break
            kept[i], total = p[i], total + p[i]
            assert abs(total - s.top_p) > 1e-12, "the case is decided by rounding"
        p = kept
    if s.min_p is not None:
        least = s.min_p * max(p.values())
        p = {i: q for i, q in p.items() if q >= least}
    total = math.fsum(p.values())
    return [(i, p[i] / total) for i in sorted(p)]


class Fixed:
    """A generator whose next random() is known."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


def pick(sampler: Sampler, logits: Any, value: float = 0.5, seen: Any = None) -> int:
    z = np.asarray(logits, np.float32)
    before = z.tobytes()
    token = sampler.pick(z, np.zeros(len(z), bool) if seen is None else seen, Fixed(value))
    assert z.tobytes() == before and isinstance(token, int)
    return token


def check_distribution(sampler: Sampler, logits: np.ndarray, seen: np.ndarray) -> None:
    """random() in [c, c + p) gives the token whose interval of the cumulated probabilities that is.

    A token too many or too few moves every boundary after it by its probability, and 1e-9 would show.
    """
    expected = reference(logits, seen, sampler)
    ends = list(itertools.accumulate(p for _, p in expected))
    assert pick(sampler, logits, 0.0, seen) == next(i for i, p in expected if p > 0)
    last = max(k for k, (_, p) in enumerate(expected) if p > 1e-12)
    assert pick(sampler, logits, min(ends[last], 1.0) - expected[last][1] / 2, seen) == expected[last][0]
    likely = [k for k, (_, p) in enumerate(expected) if p > 1e-7]
    for k in likely[:: max(1, len(likely) // 12)]:
        token, p = expected[k]
        assert pick(sampler, logits, ends[k] - p + 1e-9, seen) == token
        assert pick(sampler, logits, ends[k] - 1e-9, seen) == token


TEMPERATURES, PENALTIES = (0.3, 1.0, 2.5), (1.0, 1.3, 0.5)
RULES = [dict(zip(("top_k", "top_p", "min_p"), values, strict=True)) for values in itertools.product(
    (None, 1, 3, 40, 10 ** 6), (None, 1e-6, 0.5, 0.95, 1.0), (None, 0.0, 0.1, 1.0))]


@pytest.mark.parametrize("vocab", [1, 2, 7, 60, 800])
def test_every_combination_of_rules(rng, vocab):
    for at, rules in enumerate(RULES):
        logits = (rng.standard_normal(vocab) * rng.choice([0.5, 3.0, 12.0])).astype(np.float32)
        seen = rng.random(vocab) < 0.4
        sampler = Sampler(TEMPERATURES[at % 3], **rules, repetition_penalty=PENALTIES[at // 3 % 3])
        check_distribution(sampler, logits, seen)
        greedy = dataclasses.replace(sampler, temperature=0.0)
        z = np.where(logits > 0, logits / np.float64(sampler.repetition_penalty),
                     logits * np.float64(sampler.repetition_penalty))
        assert pick(greedy, logits, seen=seen) == int(np.where(seen, z, logits).argmax())


@pytest.mark.parametrize(("rules", "kept"), [
    ({}, [0, 1, 2, 3, 4, 5]), ({"top_k": 1}, [1, 4]), ({"top_k": 2}, [1, 4]), ({"top_k": 3}, [0, 1, 2, 4]),
    ({"top_k": 5}, [0, 1, 2, 3, 4, 5]), ({"top_p": 0.3}, [1]), ({"top_p": 0.5}, [1, 4]), ({"top_p": 0.7}, [0, 1, 4]),
    ({"min_p": 1.0}, [1, 4]), ({"min_p": 0.39}, [0, 1, 2, 4]), ({"min_p": 0.05}, [0, 1, 2, 3, 4, 5]),
])
def test_ties(rules, kept):
    """Probabilities 2:5:2:1:5:1 of 16. top_k keeps what ties with the last; top_p takes lower tokens first."""
    logits = np.log([2, 5, 2, 1, 5, 1])
    found = {pick(Sampler(1.0, **rules), logits, value) for value in np.linspace(0, 1, 401)[:-1]}
    assert sorted(found) == kept


def test_greedy_takes_the_first_of_equals():
    assert pick(Sampler(), [1, 3, 3, 2]) == 1
    assert pick(Sampler(top_k=2, top_p=0.1, min_p=0.3), [1, 3, 3, 2], 0.99) == 1


@pytest.mark.parametrize(("sampler", "logits", "expected"), [
    (Sampler(1e-300), [0, 10, 9.99], {1}), (Sampler(1e-300), [5, 5, 0], {0, 1}),
    (Sampler(1e300), [0, 50, -50], {0, 1, 2}), (Sampler(1.0, top_p=1e-300), [0, 1, 2], {2}),
    (Sampler(1.0), [-np.inf, 1, -np.inf], {1}), (Sampler(1.0, top_k=3), [-np.inf, 1, 2, -np.inf], {1, 2}),
    (Sampler(1.0, min_p=0.0), [-np.inf, 1, 1], {1, 2}), (Sampler(1.0), [3e38, -3e38, 3e38], {0, 2}),
    (Sampler(1.0, top_p=0.9), [3e38, -3e38, 3e38], {0, 2}), (Sampler(1.0), [7], {0}),
    (Sampler(1.0), [0, 0, 0], {0, 1, 2}), (Sampler(1.0, top_p=1.0), [0, -700], {0, 1}),
    (Sampler(1.0, top_k=10 ** 9), [0, 0], {0, 1}),
    (Sampler(1.0, min_p=1e-9), [0, -30], {0}),
], ids=repr)
def test_extremes(sampler, logits, expected):
    values = [0.0, 1e-300, *np.linspace(0.01, 0.99, 50), 1 - 2.0 ** -53]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {pick(sampler, logits, value) for value in values}
    if np.ptp(logits) < 700:
        assert found == expected
    assert found <= expected


def test_the_last_random_number_gives_a_token(rng):
    """Rounding leaves the cumulated probabilities a little off 1."""
    for size in (3, 50, 1000):
        logits = rng.standard_normal(size)
        assert pick(Sampler(1.0), logits, 1 - 2.0 ** -53) == size - 1
        assert pick(Sampler(1.0), logits, 0.0) == 0


@pytest.mark.parametrize("how", [{}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.1}, {"repetition_penalty": 2}], ids=repr)
@pytest.mark.parametrize("logits", [[0, np.inf, 1], [np.inf, 0, np.inf], [np.inf, -np.inf, 3]], ids=repr)
def test_an_infinite_logit_is_certain_or_an_error(logits, how):
    seen = np.ones(3, bool)
    for value in (0.0, 0.5, 0.99):
        try:
            token = pick(Sampler(1.0, **how), logits, value, seen)
        except FloatingPointError as error:
            assert str(error).startswith("generate: the model's logits are ")
        else:
            assert logits[token] == np.inf


@pytest.mark.parametrize("how", [{}, {"top_k": 1}, {"top_p": 0.5}], ids=repr)
def test_no_possible_token_is_an_error(how):
    with pytest.raises(FloatingPointError, match="^generate: the model's logits are "):
        pick(Sampler(1.0, **how), [-np.inf] * 3)


@pytest.mark.parametrize("how", [
    {}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 1}, {"repetition_penalty": 2.0},
    {"temperature": 1.0, "top_p": 0.5, "min_p": 0.5}], ids=repr)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_nan_is_an_error(how, at):
    logits = np.array([1.0, 3.0, 2.0])
    logits[at] = np.nan
    with pytest.raises(FloatingPointError) as caught:
        pick(Sampler(**how), logits, seen=np.array([True, False, True]))
    assert str(caught.value) == "generate: the model's logits are NaN"


def test_a_penalty_makes_any_sign_less_likely():
    seen = np.array([True, True, False, False])
    logits = np.array([2.0, -1.0, 2.0, -1.0])
    p = dict(reference(logits, seen, Sampler(1.0, repetition_penalty=1.5)))
    assert p[0] < p[2] and p[1] < p[3]
    assert pick(Sampler(repetition_penalty=1.1), logits, seen=seen) == 2
    assert pick(Sampler(repetition_penalty=0.9), logits, seen=seen) == 0
    check_distribution(Sampler(1.0, repetition_penalty=1.5), logits.astype(np.float32), seen)


@pytest.mark.parametrize("rules", [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2},
                                   {"top_k": 9, "top_p": 0.9, "temperature": 1.7}], ids=repr)
def test_draws_follow_the_probabilities(rules):
    """Chi-square of 5,000 draws. Its mean is the degrees of freedom k and its variance 2 k; with k <= 11 chance
    exceeds k + 6 sqrt(2 k) once in 10^4, and the seed is fixed."""
    logits = np.random.default_rng(1).standard_normal(12).astype(np.float32)
    sampler, generator, seen = Sampler(**({"temperature": 1.0} | rules)), np.random.default_rng(2), np.zeros(12, bool)
    expected = dict(reference(logits, seen, sampler))
    count = np.bincount([sampler.pick(logits, seen, generator) for _ in range(5_000)], minlength=12)
    assert set(np.flatnonzero(count)) == set(expected)
    chi_square = sum((count[i] - 5_000 * p) ** 2 / (5_000 * p) for i, p in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom + 6 * math.sqrt(2 * freedom)


def test_one_random_number_a_token():
    """So that a seed means the same whatever the rules keep."""
    logits, seen = np.arange(9, dtype=np.float32), np.zeros(9, bool)
    for sampler in (Sampler(1.0), Sampler(1.0, top_k=2), Sampler(1.0, top_p=0.5, min_p=0.1)):
        used, other = np.random.default_rng(3), np.random.default_rng(3)
        sampler.pick(logits, seen, used)
        other.random()
        assert used.random() == other.random()
    greedy = np.random.default_rng(3)
    Sampler().pick(logits, seen, greedy)
    assert greedy.random() == np.random.default_rng(3).random()


BAD = [True, "1", None, math.nan, math.inf, -1, -math.inf, [1.0]]


@pytest.mark.parametrize(("name", "expected", "values"), [
    ("temperature", "a number >= 0", [*BAD, -1e-9]), ("repetition_penalty", "a number > 0", [*BAD, 0, -0.5]),
    ("top_k", "an integer >= 1, or None for all tokens", [True, "1", 0, -1, 1.0, math.nan, [1]]),
    ("top_p", "a number above 0 and at most 1, or None for all tokens",
     [True, "1", 0, -0.1, 1.0001, math.nan, math.inf, [0.5]]),
    ("min_p", "a number from 0 to 1, or None", [True, "1", -0.1, 1.0001, math.nan, math.inf, [0.5]]),
])
def test_settings_are_checked(name, expected, values):
    for value in values:
        with pytest.raises(ValueError) as caught:
            Sampler(**{name: value})
        assert str(caught.value) == f"generate: {name} is {value!r}, expected {expected}"


def test_numpy_numbers_are_settings():
    sampler = Sampler(np.float32(0.5), np.int64(2), np.float64(0.5), np.float32(0.25), np.float64(1.5))
    assert pick(sampler, [1, 5, 2]) == 1
    assert Sampler(0, 1, 1, 0, 1) == Sampler(0.0, 1, 1.0, 0.0, 1.0)
