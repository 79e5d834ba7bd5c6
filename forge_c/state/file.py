"""The file of a KVCache: a NumPy array of records of one page each, the first ones a JSON header.

    numpy .npy, uint8 (header records + batch * pages_a_row, page_nbytes)

so that numpy reads, writes and maps it. Pages that hold no token are holes in the file. The pages' layout is that of
src_c/forge.h; VERSION changes with it.

A new file gets its name when it is whole. Nothing is written through a map before the disk has room for it: a store
that finds the disk full would end the process.
"""
from __future__ import annotations

import errno
import json
import mmap
import os
import re
import secrets
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from forge_c.files import open_regular, parse_json

VERSION = 2
_FORMAT = "forge_c.KVCache"
_HEADER_BYTES, _ROW_BYTES = 1024, 64  # room for the header: fixed, and for the numbers of each row
_HEADER_VALUES, _ROW_VALUES = 64, 2  # more than it has
_MOST = {"n_kv_heads": 2**16, "head_dim": 2**20, "v_dim": 2**20, "max_seq_len": 2**40, "window": sys.maxsize}
_MOST_ROWS = 2**20
_FIRST_LINE = re.compile(rb"\{'descr': '\|u1', 'fortran_order': False, 'shape': \((\d{1,19}), (\d{1,19})\), \} *\n")
_PIECE = 2**26  # bytes of one call, so that Ctrl-C is heard in between

Bytes = NDArray[np.uint8]


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
        """What a file cannot say about a cache."""
        sizes = {name: getattr(self, name) for name in _MOST}
        sizes["window"] = 1 if self.window is None else self.window
        for name, size in sizes.items():
            if type(size) is not int or not 1 <= size <= _MOST[name]:
                return f"{name} is {size!r}, expected 1 to {_MOST[name]}"
        if self.dtype not in ("float32", "bfloat16", "int8"):
            return f"dtype is {self.dtype!r}"
        if not 1 <= len(self.lengths) == len(self.written) <= _MOST_ROWS:
            return f"it has {len(self.lengths)} lengths and {len(self.written)} written, expected 1 to {_MOST_ROWS}"
        for length, written in zip(self.lengths, self.written, strict=True):
            if type(length) is not int or type(written) is not int or not 0 <= length <= written <= self.max_seq_len:
                return f"a row has {length!r} tokens of {written!r} written"
        return None

    def check(self, function: str) -> None:
        """ValueError if no file can hold such a cache."""
        if problem := self.problem():
            raise ValueError(f"{function}: no file holds this cache: {problem}")

    def encoded(self) -> bytes:
        """As it stands in the file, zeros behind it."""
        text = json.dumps({"format": _FORMAT, "version": VERSION, **asdict(self)}).encode()
        return text.ljust(_header_bytes(len(self.lengths)), b"\0")


