"""forge-c chat: in a pipe and at a terminal."""
from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from model_folder import following, small, write, write_chain, write_json

from forge_c.models import load

COMMAND = [sys.executable, "-m", "forge_c", "chat", "--threads", "1", "--model"]
TEMPLATE = ("{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
            "{% if add_generation_prompt %}<assistant> {% endif %}")
WORDS = ["</s>", "<user>", "<assistant>", "<system>", "hi", "hello", "there", "on", "and"]


def speaking(folder: Path, chain: dict[int, int] | None = None) -> Path:
    """A model that says "hello there" and ends, or follows a chain of its own."""
    write_chain(folder, following([2, 5, 6, 0]) if chain is None else chain, vocab=16, eos=0,
                tokenizer={"chat_template": TEMPLATE})
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="</s>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(folder / "tokenizer.json"))
    return folder


def piped(folder: Path, text: str, *options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, folder, *map(str, options)], input=text, capture_output=True, text=True,
                          timeout=120, check=False)


@pytest.fixture(scope="module")
def speaker(tmp_path_factory) -> Path:
    return speaking(tmp_path_factory.mktemp("speaker"))


def test_every_line_of_a_pipe_is_answered(speaker):
    done = piped(speaker, "hi\n\nhi there\n/reset\nhi")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello there\n" * 3, "")
    done = piped(speaker, "hi\n/exit\nhi\n")
    assert (done.returncode, done.stdout) == (0, "hello there\n")


@pytest.mark.parametrize("options", [{}, {"system": "on"}, {"temperature": 1.5, "seed": 4}])
def test_the_conversation_goes_on(tmp_path, options):
    """The same as messages= of everything that was said, turn after turn; /reset keeps the system message."""
    write(tmp_path, small(vocab_size=97, eos_token_id=0), tokenizer={"chat_template": TEMPLATE})
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {**{w: i for i, w in enumerate(WORDS)}, **{f"w{i}": i for i in range(len(WORDS), 97)}}, unk_token="</s>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    model, system = load(tmp_path), options.get("system")
    begun = [{"role": "system", "content": system}] if system else []
    messages, want, sampled = list(begun), [], {k: v for k, v in options.items() if k == "temperature"}
    for text in ("hi there", "and on", "/reset", "hi"):
        if text == "/reset":
            messages = list(begun)
            continue
        seed = {"seed": options["seed"] + len(messages)} if sampled else {}
        messages.append({"role": "user", "content": text})
        want.append(model.generate(messages=messages, max_new_tokens=8, **sampled, **seed))
        messages.append({"role": "assistant", "content": want[-1]})
    flags = [item for name, value in options.items() for item in (f"--{name}", value)]
    done = piped(tmp_path, "hi there\nand on\n/reset\nhi\n", "--max-new-tokens", 8, *flags)
    assert (done.stderr, done.stdout.splitlines()) == ("", want)


def test_the_models_own_sampling_by_default(tmp_path):
    speaking(tmp_path, {2: 5, 5: 6, 6: 5})
    write_json(tmp_path / "generation_config.json", {"do_sample": True, "top_k": 16, "temperature": 1e9})
    args = ("--max-new-tokens", 12, "--seed", 1)
    wild, tame = piped(tmp_path, "hi\n", *args).stdout, piped(tmp_path, "hi\n", *args, "--sampling", "greedy").stdout
    assert wild != tame and tame == "hello there " * 5 + "hello there\n"
    assert piped(tmp_path, "hi\n", *args, "--temperature", 0).stdout == tame


@pytest.mark.parametrize(("text", "options", "message"), [
    ("hi\n" * 30, ["--context", 40], r"\d+ tokens fill the cache of 40, and leave no room for another"),
    ("hi\n", ["--context", 0], "new_cache: max_seq_len is 0, expected at least 1"),
    (b"\xff\n", [], "stdin has byte 0xff at 0, expected UTF-8"),
])
def test_mistakes_in_a_pipe_end_it(speaker, text, options, message):
    data = text if isinstance(text, bytes) else text.encode()
    done = subprocess.run([*COMMAND, speaker, *map(str, options)], input=data, capture_output=True, check=False)
    assert done.returncode == 2 and re.fullmatch(f"forge-c chat: {message}\n", done.stderr.decode())


class Terminal:
    """A chat at a terminal: what is typed, and what is seen."""

    def __init__(self, *arguments: Any) -> None:
        self.mine, theirs = pty.openpty()
        self.process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdin=theirs, stdout=theirs, stderr=theirs,
                                        start_new_session=True)
        os.close(theirs)
        self.seen = ""

    def until(self, text: str, seconds: float = 60.0) -> str:
        """What is seen up to and with that text."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} did not come: {self.seen!r}"
            if select.select([self.mine], [], [], 0.2)[0]:
                try:
                    piece = os.read(self.mine, 4096)
                except OSError:  # the other side is gone
                    piece = b""
                assert piece, f"{text!r} did not come: {self.seen!r}"
                self.seen += piece.decode(errors="replace")
        found, _, self.seen = self.seen.partition(text)
        return found + text

    def type(self, text: str) -> None:
        os.write(self.mine, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def interrupted_until(self, text: str) -> None:
        """Again and again: a signal between a prompt and Python's wait for a key goes unseen until the next key."""
        for _ in range(60):
            self.interrupt()
            with suppress(AssertionError):
                self.until(text, 1.0)
                return
        self.until(text, 0.0)

    def ended(self) -> int:
        return self.process.wait(timeout=60)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.mine)


def test_a_conversation_at_a_terminal(speaker):
    with Terminal(speaker) as terminal:
        terminal.until("/reset forgets the conversation, Ctrl-C stops an answer, Ctrl-D or /exit ends")
        for _ in range(2):
            terminal.until("> ")
            terminal.type("hi\r")
            terminal.until("hello there\r\n")
        terminal.until("> ")
        terminal.interrupted_until("Ctrl-C stops an answer")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.ended() == 0


@pytest.mark.alone
def test_an_interrupt_stops_the_answer_and_not_the_program(tmp_path):
    with Terminal(speaking(tmp_path, {2: 5, 5: 6, 6: 5}), "--context", 900) as terminal:
        terminal.until("> ")
        terminal.type("hi\r")
        terminal.until("hello there hello")
        terminal.interrupt()
        terminal.until("> ")
        terminal.type("/exit\r")
        assert terminal.ended() == 0


@pytest.mark.alone
def test_an_interrupt_in_a_pipe_ends_the_program_after_the_line(tmp_path):
    folder = speaking(tmp_path, {2: 5, 5: 6, 6: 5})
    process = subprocess.Popen([*COMMAND, folder, "--context", "4000"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, bufsize=0, pipesize=4096)  # it is full before the answer ends
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"hi\nhi\nhi\n")
    process.stdin.close()
    begun = process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    rest, notes = process.stdout.read(), process.stderr.read()
    assert (process.wait(timeout=60), notes) == (130, b"")
    assert re.fullmatch(rb"hello( there| hello)*( |)\n", begun + rest)


def test_a_mistake_at_a_terminal_is_told_and_the_chat_goes_on(speaker):
    with Terminal(speaker, "--context", 12) as terminal:
        terminal.until("> ")
        terminal.type("hi there on and hi there on and hi there on and\r")
        terminal.until("forge-c chat: 14 tokens fill the cache of 12, and leave no room for another; /reset begins")
        terminal.until("> ")
        terminal.type("hi\r")
        assert terminal.until("hello there\r\n") == "hi\r\nhello there\r\n"
        terminal.until("> ")
        terminal.type("/exit\r")
        assert terminal.ended() == 0
