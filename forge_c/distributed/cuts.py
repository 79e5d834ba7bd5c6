"""Which heads and channels of a layer are which rank's: pure functions of the layer, the ranks and the formats.

A matrix whose results are heads or inner channels is cut by columns, and the one that takes these in by rows (here, as
files have them, (out, in): the other way round). What a rank's rows give is a term of a sum over ranks:

    attention   q, k, v of some heads | o of these channels     k and v of a head may be on several ranks, of q on one
    mlp         gate, up of some channels | down of these
    Mamba       in, conv, dt of some channels | x, whose results are summed too, and out of these
    RG-LRU      the block-diagonal gates of some heads, y, x, conv | out of these

Norms of heads, routers and norms of the stream are on every rank, and so are Mamba-2 and short convolutions as a whole:
they compute the same everywhere. Cuts along the channels that go in fall between groups that share a scale, so that a
weight is the same number as in one process; shares may differ by one such unit.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import singledispatch
from math import lcm
from typing import Any

from forge_c.models.spec import MLP, RGLRU, Attention, GatedMLP, LayerSpec, Mamba
from forge_c.models.weights.share import Cut, Kept

UnitOf = Callable[[str, int], int]  # of a matrix's name and in_features: where its rows may be cut


@dataclass(frozen=True)
class Place:
    """One rank of several, and what it needs to know of the formats."""

    rank: int
    size: int
    unit: UnitOf
    where: str  # as errors begin


@dataclass(frozen=True)
class Share:
    """What a rank has of a part: the kind that it computes, and the cuts of its tensors, by their names within the
    layer. Without cuts it has all of it."""

    kind: Any
    cuts: Mapping[str, Cut | Kept] = field(default_factory=dict)

    @property
    def is_term(self) -> bool:
        """Whether what it gives is a term of the sum over ranks."""
        return bool(self.cuts)


@dataclass(frozen=True)
class LayerShare:
    """What a rank has of a layer; terms: which of its parts, in the order of build_layer, give terms of sums."""

    layer: LayerSpec
    cuts: Mapping[str, Cut | Kept]
    mixer: bool
    mlp: bool
    beside: bool
    ahead: tuple[bool, bool]


def layer_share(layer: LayerSpec, place: Place) -> LayerShare:
    """The rank's share of a layer; ValueError if it cannot be cut into so many."""
    mixer, mlp, beside = (share_of(kind, place) for kind in (layer.mixer, layer.mlp, layer.beside))
    found = [mixer, mlp, beside]
    made = replace(layer, mixer=mixer.kind, mlp=mlp.kind, beside=beside.kind)
    if layer.ahead is not None:
        found += [share_of(kind, place) for kind in (layer.ahead.attention, layer.ahead.mlp)]
        made = replace(made, ahead=replace(layer.ahead, attention=found[3].kind, mlp=found[4].kind))
    cuts = {name: cut for share in found for name, cut in share.cuts.items()}
    terms = [share.is_term for share in found] + [False, False]
    return LayerShare(made, cuts, terms[0], terms[1], terms[2], (terms[3], terms[4]))


@singledispatch
def share_of(kind: Any, place: Place) -> Share:
    """The rank's share of a part of this kind; of kinds that are not named here all of it."""
    return Share(kind)


@share_of.register
def _(kind: Attention, place: Place) -> Share:
    dim, queries = kind.head_dim, kind.n_heads * kind.head_dim
    unit = place.unit("self_attn.o_proj", queries)
    step = lcm(unit, dim) // dim
    heads = cut_heads(kind.n_heads, kind.n_kv_heads, step, place.size)
    if heads is None:
        most = next(n for n in range(place.size - 1, 0, -1) if cut_heads(kind.n_heads, kind.n_kv_heads, step, n))
        raise ValueError(f"{place.where}: attention has {kind.n_heads} heads, {kind.n_kv_heads} of keys and values, "
                         f"expected some for each of {place.size} ranks{_because(step, unit)}; at most {most} get some")
    of_q, of_kv = heads[place.rank]
    q, kv = _channels(of_q, dim), _channels(of_kv, dim)
    keys = kind.n_kv_heads * dim
    whole = {"q": (queries, q), "k": (keys, kv), "v": (keys, kv)}
    cuts: dict[str, Cut | Kept] = {f"self_attn.{p}_proj.{end}": Cut(0, n, (some,)) for p, (n, some) in whole.items()
                                   for end in ("weight", "bias")}
    cuts["self_attn.qkv_proj.weight"] = Cut(0, queries + 2 * keys, (
        q, _after(queries, kv), _after(queries + keys, kv)))
    cuts |= _summed("self_attn.o_proj", queries, q, place)
    return Share(replace(kind, n_heads=len(of_q), n_kv_heads=len(of_kv)), cuts)


@share_of.register
def _(kind: GatedMLP, place: Place) -> Share:
    some = _channels_of(kind.width, place, "mlp.down_proj")
    cuts: dict[str, Cut | Kept] = {f"mlp.{side}_proj.{end}": Cut(0, kind.width, (some,)) for side in ("gate", "up")
                                   for end in ("weight", "bias")}
    cuts["mlp.gate_up_proj.weight"] = Cut(0, 2 * kind.width, (some, _after(kind.width, some)))
    cuts |= _summed("mlp.down_proj", kind.width, some, place)
    return Share(replace(kind, width=len(some)), cuts)


