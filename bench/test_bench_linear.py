"""linear with the weights of an MLP, up and down, in every packed format: from one token to a prompt."""
from __future__ import annotations

import pytest

# Bytes a weight; int4-32 is llama.cpp's Q4_0, int4 has a minimum beside the scale of each 64.
BYTES = {"float32": 4, "bfloat16": 2, "int8": 8.25 / 8, "int4": 4.5 / 8, "int4-32": 4.5 / 8}
SMALL = [(4096, 11008, 1)]
LARGE = [*((4096, 11008, rows) for rows in (4, 8, 16, 32, 128, 512)), (2048, 16384, 2048), (5632, 2048, 1),
         (5632, 2048, 512)]


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize(("k", "n", "rows"), [*SMALL, *(pytest.param(*c, marks=pytest.mark.large) for c in LARGE)])
def test_linear(bench, normal, k, n, rows, dtype):
    bench("linear", normal(rows, k), normal(k, n, scale=k ** -0.5), case=f"linear {k} -> {n}, M {rows}", dtype=dtype,
          read=int(k * n * BYTES[dtype]) + 4 * rows * k, written=4 * rows * n, flops=2 * rows * k * n)
