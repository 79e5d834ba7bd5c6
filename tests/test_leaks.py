"""Memory and references: thousands of calls leave nothing behind, whether they succeed or fail."""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from op_table import LAYERS, OPS

import forge_c as fc
from forge_c import nn

pytestmark = pytest.mark.slow

CALLS = 20_000
ALLOWED = 2 << 20
PR_SET_THP_DISABLE = 41
F32 = np.float32


@pytest.fixture(autouse=True)
def no_huge_pages() -> Iterator[None]:
    """The kernel may fill holes in the heap to make huge pages of them, 2 MB at a time and whenever it likes."""
    LIBC.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    yield
    LIBC.prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0)


@pytest.fixture(autouse=True)
def nothing_old_to_collect() -> None:
    """What pytest keeps of ten thousand tests makes each of many collections last 0.15 s."""
    gc.collect()
    gc.freeze()


def resident() -> int:
    """Bytes of the process's own, swapped out ones too: pages of files come and go as the system likes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "VmSwap"))


def growth(call: Callable[[], Any], calls: int = CALLS) -> int:
    """Bytes by which the process grows over `calls` calls, after some to warm up; the median of three times, for a leak
    grows every time and the allocator's own needs do not."""
    for _ in range(200):
        call()
    return median(grown_once(call, calls) for _ in range(3))


def grown_once(call: Callable[[], Any], calls: int) -> int:
    gc.collect()
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)  # or what earlier tests have freed would hide a leak
    before = resident()
    for _ in range(calls):
        call()
    gc.collect()
    return resident() - before


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split())]


LIBC = ctypes.CDLL(None)
if hasattr(LIBC, "mallinfo2"):
    LIBC.mallinfo2.restype = _Mallinfo


def held() -> tuple[int, int]:
    """(bytes that malloc has given out, where the C library tells; Python objects alive)."""
    info = LIBC.mallinfo2() if hasattr(LIBC, "mallinfo2") else _Mallinfo()
    return info.uordblks + info.hblkhd, sys.getallocatedblocks()


