"""The process around the kernels: floating-point state, environment, signals, Ctrl-C, memory limits, exit."""

from __future__ import annotations

import pytest
from child import run_script

pytestmark = pytest.mark.slow  # a process a test

WATCH = """
import ctypes, ctypes.util, os, platform, signal, sys, threading, time

libm = ctypes.CDLL(ctypes.util.find_library("m"))

def floating_point():
    # The rounding mode, MXCSR without its sticky flags, and whether subnormals are numbers.
    state = (ctypes.c_uint32 * 64)()
    assert libm.fegetenv(state) == 0
    control = state[7] & ~0x3F if platform.machine() == "x86_64" else state[0]
    tiny = sys.float_info.min
    return libm.fegetround(), control, tiny / 2 != 0.0, tiny / 2 * 2 == tiny
"""
KERNELS = """
import numpy as np
import forge_c as fc
from op_table import LAYERS, OPS

def all_kernels():
    rng = np.random.default_rng(0)
    for isa in reversed(fc.available_isas()):
        fc.use_isa(isa)
        for op in (*OPS.values(), *LAYERS.values()):
            op.run(op.make(rng, big=op.splits and isa == fc.available_isas()[0]))
        fc.relu(np.full(100, 1e-40, np.float32))
        fc.softmax(np.array([[0, -90, -100, -1000]], np.float32))
"""


# ---- floating point ---------------------------------------------------------------------------------

def test_floating_point_state_is_the_same_before_and_after_in_every_thread():
    assert run_script(WATCH + """
imported, stop, seen = threading.Event(), threading.Event(), []

def older_than_the_import():
    before = floating_point()
    imported.wait()
    middle = floating_point()
    all_kernels()
    seen.append((before, middle, floating_point()))

old = threading.Thread(target=older_than_the_import)
old.start()
before = floating_point()
""" + KERNELS + """
after_import = floating_point()
fc.set_num_threads(2)
all_kernels()
imported.set()
old.join()
new = []
thread = threading.Thread(target=lambda: new.append(floating_point()))
thread.start()
thread.join()
states = {before, after_import, floating_point(), *seen[0], *new}
assert len(states) == 1, states
assert before[2:] == (True, True)
assert np.finfo(np.float32).smallest_subnormal > 0 and np.float32(1e-39) / np.float32(2) > 0
print("same")
""", OMP_NUM_THREADS="2") == "same\n"


def test_a_rounding_mode_of_the_caller_is_left_alone():
    assert run_script(WATCH + KERNELS + """
upward = {"x86_64": 0x800}.get(platform.machine(), 0x400000)
assert libm.fesetround(upward) == 0
before = floating_point()
all_kernels()
assert floating_point() == before and before[0] == upward
print("left alone")
""") == "left alone\n"


def test_negative_control_a_library_that_flushes_subnormals_is_noticed():
    """What a library linked with crtfastmath.o does when it is loaded: FTZ and DAZ on."""
    assert run_script(WATCH + """
before = floating_point()
state = (ctypes.c_uint32 * 64)()
libm.fegetenv(state)
state[7 if platform.machine() == "x86_64" else 0] |= 0x8040 if platform.machine() == "x86_64" else 1 << 24
libm.fesetenv(state)
after = floating_point()
print(before[2:], after[2:], before[1] != after[1])
""") == "(True, True) (False, False) True\n"


def test_kernels_keep_subnormals():
    assert run_script("""
import numpy as np
import forge_c as fc
x = np.array([[1e-40, -1e-40, 3e-45, 1e-38] * 9] * 5, np.float32)
for isa in fc.available_isas():
    fc.use_isa(isa)
    for threads in (1, 3):
        fc.set_num_threads(threads)
        assert (fc.relu(x) == np.maximum(x, 0)).all() and fc.relu(x).any()
        assert (fc.linear(x, np.eye(36, dtype=np.float32)) == x).all()
        assert (fc.embedding([2, 0], x) == x[[2, 0]]).all()
        assert (fc.relu(x.astype(np.float16) + np.float16(6e-8)) == np.float16(6e-8)).all()
print("kept")
""") == "kept\n"


# ---- everything else that a process holds -----------------------------------------------------------

