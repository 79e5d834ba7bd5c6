"""What is done with each kind of a spec: its weights from a checkpoint, its state, its channels in the forward pass.

A new kind registers here: `build_part` makes what computes it, `new_state` what it remembers, if it does.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, singledispatch
from itertools import groupby
from operator import itemgetter
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from forge_c.formats.layout import Activations, PackDtype
from forge_c.functional import (
    AttentionPart,
    Mamba2Part,
    MambaPart,
    MLPPart,
    Norm,
    PackedWeight,
    Part,
    Ranks,
    RGLRUPart,
    Router,
    ShortConvPart,
)
from forge_c.models.balance import balance
from forge_c.models.spec import MLP, RGLRU, Attention, GatedMLP, LayerSpec, Mamba, Mamba2, Routed, ShortConv
from forge_c.models.spec import Norm as NormSpec
from forge_c.models.spec import Router as RouterSpec
from forge_c.models.weights import StoredTensors, Tensors, decay
from forge_c.packing import pack, pack_blocks, pack_gated, pack_gated_blocks
from forge_c.state.kv import KVCache
from forge_c.state.recurrent import RecurrentState
from forge_c.state.routed import RoutedCache

Floats = NDArray[np.float32]
Over = tuple[Ranks | None, Ranks]  # of a part, the ranks that it is spread over


class LayerSource:
    """The tensors of one layer by the names that Hugging Face gives them; matrices are (out, in) there. A matrix is let
    go as soon as it is packed."""

    def __init__(self, checkpoint: Tensors, prefix: str, hidden: int, dtype: PackDtype,
                 activations: Activations | None = None, formats: Callable[[str, int], PackDtype] | None = None,
                 importance: Callable[[str], Any] | None = None) -> None:
        self.checkpoint, self.prefix, self.hidden, self.dtype = checkpoint, prefix, hidden, dtype
        self.activations = activations  # as in pack
        self.formats = formats or (lambda name, in_features: dtype)
        self.importance = importance or (lambda name: None)
        self.spread: Mapping[Any, Over] = {}  # of kinds whose heads or channels are a share: as in their parts

    def matrix(self, name: str, rows: int, columns: int) -> NDArray[Any]:
        """(out, in) as the file has it."""
        return self.checkpoint.take(f"{self.prefix}{name}.weight", (rows, columns))

    def packed(self, name: str, rows: int, columns: int) -> PackedWeight:
        """The same as (in, out), packed."""
        return self._pack(name, self.matrix(name, rows, columns))

    def _pack(self, name: str, matrix: NDArray[Any]) -> PackedWeight:
        """A matrix (out, in) in the format of the one of that name."""
        form = self.formats(name, matrix.shape[1])
        rounded = None if form in ("float32", "bfloat16") else self.activations
        with self._naming(name):
            return pack(matrix.T, form, activations=rounded, importance=self.importance(name))

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """What pack refuses is told of the matrix."""
        try:
            yield
        except (TypeError, ValueError) as error:
            raise type(error)(f"load: {self.prefix}{name}.weight: {str(error).partition(': ')[2]}") from None

    def side_by_side(self, parts: Mapping[str, int], columns: int) -> PackedWeight | Sequence[PackedWeight]:
        """Matrices of these rows, packed as one; or as several, of formats of their own."""
        packed = []
        for _, some in groupby(parts, key=lambda name: self.formats(name, columns)):
            names = list(some)
            packed.append(self._pack(names[0], np.concatenate([self.matrix(n, parts[n], columns) for n in names])))
        return packed[0] if len(packed) == 1 else packed

    def pair(self, kind: GatedMLP) -> PackedWeight | Sequence[PackedWeight]:
        """gate and up, packed as a pair; or each in a format of its own."""
        if kind.fused:
            gate, up = np.split(self.matrix("mlp.gate_up_proj", 2 * kind.width, self.hidden), 2)
        else:
            gate, up = (self.matrix(f"mlp.{side}_proj", kind.width, self.hidden) for side in ("gate", "up"))
        names = ["mlp.gate_up_proj"] if kind.fused else ["mlp.gate_proj", "mlp.up_proj"]
        formats = {self.formats(name, self.hidden) for name in names}
        if len(formats) > 1:
            return self._pack(names[0], gate), self._pack(names[1], up)
        with self._naming(names[0]):
            return pack_gated(gate.T, up.T, formats.pop(), activations=self.activations,
                              importance=self.importance(names[0]))

    def bias(self, wanted: bool, *parts: tuple[str, int]) -> Floats | None:
        """Biases end to end, or None where they are not wanted."""
        return np.concatenate([self.vector(f"{name}.bias", n) for name, n in parts]) if wanted else None

    def vector(self, name: str, n: int) -> Floats:
        """(n,) in float32."""
        return self.tensor(name, n)

    def tensor(self, name: str, *shape: int) -> Floats:
        """Of any shape, in float32."""
        return self.checkpoint.take(self.prefix + name, shape).astype(np.float32)

    def convolution(self, name: str, channels: int, width: int) -> PackedWeight:
        """A short convolution of each channel: (width, channels), in float32 whatever the model's dtype."""
        return pack(self.tensor(f"{name}.weight", channels, 1, width).reshape(channels, width).T)

    def heads(self, name: str, heads: int, size: int) -> list[PackedWeight]:
        """A product of its own for each head, from one tensor, whose matrices are (in, out)."""
        return [self._pack(name, block.T) for block in self.tensor(f"{name}_weight", heads, size, size)]

    def decay(self, name: str, *shape: int) -> Floats:
        """A of a state space, from its logarithm."""
        return decay(self.checkpoint, self.prefix + name, shape)

    def norm(self, spec: NormSpec, name: str, n: int) -> Norm:
        """A norm over n channels."""
        bias = self.vector(f"{name}.bias", n) if spec.kind == "layer" else None
        return Norm(spec.kind, n, self.vector(f"{name}.weight", n), bias, eps=spec.eps, offset=spec.offset)


