"""Weights over ranks: the bits of one process, or, of sums over ranks, its numbers within what rounding does."""
from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_models import golden, names
from ranks import needs_mpi, run_mpi, run_threads, run_threads_to_the_end
from suite import case
from test_gguf_models import BLOCKS, of_blocks

from forge_c.distributed import Comm, RankError, SelfComm, parallel
from forge_c.distributed.tensor import load_share, random_share
from forge_c.functional import MLPPart, Ranks
from forge_c.models import Model, load, random_model
from forge_c.models.inputs import random_tokens
from forge_c.models.spec import Attention
from forge_c.packing import pack

# Sums of float32 over ranks against one process's: as far apart as both are from the golden logits, which were summed
# in yet another order (the bound of test_model_parity), relative to the largest.
SUMMED = 2e-5
DTYPES = ("float32", "bfloat16", "int8", "int4")


def on(n: int, source: Any, use: Callable[[Model], Any], **options: Any) -> list[Any]:
    """use(model) on each of n ranks, of which each has a share."""
    return run_threads(lambda comm: use(parallel(source, comm, tensor=n, **options)), n)


def bits(a: np.ndarray) -> bytes:
    return a.tobytes()


def heads_of(model: Model) -> int:
    """How many ranks can have one, at most 4."""
    return min([4, *(kind.n_heads for layer in model.config.layers for kind in layer.mixers
                     if isinstance(kind, Attention))])


# ---- the bits of one process ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", names())
def test_logits_have_the_bits_of_one_process(name: str, dtype: Any, tmp_path: Path) -> None:
    """Of a prompt, of tokens after it in a cache, and hidden states within; of every family and format."""
    model = golden(name)
    folder = model.write(tmp_path)
    whole, ids = load(folder, dtype), model.ids

    def use(m: Model) -> list[bytes]:
        cache = m.new_cache(len(ids), ids.shape[1] + 2)
        found = [m(ids, cache, last_only=True), *(m(ids[:, i : i + 1], cache) for i in range(2))]
        return [bits(a) for a in (*found, m.hidden(ids[:1, :5], layer=1), m.hidden(ids[:1, :3]))]

    want = use(whole)
    for n in {2, heads_of(whole)}:
        with case(n):
            for got in on(n, folder, use, dtype=dtype):
                assert got == want


