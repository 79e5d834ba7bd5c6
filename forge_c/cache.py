"""The key/value cache: what attention reads about the tokens before the new ones.

    k:  (batch, n_kv_heads, capacity, head_dim)     position p of a row lies in slot p,
    v:  (batch, n_kv_heads, capacity, v_dim)        with a window in slot p % capacity

Heads come before slots, so that the keys of one head lie side by side, as attention walks them. Rows may hold
different numbers of tokens. Everything is allocated at the start; appending never moves what is there.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from operator import index
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from forge_c.functional import KV_CHUNK, store_tokens

__all__ = ["KVCache", "kv_cache_nbytes"]

_STORED = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_ACCEPTED = (*_STORED.values(), np.dtype(np.float16))
_ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_CACHE_LINE = 64


def kv_cache_nbytes(
    batch: int, seq_len: int, n_kv_heads: int, head_dim: int, dtype: DTypeLike = "float32"
) -> int:
    """Bytes of one layer's keys and values: 2 * batch * seq_len * n_kv_heads * head_dim * itemsize.

    Args:
        dtype: "float64", "float32", "float16" or "bfloat16".

    Raises:
        TypeError, ValueError: a size that is not an integer or is negative, or another dtype.

    >>> kv_cache_nbytes(batch=1, seq_len=4096, n_kv_heads=8, head_dim=128, dtype="bfloat16")
    16777216
    """
    name = _dtype_name(dtype)
    if name not in _ITEMSIZE:
        raise ValueError(f"kv_cache_nbytes: dtype is {name!r}, expected one of {', '.join(_ITEMSIZE)}")
    sizes = {"batch": batch, "seq_len": seq_len, "n_kv_heads": n_kv_heads, "head_dim": head_dim}
    counts = [_checked_size("kv_cache_nbytes", size, value, least=0) for size, value in sizes.items()]
    return 2 * math.prod(counts) * _ITEMSIZE[name]


class KVCache:
    """Keys and values of the tokens so far, for one attention layer.

    Args:
        batch: rows; each has its own length.
        max_seq_len: the longest a row may become.
        n_kv_heads, head_dim: of the keys.
        v_dim: head_dim of the values, if it differs.
        dtype: "float32" or "bfloat16"; what is appended is rounded to it.
        window: keep only what a sliding window of that many keys needs: a ring, whatever max_seq_len is.

    One thread may write at a time: while one does, append and truncate raise RuntimeError in any other.

    Raises:
        TypeError, ValueError: a size that is not a positive integer, an unknown dtype, or sizes whose product
            no computer can address.
        MemoryError: sizes that this computer cannot hold.

    >>> cache = KVCache(batch=1, max_seq_len=8, n_kv_heads=2, head_dim=4)
    >>> cache.append(np.ones((1, 3, 2, 4), np.float32), np.zeros((1, 3, 2, 4), np.float32))
    >>> cache.seq_len, cache.nbytes
    (3, 512)
    >>> k, v = cache
    >>> k.shape
    (1, 3, 2, 4)
    """

    __slots__ = ("_dtype", "_k", "_lengths", "_max_seq_len", "_v", "_window", "_writer", "_written")

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
    ) -> None:
        v_dim = head_dim if v_dim is None else v_dim
        sizes = {"batch": batch, "n_kv_heads": n_kv_heads, "head_dim": head_dim, "v_dim": v_dim}
        rows, heads, k_dim, v_dim = (_checked_size("KVCache", name, size) for name, size in sizes.items())
        self._dtype = _dtype_name(dtype)
        if self._dtype not in _STORED:
            raise ValueError(f"KVCache: dtype is {self._dtype!r}, expected one of {', '.join(_STORED)}")
        self._max_seq_len = capacity = _checked_size("KVCache", "max_seq_len", max_seq_len)
        self._window = None if window is None else _checked_size("KVCache", "window", window)
        if self._window is not None:
            # A whole append of KV_CHUNK tokens and the window before its first one fit, in whole chunks.
            capacity = -(-min(capacity, self._window + KV_CHUNK) // KV_CHUNK) * KV_CHUNK
        self._k = _zeros((rows, heads, capacity, k_dim), self._dtype)
        self._v = _zeros((rows, heads, capacity, v_dim), self._dtype)
        self._lengths = np.zeros(rows, np.int64)
        # Highest position ever written, plus 1: in a ring, positions from _written - capacity on survive.
        self._written = np.zeros(rows, np.int64)
        self._writer = threading.RLock()

    @property
    def batch(self) -> int:
        """Number of rows."""
        return int(self._k.shape[0])

    @property
    def max_seq_len(self) -> int:
        """The longest a row may become."""
        return self._max_seq_len

    @property
    def n_kv_heads(self) -> int:
        """Number of key/value heads."""
        return int(self._k.shape[1])

    @property
    def head_dim(self) -> int:
        """Channels of a key."""
        return int(self._k.shape[3])

    @property
    def v_dim(self) -> int:
        """Channels of a value."""
        return int(self._v.shape[3])

    @property
    def dtype(self) -> str:
        """Name of the dtype that keys and values are kept in."""
        return self._dtype

    @property
    def window(self) -> int | None:
        """How many keys a token attends to, itself included; None for all."""
        return self._window

    @property
    def capacity(self) -> int:
        """Slots a row has: max_seq_len, or the size of the ring."""
        return int(self._k.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return int(self._k.nbytes + self._v.nbytes)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each row, (batch,); a copy."""
        return self._lengths.copy()

    @property
    def seq_len(self) -> int:
        """Tokens in the longest row."""
        return int(self._lengths.max())

    def __iter__(self) -> Iterator[NDArray[Any]]:
        """`k, v = cache`: two read-only arrays (batch, seq, n_kv_heads, dim) in the cache's dtype.

        Without a window they are views of all seq_len positions, with one copies of the last min(window,
        seq_len). In a row shorter than seq_len, what follows its last token is unspecified.
        """
        stop = self.seq_len
        for store in (self._k, self._v):
            if self._window is None:
                held = store[:, :, :stop]
            else:
                held = store[:, :, np.arange(max(0, stop - self._window), stop) % self.capacity]
            held = held.transpose(0, 2, 1, 3)
            held.flags.writeable = False
            yield held

    def __repr__(self) -> str:
        window = "" if self._window is None else f", window={self._window}"
        return (
            f"KVCache(batch={self.batch}, seq_len={self.seq_len}, max_seq_len={self.max_seq_len}, "
            f"n_kv_heads={self.n_kv_heads}, head_dim={self.head_dim}, dtype={self._dtype!r}{window})"
        )

    def append(self, k: ArrayLike, v: ArrayLike, *, lens: ArrayLike | None = None) -> None:
        """Add tokens at the end of every row, all of them or, when an error is raised, none.

        Args:
            k: (batch, tokens, n_kv_heads, head_dim), float32, float16 or bfloat16.
            v: (batch, tokens, n_kv_heads, v_dim), likewise.
            lens: (batch,) how many of the tokens each row takes, from the first on; all of them if None.

        Raises:
            TypeError: another dtype.
            ValueError: wrong shapes, a row that would become longer than max_seq_len, or, with a window, more
                than forge_c.functional.KV_CHUNK tokens at once.
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
            stop = self._stop(added)
            np.maximum(self._written, stop, out=self._written)
            for store, new in ((self._k, k), (self._v, v)):
                store_tokens(store, new, self._lengths, added, self._window is not None)
            self._lengths[:] = stop

    def _stop(self, added: NDArray[np.int64]) -> NDArray[np.int64]:
        """Lengths after `added` more tokens a row; ValueError if they do not fit."""
        stop = self._lengths + added
        if stop.max() > self._max_seq_len:
            row = int(stop.argmax())
            raise ValueError(
                f"KVCache.append: row {row} has {self._lengths[row]} tokens and {added[row]} more do not fit, "
                f"max_seq_len is {self._max_seq_len}"
            )
        return stop

    def truncate(self, n: ArrayLike) -> None:
        """Forget every token from position n on; what comes next is as if they had never been there.

        Args:
            n: tokens to keep, for all rows (a shorter row stays as it is) or (batch,) for each.

        Raises:
            TypeError, ValueError: n is not an integer, is negative or is more than there are; or, with a
                window, the last `window` tokens before n are no longer all there. Then nothing changes.
            RuntimeError: another thread is writing.
        """
        keep = np.asarray(n)
        if keep.dtype.kind not in "iu" or keep.shape not in ((), (self.batch,)):
            raise TypeError(f"KVCache.truncate: n is {n!r}, expected an integer or {self.batch} of them")
        with self.writing():
            most = self._lengths if keep.ndim else self._lengths.max()
            if (keep < 0).any() or (keep > most).any():
                raise ValueError(f"KVCache.truncate: n is {keep.tolist()}, expected 0 to {most.tolist()}")
            keep = np.minimum(keep, self._lengths)
            if self._window is not None:
                lost = self._written - self.capacity
                gone = (keep > 0) & (np.maximum(keep - self._window, 0) < lost)
                if gone.any():
                    row = int(gone.argmax())
                    raise ValueError(
                        f"KVCache.truncate: row {row} cannot go back to {keep[row]} tokens, the ring holds "
                        f"only those from {lost[row]} on and a window of {self._window} needs more"
                    )
            self._written[keep == 0] = 0
            self._lengths[:] = keep

    def row(self, i: int) -> KVCache:
        """A cache of row i alone that shares its memory and its length with this one.

        Raises:
            IndexError: i is not 0 .. batch - 1.
        """
        if not 0 <= index(i) < self.batch:
            raise IndexError(f"KVCache.row: i is {i}, expected 0 to {self.batch - 1}")
        row = object.__new__(KVCache)
        row._dtype, row._window, row._max_seq_len = self._dtype, self._window, self._max_seq_len
        row._k, row._v = self._k[i : i + 1], self._v[i : i + 1]
        row._lengths, row._written = self._lengths[i : i + 1], self._written[i : i + 1]
        row._writer = self._writer
        return row

    def copy(self, max_seq_len: int | None = None) -> KVCache:
        """An independent cache with the same contents and room for at least as many tokens.

        Raises:
            ValueError: max_seq_len is less than this cache's.
        """
        room = self._max_seq_len
        if max_seq_len is not None:
            room = _checked_size("KVCache.copy", "max_seq_len", max_seq_len)
        if room < self._max_seq_len:
            raise ValueError(f"KVCache.copy: max_seq_len is {room}, expected at least {self._max_seq_len}")
        sizes = (self.batch, room, self.n_kv_heads, self.head_dim)
        twin = KVCache(*sizes, v_dim=self.v_dim, dtype=self._dtype, window=self._window)
        with self.writing():
            # A ring grows only while it is as long as max_seq_len, and such a ring has never wrapped.
            used = min(int(self._written.max()), self.capacity)
            twin._k[:, :, :used], twin._v[:, :, :used] = self._k[:, :, :used], self._v[:, :, :used]
            twin._lengths[:], twin._written[:] = self._lengths, self._written
        return twin

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep other threads from writing for as long as the block lasts.

        append and truncate do so by themselves; a layer does so from its append to the end of its attention.

        Raises:
            RuntimeError: another thread holds it.
        """
        if not self._writer.acquire(blocking=False):
            raise RuntimeError("KVCache: another thread is writing to this cache")
        try:
            yield
        finally:
            self._writer.release()

    def _checked(self, name: str, new: ArrayLike, dim: int) -> NDArray[Any]:
        array = np.asarray(new)
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
        counts = np.asarray(lens)
        if counts.dtype.kind not in "iu" or counts.shape != (self.batch,):
            raise ValueError(
                f"KVCache.append: lens has shape {counts.shape} and dtype {counts.dtype}, "
                f"expected ({self.batch},) integers"
            )
        if (counts < 0).any() or (counts > tokens).any():
            raise ValueError(f"KVCache.append: lens is {counts.tolist()}, expected 0 to {tokens} each")
        return counts.astype(np.int64)


def _zeros(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Zeros that begin on a cache line; the system hands out their pages when they are first written."""
    nbytes = math.prod(shape) * _STORED[dtype].itemsize
    if nbytes > sys.maxsize - _CACHE_LINE:
        raise ValueError(f"KVCache: {' x '.join(map(str, shape))} {dtype} numbers cannot be addressed")
    memory = np.zeros(nbytes + _CACHE_LINE, np.uint8)
    offset = -memory.ctypes.data % _CACHE_LINE
    return np.ndarray(shape, _STORED[dtype], memory, offset)


def _dtype_name(dtype: DTypeLike) -> str:
    return dtype if isinstance(dtype, str) else np.dtype(dtype).name


def _checked_size(function: str, name: str, value: int, *, least: int = 1) -> int:
    try:
        size = index(value)
    except TypeError:
        raise TypeError(f"{function}: {name} is {value!r}, expected an integer") from None
    if size < least:
        raise ValueError(f"{function}: {name} is {size}, expected at least {least}")
    return size