def test_environment_signals_and_random_numbers_are_left_alone():
    assert run_script("""
import numpy as np
import ctypes, os, signal, sys

def environment():
    entries, held = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ"), []
    while entries[len(held)] is not None:
        held.append(entries[len(held)])
    return held, dict(os.environ)

def handlers():
    lines = [line for line in open("/proc/self/status") if line.startswith(("SigBlk", "SigIgn", "SigCgt"))]
    return lines, [signal.getsignal(number) for number in signal.valid_signals()]

def everything():
    state = np.random.get_state()
    return (environment(), handlers(), state[1].tobytes(), state[2:], os.getcwd(), sys.getrecursionlimit(),
            sys.getswitchinterval(), threading.excepthook, sys.excepthook, np.geterr(), os.umask(0o22))

import threading
np.random.seed(7)
os.umask(0o22)
before = everything()
import forge_c, forge_c.functional, forge_c.nn, forge_c.models
assert everything() == before
""" + KERNELS + """
all_kernels()
fc.show_config()
after = everything()
assert after == before
print("left alone")
""").endswith("left alone\n")


def test_import_warns_of_nothing():
    assert run_script("import forge_c, forge_c.functional, forge_c.nn, forge_c.models, forge_c.state.kv, forge_c.cli",
                      "-X", "dev", "-W", "error") == ""


def test_kernels_warn_of_nothing():
    assert run_script(KERNELS + "all_kernels(); print('done')", "-X", "dev", "-W", "error") == "done\n"


def test_modules_can_be_reloaded():
    assert run_script(KERNELS + """
import importlib
op = OPS["linear"]
arrays = op.make(np.random.default_rng(0), big=True)
before = op.run(arrays)[0].tobytes()
for module in ("forge_c", "forge_c.functional", "forge_c.state.kv", "forge_c.rotary", "forge_c.nn.layer"):
    importlib.reload(importlib.import_module(module))
assert fc.linear(**arrays).tobytes() == before
print("reloaded")
""") == "reloaded\n"


# ---- signals ----------------------------------------------------------------------------------------

LONG = """
import os, signal, threading, time
import numpy as np
import forge_c as fc
from pace import slowness

fc.set_num_threads(THREADS)
rng = np.random.default_rng(0)
qkv = rng.standard_normal((1, 16384, 1, 64), np.float32)
heads = np.broadcast_to(qkv, (1, 16384, 16, 64))
wide = np.broadcast_to(rng.standard_normal((1, 8192), np.float32), (4096, 8192))
weight = np.broadcast_to(rng.standard_normal((1, 16384), np.float32), (8192, 16384))
calls = {
    "attention": lambda: fc.attention(heads, qkv, qkv),
    "causal": lambda: fc.attention(heads, qkv, qkv, causal=True, softcap=30.0),
    "linear": lambda: fc.linear(wide, weight),
}
def small():
    return (fc.attention(heads[:, :300], qkv[:, :300], qkv[:, :300]).tobytes()
            + fc.linear(wide[:64, :512], weight[:512, :2048]).tobytes())

sent = []

def ready():
    # Seconds in which threads of this process were ready to run and others had the CPUs.
    found = 0
    for task in os.listdir("/proc/self/task"):
        try:
            found += int(open(f"/proc/self/task/{task}/schedstat").read().split()[1])
        except (OSError, IndexError):
            pass
    return found / 1e9

def clocks():
    return time.monotonic() - ready(), time.process_time()

def interrupt(number):
    time.sleep(0.3)
    sent[:] = clocks()
    os.kill(os.getpid(), number)

def interrupted(call, number, error):
    # Seconds from the signal to the error, of the clock and of this process, with all its threads.
    thread = threading.Thread(target=interrupt, args=(number,))
    thread.start()
    try:
        call()
    except error:
        now = clocks()
        thread.join()
        return now[0] - sent[0], now[1] - sent[1]
    raise SystemExit("the call was over before the signal, or never looked for it")

def notices(call, number, error):
    # What the process itself still does is bounded each time. The clock also runs while the machine stands still, for
    # seconds perhaps, but not each time.
    for _ in range(20):
        late, busy = interrupted(call, number, error)
        assert busy < 0.6 * THREADS * slowness(), busy
        if late < 0.6:
            return
    raise AssertionError(f"{late} s after the signal")
"""


