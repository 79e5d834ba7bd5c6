"""Layers: weights and one functional call each."""
from forge_c.nn.activation import GELU, ReLU
from forge_c.nn.attention import MultiHeadAttention
from forge_c.nn.linear import Embedding, Linear
from forge_c.nn.mixture_of_depths import MixtureOfDepths
from forge_c.nn.modern_activations import GeGLU, SwiGLU, Swish
from forge_c.nn.modern_attention import GroupedQueryAttention, MultiQueryAttention
from forge_c.nn.normalization import LayerNorm, RMSNorm
from forge_c.nn.positional import RotaryPositionalEmbedding, SinusoidalPositionalEncoding
from forge_c.nn.ssm import RGLRU, S4D, GatedDeltaNet, Mamba, Mamba2, ShortConv
from forge_c.nn.transformer import ModernTransformerBlock

__all__ = [
    "GELU", "RGLRU", "S4D", "Embedding", "GatedDeltaNet", "GeGLU", "GroupedQueryAttention", "LayerNorm", "Linear",
    "Mamba", "Mamba2", "MixtureOfDepths", "ModernTransformerBlock", "MultiHeadAttention", "MultiQueryAttention",
    "RMSNorm", "ReLU", "RotaryPositionalEmbedding", "ShortConv", "SinusoidalPositionalEncoding", "SwiGLU", "Swish",
]


def __dir__() -> list[str]:
    return sorted(__all__)
