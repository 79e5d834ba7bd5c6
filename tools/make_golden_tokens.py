"""Write tests/golden_tokens.json: ids of the texts in tests/gguf_vocabularies.py, by llama.cpp.

    python tools/make_golden_tokens.py        # needs gguf 0.19 and llama-cpp-python 0.3.36

A text is null where llama.cpp differs from the models' makers: its expressions know capitals and small letters of ASCII
alone, and its ideographic space is in no range of characters. It puts BOS before a text that begins with it.
"""
from __future__ import annotations

import ctypes
import json
import sys
import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp.llama_cpp as llama
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import gguf_vocabularies as vocabularies

from forge_c.models.pre_tokenizers import PRE_TOKENIZERS

NOT_COMPARED = dict.fromkeys(("gpt-4o", "tekken", "granite-embed-multi-97m"), "ЖÁ\u0301") | dict.fromkeys(
    ("deepseek-llm", "deepseek-coder"), "\u3000")


def write(path: Path, metadata: Mapping[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def encoded(metadata: Mapping[str, Any], texts: Sequence[str], parse: bool = True) -> list[list[int]]:
    """By llama.cpp, with special tokens around; `parse`: control tokens are found in texts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vocabulary.gguf")
        write(path, metadata)
        parameters = llama.llama_model_default_params()
        parameters.vocab_only = True
        model = llama.llama_model_load_from_file(str(path).encode(), parameters)
        vocab, found = llama.llama_model_get_vocab(model), []
        for text in texts:
            data = text.encode()
            ids = (llama.llama_token * (len(data) + 16))()
            n = llama.llama_tokenize(vocab, data, len(data), ids, len(ids), True, parse)
            found.append(list(ids[:n]))
        llama.llama_model_free(model)
    return found


def main() -> None:
    silence = llama.llama_log_callback(lambda *_: None)  # has to live as long as it may be called
    llama.llama_log_set(silence, ctypes.c_void_p(0))
    golden: dict[str, list[list[int] | None]] = {}
    names = {pre: name for name, pre in sorted(PRE_TOKENIZERS.items(), reverse=True) if name not in ("qwen2", "qwen35")}
    for name in sorted({*names.values(), "qwen2", "qwen35"}):
        texts = [unicodedata.normalize("NFC", t) if name in ("qwen2", "qwen35") else t for t in vocabularies.BYTE_TEXTS]
        ids = encoded(vocabularies.pairs_of_letters(name), texts)
        golden[name] = [None if any(c in text for c in NOT_COMPARED.get(name, "")) else found
                        for text, found in zip(texts, ids, strict=True)]
    for prefix in (True, False):
        words = vocabularies.words(add_space_prefix=prefix)
        golden[f"words {prefix}"] = encoded(words, vocabularies.WORD_TEXTS)
        golden[f"words {prefix} plain"] = encoded(words, vocabularies.WORD_TEXTS, parse=False)
    golden["bytes plain"] = encoded(vocabularies.pairs_of_letters("smollm"), vocabularies.BYTE_TEXTS, parse=False)
    lines = [f" {json.dumps(name)}: {json.dumps(ids, separators=(',', ':'))}" for name, ids in golden.items()]
    vocabularies.GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