@share_of.register
def _(kind: MLP, place: Place) -> Share:
    some = _channels_of(kind.width, place, "mlp.down_proj")
    cuts: dict[str, Cut | Kept] = {f"mlp.up_proj.{end}": Cut(0, kind.width, (some,)) for end in ("weight", "bias")}
    return Share(replace(kind, width=len(some)), cuts | _summed("mlp.down_proj", kind.width, some, place))


@share_of.register
def _(kind: Mamba, place: Place) -> Share:
    n = kind.inner
    some = _channels_of(n, place, "mixer.out_proj", "mixer.x_proj")
    both, one = Cut(0, 2 * n, (some, _after(n, some))), Cut(0, n, (some,))
    cuts: dict[str, Cut | Kept] = {f"mixer.in_proj.{end}": both for end in ("weight", "bias")}
    cuts |= dict.fromkeys([f"mixer.{name}" for name in (
        "conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias", "A_log", "D")], one)
    cuts["mixer.x_proj.weight"] = Cut(1, n, (some,))
    return Share(replace(kind, inner=len(some)), cuts | _summed("mixer.out_proj", n, some, place))


@share_of.register
def _(kind: RGLRU, place: Place) -> Share:
    block = kind.width // kind.heads
    unit = place.unit("mixer.linear_out", kind.width)
    step = lcm(unit, block) // block
    heads = cut_evenly(kind.heads, step, place.size)
    if heads is None:
        raise ValueError(f"{place.where}: the recurrent block has {kind.heads} heads, expected some for each of "
                         f"{place.size} ranks{_because(step, unit)}; at most {-(-kind.heads // step)} get some")
    of_heads = heads[place.rank]
    some = _channels(of_heads, block)
    one, each = Cut(0, kind.width, (some,)), Cut(0, kind.heads, (of_heads,))
    cuts: dict[str, Cut | Kept] = dict.fromkeys([f"mixer.{name}" for name in (
        "linear_y.weight", "linear_y.bias", "linear_x.weight", "linear_x.bias", "conv1d.weight", "conv1d.bias",
        "recurrent_param")], one)
    cuts |= {f"mixer.{gate}_gate_{end}": each for gate in ("input", "recurrent") for end in ("weight", "bias")}
    cuts |= _summed("mixer.linear_out", kind.width, some, place)
    return Share(replace(kind, width=len(some), heads=len(of_heads)), cuts)


def _summed(name: str, n: int, some: range, place: Place) -> dict[str, Cut | Kept]:
    """Of a matrix whose results are summed over ranks, and of its bias, which is added once."""
    return {f"{name}.weight": Cut(1, n, (some,)), f"{name}.bias": Kept(place.rank == 0)}


def _channels_of(n: int, place: Place, *names: str) -> range:
    """The rank's channels of n, which these matrices take in; ValueError if there are too few."""
    unit = lcm(*(place.unit(name, n) for name in names))
    wide = lcm(unit, 128)  # whole groups of int8, where shares then differ by an eighth at most
    for each in (*[wide] * (n >= 8 * wide * place.size), lcm(unit, 16), unit):
        found = cut_evenly(n, each, place.size)
        if found is not None:
            return found[place.rank]
    raise ValueError(f"{place.where}: {names[0]} has {n} channels, expected some for each of {place.size} ranks"
                     f"{_because(unit, unit)}; at most {-(-n // unit)} get some")


def _because(step: int, unit: int) -> str:
    """What an error says of a cut that falls after multiples of step only."""
    return "" if step == 1 else f" in multiples of {step}, since the format has groups of {unit} channels"


# ---- the arithmetic ----


def cut_evenly(n: int, unit: int, size: int) -> list[range] | None:
    """n in `size` ranges that begin at multiples of unit and differ by one of it at most; None: there are too few."""
    units = -(-n // unit)
    if units < size:
        return None
    ends = [min(unit * ((units * (r + 1)) // size), n) for r in range(size)]
    return [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def cut_heads(heads: int, kv_heads: int, step: int, size: int) -> list[tuple[range, range]] | None:
    """(query heads, heads of keys and values) of each rank, beginning at multiples of step; None: it does not go.

    Each rank gets whole groups of queries with one key, or, where there are fewer groups than ranks, some of one group.
    """
    group = heads // kv_heads
    whole = cut_evenly(kv_heads, lcm(step, group) // group, size)
    if whole is not None:
        return [(range(group * kv.start, group * kv.stop), kv) for kv in whole]
    if size <= kv_heads or (kv_heads > 1 and group % step):
        return None
    found: list[tuple[range, range]] = []
    for kv in range(kv_heads):
        ranks = size * (kv + 1) // kv_heads - size * kv // kv_heads
        some = cut_evenly(group, step, ranks)
        if some is None:
            return None
        found += [(_after(group * kv, each), range(kv, kv + 1)) for each in some]
    return found


def _channels(heads: range, dim: int) -> range:
    return range(heads.start * dim, heads.stop * dim)


def _after(n: int, some: range) -> range:
    return range(n + some.start, n + some.stop)


def vocabulary(n: int, size: int) -> Sequence[range]:
    """Each rank's tokens; ValueError if there are fewer than ranks."""
    found = cut_evenly(n, 16, size) or cut_evenly(n, 1, size)
    if found is None:
        raise ValueError(f"parallel: the vocabulary has {n} tokens, expected one for each of {size} ranks")
    return found
