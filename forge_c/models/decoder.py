"""The decoder: which functional calls, in what order. It knows the spec and nothing of model families."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c.cache import KVCache
from forge_c.functional import DecoderBlock, PackedWeight, decode, embedding, linear, rms_norm
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

    def fork(self, n: int) -> ModelCache:
        """n continuations of every row, sharing what is there; as KVCache.fork."""
        with self.held():
            return ModelCache([layer.fork(n) for layer in self.layers], self.table)

    @contextmanager
    def growing(self, tokens: int) -> Iterator[NDArray[np.int64]]:
        """Yield the lengths, and make every row `tokens` longer unless the block raises. ValueError without room."""
        start = self.lengths
        stop = self.layers[0]._stop(np.full(self.batch, tokens))
        for layer in self.layers:
            layer._claim(stop)
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
        layers = [_LayerReader(spec, checkpoint, i, dtype).block() for i in progress(range(spec.n_layers))]
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

        Layers with a sliding window keep no more than the window needs. dtype "float32", "bfloat16" or "int8".
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


class _LayerReader:
    """Layer i of a checkpoint, whose matrices are (out, in). A matrix is let go as soon as it is packed."""

    def __init__(self, spec: ModelSpec, checkpoint: Tensors, i: int, dtype: str) -> None:
        self.spec, self.checkpoint, self.prefix, self.dtype = spec, checkpoint, f"model.layers.{i}.", dtype
        self.queries, self.keys = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        self.turned = spec.rope_layers[i]

    def matrix(self, name: str, rows: int, columns: int) -> NDArray[Any]:
        return self.checkpoint.take(f"{self.prefix}{name}.weight", (rows, columns))

    def vector(self, name: str, n: int, wanted: bool = True) -> Floats | None:
        return _vector(self.checkpoint, self.prefix + name, n) if wanted else None

    def packed(self, name: str, rows: int, columns: int) -> PackedWeight:
        return pack(self.matrix(name, rows, columns).T, self.dtype)

    def qkv(self) -> PackedWeight:
        if self.spec.fused:
            return self.packed("self_attn.qkv_proj", self.queries + 2 * self.keys, self.spec.hidden_size)
        sizes = {"q": self.queries, "k": self.keys, "v": self.keys}
        parts = [self.matrix(f"self_attn.{p}_proj", n, self.spec.hidden_size) for p, n in sizes.items()]
        return pack(np.concatenate(parts).T, self.dtype)

    def gate_up(self) -> PackedWeight:
        inner, hidden = self.spec.intermediate_size, self.spec.hidden_size
        if self.spec.fused:
            gate, up = np.split(self.matrix("mlp.gate_up_proj", 2 * inner, hidden), 2)
        else:
            gate, up = self.matrix("mlp.gate_proj", inner, hidden), self.matrix("mlp.up_proj", inner, hidden)
        return pack_gated(gate.T, up.T, self.dtype)

    def biases(self) -> dict[str, Floats | None]:
        s, found = self.spec, {}
        if s.qkv_bias:
            sizes = {"q": self.queries, "k": self.keys, "v": self.keys}
            found["qkv_bias"] = np.concatenate([_vector(self.checkpoint, f"{self.prefix}self_attn.{p}_proj.bias", n)
                                                for p, n in sizes.items()])
        if s.mlp_bias:
            sides = [f"{self.prefix}mlp.{p}_proj.bias" for p in ("gate", "up")]
            found["gate_up_bias"] = np.concatenate([_vector(self.checkpoint, n, s.intermediate_size) for n in sides])
        return found | {"out_bias": self.vector("self_attn.o_proj.bias", s.hidden_size, s.o_bias),
                        "down_bias": self.vector("mlp.down_proj.bias", s.hidden_size, s.mlp_bias)}

    def norms(self) -> dict[str, Floats | None]:
        s = self.spec
        names = {"input_norm": ("input_layernorm", True),
                 "post_attention_norm": ("post_attention_layernorm", s.post_norms),
                 "mlp_norm": ("pre_feedforward_layernorm" if s.post_norms else "post_attention_layernorm", True),
                 "post_mlp_norm": ("post_feedforward_layernorm", s.post_norms)}
        found = {key: self.vector(f"{name}.weight", s.hidden_size, wanted) for key, (name, wanted) in names.items()}
        return found | {f"{p}_norm": self.vector(f"self_attn.{p}_norm.weight", s.head_dim, s.qk_norm) for p in "qk"}

    def block(self) -> tuple[DecoderBlock, int]:
        """The block, and the bytes of its weights."""
        s = self.spec
        weights: dict[str, Any] = {
            "qkv": self.qkv(), "out": self.packed("self_attn.o_proj", s.hidden_size, self.queries),
            "gate_up": self.gate_up(), "down": self.packed("mlp.down_proj", s.hidden_size, s.intermediate_size),
            **self.norms(), **self.biases()}
        block = DecoderBlock(
            heads=s.n_heads, kv_heads=s.n_kv_heads, head_dim=s.head_dim, activation=s.activation, eps=s.norm_eps,
            norm_offset=s.norm_weight_offset, residual_scale=s.residual_scale, attention_scale=s.attention_scale,
            softcap=s.attention_softcap or 0.0, turned=self.turned, **weights)
        return block, sum(w.nbytes for w in weights.values() if w is not None)


__all__ = ["DEFAULT_CONTEXT", "Decoder", "ModelCache"]
