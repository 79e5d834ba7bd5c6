"""rg_lru against its formula: any shape, beginnings, any cut, decays near 1, odd numbers, edge of memory."""

from __future__ import annotations

import itertools
from math import log

import ml_dtypes
import numpy as np
import pytest
import reference as ref
from conftest import check_close
from guard import guarded, guarded_copy
from suite import case

import forge_c as fc

CHANNELS = (1, 3, 8, 15, 16, 17, 40, 127, 128, 131)
TOKENS = ("x", "input_gate", "recurrence_gate", "reset")
ROUNDING = 2.0**-24
TINY = 2.0**-126  # a smaller number counts as 0
LOST = 16 * TINY**0.5  # of what is added, where 1 - a^2 is that small


def inputs(rng, batch, seq, channels, dtype=np.float32, leave_out=()):
    """Decays that forget within a token, and that remember a thousand."""
    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    a = {"x": normal(batch, seq, channels), "input_gate": 2 * normal(batch, seq, channels),
         "recurrence_gate": 3 * normal(batch, seq, channels), "param": 3 * normal(channels) - 4,
         "reset": rng.random((batch, seq)) < 0.1, "state": normal(batch, channels)}
    typed = {name: value.astype(dtype) if name in TOKENS[:3] else value for name, value in a.items()}
    return {name: value for name, value in typed.items() if name not in leave_out}


def magnitudes(a):
    """What y and the state may be off by, in roundings to float32, step by step.

    log a: softplus 8, sigmoid 5, three products 3. Its error is the decay's own, and at most as much of 1 - a; beside
    it the power of two 4 and its sum. The root halves: (16 + 4 + 4) / 2, its own and a product 2. sigmoid(i) x 5.
    """
    x, log_a = ref.f64(a["x"]), -8 * ref.sigmoid(a["recurrence_gate"]) * ref.softplus(a["param"])
    with np.errstate(all="ignore"):
        decay, factor, u = np.exp(log_a), np.sqrt(-np.expm1(2 * log_a)), ref.sigmoid(a["input_gate"]) * x
        h, y = ref.f64(a.get("state", np.zeros((len(x), x.shape[2])))), np.empty_like(u)
        far, size = np.zeros_like(h), np.where(decay == 0, 0, np.abs(log_a))
        for t in range(x.shape[1]):
            begins = np.zeros(len(x), bool) if "reset" not in a else a["reset"][:, t]
            going = decay[:, t] * (1.01 * far + np.abs(h) * (16 * size[:, t] + 6))
            going += np.where(decay[:, t] < 2 * TINY, decay[:, t] * np.abs(h), 0) / ROUNDING
            going += np.abs(factor[:, t] * u[:, t]) * 20 + np.abs(u[:, t]) * LOST / ROUNDING
            far = np.where(begins[:, None], 5 * np.abs(u[:, t]), going)
            h = np.where(begins[:, None], u[:, t], decay[:, t] * h + factor[:, t] * u[:, t])
            y[:, t] = far = far + np.abs(h) + TINY / ROUNDING
        return np.nan_to_num(y), np.nan_to_num(far)


def check(got, a):
    want = ref.rg_lru(**a)
    for result, expected, size in zip(got, want, magnitudes(a), strict=True):
        check_close("rg_lru", result, expected, magnitude=size)


def same(got, want):
    return all(g.dtype == w.dtype and g.tobytes() == w.tobytes() for g, w in zip(got, want, strict=True))


def pieces(a, cuts):
    """The sequence in pieces, each from the state that the one before it left."""
    bounds, parts, state = [0, *cuts, a["x"].shape[1]], [], a.get("state")
    for begin, end in itertools.pairwise(bounds):
        cut = {name: value[:, begin:end] if name in TOKENS else value for name, value in a.items()}
        y, state = fc.rg_lru(**cut | {"state": state})
        parts.append(y)
    return np.concatenate(parts, axis=1), state


