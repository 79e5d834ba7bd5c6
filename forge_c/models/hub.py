"""Models by their name on the Hugging Face Hub: from the local cache, else downloaded by the huggingface_hub package.

The cache is read here, without that package: models--ORG--NAME/snapshots/COMMIT/ holds the files, and refs/main names
the commit that was last fetched.
"""
from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from forge_c.files import read_file, read_json

_PART = r"[0-9A-Za-z_](?:[0-9A-Za-z_.-]{0,94}[0-9A-Za-z_])?"
_NAME = re.compile(f"{_PART}/{_PART}")
_COMMIT = re.compile(r"[0-9A-Za-z_-][0-9A-Za-z_.-]{0,127}")
_ON = frozenset({"1", "ON", "YES", "TRUE"})
# What `load` reads; the weights come when the rest has been looked at.
_FIRST = ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
          "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.*",
          "additional_chat_templates/*", "adapter_config.json", "hf_quant_config.json", "quantize_config.json",
          "quant_config.json"]
_WEIGHTS = ["model.safetensors", "model-*.safetensors"]


def find(path: str | os.PathLike[str], check: Callable[[Path], object]) -> Path:
    """What exists at `path`; for a text ORG/NAME, where nothing does, that model's folder. check(folder) raises if the
    files beside the weights say that the model cannot be read: before it is downloaded.

    Raises:
        FileNotFoundError: there is no such path, nor such a model in the cache, and it cannot be downloaded.
    """
    if Path(path).exists():
        return Path(path)
    if not isinstance(path, str) or not _NAME.fullmatch(path):
        raise FileNotFoundError(f"load: {os.fspath(path)} is not a folder; `hf download ORG/NAME --local-dir DIR` "
                                "makes one")
    return _cached(path) or _downloaded(path, check)


def cache_folder() -> Path:
    """Where the Hub's files are kept, by the rules of huggingface_hub."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    home = os.environ.get("HF_HOME") or os.path.join(home, "huggingface")
    hub = (os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub"))
    return Path(os.path.expandvars(os.path.expanduser(hub)))


def _cached(name: str) -> Path | None:
    """The snapshot of a model that was fetched last, of those that are whole."""
    folder = cache_folder() / f"models--{name.replace('/', '--')}"
    if not (folder / "snapshots").is_dir():
        return None
    whole = sorted((p for p in (folder / "snapshots").iterdir() if _is_whole(p)), key=lambda p: p.stat().st_mtime)
    ref = folder / "refs" / "main"
    commit = read_file(ref, 1 << 10).decode(errors="replace").strip() if ref.is_file() else ""
    named = folder / "snapshots" / commit if _COMMIT.fullmatch(commit) else None
    return named if named in whole else whole[-1] if whole else None


def _is_whole(folder: Path) -> bool:
    """Whether it holds a model: a link to a file that is not there does not count."""
    if not folder.is_dir():
        return False
    if not (folder / "config.json").exists():
        return any(path.exists() for path in folder.glob("*.gguf"))
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return (folder / "model.safetensors").exists()
    document = read_json(index)
    shards = document.get("weight_map") if isinstance(document, dict) else None
    return isinstance(shards, dict) and all((folder / str(shard)).exists() for shard in set(map(str, shards.values())))


def _downloaded(name: str, check: Callable[[Path], object]) -> Path:
    nowhere = f"load: {name} is no folder, and not in {cache_folder()}; `hf download {name}` puts it there"
    if any((os.environ.get(key) or "").upper() in _ON for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")):
        raise FileNotFoundError(f"{nowhere} (HF_HUB_OFFLINE is set: nothing is downloaded here)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"{nowhere}; with huggingface_hub installed (pip install huggingface_hub) so does "
                                "load") from None
    try:
        folder = Path(snapshot_download(name, allow_patterns=_FIRST))
    except Exception as error:  # of many kinds, by its version and by the network's state
        raise FileNotFoundError(f"{nowhere}; it was tried: {_first_line(error)}") from error
    check(folder)
    try:
        return Path(snapshot_download(name, allow_patterns=_FIRST + _WEIGHTS))
    except Exception as error:
        raise OSError(f"load: {name} was not downloaded to its end: {_first_line(error)}; `hf download {name}` goes on "
                      "where it stopped") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
