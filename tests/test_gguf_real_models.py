"""Published GGUF files: FORGE_C_REAL_MODELS names a folder with smollm2.gguf (SmolLM2-135M-Instruct, Q4_1) and
gemma3.gguf (gemma-3-270m, Q4_K_M)."""
from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from child import run_script
from numpy.typing import NDArray
from pace import check_pace
from safetensors.numpy import save_file

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


LAYER = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
         "attn_k_norm": "self_attn.k_norm", "post_attention_norm": "post_attention_layernorm",
         "post_ffw_norm": "post_feedforward_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}
MODEL = {"token_embd": "embed_tokens", "output_norm": "norm"}
CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2": {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
                "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100000.0,
                "rms_norm_eps": 9.999999747378752e-06, "max_position_embeddings": 8192, "tie_word_embeddings": True},
    "gemma3": {"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048,
               "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
               "rms_norm_eps": 9.999999974752427e-07, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
               "sliding_window": 512, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256,
               "max_position_embeddings": 32768, "hidden_activation": "gelu_pytorch_tanh"}}


def in_a_folder(folder: Path, name: str) -> Path:
    """The file's numbers in float32 as Hugging Face holds them, read by the gguf package."""
    gguf = pytest.importorskip("gguf")
    config, tensors = CONFIGS[name], {}
    llama = name == "smollm2"
    layer = LAYER | {"ffn_norm": "post_attention_layernorm" if llama else "pre_feedforward_layernorm"}
    for tensor in gguf.GGUFReader(FOLDER / f"{name}.gguf").tensors:
        w = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        *block, part, _ = tensor.name.split(".")
        if llama and part in ("attn_q", "attn_k"):  # llama.cpp rotates neighbours, Hugging Face halves
            heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
            w = w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        if not llama and part.endswith("norm"):
            w = w - np.float32(1)
        prefix = f"model.layers.{block[1]}.{layer[part]}" if block else f"model.{MODEL[part]}"
        tensors[f"{prefix}.weight"] = np.ascontiguousarray(w)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_logits_are_those_of_the_same_numbers_in_a_folder(name, tmp_path):
    """transformers computes in float32 as well, and is off by 2.4e-6 itself."""
    transformers = pytest.importorskip("transformers")
    import torch

    folder = in_a_folder(tmp_path, name)
    ids = text_ids(name)
    ours = load(FOLDER / f"{name}.gguf", "float32")(ids)
    assert np.abs(ours - load(folder, "float32")(ids)).max() <= 2e-6 * np.abs(ours).max()
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.from_numpy(ids))
    assert np.abs(ours - theirs.logits.numpy()).max() <= 1e-5 * np.abs(ours).max()


def test_a_load_is_fast_and_takes_little_memory(name):
    path = FOLDER / f"{name}.gguf"
    load(path)
    check_pace(lambda: load(path), 4.0)  # of two threads
    model = load(path)
    assert model.dtype == DTYPES[name] and model.nbytes < 1.02 * path.stat().st_size
    largest = max(tensor.nbytes for tensor in open_gguf(path).tensors.values())
    peak, held = map(int, run_script(CHILD.format(path=str(path))).split())
    assert peak <= held + largest + (64 << 20), f"{peak / 1e6:.0f} MB for {held / 1e6:.0f} MB of weights"


def test_the_header_is_read_at_once(name):
    check_pace(lambda: open_gguf(FOLDER / f"{name}.gguf"), 0.5)


def test_info_on_the_command_line(name, capsys):
    from forge_c.cli import main

    assert main(["info", str(FOLDER / f"{name}.gguf")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^stored as Q8_0 +10? tensors, \d+ bytes, held as q8_0$", shown, re.M)
