"""rope against its formula: both pairings, any width and position, edge of memory, layouts, positions from outside."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import reference as ref
from conftest import DTYPES
from guard import guarded, guarded_copy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import forge_c as fc

HALVES = (*range(1, 35), 63, 64, 65, 128)
FAR = 2**20
INTEGERS = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64)
PAIRINGS = pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])


def normal(rng, *shape, dtype):
    return rng.standard_normal(shape, np.float32).astype(dtype)


def any_table(rng, rows, half):
    """Angles at random: every row and pair of channels has one of its own."""
    angles = rng.uniform(0, 2 * np.pi, (rows, half))
    return fc.RopeTable(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))


def pair_length(x, dim, interleaved):
    """sqrt(a^2 + b^2) of the pair that each channel belongs to, 0 where there is none: the tail is copied.

    Rounding a subnormal number moves it as far as rounding the smallest normal one.
    """
    x, size = ref.f64(x), np.zeros(x.shape)
    first, second = (np.s_[0:dim:2], np.s_[1:dim:2]) if interleaved else (np.s_[: dim // 2], np.s_[dim // 2 : dim])
    size[..., first] = size[..., second] = np.maximum(np.hypot(x[..., first], x[..., second]), 2.0**-126)
    return size


@pytest.fixture
def assert_right(assert_close):
    """Compare with the reference's rotation of x (batch, seq, heads, head_dim) by the table's own cos and sin."""
    def check(got, x, table, positions, interleaved):
        with np.errstate(all="ignore"):
            want = ref.rope(x, table.cos, table.sin, positions, interleaved=interleaved)
            size = pair_length(x, table.dim, interleaved)
        assert_close("rope", got, want, magnitude=size)
        assert got[..., table.dim :].tobytes() == x[..., table.dim :].tobytes()

    return check


def test_golden_numbers(isa, assert_close):
    """The rotation of transformers' Llama (half-split) and Cohere (interleaved) layers, positions 3 and 4."""
    x = np.array([[[[1.0, 2.0, 3.0, 4.0]], [[-1.0, 0.5, 0.25, 2.0]]]], np.float32)
    table = fc.rope_table(4, 8)
    llama = [[-1.4133524894714355, 1.8791180849075317, -2.828857421875, 4.058191299438477],
             [0.8428442478179932, 0.41962137818336487, 0.5933915972709656, 2.018394947052002]]
    cohere = [[-1.2722325325012207, -1.838865041732788, 2.8786680698394775, 4.088186740875244],
              [1.0320448875427246, 0.42998069524765015, 0.1698213517665863, 2.0083975791931152]]
    for interleaved, golden in ((False, llama), (True, cohere)):
        got = fc.rope(x, table, start_pos=3, interleaved=interleaved)
        # As many roundings again in the golden numbers, which are float32 too.
        size = 2 * pair_length(x, 4, interleaved)
        assert_close("rope", got, np.array(golden)[None, :, None], magnitude=size)


@PAIRINGS
def test_every_width_between_guard_pages(isa, dtype, rng, assert_right, interleaved):
    """Whole and partial rotation, tails of 0, 1 and more channels; cos and sin are read to their last row."""
    for half in HALVES:
        for tail in (0, 1, 17):
            plain = any_table(rng, 5, half)
            x = normal(rng, 1, 3, 2, 2 * half + tail, dtype=dtype)
            results = []
            for at_end in (False, True):
                table = fc.RopeTable(guarded_copy(plain.cos, at_end=at_end), guarded_copy(plain.sin, at_end=at_end))
                inside, out = guarded_copy(x, at_end=at_end), guarded(x.shape, dtype, at_end=at_end)
                positions = guarded_copy(np.array([4, 0, 4]), at_end=at_end)
                assert fc.rope(inside, table, positions=positions, interleaved=interleaved, out=out) is out
                assert inside.tobytes() == x.tobytes()
                results.append(out.tobytes())
            assert results[0] == results[1]
            assert_right(out, x, table, [4, 0, 4], interleaved)


