"""Which function reads which model_type."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from forge_c.models.spec.gemma import gemma, gemma2, gemma3, gemma3_with_images
from forge_c.models.spec.kinds import ModelSpec
from forge_c.models.spec.llama import granite, llama, mistral, smollm3
from forge_c.models.spec.phi import phi3
from forge_c.models.spec.qwen import qwen2, qwen3

FAMILIES: Mapping[str, Callable[[Mapping[str, Any]], ModelSpec]] = {
    "llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3, "gemma": gemma, "gemma2": gemma2,
    "gemma3_text": gemma3, "gemma3": gemma3_with_images, "phi3": phi3, "smollm3": smollm3, "granite": granite}


def model_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a config.json.

    Raises:
        ValueError: an unknown model_type, a key that is not understood, or a value out of range.
    """
    if not isinstance(config, Mapping):
        raise ValueError("config.json: expected a JSON object")
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"config.json: model_type is {family!r}, expected one of {', '.join(FAMILIES)}")
    return FAMILIES[family](config)
