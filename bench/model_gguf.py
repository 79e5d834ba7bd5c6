"""A GGUF file of a llama with random weights and a made-up tokenizer, for llama-bench.

    python bench/model_gguf.py FILE BF16|Q8_0|Q4_0 CONFIG        CONFIG is a config.json as text

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


def _shapes(c: dict[str, Any]) -> Shapes:
    """Tensors of the architecture "llama"; matrices are (out, in)."""
    d, hidden = c["hidden_size"], c["intermediate_size"]
    q, kv = (c[name] * c["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    layer: Shapes = {"attn_norm": (d,), "attn_q": (q, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, q),
                     "ffn_norm": (d,), "ffn_gate": (hidden, d), "ffn_up": (hidden, d), "ffn_down": (d, hidden)}
    layers = {f"blk.{i}.{name}": shape for i in range(c["num_hidden_layers"]) for name, shape in layer.items()}
    return {"token_embd": (c["vocab_size"], d), **layers, "output_norm": (d,), "output": (c["vocab_size"], d)}


def _describe(writer: GGUFWriter, c: dict[str, Any]) -> None:
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_rope_dimension_count(c["head_dim"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_vocab_size(c["vocab_size"])


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


def write(path: Path, form: str, config: dict[str, Any]) -> None:
    """The file appears when it is whole."""
    kind, rng, partial = GGMLQuantizationType[form], np.random.default_rng(0), path.with_suffix(".part")
    elements, unit = GGML_QUANT_SIZES[kind]
    normal = np.float32(0.02) * rng.standard_normal((_BLOCK // 2048, 2048), np.float32)
    block = quantize(normal, kind).view(np.uint8).ravel()
    writer = GGUFWriter(partial, "llama")
    _describe(writer, config)
    _add_tokenizer(writer, config["vocab_size"])
    sizes = {}
    for name, shape in _shapes(config).items():
        vector = len(shape) == 1
        sizes[name] = 4 * shape[0] if vector else math.prod(shape) // elements * unit
        writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.float32), sizes[name],
                               GGMLQuantizationType.F32 if vector else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in _shapes(config).items():
        writer.write_tensor_data(np.float32(1) + normal.ravel()[:shape[0]] if len(shape) == 1
                                 else _cut(block, unit, sizes[name], name))
    writer.close()
    partial.rename(path)


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
