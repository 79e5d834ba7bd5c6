"""Threads: the same bits for any number of them, how many there are and why, and many callers at once."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from child import run_script
from op_table import LAYERS, OPS, same_bits

import forge_c as fc
from forge_c import functional, threads
from forge_c.threads import cgroup_quota, default_threads

SPLIT = [pytest.param(op, id=op.name) for op in OPS.values() if op.splits]
needs_openmp = functional._openmp() != "none"


def os_threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def in_a_fresh_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns, run by a Python thread of its own, which has no team of threads yet."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.fixture
def thread_count() -> Iterator[Callable[[int], None]]:
    """set_num_threads for this test alone."""
    before = fc.get_num_threads()
    yield fc.set_num_threads
    fc.set_num_threads(before)


# ---- the same bits ----------------------------------------------------------------------------------

@pytest.mark.parametrize("op", SPLIT)
def test_same_bits_for_any_number_of_threads(rng, isa, dtype, each_thread_count, op):
    arrays = op.make(rng, dtype, big=True)
    results = {count: op.run(arrays) for count in each_thread_count()}
    for count, result in results.items():
        assert same_bits(result, results[1]), f"{count} threads"


@pytest.mark.parametrize("op", SPLIT)
def test_these_sizes_are_split(rng, thread_count, op):
    """Three threads are asked for and two more appear; without this the test above would prove nothing."""
    arrays = op.make(rng, big=True)
    thread_count(3)

    def run() -> int:
        before = os_threads()
        op.run(arrays)
        return len(os_threads() - before)

    assert in_a_fresh_thread(run) == (2 if needs_openmp else 0)


def test_small_work_stays_on_the_calling_thread(rng, thread_count):
    thread_count(3)
    small = [(op, op.make(rng)) for op in OPS.values()]

    def run() -> int:
        before = os_threads()
        for op, arrays in small:
            op.run(arrays)
        return len(os_threads() - before)

    assert in_a_fresh_thread(run) == 0


def test_fifty_repeats_give_one_result(rng, thread_count):
    thread_count(5)
    for name in ("linear_packed", "attention_decode", "rms_norm_residual"):
        arrays = OPS[name].make(rng, big=True)
        first = OPS[name].run(arrays)
        assert all(same_bits(OPS[name].run(arrays), first) for _ in range(50))


# ---- cgroups: the tree is made under tmp_path -------------------------------------------------------

def v2(root: Path, **limits: str) -> Path:
    """A cgroup v2 tree: path (with __ for /) -> the text of its cpu.max."""
    for path, text in limits.items():
        folder = root.joinpath(*path.strip("_").split("__"))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.max").write_text(text)
    return root


@pytest.mark.parametrize(("text", "expected"), [
    ("max 100000\n", None), ("200000 100000\n", 2), ("50000 100000\n", 1), ("150000 100000\n", 2),
    ("100000 100000\n", 1), ("1000 100000\n", 1), ("6400000 100000\n", 64), ("200001 100000\n", 3),
    ("", None), ("garbage\n", None), ("200000\n", None), ("200000 0\n", None), ("a b\n", None), ("1 2 3\n", None),
])
def test_a_v2_quota(tmp_path, text, expected):
    assert cgroup_quota(v2(tmp_path, app=text), "0::/app\n") == expected
    assert cgroup_quota(v2(tmp_path / "rooted", _=text), "0::/\n") == expected


@pytest.mark.parametrize(("limits", "expected"), [
    ({"a": "200000 100000", "a__b": "max 100000", "a__b__c": "max 100000"}, 2),
    ({"a": "100000 100000", "a__b": "400000 100000"}, 1),
    ({"a": "800000 100000", "a__b": "300000 100000", "a__b__c": "600000 100000"}, 3),
    ({"a__b__c": "700000 100000"}, 7),
    ({"a": "max 100000", "x": "100000 100000"}, None),
])
def test_the_tightest_v2_quota_on_the_path_counts(tmp_path, limits, expected):
    assert cgroup_quota(v2(tmp_path, **limits), "0::/a/b/c\n") == expected


def v1(root: Path, controllers: str, path: str, quota: str, period: str) -> Path:
    folder = root / controllers / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.cfs_quota_us").write_text(quota)
    (folder / "cpu.cfs_period_us").write_text(period)
    return root


@pytest.mark.parametrize(("quota", "period", "expected"), [
    ("-1\n", "100000\n", None), ("200000\n", "100000\n", 2), ("50000\n", "100000\n", 1), ("250000\n", "100000\n", 3),
    ("garbage", "100000", None), ("100000", "0", None), ("0", "100000", None),
])
@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct"])
def test_a_v1_quota(tmp_path, quota, period, expected, controllers):
    v1(tmp_path, controllers, "docker/one", quota, period)
    membership = f"9:memory:/elsewhere\n4:{controllers}:/docker/one\n2:cpuset:/docker/one\n"
    assert cgroup_quota(tmp_path, membership) == expected


def test_v1_parents_count_and_other_controllers_do_not(tmp_path):
    v1(tmp_path, "cpu", "", "300000", "100000")
    v1(tmp_path, "cpu", "docker/one", "900000", "100000")
    v1(tmp_path, "cpuacct", "docker/one", "100000", "100000")
    assert cgroup_quota(tmp_path, "3:cpuacct:/docker/one\n2:cpu:/docker/one\n") == 3


def test_v1_and_v2_side_by_side(tmp_path):
    v1(tmp_path, "cpu", "one", "500000", "100000")
    assert cgroup_quota(v2(tmp_path, one="400000 100000"), "1:cpu:/one\n0::/one\n") == 4


@pytest.mark.parametrize("membership", ["", "garbage\n", "0::\n", "::::\n", "0::/missing/group\n", "1:cpu:/missing\n"])
def test_no_quota_without_a_readable_group(tmp_path, membership):
    assert cgroup_quota(tmp_path, membership) is None
    assert cgroup_quota(tmp_path / "nowhere", membership) is None


def test_a_path_cannot_climb_out_of_the_tree(tmp_path):
    (tmp_path / "cpu.max").write_text("100000 100000")
    root = v2(tmp_path / "root", app="500000 100000")
    assert cgroup_quota(root, "0::/../../app\n") == 5


# ---- how many by default ----------------------------------------------------------------------------

def expect_default(monkeypatch, cpus: int, cores: int, quota: int | None, omp: str | None,
                   machine: int = 8) -> tuple[int, str]:
    monkeypatch.setattr(threads.os, "cpu_count", lambda: machine)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(cpus)))
    monkeypatch.setattr(threads, "_physical_cores", lambda held: cores)
    monkeypatch.setattr(threads, "cgroup_quota", lambda: quota)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    return default_threads()


@pytest.mark.parametrize(("cpus", "cores", "quota", "omp", "expected"), [
    (8, 8, None, None, (8, "physical cores = 8")),
    (8, 4, None, None, (4, "physical cores = 4")),
    (3, 4, None, None, (3, "affinity = 3")), (3, 3, None, None, (3, "affinity = 3")),
    (4, 2, None, None, (2, "physical cores = 2")), (1, 1, 1, None, (1, "affinity = 1")),
    (8, 8, 2, None, (2, "cgroup quota = 2")),
    (8, 8, 2, "1", (1, "OMP_NUM_THREADS = 1")),
    (8, 8, None, "64", (8, "physical cores = 8")),
    (8, 8, None, "3,2", (3, "OMP_NUM_THREADS = 3")),
    (8, 8, None, "garbage", (8, "physical cores = 8")),
    (8, 8, None, "0", (8, "physical cores = 8")),
    (8, 8, None, "-2", (8, "physical cores = 8")),
    (8, 8, None, "", (8, "physical cores = 8")),
])
def test_the_smallest_limit_wins_and_is_named(monkeypatch, cpus, cores, quota, omp, expected):
    assert expect_default(monkeypatch, cpus, cores, quota, omp) == expected


PRINT_COUNT = "import forge_c; print(forge_c.get_num_threads(), forge_c.show_config()['threads_default'])"


def test_omp_num_threads_is_obeyed_at_import():
    out = run_script(PRINT_COUNT, OMP_NUM_THREADS="1")
    assert out.splitlines()[-1] == "1 1 (OMP_NUM_THREADS = 1)" or out.splitlines()[-1].startswith("1 1 (physical")


def test_affinity_is_obeyed_at_import():
    out = run_script("import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" + PRINT_COUNT)
    assert out.splitlines()[-1] == "1 1 (affinity = 1)" or os.cpu_count() == 1


def counted(source: str = "", **env: str) -> str:
    """The line of PRINT_COUNT, without what libgomp says about its environment."""
    return re.findall(r"^\d+ \d+ \(.*", run_script(source + PRINT_COUNT, OMP_NUM_THREADS="64", **env), re.M)[-1]


@pytest.mark.parametrize("bind", ["true", "close", "spread"])
def test_threads_that_openmp_binds_are_as_many(bind):
    """OpenMP has bound the main thread to one CPU before anyone can ask for its affinity."""
    assert counted(OMP_PROC_BIND=bind) == counted(OMP_PROC_BIND="false")


def test_the_places_of_openmp_are_a_limit():
    assert counted(OMP_PLACES=f"{{{min(os.sched_getaffinity(0))}}}").startswith("1 1 (") or not needs_openmp


def test_the_affinity_of_the_process_is_obeyed_under_binding():
    one = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    assert counted(one, OMP_PROC_BIND="close").startswith("1 1 (")


def test_set_num_threads_may_ask_for_more_than_the_default_and_comes_back(thread_count):
    before = fc.get_num_threads()
    for count in (1, 2, 17, 4096, before):
        thread_count(count)
        assert fc.get_num_threads() == (count if needs_openmp else 1)


# ---- other owners of the OpenMP runtime -------------------------------------------------------------

def test_threadpool_limits_are_respected():
    out = run_script("""
        import os
        import numpy as np
        import threadpoolctl
        import forge_c as fc
        from op_table import OPS, same_bits

        arrays = {name: op.make(np.random.default_rng(0), big=True) for name, op in OPS.items() if op.splits}
        run = lambda: [OPS[name].run(given) for name, given in arrays.items()]
        fc.set_num_threads(3)
        at_start = len(os.listdir("/proc/self/task"))
        with threadpoolctl.threadpool_limits(1):
            limited = fc.get_num_threads()
            alone = run()
        alone_count = len(os.listdir("/proc/self/task")) - at_start
        three = run()
        print(limited, alone_count, fc.get_num_threads(), len(os.listdir("/proc/self/task")) - at_start)
        assert all(same_bits(a, b) for a, b in zip(alone, three))
    """, OMP_NUM_THREADS="3")
    assert out == ("1 0 3 2\n" if needs_openmp else "1 0 1 0\n")


RUNTIME = """
    import ctypes, re
    def omp():
        maps = open("/proc/self/maps").read()
        return ctypes.CDLL(re.search(r"/\\S*lib(?:g|i)?omp[^/\\n]*\\.so\\S*", maps).group())
