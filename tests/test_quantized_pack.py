"""pack to int8 and int4: how far each weight moves, which bytes come out, what is refused; from_q4_0."""

from __future__ import annotations

import copy
import pickle
import struct
from itertools import product

import ml_dtypes
import numpy as np
import pytest
from conftest import DTYPES
from guard import guarded_copy
from quantized import FORMATS, SMALL_GROUPS, Array, from_parts, has_minimum, packed_as, parts

from forge_c import PackedWeight, functional, gated_linear, linear, pack, pack_gated
from forge_c.formats import layout
from forge_c.nn.linear import Embedding, Linear
from forge_c.packing import from_q4_0

DEPTHS = (1, 2, 7, 31, 32, 33, 64, 65, 100, 127, 128, 129, 257)


def gauss(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, np.float32)


def kinds(rng: np.random.Generator, k: int, n: int) -> dict[str, Array]:
    w, row = gauss(rng, k, n), np.arange(k)[:, None]
    one = w * 1e-3
    one[rng.integers(0, k, n), np.arange(n)] = 4e3
    found = {
        "normal": w, "heavy tails": rng.standard_t(2, (k, n)).clip(-1e4, 1e4), "positive": np.abs(w) + 3,
        "negative": -np.abs(w) - 3, "constant": np.full((k, n), 0.3), "ramp": np.broadcast_to(0.01 * row, (k, n)),
        "alternating": np.where(row % 2 == 0, 1.5, -1.5) + 0 * w, "one huge": one, "tiny": w * 1e-6, "small": w * 1e-4,
        "large": w * 5e3, "zeros": np.zeros((k, n)), "zero groups": np.where(row // 32 % 2 == 0, w, 0),
        "by column": w * 2.0 ** rng.integers(-12, 12, n),
    }
    return {name: np.ascontiguousarray(a, np.float32) for name, a in found.items()}


def in_groups(w: Array, group: int) -> Array:
    """(groups, group, n) float64, the last group filled up with its last row."""
    k = len(w)
    return w[np.minimum(np.arange(-(-k // group) * group), k - 1)].astype(np.float64).reshape(-1, group, w.shape[1])


def float16_error(a: Array) -> Array:
    """Half a step of float16 at a; half a subnormal below."""
    return np.maximum(np.abs(a) * 2.0**-11, 2.0**-25)


# ---- how far a weight moves -----------------------------------------------------------------------------

# Beside the step itself: w / scale is a product by a rounded reciprocal, so up to 127 * 3 * 2^-24 of a step.
SLACK = 1 + 2.0**-14


def allowed(w: Array) -> Array:
    """(groups, n): the error that int8 may make in each group of w (groups, group, n)."""
    return np.abs(w).max(axis=1) / 127 / 2 * SLACK


def by_range(name: str, w: Array) -> Array:
    """w (groups, group, n) with int4's scales from the range of each group alone, float64."""
    levels = np.float32 if w.dtype == np.float32 else np.float64
    if not has_minimum("int4", FORMATS[name][2]):
        scale = -np.take_along_axis(w, np.abs(w).argmax(axis=1)[:, None], 1) / 8
        minimum = -8 * (scale := scale.astype(np.float16).astype(levels))
    else:
        minimum = w.min(axis=1, keepdims=True).astype(np.float16).astype(levels)
        scale = ((w.max(axis=1, keepdims=True) - minimum) / 15).astype(np.float16).astype(levels)
    u = np.rint(np.divide(w - minimum, scale, out=np.zeros_like(w), where=scale != 0)).clip(0, 15)
    return scale * u + minimum


def squared_error(back: Array, w: Array) -> Array:
    """(groups, n), of groups (groups, group, n)."""
    return np.square(back - w).sum(axis=1)


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("int8")])
def test_each_int8_weight_moves_by_half_a_step_at_most(rng, name):
    group = FORMATS[name][2]
    for k in DEPTHS if group < 8192 else (1, 300):
        for kind, w in kinds(rng, k, 19).items():
            back = packed_as(name, w).unpack()
            error = np.abs(in_groups(back, min(group, 512)) - in_groups(w, min(group, 512)))
            assert (error.max(axis=1) <= allowed(in_groups(w, min(group, 512)))).all(), (kind, k)


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("int4")])
def test_no_group_of_int4_is_worse_than_by_its_range(isa, rng, name):
    """A search keeps what it starts from, where it finds nothing better. Rows that fill a group up are not weighed."""
    group = min(FORMATS[name][2], 512)
    for k in DEPTHS if FORMATS[name][2] < 8192 else (1, 300):
        for kind, w in kinds(rng, k, 19).items():
            before, back = in_groups(w, group), in_groups(packed_as(name, w).unpack(), group)
            real = (np.arange(before.shape[0] * group) < k).reshape(-1, group, 1)
            error, usual = squared_error(back * real, before * real), squared_error(by_range(name, before) * real,
                                                                                    before * real)
            tiny = np.abs(before).max(axis=1) < 2.0**-18
            noise = 1e-9 * np.square(before).sum(axis=1)  # of float32, in which errors are compared
            assert ((error <= usual * (1 + 1e-3) + noise) | tiny).all(), (kind, k)


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("int4")])
def test_a_search_halves_no_error_but_takes_a_quarter_away(rng, name):
    """Of Gaussian weights; larger groups have less to gain."""
    group = min(FORMATS[name][2], 512)
    w = gauss(rng, 1536, 64)
    before, back = in_groups(w, group), in_groups(packed_as(name, w).unpack(), group)
    gain = squared_error(back, before).sum() / squared_error(by_range(name, before), before).sum()
    assert 0.6 < gain < 0.92, gain