@pytest.mark.parametrize("kinds", [
    {"other": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q6_K"}, {"other": "Q5_0", "attn_q": "Q4_0", "ffn_up": "Q8_0"},
    {"other": "MXFP4", "attn_k": "TQ2_0", "ffn_gate": "IQ4_XS"}, {"other": "F16", "ffn_down": "BF16"}])
def test_blocks_of_a_file_are_held_in_shares(kinds: dict[str, str], tmp_path: Path, rng: np.random.Generator) -> None:
    file, _ = of_blocks(tmp_path, rng, BLOCKS, kinds)
    ids = np.arange(24).reshape(2, 12)
    for dtype in ("auto", "float32"):
        whole = load(file, dtype)
        for n in (2, 3, 4):
            with case(dtype, n):
                found = on(n, file, lambda m: (m(ids).tobytes(), m.dtype, m.nbytes), dtype=dtype)
                assert [(a, b) for a, b, _ in found] == [(whole(ids).tobytes(), whole.dtype)] * n
                assert max(held for _, _, held in found) < whole.nbytes * (0.75 if n == 2 else 0.6)


def test_text_is_that_of_one_process_on_every_rank() -> None:
    want = load().generate("def f(", 24)
    assert on(2, None, lambda m: m.generate("def f(", 24)) == [want] * 2
    assert on(3, load(dtype="int8"), lambda m: m.generate("def f(", 24)) == [load(dtype="int8").generate(
        "def f(", 24)] * 3


def test_ranks_draw_the_same_tokens_without_a_seed() -> None:
    found = on(2, None, lambda m: [m.generate("import ", 12, temperature=1.5) for _ in range(3)])
    assert found[0] == found[1] and len(set(found[0])) > 1


def test_scores_and_embeddings_are_those_of_one_process() -> None:
    def use(m: Model) -> Any:
        return m.score("import os\nimport sys")[0][1].tobytes(), m.embed(["a = 1", "b"]).tobytes()

    assert on(2, None, use) == [use(load())] * 2


def test_a_cache_holds_its_own_heads(tmp_path: Path) -> None:
    """Of bfloat16 and int8 too, whose rounding is a head's own."""
    folder = golden("llama_mha_tied").write(tmp_path)
    whole, ids = load(folder), golden("llama_mha_tied").ids
    for dtype in ("float32", "bfloat16", "int8"):
        def use(m: Model, dtype: str = dtype) -> tuple[bytes, int]:
            cache = m.new_cache(len(ids), 64, dtype=dtype)
            return m(ids, cache).tobytes(), cache.nbytes

        want = use(whole)
        found = on(4, folder, use)
        assert [logits for logits, _ in found] == [want[0]] * 4
        assert sum(held for _, held in found) == want[1]


def test_a_loaded_model_is_cut_as_it_was_loaded(tmp_path: Path) -> None:
    folder = golden("llama").write(tmp_path)
    model, ids = load(folder, "int8", attention_precision="bfloat16"), golden("llama").ids
    found = on(2, model, lambda m: (m(ids).tobytes(), m.dtype, m.attention_precision))
    assert found == [(model(ids).tobytes(), "int8", "bfloat16")] * 2


def test_weighed_formats_are_weighed_as_in_one_process(tmp_path: Path) -> None:
    """By what was given, be it squares or products, and by what rank 0 sees."""
    model = golden("llama")
    folder = model.write(tmp_path)
    rng = np.random.default_rng(0)
    for products in (False, True):
        seen = {}
        for name, shape in model.shapes.items():
            if name.startswith("model.layers.") and len(shape) == 2:
                x = rng.standard_normal((400, shape[1])).astype(np.float32) * np.geomspace(0.1, 3, shape[1])
                seen[name] = (x.T @ x / 400 if products else np.square(x).mean(0)).astype(np.float32)
        want = load(folder, "q4_1", importance=seen)(model.ids).tobytes()
        with case(products):
            assert want != load(folder, "q4_1")(model.ids).tobytes()
            found = on(2, folder, lambda m: m(model.ids).tobytes(), dtype="q4_1", importance=seen)  # noqa: B023
            assert found == [want] * 2


# ---- sums over ranks ----


@pytest.mark.parametrize("name", names())
def test_sums_over_ranks_are_those_of_one_process_but_for_rounding(name: str, tmp_path: Path) -> None:
    model = golden(name)
    folder = model.write(tmp_path)
    whole = load(folder, "float32")
    want = whole(model.ids)
    for n in {2, heads_of(whole)}:
        found = on(n, folder, lambda m: m(model.ids), dtype="float32", exact=False)
        with case(n):
            assert all(bits(a) == bits(found[0]) for a in found)
            assert np.abs(found[0] - want).max() <= SUMMED * np.abs(want).max()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "q4_1", "int4"])
def test_sums_of_rounded_inputs_differ_by_less_than_rounding_does(dtype: Any, tmp_path: Path) -> None:
    """Inputs that are rounded to other numbers are off by a step, as all are from float32: together by no more than
    the format is from the golden logits. Weights are the same numbers: groups are not cut, or have the whole's scale.
    """
    for name in ("qwen2", "gemma_mha", "mamba", "mamba_long_prompt"):
        model = golden(name)
        folder = model.write(tmp_path / f"{name}")
        want = load(folder, dtype)(model.ids)
        rounding = np.abs(want - model.logits).max()
        found = on(2, folder, lambda m: m(model.ids), dtype=dtype, exact=False)  # noqa: B023
        with case(name):
            assert bits(found[0]) == bits(found[1])
            assert np.abs(found[0] - want).max() <= rounding / 2


def test_blocks_of_a_file_are_not_cut(tmp_path: Path, rng: np.random.Generator) -> None:
    """Cuts fall between blocks of 32 or 256: a file that has too few of them for its ranks says so."""
    file, folder = of_blocks(tmp_path, rng, BLOCKS, {"other": "Q4_0"})
    ids, exact = np.arange(24).reshape(2, 12), load(folder, "float32")
    want, truth = load(file)(ids), exact(ids)
    for n in (2, 4):
        found = on(n, file, lambda m: m(ids), exact=False)
        assert all(bits(a) == bits(found[0]) for a in found)
        assert np.abs(found[0] - want).max() <= np.abs(want - truth).max()
    file, _ = of_blocks(tmp_path, rng, BLOCKS, {"other": "Q4_K"})
    with pytest.raises(ValueError, match="layer 0: attention has 4 heads, 2 of keys and values, expected some for each "
                                         "of 2 ranks in multiples of 4, since the format has groups of 256 channels"):
        on(2, file, lambda m: None, exact=False)


