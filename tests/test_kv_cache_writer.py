"""The key/value cache has one writer: whatever interrupts it, and on both sides of a fork."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from child import run_script
from test_kv_cache import in_another_thread, snapshot

import forge_c
from forge_c.functional import WriterLock, Writing
from forge_c.state.kv import KVCache

K = np.ones((2, 3, 1, 4), np.float32)


def interrupted(work: Callable[[], object], at: int) -> KeyboardInterrupt | None:
    """What comes out when Ctrl-C meets `work` before bytecode number `at` of forge_c's; None if it has fewer."""
    seen = 0

    def trace(frame, event, arg):
        nonlocal seen
        if "forge_c" not in frame.f_globals["__name__"]:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            seen += 1
            if seen == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # or settrace of Python 3.12 sends none the first time
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt as error:
        return error
    finally:
        sys.settrace(before)
    return None


WORK = {
    "append": lambda cache: cache.append(K, K),
    "a row's append": lambda cache: cache.row(1).append(K[:1], K[:1]),
    "truncate": lambda cache: cache.truncate(2),
    "fork": lambda cache: cache.fork(2),
    "copy": lambda cache: cache.copy(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORK)
def test_an_interrupt_at_any_bytecode_leaves_the_cache_to_others(name):
    """While the exception, and with it every frame it came through, is still at hand, as in an interactive session."""
    for at in range(1, 10_000):
        cache = KVCache(2, 600, 1, 4)
        cache.append(K, 2 * K)
        error = interrupted(lambda cache=cache: WORK[name](cache), at)
        if error is None:
            break
        length = cache.seq_len
        assert in_another_thread(lambda cache=cache: cache.append(K, K)) is None, f"bytecode {at}"
        assert cache.seq_len == length + 3
    assert at > 20


def test_a_block_that_never_began_gives_the_lock_back():
    """As when an interrupt comes after __enter__ and before the block."""
    cache = KVCache(1, 8, 1, 4)
    entered = cache.writing()
    entered.__enter__()
    assert isinstance(in_another_thread(lambda: cache.truncate(0)), RuntimeError)
    del entered
    assert in_another_thread(lambda: cache.truncate(0)) is None


def test_blocks_nest_and_end_in_any_order():
    cache = KVCache(1, 8, 1, 4)
    outer, inner = cache.writing(), cache.row(0).writing()
    outer.__enter__()
    with inner, inner:
        outer.__exit__(None, None, None)
        assert isinstance(in_another_thread(lambda: cache.truncate(0)), RuntimeError)
    assert in_another_thread(lambda: cache.truncate(0)) is None
    outer.__exit__(None, None, None)  # once too often: it holds nothing any more
    with cache.writing():
        outer.__exit__(None, None, None)
        assert isinstance(in_another_thread(lambda: cache.truncate(0)), RuntimeError)


def test_several_locks_are_taken_together_or_not_at_all():
    locks = tuple(WriterLock() for _ in range(3))
    held, release = threading.Event(), threading.Event()

    def other() -> None:
        with Writing(locks[2:]):
            held.set()
            release.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    held.wait(30)
    with pytest.raises(RuntimeError, match="another thread is writing"), Writing(locks):
        pass
    assert in_another_thread(Writing(locks[:2]).__enter__) is None
    release.set()
    thread.join()
    with Writing(locks):
        assert isinstance(in_another_thread(Writing(locks[:1]).__enter__), RuntimeError)
    with pytest.raises(TypeError, match="Writing: locks hold a str, expected WriterLocks"):
        Writing(("x",))


def test_a_child_can_write_what_another_thread_was_writing_at_the_fork():
    run_script("""
        import os, threading, numpy as np
        from forge_c.state.kv import KVCache
        from test_kv_cache import in_another_thread
        k = np.ones((1, 3, 1, 4), np.float32)
        cache = KVCache(1, 20, 1, 4)
        cache.append(k, k)
        held, release = threading.Event(), threading.Event()
        def other():
            with cache.writing():
                held.set()
                release.wait(60)
        thread = threading.Thread(target=other)
        thread.start()
        held.wait(60)
        child = os.fork()
        if not child:
            status = 1
            try:
                assert in_another_thread(lambda: cache.append(k, k)) is None
                cache.append(k, k)
                with cache.writing():
                    assert isinstance(in_another_thread(lambda: cache.truncate(0)), RuntimeError)
                assert cache.seq_len == 9
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        try:
            cache.truncate(0)
            raise SystemExit("the parent's lock was lost")
        except RuntimeError:
            release.set()
        thread.join()
        assert cache.seq_len == 3
        cache.append(k, k)
    """)


def test_a_child_goes_on_writing_what_its_only_thread_was_writing_at_the_fork():
    run_script("""
        import os, numpy as np
        from forge_c.state.kv import KVCache
        from test_kv_cache import in_another_thread
        k = np.ones((1, 3, 1, 4), np.float32)
        cache = KVCache(1, 20, 1, 4)
        with cache.writing():
            child = os.fork()
            if not child:
                grandchild = os.fork()
            cache.append(k, k)
            assert isinstance(in_another_thread(lambda: cache.append(k, k)), RuntimeError)
        assert in_another_thread(lambda: cache.append(k, k)) is None
        assert cache.seq_len == 6
        if not child:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) if grandchild else 0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """)


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"dtype": "int8"}, {"window": 70}])
def test_attention_beside_a_writer_sees_the_tokens_of_its_beginning(rng, options):
    total = 700
    k, q = rng.standard_normal((1, total, 1, 8), np.float32), rng.standard_normal((1, 1, 2, 8), np.float32)
    k[0, -1] = np.nan  # what comes later is not felt
    alone, cache = KVCache(1, total, 1, 8, **options), KVCache(1, total, 1, 8, **options)
    want, seen = [forge_c.attention(q, alone).tobytes()], []
    for i in range(total):
        alone.append(k[:, i : i + 1], -k[:, i : i + 1])
        want.append(forge_c.attention(q, alone).tobytes())

    assert len(set(want)) > total // 2

    reader_saw = [0]

    def writer() -> None:
        for i in range(total):
            while i - reader_saw[0] > 200:  # a ring keeps what a reader began with for as many new tokens as this
                time.sleep(0)
            cache.append(k[:, i : i + 1], -k[:, i : i + 1])

    thread = threading.Thread(target=writer)
    thread.start()
    while thread.is_alive() or not seen:
        reader_saw[0] = first = cache.seq_len
        got, last = forge_c.attention(q, cache).tobytes(), cache.seq_len
        assert got in want[first : last + 1], (first, last)
        seen.append(last)
    thread.join()
    assert forge_c.attention(q, cache).tobytes() == want[total]


def test_forks_and_copies_have_locks_of_their_own():
    cache = KVCache(1, 8, 1, 4)
    for other in (cache.fork(2), cache.copy()):
        with cache.writing():
            assert in_another_thread(lambda other=other: other.truncate(0)) is None
    assert snapshot(cache) == snapshot(cache.copy())
