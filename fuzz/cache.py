"""A KVCache beside lists: append, truncate, fork, copy, row, save, load, flush, attend, in any order.

Every cache of a case has a twin that holds each row's tokens in a list; a row view shares the list, as it shares the
memory. After each step the lengths, now and then all contents, agree. Two other cases interrupt operations at random
moments, and fill a disk of one megabyte: nothing is half done, and nobody is locked out.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import forge_c as fc
from fuzz import doing
from fuzz.arrays import Array

STORED = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "int8": np.dtype(np.float32)}
PAGE = 256
Rng = np.random.Generator


def pick(rng: Rng, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


@dataclass
class Row:
    """Keys and values (heads, dim) of each token, and how many there were at most."""

    tokens: list[tuple[Array, Array]] = field(default_factory=list)
    written: int = 0

    def twin(self) -> Row:
        return Row(list(self.tokens), self.written)


@dataclass
class Pair:
    """A cache and what it must hold."""

    cache: fc.KVCache
    rows: list[Row]
    path: Path | None = None
    read_only: bool = False
    is_row: bool = False

    @property
    def lengths(self) -> list[int]:
        return [len(row.tokens) for row in self.rows]


def case(seed: int) -> None:
    rng = np.random.default_rng(seed)
    fc.use_isa(pick(rng, fc.available_isas()))
    fc.set_num_threads(int(rng.integers(1, 4)))
    what = rng.random()
    doing("interrupts" if what < 0.15 else "a full disk" if what < 0.25 else "steps")
    if what < 0.15:
        clean(Path(os.environ["FUZZ_SCRATCH"]))
        interrupts(rng)
    elif what < 0.25 and "FUZZ_SMALL_DISK" in os.environ:
        full_disk(rng)
    else:
        Machine(rng).run()


def clean(folder: Path) -> None:
    """No file of a case before, whatever became of it."""
    for file in folder.glob("*.npy"):
        file.unlink()


# ---- the state machine ------------------------------------------------------------------------------


class Machine:
    """Up to four caches that descend from one."""

    def __init__(self, rng: Rng) -> None:
        self.rng = rng
        self.folder = Path(os.environ["FUZZ_SCRATCH"])
        self.dtype = pick(rng, tuple(STORED))
        self.heads, self.dim, self.v_dim = pick(rng, (1, 2)), pick(rng, (1, 4, 5, 16)), pick(rng, (1, 3, 8, 17))
        self.window = pick(rng, (None, None, 1, 7, 40, 256, 300))
        self.room = pick(rng, (1, 5, 100, 256, 257, 600, 1500))
        batch, path = pick(rng, (1, 1, 2, 3)), self.new_path() if rng.random() < 0.2 else None
        cache = fc.KVCache(batch, self.room, self.heads, self.dim, v_dim=self.v_dim, dtype=self.dtype,
                           window=self.window, path=path)
        self.pairs = [Pair(cache, [Row() for _ in range(batch)], path)]
        self.done: list[str] = []

    def new_path(self) -> Path:
        return self.folder / f"cache{int(self.rng.integers(2**60))}.npy"

    def run(self) -> None:
        steps = {self.append: 8, self.truncate: 3, self.fork: 1, self.copy: 1, self.row: 1, self.save_and_load: 1,
                 self.flush: 1, self.attend: 3, self.read: 2}
        choices = [step for step, weight in steps.items() for _ in range(weight)]
        try:
            for _ in range(40):
                step, pair = pick(self.rng, choices), pick(self.rng, self.pairs)
                self.done.append(step.__name__)
                step(pair)
                for other in self.pairs:
                    got = other.cache.lengths.tolist()
                    assert got == other.lengths, f"lengths are {got}, expected {other.lengths} after {step.__name__}"
            for pair in self.pairs:
                self.read(pair)
        except BaseException as error:
            error.add_note(f"{self.dtype} window {self.window} room {self.room}; {' '.join(self.done[-6:])}")
            raise
        finally:
            self.pairs.clear()
            clean(self.folder)

    def keep(self, pair: Pair) -> None:
        if len(self.pairs) >= 4:
            self.pairs.pop(int(self.rng.integers(len(self.pairs))))
        self.pairs.append(pair)

    def refused(self, call: Callable[[], Any], *kinds: type[BaseException]) -> None:
        try:
            call()
        except kinds:
            return
        raise AssertionError(f"{self.done[-1]} was not refused")

    def append(self, p: Pair) -> None:
        rng, cache = self.rng, p.cache
        n, batch = int(pick(rng, (0, 1, 1, 1, 2, 17, 100, 255, 256, 257, 300))), len(p.rows)
        given = pick(rng, (np.float32, np.float16, ml_dtypes.bfloat16))
        k, v = (rng.standard_normal((batch, n, self.heads, d), np.float32).astype(given)
                for d in (self.dim, self.v_dim))
        lens = rng.integers(0, n + 1, batch) if rng.random() < 0.4 else None
        counts = [n] * batch if lens is None else lens.tolist()
        too_long = any(a + b > cache.max_seq_len for a, b in zip(p.lengths, counts, strict=True))
        if too_long or p.read_only or (self.window is not None and n > PAGE):
            return self.refused(lambda: cache.append(k, v, lens=lens), ValueError)
        cache.append(k, v, lens=lens)
        for b, (row, count) in enumerate(zip(p.rows, counts, strict=True)):
            row.tokens += [(k[b, i].astype(STORED[self.dtype]), v[b, i].astype(STORED[self.dtype]))
                           for i in range(count)]
            row.written = max(row.written, len(row.tokens))

    def truncate(self, p: Pair) -> None:
        lengths, each = p.lengths, bool(self.rng.random() < 0.5)
        most = max(lengths)
        n = [int(self.rng.integers(0, x + 1)) for x in lengths] if each else int(self.rng.integers(0, most + 2))
        wanted = n if isinstance(n, list) else [min(n, x) for x in lengths]
        lost = self.window is not None and any(
            keep > 0 and max(keep - self.window, 0) < row.written - p.cache.capacity
            for keep, row in zip(wanted, p.rows, strict=True))
        if lost or (not each and n > most):
            return self.refused(lambda: p.cache.truncate(n), ValueError)
        p.cache.truncate(n)
        for keep, row in zip(wanted, p.rows, strict=True):
            del row.tokens[keep:]
            row.written = row.written if keep else 0

    def fork(self, p: Pair) -> None:
        n = int(self.rng.integers(1, 4))
        if n * len(p.rows) <= 6:
            self.keep(Pair(p.cache.fork(n), [row.twin() for row in p.rows for _ in range(n)]))

    def copy(self, p: Pair) -> None:
        room = pick(self.rng, (None, p.cache.max_seq_len, p.cache.max_seq_len + 300))
        self.keep(Pair(p.cache.copy(room), [row.twin() for row in p.rows]))

    def row(self, p: Pair) -> None:
        b = int(self.rng.integers(len(p.rows)))
        self.keep(Pair(p.cache.row(b), p.rows[b : b + 1], p.path, p.read_only, True))

    def save_and_load(self, p: Pair) -> None:
        path, mode = self.new_path(), pick(self.rng, (None, "r", "r+"))
        p.cache.save(path)
        self.refused(lambda: p.cache.save(path), FileExistsError)
        loaded = fc.KVCache.load(path, mode)
        self.keep(Pair(loaded, [row.twin() for row in p.rows], path if mode == "r+" else None, mode == "r"))

    def flush(self, p: Pair) -> None:
        if p.path is None or p.read_only or (p.is_row and p.cache._pages.table.size != len(p.cache._file.pages)):
            return self.refused(p.cache.flush, ValueError)
        p.cache.flush()
        twin = Pair(fc.KVCache.load(p.path), [row.twin() for row in p.rows])
        assert twin.cache.lengths.tolist() == p.lengths, "flushed lengths"
        self.read(twin)

    # ---- what is in it ----

    def read(self, p: Pair) -> None:
        start = 0 if self.window is None else max(0, max(p.lengths) - self.window)
        for part, which in zip(p.cache, (0, 1), strict=True):
            assert part.shape[1] == max(p.lengths) - start, f"read {part.shape}"
            for b, row in enumerate(p.rows):
                if len(row.tokens) <= start:
                    continue
                want = np.stack([t[which] for t in row.tokens[start:]])
                self.same(part[b, : len(want)], want)

    def same(self, got: Array, want: Array) -> None:
        """Bit for bit, or for int8 within half a step."""
        if self.dtype != "int8":
            assert got.tobytes() == want.tobytes(), "other contents"
            return
        step = np.abs(want).max(-1, keepdims=True) / 127
        assert (np.abs(got - want) <= step * (0.5 + 2.0**-14)).all(), "other contents"

    def attend(self, p: Pair) -> None:
        """The bits of attention over a new cache that was filled with the same tokens in other pieces."""
        rng, batch = self.rng, len(p.rows)
        q = rng.standard_normal((batch, int(pick(rng, (1, 1, 3))), self.heads * 2, self.dim), np.float32)
        options: dict[str, Any] = {"causal": bool(rng.random() < 0.5), "return_lse": True}
        if rng.random() < 0.3:
            options["window"] = int(rng.integers(1, (self.window or 50) + 1))
        got = fc.attention(q, p.cache, **options)
        want = fc.attention(q, self.rebuilt(p), **options)
        assert got[0].tobytes() + got[1].tobytes() == want[0].tobytes() + want[1].tobytes(), "other bits in attention"
        if self.dtype != "int8" and self.window is None and min(p.lengths, default=0) > 0:
            del options["return_lse"]
            k, v = self.padded(p, 0), self.padded(p, 1)
            want = fc.attention(q, k, v, kv_lens=np.array(p.lengths), **options)
            assert got[0].tobytes() == want.tobytes(), "attention over the arrays has other bits"

    def padded(self, p: Pair, which: int) -> Array:
        """(batch, seq, heads, dim), NaN behind each row's end."""
        dim = (self.dim, self.v_dim)[which]
        out = np.full((len(p.rows), max(p.lengths), self.heads, dim), np.nan, STORED[self.dtype])
        for b, row in enumerate(p.rows):
            out[b, : len(row.tokens)] = np.stack([t[which] for t in row.tokens])
        return out

    def rebuilt(self, p: Pair) -> fc.KVCache:
        cache = fc.KVCache(len(p.rows), p.cache.max_seq_len, self.heads, self.dim, v_dim=self.v_dim, dtype=self.dtype,
                           window=self.window)
        piece = int(pick(self.rng, (1, 60, PAGE))) if max(p.lengths) < 300 else PAGE
        for start in range(0, max(p.lengths), piece):
            lens = np.array([min(max(n - start, 0), piece) for n in p.lengths])
            k, v = (np.zeros((len(p.rows), int(lens.max()), self.heads, d), STORED[self.dtype])
                    for d in (self.dim, self.v_dim))
            for b, row in enumerate(p.rows):
                for i, (key, value) in enumerate(row.tokens[start : start + int(lens[b])]):
                    k[b, i], v[b, i] = key, value
            cache.append(k, v, lens=lens)
        return cache