def test_a_layer_exchanges_four_times_or_sums_twice(tmp_path: Path) -> None:
    """And once for the embedding, once for the logits; a parallel layer's parts are summed together."""
    folder = golden("llama").write(tmp_path)
    ids = golden("llama").ids
    for exact, each in ((True, 4), (False, 2)):
        def count(comm: Comm, exact: bool = exact) -> tuple[int, int]:
            model = parallel(folder, comm, tensor=2, exact=exact)
            calls = [0, 0]
            for i, name in enumerate(("all_gather_arrays", "all_reduce")):
                exchanges = model._decoder._exchanges
                real = getattr(exchanges._comm, name)

                def counted(*a: Any, i: int = i, real: Any = real) -> None:
                    calls[i] += 1
                    real(*a)

                setattr(exchanges._comm, name, counted)
            model(ids)
            return calls[0], calls[1]

        layers = load(folder).config.n_layers
        gathers, sums = run_threads(count, 2)[0]
        assert sums == 1 + (0 if exact else each * layers)
        # an all_reduce of little is itself a gather
        assert gathers - sums == 1 + (each * layers if exact else 0)


# ---- tokens and weights over ranks ----


@pytest.mark.parametrize("name", ["llama", "gemma3", "mamba", "lfm2"])
def test_tokens_and_weights_over_ranks_together(name: str, tmp_path: Path) -> None:
    """Two groups of two: prompts have the bits of one process, and generate gives its tokens."""
    model = golden(name)
    folder = model.write(tmp_path)
    ids = np.resize(model.ids[0], 40)
    whole = load(folder)

    def use(m: Model) -> tuple[bytes, list[int]]:
        return m(ids[None]).tobytes(), m.generate(ids, 5).tolist()

    want = use(whole)
    for got in run_threads(lambda comm: use(parallel(folder, comm, tensor=2)), 4):
        assert got == want


# ---- errors ----


def test_what_cannot_be_cut_says_so(tmp_path: Path) -> None:
    folder = golden("llama").write(tmp_path / "model")
    load(folder).save(tmp_path / "saved")
    nothing = SelfComm()
    for n, source, options, error in (
            (3, folder, {"tensor": 2}, "tensor is 2, expected a divisor of 3"),
            (2, folder, {"tensor": 0}, "tensor is 0, expected a divisor of 2"),
            (2, tmp_path / "saved", {"tensor": 2}, "was packed already, and is not cut into shares"),
            (2, random_model("llama-tiny"), {"tensor": 2}, "was not loaded; pass the path of its files instead"),
            (5, folder, {"tensor": 5}, "4 heads, 2 of keys and values, expected some for each of 5 ranks")):
        with case(error), pytest.raises(ValueError, match=error):
            run_threads(lambda comm: parallel(source, comm, **options), n)  # noqa: B023
    with pytest.raises(TypeError, match="parallel: model is a int, expected a Model of one process, or a path"):
        parallel(3, nothing)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dtype is an argument of a path alone"):
        parallel(load(), nothing, dtype="int8")


def test_ranks_that_differ_are_told(tmp_path: Path) -> None:
    folder = golden("llama").write(tmp_path)
    for options in ("dtype", "exact"):
        def differ(comm: Comm, options: str = options) -> Model:
            own = {"dtype": ("int8", "float32")[comm.rank]} if options == "dtype" else {"exact": comm.rank == 0}
            return parallel(folder, comm, tensor=2, **own)

        with pytest.raises(ValueError, match="ranks do not agree"):
            run_threads(differ, 2)


