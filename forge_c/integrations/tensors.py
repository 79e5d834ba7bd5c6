"""Torch tensors as NumPy arrays over the same memory, and the one check of what may go through them."""
from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def array(t: torch.Tensor) -> NDArray[Any]:
    """A CPU tensor as an array of its shape, strides and dtype (bfloat16: ml_dtypes.bfloat16) over its memory."""
    t = t.detach()
    return t.view(torch.int16).numpy().view(_BFLOAT16) if t.dtype is torch.bfloat16 else t.numpy()


def check(name: str, **tensors: torch.Tensor) -> None:
    """TypeError for a dtype, ValueError for a device, RuntimeError for a gradient that the kernels cannot give."""
    for arg, t in tensors.items():
        if t.dtype not in DTYPES:
            raise TypeError(f"{name}: {arg} has dtype {t.dtype}, expected torch.float32, torch.bfloat16 or "
                            "torch.float16; load the model with dtype=torch.float32")
        if t.device.type != "cpu":
            raise ValueError(f"{name}: {arg} is on {t.device}, expected cpu")
    check_no_grad(name, **tensors)


def check_no_grad(name: str, **tensors: torch.Tensor) -> None:
    """RuntimeError if autograd would want to come back through here."""
    if torch.is_grad_enabled():
        for arg, t in tensors.items():
            if t.requires_grad:
                raise RuntimeError(f"{name}: {arg} requires a gradient, expected none: forge_c is inference only; "
                                   "run the model under torch.no_grad() or torch.inference_mode()")


def takes(x: torch.Tensor, *weights: torch.Tensor | None) -> bool:
    """Whether x (..., features) and the weights it meets are for the kernels: one float dtype, CPU, no autocast. How x
    lies in memory does not count: a model would compute by its layout."""
    return (x.dtype in DTYPES and x.device.type == "cpu" and x.dim() > 0
            and all(w is None or (w.dtype is x.dtype and w.device.type == "cpu") for w in weights)
            and not torch.is_autocast_enabled("cpu"))


def rows(t: torch.Tensor) -> torch.Tensor:
    """t (..., n) itself, or a copy where its last axis has gaps."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()