# ---- interrupts -------------------------------------------------------------------------------------


class Interrupted(Exception):
    """What the signal handler raises."""


def interrupted(call: Callable[[], Any], seconds: float) -> tuple[bool, Any]:
    """(whether the alarm came, what the call gave). One that another thread received late raises nothing any more."""
    armed = [True]

    def handler(signum: int, frame: Any) -> None:
        if armed[0]:
            raise Interrupted

    before, result = signal.signal(signal.SIGALRM, handler), None
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            result = call()
        finally:
            armed[0] = False
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Interrupted:
        return True, result
    finally:
        armed[0] = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return False, result


def interrupts(rng: Rng) -> None:
    """An operation happens or does not, and afterwards any thread may write."""
    m = Machine(rng)
    m.pairs[0] = p = Pair(fc.KVCache(2, 5000, 1, 16, dtype=m.dtype), [Row(), Row()])
    m.heads, m.dim, m.v_dim, m.window = 1, 16, 16, None
    hits = 0
    for i in range(150):
        k = rng.standard_normal((2, int(rng.integers(1, 40)), 1, 16), np.float32)
        path = m.folder / f"interrupted{i}.npy"
        call = pick(rng, (lambda: p.cache.append(k, k), lambda: p.cache.append(k, k), lambda: p.cache.fork(2),  # noqa: B023
                          lambda: p.cache.copy(), lambda: p.cache.truncate(0), lambda: p.cache.save(path)))  # noqa: B023
        before = p.lengths
        hits += interrupted(call, float(rng.exponential(1e-4)) + 1e-6)[0]
        after = p.cache.lengths.tolist()
        if after == [n + k.shape[1] for n in before]:
            for b, row in enumerate(p.rows):
                row.tokens += [(t, t) for t in k[b].astype(STORED[m.dtype])]
        elif after == [0, 0]:
            p.rows = [Row(), Row()]
        else:
            assert after == before, f"half done by an interrupt: lengths {before} became {after}"
        check_file(path, p)
        usable_elsewhere(p.cache)
        if max(after) > 4000:
            p.cache.truncate(0)
            p.rows = [Row(), Row()]
    m.read(p)


