"""Zamba-2: attention and an MLP ahead of a state space, with weights that layers share and what each adds to them."""
from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from model_folder import small, tensors, write

from forge_c import pack
from forge_c.functional import AttentionPart, AttentionState, CalledPart, LayeredModel, MLPPart, Norm, StateTable
from forge_c.models import ModelCache, collect_importance, load
from forge_c.models.saved import HEADER
from forge_c.models.spec import JoinedAttention, Mamba2, model_spec
from forge_c.models.spec import Norm as NormSpec
from forge_c.models.spec.document import from_document, to_document
from forge_c.state.kv import KVCache
from forge_c.state.recurrent import RecurrentState

IDS = np.random.default_rng(0).integers(0, 97, (2, 40))
PLAIN = {"use_shared_attention_adapter": False, "use_mem_rope": False}


# ---- the spec ----------------------------------------------------------------------------------------------------


def test_what_a_file_leaves_out():
    spec = model_spec({"model_type": "zamba2", "vocab_size": 9, "hidden_size": 2560, "num_hidden_layers": 3,
                       "num_attention_heads": 32, "layers_block_type": ["mamba", "hybrid", "mamba"]})
    assert spec.layers[0].mixer == Mamba2(8, 640, 1, 64, 4, norm=NormSpec("rms", 1e-5), dt_min=0.001)
    ahead = spec.layers[1].ahead
    assert ahead is not None and spec.layers[0].ahead is None and spec.head.tied
    assert ahead.attention == JoinedAttention(32, 32, 160, 80 ** -0.5)
    assert (ahead.mlp.width, ahead.mlp.activation, ahead.rank, ahead.adapted) == (10240, "gelu", 128, False)
    assert spec.layers[1].remembers == (spec.layers[1].mixer, ahead.attention)


def test_blocks_are_shared_by_turns():
    types = ["hybrid", "linear_attention", "hybrid", "hybrid", "hybrid", "linear_attention", "hybrid"]
    spec = model_spec(small("zamba2", num_hidden_layers=7, layers_block_type=types, num_mem_blocks=2))
    found = [layer.ahead for layer in spec.layers if layer.ahead is not None]
    assert [(one.of, one.use) for one in found] == [(0, 0), (2, 1), (0, 2), (2, 3), (0, 4)]
    said = small("zamba2", layers_block_type=..., layer_types=["hybrid", "linear_attention", "hybrid"],
                 hybrid_layer_ids=[0, 2], attention_head_dim=16, attention_hidden_size=64, kv_channels=8)
    assert model_spec(said) == model_spec(small("zamba2"))