@pytest.mark.alone
@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_stops_a_long_call_and_the_library_works_on(threads):
    run_script(LONG.replace("THREADS", str(threads)) + """
before = small()
for name, call in calls.items():
    try:
        notices(call, signal.SIGINT, KeyboardInterrupt)
        assert small() == before
    except AssertionError as error:
        error.add_note(name)
        raise
""")


@pytest.mark.alone
def test_what_a_signal_handler_raises_comes_out_of_the_call():
    assert run_script(LONG.replace("THREADS", "2") + """
class TooLate(Exception):
    pass

def handler(number, frame):
    raise TooLate("0.2 s are over")

signal.signal(signal.SIGUSR1, handler)
notices(calls["attention"], signal.SIGUSR1, TooLate)
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.2)
try:
    calls["attention"]()
except TooLate as error:
    print(error)
""") == "0.2 s are over\n"


def test_a_signal_handler_that_returns_changes_nothing():
    assert run_script(LONG.replace("THREADS", "2") + """
count = []
q, k = heads[:, :1500], qkv[:, :6000]
expected = fc.attention(q, k, k).tobytes()
signal.signal(signal.SIGALRM, lambda number, frame: count.append(fc.linear(wide[:2, :64], wide[:64, :64])))
signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
got = fc.attention(q, k, k).tobytes()
signal.setitimer(signal.ITIMER_REAL, 0)
assert got == expected
print(len(count) > 0)
""") == "True\n"


def test_sigterm_ends_the_process_in_the_middle_of_a_call():
    assert run_script(LONG.replace("THREADS", "2") + """
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
calls["attention"]()
""", expect=-15) == ""


# ---- exit -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ending", ["pass", "sys.exit(0)", "os._exit(0)"])
def test_exit_with_a_daemon_thread_inside_a_kernel(ending):
    assert run_script(f"""
import os, sys, threading, time
import numpy as np
import forge_c as fc

fc.set_num_threads(2)
x = np.ones((1, 4096, 8, 64), np.float32)
started = threading.Event()

def work():
    while True:
        started.set()
        fc.attention(x, x, x)

for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
started.wait()
time.sleep(0.1)
{ending}
""") == ""


# ---- memory -----------------------------------------------------------------------------------------

def test_no_memory_is_a_memory_error_and_the_library_works_on():
    """Limits apply after the first parallel region: the OpenMP runtime ends a process that refuses it a thread."""
    out = run_script("""
import resource
import numpy as np
import forge_c as fc

fc.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((256, 256), np.float32)
before = fc.linear(x, x).tobytes()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (128 << 20), resource.RLIM_INFINITY))

half = np.broadcast_to(np.ones((1, 4096), np.float16), (100_000, 4096))
heads = np.ones((1, 1, 1, 1 << 20), np.float32)
calls = {
    "scratch for x": lambda: fc.linear(half, np.ones((4096, 1), np.float32)),
    "scratch for keys": lambda: fc.attention(heads, heads, heads),
    "the result": lambda: fc.linear(half, np.broadcast_to(np.float16(1), (4096, 4096)).copy()),
    "a result of 64 TiB": lambda: fc.embedding(np.broadcast_to(0, (1 << 20, 1 << 20)), np.ones((1, 16), np.float32)),
    "a table": lambda: fc.rope_table(128, 1 << 31),
    "a cache": lambda: fc.KVCache(64, 1 << 20, 8, 128),
    "a packed weight": lambda: fc.pack(np.broadcast_to(np.float32(1), (1 << 15, 1 << 15))),
}
for what, call in calls.items():
    try:
        call()
        print(what, "fits")
    except MemoryError as error:
        print(what, "|", error if str(error).endswith("scratch") else "MemoryError")
    assert fc.linear(x, x).tobytes() == before
""")
    assert out.splitlines() == [
        "scratch for x | linear: no memory for scratch",
        "scratch for keys | attention: no memory for scratch",
        "the result | MemoryError",
        "a result of 64 TiB | MemoryError",
        "a table | MemoryError",
        "a cache | MemoryError",
        "a packed weight | MemoryError",
    ]
