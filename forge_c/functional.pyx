# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""The border: every op as one function over NumPy arrays.

Each function checks its arguments, allocates the result unless `out=` is given, lets the GIL go and makes one call
into src_c. Conventions (axis order, dtypes, errors, `out=`) are in docs/conventions.md.
"""
cimport cython
cimport numpy as cnp
from libc.math cimport INFINITY
from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int64_t, uint8_t
from libc.string cimport memset

from forge_c._c cimport *

import os
from operator import index

import ml_dtypes
import numpy as np

from forge_c.rotary import RopeTable
from forge_c.threads import default_threads

cnp.import_array()

cdef extern from "Python.h":
    const Py_ssize_t PY_SSIZE_T_MAX

cdef enum:
    MAX_AXES = 64  # of NumPy

include "border/arrays.pxi"
include "border/runtime.pxi"
include "border/norms.pxi"
include "border/activations.pxi"
include "border/rope.pxi"
include "border/linear.pxi"
include "border/route_tokens.pxi"
include "border/writer.pxi"
include "border/cache.pxi"
include "border/attention.pxi"
include "border/states.pxi"
include "border/conv1d.pxi"
include "border/scan.pxi"
include "border/ssd.pxi"
include "border/rg_lru.pxi"
include "border/gated_delta.pxi"
include "border/s4d.pxi"
include "border/ranks.pxi"
include "border/parts.pxi"
include "border/decoder.pxi"
include "border/state_space.pxi"

set_num_threads(default_threads(_bound_cpus())[0])
if os.environ.get("FORGE_C_ISA"):
    use_isa(os.environ["FORGE_C_ISA"])

# Not KVPages, pack_columns, and what models are built from: what checks their arguments is the package above them.
__all__ = [
    "KV_CHUNK", "PackedWeight", "attention", "available_isas", "causal_conv1d", "embedding", "gated_delta",
    "gated_linear", "geglu", "gelu", "get_num_threads", "isa", "layer_norm", "linear", "merge_attention", "relu",
    "rg_lru", "rms_norm", "rope", "route_tokens", "s4d_kernel", "s4d_scan", "selective_scan", "set_num_threads", "silu",
    "softmax", "ssd_scan", "swiglu", "use_isa",
]
