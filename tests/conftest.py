"""What the whole suite shares: every ISA, every dtype, thread counts, and the one table of tolerances."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from small_models import model, model_of, texts  # noqa: F401
from suite import (  # noqa: F401
    case_id,
    once,
    pytest_addoption,
    pytest_collection_finish,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_configure_node,
    pytest_generate_tests,
    pytest_runtest_protocol,
    pytest_unconfigure,
    pytest_xdist_setupnodes,
)

import forge_c
from forge_c import functional

# Without tokenizers the rest runs.
collect_ignore = [] if find_spec("tokenizers") else [
    path.name for path in Path(__file__).parent.glob("test_*.py")
    if re.search(r"^(from|import) (tokenizers|tiny_tokenizers|gguf_vocabularies)\b", path.read_text(), re.M)]

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16),
          "bfloat16": np.dtype(ml_dtypes.bfloat16)}
THREAD_COUNTS = (1, 2, 3, 8)

# Half the distance between neighbours, relative to the value (normal numbers) and absolute (subnormals).
HALF_ULP = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
HALF_SUBNORMAL = {"float32": 2.0**-150, "float16": 2.0**-25, "bfloat16": 2.0**-134}
LARGEST = {"float32": 2.0**128, "float16": 65520.0, "bfloat16": 2.0**128}

SMALLEST_NORMAL = 2.0**-126

OPENMP = functional._openmp() != "none"

for _name in ("rms_norm", "layer_norm", "rope", "gelu", "silu", "swiglu", "geglu", "softmax", "linear", "group_terms",
              "gated_linear", "attention", "ssd_scan", "gated_delta", "s4d_scan", "causal_conv1d", "selective_scan",
              "rg_lru"):
    setattr(reference, _name, once(getattr(reference, _name)))


@dataclass(frozen=True)
class Tolerance:
    """|got - expected| <= work + one rounding to the result's dtype, work = roundings 2^-24 magnitude + floor.

    roundings(n, d, s) counts the float32 roundings on the longest path through the operation: n is the
    length of the reduction, d and s are attention's head_dim and largest sum of |q||k| scale. floor may depend on n.
    magnitude, |expected| unless the test passes it, is the size of what those roundings act on.
    """

    roundings: Callable[[float, float, float], float]
    floor: float | Callable[[float], float] = 0.0
    half_ulp: float = 2.0**-24
    half_subnormal: float = 2.0**-150
    largest: float = 2.0**128


def sums_flushed(n: float) -> float:
    """vdpbf16ps and tdpbf16ps make 0 of a sum under the normal numbers, after each of n products, and, in a tile, of
    the sum of two chains that are added to the rest. flushed() has its inputs."""
    return (n + 2) * SMALLEST_NORMAL


OPERATIONS: dict[str, tuple[Callable[[float, float, float], float], float | Callable[[float], float]]] = {
    # One conversion, no arithmetic.
    "relu": (lambda n, d, s: 0, 0.0),
    "embedding": (lambda n, d, s: 1, 0.0),
    # x + residual: one addition.
    "residual": (lambda n, d, s: 1, 0.0),
    # The sum of squares has no cancellation: n additions and n products at most, halved by the root; then
    # division by n, eps, root, reciprocal, offset + weight, two products.
    "rms_norm": (lambda n, d, s: n + 7, 0.0),
    # The mean carries n roundings of mean|x| into every difference, the variance n more, halved by the root.
    # magnitude: |weight| (|x - mean| + mean|x|) / sigma + |bias|.
    "layer_norm": (lambda n, d, s: 1.5 * n + 10, 0.0),
    # Two products and an addition. magnitude: the length of the pair, sqrt(a^2 + b^2).
    "rope": (lambda n, d, s: 3, 0.0),
    # 2.47 ulp at most, an ulp being two roundings at most; 1.43 of the least subnormal under 2^-126, to which results
    # fall gradually: e^-x beyond float32 is carried as two factors. Both measured over all floats, docs/accuracy.md.
    "silu": (lambda n, d, s: 5, 1.43 * 2.0**-149),
    # 4.35 roundings of |x|, which is the magnitude, for the erf form and 2.1 for tanh's, measured as above.
    "gelu": (lambda n, d, s: 5, 2.0**-149),
    # As above and one more product, which may fall among the subnormals; their own floor scales with |linear|, so it
    # belongs to magnitude.
    "swiglu": (lambda n, d, s: 6, 2.0**-149),
    "geglu": (lambda n, d, s: 6, 2.0**-149),
    # exp to 2 ulp above and below, n additions, the division. magnitude: p (1 + |x - max|), since the rounding
    # of x - max is relative to it. exp may flush to zero below the normal numbers.
    "softmax": (lambda n, d, s: n + 10, SMALLEST_NORMAL),
    # gamma_n of a dot product in any order, bias, residual. magnitude: |x| @ |weight| + |bias| + |residual|.
    "linear": (lambda n, d, s: n + 2, sums_flushed),
    # The two products' bounds carry through act' <= 1.13 and the other factor. magnitude and what else there is: see
    # test_linear.
    "gated_linear": (lambda n, d, s: 1.13 * (n + 2) + 10, SMALLEST_NORMAL),
    # n steps that add a chunk's exact sum to the chain, each one rounding or, unfused, one more for its product; a sum
    # beyond 2^24 as float32; x's scale, and its product by W's; bias, residual. magnitude: the sum over chunks of scale
    # of x times |scale sum(x u)| + |minimum sum(x)|, + |bias| + |residual|.
    "quantized_linear": (lambda n, d, s: n + 6, 2.0**-149),
    # As gated_linear, from the line above.
    "quantized_gated_linear": (lambda n, d, s: 1.13 * (n + 6) + 10, 128 * SMALLEST_NORMAL),
    # gamma_n of a dot product in any order. magnitude: |x| @ |weight|.
    "router_logits": (lambda n, d, s: n + 1, 0.0),
    # 1 - r, its product by x, and the sum with r y. magnitude: (1 + |r|) |x| + |r y|.
    "gate_update": (lambda n, d, s: 3, 2.0**-149),
    # Every score is a dot product of length d, scaled (and capped: 4 more); an error e in the scores is 2e in
    # the weights; exp 4, twice; n additions above and below; one rescale a key at most. magnitude: p @ |v|.
    "attention": (lambda n, d, s: 2 * (d + 8) * (1 + s) + 3 * n + 16, SMALLEST_NORMAL),
    # As above where the ISA multiplies pairs of bfloat16: a weight is rounded to 8 bits, 2^-8 = 2^16 2^-24.
    "attention_pairs": (lambda n, d, s: 2 * (d + 8) * (1 + s) + 3 * n + 16 + 2**16, lambda n: sums_flushed(n + 1)),
    # As "attention" where products are bytes: weights of 2^x to 1e-4, above and below, 2^12 2^-24; what the bytes of
    # queries, keys, values and weights do is the test's `more`. Terms under 2^-100 of a row's largest stay that.
    "attention_bytes": (lambda n, d, s: 2 * (d + 8) * (1 + s) + 3 * n + 16 + 2**12, lambda n: n * 2.0**-100),
    # As "lse", and 1e-4 in each term, 2^11 2^-24.
    "lse_bytes": (lambda n, d, s: (d + 8) * (1 + s) + n + 8 + 2**11, 0.0),
    # The log of a sum of n terms, absolute. magnitude: 1 + |lse|.
    "lse": (lambda n, d, s: (d + 8) * (1 + s) + n + 8, 0.0),
    # n tokens; a token's term loses a rounding to its product and one to the sum, 4 to the decay, and 10 of the size of
    # the exponent s: that is a rounded product, and its dt a sum whose softplus is good to 4 ulp. d terms in a result,
    # a skip, a gate. magnitude: the sum of the sizes of all terms.
    "ssd_scan": (lambda n, d, s: (n + 1) * (6 + 10 * s) + d + 16, SMALLEST_NORMAL),
    # As above. By the delta rule the largest column's length instead of terms, and d more roundings a token for S k.
    "gated_delta": (lambda n, d, s: (n + 1) * (2 * d + 12 + 2 * s) + d + 8, SMALLEST_NORMAL),
    # n tokens, each a complex product in two steps and its input; d modes in a result, and the skip.
    "s4d_scan": (lambda n, d, s: 10 * (n + 1) + 4 * d + 4, SMALLEST_NORMAL),
    # Made in float64.
    "s4d_kernel": (lambda n, d, s: 0.01, 0.0),
    # gamma of a sum of n products and the bias. magnitude: |weight| |x| summed, + |bias|; a product may be subnormal.
    "causal_conv1d": (lambda n, d, s: n + 1, lambda n: n * 2.0**-149),
    # silu' <= 1.1, and silu of it as above.
    "causal_conv1d_silu": (lambda n, d, s: 1.1 * (n + 1) + 5, lambda n: (n + 2) * 2.0**-149),
    # magnitude: the roundings themselves, see test_selective_scan.magnitudes.
    "selective_scan": (lambda n, d, s: 1, SMALLEST_NORMAL),
    "rg_lru": (lambda n, d, s: 1, SMALLEST_NORMAL),  # likewise, see test_rg_lru.magnitudes
    # Two weights from exp of a rounded difference (p |log p| < 0.37), two products, a sum, a division.
    # magnitude: the larger |out| of the two parts.
    "merge_attention": (lambda n, d, s: 16, 0.0),
}

TOLERANCES = {
    (op, dtype): Tolerance(roundings, floor, HALF_ULP[dtype], HALF_SUBNORMAL[dtype], LARGEST[dtype])
    for op, (roundings, floor) in OPERATIONS.items() for dtype in DTYPES
}
# For results of 16 bits an exponential is good to 2^-13.7, and so is what else these are made of: 2^-12.5 together, a
# twentieth of a bfloat16's ulp.
for _op in ("silu", "gelu", "swiglu", "geglu"):
    for _dtype in ("float16", "bfloat16"):
        TOLERANCES[_op, _dtype] = replace(TOLERANCES[_op, _dtype], roundings=lambda n, d, s: 2**11.5)
for _dtype in ("float16", "bfloat16"):
    TOLERANCES["causal_conv1d_silu", _dtype] = replace(TOLERANCES["causal_conv1d_silu", _dtype],
                                                       roundings=lambda n, d, s: 1.1 * (n + 1) + 2**11.5)


def multiplies_pairs(dtype: Any) -> bool:
    """Whether this ISA multiplies pairs of bfloat16 where keys and values have this dtype: then queries and softmax
    weights are rounded to it, and the op is "attention_pairs" in TOLERANCES."""
    return str(dtype) == "bfloat16" and forge_c.isa() in ("avx512_vnni_bf16", "avx512_amx")


def flushed(x: Any, w: Any) -> Any:
    """What x @ w may lose, x (..., k) and w (k, n) of bfloat16, where pairs of bfloat16 are multiplied: that takes
    subnormal numbers for zeros, as inputs and as sums."""
    size = [np.where(np.isfinite(a), np.abs(a), 0) for a in (np.asarray(x, np.float64), np.asarray(w, np.float64))]
    tiny = [np.where(a < SMALLEST_NORMAL, a, 0) for a in size]
    return tiny[0] @ size[1] + size[0] @ tiny[1] + sums_flushed(len(size[1]))


def check_close(op: str, got: Any, expected: Any, *, magnitude: Any = None, n: float = 0, d: float = 0,
                s: float = 0, roundings: float = 0, more: Any = 0, case: str = "") -> None:
    """Fail unless `got` is `expected` within TOLERANCES[op, its dtype], NaN and Inf at the same places.

    roundings: inputs that were themselves rounded to the result's dtype on the way, in half ulps.
    more: what other roundings of inputs can do to the result, absolute.
    case: a loop's, to be named on failure.
    """
    t, expected = TOLERANCES[op, got.dtype.name], np.asarray(expected)
    op = f"{op}, {case}" if case else op
    assert got.shape == expected.shape, f"{op}: shape {got.shape}, expected {expected.shape}"
    value = got.astype(np.float64)
    np.testing.assert_array_equal(np.isnan(value), np.isnan(expected), f"{op}: NaN at other places")
    floor = t.floor(n) if callable(t.floor) else t.floor
    with np.errstate(invalid="ignore"):
        work = 2.0**-24 * t.roundings(n, d, s) * (np.abs(expected) if magnitude is None else magnitude) + floor
        work = work + more
        bound = work + (1 + roundings) * t.half_ulp * (np.abs(expected) + work) + t.half_subnormal
        overflows = np.isfinite(expected) & (np.abs(expected) + bound >= t.largest)
        right = (value == expected) | (np.abs(value - expected) <= bound) | np.isnan(expected)
        right &= np.isfinite(expected) | np.isnan(expected) | (value == expected)
        right |= overflows & (value == np.copysign(np.inf, expected))
    if not right.all():
        at = tuple(int(i) for i in np.argwhere(~right)[0])
        allowed = np.broadcast_to(bound, expected.shape)[at]
        pytest.fail(f"{op}: {np.count_nonzero(~right)} of {right.size} values off, first at {at}: "
                    f"{value[at]!r}, expected {expected[at]!r} within {allowed:.3g}")


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """check_close(op, got, expected, *, magnitude, n, d, s)."""
    return check_close


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on every ISA this CPU has (suite.pytest_generate_tests)."""
    before = forge_c.isa()
    forge_c.use_isa(request.param)
    assert forge_c.isa() == request.param
    yield request.param
    forge_c.use_isa(before)


