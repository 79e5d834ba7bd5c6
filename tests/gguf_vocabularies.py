"""Vocabularies as GGUF files hold them, of our own making: metadata by key, and texts for them."""
from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

GOLDEN = Path(__file__).parent / "golden_tokens.json"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
Metadata = dict[str, Any]

# Characters of every kind that expressions tell apart; each pair of them is a token, so that ids show where words end.
LETTERS = "alAsT19 \n\r.'/_$é́你〆\u3000(!\u2019ñЖ"


def metadata(kind: str, tokens: Iterable[str], types: Iterable[int], **more: Any) -> Metadata:
    """Keys of tokenizer.ggml; a key with a dot in it is taken as it is, a value that is None is left out."""
    keys = {"model": kind, "tokens": list(tokens), "token_type": np.array(list(types), np.int32)} | more
    return {key if "." in key else f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def as_bytes(text: str) -> str:
    """The text as byte-level vocabularies write it."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(piece for piece, _ in byte_level.pre_tokenize_str(text))


def pairs_of_letters(pre: str | None, **more: Any) -> Metadata:
    """A byte-level vocabulary of the bytes, LETTERS, and all pairs of those; three control and two other tokens."""
    letters = [as_bytes(letter) for letter in LETTERS]
    tokens = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    merges = []
    for letter in letters:
        for n in range(1, len(letter)):
            merges.append((letter[:n], letter[n]))
            tokens[letter[: n + 1]] = None
    for left in letters:
        for right in letters:
            merges.append((left, right))
            tokens[left + right] = None
    added = {"<s>": CONTROL, "</s>": CONTROL, "<|im_end|>": CONTROL, "<think>": USER_DEFINED, "  ": USER_DEFINED}
    keys = {"merges": [f"{left} {right}" for left, right in dict.fromkeys(merges)], "pre": pre,
            "bos_token_id": len(tokens), "eos_token_id": len(tokens) + 1, "eot_token_id": len(tokens) + 2}
    return metadata("gpt2", [*tokens, *added], [NORMAL] * len(tokens) + list(added.values()), **(keys | more))


PIECES = """▁ ▁▁ ▁a ▁an ▁and an and na nan ban bana ▁ban ana nana a b n d é éa 日 日本 本 本日 . .. ... ▁. s > </ /s < /
    """.split() + ["\n", "a\n"]


def words(**more: Any) -> Metadata:
    """A SentencePiece vocabulary: pieces of a few words with scores that make merges compete, bytes, other tokens."""
    rng = Random(5)
    added = {"<turn>": CONTROL, "[x]": USER_DEFINED, "\n\n": USER_DEFINED, "ab": USER_DEFINED, "unused": UNUSED}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *PIECES, *added]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(PIECES), *added.values()]
    scores = np.array([-rng.randrange(10 ** 6) / 1000 for _ in tokens], np.float32)
    return metadata("llama", tokens, types, **({"scores": scores, "bos_token_id": 1, "eos_token_id": 2,
                                                "unknown_token_id": 0} | more))


def texts(letters: str, special: Iterable[str], n: int, seed: int = 0) -> list[str]:
    """Random texts of these letters, with special tokens in some."""
    rng, special = Random(seed), list(special)
    found = ["", " ", "  ", "\n", *special]
    while len(found) < n:
        parts = [rng.choice(special) if rng.random() < 0.08 else "".join(rng.choices(letters, k=rng.randint(1, 4)))
                 for _ in range(rng.randint(1, 6))]
        found.append("".join(parts))
    return found


BYTE_TEXTS = texts(LETTERS, ("a<s>", "<|im_end|>", "<think>", "'ll", "'S", "  "), 40)
WORD_TEXTS = texts("aabnnd é日本.\n<>/s ▁🎉", (
    "a<s>", "</s>", "<turn>", "[x]", "\n\n", "ab", "banana and", "unused"), 150)


def golden() -> Mapping[str, list[list[int]]]:
    """Ids by llama.cpp (tools/make_golden_tokens.py): of BYTE_TEXTS by each `pre`, of WORD_TEXTS for the rest."""
    return json.loads(GOLDEN.read_text())
