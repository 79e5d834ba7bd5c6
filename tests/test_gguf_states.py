"""GGUF files of models whose layers have recurrent states, all or some: the bits of the folder they were made of."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import Raw, Typed
from gguf_models import ARCHITECTURES, STATES, renamed, write_gguf
from model_folder import Config, small, tensors, write
from numpy.typing import NDArray
from test_gguf_models import ROUNDED, SAME, both, check_refused, config_of, difference

from forge_c.models import load
from forge_c.models.spec import Attention, Mamba2, ShortConv

IDS = np.arange(24).reshape(2, 12)
FAMILIES = tuple(family for family, name in ARCHITECTURES.items() if name in STATES)


@pytest.mark.parametrize(("family", "dtype"), [
    (family, dtype) for family in FAMILIES for dtype in ("float32", "bfloat16", "int8", "int4")
    # whose gate is part of a matrix in the folder, and has more bits there
    if (family, dtype) != ("granitemoehybrid", "int4")])
def test_the_bits_are_the_folders(tmp_path, family, dtype):
    """A stands in a file as it is, and other numbers in another order."""
    file, folder = both(tmp_path, config_of(family))
    assert load(file, dtype)(IDS).tobytes() == load(folder, dtype)(IDS).tobytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_are_the_folders(tmp_path, family):
    """But for eps and scale, which are float32 in a file."""
    file, folder = both(tmp_path, config_of(family))
    found, expected = ([re.sub(r"(eps|scale)=[^,]+", "", repr(layer.mixer)) for layer in load(path).config.layers]
                       for path in (file, folder))
    assert found == expected


def q8_0(w: NDArray[Any]) -> tuple[Raw, NDArray[np.float32]]:
    """A matrix in blocks of 32, and its numbers, of which the same blocks would be made again."""
    blocks = w.reshape(-1, 32)
    d = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
    q = np.rint(blocks / d.astype(np.float32)).clip(-127, 127).astype(np.int8)
    numbers = (q * d.astype(np.float32)).reshape(w.shape)
    return Raw(8, w.shape, np.concatenate([d.view(np.int8), q], axis=1).tobytes()), numbers


def of_blocks(tmp_path: Path, config: Config) -> tuple[Path, Path]:
    """A file in which matrices with rows of whole blocks are Q8_0, and the folder with their numbers."""
    weights = {name: q8_0(w)[1] if w.ndim == 2 and w.shape[1] % 32 == 0 and not name.endswith("A_log") else w
               for name, w in tensors(config).items()}
    names = ("ssm_in.", "ssm_x.", "ssm_dt.", "ssm_out.", "attn_", "ffn_", "proj.", "token_embd.", "output.")
    raws = {name: q8_0(w)[0] for name, w in renamed(config, weights).items()
            if w.ndim == 2 and w.shape[1] % 32 == 0 and any(part in name for part in names)}
    assert len(raws) > 5
    return write_gguf(tmp_path / "x.gguf", config, weights, more=raws), write(tmp_path / "folder", config, weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_held_as_they_are(tmp_path, family):
    """Number by number; a matrix whose rows are no whole blocks stays in floats."""
    file, folder = of_blocks(tmp_path, config_of(family))
    model = load(file)
    assert model.dtype == "q8_0" and difference(file, folder) <= SAME
    assert difference(file, folder, found="auto") < ROUNDED
    assert {row.type for row in model.info} == {"Q8_0", "F32"}


def test_what_is_no_matrix_stays_in_floats(tmp_path):
    """A convolution and A have two dimensions, and no product is made of them."""
    file, _ = both(tmp_path, config_of("mamba2"))
    held = {(row.held, row.tensors) for row in load(file, "int8").info}
    assert held == {("int8", 1 + 1 + 3 * 2), ("float32", 1 + 3 * 7)}


@pytest.mark.parametrize(("family", "value", "kinds"), [
    ("granitemoehybrid", 2, [Attention] * 3), ("granitemoehybrid", Typed(5, [0, 0, 0]), [Mamba2] * 3),
    ("lfm2", 2, [Attention] * 3), ("lfm2", Typed(4, [2, 0, 2]), [Attention, ShortConv, Attention])])
def test_layers_without_key_value_heads_are_recurrent(tmp_path, family, value, kinds):
    types = {Attention: "full_attention" if family == "lfm2" else "attention", Mamba2: "mamba", ShortConv: "conv"}
    config = config_of(family, layer_types=[types[kind] for kind in kinds])
    key = f"{ARCHITECTURES[family]}.attention.head_count_kv"
    file, folder = both(tmp_path, config, {key: value})
    assert [type(layer.mixer) for layer in load(file).config.layers] == kinds
    assert load(file)(IDS).tobytes() == load(folder)(IDS).tobytes()


def test_granite_without_rotation(tmp_path):
    file, folder = both(tmp_path, config_of("granitemoehybrid", position_embedding_type="nope"))
    assert load(file)(IDS).tobytes() == load(folder)(IDS).tobytes()


def test_the_eps_of_nemotron_by_either_key(tmp_path):
    name = "nemotron_h.attention.layer_norm"
    config = config_of("nemotron_h", layer_norm_epsilon=1e-3)
    file, folder = both(tmp_path, config, {f"{name}_rms_epsilon": None, f"{name}_epsilon": 1e-3})
    assert load(file)(IDS).tobytes() == load(folder)(IDS).tobytes()
    assert load(both(tmp_path, config)[0])(IDS).tobytes() != load(folder)(IDS).tobytes()


@pytest.mark.parametrize("family", ["mamba", "mamba2", "lfm2"])
def test_biases_where_there_are_tensors(tmp_path, family):
    """Of the projections, and of LFM2's convolution."""
    flag = {"conv_bias" if family == "lfm2" else "use_bias": True}
    config, rng = config_of(family, **flag), np.random.default_rng(1)
    weights = tensors(config)
    parts = ("in_proj", "out_proj", "conv.conv") if family == "lfm2" else ("in_proj", "out_proj")
    for name in [n for n in weights if n.endswith(tuple(f"{part}.weight" for part in parts)) and "attn" not in n]:
        weights[name.replace("weight", "bias")] = rng.standard_normal(len(weights[name])).astype(np.float32) * 0.3
    file = write_gguf(tmp_path / "x.gguf", config, weights)
    folder = write(tmp_path / "folder", config, weights)
    assert load(file)(IDS).tobytes() == load(folder)(IDS).tobytes()


