"""ring_attention beside torch's own ring attention: the same cuts of the same tokens, rank by rank.

For whoever comes from torch's context_parallel: what its load balancer gives a rank is the layout "zigzag", and without
one "contiguous"; heads and tokens change places, and keys and values need not be repeated for every head.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from child import run_script
from conftest import OPERATIONS
from ranks import run_threads
from ring_cases import Array
from test_attention import expected, qkv
from torch_ring import CASES, SIZES, result_file

from forge_c.distributed import Comm, positions, ring_attention, shard

# More than three chunks of 256 keys; a multiple of twice each number of ranks, without which torch's does not go.
SEQ_LEN, HEADS, KV_HEADS, DIM = 1032, 4, 2, 32

pytestmark = pytest.mark.usefixtures("one_thread")


def most_apart(want: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
    """How far two results of float32 may be from each other, out (..., E) and lse.

    The table's bound adds up every rounding as if all went one way. Each is evenly spread over +-2^-24 of what it acts
    on at most, a deviation of 2^-24 / sqrt(3), and two results have twice as many: six deviations of their sum. That
    is 2e-5 of p @ |v|, where a key lost, or one too many, is 1 / SEQ_LEN = 1e-3 of |v|.
    """
    _, lse, magnitude, size = want
    roundings = [OPERATIONS[op][0](SEQ_LEN, DIM, s) for op, s in (("attention", size), ("lse", size[..., 0]))]
    out_apart, lse_apart = (6 * np.sqrt(2 * n / 3) * 2.0**-24 for n in roundings)
    return out_apart * magnitude, lse_apart * (1 + np.abs(lse))


def check_near(got: Array, theirs: Array, most: Array, what: Any) -> None:
    apart = np.abs(got.astype(np.float64) - theirs)
    assert got.shape == theirs.shape and (apart <= most).all(), (what, apart.max(), (apart / most).max())


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed: pip install forge_c[peers]")
def test_torch_on_gloo(tmp_path: Path, rng: np.random.Generator) -> None:
    q, k, v = qkv(rng, 1, SEQ_LEN, SEQ_LEN, HEADS, KV_HEADS, DIM)
    for name, x in (("q", q), ("k", k), ("v", v)):
        np.save(tmp_path / f"{name}.npy", np.repeat(x, HEADS // x.shape[2], axis=2).transpose(0, 2, 1, 3))
    said = run_script(f"from torch_ring import Path, run_all; print('cannot:', run_all(Path({str(tmp_path)!r})))")
    reason = said.rpartition("cannot: ")[2].strip()
    if reason != "None":
        pytest.skip(reason)
    most = {causal: most_apart(expected(q, k, v, causal=causal)) for causal in (False, True)}
    for size in SIZES:
        for index, (layout, _, causal) in enumerate(CASES):
            def ours(comm: Comm, layout: Any = layout, causal: bool = causal) -> tuple[Array, ...]:
                parts = (shard(x, layout, comm) for x in (q, k, v))
                return (positions(layout, SEQ_LEN, comm),
                        *ring_attention(*parts, comm=comm, layout=layout, causal=causal, return_lse=True))

            for rank, (at, out, lse) in enumerate(run_threads(ours, size)):
                what = f"{layout}, causal={causal}, rank {rank} of {size}"
                with np.load(tmp_path / result_file(size, index, rank)) as theirs:
                    np.testing.assert_array_equal(at, theirs["positions"], what)
                    check_near(out, theirs["out"].transpose(0, 2, 1, 3), most[causal][0][:, at], what)
                    check_near(lse, theirs["lse"].transpose(0, 2, 1), most[causal][1][:, at], what)
