"""The decoder of one rank of several: its forward passes are made by all of them, and give each the same.

A prompt goes through in passes of TOKENS_A_RANK tokens a rank: what a pass needs of memory does not grow with the
prompt, and the keys before it, which travel again in each pass, stay hidden behind the work of so many queries.
What is short beside the keys that are there is run by every rank as a whole, and its queries travel instead: a step of
generation, a turn of a long conversation. Which it is, `runs_together` says of a whole text, however it is fed.
"""
from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge_c.checks import checked_size
from forge_c.distributed.cache import Shard, ShardedCache, ShardedKV
from forge_c.distributed.comm import Comm
from forge_c.distributed.owners import Owners, appended, by_tokens, cut, room_of
from forge_c.distributed.passes import Prompt, Step
from forge_c.distributed.relay import Relay
from forge_c.functional import KV_CHUNK, StateTable
from forge_c.models.decoder import Decoder, stacked
from forge_c.models.parts import new_state
from forge_c.models.spec import RGLRU, Attention, Mamba, Mamba2, ShortConv
from forge_c.state import ModelCache
from forge_c.state.lengths import lengths_after
from forge_c.state.recurrent import RecurrentState

TOKENS_A_RANK = 16 * KV_CHUNK

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
_RECURRENT = (Mamba, Mamba2, ShortConv, RGLRU)


@dataclass(frozen=True)
class Wanted:
    """Of a pass; layer: what goes into it is what `hidden` is to be."""

    logits: bool = False
    last_only: bool = False
    hidden: bool = False
    layer: int | None = None


