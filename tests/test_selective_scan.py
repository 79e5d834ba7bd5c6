"""selective_scan against its formula: any shape and option, any cut, odd numbers, edge of memory, a million tokens."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reference as ref
from conftest import check_close
from guard import guarded, guarded_copy
from suite import case

import forge_c as fc

STATES = (1, 2, 3, 8, 15, 16, 17, 40)
CHANNELS = (1, 3, 16, 17, 40, 70, 131)
OPTIONS = ("D", "z", "delta_bias", "state")
ROUNDING = 2.0**-24
LOST = 2.0**-125 / ROUNDING  # of h, where its factor counts as 0
TINY = 2.0**-126 / ROUNDING  # a subnormal number counts as 0


def inputs(rng, batch, seq, channels, n, dtype=np.float32, leave_out=()):
    """Steps of 0.002 to 0.4 and decays of 1 to n, as Mamba begins with."""
    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    a = {"u": normal(batch, seq, channels), "delta": normal(batch, seq, channels) - 3,
         "A": -np.exp(np.log(np.arange(1, n + 1)) + 0.1 * normal(channels, n)).astype(np.float32),
         "B": normal(batch, seq, n), "C": normal(batch, seq, n), "D": normal(channels),
         "z": normal(batch, seq, channels), "delta_bias": normal(channels), "state": normal(batch, channels, n)}
    own = {name: x if name in ("A", "D", "delta_bias", "state") else x.astype(dtype) for name, x in a.items()}
    return {name: x for name, x in own.items() if name not in leave_out}


def positive(a):
    """The same with steps that need no softplus to be positive."""
    small = np.abs(a["delta"].astype(np.float32)) * np.float32(0.1)
    return {**{name: x for name, x in a.items() if name != "delta_bias"}, "delta": small.astype(a["delta"].dtype)}


def times(size, roundings):
    """Nothing is off in 0, not even by infinitely many roundings of what it came from."""
    return np.where(size == 0, 0, size * roundings)


def magnitudes(a, softplus):
    """What y and the state may be off by, in roundings to float32: `off` of delta, `far` of h, step by step.

    delta: its sum with the bias, which counts by |x| in softplus' tail, exp 4, log1p 3, a sum. exp(delta A): log2(e)
    and two products in the exponent, the power of two 4. delta u and its product with B 2. A fused step, its sum.
    """
    u, b, c = ref.f64(a["u"]), ref.f64(a["B"]), ref.f64(a["C"])
    x = ref.f64(a["delta"]) + ref.f64(a.get("delta_bias", 0.0))
    dt, off = (ref.softplus(x), 10 + np.abs(x)) if softplus else (x, np.ones_like(x))
    off = np.where(dt == 0, 1, off)
    h = ref.f64(a.get("state", np.zeros((len(u), *a["A"].shape))))
    far, y_far = np.zeros_like(h), np.abs(ref.f64(a.get("D", 0.0)) * u) * 2
    y = ref.f64(a.get("D", 0.0)) * u
    with np.errstate(all="ignore"):
        for t in range(u.shape[1]):
            power, of = dt[:, t, :, None] * ref.f64(a["A"]), off[:, t, :, None]
            decay, added = np.exp(power), dt[:, t, :, None] * b[:, t, None] * u[:, t, :, None]
            far = 1.01 * decay * (far + 5 * np.abs(h)) + times(np.abs(added), of + 3)
            far += times(1.01 * decay * np.abs(h), np.abs(power) * (of + 3))
            h = np.where(decay == 0, 0, decay * h) + added
            far += np.abs(h) * (1 + LOST) + TINY
            part = np.abs(c[:, t, None])
            y_far[:, t] += np.sum(part * (far + (h.shape[-1] + 2) * np.abs(h)) + TINY, axis=-1)
            y[:, t] += np.sum(h * c[:, t, None], axis=-1)
        y_far += np.abs(y)
        gate = ref.silu(a["z"]) if "z" in a else 1.0
        return np.nan_to_num(y_far * np.abs(gate) + 8 * np.abs(y * gate) + TINY), np.nan_to_num(far)


def check(got, a, softplus):
    want = ref.selective_scan(**a, delta_softplus=softplus)
    sizes = magnitudes(a, softplus)
    for result, expected, size in zip(got, want, sizes, strict=True):
        check_close("selective_scan", result, expected, magnitude=size)


def same(got, want):
    return all(g.dtype == w.dtype and g.tobytes() == w.tobytes() for g, w in zip(got, want, strict=True))


def pieces(a, cuts, **options):
    """The sequence in pieces, each from the state that the one before it left."""
    bounds, parts, state = [0, *cuts, a["u"].shape[1]], [], a.get("state")
    for begin, end in itertools.pairwise(bounds):
        cut = {name: x[:, begin:end] if name in ("u", "delta", "B", "C", "z") else x for name, x in a.items()}
        y, state = fc.selective_scan(**{**cut, "state": state}, **options)
        parts.append(y)
    return np.concatenate(parts, axis=1), state


@pytest.mark.parametrize("softplus", [False, True])
def test_every_number_of_states_and_channels(isa, dtype, rng, softplus):
    for channels, n in itertools.product(CHANNELS, STATES):
        with case(channels, n):
            a = inputs(rng, 2, 5, channels, n, dtype)
            a = a if softplus else positive(a)
            check(fc.selective_scan(**a, delta_softplus=softplus), a, softplus)


@pytest.mark.parametrize("n", [255, 256])
def test_many_states(isa, rng, n):
    a = inputs(rng, 1, 33, 18, n)
    check(fc.selective_scan(**a, delta_softplus=True), a, True)


def test_every_choice_of_options(isa, dtype, rng):
    for count in range(len(OPTIONS) + 1):
        for left_out in itertools.combinations(OPTIONS, count):
            with case(left_out):
                a = inputs(rng, 2, 19, 21, 16, dtype, left_out)
                check(fc.selective_scan(**a, delta_softplus=True), a, True)


def test_longer_than_a_run(isa, dtype, rng):
    a = inputs(rng, 2, 150, 40, 16, dtype)
    check(fc.selective_scan(**a, delta_softplus=True), a, True)


def test_any_cut_gives_the_bits_of_the_whole(isa, dtype, rng, each_thread_count):
    a = inputs(rng, 2, 70, 150, 16, dtype)
    whole = fc.selective_scan(**a, delta_softplus=True)
    for threads in each_thread_count():
        for cuts in ((1,), (16,), (33,), (69,), (0, 0, 5), (5, 5, 70), range(1, 70)):
            with case(threads, cuts):
                assert same(pieces(a, cuts, delta_softplus=True), whole)


def test_a_row_of_a_batch_has_the_bits_that_it_has_alone(isa, dtype, rng):
    a = inputs(rng, 3, 20, 37, 9, dtype)
    together = fc.selective_scan(**a, delta_softplus=True)
    for b in range(3):
        alone = {name: x if name in ("A", "D", "delta_bias") else x[b:b + 1] for name, x in a.items()}
        assert same(fc.selective_scan(**alone, delta_softplus=True), [r[b:b + 1] for r in together])


def test_channels_are_apart(isa, rng):
    a = inputs(rng, 2, 20, 70, 16)
    whole = fc.selective_scan(**a, delta_softplus=True)
    for some in (slice(0, 1), slice(3, 40), slice(69, 70)):
        cut = {name: x if name in ("B", "C") else x[some] if name in ("A", "D", "delta_bias") else
               x[:, some] if name == "state" else x[..., some] for name, x in a.items()}
        y, state = fc.selective_scan(**cut, delta_softplus=True)
        assert y.tobytes() == whole[0][..., some].tobytes() and state.tobytes() == whole[1][:, some].tobytes()


# ---- the state --------------------------------------------------------------------------------------

def test_the_given_state_is_not_written_to_and_an_empty_sequence_returns_it(isa, rng):
    a = inputs(rng, 2, 0, 21, 5)
    before = a["state"].copy()
    y, state = fc.selective_scan(**a)
    assert y.shape == (2, 0, 21) and state is not a["state"] and state.tobytes() == before.tobytes()
    del a["state"]
    assert not fc.selective_scan(**a)[1].any()
    a = inputs(rng, 2, 7, 21, 5)
    before = a["state"].copy()
    fc.selective_scan(**a)
    assert a["state"].tobytes() == before.tobytes()


def test_the_state_in_place(isa, rng):
    a = inputs(rng, 2, 7, 150, 16)
    want = fc.selective_scan(**a)
    y, state = fc.selective_scan(**a, out=(None, a["state"]))
    assert state is a["state"] and same((y, state), want)
    for n in (1, 3):  # rows that are further apart than they are long
        a = inputs(rng, 2, 7, 20, n)
        want = fc.selective_scan(**a)
        wide = np.full((2, 20, n + 2), 7, np.float32)
        wide[..., 1:-1] = a["state"]
        a["state"] = wide[..., 1:-1]
        assert same(fc.selective_scan(**a, out=(None, a["state"])), want)
        assert (wide[..., [0, -1]] == 7).all()


def test_no_states_leave_the_direct_path(rng):
    a = inputs(rng, 2, 7, 21, 0)
    y, state = fc.selective_scan(**a)
    assert state.shape == (2, 21, 0)
    np.testing.assert_allclose(y, a["D"] * a["u"] * ref.silu(a["z"]), rtol=1e-6)


# ---- odd numbers ------------------------------------------------------------------------------------

def test_a_step_of_zero_changes_nothing(isa, rng):
    a = inputs(rng, 1, 1000, 33, 17)
    a["delta"][...], a["delta_bias"][...] = 0, 0
    y, state = fc.selective_scan(**a)
    assert state.tobytes() == a["state"].tobytes()
    check((y, state), a, False)


@pytest.mark.parametrize("delta", [1e-30, 1e3, 1e10, 1e30, -1e-3, -0.5, -80.0, -1e3, -1e30, np.inf, -np.inf, np.nan])
def test_steps_of_every_size(isa, rng, delta):
    """Positive ones forget, negative ones grow the state to infinity, as the formula does."""
    for softplus in (False, True):
        a = positive(inputs(rng, 1, 3, 5, 1 if delta < 0 else 9))
        a["delta"][0, 1, 2] = delta
        with case(softplus):
            check(fc.selective_scan(**a, delta_softplus=softplus), a, softplus)


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "state"])
def test_nan_and_infinity_go_where_the_formula_sends_them(isa, rng, name):
    for value in (np.nan, np.inf, -np.inf):
        for softplus in (False, True):
            a = inputs(rng, 1, 4, 19, 5) if softplus else positive(inputs(rng, 1, 4, 19, 5))
            if name not in a:
                continue
            a[name].reshape(-1)[a[name].size // 2] = value
            with case(value, softplus):
                check(fc.selective_scan(**a, delta_softplus=softplus), a, softplus)


def numbers(low, high, count=4000):
    """As many channels: a step of one state, A = 0 or 1."""
    return np.linspace(low, high, count, dtype=np.float32)[None, None]


@pytest.mark.parametrize(("low", "high"), [(-87, -15), (-16, 1), (-1e-3, 1e-3), (0, 21), (20, 1e6)])
def test_softplus(isa, rng, low, high):
    """h = delta * 1 * 1 after one step: softplus, to 8 roundings and those of the sum. Under -16 it is not 0."""
    x = numbers(low, high)
    ones, zero = np.ones((1, 1, 1), np.float32), np.zeros((x.size, 1), np.float32)
    state = fc.selective_scan(np.ones_like(x), x, zero, ones, ones, delta_softplus=True)[1].ravel()
    want = ref.softplus(x).ravel()
    assert (np.abs(state - want) <= 8 * ROUNDING * want).all() and (state > 0).all()


@pytest.mark.parametrize(("low", "high"), [(-86, -1), (-1, 1), (-1e-3, 1e-3), (1, 88.7)])
def test_the_decay(isa, rng, low, high):
    """h = exp(delta) 1 + 0 after one step: two roundings of the exponent and 4."""
    x = numbers(low, high)
    one, zero = np.ones((x.size, 1), np.float32), np.zeros((1, 1, 1), np.float32)
    state = fc.selective_scan(np.zeros_like(x), x, one, zero, zero, state=one[None])[1].ravel()
    want = np.exp(ref.f64(x)).ravel()
    assert (np.abs(state - want) <= (4 + 2 * np.abs(x.ravel())) * ROUNDING * want).all()


def test_the_decay_beyond_float32(isa):
    """2^128 less a little is a float; under 2^-125 there may be 0."""
    x = np.array([[[88.72, 88.8, 200, 1e9, 3e38, np.inf, -86.6, -88, -103, -150, -1e9, -3e38, -np.inf]]], np.float32)
    one, zero = np.ones((x.size, 1), np.float32), np.zeros((1, 1, 1), np.float32)
    state = fc.selective_scan(np.zeros_like(x), x, one, zero, zero, state=one[None])[1].ravel()
    with np.errstate(over="ignore", under="ignore"):
        want = np.exp(x.ravel().astype(np.float64))
    finite = state[:5]
    assert np.isfinite(finite[0]) and (finite[1:] == np.inf).all()
    assert np.isnan(state[5])  # delta is infinite and u 0
    assert state[6] > 0 and (np.abs(state[6:9] - want[6:9]) < 2.0**-125).all() and (state[9:12] == 0).all()


def test_a_state_that_nothing_is_added_to_becomes_0_and_not_subnormal(isa, rng):
    """Where every further token would take many times as long."""
    a = inputs(rng, 1, 3000, 33, 17, leave_out=("delta_bias",))
    a["u"][...], a["delta"][...] = 0, 0.1
    y, state = fc.selective_scan(**a)
    assert not state.any() and not y[:, -1].any()
    check((y, state), a, False)


# ---- edge of memory ---------------------------------------------------------------------------------

def test_nothing_is_read_or_written_outside(isa, dtype, rng):
    for channels, n, seq in itertools.product((1, 5, 16, 23, 64, 67), (1, 5, 16, 19), (1, 18)):
        a = inputs(rng, 1, seq, channels, n, dtype)
        want = fc.selective_scan(**a, delta_softplus=True)
        for at_end in (False, True):
            inside = {name: guarded_copy(x, at_end=at_end) for name, x in a.items()}
            out = tuple(guarded(w.shape, w.dtype, at_end=at_end) for w in want)
            got = fc.selective_scan(**inside, delta_softplus=True, out=out)
            with case(channels, n, seq, at_end):
                assert got[0] is out[0] and got[1] is out[1] and same(got, want)
                assert all(inside[name].tobytes() == x.tobytes() for name, x in a.items())


# ---- a million tokens -------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("constant", [False, True])
def test_a_million_tokens_do_not_drift(isa, rng, constant):
    """h = sum of exp(A (S - S_t)) delta_t B_t u_t with S the sum of all steps; to 1e-5 of the sum of sizes."""
    seq, channels, n = 1_000_000, 4, 16
    u = rng.standard_normal((1, seq, channels), np.float32)
    b, c = rng.standard_normal((2, 1, seq, n), np.float32)
    delta = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), u.shape)).astype(np.float32)
    if constant:
        delta[...], u[...], b[...] = 1e-3, 1, 1
    A = -np.tile(np.arange(1, n + 1, dtype=np.float32), (channels, 1))
    state = fc.selective_scan(u, delta, A, b, c)[1][0]
    steps = np.cumsum(ref.f64(delta[0]), axis=0)
    for i, k in np.ndindex(channels, n):
        terms = np.exp(float(A[i, k]) * (steps[-1, i] - steps[:, i])) * delta[0, :, i]
        terms *= ref.f64(b[0, :, k]) * u[0, :, i]
        assert abs(state[i, k] - terms.sum()) <= (1e-4 if constant else 1e-5) * np.abs(terms).sum()
