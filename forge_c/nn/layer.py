"""What every layer shares: calling, parameters, packed matrices as settable attributes, change of weight format.

A matrix is kept packed and nowhere else: reading one decodes it, assigning one packs again, so a layer always shows
the weights it computes with.
"""
from __future__ import annotations

import copy
import math
from typing import Any, Self

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c.functional import PackedWeight
from forge_c.packing import Format, pack, pack_gated

_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))

Seed = int | np.random.Generator | None


def cast_input(layer: Layer, name: str, x: ArrayLike) -> NDArray[Any]:
    """x as an array that the kernels take: float64 and whole numbers become float32, the rest stays as it is."""
    a = np.asarray(x)
    if a.dtype in _FLOATS:
        return a
    if a.dtype.kind not in "fiu":
        raise TypeError(f"{type(layer).__name__}: {name} has dtype {a.dtype}, expected numbers")
    return a.astype(np.float32)


def parameter_array(layer: Layer, name: str, value: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A read-only float32 copy of a parameter, checked against its shape."""
    a = np.asarray(value)
    if a.dtype not in _FLOATS and a.dtype.kind not in "fiu":
        raise TypeError(f"{type(layer).__name__}: {name} has dtype {a.dtype}, expected numbers")
    if a.shape != shape:
        raise ValueError(f"{type(layer).__name__}: {name} has shape {a.shape}, expected {shape}")
    return read_only(a.astype(np.float32))


def read_only(a: NDArray[Any]) -> NDArray[Any]:
    """`a` itself, made read-only."""
    a.flags.writeable = False
    return a


def uniform(rng: np.random.Generator, fan_in: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the usual start of a linear layer."""
    bound = np.float32(1.0 / math.sqrt(max(fan_in, 1)))
    return bound * (2 * rng.random(shape, np.float32) - 1)


class Vector:
    """A parameter (n,), or None where the layer has none. Assigning checks and copies; reading is read-only."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Layer | None, owner: type) -> Any:
        if layer is None:
            return self
        held = layer._vectors[self.name]
        return None if held is None else read_only(held.view())

    def __set__(self, layer: Layer, value: ArrayLike) -> None:
        held = layer._vectors[self.name]
        if held is None:
            raise AttributeError(f"{type(layer).__name__}: {self.name} is None, this layer was made without it")
        layer._vectors[self.name] = parameter_array(layer, self.name, value, held.shape)


class Matrix:
    """A weight (in, out): some columns of a packed matrix. Assigning repacks; reading unpacks, read-only."""

    def __init__(self, packed: str, part: int = 0) -> None:
        self.packed, self.part = packed, part

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Layer | None, owner: type) -> Any:
        return self if layer is None else read_only(layer._parts(self.packed)[self.part].copy())

    def __set__(self, layer: Layer, value: ArrayLike) -> None:
        parts = layer._parts(self.packed)
        parts[self.part] = parameter_array(layer, self.name, value, parts[self.part].shape)
        layer._pack(self.packed, parts)


class Layer:
    """Weights, and a forward that is little more than functional calls. Calling a layer is its forward."""

    def __init__(self) -> None:
        self._vectors: dict[str, NDArray[np.float32] | None] = {}
        self._matrices: dict[str, PackedWeight] = {}
        self._widths: dict[str, list[int]] = {}
        self._gated: frozenset[str] = frozenset()
        self._dtype = "float32"
        self._activations: str | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} has no forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    @property
    def dtype(self) -> str:
        """The format of the layer's matrices."""
        return self._dtype

    def parameters(self) -> dict[str, NDArray[Any]]:
        """Every parameter by its attribute name; those of inner layers as `inner.name`. Read-only arrays."""
        named = {name: getattr(self, name) for cls in type(self).__mro__ for name, attribute in vars(cls).items()
                 if isinstance(attribute, Matrix | Vector)}
        found = {name: value for name, value in named.items() if value is not None}
        for prefix, child in self._children().items():
            found |= {f"{prefix}.{name}": value for name, value in child.parameters().items()}
        return found

    @property
    def activations(self) -> str | None:
        """How inputs of the layer's matrices are rounded, see forge_c.pack; None for float formats."""
        return Format.checked("activations", self._dtype, None).checked_activations("activations", self._activations)

    def astype(self, dtype: str, *, activations: str | None = None) -> Self:
        """A new layer whose matrices are packed as `dtype`; vectors stay float32.

        dtype is "float32", "bfloat16", "int8" or "int4", activations "int8", "int12" or None, see forge_c.pack.

        The two share only arrays that nothing can write to: assigning a weight of one leaves the other as it is.
        What a layer computes has the dtype of its input, whatever the format of its matrices.
        """
        name = f"{type(self).__name__}.astype"
        Format.checked(name, dtype, None).checked_activations(name, activations)
        other = copy.copy(self)
        other._dtype, other._activations = dtype, activations
        other._vectors, other._matrices, other._widths = dict(self._vectors), dict(self._matrices), dict(self._widths)
        for packed in self._matrices:
            other._pack(packed, self._parts(packed))
        for name, child in self._children().items():
            setattr(other, name, child.astype(dtype, activations=activations))
        return other

    def _children(self) -> dict[str, Layer]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Layer)}

    def _parts(self, packed: str) -> list[NDArray[np.float32]]:
        return np.split(self._matrices[packed].unpack(), np.cumsum(self._widths[packed])[:-1], axis=1)

    def _pack(self, packed: str, parts: list[NDArray[np.float32]], *, gated: bool = False) -> None:
        """Hold `parts` (in, out_i) side by side as one packed matrix; a gated pair alternates panels."""
        self._widths[packed] = [p.shape[1] for p in parts]
        if gated:
            self._gated |= {packed}
        if packed in self._gated:
            self._matrices[packed] = pack_gated(parts[0], parts[1], self._dtype, activations=self._activations)
        else:
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
            self._matrices[packed] = pack(whole, self._dtype, activations=self._activations)

    def _hold_vectors(self, **values: NDArray[np.float32] | None) -> None:
        self._vectors |= {name: None if value is None else read_only(value) for name, value in values.items()}

    def _joined(self, *names: str) -> NDArray[np.float32] | None:
        """The named vectors end to end, or None where the layer has none of them."""
        held = [value for value in map(self._vectors.__getitem__, names) if value is not None]
        return np.concatenate(held) if held else None
