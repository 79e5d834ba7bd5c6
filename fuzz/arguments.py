"""Wrong arguments: nothing but a TypeError, ValueError, IndexError or MemoryError with our name, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from op_table import OPS

import forge_c as fc
from forge_c import nn
from fuzz import doing
from fuzz.arrays import DTYPES, Arena, values

ALLOWED = (TypeError, ValueError, IndexError, MemoryError)
NAMES = ("rms_norm", "layer_norm", "softmax", "relu", "silu", "gelu", "swiglu", "geglu", "rope", "embedding", "linear",
         "attention", "route_tokens", "ssd_scan", "gated_delta", "s4d_", "causal_conv1d", "selective_scan", "rg_lru",
         "KVCache", "pack", "RopeTable", "rope_table", "PackedWeight", "kv_cache_nbytes", "set_num_threads", "use_isa",
         "nn.", "Linear", "RMSNorm")
SCALARS: tuple[Any, ...] = (
    0, 1, -1, 2, 0.5, -0.0, np.nan, np.inf, -np.inf, 1e308, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 2**70,
    -2**63, 10**400, "x", "", b"y", None, [], [1], {}, (), object(), 1j, True, np.float16(2), np.int8(-3),
    np.uint64(2**64 - 1), np.array(3), np.ones(3), float, "\0", "float32", "int8", "tanh", "silu", "\ud800",
    np.datetime64("2020"))
SIZES = (0, 1, 2, 3, 16, 2**16, 2**20, 2**31 - 1, 2**31, 2**32, 2**40, 2**52, 2**53, 2**54, 2**62, 2**63 - 1, 2**63,
         2**64, 2**70, -1)

Rng = np.random.Generator


def pick(rng: Rng, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def checked(what: str, value: str, call: Callable[[], Any]) -> bool:
    """Whether `call` was rejected; fails unless that was as documented. NumPy may say what it could not allocate."""
    doing(f"{what}; given {value}")
    try:
        with np.errstate(all="ignore"):
            call()
    except MemoryError:
        return True
    except ALLOWED as error:
        text = str(error)
        assert any(name in text for name in NAMES), f"{what}: unnamed {type(error).__name__}: {text}; given {value}"
        return True
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}; given {value}") from error
    return False


def bad_array(rng: Rng, a: Any) -> Any:
    """Something that is not quite `a`."""
    shape, dtype = a.shape, a.dtype
    makers: tuple[Callable[[], Any], ...] = (
        lambda: a.astype(pick(rng, (np.float64, np.complex64, np.int32, np.uint8, bool, object, "S3", "U2", "V5"))),
        lambda: a.astype(dtype.newbyteorder()) if dtype.kind != "V" else a.astype(">f4"),
        lambda: a.astype(pick(rng, DTYPES)),
        lambda: a[..., None] if a.ndim < 60 else a,
        lambda: a[None],
        lambda: a.reshape((1,) * (64 - a.ndim) + shape),
        lambda: a[0] if a.ndim and len(a) else a,
        lambda: a[..., :-1] if a.ndim else a,
        lambda: np.concatenate([a, a], axis=pick(rng, range(a.ndim))) if a.ndim else a,
        lambda: np.repeat(a, 2, axis=-1)[..., ::2] if a.ndim else a,
        lambda: a[..., ::-1] if a.ndim else a,
        lambda: np.broadcast_to(a.reshape(-1)[:1].reshape((1,) * a.ndim), (*shape[:-1], 2**40)) if a.size else a,
        lambda: np.broadcast_to(np.zeros(1, dtype), (2**31, 2**31)),
        lambda: huge(rng, a, empty=False), lambda: huge(rng, a, empty=True),
        lambda: np.zeros((0,) * a.ndim, dtype),
        lambda: np.zeros((*shape[:-1], 0), dtype),
        lambda: a.tolist(), lambda: memoryview(a.tobytes()), lambda: bytearray(a.tobytes()),
        lambda: np.ma.masked_array(a), lambda: np.matrix(np.ones((2, 2))), lambda: a.view(np.recarray),
        lambda: pick(rng, SCALARS),
    )
    try:
        return pick(rng, makers)()
    except (TypeError, ValueError, IndexError):
        return pick(rng, SCALARS)


def huge(rng: Rng, a: Any, *, empty: bool) -> Any:
    """a's first element, over and over along one axis; or nothing at all, that many times."""
    shape, axes = list(a.shape), rng.permutation(a.ndim).tolist()
    shape[axes[0]] = pick(rng, (2**31, 2**40, 2**50))
    if empty and a.ndim > 1:
        shape[axes[1]] = 0
    return np.broadcast_to(np.zeros((1,) * a.ndim, a.dtype), shape)


