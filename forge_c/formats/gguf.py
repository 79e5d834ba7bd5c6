"""The GGUF container: metadata by key and tensors by name, in one file or in shards. A file is a magic, counts, keys
with their values, tensor infos, padding, data; all little endian.

Every size is checked against the file before anything is allocated, and nothing stays mapped: a mapped page counts as
this process's memory, and a file that shrinks under a mapping ends the process. What the numbers of a tensor mean is no
concern of this file: it hands out their bytes.
"""
from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, overload

import numpy as np
from numpy.typing import NDArray

from forge_c.checks import short
from forge_c.files import PathLike, open_regular
from forge_c.formats.ggml import TYPES as BLOCK_TYPES

__all__ = ["GGUF", "TYPES", "Strings", "TensorInfo", "Type", "is_gguf", "open_gguf"]

MAGIC = b"GGUF"
MAX_KEYS, MAX_TENSORS, MAX_SHARDS = 4096, 1 << 16, 1024
_MAX_HEADER, _MAX_STRING, _MAX_ARRAY = 256 << 20, 16 << 20, 1 << 22
_MAX_KEY, _MAX_NAME, _MAX_AXES, _MAX_SIZE, _MAX_NUMBERS = 1024, 255, 4, 1 << 32, 1 << 40
_MAX_ALIGNMENT = 1 << 16
_LEAST_PAIR, _LEAST_INFO = 14, 25  # bytes of the shortest key with its value, and of the shortest tensor info
_FIRST_READ = 1 << 16
_SHOWN = 60  # bytes that a message shows


class Type(NamedTuple):
    """How ggml stores numbers: `block` of them, neighbours in a row, in `nbytes` bytes."""

    name: str
    block: int
    nbytes: int

    def bytes_of(self, n: int) -> int:
        """Of n numbers, whole blocks."""
        return n // self.block * self.nbytes


# What ggml has beside the types that can be dequantised: their bytes are counted, and no more.
_OTHERS = (
    (9, "Q8_1", 32, 36), (15, "Q8_K", 256, 292), (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98), (19, "IQ1_S", 256, 50), (21, "IQ3_S", 256, 110), (22, "IQ2_S", 256, 82), (24, "I8", 1, 1),
    (25, "I16", 1, 2), (26, "I32", 1, 4), (27, "I64", 1, 8), (28, "F64", 1, 8), (29, "IQ1_M", 256, 56),
    (41, "Q1_0", 128, 18), (42, "Q2_0", 64, 18))
TYPES: Mapping[int, Type] = {t.id: Type(t.name, t.weights, t.nbytes) for t in BLOCK_TYPES.values()} | {
    number: Type(name, block, nbytes) for number, name, block, nbytes in _OTHERS}
_REMOVED = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8",
            38: "IQ4_NL_8_8"}

# Value types by number.
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8",
            12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9

# What a file of another kind begins with, and what to do about it; the old formats wrote their magic as a number.
_OLD = "was given up in 2023; convert the original model again, or get its GGUF"
_OTHER_MAGICS = {
    b"lmgg": f"a GGML file, a format that {_OLD}", b"GGML": f"a GGML file, a format that {_OLD}",
    b"fmgg": f"a GGMF file, a format that {_OLD}", b"GGMF": f"a GGMF file, a format that {_OLD}",
    b"tjgg": f"a GGJT file, a format that {_OLD}", b"GGJT": f"a GGJT file, a format that {_OLD}",
    b"algg": "a GGLA file, an adapter and no model", b"GGLA": "a GGLA file, an adapter and no model",
    b"PK\3\4": "a zip archive, perhaps of PyTorch: it can hold code and is not read; get safetensors or a GGUF",
    b"<!DO": "a web page, not the file itself; `hf download` fetches it",
    b"vers": "a Git LFS pointer, not the file itself; `git lfs pull` or `hf download` fetches it",
}
_SAFETENSORS = "a safetensors file; pass the folder that it lies in with its config.json"


class Strings(Sequence[str]):
    """Texts as they lie in the file, each decoded when it is asked for."""

    def __init__(self, where: str, raw: bytes, stops: array[int]) -> None:
        self._where, self._raw, self._stops = where, raw, stops  # string i is raw[stops[i] + 8 : stops[i + 1]]

    def __len__(self) -> int:
        return len(self._stops) - 1

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...

    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        j = range(len(self))[i]
        return self._decoded(self._stops[j] + 8, self._stops[j + 1])

    def __iter__(self) -> Iterator[str]:
        for start, stop in pairwise(self._stops):
            yield self._decoded(start + 8, stop)

    def _decoded(self, start: int, stop: int) -> str:
        raw = self._raw[start:stop]
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self._where} holds {short(raw[:_SHOWN])}, expected UTF-8") from None

    def __repr__(self) -> str:
        return f"Strings({len(self)} texts)"


