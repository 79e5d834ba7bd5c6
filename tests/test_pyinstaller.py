"""The hook for PyInstaller names every module that imports hide, the embedded model's files and the library."""

from __future__ import annotations

import pkgutil
import runpy
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import forge_c
from forge_c._pyinstaller import get_hook_dirs

PACKAGE = Path(forge_c.__file__).parent


def hook():
    (folder,) = get_hook_dirs()
    return runpy.run_path(str(Path(folder, "hook-forge_c.py")))


def modules() -> set[str]:
    """What pkgutil finds, but libforge_c.so, which is a plain library."""
    names = {"forge_c", *(m.name for m in pkgutil.walk_packages([str(PACKAGE)], "forge_c.", onerror=lambda name: None))}
    return names - {"forge_c.libforge_c"}


def test_every_module_is_named_but_integrations():
    """Which would bring torch into every bundle where it is installed."""
    named = hook()["hiddenimports"]
    left_out = {name for name in modules() if name.split(".")[1:2] in (["integrations"], ["_pyinstaller"])}
    assert len(named) == len(set(named)) and len(left_out) >= 5
    assert set(named) == modules() - left_out | {"numpy", "ml_dtypes"}
    for name in named:
        import_module(name)


def test_importing_all_that_is_named_imports_no_torch():
    lines = "".join(f"import {name}\n" for name in hook()["hiddenimports"])
    check = "import sys; assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", lines + check], check=True, cwd=PACKAGE.parent)


def test_the_embedded_model_and_the_library_are_bundled_where_the_package_looks():
    made = hook()
    placed = {Path(folder, Path(file).name) for file, folder in made["datas"] + made["binaries"]}
    assert all(Path(file).is_file() for file, _ in made["datas"] + made["binaries"])
    embedded = forge_c.models.EMBEDDED
    wanted = {file for file in embedded.iterdir() if file.is_file() and file.suffix != ".py"}
    assert {embedded / "model.safetensors", embedded / "config.json"} <= wanted
    assert placed >= {file.relative_to(PACKAGE.parent) for file in wanted}
    assert Path(forge_c.get_library_dir(), "libforge_c.so").relative_to(PACKAGE.parent) in placed


def test_the_package_says_where_the_hook_is():
    said = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    module, function = said["project"]["entry-points"]["pyinstaller40"]["hook-dirs"].split(":")
    assert getattr(import_module(module), function) is get_hook_dirs
    assert module in said["tool"]["setuptools"]["packages"]
