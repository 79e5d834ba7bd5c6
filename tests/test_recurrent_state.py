"""States that do not grow: each layer's slots, to where a cache can go back, and what generation makes of it."""
from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from child import run_script
from model_folder import STATE_SPACE, small, write
from small_models import interrupted

import forge_c as fc
from forge_c.functional import KV_CHUNK, RecurrentSlots, StateTable
from forge_c.models import Model, ModelCache, load
from forge_c.state.recurrent import SLOTS, History, RecurrentState

IDS = np.random.default_rng(0).integers(0, 97, (2, 700))
KEPT = r"truncate: row {} cannot go back to {} tokens: its recurrent state is kept after {}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp(name), small(name)) for name in STATE_SPACE}


@pytest.fixture(scope="module")
def models(folders) -> dict[str, Model]:
    return {name: load(folder) for name, folder in folders.items()}


@pytest.fixture(params=STATE_SPACE)
def model(request, models) -> Model:
    return models[request.param]


def fed(model: Model, *cuts: int, rows: int = 2) -> ModelCache:
    """A cache of IDS[:, :cuts[-1]] in calls that end at the cuts."""
    cache = model.new_cache(rows)
    for start, stop in itertools.pairwise((0, *cuts)):
        model(IDS[:rows, start:stop], cache)
    return cache


def goes_on(model: Model, cache: ModelCache, *lengths: int) -> None:
    """Each row holds what it would if it had just read so many of its tokens."""
    assert cache.lengths.tolist() == list(lengths)
    for b, n in enumerate(lengths):
        alone = model.new_cache(1)
        model(IDS[b : b + 1, :n], alone)
        rest = IDS[b : b + 1, n : n + 5]
        assert model(rest, cache.row(b)).tobytes() == model(rest, alone).tobytes(), (b, n)


# ---- going back --------------------------------------------------------------------------------------------------


def test_what_can_be_gone_back_to(model):
    """The beginning, before and after the last prompt, the step before this one, and this one."""
    cache = fed(model, 40, 41, 42, 100, 101, 102, 103)
    assert [cache.nearest(n).tolist() for n in (103, 102, 101, 100, 99, 42, 41, 0)] == [
        [n, n] for n in (103, 102, 100, 100, 42, 42, 0, 0)]
    for n in (101, 99, 1):
        before = cache.lengths.tolist()
        with pytest.raises(ValueError, match=KEPT.format(0, n, "0, 42, 100, 102, 103")):
            cache.truncate(n)
        assert cache.lengths.tolist() == before
    for n in (103, 102, 100, 42, 0):
        other = cache.copy()
        other.truncate(n)
        goes_on(model, other, n, n)


def test_rows_go_back_each_to_a_place_of_its_own(model):
    cache = fed(model, 40, 50, 51)
    cache.truncate([50, 40])
    goes_on(model, cache, 50, 40)
    with pytest.raises(ValueError, match=KEPT.format(1, 30, "0, 40, 45")):
        cache.truncate([50, 30])
    assert cache.nearest([50, 44]).tolist() == [50, 40]
    cache.truncate([0, 40])
    goes_on(model, cache, 0, 40)


def test_a_prompt_of_many_passes_can_be_taken_back(model):
    """As Ctrl-C in its last pass does."""
    cache = fed(model, 7)
    with interrupted(model, after=3) as caught:
        model(IDS[:, 7 : 7 + 2 * KV_CHUNK + 1], cache)
    if any(getattr(kind, "window", None) for kind in cache.kinds):  # its ring holds later ones
        assert caught.value.__notes__ == ["model: the cache holds [519, 519] tokens: a layer with a window could not "
                                          "go back to [7, 7]"]
        return goes_on(model, cache, 519, 519)
    assert not hasattr(caught.value, "__notes__")
    return goes_on(model, cache, 7, 7)


def test_a_pass_that_fails_changes_nothing(model):
    cache = fed(model, 20, 21)
    for tokens in (1, 1, 9, 1):
        with interrupted(model):
            model(IDS[:, 21 : 21 + tokens], cache)
        assert cache.lengths.tolist() == [21, 21]
    other = cache.copy()
    goes_on(model, cache, 21, 21)
    other.truncate(20)
    goes_on(model, other, 20, 20)


def test_calls_of_no_token_change_nothing(model):
    cache = model.new_cache(2)
    for stop in (0, 3, 3, 4, 4):
        start = cache.seq_len
        y = model(IDS[:, start:stop], cache)
        assert y.shape[1] == stop - start and cache.lengths.tolist() == [stop, stop]
    other = cache.copy()
    other.truncate(3)
    goes_on(model, other, 3, 3)
    goes_on(model, cache, 4, 4)