@pytest.fixture(params=list(DTYPES))
def dtype(request: pytest.FixtureRequest) -> np.dtype[Any]:
    """float32, float16 and bfloat16 in turn."""
    return DTYPES[request.param]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Bits do not depend on threads, as the tests with each_thread_count show; time on a busy machine does."""
    before = forge_c.get_num_threads()
    forge_c.set_num_threads(1)
    yield
    forge_c.set_num_threads(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """A test begins with one, suite.THREADS."""
    before = forge_c.get_num_threads()
    forge_c.set_num_threads(2)
    yield
    forge_c.set_num_threads(before)


@pytest.fixture
def each_thread_count() -> Iterator[Callable[[], Iterator[int]]]:
    """A loop over THREAD_COUNTS that sets each of them; the count is restored after the test."""
    before = forge_c.get_num_threads()

    def counts() -> Iterator[int]:
        for count in THREAD_COUNTS:
            forge_c.set_num_threads(count)
            assert forge_c.get_num_threads() == (count if OPENMP else 1)
            yield count

    yield counts
    forge_c.set_num_threads(before)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Seeded by the test's name, so that a failure repeats; the same for every ISA, whom one reference serves."""
    name = np.frombuffer(case_id(request.node).encode(), np.uint8)
    return np.random.default_rng(name.astype(np.uint32))  # a list of the same numbers takes five times as long
