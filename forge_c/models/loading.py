"""Reads a model folder: config.json and safetensors. Nothing in it is executed or unpickled, and every size is checked
against the file before anything is allocated."""
from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

_MAX_JSON = 16 << 20
_MAX_HEADER = 100 << 20
_MAX_VALUES = 1 << 20  # a parsed value takes up to 100 bytes, however short its text
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_DERIVED = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")  # buffers that older exporters also wrote


def read_json(path: Path, limit: int = _MAX_JSON) -> Any:
    """The JSON in a file of at most `limit` bytes; ValueError names the file."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{path}: {size} bytes, expected at most {limit}")
        return _parse(path, file.read(size))


def _parse(path: Path, text: bytes) -> Any:
    if sum(map(text.count, (b"{", b"[", b","))) > _MAX_VALUES:
        raise ValueError(f"{path}: more than {_MAX_VALUES} values")
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path}: not valid JSON: {reason}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


class Tensors(Protocol):
    """What a decoder takes its weights from."""

    def take(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """A tensor of that shape, float32, float16 or bfloat16; ValueError if there is none."""

    def check_all_taken(self, allowed: tuple[str, ...] = ()) -> None:
        """Raise ValueError if a tensor is left that no one asked for."""


class Checkpoint:
    """The tensors of a folder's safetensors files by name, each read when it is asked for.

    Raises:
        FileNotFoundError: no safetensors file, or a shard that the index names is missing.
        ValueError: a file that is damaged, truncated or names a tensor twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._home: dict[str, Path] = {}
        self._taken: set[str] = set()
        for path, expected in _files(folder):
            names = _header_names(path)
            missing = expected - names
            if missing:
                raise ValueError(f"{path}: tensor {min(missing)} is missing, which the index promises")
            twice = names & self._home.keys()
            if twice:
                raise ValueError(f"{path}: tensor {min(twice)} stands also in {self._home[min(twice)].name}")
            self._home |= dict.fromkeys(names, path)

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def dtypes(self) -> set[str]:
        """safetensors names of the dtypes in use, such as {"BF16"}."""
        found = set()
        for path in set(self._home.values()):
            with self._file(path) as file:
                found |= {file.get_slice(name).get_dtype() for name, home in self._home.items() if home == path}
        return found

    def take(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """A tensor of that shape, float32, float16 or bfloat16.

        Raises:
            ValueError: it is missing, or has another shape or dtype.
        """
        if name not in self._home:
            raise ValueError(f"{self.folder}: tensor {name} is missing")
        path = self._home[name]
        with self._file(path) as file:
            entry = file.get_slice(name)
            found, dtype = tuple(entry.get_shape()), entry.get_dtype()
            if found != shape:
                raise ValueError(f"{path}: {name} has shape {found}, expected {shape} from config.json")
            if dtype not in _DTYPES:
                raise ValueError(f"{path}: {name} has dtype {dtype}, expected one of {', '.join(_DTYPES)}")
            tensor = file.get_tensor(name)
        self._taken.add(name)
        return tensor if tensor.dtype == _DTYPES[dtype] else tensor.view(_DTYPES[dtype])

    def check_all_taken(self, allowed: tuple[str, ...] = ()) -> None:
        """Raise ValueError if the folder holds a tensor that no one asked for: it would have changed the result."""
        left = sorted(n for n in self._home.keys() - self._taken - set(allowed) if not n.endswith(_DERIVED))
        if left:
            raise ValueError(f"{self.folder}: {len(left)} tensors have no place in this model, the first is {left[0]}")

    def _file(self, path: Path) -> Any:
        """Opened anew for each tensor: a file that stays mapped counts, page by page, as this process's memory."""
        try:
            return safe_open(path, "np")
        except SafetensorError as error:
            raise ValueError(f"{path}: {error}") from None


def _files(folder: Path) -> Iterator[tuple[Path, set[str]]]:
    """Each safetensors file and the tensors that the index, if there is one, promises in it."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if not index.exists():
        if not single.exists():
            refused = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".gguf"))
            hint = f"; {refused[0]} is not read: only safetensors is safe to open" if refused else ""
            raise FileNotFoundError(f"{single}: no such file{hint}")
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


def _header_names(path: Path) -> set[str]:
    """Tensor names of a safetensors file whose header is sound; offsets and sizes are checked by safe_open."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"{path}: the header claims {length} bytes of a file of {size}")
        header = _parse(path, file.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header is not an object")
    return header.keys() - {"__metadata__"}
