"""Decoders of well-known sizes with random weights: to measure speed without a checkpoint."""
from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

_LLAMA_1B: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64,
    "max_position_embeddings": 4096, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}
_TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_MAMBA: dict[str, Any] = {
    "model_type": "mamba", "vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24, "state_size": 16,
    "expand": 2, "conv_kernel": 4, "time_step_rank": 48, "tie_word_embeddings": True,
}
_MAMBA2: dict[str, Any] = {
    "model_type": "mamba2", "vocab_size": 50288, "hidden_size": 768, "num_hidden_layers": 24, "state_size": 128,
    "expand": 2, "conv_kernel": 4, "num_heads": 24, "head_dim": 64, "n_groups": 1, "tie_word_embeddings": True,
}
_FALCON_H1: dict[str, Any] = {
    "model_type": "falcon_h1", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "mamba_d_ssm": 96, "mamba_n_heads": 6, "mamba_n_groups": 1,
    "mamba_d_state": 24, "max_position_embeddings": 4096,
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-1.1b": _LLAMA_1B,
    "llama-1.1b-short": _LLAMA_1B | {"num_hidden_layers": 2},
    "llama-1.1b-mod": _LLAMA_1B | {"model_type": "mixture_of_depths", "router_threshold": 1.33},
    "mamba-130m": _MAMBA,
    "mamba2-130m": _MAMBA2,
    "llama-tiny": _LLAMA_1B | _TINY,
    "llama-tiny-mod": _LLAMA_1B | _TINY | {"model_type": "mixture_of_depths", "num_hidden_layers": 4,
                                           "router_threshold": [0.283, 0.235]},
    "mamba-tiny": _MAMBA | {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "time_step_rank": "auto"},
    "mamba2-tiny": _MAMBA2 | {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8,
                              "head_dim": 16, "state_size": 24},
    "falcon-h1-tiny": _FALCON_H1,
}
_BLOCK = 1 << 22  # elements that are drawn once; every tensor is cut from them
_STD = 0.02
# In a model of routers embeddings stand out from what layers add, so that logits are normal, whatever the text: of std
# 512 * 0.02 * sqrt(hidden) * 0.02 / 8. An eighth of all tokens is above 1.15 of that, the shapes' thresholds.
_ROUTED = {"embed_tokens.weight": 512.0, "router.weight": 0.125}


def shape_config(name: str) -> Mapping[str, Any]:
    """The config.json of a shape; ValueError for a name that is not in SHAPES."""
    if name not in SHAPES:
        raise ValueError(f"random_model: shape is {name!r}, expected one of {', '.join(SHAPES)}")
    return SHAPES[name]


class RandomCheckpoint:
    """Holds every tensor that it is asked for: bfloat16, normal with std 0.02, and around 1 for a norm's weight and for
    what a state space lets through.

    The same name and shape give the same values. They are cut from one block of random numbers at random offsets:
    a model of gigabytes is there in seconds. routed: for a model with routers, an eighth of whose tokens go through.
    """

    def __init__(self, routed: bool = False) -> None:
        self._scales = _ROUTED if routed else {}
        drawn = np.random.default_rng(0).standard_normal(_BLOCK, np.float32)
        self._block = (drawn * np.float32(_STD)).astype(ml_dtypes.bfloat16)

    def __contains__(self, name: str) -> bool:
        return True

    def dtypes(self) -> set[str]:
        """As Checkpoint.dtypes."""
        return {"BF16"}

    def take(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """A bfloat16 tensor of that shape."""
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        flat = np.empty(math.prod(shape), ml_dtypes.bfloat16)
        at = 0
        while at < flat.size:
            start = int(rng.integers(_BLOCK // 2))
            piece = self._block[start : start + flat.size - at]
            flat[at : at + piece.size] = piece
            at += piece.size
        if name.endswith(("norm.weight", "mixer.D")):
            flat += ml_dtypes.bfloat16(1)
        for ending, scale in self._scales.items():
            if name.endswith(ending):
                flat *= ml_dtypes.bfloat16(scale)
        return flat.reshape(shape)

    def check_all_taken(self, allowed: tuple[str, ...] = ()) -> None:
        """Nothing can be left over."""