# ---- rows --------------------------------------------------------------------------------------------------------


def test_rows_of_different_histories_go_on_as_each_alone(model):
    """Their states lie in different slots, and some rows are at their beginning."""
    cache = model.new_cache(3)
    for b, cuts in enumerate([(5,), (3, 4, 9), ()]):
        for start, stop in itertools.pairwise((0, *cuts)):
            model(IDS[:1, start:stop], cache.row(b))
    assert cache.lengths.tolist() == [5, 9, 0]
    for tokens in (1, 4, 1):
        before = cache.lengths
        step = np.stack([IDS[0, n : n + tokens] for n in before])
        found = model(step, cache)
        for b, n in enumerate(before + tokens):
            assert found[b].tobytes() == model(IDS[:1, :n])[0, -tokens:].tobytes()


def test_threads_change_no_bit(model):
    """Rows in different slots too, which are calls of their own."""
    before, found = fc.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            fc.set_num_threads(threads)
            cache = fed(model, 300, 301)
            model(IDS[:1, :2], cache.row(0))
            found.append(model(IDS[:, 301:310], cache).tobytes() + model(IDS[:, :1], cache).tobytes())
    finally:
        fc.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_forks_copies_and_pickles_go_their_own_ways(model):
    cache = fed(model, 30, 31)
    others = cache.fork(2), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    model(IDS[:, :40], cache)
    goes_on(model, others[1], 31, 31)
    goes_on(model, others[2], 31, 31)
    assert others[0].nbytes == 2 * cache.nbytes
    found = model(np.repeat(IDS[:, 31:35], 2, axis=0), others[0])
    for b in range(4):
        assert found[b].tobytes() == model(IDS[b // 2 : b // 2 + 1, :35])[0, 31:].tobytes()
    others[0].truncate(30)
    assert others[0].lengths.tolist() == [30] * 4


def test_a_cache_does_not_grow(model):
    cache = fed(model, 1)
    before = cache.nbytes
    model(IDS, cache)
    if all(isinstance(layer, RecurrentState) for layer in cache.layers):
        assert cache.nbytes == before == sum(layer.memory.nbytes for layer in cache.layers)
        assert cache.max_seq_len >= 1 << 39


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["mamba-tiny", "mamba2-tiny"])
def test_of_what_was_read_only_the_ids_take_memory(shape):
    """In a process of its own: 300 000 tokens in calls of a thousand, whose ids are 4 bytes each."""
    out = run_script(f"""
        import numpy as np, forge_c as fc
        def resident():
            return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
        model, before = fc.models.random_model({shape!r}), 0
        cache, ids = model.new_cache(), np.random.default_rng(0).integers(0, 512, (1, 1000))
        for i in range(305):
            before = before if i != 5 else resident()
            model(ids, cache, last_only=True)
        print(resident() - before, cache.seq_len)
        """)
    grown, tokens = map(int, out.split())
    assert tokens == 305_000 and grown <= 4 * tokens * 1.125 + (1 << 20)  # an array grows by an eighth at a time


# ---- generation --------------------------------------------------------------------------------------------------


def test_a_batch_of_different_lengths_is_each_alone(model):
    prompts = [IDS[0, :n] for n in (1, 3, 40, KV_CHUNK + 9)]
    together = model.generate(prompts, 6)
    for prompt, found in zip(prompts, together, strict=True):
        assert model.generate(prompt, 6).tolist() == found.tolist()


@pytest.mark.parametrize("options", [{}, {"stop": ["e"]}, {"temperature": 1.0, "seed": 3}])
def test_generation_with_a_cache_goes_on(folders, options, tmp_path):
    for name in STATE_SPACE:
        config = small(name, vocab_size=256)
        model = load(write(tmp_path / name, config, tokenizer={"tokenizer_class": "ByteTokenizer"}))
        cache = model.new_cache(1)
        for more in ("a", "bcd", "e"):
            before = cache.ids[0]
            first = model.generate(more, 5, cache=cache, details=True, **options)
            again = model.new_cache(1)
            model(before[None], again)
            second = model.generate(more, 5, cache=again, details=True, **options)
            assert first.ids.tolist() == second.ids.tolist() and first.text == second.text


# ---- files -------------------------------------------------------------------------------------------------------


def test_a_saved_cache_goes_on_and_back(model, tmp_path):
    cache = fed(model, 30, 31, 60, 61)
    cache.truncate([61, 31])
    cache.save(tmp_path / "cache")
    found = ModelCache.load(tmp_path / "cache", model)
    assert found.nearest([60, 30]).tolist() == cache.nearest([60, 30]).tolist() == [60, 30]
    other = found.copy()
    other.truncate([60, 30])
    goes_on(model, other, 60, 30)
    goes_on(model, found, 61, 31)


DAMAGES: dict[str, Any] = {
    "empty": lambda b: b"", "short": lambda b: b[:-1], "long": lambda b: b + b"\0", "other": lambda b: b"x" + b[1:],
    "header alone": lambda b: b[:40], "rows": lambda b: b[:20] + b"\x07" + b[21:],
    "held": lambda b: b[:44] + b"\xff" * 8 + b[52:], "slots": lambda b: b[: 44 + 2 * 2 * SLOTS * 8] + b"\x09" + b[
        45 + 2 * 2 * SLOTS * 8 :]}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_file_is_an_error(models, tmp_path, case):
    model = models["mamba"]
    fed(model, 30, 31).save(tmp_path / "cache")
    path = tmp_path / "cache" / "layer-0001.npy"
    path.write_bytes(DAMAGES[case](path.read_bytes()))
    with pytest.raises(ValueError, match=r"RecurrentState|ModelCache.load"):
        ModelCache.load(tmp_path / "cache", model)


def test_a_cache_of_another_model_is_refused(models, folders, tmp_path):
    cache = models["mamba"].new_cache(2)
    with pytest.raises(ValueError, match="model: cache is one of another model"):
        models["mamba2"](IDS[:, :3], cache)
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="layers differ"):
        ModelCache.load(tmp_path / "cache", models["falcon_mamba"])


