"""Phi-3."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forge_c.models.spec import blocks
from forge_c.models.spec.kinds import Attention, LayerSpec, ModelSpec
from forge_c.models.spec.reader import COMMON, Reader

_PHI3 = COMMON | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None,
                  "original_max_position_embeddings": None}


def phi3(config: Mapping[str, Any]) -> ModelSpec:
    """LLaMA whose files hold q, k, v as one matrix and gate, up as another."""
    c = Reader(config, _PHI3)
    s, norm = blocks.sizes(c), blocks.rms_norm(c)
    rope, mlp = blocks.rope(c, s.head_dim), blocks.gated_mlp(c, blocks.activation(c), fused=True)
    layers = [LayerSpec(Attention(s.heads, s.kv_heads, s.head_dim, s.head_dim ** -0.5, window=w, rope=rope, fused=True),
                        mlp, norm) for w in blocks.windows(c, s.layers)]
    return blocks.decoder(c, layers, norm)
