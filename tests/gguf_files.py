"""GGUF files as tests need them: sound ones from metadata and tensors, and broken ones byte by byte."""
from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = "<B <b <H <h <I <i <f <B - - <Q <q <d".split()
PLAIN = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 30}


class Typed(NamedTuple):
    """A value under a type that is not the one it would get by itself."""

    kind: int
    value: Any


class Raw(NamedTuple):
    """A tensor as its bytes: shape is (rows, columns), as NumPy has it."""

    type: int
    shape: tuple[int, ...]
    data: bytes


def text(s: str | bytes) -> bytes:
    raw = s.encode() if isinstance(s, str) else s
    return struct.pack("<Q", len(raw)) + raw


def scalar(kind: int, value: Any) -> bytes:
    return text(value) if kind == STRING else struct.pack(_CODES[kind], value)


def kind_of(value: Any) -> int:
    return {bool: BOOL, int: U32, float: F32, str: STRING, bytes: STRING}[type(value)]


def value(v: Any) -> bytes:
    """A value with its type before it; a list is an array of its first item's type."""
    if isinstance(v, Typed) and not isinstance(v.value, list):
        return struct.pack("<I", v.kind) + scalar(v.kind, v.value)
    if not isinstance(v, list | Typed):
        return struct.pack("<I", kind_of(v)) + scalar(kind_of(v), v)
    kind, items = (v.kind, v.value) if isinstance(v, Typed) else (kind_of(v[0]), v)
    return struct.pack("<IIQ", ARRAY, kind, len(items)) + b"".join(scalar(kind, item) for item in items)


def pair(key: str | bytes, v: Any) -> bytes:
    return text(key) + (v if isinstance(v, bytes) else value(v))


def info(name: str | bytes, sizes: Iterable[int], kind: int = 0, offset: int = 0, axes: int | None = None) -> bytes:
    """sizes as the file has them, the contiguous one first."""
    sizes = list(sizes)
    return (text(name) + struct.pack("<I", len(sizes) if axes is None else axes)
            + b"".join(struct.pack("<Q", n % 2**64) for n in sizes) + struct.pack("<IQ", kind % 2**32, offset % 2**64))


def container(pairs: Iterable[bytes] = (), infos: Iterable[bytes] = (), data: bytes = b"", *, version: int = 3,
              magic: bytes = b"GGUF", n_tensors: int | None = None, n_pairs: int | None = None,
              alignment: int = 32) -> bytes:
    """A file of these pieces, whatever they hold, with any claim about their number."""
    pairs, infos = list(pairs), list(infos)
    n_tensors, n_pairs = len(infos) if n_tensors is None else n_tensors, len(pairs) if n_pairs is None else n_pairs
    head = magic + struct.pack("<IQQ", version, n_tensors, n_pairs) + b"".join(pairs) + b"".join(infos)
    return head + (b"\0" * (-len(head) % alignment) + data if infos else b"")


def raw(tensor: Raw | NDArray[Any]) -> Raw:
    return tensor if isinstance(tensor, Raw) else Raw(PLAIN[tensor.dtype], tensor.shape, tensor.tobytes())


def gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Raw | NDArray[Any]], alignment: int = 32) -> bytes:
    """The bytes of a sound file."""
    infos, data = [], b""
    for name, tensor in tensors.items():
        r = raw(tensor)
        infos.append(info(name, r.shape[::-1], r.type, len(data)))
        data += r.data + b"\0" * (-len(r.data) % alignment)
    if alignment != 32:
        metadata = {**metadata, "general.alignment": alignment}
    return container([pair(key, v) for key, v in metadata.items()], infos, data, alignment=alignment)


def write_shards(folder: Path, name: str, metadata: Mapping[str, Any], tensors: Mapping[str, Raw | NDArray[Any]],
                 count: int) -> list[Path]:
    """The same model in `count` files; the first has the metadata."""
    paths = []
    for i in range(count):
        split = {"split.no": Typed(U16, i), "split.count": Typed(U16, count),
                 "split.tensors.count": Typed(I32, len(tensors))}
        mine = {key: tensors[key] for key in list(tensors)[i::count]}
        paths.append(folder / f"{name}-{i + 1:05}-of-{count:05}.gguf")
        paths[-1].write_bytes(gguf((dict(metadata) if i == 0 else {}) | split, mine))
    return paths