@pytest.mark.parametrize("name", [name for name in SMALL_GROUPS if name.startswith("int4")])
def test_weights_that_lie_on_steps_are_kept(isa, rng, name):
    """Scale, and minimum, float16 numbers; each group has its first and its last level."""
    group = FORMATS[name][2]
    u = rng.integers(0, 16, (4, group, 33))
    u[:, 0], u[:, 1] = 0, 15
    scale = rng.integers(1025, 2048, (4, 1, 33)) * 2.0**-14
    w = scale * (u - (0 if has_minimum("int4", group) else 8))
    if has_minimum("int4", group):
        w += rng.integers(-64, 64, (4, 1, 33)) * 2.0**-4
    np.testing.assert_array_equal(packed_as(name, w.reshape(-1, 33).astype(np.float32)).unpack(), w.reshape(-1, 33))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_tiny_weights_become_zero_and_nothing_else(rng, dtype):
    """Down to the least float32; where int8 has no inverse of its scale, a group is zero."""
    for group, power in product((32, 64, 128), (-24, -26, -100, -121, -126, -133, -140, -149)):
        w = gauss(rng, 130, 20) * np.float32(2.0**power)
        error = np.abs(in_groups(pack(w, dtype, group_size=group).unpack(), group) - in_groups(w, group)).max(axis=1)
        largest = np.abs(in_groups(w, group)).max(axis=1)
        least = 2.0**-25 if dtype == "int4" else 0.0
        zero = dtype == "int8" and power < -120
        assert (error <= (largest if zero else largest / (7 if dtype == "int4" else 127) / 2 * SLACK + 9 * least)).all()


INT4 = [name for name in SMALL_GROUPS if FORMATS[name][0] == "int4"]


@pytest.mark.parametrize("name", INT4)
@pytest.mark.parametrize("std", [1e-4, 1e-5, 3e-6, 1e-6, 3e-7, 1e-7, 3e-8, 1e-8, 1e-12, 1e-40])
def test_small_int4_weights_are_never_worse_than_zeros(rng, name, std):
    """Scale and minimum are float16, whose numbers are 6e-8 apart at zero. A group is as good as any, or as these are
    apart at worst; no value of a group under 64 of them moves further than to zero."""
    group, spacing = FORMATS[name][2], 2.0**-24
    for side, k in product((0, 1, -1, 8, -8), (1, 100, 2 * group)):
        w = ((gauss(rng, k, 35) + side) * std).astype(np.float32)
        before, back = in_groups(w, group), in_groups(packed_as(name, w).unpack(), group)
        error, zeros = np.abs(back - before), np.abs(before)
        tiny = zeros.max(axis=1, keepdims=True) < 64 * spacing
        assert (np.square(error).sum(axis=1) <= np.square(zeros).sum(axis=1)).all(), (side, k)
        assert ((error <= zeros) | ~tiny).all(), (side, k)
        ends = np.ptp(before, axis=1) / 15 if has_minimum("int4", group) else np.abs(before).max(axis=1) / 7
        half_step = np.ceil(np.maximum(ends / spacing, 1)) * spacing / 2
        rms = np.sqrt(np.square(error).mean(axis=1))
        assert ((rms <= half_step * SLACK) | ~tiny[:, 0]).all() or k % group, (side, k)


