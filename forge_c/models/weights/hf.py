"""Reads a model folder: config.json and safetensors. Nothing in it is executed or unpickled, and every size is checked
against the file before anything is allocated.

The safetensors package, whose README has the format, would parse a file's header once a tensor, or keep the file
mapped, which counts as this process's memory: the offsets of one parse serve all tensors here."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from forge_c.checks import short, warn
from forge_c.files import open_regular, parse_json, read_json, read_rows
from forge_c.models.weights.foreign import check_tensors, weights_instead
from forge_c.pages import empty

_MAX_HEADER = 100 << 20
_MAX_HEADER_VALUES = 1 << 19  # of 65 000 tensors in one file
_MAX_METADATA = 4096  # entries that no tensor needs; exporters write one to a few hundred
_MAX_AXES = 64
_PIECE = 1 << 22
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# Of every type that a file may hold, so that each tensor's bytes can be checked, also of those that are not read.
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
         "F8_E5M2FNUZ": 8, "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32,
         "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64}
# Where a text model's tensors lie, as `model.layers.0.` in most files: others are saved without a head's name around
# them, or beside an image encoder.
_PLACES = ("model.", "", "language_model.model.", "model.language_model.", "language_model.")
_OWN = ("embed_tokens.", "layers.", "norm.")
_DERIVED = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")  # buffers that older exporters also wrote


class _Entry(NamedTuple):
    """Where a tensor lies in its file, and its name there."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int


