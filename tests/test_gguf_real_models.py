"""Published GGUF files: FORGE_C_REAL_MODELS names a folder with smollm2.gguf (SmolLM2-135M-Instruct, Q4_1) and
gemma3.gguf (gemma-3-270m, Q4_K_M)."""
from __future__ import annotations

import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from child import run_script
from numpy.typing import NDArray

from forge_c.formats.gguf import open_gguf
from forge_c.models import load

FOLDER = Path(os.environ.get("FORGE_C_REAL_MODELS", ""))
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif("FORGE_C_REAL_MODELS" not in os.environ, reason="no real models here")]
NAMES = ("smollm2", "gemma3")
BEGIN, SPACE = {"smollm2": 1, "gemma3": 2}, {"smollm2": "Ġ", "gemma3": "▁"}
TEXT = "The capital of France is Paris . It lies on the river , and about two million people live there"
DTYPES = {"smollm2": "q4_1", "gemma3": "q5_0"}

CHILD = """
import re
import forge_c as fc
fc.models.load()
def resident(what):
    return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = resident("VmRSS")
model = fc.models.load({path!r})
print(resident("VmHWM") - before, model.nbytes)
"""


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def text_ids(name: str) -> NDArray[np.int64]:
    """Words that are tokens."""
    tokens = {text: i for i, text in enumerate(open_gguf(FOLDER / f"{name}.gguf").metadata["tokenizer.ggml.tokens"])}
    return np.array([[BEGIN[name]] + [tokens[SPACE[name] + word] for word in TEXT.split()]])


def test_the_logits_are_those_of_the_same_numbers_in_a_folder(name):
    """NAME_f32 is a folder with the file's numbers in float32. transformers computes in float32 as well, and is off by
    2.4e-6 itself."""
    transformers = pytest.importorskip("transformers")
    import torch

    folder = FOLDER / f"{name}_f32"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    ids = text_ids(name)
    ours = load(FOLDER / f"{name}.gguf", "float32")(ids)
    assert np.abs(ours - load(folder, "float32")(ids)).max() <= 2e-6 * np.abs(ours).max()
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.from_numpy(ids))
    assert np.abs(ours - theirs.logits.numpy()).max() <= 1e-5 * np.abs(ours).max()


def test_a_load_is_fast_and_takes_little_memory(name):
    path = FOLDER / f"{name}.gguf"
    load(path)
    start = time.process_time()
    model = load(path)
    assert time.process_time() - start < 4.0  # of two threads
    assert model.dtype == DTYPES[name] and model.nbytes < 1.02 * path.stat().st_size
    largest = max(tensor.nbytes for tensor in open_gguf(path).tensors.values())
    peak, held = map(int, run_script(CHILD.format(path=str(path))).split())
    assert peak <= held + largest + (64 << 20), f"{peak / 1e6:.0f} MB for {held / 1e6:.0f} MB of weights"


def test_the_header_is_read_at_once(name):
    start = time.process_time()
    open_gguf(FOLDER / f"{name}.gguf")
    assert time.process_time() - start < 0.5


def test_info_on_the_command_line(name, capsys):
    from forge_c.cli import main

    assert main(["info", str(FOLDER / f"{name}.gguf")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^stored as Q8_0 +10? tensors, \d+ bytes, held as q8_0$", shown, re.M)