"""


@pytest.mark.parametrize("asked", [1, 2, 5])
def test_the_count_of_others_is_never_changed(asked):
    """omp_get_max_threads before the import, after it, and after kernels with several counts."""
    out = run_script(RUNTIME + f"""
    import numpy as np
    runtime = {"ctypes.CDLL('libgomp.so.1')" if functional._openmp() == "libgomp" else "None"}
    before = runtime.omp_get_max_threads() if runtime else None
    import forge_c as fc
    fc.relu(np.ones(3, np.float32))
    runtime = omp()
    after_import = runtime.omp_get_max_threads()
    assert before in (None, after_import), (before, after_import)
    runtime.omp_set_num_threads({asked})
    x = np.ones((512, 512), np.float32)
    for count in (1, 2, 3):
        fc.set_num_threads(count)
        fc.linear(x, x)
        assert fc.get_num_threads() == (min(count, {asked}) if {asked} < after_import else count)
    print(runtime.omp_get_max_threads())
    """) if needs_openmp else f"{asked}\n"
    assert out == f"{asked}\n"


# ---- many callers -----------------------------------------------------------------------------------

def at_once(count: int, work: Callable[[int], Any]) -> list[Any]:
    """work(0 .. count - 1), each in a Python thread, started together."""
    gate = threading.Barrier(count)

    def run(i: int) -> Any:
        gate.wait()
        return work(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.mark.parametrize("own_threads", [1, 2])
def test_eight_callers_at_once_all_get_the_right_bits(rng, thread_count, own_threads):
    cases = [(op, op.make(rng, big=op.splits)) for op in (*OPS.values(), *LAYERS.values())]
    thread_count(1)
    expected = [op.run(arrays) for op, arrays in cases]
    thread_count(own_threads)

    def work(i: int) -> bool:
        order = np.random.default_rng(i).permutation(len(cases))
        return all(same_bits(cases[j][0].run(cases[j][1]), expected[j]) for j in order)

    assert at_once(8, work) == [True] * 8


def test_isas_and_counts_that_change_under_running_kernels_do_no_harm(rng, thread_count):
    """Every row of a softmax is the row that one of the ISAs gives."""
    op = OPS["softmax"]
    arrays = op.make(rng, big=True)
    before, right = fc.isa(), {}
    for name in fc.available_isas():
        fc.use_isa(name)
        right[name] = op.run(arrays)
    stop = threading.Event()

    def work(i: int) -> bool:
        if i == 0:
            for turn in range(60):
                fc.use_isa(fc.available_isas()[turn % len(right)])
                thread_count(1 + turn % 3)
                time.sleep(0.002)
            stop.set()
        good = True
        while not stop.is_set():
            (result,) = op.run(arrays)
            good &= np.any([(result == r).all(-1) for (r,) in right.values()], axis=0).all()
        return bool(good)

    try:
        assert at_once(3, work) == [True] * 3
    finally:
        fc.use_isa(before)


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


@pytest.mark.alone
def test_short_lived_callers_leave_no_threads_behind(thread_count):
    thread_count(2)
    x = np.ones((256, 256), np.float32)

    def callers(count: int) -> None:
        for _ in range(count):
            caller = threading.Thread(target=fc.linear, args=(x, x))
            caller.start()
            caller.join()

    callers(5)
    time.sleep(0.05)
    before, grown = status("Threads:"), []
    for _ in range(4):  # a leak grows every time, the allocator's own needs do not
        resident = status("VmRSS:")
        callers(50)
        grown.append(status("VmRSS:") - resident)
    deadline = time.monotonic() + 60
    while status("Threads:") > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert status("Threads:") <= before
    assert min(grown) < 2048, grown


@pytest.mark.slow
def test_indices_that_another_thread_changes_after_the_check_do_no_harm():
    """Each call is right or an IndexError, whatever happens to the caller's ids meanwhile. In a child: it may crash."""
    assert run_script("""
        import threading
        import numpy as np
        import forge_c as fc

        ids, lens = np.zeros((1, 300_000), np.int64), np.ones(1, np.int64)
        table, rope_table = np.zeros((4, 16), np.float32), fc.rope_table(2, 4)
        x, kv = np.zeros((1, 300_000, 2), np.float32), np.zeros((1, 4, 1, 2), np.float32)
        done = threading.Event()

        def meddle():
            while not done.is_set():
                ids[0, -1] = lens[0] = 1 << 50
                ids[0, -1] = lens[0] = 1

        meddler = threading.Thread(target=meddle)
        meddler.start()
        for call in [lambda: fc.embedding(ids, table), lambda: fc.rope(x, rope_table, positions=ids),
                     lambda: fc.attention(x[:, :2000, None], kv, kv, kv_lens=lens)] * 30:
            try:
                call()
            except (IndexError, ValueError) as error:
                assert "outside the table" in str(error) or "expected 0 to 4" in str(error)
        done.set()
        meddler.join()
        print("unharmed")
    """) == "unharmed\n"


