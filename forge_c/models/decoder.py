"""The decoder: a spec's layers with their weights, and one call that runs them. It knows no family and no kind."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from forge_c.checks import checked_size
from forge_c.formats.layout import Activations, PackDtype, Precision
from forge_c.functional import KV_CHUNK, AttentionPart, CalledPart, LayeredModel, PackedWeight, StateTable
from forge_c.models.folded import folded
from forge_c.models.inputs import can_observe, importance_of, of_random_tokens
from forge_c.models.mix import Formats, weighs
from forge_c.models.parts import LayerSource, StoredSource, build_layer, new_state
from forge_c.models.rope_tables import RopeTables, depends_on_length
from forge_c.models.spec import Attention, ModelSpec, Rope
from forge_c.models.weights import StoredTensors, Tensors
from forge_c.packing import pack, pack_blocks
from forge_c.state import ModelCache

__all__ = ["DEFAULT_CONTEXT", "STORED", "Decoder"]

DEFAULT_CONTEXT = 4096  # of new_cache, so that a model made for a million tokens does not ask for their memory

_ROUTED_PAGES = 4  # of a pass; an eighth of them is half a page

STORED = "stored"  # the dtype of a model whose matrices are held as the file has them

Floats = NDArray[np.float32]


class Decoder:
    """Packed weights and the forward pass; `forge_c.models.Model` adds text."""

    def __init__(self, spec: ModelSpec, checkpoint: Tensors, dtype: str,
                 progress: Callable[[range], Iterable[int]] = iter, activations: Activations | None = None,
                 importance: Mapping[str, Any] | None = None) -> None:
        """importance: as in load."""
        stored = cast(StoredTensors, checkpoint) if dtype == STORED else None
        self._describe(spec, dtype if stored is None else stored.mostly())
        form = cast(PackDtype, dtype)  # of what is not stored already
        ends = (packed_ends(spec, checkpoint, form, activations) if stored is None
                else stored_ends(spec, stored, activations))
        source = _weighed(spec, checkpoint, form, activations, importance) if stored is None else (
            lambda i: StoredSource(checkpoint, f"model.layers.{i}.", spec.hidden_size, form, activations))
        layers = [build_layer(spec.layers[i], source(i)) for i in progress(range(spec.n_layers))]
        norm = LayerSource(checkpoint, "model.", spec.hidden_size, form).norm(spec.head.norm, "norm", spec.hidden_size)
        checkpoint.check_all_taken(("lm_head.weight",) if spec.head.tied else ())
        self._model = LayeredModel(ends[0], layers, norm, ends[1], embedding_scale=spec.embed.scale)

    @classmethod
    def of(cls, spec: ModelSpec, dtype: str, model: LayeredModel) -> Decoder:
        """Of a model that is packed already."""
        decoder = object.__new__(cls)
        decoder._describe(spec, dtype)
        decoder._model = model
        return decoder

    def _describe(self, spec: ModelSpec, dtype: str) -> None:
        self.spec, self.dtype = spec, dtype
        self.kinds = tuple(kind for layer in spec.layers for kind in layer.remembers)  # a cache is one of these
        self._tables = RopeTables()

    def _ropes(self) -> list[Rope]:
        return [r for r in (getattr(kind, "rope", None) for kind in self._mixers()) if r is not None]

    def _mixers(self) -> Iterator[Any]:
        return (kind for layer in self.spec.layers for kind in layer.mixers)

    @property
    def attention_precision(self) -> Precision | None:
        """As in load; the same for all layers."""
        return next((part.precision for part in self._model.parts if isinstance(part, AttentionPart)), None)

    @attention_precision.setter
    def attention_precision(self, value: Precision | None) -> None:
        for part in self._model.parts:
            if isinstance(part, AttentionPart):
                part.set_precision(value)

    @property
    def pass_tokens(self) -> int:
        """How many of a row's tokens a pass reads at most: a page of them. More where layers have routers, so that what
        goes through is still many rows to a matrix; a window's ring takes a page at a time."""
        routed = any(layer.router is not None for layer in self.spec.layers)
        windows = any(getattr(kind, "window", None) is not None for kind in self._mixers())
        return _ROUTED_PAGES * KV_CHUNK if routed and not windows else KV_CHUNK

    @property
    def result_tokens(self) -> int:
        """The same of a pass of which every token's logits or hidden states are wanted."""
        return KV_CHUNK

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they are held."""
        return self._model.nbytes

    @property
    def step_nbytes(self) -> int:
        """Bytes of weights that one step reads: all but an embedding of its own, of which it reads a row a token. Where
        layers have routers, the most that it may read: a layer through which no token goes is left alone."""
        m = self._model
        return sum(part.nbytes for part in m.parts) + m.norm.nbytes + m.head.nbytes

    @property
    def layer_params(self) -> int:
        """Weights of all layers that a token is multiplied by."""
        return sum(part.params for part in self._model.parts)

    def new_cache(self, batch: int = 1, max_seq_len: int | None = None, dtype: str = "float32") -> ModelCache:
        """An empty cache for `batch` rows of up to max_seq_len tokens, by default min(the model's context, 4096), or
        the context alone where no layer has attention: then a cache is as large for any of them.

        Layers with a sliding window keep no more than the window needs. dtype "float32", "bfloat16" or "int8".
        """
        rows, room = checked_size("new_cache", "batch", batch), self._room(max_seq_len)
        layers = [new_state(kind, rows, room, dtype) for kind in self.kinds]
        tables = [self._tables.of(getattr(kind, "rope", None)) for kind in self.kinds]
        return ModelCache(self.kinds, layers, tables, np.zeros(rows, np.int64), room)

    def _room(self, max_seq_len: int | None) -> int:
        """Of new_cache, checked."""
        if max_seq_len is None:
            max_seq_len = self.spec.max_position_embeddings
            if any(isinstance(kind, Attention) for kind in self._mixers()):
                max_seq_len = min(max_seq_len, DEFAULT_CONTEXT)
        return checked_size("new_cache", "max_seq_len", max_seq_len)

    @property
    def angles_depend_on_length(self) -> bool:
        """Whether a token's rotary angles depend on how long its text is."""
        return any(depends_on_length(rope) for rope in self._ropes())

    def forward(self, ids: NDArray[np.int64], cache: ModelCache, *, logits: bool = True, last_only: bool = False,
                hidden: bool = False, fresh: NDArray[np.bool_] | None = None) -> tuple[Any, Any]:
        """ids (batch, n <= pass_tokens), the tokens after those in the cache -> logits (batch, n, vocab), or with
        last_only (batch, 1, vocab), and hidden (batch, n, H) after the last norm; None for what is not asked for.
        fresh: as ModelCache.extending. ValueError for logits of a model without a head."""
        self._check_head(logits)
        with cache.locked():
            self.read_outdated(cache, ids.shape[1], fresh)
            if not cache.agree(ids.shape[1], fresh):
                return stacked([self.forward(ids[i : i + 1], cache.row(i), logits=logits, last_only=last_only,
                                              hidden=hidden, fresh=None if fresh is None else fresh[i : i + 1])
                                 for i in range(len(ids))])
            with cache.extending(ids, fresh) as start:
                found, normed = self._model.forward(ids, cache.states, start, logits=logits, last_only=last_only,
                                                    hidden=hidden)
        return None if found is None else self._finished(self.whole_logits(found)), normed

    def whole_logits(self, found: Floats) -> Floats:
        """Logits of the whole vocabulary, from those of this rank's tokens where it is spread over ranks."""
        return found

    def _check_head(self, logits: bool) -> None:
        if logits and self.spec.head.absent:
            raise ValueError("model: the checkpoint has no lm_head.weight, and config.json has tie_word_embeddings "
                             "false: it was saved without its head, and gives hidden states alone")

    def read_outdated(self, cache: ModelCache, tokens: int, fresh: NDArray[np.bool_] | None = None) -> None:
        """Read again the rows whose tokens have the angles of a shorter or longer text than they are part of with
        `tokens` more, as transformers does when a text outgrows longrope's original length."""
        for i, length in cache.outdated(tokens, fresh).items():
            with cache.rereading(i, length) as (row, ids):
                for start in range(0, len(ids), self.result_tokens):
                    self.forward(ids[None, start : start + self.result_tokens], row, logits=False)

    def hidden(self, ids: NDArray[np.int64], cache: ModelCache, layer: int) -> Floats:
        """(batch, n, H) of ids (batch, n <= result_tokens): what goes into layer 0 .. n_layers - 1, or, for n_layers,
        what comes out of the last norm."""
        if layer == self.spec.n_layers:
            found: Floats = self.forward(ids, cache, logits=False, hidden=True)[1]
            return found
        seen: list[Floats] = []
        model, before = self._looking(layer, seen)
        states = cache.states.held
        with cache.locked():
            self.read_outdated(cache, ids.shape[1])
            if not cache.agree(ids.shape[1]):
                return np.concatenate([self.hidden(ids[i : i + 1], cache.row(i), layer) for i in range(len(ids))])
            with cache.extending(ids) as start:
                model.forward(ids, StateTable([*states[:before], None, *states[before:]]), start, logits=False)
        return seen[0]

    def _looking(self, layer: int, seen: list[Floats]) -> tuple[LayeredModel, int]:
        """A model over the same parts that puts into `seen` what goes into a layer, in the place of the state of this
        number, which is None."""
        def look(x: Floats, state: None, start: NDArray[np.int64]) -> Floats:
            seen.append(x)
            return np.zeros_like(x)

        m = self._model
        layers = [*m.held[:layer], (CalledPart(m.norm.n, look), None, False, 1.0), *m.held[layer:]]
        before = sum(len(one.remembers) for one in self.spec.layers[:layer])
        made = LayeredModel(m.embedding, layers, m.norm, m.head, embedding_scale=self.spec.embed.scale, ranks=m.ranks,
                            first_token=m.first_token)
        return made, before

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


def _weighed(spec: ModelSpec, checkpoint: Tensors, dtype: PackDtype, activations: Activations | None,
             importance: Mapping[str, Any] | None) -> Callable[[int], LayerSource]:
    """The source of each layer's matrices, for one after the other: which format they get, and what errors cost."""
    formats, of_layer = Formats(dtype, spec.n_layers), None
    if importance is None and weighs(dtype) and can_observe(spec):
        of_layer = of_random_tokens(spec, checkpoint)

    def source(i: int) -> LayerSource:
        known, prefix = importance if of_layer is None else of_layer(i), f"model.layers.{i}."
        return LayerSource(folded(checkpoint, prefix, spec.layers[i]), prefix, spec.hidden_size, dtype, activations,
                           lambda name, in_features: formats.of(name, i, in_features),
                           lambda name: importance_of(known, prefix, name))

    return source


def packed_ends(spec: ModelSpec, checkpoint: Tensors, dtype: PackDtype,
          activations: Activations | None) -> tuple[Any, PackedWeight]:
    """The embedding (vocab, H), or packed as (H, vocab), and the last projection (H, vocab)."""
    table = checkpoint.take("model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size))
    held = Formats(dtype, spec.n_layers).of("lm_head", None, spec.hidden_size)
    if spec.head.tied or spec.head.absent:  # rows are looked up in what is multiplied
        packed = pack(table.T, held, activations=activations)
        return packed, packed
    head = checkpoint.take("lm_head.weight", table.shape)
    embedding = table if dtype == "float32" else table.astype(ml_dtypes.bfloat16, copy=False)
    return embedding, pack(head.T, held, activations=activations)


def stored_ends(spec: ModelSpec, checkpoint: StoredTensors,
                 activations: Activations | None) -> tuple[PackedWeight, PackedWeight]:
    """The same as the file has them, both (H, vocab), and one where the model is tied."""
    def packed(name: str) -> PackedWeight:
        return pack_blocks(*checkpoint.take_raw(name, (spec.vocab_size, spec.hidden_size)), activations=activations)

    table = packed("model.embed_tokens.weight")
    return table, table if spec.head.tied else packed("lm_head.weight")


def stacked(rows: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Results of single rows as that of all."""
    first, second = zip(*rows, strict=True)
    return tuple(None if one[0] is None else np.concatenate(one) for one in (first, second))  # type: ignore[return-value]
