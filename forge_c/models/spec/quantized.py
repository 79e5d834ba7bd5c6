"""What is said of weights that another program has quantised."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forge_c.checks import short

_NAMES = {"awq": "AWQ", "gptq": "GPTQ", "fp8": "FP8", "fbgemm_fp8": "FP8", "modelopt": "ModelOpt", "mxfp4": "MXFP4",
          "mlx": "MLX", "exl2": "EXL2", "exl3": "EXL3", "hqq": "HQQ", "aqlm": "AQLM", "eetq": "EETQ", "spqr": "SpQR"}


def advice(method: str) -> str:
    """Why such weights are not read, and what to get instead."""
    return (f"the weights are quantised by {_NAMES.get(method.lower(), method)}, which is not read: get the model that "
            "they were made from (bfloat16, float16 or float32; dtype=\"int8\" or \"int4\" quantises it as it loads), "
            "or a GGUF file")


def check_not_quantized(config: Mapping[str, Any]) -> None:
    """ValueError for a config.json that says its weights are in another program's format."""
    for key in ("quantization_config", "quantization", "compression_config"):
        value = config.get(key)
        if value is not None:
            method = method_of(value) or ("mlx" if key == "quantization" else short(value))
            raise ValueError(f"config.json: {key}: {advice(method)}; if the file's tensors are none of that, "
                             f"load(..., ignore=({key!r},))")


def method_of(settings: Any) -> str:
    """The name of the method in what a file says of its quantisation, or nothing."""
    if not isinstance(settings, Mapping):
        return ""
    for key in ("quant_method", "quant_algo", "quantization_type"):
        if isinstance(settings.get(key), str):
            return short(settings[key])[1:-1]
    return "bitsandbytes" if settings.get("load_in_4bit") or settings.get("load_in_8bit") else ""
