"""embedding against its formula: every length and pair of dtypes, edge of memory, layouts, and ids from outside."""

from __future__ import annotations

import ggml_blocks as blocks
import numpy as np
import pytest
import reference as ref
from conftest import DTYPES
from guard import guarded, guarded_copy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import forge_c as fc
from forge_c import PackedWeight, pack, pack_gated
from forge_c.formats.blocks import DTYPE_OF
from forge_c.packing import pack_blocks

LENGTHS = (*range(1, 67), 127, 128, 129, 511, 512, 513, 767, 768, 1024, 1025, 4096, 4099)
INTEGERS = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64)


def normal(rng, *shape, dtype):
    return rng.standard_normal(shape, np.float32).astype(dtype)


def test_every_length_between_guard_pages(isa, dtype, rng, assert_close):
    """The first and the last row, in memory where nothing before or after them may be read."""
    ids = np.array([0, 2, 1, 2], np.int64)
    for n in LENGTHS:
        table = normal(rng, 3, n, dtype=dtype)
        for out_dtype in DTYPES.values():
            results = []
            for at_end in (False, True):
                out = guarded((4, n), out_dtype, at_end=at_end)
                inside, which = guarded_copy(table, at_end=at_end), guarded_copy(ids, at_end=at_end)
                assert fc.embedding(which, inside, scale=1.5, dtype=out_dtype, out=out) is out
                assert inside.tobytes() == table.tobytes()
                results.append(out.tobytes())
            assert results[0] == results[1]
            assert_close("embedding", out, ref.embedding(ids, table, scale=1.5))


def test_without_a_scale_the_rows_are_copied_bit_for_bit(isa, dtype, rng):
    table, ids = normal(rng, 50, 37, dtype=dtype), rng.integers(0, 50, (3, 7))
    got = fc.embedding(ids, table)
    assert got.dtype == dtype and got.tobytes() == table[ids].tobytes()
    if dtype != np.float32:
        every = np.arange(2**16, dtype=np.uint16).view(dtype).reshape(256, 256)
        got, number = fc.embedding(np.arange(256), every), ~np.isnan(every.astype(np.float32))
        assert got[number].tobytes() == every[number].tobytes()
        assert np.isnan(got[~number].astype(np.float32)).all()
        wide = fc.embedding(np.arange(256), every, dtype=np.float32)
        assert wide[number].tobytes() == every[number].astype(np.float32).tobytes()


def test_every_pair_of_dtypes_rounds_once(isa, rng, assert_close):
    """bfloat16 holds numbers that float16 cannot: those become infinite, subnormal or zero."""
    for source in DTYPES.values():
        with np.errstate(over="ignore"):
            table = (rng.standard_normal((20, 130)) * 2.0 ** rng.integers(-30, 20, (20, 130))).astype(source)
        for target in DTYPES.values():
            ids = rng.integers(0, 20, 9)
            got = fc.embedding(ids, table, dtype=target)
            assert_close("embedding", got, ref.embedding(ids, table))
            with np.errstate(over="ignore"):
                assert got.tobytes() == table[ids].astype(np.float32).astype(target).tobytes()


@pytest.mark.parametrize("scale", [0.0, -2.0, 45.25, 2.0**-20, float(np.float32(0.1))])
def test_scale(isa, dtype, rng, assert_close, scale):
    table, ids = normal(rng, 9, 37, dtype=dtype), rng.integers(0, 9, 5)
    assert_close("embedding", fc.embedding(ids, table, scale=scale), ref.embedding(ids, table, scale=scale))


def test_specials_and_extremes_are_copied(isa, dtype):
    largest, smallest = ({"float32": (3.4028235e38, 2.0**-149), "float16": (65504.0, 2.0**-24),
                          "bfloat16": (3.3895e38, 2.0**-133)})[dtype.name]
    row = np.resize(np.array([np.nan, np.inf, -np.inf, largest, -largest, smallest, -smallest, 0.0, -0.0]), 37)
    table = np.stack([np.ones(37), row, row[::-1]]).astype(dtype)
    got = fc.embedding([1, 2, 0], table).astype(np.float64)
    np.testing.assert_array_equal(got, table.astype(np.float64)[[1, 2, 0]])
    assert (np.signbit(got) == np.signbit(table.astype(np.float64)[[1, 2, 0]]))[~np.isnan(got)].all()


def test_ids_of_every_integer_type_and_layout(isa, rng):
    table = normal(rng, 100, 5, dtype=np.float32)
    ids = rng.integers(0, 100, (4, 6))
    want = table[ids]
    for kind in INTEGERS:
        assert (fc.embedding(ids.astype(kind), table) == want).all()
    for odd, expected in ((ids[::-1, ::-2], want[::-1, ::-2]), (ids.T, want.swapaxes(0, 1)), (ids[2, 3], want[2, 3]),
                          (np.broadcast_to(ids[:1], ids.shape), np.broadcast_to(want[:1], want.shape)),
                          (ids.astype(">i4"), want), (ids.tolist(), want), (7, table[7]), (np.int32(7), table[7])):
        got = fc.embedding(odd, table)
        assert got.shape == expected.shape and (got == expected).all()
    unaligned = np.frombuffer(b"\0" + ids.tobytes(), np.int64, offset=1).reshape(ids.shape)
    assert not unaligned.flags.aligned and (fc.embedding(unaligned, table) == want).all()


