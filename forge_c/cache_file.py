"""The file of a KVCache: a NumPy array of records of one page each, the first ones a JSON header.

    numpy .npy, uint8 (header records + batch * pages_a_row, page_nbytes)

so that numpy reads, writes and maps it. Pages that hold no token are holes in the file. The pages' layout is that of
src_c/forge.h; VERSION changes with it.
"""
from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

VERSION = 2
_FORMAT = "forge_c.KVCache"
_HEADER_BYTES, _ROW_BYTES = 1024, 64  # room for the header: fixed, and for the numbers of each row
_MOST = 2**40  # of any size; rows are at most _MOST_ROWS
_MOST_ROWS = 2**20


@dataclass(frozen=True)
class Header:
    """What a KVCache is, and how many tokens each row holds and has ever held."""

    dtype: str
    n_kv_heads: int
    head_dim: int
    v_dim: int
    max_seq_len: int
    window: int | None
    lengths: tuple[int, ...]
    written: tuple[int, ...]

    def problem(self) -> str | None:
        """What is impossible about it."""
        sizes = {name: getattr(self, name) for name in ("n_kv_heads", "head_dim", "v_dim", "max_seq_len")}
        sizes["window"] = 1 if self.window is None else self.window
        for name, size in sizes.items():
            if type(size) is not int or not 1 <= size <= _MOST:
                return f"{name} is {size!r}"
        if self.dtype not in ("float32", "bfloat16", "int8"):
            return f"dtype is {self.dtype!r}"
        if not 1 <= len(self.lengths) == len(self.written) <= _MOST_ROWS:
            return f"{len(self.lengths)} lengths and {len(self.written)} written"
        for length, written in zip(self.lengths, self.written, strict=True):
            if type(length) is not int or type(written) is not int or not 0 <= length <= written <= self.max_seq_len:
                return f"a row has {length!r} tokens of {written!r} written"
        return None


@dataclass
class PagesFile:
    """An open file: its pages (count, page_nbytes), and the header's records before them."""

    path: Path
    records: NDArray[np.uint8]
    pages: NDArray[np.uint8]
    writable: bool

    def flush(self, header: Header) -> None:
        """Put the header in its place, and everything on the disk."""
        text = json.dumps({"format": _FORMAT, "version": VERSION, **asdict(header)}).encode()
        room = self.records.reshape(-1)
        room[: len(text)] = np.frombuffer(text, np.uint8)
        room[len(text) :] = 0
        base = self.records
        while base is not None and not isinstance(base, np.memmap):
            base = base.base  # type: ignore[assignment]
        if base is not None:
            base.flush()

    def check(self, header: Header, count: int, page_nbytes: int) -> None:
        """ValueError unless it has `count` pages of page_nbytes."""
        first = _header_records(len(header.lengths), page_nbytes)
        expected = (first + count, page_nbytes)
        if self.records.shape != expected:
            raise ValueError(f"KVCache.load: {self.path} has records {self.records.shape}, expected {expected}")
        self.records, self.pages = self.records[:first], self.records[first:]


def _header_records(rows: int, page_nbytes: int) -> int:
    return -(-(_HEADER_BYTES + _ROW_BYTES * rows) // page_nbytes)


def create(path: str | os.PathLike[str], header: Header, count: int, page_nbytes: int) -> PagesFile:
    """A new file of `count` empty pages, mapped for writing. FileExistsError if there is one."""
    first = _header_records(len(header.lengths), page_nbytes)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    records = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(first + count, page_nbytes))
    file = PagesFile(Path(path), records[:first], records[first:], True)
    file.flush(header)
    return file


def open_pages(path: str | os.PathLike[str], mmap_mode: Literal["r", "r+"] | None) -> tuple[Header, PagesFile]:
    """The header of a file, and the file, whose shape `PagesFile.check` must confirm."""
    if mmap_mode not in (None, "r", "r+"):
        raise ValueError(f'KVCache.load: mmap_mode is {mmap_mode!r}, expected None, "r" or "r+"')
    try:
        records = np.lib.format.open_memmap(path, mode=mmap_mode or "r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"KVCache.load: {path} is no KVCache file: {error}") from None
    if records.dtype != np.uint8 or records.ndim != 2 or not records.flags.c_contiguous or not records.size:
        raise ValueError(f"KVCache.load: {path} is no KVCache file: an array {records.shape} of {records.dtype}")
    return _header_of(path, records), PagesFile(Path(path), records, records, mmap_mode == "r+")


def _header_of(path: str | os.PathLike[str], records: NDArray[np.uint8]) -> Header:
    text = records.reshape(-1)[: _HEADER_BYTES + _ROW_BYTES * _MOST_ROWS].tobytes().split(b"\0", 1)[0]
    try:
        found: Any = json.loads(text)
        if found.pop("format") != _FORMAT or found.pop("version") != VERSION:
            raise ValueError("another format or version")
        names = {field.name for field in fields(Header)}
        if set(found) != names:
            raise ValueError(f"it has {sorted(found)}")
        header = Header(**{**found, "lengths": tuple(found["lengths"]), "written": tuple(found["written"])})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"KVCache.load: {path} is no KVCache file: {error}") from None
    if problem := header.problem():
        raise ValueError(f"KVCache.load: {path} is damaged: {problem}")
    return header
