"""Caches in files when the disk is full, and when something ends a save: an error, and nothing that looks whole."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from child import PACKAGE_PARENT, TESTS, run_script
from test_cache_file import contents, filled
from test_kv_cache_writer import interrupted

from forge_c.state.kv import KVCache

pytestmark = pytest.mark.slow

ON_A_SMALL_DISK = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs "$0" && cd "$0" && exec "$@"']
FULL = "No space left on device"


def on_a_small_disk(folder: Path, source: str) -> None:
    """Run `source`, which asserts, where there is 1 MB, in the folder. A system that lets nobody mount proves nothing
    here; there the tests below, whose disks fail by a double, are all there is."""
    if subprocess.run([*ON_A_SMALL_DISK, str(folder), "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE_PARENT), str(TESTS)])}
    source = SETUP + textwrap.dedent(source)
    done = subprocess.run([*ON_A_SMALL_DISK, str(folder), sys.executable, "-c", source], env=env, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0, f"exit status {done.returncode} (-7: SIGBUS)\n{done.stdout}{done.stderr}"


SETUP = """
import errno, os
import numpy as np
import pytest
from forge_c.state.kv import KVCache
k = np.random.default_rng(0).standard_normal((2, 1024, 2, 64), np.float32)

def full(function, path):
    return pytest.raises(OSError, match=f"{function}: No space left on device: '{path}'")

def fill(cache, start):
    # Append until the disk is full; how many tokens there are then.
    with full("KVCache.append", "c.npy") as caught:
        for i in range(start, 1024, 8):
            cache.append(k[: cache.batch, i : i + 8], -k[: cache.batch, i : i + 8])
    assert caught.value.errno == errno.ENOSPC
    return i

def right(cache, lengths):
    assert cache.lengths.tolist() == lengths
    for b, length in enumerate(lengths):
        row_k, row_v = cache.row(b)
        np.testing.assert_array_equal(row_k[0], k[b, :length])
        np.testing.assert_array_equal(row_v[0], -k[b, :length])
