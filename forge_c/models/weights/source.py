"""Where a decoder's weights come from: tensors by the names that Hugging Face gives them."""
from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


class Tensors(Protocol):
    """What a decoder takes its weights from."""

    def take(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """A tensor of that shape, float32, float16 or bfloat16; ValueError if there is none."""

    def check_all_taken(self, allowed: tuple[str, ...] = ()) -> None:
        """Raise ValueError if a tensor is left that no one asked for."""


class StoredTensors(Tensors, Protocol):
    """Tensors that can also be had as ggml's blocks, as the file stores them."""

    def take_raw(self, name: str, shape: tuple[int, ...]) -> tuple[str, NDArray[np.uint8]]:
        """(type, bytes (rows, bytes of a row)) of a tensor of that shape; ValueError if there is none."""

    def mostly(self) -> str:
        """The format that holds most of the layers' bytes, as a PackedWeight calls it."""


@runtime_checkable
class HoldsDecay(Protocol):
    """Tensors among which is A of a state space itself, where Hugging Face has its logarithm."""

    def take_decay(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A, by the name of its logarithm; ValueError if there is none of that shape."""


def decay(tensors: Tensors, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A of a state space, by the name of its logarithm."""
    if isinstance(tensors, HoldsDecay):
        return tensors.take_decay(name, shape)
    found: NDArray[np.float32] = -np.exp(tensors.take(name, shape).astype(np.float32))
    return found
