"""RecurrentGemma's config.json, what its formats leave whole, and rows that begin beside others that go on."""
from __future__ import annotations

from pathlib import Path

import golden_models
import numpy as np
import pytest
from model_folder import small, tensors, write

import forge_c as fc
from forge_c.functional import RGLRUPart
from forge_c.models import load
from forge_c.models.spec import RGLRU, Attention, GatedMLP, Norm, Rope, model_spec
from forge_c.models.spec.document import from_document, to_document

FAMILY = "recurrent_gemma"
# The file of google/recurrentgemma-2b, but for what no decoder reads.
PUBLISHED = {
    "model_type": FAMILY, "architectures": ["RecurrentGemmaForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "attention_window_size": 2048, "block_types": ["recurrent", "recurrent", "attention"],
    "bos_token_id": 2, "conv1d_width": 4, "embeddings_scale_by_sqrt_dim": True, "eos_token_id": 1,
    "final_w_init_variance_scale": 0.07692307692307693, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2560, "intermediate_size": 15360, "logits_soft_cap": 30.0, "lru_width": 2560,
    "num_attention_heads": 10, "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 256000, "w_init_variance_scale": 0.01}
IDS = np.random.default_rng(0).integers(0, 97, (2, 60))


def test_the_published_file():
    spec = model_spec(PUBLISHED)
    kinds = [type(layer.mixer) for layer in spec.layers]
    assert kinds == ([RGLRU, RGLRU, Attention] * 9)[:26]
    assert spec.layers[0].mixer == RGLRU(2560, 10, 4, "gelu_tanh") and spec.layers[0].mixer.floats == 4 * 2560
    attention = spec.layers[2].mixer
    assert attention == Attention(10, 1, 256, 256 ** -0.5, window=2048, rope=attention.rope, o_bias=True)
    assert attention.rope == Rope(128, 10000.0, attention.rope.scaling)
    assert spec.layers[0].mlp == GatedMLP(7680, "gelu_tanh", bias=True)
    assert spec.layers[0].norm == spec.head.norm == Norm("rms", 1e-6, 1.0)
    assert spec.head.tied and spec.head.softcap == 30.0
    assert spec.embed.scale == 50.5  # of 50.596, in bfloat16


def test_what_a_file_leaves_out():
    spec = model_spec({"model_type": FAMILY})
    assert (spec.n_layers, spec.hidden_size, spec.vocab_size) == (26, 2560, 256000)
    assert spec.layers[0].mixer == RGLRU(2560, 10, 4, "gelu_tanh") and spec.layers[1].mlp.width == 3840
    assert spec.layers[2].mixer.n_kv_heads == 10 and spec.layers[2].mixer.rope.dim == 128
    assert model_spec(small(FAMILY, lru_width=None)).layers[0].mixer.width == 32


def test_the_rotation_by_old_and_new_keys():
    new = {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.25}
    old = {"rope_theta": 5e4, "partial_rotary_factor": 0.25}
    specs = [model_spec(small(FAMILY, hidden_size=64, head_dim=16, **keys)) for keys in ({"rope_parameters": new}, old)]
    assert specs[0] == specs[1] and specs[0].layers[1].mixer.rope.dim == 4
    assert specs[0].layers[1].mixer.rope.theta == 5e4


@pytest.mark.parametrize(("changes", "message"), [
    ({"block_types": []}, r"block_types is \[\], expected a list of recurrent and attention"),
    ({"block_types": ["recurrent", "mamba"]}, "block_types is"), ({"block_types": "recurrent"}, "block_types is"),
    ({"lru_width": 30}, "lru_width is 30, expected a multiple of num_attention_heads 4"),
    ({"head_dim": 12}, "head_dim is 12, expected 32 / 4, hidden_size by num_attention_heads"),
    ({"embeddings_scale_by_sqrt_dim": False}, "embeddings_scale_by_sqrt_dim is False, expected true"),
    ({"attention_window_size": None}, "attention_window_size is None, expected an integer from 1"),
    ({"conv1d_width": 0}, "conv1d_width is 0"), ({"logits_soft_cap": None}, "logits_soft_cap is None"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling .*, expected default and null"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
    ({"hidden_activation": "silu2"}, "hidden_act is 'silu2'"), ({"num_attention_heads": 5}, "num_attention_heads"),
    ({"sliding_window": 5}, "sliding_window is 5, which may change the maths"),
    ({"layer_types": ["linear_attention"] * 3}, "layer_types is"), ({"mlp_bias": True}, "mlp_bias is True"),
    ({"partial_rotary_factor": 0.4}, "config.json"),
])
def test_messages(changes, message):
    with pytest.raises(ValueError, match=rf"^config.json: .*{message}" if message != "config.json" else message):
        model_spec(small(FAMILY, **changes))


def test_a_spec_as_a_document():
    spec = model_spec(small(FAMILY))
    document = to_document(spec)
    assert from_document(document) == spec and document["layers"][0]["mixer"]["kind"] == "RGLRU"
    for name, value in (("heads", 5), ("heads", 0), ("width", 0), ("conv", 0), ("width", 1 << 30)):
        mixer = document["layers"][0]["mixer"] | {name: value}
        wrong = document | {"layers": [document["layers"][0] | {"mixer": mixer}, *document["layers"][1:]]}
        with pytest.raises(ValueError, match=rf"spec.layers\[0\].mixer.{name}"):
            from_document(wrong)


@pytest.mark.parametrize(("dtype", "activations", "off"), [
    ("bfloat16", None, 0.03), ("int8", None, 0.05), ("int4", None, 0.4), ("int4", "int12", 0.4),
    ("int8", "int12", 0.05)])
def test_formats(tmp_path: Path, dtype, activations, off):
    """Near float32, in the same bits in pieces; the gates, which are small, keep more of int4 than others."""
    case = golden_models.golden("recurrent_gemma")
    model = load(case.write(tmp_path), dtype, activations=activations)
    whole = model(case.ids)
    assert np.abs(whole - case.logits).max() <= off * np.abs(case.logits).max()
    for cuts in ([0, 3, 20, 21, 37], range(38)):
        cache = model.new_cache(len(case.ids))
        parts = [model(case.ids[:, a:b], cache) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        assert np.concatenate(parts, axis=1).tobytes() == whole.tobytes()
    held = model._decoder._model.parts[0].arguments
    assert {gate.dtype for gate in held["gates"]} == {"q8_0" if dtype == "int4" else dtype}
    assert held["in_proj"].dtype == held["out_proj"].dtype == ("q4_1" if dtype == "int4" else dtype)
    assert held["conv"].dtype == "float32"


def test_a_row_begins_beside_others_that_go_on(tmp_path: Path):
    """By its position, not by the call: also after it was taken back to its beginning."""
    model = load(write(tmp_path, small(FAMILY)))
    alone = [model(IDS[i : i + 1]) for i in range(2)]
    cache = model.new_cache(2)
    model(IDS[:1, :7], cache.row(0))
    found = model(np.stack([IDS[0, 7:20], IDS[1, :13]]), cache)
    np.testing.assert_array_equal(found, np.stack([alone[0][0, 7:20], alone[1][0, :13]]))
    cache.truncate([20, 0])
    found = model(np.stack([IDS[0, 20:21], IDS[1, :1]]), cache)
    np.testing.assert_array_equal(found, np.stack([alone[0][0, 20:21], alone[1][0, :1]]))


def test_a_long_past_counts_and_the_first_token_is_added_whole(tmp_path: Path):
    """At a row's first token the recurrence adds sigmoid(i) u, at others sqrt(1 - a^2) of that."""
    config = small(FAMILY, num_hidden_layers=1, block_types=["recurrent"])
    weights = tensors(config)
    name = "model.layers.0.temporal_block.rg_lru.recurrent_param"
    weights[name][...] = -30  # a = 1, to 1e-12
    model = load(write(tmp_path, config, weights))
    hidden = model.hidden(IDS[:1])
    weights[name][...] = 0
    forgetful = load(write(tmp_path / "other", config, weights)).hidden(IDS[:1])
    np.testing.assert_array_equal(hidden[:, 0], forgetful[:, 0])
    assert np.abs(hidden[:, 1:] - forgetful[:, 1:]).max() > 0.1


def test_what_the_part_is_made_of():
    """Two heads of 3 channels, from 8."""
    weights = {"in_proj": (8, 12), "conv": (4, 6), "out_proj": (6, 8)}
    made = {name: fc.pack(np.ones(shape, np.float32)) for name, shape in weights.items()}
    made |= {"gates": [fc.pack(np.ones((3, 3), np.float32))] * 4, "heads": 2, "param": np.ones(6, np.float32)}
    assert RGLRUPart(**made).floats == 4 * 6
    for changes, error, message in (
            ({"heads": 4}, ValueError, "RGLRUPart: heads is 4, with 4 gates, expected a divisor of 6"),
            ({"heads": 0}, ValueError, "heads is 0"), ({"gates": made["gates"][:3]}, ValueError, "with 3 gates"),
            ({"gate_bias": np.ones(11, np.float32)}, ValueError, "biases of as many channels"),
            ({"gates": [made["conv"]] * 4}, ValueError, r"RGLRUPart: gates has shape \(4, 6\), expected \(3, 3\)"),
            ({"conv": made["in_proj"]}, ValueError, r"conv is .*, expected a PackedWeight \(width, 6\) of float32"),
            ({"param": np.ones(5, np.float32)}, ValueError, r"param has shape \(5,\), expected \(6,\)"),
            ({"param": None}, TypeError, "RGLRUPart: param is None, expected an array"),
            ({"in_proj": made["conv"]}, ValueError, r"in_proj has shape \(4, 6\), expected \(8, 12\)")):
        with pytest.raises(error, match=message):
            RGLRUPart(**made | changes)
