"""Layers by name: a misspelt weight fails, a mapping of weights is taken whole or not at all, a layer prints itself."""
from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from forge_c.nn import (
    Embedding,
    GroupedQueryAttention,
    Linear,
    ModernTransformerBlock,
    MultiQueryAttention,
    RotaryPositionalEmbedding,
    SwiGLU,
    Swish,
)
from forge_c.nn.layer import Layer

SHAPES = {
    "input_layernorm.weight": (64,), "post_attention_layernorm.weight": (64,), "mlp.gate_proj.weight": (96, 64),
    "mlp.up_proj.weight": (96, 64), "mlp.down_proj.weight": (64, 96), "self_attn.q_proj.weight": (64, 64),
    "self_attn.k_proj.weight": (32, 64), "self_attn.v_proj.weight": (32, 64), "self_attn.o_proj.weight": (64, 64),
}
PREFIX = "model.layers.7."


def llama_weights(rng: np.random.Generator, biases: bool = False) -> dict[str, np.ndarray]:
    shapes = SHAPES | ({"self_attn.q_proj.bias": (64,), "self_attn.k_proj.bias": (32,)} if biases else {})
    return {PREFIX + name: rng.standard_normal(shape).astype(np.float32) / 8 for name, shape in shapes.items()}


@pytest.mark.parametrize("layer", [
    GroupedQueryAttention(64, 4, 2), MultiQueryAttention(64, 4).gqa, GroupedQueryAttention(64, 4, 2).astype("int8"),
    copy.deepcopy(GroupedQueryAttention(64, 4, 2)), pickle.loads(pickle.dumps(GroupedQueryAttention(64, 4, 2))),
], ids=["made", "inner", "astype", "deepcopy", "pickle"])
def test_misspelt_weight_is_refused_with_the_name_that_was_meant(layer: Layer) -> None:
    with pytest.raises(AttributeError, match="GroupedQueryAttention has no attribute 'Wq'; did you mean W_q?"):
        layer.Wq = np.zeros((64, 64))
    assert "Wq" not in vars(layer)
    layer.causal = True  # what a layer has may be set


@pytest.mark.parametrize("layer", [
    SwiGLU.from_llama(np.ones((5, 3)), np.ones((5, 3)), np.ones((3, 5))),
    RotaryPositionalEmbedding.from_table(RotaryPositionalEmbedding(4).table), Embedding(3, 4), Swish(),
], ids=lambda layer: type(layer).__name__)
def test_every_way_of_making_a_layer_seals_it(layer: Layer) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'wieght'"):
        layer.wieght = np.zeros(3)


def test_subclass_may_add_attributes_while_it_is_made() -> None:
    class Scaled(SwiGLU):
        def __init__(self, dim: int) -> None:
            super().__init__(dim)
            self.scale = 2.0

    layer = Scaled(8)
    layer.scale = 3.0
    with pytest.raises(AttributeError, match="did you mean scale?"):
        layer.scales = 3.0


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_load_takes_the_weights_of_another_layer(dtype: str) -> None:
    one, other = (ModernTransformerBlock(64, 4, 2, bias=True, seed=seed).astype(dtype) for seed in (0, 1))
    attention, x = other.attention, np.random.default_rng(2).standard_normal((1, 5, 64)).astype(np.float32)
    assert other.load(one.parameters()) is other and other.attention is attention
    for name, value in one.parameters().items():
        np.testing.assert_array_equal(other.parameters()[name], value, err_msg=name)
    np.testing.assert_array_equal(other(x), one(x))


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("ffn.W_up"), "weights lacks ffn.W_up"),
    (lambda w: w.update({"ffn.Wup": w["ffn.W_up"]}), "weights has 'ffn.Wup'; did you mean ffn.W_up?"),
    (lambda w: w.update({"norm2.weight": np.ones(65)}), r"norm2.weight has shape \(65,\), expected \(64,\)"),
    (lambda w: w.update({"ffn.W_down": np.full_like(w["ffn.W_down"], np.nan)}), "NaN|finite"),
])
def test_load_that_fails_leaves_the_layer_as_it_was(change: object, message: str) -> None:
    layer = ModernTransformerBlock(64, 4, 2, seed=0).astype("int8")
    before = layer.parameters()
    weights = dict(ModernTransformerBlock(64, 4, 2, seed=1).parameters())
    change(weights)
    with pytest.raises(ValueError, match=message):
        layer.load(weights)
    for name, value in layer.parameters().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_load_refuses_what_is_no_mapping() -> None:
    with pytest.raises(TypeError, match="Linear.load: weights is a list, expected a mapping"):
        Linear(2, 2).load([1])


@pytest.mark.parametrize("biases", [False, True])
def test_block_from_llama_holds_each_weight_under_its_own_name(rng: np.random.Generator, biases: bool) -> None:
    weights = llama_weights(rng, biases)
    others = {"lm_head.weight": np.zeros((3, 3), np.float32)}
    block = ModernTransformerBlock.from_llama(weights | others, 4, 2, prefix=PREFIX, max_seq_len=50, eps=1e-5)
    held = block.parameters()
    for ours, theirs in {"attention.W_q": "self_attn.q_proj", "attention.W_k": "self_attn.k_proj",
                         "attention.W_v": "self_attn.v_proj", "attention.W_o": "self_attn.o_proj",
                         "ffn.W_up": "mlp.gate_proj", "ffn.W_gate": "mlp.up_proj", "ffn.W_down": "mlp.down_proj",
                         "norm1.weight": "input_layernorm", "norm2.weight": "post_attention_layernorm"}.items():
        np.testing.assert_array_equal(held[ours], weights[f"{PREFIX}{theirs}.weight"].T, err_msg=ours)
    assert block.rope.max_seq_len == 50 and block.norm1.eps == 1e-5
    if biases:
        np.testing.assert_array_equal(held["attention.b_k"], weights[PREFIX + "self_attn.k_proj.bias"])
        assert not held["attention.b_o"].any() and not held["ffn.b_up"].any()
    mlp = SwiGLU.from_llama(*(weights[f"{PREFIX}mlp.{side}_proj.weight"] for side in ("gate", "up", "down")))
    x = rng.standard_normal((1, 3, 64)).astype(np.float32)
    if not biases:
        np.testing.assert_array_equal(block.ffn(x), mlp(x))


def test_block_from_llama_names_what_it_lacks(rng: np.random.Generator) -> None:
    weights = llama_weights(rng)
    del weights[PREFIX + "mlp.up_proj.weight"]
    with pytest.raises(ValueError, match="from_llama: weights lacks model.layers.7.mlp.up_proj.weight"):
        ModernTransformerBlock.from_llama(weights, 4, 2, prefix=PREFIX)


def test_layers_print_their_sizes() -> None:
    assert repr(Linear(3, 4).astype("int8")) == "Linear(in_features=3, out_features=4, dtype='int8')"
    assert repr(Swish()) == "Swish()"
    lines = repr(ModernTransformerBlock(64, 4, 2)).splitlines()
    assert lines[0] == "ModernTransformerBlock:" and "  norm1: RMSNorm(dim=64, eps=1e-06)" in lines
    assert "  ffn: SwiGLU(input_dim=64, hidden_dim=170, dtype='float32')" in lines