"""


def test_save_to_a_full_disk_is_an_error_and_leaves_no_file(tmp_path):
    on_a_small_disk(tmp_path, """
        cache = KVCache(2, 1024, 2, 64)
        cache.append(k, -k)
        with full("KVCache.save", "c.npy") as caught:
            cache.save("c.npy")
        assert caught.value.errno == errno.ENOSPC and os.listdir() == []
        right(cache, [1024, 1024])
        cache.truncate(0)
        small = cache.row(0).copy()
        small.append(k[:1, :100], -k[:1, :100])
        small.save("c.npy")
        right(KVCache.load("c.npy"), [100])
    """)


def test_append_to_a_file_on_a_full_disk_is_an_error_and_changes_nothing(tmp_path):
    on_a_small_disk(tmp_path, """
        cache = KVCache(2, 1024, 2, 64, path="c.npy")
        length = fill(cache, 0)
        assert length > 0
        right(cache, [length, length])
        with full("KVCache.append", "c.npy"):
            cache.row(1).append(k[1:, length : length + 300], -k[1:, length : length + 300])
        cache.truncate(10)
        cache.append(k[:, 10:length], -k[:, 10:length])  # into the pages that are there
        cache.flush()
        right(cache, [length, length])
        for mode in (None, "r", "r+"):
            right(KVCache.load("c.npy", mode), [length, length])
    """)


def test_a_mapped_file_grows_until_the_disk_is_full(tmp_path):
    on_a_small_disk(tmp_path, """
        cache = KVCache(2, 1024, 2, 64)
        cache.append(k[:, :100], -k[:, :100])
        cache.save("c.npy")
        mapped = KVCache.load("c.npy", "r+")
        length = fill(mapped, 100)
        assert 100 < length < 1024
        right(mapped, [length, length])
        right(KVCache.load("c.npy"), [100, 100])
        mapped.flush()
        right(KVCache.load("c.npy"), [length, length])
    """)


def test_a_ring_in_a_file_reserves_the_pages_that_it_comes_round_to(tmp_path):
    on_a_small_disk(tmp_path, """
        ring = KVCache(1, 10**6, 2, 64, window=40, path="c.npy")
        for i in range(0, 4096, 128):
            ring.append(k[:1, i % 1024 : i % 1024 + 128], -k[:1, i % 1024 : i % 1024 + 128])
        np.testing.assert_array_equal(next(iter(ring)), k[:1, 984:])
        with open("more", "wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(4096))
        ring.append(k[:1, :128], -k[:1, :128])
        for i in range(2):
            other = KVCache.load("c.npy", "r+")
            other.append(k[:1, :1], k[:1, :1])
    """)


def test_a_new_file_on_a_full_disk_is_an_error_and_leaves_none(tmp_path):
    on_a_small_disk(tmp_path, """
        with open("more", "wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(4096))
        with full("KVCache", "c.npy"):
            KVCache(2, 1024, 2, 64, path="c.npy")
        assert os.listdir() == ["more"]
    """)


# ---- the same without a disk of our own ----


def test_a_write_that_fails_half_way_leaves_no_file(rng, tmp_path, monkeypatch):
    left, pwrite = 300_000, os.pwrite

    def short(handle: int, content: memoryview, place: int) -> int:
        nonlocal left
        count = pwrite(handle, content[:left], place)
        left -= count
        if not count:
            raise OSError(errno.ENOSPC, FULL)
        return count

    cache = filled(rng)
    monkeypatch.setattr(os, "pwrite", short)
    with pytest.raises(OSError, match=f"KVCache.save: {FULL}: .*cache.npy") as caught:
        cache.save(tmp_path / "cache.npy")
    assert caught.value.errno == errno.ENOSPC and not os.listdir(tmp_path)
    cache.truncate(0)  # and the lock is free


def test_an_append_without_room_changes_neither_cache_nor_file(rng, tmp_path, monkeypatch):
    cache = filled(rng, path=tmp_path / "cache.npy")
    cache.flush()
    before, file = contents(cache), (tmp_path / "cache.npy").read_bytes()

    def refuse(*where: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    k = rng.standard_normal((2, 200, 2, 40), np.float32)
    for work in (lambda: cache.append(k[..., :16], k[..., 16:]),
                 lambda: cache.row(1).append(k[:1, ..., :16], k[:1, ..., 16:])):
        with pytest.raises(OSError, match="KVCache.append: Disk quota exceeded: .*cache.npy"):
            work()
        assert contents(cache) == before and (tmp_path / "cache.npy").read_bytes() == file
    cache.append(k[:, :68, :, :16], k[:, :68, :, 16:])  # as many as the reserved pages hold
    assert cache.lengths.tolist() == [768, 418]


def test_where_room_cannot_be_reserved_it_is_written(tmp_path, monkeypatch):
    def unsupported(*where: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    seed = np.random.default_rng
    cache = filled(seed(1), path=tmp_path / "cache.npy")
    assert contents(cache) == contents(filled(seed(1)))
    cache.flush()
    again, k = KVCache.load(tmp_path / "cache.npy", "r+"), seed(2).standard_normal((2, 1, 2, 40), np.float32)
    for one in (again, cache):
        one.append(k[..., :16], k[..., 16:])
    assert contents(again) == contents(cache)
    assert (tmp_path / "cache.npy").stat().st_blocks * 512 > 5 * 256 * 2 * 40 * 4


def test_without_hard_links_a_file_still_never_replaces_another(rng, tmp_path, monkeypatch):
    def unsupported(*paths: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", unsupported)
    cache = filled(rng)
    cache.save(tmp_path / "cache.npy")
    assert contents(KVCache.load(tmp_path / "cache.npy")) == contents(cache)
    assert os.listdir(tmp_path) == ["cache.npy"]
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    with pytest.raises(FileExistsError):
        filled(rng).save(tmp_path / "cache.npy")
    assert contents(KVCache.load(tmp_path / "cache.npy")) == contents(cache)


@pytest.mark.parametrize("make", [lambda path: KVCache(1, 8, 1, 4).save(path),
                                  lambda path: KVCache(1, 8, 1, 4, path=path)])
def test_a_file_that_comes_there_meanwhile_is_left_alone(tmp_path, monkeypatch, make):
    path, fsync = tmp_path / "precious", os.fsync

    def another_comes(handle: int) -> None:
        fsync(handle)
        path.write_bytes(b"42")

    monkeypatch.setattr(os, "fsync", another_comes)
    with pytest.raises(FileExistsError, match="precious"):
        make(path)
    assert path.read_bytes() == b"42" and os.listdir(tmp_path) == ["precious"]


# ---- a save that something ends ----


def found(folder: Path, want: list[bytes]) -> dict[str, str]:
    """What `load` says of each file of the folder: refused, whole, or wrong."""
    said = {}
    for name in os.listdir(folder):
        try:
            said[name] = "whole" if contents(KVCache.load(folder / name)) == want else "wrong"
        except ValueError:
            said[name] = "refused"
    return said


def test_what_the_tests_below_look_for_is_seen(rng, tmp_path):
    """A file with its header and without its tokens, as a save that wrote the header first would leave."""
    cache = filled(rng)
    cache.save(tmp_path / "cache.npy")
    nbytes = cache._pages.page_nbytes
    with open(tmp_path / "cache.npy", "r+b") as file:
        file.seek(128 + 2 * nbytes)
        file.write(bytes(nbytes))
    assert found(tmp_path, contents(cache)) == {"cache.npy": "wrong"}


def test_an_interrupt_at_any_bytecode_of_save_leaves_no_half_file(rng, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # many saves, all in memory
    cache = KVCache(1, 300, 1, 4)
    cache.append(*rng.standard_normal((2, 1, 300, 1, 4), np.float32))
    want, ends = contents(cache), set()
    for at in range(1, 10_000):
        error = interrupted(lambda: cache.save(tmp_path / "cache.npy"), at)
        said = found(tmp_path, want)
        ends.add(said.get("cache.npy", "none"))
        assert "wrong" not in said.values() and said.get("cache.npy") != "refused", f"bytecode {at}: {said}"
        if error is None:
            break
        for name in said:
            (tmp_path / name).unlink()
    assert at > 100 and ends == {"none", "whole"} and list(said) == ["cache.npy"]


def test_a_killed_save_leaves_no_half_file(tmp_path):
    """At each of its writes and before each of the calls that end it."""
    script = """
        import os, signal, sys
        import numpy as np
        from test_cache_file import filled
        left = int(os.environ["LEFT"])
        def counted(call):
            def until(*args):
                global left
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return call(*args)
            return until
        for name in ("ftruncate", "pwrite", "fsync", "link", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        cache = filled(np.random.default_rng(3))
        cache.save(os.environ["FOLDER"] + "/cache.npy")
    """
    want = contents(filled(np.random.default_rng(3)))
    # ftruncate, 5 pages, the header, fsync, link, unlink
    for left in (0, 4, 6, 7, 9):
        folder = tmp_path / str(left)
        folder.mkdir()
        run_script(script, LEFT=str(left), FOLDER=str(folder), expect=-9)
        said = found(folder, want)
        assert "wrong" not in said.values(), (left, said)
        assert said.get("cache.npy") == ("whole" if left == 9 else None), (left, said)
        assert set(said.values()) == ({"refused"} if left < 7 else {"whole"}), (left, said)
