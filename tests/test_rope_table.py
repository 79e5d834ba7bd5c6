"""Rope tables: golden numbers of every scaling type, accuracy at far positions, and what is refused."""

import copy
import math
import pickle
import tracemalloc

import numpy as np
import pytest

from forge_c.rotary import RopeTable, extend_rope_table, rope_table

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 4.0, 16.0, 64.0],
    "original_max_position_embeddings": 4096,
    "max_position_embeddings": 131072,
}
# Rounding to float32 moves a number below 1 by at most half a unit in its last place; the float64 arithmetic
# before it adds a thousandth of that at the positions tested here.
ROUNDING = 1.001 * 2.0**-25


def frequencies(table: RopeTable) -> np.ndarray:
    """The inverse frequencies, read back from position 1."""
    return np.arctan2(table.sin[1].astype(np.float64), table.cos[1].astype(np.float64))


def attention_factor(table: RopeTable) -> float:
    """What cos and sin were multiplied by."""
    return float(np.hypot(table.sin[1].astype(np.float64), table.cos[1].astype(np.float64)).mean())


def plain_frequencies(dim: int, base: float) -> np.ndarray:
    return base ** (-2.0 * np.arange(dim // 2) / dim)


@pytest.mark.parametrize("dim", [2, 4, 40, 64, 96, 128, 256])
@pytest.mark.parametrize("rows", [1, 2, 255, 256, 257, 600])
def test_default_table_is_cos_and_sin_of_position_times_frequency(dim, rows):
    table = rope_table(dim, rows, 10000.0)
    angles = np.arange(rows)[:, None] * plain_frequencies(dim, 10000.0)
    assert table.cos.shape == table.sin.shape == (rows, dim // 2)
    assert np.abs(table.cos - np.cos(angles)).max() <= ROUNDING
    assert np.abs(table.sin - np.sin(angles)).max() <= ROUNDING


@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_positions_to_two_to_the_twenty_are_accurate(base):
    table = rope_table(16, 2**20, base)
    positions = np.r_[0:3, 4095:4098, 131071:131074, 2**20 - 3 : 2**20, 1:1000000:7919]
    angles = positions[:, None] * plain_frequencies(16, base)
    assert np.abs(table.cos[positions] - np.cos(angles)).max() < 1e-6
    assert np.abs(table.sin[positions] - np.sin(angles)).max() < 1e-6


def test_float32_angles_would_fail_the_accuracy_test():
    inv_freq = plain_frequencies(128, 500000.0)
    position = 2**20 - 1
    in_float32 = np.float32(position) * inv_freq.astype(np.float32)
    error = np.abs(np.cos(in_float32.astype(np.float64)) - np.cos(position * inv_freq)).max()
    assert error > 1e-3


def test_a_longer_table_begins_with_the_shorter_one():
    short, long = rope_table(64, 300), rope_table(64, 1000)
    assert short.cos.tobytes() == long.cos[:300].tobytes()
    assert short.sin.tobytes() == long.sin[:300].tobytes()


@pytest.mark.parametrize("scaling", [{}, LLAMA3, YARN, {"rope_type": "linear", "factor": 3.0}])
def test_an_extended_table_is_the_longer_one(scaling):
    longest = rope_table(40, 1500, 5e5, scaling=scaling)
    for rows in (1, 2, 255, 256, 257, 512, 700):
        table = rope_table(40, rows, 5e5, scaling=scaling)
        for longer in (rows + 1, 768, 1025, 1500):
            found = extend_rope_table(table, longer, 5e5, scaling=scaling)
            assert found.cos.tobytes() == longest.cos[:longer].tobytes(), (rows, longer)
            assert found.sin.tobytes() == longest.sin[:longer].tobytes(), (rows, longer)
            table = found if longer < 1000 else table
    assert extend_rope_table(longest, 1500, 5e5, scaling=scaling) is longest
    assert extend_rope_table(longest, 3, 5e5, scaling=scaling) is longest


def test_only_new_positions_are_computed():
    table = rope_table(64, 1 << 17)
    tracemalloc.start()
    longer = extend_rope_table(table, (1 << 17) + 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * (longer.cos.nbytes + longer.sin.nbytes)


@pytest.mark.parametrize("scaling", [LONGROPE, {"type": "dynamic", "factor": 2.0, "max_position_embeddings": 4096}])
def test_angles_that_depend_on_the_length_are_not_extended(scaling):
    with pytest.raises(ValueError) as caught:
        extend_rope_table(rope_table(8, 4, scaling=scaling), 8, scaling=scaling)
    kind = scaling.get("rope_type", scaling.get("type"))
    assert str(caught.value) == (f"extend_rope_table: rope_type {kind} depends on max_seq_len, expected another or a "
                                 "new table")


NUMBERS = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0, "max_position_embeddings": 64},
    "yarn": YARN | {"attention_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0},
    "longrope": LONGROPE | {"factor": 4.0, "attention_factor": 1.0},
    "llama3": LLAMA3,
    "proportional": {"factor": 2.0, "partial_rotary_factor": 0.5},
    "divided": {"divisors": [1.0, 1.5, 4.0, 8.0]},
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", NUMBERS)
def test_a_number_beyond_any_model_is_refused_or_gives_a_finite_table(kind):
    """Nothing else: no OverflowError, no warning of NumPy's, no infinite angle."""
    hostile = [10**400, -(10**400), 10**5000, 1e308, 1e200, 1e19, 2.0**70, 2**53, 1e-300, 5e-324, 1e-19, 0, -1,
               math.nan, math.inf, np.float64(1e308)]
    keys = {*NUMBERS[kind], "rope_theta", "max_position_embeddings", "original_max_position_embeddings"}
    for key in keys - {"rope_type"}:
        for value in hostile:
            given = {"rope_type": kind} | NUMBERS[kind] | {key: [value] * 4 if isinstance(
                NUMBERS[kind].get(key), list) else value}
            without = {k: v for k, v in given.items() if k == key or k not in ("factor", "attention_factor")}
            for scaling in (given, without):
                try:
                    table = rope_table(8, 300, scaling=scaling)
                except ValueError as error:
                    assert str(error).startswith("rope_table: "), (key, error)
                else:
                    assert np.isfinite(table.cos).all() and np.isfinite(table.sin).all(), (key, value)


def test_building_takes_little_memory_beyond_the_table():
    tracemalloc.start()
    table = rope_table(16, 2**17)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * (table.cos.nbytes + table.sin.nbytes)


def test_linear_divides_the_frequencies():
    table = rope_table(64, 8, scaling={"type": "linear", "factor": 4.0})
    np.testing.assert_allclose(frequencies(table), plain_frequencies(64, 10000.0) / 4.0, rtol=1e-6)


def test_linear_is_the_same_as_dividing_positions():
    stretched = rope_table(64, 41, scaling={"rope_type": "linear", "factor": 4.0})
    plain = rope_table(64, 11)
    np.testing.assert_allclose(stretched.cos[::4], plain.cos, atol=2 * ROUNDING)
    np.testing.assert_allclose(stretched.sin[::4], plain.sin, atol=2 * ROUNDING)


@pytest.mark.parametrize(
    ("length", "base"), [(16, 10000.0), (4096, 10000.0), (8192, 30527.737), (16384, 72195.860)]
)
def test_dynamic_base_grows_with_the_table(length, base):
    scaling = {"rope_type": "dynamic", "factor": 2.0, "max_position_embeddings": 4096}
    table = rope_table(128, length, scaling=scaling)
    np.testing.assert_allclose(frequencies(table), plain_frequencies(128, base), rtol=1e-6)


@pytest.mark.parametrize(
    ("pair", "inv_freq"),
    [
        (28, 3.21144599e-3),
        (29, 2.16657076e-3),
        (30, 1.37189357e-3),
        (34, 1.78507813e-4),
        (35, 9.55621235e-5),
        (63, 3.06892599e-7),
    ],
)
def test_llama3_golden_frequencies(pair, inv_freq):
    table = rope_table(128, 2, 500000.0, scaling=LLAMA3)
    assert frequencies(table)[pair] == pytest.approx(inv_freq, rel=1e-6)


def test_llama3_blends_exactly_pairs_29_to_34():
    plain = plain_frequencies(128, 500000.0)
    scaled = frequencies(rope_table(128, 2, 500000.0, scaling=LLAMA3))
    kept = np.isclose(scaled, plain, rtol=1e-6)
    divided = np.isclose(scaled, plain / 8.0, rtol=1e-6)
    assert np.flatnonzero(~kept & ~divided).tolist() == list(range(29, 35))
    assert kept[:29].all() and divided[35:].all()


def test_llama3_has_no_attention_factor():
    assert attention_factor(rope_table(128, 2, 500000.0, scaling=LLAMA3)) == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize(
    ("factor", "expected"), [(1.0, 1.0), (4.0, 1.138629), (8.0, 1.207944), (32.0, 1.346574), (40.0, 1.368888)]
)
def test_yarn_attention_factor(factor, expected):
    table = rope_table(64, 2, 1e6, scaling=YARN | {"factor": factor})
    assert attention_factor(table) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"attention_factor": 1.5}, 1.5),
        ({"mscale": 0.707, "mscale_all_dim": 0.707}, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, 1.1386294 / 1.0693147),
        ({"mscale": 1.0}, 1.1386294),
        ({"mscale": 1.0, "mscale_all_dim": 0}, 1.1386294),
        ({"attention_factor": 1.5, "mscale": 1.0, "mscale_all_dim": 0.5}, 1.5),
    ],
)
def test_yarn_attention_factor_keys(extra, expected):
    assert attention_factor(rope_table(64, 2, scaling=YARN | extra)) == pytest.approx(expected, abs=1e-6)


