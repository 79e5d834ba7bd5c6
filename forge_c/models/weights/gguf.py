"""The tensors of a GGUF file by the names that Hugging Face gives them, and in its order of rows."""
from __future__ import annotations

import re
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from forge_c.files import read_rows
from forge_c.formats.ggml import TYPES, check_scales, dequantize
from forge_c.formats.gguf import GGUF, TensorInfo
from forge_c.models.spec import Attention, LayerSpec, Mamba, Mamba2, ModelSpec, ShortConv
from forge_c.models.spec.gguf import ROPE_TENSORS, Architecture, architecture_of
from forge_c.packing import dtype_of_blocks

__all__ = ["GGUFCheckpoint", "StoredType"]

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_COMMON = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
           "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_MIXERS: dict[type, dict[str, str]] = {
    Attention: {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
                "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
                "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
    Mamba: {"ssm_in": "mixer.in_proj", "ssm_conv1d": "mixer.conv1d", "ssm_x": "mixer.x_proj", "ssm_dt": "mixer.dt_proj",
            "ssm_out": "mixer.out_proj"},
    Mamba2: {"ssm_in": "mixer.in_proj", "ssm_conv1d": "mixer.conv1d", "ssm_norm": "mixer.norm",
             "ssm_out": "mixer.out_proj"},
    ShortConv: {"shortconv.in_proj": "mixer.in_proj", "shortconv.conv": "mixer.conv1d",
                "shortconv.out_proj": "mixer.out_proj"}}
# Whole names, without .weight or .bias in one of the two worlds.
_OTHERS = {Mamba: {"ssm_a": "mixer.A_log", "ssm_d": "mixer.D"},
           Mamba2: {"ssm_a": "mixer.A_log", "ssm_d": "mixer.D", "ssm_dt.bias": "mixer.dt_bias"}}
_TWO_MIXERS = {"ffn_norm": "post_attention_layernorm.weight"}  # whose norm stands there without .weight
_NO_MATRICES = re.compile(r".*\.(ssm_conv1d|ssm_norm|shortconv\.conv)\.weight|.*\.ssm_[ad]")  # though of two dimensions
_FUSED_MLP = {"ffn_up": "mlp.gate_up_proj"}
_BOTH_NORMS = {"ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
               "post_ffw_norm": "post_feedforward_layernorm"}
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,3})\.([\w.]+)")

Rows = NDArray[np.intp]


class _Place(NamedTuple):
    """A tensor, or those of its rows that belong here, in their order."""

    tensor: TensorInfo
    rows: Rows | None = None

    @property
    def name(self) -> str:
        """The file's and the tensor's, as errors begin."""
        return f"{self.tensor.path}: tensor {self.tensor.name}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape if self.rows is None else (len(self.rows), *self.tensor.shape[1:])


class StoredType(NamedTuple):
    """Tensors of one type in a file, and the format that holds them in memory."""

    type: str
    tensors: int
    nbytes: int
    held: str