@pytest.mark.parametrize(("changes", "message"), [
    ({"layers_block_type": None}, "layers_block_type is null, expected 3 times linear_attention or hybrid"),
    ({"layers_block_type": ["hybrid"]}, "layers_block_type is .*, expected 3 times"),
    ({"add_bias_linear": True}, "expected add_bias_linear and use_long_context false and use_conv_bias true"),
    ({"use_long_context": True}, "expected add_bias_linear and use_long_context false"),
    ({"use_conv_bias": False}, "use_conv_bias true"),
    ({"n_mamba_heads": 5}, "n_mamba_heads is 5, expected a divisor of 64, mamba_expand times hidden_size"),
    ({"mamba_ngroups": 3}, "mamba_ngroups is 3, expected a divisor of the 4 heads"),
    ({"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads is 5, expected a divisor of 64"),
    ({"num_key_value_heads": 3}, "expected a divisor of 64, and a multiple of num_key_value_heads 3"),
    ({"hybrid_layer_ids": [0]}, r"hybrid_layer_ids is \[0\], expected \[0, 2\]"),
    ({"attention_head_dim": 8}, "attention_head_dim is 8, expected 16"),
    ({"mamba_headdim": 8}, "mamba_headdim is 8, expected 16"),
    ({"hidden_act": "tanh"}, "hidden_act is 'tanh', expected one of"),
    ({"adapter_rank": 0}, "adapter_rank is 0"), ({"num_mem_blocks": 0}, "num_mem_blocks is 0"),
])
def test_what_is_not_computed_is_an_error(changes, message):
    with pytest.raises(ValueError, match=rf"^config.json: .*{message}"):
        model_spec(small("zamba2", **changes))


def test_a_spec_as_a_document():
    spec = model_spec(small("zamba2"))
    document = json.loads(json.dumps(to_document(spec)))
    assert from_document(document) == spec and "ahead" not in document["layers"][1]
    joined = document["layers"][0]["ahead"]["attention"]
    plain = {"kind": "Attention", **{key: value for key, value in joined.items() if key != "kind"}}
    for i, key, value in ((0, "mixer", None), (0, "mixer", joined), (0, "beside", plain), (0, "ahead", {}),
                          (1, "beside", joined), (0, "router", {"threshold": 0.0, "predictor": None})):
        changed = json.loads(json.dumps(document))
        changed["layers"][i][key] = value
        with pytest.raises(ValueError, match=rf"spec.layers\[{i}\]"):
            from_document(changed)
    for path, value in (("attention", plain), ("attention.n_heads", 3), ("mlp", joined), ("rank", "x"), ("more", 1)):
        changed = json.loads(json.dumps(document))
        where, (*way, last) = changed["layers"][0]["ahead"], path.split(".")
        for name in way:
            where = where[name]
        where[last] = value
        with pytest.raises(ValueError, match=r"spec.layers\[0\].ahead"):
            from_document(changed)


# ---- weights -----------------------------------------------------------------------------------------------------


def logits(folder: Any, config: Any, weights: Any) -> Any:
    return load(write(folder, config, weights), "float32")(IDS)


def test_what_a_layer_adds_to_shared_weights(tmp_path):
    """As if each had a block of its own with the sum in it, and what follows the MLP were part of that."""
    config, weights = small("zamba2"), tensors(small("zamba2"))
    block, apart = "model.layers.0.shared_transformer.", dict(weights)
    own = {name: value for name, value in weights.items() if name.startswith(block) and "adapter" not in name}
    for use, layer in enumerate((0, 2)):
        prefix = f"model.layers.{layer}.shared_transformer."
        apart |= {prefix + name.removeprefix(block): value.copy() for name, value in own.items()}
        for stem in ("self_attn.{}q", "self_attn.{}k", "self_attn.{}v", "feed_forward.{}gate_up"):
            matrix, low = stem.format("") + "_proj", stem.format("linear_" if "self" in stem else "")
            low += "_adapter_list" if "self" in stem else "_proj_adapter_list"
            down, up = (weights[f"{block}{low}.{use}.{i}.weight"].astype(np.float64) for i in range(2))
            apart[f"{prefix}{matrix}.weight"] = (own[f"{block}{matrix}.weight"] + up @ down).astype(np.float32)
            for i, value in enumerate((down, up)):
                apart.pop(f"{block}{low}.{use}.{i}.weight", None)
                apart[f"{prefix}{low}.{use}.{i}.weight"] = np.zeros_like(value, dtype=np.float32)
        name = f"{prefix}feed_forward.down_proj.weight"
        both = [w.astype(np.float64) for w in (weights[f"model.layers.{layer}.linear.weight"],
                                               own[f"{block}feed_forward.down_proj.weight"])]
        apart[name] = (both[0] @ both[1]).astype(np.float32)
        apart[f"model.layers.{layer}.linear.weight"] = np.eye(32, dtype=np.float32)
    expected = logits(tmp_path / "shared", config, weights)
    found = logits(tmp_path / "apart", config | {"num_mem_blocks": 2}, apart)
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


def test_attention_without_matrices_of_its_own(tmp_path):
    config = small("zamba2", **PLAIN)
    weights = tensors(config)
    plain = {name: value for name, value in weights.items() if "self_attn.linear" not in name}
    zeros = {name: value if name in plain else np.zeros_like(value) for name, value in weights.items()}
    expected = logits(tmp_path / "zeros", config | {"use_shared_attention_adapter": True}, zeros)
    assert logits(tmp_path / "none", config, plain).tobytes() == expected.tobytes()


@pytest.mark.parametrize(("change", "reason"), [
    ({"model.layers.2.shared_transformer.self_attn.q_proj.weight": np.zeros((64, 64), np.float32)}, "have no place"),
    ({"model.layers.0.shared_transformer.feed_forward.gate_up_proj_adapter_list.1.0.weight": None}, "is missing"),
    ({"model.layers.2.linear.weight": None}, "is missing"),
    ({"model.layers.0.shared_transformer.self_attn.linear_v_adapter_list.0.1.weight": np.zeros((64, 5), np.float32)},
     r"has shape \(64, 5\), expected \(64, 4\)")])
def test_tensors_that_do_not_fit(tmp_path, change, reason):
    weights = {name: value for name, value in (tensors(small("zamba2")) | change).items() if value is not None}
    with pytest.raises(ValueError, match=reason):
        load(write(tmp_path, small("zamba2"), weights))


def test_importance_is_told_of_what_is_ahead(tmp_path):
    folder = write(tmp_path, small("zamba2"))
    found = collect_importance(folder, [IDS[0]])
    for layer in (0, 2):
        assert found[f"model.layers.{layer}.self_attn.q_proj.weight"].shape == (64,)
        assert found[f"model.layers.{layer}.mlp.down_proj.weight"].shape == (40,)
    assert "model.layers.1.self_attn.q_proj.weight" not in found
    assert load(folder, "int4", importance=found)(IDS).tobytes() != load(folder, "int4", importance={})(IDS).tobytes()


# ---- states ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_a_cache_holds(tmp_path, dtype):
    model = load(write(tmp_path / "m", small("zamba2")))
    cache = model.new_cache(2, 60, dtype=dtype)
    assert [type(state) for state in cache.layers] == [RecurrentState, KVCache, RecurrentState, RecurrentState, KVCache]
    assert (cache.layers[1].n_kv_heads, cache.layers[1].head_dim, cache.layers[1].dtype) == (4, 16, dtype)
    model(IDS[:, :20], cache)
    cache.save(tmp_path / "c")
    found = ModelCache.load(tmp_path / "c", model)
    assert model(IDS[:, 20:], found).tobytes() == model(IDS[:, 20:], cache).tobytes()
    cache.truncate(20)
    again = ModelCache.load(tmp_path / "c", model)
    assert model(IDS[:, 20:30], cache).tobytes() == model(IDS[:, 20:30], again).tobytes()


def test_what_a_packed_model_may_have_ahead(tmp_path):
    load(write(tmp_path / "m", small("zamba2"))).save(tmp_path / "s")
    document = json.loads((tmp_path / "s" / HEADER).read_text())
    layers = document["model"][1]
    with_it, without = layers[0], layers[1]
    assert (len(with_it), len(without)) == (8, 4)
    for changed in (with_it[:4], with_it[:7], [*with_it[:6], None, None], [*with_it[:6], with_it[7], with_it[6]],
                    [*with_it[:6], with_it[6], None], [with_it[6], *with_it[1:]],
                    [*with_it[:5], with_it[0], *with_it[6:]], [*with_it[:3], 0.5, *with_it[4:]],
                    [*with_it[:6], with_it[0], with_it[7]]):
        document["model"][1] = [changed, *layers[1:]]
        (tmp_path / "s" / HEADER).write_text(json.dumps(document))
        with pytest.raises(ValueError, match="^load: .* is damaged: "):
            load(tmp_path / "s")
    document["model"][1] = [with_it, [*without, None, None, *with_it[6:]], with_it]
    (tmp_path / "s" / HEADER).write_text(json.dumps(document))
    with pytest.raises(ValueError, match="^load: .* is damaged: "):
        load(tmp_path / "s")


# ---- the parts ---------------------------------------------------------------------------------------------------

HIDDEN, HEADS, DIM, VOCAB = 32, 2, 8, 50
ONES = np.ones(2 * HIDDEN, np.float32)


def attention(rng: np.random.Generator, width: int) -> AttentionPart:
    def matrix(rows: int, columns: int) -> Any:
        return pack(rng.standard_normal((rows, columns), np.float32) / np.float32(4))

    return AttentionPart(matrix(width, 3 * HEADS * DIM), matrix(HEADS * DIM, HIDDEN), heads=HEADS, kv_heads=HEADS,
                         head_dim=DIM, norm=Norm("rms", width, ONES[:width]), scale=0.4, width=width)


def layered(*layers: Any, table: Any = None) -> LayeredModel:
    table = np.zeros((VOCAB, HIDDEN), np.float32) if table is None else table
    return LayeredModel(table, list(layers), Norm("rms", HIDDEN, ONES[:HIDDEN]), pack(np.eye(HIDDEN, VOCAB,
                                                                                            dtype=np.float32)))


def test_the_mixer_is_given_the_sum_and_the_stream_is_not(rng, isa):
    """And what is ahead is given the embeddings, also in the second layer: with a mixer that gives back what it gets,
    x becomes 2 x + mlp(attention(x | e))."""
    table = rng.standard_normal((VOCAB, HIDDEN), np.float32)
    up, down = pack(rng.standard_normal((HIDDEN, 24), np.float32)), pack(rng.standard_normal((24, HIDDEN), np.float32))
    ahead, mlp, seen = attention(rng, 2 * HIDDEN), MLPPart(up, down, norm=Norm("rms", HIDDEN, ONES[:HIDDEN])), []

    def same(x: Any, state: Any, start: Any) -> Any:
        seen.append(x)
        return x

    layer = (CalledPart(HIDDEN, same), None, False, 1.0, None, None, ahead, mlp)
    ids, start = np.arange(14).reshape(2, 7), np.zeros(2, np.int64)
    caches = [KVCache(2, 7, HEADS, DIM) for _ in range(2)]
    states = [one for cache in caches for one in (None, AttentionState(cache._pages))]
    hidden = layered(layer, layer, table=table).forward(ids, StateTable(states), start, hidden=True)[1]
    e, x = table[ids], table[ids]
    for given in seen:
        joined = np.concatenate([x, e], axis=-1)
        joined = joined / np.sqrt(np.square(joined.astype(np.float64)).mean(-1, keepdims=True) + 1e-6)
        expected = x + of_parts(ahead, mlp, joined)
        assert np.abs(given - expected).max() < 2e-5 * np.abs(expected).max()
        x = x + given
    normed = x / np.sqrt(np.square(x.astype(np.float64)).mean(-1, keepdims=True) + 1e-6)
    assert np.abs(hidden - normed).max() < 2e-5 * np.abs(normed).max()


def of_parts(ahead: AttentionPart, mlp: MLPPart, x: Any) -> Any:
    """mlp(attention(x)) in float64."""
    def weights(part: Any, name: str) -> Any:
        return np.asarray(part.arguments[name].unpack(), np.float64)

    q, k, v = np.split((x @ weights(ahead, "qkv")).reshape(2, 7, 3 * HEADS, DIM), 3, axis=2)
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * 0.4
    scores = np.where(np.tri(7, dtype=bool), scores, -np.inf)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    y = np.einsum("bhqk,bkhd->bqhd", weight / weight.sum(-1, keepdims=True), v).reshape(2, 7, -1)
    y = y @ weights(ahead, "out")
    y = y / np.sqrt(np.square(y).mean(-1, keepdims=True) + 1e-6) @ weights(mlp, "up")
    return (y / (1 + np.exp(-y))) @ weights(mlp, "down")


def test_what_may_be_ahead(rng):
    wide, plain, mixer = attention(rng, 2 * HIDDEN), attention(rng, HIDDEN), CalledPart(HIDDEN, lambda x, s, t: x)
    mlp = MLPPart(pack(np.zeros((HIDDEN, 8), np.float32)), pack(np.zeros((8, HIDDEN), np.float32)))
    layered((mixer, None, False, 1.0, None, None, wide, mlp))
    for layer in ((mixer, None, False, 1.0, None, None, plain, mlp), (None, None, False, 1.0, None, None, wide, mlp),
                  (mixer, mlp, True, 1.0, None, None, wide, mlp), (mixer, None, False, 0.5, None, None, wide, mlp),
                  (mixer, None, False, 1.0, None, plain, wide, mlp)):
        with pytest.raises(ValueError, match="LayeredModel: a layer has attention of .* channels ahead of its mixer"):
            layered(layer)
    for layer in ((mixer, None, False, 1.0, None, None, wide, None), (mixer, None, False, 1.0, None, None, None, mlp),
                  (mixer, None, False, 1.0, None, None, mlp, wide)):
        with pytest.raises(TypeError):
            layered(layer)
    with pytest.raises(ValueError, match="LayeredModel: attention is of width 64, expected 32"):
        layered((wide, None, False, 1.0))
    with pytest.raises(ValueError, match="LayeredModel: a layer has .* beside its mixer"):
        layered((mixer, None, False, 1.0, None, wide))
    with pytest.raises(ValueError, match="AttentionPart: norm has 32 channels, expected 64"):
        AttentionPart(wide.arguments["qkv"], wide.arguments["out"], heads=HEADS, kv_heads=HEADS, head_dim=DIM, width=64,
                      norm=Norm("rms", HIDDEN, ONES[:HIDDEN]))
