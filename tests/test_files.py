"""Files that are no files, have no end, or are mostly nothing: each is refused at once, by name, and cheaply."""
from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
from child import run_script
from model_folder import BYTES, container, small, tensors, write
from pace import check_pace, processor_time

from forge_c.files import open_regular, read_file, read_json
from forge_c.models.tokenizer_files import load_tokenizer
from forge_c.models.weights.hf import Checkpoint

CHILD = """
import forge_c as fc
import forge_c.models.tokenizer, tokenizers, jinja2
from child import limit_address_space
from pace import check_pace
limit_address_space(4 << 30)

def refusal(folder):
    try:
        fc.models.load(folder)
    except ValueError as error:
        return error

for folder in {folders!r}:
    told = []
    check_pace(lambda: told.append(refusal(folder)), {seconds})
    print(told[0])
"""
TOKENIZER = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "decoder": None,
             "truncation": None, "padding": None, "post_processor": None,
             "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
READ = ["model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json", "chat_template.jinja"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = write(tmp_path / "model", small(), tokenizer={"tokenizer_class": "PreTrainedTokenizerFast"})
    (path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return path


def refusals(*folders: Path, seconds: float = 2.0) -> list[str]:
    """What loading each says when it refuses, in a process of its own that is killed if it waits."""
    script = CHILD.format(folders=list(map(str, folders)), seconds=seconds)
    return run_script(script, timeout=60).splitlines()


def replace(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(path.with_suffix(".fifo"))
        path.symlink_to(path.with_suffix(".fifo"))
    elif kind == "socket":
        here = os.open(path.parent, os.O_RDONLY)  # a socket's own path may have 108 bytes
        socket.socket(socket.AF_UNIX).bind(f"/proc/self/fd/{here}/{path.name}")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "socket", "folder", "/dev/zero", "/dev/tty"])
def test_what_is_no_file_is_refused(folder, tmp_path, kind):
    copies = [shutil.copytree(folder, tmp_path / name) for name in READ]
    for copy in copies:
        replace(copy / copy.name, kind)
    assert refusals(*copies) == [f"{copy / copy.name}: not a regular file" for copy in copies]


def test_a_file_that_becomes_a_pipe_is_not_waited_for(tmp_path, monkeypatch):
    path, real = tmp_path / "x", os.stat
    path.write_bytes(b"{}")
    regular = real(path)
    replace(path, "pipe")
    monkeypatch.setattr(os, "stat", lambda *_, **__: regular)
    with pytest.raises(ValueError) as caught:
        open_regular(path)
    assert str(caught.value) == f"{path}: not a regular file"


def test_three_gigabytes_of_nothing_are_not_read(folder, tmp_path):
    copies = [shutil.copytree(folder, tmp_path / name) for name in READ[2:]]
    for copy in copies:
        with open(copy / copy.name, "wb") as file:
            file.truncate(3 << 30)
    for copy, said in zip(copies, refusals(*copies), strict=True):
        assert said.startswith(f"{copy / copy.name}: {3 << 30} bytes, expected at most ")


def test_the_limit_is_on_what_is_read():
    """Files of /proc claim 0 bytes."""
    assert os.stat("/proc/self/maps").st_size == 0
    assert len(read_file("/proc/self/maps", 1 << 24)) > 100
    with pytest.raises(ValueError) as caught:
        read_file("/proc/self/maps", 100)
    assert str(caught.value) == "/proc/self/maps: more than 100 bytes, expected at most 100"


def test_a_file_of_just_the_limit_is_read(tmp_path):
    (tmp_path / "x").write_bytes(b"[1234]")
    assert read_file(tmp_path / "x", 6) == b"[1234]" and read_json(tmp_path / "x", 6) == [1234]
    with pytest.raises(ValueError) as caught:
        read_file(tmp_path / "x", 5)
    assert str(caught.value) == f"{tmp_path / 'x'}: 6 bytes, expected at most 5"
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none", 5)


# ---- what costs time -------------------------------------------------------------------------------

def with_metadata(folder: Path, metadata: object) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length]) | {"__metadata__": metadata}
    path.write_bytes(container(header, data[8 + length :]))


