"""Mamba's scan over ranks that are threads of one process, which together have as many threads as the others: on one
machine ranks bring no speed, and these say what they cost."""
from __future__ import annotations

import pytest
from test_bench_selective_scan import inputs, moved

CHANNELS = 1536
LARGE = pytest.mark.large
RANKS = [(1, "pipeline"), (2, "pipeline"), (2, "scan"), pytest.param(4, "pipeline", marks=LARGE),
         pytest.param(4, "scan", marks=LARGE)]


@pytest.mark.parametrize("seq", [512, pytest.param(4096, marks=LARGE)])
@pytest.mark.parametrize(("ranks", "schedule"), RANKS)
def test_selective_scan(bench, normal, seq, ranks, schedule):
    bench("scan_over_ranks", *inputs(normal, seq, CHANNELS), case=f"selective_scan, {seq} x {CHANNELS}, over ranks",
          ranks=ranks, schedule=schedule, variant=f"{schedule}, {ranks} ranks", hot=True, **moved(seq, CHANNELS, 4))
