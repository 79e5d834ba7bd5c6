"""A ModelSpec as plain data, for JSON, and back: a file may say what the annotations of the kinds allow."""
from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from forge_c.checks import short
from forge_c.models.spec.kinds import (
    ABSENT,
    MLP,
    RGLRU,
    Attention,
    GatedMLP,
    JoinedAttention,
    LayerSpec,
    Mamba,
    Mamba2,
    ModelSpec,
    ShortConv,
)
from forge_c.models.spec.reader import MAX_HEADS, MAX_LAYERS, MAX_VOCAB, MAX_WIDTH
from forge_c.rotary import rope_table

_PARTS: Mapping[str, type] = {kind.__name__: kind for kind in (
    Attention, JoinedAttention, Mamba, Mamba2, ShortConv, RGLRU, GatedMLP, MLP)}
_MOST = 1 << 40  # of any integer
_MOST_ITEMS = 1 << 20


def to_document(value: Any) -> Any:
    """Dataclasses as objects; a part's has its kind's name, since a layer may have any."""
    if is_dataclass(value):
        found = {field.name: to_document(getattr(value, field.name)) for field in fields(value)
                 if ABSENT not in field.metadata or getattr(value, field.name) != field.default}
        return {"kind": type(value).__name__, **found} if type(value).__name__ in _PARTS else found
    if isinstance(value, Mapping):
        return {key: to_document(item) for key, item in value.items()}
    return [to_document(item) for item in value] if isinstance(value, list | tuple) else value


def from_document(document: Any) -> ModelSpec:
    """The spec, of sizes that fit together; ValueError says what does not."""
    spec: ModelSpec = _value(ModelSpec, document, "spec")
    _check(spec.layers, len(spec.layers) <= MAX_LAYERS, "spec.layers")
    _check(spec.vocab_size, 1 <= spec.vocab_size <= MAX_VOCAB, "spec.embed.vocab_size")
    _check(spec.hidden_size, 1 <= spec.hidden_size <= MAX_WIDTH, "spec.embed.width")
    _check(spec.max_position_embeddings, spec.max_position_embeddings >= 1, "spec.max_position_embeddings")
    for i, layer in enumerate(spec.layers):
        where = f"spec.layers[{i}]"
        _check_mixer(layer.mixer, spec.hidden_size, f"{where}.mixer")
        _check_mixer(layer.beside, spec.hidden_size, f"{where}.beside")
        _check_ahead(layer, f"{where}.ahead")
        alone = layer.mixer is None or layer.router is not None
        _check(layer.beside, layer.beside is None or not alone, f"{where}.beside")
        if layer.router is not None:
            _check(layer.mixer, isinstance(layer.mixer, Attention), f"{where}.mixer")
            size = layer.router.predictor
            _check(size, size is None or 1 <= size <= MAX_WIDTH, f"{where}.router.predictor")
        if layer.multipliers is not None:
            _check(layer.multipliers.ssm, len(layer.multipliers.ssm) == 5, f"{where}.multipliers.ssm")
    return spec


def _check_ahead(layer: LayerSpec, where: str) -> None:
    ahead = layer.ahead
    if ahead is not None:
        _check(ahead, isinstance(ahead.attention, JoinedAttention) and isinstance(ahead.mlp, GatedMLP | MLP), where)
        _check(ahead, layer.mixer is not None and layer.beside is None and layer.router is None, where)
        _check_attention(ahead.attention, f"{where}.attention")


def _check_mixer(mixer: Any, hidden: int, where: str) -> None:
    _check(mixer, not isinstance(mixer, JoinedAttention), where)
    if isinstance(mixer, Attention):
        _check_attention(mixer, where)
    if isinstance(mixer, Mamba | Mamba2):
        _check_recurrent(mixer, where)
    if isinstance(mixer, RGLRU):
        _check_griffin(mixer, where)
    if isinstance(mixer, ShortConv):
        _check(mixer.width, 1 <= mixer.width <= MAX_WIDTH, f"{where}.width")
        _check(mixer.channels, mixer.channels == hidden, f"{where}.channels")


