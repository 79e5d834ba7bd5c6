"""rms_norm against its formula: every length, edge of memory, extreme value, layout and thread count."""

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
X = [[0.5, -1.25, 2.0, 3.5, -0.75], [100.0, -200.0, 300.0, 0.25, -50.0]]
WEIGHT = [1.0, 0.5, -2.0, 0.25, 1.5]
# float64 results of torch.nn.functional.rms_norm, the second with 1 + WEIGHT as Gemma's layers have it.
LLAMA = [[0.25906384530175175, -0.3238298066271897, -2.072510762414014, 0.45336172927806556, -0.5828936519289414],
         [0.5923487478476733, -0.5923487478476733, -3.5540924870860398, 0.0003702179674047958, -0.44426156088575497]]
GEMMA = [[0.5181276906035035, -0.9714894198815691, -1.036255381207007, 2.2668086463903276, -0.9714894198815691],
         [1.1846974956953467, -1.7770462435430199, -1.7770462435430199, 0.001851089837023979, -0.7404359348095917]]


def normal(rng, *shape, dtype):
    return rng.standard_normal(shape, np.float32).astype(dtype)


def expected(x, *args, **kwargs):
    with np.errstate(all="ignore"):
        return ref.rms_norm(x, *args, **kwargs)


@pytest.mark.parametrize(("offset", "golden"), [(0.0, LLAMA), (1.0, GEMMA)], ids=["llama", "gemma"])
def test_golden_numbers(isa, dtype, assert_close, offset, golden):
    got = fc.rms_norm(np.array(X, dtype), np.array(WEIGHT, np.float32), weight_offset=offset)
    assert_close("rms_norm", got, np.array(golden), n=5)


def test_every_length_between_guard_pages(isa, dtype, rng, assert_close):
    for n in LENGTHS:
        x, residual, weight = (normal(rng, *shape, dtype=dtype) for shape in ((3, n), (3, n), (n,)))
        results = []
        for at_end in (False, True):
            gx, gr, gw = (guarded_copy(a, at_end=at_end) for a in (x, residual, weight))
            out, y, h = (guarded(x.shape, dtype, at_end=at_end) for _ in range(3))
            assert fc.rms_norm(gx, gw, out=out) is out
            fused = fc.rms_norm(gx, gw.astype(np.float32), weight_offset=1.0, residual=gr, out=(y, h))
            assert fused[0] is y and fused[1] is h
            assert gx.tobytes() == x.tobytes() and gr.tobytes() == residual.tobytes()
            results.append(out.tobytes() + y.tobytes() + h.tobytes())
        assert results[0] == results[1]
        assert_close("rms_norm", out, expected(x, weight), n=n)
        assert_close("residual", h, ref.f64(x) + ref.f64(residual))
        assert_close("rms_norm", y, expected(h, weight, weight_offset=1.0), n=n)


def test_the_fused_residual_is_the_sum_and_then_the_norm(isa, dtype, rng):
    for n in (1, 5, 37, 145, 768):
        x, residual = normal(rng, 4, n, dtype=dtype), normal(rng, 4, n, dtype=dtype)
        weight = normal(rng, n, dtype=np.float32)
        y, h = fc.rms_norm(x, weight, 1e-5, residual=residual)
        assert h.tobytes() == (x + residual).tobytes()
        assert y.tobytes() == fc.rms_norm(h, weight, 1e-5).tobytes()


def test_weights_of_another_dtype(isa, dtype, rng, assert_close):
    x = normal(rng, 3, 37, dtype=dtype)
    for other in DTYPES.values():
        weight = normal(rng, 37, dtype=other)
        assert_close("rms_norm", fc.rms_norm(x, weight, weight_offset=1), expected(x, weight, weight_offset=1), n=37)
    assert_close("rms_norm", fc.rms_norm(x, weight_offset=5.0), expected(x), n=37)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-6, 1e-5, 1.0, 1e30])
