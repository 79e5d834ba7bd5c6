"""A model on several ranks gives what it gives in one process: prompts the same bytes, steps the same tokens."""
from __future__ import annotations

import copy
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_models
import numpy as np
import pytest
from model_folder import BYTES, FAMILIES, STATE_SPACE, small, write
from ranks import needs_mpi, run_mpi, run_threads, run_threads_to_the_end
from small_models import ANGLES_BY_LENGTH
from suite import case

from forge_c.cli import main
from forge_c.distributed import RankError, SelfComm, ThreadComm, chunks, parallel
from forge_c.distributed import decoder as parallel_decoder
from forge_c.distributed.cache import ShardedKV
from forge_c.models import Model, load
from forge_c.state import ModelCache
from forge_c.state.kv import KVCache

LAYOUTS = ("zigzag", "striped", "contiguous")


def on(n: int, model: Model, use: Callable[[Model], Any], **options: Any) -> list[Any]:
    """use(model) on each of n ranks."""
    return run_threads(lambda comm: use(parallel(model, comm, **options)), n)


def layouts_of(family: str) -> tuple[str, ...]:
    return LAYOUTS if family not in STATE_SPACE else ("zigzag", "contiguous")


def ids_of(model: Model, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, shape)


def same(got: list[np.ndarray], want: list[np.ndarray]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(got, want, strict=True))


# ---- prompts ----


@pytest.mark.parametrize("family", [*FAMILIES, *STATE_SPACE])
def test_prompts_of_any_length_have_the_bytes_of_one_process(model_of, family: str) -> None:
    model = model_of(family)
    prompts = [ids_of(model, 1, n) for n in (1, 2, 3, 7, 50, 301)]
    want = [model(ids) for ids in prompts]
    for n in (1, 2, 3, 4):
        for layout in layouts_of(family):
            with case(n, layout):
                for got in on(n, model, lambda p: [p(ids) for ids in prompts], layout=layout):
                    assert same(got, want)


@pytest.mark.parametrize("name", golden_models.names())
def test_golden_models_read_and_go_on_as_in_one_process(name: str, tmp_path: Path) -> None:
    golden = golden_models.golden(name)
    model, ids = load(golden.write(tmp_path)), golden.ids

    def use(m: Model) -> list[np.ndarray]:
        cache = m.new_cache(len(ids), ids.shape[1] + 3)
        return [m(ids, cache), *(m(ids[:, i : i + 1], cache) for i in range(3))]

    want = use(model)
    if any(layer.router is not None for layer in model.config.layers):
        with pytest.raises(ValueError, match="router"):
            parallel(model, SelfComm())
        return
    for got in on(3, model, use):
        assert got[0].tobytes() == want[0].tobytes()
        assert same(got, want)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bamba"])
def test_last_logits_hidden_states_scores_and_vectors(model_of, family: str) -> None:
    model = model_of(family)
    ids = ids_of(model, 2, 45)
    rows = [row[: 45 - 20 * i] for i, row in enumerate(ids)]

    def use(m: Model) -> list[np.ndarray]:
        return [m(ids, last_only=True), m.hidden(ids), m.hidden(ids, layer=1), m.embed(rows), m.embed(rows[0][:1]),
                *(logprobs for _, logprobs in m.score(rows))]

    for got in on(3, model, use):
        assert same(got, use(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "recurrent_gemma", "zamba2"])
def test_caches_of_each_dtype_hold_what_one_process_holds(model_of, family: str, dtype: str) -> None:
    model = model_of(family)
    first, second = ids_of(model, 2, 333), ids_of(model, 2, 290, seed=1)

    def use(m: Model) -> list[np.ndarray]:
        cache = m.new_cache(2, 700, dtype=dtype)
        found = [m(first, cache), m(second, cache)]
        assert cache.lengths.tolist() == [623, 623] and (cache.ids[1] == np.append(first[1], second[1])).all()
        return found

    for layout in layouts_of(family):
        for got in on(3, model, use, layout=layout):
            assert same(got, use(model))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_attention_of_each_precision(tmp_path: Path, precision: Any) -> None:
    model = load(write(tmp_path, small("gemma2")), attention_precision=precision)
    ids = ids_of(model, 1, 600)

    def use(m: Model) -> list[np.ndarray]:
        return [m(ids, m.new_cache(1, 600, dtype=dtype)) for dtype in ("float32", "bfloat16", "int8")]

    for got in on(3, model, use):
        assert same(got, use(model))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mamba2", "falcon_h1", "recurrent_gemma"])
