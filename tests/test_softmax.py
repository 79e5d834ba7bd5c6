"""softmax against its formula: every length, edge of memory, extreme value, layout and thread count."""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref
from conftest import DTYPES
from guard import guarded, guarded_copy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import forge_c as fc

LENGTHS = (*range(1, 67), 127, 128, 129, 143, 144, 145, 255, 256, 257, 767, 768, 4096, 4099)
X = [[1.0, 2.0, 3.0, 4.0, -2.0], [10.0, -10.0, 0.0, 9.5, 10.0]]
# torch.nn.functional.softmax in float64.
GOLDEN = [[0.03200751595988722, 0.08700544900787431, 0.2365053310150248, 0.6428881436318333, 0.0015935603853804014],
          [0.38364504864916227, 7.907513817538376e-10, 1.741745826239705e-05, 0.23269248445266175, 0.38364504864916227]]


def normal(rng, *shape, dtype, scale=5.0):
    return (rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(dtype)


@pytest.fixture
def assert_right(assert_close):
    """Compare a result with the reference; magnitude: p (1 + |x - max|), and p = 0 of a number far below."""
    def check(got, x, want=None):
        with np.errstate(all="ignore"):
            want = ref.softmax(x) if want is None else np.array(want)
            below = ref.f64(x) - ref.f64(x).max(-1, keepdims=True)
            magnitude = np.where(want == 0, 0.0, want * (1 + abs(below)))
        assert_close("softmax", got, want, magnitude=magnitude, n=x.shape[-1])

    return check


def test_golden_numbers(isa, dtype, assert_right):
    x = np.array(X, dtype)
    assert_right(fc.softmax(x), x, GOLDEN)


def test_every_length_between_guard_pages(isa, dtype, rng, assert_right):
    for n in LENGTHS:
        x = normal(rng, 3, n, dtype=dtype)
        results = []
        for at_end in (False, True):
            gx, out = guarded_copy(x, at_end=at_end), guarded(x.shape, dtype, at_end=at_end)
            assert fc.softmax(gx, out=out) is out
            assert gx.tobytes() == x.tobytes()
            results.append(out.tobytes())
        assert results[0] == results[1]
        assert_right(out, x)


def test_a_vocabulary(isa, dtype, rng, assert_right):
    x = normal(rng, 2, 151_936, dtype=dtype)
    x[0, 150_000] = 40
    assert_right(fc.softmax(x), x)


def test_equal_numbers_share_equally(isa, dtype):
    for n in (1, 2, 4, 16, 64, 1024):
        for value in (0.0, -3.0, 1000.0, -60000.0):
            got = fc.softmax(np.full((2, n), value, dtype))
            assert (got.astype(np.float64) == 1 / n).all()


def test_the_maximum_anywhere(isa, dtype, rng, assert_right):
    """Without subtracting the maximum, wherever in the row it is, exp overflows from 89 on and the row is NaN."""
    for n in (3, 37, 150):
        for at in (0, n // 4, n // 2, n - 1):
            for height in (100.0, 1e4, 6e4):
                x = normal(rng, 2, n, dtype=dtype)
                x[:, at] = height
                got = fc.softmax(x)
                assert_right(got, x)
                assert (got[:, at].astype(np.float64) == 1).all()


def test_huge_and_tiny_numbers(isa, dtype, rng, assert_right):
    """x - max overflows to -inf, whose exponential is the reference's 0; the numbers below are all but equal."""
    scales = (65000.0, 1e-6) if dtype == np.float16 else (1e30, 3.3895e38, 1e-30, 1e-42)
    for n in (1, 2, 37, 145):
        for scale in scales:
            x = (rng.uniform(-1, 1, (3, n)) * scale).astype(dtype)
            x[0, 0], x[1, -1] = scale, -scale
            assert_right(fc.softmax(x), x)


def test_exponentials_down_to_the_smallest_float(isa, dtype, assert_right):
    """From exp(-87.3) on results are subnormal, below exp(-104) zero: within one smallest normal of the truth."""
    x = np.linspace(-120, 0, 481).astype(dtype)
    assert_right(fc.softmax(x), x)
    assert (fc.softmax(np.array([-200, 0, -1000], dtype)) == np.array([0, 1, 0], dtype)).all()


def test_minus_infinity_is_weight_zero(isa, dtype, rng, assert_right):
    for n in (2, 37, 150):
        x = normal(rng, 4, n, dtype=dtype)
        for i, at in enumerate((0, n // 4, n // 2, n - 1)):
            x[i, at] = -np.inf
            got = fc.softmax(x[i])
            assert_right(got, x[i])
            assert got[at] == 0
        x[:, : n - 1], x[:, -1] = -np.inf, 3
        assert (fc.softmax(x).astype(np.float64) == np.eye(n)[-1]).all()


@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_nan_and_infinity_make_their_row_nan(isa, dtype, rng, special):
    for n in (1, 3, 37, 150):
        places = sorted({0, n // 4, n // 2, n - 1})
        x = normal(rng, 2 * len(places) + 1, n, dtype=dtype)
        plain = fc.softmax(x)
        for i, at in enumerate(places):
            x[2 * i + 1, at] = special
        got = fc.softmax(x)
        assert np.isnan(got[1::2].astype(np.float32)).all()
        assert got[::2].tobytes() == plain[::2].tobytes()


def test_nan_beside_infinities_and_a_row_of_minus_infinity(isa, dtype, assert_right):
    for n in (2, 37, 150):
        x = np.full((4, n), -np.inf).astype(dtype)
        x[1, 0], x[2, -1] = np.nan, np.inf
        x[3, 0], x[3, -1] = np.inf, np.nan
        assert np.isnan(fc.softmax(x).astype(np.float32)).all()
        assert_right(fc.softmax(x), x)


def test_layouts(isa, dtype, rng):
    x = normal(rng, 4, 3, 2, 53, dtype=dtype)
    unaligned = np.frombuffer(b"\0" + x.tobytes(), dtype, offset=1).reshape(x.shape)
    assert not unaligned.flags.aligned and not unaligned.flags.writeable
    before = x.tobytes()
    for whole in (x[::-1], x[::2, ::-2], x.swapaxes(0, 2), np.broadcast_to(x[:1], x.shape), x[0, 0, 0], unaligned):
        for odd in (whole[..., 3:], whole[..., :50]):
            assert fc.softmax(odd).tobytes() == fc.softmax(odd.copy()).tobytes()
    assert x.tobytes() == before


def test_out(isa, dtype, rng):
    x = normal(rng, 4, 3, 37, dtype=dtype)
    plain = fc.softmax(x)
    room = np.full((3, 4, 42), 7, dtype)
    out = room.swapaxes(0, 1)[::-1, :, 2:-3]
    assert fc.softmax(x, out=out) is out
    assert out.tobytes() == plain.tobytes() and (room[..., :2] == 7).all() and (room[..., -3:] == 7).all()
    mine = x.copy()
    assert fc.softmax(mine, out=mine) is mine
    assert mine.tobytes() == plain.tobytes()


def test_what_is_refused_writes_nothing():
    memory = np.arange(40, dtype=np.float32)
    x, near = memory[:16].reshape(2, 8), memory[8:24].reshape(2, 8)
    locked = np.empty((2, 8), np.float32)
    locked.flags.writeable = False
    for error, a, out in (
        (ValueError, x, near),
        (ValueError, x, x[::-1]),
        (ValueError, np.float32(1), None),
        (TypeError, x.astype(np.float64), None),
        (TypeError, x.astype(np.float16), memory[24:].reshape(2, 8)),
        (ValueError, x[:1], memory[24:].reshape(2, 8)),
        (ValueError, x, memory[24:].reshape(8, 2).T),
        (ValueError, x.reshape(8, 2).T, memory[24:].reshape(2, 8)),
        (ValueError, x, locked),
    ):
        with pytest.raises(error, match="softmax: "):
            fc.softmax(a, out=out)
        assert memory.tobytes() == np.arange(40, dtype=np.float32).tobytes()


def test_empty(isa, dtype):
    for shape in ((0,), (3, 0), (0, 5), (2, 0, 4), (2, 0, 0)):
        for at_end in (False, True):
            x = guarded(shape, dtype, at_end=at_end)
            assert fc.softmax(x, out=x) is x
            assert fc.softmax(x).shape == shape and fc.softmax(x).dtype == dtype


def test_a_row_does_not_depend_on_its_batch(isa, dtype, rng):
    for n in (5, 145, 768):
        x = normal(rng, 33, n, dtype=dtype)
        whole = fc.softmax(x)
        for rows in (slice(0, 1), slice(7, 8), slice(32, 33), slice(3, 20)):
            assert fc.softmax(x[rows]).tobytes() == whole[rows].tobytes()


@pytest.mark.parametrize("shape", [(129, 1031), (5, 40003), (3, 43, 257)])
def test_equal_bytes_for_any_thread_count(isa, dtype, rng, each_thread_count, shape):
    x = normal(rng, *shape, dtype=dtype)
    assert len({fc.softmax(x).tobytes() for _ in each_thread_count()}) == 1


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(outer=st.lists(st.integers(0, 5), max_size=4), n=st.integers(1, 200), name=st.sampled_from(list(DTYPES)),
       power=st.integers(-20, 14), swap=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_any_shape(isa, assert_right, outer, n, name, power, swap, seed):
    x = (np.random.default_rng(seed).uniform(-1, 1, (*outer, n)) * 2.0**power).astype(DTYPES[name])
    x = x.swapaxes(0, -2) if swap and len(outer) > 1 else x
    assert_right(fc.softmax(x), x)
