"""One Hugging Face config.json, read with the defaults of its family; every value comes out checked.

A key that nobody knows is an error, because it could change the maths; so is a known key with a value that the decoder
cannot compute.
"""
from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from forge_c.checks import short
from forge_c.models.spec.inert import without_effect

MAX_LAYERS, MAX_HEADS, MAX_VOCAB, MAX_WIDTH = 1024, 1024, 1 << 22, 1 << 20

# Defaults of the Hugging Face configuration classes, where many families agree.
COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 2048}
WINDOWED = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
BIASES = {"attention_bias": False, "mlp_bias": False}

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL = ("num_key_value_heads", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
             "head_dim")


class Reader:
    """One config.json and the defaults of its family; every number comes out checked."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.model_type: str = config["model_type"]
        self.given, self.defaults = config, defaults
        self._reject_unknown()

    def _reject_unknown(self) -> None:
        known = set(self.defaults) | set(_REQUIRED) | set(_OPTIONAL)
        for key, value in self.given.items():
            if key not in known and not without_effect(key, self.given):
                raise ValueError(f"config.json: {short(key)[1:-1]} is {short(value)}, which may change the maths and "
                                 f"is not understood for model_type {self.model_type}; "
                                 f"load(..., ignore=({short(key)},)) loads the model without it")

    def value(self, key: str) -> Any:
        """What the file says, else the family's default. A JSON null is a value of its own."""
        return self.given[key] if key in self.given else self.defaults.get(key)

    def integer(self, key: str, most: int, default: int | None = None) -> int:
        value = self.value(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"config.json: {key} is {short(value)}, expected an integer from 1 to {most}")
        return value

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        value = self.value(key)
        return checked_number(key, default if value is None else value, zero=zero)

    def optional_number(self, key: str) -> float | None:
        return None if self.value(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        value = self.value(key)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"config.json: {key} is {short(value)}, expected true or false")
        return bool(value)

    def mapping(self, key: str) -> dict[str, Any]:
        """An object of the file without its nulls; empty where there is none."""
        return checked_mapping(key, self.given.get(key))

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.given.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise ValueError(f"config.json: {key} is {short(value)}, expected token ids")
        return tuple(i for i in ids if i >= 0)

    def per_layer(self, key: str, layers: int, allowed: tuple[Any, ...]) -> list[Any] | None:
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != layers or any(v not in allowed for v in value):
            expected = " or ".join(map(str, allowed))
            raise ValueError(f"config.json: {key} is {short(value)}, expected {layers} times {expected}")
        return value


def checked_number(key: str, value: Any, *, zero: bool = False, most: float = sys.float_info.max) -> float:
    """What stands under `key`, a finite number above 0, or 0 too; at most `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value <= most or zero and value == 0):
        expected = f"{'>=' if zero else 'above'} 0" + (f" and at most {most:g}" if most < sys.float_info.max else "")
        raise ValueError(f"config.json: {key} is {short(value)}, expected a number {expected}")
    return float(value)


def checked_mapping(key: str, value: Any) -> dict[str, Any]:
    """What stands under `key`, an object or null, without its nulls."""
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"config.json: {key} is {short(value)}, expected an object")
    return {k: v for k, v in (value or {}).items() if v is not None}
