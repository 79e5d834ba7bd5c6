"""The GGUF container: what stands in a file comes out; a broken one is a named ValueError at once, in little memory."""
from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf_files import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Raw,
    Typed,
    container,
    gguf,
    info,
    pair,
    text,
    write_shards,
)
from pace import check_pace
from refusal import refused

from forge_c.formats.gguf import TYPES, open_gguf

SECONDS = 1.0
ZEROS = np.zeros((4, 8), np.float32)
NAMES = [f"t{i}" for i in range(5)]


def written(folder: Path, content: bytes, name: str = "x.gguf") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


# ---- sound files -----------------------------------------------------------------------------------------------------


def test_every_value_type(tmp_path):
    given: dict[str, Any] = {
        "u8": Typed(U8, 255), "i8": Typed(I8, -128), "u16": Typed(U16, 65535), "i16": Typed(I16, -32768),
        "u32": Typed(U32, 2**32 - 1), "i32": Typed(I32, -2**31), "f32": Typed(F32, 0.5), "true": True, "false": False,
        "text": "héllo", "u64": Typed(U64, 2**64 - 1), "i64": Typed(I64, -2**63), "f64": Typed(F64, 1e300), "none": ""}
    found = open_gguf(written(tmp_path, gguf(given, {}))).metadata
    expected = {key: v.value if isinstance(v, Typed) else v for key, v in given.items()}
    assert dict(found) == expected
    assert {key: type(v) for key, v in found.items()} == {key: type(v) for key, v in expected.items()}


def test_arrays(tmp_path):
    given = {"ints": Typed(I32, [3, -1, 2]), "floats": [0.5, -1.0], "flags": [True, False], "empty": Typed(F32, []),
             "texts": ["a", "", "ü" * 300, "z"], "no texts": Typed(STRING, [])}
    found = open_gguf(written(tmp_path, gguf(given, {}))).metadata
    assert found["ints"].tolist() == [3, -1, 2] and found["floats"].tolist() == [0.5, -1.0]
    assert found["flags"].tolist() == [True, False] and found["empty"].tolist() == []
    texts = found["texts"]
    assert list(texts) == ["a", "", "ü" * 300, "z"] == [texts[i] for i in range(4)] and len(texts) == 4
    assert texts[-1] == "z" and texts[1:3] == ["", "ü" * 300] and len(found["no texts"]) == 0
    with pytest.raises(IndexError):
        texts[4]


def test_a_text_that_is_no_utf8_says_so_when_it_is_read(tmp_path):
    texts = open_gguf(written(tmp_path, gguf({"k": [b"a", b"\xff"]}, {}))).metadata["k"]
    assert texts[0] == "a"
    with pytest.raises(ValueError, match=r"x\.gguf: k holds b'\\xff', expected UTF-8"):
        list(texts)


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_tensors_come_back(tmp_path, rng, alignment):
    given = {"a": rng.standard_normal((3, 5)).astype(np.float32), "b": rng.standard_normal(7).astype(np.float16),
             "c": rng.standard_normal((2, 3, 4)).astype(ml_dtypes.bfloat16), "q": Raw(2, (3, 64), rng.bytes(108))}
    file = open_gguf(written(tmp_path, gguf({}, given, alignment)))
    assert list(file.tensors) == list(given)
    for name, tensor in given.items():
        entry = file.tensors[name]
        assert entry.shape == tensor.shape
        assert entry.read().tobytes() == (tensor.data if isinstance(tensor, Raw) else tensor.tobytes())
    assert [file.tensors[n].type.name for n in given] == ["F32", "F16", "BF16", "Q4_0"]


def test_the_last_padding_may_be_missing(tmp_path):
    content = gguf({}, {"a": np.arange(3, dtype=np.float32)})
    assert open_gguf(written(tmp_path, content[:-20])).tensors["a"].read().view(np.float32).tolist() == [0, 1, 2]


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions(tmp_path, version):
    assert open_gguf(written(tmp_path, container([pair("k", 1)], version=version))).metadata == {"k": 1}


