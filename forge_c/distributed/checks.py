"""Whether the ranks of a call agree, before anything moves."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from forge_c.checks import checked_size
from forge_c.distributed.comm import Array, Comm, Disagreement
from forge_c.distributed.layout import check_layout, length_of
from forge_c.distributed.wire import BFLOAT16
from forge_c.version import __version__

_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)


@dataclass(frozen=True)
class Sizes:
    """Of q (B, S, H, D), k (B, S, G, D) and v (B, S, G, E)."""
    batch: int
    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int

    def shared(self) -> dict[str, int]:
        """What all ranks have alike."""
        return {"batch": self.batch, "heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim,
                "v_dim": self.v_dim}


def check_array(function: str, name: str, x: object) -> Array:
    if not isinstance(x, np.ndarray) or isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{function}: {name} is a {type(x).__name__}, expected a NumPy array")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{function}: {name} has dtype {x.dtype}, expected float32, float16 or bfloat16")
    if x.ndim != 4:
        raise ValueError(f"{function}: {name} has shape {x.shape}, expected 4 axes (batch, seq, heads, dim)")
    return x


def check_qkv(function: str, q: Array, k: Array, v: Array) -> Sizes:
    """ValueError or TypeError unless they fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_array(function, name, x)
    if k.dtype != v.dtype:
        raise TypeError(f"{function}: v has dtype {v.dtype}, expected {k.dtype} as k")
    batch, _, heads, head_dim = q.shape
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(f"{function}: k has shape {k.shape}, expected ({batch}, seq, kv_heads, {head_dim})")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{function}: v has shape {v.shape}, expected {k.shape[:3]} and v_dim")
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(f"{function}: q has {heads} heads, expected a multiple of k's {k.shape[2]} heads")
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"{function}: q has {q.shape[1]} tokens and k {k.shape[1]}, expected as many")
    return Sizes(batch, q.shape[1], heads, k.shape[2], head_dim, v.shape[3])


def check_call(comm: Comm, function: str, q: Array, k: Array, v: Array, layout: str, sinks: Array | None,
               options: dict[str, Any], **more: Any) -> tuple[Sizes, int]:
    """(sizes, tokens of all ranks) of a call, where all ranks make the same; options: of attention, more: others."""
    sizes = check_qkv(function, q, k, v)
    check_layout(function, layout)
    window = options["window"]
    options["causal"] = bool(options["causal"])
    options["window"] = None if window is None else checked_size(function, "window", window, most=math.inf)
    lengths = agree(comm, function, {**sizes.shared(), "q's dtype": q.dtype.name, "k's dtype": k.dtype.name,
                                     "layout": layout, **options, "sinks": as_said(sinks), **more}, sizes.seq_len)
    return sizes, whole_length(function, layout, lengths)


def agree(comm: Comm, function: str, own: dict[str, Any], length: int = 0) -> list[int]:
    """Every rank's length, where they agree about everything else; Disagreement on every rank where not."""
    said = comm.all_gather(({"version": __version__, **own}, length))
    check_said(function, [each for each, _ in said])
    return [each for _, each in said]


def check_said(function: str, said: list[dict[str, Any]]) -> None:
    """Disagreement, which names what differs and where, unless all ranks say the same."""
    for rank, values in enumerate(said):
        for name, value in values.items():
            if value != said[0].get(name):
                raise Disagreement(f"{function}: ranks do not agree: {name} is {said[0].get(name)!r} on rank 0 and "
                                   f"{value!r} on rank {rank}")


def whole_length(function: str, layout: str, lengths: list[int]) -> int:
    """The length of the whole; Disagreement if the ranks' are not those of the layout."""
    total = sum(lengths)
    expected = [length_of(layout, total, len(lengths), rank) for rank in range(len(lengths))]
    if lengths != expected:
        raise Disagreement(f"{function}: ranks hold {lengths} tokens, expected {expected}: {layout} of {total}")
    return total


def as_said(x: Any) -> Any:
    """An array as ranks compare it."""
    return None if x is None else (np.asarray(x).shape, str(np.asarray(x).dtype), np.asarray(x).tobytes())