@PAIRINGS
def test_every_head_dim_with_a_small_table(isa, dtype, rng, interleaved):
    """Every length of the copied tail; a table of no channels copies everything."""
    for half in (0, 1, 3):
        table = any_table(rng, 4, half)
        for head_dim in range(2 * half, 66):
            x = normal(rng, 2, head_dim, dtype=dtype)[None, :, None]
            got = fc.rope(x, table, start_pos=1, interleaved=interleaved)
            alone = fc.rope(x[..., : 2 * half], table, start_pos=1, interleaved=interleaved)
            assert got[..., : 2 * half].tobytes() == alone.tobytes()
            assert got[..., 2 * half :].tobytes() == x[..., 2 * half :].tobytes()


def test_the_two_pairings_are_one_rotation_of_permuted_channels(isa, dtype, rng, assert_close):
    x, table = normal(rng, 2, 7, 3, 40, dtype=dtype), fc.rope_table(40, 16)
    permuted = np.ascontiguousarray(x.reshape(2, 7, 3, 2, 20).swapaxes(-1, -2)).reshape(x.shape)
    half_split = fc.rope(x, table).reshape(2, 7, 3, 2, 20).swapaxes(-1, -2).reshape(x.shape)
    size = 2 * pair_length(permuted, 40, True)
    assert_close("rope", fc.rope(permuted, table, interleaved=True), ref.f64(half_split), magnitude=size, roundings=1)


@PAIRINGS
def test_start_pos_and_positions(isa, dtype, rng, assert_right, interleaved):
    x, table = normal(rng, 3, 5, 2, 20, dtype=dtype), any_table(rng, 70, 8)
    for start in (0, 1, 33, 65):
        row = np.arange(start, start + 5)
        got = fc.rope(x, table, start_pos=start, interleaved=interleaved)
        assert_right(got, x, table, row, interleaved)
        for positions in (row, np.tile(row, (3, 1))):
            assert fc.rope(x, table, positions=positions, interleaved=interleaved).tobytes() == got.tobytes()
    for positions in (rng.integers(0, 70, 5), rng.integers(0, 70, (3, 5)), np.array([69, 0, 69, 5, 5])):
        got = fc.rope(x, table, positions=positions, interleaved=interleaved)
        assert_right(got, x, table, positions, interleaved)
        assert fc.rope(x, table, start_pos=999, positions=positions, interleaved=interleaved).tobytes() == got.tobytes()


def test_positions_of_every_integer_type_and_layout(isa, rng):
    x, table = normal(rng, 4, 6, 2, 16, dtype=np.float32), any_table(rng, 100, 8)
    positions = rng.integers(0, 100, (4, 6))
    want = fc.rope(x, table, positions=positions)
    for kind in INTEGERS:
        assert fc.rope(x, table, positions=positions.astype(kind)).tobytes() == want.tobytes()
    unaligned = np.frombuffer(b"\0" + positions.tobytes(), np.int64, offset=1).reshape(positions.shape)
    backwards = positions[::-1, ::-1].copy()[::-1, ::-1]
    for odd in (unaligned, backwards, np.asfortranarray(positions), positions.astype(">i4")):
        assert fc.rope(x, table, positions=odd).tobytes() == want.tobytes()
    broadcast = np.broadcast_to(positions[:1], positions.shape)
    assert fc.rope(x, table, positions=broadcast).tobytes() == fc.rope(x, table, positions=positions[0]).tobytes()


def test_three_axes_are_one_head(isa, dtype, rng):
    x, table = normal(rng, 3, 5, 20, dtype=dtype), any_table(rng, 70, 8)
    for kwargs in ({}, {"start_pos": 7}, {"positions": rng.integers(0, 70, (3, 5))}, {"interleaved": True}):
        assert fc.rope(x, table, **kwargs).tobytes() == fc.rope(x[:, :, None], table, **kwargs).tobytes()


@pytest.fixture(scope="module", params=[10000.0, 500000.0])
def base_and_far_table(request):
    return request.param, fc.rope_table(8, FAR, request.param)


def test_positions_to_two_to_the_twenty(isa, base_and_far_table, rng, assert_close):
    """Against angles in float64. One rounding of cos and sin beside the three of the rotation."""
    positions = np.array([0, 1, 4095, 131_071, 131_072, 999_983, FAR - 2, FAR - 1])
    base, table = base_and_far_table
    angles = positions[:, None] * ref.rope_frequency(8, base)
    x = normal(rng, 1, len(positions), 3, 8, dtype=np.float32)
    for interleaved in (False, True):
        want = ref.rope(x, np.cos(angles), np.sin(angles), np.arange(len(positions)), interleaved=interleaved)
        got = fc.rope(x, table, positions=positions, interleaved=interleaved)
        assert_close("rope", got, want, magnitude=4 / 3 * pair_length(x, 8, interleaved))
    last = fc.rope(x[:, -2:], table, start_pos=FAR - 2)
    assert last.tobytes() == fc.rope(x[:, -2:], table, positions=positions[-2:]).tobytes()


