"""How files of others are opened and read: regular files only, never waiting for one, never more of it than a limit;
and how a folder is written: all of it or nothing."""
from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, BinaryIO

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