# ---- what the pass takes -----------------------------------------------------------------------------------------


def test_slots_that_are_none_are_refused(models):
    model = models["mamba"]
    layered, cache, start = model._decoder._model, model.new_cache(2), np.zeros(2, np.int64)
    layer = cache.layers[0]
    rest = cache.states.held[1:]

    def forward(state: Any, rows: int = 2) -> Any:
        return layered.forward(IDS[:rows, :2].astype(np.int64), StateTable([state, *rest]), start[:rows])

    with pytest.raises(TypeError, match="state 0 is a NoneType"):
        forward(None)
    with pytest.raises(ValueError, match="state 0 has 2 rows of .* floats, expected 1 of"):
        forward(layer.bound(), 1)
    for source, target in ((0, 0), (SLOTS, 0), (0, SLOTS), (0, -1)):
        slots = RecurrentSlots(layer.memory, np.full(2, source), np.full(2, target))
        with pytest.raises(ValueError, match=f"state 0 goes from slot {source} to {target}"):
            forward(slots)
    with pytest.raises(ValueError, match="state 0 has 2 rows of"):
        forward(RecurrentSlots(layer.memory[:, :, 1:].copy(), np.zeros(2, np.int64), np.ones(2, np.int64)))
    for bad in (layer.memory.astype(np.float64), layer.memory[0], layer.memory[:, :, ::2]):
        with pytest.raises(ValueError, match="RecurrentSlots: memory"):
            RecurrentSlots(bad, np.zeros(2, np.int64), np.ones(2, np.int64))
    with pytest.raises(ValueError, match="RecurrentSlots: target"):
        RecurrentSlots(layer.memory, np.zeros(2, np.int64), np.ones(3, np.int64))


def test_any_history_keeps_what_it_promises():
    """Random passes and truncations of three rows, beside a list of what each slot was written with."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        history, state, length = History(3), RecurrentState(3, 1), np.zeros(3, np.int64)
        state.join(history)
        for _ in range(40):
            tokens = rng.choice([1, 1, 2, KV_CHUNK, 0])
            if rng.random() < 0.2:
                keep = history.nearest((length * rng.random(3)).astype(np.int64))
                state.check_truncate(keep)
                state.truncate(keep)
                length = keep
            elif rng.random() < 0.1:
                state.reserve(length, length + tokens)
                state.rollback(length)
            else:
                before, prompt = length.copy(), history.prompt.copy()
                state.reserve(length, length + tokens)
                if tokens:
                    assert (history.target != history.current).all()
                    state.memory[np.arange(3), history.target, 0] = length = length + tokens
                state.commit(length)
                if tokens:
                    assert (history.nearest(before) == before).all(), "a pass can always be taken back"
                    assert (history.nearest(before - (before > 0)) <= before).all()
                if tokens == 1:
                    assert (history.prompt == prompt).all()
            assert (history.lengths == length).all()
            rows, slots = np.nonzero(history.held >= 0)
            assert (state.memory[rows, slots, 0] == history.held[rows, slots]).all()
