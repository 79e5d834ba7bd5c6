"""forge-c chat: questions from a terminal or a pipe, answers as they come; the cache holds the conversation."""
from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from forge_c.models import Model
    from forge_c.models.generation import Stream

_HELP = "/reset forgets the conversation, Ctrl-C stops an answer, Ctrl-D or /exit ends"


@contextmanager
def utf8_stdin() -> Iterator[TextIO]:
    """Standard input as UTF-8 in whatever locale; ValueError for what is none."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    try:
        yield sys.stdin if sys.stdin is not None else io.StringIO()
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin has byte 0x{error.object[error.start]:02x} at {error.start}, expected UTF-8") from None


class Conversation:
    """What was said, and the cache that has read it."""

    def __init__(self, model: Model, system: str | None, room: int | None, options: Mapping[str, Any]) -> None:
        if getattr(model.tokenizer, "chat_template", None) is None:
            raise ValueError("chat: the model has no chat template; forge-c generate continues a text")
        self.model, self.options = model, dict(options)
        self.seed = self.options.pop("seed", None)
        self.begun = [] if system is None else [{"role": "system", "content": system}]
        self.cache = model.new_cache(1, room, dtype=self.options.pop("cache_dtype", "float32"))
        self.messages = list(self.begun)

    def ask(self, text: str) -> Stream:
        """The answer to come; each turn draws from a seed of its own."""
        seed = None if self.seed is None else self.seed + len(self.messages)
        stream: Stream = self.model.generate(
            messages=[*self.messages, {"role": "user", "content": text}], cache=self.cache, seed=seed, stream=True,
            **self.options)
        return stream

    def heard(self, text: str, answer: str) -> None:
        """Remember both."""
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = list(self.begun)
        self.cache.truncate(0)


def run(conversation: Conversation, watch: Any) -> int:
    """Answer until the input ends; the exit status. watch: a context for the reading of a stream."""
    by_hand = sys.stdin is not None and sys.stdin.isatty()
    if by_hand:
        print(_HELP, file=sys.stderr)
    for text in _lines(by_hand):
        if text.strip() == "/reset":
            conversation.reset()
        elif text.strip() == "/exit":
            break
        elif text.strip():
            try:
                _answer(conversation, text, watch, by_hand)
            except ValueError as error:
                if not by_hand:
                    raise
                print(f"forge-c chat: {str(error).removeprefix('generate: ')}; /reset begins anew", file=sys.stderr)
    return 0


def _answer(conversation: Conversation, text: str, watch: Any, by_hand: bool) -> None:
    """Write the answer as it comes. Ctrl-C ends it, and what was said of it stays said; in a pipe, where nobody asks
    on, it ends the program too, after the line."""
    stream, shown, stopped = conversation.ask(text), 0, None
    try:
        with watch(stream):
            for piece in stream:
                shown += len(piece)  # before: Ctrl-C is raised by the writing, when that is done
                sys.stdout.write(piece)
                sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        stopped = interrupt
    answer = stream.completions[0].text or ""
    sys.stdout.write(answer[shown:] + ("" if answer.endswith("\n") else "\n"))
    sys.stdout.flush()
    if stopped and not by_hand:
        raise stopped
    conversation.heard(text, answer)


def _lines(by_hand: bool) -> Iterator[str]:
    """What is typed, or the lines of what is piped in."""
    if not by_hand:
        with utf8_stdin() as lines:
            yield from (line.rstrip("\n") for line in lines)
        return
    with suppress(ImportError):
        import readline  # noqa: F401  input() edits lines by it
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(f"\n{_HELP}", file=sys.stderr)
