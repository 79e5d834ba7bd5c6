"""llama.cpp's files of forge_c's shapes, written once and kept."""
from __future__ import annotations

import json
import shutil
import sys
import zlib
from pathlib import Path

from peers_table import Sizes
from processes import HERE, output, say

from forge_c.models.weights.random import SHAPES

_SPARE_DISK = 2 << 30


def gguf_file(form: str, shape: str, folder: Path, llama_bench: str, python: str = sys.executable) -> Path:
    """The model file of a format, written if it is not there yet; RuntimeError if it cannot be."""
    if not shutil.which(llama_bench):
        raise RuntimeError(f"{llama_bench} is not there, see --llama-bench")
    output([llama_bench, "--help"])
    config = json.dumps(dict(SHAPES[shape]))
    path = folder / f"{shape}-{zlib.crc32(config.encode()):08x}-{form}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        need, free = int(Sizes.of(SHAPES[shape]).file_bytes(form)), shutil.disk_usage(folder).free
        if free < need + _SPARE_DISK:
            raise RuntimeError(f"{folder} has {free >> 20} MiB, {need + _SPARE_DISK >> 20} are wanted")
        say(f"writing {path}")
        output([python, str(HERE / "model_gguf.py"), str(path), form, config])
    return path
