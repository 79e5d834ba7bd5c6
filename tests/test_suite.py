"""How the suite itself runs: what is remembered, what is named, who is alone, what `--quick` leaves out."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import numpy as np
import pytest
from suite import (
    ISA,
    ONLY_PRODUCTS,
    PRODUCTS,
    Locks,
    best_isa,
    case,
    case_id,
    chosen_quickly,
    in_order,
    is_alone,
    isas_of,
    once,
)

import forge_c as fc


def parameters(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def test_equal_arguments_are_computed_once():
    calls = []

    @once
    def doubled(x, **options):
        calls.append(options)
        return 2 * np.asarray(x)

    x = np.arange(3, dtype=np.float32)
    assert doubled(x) is doubled(x.copy()) and len(calls) == 1
    others = (x.astype(np.float64), x.astype(np.int32), x[None], x[:2], -x, 0.0, -0.0, 0, False, "0", [x], (x,))
    for i, other in enumerate(others):
        doubled(x, other=other)
        assert len(calls) == i + 2, other
    with pytest.raises(ValueError, match="read-only"):
        doubled(x)[0] = 1


def test_one_object_is_not_another_that_came_where_it_lay():
    kind = once(lambda value: type(value).__name__)
    assert [kind(make()) for make in (set, bytearray, set, bytearray) * 50] == ["set", "bytearray"] * 100


def test_a_loop_that_fails_names_its_case():
    for fail in (lambda: pytest.fail("no"), lambda: np.testing.assert_array_equal(1, 2)):
        with pytest.raises((AssertionError, pytest.fail.Exception)) as caught, case("int8", 3, "threads"):
            fail()
        assert caught.value.__notes__ == ["in the case int8, 3, threads"]


def test_who_runs_alone_waits_and_is_waited_for(tmp_path):
    running, seen, lock = set(), [], threading.Lock()

    def worker(i: int) -> None:
        locks = Locks(tmp_path)  # files of its own, as in another process
        for turn in range(6):
            alone = turn % 3 == i % 3
            with locks.held(alone):
                with lock:
                    running.add((i, alone))
                time.sleep(0.002)
                with lock:
                    seen.append(set(running))
                    running.discard((i, alone))

    workers = [threading.Thread(target=worker, args=(i,)) for i in range(4)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    assert len(seen) == 24 and all(len(at_once) == 1 for at_once in seen if any(alone for _, alone in at_once))


def test_who_need_not_be_alone_runs_beside_others(tmp_path):
    met = threading.Barrier(3)

    def worker(_: int) -> None:
        with Locks(tmp_path).held(False):
            met.wait(60.0)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(worker, range(3))) == [None] * 3


def test_the_isas_of_a_case_follow_each_other(request):
    items = in_order(request.session.items)
    cases = [key for key, _ in groupby((item.path, case_id(item)) for item in items)]
    assert len(cases) == len(set(cases))
    alone = [is_alone(item) for item in items]
    assert alone == sorted(alone)


def test_quick_has_every_value_of_every_parameter(request):
    def values(items):
        return {(item.path, item.name.partition("[")[0], name, id(value))
                for item in items if not is_alone(item) and not item.get_closest_marker("slow")
                for name, value in parameters(item).items() if name != ISA}

    items, chosen = request.session.items, chosen_quickly(request.session.items)
    assert values(chosen) == values(items)
    assert {parameters(item).get(ISA, best_isa()) for item in chosen} <= {best_isa()}


def test_tables_that_differ_in_products_alone_run_what_multiplies():
    """And everything where they are asked for: by --every-isa, or by FORGE_C_ISA."""
    everything = list(fc.available_isas())
    for name in (*PRODUCTS, "test_linear_more"):
        assert isas_of(name) == everything
    assert isas_of("test_rms_norm", every=True) == everything
    less = [isa for isa in everything if isa not in ONLY_PRODUCTS or isa == fc.isa()]
    assert isas_of("test_rms_norm") == less and set(ONLY_PRODUCTS.values()) & set(everything) <= set(less)
