"""Prompts in, tokens out: prefill row by row, then one step for all rows at a time.

A row's tokens do not depend on what else is in the batch: each prompt is fed alone, the kernels give a row the same
bits in any batch, and each row has a random generator of its own.
"""
from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from forge_c.functional import KV_CHUNK
from forge_c.models.decoder import Decoder
from forge_c.models.sampling import Sampler
from forge_c.models.tokenizer import TextStream, Tokenizer, stop_ids, text_stream
from forge_c.state import ModelCache


@dataclass
class Row:
    """One prompt and what has been generated after it."""

    prompt: NDArray[np.int64]
    rng: np.random.Generator
    stream: TextStream | None
    ids: list[int] = field(default_factory=list)
    text: str = ""  # what the reader may see
    held: str = ""  # the end of the text that may yet become a stop string
    done: bool = False


class Generation:
    """One call of generate, step by step; afterwards its counts and times say how fast it went."""

    def __init__(self, decoder: Decoder, prompts: Sequence[NDArray[np.int64]], max_new_tokens: int, sampler: Sampler,
                 seed: int | None, stop: Sequence[str], eos: frozenset[int], tokenizer: Tokenizer | None) -> None:
        self.decoder, self.sampler, self.max_new_tokens = decoder, sampler, max_new_tokens
        self.stop, self.eos = stop, eos | stop_ids(tokenizer, stop)
        self.rows = [Row(p, np.random.default_rng(seed), text_stream(tokenizer, p)) for p in prompts]
        self.prompt_tokens, self.new_tokens = sum(map(len, prompts)), 0
        self.prompt_seconds = self.decode_seconds = 0.0

    def steps(self) -> Iterator[list[tuple[int, int, str]]]:
        """(row, token, text that became visible) of each row that is not done, step after step."""
        if not self.rows or self.max_new_tokens == 0:
            return
        start = time.perf_counter()
        groups = self._groups()
        logits = np.stack([prefill(self.decoder, self.rows[i].prompt, cache.row(n))
                           for group, cache in groups for n, i in enumerate(group)])
        seen = self._seen()
        self.prompt_seconds = time.perf_counter() - start
        start = time.perf_counter()
        for step in range(1, self.max_new_tokens + 1):
            out = [(i, *self._advance(row, logits[i], seen[i], step))
                   for i, row in enumerate(self.rows) if not row.done]
            self.new_tokens += len(out)
            self.decode_seconds = time.perf_counter() - start
            yield out
            if all(row.done for row in self.rows) or step == self.max_new_tokens:
                return
            for group, cache in groups:
                tokens = np.array([[self.rows[i].ids[-1]] for i in group], np.int64)
                found, _ = self.decoder.forward(tokens, cache, last_only=True)
                logits[group] = found[:, 0]

    def _groups(self) -> list[tuple[list[int], ModelCache]]:
        """Rows that decode together, and their cache: all of them, or each alone where its room changes its angles."""
        rows = range(len(self.rows))
        groups = [[i] for i in rows] if self.decoder.angles_depend_on_length else [list(rows)]
        rooms = [max(len(self.rows[i].prompt) for i in group) + self.max_new_tokens for group in groups]
        return [(g, self.decoder.new_cache(len(g), room)) for g, room in zip(groups, rooms, strict=True)]

    def _seen(self) -> NDArray[np.bool_]:
        """(rows, vocab): tokens that stand in each prompt, for the repetition penalty."""
        seen = np.zeros((len(self.rows), self.decoder.spec.vocab_size), bool)
        for flags, row in zip(seen, self.rows, strict=True):
            flags[row.prompt] = True
        return seen

    def _advance(self, row: Row, logits: NDArray[np.float32], seen: NDArray[np.bool_], step: int) -> tuple[int, str]:
        """Add one token to the row: (token, text that became visible)."""
        token = self.sampler.pick(logits, seen, row.rng)
        seen[token] = True
        row.ids.append(token)
        ended = token in self.eos
        row.done = ended or step == self.max_new_tokens
        if row.stream is None:
            return token, ""
        row.held += "" if ended else row.stream.push(token)
        if row.done:
            row.held += row.stream.rest()
        return token, self._release(row)

    def _release(self, row: Row) -> str:
        """Move to row.text what cannot be part of a stop string any more; a whole stop string ends the row."""
        found = [at for at in (row.held.find(s) for s in self.stop) if at >= 0]
        if found:
            row.done = True
            visible, row.held = row.held[: min(found)], ""
        else:
            kept = 0 if row.done else max((_overlap(row.held, s) for s in self.stop), default=0)
            visible, row.held = row.held[: len(row.held) - kept], row.held[len(row.held) - kept :]
        row.text += visible
        return visible


def prefill(decoder: Decoder, ids: NDArray[np.int64], cache: ModelCache) -> NDArray[np.float32]:
    """Feed one prompt (n,), n >= 1, into an empty cache of one row -> the logits (vocab,) after its last token."""
    for start in range(0, len(ids), KV_CHUNK):
        stop = start + KV_CHUNK
        logits, _ = decoder.forward(ids[None, start:stop], cache, logits=stop >= len(ids), last_only=True)
    return logits[0, 0]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
