"""A packed model as a folder: what Model.save writes, and what load maps instead of packing again.

    forge_c.json    what the model is, and the objects that compute it, in the order in which they are made
    weights.bin     their arrays, each from a multiple of 64 bytes on, in that order, without gaps beyond that
    and the tokenizer's files

The arrays of packed weights are the panels as the kernels read them. VERSION changes whenever their bytes do; the facts
of the formats that are in use stand in the file besides. A folder is as little trusted as any other: the objects are of
few classes, which check what they are made of, every size is compared with the file's, and nothing is executed.
"""
from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from forge_c.files import new_folder, open_regular, read_json
from forge_c.functional import (
    AttentionPart,
    LayeredModel,
    Mamba2Part,
    MambaPart,
    MLPPart,
    Norm,
    PackedWeight,
    RecurrentPart,
    RGLRUPart,
    Router,
    ShortConvPart,
    _weight_formats,
)
from forge_c.models.decoder import Decoder
from forge_c.models.spec import (
    MLP,
    RGLRU,
    Attention,
    GatedMLP,
    JoinedAttention,
    LayerSpec,
    Mamba,
    Mamba2,
    ModelSpec,
    ShortConv,
)
from forge_c.models.spec.document import from_document, to_document
from forge_c.models.tokenizer_files import save_tokenizer
from forge_c.models.weights.gguf import StoredType
from forge_c.version import __version__

if TYPE_CHECKING:
    from forge_c.models.model import Model

HEADER, WEIGHTS = "forge_c.json", "weights.bin"
_FORMAT, VERSION = "forge_c.Model", 1
_LINE = 64
_PIECE = 1 << 24  # bytes of one write, so that Ctrl-C is heard in between
_MOST_AXES = 4
_DTYPES = {"uint8": np.dtype(np.uint8), "float32": np.dtype(np.float32), "float16": np.dtype(np.float16),
           "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_MADE: Mapping[str, Any] = {"PackedWeight": PackedWeight, "Norm": Norm, "AttentionPart": AttentionPart,
                            "MLPPart": MLPPart, "MambaPart": MambaPart, "Mamba2Part": Mamba2Part,
                            "ShortConvPart": ShortConvPart, "RGLRUPart": RGLRUPart, "Router": Router}
_PARTS_OF: Mapping[type, Any] = {Attention: AttentionPart, JoinedAttention: AttentionPart, Mamba: MambaPart,
                                 Mamba2: Mamba2Part, ShortConv: ShortConvPart, RGLRU: RGLRUPart, GatedMLP: MLPPart,
                                 MLP: MLPPart}
_ERRORS = (ValueError, TypeError, KeyError, IndexError, OverflowError, AttributeError)


# ---- saving ----