def test_a_share_is_neither_saved_nor_pickled(tmp_path: Path) -> None:
    folder = golden("llama").write(tmp_path / "model")

    def use(m: Model) -> None:
        with pytest.raises(ValueError, match="Model.save"):
            m.save(tmp_path / "saved")
        with pytest.raises(TypeError, match="not loaded from a path"):
            pickle.dumps(m)
        assert copy.copy(m)._decoder is m._decoder and "of 2" in repr(m)

    on(2, folder, use)
    share = load_share(folder, SelfComm())
    with pytest.raises(ValueError, match="Model.save: the model is one rank's share"):
        share.save(tmp_path / "saved")


def test_an_error_of_one_rank_is_told_to_the_others(tmp_path: Path) -> None:
    """In a pass, whose sums the others await, and while loading."""
    folder = golden("llama").write(tmp_path)

    def fail(comm: Comm) -> Any:
        model = parallel(folder, comm, tensor=3)
        if comm.rank == 1:
            def broken(y: Any) -> None:
                raise OSError("no more")

            model._decoder._exchanges._summed = broken
            model._decoder._exchanges.sum.__init__(broken)
        return model.generate([1, 2, 3], 4)

    _, errors = run_threads_to_the_end(fail, 3)
    assert isinstance(errors[1], OSError)
    for r in (0, 2):
        assert isinstance(errors[r], RankError) and "rank 1" in str(errors[r]) and "no more" in str(errors[r])

    _, errors = run_threads_to_the_end(lambda comm: parallel(folder / "no" if comm.rank else folder, comm, tensor=2), 2)
    assert isinstance(errors[1], FileNotFoundError) and isinstance(errors[0], RankError)


def test_what_ranks_give_has_the_shape_that_is_awaited(tmp_path: Path) -> None:
    model = golden("llama")
    folder = model.write(tmp_path)
    share = load_share(folder, SelfComm())
    assert bits(share(model.ids)) == bits(load(folder)(model.ids))  # the only rank's is all of it
    ranks = share._decoder._model.ranks
    assert ranks is not None
    for wrong in (lambda y: y[:, :1], lambda y: y[:1]):
        ranks.__init__(wrong)  # type: ignore[misc]
        with pytest.raises(ValueError, match="Ranks: its result has shape"):
            share(model.ids)


def test_a_share_is_of_the_shapes_that_its_ranks_say() -> None:
    rng = np.random.default_rng(0)

    def w(k: int, n: int) -> Any:
        return pack(rng.standard_normal((k, n)).astype(np.float32))

    inner, columns = Ranks(lambda y: y, range(4, 12), 24), Ranks(lambda y: y, range(16, 32), 40)
    part = MLPPart((w(40, 8), w(40, 8)), w(24, 16), over=(inner, columns))
    assert part.hidden == 40
    assert MLPPart((w(40, 8), w(40, 8)), w(8, 40), over=(None, Ranks(lambda y: y))).hidden == 40
    with pytest.raises(ValueError, match=r"MLPPart: down has shape \(8, 40\), expected \(24, 16\)"):
        MLPPart((w(40, 8), w(40, 8)), w(8, 40), over=(inner, columns))
    with pytest.raises(TypeError):
        MLPPart((w(40, 8), w(40, 8)), w(24, 16), over=(inner, None))  # type: ignore[arg-type]


def test_random_models_have_shares() -> None:
    ids = random_tokens(512)[0][:, :9]
    want = random_model("llama-tiny")(ids).tobytes()
    assert run_threads(lambda comm: random_share("llama-tiny", comm)(ids).tobytes(), 2) == [want] * 2


# ---- processes ----


@needs_mpi
@pytest.mark.parametrize("n", [2, 3])
def test_processes_of_mpi_give_the_text_of_one(n: int, tmp_path: Path) -> None:
    run_mpi(f"""
        import numpy as np
        from forge_c.distributed import MPIComm, parallel
        from forge_c.models import load

        with MPIComm() as comm:
            whole = load()
            model = parallel(whole, comm, tensor={n})
            assert model.nbytes < 0.7 * whole.nbytes, (model.nbytes, whole.nbytes)
            ids = np.arange(300)[None] % 250
            assert np.array_equal(model(ids).view(np.uint32), whole(ids).view(np.uint32))
            assert model.generate("for i in ", 16) == whole.generate("for i in ", 16)
            sums = parallel(whole, comm, tensor={n}, exact=False)
            assert len(set(comm.all_gather(sums(ids).tobytes()))) == 1
        """, n, timeout=60)
