# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""The border: every op as one function over NumPy arrays.

Each function checks its arguments, allocates the result unless `out=` is given, lets the GIL go and makes one call
into src_c. Conventions (axis order, dtypes, errors, `out=`) are in docs/conventions.md.
"""
cimport numpy as cnp
from cpython.exc cimport PyErr_Occurred
from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int64_t
from libc.string cimport memset

from forge_c._c cimport *

import ml_dtypes
import numpy as np

cnp.import_array()

include "border/arrays.pxi"
include "border/runtime.pxi"
include "border/norms.pxi"
include "border/activations.pxi"
include "border/rope.pxi"
include "border/linear.pxi"
include "border/attention.pxi"

__all__ = [
    "KV_CHUNK", "PackedWeight", "attention", "embedding", "gated_linear", "geglu", "gelu", "layer_norm", "linear",
    "merge_attention", "relu", "rms_norm", "rope", "silu", "softmax", "swiglu",
]
