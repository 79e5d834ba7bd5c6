"""The decoder: which functional calls, in what order. It knows the spec and nothing of model families."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c.cache import KVCache
from forge_c.functional import DecoderBlock, decode, embedding, linear, rms_norm
from forge_c.models.config import ModelSpec
from forge_c.models.loading import Tensors
from forge_c.packing import pack, pack_gated
from forge_c.rotary import RopeTable, rope_table

DEFAULT_CONTEXT = 4096  # of new_cache, so that a model made for a million tokens does not ask for their memory
_DEPEND_ON_LENGTH = ("dynamic", "longrope")  # rope types whose angles depend on how long the sequence may become

# The format of the last projection: its errors reach the probabilities directly, so int4 models hold it in int8.
_HEAD = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8", "int4": "int8"}

Floats = NDArray[np.float32]


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
    def growing(self, tokens: int) -> Iterator[NDArray[np.int64]]:
        """Yield the lengths, and make every row `tokens` longer if the block does not raise. ValueError without room."""
        start = self.lengths
        stop = self.layers[0]._stop(np.full(self.batch, tokens))
        for layer in self.layers:
            np.maximum(layer._written, stop, out=layer._written)
        yield start
        for layer in self.layers:
            layer._lengths[:] = stop

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

    def __init__(self, spec: ModelSpec, checkpoint: Tensors, dtype: str,
                 progress: Callable[[range], Iterable[int]] = iter) -> None:
        self.spec, self.dtype = spec, dtype
        self._tables: dict[int, RopeTable] = {}
        table = checkpoint.take("model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size))
        head = table if spec.tied else checkpoint.take("lm_head.weight", table.shape)
        # (vocab, H): rows are looked up, not multiplied, so the quantised formats keep them in bfloat16.
        self._embedding = table if dtype == "float32" else table.astype(ml_dtypes.bfloat16, copy=False)
        self._head = pack(head.T, _HEAD[dtype])  # (H, vocab)
        del table, head
        layers = [_layer(spec, checkpoint, i, dtype) for i in progress(range(spec.n_layers))]
        self._blocks = [block for block, _ in layers]
        self._blocks_nbytes = sum(nbytes for _, nbytes in layers)
        self._norm = _vector(checkpoint, "model.norm.weight", spec.hidden_size)
        checkpoint.check_all_taken(("lm_head.weight",) if spec.tied else ())
        self._rope_table(1)  # an impossible rope setting is an error of the load, not of the first call

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they are held."""
        return self._embedding.nbytes + self._head.nbytes + self._norm.nbytes + self._blocks_nbytes

    @property
    def step_nbytes(self) -> int:
        """Bytes of weights that one step reads: all of them but the embedding, of which it reads a row a token."""
        return self.nbytes - self._embedding.nbytes

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
            x = embedding(ids, self._embedding, scale=s.embedding_scale, dtype=np.float32)
            with cache.growing(ids.shape[1]) as start:
                decode(x, self._blocks, cache.layers, start, cache.table)
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

    def _rope_table(self, length: int) -> RopeTable:
        """A table for at least `length` positions, or exactly as many where the angles depend on it."""
        s = self.spec
        tables, rows = self._tables, length
        if not self.angles_depend_on_length:
            rows = max([1 << (length - 1).bit_length(), *tables])
        if rows not in tables:
            tables = self._tables = {rows: rope_table(s.rope_dim, rows, s.rope_theta, scaling=s.rope_scaling)}
        return tables[rows]


def _vector(checkpoint: Tensors, name: str, n: int) -> Floats:
    return checkpoint.take(name, (n,)).astype(np.float32)


def _layer(s: ModelSpec, checkpoint: Tensors, i: int, dtype: str) -> tuple[DecoderBlock, int]:
    """Layer i, its matrices packed, and the bytes of its weights. The checkpoint holds matrices as (out, in)."""
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
    weights: dict[str, Any] = dict(
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
    block = DecoderBlock(
        heads=s.n_heads, kv_heads=s.n_kv_heads, head_dim=s.head_dim, activation=s.activation, eps=s.norm_eps,
        norm_offset=s.norm_weight_offset, residual_scale=s.residual_scale, attention_scale=s.attention_scale,
        softcap=s.attention_softcap or 0.0, turned=s.rope_layers[i], **weights)
    return block, sum(w.nbytes for w in weights.values() if w is not None)


__all__ = ["DEFAULT_CONTEXT", "Decoder", "ModelCache"]
