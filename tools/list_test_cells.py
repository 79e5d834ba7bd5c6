"""Which cells a run of the tests exercised: (operation, format, dtype, ISA, threads), with the calls that were made.

    python tools/list_test_cells.py record CELLS [pytest's arguments]    run the tests, write the cells to a file
    python tools/list_test_cells.py compare BEFORE AFTER [--by-test]     fail if a cell of BEFORE is not in AFTER

A change to the tests that is to lose nothing records before and after. Every call of a function of forge_c.functional
that is not refused counts, by whatever test, layer or model it is made; calls in child processes and from C do not.
format is that of the packed weight or of the key/value cache, dtype that of the first array. --by-test asks for more:
that each test function still exercises what it did. As a plugin (-p list_test_cells) it also runs in the workers of
pytest-xdist.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FOLDER = "FORGE_C_TEST_CELLS"
TESTS = Path(__file__).parent.parent / "tests"
NOT_OPERATIONS = {"available_isas", "check", "get_num_threads", "isa", "set_num_threads", "use_isa"}

Cell = tuple[str, ...]  # the test function, operation, format, dtype, ISA, threads
cells: Counter[Cell] = Counter()
running = ""


def formats(value: Any) -> Iterator[str]:
    """The formats of the packed weights and caches in an argument."""
    if isinstance(value, list | tuple):
        for part in value[:2]:
            yield from formats(part)
    elif type(value).__name__ in ("PackedWeight", "KVCache", "RowView"):
        group = getattr(value, "group_size", None)
        yield f"{value.dtype}{f'/{group}' if group else ''}"
    elif hasattr(value, "cell_formats"):
        yield value.cell_formats


def count(name: str, arguments: tuple[Any, ...], functional: Any) -> None:
    arrays = (str(a.dtype) for a in arguments if hasattr(a, "dtype") and hasattr(a, "strides"))
    named = sorted({text for a in arguments for text in formats(a)})
    cells[running, name, " ".join(named), next(arrays, ""), functional.isa(), str(functional.get_num_threads())] += 1


def counted(name: str, call: Callable[..., Any], functional: Any) -> Callable[..., Any]:
    @functools.wraps(call)
    def wrapper(*args: Any, **options: Any) -> Any:
        result = call(*args, **options)
        count(name, (*args, *options.values()), functional)
        return result

    return wrapper


def watch() -> None:
    """Put a counter before every operation, before anyone has imported one."""
    from forge_c import functional

    class LayeredModel(functional.LayeredModel):  # type: ignore[misc]
        def forward(self, ids: Any, states: Any, start: Any, **options: Any) -> Any:
            result = super().forward(ids, states, start, **options)
            count("forward", (self.embedding, self.head), functional)
            return result

    functional.LayeredModel = LayeredModel
    for name, value in list(vars(functional).items()):
        ours = type(value).__name__ == "cython_function_or_method"
        if ours and not name.startswith("_") and name not in NOT_OPERATIONS:
            setattr(functional, name, counted(name, value, functional))


def pytest_runtest_logstart(nodeid: str) -> None:
    global running
    running = nodeid.partition("[")[0].removeprefix("tests/")


def pytest_sessionfinish() -> None:
    lines = [json.dumps([*cell, calls]) for cell, calls in cells.items()]
    Path(os.environ[FOLDER], str(os.getpid())).write_text("\n".join(lines))


if FOLDER in os.environ:
    watch()


def record(path: str, arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, FOLDER: folder,
               "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-m", "pytest", "-c", "../pyproject.toml", "--rootdir", "..",
                   "-p", "no:cacheprovider", "-p", "list_test_cells", *(arguments or ["."])]
        status = subprocess.run(command, env=env, cwd=TESTS).returncode
        total: Counter[Cell] = Counter()
        for part in Path(folder).iterdir():
            for line in part.read_text().splitlines():
                *cell, calls = json.loads(line)
                total[tuple(cell)] += calls
    Path(path).write_text("".join(f"{json.dumps([*cell, calls])}\n" for cell, calls in sorted(total.items())))
    print(f"{len(total)} cells by test, {len({cell[1:] for cell in total})} in all, {total.total()} calls")
    return status


def read(path: str, by_test: bool) -> set[Cell]:
    lines = (tuple(json.loads(line)[:-1]) for line in Path(path).read_text().splitlines())
    return {line if by_test else line[1:] for line in lines}


def compare(before: str, after: str, by_test: bool) -> int:
    old, new = read(before, by_test), read(after, by_test)
    for cell in sorted(old - new):
        print("lost:", *(part or "-" for part in cell))
    print(f"{len(old)} cells before, {len(new)} after: {len(old - new)} lost, {len(new - old)} new")
    return int(bool(old - new))


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["record"] and len(arguments) > 1:
        return record(os.path.abspath(arguments[1]), arguments[2:])
    options = [a for a in arguments if a != "--by-test"]
    if options[:1] == ["compare"] and len(options) == 3:
        return compare(options[1], options[2], "--by-test" in arguments)
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
