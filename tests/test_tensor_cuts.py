"""Which heads, channels and numbers of a checkpoint are which rank's: each is someone's, and no more is read."""
from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_models import golden, names
from ranks import run_threads
from suite import case

import forge_c.files
from forge_c.distributed import ThreadComm
from forge_c.distributed.cuts import Place, cut_anyhow, cut_evenly, cut_heads, layer_share
from forge_c.distributed.tensor import load_share
from forge_c.files import read_rows
from forge_c.formats.layout import ROWS_OF, Format
from forge_c.models import load
from forge_c.models.spec import Attention
from forge_c.models.weights import Checkpoint
from forge_c.models.weights.share import Cut
from forge_c.packing import pack, rows_of


def test_even_cuts_begin_at_units_and_differ_by_one():
    for n in (1, 2, 16, 17, 100, 576):
        for unit in (1, 16, 32):
            for size in range(1, 9):
                found = cut_evenly(n, unit, size)
                with case(n, unit, size):
                    if found is None:
                        assert -(-n // unit) < size
                        continue
                    assert [i for some in found for i in some] == list(range(n)) and len(found) == size
                    assert all(some.start % unit == 0 and len(some) for some in found)
                    assert max(map(len, found)) - min(map(len, found)) <= unit


def test_heads_of_queries_are_cut_and_find_their_keys():
    for kv_heads in (1, 2, 3, 4, 8):
        for group in (1, 2, 3, 7):
            for step in (1, 2, 3):
                for size in range(1, 13):
                    heads = group * kv_heads
                    found = cut_heads(heads, kv_heads, step, size)
                    with case(heads, kv_heads, step, size):
                        if found is None:
                            assert step > 1 or size > heads
                            continue
                        assert [h for q, _ in found for h in q] == list(range(heads))
                        for q, kv in found:
                            assert q.start % step == 0 and len(q) and len(q) % len(kv) == 0
                            each = len(q) // len(kv)
                            assert [h // group for h in q] == [kv.start + i // each for i in range(len(q))]


def test_any_number_of_ranks_up_to_the_heads_goes():
    for heads, kv_heads in ((9, 3), (4, 1), (14, 2), (32, 4), (6, 6)):
        assert all(cut_heads(heads, kv_heads, 1, n) for n in range(1, heads + 1))
        assert cut_heads(heads, kv_heads, 1, heads + 1) is None


def test_too_few_tokens_are_an_error():
    assert cut_anyhow("x", 33, 2) == (range(0, 16), range(16, 33)) and cut_anyhow("x", 3, 2) == (range(1), range(1, 3))
    with pytest.raises(ValueError, match="the vocabulary has 3 tokens, expected one for each of 4 ranks"):
        cut_anyhow("the vocabulary has 3 tokens", 3, 4)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", names())
def test_each_number_of_a_layer_is_some_ranks(name: str, exact: bool, tmp_path: Path):
    """Of matrices, but for keys and values that several heads of queries share, exactly one's."""
    spec = load(golden(name).write(tmp_path)).config
    size = 2
    columns = cut_anyhow("x", spec.hidden_size, size) if exact else None
    for layer in spec.layers:
        shares = [layer_share(layer, Place(r, size, spec.hidden_size, columns, lambda n, k: 1, "x"))
                  for r in range(size)]
        assert all(share.cuts.keys() == shares[0].cuts.keys() for share in shares)
        for tensor in shares[0].cuts:
            cuts = [share.cuts[tensor] for share in shares]
            if not isinstance(cuts[0], Cut):
                assert [cut.here for cut in cuts] == [True, False]
                continue
            seen = Counter(i for cut in cuts for some in cut.ranges for i in some)
            assert sorted(seen) == list(range(cuts[0].n)), tensor
            attention = next((k for k in layer.mixers if isinstance(k, Attention)), None)
            few_keys = attention is not None and attention.n_kv_heads < size
            if "x_proj" not in tensor and not (few_keys and tensor.split(".")[1] in ("k_proj", "v_proj", "qkv_proj")):
                assert set(seen.values()) == {1}, tensor


# ---- reading ----


def test_rows_are_read_and_nothing_else(tmp_path: Path, monkeypatch):
    table = np.arange(20 * 12, dtype=np.uint8).reshape(20, 12)
    path = tmp_path / "file"
    path.write_bytes(b"before" + table.tobytes())
    read: list[tuple[int, int]] = []
    real = forge_c.files.os.preadv
    monkeypatch.setattr(forge_c.files.os, "preadv", lambda fd, into, at: read.append((at, len(into[0]))) or real(
        fd, into, at))
    for rows in ([3], [0, 1, 2], [5, 4, 19], [7, 7, 2], []):
        for among in (slice(None), slice(0, 5), slice(4, 12)):
            read.clear()
            with case(rows, among):
                found = read_rows(path, "x", 6, 12, np.array(rows, np.intp), among)
                assert np.array_equal(found, table[np.array(rows, np.intp), among])
                assert sum(n for _, n in read) == len(set(rows)) * table[0, among].size
    with pytest.raises(ValueError, match=r"file: it ends within x$"):
        read_rows(path, "x", 6, 12, np.array([20]))


@pytest.mark.parametrize("exact", [True, False])
def test_ranks_read_each_byte_of_a_matrix_once(exact: bool, tmp_path: Path, monkeypatch):
    """Four ranks, as many heads of keys: of matrices no rank reads what is another's, whole ones are small."""
    model = golden("llama_mha_tied")
    folder = model.write(tmp_path)
    read, whole = [0] * 4, list[int]()
    real, take = forge_c.files.os.preadv, Checkpoint.take
    matrices = sum(a.nbytes for a in model.weights().values() if a.ndim == 2)

    def count(fd: int, into: list[Any], at: int) -> int:
        read[0] += len(into[0])
        return real(fd, into, at)

    def taken(self: Checkpoint, name: str, shape: tuple[int, ...]) -> Any:
        whole.append(len(shape))
        return take(self, name, shape)

    monkeypatch.setattr(forge_c.files.os, "preadv", count)
    monkeypatch.setattr(Checkpoint, "take", taken)
    run_threads(lambda comm: load_share(folder, comm, "float32", exact=exact) and None, 4)
    assert read[0] == matrices and set(whole) == {1}


def test_a_share_holds_its_part_and_vectors(tmp_path: Path):
    """Weights of 4 ranks together: all matrices once, in panels of 16 columns of which some are cut, and norms."""
    folder = golden("llama_mha_tied").write(tmp_path)
    whole = load(folder, "float32")
    held = run_threads(lambda comm: load_share(folder, comm, "float32").nbytes, 4)
    assert max(held) < 0.4 * whole.nbytes
    assert whole.nbytes <= sum(held) < 1.4 * whole.nbytes


# ---- rows of packed weights ----


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "q4_1", "q5_0", "q8_0", "q4_k", "q6_k"])
def test_rows_of_a_weight_are_its_numbers(form: Any, rng: np.random.Generator):
    w = rng.standard_normal((640, 35)).astype(np.float32)
    packed = pack(w, form)
    unit = 32 if form == "int8" else Format.checked("test", form, None, ROWS_OF).block_k
    whole = packed.unpack()
    for start, stop in ((0, 640), (0, 2 * unit), (unit, 640), (unit, 2 * unit)):
        with case(start, stop):
            some = rows_of(packed, range(start, stop))
            assert some.shape == (stop - start, 35) and some.dtype == form
            assert np.array_equal(some.unpack(), whole[start:stop])


def test_threads_of_one_process_load_shares_of_any_size(tmp_path: Path):
    folder = golden("llama").write(tmp_path)
    assert len(ThreadComm(2)) == 2
    with pytest.raises(ValueError, match="parallel: layer 0: attention has 4 heads, 2 of keys and values, expected "
                                         "some for each of 5 ranks; at most 4 get some"):
        run_threads(lambda comm: load_share(folder, comm), 5)
