"""A model whose weights are spread over ranks: each holds some heads and inner channels of every layer, some tokens of
the vocabulary, and the whole residual stream. Every rank runs the same pass over the same tokens, its cache holds its
own heads, and all have the same bits of the residual stream, of logits, and so the same tokens.

exact: matrices are cut by columns alone, and ranks tell each other what they have computed before and after the last
matrix of attention and mlp, four times a layer. No sum is cut: the bits are those of one process, whatever the format.

Else the last matrices are cut by rows, and what they give is summed over ranks, in rank order, twice a layer. That
differs from one process as sums in another order do: by the rounding of float32; and where inputs of matrices are
rounded (bfloat16, formats of integers) by as much as that rounding does, since it soon rounds other numbers.
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
from forge_c.distributed.cuts import LayerShare, Place, layer_share
from forge_c.distributed.exchanges import Exchanges
from forge_c.distributed.share_source import CutFormats, SharedSource
from forge_c.formats.layout import Activations, PackDtype, Precision
from forge_c.functional import LayeredModel
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


def load_share(path: str | os.PathLike[str] | None, comm: Comm, dtype: DTypeLike = "auto", *, exact: bool = True,
               activations: Activations | None = None, attention_precision: Precision | None = None,
               ignore: str | Collection[str] = (), importance: Mapping[str, ArrayLike] | None = None) -> Model:
    """This rank's share of a model, over the ranks of comm: every rank calls it, and calls the model alike.

    Arguments as of load; of large matrices no more is read and packed than the share. Formats that weigh errors ("int4"
    and the like, without importance) let rank 0 read all layers, one at a time, to see what they are given.

    Raises:
        ValueError: as load; heads or channels that cannot be cut into so many shares; ranks that do not agree.
    """
    decoder = partial(ShareDecoder, comm=comm, exact=exact)
    return _share(load_with(decoder, path, dtype, activations, attention_precision, ignore, importance))


def random_share(shape: str, comm: Comm, dtype: DTypeLike = "auto", *, exact: bool = True,
                 activations: Activations | None = None, attention_precision: Precision | None = None) -> Model:
    """This rank's share of random_model's."""
    return _share(random_with(partial(ShareDecoder, comm=comm, exact=exact), shape, dtype, activations,
                              attention_precision))


def share_of(model: Model, comm: Comm, *, exact: bool = True) -> Model:
    """This rank's share of a model that every rank has loaded: loaded again from where it came from."""
    source = model._source
    if not isinstance(source, partial):
        raise ValueError("parallel: tensor > 1 cuts what a model was loaded from, and this one was not loaded; pass "
                         "the path of its files instead")
    path, dtype = source.args
    return load_share(path, comm, dtype, exact=exact, **source.keywords)


def _share(model: Model) -> Model:
    """A model that is no longer loaded by one process from where it came from."""
    model._source = None
    return model


class ShareDecoder(Decoder):
    """A rank's share of the packed weights; logits are whole."""

    def __init__(self, spec: ModelSpec, checkpoint: Tensors, dtype: str,
                 progress: Callable[[range], Iterable[int]] = iter, activations: Activations | None = None,
                 importance: Mapping[str, Any] | None = None, *, comm: Comm, exact: bool = True) -> None:
        self.comm = comm
        with comm.guard():
            comm.agree("parallel: version, instructions, dtype, exact, and what the model is",
                       (__version__, isa(), dtype, exact, spec.model_type, f"{zlib.crc32(repr(spec).encode()):08x}"))
            self._exchanges = Exchanges(comm, spec, exact)
            self._build(spec, checkpoint, dtype, progress if comm.rank == 0 else iter, activations, importance)
            weight = np.ascontiguousarray(self._model.norm.weight)
            comm.agree("parallel: the last norm's weights", f"{zlib.crc32(weight.tobytes()):08x}")

    def _build(self, spec: ModelSpec, checkpoint: Tensors, dtype: str, progress: Callable[[range], Iterable[int]],
               activations: Activations | None, importance: Mapping[str, Any] | None) -> None:
        stored = cast(StoredTensors, checkpoint) if dtype == STORED else None
        formats, exchanges = CutFormats(spec, checkpoint, dtype), self._exchanges
        places = [Place(self.comm.rank, self.comm.size, spec.hidden_size, exchanges.columns, partial(formats.unit, i),
                        f"parallel: layer {i}") for i in range(spec.n_layers)]
        shares = [layer_share(layer, place) for layer, place in zip(spec.layers, places, strict=True)]
        mine = exchanges.vocabulary[self.comm.rank]
        local = replace(spec, embed=replace(spec.embed, vocab_size=len(mine)),
                        layers=tuple(share.layer for share in shares))
        self._describe(local, dtype if stored is None else stored.mostly())
        self.spec = spec
        cuts = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), Cut(0, spec.vocab_size, (mine,)))
        form = cast(PackDtype, dtype)
        ends = (packed_ends(local, SharedTensors(checkpoint, cuts), form, activations) if stored is None
                else stored_ends(local, SharedBlocks(stored, cuts), activations))
        known = self._importance(spec, checkpoint, form, importance, stored is None)
        layers = []
        for i in progress(range(spec.n_layers)):
            source = _source(spec, checkpoint, shares[i], i, formats, activations, known(i))
            source.spread = {kind: exchanges.over(inner) for kind, inner in shares[i].inner.items()}
            layers.append(build_layer(shares[i].layer, source))
            self.comm.barrier()  # so that no rank waits for one that loads slowly longer than for one layer
        norm = LayerSource(checkpoint, "model.", spec.hidden_size, form).norm(spec.head.norm, "norm", spec.hidden_size)
        checkpoint.check_all_taken(("lm_head.weight",) if spec.head.tied else ())
        self._model = LayeredModel(ends[0], layers, norm, ends[1], embedding_scale=spec.embed.scale,
                                   ranks=exchanges.sum, first_token=mine.start)

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
        self._check_head(logits)
        with self.comm.guard():
            return super().forward(ids, cache, logits=logits, last_only=last_only, hidden=hidden, fresh=fresh)

    def hidden(self, ids: NDArray[np.int64], cache: ModelCache, layer: int) -> Floats:
        """As Decoder.hidden, likewise."""
        with self.comm.guard():
            return super().hidden(ids, cache, layer)

    def whole_logits(self, found: Floats) -> Floats:
        return self._exchanges.logits(np.ascontiguousarray(found))


def _source(spec: ModelSpec, checkpoint: Tensors, share: LayerShare, i: int, formats: CutFormats,
            activations: Activations | None, importance: Mapping[str, Any] | None) -> LayerSource:
    """The tensors of the rank's share of layer i."""
    prefix = f"model.layers.{i}."
    cuts: dict[str, Cut | Kept] = {prefix + name: cut for name, cut in share.cuts.items()}
    if formats.dtype == STORED:
        return StoredSource(SharedBlocks(checkpoint, cuts), prefix, spec.hidden_size, formats.form, activations)
    tensors = SharedTensors(folded(checkpoint, prefix, spec.layers[i]), cuts)
    return SharedSource(tensors, prefix, spec.hidden_size, formats, i, activations, importance)
