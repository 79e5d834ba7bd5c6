"""What a machine's page compares: the work, what it must move and multiply at least, and its variants. Sizes are those
of LLaMA-like models of 1 to 7 billion weights, Qwen3-Next, Mamba and Griffin."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
FLOATS = {"float32": 4.0, "bfloat16": 2.0}
FORMATS = FLOATS | {"int8": 8.25 / 8, "int4": 4.5 / 8}   # bytes a weight
STORED = FLOATS | {"int8": 1 + 4 / 128}                  # bytes a number in a cache, with its token's share of a scale
HEADS, KV_HEADS = 32, 8
_MANY = 64         # rows of a product that the peak limits: which buffers it takes does not matter
_BLOCK = 1 << 22  # numbers that are drawn; larger arrays repeat them


class Variant(NamedTuple):
    """One way to do a case: in which dtype, and forge_c's options, which others do not have."""
    name: str
    dtype: str
    read: int
    written: int
    flops: int
    options: Mapping[str, Any] = {}
    shared: bool = False  # whether others have it, though forge_c needs options for it
    beside: str = ""  # the variant of others to compare with where they have none of this name


class Case(NamedTuple):
    section: str
    name: str
    op: str
    inputs: Callable[[], tuple[Array, ...]]
    variants: tuple[Variant, ...]
    rank: int = 0                       # those of higher rank are measured after the others, if there is time
    hot: bool = False                   # in cache by nature: no rotation through buffers
    weights: tuple[int, ...] = ()       # of the inputs: what is packed once
    curve: str = ""                     # drawn against its length
    length: int = 0
    threads: bool = False               # measured at every number of threads
    numpy_op: str = ""
    without: tuple[str, ...] = ()       # implementations that would take minutes
    options: Mapping[str, Any] = {}     # of the operation, for everyone


def normal(*shape: int, scale: float = 1.0) -> Array:
    """Random float32, never zeros."""
    size = int(np.prod(shape))
    drawn = np.random.default_rng(len(shape) + shape[0]).standard_normal(min(size, _BLOCK), np.float32)
    drawn *= np.float32(scale)
    return np.resize(drawn, shape)


def _rows(op: str, rows: int, dim: int, inputs: int = 1, vectors: int = 0, **more: Any) -> Case:
    """An operation that reads `inputs` arrays (rows, dim) and `vectors` of (dim,), and writes one array."""
    variants = tuple(Variant(name, name, int(inputs * rows * dim * size), int(rows * dim * size), 0)
                     for name, size in FLOATS.items())
    return Case("rows", f"{op} {rows} x {dim}", op, lambda: (*(normal(rows, dim) for _ in range(inputs)),
                                                            *(normal(dim) for _ in range(vectors))),
                variants, hot=rows == 1, **more)


def _rope(seq: int, **more: Any) -> Case:
    def inputs() -> tuple[Array, ...]:
        angles = np.outer(np.arange(seq), 10000.0 ** (-np.arange(0, 128, 2) / 128))
        return normal(1, seq, HEADS, 128), np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    variants = tuple(Variant(name, name, *(int(seq * HEADS * 128 * size),) * 2, 0) for name, size in FLOATS.items())
    return Case("rows", f"rope L {seq}, {HEADS} heads of 128", "rope", inputs, variants, hot=seq == 1, **more)


def _linear(k: int, n: int, m: int, formats: tuple[str, ...] = tuple(FORMATS), **more: Any) -> Case:
    """x (m, k) by weights (k, n). int8 takes inputs in 12 bits unless it is asked for 8; beside that and int4
    of 32s, llama.cpp's Q4_0, stands ONNX Runtime's MatMulNBits."""
    def variant(name: str, dtype: str = "", **options: Any) -> Variant:
        size = FORMATS[(dtype or name).split("-")[0]]
        return Variant(name, dtype or name, int(k * n * size) + 4 * m * k, 4 * m * n, 2 * m * k * n, options)

    variants = [variant(name) for name in formats]
    if "int8" in formats:
        variants.append(variant("int8, inputs int8", "int8-128", activations="int8")._replace(shared=True))
    if "int4" in formats:
        variants.append(variant("int4-32"))
    return Case("linear", f"linear {k} -> {n}, M {m}", "linear",
                lambda: (normal(m, k), normal(k, n, scale=k ** -0.5)), tuple(variants), hot=m >= _MANY, weights=(1,),
                curve=f"linear {k} -> {n}" if (k, n) == (4096, 11008) else "", length=m, **more)


