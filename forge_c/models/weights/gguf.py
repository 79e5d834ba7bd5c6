"""The tensors of a GGUF file by the names that Hugging Face gives them, and in its order of rows."""
from __future__ import annotations

import re
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from forge_c.formats.ggml import TYPES, check_scales, dequantize
from forge_c.formats.gguf import GGUF, TensorInfo
from forge_c.models.spec import Attention, LayerSpec, ModelSpec
from forge_c.models.spec.gguf import ROPE_TENSORS, interleaved
from forge_c.packing import dtype_of_blocks

__all__ = ["GGUFCheckpoint", "StoredType"]

_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight"}
_LAYER = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
          "attn_v": "self_attn.v_proj", "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
          "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm",
          "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_FUSED_MLP = {"ffn_up": "mlp.gate_up_proj"}
_BOTH_NORMS = {"ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
               "post_ffw_norm": "post_feedforward_layernorm"}
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,3})\.(\w+)\.(weight|bias)")

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
        self.file, self._spec, self._interleaved = file, spec, interleaved(file)
        self._places: dict[str, _Place] = {}
        self._taken: set[str] = set()
        for name, tensor in file.tensors.items():
            if tensor.type.name not in TYPES:
                raise ValueError(f"{tensor.path}: tensor {name} has type {tensor.type.name}, which is not read; "
                                 f"expected one of {', '.join(TYPES)}")
            if name in _TOP:
                self._places[_TOP[name]] = _Place(tensor)
            elif name not in ROPE_TENSORS:
                self._places |= self._places_in_layer(tensor)

    def _places_in_layer(self, tensor: TensorInfo) -> dict[str, _Place]:
        """Where a tensor goes: the bias of q, k and v together goes to three places."""
        found = _BLOCK.fullmatch(tensor.name)
        layer = self._spec.layers[int(found[1])] if found and int(found[1]) < self._spec.n_layers else None
        names = {} if layer is None else _names(layer)
        if layer is None or found is None or found[2] not in names:
            raise ValueError(f"{tensor.path}: tensor {tensor.name} has no place in this model of {self._spec.n_layers} "
                             f"layers; expected {', '.join(_TOP)}, and blk.N. with {', '.join(names or _LAYER)}")
        prefix, (_, stem, ending) = f"model.layers.{found[1]}.", found.groups()
        rows = _rows_of(tensor, stem, ending, layer.mixer, self._interleaved)
        return {f"{prefix}{names[part]}.{ending}": _Place(tensor, order) for part, order in rows.items()}

    def stored(self, dtype: str | None = None) -> tuple[StoredType, ...]:
        """What the file holds, the type with the most bytes first. dtype: what matrices are packed in instead."""
        found: dict[tuple[str, str], list[int]] = {}
        for tensor in self.file.tensors.values():
            held = dtype or dtype_of_blocks(tensor.type.name) if len(tensor.shape) > 1 else "float32"
            found.setdefault((tensor.type.name, held), []).append(tensor.nbytes)
        rows = (StoredType(kind, len(sizes), sum(sizes), held) for (kind, held), sizes in found.items())
        return tuple(sorted(rows, key=lambda row: -row.nbytes))

    def mostly(self) -> str:
        """The format that holds most of the layers' bytes, as a PackedWeight calls it."""
        sizes: dict[str, int] = {}
        for tensor in self.file.tensors.values():
            if len(tensor.shape) > 1 and tensor.name not in _TOP:
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

    def take_raw(self, name: str, shape: tuple[int, ...]) -> tuple[str, NDArray[np.uint8]]:
        """(type, bytes (rows, bytes of a row)) of a matrix of that shape; errors as of take."""
        place, raw = self._read(name, shape)
        stored = TYPES[place.tensor.type.name]
        check_scales(place.name, stored, raw.reshape(-1, stored.nbytes))
        return stored.name, raw

    def _read(self, name: str, shape: tuple[int, ...]) -> tuple[_Place, NDArray[np.uint8]]:
        """Where it lies, and its rows, or all of a vector as one."""
        place = self._places.get(name)
        if place is None:
            raise ValueError(f"{self.file.path}: tensor {name} is missing")
        if place.shape != shape:
            raise ValueError(f"{place.name} has shape {place.tensor.shape}, expected {shape} from the metadata")
        raw = place.tensor.read().reshape(place.tensor.shape[0], -1)
        if place.rows is not None:
            raw = raw[place.rows]
        self._taken.add(name)
        return place, raw if len(shape) > 1 else raw.reshape(1, -1)

    def check_all_taken(self, allowed: tuple[str, ...] = ()) -> None:
        """Raise ValueError if the file holds a tensor that no one asked for: it would have changed the result."""
        left = sorted(self._places[n].tensor.name for n in self._places.keys() - self._taken - set(allowed))
        if left:
            raise ValueError(f"{self.file.path}: {len(left)} tensors have no place in this model, the first is "
                             f"{left[0]}")


def _names(layer: LayerSpec) -> dict[str, str]:
    """The file's names in such a layer, and Hugging Face's."""
    return (_LAYER | (_FUSED_MLP if getattr(layer.mlp, "fused", False) else {})
            | (_BOTH_NORMS if layer.norms == "both" else {}))


def _rows_of(tensor: TensorInfo, stem: str, ending: str, mixer: Attention, turned: bool) -> dict[str, Rows | None]:
    """Which rows of a tensor go where; None: all as they lie. q, k and v may be one matrix, their biases one vector."""
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
        found[part] = first + (_turned_back(size, mixer) if turned and part != "attn_v" else np.arange(size))
        first += size
    if stem == "attn_qkv" and ending == "weight":
        return {stem: np.concatenate(list(found.values())) if turned else None}
    return found if turned or stem == "attn_qkv" else {stem: None}


def _turned_back(size: int, mixer: Attention) -> Rows:
    """Where the rows of q or k lie in a file in which each head's rotated rows are 0, half, 1, half + 1, ..., also
    where a layer does not rotate."""
    head = np.arange(mixer.head_dim)
    rotated = mixer.head_dim if mixer.rope is None else mixer.rope.dim
    head[:rotated] = head[:rotated].reshape(-1, 2).T.reshape(-1)
    return (np.arange(0, size, mixer.head_dim)[:, None] + head).reshape(-1)
