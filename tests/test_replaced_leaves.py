"""An ISA may replace a leaf: a double that does is compiled here, and AVX-512's own replacement gives the same bits."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from child import compile_c

import forge_c as fc

pytestmark = pytest.mark.slow

SOURCES = Path(__file__).parents[1] / "src_c"
LEAVES = """
static int products, halves;
static void counted_gemm(const struct fc_gemm *g) {
    products++;
    gemm_f32(g);
}
static void counted_relu(void *out, const void *x, ptrdiff_t n, struct fc_stream *stream) {
    halves++;
    relu_f16(out, x, n, stream);
}
#define FC_REPLACED .gemm_f32 = counted_gemm, .relu[FC_F16] = counted_relu,
"""
DOUBLE = """
#define FC_ISA "double"
#define FC_TABLE fc_kernels_double
#define FC_BYTES 16
#define FC_LEAVES "double_leaves.h"
#include "isa/all.h"

/* x (1, 1) times a panel, and a relu in each dtype: what ran, as digits */
int double_calls(float *c, const float *x, const float *w) {
    const struct fc_gemm g = {.c = c, .ldc = 64, .x = x, .ldx = 4, .w = w, .panel_stride = 64, .m = 1, .panels = 1,
                              .lines = 1};
    char zeros[64] = {0};
    products = halves = 0;
    fc_kernels_double.gemm_f32(&g);
    for (int type = 0; type < FC_DTYPES; type++) fc_kernels_double.relu[type](zeros, zeros, 4, NULL);
    const int others = fc_kernels_double.gemm_bf16 == gemm_bf16 && fc_kernels_double.relu[FC_F32] == relu_f32;
    return products * 100 + halves * 10 + others;
}
"""


def test_a_double_runs_the_leaves_that_it_replaces(tmp_path):
    """And the others, of the common text, which its own may call."""
    (tmp_path / "double_leaves.h").write_text(LEAVES)
    (tmp_path / "double.c").write_text(DOUBLE)
    library = tmp_path / "double.so"
    compile_c("-std=gnu11", "-O0", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{SOURCES}", f"-I{tmp_path}",
              tmp_path / "double.c", "-o", library, "-lm")
    c, x, w = np.zeros(16, np.float32), np.array([2], np.float32), np.arange(16, dtype=np.float32)
    pointers = (a.ctypes.data_as(ctypes.c_void_p) for a in (c, x, w))
    assert ctypes.CDLL(str(library)).double_calls(*pointers) == 111
    np.testing.assert_array_equal(c, 2 * w)


@pytest.mark.parametrize("byte", [1, 2, 255])
def test_a_mask_of_bytes_is_one_of_floats(isa, rng, byte):
    """Keys on both sides of whole vectors and chunks; any byte but 0 shows a key."""
    for n in (*range(1, 50), 255, 256, 257, 300):
        q, kv = rng.standard_normal((1, 3, 2, 8), np.float32), rng.standard_normal((1, n, 2, 8), np.float32)
        shown = rng.random((3, n)) < 0.7
        mask = (shown * np.uint8(byte)).view(bool)
        floats = np.where(shown, 0, -np.inf).astype(np.float32)
        assert fc.attention(q, kv, kv, mask=mask).tobytes() == fc.attention(q, kv, kv, mask=floats).tobytes(), n
