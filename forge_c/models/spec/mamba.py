"""Mamba, Falcon Mamba and Mamba-2: layers of a norm and a state space each, without attention or feed-forward parts."""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from forge_c.checks import short
from forge_c.models.spec import blocks
from forge_c.models.spec.kinds import LayerSpec, Mamba, Mamba2, ModelSpec, Norm
from forge_c.models.spec.reader import MAX_LAYERS, MAX_WIDTH, Reader

ANY_LENGTH = 1 << 39  # no number of tokens is too many: the state does not grow
# How the weights were drawn, and how somebody's kernels compute the same sums.
UNREAD = dict.fromkeys("""
    time_step_min time_step_max time_step_floor time_step_scale time_step_init_scheme rescale_prenorm_residual
    use_mambapy use_falcon_mambapy use_associative_scan fused_add_norm ssm_cfg chunk_size mamba_chunk_size
""".split())
_MAMBA = UNREAD | {
    "hidden_act": "silu", "tie_word_embeddings": True, "max_position_embeddings": ANY_LENGTH,
    "layer_norm_epsilon": 1e-5, "state_size": 16, "expand": 2, "conv_kernel": 4, "use_bias": False,
    "use_conv_bias": True, "time_step_rank": "auto", "rms_norm": True, "d_inner": None}
_FALCON = _MAMBA | {"mixer_rms_eps": 1e-6}
_MAMBA2 = _MAMBA | {"tie_word_embeddings": False, "state_size": 128, "num_heads": 128, "head_dim": 64, "n_groups": 8,
                    "time_step_limit": None, "norm_before_gate": False}


def mamba(config: Mapping[str, Any]) -> ModelSpec:
    """Pre-norm layers of selective state spaces."""
    c = Reader(config, _MAMBA)
    return _decoder(c, _selective(c))


def falcon_mamba(config: Mapping[str, Any]) -> ModelSpec:
    """Mamba that normalises a token's step, B and C, without weights."""
    c = Reader(config, _FALCON)
    return _decoder(c, _selective(c, Norm("rms", c.number("mixer_rms_eps", zero=True))))


def mamba2(config: Mapping[str, Any]) -> ModelSpec:
    """Pre-norm layers of Mamba-2's state spaces."""
    c = Reader(config, _MAMBA2)
    if c.flag("norm_before_gate"):
        raise ValueError("config.json: norm_before_gate is True, expected false for model_type mamba2")
    heads, head_dim = c.integer("num_heads", MAX_WIDTH), c.integer("head_dim", MAX_WIDTH)
    if heads * head_dim != _inner(c):
        raise ValueError(f"config.json: num_heads is {heads} and head_dim {head_dim}, expected a product of {_inner(c)}"
                         ", expand times hidden_size")
    return _decoder(c, state_space(c, heads, head_dim, groups="n_groups", state="state_size", conv="conv_kernel",
                                   bias="use_bias", conv_bias="use_conv_bias", limits=time_step_limit(c),
                                   norm=_norm(c)))


def state_space(c: Reader, heads: int, head_dim: int, *, groups: str, state: str, conv: str, bias: str, conv_bias: str,
                limits: tuple[float, float | None], norm: Norm | None, norm_before_gate: bool = False) -> Mamba2:
    """Mamba-2 by the names that the family gives its keys."""
    count = c.integer(groups, MAX_WIDTH)
    if heads % count:
        raise ValueError(f"config.json: {groups} is {count}, expected a divisor of the {heads} heads")
    _check_silu(c)
    return Mamba2(heads, head_dim, count, c.integer(state, MAX_WIDTH), c.integer(conv, MAX_WIDTH), c.flag(conv_bias),
                  c.flag(bias), norm, norm_before_gate, *limits)


def time_step_limit(c: Reader) -> tuple[float, float | None]:
    """What a step is clipped to: two numbers, of which the second may be infinity, None here. JSON has no infinity:
    transformers writes {"__float__": "Infinity"}, Python Infinity."""
    given = c.value("time_step_limit")
    if given is None:
        return 0.0, None
    found = [_limit(one) for one in given] if isinstance(given, list | tuple) else []
    if len(found) != 2 or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in found) or not (
            0 <= found[0] <= found[1] and math.isfinite(found[0])):
        raise ValueError(f"config.json: time_step_limit is {short(given)}, expected two numbers, the smaller first")
    return float(found[0]), None if math.isinf(found[1]) else float(found[1])


def _limit(given: Any) -> Any:
    named = isinstance(given, Mapping) and set(given) == {"__float__"} and given["__float__"] == "Infinity"
    return math.inf if named else given


def _selective(c: Reader, norm: Norm | None = None) -> Mamba:
    inner, rank = _inner(c), c.value("time_step_rank")
    _check_silu(c)
    if rank == "auto":
        rank = -(-c.integer("hidden_size", MAX_WIDTH) // 16)
    elif isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_WIDTH:
        raise ValueError(f"config.json: time_step_rank is {short(rank)}, expected auto or an integer from 1 to "
                         f"{MAX_WIDTH}")
    return Mamba(inner, c.integer("state_size", MAX_WIDTH), c.integer("conv_kernel", MAX_WIDTH), rank,
                 c.flag("use_conv_bias"), c.flag("use_bias"), norm)


def expanded(c: Reader, key: str) -> int:
    """`key` times hidden_size."""
    found = c.number(key) * c.integer("hidden_size", MAX_WIDTH)
    if not 1 <= found <= MAX_WIDTH:
        raise ValueError(f"config.json: {key} times hidden_size is {short(found)}, expected 1 to {MAX_WIDTH}")
    return int(found)


def _inner(c: Reader) -> int:
    """expand times hidden_size; files say it again."""
    inner = expanded(c, "expand")
    for key in ("intermediate_size", "d_inner"):
        if c.value(key) not in (None, inner):
            raise ValueError(f"config.json: {key} is {short(c.value(key))}, expected {inner}, expand times hidden_size")
    return inner


def _check_silu(c: Reader) -> None:
    if blocks.activation(c) != "silu":
        raise ValueError(f"config.json: hidden_act is {short(c.value('hidden_act'))}, expected silu for model_type "
                         f"{c.model_type}")


def _norm(c: Reader) -> Norm:
    if not c.flag("rms_norm"):
        raise ValueError(f"config.json: rms_norm is {short(c.value('rms_norm'))}, expected true for model_type "
                         f"{c.model_type}")
    return Norm("rms", c.number("layer_norm_epsilon", zero=True))


def _decoder(c: Reader, mixer: Mamba | Mamba2) -> ModelSpec:
    norm = _norm(c)
    return blocks.decoder(c, [LayerSpec(mixer, None, norm)] * c.integer("num_hidden_layers", MAX_LAYERS), norm)