def _mlp(m: int, **more: Any) -> Case:
    d, hidden = 2048, 5632
    variants = tuple(Variant(name, name, int(3 * d * hidden * size) + 4 * m * d, 4 * m * d, 6 * m * d * hidden)
                     for name, size in FORMATS.items())
    return Case("linear", f"SwiGLU MLP 2048 -> 5632, M {m}", "swiglu_mlp",
                lambda: (normal(m, d), normal(d, hidden, scale=d ** -0.5), normal(d, hidden, scale=d ** -0.5),
                         normal(hidden, d, scale=hidden ** -0.5)), variants, hot=m >= _MANY, weights=(1, 2, 3),
                **more)


def _heads(q_len: int, keys: int, dim: int) -> Callable[[], tuple[Array, ...]]:
    return lambda: (normal(1, q_len, HEADS, dim), normal(1, keys, KV_HEADS, dim), normal(1, keys, KV_HEADS, dim))


def _prompt(seq: int, dim: int, **more: Any) -> Case:
    flops = 4 * HEADS * dim * seq * (seq + 1) // 2

    def variant(name: str, dtype: str, **options: Any) -> Variant:
        size = seq * dim * FLOATS[dtype]
        return Variant(name, dtype, int((HEADS + 2 * KV_HEADS) * size), int(HEADS * size), flops, options, beside=dtype)

    variants = (*(variant(dtype, dtype) for dtype in FLOATS),
                *(variant(f"float32, precision {name}", "float32", precision=name) for name in ("bfloat16", "int8")))
    return Case("attention", f"causal prompt of {seq}, heads of {dim}", "attention", _heads(seq, seq, dim), variants,
                hot=True, curve=f"causal prompt, heads of {dim}", length=seq, numpy_op="attention_blocked", **more)


def _decode(keys: int, tokens: int = 1, **more: Any) -> Case:
    variants = tuple(Variant(name, name, int(2 * keys * KV_HEADS * 128 * size), 4 * tokens * HEADS * 128,
                             4 * tokens * HEADS * 128 * keys) for name, size in STORED.items())
    one = tokens == 1
    return Case("attention", f"{'one token' if one else f'{tokens} tokens'} against {keys} keys",
                "decode" if one else "verify", _heads(tokens, keys, 128), variants,
                curve="one token, heads of 128" if one else "", length=keys, **more)


def _rg_lru(seq: int, channels: int, **more: Any) -> Case:
    def variant(name: str, size: float) -> Variant:
        tokens = int(seq * channels * size)
        return Variant(name, name, 3 * tokens + 8 * channels, tokens + 4 * channels, 0)

    return Case("states", f"rg_lru, {seq} x {channels}", "rg_lru",
                lambda: (*(normal(1, seq, channels) for _ in range(3)), normal(channels) - 4, normal(1, channels)),
                tuple(variant(*pair) for pair in FLOATS.items()), hot=seq == 1, **more)


def _gated_delta_inputs(seq: int) -> tuple[Array, ...]:
    q, k, v = (normal(1, seq, 32, 128) for _ in range(3))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = np.random.default_rng(1).random((1, seq, 32), np.float32)
    return q, k, v, -np.abs(normal(1, seq, 32, scale=0.1)), beta


def _gated_delta(seq: int, **more: Any) -> Case:
    size, state = 4 * seq * 32 * 128, 4 * 32 * 128 * 128
    one, flops = seq == 1, 7 * seq * 32 * 128 * 128
    moved = (state, state) if one else (3 * size, size)
    return Case("states", f"gated_delta, L {seq}, 32 heads of 128", "gated_delta_step" if one else "gated_delta",
                lambda: _gated_delta_inputs(seq) + ((normal(1, 32, 128, 128),) if one else ()),
                (Variant("float32", "float32", *moved, flops),), hot=not one,
                numpy_op="" if one else "gated_delta_chunked", **more)