class _Writer:
    """The objects of a model, each after those that it is made of, and their arrays."""

    def __init__(self) -> None:
        self.objects: list[dict[str, Any]] = []
        self.arrays: list[NDArray[Any]] = []
        self._known: dict[int, Any] = {}

    def value(self, value: Any) -> Any:
        """A value as it stands in the header; an array or an object by its number."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        if id(value) not in self._known:
            self._known[id(value)] = self._array(value) if isinstance(value, np.ndarray) else self._object(value)
        return self._known[id(value)]

    def _array(self, array: NDArray[Any]) -> dict[str, int]:
        self.arrays.append(array)
        return {"array": len(self.arrays) - 1}

    def _object(self, made: Any) -> dict[str, int]:
        name = type(made).__name__
        if isinstance(made, PackedWeight):
            arguments: Any = [made.data, *made.__reduce__()[1][1:]]
        else:
            arguments = getattr(made, "arguments", None)
        if name not in _MADE or arguments is None:
            raise ValueError(f"Model.save: the model has a {name}, which no file holds")
        if isinstance(arguments, dict):
            written: Any = {key: self.value(item) for key, item in arguments.items()}
        else:
            written = [self.value(item) for item in arguments]
        self.objects.append({"class": name, "arguments": written})
        return {"object": len(self.objects) - 1}


def save_model(model: Model, folder: str | os.PathLike[str]) -> None:
    """See Model.save."""
    writer, made = _Writer(), model._decoder._model
    if made.ranks is not None:
        raise ValueError("Model.save: the model is one rank's share of a model; load that in one process to save it")
    document = {
        "format": _FORMAT, "version": VERSION, "written_by": __version__, "layout": _layout(packed_weights(made)),
        "spec": to_document(model.config), "dtype": model.dtype, "eos_token_ids": sorted(model.eos_token_ids),
        "generation_config": model.generation_config, "stored": [list(row) for row in model.info],
        "model": [writer.value(part) for part in (made.embedding, made.held, made.norm, made.head)],
        "objects": writer.objects, "arrays": [[array.dtype.name, list(array.shape)] for array in writer.arrays]}
    with new_folder("Model.save", folder) as half:
        _write_arrays(half / WEIGHTS, writer.arrays)
        save_tokenizer(model.tokenizer, half)
        (half / HEADER).write_text(json.dumps(document))


def _write_arrays(path: Path, arrays: list[NDArray[Any]]) -> None:
    total = sum(_room(array.nbytes) for array in arrays)
    with open(path, "xb") as file, tqdm(total=total, desc="saving", unit="B", unit_scale=True, disable=None, delay=2.0,
                                        leave=False) as bar:
        for array in arrays:
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            for start in range(0, len(content), _PIECE):
                file.write(content[start : start + _PIECE])
                bar.update(min(_PIECE, len(content) - start))
            file.write(bytes(_room(len(content)) - len(content)))
        file.flush()
        os.fsync(file.fileno())


def _room(nbytes: int) -> int:
    return -(-nbytes // _LINE) * _LINE


def packed_weights(model: LayeredModel) -> Iterator[PackedWeight]:
    """All packed weights of a model."""
    for part in model.parts:
        for value in (part.arguments or {}).values():
            yield from (one for one in (value if isinstance(value, list | tuple) else [value])
                        if isinstance(one, PackedWeight))
    yield from (one for one in (model.embedding, model.head) if isinstance(one, PackedWeight))


def _layout(weights: Iterator[PackedWeight]) -> dict[str, Any]:
    """The facts that the bytes of those weights follow."""
    formats, used = _weight_formats(), {weight.dtype for weight in weights}
    rows = {name: row for name, row in formats["rows"].items() if name.split()[0] in used}
    return {"panel": formats["panel"], "line": formats["line"], "rows": rows}


# ---- loading ----


def is_saved(folder: Path) -> bool:
    """Whether Model.save wrote it."""
    return (folder / HEADER).is_file()


Loaded = tuple[Decoder, frozenset[int], dict[str, Any], tuple[StoredType, ...]]


def load_saved(folder: Path, dtype: str) -> Loaded:
    """(decoder, end tokens, generation_config, info) of a folder that Model.save wrote.

    Raises:
        OSError: a file cannot be read.
        ValueError: it is damaged, packed by another version, or in another dtype than the one asked for.
    """
    document = read_json(folder / HEADER)
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise ValueError(f"load: {folder / HEADER} is not what Model.save writes")
    if document.get("version") != VERSION:
        raise ValueError(f"load: {folder} was packed by version {document.get('version')!r} of the format, expected "
                         f"{VERSION}; load the model that it was made of, and save it again")
    if dtype not in ("auto", document.get("dtype")):
        held = document.get("dtype")
        raise ValueError(f"load: {folder} holds {held!r}, not {dtype!r}; load the model that it was made of")
    try:
        return _loaded(folder, document)
    except _ERRORS as error:
        reason = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"load: {folder} is damaged: {reason.removeprefix('load: ')}") from None


def _loaded(folder: Path, document: dict[str, Any]) -> Loaded:
    spec = from_document(document["spec"])
    arrays = _map(folder / WEIGHTS, document["arrays"])
    made: list[Any] = []
    for one in document["objects"]:
        arguments = one["arguments"]
        kind = _MADE[one["class"]]
        if isinstance(arguments, list):
            made.append(kind(*(_read(item, arrays, made) for item in arguments)))
        else:
            made.append(kind(**{key: _read(item, arrays, made) for key, item in arguments.items()}))
    embedding, layers, norm, head = (_read(item, arrays, made) for item in document["model"])
    model = LayeredModel(embedding, [tuple(layer) for layer in layers], norm, head, embedding_scale=spec.embed.scale)
    _check_model(spec, model)
    found = _layout(packed_weights(model))
    if document["layout"] != json.loads(json.dumps(found)):
        raise ValueError(f"its formats lie otherwise than this version's: {document['layout']}, expected {found}; load "
                         "the model that it was made of, and save it again")
    eos, settings = document["eos_token_ids"], document["generation_config"]
    if not all(type(i) is int for i in eos) or not isinstance(settings, dict) or not isinstance(document["dtype"], str):
        raise ValueError(f"eos_token_ids is {eos!r} and generation_config {settings!r}")
    stored = tuple(StoredType(*row) for row in document["stored"])
    if not all([type(value) for value in row] == [str, int, int, str] for row in stored):
        raise ValueError(f"stored is {document['stored']}")
    return Decoder.of(spec, document["dtype"], model), frozenset(eos), settings, stored


def _map(path: Path, listed: Any) -> list[NDArray[Any]]:
    """The arrays of the file, mapped for reading: [dtype, shape] of each. ValueError unless they fill it."""
    sizes = []
    for dtype, shape in listed:
        if len(shape) > _MOST_AXES or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
            raise ValueError(f"an array has shape {shape}")
        sizes.append(_DTYPES[dtype].itemsize * prod(shape))
    with open_regular(path) as file:
        size, expected = os.fstat(file.fileno()).st_size, sum(map(_room, sizes))
        if size != expected or not size:
            raise ValueError(f"{path} has {size} bytes, expected {expected}")
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_WILLNEED"):
        mapped.madvise(mmap.MADV_WILLNEED)
    whole, arrays, start = np.frombuffer(mapped, np.uint8), [], 0
    for (dtype, shape), nbytes in zip(listed, sizes, strict=True):
        arrays.append(whole[start : start + nbytes].view(_DTYPES[dtype]).reshape(shape))
        start += _room(nbytes)
    return arrays


def _read(value: Any, arrays: list[NDArray[Any]], made: list[Any]) -> Any:
    """A value of the header; what it refers to is there already."""
    if isinstance(value, list):
        return tuple(_read(item, arrays, made) for item in value)
    if not isinstance(value, dict):
        return value
    (kind, number), = value.items()
    if type(number) is not int or number < 0:
        raise ValueError(f"the header refers to {value}")
    return {"array": arrays, "object": made}[kind][number]


def _check_model(spec: ModelSpec, model: LayeredModel) -> None:
    """ValueError unless the parts are what the spec says: the caches are made by it."""
    if len(model.held) != spec.n_layers or (model.head.shape != (spec.hidden_size, spec.vocab_size)):
        raise ValueError(f"{len(model.held)} layers and a head of {model.head.shape}, expected {spec.n_layers} and "
                         f"{(spec.hidden_size, spec.vocab_size)}")
    for i, (layer, (mixer, mlp, parallel, scale, *more)) in enumerate(zip(spec.layers, model.held, strict=True)):
        router, beside, *ahead = [*more, None, None, None, None][:4]
        _check_router(i, layer, router)
        if (parallel, scale) != (layer.parallel, layer.residual_scale):
            raise ValueError(f"layer {i} is {(parallel, scale)}, expected {(layer.parallel, layer.residual_scale)}")
        kinds: list[Any] = [layer.mixer, layer.mlp, layer.beside, None, None]
        if layer.ahead is not None:
            kinds[3:] = layer.ahead.attention, layer.ahead.mlp
        for part, kind in zip((mixer, mlp, beside, *ahead), kinds, strict=True):
            _check_part(i, part, kind)


def _check_part(i: int, part: Any, kind: Any) -> None:
    """ValueError unless the part computes the kind of layer i's spec."""
    if not isinstance(part, _PARTS_OF.get(type(kind), type(None))):
        raise ValueError(f"layer {i} has {part}, expected {kind}")
    expected = _arguments(kind)
    found = {name: part.arguments[name] for name in expected}
    if found != expected:
        raise ValueError(f"layer {i} is {found}, expected {expected}")
    if isinstance(part, RecurrentPart) and part.floats != kind.floats:
        raise ValueError(f"layer {i} remembers {part.floats} numbers, expected {kind.floats}")


