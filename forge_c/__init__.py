"""Transformer components for CPUs: NumPy in, NumPy out.

The functional ops, KVCache, packing and the runtime are names of this package; layers live in forge_c.nn, whole
models in forge_c.models. See README.md.
"""
from __future__ import annotations

import os
from pathlib import Path

from forge_c.functional import (
    PackedWeight,
    attention,
    available_isas,
    embedding,
    gated_linear,
    geglu,
    gelu,
    get_num_threads,
    isa,
    layer_norm,
    linear,
    merge_attention,
    relu,
    rms_norm,
    rope,
    set_num_threads,
    silu,
    softmax,
    swiglu,
    use_isa,
)

if os.environ.get("FORGE_C_ISA"):
    use_isa(os.environ["FORGE_C_ISA"])

from forge_c import models, nn
from forge_c.cache import KVCache, kv_cache_nbytes
from forge_c.pack import pack, pack_gated
from forge_c.rotary import RopeTable, rope_table
from forge_c.runtime import roofline, show_config

from forge_c.version import __version__


def get_include() -> str:
    """The folder of forge.h, for C and Cython code that calls the kernels directly."""
    return str(Path(__file__).parent / "include")


__all__ = [
    "KVCache", "PackedWeight", "RopeTable", "attention", "available_isas", "embedding", "gated_linear", "geglu", "gelu",
    "get_include", "get_num_threads", "isa", "kv_cache_nbytes", "layer_norm", "linear", "merge_attention", "models",
    "nn", "pack", "pack_gated", "relu", "rms_norm", "roofline", "rope", "rope_table", "set_num_threads", "show_config",
    "silu", "softmax", "swiglu", "use_isa",
]