def _check_attention(a: Attention, where: str) -> None:
    _check(a.n_kv_heads, 1 <= a.n_kv_heads <= MAX_HEADS, f"{where}.n_kv_heads")
    _check(a.n_heads, 1 <= a.n_heads <= MAX_HEADS and a.n_heads % a.n_kv_heads == 0, f"{where}.n_heads")
    _check(a.head_dim, 1 <= a.head_dim <= MAX_WIDTH, f"{where}.head_dim")
    _check(a.window, a.window is None or a.window >= 1, f"{where}.window")
    if a.rope is not None:
        _check(a.rope.dim, 2 <= a.rope.dim <= a.head_dim, f"{where}.rope.dim")
        rope_table(a.rope.dim, 1, a.rope.theta, scaling=a.rope.scaling)  # an impossible setting is an error here


def _check_recurrent(m: Mamba | Mamba2, where: str) -> None:
    sizes = ("inner", "dt_rank") if isinstance(m, Mamba) else ("heads", "head_dim", "groups")
    for name in (*sizes, "conv", "state"):
        _check(getattr(m, name), 1 <= getattr(m, name) <= MAX_WIDTH, f"{where}.{name}")
    if isinstance(m, Mamba2):
        _check(m.groups, m.heads % m.groups == 0, f"{where}.groups")
        _check(m.heads, m.inner <= MAX_WIDTH, f"{where}.heads")


def _check_griffin(r: RGLRU, where: str) -> None:
    for name in ("width", "heads", "conv"):
        _check(getattr(r, name), 1 <= getattr(r, name) <= MAX_WIDTH, f"{where}.{name}")
    _check(r.heads, r.width % r.heads == 0, f"{where}.heads")


def _value(kind: Any, given: Any, where: str) -> Any:
    """`given` as that annotation wants it."""
    origin = get_origin(kind)
    if is_dataclass(kind):
        return _data(kind, given, where)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        inner = [one for one in get_args(kind) if one is not type(None)]
        return None if given is None else _value(inner[0], given, where)
    if origin is Literal:
        _check(given, isinstance(given, str) and given in get_args(kind), where)
        return given
    if origin is tuple:
        _check(given, isinstance(given, list) and len(given) <= _MOST_ITEMS, where)
        return tuple(_value(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(given))
    if kind is Any:
        return None if given is None else _part(given, where)
    return _plain(kind, given, where)


def _plain(kind: Any, given: Any, where: str) -> Any:
    if kind is float:
        _check(given, type(given) in (int, float) and math.isfinite(given), where)
        return float(given)
    if kind is int:
        _check(given, type(given) is int and 0 <= given <= _MOST, where)
    elif kind in (str, bool):
        _check(given, type(given) is kind, where)
    else:
        _check(given, isinstance(given, dict), where)  # of a rope's scaling, which rope_table checks
    return given


def _data(kind: type, given: Any, where: str) -> Any:
    """A dataclass that has all of its fields but those that may be absent, and no others."""
    _check(given, isinstance(given, dict), where)
    names = [field.name for field in fields(kind)]
    needed = {field.name for field in fields(kind) if ABSENT not in field.metadata}
    if not needed <= given.keys() <= set(names):
        raise ValueError(f"{where} has {short(sorted(given))}, expected {', '.join(names)}")
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints[name], given[name], f"{where}.{name}") for name in names if name in given})


def _part(given: Any, where: str) -> Any:
    _check(given, isinstance(given, dict) and given.get("kind") in _PARTS, where)
    return _data(_PARTS[given["kind"]], {key: item for key, item in given.items() if key != "kind"}, where)


def _check(given: Any, is_right: bool, where: str) -> None:
    if not is_right:
        raise ValueError(f"{where} is {short(given)}")
