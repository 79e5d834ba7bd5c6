"""States whose functions take part in a forward pass: attention by the caller, recurrent states that come and go."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from forge_c.functional import AttentionState, RecurrentSlots, RoutedState, StateTable, attention

START = np.zeros(1, np.int64)


def attending(cache: Any, model: Any, call: Any = None) -> StateTable:
    """The states of a cache whose layers append and attend in Python."""
    def attend_of(kind: Any, kv: Any) -> Any:
        def attend(q: Any, k: Any, v: Any, out: Any) -> None:
            kv.append(k, v)
            out[...] = attention(q, kv, causal=True, window=kind.window, scale=kind.scale, softcap=kind.softcap)

        return attend

    def table_of(kind: Any) -> Any:
        of = model._decoder._tables.of(kind.rope)
        return None if of is None else of(64)

    return StateTable([AttentionState(kv.copy()._pages, table_of(kind), call or attend_of(kind, kv.copy()))
                       for kind, kv in zip(model._decoder.kinds, cache.layers, strict=True)])


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_attention_in_python_has_the_bytes_of_the_pages(model_of, family: str, each_thread_count: Any) -> None:
    model = model_of(family)
    ids = np.random.default_rng(0).integers(0, 97, (1, 40))
    want, cache, layers = model(ids), model.new_cache(1, 40), model._decoder._model
    for options in ({}, {"positions": np.arange(40)[None]}):
        got, _ = layers.forward(ids, attending(cache, model), START, **options)
        assert model._decoder._finished(got).tobytes() == want.tobytes()


def test_keys_are_rotated_at_the_positions_that_are_given(model) -> None:
    ids, layers, seen = np.arange(1, 7)[None], model._decoder._model, []

    def look(q: Any, k: Any, v: Any, out: Any) -> None:
        seen.append((q.copy(), k.copy(), v.copy()))
        out[...] = 0

    for some in (slice(None), slice(1, None, 2)):
        layers.forward(ids[:, some], attending(model.new_cache(), model, look), START, logits=False,
                       positions=np.arange(6)[None, some])
    whole, odd = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert all(a[:, 1::2].tobytes() == b.tobytes() for w, o in zip(whole, odd, strict=True)
               for a, b in zip(w, o, strict=True))


def test_what_python_raises_ends_the_pass(model_of) -> None:
    model, ids = model_of("llama"), np.ones((1, 3), np.int64)
    with pytest.raises(ZeroDivisionError):
        model._decoder._model.forward(ids, attending(model.new_cache(), model, lambda *_: 1 // 0), START)
    mamba = model_of("mamba")
    floats = mamba._decoder.kinds[0].floats
    memory, source, target = np.zeros((1, 2, floats), np.float32), np.array([-1]), np.array([0])
    states = [RecurrentSlots(memory, source, target, lambda written: 1 // 0) for _ in mamba._decoder.kinds]
    with pytest.raises(ZeroDivisionError):
        mamba._decoder._model.forward(ids, StateTable(states), START)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_recurrent_state_is_asked_for_before_it_is_read_and_told_of_when_it_is_whole(model_of, family: str) -> None:
    model = model_of(family)
    ids = np.random.default_rng(0).integers(0, 97, (1, 30))
    kinds, layers = model._decoder.kinds, model._decoder._model
    first = [RecurrentSlots(np.zeros((1, 2, kind.floats), np.float32), np.array([-1]), np.array([1])) for kind in kinds]
    calls: list[bool] = []

    def second_of(before: Any) -> Any:
        memory = np.full((1, 2, before.memory.shape[2]), np.nan, np.float32)

        def relay(written: bool) -> None:
            calls.append(written)
            if written:
                assert np.isfinite(memory[0, 1]).all()
            else:
                memory[0, 0] = before.memory[0, 1]

        return RecurrentSlots(memory, np.array([0]), np.array([1]), relay)

    layers.forward(ids[:, :11], StateTable(first), START, logits=False)
    got, _ = layers.forward(ids[:, 11:], StateTable([second_of(s) for s in first]), START + 11)
    assert got.tobytes() == np.ascontiguousarray(model(ids)[:, 11:]).tobytes()
    assert calls == [False, True] * len(kinds)


def test_positions_that_no_state_can_attend_to_are_refused(model) -> None:
    layers, ids = model._decoder._model, np.ones((1, 3), np.int64)
    model(ids)  # so that the tables are long enough
    cache = model.new_cache()
    with pytest.raises(TypeError, match="positions are given"):
        layers.forward(ids, cache.states, START, positions=np.arange(3)[None])
    states = attending(cache, model)
    for wrong in (np.arange(4)[None], np.array([[-1, 0, 1]]), np.arange(3)):
        with pytest.raises(ValueError, match="positions has shape"):
            layers.forward(ids, states, START, positions=wrong)
    with pytest.raises(IndexError, match="outside the table"):
        layers.forward(ids, states, START, positions=np.array([[0, 1, 1 << 40]]))


def test_no_function_attends_behind_a_router(model) -> None:
    state = attending(model.new_cache(), model).held[0]
    with pytest.raises(TypeError, match="expected pages behind a Router"):
        RoutedState(state, np.zeros((1, 8), np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64))
