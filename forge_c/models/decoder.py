"""The decoder: a spec's layers with their weights, and one call that runs them. It knows no family and no kind."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from forge_c.checks import checked_size
from forge_c.functional import LayeredModel
from forge_c.models.parts import LayerSource, build_layer, new_state
from forge_c.models.spec import ModelSpec, Rope
from forge_c.models.weights import Tensors
from forge_c.packing import pack
from forge_c.rotary import DEPEND_ON_LENGTH, RopeTable, extend_rope_table, rope_table
from forge_c.state import ModelCache
from forge_c.state.model import TableOf

__all__ = ["DEFAULT_CONTEXT", "Decoder"]

DEFAULT_CONTEXT = 4096  # of new_cache, so that a model made for a million tokens does not ask for their memory

# The format of the last projection: its errors reach the probabilities directly, so int4 models hold it in int8.
_HEAD = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8", "int4": "int8"}

Floats = NDArray[np.float32]


class Decoder:
    """Packed weights and the forward pass; `forge_c.models.Model` adds text."""

    def __init__(self, spec: ModelSpec, checkpoint: Tensors, dtype: str,
                 progress: Callable[[range], Iterable[int]] = iter, activations: str | None = None) -> None:
        self.spec, self.dtype = spec, dtype
        self.kinds = tuple(layer.mixer for layer in spec.layers)  # a cache is one of these
        self._tables: list[tuple[Rope, RopeTable]] = []
        table = checkpoint.take("model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size))
        head = table if spec.head.tied else checkpoint.take("lm_head.weight", table.shape)
        packed = pack(head.T, _HEAD[dtype], activations=activations)  # (H, vocab)
        # Rows are looked up in what is multiplied, where that is the same; else (vocab, H), unless float32 in bfloat16.
        embedding: Any = packed
        if not spec.head.tied:
            embedding = table if dtype == "float32" else table.astype(ml_dtypes.bfloat16, copy=False)
        del table, head
        layers = [build_layer(spec.layers[i], LayerSource(checkpoint, f"model.layers.{i}.", spec.hidden_size, dtype,
                                                          activations)) for i in progress(range(spec.n_layers))]
        norm = LayerSource(checkpoint, "model.", spec.hidden_size, dtype).norm(spec.head.norm, "norm", spec.hidden_size)
        checkpoint.check_all_taken(("lm_head.weight",) if spec.head.tied else ())
        self._model = LayeredModel(embedding, layers, norm, packed, embedding_scale=spec.embed.scale)
        for rope in self._ropes():
            self._rope_table(rope, 1)  # an impossible rope setting is an error of the load, not of the first call

    def _ropes(self) -> list[Rope]:
        return [r for r in (getattr(layer.mixer, "rope", None) for layer in self.spec.layers) if r is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they are held."""
        m = self._model
        return self.step_nbytes + (0 if m.embedding is m.head else m.embedding.nbytes)

    @property
    def step_nbytes(self) -> int:
        """Bytes of weights that one step reads: all but an embedding of its own, of which it reads a row a token."""
        m = self._model
        return sum(part.nbytes for part in m.parts) + m.norm.nbytes + m.head.nbytes

    @property
    def layer_params(self) -> int:
        """Weights of all layers that a token is multiplied by."""
        return sum(part.params for part in self._model.parts)

    def new_cache(self, batch: int = 1, max_seq_len: int | None = None, dtype: str = "float32") -> ModelCache:
        """An empty cache for `batch` rows of up to max_seq_len tokens, by default min(the model's context, 4096).

        Layers with a sliding window keep no more than the window needs. dtype "float32", "bfloat16" or "int8".
        """
        if max_seq_len is None:
            max_seq_len = min(self.spec.max_position_embeddings, DEFAULT_CONTEXT)
        rows, room = checked_size("new_cache", "batch", batch), checked_size("new_cache", "max_seq_len", max_seq_len)
        layers = [new_state(kind, rows, room, dtype) for kind in self.kinds]
        tables = [self._table_of(getattr(kind, "rope", None), room) for kind in self.kinds]
        return ModelCache(self.kinds, layers, tables, np.zeros(rows, np.int64), room)

    @property
    def angles_depend_on_length(self) -> bool:
        """Whether a row's rotary angles depend on the room that its cache has."""
        return any(_depends_on_length(rope) for rope in self._ropes())

    def forward(self, ids: NDArray[np.int64], cache: ModelCache, *, logits: bool = True, last_only: bool = False,
                hidden: bool = False) -> tuple[Any, Any]:
        """ids (batch, n <= KV_CHUNK), the tokens after those in the cache -> logits (batch, n, vocab), with last_only
        (batch, 1, vocab), and hidden (batch, n, H) after the last norm; None for what is not asked for."""
        with cache.locked(), cache.extending(ids.shape[1]) as start:
            found, normed = self._model.forward(ids, cache.states, start, logits=logits, last_only=last_only,
                                                hidden=hidden)
        return None if found is None else self._finished(found), normed

    def _finished(self, y: Floats) -> Floats:
        """Logits as the family scales and caps them, in place."""
        head = self.spec.head
        if head.logits_scale != 1.0:
            y *= np.float32(head.logits_scale)
        if head.softcap is not None:
            cap = np.float32(head.softcap)
            y /= cap
            np.tanh(y, out=y)
            y *= cap
        return y

    def _table_of(self, rope: Rope | None, room: int) -> TableOf | None:
        if rope is None:
            return None
        if _depends_on_length(rope):
            return lambda length: self._rope_table(rope, room)
        return partial(self._rope_table, rope)

    def _rope_table(self, rope: Rope, length: int) -> RopeTable:
        """A table for at least `length` positions, or exactly as many where the angles depend on it."""
        held = next((table for known, table in self._tables if known == rope), None)
        exact = _depends_on_length(rope)
        if held is not None and (held.max_seq_len == length if exact else held.max_seq_len >= length):
            return held
        rows = length if exact else 1 << (length - 1).bit_length()
        if held is None or exact:
            table = rope_table(rope.dim, rows, rope.theta, scaling=rope.scaling)
        else:
            table = extend_rope_table(held, rows, rope.theta, scaling=rope.scaling)
        self._tables = [(known, t) for known, t in self._tables if known != rope] + [(rope, table)]
        return table


def _depends_on_length(rope: Rope) -> bool:
    return rope.scaling.get("rope_type") in DEPEND_ON_LENGTH
