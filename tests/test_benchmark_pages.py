"""Pages of machines: every figure is that of a run, and a table says what its figures say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "benchmarks"
sys.path.append(str(ROOT / "bench"))

import machine  # noqa: E402
import machine_page  # noqa: E402
from cases import CASES  # noqa: E402

LIMITS = {"fp32_gflops": 100.0, "bf16_gflops": 0.0, "int8_gops": 300.0, "int4_gops": 300.0, "read_gbs": 10.0,
          "copy_gbs": 20.0}


def cell(case: str, impl: str, seconds: list[float], variant: str = "float32", **more: Any) -> dict[str, Any]:
    return {"section": "rows", "case": case, "variant": variant, "impl": impl, "threads": 2, "seconds": seconds,
            "read": 10**9, "written": 10**9, "flops": 0, "dtype": variant, "in_memory": True, "beside": "", "curve": "",
            "length": 0, **more}


def figures(cells: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": "mill-2cpus", "family": "Mill", "cpus": 2, "asked": "", "details": "a mill", "cells": cells,
            "limits": {"isa": "wood", "threads": 2, "by_threads": {"1": LIMITS, "2": LIMITS},
                       "memory": [[1 << 20, 9, 8]]},
            "models": [], "versions": {"forge_c": "0", "numpy": "2"},
            "runs": {"rows": {"date": "2026-01-01", "version": "0.1.0 (abc)", "others": 0.25,
                              "left_out": ["the rest"]}}}


def test_a_row_has_the_time_the_limit_and_ratios_within_rounds() -> None:
    found = figures([cell("grind", "forge_c", [0.2, 0.1, 0.4]), cell("grind", "numpy", [0.4, 0.4, 0.4]),
                     cell("grind", "torch", [0.1, 0.1, 0.1])])
    lines = machine_page.section(machine_page.Figures(found), "rows")
    # 2 GB at 20 GB/s are 0.1 s, of 0.2 s; ratios of the rounds to NumPy are 2, 4 and 1.
    assert lines[-1] == ("| grind | float32 | 200 ms | 10 GB/s | 50 % | 400 ms, **2.00** (1.00–4.00) | "
                         "100 ms, **0.50** (0.25–1.00) | – |")


def test_a_variant_that_others_lack_stands_beside_what_they_have() -> None:
    found = figures([cell("grind", "forge_c", [0.1], "float32, precision int8", beside="float32", dtype="float32",
                          flops=10**10, in_memory=False), cell("grind", "torch", [0.3])])
    line = machine_page.section(machine_page.Figures(found), "rows")[-1]
    assert "300 ms, **3.00** (3.00–3.00)" in line and "| 33 % |" in line  # of int8's peak
    assert "100 GFLOP/s" in line


def test_the_page_names_machine_version_neighbours_and_what_was_left_out() -> None:
    text = machine_page.page_text(figures([cell("grind", "forge_c", [0.1])]), set())
    for part in ("# Mill, 2 CPUs", "a mill; forge_c's kernels for wood", "2026-01-01, forge_c 0.1.0 (abc)", "numpy 2",
                 "25 % of the processors", "the rest", "| float32 multiply-add, GFLOP/s | 100 | 100 |"):
        assert part in text
    assert "svg" not in text


@pytest.mark.parametrize("path", sorted(PAGES.glob("*.json")), ids=lambda p: p.stem)
def test_a_page_is_what_its_figures_say(path: Path) -> None:
    found = json.loads(path.read_text())
    pictures = {each.stem for each in path.with_suffix("").glob("*.svg")}
    assert path.with_suffix(".md").read_text() == machine_page.page_text(found, pictures), \
        f"run bench/page.py --draw {path}"


def test_the_index_names_every_machine(tmp_path: Path) -> None:
    index = ROOT / "docs" / "benchmarks.md"
    for path in PAGES.glob("*.md"):
        assert f"](benchmarks/{path.name})" in index.read_text()
    copy = tmp_path / "benchmarks.md"
    copy.write_text(index.read_text())
    (tmp_path / "benchmarks").symlink_to(PAGES)
    machine_page.put_index(copy)
    assert copy.read_text() == index.read_text(), "run bench/page.py --draw"


def test_cases_have_names_of_their_own_and_least_work() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert case.section in machine_page.TITLES
        assert len({variant.name for variant in case.variants}) == len(case.variants)
        assert all(variant.read > 0 and variant.written > 0 for variant in case.variants)


@pytest.mark.parametrize(("vendor", "flags", "family"), [
    ("GenuineIntel", "avx2 avx512f avx512_vnni avx512_vbmi2 amx_tile", "Sapphire Rapids"),
    ("GenuineIntel", "avx2 avx512f avx512_vnni avx512_vbmi2", "Ice Lake"),
    ("GenuineIntel", "avx2 avx_vnni", "Alder Lake"), ("AuthenticAMD", "avx2 vaes avx512f avx512_vnni", "Zen 4"),
    ("AuthenticAMD", "avx2 vaes", "Zen 3")])
def test_a_kind_of_core_is_known_by_what_it_can_do(vendor: str, flags: str, family: str,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_read", lambda path: f"vendor_id\t: {vendor}\nflags\t\t: {flags}\n")
    assert machine.family() == family
