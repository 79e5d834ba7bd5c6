"""Train, measure and sample the embedded model: a byte-level LLaMA of under 4 MB that writes Python.

    python tools/train_embedded_model.py train --minutes 70 --out /tmp/tiny_python
    python tools/train_embedded_model.py eval                # the table of the model card, from the shipped files
    python tools/train_embedded_model.py sample --prompt "def "
    python tools/train_embedded_model.py overlap             # how much of each held-out file also stands in the training set

The data are the standard library's own .py files of the running Python; `heldout.json` beside the model names
the modules that are never trained on. A token is a byte; byte 0, which no source file holds, stands before and
after every file (it is both BOS and EOS). Needs torch, numpy and safetensors; transformers is not used.
"""
from __future__ import annotations

import argparse
import bz2
import fnmatch
import gzip
import json
import lzma
import math
import os
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SHIPPED = Path(__file__).resolve().parent.parent / "forge_c" / "assets" / "tiny_python"
BOUNDARY = 0  # BOS and EOS: the byte before the first and after the last of a file
WINDOW, STRIDE = 2048, 1024  # evaluation: at least STRIDE bytes of context, except near the start of a file
QUERY_CHUNK = 256
SHINGLE = 64  # bytes that must agree before `overlap` calls two places the same


@dataclass(frozen=True)
class Shape:
    """The model's sizes, named as in a Hugging Face LlamaConfig."""

    hidden_size: int = 192
    intermediate_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    vocab_size: int = 256
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5


def rope_cos_sin(head_dim: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """The half-split rotary tables, each (seq_len, head_dim), angles in float64."""
    inv_freq = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float64), inv_freq)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float(), angles.sin().float()


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by plain matrix products, which torch.compile fuses well on a CPU (its flash kernel is slower here).

    q (batch, heads, seq, head_dim), k and v (batch, kv_heads, seq, head_dim); cut into QUERY_CHUNK queries, so
    that most of the masked upper triangle is never computed.
    """
    batch, heads, seq, head_dim = q.shape
    kv_heads = k.shape[1]
    rep = heads // kv_heads
    q = (q * head_dim**-0.5).view(batch, kv_heads, rep, seq, head_dim)
    position = torch.arange(seq)
    parts = []
    for start in range(0, seq, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, seq)
        rows = q[:, :, :, start:stop].reshape(batch * kv_heads, rep * (stop - start), head_dim)
        keys = k[:, :, :stop].reshape(batch * kv_heads, stop, head_dim)
        values = v[:, :, :stop].reshape(batch * kv_heads, stop, head_dim)
        scores = torch.bmm(rows, keys.transpose(1, 2)).view(-1, rep, stop - start, stop)
        visible = position[:stop] <= position[start:stop, None]
        probs = scores.float().masked_fill(~visible, float("-inf")).softmax(-1).to(v.dtype)
        part = torch.bmm(probs.view(-1, rep * (stop - start), stop), values)
        parts.append(part.view(batch, heads, stop - start, head_dim))
    return torch.cat(parts, dim=2)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        queries, keys = (n * shape.head_dim for n in (shape.num_attention_heads, shape.num_key_value_heads))
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        s = self.shape
        heads, kv_heads = s.num_attention_heads, s.num_key_value_heads
        fused = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        qkv = F.linear(x, fused).view(batch, seq, heads + 2 * kv_heads, s.head_dim).transpose(1, 2)
        qk, v = qkv.split([heads + kv_heads, kv_heads], dim=1)
        first, second = qk.chunk(2, dim=-1)
        qk = (qk * cos + torch.cat([-second, first], dim=-1) * sin).to(v.dtype)
        q, k = qk.split([heads, kv_heads], dim=1)
        y = causal_attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(batch, seq, heads * s.head_dim))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, torch.cat([self.gate_proj.weight, self.up_proj.weight])).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """LlamaForCausalLM without its `model.` prefix; the embedding is also the output matrix."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        cos, sin = rope_cos_sin(shape.head_dim, shape.max_position_embeddings)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02 if name == "embed_tokens.weight" else 0.5 * p.shape[1] ** -0.5
                nn.init.normal_(p, std=std, generator=generator)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(p)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (batch, seq, vocab) of ids (batch, seq)."""
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)
