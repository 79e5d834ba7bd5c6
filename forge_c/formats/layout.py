"""The bytes of packed weights: src_c/formats.h row by row, for Python. Nobody else looks inside.

A weight W (in, out) is cut into panels of 16 columns, the last one padded with zeros. One 64-byte line of a panel
holds 16 columns at as many consecutive k as fit, so lanes are columns and no kernel ever adds across lanes:

    float32    panel[k][16]              line k:      W[k,0] W[k,1] ... W[k,15]
    bfloat16   panel[k/2][16][2]         line k/2:    W[k,0] W[k+1,0]  W[k,1] W[k+1,1] ... W[k,15] W[k+1,15]
    int8       panel[k/4][16][4]         line k/4:    u[k..k+3, 0]  u[k..k+3, 1]  ...  u[k..k+3, 15], a byte each
    int4       panel[k/8][16][4]         line k/8:    the same bytes: u[k..k+3] in the low nibbles, u[k+4..k+7] high

Integer formats quantise groups of consecutive k of a column. After the lines of its groups a block has one line with
what turns u back into W, 16 columns side by side:

    int8, group g (128)      | g/4 lines of u | scale float32                        |   W = scale (u - 128)
    int4, group 32           | 4 lines | 4 lines | scale float16 of each of the two   |   W = scale (u - 8)
    int4, group g (64)       | g/8 lines of u | scale float16 | minimum float16      |   W = scale u + minimum

    data:      panel 0 | panel 1 | ...   each as long as in_features, rounded up to whole lines or blocks, asks

int4 of group 32 holds the numbers of llama.cpp's Q4_0, and quantises by its rule; `from_q4_0` takes its bytes.

ggml's formats keep the numbers of its blocks (formats/ggml.py), T and E being its tables. They lie in planes: after the
lines of u's low bits come those of its upper ones, each byte with as many k as fit, 4 apart; then what turns u back
into W, 16 columns side by side. formats/blocks.py moves ggml's bytes into them:

    q4_1    32 k    as int4 of group 32 with a minimum                              W = d u + m
    q8_0    64 k    16 lines of bytes | d of the first 32 k, d of the others        W = d (u - 128)
    q5_0    64 k    8 of nibbles | 2 of fifth bits | d, d                           W = d (u - 16)
    q5_1    32 k    4 | 1 | d, m                                                    W = d u + m
    iq4_nl  64 k    8 | d, d                                                        W = d T[u]
    mxfp4   128 k   16 | e of each of the four 32, a byte                           W = 2^(e - 128) E[u]
    q4_k    256 k   32 | 2 of scales | 2 of minima | d, m                           W = (d scale) u - (m minimum)
    q5_k    256 k   32 | 8 of fifth bits | 2 | 2 | d, m                             likewise
    q6_k    256 k   32 | 16 of two upper bits | 4 of scales | d                     W = (d scale) (u - 32)
    q3_k    256 k   16 of two bits | 8 of third bits | 4 | d                        W = (d scale) (u - 4)
    q2_k    256 k   16 of two bits | 4 of nibbles: scale, minimum | d, m            as q4_k
    iq4_xs  256 k   32 of nibbles | 2 of scales | d                                 W = (d scale) T[u]

A gated pair (gate, up), both (in, hidden), alternates their panels, so that one tile of the product holds
both sides of each output:      gate 0 | up 0 | gate 1 | up 1 | ...
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from forge_c.checks import dtype_name

PANEL = 16
LINE = 64
NumPyDtype = type[np.generic] | np.dtype[Any]  # whose name is one of these
Dtype = Literal["float32", "bfloat16", "int8", "int4"]  # of layers
FORMATS = get_args(Dtype)
PackDtype = Literal["float32", "bfloat16", "int8", "int4", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k"]
PACKED = get_args(PackDtype)  # that pack makes
Activations = Literal["int8", "int12"]  # how inputs are rounded for integer weights
Precision = Literal["float32", "bfloat16", "int8"]  # of attention
ACTIVATIONS = get_args(Activations)


@dataclass(frozen=True)
class Groups:
    """Rows of a column that share a scale: a multiple of `unit` up to `largest`, `default` unless the caller says.

    The sum over a group stays exact: 255 * 127 * 2^16 < 2^31, and 15 * 127 * 2^13 < 2^24, for ISAs that add up parts
    of it in float32.
    """

    unit: int
    largest: int
    default: int

    def __contains__(self, group: int) -> bool:
        return 0 < group <= self.largest and group % self.unit == 0


@dataclass(frozen=True)
class Row:
    """A row of src_c/formats.h: bits of a number u, rows in a line, groups in a block, bytes of a scale and a minimum,
    and the u that stands for 0."""

    dtype: str
    bits: int
    k_step: int
    groups: Groups | None = None
    block_groups: int = 1
    scale_bytes: int = 0
    minimum_bytes: int = 0
    zero: int = 0
    block_lines: int = 0  # of a format that expands; of others it follows

    @property
    def scale_lines(self) -> int:
        return self.block_groups * (self.scale_bytes + self.minimum_bytes) * PANEL // LINE


_THIRTY_TWO, _SIXTEEN = Groups(32, 32, 32), Groups(16, 16, 16)
ROWS = {
    "float32": Row("float32", 32, 1),
    "bfloat16": Row("bfloat16", 16, 2),
    "int8": Row("int8", 8, 4, Groups(32, 1 << 16, 128), 1, 4, 0, 128),
    "int4 symmetric": Row("int4", 4, 8, Groups(32, 32, 32), 2, 2, 0, 8),
    "int4 affine": Row("int4", 4, 8, Groups(64, 1 << 13, 64), 1, 2, 2, 0),
    "q4_1": Row("q4_1", 4, 8, _THIRTY_TWO, 1, 2, 2, 0),
    "q5_0": Row("q5_0", 4, 8, _THIRTY_TWO, 2, 2, 0, 16, 11),
    "q5_1": Row("q5_1", 4, 8, _THIRTY_TWO, 1, 2, 2, 0, 6),
    "q8_0": Row("q8_0", 8, 4, _THIRTY_TWO, 2, 2, 0, 128, 17),
    "q2_k": Row("q2_k", 2, 16, _SIXTEEN, 16, 1, 1, 0, 21),
    "q3_k": Row("q3_k", 2, 16, _SIXTEEN, 16, 1, 0, 4, 29),
    "q4_k": Row("q4_k", 4, 8, _THIRTY_TWO, 8, 1, 1, 0, 37),
    "q5_k": Row("q5_k", 4, 8, _THIRTY_TWO, 8, 1, 1, 0, 45),
    "q6_k": Row("q6_k", 4, 8, _SIXTEEN, 16, 1, 0, 32, 53),
    "iq4_nl": Row("iq4_nl", 4, 8, _THIRTY_TWO, 2, 2, 0, 128, 9),
    "iq4_xs": Row("iq4_xs", 4, 8, _THIRTY_TWO, 8, 1, 0, 128, 35),
    "mxfp4": Row("mxfp4", 4, 8, _THIRTY_TWO, 4, 1, 0, 12, 17),
}
# What pack's dtype stands for when no group size is given, and what else a group size makes of it.
ROWS_OF = {"float32": ("float32",), "bfloat16": ("bfloat16",), "int8": ("int8",),
           "int4": ("int4 affine", "int4 symmetric")}
ROWS_OF |= {name: (name,) for name in ROWS if ROWS[name].dtype == name and name not in ROWS_OF}


@dataclass(frozen=True)
class Format:
    """A format's name and group, and the sizes that follow from them."""

    dtype: Any  # a key of ROWS_OF
    group: int | None

    @staticmethod
    def checked(name: str, given: Any, group_size: int | None, among: Iterable[str] = FORMATS) -> Format:
        """The format of these arguments of function `name`, its dtype by name or as NumPy has it; None is the default
        group. ValueError if there is none."""
        dtype = dtype_name(given)
        if not isinstance(dtype, str) or dtype not in among:
            raise ValueError(f"{name}: dtype is {given!r}, expected one of {', '.join(among)}")
        choices = [groups for row in ROWS_OF[dtype] if (groups := ROWS[row].groups)]
        if group_size is None:
            return Format(dtype, choices[0].default if choices else None)
        if not choices:
            raise ValueError(f"{name}: group_size is {group_size}, expected None for {dtype}")
        integer = isinstance(group_size, int | np.integer) and not isinstance(group_size, bool)
        if not integer or not any(group_size in groups for groups in choices):
            kinds = [str(g.unit) if g.unit == g.largest else f"a multiple of {g.unit} up to {g.largest}"
                     for g in sorted(choices, key=lambda groups: groups.largest)]
            raise ValueError(f"{name}: group_size is {group_size}, expected {' or '.join(kinds)} for {dtype}")
        return Format(dtype, int(group_size))

    def checked_activations(self, name: str, activations: Activations | None) -> Activations | None:
        """How inputs are rounded, of this argument of function `name`; None: int12 beside weights of 8 bits, int8
        beside fewer, and not at all beside floats."""
        if self.group is None:
            if activations is not None:
                raise ValueError(f"{name}: activations is {activations!r}, expected None for {self.dtype}")
            return None
        if activations is None:
            return "int12" if self.row.bits == 8 else "int8"
        if not isinstance(activations, str) or activations not in ACTIVATIONS:
            raise ValueError(f"{name}: activations is {activations!r}, expected one of {', '.join(ACTIVATIONS)}")
        return activations

    @property
    def name(self) -> str:
        """That of the row: the key of ROWS, and what the C library calls it."""
        for name in ROWS_OF[self.dtype]:
            groups = ROWS[name].groups
            if self.group is None if groups is None else self.group is not None and self.group in groups:
                return name
        raise ValueError(f"no format {self.dtype} of group {self.group}")

    @property
    def row(self) -> Row:
        return ROWS[self.name]

    @property
    def has_minimum(self) -> bool:
        """int4 with a minimum beside the scale."""
        return self.row.minimum_bytes > 0

    @property
    def k_per_line(self) -> int:
        return self.row.k_step

    @property
    def block_k(self) -> int:
        """Rows of a block."""
        return (self.group or self.k_per_line) * self.row.block_groups

    @property
    def block_bytes(self) -> int:
        return LINE * (self.row.block_lines or self.block_k // self.k_per_line + self.row.scale_lines)

    def blocks(self, k: int) -> int:
        return -(-k // self.block_k)

    def panel_bytes(self, k: int) -> int:
        return self.blocks(k) * self.block_bytes
