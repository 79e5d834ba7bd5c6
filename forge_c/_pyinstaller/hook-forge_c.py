"""What PyInstaller must bundle with a script that imports forge_c and cannot see: modules are imported when a name is
first used, the extension module imports others, and the embedded model is data.

The integrations stay out: they need torch and transformers, and a script that uses one imports it by name.
"""
from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_LEFT_OUT = ("integrations", "_pyinstaller")


def _module(file: Path) -> str:
    """forge_c/nn/layer.py -> forge_c.nn.layer"""
    parts = file.relative_to(_PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


hiddenimports = ["numpy", "ml_dtypes", "forge_c.functional"] + sorted(
    _module(file) for file in _PACKAGE.rglob("*.py") if file.relative_to(_PACKAGE).parts[0] not in _LEFT_OUT)
datas = [(str(file), str(file.parent.relative_to(_PACKAGE.parent))) for file in sorted((_PACKAGE / "assets").rglob("*"))
         if file.is_file() and file.suffix not in (".py", ".pyc")]
binaries = [(str(_PACKAGE / "libforge_c.so"), "forge_c")]