class StoredSource(LayerSource):
    """Matrices as the checkpoint stores them: its blocks, packed number by number. Neighbours of one type are packed as
    one."""

    checkpoint: StoredTensors

    def raw(self, name: str, rows: int, columns: int) -> tuple[str, NDArray[np.uint8]]:
        """(type, rows of blocks)."""
        return self.checkpoint.take_raw(f"{self.prefix}{name}.weight", (rows, columns))

    def blocks(self, kind: str, *raws: NDArray[np.uint8]) -> PackedWeight:
        """Matrices of one type, packed as one."""
        return pack_blocks(kind, *raws, activations=self.activations)

    def packed(self, name: str, rows: int, columns: int) -> PackedWeight:
        return self.blocks(*self.raw(name, rows, columns))

    def side_by_side(self, parts: Mapping[str, int], columns: int) -> PackedWeight | Sequence[PackedWeight]:
        raws = [self.raw(name, rows, columns) for name, rows in parts.items()]
        return [self.blocks(kind, *(raw for _, raw in some)) for kind, some in groupby(raws, key=itemgetter(0))]

    def pair(self, kind: GatedMLP) -> PackedWeight | Sequence[PackedWeight]:
        if kind.fused:
            stored, both = self.raw("mlp.gate_up_proj", 2 * kind.width, self.hidden)
            return pack_gated_blocks(stored, *np.split(both, 2), activations=self.activations)
        (gate_type, gate), (up_type, up) = (self.raw(f"mlp.{side}_proj", kind.width, self.hidden)
                                            for side in ("gate", "up"))
        if gate_type == up_type:
            return pack_gated_blocks(gate_type, gate, up, activations=self.activations)
        return self.blocks(gate_type, gate), self.blocks(up_type, up)


Norms = tuple[Norm | None, Norm | None]  # before the part and after it