def test_axes_of_one_may_be_left_out(tmp_path):
    """As llama-quantize does: a norm of one group is a vector."""
    config = config_of("mamba2", n_groups=1)
    weights = tensors(config)
    flat = {name: w[0] for name, w in renamed(config, weights).items() if name.endswith("ssm_norm.weight")}
    assert len(flat) == 3 and all(w.shape == (64,) for w in flat.values())
    folder = write(tmp_path / "folder", config, weights)
    for more in ({}, flat):
        file = write_gguf(tmp_path / "x.gguf", config, weights, more=more)
        assert load(file)(IDS).tobytes() == load(folder)(IDS).tobytes()


@pytest.mark.parametrize("hidden", [48, 112, 1000])
def test_any_ratio_of_widths(tmp_path, hidden):
    """expand is a fraction, whose product with the width is rounded down."""
    from forge_c.models.spec.gguf_states import _expand
    for inner in range(1, 3 * hidden, 7):
        assert int(_expand(None, {"hidden_size": hidden}, inner) * hidden) == inner


REFUSED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("mamba", {"mamba.ssm.inner_size": None}, "mamba.ssm.inner_size is missing"),
    ("mamba", {"mamba.ssm.inner_size": 2**31}, "mamba.ssm.inner_size is 2147483648, expected an integer from 1 to"),
    ("mamba", {"mamba.ssm.inner_size": 63}, r"tensor blk.0.ssm_in.weight has shape .*, expected \(126, 32\)"),
    ("mamba", {"mamba.ssm.state_size": 0}, "mamba.ssm.state_size is 0, expected an integer from 1"),
    ("mamba", {"mamba.ssm.state_size": 2**20}, r"tensor blk.0.ssm_x.weight has shape \(15, 64\), expected \(2097155"),
    ("mamba", {"mamba.ssm.conv_kernel": 3}, r"tensor blk.0.ssm_conv1d.weight has shape \(64, 4\), expected \(64, 3\)"),
    ("mamba", {"mamba.ssm.conv_kernel": "4"}, "mamba.ssm.conv_kernel is '4', expected an integer"),
    ("mamba", {"mamba.ssm.time_step_rank": True}, "mamba.ssm.time_step_rank is True, expected an integer"),
    ("mamba", {"mamba.ssm.dt_b_c_rms": 1}, "mamba.ssm.dt_b_c_rms is 1, expected true or false"),
    ("mamba", {"mamba.ssm.group_count": 2}, "mamba.ssm.group_count is 2, which may change the maths"),
    ("mamba", {"mamba.attention.head_count": Typed(5, -1)}, "mamba.attention.head_count is -1, expected an integer"),
    ("mamba", {"mamba.attention.layer_norm_rms_epsilon": 0.0}, "rms_epsilon is 0.0, expected a number above 0"),
    ("mamba2", {"mamba2.ssm.time_step_rank": 5}, "mamba2.ssm.inner_size is 64, expected a multiple of .*rank 5"),
    ("mamba2", {"mamba2.ssm.time_step_rank": 2**20 + 1}, "time_step_rank is 1048577, expected an integer"),
    ("mamba2", {"mamba2.ssm.group_count": 3}, "n_groups is 3, expected a divisor of the 4 heads"),
    ("mamba2", {"mamba2.ssm.group_count": 4}, r"tensor blk.0.ssm_in.weight has shape \(156, 32\), expected \(180, 32"),
    ("mamba2", {"mamba2.ssm.state_size": None}, "mamba2.ssm.state_size is missing"),
    ("lfm2", {"lfm2.shortconv.l_cache": 0}, "lfm2.shortconv.l_cache is 0, expected an integer from 1"),
    ("lfm2", {"lfm2.shortconv.l_cache": 4}, r"tensor blk.0.shortconv.conv.weight has shape .*expected \(32, 4\)"),
    ("lfm2", {"lfm2.attention.head_count_kv": Typed(5, [0, 2])}, "head_count_kv has 2 values, expected 3, one a layer"),
    ("lfm2", {"lfm2.attention.head_count_kv": Typed(5, [2, 4, 0])}, "head_count_kv is .2, 4, 0.: layers that differ"),
    ("lfm2", {"lfm2.attention.head_count_kv": Typed(5, [0, -2, 0])}, "head_count_kv is -2, expected an integer from 0"),
    ("lfm2", {"lfm2.attention.head_count_kv": Typed(5, [0, 3, 0])}, "num_attention_heads is 4, expected a multiple"),
    ("lfm2", {"lfm2.attention.head_count_kv": Typed(5, [2, 2, 0])}, "tensor blk.0.shortconv.* has no place in this"),
    ("lfm2", {"lfm2.attention.causal": False}, "lfm2.attention.causal is False, expected true"),
    ("lfm2", {"lfm2.attention.sliding_window": 8}, "lfm2.attention.sliding_window is 8, which may change the maths"),
    ("lfm2", {"lfm2.feed_forward_length": 0}, r"tensor blk.0.ffn_gate.weight has shape .*expected \(1, 32\)"),
    ("granitemoehybrid", {"granitehybrid.expert_count": 8}, "granitehybrid.expert_count is 8: a mixture of experts"),
    ("granitemoehybrid", {"granitehybrid.rope.scaling.finetuned": 2}, "finetuned is 2, expected true or false"),
    ("granitemoehybrid", {"granitehybrid.ssm.inner_size": 96}, r"tensor blk.0.ssm_in.* expected \(220, 32\)"),
    ("granitemoehybrid", {"granitehybrid.embedding_scale": float("nan")}, "embedding_scale is nan, expected a number"),
    ("nemotron_h", {"nemotron_h.feed_forward_length": Typed(5, [0, 40, 40, 0])},
     "nemotron_h.feed_forward_length of layer 2 is 40, expected 0 where nemotron_h.attention.head_count_kv is not"),
    ("nemotron_h", {"nemotron_h.feed_forward_length": Typed(5, [0, 40])}, "feed_forward_length has 2 values, exp"),
    ("nemotron_h", {"nemotron_h.feed_forward_length": Typed(5, [0] * 4)}, "tensor blk.1.ssm_in.weight is missing"),
    ("nemotron_h", {"nemotron_h.expert_count": 8}, "nemotron_h.expert_count is 8: a mixture of experts"),
)


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_what_is_not_understood_is_refused(tmp_path, family, changes, message):
    config = config_of(family)
    check_refused(write_gguf(tmp_path / "x.gguf", config, tensors(config), changes), message)


