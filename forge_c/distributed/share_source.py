"""Matrices of a share, in the formats and with the numbers that the whole has: groups of weights that share a scale
are not cut, unless they can be packed with the scale of the whole group."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from forge_c.formats.ggml import TYPES
from forge_c.formats.layout import ROWS_OF, Activations, Format, PackDtype
from forge_c.formats.rounding import Importance
from forge_c.functional import PackedWeight
from forge_c.models.decoder import STORED
from forge_c.models.inputs import importance_of
from forge_c.models.mix import Formats
from forge_c.models.parts import LayerSource
from forge_c.models.spec import ModelSpec
from forge_c.models.weights import Tensors
from forge_c.models.weights.share import Cut, SharedTensors
from forge_c.packing import pack, rows_of

_LEAST_GROUP = 32  # that int8's can be made


class CutFormats:
    """What each matrix of a model is held in, and where its rows (in_features) may be cut."""

    def __init__(self, spec: ModelSpec, checkpoint: Tensors, dtype: str) -> None:
        self.dtype, self.form = dtype, cast(PackDtype, dtype)
        self._formats, self._checkpoint = Formats(self.form, spec.n_layers), checkpoint

    def of(self, layer: int, name: str, in_features: int) -> PackDtype:
        """The format of a matrix of so many in_features, all of them."""
        return self._formats.of(name, layer, in_features)

    def unit(self, layer: int, name: str, in_features: int) -> int:
        """Its rows are cut at multiples of this."""
        if self.dtype == STORED:
            stored: Any = self._checkpoint
            return TYPES[stored.type_of(f"model.layers.{layer}.{name}.weight")].weights
        found = Format.checked("parallel", self.of(layer, name, in_features), None, ROWS_OF)
        if found.group is None:
            return 1
        return _LEAST_GROUP if found.dtype == "int8" else found.block_k


class SharedSource(LayerSource):
    """The matrices of a layer's share."""

    checkpoint: SharedTensors

    def __init__(self, tensors: SharedTensors, prefix: str, hidden: int, formats: CutFormats, layer: int,
                 activations: Activations | None, importance: Mapping[str, Any] | None) -> None:
        super().__init__(tensors, prefix, hidden, formats.form, activations,
                         lambda name, in_features: formats.of(layer, name, in_features),
                         lambda name: importance_of(importance, prefix, name))

    def packed(self, name: str, rows: int, columns: int) -> PackedWeight:
        cut = self.checkpoint.cut_of(f"{self.prefix}{name}.weight")
        if cut is None or cut.axis == 0:
            return super().packed(name, rows, columns)
        return self._some_rows(name, rows, cut)

    def _some_rows(self, name: str, outputs: int, cut: Cut) -> PackedWeight:
        """Of a matrix (outputs, cut.n) as the file has it, the channels of the cut that go in."""
        form, known, some = self.formats(name, cut.n), self.importance(name), cut.ranges[0]
        wide = _with_whole_groups(form, some, cut.n)
        if known is not None and np.ndim(known) == 2:  # errors of all channels make up for each other
            wide, weighed = range(cut.n), known
        else:
            all_of_it = Importance.checked("load", known, cut.n)
            weighed = None if all_of_it is None else all_of_it.of(wide)
        matrix: NDArray[Any] = self.checkpoint.columns(f"{self.prefix}{name}.weight", (outputs, cut.n), wide)
        rounded = None if form in ("float32", "bfloat16") else self.activations
        with self._naming(name):
            packed = pack(matrix.T, form, activations=rounded, importance=weighed)
        return packed if wide == some else rows_of(packed, range(some.start - wide.start, some.stop - wide.start))


def _with_whole_groups(form: PackDtype, some: range, n: int) -> range:
    """The range of n rows, and the rest of the groups that it cuts."""
    group = Format.checked("parallel", form, None, ROWS_OF).group if form == "int8" else None
    if group is None:
        return some
    return range(some.start // group * group, min(-(-some.stop // group) * group, n))