def test_block_sizes_are_those_of_the_gguf_package():
    sizes = pytest.importorskip("gguf").GGML_QUANT_SIZES
    for number, (block, nbytes) in sizes.items():
        if number.name != "Q8_1":  # never in a file; the package counts float32 where ggml has float16
            assert (TYPES[number].name, TYPES[number].block, TYPES[number].nbytes) == (number.name, block, nbytes)


def test_the_packages_own_writer(tmp_path, rng):
    package = pytest.importorskip("gguf")
    writer = package.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "bc"])
    writer.add_token_scores([0.5, 1.5])
    writer.add_context_length(77)
    weight = rng.standard_normal((4, 64)).astype(np.float32)
    writer.add_tensor("w", weight)
    quantised = package.quants.quantize(weight, package.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q", quantised, raw_dtype=package.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "x.gguf")
    assert file.metadata["llama.context_length"] == 77 and list(file.metadata["tokenizer.ggml.tokens"]) == ["a", "bc"]
    assert file.tensors["w"].read().tobytes() == weight.tobytes()
    assert file.tensors["q"].read().tobytes() == quantised.tobytes() and file.tensors["q"].shape == (4, 64)


def test_a_large_vocabulary_is_read_at_once(tmp_path):
    tokens = [f"▁token{i}" for i in range(262144)]
    path = written(tmp_path, gguf({"tokenizer.ggml.tokens": tokens}, {}))
    check_pace(lambda: open_gguf(path).metadata["tokenizer.ggml.tokens"], 0.5)
    assert list(open_gguf(path).metadata["tokenizer.ggml.tokens"]) == tokens


# ---- shards ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path, rng):
    tensors = {name: rng.standard_normal((2, 3)).astype(np.float32) for name in NAMES}
    return write_shards(tmp_path, "m", {"k": 1}, tensors, 3), tensors


@pytest.mark.parametrize("which", range(3))
def test_any_shard_stands_for_all(shards, which):
    paths, tensors = shards
    file = open_gguf(paths[which])
    assert file.path == paths[0] and file.metadata["k"] == 1 and set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert file.tensors[name].read().tobytes() == tensor.tobytes()


def test_shards_that_do_not_fit_are_refused(shards):
    paths, tensors = shards
    whole = [path.read_bytes() for path in paths]

    def split(i: int, count: int, total: int) -> dict[str, Any]:
        return {"split.no": Typed(U16, i), "split.count": Typed(U16, count), "split.tensors.count": Typed(I32, total)}

    def check(change: dict[int, bytes], message: str, kind: type[Exception] = ValueError) -> None:
        for path, content in zip(paths, whole, strict=True):
            path.write_bytes(content)
        for i, content in change.items():
            paths[i].write_bytes(content)
        with pytest.raises(kind, match=message):
            open_gguf(paths[0])

    check({1: gguf(split(2, 3, 5), {"t1": ZEROS, "t4": ZEROS})}, r"m-00002-of-00003\.gguf: split\.no is 2, expected 1")
    check({1: gguf(split(1, 4, 5), {"t1": ZEROS, "t4": ZEROS})}, "split.count is 4, expected 3")
    check({1: gguf({}, {"t1": ZEROS, "t4": ZEROS})}, "split.no is -1, expected 1")
    check({1: gguf(split(1, 3, 5), {"t1": ZEROS, "t0": ZEROS})}, r"tensor t0 stands also in m-00001-of-00003\.gguf")
    check({1: gguf(split(1, 3, 5), {"t1": ZEROS})}, "split.tensors.count is 5, expected 4")
    check({0: gguf(split(0, 65535, 5), {"t0": ZEROS})}, "split.count is 65535, expected at most 1024")
    check({0: gguf(split(0, 4, 5), {"t0": ZEROS})}, r"expected a name that ends in -00001-of-00004\.gguf")
    check({0: gguf(split(7, 3, 5), {"t0": ZEROS})}, "shard 8 of 3")
    check({1: b""}, r"m-00002-of-00003\.gguf: it begins with b''")
    paths[2].unlink()
    paths[0].write_bytes(whole[0])
    with pytest.raises(FileNotFoundError, match=r"m-00003-of-00003\.gguf: no such file; m-00001-of-00003\.gguf is"):
        open_gguf(paths[0])


def test_a_shard_by_another_name_is_refused(shards, tmp_path):
    """The others could not be found; nothing is looked for outside the folder."""
    renamed = tmp_path / "model.gguf"
    renamed.write_bytes(shards[0][0].read_bytes())
    with pytest.raises(ValueError, match=r"expected a name that ends in -00001-of-00003\.gguf"):
        open_gguf(renamed)


# ---- broken files ----------------------------------------------------------------------------------------------------

K = pair("k", 1)
T = info("t", [8, 4])
DATA = ZEROS.tobytes()
SOUND = container([K], [T], DATA)


def arrays(n: int) -> bytes:
    """An array in an array in an array."""
    return struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * n + struct.pack("<IQI", U32, 1, 7)


def array_of(kind: int, n: int, data: bytes = b"") -> bytes:
    return struct.pack("<IIQ", ARRAY, kind, n) + data


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "begins with b''"),
    "seven bytes": (SOUND[:7], "the version ends at byte 8, but the file has 7"),
    "GGJT": (container([K], [T], DATA, magic=b"GGJT"), "a GGJT file, a format that was given up in 2023"),
    "GGJT as it was written": (b"tjgg\3\0\0\0" + bytes(100), "a GGJT file"),
    "GGML": (b"lmgg" + bytes(100), "a GGML file"),
    "GGLA": (b"algg" + bytes(100), "an adapter and no model"),
    "another magic": (container([K], [T], DATA, magic=b"FUGG"), "begins with b'FUGG', expected b'GGUF'"),
    "a zip archive": (b"PK\3\4" + bytes(100), "it can hold code and is not read"),
    "safetensors": (struct.pack("<Q", 50) + b'{"a": 1}' + bytes(100), "a safetensors file; pass the folder"),
    "an LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "a web page": (b"<!DOCTYPE html><html>", "a web page"),
    "version 0": (container([K], [T], DATA, version=0), "version is 0, expected 2 or 3"),
    "version 1": (container([K], [T], DATA, version=1), "version is 1, expected 2 or 3"),
    "version 4": (container([K], [T], DATA, version=4), "version is 4, expected 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(100), "a big-endian GGUF file"),
    "2^63 tensors": (container([K], [T], DATA, n_tensors=2**63), f"claims {2**63} tensors, expected at most"),
    "2^64 - 1 keys": (container([K], [T], DATA, n_pairs=2**64 - 1), f"claims {2**64 - 1} keys, expected at most"),
    "one key too many": (container([K], [T], DATA, n_pairs=2), "a tensor's name has 1125899906842624 bytes"),
    "1e9 keys": (container([K], [T], DATA, n_pairs=10**9), "claims 1000000000 keys"),
    "a key of 2^64 - 1 bytes": (
        container([struct.pack("<Q", 2**64 - 1) + bytes(20)]), "a key has 18446744073709551615"),
    "empty key": (container([pair("", 1)]), "a key has 0 bytes, expected 1 to 1024"),
    "a key twice": (container([K, K]), "key k stands twice"),
    "a key that is no UTF-8": (container([pair(b"\xff\xfe", 1)]), r"a key is b'\\xff\\xfe', expected UTF-8"),
    "NUL in a key": (container([pair("a\0b", 1)]), "a key is .*, expected no NUL"),
    "value type 13": (container([pair("k", struct.pack("<IQ", 13, 0))]), "k has value type 13, expected 0 to 12"),
    "array of type 99": (container([pair("k", array_of(99, 1, bytes(8)))]), "k is an array of value type 99"),
    "array of arrays": (container([pair("k", arrays(1))]), "k is an array of arrays"),
    "100000 arrays": (container([pair("k", arrays(10**5))]), "k is an array of arrays"),
    "2^61 u64": (
        container([pair("k", array_of(U64, 2**61, bytes(64)))]), f"k claims {2**61} values, expected at most 8"),
    "2^60 empty strings": (container([pair("k", array_of(STRING, 2**60, bytes(64)))]), f"k claims {2**60} values"),
    "1e9 strings": (container([pair("k", array_of(STRING, 10**9, bytes(64)))]), "k claims 1000000000 values"),
    "a string beyond the end": (container([pair("k", struct.pack("<IQ", STRING, 1000) + b"abc")]), "k ends at byte"),
    "a string of 2^64 - 1": (
        container([pair("k", struct.pack("<IQ", STRING, 2**64 - 1))]), "expected at most 16777216"),
    "a string in an array beyond the end": (
        container([pair("k", array_of(STRING, 2, text("a") + struct.pack("<Q", 500)))]), "k ends at byte"),
    "a string in an array of 2^63": (
        container([pair("k", array_of(STRING, 2, text("a") + struct.pack("<Q", 2**63)))]),
        "holds a string of 9223372036"),
    "a text that is no UTF-8": (
        container([pair("k", b"\x08\0\0\0" + text(b"\xff"))]), r"k is b'\\xff', expected UTF-8"),
    "bool 2": (container([pair("k", struct.pack("<IB", BOOL, 2))]), r"k is b'\\x02' as bool, expected bytes 0 or 1"),
    "bool 2 in an array": (container([pair("k", array_of(BOOL, 2, b"\1\2"))]), "as bool, expected bytes 0 or 1"),
    "alignment 0": (container([pair("general.alignment", 0)], [T], DATA), "alignment is 0, expected a power of two"),
    "alignment 24": (container([pair("general.alignment", 24)], [T], DATA), "alignment is 24, expected a power of two"),
    "alignment 2^31": (container([pair("general.alignment", 2**31)], [T], DATA), "expected a power of two up to 65536"),
    "alignment a text": (container([pair("general.alignment", "32")], [T], DATA), "alignment is '32'"),
    "alignment true": (container([pair("general.alignment", True)], [T], DATA), "alignment is True"),
    "alignment u64": (
        container([pair("general.alignment", Typed(U64, 2**40))], [T], DATA), "alignment is 1099511627776"),
    "5 axes": (container([K], [info("t", [1] * 5)], DATA), "tensor t has 5 axes, expected at most 4"),
    "2^32 - 1 axes": (container([K], [info("t", [8, 4], axes=2**32 - 1)], DATA), "tensor t has 4294967295 axes"),
    "an axis of 0": (container([K], [info("t", [8, 0])], DATA), r"tensor t has sizes \(8, 0\)"),
    "a negative axis": (
        container([K], [info("t", [8, -4])], DATA), "tensor t has sizes .*, expected 1 to 4294967296 each"),
    "a product of 0 mod 2^64": (container([K], [info("t", [2**32] * 2)], DATA), "a product of at most 1099511627776"),
    "bytes that wrap": (container([K], [info("t", [2**31, 2**31 + 1])], DATA), "a product of at most"),
    "(2^42 + 1) x 2^22": (container([K], [info("t", [2**42 + 1, 2**22])], DATA), "expected 1 to 4294967296 each"),
    "type 43": (container([K], [info("t", [8, 4], 43)], DATA), "tensor t has type 43, which ggml does not have"),
    "type 4": (container([K], [info("t", [8, 4], 4)], DATA), "tensor t has type 4, Q4_2, which ggml has given up"),
    "type -1": (container([K], [info("t", [8, 4], -1)], DATA), "tensor t has type 4294967295"),
    "a Q4_0 row of 33": (container([K], [info("t", [33, 4], 2)], DATA), "expected a multiple of 32 for Q4_0"),
    "a Q4_K row of 128": (container([K], [info("t", [128, 4], 12)], bytes(288)), "expected a multiple of 256 for Q4_K"),
    "an offset of 4": (container([K], [info("t", [8, 4], offset=4)], DATA + bytes(64)), "begins at byte 4 of the data"),
    "an offset beyond": (
        container([K], [info("t", [8, 4], offset=2**40)], DATA), "tensor t begins at byte 1099511627776"),
    "an offset that wraps": (container([K], [info("t", [8, 4], offset=-32)], DATA), "tensor t begins at byte 18446744"),
    "a tensor longer than the file": (container([K], [info("t", [8, 5])], DATA), "the file has .*: it is not whole"),
    "an overlap": (
        container([K], [T, info("u", [8, 4], offset=32)], DATA * 2), "tensor u begins at byte 32 .* expected 128"),
    "equal offsets": (container([K], [T, info("u", [8, 4])], DATA * 2), "tensor u begins at byte 0 .*, expected 128"),
    "a tensor twice": (container([K], [T, info("t", [8, 4], offset=128)], DATA * 2), "tensor t stands twice"),
    "a hole": (
        container([K], [T, info("u", [8, 4], offset=192)], DATA * 3), "tensor u begins at byte 192 .* expected 128"),
    "an empty name": (container([K], [info("", [8, 4])], DATA), "a tensor's name has 0 bytes, expected 1 to 255"),
    "a name of 1e6": (container([K], [info("t" * 10**6, [8, 4])], DATA), "a tensor's name has 1000000 bytes"),
    "NUL in a name": (container([K], [info("t\0u", [8, 4])], DATA), "a tensor's name is .*, expected no NUL in it"),
    "a name that is no UTF-8": (container([K], [info(b"\xff", [8, 4])], DATA), r"name is b'\\xff', expected UTF-8"),
    "cut in the infos": (SOUND[:60], "claims 1 tensors|ends at byte"),
    "cut in an info": (SOUND[:80], "t ends at byte 82, but the file has 80"),
    "cut in the padding": (SOUND[:91], "tensor t ends at byte 224, but the file has 91"),
    "no data": (container([K], [T]), "tensor t ends at byte 224, but the file has 96"),
    "split.count a text": (container([pair("split.count", "2")]), "split.count is '2', expected an integer"),
    "split name ../x": (container([pair("split.count", Typed(U16, 2)), pair("split.no", Typed(U16, 0)),
                                   pair("split.prefix", "../x")]), "expected a name that ends in -00001-of-00002.gguf"),
}


