"""Routed depth: which eighth of 2048 tokens goes through, and a block for those beside one for all of them."""
from __future__ import annotations

import pytest
from test_bench_transformer import D, products, weights  # noqa: F401

TOKENS, CHOSEN = 2048, 256
DTYPES = {"float32": 4, "bfloat16": 2}


@pytest.mark.parametrize("batch", [1, 8])
def test_route_tokens(bench, normal, batch):
    bench("route_tokens", normal(batch, TOKENS, D), normal(D), case=f"an eighth of {batch} x {TOKENS} tokens of {D}",
          read=batch * TOKENS * D * 4, flops=2 * batch * TOKENS * D)


def work(weights, tokens, nbytes):  # noqa: F811
    size = products(weights)
    return {"read": size * nbytes + 4 * TOKENS * D, "written": 4 * TOKENS * D, "tokens": TOKENS,
            "flops": 2 * tokens * size + 4 * D * tokens * (tokens + 1) // 2}


@pytest.mark.parametrize("dtype", DTYPES)
def test_block(bench, normal, weights, dtype):  # noqa: F811
    bench("block", normal(1, TOKENS, D), weights, case=f"block, all of {TOKENS} tokens", dtype=dtype, hot=True,
          **work(weights, TOKENS, DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_routed_block(bench, normal, weights, dtype):  # noqa: F811
    bench("routed_block", normal(1, TOKENS, D), weights, normal(D, scale=D ** -0.5),
          case=f"block, an eighth of {TOKENS} tokens", dtype=dtype, hot=True, **work(weights, CHOSEN, DTYPES[dtype]))
