"""Tiny random Hugging Face models of every family, and what the tests with them share. Needs torch and transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import transformers  # noqa: E402

import forge_c as fc  # noqa: E402
from forge_c.integrations.transformers import register  # noqa: E402

WINDOW = 7
# Both sides compute in float32; what is left is rounding that grows with depth. Relative to the largest logit, as in
# test_model_parity.
PARITY = 2e-5


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """One thread for torch and for us, no gradients, and the name registered."""
    before = torch.get_num_threads(), fc.get_num_threads()
    torch.set_num_threads(1)
    fc.set_num_threads(1)
    register()
    with torch.no_grad():
        yield
    torch.set_num_threads(before[0])
    fc.set_num_threads(before[1])


# Family -> prefix of its classes, options beyond COMMON, norms of a layer (one more after the last), its attention's
# linears.
FAMILIES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}, 2, 4),
    "mistral": ("Mistral", {"sliding_window": WINDOW}, 2, 4),
    "qwen2": ("Qwen2", {}, 2, 4),
    "qwen3": ("Qwen3", {}, 4, 4),
    "gemma": ("Gemma", {}, 2, 4),
    "gemma2": ("Gemma2", {"sliding_window": WINDOW, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0}, 4, 4),
    "gemma3_text": ("Gemma3", {"sliding_window": WINDOW, "query_pre_attn_scalar": 16,
                               "layer_types": ["sliding_attention", "full_attention"]}, 6, 4),
    "phi3": ("Phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                          "partial_rotary_factor": 0.5}}, 2, 2),
    "smollm3": ("SmolLM3", {}, 2, 4),
    "granite": ("Granite", {"attention_multiplier": 0.2, "residual_multiplier": 0.5}, 2, 4),
}
COMMON = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
          "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
          "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.2,
          "attn_implementation": "eager"}


def tiny(family: str, dtype: Any = torch.float32, seed: int = 0, **options: Any) -> Any:
    """A random model of the family; norm weights are random too."""
    prefix, own = FAMILIES[family][:2] if family in FAMILIES else (family, {})
    config_class = getattr(transformers, f"{prefix}TextConfig", None) or getattr(transformers, f"{prefix}Config")
    config = config_class(**COMMON | own | options)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.add_(0.1 * torch.randn(weight.shape))
        assert "sinks" not in name or weight.isfinite().all()
    return model.to(dtype)


def ids(batch: int, length: int, seed: int = 1) -> Any:
    return torch.from_numpy(np.random.default_rng(seed).integers(2, COMMON["vocab_size"], (batch, length)))


def written(model: Any, prompt: Any, new: int = 24, **options: Any) -> list[list[int]]:
    """Greedy continuation."""
    return model.generate(prompt, max_new_tokens=new, do_sample=False, **options)[:, prompt.shape[1]:].tolist()


def assert_parity(got: Any, want: Any) -> None:
    assert got.shape == want.shape and got.dtype is want.dtype
    assert (got - want).abs().max() <= PARITY * want.abs().max()


def heads(rng: np.random.Generator, dtype: Any, batch: int, n_heads: int, seq: int, dim: int, laid_out: bool) -> Any:
    """(batch, heads, seq, dim) as transformers has it: a view of a projection (batch, seq, heads, dim), or a cache."""
    shape = (batch, seq, n_heads, dim) if laid_out else (batch, n_heads, seq, dim)
    t = torch.from_numpy(rng.standard_normal(shape, np.float32)).to(dtype)
    return t.transpose(1, 2) if laid_out else t


def qkv(rng: np.random.Generator, dtype: Any = torch.float32, batch: int = 2, q_len: int = 9, kv_len: int = 9,
        dim: int = 16, v_dim: int = 16) -> tuple[Any, Any, Any]:
    return (heads(rng, dtype, batch, 6, q_len, dim, True), heads(rng, dtype, batch, 2, kv_len, dim, False),
            heads(rng, dtype, batch, 2, kv_len, v_dim, False))