def _check_router(i: int, layer: LayerSpec, router: Any) -> None:
    """ValueError unless layer i has one where the spec does, of its threshold and predictor."""
    found = expected = None
    if router is not None:
        up = router.arguments["up"]
        found = router.arguments["threshold"], None if up is None else up.shape[1]
    if layer.router is not None:
        expected = layer.router.threshold, layer.router.predictor
    if found != expected:
        raise ValueError(f"layer {i} has a router of {found}, expected {expected}")


def _arguments(kind: Any) -> dict[str, Any]:
    """Of the part that computes the kind, the arguments that the spec decides."""
    if isinstance(kind, GatedMLP | MLP):
        return {"activation": kind.activation}
    if isinstance(kind, Attention):
        return {"heads": kind.n_heads, "kv_heads": kind.n_kv_heads, "head_dim": kind.head_dim, "scale": kind.scale,
                "softcap": kind.softcap or 0.0, "window": kind.window}
    if isinstance(kind, RGLRU):
        return {"heads": kind.heads, "activation": kind.activation}
    if isinstance(kind, Mamba2):
        return {"heads": kind.heads, "groups": kind.groups, "n": kind.state, "dt_min": kind.dt_min,
                "dt_max": kind.dt_max, "norm_before_gate": kind.norm_before_gate}
    return {}
