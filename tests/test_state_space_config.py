"""config.json and tensor names of families with recurrent layers."""
from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from model_folder import STATE_SPACE, small, tensors, write

from forge_c.models import load
from forge_c.models.spec import MLP, Attention, GatedMLP, Mamba, Mamba2, Norm, ShortConv, model_spec, tensor_names
from forge_c.models.weights.random import shape_config

IDS = np.arange(7)[None]


def test_what_a_file_leaves_out():
    layer = model_spec({"model_type": "mamba", "vocab_size": 9, "hidden_size": 40, "num_hidden_layers": 2}).layers[1]
    assert layer.mixer == Mamba(80, 16, 4, 3) and layer.mlp is None and layer.norm == Norm("rms", 1e-5)
    falcon = model_spec({"model_type": "falcon_mamba", "vocab_size": 9, "hidden_size": 40, "num_hidden_layers": 2})
    assert falcon.layers[0].mixer == Mamba(80, 16, 4, 3, norm=Norm("rms", 1e-6)) and falcon.head.tied
    two = model_spec({"model_type": "mamba2", "vocab_size": 9, "hidden_size": 4096, "num_hidden_layers": 1})
    assert two.layers[0].mixer == Mamba2(128, 64, 8, 128, 4, norm=Norm("rms", 1e-5)) and not two.head.tied


@pytest.mark.parametrize(("name", "heads"), [("mamba-130m", None), ("mamba2-130m", 24)])
def test_the_sizes_of_models_of_130_million(name, heads):
    spec = model_spec(shape_config(name))
    assert (spec.hidden_size, spec.n_layers, spec.layers[0].mixer.inner) == (768, 24, 1536)
    assert getattr(spec.layers[0].mixer, "heads", None) == heads


@pytest.mark.parametrize(("limit", "expected"), [
    (None, (0.0, None)), ([0.0, math.inf], (0.0, None)), ([0.1, {"__float__": "Infinity"}], (0.1, None)),
    ([0, 2], (0.0, 2.0))])
def test_limits_of_a_step(limit, expected):
    mixer = model_spec(json.loads(json.dumps(small("mamba2", time_step_limit=limit)))).layers[0].mixer
    assert (mixer.dt_min, mixer.dt_max) == expected


@pytest.mark.parametrize(("family", "changes", "message"), [
    ("mamba2", {"time_step_limit": [2, 1]}, r"time_step_limit is \[2, 1\], expected two numbers, the smaller first"),
    ("mamba2", {"time_step_limit": [math.nan, 1]}, "time_step_limit is"), ("mamba2", {"time_step_limit": 3}, "is 3"),
    ("mamba2", {"time_step_limit": [0, {"__float__": "NaN"}]}, "time_step_limit is"),
    ("mamba2", {"num_heads": 5}, "num_heads is 5 and head_dim 16, expected a product of 64"),
    ("mamba2", {"n_groups": 3}, "n_groups is 3, expected a divisor of the 4 heads"),
    ("mamba2", {"norm_before_gate": True}, "norm_before_gate is True, expected false"),
    ("mamba", {"rms_norm": False}, "rms_norm is False, expected true"),
    ("mamba", {"hidden_act": "gelu"}, "hidden_act is 'gelu', expected silu"),
    ("mamba", {"intermediate_size": 60}, "intermediate_size is 60, expected 64, expand times hidden_size"),
    ("mamba", {"time_step_rank": "full"}, "time_step_rank is 'full', expected auto or an integer"),
    ("mamba", {"expand": 1e300}, "expand times hidden_size is"),
    ("mamba2", {"expand": 1.7e308}, "expand times hidden_size is inf, expected 1 to"),
    ("bamba", {"mamba_expand": 1.7e308}, "mamba_expand times hidden_size is inf, expected 1 to"),
    ("zamba2", {"mamba_expand": 0.01}, "mamba_expand times hidden_size is 0.32, expected 1 to"),
    ("falcon_h1", {"mamba_expand": 1.7e308, "mamba_d_ssm": None}, "mamba_expand times hidden_size is inf"),
    ("mamba", {"state_size": 0}, "state_size is 0"),
    ("bamba", {"attn_layer_indices": [7]}, r"attn_layer_indices is \[7\], expected numbers of layers, 0 to 2"),
    ("bamba", {"mamba_d_head": 5}, "mamba_n_heads is 4 and mamba_d_head 5, expected a product of 64"),
    ("granitemoehybrid", {"num_local_experts": 4}, "num_local_experts is 4, expected 0: experts are not computed"),
    ("granitemoehybrid", {"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'"),
    ("lfm2", {"layer_types": ["conv"]}, "layer_types is .*, expected 3 times conv or full_attention"),
    ("nemotron_h", {"layers_block_type": ["moe"]}, "expected linear_attention, full_attention or mlp for each layer"),
    ("nemotron_h", {"mlp_hidden_act": "silu"}, "expected mlp_hidden_act relu2"),
])
def test_messages(family, changes, message):
    with pytest.raises(ValueError, match=rf"^config.json: .*{message}"):
        model_spec(small(family, **changes))


def test_older_names():
    """Of keys and of layer types."""
    new = model_spec(small("nemotron_h"))
    old = small("nemotron_h", layers_block_type=..., hybrid_override_pattern="M-*M", n_groups=..., mamba_n_groups=2)
    assert model_spec(old) == new and [type(layer.mixer) for layer in new.layers] == [
        Mamba2, type(None), Attention, Mamba2] and new.layers[1].mlp == MLP(40, "relu2")
    types = ["linear_attention", "full_attention", "linear_attention"]
    assert model_spec(small("granitemoehybrid", layer_types=types)) == model_spec(small("granitemoehybrid"))
    other = small("lfm2", layer_types=..., full_attn_idxs=[1], intermediate_size=..., block_ff_dim=40)
    assert model_spec(other) == model_spec(small("lfm2"))
    spec = model_spec(small("lfm2"))
    assert spec.layers[0].mixer == ShortConv(32, 3) and spec.layers[0].mlp == GatedMLP(32, "silu")
    assert spec.layers[1].mixer.rope.theta == 1e6


@pytest.mark.parametrize("family", STATE_SPACE)
def test_a_model_saved_without_its_head(family, tmp_path):
    """Its tensors have no prefix then."""
    config = small(family)
    weights = tensors(config)
    whole = load(write(tmp_path / "whole", config, weights))
    bare = {name.split(".", 1)[1] if name != "lm_head.weight" else name: value for name, value in weights.items()}
    found = load(write(tmp_path / "bare", config, {n: v for n, v in bare.items() if n != "lm_head.weight"}))
    assert found.hidden(IDS).tobytes() == whole.hidden(IDS).tobytes()


def test_two_names_for_one_place(tmp_path):
    config: dict[str, Any] = small("mamba")
    weights = tensors(config)
    weights["model.embed_tokens.weight"] = weights["backbone.embeddings.weight"]
    with pytest.raises(ValueError, match="have the same place in the model"):
        load(write(tmp_path, config, weights))
    assert tensor_names("llama")("backbone.norm_f.weight") == "backbone.norm_f.weight"
