"""A model whose weights are spread over ranks: each holds some heads and inner channels of every layer, some tokens of
the vocabulary, and the whole residual stream, and what their matrices give is summed over ranks, twice a layer.

Every rank runs the same pass over the same tokens, and its cache holds its own heads. The sums are in rank order on
every rank, so that all have the same bits of the residual stream, of logits, and so the same tokens. They differ from
one process's as sums in another order do: by the rounding of float32, and, with inputs of matrices rounded to integers,
by the few of them that come to lie on the other side of a step.
"""
from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from forge_c import __version__, isa
from forge_c.distributed.comm import Comm
from forge_c.distributed.cuts import LayerShare, Place, layer_share, vocabulary
from forge_c.distributed.share_source import CutFormats, SharedSource
from forge_c.formats.layout import Activations, PackDtype, Precision
from forge_c.functional import LayeredModel, Ranks
from forge_c.models import Model
from forge_c.models.decoder import STORED, Decoder, packed_ends, stored_ends
from forge_c.models.folded import folded
from forge_c.models.inputs import can_observe, of_random_tokens
from forge_c.models.mix import weighs
from forge_c.models.model import load_with, random_with
from forge_c.models.parts import LayerSource, StoredSource, build_layer
from forge_c.models.spec import ModelSpec
from forge_c.models.weights import StoredTensors, Tensors
from forge_c.models.weights.share import Cut, Kept, SharedBlocks, SharedTensors
from forge_c.state import ModelCache

Floats = NDArray[np.float32]


def load_share(path: str | os.PathLike[str] | None, comm: Comm, dtype: DTypeLike = "auto", *,
               activations: Activations | None = None, attention_precision: Precision | None = None,
               ignore: str | Collection[str] = (), importance: Mapping[str, ArrayLike] | None = None) -> Model:
    """This rank's share of a model, over the ranks of comm: every rank calls it, and calls the model alike.

    Arguments as of load; of large matrices no more is read and packed than the share. Formats that weigh errors ("int4"
    and the like, without importance) let rank 0 read all layers, one at a time, to see what they are given.

    Raises:
        ValueError: as load; heads or channels that cannot be cut into so many shares; ranks that do not agree.
    """
    return _share(load_with(partial(ShareDecoder, comm=comm), path, dtype, activations, attention_precision, ignore,
                            importance))


def random_share(shape: str, comm: Comm, dtype: DTypeLike = "auto", *, activations: Activations | None = None,
                 attention_precision: Precision | None = None) -> Model:
    """This rank's share of random_model's."""
    return _share(random_with(partial(ShareDecoder, comm=comm), shape, dtype, activations, attention_precision))


def share_of(model: Model, comm: Comm) -> Model:
    """This rank's share of a model that every rank has loaded: loaded again from where it came from."""
    source = model._source
    if not isinstance(source, partial):
        raise ValueError("parallel: tensor > 1 cuts what a model was loaded from, and this one was not loaded; pass "
                         "the path of its files instead")
    path, dtype = source.args
    return load_share(path, comm, dtype, **source.keywords)


def _share(model: Model) -> Model:
    """A model that is no longer loaded by one process from where it came from."""
    model._source = None
    return model


