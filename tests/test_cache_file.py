"""Caches in files: saved, loaded, mapped; larger than memory; and files that are no caches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from pace import check_pace

import forge_c
from forge_c.state.kv import KVCache

pytestmark = pytest.mark.usefixtures("two_threads")


def filled(rng: np.random.Generator, **options) -> KVCache:
    """Rows of 700 and 350 tokens."""
    cache = KVCache(2, 1000, 2, 16, v_dim=24, **options)
    for _ in range(7):
        k = rng.standard_normal((2, 100, 2, 40), np.float32)
        cache.append(k[..., :16], k[..., 16:], lens=[100, 50])
    return cache


def contents(cache: KVCache) -> list[bytes]:
    return [part.tobytes() for row in range(cache.batch) for part in cache.row(row)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("window", [None, 40, 300])
@pytest.mark.parametrize("mode", [None, "r", "r+"])
def test_what_is_saved_is_loaded(rng, tmp_path, dtype, window, mode):
    cache = filled(rng, dtype=dtype, window=window)
    cache.save(tmp_path / "cache.npy")
    loaded = KVCache.load(tmp_path / "cache.npy", mode)
    assert repr(loaded) == repr(cache) and loaded.lengths.tolist() == [700, 350]
    assert contents(loaded) == contents(cache)
    q = rng.standard_normal((2, 3, 4, 16), np.float32)
    assert forge_c.attention(q, loaded, causal=True).tobytes() == forge_c.attention(q, cache, causal=True).tobytes()


def test_a_mapped_cache_continues_in_its_file(rng, tmp_path):
    cache = filled(rng)
    cache.save(tmp_path / "cache.npy")
    mapped = KVCache.load(tmp_path / "cache.npy", "r+")
    k = rng.standard_normal((2, 100, 2, 40), np.float32)
    for one in (cache, mapped):
        one.append(k[..., :16], k[..., 16:])
    assert KVCache.load(tmp_path / "cache.npy").lengths.tolist() == [700, 350]
    mapped.flush()
    del mapped
    assert contents(KVCache.load(tmp_path / "cache.npy")) == contents(cache)


def test_a_cache_that_lives_in_a_file(rng, tmp_path):
    memory = np.random.default_rng(7)
    on_disk = filled(np.random.default_rng(7), path=tmp_path / "new.npy")
    assert contents(on_disk) == contents(filled(memory))
    on_disk.flush()
    assert contents(KVCache.load(tmp_path / "new.npy", "r")) == contents(on_disk)


def test_a_fork_of_a_file_writes_elsewhere(rng, tmp_path):
    filled(rng).save(tmp_path / "cache.npy")
    before = (tmp_path / "cache.npy").read_bytes()
    prompt = KVCache.load(tmp_path / "cache.npy", "r")
    fork = prompt.fork(2)
    k = rng.standard_normal((4, 100, 2, 40), np.float32)
    fork.append(k[..., :16], k[..., 16:])
    assert fork.lengths.tolist() == [800, 800, 450, 450]
    assert (tmp_path / "cache.npy").read_bytes() == before


def test_a_file_keeps_its_own_pages_whatever_forks_do(rng, tmp_path):
    cache = filled(rng)
    cache.save(tmp_path / "cache.npy")
    mapped = KVCache.load(tmp_path / "cache.npy", "r+")
    fork = mapped.fork(1)
    before = contents(fork)
    k = rng.standard_normal((2, 100, 2, 40), np.float32)
    for one in (cache, mapped):
        one.truncate(10)
        one.append(k[..., :16], k[..., 16:])
    mapped.flush()
    assert contents(fork) == before
    assert contents(KVCache.load(tmp_path / "cache.npy")) == contents(mapped) == contents(cache)


def test_a_row_cannot_write_the_header_of_its_file(rng, tmp_path):
    cache = filled(rng, path=tmp_path / "cache.npy")
    with pytest.raises(ValueError, match="KVCache.flush: this is a row, expected the cache that has the file"):
        cache.row(1).flush()
    cache.flush()
    assert contents(KVCache.load(tmp_path / "cache.npy")) == contents(cache)


def test_read_only_refuses_to_append_and_to_flush(rng, tmp_path):
    cache = filled(rng)
    cache.save(tmp_path / "cache.npy")
    mapped = KVCache.load(tmp_path / "cache.npy", "r")
    one = np.ones((2, 1, 2, 24), np.float32)
    with pytest.raises(ValueError, match="KVCache.append: .*cache.npy is open for reading only"):
        mapped.append(one[..., :16], one)
    for refused in (mapped, cache):
        with pytest.raises(ValueError, match="KVCache.flush: the cache has no file that is open for writing"):
            refused.flush()
    assert mapped.lengths.tolist() == [700, 350]
    mapped.truncate(10)
    assert mapped.lengths.tolist() == [10, 10]


def test_an_existing_file_is_left_alone(rng, tmp_path):
    path = tmp_path / "precious"
    path.write_bytes(b"42")
    with pytest.raises(FileExistsError):
        filled(rng).save(path)
    with pytest.raises(FileExistsError):
        KVCache(1, 10, 1, 4, path=path)
    assert path.read_bytes() == b"42"


def test_pages_without_tokens_take_no_disk(tmp_path):
    cache = KVCache(1, 2**20, 4, 64, path=tmp_path / "sparse.npy")
    one = np.ones((1, 1, 4, 64), np.float32)
    cache.append(one, one)
    cache.flush()
    assert (tmp_path / "sparse.npy").stat().st_size > 2**31
    assert (tmp_path / "sparse.npy").stat().st_blocks * 512 < 2**22


def header_changed(path, **changes) -> None:
    """The JSON header of the file with other values."""
    records = np.lib.format.open_memmap(path, mode="r+")
    flat = records.reshape(-1)
    text = json.dumps(json.loads(flat[:4096].tobytes().split(b"\0", 1)[0]) | changes).encode()
    flat[:4096] = 0
    flat[: len(text)] = np.frombuffer(text, np.uint8)
    records.flush()


@pytest.mark.parametrize("changes", [
    {"lengths": [700]}, {"lengths": [700, -1]}, {"lengths": [700, 1001]}, {"lengths": [700, 3.5]}, {"lengths": []},
    {"lengths": 3}, {"lengths": [[700], [350]]}, {"written": [700, 349]}, {"written": [2**70, 700]},
    {"max_seq_len": 2000},
    {"max_seq_len": 2**62}, {"n_kv_heads": 4}, {"n_kv_heads": 0}, {"head_dim": -16}, {"head_dim": 2**40},
    {"v_dim": None},
    {"n_kv_heads": 2**32, "head_dim": 2**32, "v_dim": 2**32}, {"n_kv_heads": 2**16 + 1}, {"v_dim": 2**20 + 1},
    {"n_kv_heads": 2**16, "head_dim": 2**20, "v_dim": 2**20}, {"max_seq_len": 2**40 + 1}, {"max_seq_len": 10**400},
    {"window": 2**63}, {"n_kv_heads": True}, {"lengths": {"700": 350}}, {"lengths": None}, {"lengths": "ab"},
    {"dtype": "bfloat16"}, {"dtype": "object"}, {"window": 10}, {"window": 0}, {"window": "x"}, {"version": 1},
    {"format": "other"}, {"more": 1},
])
@pytest.mark.parametrize("mode", [None, "r", "r+"])
def test_a_damaged_header_is_an_error_that_names_the_file(tmp_path, changes, mode):
    path = tmp_path / "cache.npy"
    filled(np.random.default_rng(1)).save(path)
    header_changed(path, **changes)
    with pytest.raises(ValueError, match="KVCache.load: .*cache.npy"):
        KVCache.load(path, mode)


def test_a_truncated_or_foreign_file_is_an_error(rng, tmp_path):
    path = tmp_path / "cache.npy"
    filled(rng).save(path)
    whole = path.read_bytes()
    for size in (0, 5, 100, 128, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="KVCache.load: .*cache.npy"):
            KVCache.load(path)
    np.save(path, np.ones(1000))
    with pytest.raises(ValueError, match="is no KVCache file"):
        KVCache.load(path)
    np.save(path, np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="is no KVCache file"):
        KVCache.load(path)
    with pytest.raises(FileNotFoundError):
        KVCache.load(tmp_path / "absent")
    with pytest.raises(ValueError, match="mmap_mode is 'w', expected"):
        KVCache.load(path, "w")


@pytest.mark.parametrize("mode", [None, "r", "r+"])
def test_a_file_cut_short_or_too_long_is_an_error(rng, tmp_path, mode):
    path = tmp_path / "cache.npy"
    filled(rng).save(path)
    size = path.stat().st_size
    for other in (size + 1, size - 1, size // 2, 129, 128, 127, 11, 10, 9, 1, 0):
        os.truncate(path, other)
        with pytest.raises(ValueError, match="KVCache.load: .*cache.npy is (damaged|no KVCache file)"):
            KVCache.load(path, mode)


def test_a_file_cut_short_while_it_is_read_is_an_error(rng, tmp_path, monkeypatch):
    path = tmp_path / "cache.npy"
    filled(rng).save(path)
    preadv = os.preadv

    def cut(handle: int, parts: list, place: int) -> int:
        os.truncate(path, path.stat().st_size // 2)
        return preadv(handle, parts, place)

    monkeypatch.setattr(os, "preadv", cut)
    with pytest.raises(ValueError, match="KVCache.load: .*cache.npy was cut short while it was read"):
        KVCache.load(path)


def test_any_byte_of_the_first_line_may_be_wrong(rng, tmp_path):
    """Brackets left open, quotes, line ends, numbers, NUL: an error of ours, or the same cache."""
    path = tmp_path / "cache.npy"
    filled(rng).save(path)
    whole = path.read_bytes()
    want, same = contents(KVCache.load(path, "r")), 0
    with open(path, "r+b") as file:
        for place in range(128):
            for wrong in b"[('\"9-#\n \0\xff":
                file.seek(0)
                file.write(whole[:place] + bytes([wrong]) + whole[place + 1 : 128])
                file.flush()
                try:
                    assert contents(KVCache.load(path, "r")) == want
                    same += 1
                except ValueError as error:
                    assert str(error).startswith(f"KVCache.load: {path} is "), (place, wrong)
    assert 40 < same < 128


@pytest.mark.slow
def test_a_header_of_many_values_costs_neither_time_nor_memory(tmp_path):
    body = b'{"format": "forge_c.KVCache", "version": 2, "a": [' + b"[]," * 22_000_000 + b"0]}"
    records = np.zeros((len(body) // 64 + 2, 64), np.uint8)
    records.reshape(-1)[: len(body)] = np.frombuffer(body, np.uint8)
    np.save(tmp_path / "cache.npy", records)
    del records

    def refuse() -> None:
        tracemalloc.start()
        with pytest.raises(ValueError, match="KVCache.load: .*cache.npy is no KVCache file: its header: more than"):
            KVCache.load(tmp_path / "cache.npy")
        assert tracemalloc.get_traced_memory()[1] < len(body) * 1.5
        tracemalloc.stop()

    check_pace(refuse, 2.0)


@pytest.mark.parametrize("text", [
    b"[" * 900, b'{"a":' * 900, b"9" * 900, b'{"format": "forge_c.KVCache", "version": NaN}', b"", b"[]", b"null",
    b'{"format": "forge_c.KVCache", "format": "x"}', b"\xff\xfe{}"])
def test_a_header_that_is_no_object_of_ours_is_an_error(rng, tmp_path, text):
    path = tmp_path / "cache.npy"
    filled(rng).save(path)
    with open(path, "r+b") as file:
        file.seek(128)
        file.write(text.ljust(1000, b"\0"))
    with pytest.raises(ValueError, match="KVCache.load: .*cache.npy is no KVCache file: "):
        KVCache.load(path)


def test_as_many_rows_as_pages(tmp_path):
    """The header's limits follow from the file's size: a row a page is the most."""
    one = np.ones((600, 1, 1, 1), np.float32)
    for room in (1, 257):
        cache = KVCache(600, room, 1, 1, dtype="int8")
        cache.append(one, one)
        cache.save(tmp_path / f"{room}.npy")
        assert KVCache.load(tmp_path / f"{room}.npy", "r").lengths.tolist() == [1] * 600


@pytest.mark.parametrize("mode", [None, "r", "r+"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, mode):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link", "."):
        with pytest.raises(ValueError, match="KVCache.load: .*: not a regular file"):
            KVCache.load(tmp_path / name, mode)


@pytest.mark.parametrize(("sizes", "options", "message"), [
    ((1, 8, 2**16 + 1, 1), {}, "n_kv_heads is 65537, expected 1 to 65536"),
    ((1, 8, 1, 2**20 + 1), {}, "head_dim is 1048577, expected 1 to 1048576"),
    ((1, 8, 1, 1), {"v_dim": 2**20 + 1}, "v_dim is 1048577, expected 1 to 1048576"),
    ((1, 2**40 + 1, 1, 1), {"window": 8}, "max_seq_len is 1099511627777, expected 1 to 1099511627776"),
    ((2**20 + 1, 8, 1, 1), {}, "it has 1048577 lengths and 1048577 written, expected 1 to 1048576"),
])
def test_what_load_would_refuse_is_not_saved(tmp_path, sizes, options, message):
    for function, work in (("KVCache.save", lambda: KVCache(*sizes, **options).save(tmp_path / "c.npy")),
                           ("KVCache", lambda: KVCache(*sizes, **options, path=tmp_path / "c.npy"))):
        with pytest.raises(ValueError) as caught:
            work()
        assert str(caught.value) == f"{function}: no file holds this cache: {message}"
    assert not list(tmp_path.iterdir())


def test_a_window_without_end_is_saved(rng, tmp_path):
    cache = filled(rng, window=sys.maxsize)
    cache.save(tmp_path / "cache.npy")
    loaded = KVCache.load(tmp_path / "cache.npy")
    assert loaded.window == sys.maxsize and contents(loaded) == contents(cache)


LARGER_THAN_MEMORY = """
import resource, sys
import numpy as np
import forge_c
from forge_c.state.kv import KVCache

forge_c.set_num_threads(2)  # each has a stack of 8 MiB

def peak_of(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) >> 10

rng = np.random.default_rng(0)
cache = KVCache(1, 2**17, 1, 256, dtype="float32", path=sys.argv[1])
block = rng.standard_normal((1, 4096, 1, 256), np.float32)
before = peak_of("RssAnon")
resource.setrlimit(resource.RLIMIT_DATA, (peak_of("VmData") + 64 << 20,) * 2)
for i in range(32):
    cache.append(block * (i + 1), block)
q = rng.standard_normal((1, 1, 4, 256), np.float32)
y = forge_c.attention(q, cache, causal=True)
print(peak_of("RssAnon") - before, bool(np.isfinite(y).all()), cache.nbytes >> 20)
"""


@pytest.mark.slow
def test_attention_over_a_mapped_cache_needs_no_memory_of_its_size(tmp_path):
    """256 MiB of keys and values with 64 MiB of data allowed: only the file's pages grow, which the system may drop."""
    done = subprocess.run([sys.executable, "-c", LARGER_THAN_MEMORY, str(tmp_path / "big.npy")], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    grown, finite, nbytes = done.stdout.split()
    assert int(grown) < 40 and finite == "True" and nbytes == "256"
