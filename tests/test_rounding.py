"""Packing float weights into formats of 4 to 8 bits: searched scales, importance, errors that make up for others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from forge_c import linear, pack, pack_gated
from forge_c.formats.layout import PACKED, Format

Array = NDArray[Any]

# name -> (dtype, group_size, levels, whether scales are integers of a block)
FORMATS: dict[str, tuple[str, int | None, int, bool]] = {
    "int4": ("int4", None, 16, False), "int4-32": ("int4", 32, 16, False), "q4_1": ("q4_1", None, 16, False),
    "q5_0": ("q5_0", None, 32, False), "q5_1": ("q5_1", None, 32, False), "q4_k": ("q4_k", None, 16, True),
    "q5_k": ("q5_k", None, 32, True), "q6_k": ("q6_k", None, 64, True),
}
BITS = {"int4": 4.5, "int4-32": 4.5, "q4_1": 5, "q5_0": 5.5, "q5_1": 6, "q8_0": 8.5, "q4_k": 4.625, "q5_k": 5.625,
        "q6_k": 6.625}
# Relative error of Gaussian weights, measured: what a change of the search may not lose.
GAUSSIAN = {"int4": 0.085, "int4-32": 0.084, "q4_1": 0.074, "q5_0": 0.043, "q5_1": 0.036, "q8_0": 0.0061, "q4_k": 0.075,
            "q5_k": 0.037, "q6_k": 0.019}


def packed_as(name: str, *sides: Array, **more: Any) -> Any:
    dtype, group, *_ = FORMATS.get(name, (name, None))
    return (pack if len(sides) == 1 else pack_gated)(*sides, dtype, group_size=group, **more)


def gauss(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, np.float32)


def error(back: Array, w: Array, importance: Array | None = None) -> float:
    """Weighted squared error of all weights."""
    squares = np.square(back.astype(np.float64) - w)
    return float((squares if importance is None else squares * importance[:, None]).sum())


@pytest.mark.parametrize("name", BITS)
def test_bits_and_errors_of_each_format(isa, rng, name):
    w = gauss(rng, 512, 64)
    packed = packed_as(name, w)
    assert packed.nbytes * 8 / w.size == BITS[name]
    relative = np.sqrt(error(packed.unpack(), w) / np.square(w).sum())
    assert GAUSSIAN[name] * 0.85 < relative <= GAUSSIAN[name], relative


@pytest.mark.parametrize("name", BITS)
def test_every_isa_packs_the_same_bytes(isa, name):
    rng = np.random.default_rng(5)
    w, importance = rng.standard_t(4, (300, 37)).astype(np.float32), rng.random(300) ** 4
    found = packed_as(name, w).data.tobytes() + packed_as(name, w, importance=importance).data.tobytes()
    assert SEEN.setdefault(name, found) == found


SEEN: dict[str, bytes] = {}


@pytest.mark.parametrize("name", BITS)
def test_any_number_of_threads_packs_the_same_bytes(rng, each_thread_count, name):
    w, importance = gauss(rng, 520, 900), rng.random(520)
    assert len({packed_as(name, w, importance=importance).data.tobytes() for _ in each_thread_count()}) == 1


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("k", [1, 31, 64, 100, 256, 300])
def test_any_size_and_strides(rng, name, k):
    """Rows that fill a block up change nothing: they are not weighed."""
    w = gauss(rng, k, 21)
    packed = packed_as(name, w)
    assert packed.unpack().shape == w.shape
    assert np.sqrt(error(packed.unpack(), w) / np.square(w).sum()) < 1.4 * GAUSSIAN[name]
    wide = np.full((k + 3, 60), np.nan, np.float32)
    wide[2:k + 2, 1:43:2] = w
    for laid in (np.asfortranarray(w), wide[2:k + 2, 1:43:2], w[::-1].copy()[::-1]):
        assert packed_as(name, laid).data.tobytes() == packed.data.tobytes()


@pytest.mark.parametrize("name", BITS)
def test_products_by_what_pack_made(isa, rng, name):
    w, x = gauss(rng, 320, 40), gauss(rng, 9, 320)
    packed = packed_as(name, w, activations="int12")
    expected = x.astype(np.float64) @ packed.unpack()
    assert np.abs(linear(x, packed) - expected).max() < 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("std", [1e-4, 1e-6, 1e-7, 3e-8, 1e-8, 1e-12, 1e-40])
def test_small_weights_are_never_worse_than_zeros(rng, name, std):
    for side in (0, 1, -1, 8):
        w = ((gauss(rng, 300, 19) + side) * std).astype(np.float32)
        back = packed_as(name, w).unpack()
        assert np.isfinite(back).all()
        assert error(back, w) <= error(np.zeros_like(w), w) * (1 + 1e-6), side


@pytest.mark.parametrize("name", BITS)
def test_constant_groups_and_zeros(rng, name):
    w = np.zeros((300, 20), np.float32)
    assert not packed_as(name, w).unpack().any()
    w[:, 3], w[64:96, 5], w[7, 6] = 0.25, -3, 1e4
    back = packed_as(name, w).unpack()
    assert np.abs(back - w).max() <= 1e-3 * np.abs(w).max() and np.abs(back - w)[:, :6].max() <= 0.02
    assert not back[:, 7:].any()


@pytest.mark.parametrize("name", BITS)
def test_weights_that_float16_scales_cannot_hold(name):
    w = np.zeros((300, 17), np.float32)
    w[:, 16] = np.where(np.arange(300) % 2, 3e38, -3e38)
    with pytest.raises(ValueError, match=r"^pack: weight needs a scale or minimum of .*, more than float16 holds$"):
        packed_as(name, w)


# ---- importance -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_importance_of_ones_is_none(rng, name):
    w = gauss(rng, 300, 20)
    plain = packed_as(name, w).data.tobytes()
    for ones in (np.ones(300), np.full(300, 7, np.float32), np.full(300, 3)):
        assert packed_as(name, w, importance=ones).data.tobytes() == plain
    assert packed_as(name, w, importance=np.zeros(300)).data.tobytes() == plain


@pytest.mark.parametrize("name", FORMATS)
def test_importance_lowers_the_weighted_error(rng, name):
    w, importance = gauss(rng, 512, 64), np.exp(2 * rng.standard_normal(512))
    plain, weighed = (packed_as(name, w, importance=i).unpack() for i in (None, importance))
    assert error(weighed, w, importance) < 0.9 * error(plain, w, importance)
    assert error(weighed, w) >= error(plain, w)


def inputs(rng: np.random.Generator, n: int, k: int) -> Array:
    """(n, k), channels that go together, some far larger than others."""
    mix = np.eye(k) + 2 * rng.standard_normal((k, k)) / np.sqrt(k)
    return (rng.standard_normal((n, k)) @ mix * np.exp(0.5 * rng.standard_normal(k))).astype(np.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_errors_make_up_for_each_other_where_inputs_go_together(rng, name):
    """Of products with other inputs of the same kind, against weighing each channel alone."""
    w = gauss(rng, 256, 48)
    x = inputs(rng, 3000, 256)
    seen, others = x[:2000], x[2000:]
    products = seen.T @ seen / len(seen)
    alone, together = (packed_as(name, w, importance=i).unpack() - w for i in (np.diagonal(products), products))
    assert np.linalg.norm(others @ together) < 0.9 * np.linalg.norm(others @ alone)


@pytest.mark.parametrize("name", FORMATS)
def test_products_of_channels_that_are_apart_change_no_scale(rng, name):
    """A diagonal matrix has no errors to move."""
    w, importance = gauss(rng, 256, 20), rng.random(256) + 0.5
    apart, alone = (packed_as(name, w, importance=i).unpack() for i in (np.diag(importance), importance))
    assert np.abs(apart - alone).max() <= np.ptp(w) / FORMATS[name][2] / 2 and (apart == alone).mean() > 0.99


@pytest.mark.parametrize("name", FORMATS)
def test_a_pair_is_weighed_by_one_importance(rng, name):
    a, b, products = gauss(rng, 256, 20), gauss(rng, 256, 20), np.cov(inputs(rng, 600, 256).T)
    for importance in (np.diagonal(products), products):
        pair = packed_as(name, a, b, importance=importance).unpack()
        alone = [packed_as(name, w, importance=importance).unpack() for w in (a, b)]
        np.testing.assert_array_equal(pair, np.hstack(alone))


@pytest.mark.parametrize(("importance", "error_type", "message"), [
    (np.ones(63), ValueError, r"importance has shape \(63,\), expected \(64,\) or \(64, 64\)"),
    (np.ones((64, 63)), ValueError, r"importance has shape \(64, 63\)"),
    (-np.ones(64), ValueError, "importance holds a number that is negative or not finite"),
    (np.full(64, np.nan), ValueError, "importance holds a number that is negative or not finite"),
    (np.full((64, 64), np.inf), ValueError, "importance holds a number that is negative or not finite"),
    (2 * np.eye(64)[::-1] + np.eye(64), ValueError, "importance is no matrix of mean products: it is not positive"),
    (np.full(64, "a"), TypeError, "importance has dtype .*, expected numbers"),
])
def test_an_importance_that_is_none(importance, error_type, message):
    w = np.ones((64, 5), np.float32)
    for name, call in (("pack", lambda: pack(w, "int4", importance=importance)),
                       ("pack_gated", lambda: pack_gated(w, w, "q4_k", importance=importance))):
        with pytest.raises(error_type, match=f"^{name}: {message}"):
            call()


def test_formats_that_pack_makes_are_those_of_layout():
    for name in BITS:
        dtype, group, *_ = FORMATS.get(name, (name, None))
        assert Format.checked("pack", dtype, group, PACKED).dtype == dtype


# ---- small weights ---------------------------------------------------------------------------------------

# std -> the most that is lost of a product, by bits of a weight; float16's least steps are 6e-8
SMALL = {1e-4: (0.1, 0.05, 0.03), 1e-5: (0.12, 0.065, 0.035), 1e-6: (0.14, 0.07, 0.04), 1e-7: (0.2, 0.2, 0.2),
         3e-8: (0.65, 0.65, 0.65), 1e-8: (1.0, 1.0, 1.0), 1e-40: (1.0, 1.0, 1.0)}


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("std", SMALL)
def test_small_weights_are_kept_as_far_as_float16_can(isa, rng, name, std):
    """Blocks have two factors, one of them float16 and far smaller than a step of their weights; that it is a number of
    float16's, not 0, is what keeps them. No group is worse than zeros."""
    w = (gauss(rng, 512, 33) * np.float64(std)).astype(np.float32)
    back = packed_as(name, w).unpack()
    lost = np.square(back.astype(np.float64) - w)
    most = SMALL[std][0 if BITS[name] < 5.5 and "5" not in name else 1 if "5" in name else 2]
    assert lost.sum() ** 0.5 <= most * np.square(w.astype(np.float64)).sum() ** 0.5
    by_group = -1, packed_as(name, w).group_size, 33
    zeros = np.square(w.astype(np.float64)).reshape(by_group).sum(axis=1)
    assert (lost.reshape(by_group).sum(axis=1) <= (1 + 1e-6) * zeros).all()


def test_importance_of_channels_that_are_mostly_dead(rng):
    """What is never used may have any error, and the mean products of it have no inverse."""
    w, alive = gauss(rng, 64, 16), np.arange(64) < 20
    for name in ("int4", "q4_1", "q6_k"):
        back = pack(w, name, importance=np.diag(alive.astype(float))).unpack()
        assert np.isfinite(back).all() and error(back[alive], w[alive]) <= 1.01 * error(pack(w, name).unpack()[alive],
                                                                                       w[alive])