def test_eps_is_inside_the_root(isa, dtype, rng, assert_close, eps):
    for scale in (1.0, 2.0**-10):
        x = (normal(rng, 3, 37, dtype=np.float32) * np.float32(scale)).astype(dtype)
        assert_close("rms_norm", fc.rms_norm(x, eps=eps), expected(x, eps=eps), n=37)
    zeros = np.zeros((2, 5), dtype)
    assert_close("rms_norm", fc.rms_norm(zeros, eps=eps), expected(zeros, eps=eps), n=5)


@pytest.mark.parametrize("eps", [-1e-6, -np.inf, np.nan])
def test_eps_that_is_no_number_from_zero_on(eps):
    with pytest.raises(ValueError, match="rms_norm: eps is"):
        fc.rms_norm(np.ones(4, np.float32), eps=eps)


def test_squares_beyond_the_range_of_float32(isa, dtype, rng, assert_close):
    """x*x overflows from 1.8e19 on and is zero below 2.6e-23: the result is still the reference's."""
    scales = (65000.0, 1e-6) if dtype == np.float16 else (1e17, 1e19, 1e30, 3.3e38, 1e-12, 1e-18, 1e-30, 1e-38, 1e-43)
    for n in (1, 5, 37, 145, 4099):
        weight = normal(rng, n, dtype=np.float32)
        for scale in scales:
            x = (rng.uniform(-1, 1, (3, n)) * scale).astype(dtype)
            x[:, 0] = scale
            assert_close("rms_norm", fc.rms_norm(x, weight, eps=0.0), expected(x, weight, 0.0), n=n)
            assert_close("rms_norm", fc.rms_norm(x), expected(x), n=n)
    if dtype != np.float16:
        lone = np.zeros((2, 37), dtype)
        lone[0, 36], lone[1, :3] = 1e30, (1e-30, 1e30, -1e25)
        assert_close("rms_norm", fc.rms_norm(lone), expected(lone), n=37)


