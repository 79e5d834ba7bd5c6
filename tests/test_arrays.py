"""Odd arrays: each argument of each operation as every kind of array gives the bits of a plain copy, or an error."""

from __future__ import annotations

import array
import os
import tempfile
from collections.abc import Iterator
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from child import run_script
from numpy.typing import NDArray
from op_table import LAYERS, OPS, Arrays, Op, same_bits
from suite import case

import forge_c as fc

pytestmark = pytest.mark.usefixtures("two_threads")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
FAR = 2**32 + 4096  # bytes from row to row: beyond what 32 bits hold, signed or not
ROWS_APART = 80


class Subclass(np.ndarray):
    """A subclass that adds nothing."""


class Interface:
    """Has __array_interface__ and nothing else."""

    def __init__(self, a: NDArray[Any]) -> None:
        self.owner, self.__array_interface__ = a, a.__array_interface__


class Protocol:
    """Has __array__ and nothing else."""

    def __init__(self, a: NDArray[Any]) -> None:
        self.a = a

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self.a


class DLPack:
    """Has __dlpack__ and nothing else."""

    def __init__(self, a: NDArray[Any]) -> None:
        self.a = a

    def __dlpack__(self, **options: Any) -> Any:
        return self.a.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.a.__dlpack_device__()


def _unaligned(a: NDArray[Any]) -> NDArray[Any]:
    raw = np.empty(a.nbytes + 1, np.uint8)
    odd = raw[1:].view(a.dtype).reshape(a.shape)
    odd[...] = a
    assert not odd.flags.aligned or a.dtype.itemsize == 1
    return odd


def _read_only(a: NDArray[Any]) -> NDArray[Any]:
    a = a.copy()
    a.flags.writeable = False
    return a


def _strided(a: NDArray[Any]) -> NDArray[Any]:
    wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
    wide[..., ::2] = a
    return wide[..., ::2]


def _padded(a: NDArray[Any]) -> NDArray[Any]:
    wide = np.zeros((*a.shape[:-1], a.shape[-1] + 3), a.dtype)
    wide[..., 1:-2] = a
    return wide[..., 1:-2]


def _buffer(a: NDArray[Any]) -> memoryview:
    code = {"f": "f", "i": "q"}[a.dtype.kind]
    return memoryview(array.array(code, a.tobytes())).cast("B").cast(code, a.shape)


KINDS = {
    "unaligned": _unaligned,
    "reversed_first": lambda a: a[::-1].copy()[::-1],
    "reversed_last": lambda a: a[..., ::-1].copy()[..., ::-1],
    "strided_last": _strided,
    "padded_rows": _padded,
    "axes_swapped": lambda a: a.swapaxes(0, -2).copy().swapaxes(0, -2),
    "fortran": np.asfortranarray,
    "broadcast_first": lambda a: np.broadcast_to(a[:1], a.shape),
    "broadcast_last": lambda a: np.broadcast_to(a[..., :1].copy(), a.shape),
    "read_only": _read_only,
    "subclass": lambda a: a.view(Subclass),
    "byteswapped": lambda a: a.astype(a.dtype.newbyteorder()),
    "float64": lambda a: a.astype(np.float64),
    "list": lambda a: a.astype(np.float64).tolist() if a.dtype.kind not in "ib" else a.tolist(),
    "memoryview": memoryview,
    "array.array": _buffer,
    "__array_interface__": Interface,
    "__array__": Protocol,
    "__dlpack__": DLPack,
}
OUTER_ONLY = {"reversed_first", "padded_rows", "axes_swapped", "fortran", "broadcast_first", "far"}
PROTOCOLS = {"memoryview", "array.array", "__array_interface__", "__dlpack__"}

