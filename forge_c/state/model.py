"""A model's state: one state a layer, and how many tokens each row holds, once for all of them."""
from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c.files import read_json
from forge_c.functional import KV_CHUNK, AttentionState, StateTable, WriterLock, Writing
from forge_c.rotary import RopeTable
from forge_c.state.kv import KVCache
from forge_c.state.layer import Counts

if TYPE_CHECKING:
    from forge_c.models import Model

_FORMAT, _VERSION = "forge_c.ModelCache", 1
_MAX_HEADER = 1 << 26

TableOf = Callable[[int], RopeTable]  # a table for at least so many positions
Kinds = tuple[Any, ...]  # each layer's mixer in a ModelSpec


class ModelCache:
    """Every layer's state and the rows' lengths; from Model.new_cache.

    One thread may use it at a time: a second one gets a RuntimeError. Attributes:
        layers: the states, a KVCache for a layer of attention, None for a layer that remembers nothing.
        max_seq_len: the longest a row may become.
        kinds: the mixers whose states they are, by the model's spec.
    """

    def __init__(self, kinds: Kinds, layers: Sequence[Any], tables: Sequence[TableOf | None], lengths: Counts,
                 max_seq_len: int) -> None:
        self.kinds, self.layers, self.max_seq_len = kinds, tuple(layers), max_seq_len
        self._tables, self._lengths, self._lock = list(tables), lengths, WriterLock()
        self._reserved = np.zeros_like(lengths)  # tokens of a row that every layer has room for
        self._written = lengths.copy()  # the most that a row has ever held: in a ring older tokens are gone
        self._live = [s for s in self.layers if s is not None and not s.told_by_lengths]
        self._bind()

    def _bind(self) -> None:
        """What the forward pass takes of each layer; the lengths and the lock are one for all."""
        bound = [_bound(s, t) for s, t in zip(self.layers, self._tables, strict=True)]
        self._rotating = [(s, t) for s, t in zip(bound, self._tables, strict=True) if t is not None]
        self._rotated = min((s.positions for s, _ in self._rotating), default=sys.maxsize)
        self.states = StateTable(bound)
        for layer in self.layers:
            if isinstance(layer, KVCache):
                layer.join(self._lengths, self._written, self._reserved, self._lock)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self._lengths)

    @property
    def lengths(self) -> Counts:
        """Tokens in each row, (batch,); a copy."""
        return self._lengths.copy()

    @property
    def seq_len(self) -> int:
        """Tokens in the longest row."""
        return int(self._lengths.max())

    @property
    def nbytes(self) -> int:
        """Bytes that the layers' states have room for."""
        return sum(s.nbytes for s in self.layers if s is not None)

    def __repr__(self) -> str:
        return (f"ModelCache(layers={len(self.layers)}, batch={self.batch}, seq_len={self.seq_len}, "
                f"max_seq_len={self.max_seq_len})")

    # ---- a pass over new tokens ----

    @contextmanager
    def extending(self, tokens: int) -> Iterator[Counts]:
        """Yield the lengths, and make every row `tokens` longer unless the block raises. ValueError without room."""
        start = self._lengths.copy()
        stop = self._lengths_after(start, tokens)
        self._reserve(start, stop)
        try:
            yield start
            for state in self._live:
                state.commit(stop)
            self._lengths[:] = stop
        except BaseException:
            for state in self._live:
                state.rollback(start)
            self._lengths[:] = start
            raise

    def _lengths_after(self, start: Counts, tokens: int) -> Counts:
        stop = start + tokens
        if stop.max() > self.max_seq_len:
            row = int(stop.argmax())
            raise ValueError(f"ModelCache: row {row} has {start[row]} tokens and {tokens} more do not fit, max_seq_len "
                             f"is {self.max_seq_len}")
        return stop

    def _reserve(self, start: Counts, stop: Counts) -> None:
        if stop.max() > self._rotated:
            for state, table_of in self._rotating:
                state.rotate_by(table_of(int(stop.max())))
            self._rotated = min(s.positions for s, _ in self._rotating)
        if (stop > self._reserved).any():
            upto = np.minimum(-(-stop // KV_CHUNK) * KV_CHUNK, self.max_seq_len)
            for layer in self.layers:
                if layer is not None and layer.told_by_lengths:
                    layer.reserve(start, upto)
            self._reserved[:] = upto
        self._reserve_live(start, stop)
        np.maximum(self._written, stop, out=self._written)

    def _reserve_live(self, start: Counts, stop: Counts) -> None:
        """All of them, or none: those before the one that raises go back."""
        reserved: list[Any] = []
        try:
            for state in self._live:
                state.reserve(start, stop)
                reserved.append(state)
        except BaseException:
            for state in reserved:
                state.rollback(start)
            raise

    # ---- back, and apart ----

    def truncate(self, n: ArrayLike) -> None:
        """Forget every token from position n on, in every layer; as KVCache.truncate.

        Raises:
            TypeError, ValueError: n is not an integer, is negative or more than there are, or a layer cannot go back
                so far. Then nothing changes.
            RuntimeError: another thread is using the cache.
        """
        with self.locked():
            keep = _kept(n, self._lengths)
            for layer in self.layers:
                if layer is not None:
                    layer.check_truncate(keep)
            for state in self._live:
                state.truncate(keep)
            self._written[keep == 0] = 0
            self._reserved[:] = 0
            self._lengths[:] = keep

    def row(self, i: int) -> ModelCache:
        """Row i alone, sharing memory and length with this cache."""
        twin = object.__new__(ModelCache)
        twin.kinds, twin.layers = self.kinds, tuple(None if s is None else s.row(i) for s in self.layers)
        twin.max_seq_len, twin._tables, twin._lock = self.max_seq_len, self._tables, self._lock
        one = slice(i, i + 1)
        twin._lengths, twin._reserved, twin._written = self._lengths[one], self._reserved[one], self._written[one]
        twin._live = [s for s in twin.layers if s is not None and not s.told_by_lengths]
        twin._bind()
        return twin

    def fork(self, n: int) -> ModelCache:
        """n continuations of every row, sharing what is there; as KVCache.fork."""
        with self.locked():
            layers = [None if s is None else s.fork(n) for s in self.layers]
            self._reserved[:] = 0
            return self._twin(layers, np.repeat(np.arange(self.batch), n))

    def copy(self) -> ModelCache:
        """An independent cache that holds the same."""
        with self.locked():
            return self._twin([None if s is None else s.copy() for s in self.layers], np.arange(self.batch))

    def _twin(self, layers: list[Any], rows: NDArray[np.intp]) -> ModelCache:
        twin = ModelCache(self.kinds, layers, self._tables, self._lengths[rows], self.max_seq_len)
        twin._written[:] = self._written[rows]
        return twin

    def __copy__(self) -> ModelCache:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelCache:
        return self.copy()

    def __reduce__(self) -> NoReturn:
        raise TypeError("ModelCache: a cache is not pickled; save() it and ModelCache.load() it in the other process; "
                        "copy() and fork() stay in this process")

    # ---- in files ----

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a new folder, one file a layer, for `load`. What does not come to its end leaves nothing.

        Raises:
            FileExistsError, OSError: path exists or cannot be written.
        """
        to = Path(path)
        if to.exists():
            raise FileExistsError(f"ModelCache.save: {to} exists")
        half = Path(mkdtemp(prefix=".forge_c-", dir=to.parent))
        try:
            with self.locked():
                for i, layer in enumerate(self.layers):
                    if layer is not None:
                        layer.save(half / f"layer-{i:04}.npy")
                header = {"format": _FORMAT, "version": _VERSION, "kinds": list(map(repr, self.kinds)),
                          "lengths": self._lengths.tolist(), "written": self._written.tolist(),
                          "max_seq_len": self.max_seq_len,
                          "dtype": next((s.dtype for s in self.layers if isinstance(s, KVCache)), "float32")}
                (half / "cache.json").write_text(json.dumps(header))
            half.chmod(0o777 & ~_umask())
            half.rename(to)
        except BaseException:
            shutil.rmtree(half, ignore_errors=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Model) -> ModelCache:
        """The cache in a folder that `save` wrote, for a model of the same layers.

        Raises:
            OSError: the folder cannot be read.
            ValueError: it is no such folder, damaged, made by another version or from another kind of model.
        """
        folder = Path(path)
        header = read_json(folder / "cache.json", _MAX_HEADER)
        if not isinstance(header, dict) or (header.get("format"), header.get("version")) != (_FORMAT, _VERSION):
            raise ValueError(f"ModelCache.load: {folder} is no ModelCache of version {_VERSION}")
        if header.get("kinds") != list(map(repr, model._decoder.kinds)):
            raise ValueError(f"ModelCache.load: {folder} is of a model whose layers differ, in sizes, windows or RoPE")
        try:
            lengths, written = (np.array(header[key], np.int64) for key in ("lengths", "written"))
            room, dtype = header["max_seq_len"], str(header["dtype"])
            if not all(type(n) is int for n in (room, *header["lengths"], *header["written"])):
                raise TypeError("its numbers are not all integers")
            sound = lengths.ndim == 1 and lengths.shape == written.shape and bool(len(lengths)) and bool(
                ((lengths >= 0) & (lengths <= written) & (written <= room)).all())
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"ModelCache.load: {folder} is damaged: {error}") from None
        if not sound:
            raise ValueError(f"ModelCache.load: {folder} is damaged: lengths {lengths.tolist()} of {room}")
        cache = model.new_cache(len(lengths), room, dtype=dtype)
        for i, layer in enumerate(cache.layers):
            if layer is not None:
                layer.restore(folder / f"layer-{i:04}.npy")
            if isinstance(layer, KVCache) and ((cache._lengths != lengths) | (cache._written != written)).any():
                raise ValueError(f"ModelCache.load: {folder} is damaged: layer {i} holds {cache._lengths.tolist()} "
                                 f"tokens, expected {lengths.tolist()}")
        cache._lengths[:], cache._written[:] = lengths, written
        return cache

    # ---- one thread at a time ----

    def locked(self) -> Writing:
        """A context that keeps other threads out; RuntimeError if one is in."""
        return Writing((self._lock,))


def _bound(state: Any, table_of: TableOf | None) -> Any:
    """What the forward pass is given of a layer's state: pages and rotation, or the state itself."""
    if isinstance(state, KVCache):
        return AttentionState(state._pages, None if table_of is None else table_of(1))
    return state


def _kept(n: ArrayLike, lengths: Counts) -> Counts:
    """n tokens for all rows (a shorter row keeps what it has) or for each, checked."""
    keep = np.asarray(n)
    if keep.dtype.kind not in "iu" or keep.shape not in ((), lengths.shape):
        raise TypeError(f"ModelCache.truncate: n is {n!r}, expected an integer or {len(lengths)} of them")
    most = lengths if keep.ndim else lengths.max()
    if (keep < 0).any() or (keep > most).any():
        raise ValueError(f"ModelCache.truncate: n is {keep.tolist()}, expected 0 to {most.tolist()}")
    return np.minimum(keep, lengths).astype(np.int64)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