def test_golden_numbers(isa, dtype):
    """param such that a = 1/2 where the recurrence's gate is open, 2^-1/2 where it is half open."""
    param = np.full(1, log(2 ** 0.125 - 1), np.float32)
    x, open_, half = np.full((1, 1, 1), 4, dtype), np.full((1, 1, 1), 50, dtype), np.zeros((1, 1, 1), dtype)
    state = np.full((1, 1), 8, np.float32)
    for gates, want in (((open_, open_), 4 + 4 * 0.75 ** 0.5), ((half, open_), 4 + 2 * 0.75 ** 0.5),
                        ((open_, half), 8 * 0.5 ** 0.5 + 4 * 0.5 ** 0.5), ((-open_, open_), 4)):
        y, h = fc.rg_lru(x, *gates, param, state=state)
        assert abs(h[0, 0] - want) < 2e-6 and y[0, 0, 0] == h.astype(dtype)[0, 0]
        y, h = fc.rg_lru(x, *gates, param, state=state, reset=np.ones((1, 1), bool))
        assert h[0, 0] == 4 * ref.sigmoid(gates[0])[0, 0, 0].astype(np.float32)


def test_every_number_of_channels_and_tokens(isa, dtype, rng):
    for channels, seq in itertools.product(CHANNELS, (1, 2, 7, 8, 9, 16, 19)):
        with case(channels, seq):
            a = inputs(rng, 2, seq, channels, dtype)
            check(fc.rg_lru(**a), a)


def test_every_choice_of_options(isa, dtype, rng):
    for left_out in ((), ("state",), ("reset",), ("state", "reset")):
        with case(left_out):
            a = inputs(rng, 2, 150, 140, dtype, left_out)
            check(fc.rg_lru(**a), a)


def test_parameters_of_every_type(isa, rng):
    a = inputs(rng, 1, 5, 40)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        narrow = a["param"].astype(dtype)
        assert same(fc.rg_lru(**a | {"param": narrow}), fc.rg_lru(**a | {"param": narrow.astype(np.float32)}))


def test_any_cut_gives_the_bits_of_the_whole(isa, dtype, rng, each_thread_count):
    for left_out in ((), ("state",), ("reset",)):
        a = inputs(rng, 2, 70, 300, dtype, left_out)
        whole = fc.rg_lru(**a)
        for threads in each_thread_count():
            for cuts in ((1,), (16,), (33,), (69,), (0, 0, 5), (5, 5, 70), range(1, 70)):
                with case(left_out, threads, cuts):
                    assert same(pieces(a, cuts), whole)


def test_rows_and_channels_are_apart(isa, dtype, rng):
    a = inputs(rng, 3, 20, 150, dtype)
    whole = fc.rg_lru(**a)
    for b in range(3):
        alone = {name: value if name == "param" else value[b:b + 1] for name, value in a.items()}
        assert same(fc.rg_lru(**alone), [r[b:b + 1] for r in whole])
    for some in (slice(0, 1), slice(3, 40), slice(125, 150), slice(149, 150)):
        cut = {name: value if name == "reset" else value[..., some] for name, value in a.items()}
        assert same(fc.rg_lru(**cut), [r[..., some] for r in whole])


def test_texts_side_by_side_are_each_alone(isa, dtype, rng):
    """Whatever is in the one before, NaN and infinity too, nothing of it goes over to the next."""
    a = inputs(rng, 1, 30, 21, dtype, ("state",))
    a["reset"][...] = False
    a["reset"][0, [0, 11]] = True
    a["x"][0, 10, 3], a["recurrence_gate"][0, 10, 4], a["x"][0, 9, 5] = np.nan, np.nan, np.inf
    y, state = fc.rg_lru(**a)
    assert np.isnan(y[0, 10, 3:5].astype(np.float32)).all()
    second = {name: value[:, 11:] if name in TOKENS else value for name, value in a.items()}
    assert same((y[:, 11:], state), fc.rg_lru(**second))


