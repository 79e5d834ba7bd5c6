"""Which heads and channels of a layer are which rank's: pure functions of the layer, the ranks and the formats.

A matrix whose results are heads or inner channels is cut by columns (rows of the file, which has (out, in)):

    attention   q, k, v of some heads        k and v of a head may be on several ranks, of q on one
    mlp         gate, up of some channels
    Mamba       in, conv, dt of some channels
    short conv  in, conv of some channels
    RG-LRU      y, x, conv of some heads, and their gates

and for the layer's last matrix, which takes these in, there are two ways. `exact`: it is cut by columns too, ranks tell
each other the channels that go in and those that come out, and every number is the sum of one process, in its order.
Else it is cut by rows, what a rank's rows give is a term of a sum over ranks, and half as many messages go about; cuts
fall between groups of weights that share a scale, so that weights are the numbers of one process.

Norms and routers are on every rank, so is Mamba's x matrix where exact, and so is Mamba-2 as a whole.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import singledispatch
from math import lcm
from typing import Any

from forge_c.models.spec import MLP, RGLRU, Attention, GatedMLP, LayerSpec, Mamba, ShortConv
from forge_c.models.weights.share import Cut, Kept

UnitOf = Callable[[str, int], int]  # of a matrix's name and in_features: where its rows may be cut
Cuts = dict[str, Cut | Kept]
Ranges = tuple[range, ...]


@dataclass(frozen=True)
class Place:
    """One rank of several, and what it needs to know of the model. columns: each rank's of the residual stream, of a
    model that is exact; None: of sums."""

    rank: int
    size: int
    hidden: int
    columns: Ranges | None
    unit: UnitOf
    where: str  # as errors begin


@dataclass(frozen=True)
class Share:
    """What a rank has of a part: the kind that it computes, and the cuts of its tensors, by their names within the
    layer; without any it has all of it. inner: each rank's of the channels that its last matrix takes in."""

    kind: Any
    cuts: Mapping[str, Cut | Kept] = field(default_factory=dict)
    inner: Ranges = ()


@dataclass(frozen=True)
class LayerShare:
    """What a rank has of a layer. inner: as in Share, of the kinds that are not whole."""

    layer: LayerSpec
    cuts: Mapping[str, Cut | Kept]
    inner: Mapping[Any, Ranges]


def layer_share(layer: LayerSpec, place: Place) -> LayerShare:
    """The rank's share of a layer; ValueError if it cannot be cut into so many."""
    mixer, mlp, beside = found = [share_of(kind, place) for kind in (layer.mixer, layer.mlp, layer.beside)]
    made = replace(layer, mixer=mixer.kind, mlp=mlp.kind, beside=beside.kind)
    if layer.ahead is not None:
        attention, behind = (share_of(kind, place) for kind in (layer.ahead.attention, layer.ahead.mlp))
        found += [attention, behind]
        made = replace(made, ahead=replace(layer.ahead, attention=attention.kind, mlp=behind.kind))
    cuts = {name: cut for share in found for name, cut in share.cuts.items()}
    return LayerShare(made, cuts, {share.kind: share.inner for share in found if share.cuts})


@singledispatch
def share_of(kind: Any, place: Place) -> Share:
    """The rank's share of a part of this kind; of kinds that are not named here all of it."""
    return Share(kind)


@share_of.register
def _(kind: Attention, place: Place) -> Share:
    dim, queries, keys = (n * kind.head_dim for n in (1, kind.n_heads, kind.n_kv_heads))
    unit = _unit(place, queries, "self_attn.o_proj")
    step = lcm(unit, dim) // dim
    heads = cut_heads(kind.n_heads, kind.n_kv_heads, step, place.size)
    if heads is None:
        most = next(n for n in range(place.size - 1, 0, -1) if cut_heads(kind.n_heads, kind.n_kv_heads, step, n))
        raise ValueError(f"{place.where}: attention has {kind.n_heads} heads, {kind.n_kv_heads} of keys and values, "
                         f"expected some for each of {place.size} ranks{_because(step, unit)}; at most {most} get some")
    of_q, of_kv = heads[place.rank]
    q, kv = _times(dim, of_q), _times(dim, of_kv)
    whole = {"q": (queries, q), "k": (keys, kv), "v": (keys, kv)}
    cuts: Cuts = {f"self_attn.{p}_proj.{end}": Cut(0, n, (some,)) for p, (n, some) in whole.items()
                  for end in ("weight", "bias")}
    cuts["self_attn.qkv_proj.weight"] = Cut(0, queries + 2 * keys, (
        q, _after(queries, kv), _after(queries + keys, kv)))
    kept = replace(kind, n_heads=len(of_q), n_kv_heads=len(of_kv))
    return _share(kept, place, "self_attn.o_proj", queries, [_times(dim, some) for some, _ in heads], cuts)


@share_of.register
def _(kind: GatedMLP, place: Place) -> Share:
    n = kind.width
    ranges = _channels(n, place, "mlp.down_proj")
    some = ranges[place.rank]
    cuts: Cuts = {f"mlp.{side}_proj.{end}": Cut(0, n, (some,)) for side in ("gate", "up") for end in ("weight", "bias")}
    cuts["mlp.gate_up_proj.weight"] = Cut(0, 2 * n, (some, _after(n, some)))
    return _share(replace(kind, width=len(some)), place, "mlp.down_proj", n, ranges, cuts)


