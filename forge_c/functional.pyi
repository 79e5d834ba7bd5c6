from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from forge_c.distributed.chunks import Pages
from forge_c.formats.layout import Activations, Precision
from forge_c.rotary import RopeTable
from forge_c.state.kv import KVCache

Array = NDArray[Any]
Gelu = Literal["none", "tanh"]

KV_CHUNK: int

class PackedWeight:
    shape: tuple[int, int]
    dtype: str
    gated: bool
    group_size: int | None
    activations: Activations | None
    data: Array
    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn: ...
    def __init__(self, data: Array, shape: tuple[int, int], dtype: str, gated: bool = False,
                 group_size: int | None = None, activations: Activations | None = None) -> None: ...
    @property
    def nbytes(self) -> int: ...
    def unpack(self) -> NDArray[np.float32]: ...

class WriterLock: ...

class Writing:
    def __init__(self, locks: tuple[WriterLock, ...]) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...

class KVPages:
    table: NDArray[np.uintp]
    dtype: str
    page_nbytes: int
    kv_heads: int
    head_dim: int
    v_dim: int
    def __init__(self, dtype: str, kv_heads: int, head_dim: int, v_dim: int, ring: bool,
                 table: NDArray[np.uintp] | None = None) -> None: ...
    def with_table(self, table: NDArray[np.uintp]) -> KVPages: ...
    def append(self, k: Array, v: Array, start: NDArray[np.int64], count: NDArray[np.int64],
               table: RopeTable | None = None, interleaved: bool = False) -> None: ...
    def read(self, row: int, start: int, seq: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...

class Norm:
    n: int
    nbytes: int
    weight: NDArray[np.float32] | None
    bias: NDArray[np.float32] | None
    arguments: dict[str, Any]
    def __init__(self, kind: str, n: int, weight: Array | None = None, bias: Array | None = None, *, eps: float = 1e-6,
                 offset: float = 0.0) -> None: ...

class Ranks:
    exchange: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    def __init__(self, exchange: Callable[[NDArray[np.float32]], NDArray[np.float32]], columns: range | None = None,
                 n: int = 0) -> None: ...

Over = tuple[Ranks | None, Ranks]

class Part:
    hidden: int
    nbytes: int
    params: int
    arguments: dict[str, Any] | None

class AttentionPart(Part):
    @property
    def precision(self) -> Precision | None: ...
    def set_precision(self, value: Precision | None) -> None: ...
    def __init__(self, qkv: PackedWeight | Sequence[PackedWeight], out: PackedWeight, *, heads: int, kv_heads: int,
                 head_dim: int, norm: Norm | None = None, post_norm: Norm | None = None, q_norm: Norm | None = None,
                 k_norm: Norm | None = None, qkv_bias: Array | None = None, balance: Array | None = None,
                 out_bias: Array | None = None, scale: float = 1.0, softcap: float = 0.0,
                 window: int | None = None, width: int = 0, precision: Precision | None = None,
                 over: Over | None = None) -> None: ...

class MLPPart(Part):
    def __init__(self, up: PackedWeight | Sequence[PackedWeight], down: PackedWeight, *, activation: str = "silu",
                 norm: Norm | None = None, post_norm: Norm | None = None, up_bias: Array | None = None,
                 down_bias: Array | None = None, over: Over | None = None) -> None: ...

class CalledPart(Part):
    def __init__(self, hidden: int, call: Callable[[Array, Any, NDArray[np.int64]], Array], *, norm: Norm | None = None,
                 post_norm: Norm | None = None) -> None: ...

class Router:
    hidden: int
    nbytes: int
    params: int
    arguments: dict[str, Any]
    def __init__(self, weight: Array, threshold: float = 0.0, *, up: PackedWeight | None = None,
                 up_bias: Array | None = None, down: Array | None = None, down_bias: float = 0.0) -> None: ...
class RecurrentPart(Part):
    floats: int

class MambaPart(RecurrentPart):
    def __init__(self, in_proj: PackedWeight, conv: PackedWeight, x_proj: PackedWeight, dt_proj: PackedWeight,
                 out_proj: PackedWeight, *, a: Array, d: Array | None, dt_bias: Array | None,
                 conv_bias: Array | None = None, in_bias: Array | None = None, out_bias: Array | None = None,
                 norm: Norm | None = None, post_norm: Norm | None = None, dt_norm: Norm | None = None,
                 b_norm: Norm | None = None, c_norm: Norm | None = None, over: Over | None = None) -> None: ...

class Mamba2Part(RecurrentPart):
    def __init__(self, in_proj: PackedWeight, conv: PackedWeight, out_proj: PackedWeight, *, heads: int, groups: int,
                 n: int, a: Array, d: Array | None, dt_bias: Array | None, conv_bias: Array | None = None,
                 in_bias: Array | None = None, out_bias: Array | None = None, dt_min: float = 0.0,
                 dt_max: float | None = None, norm: Norm | None = None, post_norm: Norm | None = None,
                 inner_norm: Norm | None = None, norm_before_gate: bool = False) -> None: ...

class RGLRUPart(RecurrentPart):
    def __init__(self, in_proj: PackedWeight, conv: PackedWeight, gates: Sequence[PackedWeight],
                 out_proj: PackedWeight, *, heads: int, param: Array, activation: str = "gelu_tanh",
                 gate_bias: Array | None = None, conv_bias: Array | None = None, in_bias: Array | None = None,
                 out_bias: Array | None = None, norm: Norm | None = None, post_norm: Norm | None = None,
                 over: Over | None = None) -> None: ...

class ShortConvPart(RecurrentPart):
    def __init__(self, in_proj: PackedWeight, conv: PackedWeight, out_proj: PackedWeight, *,
                 conv_bias: Array | None = None, in_bias: Array | None = None, out_bias: Array | None = None,
                 norm: Norm | None = None, post_norm: Norm | None = None, over: Over | None = None) -> None: ...

class RecurrentSlots:
    memory: NDArray[np.float32]
    source: NDArray[np.int64]
    target: NDArray[np.int64]
    relay: Callable[[bool], None] | None
    def __init__(self, memory: NDArray[np.float32], source: NDArray[np.int64], target: NDArray[np.int64],
                 relay: Callable[[bool], None] | None = None) -> None: ...

class AttentionState:
    pages: KVPages
    table: RopeTable | None
    attend: Callable[[Array, Array, Array, Array], None] | None
    positions: int
    def __init__(self, pages: KVPages, table: RopeTable | None = None,
                 attend: Callable[[Array, Array, Array, Array], None] | None = None) -> None: ...
    def rotate_by(self, table: RopeTable | None) -> None: ...

class RoutedState:
    mixer: AttentionState
    positions: int
    def __init__(self, mixer: AttentionState, positions: NDArray[np.int64], held: NDArray[np.int64],
                 chosen: NDArray[np.int64]) -> None: ...
    def rotate_by(self, table: RopeTable | None) -> None: ...

class StateTable:
    held: list[Any]
    def __init__(self, states: list[Any]) -> None: ...

class LayeredModel:
    held: list[tuple[Any, ...]]
    parts: list[Part | Router]
    nbytes: int
    embedding: Array | PackedWeight
    head: PackedWeight
    norm: Norm
    ranks: Ranks | None
    first_token: int
    def __init__(self, embedding: Array | PackedWeight,
                 layers: list[Any], norm: Norm, head: PackedWeight, *, embedding_scale: float = 1.0,
                 ranks: Ranks | None = None, first_token: int = 0) -> None: ...
    def forward(self, ids: NDArray[np.int64], states: StateTable, start: NDArray[np.int64], *, logits: bool = True,
                last_only: bool = False, hidden: bool = False,
                positions: NDArray[np.int64] | None = None) -> tuple[Any, Any]: ...


def isa() -> str: ...
def available_isas() -> tuple[str, ...]: ...
def use_isa(name: str) -> None: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
@overload
def rms_norm(x: Array, weight: Array | None = None, eps: float = 1e-6, *, weight_offset: float = 0.0,
             residual: None = None, out: Array | None = None) -> Array: ...
@overload
def rms_norm(x: Array, weight: Array | None = None, eps: float = 1e-6, *, weight_offset: float = 0.0,
             residual: Array, out: tuple[Array, Array] | None = None) -> tuple[Array, Array]: ...
@overload
def layer_norm(x: Array, weight: Array | None = None, bias: Array | None = None, eps: float = 1e-5, *,
               residual: None = None, out: Array | None = None) -> Array: ...
@overload
def layer_norm(x: Array, weight: Array | None = None, bias: Array | None = None, eps: float = 1e-5, *,
               residual: Array, out: tuple[Array, Array] | None = None) -> tuple[Array, Array]: ...
def softmax(x: Array, out: Array | None = None) -> Array: ...
def relu(x: Array, out: Array | None = None) -> Array: ...
def silu(x: Array, out: Array | None = None) -> Array: ...
def gelu(x: Array, approximate: Gelu = "none", out: Array | None = None) -> Array: ...
def swiglu(gate: Array, up: Array, *, out: Array | None = None) -> Array: ...
def geglu(gate: Array, up: Array, approximate: Gelu = "none", out: Array | None = None) -> Array: ...
def rope(x: Array, table: RopeTable, *, start_pos: int = 0, positions: Array | None = None, interleaved: bool = False,
         out: Array | None = None) -> Array: ...
def linear(x: Array, weight: Array | PackedWeight, bias: Array | None = None, *, residual: Array | None = None,
           out: Array | None = None) -> Array: ...
def gated_linear(x: Array, weight: PackedWeight, bias: Array | None = None, *, activation: str = "silu",
                 out: Array | None = None) -> Array: ...
def embedding(ids: ArrayLike, table: Array | PackedWeight, *, scale: float = 1.0, dtype: DTypeLike | None = None,
              out: Array | None = None) -> Array: ...
@overload
def attention(q: Array, k: Array | KVCache, v: Array | None = None, *, causal: bool = False, scale: float | None = None,
              mask: Array | None = None, window: int | None = None, softcap: float | None = None,
              sinks: Array | None = None, kv_lens: Array | None = None, q_positions: Array | None = None,
              kv_positions: Array | None = None, precision: Precision | None = None,
              return_lse: Literal[False] = False, out: Array | None = None) -> Array: ...
@overload
def attention(q: Array, k: Array | KVCache, v: Array | None = None, *, causal: bool = False, scale: float | None = None,
              mask: Array | None = None, window: int | None = None, softcap: float | None = None,
              sinks: Array | None = None, kv_lens: Array | None = None, q_positions: Array | None = None,
              kv_positions: Array | None = None, precision: Precision | None = None, return_lse: Literal[True],
              out: Array | None = None) -> tuple[Array, NDArray[np.float32]]: ...
def fold_attention(q: Array, k: Array | KVCache | Pages, v: Array | None, carried: NDArray[np.float32],
                   q_positions: NDArray[np.integer[Any]], *, causal: bool = False, scale: float | None = None,
                   window: int | None = None, softcap: float | None = None, precision: str | None = None,
                   sinks: NDArray[np.float32] | None = None, out: Array | None = None,
                   lse: NDArray[np.float32] | None = None) -> None: ...
def fold_parts(carried: NDArray[np.float32], parts: NDArray[np.float32]) -> None: ...
def merge_attention(out_a: Array, lse_a: NDArray[np.float32], out_b: Array,
                    lse_b: NDArray[np.float32]) -> tuple[Array, NDArray[np.float32]]: ...
def route_tokens(x: Array, weight: Array, *,
                 capacity: float = 0.125) -> tuple[NDArray[np.int64], NDArray[np.float32]]: ...
def _router_logits(x: Array, weight: Array) -> NDArray[np.float32]: ...
def _gate_update(out: Array, y: Array, gate: NDArray[np.float32], rows: ArrayLike) -> None: ...
def ssd_scan(x: Array, dt: Array, A: Array, B: Array, C: Array, D: Array | None = None, *, z: Array | None = None,
             dt_bias: Array | None = None, dt_softplus: bool = False, dt_limit: tuple[float, float] | None = None,
             state: NDArray[np.float32] | None = None,
             out: tuple[Array | None, NDArray[np.float32] | None] | None = None,
             ) -> tuple[Array, NDArray[np.float32]]: ...
def gated_delta(q: Array, k: Array, v: Array, g: Array | None = None, beta: Array | None = None, *,
                rule: Literal["gated_delta", "gated", "delta", "linear"] = "gated_delta", scale: float | None = None,
                state: NDArray[np.float32] | None = None,
                out: tuple[Array | None, NDArray[np.float32] | None] | None = None,
                ) -> tuple[Array, NDArray[np.float32]]: ...
def s4d_kernel(A: NDArray[np.complex64], B: NDArray[np.complex64], C: NDArray[np.complex64], dt: Array, length: int, *,
               method: Literal["zoh", "bilinear"] = "zoh") -> NDArray[np.float32]: ...
def s4d_scan(u: Array, A: NDArray[np.complex64], B: NDArray[np.complex64], C: NDArray[np.complex64], dt: Array,
             D: Array | None = None, *, method: Literal["zoh", "bilinear"] = "zoh",
             state: NDArray[np.complex64] | None = None,
             out: tuple[Array | None, NDArray[np.complex64] | None] | None = None,
             ) -> tuple[Array, NDArray[np.complex64]]: ...
def _s4d_modes(A: NDArray[np.complex64], B: NDArray[np.complex64], C: NDArray[np.complex64], dt: Array,
               method: str = "zoh") -> NDArray[np.float32]: ...
def _s4d_scan(u: Array, modes: NDArray[np.float32], n: int, D: Array | None = None, *,
              state: NDArray[np.complex64] | None = None,
              out: tuple[Array | None, NDArray[np.complex64] | None] | None = None,
              ) -> tuple[Array, NDArray[np.complex64]]: ...
def causal_conv1d(x: Array, weight: Array, bias: Array | None = None, *, activation: Literal["silu"] | None = None,
                  state: NDArray[np.float32] | None = None,
                  out: tuple[Array | None, NDArray[np.float32] | None] | None = None
                  ) -> tuple[Array, NDArray[np.float32]]: ...
def selective_scan(u: Array, delta: Array, A: Array, B: Array, C: Array, D: Array | None = None, *,
                   z: Array | None = None, delta_bias: Array | None = None, delta_softplus: bool = False,
                   state: NDArray[np.float32] | None = None,
                   out: tuple[Array | None, NDArray[np.float32] | None] | None = None
                   ) -> tuple[Array, NDArray[np.float32]]: ...
def rg_lru(x: Array, input_gate: Array, recurrence_gate: Array, param: Array, *,
           reset: NDArray[np.bool_] | None = None, state: NDArray[np.float32] | None = None,
           out: tuple[Array | None, NDArray[np.float32] | None] | None = None
           ) -> tuple[Array, NDArray[np.float32]]: ...
def pack_columns(out: NDArray[np.uint8], columns: Array) -> None: ...
def search_scales(out: NDArray[np.float32], columns: NDArray[np.float32], importance: NDArray[np.float32], group: int,
                  groups: int, minima: bool, zero: int, top: int) -> None: ...
def _linear_rows(x: Array, weight: Array | PackedWeight, bias: Array | None = None, *, x_rows: ArrayLike | None = None,
                 out_rows: ArrayLike | None = None, out_scale: Array | None = None, activation: str | None = None,
                 out: Array | None = None) -> Array: ...
def _weight_formats() -> dict[str, Any]: ...
def _cache_bytes(which: str) -> int: ...
def _set_cache_bytes(which: str, size: int) -> None: ...
def _bound_cpus() -> frozenset[int]: ...
def _after_fork() -> None: ...
def _openmp() -> str: ...
def _build() -> str: ...
def _peak_ops(what: str, iterations: int) -> float: ...
def _read_bytes(data: Array) -> float: ...
def _copy_bytes(out: Array, data: Array) -> None: ...