NOT_CONTIGUOUS = dict.fromkeys(("reversed_last", "strided_last", "fortran", "broadcast_last"), ValueError)
NOT_FLOATS = dict.fromkeys(("byteswapped", "float64", "list"), TypeError)
REFUSED: dict[str, dict[str, type[Exception]]] = {
    "rows": {**NOT_CONTIGUOUS, **NOT_FLOATS},
    "vector": {**NOT_CONTIGUOUS, **NOT_FLOATS},
    "weight": {**NOT_FLOATS, "reversed_last": ValueError, "strided_last": ValueError},
    "copied": NOT_FLOATS,
    "mask": NOT_FLOATS,
    "asarray": {**NOT_FLOATS, "__dlpack__": TypeError},
    "positions": {"float64": TypeError, "list": TypeError},
    "ids": {"float64": TypeError, "__dlpack__": TypeError},
    "lens": {"float64": ValueError, "__dlpack__": ValueError},
    "layer": {**NOT_CONTIGUOUS, "__dlpack__": TypeError},
    "numpy_layer": {"__dlpack__": TypeError},
}


@pytest.fixture(scope="module")
def far_memory() -> Iterator[NDArray[np.uint8]]:
    """A sparse file of rows FAR bytes apart; a row takes room only when it is written."""
    with tempfile.TemporaryFile() as file:
        os.truncate(file.fileno(), ROWS_APART * FAR)
        yield np.memmap(file, np.uint8, "r+")


def far_apart(memory: NDArray[np.uint8], a: NDArray[Any]) -> NDArray[Any]:
    """`a` with its first axis FAR bytes from one to the next."""
    assert len(a) <= ROWS_APART and a[0].nbytes < FAR
    view = np.ndarray(a.shape, a.dtype, memory, strides=(FAR, *a.strides[1:]))
    view[...] = a
    return view


def applies(kind: str, a: NDArray[Any]) -> bool:
    """Whether this array can be made into an array of this kind that differs from a plain one."""
    if a.ndim == 1 and kind in OUTER_ONLY or a.ndim == 2 and kind == "axes_swapped":
        return False
    if kind == "array.array":
        return a.dtype in (np.float32, np.int64)
    if a.dtype == np.bool_:
        return kind not in ("byteswapped", "unaligned")
    return not (a.dtype == BFLOAT16 and kind in PROTOCOLS)


def values_of(odd: Any, a: NDArray[Any], kind: str, role: str) -> NDArray[Any]:
    """The same numbers as a plain array; layers take other kinds of numbers as float32."""
    if role in ("layer", "numpy_layer") and kind in NOT_FLOATS:
        return a.astype(np.float32)
    return np.array(odd if kind.startswith("broadcast") else a, order="C")


def error_of(kind: str, a: NDArray[Any], role: str) -> type[Exception] | None:
    if kind == "byteswapped" and a.dtype == BFLOAT16 or kind in ("float64", "list") and a.dtype == np.bool_:
        return TypeError
    return REFUSED[role].get(kind)


def fresh_outs(op: Op, arrays: Arrays) -> tuple[NDArray[Any], ...]:
    return tuple(np.full(r.shape, 7, r.dtype) for r in op.run(arrays)[: op.outs])


def out_argument(outs: tuple[NDArray[Any], ...]) -> Any:
    return outs[0] if len(outs) == 1 else outs or None


def check_kind(op: Op, name: str, kind: str, arrays: Arrays, odd: Any) -> None:
    """Run `op` with this argument as `odd`: the bits of the plain copy, or the documented error and nothing written."""
    role = op.args[name].role
    plain = {**arrays, name: values_of(odd, arrays[name], kind, role)}
    before = np.asarray(odd).tobytes() if not isinstance(odd, DLPack) else odd.a.tobytes()
    expected, outs = op.run(plain), fresh_outs(op, plain)
    error = error_of(kind, arrays[name], role)
    if error is None:
        got = op.run({**arrays, name: odd}, out_argument(outs))
        assert same_bits(got, expected), f"{op.name}: {name} {kind} {arrays[name].dtype} gives other bits"
        assert all(g is o for g, o in zip(got, outs, strict=False))
    else:
        with pytest.raises(error) as caught:
            op.run({**arrays, name: odd}, out_argument(outs))
        assert ": " in str(caught.value) and (op.name in LAYERS or name in str(caught.value))
        assert all((o == 7).all() for o in outs), f"{op.name}: a rejected call wrote"
    after = np.asarray(odd).tobytes() if not isinstance(odd, DLPack) else odd.a.tobytes()
    assert after == before, f"{op.name}: {name} was written to"