def piled_up(call: Callable[[], Any], calls: int) -> tuple[int, int]:
    """By how much held() grows over `calls` calls, after some to warm up: the median of five times. A leak leaks each
    time; now and then pytest-xdist's thread meanwhile hears which tests come to this process or are taken from it, and
    makes or frees hundreds of objects."""
    for _ in range(calls // 4):
        call()
    grown = []
    for _ in range(5):
        gc.collect()
        before = held()
        for _ in range(calls):
            call()
        gc.collect()
        grown.append([after - then for after, then in zip(held(), before, strict=True)])
    nbytes, objects = map(median, zip(*grown, strict=True))
    return nbytes, objects


def z(*shape: int) -> np.ndarray:
    return np.zeros(shape, F32)


INT8, INT4 = fc.pack(np.zeros((4, 3), F32), "int8"), fc.pack(np.zeros((4, 3), F32), "int4")
COLUMN, TABLE, PACKED = np.zeros((40, 3), F32)[:, 1:2], fc.rope_table(4, 8), fc.pack(z(4, 3))
KV = z(1, 3, 2, 4)
ODD = {
    "no columns": lambda: (fc.rms_norm(z(2, 0)), fc.softmax(z(2, 0)), fc.relu(z(2, 0))),
    "no rows": lambda: (fc.rms_norm(z(0, 2), z(2)), fc.layer_norm(z(0, 2)), fc.silu(z(0, 2))),
    "one strided column": lambda: (fc.rms_norm(COLUMN), fc.relu(COLUMN), fc.softmax(COLUMN[:, None])),
    "empty slices": lambda: (fc.swiglu(COLUMN[:0], COLUMN[:0]), fc.gelu(COLUMN[5:5]), fc.relu(COLUMN[:, :0])),
    "embedding": lambda: (fc.embedding([], COLUMN), fc.embedding([[1]], COLUMN), fc.embedding([0], z(2, 0))),
    "linear": lambda: (fc.linear(z(2, 0), z(0, 3)), fc.linear(z(0, 4), PACKED), fc.linear(z(1, 4), PACKED)),
    "integers": lambda: (fc.linear(z(0, 4), INT8), fc.linear(z(1, 4), INT8), fc.linear(z(7, 4), INT4)),
    "rope": lambda: (fc.rope(z(1, 0, 4), TABLE), fc.rope(z(1, 2, 4), TABLE, positions=np.array([1, 0]))),
    "attention": lambda: (fc.attention(z(1, 1, 2, 4), z(1, 0, 2, 4), z(1, 0, 2, 4)),
                          fc.attention(z(1, 0, 2, 4), KV, KV, return_lse=True),
                          fc.attention(z(1, 2, 2, 4), KV, KV, mask=np.ones(3, bool), kv_lens=[] or np.array([2]))),
    "merge": lambda: fc.merge_attention(z(2, 0), z(2), z(2, 0), z(2)),
    "states": lambda: (fc.ssd_scan(z(1, 0, 2, 4), z(1, 0, 2), z(2), z(1, 0, 1, 3), z(1, 0, 1, 3)),
                       fc.gated_delta(KV, KV, KV, rule="linear", out=(None, z(1, 2, 4, 4)))),
    "scans": lambda: (fc.causal_conv1d(z(1, 0, 3), z(3, 4)), fc.causal_conv1d(z(1, 2, 3), z(3, 1)),
                      fc.selective_scan(z(1, 0, 3), z(1, 0, 3), z(3, 2), z(1, 0, 2), z(1, 0, 2), state=z(1, 3, 2)),
                      fc.rg_lru(z(1, 0, 3), z(1, 0, 3), z(1, 0, 3), z(3)),
                      fc.rg_lru(z(1, 2, 3), z(1, 2, 3), z(1, 2, 3), z(3), reset=np.ones((1, 2), bool))),
    "buffers": lambda: (fc.relu(memoryview(z(2, 3))), fc.relu(memoryview(bytearray(12)).cast("f"))),
}


def failing(call: Callable[[], Any], error: type[Exception]) -> Callable[[], None]:
    def run() -> None:
        try:
            call()
        except error:
            return
        raise AssertionError("the call did not fail")
    return run


SMALL = fc.KVCache(1, 3, 2, 4)
SMALL.append(KV, KV)
WRONG = {
    "dtype": failing(lambda: fc.rms_norm(np.zeros((2, 3))), TypeError),
    "shape": failing(lambda: fc.rms_norm(z(2, 3), z(4)), ValueError),
    "stride": failing(lambda: fc.silu(z(3, 2).T), ValueError),
    "list": failing(lambda: fc.relu([1.0]), TypeError),
    "buffer": failing(lambda: fc.relu(bytearray(12)), TypeError),
    "overlap": failing(lambda: fc.softmax((s := z(9))[:5], out=s[1:6]), ValueError),
    "read-only out": failing(lambda: fc.relu(z(3), out=np.broadcast_to(F32(1), 3)), ValueError),
    "pair of outs": failing(lambda: fc.layer_norm(z(3), residual=z(3), out=(z(3), z(2))), ValueError),
    "position": failing(lambda: fc.rope(z(1, 2, 4), TABLE, positions=np.array([0, 8])), IndexError),
    "id": failing(lambda: fc.embedding([[0], [40]], COLUMN), IndexError),
    "weight": failing(lambda: fc.linear(z(2, 5), PACKED), ValueError),
    "residual": failing(lambda: fc.linear(z(2, 4), PACKED, z(3), residual=z(2, 4)), ValueError),
    "keys": failing(lambda: fc.attention(z(1, 1, 2, 4), KV, z(1, 3, 1, 4)), ValueError),
    "mask": failing(lambda: fc.attention(z(1, 1, 2, 4), KV, KV, mask=np.ones(4, bool)), ValueError),
    "cache full": failing(lambda: SMALL.append(KV, KV), ValueError),
    "cache made": failing(lambda: fc.KVCache(1, 8, 2, 4, dtype="int3"), ValueError),
    "pack": failing(lambda: fc.pack(z(4)), ValueError),
    "pack int4": failing(lambda: fc.pack(z(4, 4) + F32(np.nan), "int4"), ValueError),
    "width": failing(lambda: fc.causal_conv1d(z(1, 2, 3), z(3, 0)), ValueError),
    "state": failing(lambda: fc.causal_conv1d(z(1, 2, 3), z(3, 4), state=z(1, 4, 3)), ValueError),
    "reset": failing(lambda: fc.rg_lru(z(1, 2, 3), z(1, 2, 3), z(1, 2, 3), z(3), reset=z(1, 2)), TypeError),
    "group": failing(lambda: fc.pack(z(4, 4), "int8", group_size=7), ValueError),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes_do_not_leak(name):
    assert growth(ODD[name]) < ALLOWED


@pytest.mark.parametrize("name", WRONG)
def test_errors_do_not_leak(name):
    assert growth(WRONG[name], CALLS // 4) < ALLOWED / 4


@pytest.mark.parametrize("name", [*ODD, *WRONG])
def test_nothing_piles_up_in_any_heap(name):
    """One byte or one object per call would show."""
    nbytes, objects = piled_up({**ODD, **WRONG}[name], 1000)
    assert nbytes < 1000 and objects < 100


def test_scratch_is_given_back(rng):
    """Calls that allocate megabytes inside; a single one kept would show."""
    ops = [(OPS[name], OPS[name].make(rng, big=True)) for name in (
        "linear", "linear_packed_bf16", "linear_packed_int8", "gated_linear_int4", "attention", "attention_decode")]
    assert piled_up(lambda: [op.run(arrays) for op, arrays in ops], 12)[0] < 1000


def test_caches_and_packed_weights_are_given_back():
    def call() -> None:
        cache = fc.KVCache(1, 512, 4, 64)
        cache.append(np.ones((1, 300, 4, 64), F32), np.ones((1, 300, 4, 64), F32))
        fc.attention(np.ones((1, 1, 8, 64), F32), cache.copy())
        fc.pack(np.ones((256, 256), F32))
        for dtype in ("bfloat16", "int8", "int4"):
            nn.SwiGLU(32, 64, seed=0).astype(dtype)

    assert piled_up(call, 20)[0] < 1000


def test_negative_control_leaks_are_noticed():
    kept: list[Any] = []
    # Mapped apart: the heap of a long process may have room, in memory, for whatever is kept.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

    def leak() -> None:
        kept.append(mmap.mmap(-1, 1 << 14, flags=private))
        kept[-1][:] = b"x" * (1 << 14)

    assert growth(leak, 500) > ALLOWED
    assert piled_up(lambda: kept.append(object()), 1000)[1] >= 1000
    LIBC.malloc.restype = ctypes.c_void_p
    assert piled_up(lambda: LIBC.malloc(1), 1000)[0] >= 16_000 or not hasattr(LIBC, "mallinfo2")


# ---- references -------------------------------------------------------------------------------------

CASES = [pytest.param(op, id=op.name) for op in (*OPS.values(), *LAYERS.values())]


def references(arrays: dict[str, Any]) -> list[int]:
    return [sys.getrefcount(a) for a in arrays.values()]


@pytest.mark.parametrize("op", CASES)
def test_a_call_keeps_no_reference_to_its_arguments(rng, op):
    for dtype in ("float32", "bfloat16"):
        arrays = op.make(rng, dtype)
        outs = tuple(np.empty(r.shape, r.dtype) for r in op.run(arrays)[: op.outs])
        out = outs[0] if len(outs) == 1 else outs or None
        before, outs_before = references(arrays), [sys.getrefcount(o) for o in outs]
        for _ in range(10):
            result = op.run(arrays, out)
        assert len(result) >= 1
        del result
        assert references(arrays) == before
        assert [sys.getrefcount(o) for o in outs] == outs_before
        dead = [weakref.ref(a) for a in arrays.values()]
        arrays.clear()
        assert [ref() for ref in dead] == [None] * len(dead)


@pytest.mark.parametrize("op", CASES)
def test_a_call_that_fails_keeps_no_reference(rng, op):
    """Each argument in turn of a dtype, of a shape and of a kind that is refused; and each out."""
    bad_values: list[Any] = [np.zeros(3, np.complex64), np.zeros((7, 1, 1, 1, 7), F32), object()]
    arrays = op.make(rng)
    outs = [np.full(r.shape, 7, r.dtype) for r in op.run(arrays)[: op.outs]]
    failures = 0
    for bad in bad_values:
        for name in (*arrays, *range(len(outs))):
            given = {**arrays, **({name: bad} if isinstance(name, str) else {})}
            pair = [bad if i == name else o for i, o in enumerate(outs)]
            out = pair[0] if len(pair) == 1 else tuple(pair) or None
            before = references(given), sys.getrefcount(bad), [sys.getrefcount(o) for o in outs]
            for _ in range(5):
                try:
                    op.run(given, out)
                except (TypeError, ValueError, IndexError):
                    failures += 1
            assert (references(given), sys.getrefcount(bad), [sys.getrefcount(o) for o in outs]) == before
    assert failures >= 5 * len(arrays)


@pytest.mark.parametrize("op", CASES)
def test_no_operation_piles_up_memory(rng, op):
    arrays = op.make(rng)
    nbytes, objects = piled_up(lambda: op.run(arrays), 200)
    assert nbytes < 200 and objects < 100
