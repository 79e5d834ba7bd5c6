"""A model's state: a kind of layer from outside runs among the others, and a cache goes to files and back."""
from __future__ import annotations

import copy
import json
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import golden_models
import numpy as np
import pytest
from model_folder import small, write
from numpy.typing import NDArray
from small_models import ANGLES_BY_LENGTH, interrupted

from forge_c.functional import AttentionState, CalledPart, LayeredModel, Part, StateTable
from forge_c.models import Model, ModelCache, load
from forge_c.models.decoder import Decoder
from forge_c.models.parts import LayerSource, build_part, new_state
from forge_c.models.spec import MLP, LayerSpec, ModelSpec, Norm, model_spec
from forge_c.models.weights import RandomCheckpoint
from forge_c.models.weights.random import shape_config
from forge_c.state.kv import KVCache

Array = NDArray[Any]

# ---- a kind of layer in 50 lines: h = gate * (decay h + x), y = h, with one vector of state a row -------------------


@dataclass(frozen=True)
class GatedIdentity:
    decay: float


class GatedIdentityState:
    told_by_lengths = False

    def __init__(self, rows: int, width: int) -> None:
        self.snapshots = [{0: np.zeros(width, np.float32)} for _ in range(rows)]  # tokens -> the vector after them

    @property
    def nbytes(self) -> int:
        return sum(v.nbytes for row in self.snapshots for v in row.values())

    def reserve(self, start: Array, stop: Array) -> None: ...

    def commit(self, stop: Array) -> None: ...

    def check_truncate(self, keep: Array) -> None: ...

    def truncate(self, keep: Array) -> None:
        for row, n in zip(self.snapshots, keep, strict=True):
            for later in [tokens for tokens in row if tokens > n]:
                del row[later]

    rollback = truncate

    def _of(self, snapshots: list[dict[int, Array]]) -> GatedIdentityState:
        other = copy.copy(self)
        other.snapshots = snapshots
        return other

    def row(self, i: int) -> GatedIdentityState:
        return self._of(self.snapshots[i : i + 1])

    def fork(self, n: int) -> GatedIdentityState:
        return self._of([dict(row) for row in self.snapshots for _ in range(n)])

    def copy(self) -> GatedIdentityState:
        return self.fork(1)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps([{n: v.tolist() for n, v in row.items()} for row in self.snapshots]))

    def restore(self, path: Path) -> None:
        rows = json.loads(path.read_text())
        self.snapshots = [{int(n): np.array(v, np.float32) for n, v in row.items()} for row in rows]


@new_state.register
def _(kind: GatedIdentity, batch: int, max_seq_len: int, dtype: str) -> GatedIdentityState:
    return GatedIdentityState(batch, 64)


@build_part.register
def _(kind: GatedIdentity, source: LayerSource, norms: Any) -> Part:
    gate = source.vector("gate.weight", source.hidden)

    def step(x: Array, state: GatedIdentityState, start: Array) -> Array:
        out = np.empty_like(x)
        for b, row in enumerate(state.snapshots):
            h = row[int(start[b])]
            for t in range(x.shape[1]):
                h = row[int(start[b]) + t + 1] = out[b, t] = gate * (np.float32(kind.decay) * h + x[b, t])
        return out

    norm, post_norm = norms()
    return CalledPart(source.hidden, step, norm=norm, post_norm=post_norm)


# ---- what it goes through ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Model:
    """Attention, the toy and attention again."""
    spec = model_spec(shape_config("llama-tiny"))
    layers = (spec.layers[0], replace(spec.layers[0], mixer=GatedIdentity(0.5)), spec.layers[1])
    return Model(Decoder(replace(spec, layers=layers), RandomCheckpoint(), "float32"), None, frozenset())


@pytest.fixture
def ids() -> Array:
    return np.random.default_rng(0).integers(0, 512, (2, 300))