@singledispatch
def build_part(kind: Any, source: LayerSource, norms: Callable[[], Norms]) -> Part | None:
    """The part that computes `kind`, with its weights; norms() takes its norms from the source."""
    raise TypeError(f"build_part: no part computes a {type(kind).__name__}")


@singledispatch
def new_state(kind: Any, batch: int, max_seq_len: int, dtype: str) -> Any:
    """What a mixer of this kind remembers of `batch` rows, a forge_c.state.LayerState; None: nothing."""
    return None


@build_part.register
def _(kind: None, source: LayerSource, norms: Callable[[], Norms]) -> None:
    return None


# ---- the kinds ----


@build_part.register
def _(kind: Attention, source: LayerSource, norms: Callable[[], Norms]) -> Part:
    queries, keys, width = kind.n_heads * kind.head_dim, kind.n_kv_heads * kind.head_dim, source.hidden * kind.streams
    sizes = {"q": queries, "k": keys, "v": keys}
    if kind.fused:
        qkv: Any = source.packed("self_attn.qkv_proj", queries + 2 * keys, width)
    else:
        qkv = source.side_by_side({f"self_attn.{p}_proj": n for p, n in sizes.items()}, width)
    out = source.packed("self_attn.o_proj", source.hidden, queries)
    norm, post_norm = norms()
    q_norm, k_norm = (None if kind.qk_norm is None else source.norm(kind.qk_norm, f"self_attn.{p}_norm", kind.head_dim)
                      for p in "qk")
    qkv_bias = source.bias(kind.qkv_bias, *((f"self_attn.{p}_proj", n) for p, n in sizes.items()))
    return AttentionPart(
        qkv, out, heads=kind.n_heads, kv_heads=kind.n_kv_heads, head_dim=kind.head_dim, norm=norm, post_norm=post_norm,
        q_norm=q_norm, k_norm=k_norm, scale=kind.scale, softcap=kind.softcap or 0.0, window=kind.window,
        qkv_bias=qkv_bias, balance=balance(kind, qkv_bias), width=width,
        out_bias=source.bias(kind.o_bias, ("self_attn.o_proj", source.hidden)), over=source.spread.get(kind))


@new_state.register
def _(kind: Attention, batch: int, max_seq_len: int, dtype: str) -> KVCache:
    return KVCache(batch, max_seq_len, kind.n_kv_heads, kind.head_dim, dtype=dtype, window=kind.window)


@new_state.register(Mamba)
@new_state.register(Mamba2)
@new_state.register(ShortConv)
@new_state.register(RGLRU)
def _(kind: Mamba | Mamba2 | ShortConv | RGLRU, batch: int, max_seq_len: int, dtype: str) -> RecurrentState:
    return RecurrentState(batch, kind.floats)


@build_part.register
def _(kind: Mamba, source: LayerSource, norms: Callable[[], Norms]) -> Part:
    inner, n, rank = kind.inner, kind.state, kind.dt_rank
    norm, post_norm = norms()
    inputs = [_input_norm(kind, source, name, size) for name, size in (("dt", rank), ("b", n), ("c", n))]
    return MambaPart(
        source.packed("mixer.in_proj", 2 * inner, source.hidden), source.convolution("mixer.conv1d", inner, kind.conv),
        source.packed("mixer.x_proj", rank + 2 * n, inner), source.packed("mixer.dt_proj", inner, rank),
        source.packed("mixer.out_proj", source.hidden, inner), a=source.decay("mixer.A_log", inner, n),
        d=source.vector("mixer.D", inner), dt_bias=source.vector("mixer.dt_proj.bias", inner),
        conv_bias=source.bias(kind.conv_bias, ("mixer.conv1d", inner)),
        in_bias=source.bias(kind.bias, ("mixer.in_proj", 2 * inner)),
        out_bias=source.bias(kind.bias, ("mixer.out_proj", source.hidden)), norm=norm, post_norm=post_norm,
        dt_norm=inputs[0], b_norm=inputs[1], c_norm=inputs[2], over=source.spread.get(kind))


