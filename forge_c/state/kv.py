"""The key/value cache: what attention reads about the tokens before the new ones.

Tokens lie in pages of KV_CHUNK slots, all heads of a row's 256 tokens to a page, in the panels that attention
multiplies (src_c/forge.h has the picture). Each row has a list of pages: the token at position p lies in page
p // KV_CHUNK, with a window in page p // KV_CHUNK % pages. Rows may hold different numbers of tokens. Everything is
allocated at the start; appending never moves what is there. Pages that a fork shares are not written any more: who
needs to, takes a copy of its own first.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from forge_c.checks import checked_size, dtype_name, unmasked
from forge_c.functional import KV_CHUNK, KVPages, WriterLock, Writing
from forge_c.functional import rope as rotate
from forge_c.rotary import RopeTable
from forge_c.state import file as cache_file
from forge_c.state.lengths import checked_row, lengths_after, lengths_kept
from forge_c.state.pages import CACHE_LINE, Table, check_addressable, new_pages, page_at, pages_of

__all__ = ["KVCache", "kv_cache_nbytes"]

_DECODED = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "int8": np.dtype(np.float32)}
_ACCEPTED = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
_ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_SCALE = 4  # bytes, one for each token and head of an int8 cache


def kv_cache_nbytes(
    batch: int, seq_len: int, n_kv_heads: int, head_dim: int, dtype: DTypeLike = "float32"
) -> int:
    """Bytes of one layer's keys and values: 2 * batch * seq_len * n_kv_heads * head_dim * itemsize.

    Args:
        dtype: "float64", "float32", "float16", "bfloat16" or "int8", which adds a float32 scale a token and head.

    Raises:
        TypeError, ValueError: a size that is not an integer or is negative, or another dtype.

    >>> kv_cache_nbytes(batch=1, seq_len=4096, n_kv_heads=8, head_dim=128, dtype="bfloat16")
    16777216
    """
    name = _dtype_name("kv_cache_nbytes", dtype)
    if name not in _ITEMSIZE:
        raise ValueError(f"kv_cache_nbytes: dtype is {name!r}, expected one of {', '.join(_ITEMSIZE)}")
    sizes = {"batch": batch, "seq_len": seq_len, "n_kv_heads": n_kv_heads, "head_dim": head_dim}
    rows, tokens, heads, dim = (
        checked_size("kv_cache_nbytes", size, value, least=0, most=math.inf) for size, value in sizes.items()
    )
    return _nbytes(name, rows, tokens, heads, 2 * dim)


def _nbytes(dtype: str, batch: int, seq_len: int, heads: int, channels: int) -> int:
    """channels: of a key and a value together."""
    return batch * seq_len * heads * (channels * _ITEMSIZE[dtype] + (2 * _SCALE if dtype == "int8" else 0))


class KVCache:
    """Keys and values of the tokens so far, for one attention layer.

    Args:
        batch: rows; each has its own length.
        max_seq_len: the longest a row may become.
        n_kv_heads, head_dim: of the keys.
        v_dim: head_dim of the values, if it differs.
        dtype: "float32", "bfloat16" or "int8"; what is appended is rounded to it. int8 has one scale a token and head.
        window: keep only what a sliding window of that many keys needs: a ring, whatever max_seq_len is.
        path: a new file to hold the pages, memory-mapped: the cache may be larger than the RAM. `flush` makes the file
            complete, `KVCache.load` opens it again.

    One thread may write at a time: while one does, append, truncate, fork, copy, save and flush raise RuntimeError in
    any other. Attention may read meanwhile: it sees the tokens that were complete when its call began.

    copy.copy and copy.deepcopy make a `copy`, and pickle makes one where it is unpickled. Processes that are to share
    one cache load its file with mmap_mode="r".

    Raises:
        TypeError, ValueError: a size that is not a positive integer, an unknown dtype, or sizes whose product
            no computer can address.
        MemoryError: sizes that this computer cannot hold.
        FileExistsError, OSError: path exists or cannot be written.

    >>> cache = KVCache(batch=1, max_seq_len=8, n_kv_heads=2, head_dim=4)
    >>> cache.append(np.ones((1, 3, 2, 4), np.float32), np.zeros((1, 3, 2, 4), np.float32))
    >>> cache.seq_len, cache.nbytes
    (3, 512)
    >>> k, v = cache
    >>> k.shape
    (1, 3, 2, 4)
    """

    __slots__ = ("_capacity", "_file", "_lengths", "_max_seq_len", "_memory", "_pages", "_reserved", "_shared",
                 "_window", "_writer", "_written")

    told_by_lengths: ClassVar[bool] = True  # see forge_c.state.LayerState

    _pages: KVPages
    _capacity: int  # slots of a row: max_seq_len, or the size of the ring
    _memory: list[Any]  # what the pages lie in
    _file: cache_file.PagesFile | None
    _lengths: NDArray[np.int64]
    # Highest position ever written, plus 1: in a ring, positions from _written - capacity on survive.
    _written: NDArray[np.int64]
    _shared: NDArray[np.int64]  # leading pages of a row that a fork shares
    _reserved: NDArray[np.int64]  # tokens of a row that a model's state has reserved in all its layers
    _writer: WriterLock

    def __init__(
        self,
        batch: int,
        max_seq_len: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        v_dim: int | None = None,
        dtype: DTypeLike = "float32",
        window: int | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        v_dim = head_dim if v_dim is None else v_dim
        sizes = {"batch": batch, "n_kv_heads": n_kv_heads, "head_dim": head_dim, "v_dim": v_dim}
        rows, heads, k_dim, v_dim = (checked_size("KVCache", size, value) for size, value in sizes.items())
        name = _dtype_name("KVCache", dtype)
        if name not in _DECODED:
            raise ValueError(f"KVCache: dtype is {name!r}, expected one of {', '.join(_DECODED)}")
        room = checked_size("KVCache", "max_seq_len", max_seq_len)
        ring = None if window is None else checked_size("KVCache", "window", window)
        self._describe(name, heads, k_dim, v_dim, room, ring)
        check_addressable(rows * self._pages_a_row, self._pages.page_nbytes)
        self._lengths, self._written, self._shared, self._reserved = (np.zeros(rows, np.int64) for _ in range(4))
        self._writer = WriterLock()
        self._file = None
        if path is None:
            self._memory, table = new_pages(rows, self._pages_a_row, self._pages.page_nbytes)
        else:
            self._file = cache_file.create(path, self._header(), rows * self._pages_a_row, self._pages.page_nbytes)
            self._memory, table = pages_of(self._file.pages, rows)
        self._pages = self._pages.with_table(table)

    def _describe(self, dtype: str, heads: int, k_dim: int, v_dim: int, room: int, window: int | None) -> None:
        """Everything but the pages and what is in them."""
        self._max_seq_len = self._capacity = room
        self._window = window
        if window is not None:
            # A whole append of KV_CHUNK tokens and the window before its first one fit, in whole chunks.
            self._capacity = _round_up(min(room, window + KV_CHUNK), KV_CHUNK)
        _check_page(dtype, heads, k_dim, v_dim)
        self._pages = KVPages(dtype, heads, k_dim, v_dim, window is not None)

    @property
    def _pages_a_row(self) -> int:
        return -(-self._capacity // KV_CHUNK)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return int(self._lengths.shape[0])

    @property
    def max_seq_len(self) -> int:
        """The longest a row may become."""
        return self._max_seq_len

    @property
    def n_kv_heads(self) -> int:
        """Number of key/value heads."""
        return self._pages.kv_heads

    @property
    def head_dim(self) -> int:
        """Channels of a key."""
        return self._pages.head_dim

    @property
    def v_dim(self) -> int:
        """Channels of a value."""
        return self._pages.v_dim

    @property
    def dtype(self) -> str:
        """Name of the dtype that keys and values are kept in."""
        return self._pages.dtype

    @property
    def window(self) -> int | None:
        """How many keys a token attends to, itself included; None for all."""
        return self._window

    @property
    def capacity(self) -> int:
        """Slots a row has: max_seq_len, or the size of the ring."""
        return self._capacity

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that it has room for (pages are whole, of 256 tokens)."""
        return _nbytes(self.dtype, self.batch, self.capacity, self.n_kv_heads, self.head_dim + self.v_dim)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each row, (batch,); a copy."""
        return self._lengths.copy()

    @property
    def seq_len(self) -> int:
        """Tokens in the longest row."""
        return int(self._lengths.max())

    def __iter__(self) -> Iterator[NDArray[Any]]:
        """`k, v = cache`: two read-only copies (batch, seq, n_kv_heads, dim) in the cache's dtype, of int8 in float32.

        Without a window all seq_len positions, with one the last min(window, seq_len). In a row shorter than seq_len,
        what follows its last token is unspecified.
        """
        stop = self.seq_len
        start = 0 if self._window is None else max(0, stop - self._window)
        rows = [self._pages.read(b, start, stop - start) for b in range(self.batch)]
        for part in zip(*rows, strict=True):
            held = np.stack(part).astype(_DECODED[self.dtype], copy=False)
            held.flags.writeable = False
            yield held

    def __repr__(self) -> str:
        window = "" if self._window is None else f", window={self._window}"
        return (
            f"KVCache(batch={self.batch}, seq_len={self.seq_len}, max_seq_len={self.max_seq_len}, "
            f"n_kv_heads={self.n_kv_heads}, head_dim={self.head_dim}, dtype={self.dtype!r}{window})"
        )

    def append(self, k: ArrayLike, v: ArrayLike, *, lens: ArrayLike | None = None, rope: RopeTable | None = None,
               interleaved: bool = False) -> None:
        """Add tokens at the end of every row, all of them or, when an error is raised, none.

        Args:
            k: (batch, tokens, n_kv_heads, head_dim), float32, float16 or bfloat16.
            v: (batch, tokens, n_kv_heads, v_dim), likewise.
            lens: (batch,) how many of the tokens each row takes, from the first on; all of them if None.
            rope: a table by which keys are turned on their way, at the positions that they get, and rounded to k's
                dtype, all as forge_c.rope does; `interleaved` as there.

        Raises:
            TypeError: another dtype.
            ValueError: wrong shapes, a row that would become longer than max_seq_len, a file opened for reading, or,
                with a window, more than forge_c.functional.KV_CHUNK tokens at once.
            IndexError: a position outside the RoPE table.
            RuntimeError: another thread is writing.
        """
        k, v = self._checked("k", k, self.head_dim), self._checked("v", v, self.v_dim)
        tokens = k.shape[1]
        if v.shape[1] != tokens:
            raise ValueError(f"KVCache.append: v has {v.shape[1]} tokens, expected {tokens} as k")
        if self._window is not None and tokens > KV_CHUNK:
            raise ValueError(
                f"KVCache.append: {tokens} tokens at once, expected at most {KV_CHUNK} in a ring"
            )
        added = np.full(self.batch, tokens) if lens is None else self._checked_lens(lens, tokens)
        with self.writing():
            stop = lengths_after("KVCache.append", self._lengths, added, self._max_seq_len)
            if rope is not None:
                self._check_table(rope, int(stop.max()))
            if k.dtype != v.dtype:
                if rope is not None:  # turned here, so that keys are rounded to their own dtype
                    positions = np.minimum(self._lengths[:, None] + np.arange(tokens), len(rope.cos) - 1)
                    k = rotate(np.ascontiguousarray(k), rope, positions=positions, interleaved=interleaved)
                    rope = None
                k, v = k.astype(np.float32), v.astype(np.float32)
            self.reserve(self._lengths, stop)
            np.maximum(self._written, stop, out=self._written)
            self._pages.append(k, v, self._lengths, added, rope, interleaved)
            self._lengths[:] = stop

    def _check_table(self, rope: RopeTable, stop: int) -> None:
        if not isinstance(rope, RopeTable):
            raise TypeError(f"KVCache.append: rope is a {type(rope).__name__}, expected a RopeTable")
        positions, half = rope.cos.shape
        if 2 * half > self.head_dim:
            raise ValueError(f"KVCache.append: rope turns {2 * half} channels, expected at most {self.head_dim}")
        if stop > positions:
            raise IndexError(f"KVCache.append: position {stop - 1} is outside the table of {positions}")

    def reserve(self, start: NDArray[np.int64], stop: NDArray[np.int64]) -> None:
        """Make the slots of each row's positions [start, stop) writable: as forge_c.state.LayerState."""
        if self._file is not None:
            if not self._file.writable:
                raise ValueError(f"KVCache.append: {self._file.path} is open for reading only")
            for b in np.flatnonzero(stop > start):
                chunks = np.arange(start[b] // KV_CHUNK, -(-stop[b] // KV_CHUNK))
                self._file.reserve(self._pages.table[b, chunks % self._pages_a_row])
        if self._shared.any():
            for b in np.flatnonzero((stop > start) & (start // KV_CHUNK < self._shared)):
                self._unshare(int(b), int(start[b]))

    def _unshare(self, b: int, position: int) -> None:
        """Replace row b's shared pages from `position` on by its own, with what is before `position` in them."""
        first, last = position // KV_CHUNK, int(self._shared[b])
        memory, fresh = new_pages(1, last - first, self._pages.page_nbytes)
        if position % KV_CHUNK:
            memory[0][0] = page_at(int(self._pages.table[b, first]), self._pages.page_nbytes)
        self._memory.extend(memory)
        self._pages.table[b, first:last] = fresh[0]
        self._shared[b] = first

    def truncate(self, n: ArrayLike) -> None:
        """Forget every token from position n on; what comes next is as if they had never been there.

        Args:
            n: tokens to keep, for all rows (a shorter row stays as it is) or (batch,) for each.

        Raises:
            TypeError, ValueError: n is not an integer, is negative or is more than there are; or, with a
                window, the last `window` tokens before n are no longer all there. Then nothing changes.
            RuntimeError: another thread is writing.
        """
        with self.writing():
            kept = lengths_kept("KVCache.truncate", self._lengths, n)
            self.check_truncate(kept)
            self._written[kept == 0] = self._reserved[:] = 0
            self._lengths[:] = kept

    def check_truncate(self, keep: NDArray[np.int64]) -> None:
        """ValueError if a row cannot go back to keep[b] of its tokens: as forge_c.state.LayerState."""
        if self._window is None:
            return
        lost = self._written - self.capacity
        gone = (keep > 0) & (np.maximum(keep - self._window, 0) < lost)
        if gone.any():
            row = int(gone.argmax())
            raise ValueError(f"KVCache.truncate: row {row} cannot go back to {keep[row]} tokens, the ring holds "
                             f"only those from {lost[row]} on and a window of {self._window} needs more")

    def join(self, lengths: NDArray[np.int64], written: NDArray[np.int64], reserved: NDArray[np.int64],
             writer: WriterLock) -> None:
        """Be a layer of a model's state, which owns how many tokens each row holds, has held and has reserved, and who
        may write."""
        self._lengths, self._written, self._reserved, self._writer = lengths, written, reserved, writer

    def row(self, i: int) -> KVCache:
        """A cache of row i alone that shares its memory and its length with this one.

        Raises:
            TypeError, IndexError: i is not an integer, or not 0 .. batch - 1.
        """
        i = checked_row("KVCache.row", i, self._lengths)
        return self._like(self._pages.table[i : i + 1], self._memory, slice(i, i + 1))

    def _like(self, table: Table, memory: list[Any], rows: slice | NDArray[np.int64]) -> KVCache:
        """A cache of the same kind over other pages; a slice of rows shares lengths and lock with this one."""
        twin = object.__new__(KVCache)
        twin._window, twin._max_seq_len, twin._capacity = self._window, self._max_seq_len, self._capacity
        twin._pages, twin._memory, twin._file = self._pages.with_table(table), memory, None
        twin._lengths, twin._written = self._lengths[rows], self._written[rows]
        twin._shared, twin._reserved = self._shared[rows], self._reserved[rows]
        twin._writer = WriterLock()
        if isinstance(rows, slice):
            twin._writer, twin._file = self._writer, self._file
        return twin

    def fork(self, n: int) -> KVCache:
        """n continuations of every row: a cache of batch * n rows, n for each of this one's, with its tokens.

        Full pages of KV_CHUNK tokens are shared, not copied; what is appended to either side afterwards is its own.
        The few of a ring are copied, and so are those of a file that is open for writing: it must keep its own.

        Raises:
            TypeError, ValueError: n is not a positive integer.
            MemoryError: no room for the tokens to come.

        >>> cache = KVCache(1, 1024, 2, 4)
        >>> cache.append(np.ones((1, 300, 2, 4), np.float32), np.ones((1, 300, 2, 4), np.float32))
        >>> cache.fork(3).lengths
        array([300, 300, 300])
        """
        n = checked_size("KVCache.fork", "n", n)
        if self.batch * n * self._pages_a_row > sys.maxsize // 8:
            raise ValueError(f"KVCache.fork: n is {n}, {n} times the pages of this cache cannot be addressed")
        rows = np.repeat(np.arange(self.batch), n)
        with self.writing():
            keeps_its_own = self._window is not None or (self._file is not None and self._file.writable)
            full = np.zeros_like(self._lengths) if keeps_its_own else self._lengths // KV_CHUNK
            # Rows of one shape: what the row with the fewest full pages must own, all do.
            common = int(full.min())
            memory, own = new_pages(len(rows), self._pages_a_row - common, self._pages.page_nbytes)
            table = np.concatenate([self._pages.table[rows, :common], own], axis=1)
            twin = self._like(table, [*self._memory, *memory], rows)
            twin._shared[:] = common
            for i, b in enumerate(rows):
                twin._copy_pages(i, self, int(b), common)
            np.maximum(self._shared, common, out=self._shared)
            self._reserved[:] = 0
        return twin

    def _copy_pages(self, i: int, source: KVCache, b: int, first: int) -> None:
        """Row i's pages from `first` on, those in use, from row b of a cache with pages of the same bytes."""
        nbytes = self._pages.page_nbytes
        for p in range(first, source._used_pages(b)):
            page_at(int(self._pages.table[i, p]), nbytes)[:] = page_at(int(source._pages.table[b, p]), nbytes)

    def _used_pages(self, b: int) -> int:
        """How many of row b's pages have ever held a token."""
        return min(-(-int(self._written[b]) // KV_CHUNK), self._pages_a_row)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a new file, for `load`. Pages that hold no token take no room on disk.

        The file has its name when all of it is on the disk; whatever ends `save` before leaves no file.

        Raises:
            FileExistsError, OSError: path exists or cannot be written, as on a full disk (ENOSPC).
            ValueError: a size beyond what files hold: 2**16 heads, 2**20 channels or rows, max_seq_len 2**40.
        """
        a_row, nbytes = self._pages_a_row, self._pages.page_nbytes
        with self.writing():
            used = ((b * a_row + p, page_at(int(self._pages.table[b, p]), nbytes))
                    for b in range(self.batch) for p in range(self._used_pages(b)))
            cache_file.save(path, self._header(), self.batch * a_row, nbytes, used)

    def flush(self) -> None:
        """Write the lengths, and what is still on its way, to the file of a cache that has one.

        Raises:
            ValueError: the cache has no file, or one opened for reading only, or is a row of one that has.
            OSError: the file cannot be written.
        """
        if self._file is None or not self._file.writable:
            raise ValueError("KVCache.flush: the cache has no file that is open for writing")
        if self._pages.table.size != len(self._file.pages):
            raise ValueError("KVCache.flush: this is a row, expected the cache that has the file")
        with self.writing():
            self._file.flush(self._header())

    @classmethod
    def load(cls, path: str | os.PathLike[str], mmap_mode: Literal["r", "r+"] | None = None) -> KVCache:
        """The cache in a file that `save` or `flush` wrote.

        mmap_mode: None reads it into memory. "r" and "r+" map the file, as numpy.load does: attention reads from the
        disk what it needs, chunk by chunk, in any amount of memory. "r" refuses to append; with "r+" what is appended
        goes to the file, and `flush` completes it.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no such file, damaged, or made by another version; or mmap_mode is something else.
        """
        h, file = cache_file.open_pages(path, mmap_mode)
        cache = object.__new__(cls)
        cache._describe(h.dtype, h.n_kv_heads, h.head_dim, h.v_dim, h.max_seq_len, h.window)
        batch, a_row, nbytes = len(h.lengths), cache._pages_a_row, cache._pages.page_nbytes
        file.check(h, batch * a_row, nbytes)
        cache._lengths, cache._written = np.array(h.lengths, np.int64), np.array(h.written, np.int64)
        cache._shared, cache._reserved = np.zeros(batch, np.int64), np.zeros(batch, np.int64)
        cache._writer, cache._file = WriterLock(), None
        if mmap_mode is None:
            cache._memory, table = new_pages(batch, a_row, nbytes)
            for b in range(batch):
                file.read(b * a_row, cache._memory[0][b * a_row : b * a_row + cache._used_pages(b)])
        else:
            file.map("KVCache.load")
            cache._memory, table = pages_of(file.pages, batch)
            cache._file = file
        cache._pages = cache._pages.with_table(table)
        return cache

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Hold what `save` wrote of a cache of the same kind: as forge_c.state.LayerState."""
        held = KVCache.load(path)
        for name in ("batch", "dtype", "n_kv_heads", "head_dim", "v_dim", "window", "max_seq_len"):
            found, expected = getattr(held, name), getattr(self, name)
            if found != expected:
                raise ValueError(f"KVCache.restore: {path} has {name} {found}, expected {expected}")
        with self.writing():
            # In its own pages: a model's forward pass and the cache's rows have their addresses.
            self.reserve(np.zeros_like(held._written), np.minimum(held._written, self.capacity))
            for b in range(self.batch):
                self._copy_pages(b, held, b, 0)
            self._reserved[:] = 0
            self._lengths[:], self._written[:] = held._lengths, held._written

    def _header(self) -> cache_file.Header:
        return cache_file.Header(
            self.dtype, self.n_kv_heads, self.head_dim, self.v_dim, self._max_seq_len, self._window,
            tuple(self._lengths.tolist()), tuple(self._written.tolist()))

    def copy(self, max_seq_len: int | None = None) -> KVCache:
        """An independent cache with the same contents and room for at least as many tokens.

        Raises:
            ValueError: max_seq_len is less than this cache's.
        """
        room = self._max_seq_len
        if max_seq_len is not None:
            room = checked_size("KVCache.copy", "max_seq_len", max_seq_len)
        if room < self._max_seq_len:
            raise ValueError(f"KVCache.copy: max_seq_len is {room}, expected at least {self._max_seq_len}")
        sizes = (self.batch, room, self.n_kv_heads, self.head_dim)
        twin = KVCache(*sizes, v_dim=self.v_dim, dtype=self.dtype, window=self._window)
        with self.writing():
            # A ring grows only while it is as long as max_seq_len, and such a ring has never wrapped.
            for b in range(self.batch):
                twin._copy_pages(b, self, b, 0)
            twin._lengths[:], twin._written[:] = self._lengths, self._written
        return twin

    def __copy__(self) -> KVCache:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        return self.copy()

    def __reduce__(self) -> Any:
        with self.writing():
            header, nbytes = self._header(), self._pages.page_nbytes
            pages = [page_at(int(self._pages.table[b, p]), nbytes)
                     for b in range(self.batch) for p in range(self._used_pages(b))]
            return _unpickled, (header, np.stack(pages) if pages else np.empty((0, nbytes), np.uint8))

    def writing(self) -> Writing:
        """Keep other threads from writing for as long as the block lasts.

        append and truncate do so by themselves; a layer does so from its append to the end of its attention.

        Raises:
            RuntimeError: another thread holds it.
        """
        return Writing((self._writer,))

    def _checked(self, name: str, new: ArrayLike, dim: int) -> NDArray[Any]:
        array = np.asarray(unmasked("KVCache.append", name, new))
        if array.dtype not in _ACCEPTED:
            hint = f": pass {name}.astype(np.float32)" if array.dtype == np.float64 else ""
            raise TypeError(
                f"KVCache.append: {name} has dtype {array.dtype}, expected float32, float16 or bfloat16{hint}"
            )
        rows, heads = self.batch, self.n_kv_heads
        if array.ndim != 4 or (array.shape[0], *array.shape[2:]) != (rows, heads, dim):
            raise ValueError(
                f"KVCache.append: {name} has shape {array.shape}, expected ({rows}, tokens, {heads}, {dim})"
            )
        return array

    def _checked_lens(self, lens: ArrayLike, tokens: int) -> NDArray[np.int64]:
        counts = np.asarray(unmasked("KVCache.append", "lens", lens))
        if counts.dtype.kind not in "iu" or counts.shape != (self.batch,):
            raise ValueError(
                f"KVCache.append: lens has shape {counts.shape} and dtype {counts.dtype}, "
                f"expected ({self.batch},) integers"
            )
        if (counts < 0).any() or (counts > tokens).any():
            raise ValueError(f"KVCache.append: lens is {counts.tolist()}, expected 0 to {tokens} each")
        return counts.astype(np.int64)


def _unpickled(header: cache_file.Header, pages: NDArray[np.uint8]) -> KVCache:
    """pages (those in use of all rows, bytes)."""
    h = header
    cache = KVCache(len(h.lengths), h.max_seq_len, h.n_kv_heads, h.head_dim, v_dim=h.v_dim, dtype=h.dtype,
                    window=h.window)
    cache._lengths[:], cache._written[:] = h.lengths, h.written
    slots = [(b, p) for b in range(cache.batch) for p in range(cache._used_pages(b))]
    for (b, p), page in zip(slots, pages, strict=True):
        page_at(int(cache._pages.table[b, p]), cache._pages.page_nbytes)[:] = page
    return cache


def _check_page(dtype: str, heads: int, k_dim: int, v_dim: int) -> None:
    """ValueError if a page's bytes, or what they are rounded up to, are beyond C's integers."""
    nbytes = KV_CHUNK * heads * ((k_dim + v_dim) * _ITEMSIZE[dtype] + 2 * CACHE_LINE)
    if nbytes > sys.maxsize:
        raise ValueError(f"KVCache: n_kv_heads is {heads}, head_dim {k_dim} and v_dim {v_dim}: a page of {KV_CHUNK} "
                         f"tokens, {nbytes} bytes, cannot be addressed")


def _round_up(a: int, unit: int) -> int:
    return -(-a // unit) * unit


def _dtype_name(function: str, dtype: DTypeLike) -> str:
    name = dtype_name(dtype)
    if not isinstance(name, str):
        raise TypeError(f"{function}: dtype is {dtype!r}, expected a dtype or its name")
    return name
