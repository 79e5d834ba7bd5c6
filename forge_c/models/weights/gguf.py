"""The tensors of a GGUF file by the names that Hugging Face gives them, and in its order of rows."""
from __future__ import annotations

import re
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from forge_c.formats.ggml import TYPES, dequantize
from forge_c.formats.gguf import GGUF, TensorInfo
from forge_c.models.spec import Attention, LayerSpec, ModelSpec
from forge_c.models.spec.gguf import ROPE_TENSORS, interleaved

__all__ = ["GGUFCheckpoint"]

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
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape if self.rows is None else (len(self.rows), *self.tensor.shape[1:])


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
        orders = _orders(layer.mixer, self._interleaved)
        if stem != "attn_qkv":
            rows = orders[stem] if self._interleaved and stem in ("attn_q", "attn_k") else None
            return {f"{prefix}{names[stem]}.{ending}": _Place(tensor, rows)}
        starts = np.cumsum([0, *map(len, orders.values())])
        if tensor.shape[:1] != (starts[-1],):
            raise ValueError(f"{tensor.path}: tensor {tensor.name} has shape {tensor.shape}, expected {starts[-1]} "
                             "rows")
        parts = {part: start + order for (part, order), start in zip(orders.items(), starts, strict=False)}
        if ending == "bias":
            return {f"{prefix}{names[part]}.bias": _Place(tensor, rows) for part, rows in parts.items()}
        return {f"{prefix}{names[stem]}.weight": _Place(tensor, np.concatenate(list(parts.values())))}

    def dtypes(self) -> set[str]:
        """Types of the matrices, such as {"Q4_K", "Q6_K"}."""
        return {tensor.type.name for tensor in self.file.tensors.values() if len(tensor.shape) > 1}

    def take(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """A tensor of that shape: float32, or bfloat16 where the file has it.

        Raises:
            ValueError: it is missing, has another shape, or holds a number that is not finite.
        """
        kind, raw = self.take_raw(name, shape)
        dtype = ml_dtypes.bfloat16 if kind == "BF16" else np.float32
        where = f"{self._places[name].tensor.path}: tensor {self._places[name].tensor.name}"
        return dequantize(kind, raw, dtype=dtype, name=where).reshape(shape)

    def take_raw(self, name: str, shape: tuple[int, ...]) -> tuple[str, NDArray[np.uint8]]:
        """(type, bytes (rows, bytes of a row)) of a tensor of that shape; a vector is one row."""
        place = self._places.get(name)
        if place is None:
            raise ValueError(f"{self.file.path}: tensor {name} is missing")
        tensor = place.tensor
        if place.shape != shape:
            raise ValueError(f"{tensor.path}: tensor {tensor.name} has shape {tensor.shape}, expected {shape} from the "
                             "metadata")
        raw = tensor.read().reshape(tensor.shape[0] if shape else 1, -1)
        if place.rows is not None:
            raw = raw[place.rows]
        self._taken.add(name)
        return tensor.type.name, raw if len(shape) > 1 else raw.reshape(1, -1)

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


def _orders(mixer: Attention, turned: bool) -> dict[str, Rows]:
    """Rows of q, k and v: where `turned`, each head's rotated rows lie in the file as 0, half, 1, half + 1, ..., also
    those of a layer that does not rotate."""
    dim = mixer.head_dim
    head = np.arange(dim)
    if turned:
        rotated = dim if mixer.rope is None else mixer.rope.dim
        head[:rotated] = head[:rotated].reshape(-1, 2).T.reshape(-1)
    heads = {"attn_q": mixer.n_heads, "attn_k": mixer.n_kv_heads}
    found = {stem: (np.arange(n)[:, None] * dim + head).reshape(-1) for stem, n in heads.items()}
    return found | {"attn_v": np.arange(mixer.n_kv_heads * dim)}