def test_a_kind_from_outside_counts(model, ids):
    """Without it the logits are others."""
    spec = replace(model.config, layers=model.config.layers[::2])
    other = Model(Decoder(spec, RandomCheckpoint(), "float32"), None, frozenset())
    assert np.abs(other(ids) - model(ids)).max() > 1e-3


def test_chunks_tokens_and_rows_give_the_bytes_of_the_whole(model, ids):
    whole = model(ids)
    for cuts in ([0, 3, 20, 21, 300], [*range(0, 10), 300]):
        cache = model.new_cache(2, 300)
        parts = [model(ids[:, a:b], cache) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        assert np.concatenate(parts, axis=1).tobytes() == whole.tobytes()
    for row in range(2):
        assert model(ids[row : row + 1]).tobytes() == whole[row].tobytes()


def test_a_truncated_cache_goes_on_as_if_the_rest_had_never_been(model, ids):
    whole, cache = model(ids), model.new_cache(2, 300)
    model(ids[::-1], cache)
    cache.truncate(0)
    model(ids[:, :200], cache)
    cache.truncate([100, 150])
    rest = model(ids[:, 100:150], cache)
    assert rest[0].tobytes() == whole[0, 100:150].tobytes()


def test_an_error_rolls_every_layer_back(model, ids):
    cache = model.new_cache(2, 300)
    model(ids[:, :10], cache)
    with interrupted(model):
        model(ids[:, 10:30], cache)
    assert cache.lengths.tolist() == [10, 10]
    assert model(ids[:, 10:], cache).tobytes() == model(ids)[:, 10:].tobytes()


def test_an_error_of_the_part_itself_is_the_callers(model, ids, monkeypatch):
    cache = model.new_cache(2, 300)
    monkeypatch.setattr(GatedIdentityState, "snapshots", property(lambda self: 1 / 0), raising=False)
    with pytest.raises(ZeroDivisionError):
        model(ids[:, :5], cache)
    assert cache.lengths.tolist() == [0, 0]


def test_forks_and_copies_go_their_own_ways(model, ids):
    whole, cache = model(ids), model.new_cache(2, 300)
    model(ids[:, :260], cache)
    fork, twin = cache.fork(2), copy.deepcopy(cache)
    model(ids[:, 260:270][:, ::-1], cache)
    model(np.repeat(ids[:, :5], 2, axis=0), fork)
    fork.truncate(260)
    for other, rows in ((fork, [0, 0, 1, 1]), (twin, [0, 1])):
        assert model(ids[rows, 260:], other).tobytes() == whole[rows, 260:].tobytes()


def test_generation_and_rows(model, ids):
    """Rows share memory and lengths with the cache that they are of."""
    together = model.generate(list(ids[:, :40]), 12)
    for row in range(2):
        assert model.generate(ids[row, :40], 12).tolist() == together[row].tolist()
    cache = model.new_cache(2, 300)
    for row in range(2):
        model(ids[row : row + 1, :290], cache.row(row))
    assert cache.lengths.tolist() == [290, 290]
    assert model(ids[:, 290:], cache).tobytes() == model(ids)[:, 290:].tobytes()


# ---- files -------------------------------------------------------------------------------------------------------


def golden(name: str, folder: Path) -> tuple[Model, Array]:
    case = golden_models.golden(name)
    return load(case.write(folder)), np.tile(case.ids, (1, 1 + 280 // case.ids.shape[1]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_saved_cache_goes_on_where_it_was(name, dtype, tmp_path):
    model, ids = golden(name, tmp_path / "m")
    cache = model.new_cache(len(ids), 400, dtype=dtype)
    model(ids, cache)
    cache.save(tmp_path / "cache")
    found = ModelCache.load(tmp_path / "cache", model)
    assert found.lengths.tolist() == cache.lengths.tolist() and found.max_seq_len == 400
    assert model(ids[:, :3], found).tobytes() == model(ids[:, :3], cache).tobytes()


def test_a_saved_toy_goes_on(model, ids, tmp_path):
    cache = model.new_cache(2, 300)
    model(ids[:, :30], cache)
    cache.save(tmp_path / "cache")
    found = ModelCache.load(tmp_path / "cache", model)
    assert model(ids[:, 30:], found).tobytes() == model(ids)[:, 30:].tobytes()


def test_save_keeps_what_is_there_and_leaves_nothing_half(model, ids, tmp_path, monkeypatch):
    cache = model.new_cache(2, 300)
    cache.save(tmp_path / "cache")
    with pytest.raises(FileExistsError, match="ModelCache.save"):
        cache.save(tmp_path / "cache")
    monkeypatch.setattr(GatedIdentityState, "save", lambda self, path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache.save(tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


DAMAGED: dict[str, Any] = {
    "format": {"format": "x"}, "version": {"version": 7}, "no lengths": {"lengths": None}, "texts": {"lengths": ["a"]},
    "negative": {"lengths": [-1, 3]}, "too long": {"lengths": [999, 3]}, "rows": {"lengths": [1, 2, 3]},
    "no rows": {"lengths": [], "written": []}, "room": {"max_seq_len": "x"}, "huge": {"lengths": [2 ** 70, 1]},
    "fraction": {"max_seq_len": 300.5}, "other room": {"max_seq_len": 301}, "endless": {"max_seq_len": 2 ** 40},
    "other rows": {"lengths": [0] * 3, "written": [0] * 3}, "truth": {"lengths": [False, 0]},
    "not what the layers hold": {"lengths": [9, 9], "written": [9, 9]}, "nor have held": {"written": [9, 9]}}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_header_is_an_error(model, tmp_path, case):
    model.new_cache(2, 300).save(tmp_path / "cache")
    path = tmp_path / "cache" / "cache.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | DAMAGED[case]))
    with pytest.raises(ValueError, match=r"ModelCache.load: .*cache (is damaged|is no ModelCache)"):
        ModelCache.load(tmp_path / "cache", model)


def test_another_models_cache_is_refused(model, tmp_path):
    other, _ = golden("llama", tmp_path / "m")
    model.new_cache(2, 300).save(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"ModelCache.load: .*cache is of a model whose layers differ"):
        ModelCache.load(tmp_path / "cache", other)


def test_a_saved_cache_knows_its_angles(tmp_path):
    """Equal sizes and another theta: the keys were rotated by other angles."""
    case = golden_models.golden("llama")
    model = load(case.write(tmp_path / "m"))
    turned = replace(case, config=case.config | {"rope_parameters": {"rope_theta": 12345.0}})
    other = load(turned.write(tmp_path / "other"))
    model.new_cache().save(tmp_path / "cache")
    assert ModelCache.load(tmp_path / "cache", load(tmp_path / "m")).batch == 1
    with pytest.raises(ValueError, match="layers differ"):
        ModelCache.load(tmp_path / "cache", other)


@pytest.mark.parametrize("remake", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_copy_goes_its_own_way(name, remake, tmp_path):
    model, ids = golden(name, tmp_path)
    cache = model.new_cache(len(ids), 400, dtype="int8")
    model(ids, cache)
    twin, before = remake(cache), cache.ids
    assert repr(twin) == repr(cache) and twin.layers[0] is not cache.layers[0]
    more = model(ids[:, :300 - ids.shape[1]][:, ::-1], cache)
    assert twin.lengths.tolist() == [ids.shape[1]] * len(ids)
    assert [row.tolist() for row in twin.ids] == [row.tolist() for row in before]
    assert model(ids[:, :300 - ids.shape[1]][:, ::-1], twin).tobytes() == more.tobytes()


def test_a_pickled_toy_goes_on(model, ids):
    cache = model.new_cache(2, 300)
    model(ids[:, :30], cache)
    found = pickle.loads(pickle.dumps(cache))
    assert model(ids[:, 30:], found).tobytes() == model(ids)[:, 30:].tobytes()


@pytest.mark.parametrize(("family", "changes"), ANGLES_BY_LENGTH)
def test_a_copys_angles_are_those_of_the_same_room(family, changes, tmp_path):
    model = load(write(tmp_path, small(family, **changes)))
    cache, ids = model.new_cache(1, 100), np.arange(50)[None]
    model(ids, cache)
    twin = pickle.loads(pickle.dumps(cache))
    assert model(ids, twin).tobytes() == model(ids, cache).tobytes()


def test_a_cache_knows_its_tokens(model, ids, tmp_path):
    """Through calls, rows, truncation, forks, copies and files."""
    cache = model.new_cache(2, 300)
    assert [row.tolist() for row in cache.ids] == [[], []]
    model(ids[:, :20], cache)
    model(ids[:1, 20:30], cache.row(0))
    cache.truncate([25, 10])
    want = [ids[0, :25].tolist(), ids[1, :10].tolist()]
    assert [row.tolist() for row in cache.ids] == want and cache.ids[0].dtype == np.int64
    assert [row.tolist() for row in cache.row(1).ids] == want[1:]
    cache.save(tmp_path / "cache")
    for other in (cache.copy(), pickle.loads(pickle.dumps(cache)), ModelCache.load(tmp_path / "cache", model)):
        model(ids[:, :3], other)
        assert [row.tolist() for row in other.ids] == [w + ids[b, :3].tolist() for b, w in enumerate(want)]
    assert [row.tolist() for row in cache.fork(2).ids] == [want[0], want[0], want[1], want[1]]
    assert [row.tolist() for row in cache.ids] == want


def test_tokens_that_came_by_a_layers_hand_are_unknown():
    model = load()
    cache = model.new_cache(1, 300)
    layer = cache.layers[0]
    k = np.ones((1, 3, layer.n_kv_heads, layer.head_dim), np.float32)
    layer.append(k, k)
    assert cache.ids[0].tolist() == [-1] * 3
    model([[7]], cache)
    assert cache.ids[0].tolist() == [-1] * 3 + [7]


@pytest.mark.parametrize("content", [b"", b"\0" * 119, b"\0" * 124, b"\xff\xff\xff\x7f" * 30, b"\xfe\xff\xff\xff" * 30])
def test_damaged_tokens_are_an_error(model, ids, content, tmp_path):
    cache = model.new_cache(2, 300)
    model(ids[:, :15], cache)
    cache.save(tmp_path / "cache")
    (tmp_path / "cache" / "ids.i32").write_bytes(content)
    with pytest.raises(ValueError, match="ids.i32"):
        ModelCache.load(tmp_path / "cache", model)


def test_errors_name_the_models_cache(model):
    cache = model.new_cache(2, 300)
    for i, error, message in ((2, IndexError, "2, expected 0 to 1"), (-1, IndexError, "-1, expected 0 to 1"),
                              ("x", TypeError, "'x', expected an integer")):
        with pytest.raises(error, match=f"^ModelCache.row: i is {message}"):
            cache.row(i)
    for n, error, message in ((0, ValueError, "0, expected at least 1"), (1.5, TypeError, "1.5, expected an integer")):
        with pytest.raises(error, match=f"^ModelCache.fork: n is {message}"):
            cache.fork(n)


# ---- caches that do not fit, and layers used by hand ----------------------------------------------------------------


def test_a_cache_of_another_model_is_refused(model, ids, tmp_path):
    """The pages of its layers have other sizes, or windows, or the keys in them other angles."""
    spec = model_spec(shape_config("llama-tiny"))
    mixer = spec.layers[0].mixer
    for changed in (replace(mixer, n_kv_heads=4), replace(mixer, window=8), replace(mixer, rope=None),
                    replace(mixer, rope=replace(mixer.rope, theta=7.0))):
        layers = tuple(replace(layer, mixer=changed) for layer in spec.layers)
        other = Model(Decoder(replace(spec, layers=layers), RandomCheckpoint(), "float32"), None, frozenset())
        cache = Model(Decoder(spec, RandomCheckpoint(), "float32"), None, frozenset()).new_cache(2, 300)
        with pytest.raises(ValueError, match="model: cache is one of another model"):
            other(ids, cache)
        assert cache.lengths.tolist() == [0, 0]


def layered(model: Model, *layers: Any) -> LayeredModel:
    whole = model._decoder._model
    return LayeredModel(whole.embedding, list(layers), whole.norm, whole.head)


def test_a_part_gets_no_state_that_is_not_its_kind(model):
    attention, called = model._decoder._model.held[0], (CalledPart(64, lambda x, state, start: x), None, False, 1.0)
    ids, start, bound = np.zeros((1, 2), np.int64), np.zeros(1, np.int64), model.new_cache(1, 300).states.held[0]
    for layer, state in ((attention, None), (attention, object()), (called, bound), ((None, None, False, 1.0), bound)):
        with pytest.raises(TypeError, match="forward: state 0 is a"):
            layered(model, layer).forward(ids, StateTable([state]), start)
    other = AttentionState(KVCache(1, 300, 4, 16)._pages)
    with pytest.raises(ValueError, match="forward: state 0 has 4 heads of 16 and 16 channels, expected 2 of 16"):
        layered(model, attention).forward(ids, StateTable([other]), start)


def test_a_called_mlp_has_no_state(model):
    seen: list[Any] = []

    def call(x: Array, state: Any, start: Array) -> Array:
        seen.append(state)
        return x

    layer = (None, CalledPart(64, call), False, 1.0)
    layered(model, layer).forward(np.zeros((1, 2), np.int64), StateTable([object()]), np.zeros(1, np.int64))
    assert seen == [None]


@pytest.fixture
def attention() -> Model:
    """Layers whose state follows from their lengths alone."""
    return Model(Decoder(model_spec(shape_config("llama-tiny")), RandomCheckpoint(), "float32"), None, frozenset())


def held(cache: KVCache) -> list[bytes]:
    return [part.tobytes() for part in cache]


def test_a_layer_restored_by_hand_is_the_one_that_the_pass_reads(attention, ids, tmp_path):
    """Also by its rows, and a fork keeps what it has."""
    cache, other = attention.new_cache(2, 300), attention.new_cache(2, 300)
    attention(ids[:, :270], cache)
    attention(ids[::-1, :270], other)
    row, fork = other.row(1), other.fork(2)
    before = held(fork.layers[0])
    for i, layer in enumerate(cache.layers):
        layer.save(tmp_path / f"{i}")
        other.layers[i].restore(tmp_path / f"{i}")
    assert held(fork.layers[0]) == before and held(row.layers[0]) == held(cache.layers[0].row(1))
    assert attention(ids[:, 270:], other).tobytes() == attention(ids)[:, 270:].tobytes()


@pytest.mark.parametrize("by_hand", ["fork", "truncate"])
def test_a_layer_forked_or_cut_by_hand_leaves_the_fork_alone(attention, ids, by_hand):
    cache = attention.new_cache(2, 600)
    attention(ids, cache)
    fork = cache.layers[0].fork(2) if by_hand == "fork" else cache.fork(2).layers[0]
    before = held(fork)
    if by_hand == "truncate":
        attention(ids[:, :1], cache)  # reserves what is after the fork
    cache.layers[0].truncate(10)
    attention(ids[:, :20], cache)
    assert held(fork) == before


def test_a_reserve_that_fails_takes_the_others_back(model, ids, monkeypatch):
    spec = replace(model.config, layers=(model.config.layers[1],) * 3)
    three = Model(Decoder(spec, RandomCheckpoint(), "float32"), None, frozenset())
    cache, calls = three.new_cache(2, 300), []

    def reserve(self: GatedIdentityState, start: Array, stop: Array) -> None:
        if self is cache.layers[1]:
            raise MemoryError
        calls.append(("reserve", self))

    monkeypatch.setattr(GatedIdentityState, "reserve", reserve)
    monkeypatch.setattr(GatedIdentityState, "rollback", lambda self, start: calls.append(("rollback", self)))
    with pytest.raises(MemoryError):
        three(ids[:, :3], cache)
    assert calls == [("reserve", cache.layers[0]), ("rollback", cache.layers[0])]


def test_new_cache_checks_its_sizes_for_any_layers(ids, tmp_path):
    """And takes NumPy's integers, which JSON does not."""
    tiny = model_spec(shape_config("llama-tiny"))
    spec = replace(tiny, layers=tuple(replace(layer, mixer=None) for layer in tiny.layers))
    model = Model(Decoder(spec, RandomCheckpoint(), "float32"), None, frozenset())
    for sizes in ((0, 5), (-1, 5), (1, 0), (1, -1)):
        with pytest.raises(ValueError, match="new_cache: .* expected at least 1"):
            model.new_cache(*sizes)
    for sizes in ((1.5, 5), (1, 2.5), (1, "a")):
        with pytest.raises(TypeError, match="new_cache: .* expected an integer"):
            model.new_cache(*sizes)
    cache = model.new_cache(np.int32(2), np.int64(300))
    model(ids, cache)
    cache.save(tmp_path / "cache")
    assert ModelCache.load(tmp_path / "cache", model).lengths.tolist() == [300, 300]


# ---- norms and residuals that no family here has yet ---------------------------------------------------------------


NAMES = {"pre": ("input_layernorm", "", "post_attention_layernorm", ""),
         "post": ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
         "both": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                  "post_feedforward_layernorm")}


def reference_logits(spec: ModelSpec, ids: Array) -> Array:
    """float64, of layers whose parts are MLPs: the same one as mixer and as mlp, with norms of their own."""
    source, kind = RandomCheckpoint(), spec.head.norm

    def take(name: str, *shape: int) -> Array:
        return source.take(name, shape).astype(np.float64)

    def norm(x: Array, name: str) -> Array:
        if kind.kind == "layer":
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + kind.eps)
            return x * take(f"{name}.weight", 64) + take(f"{name}.bias", 64)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + kind.eps) * take(f"{name}.weight", 64)

    def part(x: Array, at: str, before: str, after: str) -> Array:
        y = norm(x, at + before) if before else x
        y = np.maximum(y @ take(f"{at}mlp.up_proj.weight", 96, 64).T, 0) @ take(f"{at}mlp.down_proj.weight", 64, 96).T
        return norm(y, at + after) if after else y

    x = take("model.embed_tokens.weight", 512, 64)[ids]
    for i, layer in enumerate(spec.layers):
        at, (first, second, third, fourth) = f"model.layers.{i}.", NAMES[layer.norms]
        y = part(x, at, first, second) if layer.mixer else np.zeros_like(x)
        h = x + layer.residual_scale * y
        x = h + layer.residual_scale * part(x if layer.parallel else h, at, third, fourth)
    return norm(x, "model.norm") @ take("lm_head.weight", 512, 64).T


@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("norms", ["pre", "post", "both"])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_scales_residuals_and_plain_mlps(ids, kind, norms, scale, parallel):
    norm, mlp = Norm(kind, 1e-5), MLP(96, "relu")
    layers = tuple(LayerSpec(mixer, mlp, norm, norms, parallel, scale) for mixer in (mlp, None, mlp))
    tiny = model_spec(shape_config("llama-tiny"))
    spec = replace(tiny, layers=layers, head=replace(tiny.head, norm=norm))
    got = Model(Decoder(spec, RandomCheckpoint(), "float32"), None, frozenset())(ids)
    want = reference_logits(spec, ids)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