class TensorInfo(NamedTuple):
    """A tensor: shape from the slowest axis to the contiguous one, and where its bytes lie."""

    path: Path
    name: str
    type: Type
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return self.type.bytes_of(prod(self.shape))

    def read(self) -> NDArray[np.uint8]:
        """Its bytes; ValueError if the file has become shorter since."""
        raw = np.empty(self.nbytes, np.uint8)
        with open_regular(self.path) as file:
            file.seek(self.start)
            if file.readinto(raw.data) != raw.nbytes:  # type: ignore[attr-defined]
                raise ValueError(f"{self.path}: it ends within tensor {self.name}")
        return raw


class GGUF:
    """A model's file, or all its shards.

    Attributes:
        path: the file, or the first shard.
        metadata: key -> int, float, bool, str, NumPy array or Strings.
        tensors: name -> TensorInfo.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
        self.path, self.metadata, self.tensors = path, metadata, tensors

    def __repr__(self) -> str:
        return f"GGUF({str(self.path)!r}, {len(self.metadata)} keys, {len(self.tensors)} tensors)"


def is_gguf(path: PathLike) -> bool:
    """Whether a file begins like one, whatever its name; ValueError if it is no regular file."""
    with open_regular(path) as file:
        return file.read(4) == MAGIC


def open_gguf(path: PathLike) -> GGUF:
    """Read the header of a file, and of all shards if it is one of several.

    Raises:
        FileNotFoundError: no such file, or a shard is missing.
        ValueError: a file that is damaged, of another kind, or no regular file; it says which part is wrong.
    """
    one = _read(Path(path))
    count = _split(one, "split.count", 1)
    if count <= 1:
        return one
    if count > MAX_SHARDS:
        _fail(one.path, f"split.count is {count}, expected at most {MAX_SHARDS}")
    return _joined(one, count)


# ---- shards ---------------------------------------------------------------------------------------------------------


def _joined(one: GGUF, count: int) -> GGUF:
    """All shards as one: the first has the metadata. Their names follow from one name, as the splitter makes them."""
    number = _split(one, "split.no", 0) + 1
    ending = f"-{number:05}-of-{count:05}.gguf"
    if number > count or not one.path.name.endswith(ending) or one.path.name == ending:
        _fail(one.path, f"it is shard {number} of {count}, expected a name that ends in {ending}, by which the others "
                        "are found; give all shards their names back")
    prefix = one.path.name.removesuffix(ending)
    paths = [one.path.with_name(f"{prefix}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0]}: no such file; {one.path.name} is one of {count} shards, and all must "
                                "lie in one folder")
    tensors: dict[str, TensorInfo] = {}
    shards = [one if i == number - 1 else _read(path) for i, path in enumerate(paths)]
    for i, shard in enumerate(shards):
        for key, expected in (("split.no", i), ("split.count", count)):
            if _split(shard, key, -1) != expected:
                _fail(shard.path, f"{key} is {_split(shard, key, -1)}, expected {expected}: it is a shard of another "
                                  "file")
        twice = tensors.keys() & shard.tensors.keys()
        if twice:
            _fail(shard.path, f"tensor {min(twice)} stands also in {tensors[min(twice)].path.name}")
        tensors |= shard.tensors
    total = _split(shards[0], "split.tensors.count", len(tensors))
    if total != len(tensors):
        _fail(shards[0].path, f"split.tensors.count is {total}, expected {len(tensors)}, as many as all shards have")
    return GGUF(shards[0].path, shards[0].metadata, tensors)


def _split(one: GGUF, key: str, default: int) -> int:
    value = one.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        _fail(one.path, f"{key} is {short(value)}, expected an integer")
    return value


# ---- one file -------------------------------------------------------------------------------------------------------


def _fail(path: Path, what: str) -> NoReturn:
    raise ValueError(f"{path}: {what}")


def _read(path: Path) -> GGUF:
    with open_regular(path) as file:
        header = _Header(path, file)
        header.check_kind()
        tensors, pairs = header.count("tensors", MAX_TENSORS, _LEAST_INFO), header.count("keys", MAX_KEYS, _LEAST_PAIR)
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key, value = header.pair()
            if key in metadata:
                _fail(path, f"key {key} stands twice")
            metadata[key] = value
        infos = [header.info() for _ in range(tensors)]
    return GGUF(path, metadata, _placed(header, infos, _alignment(path, metadata)))


def _alignment(path: Path, metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", 32)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MAX_ALIGNMENT or value & (value - 1):
        _fail(path, f"general.alignment is {short(value)}, expected a power of two up to {_MAX_ALIGNMENT}")
    return value


def _placed(header: _Header, infos: Sequence[TensorInfo], alignment: int) -> dict[str, TensorInfo]:
    """By name, each start counted from the start of the file. One tensor follows the other, up to the alignment."""
    path, data, filled = header.path, -(-header.at // alignment) * alignment, 0
    found: dict[str, TensorInfo] = {}
    for info in infos:
        if info.name in found:
            _fail(path, f"tensor {info.name} stands twice")
        found[info.name] = info._replace(start=data + info.start)
    for info in sorted(infos, key=lambda info: info.start):
        if info.start != filled:
            _fail(path, f"tensor {info.name} begins at byte {info.start} of the data, expected {filled}, where the "
                        f"tensor before it ends at an alignment of {alignment}")
        filled = info.start + -(-info.nbytes // alignment) * alignment
        if data + info.start + info.nbytes > header.size:
            _fail(path, f"tensor {info.name} ends at byte {data + info.start + info.nbytes}, but the file has "
                        f"{header.size}: it is not whole, fetch it again")
    return found


class _Header:
    """A file's bytes up to its data, read as far as they are asked for; `at` is where the next thing begins."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file, self.at = path, file, 0
        self.size = os.fstat(file.fileno()).st_size
        self._held, self._strings = bytearray(), 0

    # ---- bytes ----

    def _reach(self, stop: int, what: str) -> None:
        """Hold the bytes up to `stop`."""
        if stop <= len(self._held):
            return
        if stop > self.size:
            _fail(self.path, f"{what} ends at byte {short(stop)}, but the file has {self.size}: it is damaged or not "
                             "whole")
        if stop > _MAX_HEADER:
            _fail(self.path, f"{what} ends at byte {stop}, expected at most {_MAX_HEADER} bytes before the data")
        wanted = min(max(stop, 2 * len(self._held), _FIRST_READ), self.size, _MAX_HEADER)
        while len(self._held) < wanted:
            piece = self._file.read(wanted - len(self._held))
            if not piece:
                _fail(self.path, f"it ends at byte {len(self._held)} within {what}")
            self._held += piece

    def take(self, nbytes: int, what: str) -> bytes:
        start, self.at = self.at, self.at + nbytes
        self._reach(self.at, what)
        return bytes(self._held[start:self.at])

    def number(self, nbytes: int, what: str) -> int:
        return int.from_bytes(self.take(nbytes, what), "little")

    def text(self, what: str, most: int) -> str:
        """A string of 1 to `most` bytes that names something."""
        length = self.number(8, what)
        if not 1 <= length <= most:
            _fail(self.path, f"{what} has {length} bytes, expected 1 to {most}")
        return self._utf8(self.take(length, what), what)

    def _utf8(self, raw: bytes, what: str) -> str:
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            _fail(self.path, f"{what} is {short(raw)}, expected UTF-8")
        if "\0" in text:
            _fail(self.path, f"{what} is {short(text)}, expected no NUL in it")
        return text

    # ---- what stands there ----

    def check_kind(self) -> None:
        """The magic and the version; ValueError says what the file is instead."""
        magic = self._start(4)
        if magic != MAGIC:
            kind = _OTHER_MAGICS.get(magic) or (_SAFETENSORS if self._start(9)[8:] == b"{" else None)
            _fail(self.path, f"it is {kind}" if kind else f"it begins with {magic!r}, expected {MAGIC!r}: no GGUF file")
        self.at = 4
        version = self.number(4, "the version")
        if not version & 0xFFFF and version:
            _fail(self.path, "it is a big-endian GGUF file, for other machines; get the little-endian one")
        if version == 1:
            _fail(self.path, "version is 1, expected 2 or 3; convert the original model again, or get a newer file")
        if version not in (2, 3):
            _fail(self.path, f"version is {version}, expected 2 or 3")

    def _start(self, nbytes: int) -> bytes:
        self._reach(min(nbytes, self.size), "the magic")
        return bytes(self._held[:nbytes])

    def count(self, what: str, most: int, least_bytes: int) -> int:
        n = self.number(8, f"the number of {what}")
        most = min(most, (self.size - self.at) // least_bytes)
        if n > most:
            _fail(self.path, f"it claims {n} {what}, expected at most {most} in a file of {self.size} bytes")
        return n

    def pair(self) -> tuple[str, Any]:
        key = self.text("a key", _MAX_KEY)
        return key, self._value(key)

    def _value(self, key: str) -> Any:
        kind = self.number(4, f"the type of {key}")
        if kind == _STRING:
            length = self.number(8, key)
            if length > _MAX_STRING:
                _fail(self.path, f"{key} has {length} bytes, expected at most {_MAX_STRING}")
            raw = self.take(length, key)
            try:
                return raw.decode()
            except UnicodeDecodeError:
                _fail(self.path, f"{key} is {short(raw[:_SHOWN])}, expected UTF-8")
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            _fail(self.path, f"{key} has value type {kind}, expected 0 to 12")
        return self._numbers(key, kind, 1)[0].item()

    def _array(self, key: str) -> Any:
        kind, n = self.number(4, f"the type of {key}"), self.number(8, f"the length of {key}")
        if kind != _STRING and kind not in _SCALARS:
            what = "arrays" if kind == _ARRAY else f"value type {kind}"
            _fail(self.path, f"{key} is an array of {what}, expected one of numbers, bools or strings")
        least = 8 if kind == _STRING else np.dtype(_SCALARS[kind]).itemsize
        most = min(_MAX_ARRAY, (self.size - self.at) // least)
        if n > most:
            _fail(self.path, f"{key} claims {n} values, expected at most {most}")
        return self._texts(key, n) if kind == _STRING else self._numbers(key, kind, n)

    def _numbers(self, key: str, kind: int, n: int) -> NDArray[Any]:
        dtype = np.dtype(_SCALARS[kind])
        raw = self.take(n * dtype.itemsize, key)
        if kind == _BOOL and raw.translate(None, b"\0\1"):
            _fail(self.path, f"{key} is {short(raw[:_SHOWN])} as bool, expected bytes 0 or 1")
        return np.frombuffer(raw, dtype)

    def _texts(self, key: str, n: int) -> Strings:
        """n strings, one after the other: only their lengths are looked at, which is what a large vocabulary costs."""
        self._strings += n
        if self._strings > _MAX_ARRAY:
            _fail(self.path, f"{key} makes it {self._strings} strings in all, expected at most {_MAX_ARRAY}")
        start = at = self.at
        stops, length_at = array("q", [0]), struct.Struct("<Q").unpack_from
        for _ in range(n):
            if at + 8 > len(self._held):
                self._reach(at + 8, key)
            length = length_at(self._held, at)[0]
            if length > _MAX_STRING:
                _fail(self.path, f"{key} holds a string of {length} bytes, expected at most {_MAX_STRING}")
            at += 8 + length
            stops.append(at - start)
        return Strings(f"{self.path}: {key}", self.take(at - start, key), stops)

    def info(self) -> TensorInfo:
        """The next tensor's, its start counted from the start of the data."""
        name = self.text("a tensor's name", _MAX_NAME)
        axes = self.number(4, name)
        if axes > _MAX_AXES:
            _fail(self.path, f"tensor {name} has {axes} axes, expected at most {_MAX_AXES}")
        sizes = tuple(self.number(8, name) for _ in range(axes))
        if not all(1 <= n <= _MAX_SIZE for n in sizes) or prod(sizes) > _MAX_NUMBERS:
            _fail(self.path, f"tensor {name} has sizes {short(sizes)}, expected 1 to {_MAX_SIZE} each and a product of "
                             f"at most {_MAX_NUMBERS}")
        kind = self._type(name)
        if (sizes[0] if sizes else 1) % kind.block:
            _fail(self.path, f"tensor {name} has rows of {sizes[:1]} numbers, expected a multiple of {kind.block} for "
                             f"{kind.name}")
        return TensorInfo(self.path, name, kind, sizes[::-1], self.number(8, name))

    def _type(self, name: str) -> Type:
        number = self.number(4, name)
        if number in _REMOVED:
            _fail(self.path, f"tensor {name} has type {number}, {_REMOVED[number]}, which ggml has given up; quantise "
                             "the original model again, or get a newer file")
        if number not in TYPES:
            _fail(self.path, f"tensor {name} has type {number}, which ggml does not have; it may be of a fork")
        return TYPES[number]