def test_subnormal_inputs(isa, dtype, rng, assert_close):
    smallest = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}[dtype.name]
    for n in (1, 5, 37, 145):
        x = (rng.integers(1, 100, (3, n)) * smallest).astype(dtype)
        assert_close("rms_norm", fc.rms_norm(x, eps=0.0), expected(x, eps=0.0), n=n)
        assert_close("rms_norm", fc.rms_norm(x), expected(x), n=n)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_specials_anywhere_in_a_row(isa, dtype, rng, assert_close, special):
    """NaN or Inf in the first lane, the unrolled loop, the vector loop and the tail; other rows do not notice."""
    for n in (1, 3, 37, 150):
        places = sorted({0, n // 4, n // 2, n - 1})
        x = normal(rng, 2 * len(places) + 1, n, dtype=dtype)
        clean = x.copy()
        for i, at in enumerate(places):
            x[2 * i + 1, at] = special
        residual = np.where(np.isfinite(x), x.dtype.type(0), x)
        for got in (fc.rms_norm(x), fc.rms_norm(clean, residual=residual)[0]):
            assert_close("rms_norm", got, expected(x), n=n)
            assert got[::2].tobytes() == fc.rms_norm(clean)[::2].tobytes()
        weight = np.ones(n, np.float32)
        weight[places] = special
        assert_close("rms_norm", fc.rms_norm(clean, weight), expected(clean, weight), n=n)


def test_a_sum_that_overflows_is_infinite(isa, dtype):
    largest = np.array(65504.0 if dtype == np.float16 else 3.3895e38, np.float32).astype(dtype)
    x = np.full((1, 37), largest)
    y, h = fc.rms_norm(x, residual=x)
    assert np.isposinf(h.astype(np.float32)).all() and np.isnan(y.astype(np.float32)).all()


def test_layouts(isa, dtype, rng):
    x = normal(rng, 4, 3, 2, 53, dtype=dtype)
    weight = normal(rng, 50, dtype=np.float32)
    unaligned = np.frombuffer(b"\0" + x.tobytes(), dtype, offset=1).reshape(x.shape)
    assert not unaligned.flags.aligned and not unaligned.flags.writeable
    odd_weight = np.frombuffer(b"\0" + weight.tobytes(), np.float32, offset=1)
    before = x.tobytes()
    for whole in (x[::-1], x[::2, ::-2], x.swapaxes(0, 2), np.broadcast_to(x[:1], x.shape), x[0, 0, 0], unaligned):
        for odd in (whole[..., 3:], whole[..., :50]):
            plain = fc.rms_norm(odd.copy(), weight)
            assert fc.rms_norm(odd, odd_weight).tobytes() == plain.tobytes()
            fused = fc.rms_norm(odd, odd_weight, residual=odd[...])
            for got, want in zip(fused, fc.rms_norm(odd.copy(), weight, residual=odd.copy()), strict=True):
                assert got.tobytes() == want.tobytes()
    assert x.tobytes() == before


def test_out_with_gaps_and_backwards(isa, dtype, rng):
    x, residual = normal(rng, 4, 3, 37, dtype=dtype), normal(rng, 4, 3, 37, dtype=dtype)
    plain, fused = fc.rms_norm(x), fc.rms_norm(x, residual=residual)
    rooms = [np.full((3, 4, 42), 7, dtype) for _ in range(3)]
    out, y, h = (room.swapaxes(0, 1)[::-1, :, 2:-3] for room in rooms)
    assert fc.rms_norm(x, out=out) is out
    fc.rms_norm(x, residual=residual, out=(y, h))
    assert [a.tobytes() for a in (out, y, h)] == [a.tobytes() for a in (plain, *fused)]
    assert all((room[..., :2] == 7).all() and (room[..., -3:] == 7).all() for room in rooms)


def test_out_may_be_the_inputs_themselves(isa, dtype, rng):
    x, residual = normal(rng, 3, 150, dtype=dtype), normal(rng, 3, 150, dtype=dtype)
    weight = normal(rng, 150, dtype=np.float32)
    plain = fc.rms_norm(x, weight).tobytes()
    mine = x.copy()
    assert fc.rms_norm(mine, weight, out=mine) is mine
    assert mine.tobytes() == plain
    wanted = b"".join(a.tobytes() for a in fc.rms_norm(x, weight, residual=residual))
    for places in ("x-", "-x", "r-", "-r", "xr", "rx"):
        arrays = {"x": x.copy(), "r": residual.copy(), "-": np.empty_like(x)}
        y, h = (arrays[place] for place in places)
        fc.rms_norm(arrays["x"], weight, residual=arrays["r"], out=(y, h))
        assert y.tobytes() + h.tobytes() == wanted, places


@pytest.mark.parametrize("places", ["out on x", "out on weight", "y on x", "y on h", "h on residual", "h on weight"])
def test_any_other_overlap_is_refused(places):
    memory = np.arange(40, dtype=np.float32)
    x, residual, weight = np.ones((2, 8), np.float32), np.ones((2, 8), np.float32), np.ones(8, np.float32)
    mine, near = memory[:16].reshape(2, 8), memory[8:24].reshape(2, 8)
    y, h = np.full((2, 8), 7, np.float32), np.full((2, 8), 7, np.float32)
    out, on = places.split(" on ")
    if on == "h":
        h = mine
    else:
        x, residual, weight = {"x": (mine, residual, weight), "residual": (x, mine, weight),
                               "weight": (x, residual, memory[16:24])}[on]
    pair = {"out": near, "y": (near, h), "h": (y, near)}[out]
    with pytest.raises(ValueError, match="overlaps"):
        fc.rms_norm(x, weight, residual=None if out == "out" else residual, out=pair)
    assert memory.tobytes() == np.arange(40, dtype=np.float32).tobytes() and (y == 7).all()


def test_wrong_shapes_and_dtypes_are_refused_and_write_nothing():
    x, out = np.ones((2, 8), np.float32), np.full((2, 8), 7, np.float32)
    half, locked = np.ones((2, 8), np.float16), out.copy()
    locked.flags.writeable = False
    for error, args, kwargs in (
        (ValueError, (np.float32(1), None), {}),
        (ValueError, (x, np.ones(7, np.float32)), {"out": out}),
        (ValueError, (x, np.ones((1, 8), np.float32)), {"out": out}),
        (TypeError, (x, np.ones(8)), {"out": out}),
        (TypeError, (x.astype(np.float64),), {}),
        (ValueError, (x,), {"residual": np.ones((1, 8), np.float32), "out": (out, out.copy())}),
        (TypeError, (x,), {"residual": half, "out": (out, out.copy())}),
        (TypeError, (x,), {"residual": x, "out": out}),
        (TypeError, (x,), {"residual": x, "out": (out,)}),
        (TypeError, (x,), {"residual": x, "out": (out, half)}),
        (ValueError, (x,), {"residual": x, "out": (out, locked)}),
        (TypeError, (half,), {"out": out}),
        (ValueError, (x,), {"out": locked}),
        (ValueError, (x[:1],), {"out": out}),
        (ValueError, (np.ones((8, 2), np.float32).T,), {"out": out}),
        (ValueError, (x,), {"out": np.full((8, 2), 7, np.float32).T}),
    ):
        with pytest.raises(error, match="rms_norm: "):
            fc.rms_norm(*args, **kwargs)
        assert (out == 7).all()


def test_empty(isa, dtype):
    for shape in ((0,), (3, 0), (0, 5), (2, 0, 4), (2, 0, 0)):
        for at_end in (False, True):
            x = guarded(shape, dtype, at_end=at_end)
            weight = guarded(shape[-1:], np.float32, at_end=at_end)
            assert fc.rms_norm(x, weight, out=x) is x
            y, h = fc.rms_norm(x, weight, residual=x)
            assert y.shape == h.shape == shape and y.dtype == h.dtype == dtype


def test_a_row_does_not_depend_on_its_batch(isa, dtype, rng):
    for n in (5, 145, 768):
        x, residual = normal(rng, 33, n, dtype=dtype), normal(rng, 33, n, dtype=dtype)
        weight = normal(rng, n, dtype=np.float32)
        whole = fc.rms_norm(x, weight, residual=residual)
        for rows in (slice(0, 1), slice(7, 8), slice(32, 33), slice(3, 20)):
            part = fc.rms_norm(x[rows], weight, residual=residual[rows])
            assert all(p.tobytes() == w[rows].tobytes() for p, w in zip(part, whole, strict=True))


@pytest.mark.parametrize("shape", [(129, 1031), (5, 40003), (3, 43, 257)])
def test_equal_bytes_for_any_thread_count(isa, dtype, rng, each_thread_count, shape):
    x, residual = normal(rng, *shape, dtype=dtype), normal(rng, *shape, dtype=dtype)
    weight = normal(rng, shape[-1], dtype=np.float32)
    seen = set()
    for _ in each_thread_count():
        y, h = fc.rms_norm(x, weight, residual=residual)
        seen.add(fc.rms_norm(x, weight).tobytes() + y.tobytes() + h.tobytes())
    assert len(seen) == 1


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(outer=st.lists(st.integers(0, 5), max_size=4), n=st.integers(1, 200), name=st.sampled_from(list(DTYPES)),
       power=st.integers(-40, 15), swap=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_any_shape(isa, assert_close, outer, n, name, power, swap, seed):
    rng = np.random.default_rng(seed)
    x = (rng.uniform(-1, 1, (*outer, n)) * 2.0**power).astype(DTYPES[name])
    x = x.swapaxes(0, -2) if swap and len(outer) > 1 else x
    weight = rng.uniform(-2, 2, n).astype(np.float32)
    assert_close("rms_norm", fc.rms_norm(x, weight), expected(x, weight), n=n)