@pytest.mark.parametrize("wrong", [-1, -8, 8, 9, 2**31, 2**32, 2**62, -(2**63), 2**63 - 1, 2**63, 2**64 - 1])
def test_a_position_outside_the_table_is_an_error_and_writes_nothing(isa, wrong):
    table, x = fc.rope_table(4, 8), np.ones((2, 5, 4), np.float32)
    out = np.full_like(x, 7)
    kind = np.uint64 if wrong >= 2**63 else np.int64
    for at in (0, 4, 9):
        positions = np.zeros(10, kind)
        positions[at] = wrong
        with pytest.raises(IndexError, match="rope: position .* is outside the table of 8 positions"):
            fc.rope(x, table, positions=positions.reshape(2, 5), out=out)
    with pytest.raises(IndexError, match="rope: position .* is outside the table of 8 positions"):
        fc.rope(x, table, positions=np.array([0, 0, wrong, 0, 0], kind), out=out)
    assert (out == 7).all()


@pytest.mark.parametrize("wrong", [-1, 4, 8, 2**32, 2**63 - 1, -(2**63), 2**70, -(2**70)])
def test_a_start_outside_the_table_is_an_error_and_writes_nothing(isa, wrong):
    table, x = fc.rope_table(4, 8), np.ones((2, 5, 4), np.float32)
    out = np.full_like(x, 7)
    with pytest.raises(IndexError, match="rope: positions .* outside the table of 8 positions"):
        fc.rope(x, table, start_pos=wrong, out=out)
    assert (out == 7).all()
    assert fc.rope(x, table, start_pos=3).shape == x.shape


@pytest.mark.parametrize("wrong", [1.5, "1", None, np.float32(1)])
def test_a_start_that_is_no_integer(wrong):
    with pytest.raises(TypeError):
        fc.rope(np.ones((1, 2, 4), np.float32), fc.rope_table(4, 8), start_pos=wrong)


def test_what_is_refused_writes_nothing():
    x, table = np.ones((2, 5, 3, 8), np.float32), fc.rope_table(8, 16)
    out = np.full_like(x, 7)
    locked = out.copy()
    locked.flags.writeable = False
    for error, a, t, kwargs in (
        (ValueError, x[0, 0], table, {}),
        (ValueError, x[None], table, {}),
        (TypeError, x.astype(np.float64), table, {"out": out}),
        (TypeError, x.astype(np.float16), table, {"out": out}),
        (ValueError, x[:, :, :, :7], table, {}),
        (ValueError, x, fc.rope_table(10, 16), {"out": out}),
        (ValueError, x[:1], table, {"out": out}),
        (ValueError, x, table, {"out": locked}),
        (ValueError, x[..., ::2], fc.rope_table(4, 16), {}),
        (TypeError, x, None, {"out": out}),
        (TypeError, x, table.cos, {"out": out}),
        (ValueError, x, table, {"out": out, "positions": np.arange(4)}),
        (ValueError, x, table, {"out": out, "positions": np.zeros((1, 5), np.int64)}),
        (ValueError, x, table, {"out": out, "positions": np.zeros((5, 2), np.int64)}),
        (ValueError, x, table, {"out": out, "positions": np.array(1)}),
        (TypeError, x, table, {"out": out, "positions": np.zeros(5)}),
        (TypeError, x, table, {"out": out, "positions": np.zeros(5, bool)}),
    ):
        with pytest.raises(error, match="rope: "):
            fc.rope(a, t, **kwargs)
        assert (out == 7).all()


def test_a_table_that_is_not_checked_is_refused():
    """Only RopeTable checks that cos and sin are float32, contiguous and of one shape; the kernel trusts that."""
    good = np.ones((8, 4), np.float32)
    flat = good[:, 0]
    for cos, sin in ((good, good.astype(np.float64)), (good[::2], good[:4]), (good, good[:1]), (flat, flat)):
        with pytest.raises((TypeError, ValueError)):
            fc.rope(np.ones((1, 1, 8), np.float32), SimpleNamespace(cos=cos, sin=sin))


