"""Layers with two mixers side by side, which see the same and whose results are added; and multipliers that weights
take over."""
from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_folder import small, tensors, write

from forge_c import pack
from forge_c.functional import (
    AttentionPart,
    AttentionState,
    CalledPart,
    LayeredModel,
    MLPPart,
    Norm,
    Router,
    StateTable,
)
from forge_c.models import Model, ModelCache, load, random_model
from forge_c.models.about import lines, parameters
from forge_c.models.options import context_of
from forge_c.models.saved import HEADER
from forge_c.models.spec import Attention, Mamba2, Multipliers, model_spec
from forge_c.models.spec.document import from_document, to_document
from forge_c.state.kv import KVCache
from forge_c.state.recurrent import RecurrentState

IDS = np.random.default_rng(0).integers(0, 97, (2, 40))
FAMILY = "falcon_h1"
MULTIPLIED = {"attention_in_multiplier": 1.3, "attention_out_multiplier": 0.9, "key_multiplier": 0.4,
              "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.6, "ssm_multipliers": [0.35, 0.25, 1.5, 0.5, 0.7],
              "mlp_multipliers": [0.9, 0.6]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("model"), small(FAMILY))


@pytest.fixture(scope="module")
def model(folder) -> Model:
    return load(folder)


# ---- the spec ----------------------------------------------------------------------------------------------------


