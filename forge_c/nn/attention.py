"""Multi-head attention (arXiv 1706.03762)."""
from __future__ import annotations

from typing import Any

from forge_c.nn.modern_attention import GroupedQueryAttention


class MultiHeadAttention(GroupedQueryAttention):
    """Grouped-query attention with as many key/value heads as query heads.

    >>> MultiHeadAttention(64, 4, seed=0).n_rep
    1
    """

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0, bias: bool = True, **options: Any) -> None:
        super().__init__(d_model, n_heads, n_heads, dropout, bias, **options)