def test_overlap_is_refused_and_writes_nothing():
    memory = np.arange(200, dtype=np.float32)
    x, near = memory[:80].reshape(2, 5, 8), memory[8:88].reshape(2, 5, 8)
    table = fc.RopeTable(memory[100:140].reshape(10, 4), memory[140:180].reshape(10, 4))
    for out in (near, x[::-1], memory[60:140].reshape(2, 5, 8), memory[120:].reshape(2, 5, 8)):
        with pytest.raises(ValueError, match="rope: out overlaps"):
            fc.rope(x, table, out=out)
        assert memory.tobytes() == np.arange(200, dtype=np.float32).tobytes()


def test_out_shares_no_memory_with_the_positions():
    """Channels written over positions that are still to be read would make them point anywhere; here all is zero."""
    positions = np.zeros(16, np.int64)
    out = positions.view(np.float32)[:20].reshape(1, 5, 4)
    with pytest.raises(ValueError, match="rope: out overlaps"):
        fc.rope(np.zeros((1, 5, 4), np.float32), fc.rope_table(4, 8), positions=positions[:5], out=out)


@PAIRINGS
def test_layouts(isa, dtype, rng, interleaved):
    """The transposed view of (batch, heads, seq, head_dim), reversed, thinned, broadcast, unaligned, read-only."""
    x, table = normal(rng, 4, 3, 5, 53, dtype=dtype), any_table(rng, 9, 8)
    before = x.tobytes()
    unaligned = np.frombuffer(b"\0" + x.tobytes(), dtype, offset=1).reshape(x.shape)
    assert not unaligned.flags.aligned and not unaligned.flags.writeable
    turn = {"interleaved": interleaved, "start_pos": 2}
    for whole in (x.transpose(0, 2, 1, 3), x[::-1, ::-1, ::-1], x[::2, 1:, ::-2], x.transpose(2, 1, 0, 3), unaligned,
                  np.broadcast_to(x[:, :, :1], x.shape), np.broadcast_to(x[:1], x.shape), x[..., 0, :]):
        for odd in (whole[..., 3:], whole[..., :16]):
            plain = fc.rope(odd.copy(), table, **turn)
            assert fc.rope(odd, table, **turn).tobytes() == plain.tobytes()
            room = np.full((*odd.shape[:-1], odd.shape[-1] + 5), 7, dtype).swapaxes(0, 1)
            out = room.swapaxes(0, 1)[..., 2:-3]
            assert fc.rope(odd, table, out=out, **turn) is out
            assert out.tobytes() == plain.tobytes() and (room[..., :2] == 7).all() and (room[..., -3:] == 7).all()
    assert x.tobytes() == before


@PAIRINGS
def test_in_place(isa, dtype, rng, interleaved):
    for half in (1, 3, 8, 17, 64):
        for tail in (0, 5):
            x, table = normal(rng, 2, 3, 4, 2 * half + tail, dtype=dtype), any_table(rng, 6, half)
            plain = fc.rope(x, table, start_pos=3, interleaved=interleaved)
            mine = x.copy()
            assert fc.rope(mine, table, start_pos=3, interleaved=interleaved, out=mine) is mine
            assert mine.tobytes() == plain.tobytes()
            swapped = x.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3)
            fc.rope(swapped, table, start_pos=3, interleaved=interleaved, out=swapped)
            assert swapped.tobytes() == plain.tobytes()


