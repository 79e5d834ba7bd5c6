"""A model's state: one state a mixer, and how many tokens each row holds, once for all of them."""
from __future__ import annotations

import json
import os
import sys
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c.checks import checked_size
from forge_c.files import new_folder, read_file, read_json
from forge_c.functional import KV_CHUNK, AttentionState, RoutedState, StateTable, WriterLock, Writing
from forge_c.state.angles import Angles, TableOf
from forge_c.state.file import open_pages
from forge_c.state.kv import KVCache
from forge_c.state.layer import Counts
from forge_c.state.lengths import checked_row, lengths_after, lengths_kept
from forge_c.state.recurrent import RecurrentState, saved_rows
from forge_c.state.routed import RoutedCache

if TYPE_CHECKING:
    from forge_c.models import Model

_FORMAT, _VERSION = "forge_c.ModelCache", 2
_MAX_HEADER = 1 << 26
_UNKNOWN = -1  # the id of a token that did not come through a model

Kinds = tuple[Any, ...]  # each mixer in a ModelSpec


class ModelCache:
    """Every layer's state, and the tokens that each row holds; from Model.new_cache.

    One thread may use it at a time: a second one gets a RuntimeError. copy.copy, copy.deepcopy and pickle make an
    independent cache; that of a pickle is in memory, whatever this one is in. Attributes:
        layers: the states, a KVCache for a layer of attention, a RoutedCache for one with a router, a RecurrentState
            for one whose memory does not grow, None for a layer that remembers nothing; two, one after the other, for
            a layer with two mixers.
        max_seq_len: the longest a row may become.
        kinds: the mixers whose states they are, by the model's spec.
    """

    def __init__(self, kinds: Kinds, layers: Sequence[Any], tables: Sequence[TableOf | None], lengths: Counts,
                 max_seq_len: int) -> None:
        self.kinds, self.layers, self.max_seq_len = kinds, tuple(layers), max_seq_len
        self._tables, self._lengths, self._lock = list(tables), lengths, WriterLock()
        self._reserved = np.zeros_like(lengths)  # tokens of a row that every layer has room for
        self._written = lengths.copy()  # the most that a row has ever held: in a ring older tokens are gone
        self._angles = Angles(tables, [array("q") for _ in lengths], np.zeros_like(lengths))
        self._ids = [array("i") for _ in lengths]  # of each row, as far as they came through a model
        self._bind()

    def _bind(self) -> None:
        """What the forward pass takes of each layer; the lengths and the lock are one for all, and so is what recurrent
        layers know of their slots."""
        recurrent = [s for s in self.layers if isinstance(s, RecurrentState)]
        for state in recurrent[1:]:
            state.join(recurrent[0].history)
        self._live = [s for s in self.layers if s is not None and not s.told_by_lengths and s not in recurrent[1:]]
        bound = [self._bound(s, t) for s, t in zip(self.layers, self._tables, strict=True)]
        rotating = [(s, t) for s, t in zip(bound, self._tables, strict=True) if t is not None]
        self._rotating = [(s, t) for s, t in rotating if not t.depends_on_length]
        self._by_length = [(s, t) for s, t in rotating if t.depends_on_length]
        self._rotated = min((s.positions for s, _ in self._rotating), default=sys.maxsize)
        self.states = StateTable(bound)
        for layer in self.layers:
            if isinstance(layer, KVCache):
                layer.join(self._lengths, self._written, self._reserved, self._lock)

    def _bound(self, state: Any, table_of: TableOf | None) -> Any:
        return _bound(state, table_of)

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
    def ids(self) -> list[NDArray[np.int64]]:
        """The tokens that each row holds, (length,) for each; copies. -1: one that came there by a layer's hand."""
        return [_padded(row, n) for row, n in zip(self._ids, self._lengths.tolist(), strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes that the layers' states have room for."""
        return sum(s.nbytes for s in self.layers if s is not None)

    def __repr__(self) -> str:
        return (f"ModelCache(layers={len(self.layers)}, batch={self.batch}, seq_len={self.seq_len}, "
                f"max_seq_len={self.max_seq_len})")

    # ---- a pass over new tokens ----

    @contextmanager
    def extending(self, ids: NDArray[np.int64], fresh: NDArray[np.bool_] | None = None) -> Iterator[Counts]:
        """Yield where ids (batch, n) begin in each row, and add them to the rows unless the block raises.

        fresh (batch,): rows to which they are new. The others hold them already, as their last ones; read again they
        leave the row as it is, to the bit. Only where `can_reread`.

        Raises:
            ValueError: no room for them.
        """
        start = self._lengths.copy()
        if fresh is not None:
            start[~fresh] -= ids.shape[1]
        stop = lengths_after("ModelCache", start, ids.shape[1], self.max_seq_len)
        self._reserve(start, stop)
        if self._by_length:
            length = self._angles.length_of_call(ids.shape[1], stop)
            tables = {table_of: table_of(int(stop.max()), length) for table_of in self._angles.tables}
            for state, table_of in self._by_length:
                state.rotate_by(tables[table_of])
        try:
            yield start
            for state in self._live:
                state.commit(stop)
            self._lengths[:] = stop
            self._record(ids, start)
            self._angles.record(start, stop)
        except BaseException:
            for state in self._live:
                state.rollback(start)
            self._lengths[:] = start if fresh is None else start + ids.shape[1] * ~fresh
            raise

    @contextmanager
    def expecting(self, tokens: int) -> Iterator[None]:
        """Within the block every row becomes so many tokens longer, in several calls.

        Models of rope types dynamic and longrope choose a token's angles by the length of its text: with this, those of
        a text that is read piece by piece are those of the whole. A model's call and generate see to it themselves.
        """
        with self._angles.expecting(self._lengths + checked_size("ModelCache.expecting", "tokens", tokens, least=0)):
            yield

    @contextmanager
    def rereading(self, i: int, length: int) -> Iterator[tuple[ModelCache, NDArray[np.int64]]]:
        """(row i, which has become empty, and the tokens (n,) that it held), to be read with the angles of a text of
        that length.

        Raises:
            ValueError: it holds tokens that did not come through a model.
        """
        row = self.row(i)
        ids = row.ids[0]
        if (ids == _UNKNOWN).any():
            raise ValueError(f"ModelCache: row {i} must be read again, as its angles follow from its length, and holds "
                             "tokens that did not come through a model")
        row.truncate(0)
        with row._angles.expecting(np.array([length]), exactly=True):
            yield row, ids

    def outdated(self, tokens: int, fresh: NDArray[np.bool_] | None = None) -> dict[int, int]:
        """Rows that must be read again before a call of so many tokens, `fresh` as in extending, and for which length
        their angles are to be chosen."""
        return self._angles.outdated(self._lengths, self._stop(tokens, fresh)) if self._by_length else {}

    def agree(self, tokens: int, fresh: NDArray[np.bool_] | None = None) -> bool:
        """Whether one call can read so many tokens of every row: their angles are those of one table."""
        return not self._by_length or self._angles.agree(tokens, self._stop(tokens, fresh))

    def _stop(self, tokens: int, fresh: NDArray[np.bool_] | None) -> Counts:
        return self._lengths + (tokens if fresh is None else tokens * fresh)

    @property
    def can_reread(self) -> bool:
        """Whether a row may read its last token again: what its layers hold follows from the tokens alone."""
        return not self._live

    def _record(self, ids: NDArray[np.int64], start: Counts) -> None:
        for row, new, before in zip(self._ids, ids.tolist(), start.tolist(), strict=True):
            if len(row) != before:
                del row[before:]
                row.extend([_UNKNOWN] * (before - len(row)))
            row.fromlist(new)

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
            keep = lengths_kept("ModelCache.truncate", self._lengths, n)
            for layer in self.layers:
                if layer is not None:
                    layer.check_truncate(keep)
            for state in self._live:
                state.truncate(keep)
            self._written[keep == 0] = 0
            self._reserved[:] = 0
            self._lengths[:] = keep
            self._angles.truncate(keep)
            for row, kept in zip(self._ids, keep.tolist(), strict=True):
                del row[kept:]

    def nearest(self, n: ArrayLike) -> Counts:
        """(batch,): how many tokens of each row `truncate` can keep, up to n; layers with a window or a recurrent state
        cannot go back to everywhere.

        Raises:
            TypeError, ValueError: n is not an integer, is negative or more than there are.
        """
        keep = lengths_kept("ModelCache.nearest", self._lengths, n)
        while True:
            before = keep
            for layer in self.layers:
                if layer is not None:
                    keep = _nearest(layer, keep)
            if (keep == before).all():
                return keep

    def row(self, i: int) -> ModelCache:
        """Row i alone, sharing memory and length with this cache.

        Raises:
            TypeError, IndexError: i is not an integer, or not 0 .. batch - 1.
        """
        i = checked_row("ModelCache.row", i, self._lengths)
        twin = object.__new__(type(self))
        twin.kinds, twin.layers = self.kinds, tuple(None if s is None else s.row(i) for s in self.layers)
        twin.max_seq_len, twin._tables, twin._lock = self.max_seq_len, self._tables, self._lock
        one = slice(i, i + 1)
        twin._lengths, twin._reserved, twin._written = self._lengths[one], self._reserved[one], self._written[one]
        twin._ids, twin._angles = self._ids[one], self._angles.row(i)
        twin._bind()
        return twin

    def fork(self, n: int) -> ModelCache:
        """n continuations of every row, sharing what is there; as KVCache.fork.

        Raises:
            TypeError, ValueError: n is not a positive integer.
            MemoryError: no room for the tokens to come.
            RuntimeError: another thread is using the cache.
        """
        n = checked_size("ModelCache.fork", "n", n)
        with self.locked():
            layers = [None if s is None else s.fork(n) for s in self.layers]
            self._reserved[:] = 0
            return self._twin(layers, np.repeat(np.arange(self.batch), n))

    def copy(self) -> ModelCache:
        """An independent cache that holds the same."""
        with self.locked():
            return self._twin([None if s is None else s.copy() for s in self.layers], np.arange(self.batch))

    def _twin(self, layers: list[Any], rows: NDArray[np.intp]) -> ModelCache:
        twin = type(self)(self.kinds, layers, self._tables, self._lengths[rows], self.max_seq_len)
        twin._written[:] = self._written[rows]
        twin._ids = [self._ids[b][:] for b in rows]
        twin._angles.of = [self._angles.of[b][:] for b in rows]
        return twin

    def __copy__(self) -> ModelCache:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelCache:
        return self.copy()

    def __reduce__(self) -> Any:
        twin = self.copy()  # nobody else's, so that the layers, pickled one after the other, are of one moment
        return _unpickled, (twin.kinds, twin.layers, twin._tables, twin._lengths, twin._written, twin._ids,
                            twin._angles.of, twin.max_seq_len)

    # ---- in files ----

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a new folder, one file a layer, for `load`. What does not come to its end leaves nothing.

        Raises:
            FileExistsError, OSError: path exists or cannot be written.
        """
        with new_folder("ModelCache.save", path) as half, self.locked():
            for i, layer in enumerate(self.layers):
                if layer is not None:
                    layer.save(_layer_file(half, i))
            header = {"format": _FORMAT, "version": _VERSION, "kinds": list(map(repr, self.kinds)),
                      "lengths": self._lengths.tolist(), "written": self._written.tolist(),
                      "max_seq_len": self.max_seq_len,
                      "dtype": next((s.dtype for s in self.layers if isinstance(s, KVCache | RoutedCache)), "float32")}
            if self._angles.tables:
                (half / "angles.i64").write_bytes(self._angles.tobytes(self._lengths))
            (half / "ids.i32").write_bytes(b"".join(ids.astype("<i4").tobytes() for ids in self.ids))
            (half / "cache.json").write_text(json.dumps(header))

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Model) -> ModelCache:
        """The cache in a folder that `save` wrote, for a model of the same layers.

        Raises:
            OSError: the folder cannot be read.
            ValueError: it is no such folder, damaged, made by another version or from another kind of model.
            MemoryError: this computer cannot hold it.
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
        _check_files(folder, model.new_cache(1, 1, dtype=dtype).layers, len(lengths), room)
        cache = model.new_cache(len(lengths), room, dtype=dtype)
        for i, layer in enumerate(cache.layers):
            if layer is not None:
                layer.restore(_layer_file(folder, i))
            if isinstance(layer, RoutedCache) and not layer.is_within(lengths):
                raise ValueError(f"ModelCache.load: {folder} is damaged: layer {i} holds tokens beyond the last of "
                                 f"{lengths.tolist()}")
            held, most = (layer.history.lengths, written) if isinstance(layer, RecurrentState) else (
                cache._lengths, cache._written)
            if isinstance(layer, KVCache | RecurrentState) and ((held != lengths) | (most != written)).any():
                raise ValueError(f"ModelCache.load: {folder} is damaged: layer {i} holds {held.tolist()} tokens, "
                                 f"expected {lengths.tolist()}")
        cache._lengths[:], cache._written[:] = lengths, written
        cache._ids = _read_ids(folder / "ids.i32", lengths, model.config.vocab_size)
        if cache._angles.tables:
            cache._angles.read(folder / "angles.i64", lengths)
        return cache

    # ---- one thread at a time ----

    def locked(self) -> Writing:
        """A context that keeps other threads out; RuntimeError if one is in."""
        return Writing((self._lock,))


@contextmanager
def all_or_nothing(cache: ModelCache, tokens: int) -> Iterator[None]:
    """Several passes over so many tokens as one: if the block raises, the cache forgets them. A ring may have
    overwritten what that needs, or a row have been read again in part."""
    with cache.locked(), cache.expecting(tokens):
        before = cache.lengths
        try:
            yield
        except BaseException as error:
            try:
                cache.truncate(before)
            except ValueError:
                ring = any(isinstance(s, KVCache) and (_nearest(s, before) != before).any() for s in cache.layers)
                kind = "a layer with a window" if ring or cache.can_reread else "a recurrent layer"
                why = ("a row was being read again" if (cache.lengths < before).any() else
                       f"{kind} could not go back to {before.tolist()}")
                error.add_note(f"model: the cache holds {cache.lengths.tolist()} tokens: {why}")
            raise


def _bound(state: Any, table_of: TableOf | None) -> Any:
    """What the forward pass is given of a layer's state: pages and rotation, or the state itself."""
    if isinstance(state, KVCache):
        return AttentionState(state._pages, None if table_of is None else table_of(1))
    if isinstance(state, RoutedCache):
        return RoutedState(_bound(state.kv, table_of), state._positions, state.kv._lengths, state._chosen)
    return state.bound() if isinstance(state, RecurrentState) else state


def _nearest(layer: Any, keep: Counts) -> Counts:
    """The most tokens of each row, up to `keep`, to which a layer can go back: there, or else to its beginning, unless
    it says."""
    if isinstance(layer, RecurrentState):
        return layer.nearest(keep)
    found = keep.copy()
    for i in range(len(keep)):
        try:
            layer.check_truncate(np.where(np.arange(len(keep)) == i, keep, 0))
        except ValueError:
            found[i] = 0
    return found


def _unpickled(kinds: Kinds, layers: Sequence[Any], tables: Sequence[TableOf | None], lengths: Counts, written: Counts,
               ids: list[array[int]], angles: list[array[int]], max_seq_len: int) -> ModelCache:
    cache = ModelCache(kinds, layers, tables, lengths, max_seq_len)
    cache._written[:], cache._ids, cache._angles.of = written, ids, angles
    return cache


def _padded(ids: array[int], n: int) -> NDArray[np.int64]:
    found = np.full(n, _UNKNOWN, np.int64)
    found[: len(ids)] = ids[:n]
    return found


def _read_ids(path: Path, lengths: Counts, vocab: int) -> list[array[int]]:
    """Each row's tokens. ValueError unless there are as many as lengths (batch,) say, all of the vocabulary."""
    count = sum(lengths.tolist())
    content = read_file(path, 4 * count)
    found = np.frombuffer(content[: len(content) // 4 * 4], "<i4")
    if len(content) != 4 * count or ((found < _UNKNOWN) | (found >= vocab)).any():
        raise ValueError(f"ModelCache.load: {path} is damaged: {len(content)} bytes, expected {count} ids from -1 to "
                         f"{vocab - 1}")
    rows = np.split(found, np.cumsum(lengths)[:-1])
    return [array("i", row.astype(np.int32).tobytes()) for row in rows]


def _layer_file(folder: Path, i: int) -> Path:
    return folder / f"layer-{i:04}.npy"


def _check_files(folder: Path, layers: Sequence[Any], rows: int, room: int) -> None:
    """ValueError unless the files of those layers that are KVCaches have as many rows and as much room, and those of
    recurrent ones as many rows: nothing is allocated for what the folder's header alone claims."""
    for i, layer in enumerate(layers):
        if isinstance(layer, RecurrentState) and (found := saved_rows(_layer_file(folder, i))) != rows:
            raise ValueError(f"ModelCache.load: {folder} is damaged: layer {i} has {found} rows, expected {rows}")
        if isinstance(layer, KVCache | RoutedCache):
            held, _ = open_pages(_layer_file(folder, i), None)
            if (len(held.lengths), held.max_seq_len) != (rows, room):
                raise ValueError(f"ModelCache.load: {folder} is damaged: layer {i} has {len(held.lengths)} rows of "
                                 f"{held.max_seq_len} tokens, expected {rows} of {room}")

