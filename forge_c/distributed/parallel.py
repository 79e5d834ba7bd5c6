"""A model on several ranks: the calls of a Model, which every rank makes with the same arguments."""
from __future__ import annotations

import os
import zlib
from typing import Any, NoReturn

import numpy as np

from forge_c.checks import integer
from forge_c.distributed.cache import ShardedCache
from forge_c.distributed.comm import Comm
from forge_c.distributed.decoder import ParallelDecoder
from forge_c.distributed.layout import Layout, check_layout
from forge_c.distributed.tensor import load_share, share_of
from forge_c.functional import isa
from forge_c.models.decoder import Decoder
from forge_c.models.model import Model, load
from forge_c.models.spec import RGLRU, Attention, Mamba, Mamba2, ModelSpec, ShortConv
from forge_c.state import ModelCache
from forge_c.version import __version__

_KNOWN = (Attention, Mamba, Mamba2, ShortConv, RGLRU)
_RECURRENT = (Mamba, Mamba2, ShortConv, RGLRU)


def parallel(model: Model | str | os.PathLike[str] | None, comm: Comm, *, layout: Layout = "zigzag", tensor: int = 1,
             timeout: float = 60.0, exact: bool = True, **loading: Any) -> Model:
    """A Model whose prompts, caches and steps are shared by all ranks of comm. Every rank calls it, and makes each call
    of what it gives with the same arguments; each has the same result.

    Each rank runs its part of a prompt, and keeps the keys and values of these tokens: a context may be as long as the
    memories of all ranks together allow. A token that is generated is run by all; its keys and values go to one of
    them, and each attends to the keys that it holds. All of that gives the bits of one process, whatever the layout and
    the number of ranks, and so the same text. On one machine ranks bring no speed.

    With tensor=t each t neighbouring ranks share the weights, for a model that is larger than one machine: a rank has
    some heads and inner channels of every layer and some tokens of the vocabulary, and its cache holds its own heads.
    Tokens are shared by the comm.size / t groups; with one group nothing but weights is.

    Args:
        model: the same on every rank, with the same instruction set (forge_c.use_isa); or a path as of load, from
            which no more is read, with tensor, than a rank's share. A model is loaded again for its share.
        layout: how a prompt's chunks of 256 tokens are cut, "zigzag", "striped" or "contiguous". Where layers have a
            recurrent state prompts are cut contiguous, and "striped" is a ValueError.
        tensor: how many ranks share each layer's weights; a divisor of the number of ranks. There must be a head of
            queries and a row of each matrix for every one; shares may differ. State spaces of Mamba-2 are on each.
        timeout: seconds after which waiting for another rank is a TimeoutError; comm's from now on.
        exact: with tensor, whether sums are those of one process, bit for bit, for which ranks talk four times a layer;
            else twice, and sums over ranks differ from one process's by rounding: of float32, or, where inputs of
            matrices are rounded, by as much as that does.
        loading: of a path, load's arguments.

    Raises:
        ValueError: ranks do not agree on the model or the arguments, which all ranks are told; or layers of a kind that
            cannot be run so, such as those with routers.
        RankError, TimeoutError: another rank failed, or did not call; also in every call of the result. Then the
            communicator, and so the model, is of no more use.

    >>> from forge_c.distributed import SelfComm, parallel
    >>> from forge_c.models import load
    >>> parallel(load(), SelfComm()).generate("import ", 4) == load().generate("import ", 4)
    True
    """
    check_layout("parallel", layout)
    ranks = integer("parallel", "tensor", tensor)
    if ranks < 1 or comm.size % ranks:
        raise ValueError(f"parallel: tensor is {ranks}, expected a divisor of {comm.size}, the number of ranks")
    comm.timeout = timeout
    comm.agree("parallel: version, instruction set, layout, tensor, timeout, exact",
               (__version__, isa(), layout, ranks, timeout, exact))
    with comm.guard():
        tokens = comm if ranks == 1 else comm.split(comm.rank % ranks)  # the ranks among which they are cut
        whole = _loaded(model, comm if ranks == 1 else comm.split(comm.rank // ranks), ranks, exact, loading)
    if ranks > 1 and tokens.size == 1:
        return ParallelModel(whole, whole._decoder, comm)
    _check_kinds(whole.config, layout)
    tokens.agree("parallel: model", _described(whole))
    return ParallelModel(whole, ParallelDecoder(whole._decoder, tokens, layout), comm)


def _loaded(model: Any, group: Comm, ranks: int, exact: bool, loading: dict[str, Any]) -> Model:
    """The model, or this rank's share among the ranks of a group."""
    if model is None or isinstance(model, str | os.PathLike):
        return load(model, **loading) if ranks == 1 else load_share(model, group, exact=exact, **loading)
    if not isinstance(model, Model) or isinstance(model, ParallelModel):
        raise TypeError(f"parallel: model is a {type(model).__name__}, expected a Model of one process, or a path")
    if loading:
        raise TypeError(f"parallel: {next(iter(loading))} is an argument of a path alone, and model is one already")
    return model if ranks == 1 else share_of(model, group, exact=exact)


def _check_kinds(spec: ModelSpec, layout: str) -> None:
    for i, layer in enumerate(spec.layers):
        if layer.router is not None:
            raise ValueError(f"parallel: layer {i} has a router, expected layers that all tokens go through")
        for kind in layer.remembers:
            if kind is not None and not isinstance(kind, _KNOWN):
                raise ValueError(f"parallel: layer {i} has a {type(kind).__name__}, expected one of "
                                 f"{', '.join(known.__name__ for known in _KNOWN)}")
            if isinstance(kind, _RECURRENT) and layout == "striped":
                raise ValueError("parallel: layout is 'striped', and the model has recurrent layers, whose tokens must "
                                 "lie one after the other; expected 'contiguous'")


def _described(model: Model) -> tuple[Any, ...]:
    """What must be the same on every rank: a checksum of what the model is made of, not of each weight."""
    return model.config.model_type, zlib.crc32(repr(model.config).encode()), model.dtype, model.nbytes


class ParallelModel(Model):
    """A Model on several ranks, from `parallel`. It is not saved: the model that it was made of is."""

    def __init__(self, model: Model, decoder: Decoder, comm: Comm) -> None:
        super().__init__(decoder, model.tokenizer, model.eos_token_ids, generation_config=model.generation_config,
                         info=model.info)
        self._comm = comm

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, rank={self._comm.rank} of {self._comm.size})"

    def _check_cache(self, function: str, cache: ModelCache) -> None:
        sharded = isinstance(self._decoder, ParallelDecoder)
        if sharded and isinstance(cache, ModelCache) and not isinstance(cache, ShardedCache):
            raise ValueError(f"{function}: cache is one of a model in one process, expected one from new_cache()")
        super()._check_cache(function, cache)

    def generate(self, prompt: Any = None, max_new_tokens: int | None = 128, **options: Any) -> Any:  # type: ignore[override]
        if options.get("seed") is None:
            options["seed"] = self._common_seed()
        return super().generate(prompt, max_new_tokens, **options)

    def _common_seed(self) -> int:
        """Rank 0's choice."""
        seed = np.frombuffer(os.urandom(8), np.int64) & np.int64(2**62 - 1)
        self._comm.broadcast(seed)
        return int(seed[0])

    def save(self, folder: str | os.PathLike[str]) -> NoReturn:
        raise ValueError("Model.save: the model is one of several ranks, expected the one that it was made of")

    def __copy__(self) -> Model:
        return ParallelModel(self, self._decoder, self._comm)
