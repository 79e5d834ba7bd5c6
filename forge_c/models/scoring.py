"""What a model makes of given texts: hidden states, vectors, log-probabilities."""
from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c.checks import integer
from forge_c.functional import KV_CHUNK
from forge_c.models.prompts import Ids, texts_or_ids
from forge_c.models.sampling import log_probabilities
from forge_c.state import ModelCache
from forge_c.state.model import all_or_nothing

if TYPE_CHECKING:
    from forge_c.models.model import Model

_BATCH_TOKENS = 2 * KV_CHUNK  # of a pass over several texts
_LOGITS = 1 << 24  # that stand at once, 64 MB


def hidden_states(model: Model, ids: ArrayLike, cache: ModelCache | None, layer: int) -> NDArray[np.float32]:
    """(batch, seq, hidden); see Model.hidden."""
    layers = model.config.n_layers
    at = integer("hidden", "layer", layer)
    if not -layers - 1 <= at < layers + 1:
        raise IndexError(f"hidden: layer is {at}, expected {-layers - 1} to {layers}")
    tokens, cache = model._fed("hidden", ids, cache)
    at %= layers + 1
    batch, seq = tokens.shape
    found = np.empty((batch, seq, model.config.hidden_size), np.float32)
    with all_or_nothing(cache, seq):
        for start in range(0, seq if batch else 0, model._decoder.result_tokens):
            chunk = slice(start, start + model._decoder.result_tokens)
            found[:, chunk] = model._decoder.hidden(tokens[:, chunk], cache, at)
    return found


def embedded(model: Model, texts: Any, pooling: str, normalize: bool) -> NDArray[np.float32]:
    """(n, hidden); see Model.embed."""
    if pooling not in ("mean", "last"):
        raise ValueError(f"embed: pooling is {pooling!r}, expected 'mean' or 'last'")
    rows = _rows("embed", model, texts)
    found = np.zeros((len(rows), model.config.hidden_size), np.float64)
    step = model._decoder.result_tokens
    for group, ids, lengths in _batches(model, rows):
        cache = model.new_cache(*ids.shape)
        with cache.expecting(ids.shape[1]):
            for start in range(0, ids.shape[1], step):
                part = model._decoder.hidden(ids[:, start : start + step], cache, model.config.n_layers)
                for i, h, length in zip(group, part, lengths, strict=True):
                    h = h[: max(0, length - start)]
                    if pooling == "mean":
                        found[i] += h.sum(0, dtype=np.float64) / length
                    elif len(h) and start + step >= length:
                        found[i] = h[-1]
    if normalize:
        found /= np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    return found.astype(np.float32)


def scored(model: Model, texts: Any) -> list[tuple[Ids, NDArray[np.float64]]]:
    """(ids, logprobs) of each text; see Model.score."""
    rows = _rows("score", model, texts)
    found = [np.empty(len(row) - 1, np.float64) for row in rows]
    for group, ids, lengths in _batches(model, rows):
        step = max(1, min(model._decoder.result_tokens, _LOGITS // (model.config.vocab_size * len(group))))
        cache = model.new_cache(*ids.shape)
        with cache.expecting(ids.shape[1]):
            for start in range(0, ids.shape[1] - 1, step):
                stop = min(start + step, ids.shape[1] - 1)
                logits, _ = model._decoder.forward(ids[:, start:stop], cache)
                for i, row, z, length in zip(group, ids, logits, lengths, strict=True):
                    for t in range(start, min(stop, length - 1)):
                        found[i][t] = log_probabilities(z[t - start])[row[t + 1]]
    return list(zip(rows, found, strict=True))


def _rows(function: str, model: Model, texts: Any) -> list[Ids]:
    if isinstance(texts, list | tuple) and not texts:
        return []
    given = texts_or_ids(function, texts, model.tokenizer, model.config.vocab_size, True)
    for i, row in enumerate(given.rows):
        if len(row) == 0:
            raise ValueError(f"{function}: text {i} is empty, expected at least one token")
    return given.rows


def _batches(model: Model, rows: list[Ids]) -> Iterator[tuple[list[int], Ids, list[int]]]:
    """Texts of like lengths together, or each alone where its length changes its angles: (which, ids (batch, longest)
    with zeros behind the shorter ones, lengths)."""
    most = 1 if model._decoder.angles_depend_on_length else _BATCH_TOKENS
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    while order:
        longest = len(rows[order[-1]])
        group = order[-max(1, most // longest) :]
        del order[-len(group) :]
        ids = np.zeros((len(group), longest), np.int64)
        for line, i in zip(ids, group, strict=True):
            line[: len(rows[i])] = rows[i]
        yield group, ids, [len(rows[i]) for i in group]