def _input_norm(kind: Mamba, source: LayerSource, name: str, n: int) -> Norm | None:
    if kind.norm is None:
        return None
    if kind.weighted:
        return source.norm(kind.norm, f"mixer.{name}_layernorm", n)
    return Norm(kind.norm.kind, n, eps=kind.norm.eps)


@build_part.register
def _(kind: Mamba2, source: LayerSource, norms: Callable[[], Norms]) -> Part:
    rows = kind.inner + kind.channels + kind.heads
    norm, post_norm = norms()
    return Mamba2Part(
        source.packed("mixer.in_proj", rows, source.hidden),
        source.convolution("mixer.conv1d", kind.channels, kind.conv),
        source.packed("mixer.out_proj", source.hidden, kind.inner), heads=kind.heads, groups=kind.groups, n=kind.state,
        a=source.decay("mixer.A_log", kind.heads), d=source.vector("mixer.D", kind.heads),
        dt_bias=source.vector("mixer.dt_bias", kind.heads),
        conv_bias=source.bias(kind.conv_bias, ("mixer.conv1d", kind.channels)),
        in_bias=source.bias(kind.bias, ("mixer.in_proj", rows)),
        out_bias=source.bias(kind.has_out_bias, ("mixer.out_proj", source.hidden)), dt_min=kind.dt_min,
        dt_max=kind.dt_max, norm=norm, post_norm=post_norm, norm_before_gate=kind.norm_before_gate,
        inner_norm=None if kind.norm is None else source.norm(kind.norm, "mixer.norm", kind.inner))


@build_part.register
def _(kind: ShortConv, source: LayerSource, norms: Callable[[], Norms]) -> Part:
    hidden, n = source.hidden, kind.channels
    norm, post_norm = norms()
    return ShortConvPart(
        source.packed("mixer.in_proj", 3 * n, hidden), source.convolution("mixer.conv1d", n, kind.width),
        source.packed("mixer.out_proj", hidden, n), conv_bias=source.bias(kind.bias, ("mixer.conv1d", n)),
        in_bias=source.bias(kind.bias, ("mixer.in_proj", 3 * n)),
        out_bias=source.bias(kind.bias, ("mixer.out_proj", hidden)), norm=norm, post_norm=post_norm,
        over=source.spread.get(kind))


@build_part.register
def _(kind: RGLRU, source: LayerSource, norms: Callable[[], Norms]) -> Part:
    width, hidden, block = kind.width, source.hidden, kind.width // kind.heads
    norm, post_norm = norms()
    first = {f"mixer.linear_{side}": width for side in "yx"}  # of one role, so of one format
    gates = [source.heads(f"mixer.{gate}_gate", kind.heads, block) for gate in ("input", "recurrent")]
    biases = [source.tensor(f"mixer.{gate}_gate_bias", kind.heads, block) for gate in ("input", "recurrent")]
    return RGLRUPart(
        cast(PackedWeight, source.side_by_side(first, hidden)), source.convolution("mixer.conv1d", width, kind.conv),
        [*gates[0], *gates[1]], source.packed("mixer.linear_out", hidden, width), heads=kind.heads,
        param=source.vector("mixer.recurrent_param", width), activation=kind.activation, gate_bias=np.stack(biases),
        conv_bias=source.vector("mixer.conv1d.bias", width), in_bias=source.bias(True, *first.items()),
        out_bias=source.vector("mixer.linear_out.bias", hidden), norm=norm, post_norm=post_norm,
        over=source.spread.get(kind))


@build_part.register
def _(kind: GatedMLP, source: LayerSource, norms: Callable[[], Norms]) -> Part:
    width, hidden = kind.width, source.hidden
    pair = source.pair(kind)
    down = source.packed("mlp.down_proj", hidden, width)
    norm, post_norm = norms()
    return MLPPart(pair, down, activation=kind.activation, norm=norm, post_norm=post_norm,
                   up_bias=source.bias(kind.bias, ("mlp.gate_proj", width), ("mlp.up_proj", width)),
                   down_bias=source.bias(kind.bias, ("mlp.down_proj", hidden)), over=source.spread.get(kind))


