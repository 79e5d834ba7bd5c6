"""config.json -> one typed spec. Every family's quirks end here: what computes knows only the kinds of a spec."""
from forge_c.models.spec.families import FAMILIES, model_spec
from forge_c.models.spec.kinds import (
    MLP,
    RGLRU,
    Ahead,
    Attention,
    Embedding,
    GatedMLP,
    Head,
    JoinedAttention,
    LayerSpec,
    Mamba,
    Mamba2,
    ModelSpec,
    Multipliers,
    Norm,
    Rope,
    Routed,
    Router,
    ShortConv,
)
from forge_c.models.spec.names import tensor_names

__all__ = ["FAMILIES", "MLP", "RGLRU", "Ahead", "Attention", "Embedding", "GatedMLP", "Head", "JoinedAttention",
           "LayerSpec", "Mamba", "Mamba2", "ModelSpec", "Multipliers", "Norm", "Rope", "Routed", "Router", "ShortConv",
           "model_spec", "tensor_names"]
