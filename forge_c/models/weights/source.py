"""Where a decoder's weights come from: tensors by the names that Hugging Face gives them."""
from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray


class Tensors(Protocol):
    """What a decoder takes its weights from."""

    def take(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """A tensor of that shape, float32, float16 or bfloat16; ValueError if there is none."""

    def check_all_taken(self, allowed: tuple[str, ...] = ()) -> None:
        """Raise ValueError if a tensor is left that no one asked for."""