def test_layouts_of_the_table(isa, dtype, rng):
    table, ids = normal(rng, 9, 53, dtype=dtype), np.array([[8, 0, 3], [3, 1, 8]])
    before = table.tobytes()
    unaligned = np.frombuffer(b"\0" + table.tobytes(), dtype, offset=1).reshape(table.shape)
    assert not unaligned.flags.aligned and not unaligned.flags.writeable
    for whole in (table, table[::-1], np.broadcast_to(table[:1], table.shape), unaligned):
        for odd in (whole, whole[:, 3:], whole[:, :50]):
            assert fc.embedding(ids, odd, scale=0.5).tobytes() == fc.embedding(ids, odd.copy(), scale=0.5).tobytes()
    assert fc.embedding(ids // 2, table[::-2]).tobytes() == table[::-2][ids // 2].tobytes()
    assert table.tobytes() == before


def test_out(isa, dtype, rng):
    table, ids = normal(rng, 9, 37, dtype=dtype), rng.integers(0, 9, (2, 3))
    room = np.full((4, 3, 37), 7, dtype)
    assert fc.embedding(ids, table, out=room[1:3]).base is room
    assert (room[1:3] == table[ids]).all() and (room[0] == 7).all() and (room[3] == 7).all()
    wide = np.empty((2, 3, 37), np.float32)
    fc.embedding(ids, table, dtype=np.float32, out=wide)
    assert (wide == table[ids].astype(np.float32)).all()


@pytest.mark.parametrize("wrong", [-1, -9, 9, 10, 2**31, 2**32, 2**62, -(2**63), 2**63 - 1, 2**63, 2**64 - 1])
def test_an_id_outside_the_table_is_an_error_and_writes_nothing(isa, wrong):
    """Also an id that a 32-bit index, or NumPy's counting from the end, would take for a row."""
    table = np.ones((9, 5), np.float32)
    for at in (0, 7, 19):
        ids = np.zeros(20, np.uint64 if wrong >= 2**63 else np.int64)
        ids[at] = wrong
        out = np.full((4, 5, 5), 7, np.float32)
        with pytest.raises(IndexError, match="embedding: id .* is outside the table of 9 rows"):
            fc.embedding(ids.reshape(4, 5), table, out=out)
        assert (out == 7).all()
    with pytest.raises(IndexError):
        fc.embedding([0], table[:0])


def test_what_is_refused_writes_nothing():
    table, ids = np.ones((9, 8), np.float32), np.zeros((2, 3), np.int64)
    out = np.full((2, 3, 8), 7, np.float32)
    locked = out.copy()
    locked.flags.writeable = False
    for error, i, t, kwargs in (
        (TypeError, ids.astype(np.float32), table, {"out": out}),
        (TypeError, ids.astype(bool), table, {"out": out}),
        (TypeError, ["a"], table, {}),
        (TypeError, ids, table.astype(np.float64), {"out": out}),
        (TypeError, ids, table, {"dtype": np.float64}),
        (TypeError, ids, table, {"dtype": np.float16, "out": out}),
        (ValueError, ids, table[0], {"out": out}),
        (ValueError, ids, table.reshape(9, 2, 4), {"out": out}),
        (ValueError, ids, np.ones((8, 9), np.float32).T, {"out": out}),
        (ValueError, ids[:1], table, {"out": out}),
        (ValueError, ids, table[:, :7], {"out": out}),
        (ValueError, ids, table, {"out": locked}),
        (ValueError, ids, table, {"out": np.full((3, 2, 8), 7, np.float32).swapaxes(0, 1)}),
    ):
        with pytest.raises(error, match="embedding: "):
            fc.embedding(i, t, **kwargs)
        assert (out == 7).all()


def test_out_shares_no_memory_with_the_table():
    memory = np.arange(40, dtype=np.float32)
    with pytest.raises(ValueError, match="overlaps table"):
        fc.embedding([0, 1], memory[:24].reshape(3, 8), out=memory[16:32].reshape(2, 8))
    assert (memory == np.arange(40)).all()


def test_out_shares_no_memory_with_the_ids():
    """Rows written over ids that are still to be read would make them point anywhere; here all of it is zero."""
    ids = np.zeros(16, np.int64)
    out = ids.view(np.float32)[:16].reshape(4, 4)
    with pytest.raises(ValueError, match="overlaps ids"):
        fc.embedding(ids[:4], np.zeros((3, 4), np.float32), out=out)


def test_empty(isa, dtype):
    for ids_shape, table_shape in (((0,), (3, 5)), ((2, 0), (3, 5)), ((0,), (0, 5)), ((3,), (2, 0)), ((), (2, 0))):
        for at_end in (False, True):
            table = guarded(table_shape, dtype, at_end=at_end)
            got = fc.embedding(np.zeros(ids_shape, np.int64), table)
            assert got.shape == (*ids_shape, table_shape[1]) and got.dtype == dtype
    assert fc.embedding([], np.ones((3, 5), dtype)).shape == (0, 5)


def test_a_table_of_more_than_two_to_the_31_numbers(isa, tmp_path):
    """A sparse file: only the rows that are written take room. Element numbers do not fit in 32 bits."""
    rows, dim = 2**32 // 8960 + 2, 8960
    table = np.memmap(tmp_path / "table", np.float16, "w+", shape=(rows, dim))
    table[0], table[rows // 2 + 1], table[rows - 1] = 1, 2, 3
    assert table.size > 2**32
    got = fc.embedding([rows - 1, 0, rows // 2 + 1, rows - 2], table, dtype=np.float32)
    assert (got == np.array([3, 1, 2, 0])[:, None]).all()


def test_a_row_does_not_depend_on_its_batch(isa, dtype, rng):
    table, ids = normal(rng, 50, 145, dtype=dtype), rng.integers(0, 50, 30)
    for target in DTYPES.values():
        whole = fc.embedding(ids, table, scale=1.7, dtype=target)
        for i in (0, 7, 29):
            assert fc.embedding(ids[i], table, scale=1.7, dtype=target).tobytes() == whole[i].tobytes()


def test_equal_bytes_for_any_thread_count(isa, dtype, rng, each_thread_count):
    for count, dim in ((2000, 130), (5, 40003)):
        table, ids = normal(rng, 50, dim, dtype=dtype), rng.integers(0, 50, count)
        assert len({fc.embedding(ids, table, scale=1.7).tobytes() for _ in each_thread_count()}) == 1


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.lists(st.integers(0, 6), max_size=4), rows=st.integers(1, 40), dim=st.integers(0, 1100),
       source=st.sampled_from(list(DTYPES)), target=st.sampled_from(list(DTYPES)), power=st.integers(-20, 12),
       seed=st.integers(0, 2**32 - 1))
def test_any_shape(isa, assert_close, shape, rows, dim, source, target, power, seed):
    rng = np.random.default_rng(seed)
    table, ids = rng.uniform(-1, 1, (rows, dim)).astype(DTYPES[source]), rng.integers(0, rows, shape)
    got = fc.embedding(ids, table, scale=2.0**power, dtype=DTYPES[target])
    assert_close("embedding", got, ref.embedding(ids, table, scale=2.0**power))


# ---- of a packed matrix ----------------------------------------------------------------------------------------------

PACKED = [("float32", None), ("bfloat16", None), ("int8", None), ("int8", 32), ("int8", 8192), ("int4", 32),
          ("int4", None), ("int4", 192), *((name, None) for name in DTYPE_OF if name not in ("Q4_0",))]


def packed_table(rng, name, group, k, n):
    """A PackedWeight of about (k, n)."""
    if name in DTYPE_OF:
        weights = blocks.TYPES[name].weights
        return pack_blocks(name, blocks.random_blocks(rng, name, n, -(-k // weights) * weights))
    return pack(normal(rng, k, n, dtype=np.float32), name, group_size=group)


@pytest.mark.parametrize(("name", "group"), PACKED)
def test_rows_of_a_packed_matrix_are_those_of_what_it_unpacks_to(isa, rng, name, group, each_thread_count):
    for k, n in ((1, 1), (133, 37), (1030, 16)):
        table, ids = packed_table(rng, name, group, k, n), rng.integers(0, n, (3, 5))
        rows = table.unpack().T
        assert fc.embedding(ids, table).tobytes() == rows[ids].tobytes()
        for target in DTYPES.values():
            scaled = (rows[ids] * np.float32(45.25)).astype(target)
            results = {fc.embedding(ids, table, scale=45.25, dtype=target).tobytes() for _ in each_thread_count()}
            assert results == {scaled.tobytes()}


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(("name", "group"), PACKED)
def test_no_byte_beyond_a_packed_matrix_is_read(isa, rng, name, group, at_end):
    made = packed_table(rng, name, group, 133, 37)
    table = PackedWeight(guarded_copy(made.data, at_end=at_end), made.shape, made.dtype, False, made.group_size)
    ids = np.array([0, 36, 15, 16])
    out = guarded_copy(np.zeros((4, made.shape[0]), np.float32), at_end=at_end)
    fc.embedding(ids, table, out=out)
    assert out.tobytes() == made.unpack().T[ids].tobytes()


def test_what_a_packed_table_refuses(rng):
    w = normal(rng, 40, 20, dtype=np.float32)
    with pytest.raises(TypeError, match="^embedding: table is a pair from pack_gated, expected one matrix"):
        fc.embedding([0], pack_gated(w, w))
    for ids in ([20], [-1]):
        with pytest.raises(IndexError, match=r"^embedding: id .* is outside the table of 20 rows"):
            fc.embedding(ids, pack(w, "int8"))
    with pytest.raises(ValueError, match=r"^embedding: out has shape \(1, 20\), expected \(1, 40\)"):
        fc.embedding([0], pack(w), out=np.zeros((1, 20), np.float32))
    assert fc.embedding(np.zeros((0, 3), int), pack(w)).shape == (0, 3, 40)