@share_of.register
def _(kind: MLP, place: Place) -> Share:
    ranges = _channels(kind.width, place, "mlp.down_proj")
    some = ranges[place.rank]
    cuts: Cuts = {f"mlp.up_proj.{end}": Cut(0, kind.width, (some,)) for end in ("weight", "bias")}
    return _share(replace(kind, width=len(some)), place, "mlp.down_proj", kind.width, ranges, cuts)


@share_of.register
def _(kind: Mamba, place: Place) -> Share:
    n, of_x = kind.inner, kind.dt_rank + 2 * kind.state
    ranges = _channels(n, place, "mixer.out_proj", "mixer.x_proj")
    some = ranges[place.rank]
    cuts: Cuts = dict.fromkeys(("mixer.in_proj.weight", "mixer.in_proj.bias"), Cut(0, 2 * n, (some, _after(n, some))))
    cuts |= _same(Cut(0, n, (some,)), "conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias", "A_log", "D")
    cuts["mixer.x_proj.weight"] = Cut(1, n, (some,)) if place.columns is None else Cut(0, of_x, (range(of_x),), n)
    return _share(replace(kind, inner=len(some)), place, "mixer.out_proj", n, ranges, cuts)


@share_of.register
def _(kind: ShortConv, place: Place) -> Share:
    n = kind.channels
    ranges = _channels(n, place, "mixer.out_proj")
    some = ranges[place.rank]
    cuts: Cuts = dict.fromkeys(("mixer.in_proj.weight", "mixer.in_proj.bias"), Cut(0, 3 * n, (
        some, _after(n, some), _after(2 * n, some))))
    cuts |= _same(Cut(0, n, (some,)), "conv1d.weight", "conv1d.bias")
    return _share(replace(kind, channels=len(some)), place, "mixer.out_proj", n, ranges, cuts)


@share_of.register
def _(kind: RGLRU, place: Place) -> Share:
    n, block = kind.width, kind.width // kind.heads
    unit = _unit(place, n, "mixer.linear_out")
    step = lcm(unit, block) // block
    heads = cut_evenly(kind.heads, step, place.size)
    if heads is None:
        raise ValueError(f"{place.where}: the recurrent block has {kind.heads} heads, expected some for each of "
                         f"{place.size} ranks{_because(step, unit)}; at most {-(-kind.heads // step)} get some")
    ranges, mine = [_times(block, each) for each in heads], heads[place.rank]
    cuts = _same(Cut(0, n, (ranges[place.rank],)), "linear_y.weight", "linear_y.bias", "linear_x.weight",
                 "linear_x.bias", "conv1d.weight", "conv1d.bias", "recurrent_param")
    cuts |= _same(Cut(0, kind.heads, (mine,)), "input_gate_weight", "input_gate_bias", "recurrent_gate_weight",
                  "recurrent_gate_bias")
    return _share(replace(kind, width=block * len(mine), heads=len(mine)), place, "mixer.linear_out", n, ranges, cuts)


def _share(kind: Any, place: Place, last: str, n: int, ranges: Sequence[range], cuts: Cuts) -> Share:
    """With the cut of the last matrix, which takes n channels in, and of its bias."""
    if place.columns is None:
        mine: Cuts = {f"{last}.weight": Cut(1, n, (ranges[place.rank],)), f"{last}.bias": Kept(place.rank == 0)}
        return Share(kind, cuts | mine)
    mine = {f"{last}.{end}": Cut(0, place.hidden, (place.columns[place.rank],), n) for end in ("weight", "bias")}
    return Share(kind, cuts | mine, tuple(ranges))


def _channels(n: int, place: Place, *names: str) -> list[range]:
    """Each rank's of n channels, which these matrices take in; ValueError if there are too few."""
    unit = _unit(place, n, *names)
    wide = lcm(unit, 128)  # whole groups of int8, where shares then differ by an eighth at most
    for each in (*[wide] * (n >= 8 * wide * place.size), lcm(unit, 16), unit):
        found = cut_evenly(n, each, place.size)
        if found is not None:
            return found
    raise ValueError(f"{place.where}: {names[0]} takes in {n} channels, expected some for each of {place.size} ranks"
                     f"{_because(unit, unit)}; at most {-(-n // unit)} get some")


def _unit(place: Place, n: int, *names: str) -> int:
    """Where the rows of these matrices may be cut, if they are."""
    return 1 if place.columns is not None else lcm(*(place.unit(name, n) for name in names))


def _because(step: int, unit: int) -> str:
    """What an error says of a cut that falls after multiples of step only."""
    return "" if step == 1 else f" in multiples of {step}, since the format has groups of {unit} channels"


def _same(cut: Cut, *names: str) -> Cuts:
    return dict.fromkeys([f"mixer.{name}" for name in names], cut)


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
        return [(_times(group, kv), kv) for kv in whole]
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


def cut_anyhow(what: str, n: int, size: int) -> Ranges:
    """n in whole panels where all ranks get some, else as it comes; ValueError if there are fewer than ranks."""
    found = cut_evenly(n, 16, size) or cut_evenly(n, 1, size)
    if found is None:
        raise ValueError(f"parallel: {what}, expected one for each of {size} ranks")
    return tuple(found)


def _times(n: int, some: range) -> range:
    return range(n * some.start, n * some.stop)


def _after(n: int, some: range) -> range:
    return range(n + some.start, n + some.stop)