def _selective_scan(seq: int, channels: int, **more: Any) -> Case:
    def inputs() -> tuple[Array, ...]:
        a = -np.tile(np.arange(1, 17, dtype=np.float32), (channels, 1))
        return (normal(1, seq, channels), normal(1, seq, channels), a, normal(1, seq, 16), normal(1, seq, 16),
                normal(channels), normal(1, seq, channels), normal(channels) - 4, normal(1, channels, 16))

    def variant(name: str, size: float) -> Variant:
        tokens, states = int(seq * channels * size), channels * 64
        return Variant(name, name, 3 * tokens + int(32 * seq * size) + 2 * states, tokens + states, 0)

    return Case("states", f"selective_scan, {seq} x {channels}", "selective_scan", inputs,
                tuple(variant(*pair) for pair in FLOATS.items()), hot=seq == 1, **more)


def _ssd_scan(seq: int, heads: int, **more: Any) -> Case:
    chunk, size = min(64, seq), 4 * seq * heads * 64
    return Case("states", f"ssd_scan, L {seq}, {heads} heads of 64, n 128", "ssd_scan",
                lambda: (normal(1, seq, heads, 64), np.abs(normal(1, seq, heads, scale=0.1)), -np.exp(normal(heads)),
                         normal(1, seq, 1, 128), normal(1, seq, 1, 128)),
                (Variant("float32", "float32", size, size, seq * (heads * (4 * 128 * 64 + chunk * 64) + chunk * 128)),),
                hot=True, numpy_op="ssd_scan_chunked", **more)


TITLES = {"rows": "Norms, softmax, activations, positions", "linear": "Products with packed weights",
          "attention": "Grouped-query attention", "states": "State spaces and linear recurrences"}
CASES = (
    _rows("rms_norm", 8192, 4096, vectors=1, threads=True),
    _rows("layer_norm", 8192, 4096, vectors=2),
    _rows("softmax", 4096, 2048),
    _rows("gelu", 4096, 5632, threads=True),
    _rows("silu", 4096, 5632),
    _rows("swiglu", 4096, 5632, inputs=2),
    _rope(2048),
    _rows("rms_norm", 1, 768, vectors=1),
    _rows("rms_norm", 1, 4096, vectors=1),
    _rows("layer_norm", 1, 4096, vectors=2),
    _rows("softmax", 1, 32000),
    _rope(1),
    _rows("rms_norm", 512, 4096, vectors=1, rank=1),
    _rows("gelu", 1, 5632, rank=1),
    _linear(4096, 11008, 512, threads=True),
    _linear(4096, 11008, 1, threads=True),
    _mlp(512, threads=True),
    _linear(4096, 11008, 8),
    _linear(4096, 11008, 128),
    _mlp(1),
    _linear(3000, 5000, 333, ("float32", "bfloat16"), rank=1),
    _linear(2048, 16384, 2048, rank=2),
    _linear(8192, 2048, 512, rank=2),
    _linear(4096, 11008, 2, rank=2),
    _linear(4096, 11008, 32, rank=2),
    _prompt(2048, 128, threads=True),
    _decode(32768, threads=True),
    _prompt(512, 128),
    _decode(4096),
    _prompt(2048, 64),
    _decode(512, rank=1),
    _decode(32768, 8, rank=1),
    _prompt(8192, 128, rank=1, without=("numpy",)),
    _prompt(512, 64, rank=2),
    _decode(131072, rank=2),
    _rg_lru(2048, 2560),
    _gated_delta(512),
    _gated_delta(1),
    _selective_scan(512, 1536, without=("torch",)),
    _ssd_scan(512, 24),
    _rg_lru(1, 2560, rank=1),
    _selective_scan(1, 1536, rank=1),
)