@PAIRINGS
def test_specials_touch_only_their_pair(isa, dtype, rng, assert_right, interleaved):
    """NaN, Inf and -Inf in the first lane, the vector loop, the tail of the pairs and the channels beyond them."""
    for half, tail in ((1, 0), (3, 2), (37, 5)):
        table = any_table(rng, 4, half)
        for special in (np.nan, np.inf, -np.inf):
            x = normal(rng, 1, 4, 2, 2 * half + tail, dtype=dtype)
            plain = fc.rope(x, table, interleaved=interleaved)
            places = sorted({0, half // 2, half - 1, half, 2 * half - 1, 2 * half + tail - 1})
            for at in places:
                hit = x.copy()
                hit[0, 1::2, 1, at] = special
                got = fc.rope(hit, table, interleaved=interleaved)
                assert_right(got, hit, table, range(4), interleaved)
                assert np.isfinite(got.astype(np.float32)).sum() >= got.size - 4
                assert got[0, ::2].tobytes() == plain[0, ::2].tobytes()
                assert got[0, :, 0].tobytes() == plain[0, :, 0].tobytes()


@PAIRINGS
def test_huge_and_tiny_numbers(isa, dtype, rng, assert_right, interleaved):
    scales = (40000.0, 1e-6) if dtype == np.float16 else (1e30, 2.4e38, 1e-30, 1e-42)
    for half in (3, 37):
        table = any_table(rng, 4, half)
        for scale in scales:
            x = (rng.uniform(-1, 1, (1, 4, 2, 2 * half + 3)) * scale).astype(dtype)
            assert_right(fc.rope(x, table, interleaved=interleaved), x, table, range(4), interleaved)


def test_empty(isa, dtype):
    table = fc.rope_table(4, 8)
    for shape in ((0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8), (0, 0, 8), (0, 3, 8), (2, 0, 8)):
        for at_end in (False, True):
            x = guarded(shape, dtype, at_end=at_end)
            assert fc.rope(x, table, out=x) is x
            got = fc.rope(x, table, positions=np.zeros(shape[1], np.int64))
            assert got.shape == shape and got.dtype == dtype
    assert fc.rope(np.empty((2, 0, 8), dtype), table, start_pos=8).shape == (2, 0, 8)


@PAIRINGS
def test_a_token_does_not_depend_on_its_batch_or_chunk(isa, dtype, rng, interleaved):
    x, table = normal(rng, 3, 33, 4, 72, dtype=dtype), any_table(rng, 40, 33)
    turn = {"interleaved": interleaved}
    whole = fc.rope(x, table, start_pos=5, **turn)
    for size in (1, 7, 32):
        parts = [fc.rope(x[:, i : i + size], table, start_pos=5 + i, **turn) for i in range(0, 33, size)]
        assert np.concatenate(parts, 1).tobytes() == whole.tobytes()
    for b, h in ((0, 0), (2, 3), (1, 2)):
        alone = fc.rope(x[b : b + 1, :, h : h + 1], table, start_pos=5, **turn)
        assert alone.tobytes() == whole[b : b + 1, :, h : h + 1].tobytes()


@PAIRINGS
@pytest.mark.parametrize("shape", [(2, 300, 4, 66), (1, 3, 50, 258), (33, 20, 130)])
def test_equal_bytes_for_any_thread_count(isa, dtype, rng, each_thread_count, interleaved, shape):
    x, table = normal(rng, *shape, dtype=dtype), any_table(rng, 300, 32)
    positions = rng.integers(0, 300, shape[:2])
    seen = {fc.rope(x, table, interleaved=interleaved).tobytes() for _ in each_thread_count()}
    assert len(seen) == 1
    seen = {fc.rope(x, table, positions=positions, interleaved=interleaved).tobytes() for _ in each_thread_count()}
    assert len(seen) == 1


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.integers(0, 4), seq=st.integers(0, 9), heads=st.integers(0, 4), half=st.integers(1, 70),
       tail=st.integers(0, 40), name=st.sampled_from(list(DTYPES)), interleaved=st.booleans(), swap=st.booleans(),
       given_positions=st.sampled_from(["start", "row", "each"]), seed=st.integers(0, 2**32 - 1))
def test_any_shape(isa, assert_right, batch, seq, heads, half, tail, name, interleaved, swap, given_positions, seed):
    rng = np.random.default_rng(seed)
    table = any_table(rng, seq + 5, half)
    x = normal(rng, batch, seq, heads, 2 * half + tail, dtype=DTYPES[name])
    x = x.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3) if swap else x
    if given_positions == "start":
        positions = np.arange(seq) + 3
        got = fc.rope(x, table, start_pos=3, interleaved=interleaved)
    else:
        positions = rng.integers(0, seq + 5, seq if given_positions == "row" else (batch, seq))
        got = fc.rope(x, table, positions=positions, interleaved=interleaved)
    assert_right(got, x, table, positions, interleaved)
