"""What generate returns when it is asked for more than the text."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, eq=False)
class Completion:
    """What follows one prompt.

    Attributes:
        text: without special tokens, and without the stop text that ended it; None if the model has no tokenizer.
        ids: (m,) int64, the end token included.
        logprobs: one dict a token, id -> natural logarithm of its probability by the model's own logits: of the k most
            likely tokens, best first, and of the one that was taken. None if none were asked for.
        finish_reason: "stop" at an end token or a stop text, "length" when there was no room for more or no more was
            asked for, "cancelled" if the stream was closed or logits_processor raised StopIteration. In a stream, None
            for a piece that is not the last.
    """

    text: str | None
    ids: NDArray[np.int64]
    logprobs: tuple[dict[int, float], ...] | None
    finish_reason: FinishReason | None

