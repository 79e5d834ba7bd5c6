"""Rotary position tables: which angle each pair of channels turns through at each position.

Angles are computed in float64 and only their cosines and sines are rounded to float32, so that they stay
right to the last bit at positions in the millions. The rotation itself is `forge_c.functional.rope`.

Glossary: d = rotary dimension, i = pair of channels (0 .. d/2 - 1), p = position, inv_i = base**(-2i/d);
pair i turns through the angle p * inv_i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge_c.checks import checked_size, short

__all__ = ["RopeTable", "extend_rope_table", "rope_table"]

DEPEND_ON_LENGTH = ("dynamic", "longrope")  # rope types whose angles depend on how long the sequence may become

_BLOCK_ROWS = 256
# No model comes near these. Between them nothing that a rule computes overflows, divides by zero or loses f - (f - 1).
_MOST, _MOST_FACTOR, _MOST_DIM, _MOST_ROWS = 2.0**64, 2.0**20, 1 << 16, 1 << 45
_ANY_TYPE = frozenset(
    "rope_type type rope_theta max_position_embeddings original_max_position_embeddings".split()
)
# Written beside yarn by its authors and read by other programs: as in transformers they change nothing.
_YARN_UNREAD = frozenset({"finetuned", "attn_factor", "extrapolation_factor"})


class RopeTable:
    """The cosines and sines that `rope` reads; immutable.

    Args:
        cos: (max_seq_len, dim / 2) float32; used as it is when C-contiguous, otherwise copied.
        sin: the same shape and dtype.

    Attributes:
        cos, sin: read-only C-contiguous float32 arrays (max_seq_len, dim / 2).
        dim: how many channels of a head are rotated.
        max_seq_len: positions 0 .. max_seq_len - 1 are covered.

    Raises:
        TypeError: a table that is not float32.
        ValueError: a table that is not two-dimensional, or two shapes that differ.
    """

    __slots__ = ("cos", "dim", "max_seq_len", "sin")

    cos: NDArray[np.float32]
    sin: NDArray[np.float32]
    dim: int
    max_seq_len: int

    def __init__(self, cos: NDArray[np.float32], sin: NDArray[np.float32]) -> None:
        cos, sin = _checked_table("cos", cos), _checked_table("sin", sin)
        if cos.shape != sin.shape:
            raise ValueError(f"RopeTable: sin has shape {sin.shape}, expected {cos.shape} as cos")
        for name, value in (("cos", cos), ("sin", sin), ("dim", 2 * cos.shape[1]), ("max_seq_len", len(cos))):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"RopeTable: {name} cannot be assigned, make a new table")

    def __reduce__(self) -> tuple[type[RopeTable], tuple[NDArray[np.float32], NDArray[np.float32]]]:
        return RopeTable, (self.cos, self.sin)

    def __repr__(self) -> str:
        return f"RopeTable(dim={self.dim}, max_seq_len={self.max_seq_len})"


def rope_table(
    dim: int, max_seq_len: int, base: float = 10000.0, *, scaling: Mapping[str, Any] | None = None,
    seq_len: int | None = None
) -> RopeTable:
    """Build the table for positions 0 .. max_seq_len - 1.

    Args:
        dim: channels that are rotated, even; less than head_dim for partial rotation.
        max_seq_len: number of positions.
        base: the frequency base, "rope_theta" in Hugging Face configs.
        scaling: a Hugging Face `rope_scaling` or `rope_parameters` dict. "rope_type" (formerly "type") is one
            of default, linear, dynamic, yarn, longrope, llama3, proportional, or divided: by "divisors", one for
            each pair, as a GGUF file has them. "rope_theta" in it replaces the default base; keys whose value
            is None count as absent. The config's `max_position_embeddings` and
            `original_max_position_embeddings` may be added to the dict: dynamic needs the first, llama3,
            yarn and longrope the second (the first stands in for it), and yarn and longrope without a
            "factor" take it from their ratio.
        seq_len: the length of the text for which dynamic and longrope choose their angles; by default max_seq_len.

    With yarn, finetuned, attn_factor and extrapolation_factor are not read, as in transformers.

    Raises:
        ValueError: a size or number out of range, an unknown rope_type, or a key that the type does not know
            and that could therefore change the result.

    >>> rope_table(128, 4096)
    RopeTable(dim=128, max_seq_len=4096)
    >>> print(rope_table(4, 3, base=100.0).sin.round(4))
    [[0.     0.    ]
     [0.8415 0.0998]
     [0.9093 0.1987]]
    """
    rows = checked_size("rope_table", "max_seq_len", max_seq_len, most=_MOST_ROWS)
    length = rows if seq_len is None else checked_size("rope_table", "seq_len", seq_len, most=_MOST_ROWS)
    inv_freq, attention_factor, _ = _frequencies(dim, length, base, scaling)
    return RopeTable(*cos_sin(inv_freq, rows, attention_factor))


def extend_rope_table(
    table: RopeTable, max_seq_len: int, base: float = 10000.0, *, scaling: Mapping[str, Any] | None = None,
    seq_len: int | None = None
) -> RopeTable:
    """`rope_table(table.dim, max_seq_len, base, scaling=scaling, seq_len=seq_len)`, of which `table` is the beginning,
    to the bit.

    Only the new positions are computed. A table that already has that many is returned as it is.

    Raises:
        ValueError: as rope_table, and for rope types dynamic and longrope without seq_len, whose angles would all
            depend on max_seq_len.

    >>> extend_rope_table(rope_table(128, 4096), 8192)
    RopeTable(dim=128, max_seq_len=8192)
    """
    rows = checked_size("rope_table", "max_seq_len", max_seq_len, most=_MOST_ROWS)
    length = rows if seq_len is None else checked_size("extend_rope_table", "seq_len", seq_len, most=_MOST_ROWS)
    inv_freq, attention_factor, kind = _frequencies(table.dim, length, base, scaling)
    if kind in DEPEND_ON_LENGTH and seq_len is None:
        raise ValueError(f"extend_rope_table: rope_type {kind} depends on max_seq_len, expected another or a new table")
    if rows <= table.max_seq_len:
        return table
    start = table.max_seq_len // _BLOCK_ROWS * _BLOCK_ROWS
    cos, sin = cos_sin(inv_freq, rows, attention_factor, start)
    return RopeTable(np.concatenate([table.cos[:start], cos]), np.concatenate([table.sin[:start], sin]))


def rope_table_by_position(
    dim: int, max_seq_len: int, base: float, scaling: Mapping[str, Any], held: RopeTable | None = None
) -> RopeTable:
    """Row p is that of `rope_table` with seq_len p + 1, to the bit: tokens that come one by one, each the last of its
    text. held: a table of this kind, of which only what is missing is computed."""
    known = 0 if held is None else held.max_seq_len
    parts = [] if held is None else [(held.cos, held.sin)]
    for first, last in _stretches(scaling, known, max_seq_len):
        inv_freq, attention_factor, _ = _frequencies(dim, last, base, scaling)
        start = first // _BLOCK_ROWS * _BLOCK_ROWS
        if last == first + 1:  # one row of its block
            turn = attention_factor * np.exp(1j * ((first - start) * inv_freq)) * np.exp(1j * (start * inv_freq))
            parts.append((turn.real[None].astype(np.float32), turn.imag[None].astype(np.float32)))
        else:
            cos, sin = cos_sin(inv_freq, last, attention_factor, start)
            parts.append((cos[first - start :], sin[first - start :]))
    return RopeTable(*(np.concatenate(tables) for tables in zip(*parts, strict=True)))


def _stretches(scaling: Mapping[str, Any], first: int, last: int) -> Iterator[tuple[int, int]]:
    """first .. last - 1 cut into runs of positions at which texts that end there have the same angles."""
    border = longest_short(scaling)
    if first < border:
        yield first, min(border, last)
    beyond = max(first, border)
    if scaling.get("rope_type") == "dynamic":
        yield from ((p, p + 1) for p in range(beyond, last))
    elif beyond < last:
        yield beyond, last


def longest_short(scaling: Mapping[str, Any]) -> int:
    """The longest text with the angles of a short one; scaling has a rope_type that depends on the length."""
    params = _Scaling(scaling)
    return int(params.number("max_position_embeddings") if params.type == "dynamic" else params.original_length())


def _frequencies(
    dim: int, rows: int, base: float, scaling: Mapping[str, Any] | None
) -> tuple[NDArray[np.float64], float, str]:
    """(inv_freq (d / 2,), what cos and sin are multiplied by, rope_type)."""
    dim = checked_size("rope_table", "dim", dim, most=_MOST_DIM)
    if dim % 2:
        raise ValueError(f"rope_table: dim is {dim}, expected an even number")
    params = _Scaling({} if scaling is None else scaling)
    base = params.number("rope_theta", params.checked_base(base))
    if base <= 1.0:
        raise ValueError(f"rope_table: base is {base}, expected more than 1")
    return *params.rule(params, dim, rows, base), params.type


class _Scaling:
    """A Hugging Face scaling dict whose type is known and whose every key is understood by that type."""

    def __init__(self, scaling: Mapping[str, Any]) -> None:
        if not isinstance(scaling, Mapping):
            raise TypeError(f"rope_table: scaling is {type(scaling).__name__}, expected a dict or None")
        self._given = {key: value for key, value in scaling.items() if value is not None}
        self.type = self._given.get("rope_type", self._given.get("type", "default"))
        if self._given.get("type", self.type) != self.type:
            raise ValueError(f"rope_table: rope_type {self.type!r} but type {self._given['type']!r}")
        if self.type not in _RULES:
            known_types = ", ".join(_RULES)
            raise ValueError(f"rope_table: unknown rope_type {self.type!r}, expected one of {known_types}")
        self.rule, own_keys = _RULES[self.type]
        known = _ANY_TYPE | own_keys
        if "partial_rotary_factor" not in known and self._given.get("partial_rotary_factor") == 1.0:
            known |= {"partial_rotary_factor"}
        unknown = sorted(set(self._given) - known)
        if unknown:
            partial = (
                "; for partial rotation pass the smaller dim" if "partial_rotary_factor" in unknown else ""
            )
            raise ValueError(
                f"rope_table: scaling has {', '.join(unknown)}, which rope_type {self.type} does not know: "
                f"expected only {', '.join(sorted(known - _YARN_UNREAD))}{partial}"
            )

    def checked_base(self, base: float) -> float:
        """The caller's base, which must not contradict the dict's unless it is the default."""
        value = _checked_number("base", base)
        theta = self._given.get("rope_theta", value)
        if value not in (theta, 10000.0):
            raise ValueError(f"rope_table: base is {value}, but scaling has rope_theta {theta}")
        return value

    def has(self, key: str) -> bool:
        return key in self._given

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        """scaling[key], finite and positive (or zero where allowed)."""
        value = self._given.get(key, default)
        if value is None:
            raise ValueError(f"rope_table: rope_type {self.type} needs {key} in scaling")
        most = _MOST_FACTOR if key == "factor" else _MOST
        return _checked_number(f"scaling[{key!r}]", value, zero=zero, most=most)

    def flag(self, key: str, default: bool) -> bool:
        value = self._given.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"rope_table: scaling[{key!r}] is {value!r}, expected True or False")
        return value

    def vector(self, key: str, length: int) -> NDArray[np.float64]:
        """scaling[key] as (length,) float64, all finite and positive."""
        given = self._given.get(key)
        if not isinstance(given, (list, tuple, np.ndarray)) or len(given) != length:
            raise ValueError(
                f"rope_table: scaling[{key!r}] is {given!r}, expected dim / 2 = {length} numbers"
            )
        return np.array([_checked_number(f"scaling[{key!r}]", value) for value in given])

    def original_length(self) -> float:
        """The length the model was first trained on."""
        longest = self._given.get("max_position_embeddings")
        length = self.number("original_max_position_embeddings", longest)
        if length <= 1.0:
            raise ValueError(
                f"rope_table: original_max_position_embeddings is {length}, expected more than 1"
            )
        return length

    def factor_or_ratio(self) -> float:
        """The explicit factor, else how much longer the model's context is than its original one."""
        if self.has("max_position_embeddings") and not self.has("factor"):
            return self.number("max_position_embeddings") / self.original_length()
        return self.number("factor")


