"""load("ORG/NAME"): which snapshot of the cache it is, what is downloaded, and what is said where it cannot be."""
from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from model_folder import small, write, write_json

from forge_c.models import hub, load

NAME, FOLDER = "some-org/Tiny_Model-0.1b", "models--some-org--Tiny_Model-0.1b"
IDS = np.arange(8)[None]
CACHE = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, no package to download with, and a working directory without models."""
    for key in CACHE:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home" / "hub"


def add_snapshot(cache: Path, commit: str, seed: int, *, age: float = 0.0, main: bool = False, shards: int = 1) -> Path:
    """As huggingface_hub lays one out: links to blobs."""
    blobs, snapshot = cache / FOLDER / "blobs", cache / FOLDER / "snapshots" / commit
    files = write(blobs / commit, small(), seed=seed, shards=shards)
    snapshot.mkdir(parents=True)
    for file in files.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    os.utime(snapshot, (1e9 - age, 1e9 - age))
    if main:
        (cache / FOLDER / "refs").mkdir(exist_ok=True)
        (cache / FOLDER / "refs" / "main").write_text(commit)
    return snapshot


def logits_of(seed: int, folder: Path) -> bytes:
    return load(write(folder / f"seed {seed}", small(), seed=seed))(IDS).tobytes()


@pytest.mark.parametrize("shards", [1, 3])
def test_a_cached_model_is_loaded_by_its_name(cache, tmp_path, shards):
    add_snapshot(cache, "a" * 40, seed=5, main=True, shards=shards)
    assert load(NAME)(IDS).tobytes() == logits_of(5, tmp_path)


def test_the_snapshot_is_the_one_that_main_names_else_the_newest(cache, tmp_path):
    add_snapshot(cache, "old", 1, age=100)
    add_snapshot(cache, "new", 2, age=10)
    assert load(NAME)(IDS).tobytes() == logits_of(2, tmp_path)
    add_snapshot(cache, "fetched", 3, age=50, main=True)
    assert load(NAME)(IDS).tobytes() == logits_of(3, tmp_path)
    for ref in ("gone", "../../escape", "", "\n", "x" * 1000):
        (cache / FOLDER / "refs" / "main").write_text(ref)
        assert load(NAME)(IDS).tobytes() == logits_of(2, tmp_path), ref


@pytest.mark.parametrize("missing", ["config.json", "model-00002-of-00003.safetensors"])
def test_a_snapshot_that_is_not_whole_does_not_count(cache, tmp_path, missing):
    add_snapshot(cache, "whole", 1, age=100)
    broken = add_snapshot(cache, "broken", 2, main=True, shards=3)
    (broken / missing).resolve().unlink()
    assert load(NAME)(IDS).tobytes() == logits_of(1, tmp_path)


def test_a_path_that_exists_wins(cache, tmp_path):
    add_snapshot(cache, "a", 1, main=True)
    write(tmp_path / NAME, small(), seed=2)
    assert load(NAME)(IDS).tobytes() == logits_of(2, tmp_path)


@pytest.mark.parametrize(("variables", "expected"), [
    ({}, "{home}/.cache/huggingface/hub"), ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
    ({"XDG_CACHE_HOME": "/x", "HF_HOME": "/h"}, "/h/hub"), ({"HF_HOME": "~/h"}, "{home}/h/hub"),
    ({"HF_HOME": "/h", "HUGGINGFACE_HUB_CACHE": "/old"}, "/old"), ({"HF_HOME": "$BASE/h"}, "/base/h/hub"),
    ({"HF_HOME": "/h", "HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "/c"}, "/c"),
])
def test_where_the_cache_is(monkeypatch, variables, expected):
    monkeypatch.delenv("HF_HOME")
    for key, value in (variables | {"HOME": "/somebody", "BASE": "/base"}).items():
        monkeypatch.setenv(key, value)
    assert str(hub.cache_folder()) == expected.format(home="/somebody")


def test_a_name_that_is_nowhere_says_the_command(cache):
    with pytest.raises(FileNotFoundError) as caught:
        load(NAME)
    assert str(caught.value) == (f"load: {NAME} is no folder, and not in {cache}; `hf download {NAME}` puts it there; "
                                 "with huggingface_hub installed (pip install huggingface_hub) so does load")


@pytest.mark.parametrize("path", ["name", "a/b/c", "/org/name", "org/", "./org/name", "../name", "org/na me", "-o/name",
                                  "org/name.", "o/" + "n" * 97, Path("org/name")], ids=repr)
def test_what_is_no_name_is_no_folder(path):
    with pytest.raises(FileNotFoundError) as caught:
        load(path)
    assert str(caught.value) == (f"load: {path} is not a folder; `hf download ORG/NAME --local-dir DIR` makes one")


def test_a_file_is_told_its_folder(tmp_path):
    write(tmp_path / "model", small())
    with pytest.raises(FileNotFoundError) as caught:
        load(tmp_path / "model" / "model.safetensors")
    assert str(caught.value) == (f"load: {tmp_path / 'model' / 'model.safetensors'} is a file, expected the folder "
                                 f"that it is in, {tmp_path / 'model'}")


# ---- downloads -------------------------------------------------------------------------------------

@pytest.fixture
def remote(tmp_path, monkeypatch, cache):
    """A Hub of one model, and the patterns of each download."""
    asked: list[list[str]] = []
    source = write(tmp_path / "remote", small(), seed=9)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "README.md", "onnx.bin"):
        (source / name).write_bytes(b"x" * 100)

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        assert name == NAME
        asked.append(allow_patterns)
        to = cache / FOLDER / "snapshots" / "c0ffee"
        to.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                (to / file.name).write_bytes(file.read_bytes())
        return str(to)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    return SimpleNamespace(asked=asked, source=source)


def test_a_model_is_downloaded_once_and_only_what_is_read(remote, cache, tmp_path):
    assert load(NAME)(IDS).tobytes() == logits_of(9, tmp_path)
    assert len(remote.asked) == 2
    held = {p.name for p in (cache / FOLDER / "snapshots" / "c0ffee").iterdir()}
    assert held == {"config.json", "model.safetensors"}
    assert load(NAME)(IDS).tobytes() == logits_of(9, tmp_path)
    assert len(remote.asked) == 2


@pytest.mark.parametrize(("change", "message"), [
    ({"surprise": 1}, "^config.json: surprise is 1"), ({"model_type": "bert"}, "^config.json: model_type is 'bert'"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantised by AWQ"),
])
def test_what_would_be_refused_is_not_downloaded(remote, change, message):
    write_json(remote.source / "config.json", small(**change))
    with pytest.raises(ValueError, match=message):
        load(NAME)
    assert len(remote.asked) == 1 and not any("safetensors" in p for p in remote.asked[0] if "index" not in p)


def test_ignored_keys_count_for_a_download_too(remote, tmp_path):
    write_json(remote.source / "config.json", small(surprise=1))
    assert load(NAME, ignore=("surprise",))(IDS).tobytes() == logits_of(9, tmp_path)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_nothing_is_downloaded_where_that_is_switched_off(remote, cache, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(FileNotFoundError) as caught:
        load(NAME)
    assert str(caught.value) == (f"load: {NAME} is no folder, and not in {cache}; `hf download {NAME}` puts it there "
                                 "(HF_HUB_OFFLINE is set: nothing is downloaded here)")
    assert not remote.asked


class Unreachable(Exception):
    pass


def failing(at: int) -> Any:
    calls: list[int] = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        calls.append(1)
        if len(calls) == at:
            raise Unreachable("the network is unreachable\nand more")
        return os.getcwd()
    return SimpleNamespace(snapshot_download=snapshot_download)


def test_a_download_that_fails_says_why_and_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", failing(1))
    with pytest.raises(FileNotFoundError, match=f"`hf download {NAME}` puts it there; it was tried: the network is "
                                                "unreachable$"):
        load(NAME)
    write_json(tmp_path / "config.json", small())
    monkeypatch.setitem(sys.modules, "huggingface_hub", failing(2))
    with pytest.raises(OSError, match=f"^load: {NAME} was not downloaded to its end: the network is unreachable; `hf "
                                      f"download {NAME}` goes on where it stopped$"):
        load(NAME)