# ---- code that runs while an op waits: signal handlers, finalisers ----------------------------------

EVERY_5_MS = """
    import signal
    import numpy as np
    import forge_c as fc

    calls = []

    def every_5_ms(work):
        def handler(*_):
            calls.append(work())
            signal.setitimer(signal.ITIMER_REAL, 0.005)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.005)

    def no_more():
        # A timer set to 0 would be set again by a handler that is due: its signal would end the process as that exits.
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
"""


def test_a_thread_count_that_grows_during_attention_does_no_harm():
    """The ranks of a later region of the call had no scratch. In a child: it may crash."""
    assert run_script(EVERY_5_MS + """
    fc.set_num_threads(1)
    k = np.broadcast_to(np.ones(64, np.float32), (4, 20480, 64, 64))
    every_5_ms(lambda: fc.set_num_threads(64))
    out = fc.attention(np.ones((4, 1, 64, 64), np.float32), k, k)
    no_more()
    print(len(calls) > 0, (out == 1).all())
    """) == "True True\n"


def test_an_op_ends_on_the_isa_that_it_began_on():
    """A handler changes the table of kernels over and over; each result is one ISA's, to the bit."""
    assert run_script(EVERY_5_MS + """
    fc.set_num_threads(1)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 4096, 8, 64), np.float32) for _ in range(3))
    isas, right = fc.available_isas(), {}
    for name in isas:
        fc.use_isa(name)
        right[name] = fc.attention(q[:, -512:], k, v).tobytes()
    every_5_ms(lambda: fc.use_isa(isas[len(calls) % len(isas)]))
    while len(calls) < 5:
        assert fc.attention(q[:, -512:], k, v).tobytes() in right.values()
    no_more()
    print("whole")
    """) == "whole\n"