class Checkpoint:
    """The tensors of a folder's safetensors files by name, each read when it is asked for. usual: the name that LLaMA's
    files would give a tensor.

    Raises:
        FileNotFoundError: no safetensors file, or a shard that the index names is missing.
        ValueError: a file that is damaged, truncated, no regular file, names a tensor twice, or holds tensors of
            another program's format.
    """

    def __init__(self, folder: Path, usual: Callable[[str], str] = str) -> None:
        self.folder = folder
        self._entries: dict[str, _Entry] = {}
        self._taken: set[str] = set()
        for path, expected in _files(folder):
            found = _header(path)
            missing = expected - found.keys()
            if missing:
                raise ValueError(f"{path}: tensor {min(missing)} is missing, which the index promises")
            twice = found.keys() & self._entries.keys()
            if twice:
                raise ValueError(f"{path}: tensor {min(twice)} stands also in {self._entries[min(twice)].path.name}")
            self._entries |= found
        self._entries = _renamed(folder, self._entries, usual)
        check_tensors((entry.name, entry.dtype, entry.path) for entry in self._entries.values())
        place = next((p for p in _PLACES if f"{p}embed_tokens.weight" in self._entries), "model.")
        self._entries, others = _text_model(folder, place, self._entries)
        self.is_headless = not place and "lm_head.weight" not in self._entries  # saved without what makes logits
        if others:
            parts = sorted({_part(name) for name in others})
            warn(f"{folder}: the text model alone is read; {len(others)} tensors of {', '.join(parts)} are "
                 "not")

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def has_own_head(self) -> bool:
        """Whether lm_head.weight is there, with other values than the embedding's."""
        head, table = (self._entries.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
        if head is None or table is None:
            return False
        return (head.dtype, head.shape) != (table.dtype, table.shape) or not _same_bytes(head, table)

    def dtypes(self) -> set[str]:
        """safetensors names of the dtypes in use, such as {"BF16"}."""
        return {entry.dtype for entry in self._entries.values()}

    def take(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """A tensor of that shape, float32, float16 or bfloat16.

        Raises:
            ValueError: it is missing, or has another shape or dtype.
        """
        entry = self._entry(name, shape)
        # Read, not mapped: a file that stays mapped counts, page by page, as this process's memory.
        tensor = empty(shape, _DTYPES[entry.dtype])
        with open_regular(entry.path) as file:
            file.seek(entry.start)
            if file.readinto(tensor.reshape(-1).view(np.uint8).data) != tensor.nbytes:  # type: ignore[attr-defined]
                raise ValueError(f"{entry.path}: it ends within {entry.name}")
        self._taken.add(name)
        return tensor

    def take_rows(self, name: str, shape: tuple[int, ...], rows: NDArray[np.intp]) -> NDArray[Any]:
        """These rows of a matrix of that shape; nothing else is read. Errors as of take."""
        return self._part(name, shape, rows, range(shape[1]))

    def take_columns(self, name: str, shape: tuple[int, ...], columns: range) -> NDArray[Any]:
        """These columns, likewise."""
        return self._part(name, shape, np.arange(shape[0]), columns)

    def _part(self, name: str, shape: tuple[int, ...], rows: NDArray[np.intp], columns: range) -> NDArray[Any]:
        entry = self._entry(name, shape)
        dtype = _DTYPES[entry.dtype]
        among = slice(columns.start * dtype.itemsize, columns.stop * dtype.itemsize)
        raw = read_rows(entry.path, entry.name, entry.start, shape[1] * dtype.itemsize, rows, among)
        self._taken.add(name)
        return raw.view(dtype)

    def _entry(self, name: str, shape: tuple[int, ...]) -> _Entry:
        """Where a tensor of that shape lies."""
        entry = self._entries.get(name)
        if entry is None:
            raise ValueError(f"{self.folder}: tensor {name} is missing")
        if entry.shape != shape:
            raise ValueError(f"{entry.path}: {entry.name} has shape {entry.shape}, expected {shape} from config.json")
        if entry.dtype not in _DTYPES:
            raise ValueError(f"{entry.path}: {entry.name} has dtype {entry.dtype}, expected one of "
                             f"{', '.join(_DTYPES)}")
        return entry

    def check_all_taken(self, allowed: tuple[str, ...] = ()) -> None:
        """Raise ValueError if the folder holds a tensor that no one asked for: it would have changed the result."""
        left = sorted(self._entries[n].name for n in self._entries.keys() - self._taken - set(allowed)
                      if not n.endswith(_DERIVED))
        if left:
            raise ValueError(f"{self.folder}: {len(left)} tensors have no place in this model, the first is {left[0]}")


def _files(folder: Path) -> Iterator[tuple[Path, set[str]]]:
    """Each safetensors file and the tensors that the index, if there is one, promises in it."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if not index.exists():
        if not single.exists():
            raise FileNotFoundError(f"{single}: no such file{weights_instead(folder)}")
        yield single, set()
        return
    document = read_json(index, _MAX_HEADER)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: expected an object with a weight_map")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index}: {tensor} is in {shard!r}, expected a .safetensors file of the folder")
        shards.setdefault(shard, set()).add(tensor)
    for shard, tensors in sorted(shards.items()):
        if not (folder / shard).exists():
            raise FileNotFoundError(f"{folder / shard}: no such file, which the index names")
        yield folder / shard, tensors


def _renamed(folder: Path, entries: Mapping[str, _Entry], usual: Callable[[str], str]) -> dict[str, _Entry]:
    found: dict[str, _Entry] = {}
    for name, entry in entries.items():
        if usual(name) in found:
            raise ValueError(f"{folder}: tensors {found[usual(name)].name} and {name} have the same place in the model")
        found[usual(name)] = entry
    return found


def _text_model(folder: Path, place: str, entries: Mapping[str, _Entry]) -> tuple[dict[str, _Entry], list[str]]:
    """(the text model's tensors by the names that most files give them, names of what a larger model has around it)."""
    found: dict[str, _Entry] = {}
    others = []
    for name, entry in sorted(entries.items()):
        if name.startswith(place) and (place or name.startswith(_OWN)):
            usual = f"model.{name[len(place):]}"
        elif name.startswith("language_model.lm_head."):
            usual = name.removeprefix("language_model.")
        elif "language_model" in place and not name.startswith("lm_head."):
            others.append(name)
            continue
        else:
            usual = name
        if usual in found:
            raise ValueError(f"{folder}: tensors {found[usual].name} and {name} have the same place in the model")
        found[usual] = entry
    return found, others


def _part(name: str) -> str:
    """vision_tower of model.vision_tower.encoder.x"""
    return name.removeprefix("model.").split(".")[0]


def _header(path: Path) -> dict[str, _Entry]:
    """The tensors of a safetensors file: together they fill what follows the header, without a gap or an overlap."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"{path}: the header claims {length} bytes of a file of {size}")
        header = parse_json(path, file.read(length), _MAX_HEADER_VALUES)
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header is not an object")
    _check_metadata(path, header.pop("__metadata__", {}))
    found = {name: _entry(path, name, info) for name, info in header.items()}
    filled = 0
    for begin, end, name in sorted((e.start, e.start + _nbytes(e), name) for name, e in found.items()):
        if begin != filled:
            raise ValueError(f"{path}: {name} begins at byte {begin} of the data, expected {filled}, where the tensor "
                             "before it ends")
        filled = end
    if filled != size - 8 - length:
        raise ValueError(f"{path}: {size - 8 - length} bytes follow the header, expected {filled} as it says")
    return {name: entry._replace(start=entry.start + 8 + length) for name, entry in found.items()}


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__ is not an object of texts")
    if len(metadata) > _MAX_METADATA:
        raise ValueError(f"{path}: __metadata__ has {len(metadata)} entries, expected at most {_MAX_METADATA}")


def _entry(path: Path, name: str, info: Any) -> _Entry:
    """What the header says of a tensor, its start counted from the end of the header."""
    if not isinstance(info, Mapping) or not info.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{path}: {name} is described by {short(info)}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{path}: {name} has dtype {short(dtype)}, expected one of {', '.join(_DTYPES)}")
    if not _are_sizes(shape) or len(shape) > _MAX_AXES:
        raise ValueError(f"{path}: {name} has shape {short(shape)}, expected a list of at most {_MAX_AXES} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{path}: {name} has data_offsets {short(offsets)}, expected its begin and its end")
    entry = _Entry(path, name, dtype, tuple(shape), offsets[0])
    if prod(shape) * _BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"{path}: {name} has {offsets[1] - offsets[0]} bytes, expected as many as shape "
                         f"{short(shape)} of {dtype} takes")
    return entry


def _same_bytes(a: _Entry, b: _Entry) -> bool:
    """Of two tensors of one size, piece by piece."""
    with open_regular(a.path) as left, open_regular(b.path) as right:
        left.seek(a.start), right.seek(b.start)
        nbytes = _nbytes(a)
        return all(left.read(min(_PIECE, nbytes - at)) == right.read(min(_PIECE, nbytes - at))
                   for at in range(0, nbytes, _PIECE))


def _nbytes(entry: _Entry) -> int:
    return prod(entry.shape) * _BITS[entry.dtype] // 8


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
