"""How the suite runs: what must run alone, in which order, what `--quick` leaves out, and results computed once.

The ISAs of a test run one after the other on the same inputs (see conftest.rng), so that what once() remembers, a
float64 result or a packed weight, serves all of them; it is forgotten when the next case begins.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import forge_c

ISA = "isa"  # the fixture of this name
THREADS = 1  # what a test begins with: the others' cores are theirs
# torch, once imported, may leave OpenMP one thread for each core of two CPUs, which forge_c takes for a limit.
LIBRARY = ctypes.CDLL(str(Path(forge_c.get_library_dir(), "libforge_c.so")))
OPENMP_THREADS = LIBRARY.omp_get_max_threads() if hasattr(LIBRARY, "omp_get_max_threads") else None

# ---- one case after the other -----------------------------------------------------------------------


def case_id(item: pytest.Item) -> str:
    """The test's name but for its ISA."""
    spec = getattr(item, "callspec", None)
    if spec is None or ISA not in spec.params:
        return item.name
    rest = f"-{spec.id}-".replace(f"-{spec.params[ISA]}-", "-", 1).strip("-")
    return f"{item.name.partition('[')[0]}[{rest}]"


def in_order(items: list[pytest.Item]) -> list[pytest.Item]:
    """By module as they come; each case's ISAs together; those that run alone last."""
    places: dict[tuple[Any, str], int] = {}
    for item in items:
        places.setdefault((item.path, case_id(item)), len(places))
    return sorted(items, key=lambda item: (is_alone(item), places[item.path, case_id(item)]))


COMPARED = 16 << 20  # bytes of an argument
remembered: dict[Any, tuple[Any, Any]] = {}
current_case: list[tuple[Any, str]] = []


def key_of(value: Any) -> Any:
    """Equal for equal numbers and texts, for arrays of equal dtype, shape and bytes, else for one object only."""
    if isinstance(value, np.ndarray | np.generic):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, list | tuple):
        return type(value), tuple(map(key_of, value))
    if isinstance(value, bool | int | float | str | None):
        return type(value), repr(value)
    return id(value)


def freeze(result: Any) -> None:
    for array in result if isinstance(result, tuple) else (result,):
        if isinstance(array, np.ndarray):
            array.flags.writeable = False


def once(compute: Callable[..., Any]) -> Callable[..., Any]:
    """`compute`, computed once for equal arguments within a case, whatever the ISA; its arrays cannot be written to.

    Not for arguments of many megabytes: to compare those takes as long, and to keep them too much memory.
    """
    @wraps(compute)
    def look_up(*args: Any, **options: Any) -> Any:
        if any(getattr(value, "nbytes", 0) > COMPARED for value in (*args, *options.values())):
            return compute(*args, **options)
        asked = compute, tuple(map(key_of, args)), tuple((name, key_of(value)) for name, value in options.items())
        if asked not in remembered:
            result = compute(*args, **options)
            freeze(result)
            remembered[asked] = result, (args, options)  # the arguments live on, so that no other object gets their id
        return remembered[asked][0]

    return look_up


@contextmanager
def case(*names: Any) -> Iterator[None]:
    """Around the body of a loop: a failure says which round it was."""
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        error.add_note(f"in the case {', '.join(map(str, names))}")
        raise


# ---- --quick: the inner loop ------------------------------------------------------------------------

def chosen_quickly(items: list[pytest.Item]) -> list[pytest.Item]:
    """On the best ISA only, of each test as few cases as have every value of each of its parameters; nothing slow."""
    seen, chosen = set(), []
    for item in items:
        if is_alone(item) or item.get_closest_marker("slow"):
            continue
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if params.get(ISA, best_isa()) != best_isa():
            continue
        test = item.path, item.name.partition("[")[0]
        values = {(test, name, id(value)) for name, value in params.items()} | {(test, "", 0)}
        if not values <= seen:
            seen |= values
            chosen.append(item)
    return chosen


def best_isa() -> str:
    return forge_c.available_isas()[0]


# ---- alone: nothing else of the suite runs meanwhile ------------------------------------------------

