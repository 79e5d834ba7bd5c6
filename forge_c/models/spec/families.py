"""Which function reads which model_type."""
from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from forge_c.models.spec.gemma import gemma, gemma2, gemma3, gemma3_with_images
from forge_c.models.spec.griffin import recurrent_gemma
from forge_c.models.spec.hybrid import bamba, falcon_h1, granitemoehybrid, lfm2, nemotron_h
from forge_c.models.spec.kinds import ModelSpec
from forge_c.models.spec.llama import granite, llama, mistral, smollm3
from forge_c.models.spec.mamba import falcon_mamba, mamba, mamba2
from forge_c.models.spec.mixture_of_depths import mixture_of_depths
from forge_c.models.spec.phi import phi3
from forge_c.models.spec.quantized import check_not_quantized
from forge_c.models.spec.qwen import qwen2, qwen3
from forge_c.models.spec.zamba import zamba2
from forge_c.rotary import rope_table

FAMILIES: Mapping[str, Callable[[Mapping[str, Any]], ModelSpec]] = {
    "llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3, "gemma": gemma, "gemma2": gemma2,
    "gemma3_text": gemma3, "gemma3": gemma3_with_images, "phi3": phi3, "smollm3": smollm3, "granite": granite,
    "mixture_of_depths": mixture_of_depths, "mamba": mamba, "falcon_mamba": falcon_mamba, "mamba2": mamba2,
    "bamba": bamba, "falcon_h1": falcon_h1, "granitemoehybrid": granitemoehybrid, "lfm2": lfm2,
    "nemotron_h": nemotron_h, "recurrent_gemma": recurrent_gemma, "zamba2": zamba2}


def model_spec(config: Mapping[str, Any], ignore: Collection[str] = ()) -> ModelSpec:
    """The spec of a config.json; keys named in `ignore` count as absent, also within its objects.

    Raises:
        ValueError: an unknown model_type, weights of another program's format, a key that is not understood, or a
            value out of range.
    """
    if not isinstance(config, Mapping):
        raise ValueError("config.json: expected a JSON object")
    config = _without(config, ignore) if ignore else config
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"config.json: model_type is {family!r}, expected one of {', '.join(FAMILIES)}")
    check_not_quantized(config)
    spec = FAMILIES[family](config)
    _check_rotations(spec)
    return spec


def _without(config: Mapping[str, Any], ignore: Collection[str]) -> dict[str, Any]:
    return {key: _without(value, ignore) if isinstance(value, Mapping) else value
            for key, value in config.items() if key not in ignore}


def _check_rotations(spec: ModelSpec) -> None:
    """An impossible rotation is an error of the file, before any weight is read."""
    rotations = [getattr(mixer, "rope", None) for layer in spec.layers for mixer in layer.mixers]
    for i, rope in enumerate(rotations):
        if rope is not None and rope not in rotations[:i]:
            try:
                rope_table(rope.dim, 1, rope.theta, scaling=rope.scaling)
            except ValueError as error:
                raise ValueError(f"config.json: {error}; load(..., ignore=(KEY,)) loads the model without a key"
                                 ) from None
