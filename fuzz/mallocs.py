"""Every allocation of libforge_c fails once: a MemoryError, and the next call is right as if nothing had been.

malloc_shim.c, preloaded into the worker, counts what libforge_c asks for and lets one of it fail. Runs on glibc.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from model_folder import BYTES, FAMILIES, small, write
from op_table import OPS, same_bits

import forge_c as fc
from fuzz import HERE, doing
from fuzz.arrays import DTYPES, Array

MOST = 40  # allocations of one call that fail in turn

Rng = np.random.Generator
State = Callable[[], Any]


def environment(folder: str) -> dict[str, str]:
    """Compile the shim; the worker's environment that loads it."""
    library = f"{folder}/malloc_shim.so"
    subprocess.run([os.environ.get("CC", "cc"), "-O1", "-fPIC", "-shared", "-fno-builtin", "-o", library,
                    str(HERE / "malloc_shim.c")], check=True)
    return {"LD_PRELOAD": f"{os.environ.get('LD_PRELOAD', '')} {library}".strip()}


@cache
def shim() -> Any:
    """The preloaded library, told where libforge_c lies."""
    found = ctypes.CDLL(None)
    found.fuzz_arm.restype, found.fuzz_arm.argtypes = ctypes.c_long, (ctypes.c_long,)
    found.fuzz_range.argtypes = (ctypes.c_size_t, ctypes.c_size_t)
    fc.isa()
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "libforge_c" in line]
    ends = [int(end, 16) for line in lines for end in line[0].split("-")]
    found.fuzz_range(min(ends), max(ends))
    found.fuzz_arm(-1)
    fc.attention(np.ones((1, 1, 1, 4), np.float32), *[np.ones((1, 300, 1, 4), np.float32)] * 2)
    assert found.fuzz_arm(-1) > 0, "the shim counts nothing"
    return found


def case(seed: int) -> None:
    rng = np.random.default_rng(seed)
    fc.use_isa(pick(rng, fc.available_isas()))
    fc.set_num_threads(int(rng.integers(1, 4)))
    kind = pick(rng, (an_op, an_op, an_op, a_cache, a_model, generating))
    try:
        kind(rng)
    finally:
        shim().fuzz_arm(-1)


def pick(rng: Rng, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def failing(rng: Rng, what: str, call: Callable[[], Any], state: State, again: Callable[[], bytes],
            grows: bool = False) -> int:
    """Let each allocation of `call` fail; `state()` stays and `again()` gives the same bytes. How many it makes.

    call: works and may change the state; the caller undoes that. again: what shows that all is well.
    grows: the call's steps share a workspace that grows after the first. Where it cannot, it stays as it was, and the
    steps ask malloc for the rest: then the call, which gives bytes, must give the right ones.
    """
    doing(what)
    arm = shim().fuzz_arm
    right, before = again(), state()
    arm(-1)
    call()
    n = arm(-1)
    for i in range(n) if n <= MOST else sorted(rng.choice(n, MOST, replace=False).tolist()):
        before = state()
        arm(i)
        try:
            got = call()
        except MemoryError as error:
            arm(-1)
            assert ": " in str(error) and str(error), f"{what}: unnamed MemoryError: {error}"
            assert state() == before, f"{what}: a MemoryError at allocation {i} of {n} left another state"
        else:
            made = arm(-1)
            assert made <= i or grows, f"{what}: allocation {i} of {n} failed, and no MemoryError came"
            assert not grows or got == right, f"{what}: other bits without allocation {i} of {n}"
        assert again() == right, f"{what}: other bits after a MemoryError at allocation {i} of {n}"
    return n


def an_op(rng: Rng) -> None:
    op = OPS[pick(rng, tuple(OPS))]
    arrays = op.make(rng, pick(rng, DTYPES), big=op.splits and bool(rng.random() < 0.5))
    expected = op.run(arrays)

    def again() -> bytes:
        got = op.run(arrays)
        assert same_bits(got, expected), f"{op.name}: other bits"
        return b""

    failing(rng, op.name, lambda: op.run(arrays), lambda: [a.tobytes() for a in arrays.values()], again)


def tokens(rng: Rng, n: int) -> Array:
    return rng.standard_normal((2, n, 2, 16), np.float32)


def a_cache(rng: Rng) -> None:
    """append, with keys that rotate or not, and attention over it; forks that must leave shared pages."""
    window = pick(rng, (None, 40))
    cache = fc.KVCache(2, 1000, 2, 16, dtype=pick(rng, ("float32", "bfloat16", "int8")), window=window)
    for _ in range(3):
        cache.append(tokens(rng, 100), tokens(rng, 100))
    start, table = cache.lengths, fc.rope_table(16, 1000)
    fork, new, q = cache.fork(1), tokens(rng, 50), rng.standard_normal((2, 3, 4, 16), np.float32)
    rope = pick(rng, (None, table))

    def append(one: fc.KVCache) -> None:
        one.append(new, new, rope=rope)
        one.truncate(start)

    def state() -> Any:
        return [(c.lengths.tolist(), [a.tobytes() for a in c]) for c in (cache, fork)]

    def again() -> bytes:
        return fc.attention(q, cache, causal=True).tobytes()

    failing(rng, "KVCache.append", lambda: append(cache), state, again)
    failing(rng, "KVCache.append to a fork", lambda: append(fork), state, again)
    failing(rng, "attention over a KVCache", again, state, again)
    failing(rng, "KVCache.copy", cache.copy, state, again)


@cache
def model(family: str, dtype: str) -> Any:
    folder = Path(os.environ["FUZZ_SCRATCH"]) / f"{family}-{dtype}"
    return fc.models.load(write(folder, small(family, vocab_size=256), tokenizer=BYTES), dtype)


def any_model(rng: Rng) -> Any:
    return model(pick(rng, FAMILIES), pick(rng, ("float32", "bfloat16", "int8", "int4")))


def a_model(rng: Rng) -> None:
    """Logits with a cache: what the cache holds stays, whole."""
    m = any_model(rng)
    cache, first = m.new_cache(1, 700, dtype=pick(rng, ("float32", "bfloat16", "int8"))), rng.integers(0, 256, (1, 5))
    start, new = first.shape[1], rng.integers(0, 256, (1, pick(rng, (1, 7, 300))))
    m(first, cache)

    def step() -> Any:
        logits = m(new, cache)
        cache.truncate(start)
        return logits

    def state() -> Any:
        return cache.seq_len, [layer.lengths.tolist() for layer in cache.layers]

    if any(layer.window is not None for layer in cache.layers):
        new = new[:, :7]
    failing(rng, "model", step, state, lambda: step().tobytes())


def generating(rng: Rng) -> None:
    m, prompt = any_model(rng), rng.integers(1, 256, int(rng.integers(1, 30)))

    def generate() -> bytes:
        return m.generate(prompt, 4).tobytes()

    failing(rng, "generate", generate, lambda: None, generate, grows=True)