def test_a_signal_handler_may_call_ops_while_a_model_reads_its_prompt():
    """The op in the handler is split, yet may not give work to the threads that its caller leads."""
    assert run_script(EVERY_5_MS + """
    fc.set_num_threads(2)
    model, ids, x = fc.models.load(), np.ones((8, 256), np.int64), np.ones((256, 1024), np.float32)
    want, normed = model(ids), fc.rms_norm(x)
    every_5_ms(lambda: fc.rms_norm(x).tobytes() == normed.tobytes())
    while len(calls) < 4:
        assert model(ids).tobytes() == want.tobytes()
    no_more()
    print(all(calls))
    """, timeout=120) == "True\n"


def test_a_signal_handler_may_call_ops_during_an_op():
    assert run_script(EVERY_5_MS + """
    fc.set_num_threads(2)
    k, x = np.ones((1, 4096, 8, 64), np.float32), np.ones((256, 1024), np.float32)
    normed = fc.rms_norm(x)
    every_5_ms(lambda: fc.rms_norm(x).tobytes() == normed.tobytes())
    while len(calls) < 5:
        assert (fc.attention(k, k, k) == 1).all()
    no_more()
    print(all(calls))
    """, timeout=60) == "True\n"


# ---- the GIL ----------------------------------------------------------------------------------------