def test_yarn_ramp_between_floor_and_ceil():
    # c(32) = 64 ln(32768 / (64 pi)) / (2 ln 1e6) = 11.80 and c(1) = 19.83, so the ramp runs over 11 .. 20.
    plain = plain_frequencies(64, 1e6)
    scaled = frequencies(rope_table(64, 2, 1e6, scaling=YARN))
    ramp = np.clip((np.arange(32) - 11) / 9.0, 0.0, 1.0)
    np.testing.assert_allclose(scaled, plain / 4.0 * ramp + plain * (1.0 - ramp), rtol=1e-6)


def test_yarn_without_truncation_keeps_the_fractions():
    low = 64 * math.log(32768 / (64 * math.pi)) / (2 * math.log(1e6))
    high = 64 * math.log(32768 / (2 * math.pi)) / (2 * math.log(1e6))
    plain = plain_frequencies(64, 1e6)
    scaled = frequencies(rope_table(64, 2, 1e6, scaling=YARN | {"truncate": False}))
    ramp = np.clip((np.arange(32) - low) / (high - low), 0.0, 1.0)
    np.testing.assert_allclose(scaled, plain / 4.0 * ramp + plain * (1.0 - ramp), rtol=1e-6)
    assert (11 < low < 12) and (19 < high < 20)


