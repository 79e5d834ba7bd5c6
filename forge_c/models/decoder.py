"""The decoder: which functional calls, in what order. It knows the spec and nothing of model families."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c.cache import KVCache
from forge_c.functional import (
    PackedWeight,
    attention,
    embedding,
    gated_linear,
    linear,
    rms_norm,
    rope,
)
from forge_c.models.config import ModelSpec
from forge_c.models.loading import Checkpoint
from forge_c.packing import pack, pack_gated
from forge_c.rotary import RopeTable, rope_table

DEFAULT_CONTEXT = 4096  # of new_cache, so that a model made for a million tokens does not ask for their memory
_DEPEND_ON_LENGTH = ("dynamic", "longrope")  # rope types whose angles depend on how long the sequence may become

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class LayerWeights:
    """One block. H hidden, I intermediate, A = n_heads * head_dim, K = n_kv_heads * head_dim."""

    input_norm: Floats  # (H,)
    qkv: PackedWeight  # (H, A + 2 K)
    qkv_bias: Floats | None
    q_norm: Floats | None  # (head_dim,)
    k_norm: Floats | None
    out: PackedWeight  # (A, H)
    out_bias: Floats | None
    post_attention_norm: Floats | None  # (H,), of what attention returns
    mlp_norm: Floats  # (H,)
    gate_up: PackedWeight  # a pair of (H, I)
    gate_up_bias: Floats | None  # (2, I)
    down: PackedWeight  # (I, H)
    down_bias: Floats | None
    post_mlp_norm: Floats | None

    def nbytes(self) -> int:
        return sum(value.nbytes for value in vars(self).values() if value is not None)


class ModelCache:
    """One KVCache per layer, and the RoPE table for the length that they have room for; from Model.new_cache."""

    def __init__(self, layers: list[KVCache], table: RopeTable) -> None:
        self.layers, self.table = layers, table

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.layers[0].batch

    @property
    def max_seq_len(self) -> int:
        """The longest a row may become."""
        return self.layers[0].max_seq_len

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each row, (batch,)."""
        return self.layers[0].lengths

    @property
    def seq_len(self) -> int:
        """Tokens in the longest row."""
        return self.layers[0].seq_len

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(layer.nbytes for layer in self.layers)

    def truncate(self, n: ArrayLike) -> None:
        """Forget every token from position n on; as KVCache.truncate."""
        with self.writing():
            for layer in self.layers:
                layer.truncate(n)

    def row(self, i: int) -> ModelCache:
        """Row i alone, sharing memory and length with this cache."""
        return ModelCache([layer.row(i) for layer in self.layers], self.table)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other threads out; RuntimeError if one is in."""
        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(layer.writing())
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep other threads out; RuntimeError if one is in. A block that raises leaves the lengths as they were."""
        with self.held():
            before = self.lengths
            try:
                yield
            except BaseException:
                for layer in self.layers:
                    layer._lengths[:] = before
                raise


