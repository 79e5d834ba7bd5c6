"""Each op's random call: its arrays, how to run it, and what to compare with what."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import reference as ref
from conftest import check_close, flushed
from ggml_blocks import random_blocks
from test_activations import REFERENCE, magnitude
from test_attention import check_pair, expected, multiplies_pairs
from test_attention_cache import integer_roundings
from test_attention_precision import check_byte_pair
from test_gated_delta import RULES
from test_gated_delta import check as check_gated_delta
from test_gated_delta import inputs as gated_delta_inputs
from test_gated_delta import run as run_gated_delta
from test_layer_norm import bound as layer_norm_bound
from test_linear import check_gated, rounded
from test_rg_lru import check as check_rg_lru
from test_rg_lru import inputs as rg_lru_inputs
from test_rope import pair_length
from test_s4d import check as check_s4d
from test_s4d import inputs as s4d_inputs
from test_selective_scan import check as check_scan
from test_selective_scan import inputs as scan_inputs
from test_ssd_scan import check as check_ssd
from test_ssd_scan import inputs as ssd_inputs

import forge_c as fc
from forge_c.formats.blocks import DTYPE_OF
from forge_c.formats.ggml import TYPES
from forge_c.packing import pack_blocks
from fuzz.arrays import DTYPES, KINDS, Array, values

F32, BF16 = DTYPES[0], DTYPES[2]
OVERFLOW = 1e36  # sums beyond it may overflow float32 on the way
LENGTHS = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 257, 300)
ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh")

Rng = np.random.Generator


@dataclass
class Call:
    """run(**arrays, out=...); check(results, arrays) raises. any_stride: arrays whose last axis need not be dense."""

    name: str
    arrays: dict[str, Array]
    run: Callable[..., Any]
    check: Callable[[tuple[Array, ...], dict[str, Array]], None]
    outs: int = 1
    alias: Sequence[str] = ()
    any_stride: Sequence[str] = ()
    options: Any = ""  # for the report


def pick(rng: Rng, choices: Sequence[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


def lead(rng: Rng, most: int = 3) -> tuple[int, ...]:
    """Outer axes, now and then an empty one or many rows."""
    shape = tuple(int(n) for n in rng.choice([0, 1, 1, 2, 2, 3, 3, 4, 5, 7, 20], rng.integers(0, most + 1)))
    return (*shape, 70) if rng.random() < 0.1 and np.prod(shape) < 20 else shape


def within(a: Any, limit: float) -> Array:
    """Which rows (..., 1) hold only values of at most this size; those that are not finite count as what they are."""
    a = np.abs(ref.f64(a))
    return ((a <= limit) | ~np.isfinite(a)).all(axis=-1, keepdims=True)


def compare(op: str, got: Array, want: Any, where: Any, **options: Any) -> None:
    """check_close of what `where` (broadcast) selects."""
    where = np.broadcast_to(where, got.shape)
    cut = {key: np.broadcast_to(v, got.shape)[where] if np.ndim(v) else v for key, v in options.items()}
    check_close(op, got[where], np.asarray(want)[where], **cut)


# ---- norms, softmax, activations --------------------------------------------------------------------


def rms_norm(rng: Rng) -> Call:
    return _norm(rng, "rms_norm")


def layer_norm(rng: Rng) -> Call:
    return _norm(rng, "layer_norm")


def _norm(rng: Rng, op: str) -> Call:
    shape, dtype, kind = (*lead(rng), pick(rng, LENGTHS)), pick(rng, DTYPES), pick(rng, KINDS)
    arrays = {"x": values(rng, shape, dtype, kind)}
    if rng.random() < 0.6:
        arrays["weight"] = values(rng, shape[-1:], pick(rng, DTYPES))
    if rng.random() < 0.5 and op == "layer_norm":
        arrays["bias"] = values(rng, shape[-1:], pick(rng, DTYPES))
    if fused := rng.random() < 0.4:
        arrays["residual"] = values(rng, shape, dtype, pick(rng, (kind, "normal")))
    options: dict[str, Any] = {"eps": float(pick(rng, (1e-5, 1e-6, 1e-3)))}
    if op == "rms_norm":
        options["weight_offset"] = float(pick(rng, (0.0, 1.0)))
    return Call(op, arrays, partial(getattr(fc, op), **options), partial(_check_norm, op, options),
                2 if fused else 1, ("x", "residual"))


def _check_norm(op: str, options: dict[str, Any], got: tuple[Array, ...], a: dict[str, Array]) -> None:
    parameters = {name: a[name] for name in ("weight", "bias") if name in a}
    h = got[1] if len(got) == 2 else a["x"]
    if len(got) == 2:
        check_close("residual", h, ref.f64(a["x"]) + ref.f64(a["residual"]))
    want = getattr(ref, op)(h, **parameters, **options)
    size: dict[str, Any] = {}
    if op == "layer_norm":
        size["magnitude"] = layer_norm_bound(h, a.get("weight"), a.get("bias"), options["eps"])
    # h / sigma may be subnormal, and is rounded before it meets the weight.
    gain = options.get("weight_offset", 0) + np.abs(ref.f64(a.get("weight", 1.0)))
    compare(op, got[0], want, within(h, 1e17), n=h.shape[-1], more=gain * 2.0**-149, **size)


def softmax(rng: Rng) -> Call:
    x = values(rng, (*lead(rng), pick(rng, (*LENGTHS, 4099))), pick(rng, DTYPES), pick(rng, KINDS))
    return Call("softmax", {"x": x}, fc.softmax, _check_softmax, alias=("x",))


def _check_softmax(got: tuple[Array, ...], a: dict[str, Array]) -> None:
    want, x = ref.softmax(a["x"]), ref.f64(a["x"])
    below = x - x.max(-1, keepdims=True, initial=-np.inf)
    # The difference of two large numbers of opposite sign overflows, to the right side.
    compare("softmax", got[0], want, True, magnitude=np.where(want == 0, 0.0, want * (1 + abs(below))), n=x.shape[-1])


def activation(rng: Rng) -> Call:
    name = pick(rng, tuple(REFERENCE))
    tanh = {"approximate": "tanh"} if name.endswith("_tanh") else {}
    function = partial(getattr(fc, name.removesuffix("_tanh")), **tanh)
    names = {"swiglu": ("gate", "up"), "geglu": ("gate", "up"), "geglu_tanh": ("gate", "up")}
    shape, dtype = (*lead(rng), pick(rng, LENGTHS)), pick(rng, DTYPES)
    arrays = {arg: values(rng, shape, dtype, pick(rng, KINDS)) for arg in names.get(name, ("x",))}
    return Call(name, arrays, function, partial(_check_activation, name), alias=tuple(arrays))


def _check_activation(name: str, got: tuple[Array, ...], a: dict[str, Array]) -> None:
    args = list(a.values())
    want = REFERENCE[name](*args)
    # An activation that underflows in float32 times an infinity is another NaN.
    where: Any = True
    if len(args) == 2:
        x, y = map(ref.f64, args)
        act = REFERENCE[{"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}[name]](x)
        where = np.isfinite(y) & (abs(y) < OVERFLOW) | ~(abs(act) < 1 / OVERFLOW) | (x == 0)
    compare(name.removesuffix("_tanh"), got[0], want, where, magnitude=magnitude(name, want, args))


# ---- rope, embedding --------------------------------------------------------------------------------


def rope(rng: Rng) -> Call:
    half, heads = pick(rng, (1, 2, 3, 8, 16, 17, 32)), lead(rng, 1)
    batch, seq, length = int(rng.integers(0, 4)), pick(rng, (0, 1, 2, 5, 40)), 60
    shape = (batch, seq, *heads[:1], 2 * half + pick(rng, (0, 0, 1, 16, 40)))
    angles = rng.uniform(-4, 4, (length, half))
    arrays = {"x": values(rng, shape, pick(rng, DTYPES), pick(rng, KINDS)),
              "cos": np.cos(angles).astype(F32), "sin": np.sin(angles).astype(F32)}
    interleaved, start = bool(rng.random() < 0.5), int(rng.integers(0, length - seq + 1))
    if rng.random() < 0.6:
        arrays["positions"] = rng.integers(0, length, (batch, seq) if rng.random() < 0.5 else (seq,))
    return Call("rope", arrays, partial(_rope, start, interleaved), partial(_check_rope, start, interleaved),
                alias=("x",), any_stride=("cos", "sin", "positions"))


def _rope(start: int, interleaved: bool, x: Array, cos: Array, sin: Array, positions: Any = None,
          out: Any = None) -> Any:
    where = {"start_pos": start} if positions is None else {"positions": positions}
    return fc.rope(x, fc.RopeTable(cos, sin), interleaved=interleaved, out=out, **where)


def _check_rope(start: int, interleaved: bool, got: tuple[Array, ...], a: dict[str, Array]) -> None:
    x, y = a["x"], got[0]
    if x.ndim == 3:
        x, y = x[:, :, None], y[:, :, None]
    dim, positions = 2 * a["cos"].shape[1], a.get("positions", start + np.arange(x.shape[1]))
    want, size = ref.rope(x, a["cos"], a["sin"], positions, interleaved=interleaved), pair_length(x, dim, interleaved)
    compare("rope", y, want, (size < OVERFLOW) | ~np.isfinite(size), magnitude=size)
    assert y[..., dim:].tobytes() == x[..., dim:].tobytes(), "rope: channels beyond the table changed"


def embedding(rng: Rng) -> Call:
    rows, n = int(rng.integers(1, 30)), pick(rng, LENGTHS)
    arrays = {"table": values(rng, (rows, n), pick(rng, DTYPES), pick(rng, KINDS)),
              "ids": rng.integers(0, rows, lead(rng)).astype(pick(rng, (np.int64, np.int32, np.uint8)))}
    scale, dtype = float(pick(rng, (1.0, 1.5, 32.0))), pick(rng, (None, *DTYPES))

    def check(got: tuple[Array, ...], a: dict[str, Array]) -> None:
        check_close("embedding", got[0], ref.embedding(a["ids"], a["table"], scale=scale))

    return Call("embedding", arrays, partial(_embedding, scale, dtype), check, any_stride=("ids",))


def _embedding(scale: float, dtype: Any, ids: Array, table: Array | fc.PackedWeight, out: Any = None) -> Any:
    if out is not None and not out.flags.c_contiguous:  # the one op whose out must be dense
        dense = np.empty(out.shape, out.dtype)
        out[...] = fc.embedding(ids, table, scale=scale, dtype=dtype, out=dense)
        return out
    return fc.embedding(ids, table, scale=scale, dtype=dtype, out=out)


def embedding_packed(rng: Rng) -> Call:
    table = _blocks(rng) if rng.random() < 0.5 else fc.pack(
        values(rng, (pick(rng, LENGTHS), int(rng.integers(1, 30))), pick(rng, DTYPES), "normal"),
        pick(rng, ("float32", "bfloat16", "int8", "int4")))
    ids = rng.integers(0, table.shape[1], lead(rng)).astype(pick(rng, (np.int64, np.int32, np.uint8)))
    scale, dtype = float(pick(rng, (1.0, 1.5, 32.0))), pick(rng, (None, *DTYPES))

    def check(got: tuple[Array, ...], a: dict[str, Array]) -> None:
        with np.errstate(over="ignore"):
            want = (table.unpack().T[a["ids"]] * np.float32(scale)).astype(dtype or F32)
        assert got[0].tobytes() == want.tobytes()

    return Call(f"embedding_{table.dtype}", {"ids": ids}, partial(_embedding, scale, dtype, table=table), check,
                any_stride=("ids",))


def _blocks(rng: Rng) -> fc.PackedWeight:
    """Of a random ggml type and shape, at least one column wide."""
    name = pick(rng, tuple(DTYPE_OF))
    k, n = TYPES[name].weights * int(rng.integers(0, 4)), int(rng.integers(1, 70))
    return pack_blocks(name, random_blocks(rng, name, n, k), activations=pick(rng, (None, "int8", "int12")))


# ---- products ---------------------------------------------------------------------------------------


def linear(rng: Rng) -> Call:
    x, k, n = _x(rng)
    arrays = {"x": x, "weight": values(rng, (k, n), pick(rng, DTYPES), pick(rng, KINDS))}
    transposed = bool(rng.random() < 0.4)
    if transposed:
        arrays["weight"] = np.ascontiguousarray(arrays["weight"].T)
    _more(rng, arrays, n)

    def run(weight: Array, **others: Any) -> Any:
        return fc.linear(weight=weight.T if transposed else weight, **others)

    def check(got: tuple[Array, ...], a: dict[str, Array]) -> None:
        _compare_linear(got[0], a["x"], a["weight"].T if transposed else a["weight"], a.get("bias"), a.get("residual"))

    return Call("linear", arrays, run, check, alias=("residual",))


def linear_packed(rng: Rng) -> Call:
    x, k, n = _x(rng)
    stored = pick(rng, ("float32", "bfloat16"))
    w = values(rng, (k, n), pick(rng, DTYPES), pick(rng, KINDS))
    packed, arrays = fc.pack(w, stored), {"x": x}
    _more(rng, arrays, n)

    def check(got: tuple[Array, ...], a: dict[str, Array]) -> None:
        pairs = stored == "bfloat16"
        used = (rounded(a["x"]), w.astype(F32).astype(BF16)) if pairs else (a["x"], w)
        _compare_linear(got[0], *used, a.get("bias"), a.get("residual"))

    return Call(f"linear_{stored}", arrays, partial(fc.linear, weight=packed), check, alias=("residual",))


def linear_integers(rng: Rng) -> Call:
    x, k, n = _x(rng)
    stored, group = pick(rng, (("int8", None), ("int8", 32), ("int4", None), ("int4", 32), ("int4", 128)))
    w = values(rng, (k, n), pick(rng, DTYPES), pick(rng, ("normal", "constant", "zero", "large")))
    packed = fc.pack(w, stored, group_size=group, activations=pick(rng, (None, "int8", "int12")))
    arrays = {"x": x}
    _more(rng, arrays, n)
    return Call(f"linear_{stored}", arrays, partial(fc.linear, weight=packed),
                partial(_check_integers, packed.unpack()), alias=("residual",))


def linear_blocks(rng: Rng) -> Call:
    packed = _blocks(rng)
    arrays = {"x": values(rng, (*lead(rng), packed.shape[0]), pick(rng, DTYPES), pick(rng, KINDS))}
    _more(rng, arrays, packed.shape[1])
    return Call(f"linear_{packed.dtype}", arrays, partial(fc.linear, weight=packed),
                partial(_check_integers, packed.unpack()), alias=("residual",))


def _check_integers(w: Array, got: tuple[Array, ...], a: dict[str, Array]) -> None:
    """Whatever the grain in which x is rounded: half a step of max|x| / 127 for each value at most, and float32."""
    x, sides = ref.f64(a["x"]), [a.get("bias"), a.get("residual")]
    rows = np.isfinite(x).all(-1, keepdims=True)
    x = np.where(rows, x, 0)
    step = np.abs(x).max(-1, keepdims=True, initial=0) / 127
    weight, absolute = ref.f64(w), np.abs(ref.f64(w))
    # The integer sums are exact, but a group's minimum and scale act on numbers as large as 255 steps.
    sizes = [None if s is None else np.abs(ref.f64(s)) for s in sides]
    largest = min(OVERFLOW, float(ml_dtypes.finfo(got[0].dtype).max))
    total = ref.linear(np.abs(x) + step * 127, absolute + absolute.max(initial=0), sizes[0], residual=sizes[1])
    compare("quantized_linear", got[0], ref.linear(x, weight, sides[0], residual=sides[1]),
            rows & (step > 2e-30) & (total < largest) & (np.abs(x).sum(-1, keepdims=True) < OVERFLOW),
            magnitude=total, n=2 * len(w), more=0.5 * step * absolute.sum(0) * (1 + 2.0**-10))


def gated(rng: Rng) -> Call:
    x, k, n = _x(rng)
    stored, act = pick(rng, ("float32", "bfloat16")), pick(rng, ACTIVATIONS)
    a, b = (values(rng, (k, n), F32) for _ in range(2))
    packed = fc.pack_gated(a, b, stored)
    arrays = {"x": x}
    if rng.random() < 0.5:
        arrays["bias"] = values(rng, (2, n), F32)

    def check(got: tuple[Array, ...], given: dict[str, Array]) -> None:
        x = given["x"]
        used = (rounded(x), a.astype(BF16), b.astype(BF16)) if stored == "bfloat16" else (x, a, b)
        rows = (np.isfinite(ref.f64(x)) & (np.abs(ref.f64(x)) < 1e15)).all(-1)
        if rows.any():  # boolean indexing of () gives (1,)
            check_gated(got[0][rows], used[0][rows], *used[1:], given.get("bias"), act)

    return Call(f"gated_{stored}_{act}", arrays, partial(fc.gated_linear, weight=packed, activation=act), check,
                any_stride=("bias",))


def _x(rng: Rng) -> tuple[Array, int, int]:
    k, n = pick(rng, (*LENGTHS, 700)), pick(rng, LENGTHS)
    return values(rng, (*lead(rng), k), pick(rng, DTYPES), pick(rng, KINDS)), k, n


def _more(rng: Rng, arrays: dict[str, Array], n: int) -> None:
    if rng.random() < 0.5:
        arrays["bias"] = values(rng, (n,), pick(rng, DTYPES))
    if rng.random() < 0.4:
        x = arrays["x"]
        arrays["residual"] = values(rng, (*x.shape[:-1], n), x.dtype, pick(rng, KINDS))


def _finite(a: Any) -> Array:
    a = np.abs(ref.f64(a))
    return np.where(np.isfinite(a), a, 0)


def _infinite(a: Any) -> Array:
    return np.isinf(ref.f64(a)).astype(F32)


def _subnormal(a: Any) -> Array:
    a = np.abs(ref.f64(a))
    return ((a > 0) & (a < 2.0**-126)).astype(F32)


def _compare_linear(got: Array, x: Array, w: Array, bias: Any, residual: Any) -> None:
    """Where no sum overflows: NaN and infinity of the inputs go where the formula sends them.

    Not where pairs of bfloat16 are multiplied and infinity meets a subnormal number, which counts as 0: that is NaN.
    """
    k = x.shape[-1]
    sizes = [None if a is None else _finite(a) for a in (x, w, bias, residual)]
    size = ref.linear(sizes[0], sizes[1], sizes[2], residual=sizes[3])
    where, more = size < OVERFLOW, 0
    if w.dtype == BF16 and x.dtype == BF16:
        where, more = where & (_infinite(x) @ _subnormal(w) + _subnormal(x) @ _infinite(w) == 0), flushed(x, w)
    compare("linear", got, ref.linear(x, w, bias, residual=residual), where, magnitude=size, n=k, more=more)


# ---- attention --------------------------------------------------------------------------------------


def _sizes(rng: Rng) -> dict[str, int]:
    kv_heads = pick(rng, (1, 1, 2, 3))
    return {"batch": pick(rng, (1, 1, 2, 3, 0)), "q_len": pick(rng, (0, 1, 1, 1, 2, 5, 17)), "kv_heads": kv_heads,
            "kv_len": pick(rng, (0, 1, 2, 7, 15, 16, 17, 40, 64, 255, 256, 257, 300)),
            "heads": kv_heads * pick(rng, (1, 1, 2, 4)), "dim": pick(rng, (1, 5, 16, 17, 40, 64)),
            "v_dim": pick(rng, (0, 1, 5, 16, 24, 64))}


def _options(rng: Rng, s: dict[str, int]) -> dict[str, Any]:
    options: dict[str, Any] = {"causal": bool(rng.random() < 0.5)}
    if rng.random() < 0.3:
        options["window"] = pick(rng, (1, 2, 9, 64, 300, 10**9, 2**62, sys.maxsize))
    if rng.random() < 0.2:
        options["softcap"] = pick(rng, (0.5, 5.0, 50.0))
    if rng.random() < 0.3:
        options["scale"] = pick(rng, (0.0, 0.1, 1.0, -0.5))
    return options


def _mask(rng: Rng, s: dict[str, int]) -> Array:
    full = (s["batch"], s["heads"], s["q_len"], s["kv_len"])
    shape = tuple(n if rng.random() < 0.6 else 1 for n in full)[int(rng.integers(0, 4)):]
    if rng.random() < 0.5:
        return rng.random(shape) < 0.7
    mask = values(rng, shape, pick(rng, DTYPES))
    mask[rng.random(shape) < 0.2] = -np.inf
    return mask


def attention(rng: Rng) -> Call:
    s, kind = _sizes(rng), pick(rng, KINDS)
    dtype = pick(rng, DTYPES)
    kv_dtype = pick(rng, (dtype, dtype, *DTYPES))
    kinds = [pick(rng, ("normal", kind)) for _ in range(3)]
    arrays = {"q": values(rng, (s["batch"], s["q_len"], s["heads"], s["dim"]), dtype, kinds[0]),
              "k": values(rng, (s["batch"], s["kv_len"], s["kv_heads"], s["dim"]), kv_dtype, kinds[1]),
              "v": values(rng, (s["batch"], s["kv_len"], s["kv_heads"], s["v_dim"]), kv_dtype, kinds[2])}
    if rng.random() < 0.4:
        arrays["mask"] = _mask(rng, s)
    if rng.random() < 0.2:
        arrays["sinks"] = values(rng, (s["heads"],), pick(rng, DTYPES))
    if rng.random() < 0.3:
        arrays["kv_lens"] = rng.integers(0, s["kv_len"] + 1, s["batch"])
    options = _options(rng, s)
    if rng.random() < 0.4:
        options["precision"] = pick(rng, (None, "float32", "bfloat16", "int8"))
    return Call("attention", arrays, partial(fc.attention, return_lse=True, **options),
                partial(_check_attention, options), any_stride=("mask", "kv_lens"), options=options)


def _check_attention(options: dict[str, Any], got: tuple[Array, ...], a: dict[str, Array]) -> None:
    """Whole, where every number is finite and no product is near the end of float32; else the places of NaN."""
    q, k, v = a["q"], a["k"], a["v"]
    precision = options.get("precision")
    if precision in ("float32", "bfloat16"):
        k, v = (t.astype(F32 if precision == "float32" else BF16) for t in (k, v))
    more = options | {name: a[name] for name in ("mask", "sinks", "kv_lens") if name in a}
    more.pop("precision", None)
    if precision == "int8":
        finite = all(t.size and np.isfinite(ref.f64(t)).all() and _finite(t).max() < 1e6 for t in (q, k, v))
        if finite:
            check_byte_pair(fc.isa(), (got[0], got[1]), q, k, v, **more)
        return
    pairs = multiplies_pairs(k.dtype)
    largest = [float(_finite(t).max(initial=0)) for t in (q, k, v)]
    if not q.size and not got[0].size or largest[0] * largest[1] > 1e30 or largest[2] > 1e30:
        return
    want = expected(q.astype(BF16) if pairs else q, k, v, **more)
    if not all(np.isfinite(ref.f64(t)).all() for t in (q, k, v)):
        # A key hidden by the mask may or may not count as 0 times its infinite value.
        if "mask" not in a and "softcap" not in options and options.get("scale") != 0.0 and "inf" not in _which(a):
            np.testing.assert_array_equal(np.isnan(ref.f64(got[0])), np.isnan(want[0]), "attention: places of NaN")
        return
    check_pair((got[0], got[1]), want, k.shape[1], q.shape[3], pairs)


def _which(a: dict[str, Array]) -> str:
    return "inf" if any(np.isinf(ref.f64(a[n])).any() for n in ("q", "k", "v")) else ""


def attention_cache(rng: Rng) -> Call:
    s, stored = _sizes(rng), pick(rng, ("float32", "bfloat16", "int8"))
    s["batch"], s["kv_len"], s["v_dim"] = max(s["batch"], 1), max(s["kv_len"], 1), max(s["v_dim"], 1)
    k, v = (values(rng, (s["batch"], s["kv_len"], s["kv_heads"], s[d]), F32) for d in ("dim", "v_dim"))
    cache = fc.KVCache(s["batch"], 400, s["kv_heads"], s["dim"], v_dim=s["v_dim"], dtype=stored)
    cut = int(rng.integers(0, s["kv_len"] + 1))
    for piece in (slice(0, cut), slice(cut, None)):
        cache.append(k[:, piece], v[:, piece])
    arrays = {"q": values(rng, (s["batch"], s["q_len"], s["heads"], s["dim"]), pick(rng, DTYPES))}
    if rng.random() < 0.4:
        arrays["mask"] = _mask(rng, s)
    options = _options(rng, s)
    return Call(f"attention_cache_{stored}", arrays, partial(_attend, cache, options),
                partial(_check_cache, cache, options), any_stride=("mask",), options=options)


def _attend(cache: fc.KVCache, options: dict[str, Any], **arrays: Any) -> Any:
    return fc.attention(k=cache, return_lse=True, **options, **arrays)


def _check_cache(cache: fc.KVCache, options: dict[str, Any], got: tuple[Array, ...], a: dict[str, Array]) -> None:
    q, (k, v) = a["q"], cache
    more = options | ({"mask": a["mask"]} if "mask" in a else {})
    if not q.size:
        return
    pairs = multiplies_pairs(k.dtype)
    want = expected(q.astype(BF16) if pairs else q, k, v, **more)
    if cache.dtype != "int8":
        return check_pair((got[0], got[1]), want, k.shape[1], q.shape[3], pairs)
    score, weights = integer_roundings(q, k, v, **{n: o for n, o in more.items() if n != "softcap"})
    score = score * max(1.0, abs(options.get("scale") or 0.0) * q.shape[3]**0.5)
    check_close("attention", got[0], want[0], magnitude=want[2], n=k.shape[1] + 2, d=q.shape[3] + 2, s=want[3],
                more=2 * score[..., None] * want[2] + 2 * np.nan_to_num(weights))
    check_close("lse", got[1], want[1], magnitude=1 + np.abs(want[1]), n=k.shape[1], d=q.shape[3] + 2,
                s=want[3][..., 0], more=score)


def merge_attention(rng: Rng) -> Call:
    shape, dtype = (*lead(rng), pick(rng, LENGTHS)), pick(rng, DTYPES)
    kind = pick(rng, ("normal", "tiny", "denormal", "large", "zero", "constant"))
    arrays = {}
    for side in "ab":
        arrays[f"out_{side}"] = values(rng, shape, dtype, kind)
        lse = values(rng, shape[:-1], F32) * F32.type(pick(rng, (1, 30, 300)))
        arrays[f"lse_{side}"] = np.where(rng.random(shape[:-1]) < 0.2, F32.type(-np.inf), lse)

    def check(got: tuple[Array, ...], a: dict[str, Array]) -> None:
        want = ref.merge_attention(**a)
        size = np.maximum(np.abs(ref.f64(a["out_a"])), np.abs(ref.f64(a["out_b"])))
        # Two products of subnormal numbers, each rounded to one.
        check_close("merge_attention", got[0], want[0], magnitude=size, more=2.0**-149)
        check_close("lse", got[1], want[1], magnitude=1 + np.abs(want[1]))

    return Call("merge_attention", arrays, fc.merge_attention, check, 0, any_stride=tuple(arrays))


def route_tokens(rng: Rng) -> Call:
    batch, seq, n = int(rng.integers(0, 4)), int(pick(rng, (0, 1, 2, 3, 8, 50, 300))), int(pick(rng, LENGTHS))
    capacity = float(pick(rng, (1e-9, 0.125, 0.3, 0.5, 0.99, 1.0)))
    arrays = {"x": values(rng, (batch, seq, n), pick(rng, DTYPES), pick(rng, KINDS)),
              "weight": values(rng, (n,), pick(rng, DTYPES), pick(rng, ("normal", "zero", "constant")))}

    def check(got: tuple[Array, ...], a: dict[str, Array]) -> None:
        logits = fc.route_tokens(a["x"], a["weight"], capacity=1)[1]
        size = np.abs(ref.f64(a["x"])) @ np.abs(ref.f64(a["weight"]))
        sound = np.isfinite(size) & (size < OVERFLOW)
        check_close("router_logits", logits[sound], (ref.f64(a["x"]) @ ref.f64(a["weight"]))[sound], n=n,
                    magnitude=size[sound], more=n * 2.0**-149)
        want = ref.route_tokens(logits[..., None], [1.0], capacity)
        assert all(np.array_equal(g, w, equal_nan=True) for g, w in zip(got, want, strict=True)), "others are chosen"

    return Call("route_tokens", arrays, partial(fc.route_tokens, capacity=capacity), check, 0, options=capacity)


# ---- states -----------------------------------------------------------------------------------------


def _split(a: dict[str, Any]) -> tuple[dict[str, Array], dict[str, Any]]:
    """(arrays, other options)"""
    return ({name: x for name, x in a.items() if isinstance(x, np.ndarray)},
            {name: x for name, x in a.items() if not isinstance(x, np.ndarray)})


def ssd_scan(rng: Rng) -> Call:
    groups, share = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    arrays, options = _split(ssd_inputs(rng, int(rng.integers(0, 4)), pick(rng, LENGTHS[:16]), groups * share,
                                        pick(rng, LENGTHS), groups, pick(rng, LENGTHS), pick(rng, DTYPES),
                                        rng.random() < 0.5))
    return Call("ssd_scan", arrays, partial(fc.ssd_scan, **options), lambda got, a: check_ssd(got, a | options), 2,
                any_stride=("dt",))


def gated_delta(rng: Rng) -> Call:
    heads, share, rule = int(rng.integers(1, 4)), int(rng.integers(1, 4)), pick(rng, RULES)
    more_of_q = bool(rng.random() < 0.5)
    of_v, of_q = (heads, heads * share) if more_of_q else (heads * share, heads)
    arrays = gated_delta_inputs(rng, rule, int(rng.integers(0, 4)), pick(rng, LENGTHS[:16]), of_v, pick(rng, LENGTHS),
                                pick(rng, LENGTHS), of_q, heads, pick(rng, DTYPES), rng.random() < 0.3,
                                rng.random() < 0.5)
    return Call("gated_delta", arrays, lambda out=None, **a: run_gated_delta(a, out=out),
                lambda got, a: check_gated_delta(got, a), 2, any_stride=("beta",))


def s4d_scan(rng: Rng) -> Call:
    arrays, _ = _split(s4d_inputs(rng, int(rng.integers(0, 4)), pick(rng, LENGTHS[:16]), pick(rng, LENGTHS),
                                  pick(rng, LENGTHS[:12]), pick(rng, DTYPES), rng.random() < 0.5))
    return Call("s4d_scan", arrays, fc.s4d_scan, lambda got, a: check_s4d(got, a), 2, any_stride=("A", "B", "C"))


def causal_conv1d(rng: Rng) -> Call:
    batch, seq, channels, width = (pick(rng, sizes) for sizes in ((0, 1, 2, 3), LENGTHS, LENGTHS, (1, 2, 3, 4, 7)))
    arrays = {"x": values(rng, (batch, seq, channels), pick(rng, DTYPES), pick(rng, KINDS)),
              "weight": values(rng, (channels, width), pick(rng, DTYPES))}
    if rng.random() < 0.5:
        arrays["bias"] = values(rng, (channels,), pick(rng, DTYPES))
    if rng.random() < 0.5:
        arrays["state"] = values(rng, (batch, width - 1, channels), F32)
    silu = pick(rng, (None, "silu"))

    def check(got: tuple[Array, ...], a: dict[str, Array]) -> None:
        want = ref.causal_conv1d(**a, activation=silu)
        size = ref.causal_conv1d(**{name: np.abs(ref.f64(x)) for name, x in a.items()})[0]
        np.testing.assert_array_equal(got[1], want[1])
        compare("causal_conv1d_silu" if silu else "causal_conv1d", got[0], want[0], ~(size > OVERFLOW), n=width,
                magnitude=np.nan_to_num(size))

    return Call("causal_conv1d", arrays, partial(fc.causal_conv1d, activation=silu), check, 2, any_stride=("weight",),
                options=silu)


def selective_scan(rng: Rng) -> Call:
    a = scan_inputs(rng, *(pick(rng, sizes) for sizes in ((0, 1, 2), LENGTHS[:13], LENGTHS[:14], (0, 1, 2, 3, 16, 17))),
                    pick(rng, DTYPES), [name for name in ("D", "z", "delta_bias", "state") if rng.random() < 0.4])
    for name in rng.choice(list(a), 2):
        if name not in ("A", "delta", "delta_bias", "z"):  # infinity times silu(z): 0 in float32 sooner than in float64
            a[name] = values(rng, a[name].shape, a[name].dtype, pick(rng, ("tiny", "large", "zero", "nan", "inf")))
    alias = [name for name in ("u", "delta", "z") if name in a]
    return Call("selective_scan", a, partial(fc.selective_scan, delta_softplus=True),
                lambda got, given: check_scan(got, given, True), 2, alias, ("A",))


def rg_lru(rng: Rng) -> Call:
    a = rg_lru_inputs(rng, *(pick(rng, sizes) for sizes in ((0, 1, 2), LENGTHS[:13], LENGTHS[:14])), pick(rng, DTYPES),
                      [name for name in ("reset", "state") if rng.random() < 0.4])
    if rng.random() < 0.3:
        a["x"] = values(rng, a["x"].shape, a["x"].dtype, pick(rng, ("zero", "tiny")))
    return Call("rg_lru", a, fc.rg_lru, check_rg_lru, 2, ("x", "input_gate", "recurrence_gate"))


FORMS = (rms_norm, layer_norm, softmax, activation, activation, rope, embedding, embedding_packed, linear, linear,
         linear_packed, linear_integers, linear_blocks, gated, attention, attention, attention_cache, merge_attention,
         route_tokens, ssd_scan, gated_delta, s4d_scan, causal_conv1d, selective_scan, rg_lru)