def test_yarn_takes_a_missing_factor_from_the_lengths():
    by_ratio = {key: YARN[key] for key in YARN if key != "factor"} | {"max_position_embeddings": 131072}
    assert rope_table(64, 9, scaling=by_ratio).sin.tobytes() == rope_table(64, 9, scaling=YARN).sin.tobytes()


@pytest.mark.parametrize(("length", "divisors"), [(4096, "short_factor"), (4097, "long_factor")])
def test_longrope_switches_lists_past_the_original_length(length, divisors):
    table = rope_table(8, length, scaling=LONGROPE)
    expected = plain_frequencies(8, 10000.0) / np.array(LONGROPE[divisors])
    np.testing.assert_allclose(frequencies(table), expected, rtol=1e-6)
    assert attention_factor(table) == pytest.approx(1.190238, abs=1e-6)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"attention_factor": 1.25}, 1.25),
        ({"factor": 1.0}, 1.0),
        ({"factor": 16.0}, 1.154701),
        ({"max_position_embeddings": 2048}, 1.0),
    ],
)
def test_longrope_attention_factor(extra, expected):
    assert attention_factor(rope_table(8, 4, scaling=LONGROPE | extra)) == pytest.approx(expected, abs=1e-6)


def test_proportional_turns_a_share_of_the_pairs_over_the_whole_width():
    scaling = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    turned = frequencies(rope_table(512, 2, scaling=scaling))
    assert turned[1] == pytest.approx(0.94746, abs=1e-5)
    np.testing.assert_allclose(turned[:64], plain_frequencies(512, 1e6)[:64], rtol=1e-6)
    assert not turned[64:].any()


def test_partial_rotation_is_a_smaller_dim():
    assert frequencies(rope_table(128, 2, 1e6))[1] == pytest.approx(0.80584, abs=1e-5)


def test_proportional_factor_divides():
    scaling = {"rope_type": "proportional", "factor": 8.0, "partial_rotary_factor": 0.5}
    expected = plain_frequencies(16, 10000.0) / 8.0
    expected[4:] = 0.0
    np.testing.assert_allclose(frequencies(rope_table(16, 2, scaling=scaling)), expected, rtol=1e-6)


@pytest.mark.parametrize("length", [2, 100])
def test_divided_has_a_divisor_for_each_pair_at_any_length(length):
    divisors = [1.0, 1.5, 4.0, 8.0]
    table = rope_table(8, length, scaling={"rope_type": "divided", "divisors": divisors})
    np.testing.assert_allclose(frequencies(table), plain_frequencies(8, 10000.0) / divisors, rtol=1e-6)
    assert attention_factor(table) == pytest.approx(1.0, abs=1e-6)