# A rule returns (inv_freq, attention_factor): (d / 2,) float64, and what cos and sin are multiplied by.
_Rule = Callable[[_Scaling, int, int, float], tuple[NDArray[np.float64], float]]


def _inv_freq(dim: int, base: float) -> NDArray[np.float64]:
    return 1.0 / base ** (np.arange(0, dim, 2) / dim)


def _default(params: _Scaling, dim: int, rows: int, base: float) -> tuple[NDArray[np.float64], float]:
    return _inv_freq(dim, base), 1.0


def _linear(params: _Scaling, dim: int, rows: int, base: float) -> tuple[NDArray[np.float64], float]:
    return _inv_freq(dim, base) / params.number("factor"), 1.0


def _proportional(params: _Scaling, dim: int, rows: int, base: float) -> tuple[NDArray[np.float64], float]:
    """The first int(fraction * d / 2) pairs turn, with exponents over the whole d; the others stand still."""
    fraction = params.number("partial_rotary_factor", 1.0, zero=True)
    if fraction > 1.0:
        raise ValueError(f"rope_table: scaling['partial_rotary_factor'] is {fraction}, expected at most 1")
    turning = int(fraction * dim // 2)
    inv_freq = _inv_freq(dim, base) / params.number("factor", 1.0)
    inv_freq[turning:] = 0.0
    return inv_freq, 1.0


def _dynamic(params: _Scaling, dim: int, rows: int, base: float) -> tuple[NDArray[np.float64], float]:
    """NTK-aware: base' = base * (f * L / max - (f - 1)) ** (d / (d - 2)) for a sequence of L > max tokens."""
    if dim == 2:
        raise ValueError("rope_table: dim is 2, expected at least 4 for rope_type dynamic")
    factor, longest = params.number("factor"), params.number("max_position_embeddings")
    stretch = factor * max(rows, longest) / longest - (factor - 1.0)
    return _inv_freq(dim, base * stretch ** (dim / (dim - 2))), 1.0


def _yarn(params: _Scaling, dim: int, rows: int, base: float) -> tuple[NDArray[np.float64], float]:
    """Fast pairs keep inv, slow pairs get inv / f, with a linear ramp over the pairs between.

    Pair c(r) = d * ln(original / (2 pi r)) / (2 ln base) makes r turns over the original length; the ramp
    runs from c(beta_fast) to c(beta_slow).
    """
    original, factor = params.original_length(), params.factor_or_ratio()

    def pair_turning(turns: float) -> float:
        return dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(base))

    low = pair_turning(params.number("beta_fast", 32.0))
    high = pair_turning(params.number("beta_slow", 1.0))
    if params.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)
    inv_freq = _inv_freq(dim, base)
    return inv_freq / factor * ramp + inv_freq * (1.0 - ramp), _yarn_attention_factor(params, factor)


