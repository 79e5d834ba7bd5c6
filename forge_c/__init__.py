"""Transformer components for CPUs: NumPy in, NumPy out.

The functional ops, KVCache, packing and the runtime are names of this package; layers live in forge_c.nn, whole
models in forge_c.models. See README.md. Names are imported when they are first used: `import forge_c` is instant.
"""
from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from forge_c.version import __version__

_HOME = {
    name: module
    for module, names in {
        "functional": "PackedWeight attention available_isas causal_conv1d embedding gated_delta gated_linear geglu "
                      "gelu get_num_threads isa layer_norm linear merge_attention relu rg_lru rms_norm rope "
                      "route_tokens s4d_kernel s4d_scan selective_scan set_num_threads silu softmax ssd_scan swiglu "
                      "use_isa",
        "state.kv": "KVCache kv_cache_nbytes",
        "packing": "pack pack_gated",
        "rotary": "RopeTable rope_table",
        "runtime": "roofline show_config",
    }.items()
    for name in names.split()
}
_SUBPACKAGES = ("distributed", "integrations", "models", "nn", "packing")

__all__ = ["__version__", "get_include", "get_library_dir", *_SUBPACKAGES, *_HOME]


def __getattr__(name: str) -> Any:
    if name in (*_SUBPACKAGES, "functional"):
        return _imported(name)
    if name not in _HOME:
        raise AttributeError(f"module 'forge_c' has no attribute {name!r}")
    value = globals()[name] = getattr(_imported(_HOME[name]), name)
    return value


def _imported(name: str) -> ModuleType:
    try:
        return import_module(f"forge_c.{name}")
    except ModuleNotFoundError as error:
        if error.name != "forge_c.functional":
            raise
        raise ImportError(f"forge_c: {Path(__file__).parent} is the source, where nothing is compiled; run `make` or "
                          "`pip install -e .` in it, or start Python in another folder") from error


def __dir__() -> list[str]:
    return sorted(__all__)


def get_include() -> str:
    """The folder of forge.h, for C and Cython code that calls the kernels directly."""
    return str(Path(__file__).parent / "include")


def get_library_dir() -> str:
    """The folder of libforge_c.so, for C and Cython code: -L<folder> -lforge_c -Wl,-rpath,<folder>."""
    return str(Path(__file__).parent)