ARGUMENTS = [pytest.param(op, name, id=f"{op.name}-{name}") for op in (*OPS.values(), *LAYERS.values())
             for name in op.args]


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_every_argument_as_every_kind_of_array(rng, op, name):
    for kind, dtype in product(KINDS, DTYPES):
        arrays = op.make(rng, dtype)
        if applies(kind, arrays[name]):
            with case(kind, dtype):
                check_kind(op, name, kind, arrays, KINDS[kind](arrays[name]))


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_rows_more_than_4_gib_apart(rng, far_memory, op, name):
    arrays = op.make(rng, np.float32)
    if arrays[name].ndim > 1:
        check_kind(op, name, "far", arrays, far_apart(far_memory, arrays[name]))
    assert sum(a.nbytes for a in arrays.values()) < FAR


# ---- out= -------------------------------------------------------------------------------------------

WITH_OUT = [pytest.param(op, id=op.name) for op in OPS.values() if op.outs]
OUT_REFUSED = {**NOT_CONTIGUOUS, **NOT_FLOATS, "broadcast_first": ValueError, "read_only": ValueError,
               "memoryview": TypeError, "array.array": TypeError, "__array_interface__": TypeError,
               "__array__": TypeError, "__dlpack__": TypeError}


def check_out(op: Op, kind: str, which: int, arrays: Arrays, memory: NDArray[np.uint8]) -> None:
    """Run `op` with this out as `kind`: the bits of a plain one, in it, or the documented error and nothing written."""
    expected = op.run(arrays)
    outs: list[Any] = [np.full(e.shape, 7, e.dtype) for e in expected]
    if not applies(kind, outs[which]):
        return
    odd = far_apart(memory, outs[which]) if kind == "far" else KINDS[kind](outs[which])
    outs[which] = odd
    error = OUT_REFUSED.get(kind)
    if op.name == "embedding" and kind in OUTER_ONLY:
        error = ValueError
    if error is None:
        got = op.run(arrays, out_argument(tuple(outs)))
        assert same_bits(got, expected) and got[which] is odd
    else:
        with pytest.raises(error, match=r"^\w+: out"):
            op.run(arrays, out_argument(tuple(outs)))
        for out in outs:
            assert (np.asarray(out.a if isinstance(out, DLPack) else out) == 7).all()


@pytest.mark.parametrize("op", WITH_OUT)
def test_out_as_every_kind_of_array(rng, far_memory, op):
    for kind, dtype, which in product((*KINDS, "far"), DTYPES, range(op.outs)):
        with case(kind, dtype, which):
            check_out(op, kind, which, op.make(rng, dtype), far_memory)
    assert op.outs


def test_only_kinds_that_cannot_be_out_are_refused_by_out():
    assert set(OUT_REFUSED) | {"unaligned", "reversed_first", "padded_rows", "axes_swapped", "subclass"} == set(KINDS)


OUT_AND_ARGUMENT = [pytest.param(op, which, name, id=f"{op.name}-out{which}-{name}") for op in OPS.values()
                    for which in range(op.outs) for name, arg in op.args.items()
                    if arg.role != "asarray" and not arg.below]


@pytest.mark.parametrize(("op", "which", "name"), OUT_AND_ARGUMENT)
@pytest.mark.parametrize("ahead", [False, True], ids=["out_after", "out_before"])
def test_an_out_that_shares_a_little_with_an_argument_is_refused(rng, op, which, name, ahead):
    arrays = op.make(rng, np.float32)
    outs = list(fresh_outs(op, arrays))
    raw, shared, outs[which] = overlapping(arrays[name], outs[which], ahead)
    before = raw.tobytes()
    with pytest.raises(ValueError, match="overlaps"):
        op.run({**arrays, name: shared}, out_argument(tuple(outs)))
    assert raw.tobytes() == before, "a rejected call wrote"


