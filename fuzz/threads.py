"""Threads beside each other: counts and ISAs that change during ops, readers beside a writer, handlers that call us.

Right values, nothing but the documented errors, and an end. Each case lasts about a second.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from model_folder import BYTES, small, write
from op_table import OPS

import forge_c as fc
from fuzz import doing
from fuzz.arrays import DTYPES

SECONDS = 1.0
PATIENCE = 30.0

Rng = np.random.Generator


def pick(rng: Rng, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def case(seed: int) -> None:
    rng = np.random.default_rng(seed)
    fc.use_isa(pick(rng, fc.available_isas()))
    fc.set_num_threads(2)
    interval = sys.getswitchinterval()
    try:
        kind = pick(rng, (toggled_threads, toggled_isa, readers_beside_a_writer, handler_in_a_prompt, shared_model,
                          shared_cache))
        doing(kind.__name__)
        kind(rng)
    finally:
        sys.setswitchinterval(interval)


@contextmanager
def beside(*bodies: Callable[[], None]) -> Iterator[None]:
    """Threads that repeat `bodies` for as long as the block lasts; what they raise fails the block."""
    over, errors = threading.Event(), []

    def repeat(body: Callable[[], None]) -> None:
        try:
            while not over.is_set():
                body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(body,), daemon=True) for body in bodies]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def for_a_while(body: Callable[[], None], seconds: float = SECONDS) -> int:
    end, n = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        body()
        n += 1
    return n


# ---- settings that change ---------------------------------------------------------------------------


def calls(rng: Rng) -> dict[str, Callable[[], bytes]]:
    """A few ops with large arguments; each call gives its result's bytes."""
    chosen = [name for name, op in OPS.items() if op.splits]
    found = {}
    for name in rng.choice(chosen, 3, replace=False).tolist() + [pick(rng, ("attention", "attention_decode"))]:
        op, arrays = OPS[name], OPS[name].make(rng, pick(rng, DTYPES), big=True)
        found[name] = lambda op=op, arrays=arrays: b"".join(a.tobytes() for a in op.run(arrays))
    return found


def toggled_threads(rng: Rng) -> None:
    """The bits do not depend on the number of threads, whenever it changes."""
    todo, most = calls(rng), int(pick(rng, (2, 4, 16, 64)))
    right = {name: call() for name, call in todo.items()}

    def toggle() -> None:
        fc.set_num_threads(1)
        fc.set_num_threads(most)

    def run() -> None:
        for name, call in todo.items():
            assert call() == right[name], f"toggled_threads: other bits of {name}"

    with beside(toggle, run):
        for_a_while(run)


def toggled_isa(rng: Rng) -> None:
    """Each result is one ISA's, not a mixture."""
    todo, before = calls(rng), fc.isa()
    right: dict[str, set[bytes]] = {name: set() for name in todo}
    for isa in fc.available_isas():
        fc.use_isa(isa)
        for name, call in todo.items():
            right[name].add(call())

    def toggle() -> None:
        for isa in fc.available_isas():
            fc.use_isa(isa)

    def run() -> None:
        for name, call in todo.items():
            assert call() in right[name], f"toggled_isa: {name} has the bits of no ISA"

    try:
        with beside(toggle, run):
            for_a_while(run)
    finally:
        fc.use_isa(before)


# ---- a cache, a model and many threads --------------------------------------------------------------


def readers_beside_a_writer(rng: Rng) -> None:
    """Keys are ones, so lse says how many a reader saw: as many as there were before or after, and as its mask has."""
    few, dtype = int(pick(rng, (1, 10, 255, 256))), pick(rng, ("float32", "bfloat16"))
    many, d = few + int(pick(rng, (1, 240, 300))), 16
    kept, k = fc.KVCache(1, many, 1, d, dtype=dtype), np.ones((1, many, 1, d), np.float32)
    kept.append(k[:, :few], k[:, :few])
    sys.setswitchinterval(1e-6)

    def write() -> None:  # a copy beside it may have the lock
        with suppress(RuntimeError):
            if kept.seq_len == few:
                kept.append(k[:, few:], k[:, few:])
            kept.truncate(few)

    masked = bool(rng.random() < 0.7) and few > 1  # a mask of one key would hold for all of them
    mask = np.zeros(few, np.float32) if masked else None
    allowed = np.log([few] if masked else [few, many]) + d**0.5

    def read() -> None:
        try:
            out, lse = fc.attention(k[:, :1], kept, mask=mask, return_lse=True)
        except (ValueError, RuntimeError):
            return
        seen = float(np.exp(lse[0, 0, 0] - d**0.5))
        check(np.abs(lse[0, 0, 0] - allowed).min() < 2e-3,
              f"readers: {seen:.1f} keys seen of {few} or {many}, {masked=}")
        assert (np.abs(out - 1) < 1e-2).all(), "readers: the mean of ones is not one"

    def copy() -> None:
        try:
            assert kept.copy().seq_len in (few, many), "readers: a copy of something in between"
            assert kept.fork(2).seq_len in (few, many), "readers: a fork of something in between"
        except RuntimeError:
            pass

    with beside(write, copy):
        for_a_while(read)


@cache
def big_model(width: int) -> Any:
    """Large enough for a prompt that takes a while."""
    folder = Path(os.environ["FUZZ_SCRATCH"]) / f"model{width}"
    config = small(vocab_size=256, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
                   num_attention_heads=width // 32, num_key_value_heads=width // 64)
    return fc.models.load(write(folder, config, tokenizer=BYTES))


def handler_in_a_prompt(rng: Rng) -> None:
    """A signal handler that calls an op, at a moment when the same thread is inside one."""
    m, ids = big_model(1024), rng.integers(0, 256, (1, 250))
    inner = calls(rng)
    name = pick(rng, tuple(inner))
    right_inner, right = inner[name](), m(ids).tobytes()

    def handler(signum: int, frame: Any) -> None:
        assert inner[name]() == right_inner, f"handler_in_a_prompt: other bits of {name}"
        signal.setitimer(signal.ITIMER_REAL, 0.03)  # only now: a slow handler must not meet itself

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        for_a_while(lambda: check(m(ids).tobytes() == right, f"handler_in_a_prompt: other logits, {name} in between"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check(right: bool, message: str) -> None:
    assert right, message


def shared_model(rng: Rng) -> None:
    """Several threads that generate with one model, each with its own text."""
    m = big_model(128)
    prompts = [rng.integers(0, 256, int(rng.integers(1, 40))) for _ in range(4)]
    right = [m.generate(p, 6).tolist() for p in prompts]

    def body(i: int) -> Callable[[], None]:
        return lambda: check(m.generate(prompts[i], 6).tolist() == right[i], "shared_model: another text")

    with beside(*(body(i) for i in range(1, 4))):
        for_a_while(body(0))


def shared_cache(rng: Rng) -> None:
    """One model's cache and several threads: each call is whole or a RuntimeError, and all layers agree."""
    m = big_model(128)
    kept, ids = m.new_cache(1, 4000), rng.integers(0, 256, (1, 3))
    worked = [0, 0, 0]

    def body(i: int) -> Callable[[], None]:
        def step() -> None:
            try:
                m(ids, kept)
                worked[i] += 1
            except RuntimeError:
                time.sleep(0)
            except ValueError:
                time.sleep(0.01)  # full
        return step

    with beside(body(0), body(1)):
        for_a_while(body(2))
    lengths = {layer.seq_len for layer in kept.layers}
    assert lengths == {3 * sum(worked)}, f"shared_cache: layers hold {lengths} after {sum(worked)} steps of 3"