def test_what_a_file_leaves_out():
    spec = model_spec({"model_type": FAMILY, "vocab_size": 9, "hidden_size": 1024, "num_hidden_layers": 2,
                       "intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2})
    layer = spec.layers[1]
    assert layer.mixer == Mamba2(128, 8, 1, 256, 4, norm_before_gate=True, out_bias=False)
    assert isinstance(layer.beside, Attention) and (layer.beside.head_dim, layer.beside.rope.theta) == (128, 1e4)
    assert layer.multipliers is None and (spec.embed.scale, spec.head.logits_scale) == (1.0, 1.0)
    assert layer.mixers == layer.remembers == (layer.mixer, layer.beside)
    assert model_spec(small(FAMILY, mamba_d_ssm=None)).layers[0].mixer.inner == 64
    assert model_spec(small(FAMILY, layer_types=["hybrid"] * 3)) == model_spec(small(FAMILY))


def test_how_long_a_text_may_be():
    scaling = {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
    assert context_of(model_spec(small(FAMILY, **scaling))) == 64
    with pytest.raises(ValueError, match=r"^config.json: .*factor"):
        model_spec(small(FAMILY, rope_scaling={"rope_type": "yarn", "factor": -1.0}))


def test_a_file_of_2025():
    """With keys that say how it was made, and older names."""
    older = {"attn_layer_indices": None, "mamba_use_mlp": True, "mlp_expansion_factor": 8, "num_logits_to_keep": 1,
             "mamba_chunk_size": 128, "rope_theta": 1e11, "rope_scaling": None, "head_dim": 16, "use_cache": True,
             "time_step_floor": 1e-4, "time_step_max": 0.1, "time_step_min": 0.001, "torch_dtype": "bfloat16",
             "time_step_limit": [0.0, {"__float__": "Infinity"}], "projectors_bias": False, "mamba_d_head": 12,
             "mamba_norm_before_gate": False, "mamba_rms_norm": False, "architectures": ["FalconH1ForCausalLM"]}
    layer = model_spec(small(FAMILY, **older)).layers[0]
    assert layer.mixer == Mamba2(4, 12, 2, 6, 4, out_bias=False)
    assert (layer.beside.head_dim, layer.beside.rope.theta, layer.beside.scale) == (16, 1e11, 0.25)


def test_multipliers_of_a_file():
    spec = model_spec(small(FAMILY, **MULTIPLIED))
    assert spec.layers[0].multipliers == Multipliers(
        attention_in=1.3, attention_out=0.9, key=0.4, ssm_in=1.25, ssm_out=0.6, ssm=(0.35, 0.25, 1.5, 0.5, 0.7),
        gate=0.9, down=0.6)
    assert (spec.embed.scale, spec.head.logits_scale) == (3.0, 0.5)


@pytest.mark.parametrize(("changes", "message"), [
    ({"ssm_multipliers": [1, 1]}, r"ssm_multipliers is \[1, 1\], expected 5 numbers"),
    ({"ssm_multipliers": [1, 1, 0, 1, 1]}, "ssm_multipliers is 0, expected a number above 0"),
    ({"mlp_multipliers": 2.0}, "mlp_multipliers is 2.0, expected 2 numbers"),
    ({"key_multiplier": "x"}, "key_multiplier is 'x', expected a number above 0"),
    ({"lm_head_multiplier": -1.0}, "lm_head_multiplier is -1.0, expected a number above 0"),
    ({"mamba_d_ssm": 50}, "mamba_n_heads is 4 and mamba_d_head 12, expected a product of 50, mamba_d_ssm"),
    ({"mamba_n_groups": 3}, "mamba_n_groups is 3, expected a divisor of the 4 heads"),
    ({"attn_layer_indices": [1]}, "expected attn_layer_indices null and mamba_use_mlp true"),
    ({"mamba_use_mlp": False}, "expected attn_layer_indices null and mamba_use_mlp true"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected silu"),
    ({"layer_types": ["hybrid", "mamba", "hybrid"]}, "layer_types is .*, expected 3 times hybrid"),
    ({"sliding_window": 5}, "sliding_window is 5, which may change the maths"),
])
def test_what_is_not_computed_is_an_error(changes, message):
    with pytest.raises(ValueError, match=rf"^config.json: .*{message}"):
        model_spec(small(FAMILY, **changes))


def test_a_spec_as_a_document():
    spec = model_spec(small(FAMILY, **MULTIPLIED))
    document = json.loads(json.dumps(to_document(spec)))
    assert from_document(document) == spec
    assert "beside" not in to_document(model_spec(small("bamba")))["layers"][0]
    for key, value, where in (("beside", {"kind": "Mamba"}, "beside"), ("beside", 3, "beside"),
                              ("mixer", None, "beside"), ("router", {"threshold": 0.0, "predictor": None}, "beside"),
                              ("multipliers", {"key": 1.0}, "multipliers")):
        changed = json.loads(json.dumps(document))
        changed["layers"][1][key] = value
        with pytest.raises(ValueError, match=rf"spec.layers\[1\].{where}"):
            from_document(changed)
    for path, value in (("beside.n_heads", 3), ("beside.head_dim", 0), ("mixer.groups", 3), ("multipliers.ssm", [1.0])):
        changed = json.loads(json.dumps(document))
        part, name = path.split(".")
        changed["layers"][1][part][name] = value
        with pytest.raises(ValueError, match=rf"spec.layers\[1\].{part}"):
            from_document(changed)


# ---- multipliers -------------------------------------------------------------------------------------------------


def by_hand(config: Any, weights: Any) -> Any:
    """The weights times the multipliers of the config."""
    inner, shared = config["mamba_d_ssm"], config["mamba_n_groups"] * config["mamba_d_state"]
    rows = np.repeat(config["ssm_multipliers"], (inner, inner, shared, shared, config["mamba_n_heads"]))
    gate, down = config["mlp_multipliers"]
    attention, ssm = config["attention_in_multiplier"], config["ssm_in_multiplier"]
    of_inputs = {"q_proj": attention, "k_proj": attention, "v_proj": attention, "mamba.in_proj": ssm}
    of_results = {"k_proj": config["key_multiplier"], "o_proj": config["attention_out_multiplier"], "gate_proj": gate,
                  "down_proj": down, "mamba.in_proj": rows, "mamba.out_proj": config["ssm_out_multiplier"]}
    found = {}
    for name, value in weights.items():
        stem, _, last = name.rpartition(".")
        factor: Any = next((f for part, f in of_results.items() if stem.endswith(part)), 1.0)
        if last == "weight":
            factor = factor * next((f for part, f in of_inputs.items() if stem.endswith(part)), 1.0)
        column = np.reshape(np.float32(factor), (-1, *[1] * (value.ndim - 1)))
        found[name] = value.astype(np.float32) * column if np.any(column != 1) else value
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_multipliers_are_those_of_the_weights(dtype, tmp_path):
    config = small(FAMILY, **MULTIPLIED)
    weights = tensors(config)
    plain = {key: value for key, value in config.items() if key not in MULTIPLIED}
    model = load(write(tmp_path / "a", config, weights), dtype)
    other = load(write(tmp_path / "b", plain, by_hand(config, weights)), dtype)
    assert model(IDS).tobytes() == other(IDS).tobytes()
    assert other.config.layers[0] == replace(model.config.layers[0], multipliers=None)


# ---- states ------------------------------------------------------------------------------------------------------


def test_a_layer_has_two_states(model, tmp_path):
    cache = model.new_cache(2, 300)
    assert [type(state) for state in cache.layers] == [RecurrentState, KVCache] * 3
    assert cache.nbytes == sum(state.nbytes for state in cache.layers)
    assert cache.kinds == model._decoder.kinds and len(cache.kinds) == 6
    whole = model(IDS, cache)
    assert [state.seq_len for state in cache.layers[1::2]] == [40] * 3
    cache.save(tmp_path / "c")
    assert len(list((tmp_path / "c").glob("layer-*.npy"))) == 6
    found = ModelCache.load(tmp_path / "c", model)
    found.truncate(0)
    assert model(IDS, found).tobytes() == whole.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_keys_and_values_in_fewer_bits(model, tmp_path, dtype):
    cache = model.new_cache(2, 60, dtype=dtype)
    model(IDS[:, :20], cache)
    cache.save(tmp_path / "c")
    found = ModelCache.load(tmp_path / "c", model)
    assert [state.dtype for state in found.layers[1::2]] == [dtype] * 3
    assert model(IDS[:, 20:], found).tobytes() == model(IDS[:, 20:], cache).tobytes()


def test_both_states_go_back_together_or_not_at_all(model):
    cache = model.new_cache(2)
    for start, stop in ((0, 10), (10, 20), (20, 21)):
        model(IDS[:, start:stop], cache)
    with pytest.raises(ValueError, match="row 0 cannot go back to 15 tokens"):
        cache.truncate(15)
    assert [state.seq_len for state in cache.layers[1::2]] == [21] * 3 and cache.nearest(15).tolist() == [10, 10]
    cache.truncate(20)
    assert model(IDS[:, 20:], cache).tobytes() == model(IDS)[:, 20:].tobytes()


def test_a_text_that_outgrows_its_angles_is_read_again(tmp_path):
    """By both mixers."""
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0],
               "original_max_position_embeddings": 16, "factor": 4.0}
    model = load(write(tmp_path, small(FAMILY, max_position_embeddings=64, rope_scaling=scaling)))
    cache = model.new_cache(2, 60)
    assert model._decoder.angles_depend_on_length
    model(IDS[:, :12], cache)
    assert model(IDS[:, 12:30], cache).tobytes() == model(IDS[:, :30])[:, 12:].tobytes()
    cache.row(1).truncate(0)
    model(IDS[1:, :3], cache.row(1))
    rows = [model(IDS[b : b + 1, : n + 5])[0, n:] for b, n in ((0, 30), (1, 3))]
    more = np.stack([IDS[0, 30:35], IDS[1, 3:8]])
    assert model(more, cache).tobytes() == np.stack(rows).tobytes()


def test_what_goes_into_a_layer(model):
    cache = model.new_cache(2)
    whole = [model.hidden(IDS, layer=layer) for layer in range(3)]
    for layer in range(3):
        cache.truncate(0)
        parts = [model.hidden(IDS[:, a:b], cache, layer=layer) for a, b in ((0, 7), (7, 8), (8, 40))]
        assert np.concatenate(parts, axis=1).tobytes() == whole[layer].tobytes()


# ---- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}])
def test_each_weight_counts_once(tmp_path, options):
    """The norm before both mixers is one."""
    config = small(FAMILY, **options)
    numbers = sum(value.size for value in tensors(config).values())
    model = load(write(tmp_path / "m", config), "float32")
    assert parameters(model) == numbers
    packed = model.nbytes - 4 * numbers  # of columns that fill panels of 16
    layered = model._decoder._model
    assert 0 <= packed < 0.7 * model.nbytes and model.nbytes == layered.nbytes
    table = 0 if options else layered.embedding.nbytes
    assert model._decoder.step_nbytes == model.nbytes - table + 3 * 4 * 32, "a step reads that norm twice"
    model.save(tmp_path / "s")
    found = load(tmp_path / "s")
    assert (found.nbytes, parameters(found)) == (model.nbytes, numbers) and found.config == model.config


def test_a_random_model_and_what_info_says():
    model = random_model("falcon-h1-tiny", "int8")
    assert repr(model) == ("Model(model_type='falcon_h1', layers=2, hidden_size=64, heads=4/2, vocab_size=512, "
                           "dtype='int8')")
    assert len(model.generate([1, 2, 3], 9)) == 9
    said = dict(line.split(maxsplit=1) for line in lines(model))
    assert said["bytes"] == str(model.nbytes) and said["context"] == "4096 tokens"
    assert re.search(r"^0-1 +LayerSpec\(mixer=Mamba2\(heads=6, .*beside=Attention\(n_heads=4, ", said["layers"])


def test_what_a_packed_model_may_have_beside(model, tmp_path):
    model.save(tmp_path / "s")
    document = json.loads((tmp_path / "s" / HEADER).read_text())
    layer = document["model"][1][0]
    assert len(layer) == 6 and layer[4] is None
    for changed in (layer[:4], [*layer[:5], None], [*layer[:5], layer[0]], [layer[5], *layer[1:5], layer[0]],
                    [*layer[:5], layer[1]], [*layer[:4], layer[5]], [*layer[:5], {"object": 0}]):
        document["model"][1][0] = changed
        (tmp_path / "s" / HEADER).write_text(json.dumps(document))
        with pytest.raises(ValueError, match="^load: .* is damaged: "):
            load(tmp_path / "s")


# ---- any two mixers ----------------------------------------------------------------------------------------------

HIDDEN, HEADS, DIM, VOCAB = 32, 2, 8, 50
IDS_OF_TABLE = np.arange(14).reshape(2, 7)


def parts(rng: np.random.Generator) -> tuple[AttentionPart, AttentionPart, MLPPart]:
    def matrix(rows: int, columns: int) -> Any:
        return pack(rng.standard_normal((rows, columns), np.float32) / np.float32(4))

    def attention(window: int | None, post_norm: Norm | None) -> AttentionPart:
        return AttentionPart(matrix(HIDDEN, 3 * HEADS * DIM), matrix(HEADS * DIM, HIDDEN), heads=HEADS, kv_heads=HEADS,
                             head_dim=DIM, norm=norm, post_norm=post_norm, window=window, scale=0.4)

    norm = Norm("rms", HIDDEN, np.ones(HIDDEN, np.float32))
    after = Norm("layer", HIDDEN, rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32))
    mlp = MLPPart(matrix(HIDDEN, 24), matrix(24, HIDDEN), norm=norm)
    return attention(None, None), attention(3, after), mlp


def stream(layer: tuple[Any, ...], table: Any) -> Any:
    """(2, 7, HIDDEN) that comes out of a layer, of embeddings from the table."""
    seen: list[Any] = []

    def look(x: Any, state: None, start: Any) -> Any:
        seen.append(x)
        return np.zeros_like(x)

    norm, head = Norm("rms", HIDDEN, np.ones(HIDDEN, np.float32)), pack(np.zeros((HIDDEN, VOCAB), np.float32))
    model = LayeredModel(table, [layer, (CalledPart(HIDDEN, look), None, False, 1.0)], norm, head)
    caches = [None if part is None else KVCache(2, 7, HEADS, DIM) for part in (layer[0], *layer[5:])]
    states = [None if cache is None else AttentionState(cache._pages) for cache in caches]
    model.forward(IDS_OF_TABLE, StateTable([*states, None]), np.zeros(2, np.int64), logits=False)
    return seen[0]


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("with_mlp", [True, False])
@pytest.mark.parametrize("parallel", [True, False])
def test_two_of_one_kind(rng, isa, scale, parallel, with_mlp):
    """One of them with a window and a norm behind it: each is as it is alone."""
    first, second, mlp = parts(rng)
    table = rng.standard_normal((VOCAB, HIDDEN), np.float32)
    x = table[IDS_OF_TABLE]
    mlp = mlp if with_mlp else None
    one, two = (stream((part, None, False, 1.0), table) - x for part in (first, second))
    expected = x + np.float32(scale) * (one + two)
    if with_mlp:
        before = x if parallel else expected
        rows = np.zeros((VOCAB, HIDDEN), np.float32)
        rows[IDS_OF_TABLE] = before
        expected = expected + np.float32(scale) * (stream((None, mlp, False, 1.0), rows) - before)
    found = stream((first, mlp, parallel, scale, None, second), table)
    assert np.abs(found - expected).max() < 2e-5
    swapped = stream((second, mlp, parallel, scale, None, first), table)
    assert np.abs(swapped - found).max() < 2e-5 and np.abs(found - x).max() > 0.1


def test_what_may_stand_beside(rng):
    first, second, mlp = parts(rng)
    norm, head = Norm("rms", HIDDEN, np.ones(HIDDEN, np.float32)), pack(np.zeros((HIDDEN, VOCAB), np.float32))
    table, router = np.zeros((VOCAB, HIDDEN), np.float32), Router(np.zeros(HIDDEN, np.float32))
    wide = CalledPart(HIDDEN + 1, lambda x, state, start: x)
    for layer in ((first, mlp, False, 1.0, router, second), (None, mlp, False, 1.0, None, second),
                  (first, mlp, False, 1.0, None, wide)):
        with pytest.raises(ValueError, match=r"LayeredModel: a layer has .* beside its mixer, expected one of 32"):
            LayeredModel(table, [layer], norm, head)
    with pytest.raises(TypeError):
        LayeredModel(table, [(first, mlp, False, 1.0, None, "x")], norm, head)


def test_states_that_are_others(model):
    cache, start = model.new_cache(2, 60), np.zeros(2, np.int64)
    layered, held = model._decoder._model, cache.states.held
    for states, message in ((held[:5], "5 states, expected 6"),
                            ([held[1], held[0], *held[2:]], "state 0 is a Attention"),
                            ([held[0], held[2], *held[2:]], "state 1 is a RecurrentSlots")):
        with pytest.raises((ValueError, TypeError), match=f"^forward: {message}"):
            layered.forward(IDS, StateTable(list(states)), start)
