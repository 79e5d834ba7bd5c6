"""Each fuzzer of fuzz/ for a second from a fixed seed, and what their harness promises: it notices, and repeats."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from fuzz import FUZZERS  # noqa: E402
from fuzz.arrays import Arena  # noqa: E402

pytestmark = pytest.mark.slow


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fuzz", *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)


@pytest.mark.parametrize("name", FUZZERS)
def test_a_fuzzer_finds_nothing(name):
    done = run("--only", name, "--seconds", "1", "--seed", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"fuzz {name}: " in done.stdout and f"fuzz {name}: 0 cases" not in done.stdout


@pytest.mark.parametrize("beside_out", [True, False])
def test_canaries_notice_a_byte(beside_out):
    """Beside an out, in the gaps between its rows, and in an input."""
    for seed in range(40):
        arena = Arena(np.random.default_rng(seed))
        a = arena.give("a", np.ones((3, 4), np.float32))
        out = arena.out("out", (3, 4), np.dtype(np.float32))
        out[...] = 5
        arena.check()
        raw, inside = arena.held[1][1], arena.held[1][3]
        assert inside is not None
        outside = np.flatnonzero(~inside)
        if beside_out and len(outside):
            raw[outside[seed % len(outside)]] ^= 1
        else:
            raw = arena.held[0][1]
            raw[seed % len(raw)] ^= 1
        with pytest.raises(AssertionError, match="bytes written"):
            arena.check()
        del a


def test_deaths_and_hangs_are_reported_with_their_seed(tmp_path, monkeypatch, capsys):
    """A fuzzer whose cases die, hang or fail by turns: each is found, and the ones after it still run."""
    (tmp_path / "broken.py").write_text(
        "import os, time\nPATIENCE = 0.5\ndef case(seed):\n"
        "    kind = seed % 4\n    if kind == 0: os.abort()\n    if kind == 1: time.sleep(60)\n"
        "    assert kind != 2, 'a wrong value'\n    time.sleep(0.05)\n")
    import fuzz
    from fuzz import __main__ as driver
    monkeypatch.setattr(fuzz, "__path__", [*fuzz.__path__, str(tmp_path)])
    monkeypatch.setenv("FUZZ_MORE", str(tmp_path))
    kinds, seconds = set(), 3.0
    while len(kinds) < 3 and seconds < 60:  # a slow machine may not come to all of them
        outcome = driver.fuzz(driver.Outcome("broken"), 1, seconds)
        kinds, seconds = {why.split(":")[0] for _, why in outcome.failures}, 2 * seconds
    assert kinds == {"death", "hang", "AssertionError"} and outcome.cases > len(outcome.failures)
    assert "--only broken --case" in capsys.readouterr().out
