"""For PyInstaller, which asks the entry point `pyinstaller40` where a package's hooks lie."""
from __future__ import annotations

from pathlib import Path


def get_hook_dirs() -> list[str]:
    """The folder of hook-forge_c.py."""
    return [str(Path(__file__).parent)]
