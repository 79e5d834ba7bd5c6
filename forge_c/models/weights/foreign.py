"""Folders that are no model in Hugging Face's format, or not in numbers that are read: what to get instead."""
from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from forge_c.checks import short
from forge_c.files import read_json
from forge_c.models.spec.quantized import advice, method_of

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Files in which older programs say what config.json says in newer ones: the object inside that says it, and a name.
_SETTINGS = {"hf_quant_config.json": ("quantization", "ModelOpt"), "quantize_config.json": (None, "GPTQ"),
             "quant_config.json": (None, "AWQ")}
# Ends of the names of tensors that only such a format has.
_TENSORS = {".qweight": "AWQ or GPTQ", ".qzeros": "AWQ or GPTQ", ".q_weight": "EXL2", ".trellis": "EXL3",
            ".absmax": "bitsandbytes", ".SCB": "bitsandbytes", ".weight_packed": "compressed-tensors",
            ".weight_scale": "FP8 or INT8", ".weight_scale_inv": "FP8", "_proj_blocks": "MXFP4", ".scales": "MLX"}


def check_folder(folder: Path, ignored: Collection[str] = ()) -> None:
    """Look at the names of its files.

    Raises:
        FileNotFoundError: it has no config.json, or is an adapter alone.
        ValueError: it says that its weights are in another program's format.
    """
    if (folder / "adapter_config.json").is_file() and not any(folder.glob("model*.safetensors*")):
        raise FileNotFoundError(
            f"load: {folder} is an adapter of {_base_model(folder)}, and no model: merge the two with peft "
            "(AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(DIR)) and load that")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"load: {folder} has no config.json{_instead(folder)}")
    for name, (key, usual) in _SETTINGS.items():
        if (folder / name).is_file() and "quantization_config" not in ignored:
            settings = read_json(folder / name)
            within = settings.get(key) if key and isinstance(settings, dict) else settings
            raise ValueError(f"{folder / name}: {advice(method_of(within) or usual)}; if the folder's tensors are none "
                             "of that, load(..., ignore=(\"quantization_config\",))")


def weights_instead(folder: Path) -> str:
    """What to do where there is no model.safetensors, as the end of a message; or nothing."""
    names = sorted(path.name for path in folder.iterdir())
    shards = [n for n in names if n.startswith("model-") and n.endswith(".safetensors")]
    if shards:
        return f"; {shards[0]} is a part of it, and model.safetensors.index.json, which names them all, is missing"
    pickles = [n for n in names if n.endswith(_PICKLES)]
    found = _instead(folder)
    if pickles and not found:
        return (f"; {pickles[0]} is not read: only safetensors is safe to open; transformers writes it: "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(DIR)")
    return found


def check_tensors(tensors: Iterable[tuple[str, str, Path]]) -> None:
    """ValueError if a tensor (its name, its dtype, its file) is one of another program's format."""
    for name, dtype, path in tensors:
        method = next((m for end, m in _TENSORS.items() if name.endswith(end)), None)
        if method or dtype.startswith("F8_"):
            raise ValueError(f"{path}: tensor {name} is {dtype}: {advice(method or 'FP8')}")


def _instead(folder: Path) -> str:
    """Another format's files in it, as the end of a message; or nothing."""
    names = sorted(path.name for path in folder.iterdir())
    gguf = next((name for name in names if name.endswith(".gguf")), None)
    if gguf is not None:
        return f"; it holds {gguf}: load that file, load({str(folder / gguf)!r})"
    if "params.json" in names or any(name.startswith("consolidated.") for name in names):
        return ("; params.json and consolidated.* are its makers' own format: get the repository's config.json and "
                "model*.safetensors, or convert it with transformers' convert_*_weights_to_hf.py")
    return ""


def _base_model(folder: Path) -> str:
    config: Any = read_json(folder / "adapter_config.json")
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return short(base)[1:-1] if isinstance(base, str) and base else "another model"