def overlapping(a: NDArray[Any], out: NDArray[Any], ahead: bool) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """(memory, a copy of `a` in it, an array like `out` in it): neighbours that share four bytes."""
    raw = np.zeros(a.nbytes + out.nbytes - 4, np.uint8)
    at, out_at = (out.nbytes - 4, 0) if ahead else (0, a.nbytes - 4)
    shared = raw[at:at + a.nbytes].view(a.dtype).reshape(a.shape)
    shared[...] = a
    return raw, shared, raw[out_at:out_at + out.nbytes].view(out.dtype).reshape(out.shape)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "argument"), [("embedding", "ids"), ("rope", "positions"), ("attention", "kv_lens")])
def test_an_out_over_checked_indices_never_undoes_the_check(name, argument):
    """Refused, or read in time: numbers that the result replaced would index far outside. In a child: it may crash."""
    run_script(f"""
        import numpy as np
        from op_table import OPS, same_bits
        from test_arrays import fresh_outs, overlapping

        op = OPS[{name!r}]
        arrays = op.make(np.random.default_rng(0), np.float32)
        arrays[{argument!r}][...] = 1
        expected = op.run(arrays)
        for ahead in (False, True):
            raw, shared, out = overlapping(arrays[{argument!r}], fresh_outs(op, arrays)[0], ahead)
            before = raw.tobytes()
            try:
                got = op.run({{**arrays, {argument!r}: shared}}, out)
            except ValueError as error:
                assert "overlaps" in str(error) and raw.tobytes() == before
            else:
                assert same_bits(got, expected)
    """)
    assert argument in OPS[name].args


@pytest.mark.parametrize("op", [p for p in WITH_OUT if p.values[0].outs == 2])
def test_two_outs_that_share_are_refused(rng, op):
    arrays = op.make(rng, np.float32)
    first, second = fresh_outs(op, arrays)
    raw = np.full(first.size + second.size - 1, 7, np.float32)
    pair = raw[:first.size].reshape(first.shape), raw[first.size - 1:].reshape(second.shape)
    with pytest.raises(ValueError, match=r"out\[1\] overlaps out\[0\]"):
        op.run(arrays, pair)
    assert (raw == 7).all()


@pytest.mark.parametrize("op", WITH_OUT)
def test_out_may_be_an_argument_only_where_it_says_so(rng, dtype, op):
    arrays = op.make(rng, dtype)
    expected = op.run(arrays)
    for name, a in arrays.items():
        if a.shape != expected[0].shape or a.dtype != expected[0].dtype or op.args[name].role == "asarray":
            continue
        own = a.copy()
        outs = (own, *(np.full(e.shape, 7, e.dtype) for e in expected[1:]))
        if name in op.alias:
            assert same_bits(op.run({**arrays, name: own}, out_argument(outs)), expected)
        else:
            with pytest.raises(ValueError, match=rf"out overlaps {name}; pass an array of its own$"):
                op.run({**arrays, name: own}, out_argument(outs))
            assert own.tobytes() == a.tobytes()
    assert op.alias <= set(arrays)


@pytest.mark.parametrize("op", WITH_OUT)
def test_out_may_lie_between_the_rows_of_an_argument(rng, dtype, op):
    arrays = op.make(rng, dtype)
    expected = op.run(arrays)
    name = next(n for n, arg in op.args.items() if arg.role == "rows")
    a, e = arrays[name], expected[0]
    if a.shape[:-1] == e.shape[:-1] and op.name != "embedding":
        both = np.zeros((*e.shape[:-1], a.shape[-1] + e.shape[-1]), dtype)
        both[..., :a.shape[-1]] = a
        outs = (both[..., a.shape[-1]:], *(np.full(r.shape, 7, r.dtype) for r in expected[1:]))
        assert same_bits(op.run({**arrays, name: both[..., :a.shape[-1]]}, out_argument(outs)), expected)
        assert both[..., :a.shape[-1]].tobytes() == a.tobytes()
    assert np.isfinite(e.astype(np.float32)).all()


