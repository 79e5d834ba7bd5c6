"""Loading a folder of a few hundred megabytes: what it takes at most, and what a terminal shows meanwhile."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path

import pytest
from child import run_script
from safetensors.numpy import save_file

from forge_c.models import model as models
from forge_c.models.weights.random import RandomCheckpoint, shape_config

pytestmark = pytest.mark.slow

WIDTH, INNER, LAYERS, VOCAB, KEYS = 1024, 2816, 8, 12000, 256
SIZES = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": VOCAB,
         "num_attention_heads": 16, "num_key_value_heads": KEYS // 64, "head_dim": 64}

# The process's own high-water mark. A first, small model has brought in every module.
CHILD = """
import re
import forge_c as fc
fc.models.load()
model = fc.models.load({folder!r}, {dtype!r})
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
print(peak, model.nbytes)
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


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_the_peak_is_little_more_than_the_packed_weights(folder, dtype):
    peak, held = map(int, run_script(CHILD.format(folder=str(folder), dtype=dtype)).split())
    assert held <= (folder / "model.safetensors").stat().st_size * 1.01
    assert peak <= 1.1 * held + 100e6, f"{peak / 1e6:.0f} MB for {held / 1e6:.0f} MB of weights"


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