def longest_wait(work: Callable[[], Any]) -> tuple[float, float]:
    """(seconds that `work` took in another thread, longest time in which this thread got nothing done meanwhile)."""
    taken: list[float] = []

    def run() -> None:
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)

    other = threading.Thread(target=run)
    longest, last = 0.0, time.perf_counter()
    other.start()
    while not taken:
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
        time.sleep(0.001)
    longest = max(longest, time.perf_counter() - last)  # it may be over before this thread got to look
    other.join()
    return taken[0], longest


def big_matrix(n: int) -> np.ndarray:
    return np.ones((n, n), np.float32)


HOLDING = {
    "linear": lambda: fc.linear(big_matrix(1536), big_matrix(1536)),
    "attention": lambda: fc.attention(*[np.ones((1, 2048, 8, 64), np.float32)] * 3),
    "gelu": lambda: [fc.gelu(np.ones(2**22, np.float32)) for _ in range(8)],
}


@pytest.mark.alone
@pytest.mark.parametrize("name", HOLDING)
def test_other_python_threads_go_on_during_a_kernel(thread_count, name):
    thread_count(1)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        assert any(longest < taken / 2 for taken, longest in (longest_wait(HOLDING[name]) for _ in range(5)))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.alone
def test_a_call_that_keeps_the_gil_is_noticed():
    holding = ctypes.PyDLL(None)
    taken, longest = longest_wait(lambda: holding.usleep(200_000))
    assert longest > 0.9 * 0.2 and taken > 0.19