@pytest.mark.slow
def test_notes_without_end_in_a_header_are_refused(folder):
    path = folder / "model.safetensors"
    for count, message in ((4097, "__metadata__ has 4097 entries, expected at most 4096"),
                           (10 ** 6, "more than 524288 values")):
        with_metadata(folder, {f"k{i}": "v" for i in range(count)})
        assert refusals(folder) == [f"{path}: {message}"]
    with_metadata(folder, {f"k{i}": "v" for i in range(4096)})
    assert "lm_head.weight" in Checkpoint(folder)


@pytest.mark.parametrize("metadata", [5, [], {"a": 1}, {"a": {"b": "c"}}, "x"], ids=repr)
def test_notes_are_texts(folder, metadata):
    with_metadata(folder, metadata)
    with pytest.raises(ValueError) as caught:
        Checkpoint(folder)
    assert str(caught.value) == f"{folder / 'model.safetensors'}: __metadata__ is not an object of texts"


@pytest.mark.slow
def test_a_header_is_parsed_once(tmp_path):
    """However many tensors are taken: this one has 40 MB, and parsing it takes tens of milliseconds."""
    config = small(num_hidden_layers=100)
    folder = write(tmp_path, config, tensors(config), tokenizer=BYTES)
    with_metadata(folder, {"note": "x" * (40 << 20)})
    checkpoint, values = Checkpoint(folder), tensors(config)
    once = processor_time(lambda: Checkpoint(folder))

    def take() -> None:
        for name, value in values.items():
            assert checkpoint.take(name, value.shape).tobytes() == value.tobytes()

    check_pace(take, 3 * once + 2.0)


def test_a_shape_of_300_000_axes_is_refused(tmp_path):
    shape = [(1 << 62) + 1] * 300_000
    header = {"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}
    (tmp_path / "model.safetensors").write_bytes(container(header, bytes(4)))

    def refuse() -> None:
        with pytest.raises(ValueError, match=r"x has shape .*, expected a list of at most 64 sizes"):
            Checkpoint(tmp_path)

    check_pace(refuse, 5.0)


def test_a_file_that_was_cut_while_loading(folder):
    path = folder / "model.safetensors"
    checkpoint = Checkpoint(folder)
    os.truncate(path, path.stat().st_size - 1)
    last = max(checkpoint._entries, key=lambda name: checkpoint._entries[name].start)
    with pytest.raises(ValueError) as caught:
        checkpoint.take(last, checkpoint._entries[last].shape)
    assert str(caught.value) == f"{path}: it ends within {last}"


@pytest.mark.parametrize(("document", "message"), [
    (b'{"model": {"vocab": {' + b",".join(b'"%d":%d' % (i, i) for i in range(600_000)) + b"}}}", "524288 keys"),
    (b'{"model": {"merges": [' + b"[]," * 1_400_000 + b"[]]}}", "2621440 values")], ids=["keys", "values"])
def test_a_tokenizer_of_too_many_entries_is_not_parsed(folder, document, message):
    (folder / "tokenizer.json").write_bytes(document)
    assert refusals(folder) == [f"{folder / 'tokenizer.json'}: more than {message}"]


@pytest.mark.slow
def test_a_tokenizer_as_large_as_any_published_one_is_read(folder):
    """262 144 tokens and 515 000 merges, written as pairs."""
    letters = [chr(0x4e00 + i) for i in range(1024)]
    pairs = [(a, b) for a in letters for b in letters[:256]][: 262_144 - len(letters)]
    vocab = {token: i for i, token in enumerate([*letters, *(a + b for a, b in pairs)])}
    model = {"type": "BPE", "vocab": vocab, "merges": (pairs + pairs)[:515_000]}
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER | {"model": model}, ensure_ascii=False))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode(letters[3] + letters[5]) == [vocab[letters[3] + letters[5]]]