def bad_numbers(rng: Rng, a: Any) -> Any:
    """Indices with one outside."""
    wide = a.astype(pick(rng, (np.int64, np.uint64, np.int32)))
    with np.errstate(all="ignore"):
        if wide.size:
            info = np.iinfo(wide.dtype)
            wide.reshape(-1)[int(rng.integers(wide.size))] = pick(rng, (info.max, info.min, 2**31 - 1, info.max - 1))
    return wide


def wrong_call(rng: Rng) -> None:
    """An op of the table with one argument, or its out, made wrong."""
    op = OPS[pick(rng, tuple(OPS))]
    arena, dtype = Arena(rng), pick(rng, DTYPES)
    arrays = op.make(rng, dtype)
    given: dict[str, Any] = {name: arena.give(name, a, repeat=False) if a.dtype.kind != "b" else a
                             for name, a in arrays.items()}
    outs: list[Any] = []
    if op.outs:
        outs = [arena.out(f"out[{i}]", r.shape, r.dtype) for i, r in enumerate(op.run(arrays)[:op.outs])]
    kept = list(outs)
    name = pick(rng, (*arrays, *range(op.outs)))
    if isinstance(name, int):
        outs[name] = bad_out(rng, outs[name], given)
    elif op.args[name].below and rng.random() < 0.5:
        given[name] = bad_numbers(rng, arrays[name])
    else:
        given[name] = bad_array(rng, arrays[name])
    before = [o.tobytes() for o in kept]
    out = outs[0] if len(outs) == 1 else tuple(outs) or None
    what, value = f"{op.name}, {name}", shown(outs[name] if isinstance(name, int) else given[name])
    if checked(what, value, lambda: op.run(given, out)):
        assert [o.tobytes() for o in kept] == before, f"{what}: a rejected call wrote; given {value}"
    elif not isinstance(name, int):
        arena.check()


def bad_out(rng: Rng, out: Any, given: dict[str, Any]) -> Any:
    makers: tuple[Callable[[], Any], ...] = (
        lambda: bad_array(rng, out), lambda: np.broadcast_to(out, out.shape), lambda: out[::-1].copy().view(np.uint8),
        lambda: pick(rng, list(given.values())), lambda: (out,), lambda: [out, out], lambda: pick(rng, SCALARS))
    made = pick(rng, makers)()
    return 0 if made is None else made


