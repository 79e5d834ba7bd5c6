"""A GGUF file of a llama, a mamba or a mamba2 with random weights and a made-up tokenizer, for llama-bench.

    python bench/model_gguf.py FILE F16|BF16|Q8_0|Q4_0 CONFIG        CONFIG is a config.json as text

Every matrix has the format asked for, the embedding and the output too; llama.cpp's own quantiser would keep the
output in more bits. Tensors are written one at a time.
"""
from __future__ import annotations

import json
import math
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize

_BLOCK = 1 << 22  # elements that are drawn and quantised once; every matrix is cut from them
Shapes = dict[str, tuple[int, ...]]


def _llama_layer(c: dict[str, Any]) -> Shapes:
    d, hidden = c["hidden_size"], c["intermediate_size"]
    q, kv = (c[name] * c["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    layer: Shapes = {"attn_norm": (d,), "attn_q": (q, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, q),
                     "ffn_norm": (d,), "ffn_gate": (hidden, d), "ffn_up": (hidden, d), "ffn_down": (d, hidden)}
    return {f"{name}.weight": shape for name, shape in layer.items()}


def _mamba_layer(c: dict[str, Any]) -> Shapes:
    d, n, rank, inner = c["hidden_size"], c["state_size"], c["time_step_rank"], _inner(c)
    return {"attn_norm.weight": (d,), "ssm_in.weight": (2 * inner, d), "ssm_conv1d.weight": (inner, c["conv_kernel"]),
            "ssm_conv1d.bias": (inner,), "ssm_x.weight": (rank + 2 * n, inner), "ssm_dt.weight": (inner, rank),
            "ssm_dt.bias": (inner,), "ssm_a": (inner, n), "ssm_d": (inner,), "ssm_out.weight": (d, inner)}


def _mamba2_layer(c: dict[str, Any]) -> Shapes:
    d, heads, groups, inner = c["hidden_size"], c["num_heads"], c["n_groups"], _inner(c)
    conv = inner + 2 * groups * c["state_size"]
    return {"attn_norm.weight": (d,), "ssm_in.weight": (inner + conv + heads, d),
            "ssm_conv1d.weight": (conv, c["conv_kernel"]), "ssm_conv1d.bias": (conv,), "ssm_dt.bias": (heads,),
            "ssm_a": (heads, 1), "ssm_d": (heads, 1), "ssm_norm.weight": (groups, inner // groups),
            "ssm_out.weight": (d, inner)}


_LAYERS = {"llama": _llama_layer, "mamba": _mamba_layer, "mamba2": _mamba2_layer}
_FLOATS = ("ssm_conv1d.weight", "ssm_a", "ssm_d", "ssm_norm.weight")  # of two dimensions, and no matrices


def _inner(c: dict[str, Any]) -> int:
    return c["expand"] * c["hidden_size"]


def _shapes(c: dict[str, Any]) -> Shapes:
    """Tensors of the architecture that the model_type is; matrices are (out, in)."""
    d, layer = c["hidden_size"], _LAYERS[c["model_type"]](c)
    layers = {f"blk.{i}.{name}": shape for i in range(c["num_hidden_layers"]) for name, shape in layer.items()}
    head: Shapes = {} if c["tie_word_embeddings"] else {"output.weight": (c["vocab_size"], d)}
    return {"token_embd.weight": (c["vocab_size"], d), **layers, "output_norm.weight": (d,), **head}


def _describe(writer: GGUFWriter, c: dict[str, Any]) -> None:
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_vocab_size(c["vocab_size"])
    if "state_size" in c:
        _describe_state(writer, c)
        return
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_rope_dimension_count(c["head_dim"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])


def _describe_state(writer: GGUFWriter, c: dict[str, Any]) -> None:
    writer.add_context_length(1 << 20)
    writer.add_feed_forward_length(0)  # asked for, and not used
    writer.add_head_count(0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_conv_kernel(c["conv_kernel"])
    writer.add_ssm_inner_size(_inner(c))
    writer.add_ssm_state_size(c["state_size"])
    writer.add_ssm_time_step_rank(c.get("num_heads") or c["time_step_rank"])
    if "n_groups" in c:
        writer.add_ssm_group_count(c["n_groups"])


def _add_tokenizer(writer: GGUFWriter, vocab: int) -> None:
    """SentencePiece in form: three special tokens, the 256 bytes, and names for the rest."""
    special = [("<unk>", TokenType.UNKNOWN), ("<s>", TokenType.CONTROL), ("</s>", TokenType.CONTROL)]
    tokens = special + [(f"<0x{byte:02X}>", TokenType.BYTE) for byte in range(256)]
    tokens += [(f"t{i}", TokenType.NORMAL) for i in range(len(tokens), vocab)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_scores([-float(i) for i in range(vocab)])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _cut(block: np.ndarray, unit: int, nbytes: int, name: str) -> np.ndarray:
    """nbytes of the block, piece after piece from random multiples of `unit`."""
    rng, out, at = np.random.default_rng(zlib.crc32(name.encode())), np.empty(nbytes, np.uint8), 0
    while at < nbytes:
        start = unit * int(rng.integers(block.size // unit // 2))
        piece = block[start:start + nbytes - at]
        out[at:at + piece.size] = piece
        at += piece.size
    return out


def _floats(name: str, shape: tuple[int, ...], normal: np.ndarray) -> np.ndarray:
    """What no format quantises: weights of norms are around 1, A around -1, everything else around 0."""
    drawn = normal.ravel()[:math.prod(shape)].reshape(shape)
    if name.endswith("ssm_a"):
        return -np.exp(drawn)
    return np.float32(1) + drawn if name.endswith(("norm.weight", "ssm_d")) else drawn


def write(path: Path, form: str, config: dict[str, Any]) -> None:
    """The file appears when it is whole."""
    kind, rng, partial = GGMLQuantizationType[form], np.random.default_rng(0), path.with_suffix(".part")
    elements, unit = GGML_QUANT_SIZES[kind]
    normal = np.float32(0.02) * rng.standard_normal((_BLOCK // 2048, 2048), np.float32)
    block = quantize(normal, kind).view(np.uint8).ravel()
    writer = GGUFWriter(partial, config["model_type"])
    _describe(writer, config)
    _add_tokenizer(writer, config["vocab_size"])
    matrices = {}
    for name, shape in _shapes(config).items():
        if len(shape) == 1 or name.endswith(_FLOATS):
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * math.prod(shape), GGMLQuantizationType.F32)
        else:
            matrices[name] = math.prod(shape) // elements * unit
            writer.add_tensor_info(name, shape, np.dtype(np.float32), matrices[name], kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in _shapes(config).items():
        writer.write_tensor_data(_cut(block, unit, matrices[name], name) if name in matrices
                                 else _floats(name, shape, normal))
    writer.close()
    partial.rename(path)


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
