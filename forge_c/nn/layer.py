"""What every layer shares: calling, parameters, packed matrices as settable attributes, change of weight format.

A matrix is kept packed and nowhere else: reading one decodes it, assigning one packs again, so a layer always shows
the weights it computes with.
"""
from __future__ import annotations

import copy
import math
from abc import ABCMeta
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Self

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c.checks import unmasked
from forge_c.formats.layout import Activations, Dtype, Format, NumPyDtype
from forge_c.functional import PackedWeight
from forge_c.packing import pack, pack_gated

_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))

Seed = int | np.random.Generator | None


def cast_input(layer: Layer, name: str, x: ArrayLike) -> NDArray[Any]:
    """x as an array that the kernels take: float64 and whole numbers become float32, the rest stays as it is."""
    a = np.asarray(unmasked(type(layer).__name__, name, x))
    if a.dtype in _FLOATS:
        return a
    if a.dtype.kind not in "fiu":
        raise TypeError(f"{type(layer).__name__}: {name} has dtype {a.dtype}, expected numbers")
    return a.astype(np.float32)


def parameter_array(layer: Layer, name: str, value: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A read-only float32 copy of a parameter, checked against its shape."""
    a = np.asarray(unmasked(type(layer).__name__, name, value))
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


def _suggestion(name: str, known: Iterable[str]) -> str:
    """"; did you mean W_q?", or nothing."""
    spelt = {one.lower().replace("_", ""): one for one in known if not one.startswith("_")}
    close = get_close_matches(str(name).lower().replace("_", ""), spelt, 1)
    return f"; did you mean {spelt[close[0]]}?" if close else ""


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


class _Sealing(ABCMeta):
    """Seals a layer once it is made, so that a misspelt weight is not taken for a new attribute."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        layer = super().__call__(*args, **kwargs)
        layer._sealed = True
        return layer


class Layer(metaclass=_Sealing):
    """Weights, and a forward that is little more than functional calls. Calling a layer is its forward."""

    _sealed = False

    def __init__(self) -> None:
        self._vectors: dict[str, NDArray[np.float32] | None] = {}
        self._matrices: dict[str, PackedWeight] = {}
        self._widths: dict[str, list[int]] = {}
        self._gated: frozenset[str] = frozenset()
        self._dtype: Dtype = "float32"
        self._activations: Activations | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if self._sealed and not name.startswith("_") and name not in vars(self) and not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{_suggestion(name, dir(self))}")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        sizes = [f"{name}={value!r}" for name, value in vars(self).items()
                 if not name.startswith("_") and isinstance(value, int | float | str)]
        sizes += [f"dtype={self._dtype!r}"] if self._matrices else []
        inner = [f"{name}: {child!r}".replace("\n", "\n  ") for name, child in self._children().items()]
        line = type(self).__name__ + (f"({', '.join(sizes)})" if sizes or not inner else ":")
        return "\n  ".join([line, *inner])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} has no forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    @property
    def dtype(self) -> Dtype:
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

    def load(self, weights: Mapping[str, ArrayLike]) -> Self:
        """Take every parameter from a mapping with the names and shapes of `parameters()`; the layer itself.

        A missing name, one too many or a wrong shape is an error, and the layer stays as it was.

        >>> from forge_c.nn import RMSNorm
        >>> print(RMSNorm(2, eps=0.0).load({"weight": [1.0, 2.0]})([3.0, 4.0]).round(4))
        [0.8485 2.2627]
        """
        name, held = type(self).__name__, self.parameters()
        if not isinstance(weights, Mapping):
            raise TypeError(f"{name}.load: weights is a {type(weights).__name__}, expected a mapping of names to "
                            "arrays")
        for odd in weights:
            if odd not in held:
                raise ValueError(f"{name}.load: weights has {odd!r}{_suggestion(odd, held)} "
                                 f"(expected {', '.join(held)})")
        if missing := [wanted for wanted in held if wanted not in weights]:
            raise ValueError(f"{name}.load: weights lacks {', '.join(missing)}")
        loaded = self.astype(self.dtype, activations=self._activations)  # what fails on the way leaves self as it was
        for path, value in weights.items():
            *inner, last = path.split(".")
            layer = loaded
            for part in inner:
                layer = getattr(layer, part)
            setattr(layer, last, parameter_array(layer, path, value, held[path].shape))
        self._adopt(loaded)
        return self

    @property
    def activations(self) -> str | None:
        """How inputs of the layer's matrices are rounded, see forge_c.pack; None for float formats."""
        return Format.checked("activations", self._dtype, None).checked_activations("activations", self._activations)

    def astype(self, dtype: Dtype | NumPyDtype, *, activations: Activations | None = None) -> Self:
        """A new layer whose matrices are packed as `dtype`; vectors stay float32.

        dtype is "float32", "bfloat16", "int8" or "int4", activations "int8", "int12" or None, see forge_c.pack.

        The two share only arrays that nothing can write to: assigning a weight of one leaves the other as it is.
        What a layer computes has the dtype of its input, whatever the format of its matrices.
        """
        name = f"{type(self).__name__}.astype"
        form = Format.checked(name, dtype, None)
        form.checked_activations(name, activations)
        other = copy.copy(self)
        other._dtype, other._activations = form.dtype, activations
        other._vectors, other._matrices, other._widths = dict(self._vectors), dict(self._matrices), dict(self._widths)
        for packed in self._matrices:
            other._pack(packed, self._parts(packed))
        for name, child in self._children().items():
            setattr(other, name, child.astype(dtype, activations=activations))
        return other

    def _children(self) -> dict[str, Layer]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Layer)}

    def _adopt(self, other: Layer) -> None:
        """Hold what another layer of the same making holds; inner layers stay the objects that they are."""
        for name, value in vars(other).items():
            if isinstance(value, Layer):
                getattr(self, name)._adopt(value)
            else:
                vars(self)[name] = value

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
