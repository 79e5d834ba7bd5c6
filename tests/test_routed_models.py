"""Models with routers on some layers (mixture of depths): against float64, in pieces and by tokens; their caches."""
from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference as ref
from child import run_script
from model_folder import small, tensors, write
from small_models import DYNAMIC, interrupted

from forge_c.models import Model, ModelCache, collect_importance, load, random_model
from forge_c.models.decoder import Decoder
from forge_c.models.spec import Routed, Router, model_spec
from forge_c.models.spec.document import from_document, to_document
from forge_c.models.weights import RandomCheckpoint
from forge_c.models.weights.random import shape_config
from forge_c.rotary import rope_table

ROUTED = (1, 3)
PREDICTED = {"router_mode": "predictor", "router_predictor_size": 8}
MODES: dict[str, dict[str, Any]] = {"threshold": {"router_threshold": [0.3, -0.2]}, "predictor": PREDICTED}


def config(**changes: Any) -> dict[str, Any]:
    return small("llama", model_type="mixture_of_depths", num_hidden_layers=5, **changes)


def weights(c: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Those of a LLaMA, embeddings as large as what layers add, and routers that choose about a half."""
    rng, found = np.random.default_rng(seed + 1), tensors(c, seed)
    found["model.embed_tokens.weight"] = (10 * found["model.embed_tokens.weight"]).astype(np.float32)
    hidden = c["hidden_size"]
    for i in c.get("routed_layers", ROUTED):
        at = f"model.layers.{i}.router"
        shapes: dict[str, tuple[int, ...]] = {f"{at}.weight": (1, hidden)}
        if c.get("router_mode") == "predictor":
            inner = c["router_predictor_size"]
            shapes |= {f"{at}.predictor.up.weight": (inner, hidden), f"{at}.predictor.up.bias": (inner,),
                       f"{at}.predictor.down.weight": (1, inner), f"{at}.predictor.down.bias": (1,)}
        for name, shape in shapes.items():
            found[name] = (rng.standard_normal(shape) * 0.3).astype(np.float32)
    return found


def made(folder: Path, mode: str = "threshold", **changes: Any) -> Model:
    c = config(**MODES[mode] | changes)
    return load(write(folder, c, weights(c)))


@pytest.fixture(scope="module", params=list(MODES))
def model(request, tmp_path_factory) -> Model:
    return made(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def ids() -> Any:
    return np.random.default_rng(7).integers(0, 97, (2, 330))


def reference(c: dict[str, Any], w: dict[str, Any], ids: Any) -> tuple[Any, list[Any]]:
    """(logits of one text in float64, which tokens go through each routed layer)."""
    heads, groups, hidden = c["num_attention_heads"], c["num_key_value_heads"], c["hidden_size"]
    d, eps = hidden // heads, 1e-6
    table = rope_table(d, len(ids))
    thresholds = dict(zip(c.get("routed_layers", ROUTED), c.get("router_threshold", ()), strict=False))
    went = []

    def block(at: str, x: Any, positions: Any) -> Any:
        def product(y: Any, name: str) -> Any:
            return y @ ref.f64(w[f"{at}{name}.weight"]).T

        n = len(x)
        y = ref.rms_norm(x, w[f"{at}input_layernorm.weight"], eps)
        q, k, v = (product(y, f"self_attn.{p}_proj").reshape(1, n, -1, d) for p in "qkv")
        q, k = (ref.rope(z, table.cos, table.sin, positions) for z in (q, k))
        assert q.shape[2] == heads and k.shape[2] == groups
        h = x + product(ref.attention(q, k, v, causal=True)[0].reshape(n, -1), "self_attn.o_proj")
        y = ref.rms_norm(h, w[f"{at}post_attention_layernorm.weight"], eps)
        return h + product(ref.swiglu(product(y, "mlp.gate_proj"), product(y, "mlp.up_proj")), "mlp.down_proj")

    x = ref.f64(w["model.embed_tokens.weight"])[ids]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        if f"{at}router.weight" not in w:
            x = block(at, x, np.arange(len(ids)))
            continue
        router, p = ref.f64(w[f"{at}router.weight"])[0], f"{at}router.predictor."
        if f"{p}up.weight" in w:
            inner = ref.silu(ref.linear(x, w[f"{p}up.weight"].T, w[f"{p}up.bias"]))
            chosen = inner @ ref.f64(w[f"{p}down.weight"])[0] + w[f"{p}down.bias"][0] > 0
        else:
            chosen = x @ router > thresholds[i]
        went.append(np.flatnonzero(chosen))
        x = ref.mixture_of_depths(x[None], router, lambda y, positions, at=at: block(at, y, positions), chosen[None])[0]
    return ref.rms_norm(x, w["model.norm.weight"], eps) @ ref.f64(w["lm_head.weight"]).T, went


# ---- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_formula(isa, tmp_path, mode):
    c = config(**MODES[mode])
    w, ids = weights(c), np.random.default_rng(3).integers(0, 97, 60)
    model, (want, went) = load(write(tmp_path, c, w)), reference(c, w, ids)
    cache = model.new_cache()
    got = model(ids[None], cache)[0]
    assert all(0 < len(rows) < 60 for rows in went)
    for i, rows in zip(ROUTED, went, strict=True):
        np.testing.assert_array_equal(cache.layers[i].positions[0], rows)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_whole_pieces_tokens_and_rows(isa, model, ids):
    whole = model(ids)
    for cuts in ([0, 3, 20, 21, 330], [*range(10), 330], [0, 310, *range(311, 331)]):
        cache = model.new_cache(2, 330)
        parts = [model(ids[:, a:b], cache) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        assert np.concatenate(parts, axis=1).tobytes() == whole.tobytes()
    for row in range(2):
        assert model(ids[row : row + 1]).tobytes() == whole[row].tobytes()


def test_more_tokens_than_a_page_go_through(tmp_path):
    model, ids = made(tmp_path, router_threshold=-1.0), np.random.default_rng(1).integers(0, 97, (2, 600))
    cache, whole = model.new_cache(2, 600), model(ids)
    parts = [model(ids[:, a : a + 75], cache) for a in range(0, 600, 75)]
    assert np.concatenate(parts, axis=1).tobytes() == whole.tobytes()
    assert 256 < cache.layers[1].lengths.min() < cache.layers[1].lengths.max() < 600


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(model, ids, threads, each_thread_count):
    whole = model(ids[:, :80])
    for _ in each_thread_count():
        assert model(ids[:, :80]).tobytes() == whole.tobytes()


def test_a_threshold_that_lets_all_through_with_gates_of_1_is_the_dense_model(tmp_path, ids):
    """The router reads a channel that is 1 in every embedding and that no layer adds to."""
    c = config(router_threshold=0.5)
    w = weights(c)
    w["model.embed_tokens.weight"][:, 0] = 1
    for name in w:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            w[name][0] = 0
        if name.endswith("router.weight"):
            w[name] = np.eye(32, dtype=np.float32)[:1]
    dense = {name: value for name, value in w.items() if "router" not in name}
    routed = load(write(tmp_path / "a", c, w))
    plain = load(write(tmp_path / "b", small("llama", num_hidden_layers=5), dense))
    cache = routed.new_cache(2, 330)
    np.testing.assert_array_equal(routed(ids, cache), plain(ids))
    assert cache.layers[1].lengths.tolist() == [330, 330]


def test_one_that_lets_nobody_through_is_the_model_without_those_layers(tmp_path, ids):
    c = config(router_threshold=1e6)
    w = weights(c)
    kept = {name: value for name, value in w.items() if not any(f"layers.{i}." in name for i in ROUTED)}
    for new, old in enumerate((0, 2, 4)):
        kept = {name.replace(f"layers.{old}.", f"layers.{new}."): value for name, value in kept.items()}
    shallow = load(write(tmp_path / "b", small("llama", num_hidden_layers=3), kept))
    assert load(write(tmp_path / "a", c, w))(ids).tobytes() == shallow(ids).tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4", "q4_k"])
def test_formats(isa, tmp_path, dtype):
    """The router's and the predictor's numbers stay as they are; int4 weighs errors by tokens that go through."""
    for mode in MODES:
        model = made(tmp_path / mode, mode, hidden_size=64, num_attention_heads=8)
        small = load(tmp_path / mode, dtype)
        tokens = np.random.default_rng(1).integers(0, 97, (1, 70))
        got, want = small(tokens), model(tokens)
        assert np.isfinite(got).all() and small.nbytes < model.nbytes
        cache = small.new_cache(1, 70)
        assert small(tokens[:, :50], cache).tobytes() == got[:, :50].tobytes()
        assert small(tokens[:, 50:], cache).tobytes() == got[:, 50:].tobytes()
        if dtype == "bfloat16":
            assert np.median(np.abs(got - want)) < 0.1 * np.median(np.abs(want))  # few choose otherwise


def test_importance_is_of_the_tokens_that_go_through(tmp_path):
    for mode in MODES:
        c = config(**MODES[mode])
        w, ids = weights(c), np.random.default_rng(3).integers(0, 97, 60)
        found = collect_importance(write(tmp_path / mode, c, w), [ids])
        _, went = reference(c, w, ids)
        few = dict(found)
        assert all(name.startswith("model.layers.") and "router" not in name for name in few)
        dense = found["model.layers.0.self_attn.q_proj.weight"].mean()  # of normed inputs: about 1
        share = len(went[0]) / 60
        routed = found["model.layers.1.self_attn.q_proj.weight"].mean()
        assert abs(routed / dense - share) < 0.1
        assert load(tmp_path / mode, "int4", importance=found)(ids[None]).shape == (1, 60, 97)


def test_a_random_model_sends_an_eighth_through():
    """Whatever the text, also one that it writes."""
    model, rng = random_model("llama-tiny-mod"), np.random.default_rng(0)
    cache = model.new_cache(3, 1000)
    model(rng.integers(0, 512, (3, 1000)), cache)
    for layer in (cache.layers[1], cache.layers[3]):
        assert ((90 < layer.lengths) & (layer.lengths < 160)).all()
    assert [layer.router is not None for layer in model.config.layers] == [False, True] * 2
    large = model_spec(shape_config("llama-1.1b-mod"))
    assert [layer.router for layer in large.layers] == [None, Router(1.33)] * 11
    plain = model_spec(shape_config("llama-1.1b"))
    assert [replace(layer, router=None) for layer in large.layers] == list(plain.layers)


# ---- what it reads ---------------------------------------------------------------------------------------------------


def test_a_layer_that_nobody_goes_through_is_not_read(tmp_path):
    """Its matrices lie on pages that kill the process which touches them. Then tokens that do go through are let."""
    c = config(routed_layers=[1], router_threshold=0.0, hidden_size=512, intermediate_size=1024)
    w = weights(c)
    router = w["model.layers.1.router.weight"]
    router[:] = 0
    router[0, 0] = 1
    w["model.embed_tokens.weight"][:, 0] = np.where(np.arange(97) < 50, -1000, 1000)  # tokens from 50 on go through
    write(tmp_path, c, w)
    script = f"""
        import ctypes, mmap
        import numpy as np
        from forge_c.functional import set_num_threads
        from forge_c.models import load
        from forge_c.models.saved import packed_weights
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        model = load({str(tmp_path)!r})
        class One: parts = list(model._decoder._model.held[1][:2]); embedding = head = None
        def forbid(protection):
            total = 0
            for weight in packed_weights(One):
                start = -(-weight.data.ctypes.data // 4096) * 4096
                size = (weight.data.ctypes.data + weight.data.nbytes - start) // 4096 * 4096
                assert size > 0 and libc.mprotect(start, size, protection) == 0
                total += size
            return total
        cache = model.new_cache(2)
        first = model(np.full((2, 5), 60), cache)
        assert cache.layers[1].lengths.tolist() == [5, 5]
        forbidden = forbid(0)
        for token in (3, 7, 49):
            model([[token], [token + 1 if token < 49 else 0]], cache)
        model(np.full((2, 300), 11), cache)
        assert cache.layers[1].lengths.tolist() == [5, 5] and cache.seq_len == 308
        forbid(mmap.PROT_READ | mmap.PROT_WRITE)
        model([[60], [3]], cache)
        assert cache.layers[1].lengths.tolist() == [6, 5]
        print(forbidden, sum(part.nbytes for part in One.parts), flush=True)
        forbid(0)
        model([[60], [3]], cache)
    """
    out = run_script(script, expect=-11)
    forbidden, layer = map(int, out.split()[:2])
    assert layer > 9_000_000 and forbidden > 0.99 * layer


def test_bytes_of_a_step(tmp_path):
    """step_nbytes says the most that a step may read; what it does read follows from who went through."""
    model = made(tmp_path)
    decoder, cache = model._decoder, model.new_cache()
    layers = {i: sum(part.nbytes for part in decoder._model.held[i][:2]) for i in ROUTED}
    router = decoder._model.held[1][4].nbytes
    assert router == 32 * 4 and all(layers[i] > 100 * router for i in ROUTED)
    read = []
    for token in range(60):
        before = {i: int(cache.layers[i].lengths[0]) for i in ROUTED}
        model([[token]], cache)
        read.append(decoder.step_nbytes - sum(layers[i] for i in ROUTED if cache.layers[i].lengths[0] == before[i]))
    went = sum(int(cache.layers[i].lengths[0]) for i in ROUTED)
    assert min(read) == decoder.step_nbytes - sum(layers.values()) < max(read) <= decoder.step_nbytes
    assert sum(read) == 60 * decoder.step_nbytes - (120 - went) * layers[1]


def test_the_cache_takes_the_memory_of_what_went_through(tmp_path):
    model, ids = made(tmp_path, router_threshold=4.0), np.random.default_rng(0).integers(0, 97, (1, 2000))
    cache = model.new_cache(1, 100_000)
    model(ids, cache)
    dense, routed = cache.layers[0], cache.layers[1]
    assert 20 < routed.lengths[0] < 500 and routed.held_nbytes < 0.3 * 2048 * dense.nbytes / dense.max_seq_len
    assert routed.nbytes == dense.nbytes + 8 * 100_000 and cache.nbytes > routed.nbytes
    assert routed.dtype == "float32" and repr(routed).startswith("RoutedCache(lengths=[")


# ---- its caches ------------------------------------------------------------------------------------------------------


def test_a_truncated_cache_goes_on_as_if_the_rest_had_never_been(model, ids):
    whole, cache = model(ids), model.new_cache(2, 330)
    model(ids[::-1], cache)
    cache.truncate(0)
    model(ids[:, :200], cache)
    cache.truncate([100, 150])
    assert model(ids[:, 100:150], cache)[0].tobytes() == whole[0, 100:150].tobytes()
    cache.truncate(0)
    for stop in (40, 41, 7, 6, 1):
        model(ids[:, : stop + 3], cache)
        cache.truncate(stop)
        assert all(at[-1] < stop for i in ROUTED for at in cache.layers[i].positions if len(at))
        assert model(ids[:, stop:], cache).tobytes() == whole[:, stop:].tobytes()
        cache.truncate(0)


def test_an_error_rolls_every_layer_back(model, ids):
    cache = model.new_cache(2, 330)
    model(ids[:, :10], cache)
    with interrupted(model):
        model(ids[:, 10:30], cache)
    assert cache.lengths.tolist() == [10, 10]
    assert model(ids[:, 10:], cache).tobytes() == model(ids)[:, 10:].tobytes()


@pytest.mark.parametrize("remake", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))],
                         ids=["copy", "deepcopy", "pickle"])
def test_forks_and_copies_go_their_own_ways(model, ids, remake):
    whole, cache = model(ids), model.new_cache(2, 330)
    model(ids[:, :300], cache)
    fork, twin = cache.fork(2), remake(cache)
    model(ids[:, 300:310][:, ::-1], cache)
    model(np.repeat(ids[:, :5], 2, axis=0), fork)
    fork.truncate(300)
    for other, rows in ((fork, [0, 0, 1, 1]), (twin, [0, 1])):
        assert model(ids[rows, 300:], other).tobytes() == whole[rows, 300:].tobytes()


def test_a_pages_fork_after_a_truncation(tmp_path):
    """Of more than a page: what is shared is not written to."""
    model, ids = made(tmp_path, router_threshold=-5.0), np.random.default_rng(1).integers(0, 97, (1, 700))
    whole, cache = model(ids), model.new_cache(1, 700)
    model(ids[:, :600], cache)
    fork = cache.fork(2)
    cache.truncate(40)
    model(ids[:, 100:300], cache)
    assert model(np.repeat(ids[:, 600:], 2, axis=0), fork)[1].tobytes() == whole[0, 600:].tobytes()


def test_rows_share_what_they_hold(model, ids):
    cache = model.new_cache(2, 330)
    for row in range(2):
        model(ids[row : row + 1, : 250 + 30 * row], cache.row(row))
    model(ids[:1, 250:280], cache.row(0))
    assert cache.lengths.tolist() == [280, 280]
    assert model(ids[:, 280:], cache).tobytes() == model(ids)[:, 280:].tobytes()
    cache.row(1).truncate(100)
    assert cache.lengths.tolist() == [330, 100]
    assert model(ids[1:, 100:], cache.row(1)).tobytes() == model(ids)[1, 100:].tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_saved_cache_goes_on(model, ids, tmp_path, dtype):
    cache = model.new_cache(2, 330, dtype=dtype)
    model(ids[:, :130], cache)
    cache.truncate([100, 130])
    cache.save(tmp_path / "cache")
    found = ModelCache.load(tmp_path / "cache", model)
    assert found.layers[1].dtype == dtype and found.lengths.tolist() == [100, 130]
    for i in ROUTED:
        assert [a.tolist() for a in found.layers[i].positions] == [a.tolist() for a in cache.layers[i].positions]
    assert model(ids[:, 200:], found).tobytes() == model(ids[:, 200:], cache).tobytes()


DAMAGES = {"short": lambda a: a[:-1], "long": lambda a: np.append(a, 999), "none": lambda a: a[:0],
           "not ascending": lambda a: a[::-1], "twice": lambda a: np.repeat(a[:1], len(a)),
           "negative": lambda a: a - a[0] - 1, "beyond the tokens": lambda a: np.append(a[:-1], 50),
           "beyond the room": lambda a: np.append(a[:-1], 2 ** 40)}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_positions_are_an_error(model, ids, tmp_path, case):
    cache = model.new_cache(1, 330)
    model(ids[:1, :50], cache)
    cache.save(tmp_path / "cache")
    path = tmp_path / "cache" / "layer-0001.positions.i64"
    held = np.fromfile(path, "<i8")
    assert held.tolist() == cache.layers[1].positions[0].tolist() and len(held) > 2
    DAMAGES[case](held).astype("<i8").tofile(path)
    with pytest.raises(ValueError, match=r"ModelCache.load: .* is damaged"):
        ModelCache.load(tmp_path / "cache", model)


def test_a_cache_of_other_routers_is_refused(tmp_path, ids):
    model, other = made(tmp_path / "a"), made(tmp_path / "b", router_threshold=0.0)
    plain = load(write(tmp_path / "c", small("llama", num_hidden_layers=5)))
    for wrong in (other, plain):
        with pytest.raises(ValueError, match="model: cache is one of another model"):
            model(ids, wrong.new_cache(2, 330))
    model.new_cache(2, 330).save(tmp_path / "cache")
    with pytest.raises(ValueError, match="layers differ"):
        ModelCache.load(tmp_path / "cache", other)


def test_generation(model, ids):
    together = model.generate(list(ids[:, :40]), 24)
    for row in range(2):
        assert model.generate(ids[row, :40], 24).tolist() == together[row].tolist()
        text = ids[row, :40].tolist()
        for _ in range(24):
            text.append(int(model([text])[0, -1].argmax()))
        assert text[40:] == together[row].tolist()
    drawn = model.generate(ids[0, :40], 12, n=3, temperature=1.0, seed=5)
    alone = model.generate(ids[0, :40], 12, temperature=1.0, seed=5)
    assert drawn[0].tolist() == alone.tolist()
    cache = model.new_cache(2, 330)
    model.generate(list(ids[:, :40]), 12, cache=cache)
    assert cache.lengths.tolist() == [51, 51] or cache.lengths.tolist() == [52, 52]
    unequal = model.generate([ids[0, :40], ids[1, :13]], 12)
    assert unequal[1].tolist() == model.generate(ids[1, :13], 12).tolist()


def test_angles_that_follow_from_the_length(tmp_path):
    model = made(tmp_path, **DYNAMIC)
    ids = np.random.default_rng(2).integers(0, 97, (1, 40))
    cache = model.new_cache(1, 40)
    for i in range(40):
        last = model(ids[:, i : i + 1], cache)
    assert np.isfinite(last).all()
    cache, whole = model.new_cache(1, 40), model(ids)
    with cache.expecting(40):
        parts = [model(ids[:, a : a + 8], cache) for a in range(0, 40, 8)]
    assert np.concatenate(parts, axis=1).tobytes() == whole.tobytes()


# ---- windows, parallel layers, norms behind parts: specs that no config.json makes --------------------------------


def of_spec(**changes: Any) -> Model:
    """llama-tiny with six layers, of which routers choose about a half."""
    tiny = model_spec(shape_config("llama-tiny"))
    plain = replace(tiny.layers[0], **{k: v for k, v in changes.items() if k != "window"})
    if "window" in changes:
        plain = replace(plain, mixer=replace(plain.mixer, window=changes["window"]))
    layers = tuple(replace(plain, router=Router() if i % 2 else None) for i in range(6))
    return Model(Decoder(replace(tiny, layers=layers), RandomCheckpoint(), "float32"), None, frozenset())


@pytest.mark.parametrize("changes", [{"window": 9}, {"window": 300}, {"parallel": True}, {"norms": "both"},
                                     {"residual_scale": 0.3}], ids=str)
def test_other_layers(changes):
    model, ids = of_spec(**changes), np.random.default_rng(0).integers(0, 512, (2, 700))
    whole = model(ids)
    cache, cuts = model.new_cache(2, 700), [0, 1, 2, 30, 280, 281, 640, *range(641, 651), 700]
    parts = [model(ids[:, a:b], cache) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    assert np.concatenate(parts, axis=1).tobytes() == whole.tobytes()
    assert all(100 < n < 700 for i in (1, 3, 5) for n in cache.layers[i].lengths)
    cache.truncate(695)
    assert model(ids[:, 695:], cache).tobytes() == whole[:, 695:].tobytes()
    if changes == {"window": 9}:
        with pytest.raises(ValueError, match="KVCache.truncate: row 0 cannot go back to"):
            cache.truncate(5)
        assert cache.lengths.tolist() == [700, 700]


def test_a_window_counts_positions_and_not_tokens_that_went_through():
    """With a window of 1 a token sees itself alone; with one of 2 only a neighbour that went through as well."""
    ids, found = np.random.default_rng(0).integers(0, 512, (1, 60)), []
    tiny = model_spec(shape_config("llama-tiny"))
    layer = replace(tiny.layers[0], router=Router())
    for window in (1, 2):
        routed = replace(layer, mixer=replace(layer.mixer, window=window))
        model = Model(Decoder(replace(tiny, layers=(routed,)), RandomCheckpoint(), "float32"), None, frozenset())
        cache = model.new_cache(1, 60)
        found.append(model(ids, cache)[0])
    at = cache.layers[0].positions[0]
    apart = np.array([p for p in at if p - 1 not in at])
    beside = np.array([p for p in at if p - 1 in at])
    assert len(apart) > 5 and len(beside) > 5
    np.testing.assert_array_equal(found[0][apart], found[1][apart])
    assert (found[0][beside] != found[1][beside]).any(axis=1).all()


def test_a_router_is_around_attention():
    tiny = model_spec(shape_config("llama-tiny"))
    layers = (replace(tiny.layers[0], mixer=None, router=Router()),)
    with pytest.raises(ValueError, match="LayeredModel: a layer has .*Router.*, expected a Router of 64 channels, ar"):
        Decoder(replace(tiny, layers=layers), RandomCheckpoint(), "float32")


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_a_packed_model_is_the_same(model, ids, tmp_path, dtype):
    mode = "predictor" if model.config.layers[1].router.predictor else "threshold"
    made(tmp_path / "model", mode)
    loaded = load(tmp_path / "model", dtype)
    loaded.save(tmp_path / "packed")
    packed = load(tmp_path / "packed")
    assert packed.config == loaded.config and packed.nbytes == loaded.nbytes
    assert packed(ids).tobytes() == loaded(ids).tobytes()
    text = json.loads((tmp_path / "packed" / "forge_c.json").read_text())
    text["spec"]["layers"][1]["router"]["threshold"] = 0.7
    (tmp_path / "packed" / "forge_c.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match=r"is damaged: layer 1 has a router of"):
        load(tmp_path / "packed")


def test_a_spec_as_a_document(model):
    document = json.loads(json.dumps(to_document(model.config)))
    assert from_document(document) == model.config
    assert "router" not in document["layers"][0] and "router" in document["layers"][1]
    for wrong in ({"threshold": 0.0}, {"threshold": 0.0, "predictor": 0}, {"threshold": "x", "predictor": None},
                  {"threshold": 0.0, "predictor": None, "more": 1}, 3):
        document["layers"][1]["router"] = wrong
        with pytest.raises(ValueError, match=r"spec.layers\[1\].router"):
            from_document(document)


def test_the_config():
    spec = model_spec(config(router_threshold=0.25))
    plain = model_spec(small("llama", num_hidden_layers=5))
    assert [layer.router for layer in spec.layers] == [None, Router(0.25), None, Router(0.25), None]
    assert replace(spec, layers=plain.layers, model_type="llama") == plain
    assert [replace(layer, router=None) for layer in spec.layers] == list(plain.layers)
    assert spec.layers[1].remembers == (Routed(plain.layers[1].mixer, Router(0.25)),)
    routers = [layer.router for layer in model_spec(config(routed_layers=[0, 4], router_threshold=[1, -2.5])).layers]
    assert routers == [Router(1.0), None, None, None, Router(-2.5)]
    assert model_spec(config(**PREDICTED)).layers[3].router == Router(predictor=8)
    assert model_spec(config(router_mode="predictor")).layers[3].router == Router(predictor=16)
    assert model_spec(config(routed_layers=[])).layers == plain.layers


@pytest.mark.parametrize(("changes", "reason"), [
    ({"router_mode": "topk"}, "router_mode is 'topk', expected one of threshold, predictor: topk chooses among"),
    ({"router_mode": None}, "router_mode is None, expected one of"),
    ({"routed_layers": [5]}, r"routed_layers is \[5\], expected layers from 0 to 4, ascending"),
    ({"routed_layers": [3, 1]}, "routed_layers is"), ({"routed_layers": [1, 1]}, "routed_layers is"),
    ({"routed_layers": 1}, "routed_layers is 1"), ({"routed_layers": [True]}, r"routed_layers is \[True\]"),
    ({"router_threshold": [0.0]}, r"router_threshold is \[0.0\], expected a number, or one for each of 2"),
    ({"router_threshold": "0"}, "router_threshold is '0'"),
    ({"router_threshold": float("nan")}, "router_threshold is nan"),
    ({"router_threshold": None}, "router_threshold is None"),
    ({"router_capacity": 0}, "router_capacity is 0, expected a number above 0 and at most 1"),
    ({"router_capacity": 1.5}, "router_capacity is 1.5"),
    ({"router_mode": "predictor", "router_predictor_size": 0}, "router_predictor_size is 0, expected an integer"),
    ({"router_bias": 1.0}, "router_bias is 1.0, which may change the maths"),
])
def test_configs_that_are_refused(changes, reason):
    with pytest.raises(ValueError, match=f"^config.json: {reason}"):
        model_spec(config(**changes))


def test_a_llama_has_no_routers():
    with pytest.raises(ValueError, match="router_mode is 'threshold', which may change the maths"):
        model_spec(small("llama", router_mode="threshold"))


def test_missing_and_odd_tensors(tmp_path):
    c = config()
    w = weights(c)
    for name, change in (("lacks", {"model.layers.1.router.weight": None}),
                         ("shape", {"model.layers.3.router.weight": np.ones((32, 1), np.float32)}),
                         ("more", {"model.layers.2.router.weight": np.ones((1, 32), np.float32)})):
        folder = write(tmp_path / name, c, {k: v for k, v in (w | change).items() if v is not None})
        with pytest.raises(ValueError, match=next(iter(change))):
            load(folder)


def test_a_prompt_is_read_in_passes_of_several_pages(tmp_path):
    """So that an eighth of a pass is many rows; bits do not depend on it. A ring takes a page at a time."""
    model, ids = made(tmp_path), np.random.default_rng(5).integers(0, 97, (1, 2100))
    assert model._decoder.pass_tokens == 1024 and of_spec(window=9)._decoder.pass_tokens == 256
    assert load()._decoder.pass_tokens == 256
    first, second = model.new_cache(1, 2100), model.new_cache(1, 2100)
    last = model(ids, first, last_only=True)
    assert last.tobytes() == model(ids, second)[:, -1:].tobytes()
    for a, b in zip(first.layers, second.layers, strict=True):
        for left, right in zip(a.kv if hasattr(a, "kv") else a, b.kv if hasattr(b, "kv") else b, strict=True):
            assert left.tobytes() == right.tobytes()