def test_the_sound_file_of_which_the_broken_ones_are_made_is_read(tmp_path):
    file = open_gguf(written(tmp_path, SOUND))
    assert file.metadata == {"k": 1} and file.tensors["t"].read().tobytes() == DATA


@pytest.mark.parametrize("name", HOSTILE)
def test_a_broken_file_is_refused_at_once(tmp_path, name):
    content, message = HOSTILE[name]
    path = written(tmp_path, content)
    error = refused(lambda: open_gguf(path), ValueError, message, len(content), SECONDS)
    assert error.startswith(f"{path}: ") and len(error) < 400 + len(str(path))


def test_every_cut_of_a_file_is_refused(tmp_path):
    """Wherever a download stopped."""
    content = gguf({"a": 1, "b": ["x", "yz"], "c": "text", "d": [0.5]}, {"t": ZEROS, "u": ZEROS})
    for stop in range(len(content)):
        with pytest.raises(ValueError, match="x.gguf: "):
            open_gguf(written(tmp_path, content[:stop]))


def test_strings_without_end_are_refused_at_once(tmp_path):
    """Millions of empty strings in arrays, which cost time and no bytes to speak of."""
    n = 1 << 21
    pairs = [pair(f"k{i}", array_of(STRING, n, bytes(8 * n))) for i in range(3)]
    path = written(tmp_path, container(pairs))

    def refuse() -> None:
        with pytest.raises(ValueError, match="k2 makes it 6291456 strings in all, expected at most 4194304"):
            open_gguf(path)

    check_pace(refuse, 3 * SECONDS)


def test_a_header_may_not_be_larger_than_256_mib(tmp_path):
    """A sparse file of zeros, which is a header of as many bytes."""
    path = tmp_path / "x.gguf"
    with open(path, "wb") as file:
        file.write(container(n_pairs=4000))
        for i in range(40):
            file.write(text(f"k{i}") + struct.pack("<IQ", STRING, 16 << 20))
            file.seek(16 << 20, os.SEEK_CUR)
        file.truncate(1 << 30)
    with pytest.raises(ValueError, match="expected at most 268435456 bytes before the data"):
        open_gguf(path)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_only_regular_files(tmp_path, kind):
    path = tmp_path / "x.gguf"
    {"fifo": lambda: os.mkfifo(path), "folder": path.mkdir, "device": lambda: path.symlink_to("/dev/zero")}[kind]()
    with pytest.raises(ValueError, match="not a regular file"):
        open_gguf(path)


def test_a_file_that_shrinks_is_noticed(tmp_path):
    path = written(tmp_path, SOUND)
    file = open_gguf(path)
    path.write_bytes(SOUND[:-4])
    with pytest.raises(ValueError, match=r"x\.gguf: it ends within tensor t"):
        file.tensors["t"].read()
