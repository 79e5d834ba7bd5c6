"""Prompts in, tokens out: prefill row by row, then one step for all rows at a time.

A row's tokens do not depend on what else is in the batch: each prompt is fed alone, the kernels give a row the same
bits in any batch, and each row has a random generator of its own. A row that has ended reads its last token again for
as long as others go on, which leaves its state as it is.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge_c.models.completion import Completion, FinishReason
from forge_c.models.decoder import Decoder
from forge_c.models.sampling import Sampler, log_probabilities, most_likely
from forge_c.models.tokenizer import TextStream, Tokenizer, stop_ids, text_stream
from forge_c.state import ModelCache

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
LogitsProcessor = Callable[[Ids, Logits], Any]
_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Options:
    """What generate was asked for, checked. prompts, generators, most (new tokens): one a row, n rows for each prompt;
    answers: of each row, whether what comes does not go on within the prompt's last words; cache: the caller's; whole:
    the prompts begin with what it holds, as far as they do."""

    prompts: Sequence[Ids]
    sampler: Sampler
    generators: Sequence[np.random.Generator]
    most: Sequence[int]
    answers: Sequence[bool]
    n: int = 1
    stop: Sequence[str] = ()
    eos: frozenset[int] = frozenset()
    cache: ModelCache | None = None
    cache_dtype: str = "float32"
    logprobs: int = 0
    processor: LogitsProcessor | None = None
    whole: bool = False


@dataclass
class Row:
    """One prompt and what has been generated after it."""

    prompt: Ids
    before: Ids  # what a cache held
    rng: np.random.Generator
    stream: TextStream | None
    most: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    text: str = ""  # what the reader may see
    held: str = ""  # the end of the text that may yet become a stop string
    finish: FinishReason | None = None

    @property
    def done(self) -> bool:
        """Whether nothing more will be generated."""
        return self.finish is not None

    @property
    def length(self) -> int:
        """How many tokens it has."""
        return len(self.before) + len(self.prompt) + len(self.ids)

    def so_far(self) -> Ids:
        """All of its tokens."""
        return np.concatenate([self.before, self.prompt, np.array(self.ids, np.int64)])


class Generation:
    """One call of generate, step by step; afterwards its counts and times say how fast it went."""

    def __init__(self, decoder: Decoder, options: Options, tokenizer: Tokenizer | None) -> None:
        self.decoder, self.options = decoder, options
        held = [_NONE] * len(options.prompts) if options.cache is None or options.whole else options.cache.ids
        self.rows = [Row(prompt, before, rng, text_stream(tokenizer, _context(before, prompt, answer)), most)
                     for prompt, before, rng, answer, most in zip(options.prompts, held, options.generators,
                                                                  options.answers, options.most, strict=True)]
        self.eos = options.eos | stop_ids(tokenizer, options.stop)
        self.prompt_tokens = self.new_tokens = 0
        self.prompt_seconds = self.decode_seconds = 0.0
        self.progress: Callable[[int, int], None] = lambda read, total: None  # called as prompts are read

    def completions(self) -> list[Completion]:
        """What there is of each row."""
        return [Completion(None if row.stream is None else row.text, np.array(row.ids, np.int64),
                           tuple(row.logprobs) if self.options.logprobs else None, row.finish) for row in self.rows]

    def piece(self, i: int, token: int | None, text: str) -> Completion:
        """What a step gave row i."""
        row = self.rows[i]
        new = [] if token is None else [token]
        logprobs = tuple(row.logprobs[len(row.ids) - len(new) :]) if self.options.logprobs else None
        return Completion(None if row.stream is None else text, np.array(new, np.int64), logprobs, row.finish)

    def cancel(self) -> None:
        """Have no row go on."""
        for row in self.rows:
            self._end(row, "cancelled")

    def steps(self) -> Iterator[list[tuple[int, int | None, str]]]:
        """(row, token, text that became visible) of each row that is not done, step after step. None instead of a
        token: logits_processor ended the row."""
        if not self.rows:
            return
        try:
            yield from self._steps()
        except BaseException:
            self.cancel()
            raise

    def _steps(self) -> Iterator[list[tuple[int, int | None, str]]]:
        start = time.perf_counter()
        groups, logits = self._prefilled()
        seen = self._seen()
        self.prompt_seconds = time.perf_counter() - start
        start = time.perf_counter()
        while going := [i for i, row in enumerate(self.rows) if not row.done]:
            out = [(i, *self._advance(self.rows[i], logits[i], seen[i])) for i in going]
            self.new_tokens += sum(token is not None for _, token, _ in out)
            self.decode_seconds = time.perf_counter() - start
            yield out
            for group, cache in groups:
                if not all(self.rows[i].done for i in group):
                    logits[group] = self._read_last(group, cache)
        if self.options.cache is not None:
            for group, cache in groups:
                self._read_last(group, cache, logits=False)

    def _prefilled(self) -> tuple[list[tuple[list[int], ModelCache]], Logits]:
        """Rows that decode together, with their cache, and the logits (rows, vocab) after their prompts."""
        wanted = any(row.most for row in self.rows)
        logits = np.empty((len(self.rows), self.decoder.spec.vocab_size if wanted else 0), np.float32)
        given = self.options.cache
        if given is not None:
            if self.options.whole:
                self._forget_the_rest(given)
            for i, row in enumerate(self.rows):
                logits[i] = self._prefill(row, given.row(i), wanted)
            rows = range(len(self.rows))
            return ([(list(rows), given)] if given.can_reread else [([i], given.row(i)) for i in rows]), logits
        if not wanted:
            for row in self.rows:
                row.finish = "length"
            return [], logits
        groups = []
        for group in self._groups():
            firsts = group[:: self.options.n]
            room = max(len(self.rows[i].prompt) + self.rows[i].most for i in group)
            cache = self.decoder.new_cache(len(firsts), room, self.options.cache_dtype)
            for b, i in enumerate(firsts):
                logits[i : i + self.options.n] = self._prefill(self.rows[i], cache.row(b), True)
            groups.append((group, cache if self.options.n == 1 else cache.fork(self.options.n)))
        return groups, logits

    def _groups(self) -> list[list[int]]:
        """Rows that decode together: all of them."""
        return [list(range(len(self.rows)))]

    def _forget_the_rest(self, cache: ModelCache) -> None:
        """Truncate each row to what its prompt begins with, and the prompt to what the row lacks, a token at least."""
        kept = np.zeros(len(self.rows), np.int64)
        for i, (row, held) in enumerate(zip(self.rows, cache.ids, strict=True)):
            length = min(len(held), len(row.prompt) - 1)
            differs = np.flatnonzero(held[:length] != row.prompt[:length])
            kept[i] = differs[0] if len(differs) else length
        kept = cache.nearest(kept)  # a layer with a window, or a recurrent one, cannot go back to everywhere
        cache.truncate(kept)
        for row, n in zip(self.rows, kept.tolist(), strict=True):
            row.before, row.prompt = row.prompt[:n], row.prompt[n:]

    def _prefill(self, row: Row, cache: ModelCache, wanted: bool) -> Logits:
        before, total = self.prompt_tokens, self._to_read()
        self.prompt_tokens += len(row.prompt)
        return prefill(self.decoder, row.prompt, cache, logits=wanted,
                       progress=lambda read: self.progress(before + read, total))

    def _to_read(self) -> int:
        """Tokens of all prompts; samples share theirs, unless they have rows in a cache."""
        rows = self.rows if self.options.cache is not None else self.rows[:: self.options.n]
        return sum(len(row.prompt) for row in rows)

    def _read_last(self, group: list[int], cache: ModelCache, *, logits: bool = True) -> Any:
        """Have the cache read the last token of each row, where it has not -> logits (rows, vocab)."""
        rows = [self.rows[i] for i in group]
        tokens = np.array([[row.ids[-1] if row.ids else row.prompt[-1]] for row in rows], np.int64)
        fresh = None
        if cache.can_reread or len(rows) == 1:  # otherwise rows that have ended go on, in a cache that nobody sees
            unread = [row.length - n for row, n in zip(rows, cache.lengths.tolist(), strict=True)]
            if not set(unread) <= {0, 1}:
                raise RuntimeError(f"generate: the cache holds {cache.lengths.tolist()} tokens, expected "
                                   f"{[row.length for row in rows]}: something else has used it meanwhile")
            if not any(unread):
                return None
            fresh = None if all(unread) else np.array(unread, bool)
        found, _ = self.decoder.forward(tokens, cache, logits=logits, last_only=True, fresh=fresh)
        return found[:, 0] if logits else None

    def _seen(self) -> NDArray[np.bool_]:
        """(rows, vocab): tokens that stand in each prompt, for the repetition penalty."""
        seen = np.zeros((len(self.rows), self.decoder.spec.vocab_size), bool)
        for flags, row in zip(seen, self.rows, strict=True):
            flags[row.before[row.before >= 0]] = True
            flags[row.prompt] = True
        return seen

    def _advance(self, row: Row, logits: Logits, seen: NDArray[np.bool_]) -> tuple[int | None, str]:
        """Add one token to the row: (token, text that became visible)."""
        if len(row.ids) == row.most:
            return None, self._end(row, "length")
        try:
            token = self.options.sampler.pick(logits, seen, row.rng, self._processor(row))
        except StopIteration:
            return None, self._end(row, "cancelled")
        seen[token] = True
        row.ids.append(token)
        if self.options.logprobs:
            row.logprobs.append(most_likely(log_probabilities(logits), self.options.logprobs, token))
        if token in self.eos:
            return token, self._end(row, "stop")
        if row.stream is not None:
            row.held += row.stream.push(token)
        if len(row.ids) == row.most:
            return token, self._end(row, "length")
        return token, self._release(row)

    def _processor(self, row: Row) -> Callable[[Logits], Any] | None:
        processor = self.options.processor
        return None if processor is None else lambda logits: processor(row.so_far(), logits)

    def _end(self, row: Row, reason: FinishReason) -> str:
        """Let the row end for that reason, unless it has ended before: the text that became visible."""
        if row.done:
            return ""
        row.finish = reason
        if row.stream is not None:
            row.held += row.stream.rest()
        return self._release(row)

    def _release(self, row: Row) -> str:
        """Move to row.text what cannot be part of a stop string any more; a whole stop string ends the row."""
        found = [at for at in (row.held.find(s) for s in self.options.stop) if at >= 0]
        if found:
            row.finish = "stop"
            visible, row.held = row.held[: min(found)], ""
        else:
            kept = 0 if row.done else max((_overlap(row.held, s) for s in self.options.stop), default=0)
            visible, row.held = row.held[: len(row.held) - kept], row.held[len(row.held) - kept :]
        row.text += visible
        return visible


class Stream(Iterator[Any]):
    """The pieces of generate(stream=True), made as they are asked for.

    `completions` says at any time what there is so far, one Completion a row. `close()` ends the generation: rows that
    were not at their end then have finish_reason "cancelled".
    """

    def __init__(self, run: Generation, pieces: Iterator[Any]) -> None:
        self.run, self._pieces = run, pieces

    def __next__(self) -> Any:
        return next(self._pieces)

    def close(self) -> None:
        """Make no more pieces."""
        self._pieces.close()  # type: ignore[attr-defined]
        self.run.cancel()

    @property
    def completions(self) -> list[Completion]:
        """What there is so far."""
        return self.run.completions()


def prefill(decoder: Decoder, ids: Ids, cache: ModelCache, *, logits: bool = True,
            progress: Callable[[int], None] = lambda read: None) -> Logits:
    """Feed ids (n,), n >= 1, into a cache of one row -> the logits (vocab,) after its last token, or (0,). progress:
    called with how many have been read."""
    found: Any = None
    with cache.expecting(len(ids)):
        for start in range(0, len(ids), decoder.pass_tokens):
            stop = start + decoder.pass_tokens
            found, _ = decoder.forward(ids[None, start:stop], cache, logits=logits and stop >= len(ids), last_only=True)
            progress(min(stop, len(ids)))
    return np.empty(0, np.float32) if found is None else found[0, 0]


def _context(before: Ids, prompt: Ids, is_answer: bool) -> Ids:
    """What the new text goes on with: an answer begins a text of its own."""
    return _NONE if is_answer else np.concatenate([before, prompt])


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