class ParallelDecoder(Decoder):
    """A decoder over the same weights, whose caches are sharded over the ranks of comm."""

    def __init__(self, decoder: Decoder, comm: Comm, layout: str) -> None:
        self._describe(decoder.spec, decoder.dtype)
        self._model, self.comm, self.layout, self._decoder = decoder._model, comm, layout, decoder
        self._of = decoder.kinds
        self.kinds = tuple(Shard(kind, comm.rank, comm.size) for kind in self._of)
        if any(isinstance(kind, _RECURRENT) for kind in self._of):
            self.layout = "contiguous"

    @property
    def pass_tokens(self) -> int:
        """As each rank has TOKENS_A_RANK of them."""
        return self.comm.size * TOKENS_A_RANK

    @property
    def result_tokens(self) -> int:
        return self.comm.size * KV_CHUNK

    def new_cache(self, batch: int = 1, max_seq_len: int | None = None, dtype: str = "float32") -> ModelCache:
        rows, room = checked_size("new_cache", "batch", batch), self._room(max_seq_len)
        owners = Owners(rows, self.comm.rank, self.comm.size, room_of(room, self.comm.size), TOKENS_A_RANK)
        layers = [ShardedKV.new(kind, rows, dtype, owners) if isinstance(kind, Attention)
                  else new_state(kind, rows, room, dtype) for kind in self._of]
        tables = [self._tables.of(getattr(kind, "rope", None)) for kind in self._of]
        cache = ShardedCache(self.kinds, layers, tables, np.zeros(rows, np.int64), room)
        cache.chosen = self.runs_together
        return cache

    def runs_together(self, tokens: int, held: int) -> bool:
        """Whether every rank runs all of a text's tokens after so many: their queries are less to send than the keys
        are, and they are few."""
        kind = next((kind for kind in self._mixers() if isinstance(kind, Attention)), None)
        if tokens <= 1 or kind is None:
            return tokens <= KV_CHUNK
        return tokens <= KV_CHUNK and tokens * kind.n_heads <= held * kind.n_kv_heads

    # ---- passes ----

    def forward(self, ids: Ids, cache: ModelCache, *, logits: bool = True, last_only: bool = False,
                hidden: bool = False, fresh: NDArray[np.bool_] | None = None) -> tuple[Any, Any]:
        """As Decoder.forward; every rank calls it with the same, and has the same result."""
        self._check_head(logits)
        with self._joined(ids, cache):
            found, normed = self._run(ids, cache, Wanted(logits, last_only, hidden))
        return None if found is None else self._finished(found), normed

    def hidden(self, ids: Ids, cache: ModelCache, layer: int) -> Floats:
        with self._joined(ids, cache):
            found: Floats = self._run(ids, cache, Wanted(hidden=True, layer=layer))[1]
            return found

    @contextmanager
    def _joined(self, ids: Ids, cache: ModelCache) -> Iterator[None]:
        """A pass of all ranks, which were given the same, and hear of each other's errors."""
        with cache.locked(), self.comm.guard():
            self.comm.agree("model: shape and checksum of ids, lengths of the cache",
                            (ids.shape, zlib.crc32(ids.tobytes()), cache.lengths.tolist()))
            self.read_outdated(cache, ids.shape[1])
            yield

    def _run(self, ids: Ids, cache: Any, wanted: Wanted) -> tuple[Any, Any]:
        together = cache.reads_together(ids.shape[1])
        if len(ids) > 1 and not (together and cache.agree(ids.shape[1])):
            return stacked([self._run(ids[i : i + 1], cache.row(i), wanted) for i in range(len(ids))])
        found = self._step(ids, cache, wanted) if together else self._prompt(ids, cache, wanted)
        for state in cache.layers:
            if isinstance(state, RecurrentState):
                state.history.whole[:] = ids.shape[1] == self.pass_tokens
        return found

    def _step(self, ids: Ids, cache: ShardedCache, wanted: Wanted) -> tuple[Any, Any]:
        """Every rank runs all tokens."""
        owners = cache.owners
        with cache.extending(ids) as start:
            if owners is not None:
                owners.coming = np.stack([appended(ids.shape[1], *each)
                                          for each in zip(owners.of, owners.counts, strict=True)])
                owners.at_work = Step(self.comm, owners, start, self.attention_precision)
            return self._called(ids, cache.states.held, start, wanted)

    def _prompt(self, ids: Ids, cache: ShardedCache, wanted: Wanted) -> tuple[Any, Any]:
        """Each rank runs some tokens of the only row."""
        owner = self._cut(ids.shape[1], cache)
        if np.bincount(owner).max() > TOKENS_A_RANK:
            half = ids.shape[1] // 2
            return joined([self._prompt(part, cache, wanted) for part in (ids[:, :half], ids[:, half:])], wanted)
        with cache.extending(ids) as begin:
            start = int(begin[0])
            tokens = [np.flatnonzero(owner == r) for r in range(self.comm.size)]
            at = Prompt(self.comm, cache.owners, start, [t + start for t in tokens], self.attention_precision)
            working = [r for r, t in enumerate(tokens) if len(t)]
            relay = Relay(self.comm, sorted(working, key=lambda r: int(tokens[r][0])))
            if cache.owners is not None:
                cache.owners.coming, cache.owners.at_work = owner[None], at
            mine, last = tokens[self.comm.rank], owner[-1] == self.comm.rank
            states = [relay.slots(layer) if isinstance(layer, RecurrentState) else state
                      for layer, state in zip(cache.layers, cache.states.held, strict=True)]
            if len(mine):
                some = replace(wanted, logits=wanted.logits and (last or not wanted.last_only))
                found = self._called(ids[:, mine], states, mine[:1] + start, some, mine[None] + start)
            else:
                found = None, None
                at.serve(cache.layers)
            relay.end()
            return self._whole(found, tokens, int(owner[-1]), wanted)

    def _cut(self, tokens: int, cache: ShardedCache) -> NDArray[np.int16]:
        """Which rank runs each of so many tokens."""
        lengths_after("ModelCache", cache.lengths, tokens, cache.max_seq_len)
        if cache.owners is None:
            return by_tokens(self.layout, tokens, self.comm.size)
        return cut(self.layout, tokens, cache.owners.of[0], cache.owners.counts[0], cache.owners.room)

    def _called(self, ids: Ids, states: list[Any], start: Ids, wanted: Wanted,
                positions: Ids | None = None) -> tuple[Any, Any]:
        """What this rank computes of tokens."""
        model = self._model
        seen: list[Floats] = []
        if looks := wanted.layer not in (None, self.spec.n_layers):
            model, before = self._looking(wanted.layer, seen)
            states = [*states[:before], None, *states[before:]]
        found, normed = model.forward(ids, StateTable(states), start, logits=wanted.logits, last_only=wanted.last_only,
                                      hidden=wanted.hidden and not looks, positions=positions)
        found = None if found is None else self._decoder.whole_logits(found)
        return found, seen[0] if looks else normed

    def _whole(self, found: tuple[Any, Any], tokens: list[Ids], last: int, wanted: Wanted) -> tuple[Any, Any]:
        """The results of all tokens, from those of each rank's."""
        logits, hidden = found
        if wanted.logits and wanted.last_only:
            logits = np.empty((1, 1, self.spec.vocab_size), np.float32) if logits is None else logits
            self.comm.broadcast(logits, last)
        elif wanted.logits:
            logits = self._gathered(logits, tokens, self.spec.vocab_size)
        return logits, self._gathered(hidden, tokens, self.spec.hidden_size) if wanted.hidden else None

    def _gathered(self, part: Floats | None, tokens: list[Ids], width: int) -> Floats:
        """(1, n, width), of which each rank has the rows of its tokens, (1, .., width)."""
        whole = np.empty((1, sum(map(len, tokens)), width), np.float32)
        parts = [np.empty((1, len(t), width), np.float32) for t in tokens]
        self.comm.all_gather_arrays(parts[self.comm.rank] if part is None else np.ascontiguousarray(part), parts)
        for t, one in zip(tokens, parts, strict=True):
            whole[:, t] = one
        return whole


def joined(found: list[tuple[Any, Any]], wanted: Wanted) -> tuple[Any, Any]:
    """The results of a row's passes as of one."""
    logits, hidden = zip(*found, strict=True)
    whole = logits[-1] if wanted.last_only or not wanted.logits else np.concatenate(logits, axis=1)
    return whole, np.concatenate(hidden, axis=1) if wanted.hidden else None