class Decoder:
    """Packed weights and the forward pass; `forge_c.models.Model` adds text."""

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint, dtype: str) -> None:
        self.spec, self.dtype = spec, dtype
        self._tables: dict[int, RopeTable] = {}
        table = checkpoint.take("model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size))
        head = table if spec.tied else checkpoint.take("lm_head.weight", table.shape)
        self._embedding = table.astype(ml_dtypes.bfloat16) if dtype == "bfloat16" else table  # (vocab, H)
        self._head = pack(head.T, dtype)  # (H, vocab)
        del table, head
        self._layers = [_layer_weights(spec, checkpoint, i, dtype) for i in range(spec.n_layers)]
        self._norm = _vector(checkpoint, "model.norm.weight", spec.hidden_size)
        checkpoint.check_all_taken(("lm_head.weight",) if spec.tied else ())
        self._rope_table(1)  # an impossible rope setting is an error of the load, not of the first call

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they are held."""
        return (self._embedding.nbytes + self._head.nbytes + self._norm.nbytes
                + sum(layer.nbytes() for layer in self._layers))

    def new_cache(self, batch: int = 1, max_seq_len: int | None = None, dtype: str = "float32") -> ModelCache:
        """An empty cache for `batch` rows of up to max_seq_len tokens, by default min(the model's context, 4096).

        Layers with a sliding window keep no more than the window needs. dtype "float32" or "bfloat16".
        """
        s = self.spec
        room = min(s.max_position_embeddings, DEFAULT_CONTEXT) if max_seq_len is None else max_seq_len
        layers = [KVCache(batch, room, s.n_kv_heads, s.head_dim, dtype=dtype, window=window) for window in s.windows]
        return ModelCache(layers, self._rope_table(room))

    @property
    def angles_depend_on_length(self) -> bool:
        """Whether a row's rotary angles depend on the room that its cache has."""
        return self.spec.rope_scaling.get("rope_type") in _DEPEND_ON_LENGTH

    def hidden(self, ids: NDArray[np.int64], cache: ModelCache) -> Floats:
        """ids (batch, n <= KV_CHUNK), the tokens after those in the cache -> normalised states (batch, n, H)."""
        s = self.spec
        with cache.writing():
            positions = cache.lengths[:, None] + np.arange(ids.shape[1])
            x = embedding(ids, self._embedding, scale=s.embedding_scale, dtype=np.float32)
            for weights, layer_cache, turned in zip(self._layers, cache.layers, s.rope_layers, strict=True):
                x = self._block(x, weights, layer_cache, positions, cache.table if turned else None)
            return rms_norm(x, self._norm, s.norm_eps, weight_offset=s.norm_weight_offset, out=x)

    def logits(self, hidden: Floats) -> Floats:
        """hidden (..., H) -> (..., vocab)."""
        y = linear(hidden, self._head)
        if self.spec.logits_scale != 1.0:
            y *= np.float32(self.spec.logits_scale)
        if self.spec.final_softcap is not None:
            cap = np.float32(self.spec.final_softcap)
            y /= cap
            np.tanh(y, out=y)
            y *= cap
        return y

    def _block(self, x: Floats, w: LayerWeights, cache: KVCache, positions: NDArray[np.int64],
               table: RopeTable | None) -> Floats:
        """x (batch, n, H) -> the same shape."""
        s = self.spec
        q, k, v = self._heads(self._norm_of(x, w.input_norm), w, positions, table)
        cache.append(k, v)
        heads = attention(q, cache, causal=True, scale=s.attention_scale, softcap=s.attention_softcap)
        x = self._add(heads.reshape(*x.shape[:2], -1), w.out, w.out_bias, w.post_attention_norm, x)
        inner = gated_linear(self._norm_of(x, w.mlp_norm), w.gate_up, w.gate_up_bias, activation=s.activation)
        return self._add(inner, w.down, w.down_bias, w.post_mlp_norm, x)

    def _heads(self, x: Floats, w: LayerWeights, positions: NDArray[np.int64],
               table: RopeTable | None) -> tuple[Floats, Floats, Floats]:
        """q (batch, n, n_heads, head_dim), k and v (batch, n, n_kv_heads, head_dim), normalised and turned."""
        s = self.spec
        all_heads = linear(x, w.qkv, w.qkv_bias).reshape(*x.shape[:2], s.n_heads + 2 * s.n_kv_heads, s.head_dim)
        q, k, v = np.split(all_heads, [s.n_heads, s.n_heads + s.n_kv_heads], axis=2)
        if w.q_norm is not None:
            rms_norm(q, w.q_norm, s.norm_eps, out=q)
            rms_norm(k, w.k_norm, s.norm_eps, out=k)
        if table is not None:
            turned = all_heads[:, :, : s.n_heads + s.n_kv_heads]
            rope(turned, table, positions=positions, out=turned)
        return q, k, v

    def _norm_of(self, x: Floats, weight: Floats) -> Floats:
        return rms_norm(x, weight, self.spec.norm_eps, weight_offset=self.spec.norm_weight_offset)

    def _add(self, y: Floats, weight: PackedWeight, bias: Floats | None, norm: Floats | None, x: Floats) -> Floats:
        """x + residual_scale * norm(y @ weight + bias)."""
        s = self.spec
        if norm is None and s.residual_scale == 1.0:
            return linear(y, weight, bias, residual=x)
        z = linear(y, weight, bias)
        if norm is not None:
            rms_norm(z, norm, s.norm_eps, weight_offset=s.norm_weight_offset, out=z)
        if s.residual_scale != 1.0:
            z *= np.float32(s.residual_scale)
        z += x
        return z

    def _rope_table(self, length: int) -> RopeTable:
        """A table for at least `length` positions, or exactly as many where the angles depend on it."""
        s = self.spec
        tables, rows = self._tables, length
        if not self.angles_depend_on_length:
            rows = max([1 << (length - 1).bit_length(), *tables])
        if rows not in tables:
            tables = self._tables = {rows: rope_table(s.rope_dim, rows, s.rope_theta, scaling=s.rope_scaling)}
        return tables[rows]


def _vector(checkpoint: Checkpoint, name: str, n: int) -> Floats:
    return checkpoint.take(name, (n,)).astype(np.float32)


def _layer_weights(s: ModelSpec, checkpoint: Checkpoint, i: int, dtype: str) -> LayerWeights:
    """Layer i, its matrices packed. The checkpoint holds them as (out, in)."""
    prefix, hidden, inner = f"model.layers.{i}.", s.hidden_size, s.intermediate_size
    queries, keys = s.n_heads * s.head_dim, s.n_kv_heads * s.head_dim

    def matrix(name: str, rows: int, columns: int) -> NDArray[Any]:
        return checkpoint.take(f"{prefix}{name}.weight", (rows, columns))

    def vector(name: str, n: int, wanted: bool = True) -> Floats | None:
        return _vector(checkpoint, prefix + name, n) if wanted else None

    def norm(name: str, wanted: bool = True) -> Any:
        return vector(f"{name}.weight", hidden, wanted)

    if s.fused:
        qkv = matrix("self_attn.qkv_proj", queries + 2 * keys, hidden)
        gate, up = np.split(matrix("mlp.gate_up_proj", 2 * inner, hidden), 2)
    else:
        sizes = {"q": queries, "k": keys, "v": keys}
        qkv = np.concatenate([matrix(f"self_attn.{p}_proj", n, hidden) for p, n in sizes.items()])
        gate, up = matrix("mlp.gate_proj", inner, hidden), matrix("mlp.up_proj", inner, hidden)
    qkv_bias = gate_up_bias = None
    if s.qkv_bias:
        biases = [vector("self_attn.q_proj.bias", queries), vector("self_attn.k_proj.bias", keys),
                  vector("self_attn.v_proj.bias", keys)]
        qkv_bias = np.concatenate([b for b in biases if b is not None])
    if s.mlp_bias:
        gate_up_bias = np.stack([_vector(checkpoint, f"{prefix}mlp.{p}_proj.bias", inner) for p in ("gate", "up")])
    return LayerWeights(
        input_norm=norm("input_layernorm"),
        qkv=pack(qkv.T, dtype), qkv_bias=qkv_bias,
        q_norm=vector("self_attn.q_norm.weight", s.head_dim, s.qk_norm),
        k_norm=vector("self_attn.k_norm.weight", s.head_dim, s.qk_norm),
        out=pack(matrix("self_attn.o_proj", hidden, queries).T, dtype),
        out_bias=vector("self_attn.o_proj.bias", hidden, s.o_bias),
        post_attention_norm=norm("post_attention_layernorm", s.post_norms),
        mlp_norm=norm("pre_feedforward_layernorm" if s.post_norms else "post_attention_layernorm"),
        gate_up=pack_gated(gate.T, up.T, dtype), gate_up_bias=gate_up_bias,
        down=pack(matrix("mlp.down_proj", hidden, inner).T, dtype),
        down_bias=vector("mlp.down_proj.bias", hidden, s.mlp_bias),
        post_mlp_norm=norm("post_feedforward_layernorm", s.post_norms),
    )


__all__ = ["DEFAULT_CONTEXT", "Decoder", "ModelCache"]