def is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


class Locks:
    """Between the workers of pytest-xdist: a test holds `running` shared, one that runs alone holds it exclusively.

    Everyone passes `gate` first, and who waits to be alone holds it: the others cannot keep it waiting.
    """

    def __init__(self, folder: Path) -> None:
        self.gate, self.running = (open(folder / name, "w") for name in ("gate", "running"))

    @contextmanager
    def held(self, alone: bool) -> Iterator[None]:
        kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        fcntl.flock(self.gate, kind)
        fcntl.flock(self.running, kind)
        fcntl.flock(self.gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(self.running, fcntl.LOCK_UN)


# ---- built once for all workers ---------------------------------------------------------------------

def built_once(config: pytest.Config, name: str, build: Callable[[Path], None]) -> Path:
    """The folder that build(folder) has filled, by whichever worker came first."""
    folder = config.shared / name
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            try:
                build(folder)
            except BaseException:
                shutil.rmtree(folder)
                raise
    return folder


# ---- pytest's hooks, imported by conftest.py --------------------------------------------------------

def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="every test on the best ISA, with few of its cases")
    parser.addoption("--every-isa", action="store_true", help="every test on every ISA")


def pytest_configure(config: pytest.Config) -> None:
    given = getattr(config, "workerinput", None)
    if given is None:
        config.owned = tempfile.TemporaryDirectory(prefix="forge_c_tests_")
        config.shared = Path(config.owned.name)
    else:
        config.shared = Path(given["shared"])
        config.locks = Locks(config.shared)
        for name in given["for_workers"]:
            del os.environ[name]  # the libraries have read it; a process that a test starts is like any other
    forge_c.set_num_threads(THREADS)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background: or no child would notice Ctrl-C


# A team of threads that spins steals the other workers' time.
FOR_WORKERS = {"OMP_WAIT_POLICY": "passive", "OPENBLAS_NUM_THREADS": "1"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config) -> None:
    config.for_workers = {name: value for name, value in FOR_WORKERS.items() if name not in os.environ}
    os.environ.update(config.for_workers)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["shared"] = str(node.config.shared)
    node.workerinput["for_workers"] = list(node.config.for_workers)


def pytest_unconfigure(config: pytest.Config) -> None:
    if hasattr(config, "owned"):
        config.owned.cleanup()


# Tables that are the next one but for the instructions of integer and bfloat16 products, and the tests of these. The
# others run there with --every-isa, or where FORGE_C_ISA names the table.
ONLY_PRODUCTS = {"avx512_vnni": "avx512", "avx_vnni": "avx2"}
PRODUCTS = ("test_linear", "test_quantized", "test_ggml", "test_rounding", "test_attention", "test_roofline",
            "test_guard", "test_generate", "test_embedded", "test_model_parity", "test_scoring")


def isas_of(module: str, *, every: bool = False) -> list[str]:
    """Those that the tests of a module run on."""
    return [isa for isa in forge_c.available_isas() if every or isa not in ONLY_PRODUCTS or isa == forge_c.isa()
            or module.startswith(PRODUCTS)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The ISAs of a test, or with --quick the best: to make thousands of cases takes as long as to run some."""
    if ISA in metafunc.fixturenames:
        option = metafunc.config.getoption
        isas = isas_of(metafunc.module.__name__, every=option("--every-isa"))
        metafunc.parametrize(ISA, [best_isa()] if option("--quick") else isas, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ordered = in_order(items)
    items[:] = chosen_quickly(ordered) if config.getoption("--quick") else ordered
    if left_out := set(ordered) - set(items):
        config.hook.pytest_deselected(items=list(left_out))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # thousands of tests live to the end


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    case = item.path, case_id(item)
    if current_case != [case]:
        current_case[:] = [case]
        remembered.clear()
    locks = getattr(item.config, "locks", None)
    if OPENMP_THREADS is not None:
        LIBRARY.omp_set_num_threads(OPENMP_THREADS)
    try:
        with locks.held(is_alone(item)) if locks else nullcontext():
            return (yield)
    finally:
        forge_c.set_num_threads(THREADS)