# ---- nothing, and a single number -------------------------------------------------------------------

def empty(*shape: int) -> NDArray[np.float32]:
    return np.zeros(shape, np.float32)


def scan(batch: int, seq: int, channels: int, n: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    return fc.selective_scan(*[empty(batch, seq, channels)] * 2, empty(channels, n), *[empty(batch, seq, n)] * 2)


EMPTY = {
    "rms_norm no rows": (lambda: fc.rms_norm(empty(0, 4), empty(4)), (0, 4)),
    "rms_norm no channels": (lambda: fc.rms_norm(empty(2, 0), empty(0)), (2, 0)),
    "layer_norm no rows": (lambda: fc.layer_norm(empty(3, 0, 4), empty(4), empty(4)), (3, 0, 4)),
    "layer_norm no channels": (lambda: fc.layer_norm(empty(2, 0)), (2, 0)),
    "softmax no rows": (lambda: fc.softmax(empty(0, 4)), (0, 4)),
    "softmax no channels": (lambda: fc.softmax(empty(4, 0)), (4, 0)),
    "relu": (lambda: fc.relu(empty(0)), (0,)),
    "silu": (lambda: fc.silu(empty(2, 0, 3)), (2, 0, 3)),
    "gelu": (lambda: fc.gelu(empty(0, 3)), (0, 3)),
    "swiglu": (lambda: fc.swiglu(empty(3, 0), empty(3, 0)), (3, 0)),
    "geglu": (lambda: fc.geglu(empty(0, 3), empty(0, 3)), (0, 3)),
    "rope no tokens": (lambda: fc.rope(empty(1, 0, 2, 4), fc.rope_table(4, 3)), (1, 0, 2, 4)),
    "rope no tokens past the end": (lambda: fc.rope(empty(1, 0, 4), fc.rope_table(4, 3), start_pos=9), (1, 0, 4)),
    "rope no batch": (lambda: fc.rope(empty(0, 2, 4), fc.rope_table(4, 3)), (0, 2, 4)),
    "linear no rows": (lambda: fc.linear(empty(0, 3), empty(3, 2)), (0, 2)),
    "linear no columns": (lambda: fc.linear(empty(2, 3), empty(3, 0)), (2, 0)),
    "linear no columns packed": (lambda: fc.linear(empty(2, 3), fc.pack(empty(3, 0))), (2, 0)),
    "linear no inputs": (lambda: fc.linear(empty(2, 0), empty(0, 3)), (2, 3)),
    "linear no inputs packed": (lambda: fc.linear(empty(5, 0), fc.pack(empty(0, 3), "bfloat16")), (5, 3)),
    "gated_linear no rows": (lambda: fc.gated_linear(empty(0, 3), fc.pack_gated(empty(3, 2), empty(3, 2))), (0, 2)),
    "gated_linear no inputs": (lambda: fc.gated_linear(empty(2, 0), fc.pack_gated(empty(0, 3), empty(0, 3))), (2, 3)),
    "embedding no ids": (lambda: fc.embedding(np.zeros((2, 0), int), empty(3, 4)), (2, 0, 4)),
    "embedding of an empty list": (lambda: fc.embedding([], empty(3, 4)), (0, 4)),
    "embedding no channels": (lambda: fc.embedding([1], empty(3, 0)), (1, 0)),
    "attention no queries": (lambda: fc.attention(empty(1, 0, 4, 8), empty(1, 5, 2, 8), empty(1, 5, 2, 8)),
                             (1, 0, 4, 8)),
    "attention no keys": (lambda: fc.attention(empty(1, 2, 4, 8), empty(1, 0, 2, 8), empty(1, 0, 2, 8)), (1, 2, 4, 8)),
    "attention no batch": (lambda: fc.attention(empty(0, 2, 4, 8), empty(0, 5, 2, 8), empty(0, 5, 2, 8)), (0, 2, 4, 8)),
    "attention no channels": (lambda: fc.attention(empty(1, 2, 4, 0), empty(1, 5, 2, 0), empty(1, 5, 2, 3)),
                              (1, 2, 4, 3)),
    "attention no values": (lambda: fc.attention(empty(1, 2, 4, 8), empty(1, 5, 2, 8), empty(1, 5, 2, 0)),
                            (1, 2, 4, 0)),
    "attention no values of a batch of 2^40": (
        lambda: fc.attention(np.broadcast_to(empty(1, 1, 1, 0), (2**40, 1, 1, 0)), *[empty(2**40, 3, 1, 0)] * 2),
        (2**40, 1, 1, 0)),
    "pack no inputs and 2^40 columns": (lambda: fc.pack(empty(0, 2**40)).data, (2**36, 0)),
    "merge_attention no rows": (lambda: fc.merge_attention(empty(0, 4), empty(0), empty(0, 4), empty(0))[0], (0, 4)),
    "merge_attention no channels": (lambda: fc.merge_attention(empty(2, 0), empty(2), empty(2, 0), empty(2))[0],
                                    (2, 0)),
    "ssd_scan no tokens": (
        lambda: fc.ssd_scan(empty(1, 0, 4, 3), empty(1, 0, 4), empty(4), *[empty(1, 0, 2, 5)] * 2)[0], (1, 0, 4, 3)),
    "ssd_scan no tokens, the state": (
        lambda: fc.ssd_scan(empty(1, 0, 4, 3), empty(1, 0, 4), empty(4), *[empty(1, 0, 2, 5)] * 2)[1], (1, 4, 3, 5)),
    "ssd_scan no heads": (lambda: fc.ssd_scan(empty(1, 2, 0, 3), empty(1, 2, 0), empty(0), *[empty(1, 2, 2, 5)] * 2)[0],
                          (1, 2, 0, 3)),
    "ssd_scan nothing for 2^40 rows": (
        lambda: fc.ssd_scan(empty(2**40, 0, 1, 1), empty(2**40, 0, 1), empty(1), *[empty(2**40, 0, 1, 0)] * 2)[1],
        (2**40, 1, 1, 0)),
    "gated_delta no tokens": (lambda: fc.gated_delta(*[empty(1, 0, 2, 3)] * 2, empty(1, 0, 4, 5), rule="linear")[1],
                              (1, 4, 3, 5)),
    "gated_delta no rows": (lambda: fc.gated_delta(*[empty(1, 2, 4, 0)] * 2, empty(1, 2, 4, 5), rule="linear")[0],
                            (1, 2, 4, 5)),
    "s4d_scan no tokens": (lambda: fc.s4d_scan(empty(1, 0, 2), *[np.zeros((2, 3), np.complex64)] * 3, empty(2))[1],
                           (1, 2, 3)),
    "s4d_scan no channels": (lambda: fc.s4d_scan(empty(1, 2, 0), *[np.zeros((0, 3), np.complex64)] * 3, empty(0))[0],
                             (1, 2, 0)),
    "s4d_kernel no taps": (lambda: fc.s4d_kernel(*[np.zeros((2, 3), np.complex64)] * 3, empty(2), 0), (2, 0)),
    "causal_conv1d no tokens": (lambda: fc.causal_conv1d(empty(2, 0, 3), empty(3, 4))[0], (2, 0, 3)),
    "causal_conv1d no tokens, its state": (lambda: fc.causal_conv1d(empty(2, 0, 3), empty(3, 4))[1], (2, 3, 3)),
    "causal_conv1d no batch": (lambda: fc.causal_conv1d(empty(0, 2, 3), empty(3, 4))[1], (0, 3, 3)),
    "causal_conv1d no channels": (lambda: fc.causal_conv1d(empty(1, 2, 0), empty(0, 4))[0], (1, 2, 0)),
    "selective_scan no tokens": (lambda: scan(2, 0, 3, 4)[0], (2, 0, 3)),
    "selective_scan no tokens, its state": (lambda: scan(2, 0, 3, 4)[1], (2, 3, 4)),
    "selective_scan no batch": (lambda: scan(0, 2, 3, 4)[1], (0, 3, 4)),
    "selective_scan no channels": (lambda: scan(1, 2, 0, 4)[0], (1, 2, 0)),
    "selective_scan no states": (lambda: scan(1, 2, 3, 0)[0], (1, 2, 3)),
    "rg_lru no tokens": (lambda: fc.rg_lru(*[empty(2, 0, 3)] * 3, empty(3))[0], (2, 0, 3)),
    "rg_lru no tokens, its state": (lambda: fc.rg_lru(*[empty(2, 0, 3)] * 3, empty(3))[1], (2, 3)),
    "rg_lru no batch": (lambda: fc.rg_lru(*[empty(0, 2, 3)] * 3, empty(3))[1], (0, 3)),
    "rg_lru no channels": (lambda: fc.rg_lru(*[empty(1, 2, 0)] * 3, empty(0))[0], (1, 2, 0)),
    "a single number": (lambda: fc.relu(np.array(3.0, np.float32)), ()),
    "two single numbers": (lambda: fc.swiglu(np.float32(0), np.float32(1)), ()),
    "embedding of a single id": (lambda: fc.embedding(np.array(2), empty(3, 4)), (4,)),
}


@pytest.mark.parametrize("case", EMPTY)
def test_nothing_gives_nothing_of_the_right_shape(case):
    call, shape = EMPTY[case]
    result = call()
    assert result.shape == shape
    expected = 3.0 if case == "a single number" else 0.0
    assert (result == expected).all()


def test_nothing_to_add_still_adds_the_bias_and_the_residual():
    bias, residual = np.arange(3, dtype=np.float32), np.full((2, 3), 10, np.float32)
    for weight in (empty(0, 3), fc.pack(empty(0, 3)), fc.pack(empty(0, 3), "bfloat16")):
        np.testing.assert_array_equal(fc.linear(empty(2, 0), weight, bias, residual=residual), bias + residual)


def test_no_keys_give_zero_and_an_lse_of_minus_infinity():
    out, lse = fc.attention(np.ones((1, 2, 4, 8), np.float32), empty(1, 0, 2, 8), empty(1, 0, 2, 8), return_lse=True)
    assert not out.any() and (lse == -np.inf).all()


# ---- more than 2^31 of anything ---------------------------------------------------------------------

def test_more_than_2_31_logical_numbers(far_memory):
    """A table whose last row begins 2^33 numbers after its first, and a product over a row that far away."""
    table = np.ndarray((2**31 // 8960 + 2, 8960), np.float16, far_memory)
    last = len(table) - 1
    table[last], table[0] = np.arange(8960) % 64, 1
    assert table.size > 2**31
    np.testing.assert_array_equal(fc.embedding([last, 0, last], table), table[[last, 0, last]])
    column = np.ndarray((8, 3), np.float32, far_memory, strides=(4, FAR))
    column[...] = np.arange(24).reshape(8, 3)
    x = np.eye(8, dtype=np.float32)
    np.testing.assert_array_equal(fc.linear(x, column), column)


def test_a_broadcast_of_more_than_2_31_rows_is_refused_or_served_from_one():
    one = np.arange(8, dtype=np.float32)
    many = np.broadcast_to(one, (2**31 + 5, 8))
    with pytest.raises(ValueError, match="out has shape"):
        fc.rms_norm(many, out=np.zeros((5, 8), np.float32))
    np.testing.assert_array_equal(fc.embedding([2**31 + 4, 0], many), [one, one])