def test_long_prompts_go_through_in_passes(model_of, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank has at most so many tokens of a pass; windows forget between passes."""
    monkeypatch.setattr(parallel_decoder, "TOKENS_A_RANK", 100)
    model = model_of(family)
    ids, more = ids_of(model, 1, 901), ids_of(model, 1, 299, seed=1)

    def use(m: Model) -> list[np.ndarray]:
        cache = m.new_cache(1, 1200)
        return [m(ids, cache, last_only=True), m(more, cache), m.generate(ids[0], 3)]

    for layout in layouts_of(family):
        for got in on(3, model, use, layout=layout):
            assert same(got, use(model))


@pytest.mark.parametrize("family, changes", ANGLES_BY_LENGTH)
def test_angles_follow_from_the_whole_texts_length(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = load(write(tmp_path, small(family, **changes)))
    ids = ids_of(model, 2, 30)

    def use(m: Model) -> list[np.ndarray]:
        cache = m.new_cache(2, 60)
        return [m(ids[:, :5], cache), m(ids[:, 5:], cache), m(ids[:, :1], cache), m(ids)]

    for got in on(3, model, use):
        assert same(got, use(model))


# ---- steps ----


@pytest.mark.parametrize("family", [*FAMILIES, *STATE_SPACE])
def test_steps_have_the_bytes_of_one_process(model_of, family: str) -> None:
    model = model_of(family)
    ids, more = ids_of(model, 2, 75), ids_of(model, 2, 30, seed=1)

    def use(m: Model) -> list[np.ndarray]:
        cache = m.new_cache(2, 120)
        return [m(ids, cache), *(m(more[:, i : i + 1], cache) for i in range(30))]

    want = use(model)
    for n in (2, 4):
        assert all(same(got, want) for got in on(n, model, use, layout="contiguous"))


def test_short_turns_of_long_conversations_send_queries(model_of) -> None:
    model = model_of("gemma3_text")
    ids, few = ids_of(model, 2, 400), ids_of(model, 2, 9, seed=1)

    def use(m: Model) -> list[np.ndarray]:
        cache = m.new_cache(2, 440)
        return [m(ids, cache), m(few, cache), m(few[:, ::-1], cache)]

    def ways(m: Any) -> tuple[bool, ...]:
        return tuple(m._decoder.runs_together(*tokens) for tokens in ((9, 400), (400, 0), (9, 2), (1, 0), (300, 9000)))

    assert on(3, model, ways)[0] == (True, False, False, True, False)
    for got in on(3, model, use):
        assert got[0].tobytes() == use(model)[0].tobytes()
        assert same(got, use(model))


def test_text_is_that_of_one_process(texts: Model) -> None:
    prompts = ["def f(x):", "import "]

    def use(m: Model) -> list[Any]:
        cache = m.new_cache(1, 200)
        drawn = m.generate(prompts, 12, temperature=0.9, top_k=20, seed=5)
        streamed = "".join(m.generate("a b", 9, stream=True))
        first = m.generate("so ", 5, cache=cache)
        return [drawn, streamed, first, m.generate("then ", 5, cache=cache), cache.lengths.tolist(),
                m.generate("x", 6, n=3, temperature=1.0, seed=2)]

    for got in on(3, texts, use):
        assert got == use(texts)


def test_without_a_seed_all_ranks_draw_the_same(texts: Model) -> None:
    found = on(3, texts, lambda m: m.generate("a", 30, temperature=2.0))
    assert found[0] == found[1] == found[2] != on(3, texts, lambda m: m.generate("a", 30, temperature=2.0))[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_steps_over_chunks_on_several_ranks_have_the_bytes_of_one_process(model_of, family: str, dtype: str) -> None:
    """Of single tokens and of some, from one chunk into the next, and behind what was cut off."""
    model = model_of(family)
    ids, more = ids_of(model, 2, 765), ids_of(model, 2, 300, seed=1)

    def use(m: Model) -> list[np.ndarray]:
        cache = m.new_cache(2, 1300, dtype=dtype)
        found = [m(ids, cache, last_only=True), *(m(more[:, i : i + 1], cache) for i in range(6))]
        found.append(m(more[:, :250], cache))
        cache.truncate(1019)
        return [*found, m(more[:, :9], cache), m(more[:, :1], cache)]

    want = use(model)
    for n, layout in ((2, "zigzag"), (3, "striped"), (5, "contiguous")):
        assert all(same(got, want) for got in on(n, model, use, layout=layout))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_steps_in_another_precision_have_the_bytes_of_one_process(model_of, precision: Any, monkeypatch: Any) -> None:
    """Parts of few chunks at a time, too."""
    monkeypatch.setattr(chunks, "_SEGMENT_BYTES", 1)
    model = model_of("llama")._attending_in(precision)
    ids = ids_of(model, 1, 1500)

    def use(m: Model) -> list[np.ndarray]:
        cache = m.new_cache(1, 1600)
        return [m(ids, cache, last_only=True), m(ids[:, :30], cache), m(ids[:, :1], cache)]

    want = use(model)
    assert all(same(got, want) for got in on(3, model, use))


@pytest.mark.skipif("FORGE_C_REAL_MODELS" not in os.environ, reason="FORGE_C_REAL_MODELS names no folder")
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_models_say_the_same(name: str) -> None:
    model = load(Path(os.environ["FORGE_C_REAL_MODELS"]) / f"{name}.gguf")
    text = "The quick brown fox jumps over the lazy dog. " * 30 + "Once upon a time in a land far away, there was"
    want = model.generate(text, 24)
    assert on(3, model, lambda m: m.generate(text, 24)) == [want] * 3


# ---- caches ----


@pytest.mark.parametrize("family", ["llama", "gemma2", "mamba", "bamba"])
def test_caches_go_back_fork_and_are_copied(model_of, family: str) -> None:
    model = model_of(family)
    ids, few = ids_of(model, 1, 140), ids_of(model, 1, 40, seed=1)

    def use(m: Model) -> list[np.ndarray]:
        cache = m.new_cache(1, 400)
        m(ids[:, :100], cache)
        found = [m(ids[:, 100:], cache)]
        cache.truncate(100)
        twin, other = cache.fork(2), copy.copy(cache)
        found += [m(few, cache), m(few[:, ::-1], other), m(np.repeat(few[:, :1], 2, 0), twin)]
        twin.row(1).truncate(0)
        found.append(m(few[:, :20], twin.row(1)))
        assert twin.lengths.tolist() == [101, 20] and cache.lengths.tolist() == [140]
        assert cache.nearest(0).tolist() == [0]
        return found

    for got in on(3, model, use):
        assert same(got, use(model))


def test_each_rank_holds_its_part_and_windows_what_they_need(model_of) -> None:
    model = model_of("gemma3_text")  # windows of 7 in every other layer

    def use(m: Model) -> tuple[int, list[int], list[int]]:
        cache = m.new_cache(1, 3000)
        for start in range(0, 2800, 700):
            m(ids_of(m, 1, 700, seed=start), cache, last_only=True)
        for _ in range(10):
            m([[1]], cache)
        held = [(s.kind.window, int(s.kv.lengths[0])) for s in cache.layers]  # type: ignore[union-attr]
        return cache.nbytes, [n for window, n in held if window is None], [n for window, n in held if window]

    found = on(4, model, use)
    full = [layers for _, layers, _ in found]
    assert {sum(of) for of in zip(*full, strict=True)} == {2810}
    assert all(max(of) - min(of) <= 256 for of in zip(*full, strict=True))  # whole chunks
    assert max(max(layers) for *_, layers in found) <= 2 * 256 + 7
    assert all(nbytes < 0.8 * model.new_cache(1, 3000).nbytes for nbytes, *_ in found)


def test_a_shard_that_is_full_leaves_the_rest_to_others(model_of) -> None:
    """After going back the first ranks hold nearly all."""
    model = model_of("llama")
    ids = ids_of(model, 1, 4000)

    def use(m: Model) -> list[np.ndarray]:
        cache = m.new_cache(1, 4000)
        m(ids[:, :3900], cache, last_only=True)
        cache.truncate(1300)
        return [m(ids[:, 1300:3995], cache, last_only=True), *(m([[i]], cache) for i in range(5))]

    for got in on(3, model, use, layout="contiguous"):
        assert same(got, use(model))


def test_a_window_cannot_go_back_behind_what_ranks_keep(model_of) -> None:
    model = model_of("mistral")

    def use(m: Model) -> str:
        cache = m.new_cache(1, 2000)
        m(ids_of(m, 1, 1500), cache, last_only=True)
        cache.truncate(1400)
        with pytest.raises(ValueError, match="cannot go back") as caught:
            cache.truncate(1000)
        assert cache.nearest(1000).tolist() == [0] and cache.lengths.tolist() == [1400]
        cache.truncate(0)
        assert m([[1, 2, 3]], cache).shape == (1, 3, 97)
        return str(caught.value)

    found = on(3, model, use)
    assert found[0] == found[1] == found[2]


def test_caches_are_not_saved_pickled_or_taken_for_others(model_of, tmp_path: Path) -> None:
    model = model_of("llama")
    mine = parallel(model, SelfComm())
    cache = mine.new_cache()
    with pytest.raises(ValueError, match="each rank holds a part"):
        cache.save(tmp_path / "a")
    with pytest.raises(ValueError, match="each rank holds a part"):
        pickle.dumps(cache)
    with pytest.raises(ValueError, match="one of a model in one process"):
        mine([[1]], model.new_cache())
    with pytest.raises(ValueError, match="another model"):
        model([[1]], cache)
    model.new_cache().save(tmp_path / "b")
    with pytest.raises(ValueError, match="layers differ"):
        ModelCache.load(tmp_path / "b", mine)
    with pytest.raises(ValueError, match="the one that it was made of"):
        mine.save(tmp_path / "c")


# ---- errors ----


def test_wrong_arguments_of_parallel(model_of) -> None:
    model, comm = model_of("llama"), SelfComm()
    with pytest.raises(ValueError, match="layout"):
        parallel(model, comm, layout="blocks")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a Model"):
        parallel(parallel(model, comm), comm)
    with pytest.raises(ValueError, match="tensor is 2, expected a divisor of 1"):
        parallel(model, comm, tensor=2)
    with pytest.raises(ValueError, match="recurrent layers"):
        parallel(model_of("mamba"), comm, layout="striped")


def test_ranks_that_differ_are_told_before_anything_moves(model_of) -> None:
    a, b = model_of("llama"), model_of("qwen3")
    _, errors = run_threads_to_the_end(lambda comm: parallel(b if comm.rank == 1 else a, comm), 3)
    assert all(isinstance(e, ValueError) and "rank 1" in str(e) for e in errors)
    _, errors = run_threads_to_the_end(
        lambda comm: parallel(a, comm, layout="striped" if comm.rank else "zigzag"), 2)
    assert all(isinstance(e, ValueError) and "striped" in str(e) for e in errors)

    def other_ids(comm: Any) -> np.ndarray:
        m = parallel(a, comm)
        cache = m.new_cache(1, 50)
        with pytest.raises(ValueError, match="do not agree"):
            m([[1, 2, 3 + comm.rank // 2]], cache)
        assert cache.lengths.tolist() == [0]
        return m([[1, 2, 3]], cache)

    for got in run_threads(other_ids, 3):
        assert got.tobytes() == a([[1, 2, 3]]).tobytes()


class Gone(KVCache):
    """Whose memory cannot be written."""

    __slots__ = ()

    def append(self, *_: Any, **__: Any) -> None:
        raise OSError("the disk is gone")


@pytest.mark.parametrize("family", ["llama", "bamba"])
def test_a_rank_that_fails_in_a_pass_ends_it_on_all(model_of, family: str) -> None:
    model = model_of(family)

    def use(comm: Any) -> None:
        m = parallel(model, comm)
        cache = m.new_cache(1, 2000)
        m(ids_of(m, 1, 600), cache)
        if comm.rank == 1:
            next(s for s in cache.layers if isinstance(s, ShardedKV)).kv.__class__ = Gone
        try:
            m(ids_of(m, 1, 1000), cache)
        finally:
            assert cache.lengths.tolist() == [600]
            with pytest.raises(RankError):
                m([[1]], cache)

    _, errors = run_threads_to_the_end(use, 3)
    assert isinstance(errors[1], OSError)
    assert all(isinstance(e, RankError) and "the disk is gone" in str(e) for e in (errors[0], errors[2]))


def test_a_rank_that_does_not_call_is_waited_for_no_longer_than_the_timeout(model_of) -> None:
    model = model_of("llama")

    def use(comm: Any) -> None:
        m = parallel(model, comm, timeout=0.3)
        if comm.rank != 1:
            m([[1, 2, 3]])

    comms = ThreadComm(2)
    results, errors = run_threads_to_the_end(use, 2, comms=comms)
    assert isinstance(errors[0], TimeoutError | RankError) and errors[1] is None


# ---- processes ----


@needs_mpi
def test_processes_under_mpiexec_give_what_one_gives(tmp_path: Path) -> None:
    write(tmp_path / "a", small("gemma3_text"))
    write(tmp_path / "b", small("bamba"))
    done = run_mpi("""
        import sys
        import numpy as np
        from forge_c.distributed import MPIComm, parallel
        from forge_c.models import load
        comm = MPIComm()
        ids = np.random.default_rng(0).integers(0, 97, (1, 333))
        for path in sys.argv[1:]:
            one = load(path)
            model = parallel(one, comm)
            assert model(ids).tobytes() == one(ids).tobytes()
            assert (model.generate(ids[0], 6) == one.generate(ids[0], 6)).all()
        print("right", comm.rank)
        """, 3, str(tmp_path / "a"), str(tmp_path / "b"))
    assert sorted(done.out.split()) == ["0", "1", "2", "right", "right", "right"]


COMMAND = """
    import sys
    from forge_c.cli import main
    sys.exit(main(sys.argv[1:]))
    """


@needs_mpi
def test_the_command_line_on_several_processes_prints_what_one_prints(tmp_path: Path, capsys: Any) -> None:
    folder = str(write(tmp_path / "a", small(vocab_size=256), tokenizer=BYTES))
    arguments = ["generate", "--model", folder, "--max-new-tokens", "9", "--temperature", "0.8", "--seed", "3", "def f"]
    assert main(arguments) == 0
    want = capsys.readouterr().out
    for options in (("--layout", "striped"), ("--tensor", "2")):
        done = run_mpi(COMMAND, 2, *arguments, "--parallel", *options)
        assert done.out == want and done.err.count("prompt 6 tokens") == 1


@needs_mpi
def test_a_mistake_on_several_processes_is_one_line(tmp_path: Path) -> None:
    done = run_mpi(COMMAND, 3, "generate", "--parallel", "--model", str(tmp_path / "none"), "text", expect=None)
    lines = [line for line in done.err.splitlines() if "forge-c" in line]
    assert len(lines) == 1 and "none" in lines[0] and not done.out.strip()
    done = run_mpi(COMMAND, 2, "generate", "--parallel", "--model", str(write(tmp_path / "a", small())), expect=None)
    assert sum("no text" in line for line in done.err.splitlines()) == 1


@needs_mpi
def test_an_interrupt_ends_all_processes(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", small(vocab_size=256, max_position_embeddings=100_000), tokenizer=BYTES)
    script = """
        import os, sys, threading
        from forge_c.cli import main
        told, sys.stdout = sys.stdout, open(os.devnull, "w")
        threading.Timer(2, lambda: print("now", file=told, flush=True)).start()
        sys.exit(main(sys.argv[1:]))
        """
    done = run_mpi(script, 2, "generate", "--parallel", "--model", str(folder), "--max-new-tokens", "90000", "a",
                   signal_after="now", expect=None)
    assert done.seconds < 60


def test_options_of_several_processes_need_them(capsys: Any) -> None:
    assert main(["generate", "--layout", "striped", "a"]) == 2
    assert "--layout is given without --parallel" in capsys.readouterr().err


def test_without_mpi4py_the_command_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    assert main(["generate", "--parallel", "a"]) == 2
    assert "pip install forge_c[mpi]" in capsys.readouterr().err