def shown(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{type(value).__name__} {value.dtype} {value.shape} strides {value.strides}"
    return f"{type(value).__name__} {repr(value)[:60]}"


def append(**a: Any) -> None:
    fc.KVCache(2, 9, 2, 16).append(**a)


def truncate(n: Any) -> None:
    fc.KVCache(2, 9, 2, 16).truncate(n)


def row(n: Any) -> None:
    fc.KVCache(2, 9, 2, 16).row(n)


def copy(max_seq_len: Any) -> None:
    fc.KVCache(2, 9, 2, 16).copy(max_seq_len)


X, KV = values(np.random.default_rng(0), (2, 3, 4, 16), np.float32), np.ones((2, 7, 2, 16), np.float32)
OPTIONS: tuple[tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]], ...] = (
    (fc.rms_norm, {"x": X}, ("eps", "weight", "weight_offset", "residual", "out")),
    (fc.layer_norm, {"x": X}, ("eps", "weight", "bias", "residual", "out")),
    (fc.gelu, {"x": X}, ("approximate", "out")),
    (fc.geglu, {"gated": X, "linear": X}, ("approximate", "linear", "out")),
    (fc.rope_table, {"dim": 16, "max_seq_len": 20}, ("dim", "base", "scaling")),
    (fc.rope, {"x": X, "table": fc.rope_table(16, 20)}, ("start_pos", "positions", "interleaved", "table", "out")),
    (fc.embedding, {"ids": [1, 2], "table": X[0, 0]}, ("scale", "dtype", "ids", "out")),
    (fc.linear, {"x": X, "weight": X[0, 0].T}, ("bias", "residual", "out", "weight")),
    (fc.gated_linear, {"x": X, "weight": fc.pack_gated(X[0, 0].T, X[0, 0].T)}, ("bias", "activation", "weight", "out")),
    (fc.attention, {"q": X, "k": KV, "v": KV},
     ("window", "scale", "softcap", "kv_lens", "sinks", "mask", "causal", "q_positions", "kv_positions", "precision",
      "return_lse", "out", "k", "v")),
    (fc.ssd_scan, {"x": X, "dt": X[..., 0], "A": X[0, 0, :, 0], "B": X[:, :, :2], "C": X[:, :, :2]},
     ("dt", "A", "D", "z", "dt_bias", "dt_softplus", "dt_limit", "state", "out")),
    (fc.gated_delta, {"q": X, "k": X, "v": X, "rule": "linear"}, ("g", "beta", "rule", "scale", "state", "out")),
    (fc.s4d_kernel, {name: KV[0, :2, 0].astype(np.complex64) for name in "ABC"} | {"dt": KV[0, 0, 0, :2], "length": 3},
     ("A", "dt", "length", "method")),
    (fc.pack, {"weight": X[0, 0]}, ("dtype", "group_size", "weight")),
    (fc.pack_gated, {"gate": X[0, 0], "up": X[0, 0]}, ("dtype", "group_size", "gate", "up")),
    (fc.kv_cache_nbytes, {"batch": 1, "seq_len": 2, "n_kv_heads": 3, "head_dim": 4}, ("batch", "seq_len", "head_dim")),
    (fc.set_num_threads, {}, ("n",)), (fc.use_isa, {}, ("name",)),
    (fc.KVCache, {"batch": 1, "max_seq_len": 8, "n_kv_heads": 2, "head_dim": 4},
     ("batch", "max_seq_len", "n_kv_heads", "head_dim", "v_dim", "dtype", "window")),
    (append, {"k": KV, "v": KV}, ("lens", "rope", "k", "v")), (truncate, {}, ("n",)), (row, {}, ("n",)),
    (copy, {}, ("max_seq_len",)),
    (fc.PackedWeight, {"data": fc.pack(X[0, 0], "int8").data, "shape": (4, 16), "dtype": "int8", "gated": False,
                       "group_size": 128}, ("data", "shape", "dtype", "gated", "group_size")),
    (nn.RMSNorm(16), {"x": X}, ("x",)), (nn.Linear(16, 3), {"x": X}, ("x",)),
)


def wrong_option(rng: Rng) -> None:
    function, given, names = pick(rng, OPTIONS)
    name, value = pick(rng, names), pick(rng, SCALARS)
    big_count = isinstance(value, int) and abs(value) > 1024
    if function is fc.set_num_threads and big_count and abs(value) < 2**63:
        return  # so many threads are allowed to be asked for, and would be started
    if getattr(function, "__name__", "") == "KVCache" and big_count:
        return  # wrong_size does that, and looks at what came out
    label = getattr(function, "__name__", type(function).__name__)
    checked(f"{label}, {name}", shown(value), lambda: function(**{**given, name: value}))


def wrong_size(rng: Rng) -> None:
    """Sizes whose product may pass what can be addressed: refused, or a cache that holds what it says."""
    sizes = [pick(rng, SIZES) if rng.random() < 0.5 else int(rng.integers(1, 4)) for _ in range(5)]
    batch, length, heads, dim, v_dim = sizes
    dtype, made = pick(rng, ("float32", "bfloat16", "int8")), []
    what, value = "KVCache", f"{tuple(sizes)} {dtype}"
    if checked(what, value, lambda: made.append(fc.KVCache(batch, length, heads, dim, v_dim=v_dim, dtype=dtype))):
        return
    cache = made[0]
    item = {"float32": 4, "bfloat16": 2, "int8": 1}[dtype]
    assert min(sizes) > 0 and cache.nbytes < 2**62, f"{what}: accepted {value}, nbytes is {cache.nbytes}"
    assert cache._pages.page_nbytes >= 256 * heads * (dim + v_dim) * item, f"{what}: pages too small for {value}"
    if batch * heads * max(dim, v_dim) < 2**20:
        k, v = (np.ones((batch, 1, heads, d), np.float32) for d in (dim, v_dim))
        checked(what, value, lambda: cache.append(k, v))