@dataclass(eq=False)
class PagesFile:
    """An open file of `records`, (count, bytes): the header from byte `start` on, then the pages."""

    path: Path
    handle: int  # closed when this object goes
    start: int
    records: tuple[int, int]
    writable: bool
    pages: Bytes = field(init=False)  # (count, page_nbytes), once mapped
    _first: int = field(init=False, default=0)  # records of the header

    def __post_init__(self) -> None:
        self.close = weakref.finalize(self, os.close, self.handle)
        self.close.atexit = False  # threads may still append

    def check(self, header: Header, count: int, page_nbytes: int) -> None:
        """ValueError unless it has `count` pages of page_nbytes."""
        self._first = _header_records(len(header.lengths), page_nbytes)
        expected = (self._first + count, page_nbytes)
        if self.records != expected:
            raise ValueError(f"KVCache.load: {self.path} has records {self.records}, expected {expected}")

    def map(self, function: str) -> None:
        """Make `pages` the file's own."""
        access = mmap.ACCESS_WRITE if self.writable else mmap.ACCESS_READ
        with _naming(function, self.path):
            self._map = mmap.mmap(self.handle, self._place(self.records[0] - self._first), access=access)
        pages = np.frombuffer(self._map, np.uint8, offset=self._place(0))
        self.pages = pages.reshape(-1, self.records[1])
        self._reserved = np.zeros(len(self.pages), bool)

    def read(self, page: int, out: Bytes) -> None:
        """out (n, page_nbytes) <- the pages from `page` on."""
        left, place = out.reshape(-1).data, self._place(page)
        while left:
            count = os.preadv(self.handle, [left[:_PIECE]], place)
            if not count:
                raise ValueError(f"KVCache.load: {self.path} was cut short while it was read")
            left, place = left[count:], place + count

    def reserve(self, addresses: NDArray[np.uintp]) -> None:
        """Have room on the disk for pages of the map, given as addresses. OSError if there is none."""
        pages = ((addresses - np.uintp(self.pages.ctypes.data)) // np.uintp(self.records[1])).astype(np.intp)
        for page in pages[~self._reserved[pages]].tolist():
            with _naming("KVCache.append", self.path):
                _allocate(self.handle, self._place(page), self.records[1])
            self._reserved[page] = True

    def flush(self, header: Header) -> None:
        """Put everything on the disk: the tokens, and then the header, which promises them."""
        with _naming("KVCache.flush", self.path):
            self._map.flush()
            _write(self.handle, header.encoded(), self.start)
            os.fsync(self.handle)

    def _place(self, page: int) -> int:
        """Of a page in the file, in bytes."""
        return self.start + (self._first + page) * self.records[1]


def _header_bytes(rows: int) -> int:
    return _HEADER_BYTES + _ROW_BYTES * rows


def _header_records(rows: int, page_nbytes: int) -> int:
    return -(-_header_bytes(rows) // page_nbytes)


# ---- new files ----


def create(path: str | os.PathLike[str], header: Header, count: int, page_nbytes: int) -> PagesFile:
    """A new file of `count` empty pages, mapped for writing. FileExistsError if there is one."""
    with _new_file("KVCache", Path(path), header, count, page_nbytes) as file:
        with _naming("KVCache", file.path):
            _allocate(file.handle, 0, file._place(0))
        file.map("KVCache")
    return file


def save(path: str | os.PathLike[str], header: Header, count: int, page_nbytes: int,
         pages: Iterable[tuple[int, Bytes]]) -> None:
    """A new file of `count` pages: those given, each with its number, and holes. FileExistsError if there is one."""
    with _new_file("KVCache.save", Path(path), header, count, page_nbytes) as file:
        for page, content in pages:
            with _naming("KVCache.save", file.path):
                _write(file.handle, content.data, file._place(page))


@contextmanager
def _new_file(function: str, path: Path, header: Header, count: int, page_nbytes: int) -> Iterator[PagesFile]:
    """What becomes the file `path`, with that header, when the block ends; if it raises, nothing is left."""
    header.check(function)
    first = _header_records(len(header.lengths), page_nbytes)
    line = _first_line(first + count, page_nbytes)
    size = len(line) + (first + count) * page_nbytes
    if size > sys.maxsize:
        raise ValueError(f"{function}: {count} pages of {page_nbytes} bytes cannot be addressed")
    temporary = path.parent / f".forge_c-{secrets.token_hex(8)}"
    try:
        with _naming(function, path):
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            file = PagesFile(path, handle, len(line), (first + count, page_nbytes), True)
            file.check(header, count, page_nbytes)
            os.ftruncate(handle, size)
        try:
            yield file
            with _naming(function, path):
                _write(handle, line + header.encoded(), 0)
                os.fsync(handle)
                _rename(temporary, path)
        except BaseException:
            file.close()  # the disk's room is free again as soon as the name is gone
            raise
    finally:
        temporary.unlink(missing_ok=True)


def _first_line(records: int, nbytes: int) -> bytes:
    """What a .npy file of uint8 (records, nbytes) begins with."""
    line = BytesIO()
    np.lib.format.write_array_header_1_0(
        line, {"descr": "|u1", "fortran_order": False, "shape": (records, nbytes)})
    return line.getvalue()


def _rename(temporary: Path, path: Path) -> None:
    """Never over a file that has come there meanwhile: FileExistsError."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # No hard links on this file system: take the name with an empty file, which is replaced.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        try:
            os.replace(temporary, path)
        except BaseException:
            path.unlink()
            raise


def _write(handle: int, content: bytes | memoryview, place: int) -> None:
    left = memoryview(content)
    while left:
        count = os.pwrite(handle, left[:_PIECE], place)
        left, place = left[count:], place + count


def _allocate(handle: int, place: int, nbytes: int) -> None:
    """Give the file blocks of its own there; what they hold does not change."""
    try:
        os.posix_fallocate(handle, place, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        _write(handle, os.pread(handle, nbytes, place).ljust(nbytes, b"\0"), place)


@contextmanager
def _naming(function: str, path: Path) -> Iterator[None]:
    """Errors of the system say who met them, and with which file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{function}: {error.strerror}", str(path)) from None


# ---- files of others ----


def open_pages(path: str | os.PathLike[str], mmap_mode: Literal["r", "r+"] | None) -> tuple[Header, PagesFile]:
    """The header of a file, and the file, whose shape `PagesFile.check` must confirm."""
    if mmap_mode not in (None, "r", "r+"):
        raise ValueError(f'KVCache.load: mmap_mode is {mmap_mode!r}, expected None, "r" or "r+"')
    path = Path(path)
    try:
        with open_regular(path, writable=mmap_mode == "r+") as file:
            start, records = _records_of(path, file)
            header = _header_of(path, file, records)
            return header, PagesFile(path, os.dup(file.fileno()), start, records, mmap_mode == "r+")
    except ValueError as error:
        raise ValueError(f"KVCache.load: {error}") from None


def _records_of(path: Path, file: BinaryIO) -> tuple[int, tuple[int, int]]:
    """Where the records begin, and (how many, bytes of each); the file is left there."""
    head = file.read(10)
    line = file.read(int.from_bytes(head[8:], "little")) if head[:8] == b"\x93NUMPY\x01\x00" else b""
    found, start = _FIRST_LINE.fullmatch(line), len(head) + len(line)
    if not found or start % 64:
        raise ValueError(f"{path} is no KVCache file: it does not begin as a NumPy array of records of bytes")
    count, nbytes = int(found[1]), int(found[2])
    size, expected = os.fstat(file.fileno()).st_size, start + count * nbytes
    if size != expected or not count * nbytes:
        raise ValueError(f"{path} is damaged: {size} bytes, expected {expected} of {count} records of {nbytes}")
    return start, (count, nbytes)


def _header_of(path: Path, file: BinaryIO, records: tuple[int, int]) -> Header:
    count, nbytes = records
    # Each row has a page at least, and its part of the header.
    rows = min(_MOST_ROWS, count * nbytes // (nbytes + _ROW_BYTES))
    text = file.read(min(_header_bytes(rows), count * nbytes)).split(b"\0", 1)[0]
    try:
        found: Any = parse_json("its header", text, _HEADER_VALUES + _ROW_VALUES * rows)
        if found.pop("format") != _FORMAT or found.pop("version") != VERSION:
            raise ValueError("another format or version")
        names = {entry.name for entry in fields(Header)}
        if set(found) != names:
            raise ValueError(f"it has {sorted(found)}")
        header = Header(**{**found, "lengths": tuple(found["lengths"]), "written": tuple(found["written"])})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no KVCache file: {error}") from None
    if problem := header.problem():
        raise ValueError(f"{path} is damaged: {problem}")
    return header