@pytest.mark.parametrize(("family", "more", "message"), [
    ("mamba", {"blk.1.ssm_a": np.full((64, 6), 0.5, np.float32)},
     "tensor blk.1.ssm_a holds 0.5, expected numbers below 0: what a state decays by, not its logarithm"),
    ("mamba2", {"blk.1.ssm_a": np.full((4, 1), 0.5, np.float32)}, "tensor blk.1.ssm_a holds 0.5, expected numbers"),
    ("mamba", {"blk.0.ssm_a": np.full((64, 6), -np.inf, np.float32)}, "tensor blk.0.ssm_a: .*is not finite"),
    ("mamba2", {"blk.0.ssm_a": -np.ones(4, np.float32)},
     r"tensor blk.0.ssm_a has shape \(4,\), expected \(4, 1\) from the metadata"),
    ("mamba2", {"blk.0.ssm_norm.weight": np.ones(64, np.float32)}, r"shape \(64,\), expected \(2, 32\) from the meta"),
    ("mamba", {"blk.0.ssm_a.weight": np.ones((64, 6), np.float32)}, "tensor blk.0.ssm_a.weight has no place"),
    ("mamba", {"blk.0.ssm_norm.weight": np.ones((1, 64), np.float32)}, "tensor blk.0.ssm_norm.weight has no place"),
    ("mamba", {"blk.0.attn_q.weight": np.ones((4, 4), np.float32)}, "tensor blk.0.attn_q.weight has no place"),
    ("mamba", {"blk.0.ssm_dt_norm.weight": np.ones(3, np.float32)}, "tensor blk.0.ssm_dt_norm.weight has no place"),
    ("mamba", {"blk.3.ssm_a": np.ones((4, 4), np.float32)}, "tensor blk.3.ssm_a has no place in this model of 3"),
    ("lfm2", {"output_norm.weight": np.ones(32, np.float32)}, "tensor output_norm.weight has no place"),
    ("lfm2", {"blk.0.shortconv.weight": np.ones(32, np.float32)}, "tensor blk.0.shortconv.weight has no place"),
    ("mamba", {"blk.0.ssm_dt.bias.weight": np.ones(32, np.float32)}, "tensor blk.0.ssm_dt.bias.weight has no place"),
    ("nemotron_h", {"blk.0.ffn_up.weight": np.ones((40, 32), np.float32)}, "1 tensors have no place .* blk.0.ffn_up"),
])
def test_tensors_without_a_place_or_a_number_are_refused(tmp_path, family, more, message):
    config = config_of(family)
    check_refused(write_gguf(tmp_path / "x.gguf", config, tensors(config), more=more), message)


def test_a_conv_of_one_token_remembers_nothing(tmp_path):
    """The shortest that a file can say."""
    config = small("lfm2", conv_L_cache=1)
    weights = {n: w[..., -1:].copy() if n.endswith("conv.conv.weight") else w for n, w in tensors(config).items()}
    file = write_gguf(tmp_path / "x.gguf", config, weights, {"lfm2.shortconv.l_cache": 1})
    folder = write(tmp_path / "folder", config, weights)
    assert load(file)(IDS).tobytes() == load(folder)(IDS).tobytes()
