"""How files of others are opened and read: regular files only, never waiting for one, never more of it than a limit;
and how a folder is written: all of it or nothing."""
from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from forge_c.pages import empty

_MAX_JSON = 16 << 20
_MAX_VALUES = 1 << 20  # a parsed value takes up to 100 bytes, however short its text
_PIECE = 1 << 20

PathLike = str | os.PathLike[str]


def open_regular(path: PathLike, *, writable: bool = False) -> BinaryIO:
    """The file, open for reading, or for writing too. ValueError if it is a pipe, a socket, a device or a folder, also
    behind a link."""
    refusal = f"{os.fspath(path)}: not a regular file"
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(refusal)
    # What stands there may have changed since: a pipe opened without O_NONBLOCK waits for its writer.
    access = os.O_RDWR if writable else os.O_RDONLY
    handle = os.open(path, access | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(refusal)
    return os.fdopen(handle, "r+b" if writable else "rb")


def read_file(path: PathLike, limit: int) -> bytes:
    """All of a regular file; ValueError if it holds more than `limit` bytes, whatever size the system claims."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{os.fspath(path)}: {size} bytes, expected at most {limit}")
        pieces, left = [], limit + 1
        while left and (piece := file.read(min(left, _PIECE))):
            pieces.append(piece)
            left -= len(piece)
    if not left:
        raise ValueError(f"{os.fspath(path)}: more than {limit} bytes, expected at most {limit}")
    return b"".join(pieces)


def read_rows(path: PathLike, name: str, start: int, row_bytes: int, rows: NDArray[np.intp],
              among: slice = slice(None)) -> NDArray[np.uint8]:
    """Some rows of a tensor that begins at byte `start` of a file, and of each these bytes: (len(rows), bytes) in the
    order of `rows`. Nothing else is read. ValueError if the file has become shorter since its header was read."""
    first, stop, _ = among.indices(row_bytes)
    wanted, places = np.unique(rows, return_inverse=True)
    ends = np.flatnonzero(np.diff(wanted) != 1) + 1 if stop - first == row_bytes else np.arange(1, len(wanted))
    raw = empty((len(wanted), stop - first), np.uint8)
    with open_regular(path) as file:
        for begin, end in pairwise([0, *ends.tolist(), len(wanted)]):
            into = memoryview(raw[begin:end].reshape(-1).data)
            if len(into) and not _filled(file, into, start + int(wanted[begin]) * row_bytes + first):
                raise ValueError(f"{os.fspath(path)}: it ends within {name}")
    return raw if np.array_equal(places, np.arange(len(raw))) else raw[places]


def _filled(file: BinaryIO, into: memoryview, start: int) -> bool:
    """Whether the file has as many bytes from `start` on; no others are read, as a buffer would."""
    while into and (count := os.preadv(file.fileno(), [into], start)):
        into, start = into[count:], start + count
    return not into


def read_json(path: Path, limit: int = _MAX_JSON) -> Any:
    """The JSON in a file of at most `limit` bytes; ValueError names the file."""
    return parse_json(path, read_file(path, limit))


def check_values(path: PathLike, text: bytes, most: int) -> None:
    """ValueError if JSON may hold more than `most` values; brackets and commas inside strings count too."""
    if sum(map(text.count, (b"{", b"[", b","))) > most:
        raise ValueError(f"{os.fspath(path)}: more than {most} values")


def parse_json(path: PathLike, text: bytes, most: int = _MAX_VALUES) -> Any:
    """The JSON of a text from that file, in which no object has a key twice; ValueError names the file."""
    check_values(path, text, most)
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{os.fspath(path)}: not valid JSON: {reason}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


@contextmanager
def new_folder(function: str, path: PathLike) -> Iterator[Path]:
    """A folder to write to, which has that name when the block has come to its end; otherwise nothing is left.
    FileExistsError if there is something by that name, other than an empty folder."""
    to = Path(path)
    if os.path.lexists(to) and not (to.is_dir() and not any(to.iterdir())):
        raise FileExistsError(f"{function}: {to} exists")
    half = Path(mkdtemp(prefix=".forge_c-", dir=to.absolute().parent))
    try:
        yield half
        half.chmod(0o777 & ~_umask())
        half.rename(to)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
