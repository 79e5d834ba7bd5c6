"""Hugging Face models on the CPU with forge_c's kernels.

`register()` adds the attention implementation "forge_c"; `accelerate(model)` also swaps norms, rotary positions, gated
MLPs and projections of a loaded model, and `restore(model)` undoes it. See docs/integrations.md.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

try:
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers import __version__ as _transformers_version

    from forge_c.formats.layout import FORMATS, Dtype
    from forge_c.integrations import attention as _attention
    from forge_c.integrations import modules as _modules
    from forge_c.integrations.tensors import check
except ImportError as error:
    raise ImportError("forge_c.integrations.transformers needs torch and transformers 5.4 or later; "
                      f"pip install 'forge_c[transformers]' ({error})") from error

if tuple(map(int, _transformers_version.split(".")[:2])) < (5, 4):
    raise ImportError("forge_c.integrations.transformers needs transformers 5.4 or later, "
                      f"found {_transformers_version}; pip install 'forge_c[transformers]'")

__all__ = ["Swaps", "accelerate", "register", "restore"]


@dataclass
class Swaps:
    """What accelerate() has swapped in a model; its attribute `forge_c_swaps`."""

    norms: int = 0              # RMSNorm modules
    rotary: int = 0             # rotary embedding modules whose angles our rope applies
    mlps: int = 0               # gated MLPs
    linears: int = 0            # projections of attention modules, and the last one onto the vocabulary
    attention: bool = False     # whether the model's attention implementation is now "forge_c"
    pack: str | None = None     # the format of the packed copies; None: torch's own weights are read
    packed_nbytes: int = 0      # memory of those copies, beside torch's weights
    _patches: list[Any] = field(default_factory=list, repr=False)
    _implementations: Any = field(default=None, repr=False)


def register() -> None:
    """Add "forge_c" to transformers' AttentionInterface and AttentionMaskInterface; again is no harm.

    Then `from_pretrained(..., attn_implementation="forge_c")` and `model.set_attn_implementation("forge_c")` work for
    every model that transformers lets choose. Inference on the CPU in float32, bfloat16 or float16; anything else is an
    error that says what came.

    Example:

        from forge_c.integrations.transformers import register
        register()
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="forge_c")
    """
    AttentionInterface.register(_attention.NAME, _attention.attention)
    AttentionMaskInterface.register(_attention.NAME, _attention.mask)


def accelerate(model: Any, *, pack: Dtype | None = None) -> Any:
    """Swap forge_c's kernels into a loaded model, in place: attention, RMSNorms, rotary positions, gated MLPs, the
    projections of attention modules and the last one.

    Args:
        model: a Hugging Face model on the CPU with float32, bfloat16 or float16 parameters: Llama, Mistral, Qwen2,
            Qwen3, Gemma, Gemma2, Phi3, SmolLM3, Granite; others as far as their modules are recognised.
        pack: None reads torch's own weights where they lie. "float32", "bfloat16", "int8" or "int4" packs copies of
            the matrices for the kernels, see forge_c.pack: faster, above all token by token, but torch's weights are
            kept, so that the copies' memory (`model.forge_c_swaps.packed_nbytes`) comes on top. int8 and int4, and
            bfloat16 for a float32 model, change what the model says; the last projection of an int4 model is int8.

    Returns:
        The model. `model.forge_c_swaps` counts what was swapped. A module is swapped when it has exactly the parts of
        its kind and computes the same as ours on a probe; all others are left alone. Weights are looked up at every
        call, so that loading a state dict works, or merging an adapter; packed copies are made anew then. Only a few
        numbers changed through `weight.data` may go unnoticed: then `accelerate(restore(model), pack=...)`.

    Raises:
        TypeError: not a torch module, or parameters of another dtype.
        ValueError: parameters on another device, an unknown format, a model that is accelerated already or that has
            nothing to swap. The model is then as it was.

    Example:

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        accelerate(model, pack="bfloat16")
        model.generate(**tokenizer("def f", return_tensors="pt"))
    """
    _check_model(model, pack)
    swaps = Swaps(pack=pack, _patches=_modules.patches(model, pack))
    swaps.packed_nbytes = sum(patch.nbytes() for patch in swaps._patches)
    if hasattr(model, "set_attn_implementation"):
        register()
        swaps._implementations = _implementations(model.config)
        model.set_attn_implementation(_attention.NAME)
        swaps.attention = model.config._attn_implementation == _attention.NAME
    if not swaps._patches and not swaps.attention:
        raise ValueError(f"accelerate: {type(model).__name__} has no RMSNorm, rotary embedding, gated MLP or attention "
                         "that could be swapped")
    for patch in swaps._patches:
        setattr(swaps, patch.counted, getattr(swaps, patch.counted) + 1)
    _modules.install(model, swaps._patches)
    model.forge_c_swaps = swaps
    return model


def restore(model: Any) -> Any:
    """Undo accelerate(): the model's own forwards and attention implementation. ValueError if it is not accelerated."""
    swaps = getattr(model, "forge_c_swaps", None)
    if not isinstance(swaps, Swaps):
        raise ValueError(f"restore: {type(model).__name__} is not accelerated")
    for patch in swaps._patches:
        patch.remove()
    if swaps.attention:
        model.set_attn_implementation(swaps._implementations)
    del model.forge_c_swaps
    return model


def _check_model(model: Any, pack: str | None) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"accelerate: model is a {type(model).__name__}, expected a torch module")
    if pack is not None and pack not in FORMATS:
        raise ValueError(f"accelerate: pack is {pack!r}, expected None or one of {', '.join(FORMATS)}")
    if hasattr(model, "forge_c_swaps"):
        raise ValueError(f"accelerate: {type(model).__name__} is accelerated already; call restore(model) first")
    for name, weight in model.named_parameters():
        if weight.is_floating_point():
            check("accelerate", **{name: weight.detach()})


def _implementations(config: Any) -> Any:
    """The attention implementation of a config and its parts, as set_attn_implementation takes it."""
    parts = {key: _implementations(part) for key in config.sub_configs if (part := getattr(config, key)) is not None}
    return {"": config._attn_implementation} | parts if parts else config._attn_implementation
