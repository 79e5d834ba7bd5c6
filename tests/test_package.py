"""The package as a module: its names, and what it says where it is not compiled."""
from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import forge_c


@pytest.mark.parametrize("package", [forge_c, forge_c.distributed, forge_c.models, forge_c.nn],
                         ids=lambda p: p.__name__)
def test_dir_lists_the_public_names_and_no_others(package: object) -> None:
    listed = [name for name in dir(package) if not name.startswith("__") or name in package.__all__]
    assert listed == sorted(package.__all__)


def test_subpackages_are_attributes() -> None:
    code = "import forge_c as fc; print(fc.packing.from_q4_0.__name__, fc.integrations.__name__, fc.nn.Linear.__name__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "from_q4_0 forge_c.integrations Linear\n"


@pytest.mark.parametrize("code", ["fc.isa()", "fc.rms_norm", "fc.pack", "fc.models.load()", "fc.nn.Linear"])
def test_source_that_is_not_compiled_says_so(tmp_path: Path, code: str) -> None:
    source = Path(forge_c.__file__).parent
    shutil.copytree(source, tmp_path / "forge_c", ignore=shutil.ignore_patterns("*.so", "__pycache__", "assets"))
    no_editable = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]"
    script = f"{no_editable}; import forge_c as fc; {code}"
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True,
                         text=True)
    assert run.returncode == 1
    assert f"ImportError: forge_c: {tmp_path / 'forge_c'} is the source, where nothing is compiled; run `make` or" \
        in run.stderr.splitlines()[-1]


def test_packed_weight_is_no_array_and_says_what_to_do() -> None:
    packed = forge_c.pack(np.eye(3, dtype=np.float32))
    x = np.ones((2, 3), np.float32)
    for wrong in (lambda: np.asarray(packed), lambda: x @ packed, lambda: forge_c.relu(packed)):
        with pytest.raises(TypeError, match=r"PackedWeight is no array: multiply by linear\(x, weight\)"):
            wrong()
