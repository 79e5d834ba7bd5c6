"""linear and attention in bfloat16 under 2^-126, where instructions for pairs of bfloat16 know no numbers but 0."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import reference
from conftest import check_close, flushed, multiplies_pairs
from test_attention import check_pair, expected
from test_linear import check_gated

import forge_c as fc

BF16 = ml_dtypes.bfloat16


# Every product is subnormal; one side is, and its products are not, also where they are large next to 2^-126.
@pytest.mark.parametrize(("x", "w"), [(2.0**-64, 2.0**-64), (2.0**-130, 2.0**40), (2.0**40, 2.0**-130)])
@pytest.mark.parametrize("k", [1, 2, 33, 5000])
def test_a_product_of_subnormal_numbers_is_right_or_lost(isa, x, w, k):
    a, b, third = np.full((3, k), x, BF16), np.full((k, 17), w, BF16), np.full((k, 17), 1, BF16)
    packed = fc.pack(b, "bfloat16")
    for y in (fc.linear(a, packed), fc.linear(a.astype(np.float32), packed)):
        check_close("linear", y, reference.linear(a, b), n=k, more=flushed(a, b))
        assert multiplies_pairs("bfloat16") or (y > 0).all()
    gated = fc.gated_linear(a, fc.pack_gated(third, b, "bfloat16"), activation="relu")
    check_gated(gated, a, third, b, None, "relu")


@pytest.mark.parametrize("size", [2.0**-127, 2.0**-120])
def test_attention_over_tiny_values_keeps_them_or_loses_its_products(isa, size):
    """A thousand keys weigh the same: each product with a value is subnormal, their mean is `size`."""
    q, k = np.zeros((1, 2, 2, 16), BF16), np.zeros((1, 1000, 2, 16), BF16)
    v = np.full((1, 1000, 2, 16), size, BF16)
    got = fc.attention(q, k, v, return_lse=True)
    check_pair(got, expected(q, k, v), 1000, 16, multiplies_pairs(k.dtype))
