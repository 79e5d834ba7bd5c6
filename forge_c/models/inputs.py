"""What the inputs of a model's matrices are like: mean squares of channels, by which `pack` weighs errors.

A text goes through the layers one by one, in floats, and only a layer's matrices are in memory at a time. Without a
text, tokens drawn at random show most of it: which channels are far larger than others is a habit of the model. How
much larger they do not show, so the root is taken of what they say."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, singledispatch
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge_c.functional import (
    attention,
    causal_conv1d,
    embedding,
    gelu,
    layer_norm,
    linear,
    relu,
    rg_lru,
    rms_norm,
    rope,
    selective_scan,
    silu,
    ssd_scan,
)
from forge_c.models.folded import folded
from forge_c.models.parts import ahead_norms, norm_names
from forge_c.models.rope_tables import RopeTables, TableOf
from forge_c.models.spec import (
    MLP,
    RGLRU,
    Attention,
    GatedMLP,
    LayerSpec,
    Mamba,
    Mamba2,
    ModelSpec,
    Norm,
    Router,
    ShortConv,
)
from forge_c.models.weights import Tensors, decay

Floats = NDArray[np.float32]
See = Callable[[str, Floats], None]

_RANDOM_TOKENS = 256
_SHARED = {"self_attn.k_proj": "self_attn.q_proj", "self_attn.v_proj": "self_attn.q_proj",
           "mlp.up_proj": "mlp.gate_proj"}  # matrices with the inputs of another


def of_random_tokens(spec: ModelSpec, checkpoint: Tensors) -> Callable[[int], Mapping[str, Any]]:
    """importance(i) of layer i; to be called for each layer in turn."""
    inputs = Inputs(spec, checkpoint, random_tokens(spec.vocab_size))

    def of_layer(i: int) -> Mapping[str, Any]:
        inputs.importance.clear()
        inputs.layer(i)
        return {name: np.sqrt(squares) for name, squares in inputs.importance.items()}

    return of_layer


def random_tokens(vocab: int) -> list[NDArray[np.int64]]:
    """The same for every model of a vocabulary."""
    return [np.random.default_rng(0).integers(0, vocab, (1, _RANDOM_TOKENS))]


def importance_of(importance: Mapping[str, Any] | None, prefix: str, name: str) -> Any:
    """That of a matrix, or of the one that shares its inputs; None if there is none."""
    if importance is None:
        return None
    for known in (name, _SHARED.get(name, name)):
        found = importance.get(f"{prefix}{known}.weight")
        if found is not None:
            return found
    return None


class Inputs:
    """Texts on their way through the layers: after layer(i), importance holds what its matrices have seen.

    texts: token ids (1, n) each. products: mean products of two channels (k, k) instead of mean squares (k,).
    """

    def __init__(self, spec: ModelSpec, checkpoint: Tensors, texts: Sequence[NDArray[np.int64]],
                 products: bool = False) -> None:
        self.spec, self.checkpoint, self.products = spec, checkpoint, products
        self.importance: dict[str, NDArray[Any]] = {}
        self._tables = RopeTables()
        table = checkpoint.take("model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size))
        self._x = self._embedded = [embedding(ids, table, scale=spec.embed.scale, dtype=np.float32) for ids in texts]

    def layer(self, i: int) -> None:
        """The texts through layer i, which comes after those before."""
        layer, prefix = self.spec.layers[i], f"model.layers.{i}."
        source = _Floats(folded(self.checkpoint, prefix, layer), prefix, self.spec.hidden_size, self._tables,
                         len(self._x))
        sums: dict[str, Any] = {}
        rows = sum(x.shape[1] for x in self._x)

        def see(name: str, x: Floats) -> None:
            flat = x.reshape(-1, x.shape[-1])
            seen = flat.T @ flat if self.products else np.square(flat).sum(axis=0)
            sums[name] = sums.get(name, 0) + seen / np.float32(rows)

        self._x = list(_through(layer, source, list(zip(self._x, self._embedded, strict=True)), see))
        self.importance |= {f"{source.prefix}{name}.weight": np.asarray(a, np.float32) for name, a in sums.items()}


class _Floats:
    """Tensors of a layer as they come, (out, in)."""

    def __init__(self, checkpoint: Tensors, prefix: str, hidden: int, tables: RopeTables, uses: int) -> None:
        """uses: how often each matrix is multiplied."""
        self.checkpoint, self.prefix, self.hidden, self.tables, self.uses = checkpoint, prefix, hidden, tables, uses
        self.positions: NDArray[np.int64] | None = None  # of the tokens that go through, behind a router

    def matrix(self, name: str, rows: int, columns: int) -> NDArray[Any]:
        """(in, out) for linear."""
        return self.checkpoint.take(f"{self.prefix}{name}.weight", (rows, columns)).T

    def product(self, name: str, rows: int, columns: int) -> Callable[..., Floats]:
        """linear by that matrix, with a bias or without. It is read when it is needed, and held for a second use."""
        def read() -> NDArray[Any]:
            return self.matrix(name, rows, columns)

        weight = read if self.uses == 1 else cache(read)
        return lambda x, bias=None: linear(x, weight(), bias)

    def bias(self, wanted: bool, name: str, n: int) -> Floats | None:
        return self.checkpoint.take(f"{self.prefix}{name}.bias", (n,)).astype(np.float32) if wanted else None

    def tensor(self, name: str, *shape: int) -> Floats:
        return self.checkpoint.take(self.prefix + name, shape).astype(np.float32)

    def decay(self, name: str, *shape: int) -> Floats:
        """A of a state space, by the name of its logarithm."""
        return decay(self.checkpoint, self.prefix + name, shape)

    def norm(self, spec: Norm, name: str, n: int) -> Callable[[Floats], Floats]:
        """The norm as a function."""
        weight = self.checkpoint.take(f"{self.prefix}{name}.weight", (n,)).astype(np.float32)
        if spec.kind == "rms":
            return lambda x: rms_norm(x, weight, spec.eps, weight_offset=spec.offset)
        bias = self.checkpoint.take(f"{self.prefix}{name}.bias", (n,)).astype(np.float32)
        return lambda x: layer_norm(x, weight + np.float32(spec.offset), bias, spec.eps)


def can_observe(spec: ModelSpec) -> bool:
    """Whether the kinds of all layers are known here."""
    return all(_observed.dispatch(type(part)) is not _observed.dispatch(object)
               for layer in spec.layers for part in (*layer.mixers, layer.mlp, layer.ahead and layer.ahead.mlp))


@singledispatch
def _observed(kind: Any, source: _Floats) -> Callable[[Floats, See], Floats] | None:
    """What computes a part of this kind, and shows the inputs of its matrices."""
    raise TypeError(f"importance: no inputs of a {type(kind).__name__} are known")


@_observed.register
def _(kind: None, source: _Floats) -> None:
    return None


@_observed.register
def _(kind: Attention, source: _Floats) -> Callable[[Floats, See], Floats]:
    heads, keys, d = kind.n_heads, kind.n_kv_heads, kind.head_dim
    sizes = [heads * d, keys * d, keys * d]
    names = ["self_attn.qkv_proj"] if kind.fused else [f"self_attn.{p}_proj" for p in "qkv"]
    rows = [sum(sizes)] if kind.fused else sizes
    products = [source.product(name, n, source.hidden * kind.streams) for name, n in zip(names, rows, strict=True)]
    biases = [source.bias(kind.qkv_bias, f"self_attn.{p}_proj", n) for p, n in zip("qkv", sizes, strict=True)]
    out = source.product("self_attn.o_proj", source.hidden, heads * d)
    out_bias = source.bias(kind.o_bias, "self_attn.o_proj", source.hidden)
    norms = [None if kind.qk_norm is None else source.norm(kind.qk_norm, f"self_attn.{p}_norm", d) for p in "qk"]
    table = None if kind.rope is None else TableOf(source.tables, kind.rope)

    def compute(x: Floats, see: See) -> Floats:
        see(names[0], x)
        joined = np.concatenate([product(x) for product in products], axis=-1)
        parts = np.split(joined, np.cumsum(sizes)[:2], axis=-1)
        q, k, v = (part if b is None else part + b for part, b in zip(parts, biases, strict=True))
        n = x.shape[1]
        q, k, v = q.reshape(1, n, heads, d), k.reshape(1, n, keys, d), v.reshape(1, n, keys, d)
        q, k = (a if norm is None else norm(np.ascontiguousarray(a)) for a, norm in zip((q, k), norms, strict=True))
        at = source.positions
        if table is not None:
            length = n if at is None else int(at[-1]) + 1
            q, k = (rope(a, table(length, length), positions=at) for a in (q, k))
        found = attention(q, k, v, causal=True, scale=kind.scale, softcap=kind.softcap, window=kind.window,
                          q_positions=at, kv_positions=at)
        flat = found.reshape(1, n, heads * d)
        see("self_attn.o_proj", flat)
        return out(flat, out_bias)

    return compute


def _convolved(kind: Mamba | Mamba2, source: _Floats, channels: int) -> Callable[[Floats], Floats]:
    weight = source.tensor("mixer.conv1d.weight", channels, 1, kind.conv).reshape(channels, kind.conv)
    bias = source.bias(kind.conv_bias, "mixer.conv1d", channels)
    return lambda x: causal_conv1d(x, weight, bias, activation="silu")[0]


@_observed.register
def _(kind: Mamba, source: _Floats) -> Callable[[Floats, See], Floats]:
    inner, n, rank, conv = kind.inner, kind.state, kind.dt_rank, _convolved(kind, source, kind.inner)
    first, first_bias = (source.product("mixer.in_proj", 2 * inner, source.hidden),
                         source.bias(kind.bias, "mixer.in_proj", 2 * inner))
    of_x, of_dt = source.product("mixer.x_proj", rank + 2 * n, inner), source.product("mixer.dt_proj", inner, rank)
    dt_bias, a = source.tensor("mixer.dt_proj.bias", inner), source.decay("mixer.A_log", inner, n)
    d, out = source.tensor("mixer.D", inner), source.product("mixer.out_proj", source.hidden, inner)
    out_bias = source.bias(kind.bias, "mixer.out_proj", source.hidden)
    norms: list[Callable[[Floats], Floats]] = [np.ascontiguousarray] * 3
    if kind.norm is not None:
        eps = kind.norm.eps
        norms = [source.norm(kind.norm, f"mixer.{name}_layernorm", size) if kind.weighted else (
            lambda x: rms_norm(x, eps=eps)) for name, size in (("dt", rank), ("b", n), ("c", n))]

    def compute(x: Floats, see: See) -> Floats:
        see("mixer.in_proj", x)
        u, z = np.split(first(x, first_bias), 2, axis=-1)
        u = conv(u)
        see("mixer.x_proj", u)
        parts = np.split(of_x(u), [rank, rank + n], axis=-1)
        dt, b, c = (norm(np.ascontiguousarray(part)) for norm, part in zip(norms, parts, strict=True))
        y, _ = selective_scan(u, of_dt(dt), a, b, c, d, z=z, delta_bias=dt_bias, delta_softplus=True)
        see("mixer.out_proj", y)
        return out(y, out_bias)

    return compute


@_observed.register
def _(kind: Mamba2, source: _Floats) -> Callable[[Floats, See], Floats]:
    inner, channels, heads = kind.inner, kind.channels, kind.heads
    conv, rows = _convolved(kind, source, channels), inner + channels + heads
    first, first_bias = (source.product("mixer.in_proj", rows, source.hidden),
                         source.bias(kind.bias, "mixer.in_proj", rows))
    d, dt_bias = (source.tensor(f"mixer.{name}", heads) for name in ("D", "dt_bias"))
    a = source.decay("mixer.A_log", heads)
    out, out_bias = (source.product("mixer.out_proj", source.hidden, inner),
                     source.bias(kind.has_out_bias, "mixer.out_proj", source.hidden))
    weight = None if kind.norm is None else source.tensor("mixer.norm.weight", inner)
    limit = (kind.dt_min, math.inf if kind.dt_max is None else kind.dt_max)

    def gated(y: Floats, z: Floats) -> Floats:
        gate = silu(np.ascontiguousarray(z))
        if kind.norm is None or weight is None:
            return y * gate
        grouped = (y if kind.norm_before_gate else y * gate).reshape(1, -1, kind.groups, inner // kind.groups)
        y = rms_norm(grouped, eps=kind.norm.eps).reshape(y.shape) * weight
        return y * gate if kind.norm_before_gate else y

    def compute(x: Floats, see: See) -> Floats:
        see("mixer.in_proj", x)
        n = x.shape[1]
        z, xbc, dt = np.split(first(x, first_bias), [inner, inner + channels], axis=-1)
        u, b, c = np.split(conv(xbc), [inner, (inner + channels) // 2], axis=-1)
        b, c = (np.ascontiguousarray(part).reshape(1, n, kind.groups, kind.state) for part in (b, c))
        y, _ = ssd_scan(np.ascontiguousarray(u).reshape(1, n, heads, kind.head_dim), dt, a, b, c, d,
                        dt_bias=dt_bias, dt_softplus=True, dt_limit=limit)
        y = gated(y.reshape(1, n, inner), z)
        see("mixer.out_proj", y)
        return out(y, out_bias)

    return compute


@_observed.register
def _(kind: ShortConv, source: _Floats) -> Callable[[Floats, See], Floats]:
    n = source.hidden
    weight = source.tensor("mixer.conv1d.weight", n, 1, kind.width).reshape(n, kind.width)
    first, out = source.product("mixer.in_proj", 3 * n, n), source.product("mixer.out_proj", n, n)
    first_bias, bias, out_bias = (source.bias(kind.bias, f"mixer.{name}", size)
                                  for name, size in (("in_proj", 3 * n), ("conv1d", n), ("out_proj", n)))

    def compute(x: Floats, see: See) -> Floats:
        see("mixer.in_proj", x)
        b, c, u = np.split(first(x, first_bias), 3, axis=-1)
        y = c * causal_conv1d(b * u, weight, bias)[0]
        see("mixer.out_proj", y)
        return out(y, out_bias)

    return compute


@_observed.register
def _(kind: RGLRU, source: _Floats) -> Callable[[Floats, See], Floats]:
    n, hidden, block = kind.width, source.hidden, kind.width // kind.heads
    conv, conv_bias = (source.tensor("mixer.conv1d.weight", n, 1, kind.conv).reshape(n, kind.conv),
                       source.tensor("mixer.conv1d.bias", n))
    y_product, x_product = (source.product(f"mixer.linear_{side}", n, hidden) for side in "yx")
    y_bias, x_bias = (source.tensor(f"mixer.linear_{side}.bias", n) for side in "yx")
    out, out_bias = source.product("mixer.linear_out", hidden, n), source.tensor("mixer.linear_out.bias", hidden)
    gates = [(source.tensor(f"mixer.{gate}_gate_weight", kind.heads, block, block),
              source.tensor(f"mixer.{gate}_gate_bias", kind.heads, block)) for gate in ("input", "recurrent")]
    param, f = source.tensor("mixer.recurrent_param", n), _ACTIVATIONS[kind.activation]

    def compute(x: Floats, see: See) -> Floats:
        see("mixer.linear_y", x)
        u, _ = causal_conv1d(x_product(x, x_bias), conv, conv_bias)
        heads, begins = u.reshape(-1, kind.heads, 1, block), np.arange(x.shape[1])[None] == 0
        i, r = ((heads @ w + b[:, None]).reshape(u.shape) for w, b in gates)
        y = f(y_product(x, y_bias)) * rg_lru(u, i, r, param, reset=begins)[0]
        see("mixer.linear_out", y)
        return out(y, out_bias)

    return compute


_ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "silu": silu, "gelu": gelu, "relu": relu, "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
    "relu2": lambda x: np.square(relu(x))}


def _mlp(kind: GatedMLP | MLP, source: _Floats, names: Sequence[str], gated: bool) -> Callable[[Floats, See], Floats]:
    rows = 2 * kind.width if gated and len(names) == 1 else kind.width
    products = [source.product(name, rows, source.hidden) for name in names]
    biases = [source.bias(kind.bias, f"mlp.{p}_proj", kind.width) for p in (("gate", "up") if gated else ("up",))]
    down = source.product("mlp.down_proj", source.hidden, kind.width)
    down_bias = source.bias(kind.bias, "mlp.down_proj", source.hidden)
    f = _ACTIVATIONS[kind.activation]

    def compute(x: Floats, see: See) -> Floats:
        see(names[0], x)
        joined = np.concatenate([product(x) for product in products], axis=-1)
        sides = np.split(joined, 2 if gated else 1, axis=-1)
        sides = [np.ascontiguousarray(s if b is None else s + b) for s, b in zip(sides, biases, strict=True)]
        hidden = f(sides[0]) * sides[1] if gated else f(sides[0])
        see("mlp.down_proj", hidden)
        return down(hidden, down_bias)

    return compute


@_observed.register
def _(kind: GatedMLP, source: _Floats) -> Callable[[Floats, See], Floats]:
    return _mlp(kind, source, ["mlp.gate_up_proj"] if kind.fused else ["mlp.gate_proj", "mlp.up_proj"], True)


@_observed.register
def _(kind: MLP, source: _Floats) -> Callable[[Floats, See], Floats]:
    return _mlp(kind, source, ["mlp.up_proj"], False)


def _ahead(layer: LayerSpec, source: _Floats, see: See) -> Callable[[Floats, Floats], Any]:
    """What is added to the input of the mixer, from x and the embeddings."""
    if layer.ahead is None:
        return lambda x, embedded: np.float32(0)
    parts: Any = [_observed(kind, source) for kind in (layer.ahead.attention, layer.ahead.mlp)]
    norms = [source.norm(layer.norm, name, n) for name, n in ahead_norms(source.hidden).items()]

    def compute(x: Floats, embedded: Floats) -> Floats:
        y: Floats = np.concatenate([x, embedded], axis=-1)
        for part, norm in zip(parts, norms, strict=True):
            y = part(norm(y), see)
        return y

    return compute


def _through(layer: LayerSpec, source: _Floats, texts: Sequence[tuple[Floats, Floats]], see: See) -> Iterator[Floats]:
    """Each text after the layer, of what it is before it and the embeddings."""
    steps, ahead = [], _ahead(layer, source, see)
    for kinds, names in zip(((layer.mixer, layer.beside), (layer.mlp,)), norm_names(layer), strict=True):
        parts = [_observed(kind, source) for kind in kinds if kind is not None]
        norms = [None if not parts or name is None else source.norm(layer.norm, name, source.hidden) for name in names]
        steps.append((parts, norms))

    def branch(x: Floats, step: Any) -> Any:
        parts, (before, after) = step
        if not parts:
            return np.float32(0)
        seen = x if before is None else before(x)
        ys = [part(seen, see) for part in parts]
        first, *others = ys if after is None else [after(y) for y in ys]
        return np.float32(layer.residual_scale) * sum(others, first)

    def whole(x: Floats, embedded: Floats) -> Any:
        first = x + branch(x if layer.ahead is None else x + ahead(x, embedded), steps[0])
        return first + branch(x if layer.parallel else first, steps[1])

    for x, embedded in texts:
        if layer.router is None:
            yield whole(x, embedded)
            continue
        gate, at = _routed(layer.router, source, x[0])
        out = x.copy()
        if len(at):
            source.positions = at
            r = gate[at, None]
            out[0, at] = (1 - r) * x[0, at] + r * whole(x[:, at], embedded)[0]
        yield out


def _routed(router: Router, source: _Floats, x: Floats) -> tuple[Floats, NDArray[np.intp]]:
    """(logits (n,), which tokens go through) of x (n, hidden)."""
    logits = x @ source.matrix("router", 1, source.hidden).astype(np.float32)[:, 0]
    if router.predictor is None:
        return logits, np.flatnonzero(logits > np.float32(router.threshold))
    up, down = "router.predictor.up", "router.predictor.down"
    inner = silu(source.product(up, router.predictor, source.hidden)(x, source.bias(True, up, router.predictor)))
    scores = inner @ source.matrix(down, 1, router.predictor).astype(np.float32)[:, 0]
    return logits, np.flatnonzero(scores + source.checkpoint.take(f"{source.prefix}{down}.bias", (1,)) > 0)
