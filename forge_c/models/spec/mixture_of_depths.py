"""LLaMA with routers on some of its layers (mixture of depths, arXiv 2404.02258). There is no published format: this is
forge_c's own, docs/mixture_of_depths.md describes it."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from forge_c.checks import short
from forge_c.models.spec.kinds import ModelSpec, Router
from forge_c.models.spec.llama import llama_as
from forge_c.models.spec.reader import MAX_WIDTH, Reader, checked_number

_MODES = ("threshold", "predictor")
_DEFAULTS = {"routed_layers": None, "router_mode": "threshold", "router_threshold": 0.0,
             "router_predictor_size": None, "router_capacity": 0.125}


def mixture_of_depths(config: Mapping[str, Any]) -> ModelSpec:
    """LLaMA's keys and those of the routers."""
    spec, c = llama_as(config, _DEFAULTS)
    checked_number("router_capacity", c.value("router_capacity"), most=1.0)  # of the training; nothing follows from it
    routed = _routed_layers(c, spec.n_layers)
    routers = dict(zip(routed, _routers(c, len(routed), spec.hidden_size), strict=True))
    return replace(spec, layers=tuple(replace(layer, router=routers.get(i)) for i, layer in enumerate(spec.layers)))


def _routed_layers(c: Reader, layers: int) -> list[int]:
    """Numbers of layers, ascending; every other one by default, beginning with the second."""
    given = c.value("routed_layers")
    if given is None:
        return list(range(1, layers, 2))
    if not isinstance(given, list) or any(type(i) is not int or not 0 <= i < layers for i in given) or (
            given != sorted(set(given))):
        raise ValueError(f"config.json: routed_layers is {short(given)}, expected layers from 0 to {layers - 1}, "
                         "ascending")
    return given


def _routers(c: Reader, count: int, hidden: int) -> list[Router]:
    mode = c.value("router_mode")
    if mode not in _MODES:
        why = ": topk chooses among the tokens of a whole text, which no model that writes one has" * (mode == "topk")
        raise ValueError(f"config.json: router_mode is {short(mode)}, expected one of {', '.join(_MODES)}{why}")
    if mode == "predictor":
        return [Router(predictor=c.integer("router_predictor_size", MAX_WIDTH, max(16, hidden // 16)))] * count
    given = c.value("router_threshold")
    thresholds = given if isinstance(given, list) else [given] * count
    if len(thresholds) != count or any(isinstance(t, bool) or not isinstance(t, int | float) or not abs(t) < 1e38
                                       for t in thresholds):
        raise ValueError(f"config.json: router_threshold is {short(given)}, expected a number, or one for each of "
                         f"{count} routed layers")
    return [Router(float(t)) for t in thresholds]
