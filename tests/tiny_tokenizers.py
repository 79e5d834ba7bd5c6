"""Tokenizers of a few tokens, of the two kinds that people publish, and folders that hold them."""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_folder import write_json
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors


def control(text: str, **flags: Any) -> AddedToken:
    return AddedToken(text, **({"special": True, "normalized": False} | flags))


def bytelevel(*special: str | AddedToken) -> Tokenizer:
    """Llama 3's and Qwen's kind: the 256 bytes without merges, <|endoftext|>, and the given control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    found.add_tokens([control(t) if isinstance(t, str) else t for t in ("<|endoftext|>", *special)])
    return found


def sentencepiece(*words: str, special: tuple[str | AddedToken, ...] = ()) -> Tokenizer:
    """LLaMA 2's kind: words, their letters, the 256 bytes; a text gets <s> and a space before it."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    merges = []
    for character in sorted({"▁", *"".join(words)}):
        vocab[character] = len(vocab)
    for word in words:
        for n in range(1, len(word)):
            if (word[:n], word[n]) not in merges:
                merges.append((word[:n], word[n]))
            vocab.setdefault(word[: n + 1], len(vocab))
    found = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    found.add_tokens([control(t) if isinstance(t, str) else t for t in ("<unk>", "<s>", "</s>", *special)])
    found.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return found


def folder_of(folder: Path, backend: Tokenizer, config: Mapping[str, Any] | None = None,
              files: Mapping[str, Any] | None = None) -> Path:
    """The folder, with tokenizer.json, tokenizer_config.json and other files: JSON, or a text."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | dict(config or {}))
    for name, value in (files or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return folder
