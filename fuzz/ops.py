"""Random calls of every op against its float64 reference, and wrong arguments.

A call runs on arrays of any layout with canaries around them, on any ISA, with 1 to 4 threads; then on plain copies
with another number of threads: the bits are the same, nothing but `out` was written, and the values are the
reference's within the suite's own tolerances. Left out are values that overflow float32 on the way and not float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import forge_c as fc
from fuzz import doing
from fuzz.arguments import wrong_call, wrong_option, wrong_size
from fuzz.arrays import Arena, Array, values
from fuzz.forms import FORMS, Call

PATIENCE = 30.0


def case(seed: int) -> None:
    rng = np.random.default_rng(seed)
    isa, threads = str(rng.choice(fc.available_isas())), int(rng.integers(1, 5))
    fc.use_isa(isa)
    fc.set_num_threads(threads)
    what = rng.random()
    if what < 0.2:
        wrong_call(rng)
    elif what < 0.25:
        wrong_option(rng)
    elif what < 0.27:
        wrong_size(rng)
    elif what < 0.28:
        interleaved(rng)
    else:
        form = FORMS[int(rng.integers(len(FORMS)))]
        doing(f"{form.__name__} on {isa} with {threads} threads")
        try:
            perform(rng, form(rng), threads)
        except BaseException as error:
            error.add_note(f"{form.__name__} on {isa} with {threads} threads")
            raise


def perform(rng: np.random.Generator, call: Call, threads: int) -> None:
    arena = Arena(rng)
    given = {name: arena.give(name, a, last=name not in call.any_stride) for name, a in call.arrays.items()}
    plain = {name: np.array(a, order="C", subok=False) for name, a in given.items()}
    fc.set_num_threads(threads % 4 + 1)
    expected = results(call.run(**plain))
    fc.set_num_threads(threads)
    outs = outs_for(rng, call, arena, given, expected)
    got = results(call.run(**given, **({} if outs is None else {"out": outs[0] if call.outs == 1 else outs})))
    arena.check()
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        assert g.shape == e.shape and g.dtype == e.dtype, f"{call.name}: result {i} is {g.shape} {g.dtype}"
        assert g.tobytes() == e.tobytes(), f"{call.name}: other bits for another layout or thread count in result {i}"
        assert outs is None or i >= call.outs or g is outs[i], f"{call.name}: result {i} is not out"
    try:
        with np.errstate(all="ignore"):
            call.check(expected, plain)
    except BaseException as error:
        error.add_note(f"{call.name} {call.options}")
        raise


def interleaved(rng: np.random.Generator) -> None:
    """x and out in one buffer: never wrong, and decided at once however hard it is to say whether they overlap."""
    raw = values(rng, (2**22,), np.float32)
    shape = tuple(int(n) for n in rng.integers(2, 40, 3)) + (1,)
    strides = [[int(4 * rng.integers(1, 30_000)) for _ in shape] for _ in range(2)]
    if rng.random() < 0.5:
        strides = [[8 * shape[1] * shape[2], 8 * shape[2], 8, 4]] * 2
    x, out = (np.ndarray(shape, np.float32, raw, 4 * i, s) for i, s in enumerate(strides))
    doing(f"relu with x {x.shape} {x.strides} and out {out.strides}")
    before, plain = raw.copy(), np.maximum(np.array(x), 0)
    try:
        fc.relu(x, out=out)
    except ValueError as error:
        assert "overlap" in str(error) and strides[0] is not strides[1], f"interleaved: {error}"
        assert raw.tobytes() == before.tobytes(), "interleaved: a rejected call wrote"
    else:
        assert distinct_in(out) is False or np.array_equal(np.array(out), plain), "interleaved: other values"


def distinct_in(a: Array) -> bool:
    """Whether no two elements of an array of float32 share memory; counted."""
    at = sum(np.arange(n).reshape([-1 if i == j else 1 for j in range(a.ndim)]) * (s // 4)
             for i, (n, s) in enumerate(zip(a.shape, a.strides, strict=True)))
    return len(np.unique(at)) == a.size


def results(value: Any) -> tuple[Array, ...]:
    return value if isinstance(value, tuple) else (value,)


def outs_for(rng: np.random.Generator, call: Call, arena: Arena, given: dict[str, Array],
             expected: tuple[Array, ...]) -> tuple[Array, ...] | None:
    """None, arrays of their own, or for the first an argument that may be overwritten."""
    if not call.outs or rng.random() < 0.3:
        return None
    outs = [arena.out(f"out[{i}]", e.shape, e.dtype) for i, e in enumerate(expected[:call.outs])]
    for i in range(call.outs):
        names = [n for n in call.alias if n in given and distinct(given[n]) and given[n].flags.writeable
                 and given[n].shape == outs[i].shape and given[n].dtype == outs[i].dtype
                 and not any(given[n] is o for o in outs)]
        if names and rng.random() < 0.4:
            name = names[int(rng.integers(len(names)))]
            outs[i] = given[name]
            arena.may_write(name, given[name])
    return tuple(outs)


def distinct(a: Array) -> bool:
    """Whether no two elements share memory."""
    return all(s or n < 2 for s, n in zip(a.strides, a.shape, strict=True))