@build_part.register
def _(kind: MLP, source: LayerSource, norms: Callable[[], Norms]) -> Part:
    up = source.packed("mlp.up_proj", kind.width, source.hidden)
    down = source.packed("mlp.down_proj", source.hidden, kind.width)
    norm, post_norm = norms()
    return MLPPart(up, down, activation=kind.activation, norm=norm, post_norm=post_norm,
                   up_bias=source.bias(kind.bias, ("mlp.up_proj", kind.width)),
                   down_bias=source.bias(kind.bias, ("mlp.down_proj", source.hidden)), over=source.spread.get(kind))


@new_state.register
def _(kind: Routed, batch: int, max_seq_len: int, dtype: str) -> RoutedCache:
    return RoutedCache(new_state(kind.mixer, batch, max_seq_len, dtype))


# ---- a layer ----

# Names of the norms before and after the mixer, and before and after the mlp.
_NORM_NAMES = {"pre": ("input_layernorm", None, "post_attention_layernorm", None),
               "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
               "both": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                        "post_feedforward_layernorm"),
               "alone": ("input_layernorm", None, "input_layernorm", None)}


def norm_names(layer: LayerSpec) -> tuple[tuple[str | None, str | None], tuple[str | None, str | None]]:
    """Of the norms before and after the mixer, and before and after the mlp."""
    before, after, before_mlp, after_mlp = _NORM_NAMES[layer.norms]
    return (before, after), (before_mlp, after_mlp)


def ahead_norms(hidden: int) -> dict[str, int]:
    """Names and channels of the norms before attention and mlp ahead of a mixer."""
    return {"ahead.input_layernorm": 2 * hidden, "ahead.post_attention_layernorm": hidden}


def build_router(spec: RouterSpec, source: LayerSource) -> Router:
    """In float32 whatever the layer's format: which tokens go through is no matter of formats."""
    hidden, inner = source.hidden, spec.predictor
    weight = source.matrix("router", 1, hidden).astype(np.float32).reshape(hidden)
    if inner is None:
        return Router(weight, spec.threshold)
    up = pack(source.matrix("router.predictor.up", inner, hidden).T, "float32")
    down = source.matrix("router.predictor.down", 1, inner).astype(np.float32).reshape(inner)
    return Router(weight, spec.threshold, up=up, up_bias=source.vector("router.predictor.up.bias", inner), down=down,
                  down_bias=float(source.vector("router.predictor.down.bias", 1)[0]))


def build_layer(layer: LayerSpec, source: LayerSource) -> tuple[Any, ...]:
    """(mixer, mlp, parallel, residual scale), and behind them, if there is one, the router, the mixer beside, or the
    parts ahead, as LayeredModel takes a layer."""
    (before, after), (before_mlp, after_mlp) = norm_names(layer)

    def norms_of(*names: str | None) -> Callable[[], Norms]:
        @cache  # two mixers have the same
        def norms() -> Norms:
            first, second = (None if n is None else source.norm(layer.norm, n, source.hidden) for n in names)
            return first, second
        return norms

    of_mixers = norms_of(before, after)
    mixer = build_part(layer.mixer, source, of_mixers)
    mlp = build_part(layer.mlp, source, norms_of(before_mlp, after_mlp))
    made = mixer, mlp, layer.parallel, layer.residual_scale
    if layer.ahead is not None:
        norms = ((source.norm(layer.norm, name, n), None) for name, n in ahead_norms(source.hidden).items())
        attention = build_part(layer.ahead.attention, source, norms.__next__)
        return *made, None, None, attention, build_part(layer.ahead.mlp, source, norms.__next__)
    if layer.beside is not None:
        return *made, None, build_part(layer.beside, source, of_mixers)
    return made if layer.router is None else (*made, build_router(layer.router, source))
