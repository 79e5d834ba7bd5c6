"""Every example in the documentation runs: docs/*.md, README.md, and the docstring of every public name."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import forge_c

ROOT = Path(__file__).parent.parent
API = ROOT / "docs" / "api.md"  # whose examples are those of the docstrings
PAGES = sorted({ROOT / "README.md", *(ROOT / "docs").glob("*.md")} - {API})
COMPILED = {"forge_c.functional", "forge_c.libforge_c"}  # the second is a library for C, no module
MODULES = sorted({m.name for m in pkgutil.walk_packages(forge_c.__path__, "forge_c.")} - COMPILED)
OPTIONS = doctest.NORMALIZE_WHITESPACE


def run(name: str, text: str, names: dict[str, Any]) -> int:
    """The number of examples in a text, all of which hold."""
    test = doctest.DocTestParser().get_doctest(text, names, name, name, 0)
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    report: list[str] = []
    runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)
    return len(test.examples)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_examples_on_the_page(page: Path) -> None:
    examples = run(page.name, page.read_text(), {})
    assert examples > 0 or page.name not in ("README.md", "mission.md", "models.md")


@pytest.mark.parametrize("page", [*PAGES, API, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    gone = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not gone


@pytest.mark.parametrize("name", forge_c.__all__)
def test_public_function_has_an_example_that_runs(name: str) -> None:
    value = getattr(forge_c, name)
    if name in ("__version__", "distributed", "integrations", "models", "nn", "packing"):
        return
    assert value.__doc__
    examples = run(name, value.__doc__, {"np": np, "fc": forge_c, name: value})
    assert examples > 0 or name in WITHOUT_EXAMPLE


# Their result is this machine, or nothing.
WITHOUT_EXAMPLE = {"available_isas", "get_include", "get_library_dir", "get_num_threads", "isa", "roofline",
                   "set_num_threads", "show_config", "use_isa", "PackedWeight", "RopeTable"}


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_the_module(name: str) -> None:
    if name.startswith("forge_c.integrations."):
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
    module = importlib.import_module(name)
    assert module.__doc__
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name, extraglobs={"np": np, "fc": forge_c}):
        runner, report = doctest.DocTestRunner(optionflags=OPTIONS), []
        runner.run(test, out=report.append)
        assert runner.failures == 0, "".join(report)


SMALLER = {"stream_million.py": ["--tokens", "4096", "--shape", "mamba-tiny"]}  # what else would take its time


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_folder(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [str(path), *SMALLER.get(path.name, [])])
    runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    assert len(out) > 20 and "the same bits: False" not in out


def test_api_reference_is_what_the_docstrings_say() -> None:
    page = runpy.run_path(str(ROOT / "tools" / "make_api_reference.py"))["page"]()
    assert API.read_text() == page, "run tools/make_api_reference.py"


def test_stub_and_package_name_the_same_things() -> None:
    stub = (Path(forge_c.__file__).parent / "__init__.pyi").read_text()
    named = {line.rsplit(" as ", 1)[1].strip() for line in stub.splitlines() if " as " in line}
    assert named | {"get_include", "get_library_dir"} == set(forge_c.__all__)
