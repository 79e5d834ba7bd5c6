"""The tiles of tools/avx512_in_software, which stand for AMX elsewhere, do what the manual says and what AMX does."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
from child import compile_c

import forge_c as fc

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "tools" / "avx512_in_software"


@pytest.mark.skipif(platform.machine() != "x86_64" or "avx2" not in fc.available_isas(), reason="this CPU has no AVX2")
def test_each_word_on_random_tiles(tmp_path):
    """Of any shape, subnormal numbers and NaN among them: bit for bit, and where the CPU has AMX its own words too."""
    compile_c("-std=gnu11", "-O2", "-mavx2", "-mfma", "-mf16c", "-Wno-psabi", f"-I{FOLDER}", FOLDER / "check_tiles.c",
              "-o", tmp_path / "check", "-lm")
    done = subprocess.run([tmp_path / "check", "100000"], capture_output=True, text=True)
    # The library itself may run on tiles in software.
    has_tiles = "avx512_amx" in fc.available_isas() and "amx_tile" in Path("/proc/cpuinfo").read_text()
    expected = " and the instructions" if has_tiles else ", no AMX here"
    assert (done.returncode, done.stdout) == (0, f"tiles in software{expected}: 100000 rounds, 0 wrong\n")