def _yarn_attention_factor(params: _Scaling, factor: float) -> float:
    def gain(mscale: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0

    if params.has("attention_factor"):
        return params.number("attention_factor")
    mscale = params.number("mscale", 0.0, zero=True)
    mscale_all_dim = params.number("mscale_all_dim", 0.0, zero=True)
    return gain(mscale) / gain(mscale_all_dim) if mscale and mscale_all_dim else gain(1.0)


def _longrope(params: _Scaling, dim: int, rows: int, base: float) -> tuple[NDArray[np.float64], float]:
    """Each pair has its own divisor: one list up to the original length, another for longer sequences."""
    original = params.original_length()
    short, long = params.vector("short_factor", dim // 2), params.vector("long_factor", dim // 2)
    inv_freq = _inv_freq(dim, base) / (long if rows > original else short)
    if params.has("attention_factor"):
        return inv_freq, params.number("attention_factor")
    factor = params.factor_or_ratio()
    return inv_freq, 1.0 if factor <= 1.0 else math.sqrt(1.0 + math.log(factor) / math.log(original))


def _llama3(params: _Scaling, dim: int, rows: int, base: float) -> tuple[NDArray[np.float64], float]:
    """Pairs that turn more than `high` times over the original length stay, below `low` they get inv / f."""
    original, factor = params.original_length(), params.number("factor")
    low, high = params.number("low_freq_factor"), params.number("high_freq_factor")
    if high <= low:
        raise ValueError(f"rope_table: high_freq_factor is {high}, expected more than low_freq_factor {low}")
    inv_freq = _inv_freq(dim, base)
    turns = original * inv_freq / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 - keep) * inv_freq / factor + keep * inv_freq, 1.0


def _divided(params: _Scaling, dim: int, rows: int, base: float) -> tuple[NDArray[np.float64], float]:
    """Each pair has its own divisor, however long the sequence."""
    return _inv_freq(dim, base) / params.vector("divisors", dim // 2), 1.0


_RULES: dict[str, tuple[_Rule, frozenset[str]]] = {
    "default": (_default, frozenset()),
    "linear": (_linear, frozenset({"factor"})),
    "dynamic": (_dynamic, frozenset({"factor"})),
    "yarn": (
        _yarn,
        frozenset("factor attention_factor mscale mscale_all_dim beta_fast beta_slow truncate".split()) | _YARN_UNREAD,
    ),
    "longrope": (_longrope, frozenset("factor attention_factor short_factor long_factor".split())),
    "llama3": (_llama3, frozenset("factor low_freq_factor high_freq_factor".split())),
    "proportional": (_proportional, frozenset({"factor", "partial_rotary_factor"})),
    "divided": (_divided, frozenset({"divisors"})),
}


def cos_sin(
    inv_freq: NDArray[np.float64], rows: int, attention_factor: float = 1.0, first: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """attention_factor * cos and sin of p * inv_freq for first <= p < rows, (rows - first, d / 2) float32.

    first is a multiple of 256, so that a position has the same bits whatever the first one is.

    exp(j * (start + r) * inv) = exp(j * start * inv) * exp(j * r * inv): one complex product for a pair and a
    position in place of two slow calls, in float64, with a temporary of one block.
    """
    cos = np.empty((rows - first, len(inv_freq)), np.float32)
    sin = np.empty_like(cos)
    within = attention_factor * np.exp(1j * np.outer(np.arange(min(rows, _BLOCK_ROWS)), inv_freq))
    for start in range(first, rows, _BLOCK_ROWS):
        turn = within[: rows - start] * np.exp(1j * (start * inv_freq))
        here = slice(start - first, start - first + _BLOCK_ROWS)
        cos[here], sin[here] = turn.real, turn.imag
    return cos, sin


def _checked_table(name: str, table: NDArray[np.float32]) -> NDArray[np.float32]:
    array = np.asarray(table)
    if array.dtype != np.float32:
        raise TypeError(f"RopeTable: {name} has dtype {array.dtype}: pass {name}.astype(np.float32)")
    if array.ndim != 2:
        raise ValueError(f"RopeTable: {name} has shape {array.shape}, expected (max_seq_len, dim / 2)")
    array = np.ascontiguousarray(array).view()
    array.flags.writeable = False
    return array


def _checked_number(name: str, value: float, *, zero: bool = False, most: float = _MOST) -> float:
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float, np.number)):
        raise ValueError(f"rope_table: {name} is {value!r}, expected a number")
    if not (value >= 0.0 and (value > 0.0 or zero) and value < math.inf):
        raise ValueError(f"rope_table: {name} is {short(value)}, expected a finite number above 0")
    if value > most or 0.0 < value < 1.0 / most:
        raise ValueError(f"rope_table: {name} is {short(value)}, expected {1.0 / most:.3g} to {most:.3g}")
    return float(value)
