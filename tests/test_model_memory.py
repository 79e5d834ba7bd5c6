"""Loading a folder of a few hundred megabytes: what it takes at most and afterwards, and what a terminal shows
meanwhile."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from child import run_script
from ggml_blocks import random_blocks
from gguf_files import Raw, gguf
from gguf_models import metadata
from model_folder import small
from safetensors.numpy import save_file

from forge_c.models import model as models
from forge_c.models.weights.random import RandomCheckpoint, shape_config

pytestmark = pytest.mark.slow

WIDTH, INNER, LAYERS, VOCAB, KEYS = 1024, 2816, 8, 12000, 256
SIZES = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": VOCAB,
         "num_attention_heads": 16, "num_key_value_heads": KEYS // 64, "head_dim": 64}

# The process's own high-water mark. A first, small model has brought in every module.
CHILD = """
import os, re
os.cpu_count = lambda: {cpus}
import forge_c as fc
fc.set_num_threads({cpus})
fc.models.load()
def status(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = status("VmRSS")
model = fc.models.load({folder!r}, {dtype!r})
print(status("VmHWM"), model.nbytes, status("VmRSS") - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 checkpoint of 230 MB."""
    path, draw = tmp_path_factory.mktemp("model"), RandomCheckpoint().take
    table = (VOCAB, WIDTH)
    shapes = {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        layer = {"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,), "mlp.down_proj": (WIDTH, INNER)}
        layer |= {f"self_attn.{p}_proj": (n, WIDTH) for p, n in (("q", WIDTH), ("k", KEYS), ("v", KEYS), ("o", WIDTH))}
        layer |= {f"mlp.{p}_proj": (INNER, WIDTH) for p in ("gate", "up")}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    save_file({name: draw(name, shape) for name, shape in shapes.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(dict(shape_config("llama-1.1b")) | SIZES))
    return path


@pytest.mark.parametrize(("dtype", "cpus"), [("bfloat16", 2), ("int8", 2), ("int4", 1), ("int4", 14)])
def test_the_peak_is_little_more_than_the_packed_weights(folder, dtype, cpus):
    peak, held, grown = map(int, run_script(CHILD.format(folder=str(folder), dtype=dtype, cpus=cpus)).split())
    assert held <= (folder / "model.safetensors").stat().st_size * 1.01
    assert peak <= 1.1 * held + 100e6, f"{peak / 1e6:.0f} MB for {held / 1e6:.0f} MB of weights"
    # malloc keeps up to a megabyte of what each thread had.
    assert grown <= 1.1 * held + (10 + cpus) * 1e6, f"{grown / 1e6:.0f} MB more for {held / 1e6:.0f} MB of weights"


def test_a_gguf_file_takes_its_packed_weights_and_a_tensor_more(tmp_path):
    """Its blocks are packed tensor by tensor; no tensor is made into floats."""
    rng, path = np.random.default_rng(0), tmp_path / "x.gguf"
    config = small(hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, vocab_size=4 * VOCAB,
                   num_attention_heads=16, num_key_value_heads=4)
    sizes = {"attn_q": (WIDTH, WIDTH), "attn_k": (KEYS, WIDTH), "attn_v": (KEYS, WIDTH), "attn_output": (WIDTH, WIDTH),
             "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
    tensors = {name: np.ones(WIDTH, np.float32) for name in ("output_norm.weight", *(
        f"blk.{i}.{norm}_norm.weight" for i in range(LAYERS) for norm in ("attn", "ffn")))}
    for i in range(LAYERS):
        for stem, (rows, columns) in sizes.items():
            raw = random_blocks(rng, "Q4_K", rows, columns)
            tensors[f"blk.{i}.{stem}.weight"] = Raw(12, (rows, columns), raw.tobytes())
    table = random_blocks(rng, "Q6_K", 4 * VOCAB, WIDTH)
    tensors["token_embd.weight"] = Raw(14, (4 * VOCAB, WIDTH), table.tobytes())
    path.write_bytes(gguf(metadata(config), tensors))
    peak, held, grown = map(int, run_script(CHILD.format(folder=str(path), dtype="auto", cpus=2)).split())
    assert held <= path.stat().st_size * 1.03
    assert peak <= held + table.nbytes + 100e6, f"{peak / 1e6:.0f} MB for {held / 1e6:.0f} MB of weights"
    assert grown <= 1.1 * held + 12e6, f"{grown / 1e6:.0f} MB more for {held / 1e6:.0f} MB of weights"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_a_long_load_shows_a_bar_on_a_terminal_and_nowhere_else(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream())
    for _ in models._bar(range(3)):
        time.sleep(0.4)
    shown = sys.stderr.getvalue()
    assert ("loading" in shown and "/3" in shown) == (stream is Terminal) and bool(shown) == (stream is Terminal)