def test_arrays_of_any_layout(isa, dtype, rng):
    a = inputs(rng, 2, 19, 40, dtype)
    want = fc.rg_lru(**a)
    wide = {name: np.repeat(value, 2, axis=1)[:, ::2] if name in TOKENS else value for name, value in a.items()}
    wide["state"] = np.concatenate([a["state"]] * 2, axis=1)[:, :40]
    assert same(fc.rg_lru(**wide), want)
    back = {name: value[:, ::-1].copy()[:, ::-1] if name in TOKENS else value for name, value in a.items()}
    assert same(fc.rg_lru(**back), want)
    out = np.zeros((2, 38, 40), dtype)[:, ::2], np.full((2, 42), 7, np.float32)[:, 1:41]
    got = fc.rg_lru(**a, out=out)
    assert got[0] is out[0] and got[1] is out[1] and same(got, want) and (out[1].base[:, [0, -1]] == 7).all()
    every = np.broadcast_to(a["reset"][:, :1], (2, 19))
    assert same(fc.rg_lru(**a | {"reset": every}), fc.rg_lru(**a | {"reset": every.copy()}))


def test_in_place(isa, dtype, rng):
    for name in TOKENS[:3]:
        a = inputs(rng, 2, 19, 140, dtype)
        want = fc.rg_lru(**a)
        assert same(fc.rg_lru(**a, out=(a[name], a["state"])), want)
        assert same((a[name], a["state"]), want)


# ---- the state --------------------------------------------------------------------------------------

def test_the_given_state_is_not_written_to_and_an_empty_sequence_returns_it(isa, rng):
    for seq in (0, 7):
        a = inputs(rng, 2, seq, 150)
        before = a["state"].copy()
        y, state = fc.rg_lru(**a)
        assert y.shape == (2, seq, 150) and state is not a["state"] and a["state"].tobytes() == before.tobytes()
        assert seq or state.tobytes() == before.tobytes()
    a = inputs(rng, 2, 0, 150, leave_out=("state",))
    assert not fc.rg_lru(**a)[1].any()


def test_no_state_is_one_of_zeros_and_a_reset_needs_none(isa, rng):
    a = inputs(rng, 2, 9, 33, leave_out=("state", "reset"))
    zeros = np.zeros((2, 33), np.float32)
    assert same(fc.rg_lru(**a), fc.rg_lru(**a, state=zeros))
    begins = np.arange(9)[None].repeat(2, axis=0) == 0
    assert same(fc.rg_lru(**a, reset=begins), fc.rg_lru(**a, reset=begins, state=zeros + 5))


# ---- accuracy ---------------------------------------------------------------------------------------

def steps(low, high, count=4000):
    """x, gates wide open for the input and at will for the recurrence, param: logarithms of a spread evenly in size."""
    sizes = -np.exp(np.linspace(log(low), log(high), count)).astype(np.float32)
    with np.errstate(over="ignore"):
        param = np.where(sizes < -100, -sizes / 8, np.log(np.expm1(-ref.f64(sizes) / 8))).astype(np.float32)
    gates = np.full((2, 1, 1, count), 60, np.float32)
    return np.ones((1, 1, count), np.float32), *gates, param


@pytest.mark.parametrize(("low", "high"), [(1e-36, 1e-20), (1e-20, 1e-6), (1e-6, 0.01), (0.01, 1), (1, 20), (20, 1e6)])
def test_what_is_added_keeps_its_accuracy_where_a_is_near_1(isa, low, high):
    """h = sqrt(1 - a^2) after one step, to 4 roundings: 1 - a^2 in float32 would have none left at 1e-8."""
    x, i, r, param = steps(low, high)
    h = fc.rg_lru(x, i, r, param)[1][0]
    want = np.sqrt(-np.expm1(-16 * ref.softplus(param)))
    assert (np.abs(h - want) <= 4 * ROUNDING * want).all()