def check_file(path: Path, p: Pair) -> None:
    """A file that an interrupted save left is refused or whole."""
    if not path.exists():
        return
    try:
        loaded = fc.KVCache.load(path)
    except ValueError:
        pass
    else:
        assert loaded.lengths.tolist() == p.lengths, "the file of an interrupted save has other lengths"
        for got, want in zip(loaded, p.cache, strict=True):
            assert got.tobytes() == want.tobytes(), "the file of an interrupted save loads and has other contents"
    path.unlink()


def usable_elsewhere(cache: fc.KVCache) -> None:
    """Another thread may write: an interrupt has not left the cache locked."""
    errors: list[BaseException] = []

    def write() -> None:
        try:
            cache.append(np.zeros((2, 0, 1, 16), np.float32), np.zeros((2, 0, 1, 16), np.float32))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert not errors, f"locked against other threads after an interrupt: {errors}"


# ---- a full disk ------------------------------------------------------------------------------------


def full_disk(rng: Rng) -> None:
    """Files on a disk of 1 MB: OSError, the process lives, what was there before stays right."""
    disk = Path(os.environ["FUZZ_SMALL_DISK"])
    tokens = int(pick(rng, (100, 600, 1500, 5000)))
    k = rng.standard_normal((1, tokens, 2, 32), np.float32)
    path, held = disk / "cache.npy", False
    try:
        if rng.random() < 0.5:
            cache = fc.KVCache(1, 6000, 2, 32)
            cache.append(k, k)
            try:
                cache.save(path)
                held = True
            except OSError:
                assert not path.exists() or refuses(path), "a save that failed left a file that loads"
        else:
            cache = fc.KVCache(1, 6000, 2, 32, path=path)
            try:
                cache.append(k, k)
                cache.flush()
                held = True
            except OSError:
                assert cache.seq_len in (0, tokens), f"half an append: {cache.seq_len} tokens"
        if held:
            assert [a.tobytes() for a in fc.KVCache.load(path)] == [a.tobytes() for a in cache], "lost on a full disk"
    except OSError:
        pass  # no room for the file itself
    finally:
        clean(disk)


def refuses(path: Path) -> bool:
    try:
        fc.KVCache.load(path)
    except (ValueError, OSError):
        return True
    return False


def wrapped(command: list[str], folder: str) -> list[str]:
    """The worker with a tmpfs of 1 MB of its own, where the system allows that."""
    disk = f"{folder}/disk"
    mount = f"mkdir -p {disk} && mount -t tmpfs -o size=1m none {disk}"
    try:
        able = subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, timeout=20).returncode == 0
    except OSError:
        able = False
    if not able:
        return command
    return ["unshare", "-rm", "sh", "-c", f'{mount} && FUZZ_SMALL_DISK={disk} exec "$@"', "sh", *command]