class GGUFCheckpoint:
    """What a decoder takes its weights from: each tensor is read when it is asked for.

    Raises:
        ValueError: a tensor that has no place in the model, or a type that is not read.
    """

    def __init__(self, file: GGUF, spec: ModelSpec) -> None:
        self.file, self._spec, self._architecture = file, spec, architecture_of(file)
        self._top = {_EMBEDDING: "model.embed_tokens.weight", f"{self._architecture.norm}.weight": "model.norm.weight",
                     _HEAD: "lm_head.weight"}
        self._places: dict[str, _Place] = {}
        self._taken: set[str] = set()
        for name, tensor in file.tensors.items():
            if tensor.type.name not in TYPES:
                raise ValueError(f"{tensor.path}: tensor {name} has type {tensor.type.name}, which is not read; get "
                                 f"another quantisation, such as Q4_K_M; expected one of {', '.join(TYPES)}")
            if name in self._top:
                self._places[self._top[name]] = _Place(tensor)
            elif name not in ROPE_TENSORS:
                self._places |= self._places_in_layer(tensor)

    def _places_in_layer(self, tensor: TensorInfo) -> dict[str, _Place]:
        """Where a tensor goes: the bias of q, k and v together goes to three places."""
        found = _BLOCK.fullmatch(tensor.name)
        layer = self._spec.layers[int(found[1])] if found and int(found[1]) < self._spec.n_layers else None
        names, others = ({}, {}) if layer is None else (_names(layer), _others(layer))
        stem, _, ending = found[2].rpartition(".") if found else ("", "", "")
        if found and found[2] in others:
            return {f"model.layers.{found[1]}.{others[found[2]]}": _Place(tensor)}
        if layer is None or found is None or stem not in names or ending not in ("weight", "bias"):
            expected = [*(names or _COMMON | _MIXERS[Attention]), *others]
            raise ValueError(f"{tensor.path}: tensor {tensor.name} has no place in this model of {self._spec.n_layers} "
                             f"layers; expected {', '.join(self._top)}, and blk.N. with {', '.join(expected)}")
        rows = _rows_of(tensor, stem, ending, layer, self._architecture)
        return {f"model.layers.{found[1]}.{names[part]}.{ending}": _Place(tensor, order)
                for part, order in rows.items()}

    def stored(self, dtype: str | None = None) -> tuple[StoredType, ...]:
        """What the file holds, the type with the most bytes first. dtype: what matrices are packed in instead."""
        found: dict[tuple[str, str], list[int]] = {}
        for tensor in self.file.tensors.values():
            held = dtype or dtype_of_blocks(tensor.type.name) if _is_matrix(tensor) else "float32"
            found.setdefault((tensor.type.name, held), []).append(tensor.nbytes)
        rows = (StoredType(kind, len(sizes), sum(sizes), held) for (kind, held), sizes in found.items())
        return tuple(sorted(rows, key=lambda row: -row.nbytes))

    def mostly(self) -> str:
        """The format that holds most of the layers' bytes, as a PackedWeight calls it."""
        sizes: dict[str, int] = {}
        for tensor in self.file.tensors.values():
            if _is_matrix(tensor) and tensor.name not in self._top:
                held = dtype_of_blocks(tensor.type.name)
                sizes[held] = sizes.get(held, 0) + tensor.nbytes
        return max(sizes, key=lambda held: sizes[held], default="float32")

    def take(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """A tensor of that shape: float32, or bfloat16 where the file has it.

        Raises:
            ValueError: it is missing, has another shape, or holds a number that is not finite.
        """
        place, raw = self._read(name, shape)
        kind = place.tensor.type.name
        dtype = ml_dtypes.bfloat16 if kind == "BF16" else np.float32
        return dequantize(kind, raw, dtype=dtype, name=place.name).reshape(shape)

    def take_decay(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A of a state space, which a file holds itself: as take, by the name of its logarithm. ValueError if one is
        above 0, as logarithms are: with it a state would grow without end."""
        found: NDArray[np.float32] = self.take(name, shape).astype(np.float32)
        if (found > 0).any():
            raise ValueError(f"{self._places[name].name} holds {found.max():g}, expected numbers below 0: what a state "
                             "decays by, not its logarithm")
        return found

    def take_raw(self, name: str, shape: tuple[int, ...]) -> tuple[str, NDArray[np.uint8]]:
        """(type, bytes (rows, bytes of a row)) of a matrix of that shape; errors as of take."""
        return self._checked(name, self._read(name, shape)[1])

    def type_of(self, name: str) -> str:
        """How the file stores a tensor; ValueError if there is none."""
        return self._place(name).tensor.type.name

    def take_rows(self, name: str, shape: tuple[int, ...], rows: Rows) -> NDArray[Any]:
        """These rows of a matrix of that shape; nothing else is read. Errors as of take."""
        return self._floats(name, self._part(name, shape, rows, range(shape[1])))

    def take_columns(self, name: str, shape: tuple[int, ...], columns: range) -> NDArray[Any]:
        """These columns, likewise, and what else is in their blocks."""
        block = TYPES[self.type_of(name)].weights
        wide = range(columns.start // block * block, min(-(-columns.stop // block) * block, shape[1]))
        found = self._floats(name, self._part(name, shape, np.arange(shape[0]), wide))
        return found[:, columns.start - wide.start : columns.stop - wide.start]

    def take_raw_rows(self, name: str, shape: tuple[int, ...], rows: Rows) -> tuple[str, NDArray[np.uint8]]:
        """As take_raw, these rows."""
        return self._checked(name, self._part(name, shape, rows, range(shape[1])))

    def take_raw_columns(self, name: str, shape: tuple[int, ...], columns: range) -> tuple[str, NDArray[np.uint8]]:
        """As take_raw, these columns, which are whole blocks."""
        return self._checked(name, self._part(name, shape, np.arange(shape[0]), columns))

    def _floats(self, name: str, raw: NDArray[np.uint8]) -> NDArray[Any]:
        """Rows of blocks as numbers."""
        kind, dtype = self.type_of(name), ml_dtypes.bfloat16 if self.type_of(name) == "BF16" else np.float32
        return dequantize(kind, raw, dtype=dtype, name=self._place(name).name).reshape(len(raw), -1)

    def _checked(self, name: str, raw: NDArray[np.uint8]) -> tuple[str, NDArray[np.uint8]]:
        """(type, rows of blocks), whose scales are finite."""
        place = self._place(name)
        stored = TYPES[place.tensor.type.name]
        check_scales(place.name, stored, raw.reshape(-1, stored.nbytes))
        return stored.name, raw

    def _part(self, name: str, shape: tuple[int, ...], rows: Rows, columns: range) -> NDArray[np.uint8]:
        """Bytes of these rows and columns of a matrix; columns are whole blocks."""
        place = self._place(name, shape)
        stored, tensor = TYPES[place.tensor.type.name], place.tensor
        among = slice(stored.row_bytes(columns.start), stored.row_bytes(columns.stop))
        self._taken.add(name)
        return read_rows(tensor.path, f"tensor {tensor.name}", tensor.start, stored.row_bytes(shape[1]),
                         rows if place.rows is None else place.rows[rows], among)

    def _place(self, name: str, shape: tuple[int, ...] | None = None) -> _Place:
        """Where a tensor lies; of that shape."""
        place = self._places.get(name)
        if place is None:
            raise ValueError(f"{self.file.path}: tensor {self._stored_name(name)} is missing")
        expected = place.shape if shape is None else self._stored_shape(name, shape)
        if _without_ones(place.shape) != _without_ones(expected):
            raise ValueError(f"{place.name} has shape {place.tensor.shape}, expected {expected} from the metadata")
        return place

    def _read(self, name: str, shape: tuple[int, ...]) -> tuple[_Place, NDArray[np.uint8]]:
        """Where it lies, and its rows, or all of a vector as one."""
        place = self._place(name, shape)
        raw = place.tensor.read()
        if place.rows is not None:
            raw = raw.reshape(place.tensor.shape[0], -1)[place.rows]
        self._taken.add(name)
        return place, raw.reshape(shape[0] if len(shape) > 1 else 1, -1)

    def _stored_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a file gives the tensor to which Hugging Face gives this one."""
        if name.endswith("mixer.conv1d.weight"):
            return shape[0], shape[2]
        layer = self._spec.layers[int(name.split(".")[2])] if name.startswith("model.layers.") else None
        space = None if layer is None else _mixer_of(Mamba2, layer)
        if space is not None and name.endswith((".A_log", ".D")):
            return *shape, 1
        if space is not None and name.endswith("mixer.norm.weight"):
            return space.groups, shape[0] // space.groups
        return shape

    def _stored_name(self, name: str) -> str:
        """What a file calls the tensor that Hugging Face calls so."""
        for theirs, ours in self._top.items():
            if ours == name:
                return theirs
        _, _, i, rest = name.split(".", 3)
        layer, (stem, ending) = self._spec.layers[int(i)], rest.rsplit(".", 1)
        whole = _others(layer) | {
            f"{theirs}.{ending}": f"{ours}.{ending}" for theirs, ours in _names(layer).items() if ours == stem}
        return next(f"blk.{i}.{theirs}" for theirs, ours in whole.items() if ours == rest)

    def check_all_taken(self, allowed: tuple[str, ...] = ()) -> None:
        """Raise ValueError if the file holds a tensor that no one asked for: it would have changed the result."""
        left = sorted(self._places[n].tensor.name for n in self._places.keys() - self._taken - set(allowed))
        if left:
            raise ValueError(f"{self.file.path}: {len(left)} tensors have no place in this model, the first is "
                             f"{left[0]}")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the first axes of 1, which ggml does not count: llama-quantize leaves them out."""
    return shape[next((i for i, n in enumerate(shape) if n > 1), len(shape)):]


def _is_matrix(tensor: TensorInfo) -> bool:
    return len(tensor.shape) > 1 and not _NO_MATRICES.fullmatch(tensor.name)


def _names(layer: LayerSpec) -> dict[str, str]:
    """The file's names in such a layer, and Hugging Face's, of what has .weight and .bias in both."""
    found = dict(_COMMON)
    for mixer in layer.mixers:
        found |= _MIXERS.get(type(mixer), {})
    found |= (_FUSED_MLP if getattr(layer.mlp, "fused", False) else {}) | (
        _BOTH_NORMS if layer.norms == "both" else {})
    return {name: theirs for name, theirs in found.items() if name not in _others(layer)}


def _others(layer: LayerSpec) -> dict[str, str]:
    """Whole names of the rest."""
    found = {} if layer.beside is None else dict(_TWO_MIXERS)
    for mixer in layer.mixers:
        found |= _OTHERS.get(type(mixer), {})
    return found


def _mixer_of(kind: type, layer: LayerSpec) -> Any:
    """The layer's mixer of that kind, or None."""
    return next((mixer for mixer in layer.mixers if isinstance(mixer, kind)), None)


def _rows_of(tensor: TensorInfo, stem: str, ending: str, layer: LayerSpec,
             file: Architecture) -> dict[str, Rows | None]:
    """Which rows of a tensor go where; None: all as they lie. q, k and v may be one matrix, their biases one vector."""
    mixer, turned = _mixer_of(Attention, layer), file.interleaved
    if mixer is None:
        return {stem: None}
    queries, keys = mixer.n_heads * mixer.head_dim, mixer.n_kv_heads * mixer.head_dim
    sizes = {"attn_q": queries, "attn_k": keys, "attn_v": keys}
    if stem in sizes:
        sizes = {stem: sizes[stem]}
    elif stem != "attn_qkv":
        return {stem: None}
    if tensor.shape[:1] != (sum(sizes.values()),):
        raise ValueError(f"{tensor.path}: tensor {tensor.name} has shape {tensor.shape}, expected "
                         f"{sum(sizes.values())} rows")
    found: dict[str, Rows | None] = {}
    first = 0
    for part, size in sizes.items():
        turns = turned and part != "attn_v"
        found[part] = first + (_turned_back(size, mixer, file.whole_heads) if turns else np.arange(size))
        first += size
    if stem == "attn_qkv" and ending == "weight":
        return {stem: np.concatenate(list(found.values())) if turned else None}
    return found if turned or stem == "attn_qkv" else {stem: None}


def _turned_back(size: int, mixer: Attention, whole: bool) -> Rows:
    """Where the rows of q or k lie in a file in which each head's rotated rows, or all, are 0, half, 1, half + 1, ...,
    also where a layer does not rotate."""
    head = np.arange(mixer.head_dim)
    rotated = mixer.head_dim if mixer.rope is None or whole else mixer.rope.dim
    head[:rotated] = head[:rotated].reshape(-1, 2).T.reshape(-1)
    return (np.arange(0, size, mixer.head_dim)[:, None] + head).reshape(-1)
