"""Mutated GGUF files of every family: other keys, other tensors, other bytes."""

from __future__ import annotations

import struct
from functools import cache
from typing import Any

import numpy as np
from ggml_blocks import QUANTIZED, random_blocks
from gguf_files import Raw, Typed, container, info, pair, raw
from gguf_models import ARCHITECTURES, metadata, renamed
from model_folder import small, tensors

from forge_c.formats.ggml import TYPES

Rng = np.random.Generator
FAMILIES = tuple(ARCHITECTURES)
HOSTILE: tuple[Any, ...] = (
    True, False, "", "x", "llama", "ü" * 300, 0.0, -1.0, 1.5, 1e38, float("nan"), float("inf"), Typed(4, 0),
    Typed(4, 1), Typed(4, 7), Typed(4, 2**20), Typed(4, 2**31), Typed(5, -1), Typed(10, 2**63), Typed(11, -(2**62)),
    Typed(0, 255), Typed(5, []), Typed(8, []), [1, 2, 3], [1.5], ["a"], [True, False, True], Typed(5, [-1] * 97),
    ["t"] * 97)
KEYS = tuple("""rope.scaling.type rope.scaling.factor rope.scaling.attn_factor rope.dimension_count rope.freq_base
    rope.scaling.original_context_length attention.sliding_window attention.sliding_window_pattern attention.key_length
    attention.value_length expert_count vocab_size rope.freq_base_swa new.key""".split())
NAMES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight", "output.weight", "output.bias",
         "blk.0.attn_q.bias", "blk.0.attn_qkv.weight", "blk.1.attn_output.bias", "blk.9.attn_q.weight", "x", "")


@cache
def base(family: str) -> tuple[dict[str, Any], dict[str, Raw]]:
    """Metadata and tensors of a sound file, some of whose matrices are blocks."""
    rng, config = np.random.default_rng(0), small(family, hidden_size=64, num_hidden_layers=2, intermediate_size=96)
    words: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*map(chr, range(33, 127)), "<s>", "</s>", "Ġ"], "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": Typed(5, [1] * 94 + [3, 3, 1]), "tokenizer.ggml.bos_token_id": 94,
        "tokenizer.ggml.eos_token_id": 95, "tokenizer.chat_template": "{{ messages[0]['content'] }}",
        "general.quantization_version": 2}
    found = {name: raw(tensor) for name, tensor in renamed(config, tensors(config)).items()}
    kinds = [kind for kind in QUANTIZED if TYPES[kind].weights == 32]
    for name, tensor in found.items():
        if len(tensor.shape) == 2 and tensor.shape[1] % 32 == 0 and rng.random() < 0.5:
            kind = kinds[int(rng.integers(len(kinds)))]
            data = random_blocks(rng, kind, *tensor.shape)
            found[name] = Raw(TYPES[kind].id, tensor.shape, data.tobytes())
    return metadata(config) | words, found


def written(rng: Rng, family: str, changed_bytes: Any, done: list[str]) -> bytes:
    """The bytes of a file with one to three things in it changed."""
    keys, found = (dict(part) for part in base(family))
    pieces: dict[str, bytes] = {}
    claims: dict[str, int] = {}
    for _ in range(int(rng.integers(1, 4))):
        what = rng.random()
        if what < 0.45:
            change_key(rng, keys, done)
        elif what < 0.85:
            change_tensor(rng, found, pieces, done)
        else:
            claims[pick(rng, ("version", "n_tensors", "n_pairs"))] = pick(rng, (0, 1, 2, 4, 1000, 2**20, 2**31))
            done.append(str(claims))
    infos, data = [], b""
    for name, tensor in found.items():
        infos.append(pieces.get(name) or info(name, tensor.shape[::-1], tensor.type, len(data)))
        data += tensor.data + b"\0" * (-len(tensor.data) % 32)
    content = container([pair(key, value) for key, value in keys.items()], infos, data, **claims)
    if rng.random() < 0.3:
        done.append("bytes")
        content = changed_bytes(rng, content)
    return content


def pick(rng: Rng, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def change_key(rng: Rng, keys: dict[str, Any], done: list[str]) -> None:
    key, value = pick(rng, tuple(keys)), pick(rng, HOSTILE)
    if rng.random() < 0.3:
        key = f"{keys.get('general.architecture', 'llama')}.{pick(rng, KEYS)}"
    if rng.random() < 0.15:
        keys.pop(key, None)
        done.append(f"drop {key}")
        return
    if rng.random() < 0.1:  # a value of any type and any length
        kind, array = int(rng.integers(0, 14)), rng.random() < 0.5
        value = (struct.pack("<IIQ", 9, kind, pick(rng, (0, 1, 50, 2**20, 2**60))) if array
                 else struct.pack("<IQ", kind, int(rng.integers(0, 2**63))))
    keys[key] = value
    done.append(f"{key} = {repr(value)[:60]}")


def change_tensor(rng: Rng, found: dict[str, Raw], pieces: dict[str, bytes], done: list[str]) -> None:
    name = pick(rng, tuple(found) or ("x",))
    tensor, how = found.get(name, Raw(0, (1,), bytes(4))), pick(rng, ("drop", "add", "info", "type", "bits", "shape"))
    done.append(f"{how} {name}")
    if how == "drop":
        found.pop(name, None)
    elif how == "add":
        eight = Raw(0, (8,), np.float32(rng.standard_normal(8)).tobytes())
        found[pick(rng, NAMES)] = eight if rng.random() < 0.5 else tensor
    elif how == "type":
        found[name] = tensor._replace(type=pick(rng, (*range(44), 99)))
    elif how == "shape":
        found[name] = tensor._replace(shape=tuple(reversed(tensor.shape)) if rng.random() < 0.5 else (4, 2, 2))
    elif how == "bits":
        data = bytearray(tensor.data)
        for i in rng.integers(0, max(len(data), 1), 8):
            data[i : i + 1] = rng.bytes(1) if i < len(data) else b""
        found[name] = tensor._replace(data=bytes(data))
    else:
        sizes = [pick(rng, (0, 1, 32, 64, 2**31, 2**32, 2**63, 2**64 - 1)) for _ in range(int(rng.integers(0, 6)))]
        pieces[name] = info(pick(rng, (name, "", "a\0b", b"\xff", "x" * 300)), sizes, pick(rng, (0, 2, 12, 43)),
                            pick(rng, (0, 32, 33, 2**40, 2**64 - 32)), pick(rng, (None, 0, 4, 5, 2**32 - 1)))
