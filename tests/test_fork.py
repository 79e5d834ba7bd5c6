"""fork after use: the child computes, gets the same bits, and may fork again. Without the handler it would hang."""

from __future__ import annotations

import pytest
from child import run_script

from forge_c import functional

pytestmark = pytest.mark.slow

SETUP = """
import os, signal, sys, threading, time
import numpy as np
import forge_c as fc
from op_table import OPS, same_bits

fc.set_num_threads(2)
arrays = {name: op.make(np.random.default_rng(0), big=True) for name, op in OPS.items() if op.splits}
names = ["linear", "rms_norm_residual", "attention", "attention_decode", "silu"]

def kernels():
    return [OPS[name].run(arrays[name]) for name in names]

def right():
    return all(same_bits(got, want) for got, want in zip(kernels(), expected, strict=True))

def fork(work, seconds=60):
    # Exit status of a child that runs work(): 0 where it returned True; minus the signal that killed it.
    pid = os.fork()
    if pid == 0:
        signal.alarm(seconds)
        os._exit(0 if work() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

expected = kernels()
"""


def test_a_child_computes_the_same_bits_and_so_does_the_parent_after_it():
    assert run_script(SETUP + """
assert len(os.listdir("/proc/self/task")) > 1 or fc.functional._openmp() == "none"
print(fork(right), right(), fork(right), right())
""") == "0 True 0 True\n"


def test_a_child_of_a_child():
    assert run_script(SETUP + """
print(fork(lambda: right() and fork(lambda: right() and fork(right) == 0) == 0 and right()), right())
""") == "0 True\n"


def test_a_child_that_computes_first_while_the_parent_goes_on():
    assert run_script(SETUP + """
pids = []
for _ in range(4):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        os._exit(0 if all(right() for _ in range(5)) else 1)
    pids.append(pid)
parent = all(right() for _ in range(5))
print(parent, [os.waitpid(pid, 0)[1] for pid in pids])
""") == "True [0, 0, 0, 0]\n"


def test_a_fork_while_other_threads_are_inside_kernels():
    assert run_script(SETUP + """
stop, wrong = threading.Event(), []

def busy():
    while not stop.is_set():
        if not right():
            wrong.append(1)

threads = [threading.Thread(target=busy) for _ in range(3)]
for thread in threads:
    thread.start()
codes = [fork(right) for _ in range(10)]
stop.set()
for thread in threads:
    thread.join()
print(codes, wrong, right())
""") == f"{[0] * 10} [] True\n"


def test_a_fork_in_a_thread_that_is_not_the_main_one():
    assert run_script(SETUP + """
codes = []
thread = threading.Thread(target=lambda: (right(), codes.append(fork(right))))
thread.start()
thread.join()
print(codes, right())
""") == "[0] True\n"


def test_a_pool_of_forked_workers():
    assert run_script(SETUP + """
import multiprocessing

def work(i):
    signal.alarm(60)
    return right()

with multiprocessing.get_context("fork").Pool(3) as pool:
    print(pool.map(work, range(12)), right())
""") == f"{[True] * 12} True\n"


def test_a_cache_and_a_layer_live_on_in_the_child():
    assert run_script(SETUP + """
from forge_c import nn
gqa = nn.GroupedQueryAttention(256, 8, 2, causal=True, seed=0)
x = np.random.default_rng(1).standard_normal((1, 64, 256), np.float32)
_, cache = gqa(x[:, :63], use_cache=True)

def step():
    return gqa(x[:, 63:], use_cache=True, kv_cache=cache.copy())[0].tobytes()

want = step()
print(fork(lambda: step() == want), step() == want)
""") == "0 True\n"


@pytest.mark.parametrize("handler", ["off", "on"])
def test_negative_control_the_handler_is_what_keeps_the_child_from_hanging(handler):
    """libgomp alone leaves the child without workers: its first parallel region waits until the alarm."""
    hangs = handler == "off" and functional._openmp() == "libgomp"
    env = {"FORGE_C_NO_FORK_HANDLER": "1"} if handler == "off" else {}
    out = run_script(SETUP + f"print(fork(right, seconds={3 if hangs else 60}), right())", **env)
    assert out == ("-14 True\n" if hangs else "0 True\n")