@pytest.mark.parametrize(("low", "high"), [(1e-20, 1e-6), (1e-6, 0.01), (0.01, 1), (1, 85)])
def test_the_decay(isa, low, high):
    """h = a after one step of nothing added: 3 roundings of its logarithm and 2, and what is subnormal."""
    x, i, r, param = steps(low, high)
    h = fc.rg_lru(0 * x, i, r, param, state=x[0])[1][0]
    log_a = -8 * ref.softplus(param)
    assert (np.abs(h - np.exp(log_a)) <= (2 + 3 * np.abs(log_a)) * ROUNDING * np.exp(log_a) + TINY).all()


def test_a_decay_beyond_float32_is_0(isa):
    param = np.array([11, 1e3, 1e30, 3e38, np.inf], np.float32)
    gates = np.full((2, 1, 1, 5), 60, np.float32)
    y, _ = fc.rg_lru(np.ones((1, 1, 5), np.float32), *gates, param, state=np.full((1, 5), 3e38, np.float32))
    assert (y == 1).all()


def test_a_state_that_nothing_is_added_to_dies_away_without_becoming_subnormal(isa, rng):
    """Where every further token would take many times as long: it stays where a token takes less than 2^-126 of it."""
    a = inputs(rng, 1, 3000, 33, leave_out=("reset",))
    a["x"][...], a["param"][...] = 0, -1
    a["recurrence_gate"][...] = -3
    y, state = fc.rg_lru(**a)
    assert y[0, 5].all() and (np.abs(state) < 2.0**-122).all() and ((state == 0) | (np.abs(state) >= TINY)).all()
    assert y[:, -1].tobytes() == state.tobytes()


# ---- odd numbers ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["x", "input_gate", "recurrence_gate", "param", "state"])
def test_nan_and_infinity_go_where_the_formula_sends_them(isa, rng, name):
    for value in (np.nan, np.inf, -np.inf):
        a = inputs(rng, 2, 4, 19)
        a["reset"][:, :3] = False
        a[name].reshape(-1)[a[name].size // 3] = value
        with case(value):
            check(fc.rg_lru(**a), a)


@pytest.mark.parametrize("gate", [88.0, 1e3, 3e38, -60.0, -88.0, -100.0, -170.0, -1e3, -3e38])
def test_gates_of_every_size(isa, rng, gate):
    for name in ("input_gate", "recurrence_gate"):
        a = inputs(rng, 1, 3, 40)
        a["x"] *= np.float32(1e20)
        a[name][0, 1] = gate
        with case(name):
            check(fc.rg_lru(**a), a)


# ---- edge of memory ---------------------------------------------------------------------------------

def test_nothing_is_read_or_written_outside(isa, dtype, rng):
    for channels, seq in itertools.product((1, 5, 16, 23, 64, 129), (1, 8, 18)):
        a = inputs(rng, 1, seq, channels, dtype)
        want = fc.rg_lru(**a)
        for at_end in (False, True):
            inside = {name: guarded_copy(value, at_end=at_end) for name, value in a.items()}
            out = tuple(guarded(w.shape, w.dtype, at_end=at_end) for w in want)
            got = fc.rg_lru(**inside, out=out)
            with case(channels, seq, at_end):
                assert got[0] is out[0] and got[1] is out[1] and same(got, want)
                assert all(inside[name].tobytes() == value.tobytes() for name, value in a.items())


# ---- a million tokens -------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_million_tokens_do_not_drift(isa, rng):
    """h = sum of exp(sum of log a after t) sqrt(1 - a_t^2) x_t; a remembers ten to a million tokens."""
    seq, channels = 1_000_000, 4
    x, r = rng.standard_normal((2, 1, seq, channels), np.float32)
    param = np.log(np.expm1(np.array([1e-1, 1e-3, 1e-5, 1e-6]) / 8)).astype(np.float32)
    state = fc.rg_lru(x, np.full_like(x, 60), r, param)[1][0]
    log_a = -8 * ref.sigmoid(r[0]) * ref.softplus(param)
    after = np.cumsum(log_a[::-1], axis=0)[::-1] - log_a
    terms = np.exp(after) * np.sqrt(-np.expm1(2 * log_a)) * x[0]
    assert (np.abs(state - terms.sum(0)) <= 1e-5 * np.abs(terms).sum(0)).all()
