"""One implementation per process, chosen with --impl: two OpenMP runtimes, or one and a BLAS, slow each other down.

    pytest bench --benchmark-only                    forge_c
    pytest bench --benchmark-only --impl numpy       the same cases in pure NumPy; run.py puts them side by side

<impl>_ops.py has one function per operation; a case that an implementation lacks is skipped.
"""
from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import machine
import numpy as np
import pytest
from machine import Limits, Work, share

IMPLEMENTATIONS = ("forge_c", "numpy", "torch", "onnxruntime")
EMBEDDED = Path(__file__).parent.parent / "forge_c" / "assets" / "tiny_python"
# Of the largest value: what rounding to the format does to a product of random numbers, with room to spare.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "int8": 5e-2, "int4": 0.25, "int4-32": 0.25}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("forge_c benchmarks")
    group.addoption("--impl", choices=IMPLEMENTATIONS, default="forge_c", help="whose code is timed")
    group.addoption("--limits", metavar="FILE", help="JSON of this machine's limits; measured when left out")
    group.addoption("--quick", action="store_true", help="leave out the large cases")
    group.addoption("--check", action="store_true", help="compare each result with NumPy's before it is timed")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "large: a case that --quick leaves out")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("quick"):
        large = [item for item in items if item.get_closest_marker("large")]
        config.hook.pytest_deselected(items=large)
        items[:] = [item for item in items if item not in large]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    name = config.getoption("impl")
    machine_info["bench_version"] = import_module(name).__version__ + (f" ({_blas()})" if name == "numpy" else "")


def _blas() -> str:
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return "BLAS unknown"
    return ", ".join(f"{i['internal_api']} {i['version']}" for i in threadpool_info()) or "no BLAS found"


@pytest.fixture(scope="session")
def impl(request: pytest.FixtureRequest) -> str:
    """Name of the implementation under the clock."""
    return request.config.getoption("impl")


@pytest.fixture(scope="session")
def operations(impl: str) -> ModuleType:
    return import_module(f"{impl}_ops")


@pytest.fixture(scope="session")
def limits(request: pytest.FixtureRequest) -> Limits | None:
    """This machine's measured limits, once per session; None where forge_c, which measures them, is not installed."""
    path = request.config.getoption("limits")
    if path:
        return json.loads(Path(path).read_text())
    return machine.measure_limits(quick=request.config.getoption("quick")) if find_spec("forge_c") else None


@pytest.fixture
def normal() -> Callable[..., np.ndarray]:
    """normal(*shape, scale=1) -> random float32; never zeros, which some hardware and libraries treat specially."""
    rng = np.random.default_rng(0)
    return lambda *shape, scale=1.0: np.float32(scale) * rng.standard_normal(shape, np.float32)


@pytest.fixture
def embedded() -> Path:
    """Folder of the embedded model."""
    return EMBEDDED


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: Any, impl: str, operations: ModuleType,
          limits: Limits | None) -> Callable[..., None]:
    """bench(op, *inputs, case=, ...) times one operation of the implementation.

    case: the group that implementations are compared in. variant: what else a row of the group is called, by default
    the dtype. read, written, flops: what a call does at least. Without hot, calls rotate through copies of the inputs
    that together exceed the last-level cache, so that memory is a limit. Cases of one curve are drawn against their
    length. options go to the operation.
    """
    def run(op: str, *inputs: Any, case: str, read: int = 0, written: int = 0, flops: int = 0, dtype: str = "float32",
            variant: str = "", hot: bool = False, tokens: int = 0, note: str = "", curve: str = "", length: int = 0,
            **options: Any) -> None:
        prepare = getattr(operations, op, None)
        if prepare is None or dtype not in operations.DTYPES:
            pytest.skip(f"{impl} has no {op} in {dtype}")
        moved = read + written
        sets = 1 if hot or request.config.getoption("quick") else machine.copies(moved)
        calls = [prepare(*(inputs if i == 0 else copy.deepcopy(inputs)), dtype=dtype, **options) for i in range(sets)]
        if request.config.getoption("check") and impl != "numpy":
            _check(op, inputs, options, dtype, operations, calls[0])
        work = Work(read, written, flops, dtype, moved * sets > machine.last_level_cache())
        benchmark.group = case
        benchmark.extra_info.update(
            component=request.module.__name__.removeprefix("test_bench_"), impl=impl, variant=variant or dtype,
            bytes=moved, tokens=tokens, note=note, curve=curve, length=length, buffer_sets=sets, **work._asdict())
        benchmark(calls[0] if sets == 1 else _rotating(calls))
        if benchmark.stats is not None:
            median = benchmark.stats.stats.median
            benchmark.extra_info.update({"GB/s": moved / median / 1e9, "GFLOP/s": flops / median / 1e9,
                                         "share": None if limits is None else share(work, median, limits)})

    return run


def _rotating(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    following = itertools.cycle(calls).__next__
    return lambda: following()()


def _check(op: str, inputs: tuple[Any, ...], options: dict[str, Any], dtype: str, operations: ModuleType,
           call: Callable[[], Any]) -> None:
    """The result is NumPy's, up to what the dtype allows: a benchmark of wrong results says nothing."""
    import numpy_ops

    expected = getattr(numpy_ops, op)(*inputs, dtype="float32", **options)()
    if expected is not None:
        got = operations.to_numpy(call()).reshape(expected.shape)
        scale = np.abs(expected).max()
        assert np.abs(got - expected).max() <= _TOLERANCE[dtype] * scale, f"{op} differs from NumPy's"