class ShareDecoder(Decoder):
    """A rank's share of the packed weights; logits are whole."""

    def __init__(self, spec: ModelSpec, checkpoint: Tensors, dtype: str,
                 progress: Callable[[range], Iterable[int]] = iter, activations: Activations | None = None,
                 importance: Mapping[str, Any] | None = None, *, comm: Comm) -> None:
        self.comm, self._vocabulary = comm, vocabulary(spec.vocab_size, comm.size)
        with comm.guard():
            comm.agree("parallel: version, instructions, dtype, and what the model is",
                       (__version__, isa(), dtype, spec.model_type, f"{zlib.crc32(repr(spec).encode()):08x}"))
            self._build(spec, checkpoint, dtype, progress if comm.rank == 0 else iter, activations, importance)
            weight = np.ascontiguousarray(self._model.norm.weight)
            comm.agree("parallel: the last norm's weights", f"{zlib.crc32(weight.tobytes()):08x}")

    def _build(self, spec: ModelSpec, checkpoint: Tensors, dtype: str, progress: Callable[[range], Iterable[int]],
               activations: Activations | None, importance: Mapping[str, Any] | None) -> None:
        stored = cast(StoredTensors, checkpoint) if dtype == STORED else None
        formats = CutFormats(spec, checkpoint, dtype)
        shares = [layer_share(layer, Place(self.comm.rank, self.comm.size, partial(formats.unit, i),
                                           f"parallel: layer {i}")) for i, layer in enumerate(spec.layers)]
        mine = self._vocabulary[self.comm.rank]
        local = replace(spec, embed=replace(spec.embed, vocab_size=len(mine)),
                        layers=tuple(share.layer for share in shares))
        self._describe(local, dtype if stored is None else stored.mostly())
        self.spec = spec
        cuts = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), Cut(0, spec.vocab_size, (mine,)))
        form, ranks = cast(PackDtype, dtype), Ranks(self.comm.all_reduce)
        ends = (packed_ends(local, SharedTensors(checkpoint, cuts), form, activations) if stored is None
                else stored_ends(local, SharedBlocks(stored, cuts), activations))
        known = self._importance(spec, checkpoint, form, importance, stored is None)
        layers = []
        for i in progress(range(spec.n_layers)):
            source = _source(spec, checkpoint, shares[i], i, formats, activations, known(i))
            layers.append(_over(ranks, shares[i], build_layer(shares[i].layer, source)))
            self.comm.barrier()  # so that no rank waits for one that loads slowly longer than for one layer
        norm = LayerSource(checkpoint, "model.", spec.hidden_size, form).norm(spec.head.norm, "norm", spec.hidden_size)
        checkpoint.check_all_taken(("lm_head.weight",) if spec.head.tied else ())
        self._model = LayeredModel(ends[0], layers, norm, ends[1], embedding_scale=spec.embed.scale, ranks=ranks,
                                   first_token=mine.start)

    def _importance(self, spec: ModelSpec, checkpoint: Tensors, dtype: PackDtype,
                    importance: Mapping[str, Any] | None, packs: bool) -> Callable[[int], Mapping[str, Any] | None]:
        """What errors cost in each layer, for one after the other: what was given, or what rank 0 sees."""
        if not packs or importance is not None or not (weighs(dtype) and can_observe(spec)):
            return lambda i: importance
        of_layer = of_random_tokens(spec, checkpoint) if self.comm.rank == 0 else None
        return lambda i: self.comm.all_gather(None if of_layer is None else of_layer(i))[0]

    def forward(self, ids: NDArray[np.int64], cache: ModelCache, *, logits: bool = True, last_only: bool = False,
                hidden: bool = False, fresh: NDArray[np.bool_] | None = None) -> tuple[Any, Any]:
        """As Decoder.forward; an error of one rank is an error of all."""
        with self.comm.guard():
            return super().forward(ids, cache, logits=logits, last_only=last_only, hidden=hidden, fresh=fresh)

    def hidden(self, ids: NDArray[np.int64], cache: ModelCache, layer: int) -> Floats:
        """As Decoder.hidden, likewise."""
        with self.comm.guard():
            return super().hidden(ids, cache, layer)

    def _finished(self, y: Floats) -> Floats:
        """Logits of the whole vocabulary, from each rank's."""
        mine = np.ascontiguousarray(super()._finished(y))
        parts = [np.empty((*y.shape[:-1], len(tokens)), np.float32) for tokens in self._vocabulary]
        self.comm.all_gather_arrays(mine, parts)
        return np.concatenate(parts, axis=-1)


def _source(spec: ModelSpec, checkpoint: Tensors, share: LayerShare, i: int, formats: CutFormats,
            activations: Activations | None, importance: Mapping[str, Any] | None) -> LayerSource:
    """The tensors of the rank's share of layer i."""
    prefix = f"model.layers.{i}."
    cuts: dict[str, Cut | Kept] = {prefix + name: cut for name, cut in share.cuts.items()}
    if formats.dtype == STORED:
        return StoredSource(SharedBlocks(checkpoint, cuts), prefix, spec.hidden_size, formats.form, activations)
    tensors = SharedTensors(folded(checkpoint, prefix, spec.layers[i]), cuts)
    return SharedSource(tensors, prefix, spec.hidden_size, formats, i, activations, importance)


def _over(ranks: Ranks, share: LayerShare, layer: tuple[Any, ...]) -> tuple[Any, ...]:
    """The layer's parts, of which those that are shares know their ranks."""
    parts = dict(enumerate(layer))
    of = {0: share.mixer, 1: share.mlp, 5: share.beside, 6: share.ahead[0], 7: share.ahead[1]}
    for at, is_term in of.items():
        if is_term and parts.get(at) is not None:
            parts[at].over(ranks)
    return layer