def test_old_and_new_spellings_are_one():
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0, "partial_rotary_factor": 1.0}
    old = {"type": "linear", "factor": 2.0}
    assert rope_table(64, 9, scaling=new).cos.tobytes() == rope_table(64, 9, 5e5, scaling=old).cos.tobytes()
    both = {"type": "linear", "rope_type": "linear", "factor": 2.0, "beta_fast": None}
    assert rope_table(64, 9, scaling=both).cos.tobytes() == rope_table(64, 9, scaling=old).cos.tobytes()


def test_an_empty_dict_and_the_default_type_change_nothing():
    plain = rope_table(64, 9).cos.tobytes()
    assert rope_table(64, 9, scaling={}).cos.tobytes() == plain
    assert rope_table(64, 9, scaling={"rope_type": "default", "rope_theta": 10000.0}).cos.tobytes() == plain


def test_the_table_is_immutable():
    table = rope_table(8, 4)
    assert not table.cos.flags.writeable and not table.sin.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        table.cos[0, 0] = 2.0
    with pytest.raises(AttributeError, match="RopeTable: cos cannot be assigned, make a new table"):
        table.cos = table.sin
    assert repr(table) == "RopeTable(dim=8, max_seq_len=4)"


@pytest.mark.parametrize("remake", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies_and_pickles_are_tables_too(remake):
    table = rope_table(8, 4)
    again = remake(table)
    assert (again.dim, again.max_seq_len) == (8, 4)
    assert again.cos.tobytes() == table.cos.tobytes() and not again.sin.flags.writeable


def test_wrapping_ones_own_tables():
    cos, sin = np.ones((5, 3), np.float32), np.zeros((5, 3), np.float32)
    table = RopeTable(cos, sin)
    assert (table.dim, table.max_seq_len) == (6, 5)
    assert np.shares_memory(table.cos, cos) and cos.flags.writeable
    strided = RopeTable(np.ones((5, 6), np.float32)[:, ::2], sin)
    assert strided.cos.flags.c_contiguous


@pytest.mark.parametrize(
    ("cos", "sin", "error", "message"),
    [
        (
            (4, 2, "f8"),
            (4, 2, "f4"),
            TypeError,
            "RopeTable: cos has dtype float64: pass cos.astype(np.float32)",
        ),
        (
            (4, 2, "f4"),
            (4, 2, "i4"),
            TypeError,
            "RopeTable: sin has dtype int32: pass sin.astype(np.float32)",
        ),
        ((4, 2, "f4"), (4, 3, "f4"), ValueError, "RopeTable: sin has shape (4, 3), expected (4, 2) as cos"),
    ],
)
def test_wrong_tables(cos, sin, error, message):
    with pytest.raises(error) as caught:
        RopeTable(np.ones(cos[:2], cos[2]), np.ones(sin[:2], sin[2]))
    assert str(caught.value) == message


def test_a_table_has_two_axes():
    flat = np.ones(4, np.float32)
    with pytest.raises(ValueError) as caught:
        RopeTable(flat, flat)
    assert str(caught.value) == "RopeTable: cos has shape (4,), expected (max_seq_len, dim / 2)"


WRONG = [
    (dict(dim=7, max_seq_len=4), ValueError, "dim is 7, expected an even number"),
    (dict(dim=0, max_seq_len=4), ValueError, "dim is 0, expected at least 1"),
    (dict(dim=8, max_seq_len=-1), ValueError, "max_seq_len is -1, expected at least 1"),
    (dict(dim=2**70, max_seq_len=4), ValueError, f"dim is {2**70}, expected at most 65536"),
    (dict(dim=8, max_seq_len=2**70), ValueError, f"max_seq_len is {2**70}, expected at most {2**45}"),
    (dict(dim=8, max_seq_len=4, base=1e300), ValueError, "base is 1e+300, expected 5.42e-20 to 1.84e+19"),
    (
        dict(dim=8, max_seq_len=4, base=10**400),
        ValueError,
        "base is an integer of 1329 bits, expected 5.42e-20 to 1.84e+19",
    ),
    (
        dict(dim=8, max_seq_len=4, scaling={"type": "linear", "factor": 1e308}),
        ValueError,
        "scaling['factor'] is 1e+308, expected 9.54e-07 to 1.05e+06",
    ),
    (dict(dim=8.0, max_seq_len=4), TypeError, "dim is 8.0, expected an integer"),
    (dict(dim=8, max_seq_len=4, base=1.0), ValueError, "base is 1.0, expected more than 1"),
    (dict(dim=8, max_seq_len=4, base=math.inf), ValueError, "base is inf, expected a finite number above 0"),
    (dict(dim=8, max_seq_len=4, base="big"), ValueError, "base is 'big', expected a number"),
    (dict(dim=8, max_seq_len=4, scaling="yarn"), TypeError, "scaling is str, expected a dict or None"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_calls(call, error, message):
    with pytest.raises(error) as caught:
        rope_table(**call)
    assert str(caught.value) == f"rope_table: {message}"


WRONG_SCALING = [
    (
        {"rope_type": "su"},
        "unknown rope_type 'su', expected one of default, linear, dynamic, yarn, longrope, llama3, "
        "proportional, divided",
    ),
    ({"rope_type": "yarn", "type": "linear"}, "rope_type 'yarn' but type 'linear'"),
    (
        {"rope_type": "linear", "factor": 2.0, "mrope_section": [16, 24, 24]},
        "scaling has mrope_section, which rope_type linear does not know: expected only factor, "
        "max_position_embeddings, original_max_position_embeddings, rope_theta, rope_type, type",
    ),
    (
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        "scaling has partial_rotary_factor, which rope_type default does not know: expected only "
        "max_position_embeddings, original_max_position_embeddings, rope_theta, rope_type, type; "
        "for partial rotation pass the smaller dim",
    ),
    ({"rope_type": "linear"}, "rope_type linear needs factor in scaling"),
    ({"rope_type": "linear", "factor": 0}, "scaling['factor'] is 0, expected a finite number above 0"),
    ({"rope_type": "linear", "factor": True}, "scaling['factor'] is True, expected a number"),
    ({"rope_type": "linear", "factor": "2"}, "scaling['factor'] is '2', expected a number"),
    ({"rope_type": "dynamic", "factor": 2.0}, "rope_type dynamic needs max_position_embeddings in scaling"),
    (
        {"rope_type": "yarn", "factor": 2.0},
        "rope_type yarn needs original_max_position_embeddings in scaling",
    ),
    (
        {"rope_type": "yarn", "original_max_position_embeddings": 4096},
        "rope_type yarn needs factor in scaling",
    ),
    (YARN | {"truncate": 1}, "scaling['truncate'] is 1, expected True or False"),
    (
        YARN | {"original_max_position_embeddings": 1},
        "original_max_position_embeddings is 1.0, expected more than 1",
    ),
    (LONGROPE | {"long_factor": [1.0]}, "scaling['long_factor'] is [1.0], expected dim / 2 = 4 numbers"),
    (LONGROPE | {"long_factor": 2.0}, "scaling['long_factor'] is 2.0, expected dim / 2 = 4 numbers"),
    (
        LONGROPE | {"short_factor": [1.0, -1.0, 1.0, 1.0]},
        "scaling['short_factor'] is -1.0, expected a finite number above 0",
    ),
    (
        LLAMA3 | {"high_freq_factor": 1.0},
        "high_freq_factor is 1.0, expected more than low_freq_factor 1.0",
    ),
    (
        {"rope_type": "proportional", "partial_rotary_factor": 1.5},
        "scaling['partial_rotary_factor'] is 1.5, expected at most 1",
    ),
    (
        {"rope_type": "divided", "divisors": [1.0, 2.0]},
        "scaling['divisors'] is [1.0, 2.0], expected dim / 2 = 4 numbers",
    ),
    ({"rope_type": "divided", "divisors": [1.0, 0.0, 1.0, 1.0]},
     "scaling['divisors'] is 0.0, expected a finite number above 0"),
]


@pytest.mark.parametrize(("scaling", "message"), WRONG_SCALING)
def test_wrong_scaling(scaling, message):
    with pytest.raises(ValueError) as caught:
        rope_table(8, 4, scaling=scaling)
    assert str(caught.value) == f"rope_table: {message}"


def test_two_different_bases_contradict():
    with pytest.raises(ValueError) as caught:
        rope_table(8, 4, 500000.0, scaling={"rope_theta": 1000000.0})
    assert str(caught.value) == "rope_table: base is 500000.0, but scaling has rope_theta 1000000.0"


def test_dynamic_needs_more_than_one_pair():
    with pytest.raises(ValueError) as caught:
        rope_table(2, 4, scaling={"rope_type": "dynamic", "factor": 2.0, "max_position_embeddings": 8})
    assert str(caught.value) == "rope_table: dim is 2, expected at least 4 for rope_type dynamic"


def test_an_impossible_size_is_a_memory_error():
    with pytest.raises(MemoryError):
        rope_table(128, 2**45)