@pytest.mark.parametrize("name", INT4)
def test_products_of_small_int4_weights(isa, rng, name):
    """std 1e-7 is 1.7 of float16's least steps, whose rounding is 0.17 of it. x, a row for each weight, is exact."""
    for std, most in ((1e-4, 0.11), (1e-6, 0.13), (1e-7, 0.2), (3e-8, 0.65), (1e-8, 1.0), (1e-9, 1.0)):
        w = (gauss(rng, 512, 64) * std).astype(np.float32)
        y = linear(np.eye(512, dtype=np.float32) * 3, packed_as(name, w))
        assert np.linalg.norm(y - 3.0 * w) <= most * np.linalg.norm(3.0 * w), std


@pytest.mark.parametrize("name", INT4)
def test_every_scale_that_float16_keeps_coarsely(name):
    """Groups whose largest value is each multiple of a quarter of float16's least number, either sign, one or all."""
    group, largest = FORMATS[name][2], np.arange(-300, 300, dtype=np.float32) * np.float32(2.0**-26)
    one = np.zeros((group, largest.size), np.float32)
    one[group // 2] = largest
    spread = np.linspace(-1, 1, group, dtype=np.float32)[:, None] * largest
    for w in (one, spread, np.tile(largest, (group, 1)), one + np.float32(2.0**-25)):
        back = packed_as(name, w).unpack()
        tiny = np.maximum(np.abs(w), np.abs(back)).max(axis=0) < 2.0**-18
        assert (np.abs(back - w) <= np.abs(w))[:, tiny].all()
        assert np.array_equal(packed_as(name, back).unpack()[:, tiny], back[:, tiny])


# ---- which bytes ----------------------------------------------------------------------------------------


def slowly(packed: PackedWeight) -> Array:
    """The weight, read as the lines of formats/layout.py's head say, one value after the other."""
    (k, n), group, data = packed.shape, packed.group_size, packed.data.tobytes()
    block = 64 if (packed.dtype, group) == ("int4", 32) else group
    lines = block // (4 if packed.dtype == "int8" else 8)
    panel_bytes = len(data) // -(-n // 16)
    w = np.zeros((k, n))
    for row, column in product(range(k), range(n)):
        start = column // 16 * panel_bytes + row // block * (lines + 1) * 64
        within, lane = row % block, column % 16
        if packed.dtype == "int8":
            u = data[start + within // 4 * 64 + lane * 4 + within % 4]
            scale, = struct.unpack_from("<f", data, start + lines * 64 + lane * 4)
            w[row, column] = scale * (u - 128)
            continue
        byte = data[start + within // 8 * 64 + lane * 4 + within % 4]
        u = byte & 15 if within % 8 < 4 else byte >> 4
        first, = struct.unpack_from("<e", data, start + lines * 64 + lane * 2)
        second, = struct.unpack_from("<e", data, start + lines * 64 + 32 + lane * 2)
        w[row, column] = (second if within >= 32 else first) * (u - 8) if group == 32 else first * u + second
    return w


@pytest.mark.parametrize("name", SMALL_GROUPS)
def test_the_bytes_are_where_the_format_says(rng, name):
    for k, n in ((1, 1), (70, 17), (FORMATS[name][2] + 5, 33)):
        packed = packed_as(name, gauss(rng, k, n))
        expected = slowly(packed)
        np.testing.assert_array_equal(packed.unpack(), expected.astype(np.float32))
        np.testing.assert_array_equal(parts(packed).weight, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_sizes_shapes_and_dtypes(rng, name):
    dtype, _, group = FORMATS[name]
    block, lines = (64, 8) if group == 32 and dtype == "int4" else (group, group // (4 if dtype == "int8" else 8))
    for k, n in product((1, 33, 64, 200), (0, 1, 16, 17, 65)):
        w = gauss(rng, k, n)
        packed, pair = packed_as(name, w), packed_as(name, w, w)
        assert (packed.shape, packed.dtype, packed.group_size, packed.gated) == ((k, n), dtype, group, False)
        assert packed.nbytes == -(-n // 16) * -(-k // block) * (lines + 1) * 64
        assert (pair.shape, pair.gated, pair.nbytes) == ((k, 2 * n), True, 2 * packed.nbytes)
        assert packed.nbytes == 0 or packed.data.ctypes.data % 64 == 0
        for p, columns in ((packed, n), (pair, 2 * n)):
            assert p.unpack().shape == (k, columns) and p.unpack().dtype == np.float32
            assert not p.data.flags.writeable and p.data.flags.c_contiguous


@pytest.mark.parametrize("dtype", [np.float32, np.dtype(np.float32), ml_dtypes.bfloat16, np.int8])
def test_a_dtype_as_numpy_has_it(rng, dtype):
    w, name = rng.standard_normal((64, 32), np.float32), np.dtype(dtype).name
    assert repr(pack(w, dtype)) == repr(pack(w, name))
    assert repr(pack_gated(w, w, dtype)) == repr(pack_gated(w, w, name))
    assert Linear(64, 32).astype(dtype).dtype == name
    assert Embedding(64, 32).astype(dtype).dtype == name


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("k", "n"), [(0, 0), (0, 5), (0, 16), (5, 0)])
def test_a_weight_of_nothing(name, k, n):
    w = np.zeros((k, n), np.float32)
    for packed, columns in ((packed_as(name, w), n), (packed_as(name, w, w), 2 * n)):
        assert packed.nbytes == 0 and packed.unpack().shape == (k, columns) and packed.unpack().dtype == np.float32


def test_bits_for_each_weight():
    """What pack's docstring promises."""
    w = np.zeros((256, 64), np.float32)
    assert [pack(w, "int8").nbytes * 8 / w.size, pack(w, "int4").nbytes * 8 / w.size,
            pack(w, "int4", group_size=32).nbytes * 8 / w.size] == [8.25, 4.5, 4.5]


@pytest.mark.parametrize("name", SMALL_GROUPS)
def test_packing_again_what_was_unpacked_gives_the_same_values(rng, name):
    """So a layer may unpack and pack as often as it likes."""
    for k, n in ((33, 17), (300, 480), (160, 33)):
        back = packed_as(name, gauss(rng, k, n)).unpack()
        np.testing.assert_array_equal(packed_as(name, back).unpack(), back, err_msg=f"{k}, {n}")


@pytest.mark.parametrize("name", SMALL_GROUPS)
def test_packing_again_moves_no_group_further_than_the_first_time(rng, name):
    group = FORMATS[name][2]
    for k, (kind, w) in product((1, 200, 257), kinds(rng, 257, 21).items()):
        if kind == "tiny":  # in whole steps of float16's least, of which several may be as good
            continue
        back = packed_as(name, w[:k]).unpack()
        again = packed_as(name, back).unpack()
        moved = squared_error(in_groups(again, group), in_groups(back, group))
        first = squared_error(in_groups(back, group), in_groups(w[:k], group))
        assert (moved <= first + 1e-6 * np.square(in_groups(back, group)).sum(axis=1)).all(), (kind, k)


@pytest.mark.parametrize("name", FORMATS)
def test_a_pair_holds_what_both_sides_alone_would(rng, name):
    for k, n in ((1, 1), (33, 16), (200, 37)):
        a, b = gauss(rng, k, n), gauss(rng, k, n)
        pair, sides = packed_as(name, a, b), (packed_as(name, a), packed_as(name, b))
        assert pair.unpack().tobytes() == np.hstack([side.unpack() for side in sides]).tobytes()
        panels = pair.data.reshape(-1, 2, pair.data.shape[-1])
        for i, side in enumerate(sides):
            assert panels[:, i].tobytes() == side.data.tobytes()
            assert parts(pair, i).weight.tobytes() == parts(side).weight.tobytes()


@pytest.mark.parametrize("name", SMALL_GROUPS)
def test_any_strides_and_dtype(rng, dtype, name):
    w = gauss(rng, 70, 37).astype(dtype)
    expected = packed_as(name, w.astype(np.float32)).data.tobytes()
    wide = np.full((75, 40), np.nan, dtype)
    wide[2:72, 1:38] = w
    unaligned = np.empty(w.nbytes + 1, np.uint8)[1:].view(dtype).reshape(w.shape)
    unaligned[...] = w
    fixed = w.copy()
    fixed.flags.writeable = False
    for laid in (w, np.asfortranarray(w), wide[2:72, 1:38], w[::-1].copy()[::-1], w.T[::-1].copy()[::-1].T, unaligned,
                 fixed):
        assert packed_as(name, laid).data.tobytes() == expected
    assert packed_as(name, w.T).unpack().shape == (37, 70)


@pytest.mark.parametrize("name", ["int8", "int4", "int4-32"])
def test_any_thread_count_packs_the_same_bytes(rng, each_thread_count, name):
    w = gauss(rng, 1030, 1100)
    assert len({packed_as(name, w).data.tobytes() for _ in each_thread_count()}) == 1
    with pytest.raises(ValueError, match="NaN or an infinity"):
        w[1029, 1099] = np.nan
        packed_as(name, w)


@pytest.mark.parametrize("name", SMALL_GROUPS)
@pytest.mark.parametrize("at_end", [False, True])
def test_packing_between_forbidden_pages(rng, name, at_end):
    for k, n in product((1, 7, 33, 130), (1, 15, 16, 35)):
        w = gauss(rng, k, n).astype(list(DTYPES.values())[n % 3])
        held = guarded_copy(w, at_end=at_end)
        assert packed_as(name, held).data.tobytes() == packed_as(name, w).data.tobytes()
        packed = packed_as(name, w)
        twin = PackedWeight(guarded_copy(packed.data, at_end=at_end), packed.shape, packed.dtype, False,
                            packed.group_size)
        assert twin.unpack().tobytes() == packed.unpack().tobytes()


@pytest.mark.parametrize("name", SMALL_GROUPS)
def test_a_pack_is_a_read_only_copy(rng, name):
    w = gauss(rng, 40, 20)
    packed = packed_as(name, w)
    kept = packed.unpack()
    w[:] = 0
    assert packed.unpack().tobytes() == kept.tobytes() and packed.unpack().flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        packed.data[...] = 0
    with pytest.raises(AttributeError):
        packed.group_size = 32
    dtype, _, group = FORMATS[name]
    assert repr(packed) == f"PackedWeight(shape=(40, 20), dtype='{dtype}', group_size={group})"
    assert repr(packed_as(name, w, w)) == (f"PackedWeight(shape=(40, 40), dtype='{dtype}', group_size={group}, "
                                           "gated=True)")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", SMALL_GROUPS)
def test_pickle_and_copy(isa, rng, name, gated):
    packed, x = packed_as(name, *(gauss(rng, 133, 21) for _ in range(1 + gated))), gauss(rng, 5, 133)
    multiply = gated_linear if gated else linear
    twins = [pickle.loads(pickle.dumps(packed, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for twin in (*twins, copy.copy(packed), copy.deepcopy(packed)):
        for attribute in ("shape", "dtype", "gated", "nbytes", "group_size", "activations"):
            assert getattr(twin, attribute) == getattr(packed, attribute)
        assert twin.data.tobytes() == packed.data.tobytes() and not twin.data.flags.writeable
        assert multiply(x, twin).tobytes() == multiply(x, packed).tobytes()


def test_how_inputs_are_rounded():
    """int8 weights deserve 12 bits; what is held is shown where it is not what one gets without asking."""
    w = np.ones((64, 16), np.float32)
    for dtype, usual, other in (("int8", "int12", "int8"), ("int4", "int8", "int12")):
        packed, asked = pack(w, dtype), pack(w, dtype, activations=other)
        assert (packed.activations, asked.activations) == (usual, other)
        assert pack(w, dtype, activations=usual).activations == usual
        assert pack_gated(w, w, dtype, activations=other).activations == other
        assert repr(packed) == f"PackedWeight(shape=(64, 16), dtype='{dtype}', group_size={packed.group_size})"
        assert repr(asked) == (f"PackedWeight(shape=(64, 16), dtype='{dtype}', group_size={packed.group_size}, "
                               f"activations='{other}')")
        assert pickle.loads(pickle.dumps(asked)).activations == other and copy.copy(asked).activations == other
        assert asked.data.tobytes() == packed.data.tobytes()
        with pytest.raises(AttributeError):
            packed.activations = other
        # 11 states of x that 127 steps cannot tell apart, 2047 can
        x = np.linspace(100, 100.4, 11, dtype=np.float32)[:, None] * np.eye(1, 64, 3, dtype=np.float32)
        x[:, 0] = 127
        assert len(np.unique(linear(x, pack(w, dtype, activations="int8"))[:, 0])) < 3
        assert len(np.unique(linear(x, pack(w, dtype, activations="int12"))[:, 0])) > 5
    assert pack(w).activations is None and pack(w, "bfloat16").activations is None


# ---- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_that_is_not_finite(rng, dtype, name, special):
    message = f"weight holds a NaN or an infinity, which {FORMATS[name][0]} cannot"
    for row, column in ((0, 0), (69, 36), (33, 16)):
        w = gauss(rng, 70, 37).astype(dtype)
        w[row, column] = special
        with pytest.raises(ValueError, match=f"^pack: {message}$"):
            packed_as(name, w)
        for pair in ((w, np.zeros_like(w)), (np.zeros_like(w), w)):
            with pytest.raises(ValueError, match=f"^pack_gated: {message}$"):
                packed_as(name, *pair)


@pytest.mark.parametrize(("name", "values"), [
    ("int4-32", (65520 * 8, 0)), ("int4-32", (-65520 * 8, 0)), ("int4-32", (3e38, -3e38)), ("int4", (65520, 65520)),
    ("int4", (-65520, 0)), ("int4", (0, 65520 * 15)), ("int4-128", (-60000, 3e38)), ("int4", (3e38, -3e38)),
])
def test_a_scale_that_float16_cannot_hold(name, values):
    w = np.zeros((70, 17), np.float32)
    w[:, 16] = np.where(np.arange(70) % 2, *values)
    message = r"^pack: weight needs a scale or minimum of [\d.e+]+, more than float16 holds$"
    with pytest.raises(ValueError, match=message):
        packed_as(name, w)
    assert np.isfinite(pack(w, "int8").unpack()).all()


def test_the_largest_scales_that_float16_holds():
    for group, largest in ((32, 65504.0 * 8), (64, 65504.0)):
        w = np.zeros((64, 3), np.float32)
        w[::2, 0], w[1::2, 1] = largest, -largest
        back = pack(w, "int4", group_size=group).unpack()
        assert np.abs(back - w).max() <= largest * 2.0**-10


X, W = np.ones((3, 4), np.float32), np.ones((4, 5), np.float32)
GROUPS = {"int8": "a multiple of 32 up to 65536 for int8", "int4": "32 or a multiple of 64 up to 8192 for int4"}


@pytest.mark.parametrize(("dtype", "group"), [
    ("int8", 0), ("int8", -32), ("int8", 16), ("int8", 33), ("int8", 65568), ("int8", 32.0), ("int8", True),
    ("int8", "32"), ("int4", 0), ("int4", -64), ("int4", 16), ("int4", 48), ("int4", 96), ("int4", 65600),
    ("int4", 64.0), ("int4", False), ("int4", 2**70),
])
def test_a_group_size_that_does_not_fit(dtype, group):
    for call, name in ((lambda: pack(W, dtype, group_size=group), "pack"),
                       (lambda: pack_gated(W, W, dtype, group_size=group), "pack_gated")):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == f"{name}: group_size is {group}, expected {GROUPS[dtype]}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float_formats_have_no_groups(dtype):
    with pytest.raises(ValueError, match=f"^pack: group_size is 64, expected None for {dtype}$"):
        pack(W, dtype, group_size=64)
    assert pack(W, dtype).group_size is None


@pytest.mark.parametrize("kind", [int, np.int64, np.uint16, np.int32])
def test_a_group_size_of_any_whole_number_type(kind):
    packed = pack(W, "int4", group_size=kind(64))
    assert packed.group_size == 64 and type(packed.group_size) is int


@pytest.mark.parametrize("activations", ["int9", "float32", 8, True, b"int8"])
def test_another_rounding_of_inputs(activations):
    packed = pack(W, "int8")
    for call, name in ((lambda: pack(W, "int8", activations=activations), "pack"),
                       (lambda: pack_gated(W, W, "int4", activations=activations), "pack_gated"),
                       (lambda: PackedWeight(packed.data, packed.shape, "int8", False, 128, activations),
                        "PackedWeight")):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == f"{name}: activations is {activations!r}, expected one of int8, int12"
    with pytest.raises(ValueError, match="^pack: activations is 'int8', expected None for bfloat16$"):
        pack(W, "bfloat16", activations="int8")


def test_data_of_another_size():
    packed = pack(W, "int8")
    for dtype, group in (("int8", 64), ("int4", 64)):
        with pytest.raises(ValueError, match="expected those that pack"):
            PackedWeight(packed.data, packed.shape, dtype, False, group)


@pytest.mark.parametrize(("dtype", "group", "expected"), [
    ("int8", 0, "a multiple of 32 up to 65536"), ("int8", 1, "a multiple of 32"), ("int8", 1 << 17, "up to 65536"),
    ("int4", 1, "32 or a multiple of 64 up to 8192"), ("int4", 96, "32 or a multiple of 64"), ("int4", 0, "32 or"),
    ("float32", 32, "expected None for float32"), ("int8", 64.0, "a multiple of 32"),
    ("int8", True, "a multiple of 32"),
])
def test_a_packed_weight_has_a_group_of_its_format(dtype, group, expected):
    """Any other would send the product beyond the data, or a division by it."""
    with pytest.raises(ValueError, match=f"^PackedWeight: group_size is {group}, .*{expected}"):
        PackedWeight(pack(W, "int8").data, W.shape, dtype, False, group)


@pytest.mark.parametrize(("dtype", "shape", "gated", "named"), [
    ("int7", (4, 3), False, "dtype is 'int7'"), ("float32", (-4, 3), False, "shape is"),
    ("float32", (4, -3), False, "shape is"), ("float32", (4, 3), True, "shape is .*equal width"),
])
def test_a_packed_weight_of_another_kind(dtype, shape, gated, named):
    with pytest.raises(ValueError, match=f"^PackedWeight: {named}"):
        PackedWeight(pack(W).data, shape, dtype, gated)


def test_the_layout_of_python_is_that_of_c():
    """forge_c.formats.layout mirrors src_c/formats.h, which nobody else repeats."""
    in_c = functional._weight_formats()
    rows = {name: {"bits": row.bits, "k_step": row.k_step, "block_groups": row.block_groups,
                   "scale_bytes": row.scale_bytes, "minimum_bytes": row.minimum_bytes, "zero": row.zero,
                   "block_lines": row.block_lines}
            for name, row in layout.ROWS.items()}
    assert (in_c["panel"], in_c["line"]) == (layout.PANEL, layout.LINE)
    assert {name: {k: v for k, v in row.items() if k != "group"} for name, row in in_c["rows"].items()} == rows
    for name, row in layout.ROWS.items():
        fixed = in_c["rows"][name]["group"]
        if row.groups is None:
            assert fixed == 0
        elif fixed is not None:
            assert row.groups == layout.Groups(fixed, fixed, fixed)
        assert row.bits * row.k_step * layout.PANEL == layout.LINE * 8, "a line holds whole steps"


@pytest.mark.parametrize(("dtype", "group", "name"), [
    ("float32", None, "float32"), ("bfloat16", None, "bfloat16"), ("int8", 128, "int8"), ("int8", 32, "int8"),
    ("int4", 32, "int4 symmetric"), ("int4", 64, "int4 affine"), ("int4", 8192, "int4 affine"),
])
def test_each_format_is_one_row(dtype, group, name):
    f = layout.Format(dtype, group)
    assert f.name == name and f.row is layout.ROWS[name] and f == layout.Format.checked("pack", dtype, group)


@pytest.mark.parametrize("name", ["int8", "int4", "int4-32"])
def test_a_refused_call_writes_nothing(name):
    out, packed, pair = np.full((3, 5), 7, np.float32), packed_as(name, W), packed_as(name, W, W)
    for call in (lambda: linear(X[:, :3], packed, out=out), lambda: linear(X, pair, out=out),
                 lambda: gated_linear(X, packed, out=out), lambda: linear(out[:, :4], packed, out=out),
                 lambda: gated_linear(X, pair, W[0], out=out)):
        with pytest.raises((TypeError, ValueError)):
            call()
    assert (out == 7).all()


# ---- Q4_0 -----------------------------------------------------------------------------------------------


def block_q4_0(block: bytes) -> list[float]:
    """32 weights from ggml's 18 bytes: a float16 scale; low nibbles are 0..15, high ones 16..31; scale (q - 8)."""
    scale, = struct.unpack_from("<e", block)
    q = [byte & 15 for byte in block[2:]] + [byte >> 4 for byte in block[2:]]
    return [scale * (value - 8) for value in q]


def random_blocks(rng: np.random.Generator, k: int, n: int, *, with_least: bool = False) -> Array:
    blocks = rng.integers(0, 256, (n, k // 32, 18), np.uint8)
    scale = rng.standard_normal((n, k // 32)).astype(np.float16)
    blocks[..., :2] = scale[..., None].view(np.uint8)
    if with_least:
        np.put_along_axis(blocks, rng.integers(2, 18, (n, k // 32, 1)), np.uint8(0x50), 2)  # q = 0 and 5
    return blocks


SHAPES = [(32, 1), (32, 16), (64, 16), (96, 5), (128, 48), (256, 33), (32, 0), (0, 16)]


@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_from_q4_0_is_value_for_value(isa, rng, k, n):
    blocks = random_blocks(rng, k, n)
    decoded = np.array([[value for block in row for value in block_q4_0(block.tobytes())] for row in blocks])
    packed = from_q4_0(blocks, (k, n))
    assert (packed.shape, packed.dtype, packed.group_size, packed.gated) == ((k, n), "int4", 32, False)
    np.testing.assert_array_equal(packed.unpack(), decoded.reshape(n, k).T)
    x = gauss(rng, 3, k)
    assert linear(x, packed).tobytes() == linear(x, from_q4_0(np.asfortranarray(blocks), (k, n))).tobytes()
    if k and n:
        held = from_parts("int4", 32, parts(packed).ints.reshape(-1, n)[:k] + 8, parts(packed).scale[:k // 32])
        assert linear(x, held).tobytes() == linear(x, packed).tobytes()


@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_packing_the_decoded_weights_gives_the_same_bytes(rng, k, n):
    """Where each block holds a -8, which both call the value of largest magnitude."""
    packed = from_q4_0(random_blocks(rng, k, n, with_least=True), (k, n))
    again = pack(packed.unpack(), "int4", group_size=32)
    assert again.unpack().tobytes() == packed.unpack().tobytes()
    assert again.data.tobytes() == packed.data.tobytes()


@pytest.mark.parametrize(("blocks", "shape"), [
    (np.zeros((5, 2, 18), np.int8), (64, 5)), (np.zeros((5, 2, 17), np.uint8), (64, 5)),
    (np.zeros((2, 5, 18), np.uint8), (64, 5)), (np.zeros((5, 2, 18), np.uint8), (65, 5)),
    (np.zeros((5, 36), np.uint8), (64, 5)), (np.zeros((5, 2, 18), np.uint8), (96, 5)),
])
def test_blocks_that_do_not_fit(blocks, shape):
    with pytest.raises(ValueError, match=r"^from_q4_0: blocks has dtype u?int8 and shape .*expected uint8 \(5, "):
        from_q4_0(blocks, shape)
