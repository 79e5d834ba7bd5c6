"""Layers whose memory does not grow: Mamba (arXiv 2312.00752), Mamba-2 (2405.21060), S4D (2206.11893), the
gated delta net (2412.06464), Griffin's recurrence (2402.19427), and LFM2's short convolution."""
from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c import functional
from forge_c.checks import checked_size
from forge_c.nn.layer import Layer, Matrix, Seed, Vector, cast_input, uniform
from forge_c.packing import pack

Floats = NDArray[np.float32]

_STEPS = 1e-3, 0.1, 1e-4  # a fresh layer's steps are log-uniform between the first two, and no less than the third


@dataclass(frozen=True)
class SSMState:
    """What a layer remembers of `seq_len` tokens: conv (batch, d_conv - 1, channels), the last inputs of the
    convolution, and h (batch, ...), the state; float32, of S4D complex64, and empty where a layer has none. It is
    never written to: keep one to go back to it."""

    conv: Floats
    h: NDArray[Any]
    seq_len: int


class _StateSpace(Layer):
    """What the layers share: calls with and without a state, and how fresh weights are drawn."""

    d_model: int
    _made: tuple[list[Any], Any] | None = None  # vectors, and what was made of them

    @overload
    def forward(self, x: ArrayLike, use_cache: Literal[False] = False, state: None = None, *,
                residual: NDArray[Any] | None = None) -> NDArray[Any]: ...

    @overload
    def forward(self, x: ArrayLike, use_cache: bool = False, state: SSMState | None = None, *,
                residual: NDArray[Any] | None = None) -> Any: ...

    def forward(self, x: ArrayLike, use_cache: bool = False, state: SSMState | None = None, *,
                residual: NDArray[Any] | None = None) -> Any:
        """x (batch, seq, d_model) -> (batch, seq, d_model), plus `residual` where given. With use_cache or a state the
        result is (y, state), see the class. Whatever x's dtype, what is between is computed in float32."""
        a = cast_input(self, "x", x)
        if a.ndim != 3 or a.shape[2] != self.d_model:
            raise ValueError(f"{type(self).__name__}: x has shape {a.shape}, expected (batch, seq, {self.d_model})")
        before = self._checked(state, len(a)) if state is not None else None
        if residual is not None:
            residual = cast_input(self, "residual", residual).astype(np.float32, copy=False)
        y, conv, h = self._mix(a.astype(np.float32, copy=False), before, residual)
        y = y.astype(a.dtype, copy=False)
        if not use_cache and state is None:
            return y
        return y, SSMState(conv, h, a.shape[1] + (0 if before is None else before.seq_len))

    if TYPE_CHECKING:
        __call__ = forward

    def _checked(self, state: SSMState, batch: int) -> SSMState:
        name = type(self).__name__
        if not isinstance(state, SSMState):
            raise TypeError(f"{name}: state is a {type(state).__name__}, expected an SSMState")
        shapes = (batch, *self._conv_shape()), (batch, *self._h_shape())
        if (state.conv.shape, state.h.shape) != shapes:
            raise ValueError(f"{name}: state has conv {state.conv.shape} and h {state.h.shape}, expected {shapes[0]} "
                             f"and {shapes[1]}")
        return state

    def _derived(self, make: Callable[[], Any], *names: str) -> Any:
        """make(), which depends on these vectors: again when one has been assigned, as none can be written into."""
        held, made = [self._vectors[name] for name in names], self._made
        if made is None or any(new is not old for new, old in zip(held, made[0], strict=True)):
            made = self._made = held, make()
        return made[1]

    def _rates(self) -> Floats:
        """A = -exp(A_log)."""
        rates: Floats = self._derived(lambda: -np.exp(np.asarray(self._vectors["A_log"])), "A_log")
        return rates

    @abstractmethod
    def _conv_shape(self) -> tuple[int, ...]:
        """Of a row of SSMState.conv."""

    @abstractmethod
    def _h_shape(self) -> tuple[int, ...]:
        """Of a row of SSMState.h."""

    @abstractmethod
    def _mix(self, x: Floats, state: SSMState | None, residual: Any) -> tuple[Any, Floats, NDArray[Any]]:
        """(y (batch, seq, d_model), conv, h) of x (batch, seq, d_model)."""


class _Convolved(_StateSpace):
    """Those that begin with a projection and a convolution, and end with a projection."""

    W_in = Matrix("in")
    W_out = Matrix("out")
    conv = Vector()
    b_conv = Vector()

    def _conv_shape(self) -> tuple[int, ...]:
        channels, width = self.conv.shape
        return width - 1, channels

    def _convolved(self, x: Floats, state: SSMState | None,
                   activation: Literal["silu"] | None = "silu") -> tuple[Floats, Floats]:
        return functional.causal_conv1d(x, self.conv, self._vectors["b_conv"], activation=activation,
                                        state=None if state is None else state.conv)

    def _hold_conv(self, rng: np.random.Generator, channels: int, width: int, bias: bool) -> None:
        self._hold_vectors(conv=uniform(rng, width, (channels, width)),
                           b_conv=uniform(rng, width, (channels,)) if bias else None)


class Mamba(_Convolved):
    """Mamba's mixer. d_inner = expand * d_model channels, each with d_state numbers of state.

        x, z = x W_in + b_in;  u = silu(conv(x) + b_conv);  dt, B, C = u W_x;  dt = softplus(dt W_dt + b_dt)
        h = exp(-dt exp(A_log)) h + dt u B;  y = (h C + D u) silu(z) W_out + b_out

    W_in (d_model, 2 d_inner), conv (d_inner, d_conv), W_x (d_inner, dt_rank + 2 d_state), W_dt (dt_rank, d_inner),
    A_log (d_inner, d_state), D, b_dt, b_conv (d_inner,), W_out (d_inner, d_model), b_in and b_out, None with
    bias=False. dt_rank is d_model / 16, rounded up, unless given. The weights start as in the paper. In a layer of
    integers W_dt is held in bfloat16, and conv, A_log and D in float32.

    mamba(x) -> y.  mamba(x, use_cache=True) -> (y, state); pass state back with the next tokens. However a text is cut,
    the bits are the same.

    >>> mamba = Mamba(32, seed=0)
    >>> y, state = mamba(np.ones((1, 3, 32)), use_cache=True)
    >>> y, state = mamba(np.ones((1, 1, 32)), state=state)
    >>> y.shape, state.seq_len
    ((1, 1, 32), 4)
    """

    W_x = Matrix("x")
    W_dt = Matrix("dt")
    b_in = Vector()
    b_dt = Vector()
    b_out = Vector()
    A_log = Vector()
    D = Vector()

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, *,
                 dt_rank: int | None = None, bias: bool = False, conv_bias: bool = True, seed: Seed = None) -> None:
        super().__init__()
        name = type(self).__name__
        self.d_model = checked_size(name, "d_model", d_model)
        self.d_state, self.d_conv = checked_size(name, "d_state", d_state), checked_size(name, "d_conv", d_conv)
        self.d_inner = inner = checked_size(name, "expand", expand) * d_model
        self.dt_rank = rank = -(-d_model // 16) if dt_rank is None else checked_size(name, "dt_rank", dt_rank)
        rng = np.random.default_rng(seed)
        self._pack("in", [uniform(rng, d_model, (d_model, 2 * inner))])
        self._hold_conv(rng, inner, d_conv, conv_bias)
        self._pack("x", [uniform(rng, inner, (inner, rank + 2 * d_state))])
        self._pack("dt", [uniform(rng, rank, (rank, inner))])
        self._pack("out", [uniform(rng, inner, (inner, d_model))])
        counted = np.tile(np.arange(1, d_state + 1, dtype=np.float32), (inner, 1))
        self._hold_vectors(A_log=np.log(counted), D=np.ones(inner, np.float32), b_dt=_first_steps(rng, inner),
                           b_in=np.zeros(2 * inner, np.float32) if bias else None,
                           b_out=np.zeros(d_model, np.float32) if bias else None)

    def _pack(self, packed: str, parts: list[Floats], *, gated: bool = False) -> None:
        super()._pack(packed, parts, gated=gated)
        if packed == "dt" and self._matrices[packed].dtype not in ("float32", "bfloat16"):
            self._matrices[packed] = pack(parts[0], "bfloat16")

    def _h_shape(self) -> tuple[int, ...]:
        return self.d_inner, self.d_state

    def _mix(self, x: Floats, state: SSMState | None, residual: Any) -> tuple[Any, Floats, Floats]:
        held, weights, rank = self._vectors, self._matrices, self.dt_rank
        u, z = np.split(functional.linear(x, weights["in"], held["b_in"]), 2, axis=-1)
        u, conv = self._convolved(u, state)
        dt, b, c = np.split(functional.linear(u, weights["x"]), [rank, rank + self.d_state], axis=-1)
        y, h = functional.selective_scan(
            u, functional.linear(dt, weights["dt"]), self._rates(), b, c, held["D"], z=z, delta_bias=held["b_dt"],
            delta_softplus=True, state=None if state is None else state.h)
        return functional.linear(y, weights["out"], held["b_out"], residual=residual), conv, h


class Mamba2(_Convolved):
    """Mamba-2's mixer. d_inner = expand * d_model channels in heads of head_dim, each channel with d_state numbers of
    state; heads // n_groups neighbours share B and C.

        z, x, B, C, dt = x W_in + b_in;  x, B, C = silu(conv(x, B, C) + b_conv)
        dt = clip(softplus(dt + b_dt), dt_limit);  h = exp(-dt exp(A_log)) h + dt x B
        y = rms_norm((h C + D x) silu(z)) norm W_out + b_out, the norm over the channels of each group

    W_in (d_model, 2 d_inner + 2 n_groups d_state + heads), conv (channels, d_conv) and b_conv (channels,) of x, B and
    C, A_log, D and b_dt (heads,), norm (d_inner,), W_out (d_inner, d_model), b_in and b_out, None with bias=False. The
    weights start as in the paper. In a layer of integers conv stays in float32.

    Calls are those of Mamba.

    >>> Mamba2(32, head_dim=16, seed=0)(np.ones((1, 3, 32))).shape
    (1, 3, 32)
    """

    norm = Vector()
    b_in = Vector()
    b_dt = Vector()
    b_out = Vector()
    A_log = Vector()
    D = Vector()

    def __init__(self, d_model: int, d_state: int = 128, d_conv: int = 4, expand: int = 2, *, head_dim: int = 64,
                 n_groups: int = 1, bias: bool = False, conv_bias: bool = True, eps: float = 1e-5,
                 dt_limit: Sequence[float] = (0.0, math.inf), seed: Seed = None) -> None:
        super().__init__()
        name = type(self).__name__
        self.d_model = checked_size(name, "d_model", d_model)
        self.d_state, self.d_conv = checked_size(name, "d_state", d_state), checked_size(name, "d_conv", d_conv)
        self.d_inner = inner = checked_size(name, "expand", expand) * d_model
        self.head_dim = checked_size(name, "head_dim", head_dim)
        self.n_groups = checked_size(name, "n_groups", n_groups)
        if inner % head_dim or inner // head_dim % n_groups:
            raise ValueError(f"{name}: head_dim is {head_dim} and n_groups {n_groups}, expected {inner} channels in "
                             "whole heads, and these in groups of as many")
        self.n_heads = heads = inner // head_dim
        self.eps, (low, high) = float(eps), dt_limit
        self._limit = float(low), float(high)
        channels = inner + 2 * n_groups * d_state
        rng = np.random.default_rng(seed)
        self._pack("in", [uniform(rng, d_model, (d_model, inner + channels + heads))])
        self._hold_conv(rng, channels, d_conv, conv_bias)
        self._pack("out", [uniform(rng, inner, (inner, d_model))])
        self._hold_vectors(A_log=np.log(rng.uniform(1, 16, heads)).astype(np.float32), D=np.ones(heads, np.float32),
                           b_dt=_first_steps(rng, heads), norm=np.ones(inner, np.float32),
                           b_in=np.zeros(inner + channels + heads, np.float32) if bias else None,
                           b_out=np.zeros(d_model, np.float32) if bias else None)

    def _h_shape(self) -> tuple[int, ...]:
        return self.n_heads, self.head_dim, self.d_state

    def _mix(self, x: Floats, state: SSMState | None, residual: Any) -> tuple[Any, Floats, Floats]:
        held, (batch, seq, _), inner = self._vectors, x.shape, self.d_inner
        heads, groups = (batch, seq, self.n_heads, self.head_dim), (batch, seq, self.n_groups, self.d_state)
        mixed = functional.linear(x, self._matrices["in"], held["b_in"])
        z, xbc, dt = np.split(mixed, [inner, mixed.shape[2] - self.n_heads], axis=-1)
        xbc, conv = self._convolved(xbc, state)
        u, b, c = np.split(xbc, [inner, (inner + xbc.shape[2]) // 2], axis=-1)
        y, h = functional.ssd_scan(
            _split(u, heads), dt, self._rates(), _split(b, groups), _split(c, groups), held["D"],
            z=_split(z, heads), dt_bias=held["b_dt"], dt_softplus=True, dt_limit=self._limit,
            state=None if state is None else state.h)
        grouped = functional.rms_norm(y.reshape(batch, seq, self.n_groups, -1), eps=self.eps)
        y = grouped.reshape(batch, seq, inner) * held["norm"]
        return functional.linear(y, self._matrices["out"], held["b_out"], residual=residual), conv, h


class GatedDeltaNet(_Convolved):
    """The gated delta net, as in Qwen3-Next: linear attention whose state forgets, and is corrected by what it gets
    wrong. n_heads heads of values, neighbours of which share one of n_kv_heads heads of queries and keys.

        q, k, v, z, b, a = x W_in;  q, k, v = silu(conv(q, k, v));  q, k = each head's, of length 1;  beta = sigmoid(b)
        S = exp(-exp(A_log) softplus(a + b_dt)) S;  S = S + k beta (v - k S);  o = q S / sqrt(head_dim)
        y = (rms_norm(o) norm silu(z)) W_out, the norm of each head

    W_in (d_model, 2 n_kv_heads head_dim + 2 n_heads v_dim + 2 n_heads), conv (channels of q, k and v, d_conv), A_log
    and b_dt (n_heads,), norm (v_dim,), W_out (n_heads v_dim, d_model). Calls are those of Mamba. In a layer of integers
    conv stays in float32.

    >>> GatedDeltaNet(32, n_heads=2, n_kv_heads=1, head_dim=8, seed=0)(np.ones((1, 3, 32))).shape
    (1, 3, 32)
    """

    norm = Vector()
    b_dt = Vector()
    A_log = Vector()

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, head_dim: int = 128, d_conv: int = 4, *,
                 v_dim: int | None = None, eps: float = 1e-6, seed: Seed = None) -> None:
        super().__init__()
        name = type(self).__name__
        self.d_model, self.d_conv = checked_size(name, "d_model", d_model), checked_size(name, "d_conv", d_conv)
        self.n_heads = checked_size(name, "n_heads", n_heads)
        self.n_kv_heads = checked_size(name, "n_kv_heads", n_kv_heads)
        if n_heads % n_kv_heads:
            raise ValueError(f"{name}: n_heads is {n_heads}, expected a multiple of n_kv_heads {n_kv_heads}")
        self.head_dim = checked_size(name, "head_dim", head_dim)
        self.v_dim = head_dim if v_dim is None else checked_size(name, "v_dim", v_dim)
        self.eps = float(eps)
        keys, values = n_kv_heads * head_dim, n_heads * self.v_dim
        rng = np.random.default_rng(seed)
        self._pack("in", [uniform(rng, d_model, (d_model, 2 * (keys + values + n_heads)))])
        self._hold_conv(rng, 2 * keys + values, d_conv, False)
        self._pack("out", [uniform(rng, values, (values, d_model))])
        self._hold_vectors(A_log=np.log(rng.uniform(1, 16, n_heads)).astype(np.float32),
                           b_dt=_first_steps(rng, n_heads), norm=np.ones(self.v_dim, np.float32))

    def _h_shape(self) -> tuple[int, ...]:
        return self.n_heads, self.head_dim, self.v_dim

    def _mix(self, x: Floats, state: SSMState | None, residual: Any) -> tuple[Any, Floats, Floats]:
        (batch, seq, _), keys, values = x.shape, self.n_kv_heads * self.head_dim, self.n_heads * self.v_dim
        ends = np.cumsum([2 * keys + values, values, self.n_heads])
        qkv, z, b, a = np.split(functional.linear(x, self._matrices["in"]), ends, axis=-1)
        qkv, conv = self._convolved(qkv, state)
        q, k, v = np.split(qkv, [keys, 2 * keys], axis=-1)
        unit = np.full(self.head_dim, self.head_dim ** -0.5, np.float32)
        q, k = (functional.rms_norm(_split(part, (batch, seq, self.n_kv_heads, self.head_dim)), unit,
                                    1e-6 / self.head_dim) for part in (q, k))
        g = self._rates() * np.logaddexp(np.float32(0), a + self.b_dt)
        o, h = functional.gated_delta(q, k, _split(v, (batch, seq, self.n_heads, self.v_dim)), g, _sigmoid(b),
                                      scale=self.head_dim ** -0.5, state=None if state is None else state.h)
        y = functional.rms_norm(o, self._vectors["norm"], self.eps).reshape(batch, seq, values)
        return functional.linear(functional.swiglu(z, y), self._matrices["out"], residual=residual), conv, h


class ShortConv(_Convolved):
    """LFM2's gated convolution over d_conv tokens.

        b, c, u = x W_in + b_in;  y = (c (conv(b u) + b_conv)) W_out + b_out

    W_in (d_model, 3 d_model), conv (d_model, d_conv), W_out (d_model, d_model), b_in, b_conv, b_out, None with
    bias=False. Calls are those of Mamba. In a layer of integers conv stays in float32.

    >>> ShortConv(32, seed=0)(np.ones((1, 3, 32))).shape
    (1, 3, 32)
    """

    b_in = Vector()
    b_out = Vector()

    def __init__(self, d_model: int, d_conv: int = 3, bias: bool = False, *, seed: Seed = None) -> None:
        super().__init__()
        self.d_model = checked_size("ShortConv", "d_model", d_model)
        self.d_conv = checked_size("ShortConv", "d_conv", d_conv)
        rng = np.random.default_rng(seed)
        self._pack("in", [uniform(rng, d_model, (d_model, 3 * d_model))])
        self._hold_conv(rng, d_model, d_conv, bias)
        self._pack("out", [uniform(rng, d_model, (d_model, d_model))])
        self._hold_vectors(b_in=np.zeros(3 * d_model, np.float32) if bias else None,
                           b_out=np.zeros(d_model, np.float32) if bias else None)

    def _h_shape(self) -> tuple[int, ...]:
        return (0,)

    def _mix(self, x: Floats, state: SSMState | None, residual: Any) -> tuple[Any, Floats, Floats]:
        b, c, u = np.split(functional.linear(x, self._matrices["in"], self._vectors["b_in"]), 3, axis=-1)
        y, conv = self._convolved(b * u, state, None)
        y = functional.linear(c * y, self._matrices["out"], self._vectors["b_out"], residual=residual)
        return y, conv, np.empty((len(x), 0), np.float32)


class RGLRU(_Convolved):
    """Griffin's recurrent block: width channels, by default d_model, in n_heads heads.

        y, u = x W_in + b_in;  u = conv(u) + b_conv;  i, r = each head's u W_i + b_i, u W_r + b_r
        h = a h + sqrt(1 - a^2) sigmoid(i) u,  a = exp(-8 softplus(param) sigmoid(r));  y = (gelu(y) h) W_out + b_out

    where a is 0 at a sequence's first token, and gelu its tanh form. W_in (d_model, 2 width), conv (width, d_conv), W_i
    and W_r (n_heads, width / n_heads, width / n_heads), W_out (width, d_model). param (width,) starts as in the paper,
    with a from 0.9 to 0.999 where r is open. In a layer of integers W_i, W_r and conv stay in float32. Calls are those
    of Mamba.

    >>> RGLRU(32, n_heads=4, seed=0)(np.ones((1, 3, 32))).shape
    (1, 3, 32)
    """

    W_i = Vector()
    W_r = Vector()
    b_in = Vector()
    b_i = Vector()
    b_r = Vector()
    b_out = Vector()
    param = Vector()

    def __init__(self, d_model: int, n_heads: int, width: int | None = None, d_conv: int = 4, *,
                 seed: Seed = None) -> None:
        super().__init__()
        self.d_model, self.d_conv = checked_size("RGLRU", "d_model", d_model), checked_size("RGLRU", "d_conv", d_conv)
        self.width = d_model if width is None else checked_size("RGLRU", "width", width)
        self.n_heads, n = checked_size("RGLRU", "n_heads", n_heads), self.width
        if n % n_heads:
            raise ValueError(f"RGLRU: n_heads is {n_heads}, expected a divisor of the {n} channels")
        rng, block = np.random.default_rng(seed), n // n_heads
        self._pack("in", [uniform(rng, d_model, (d_model, 2 * n))])
        self._hold_conv(rng, n, d_conv, True)
        self._pack("out", [uniform(rng, n, (n, d_model))])
        decays = rng.uniform(0.9, 0.999, n)
        self._hold_vectors(
            W_i=uniform(rng, block, (n_heads, block, block)), W_r=uniform(rng, block, (n_heads, block, block)),
            param=np.log(np.expm1(-np.log(decays) / 8)).astype(np.float32), b_in=np.zeros(2 * n, np.float32),
            b_i=np.zeros(n, np.float32), b_r=np.zeros(n, np.float32), b_out=np.zeros(d_model, np.float32))

    def _h_shape(self) -> tuple[int, ...]:
        return (self.width,)

    def _gate(self, u: Floats, of: str) -> Floats:
        """Each head's channels of u by its own matrix."""
        heads = zip(np.split(u, self.n_heads, axis=-1), getattr(self, f"W_{of}"),
                    np.split(getattr(self, f"b_{of}"), self.n_heads), strict=True)
        return np.concatenate([functional.linear(part, w, b) for part, w, b in heads], axis=-1)

    def _mix(self, x: Floats, state: SSMState | None, residual: Any) -> tuple[Any, Floats, Floats]:
        gate, u = np.split(functional.linear(x, self._matrices["in"], self._vectors["b_in"]), 2, axis=-1)
        u, conv = self._convolved(u, state, None)
        begins = np.zeros(u.shape[:2], np.bool_)
        begins[:, :1] = state is None or state.seq_len == 0
        y, h = functional.rg_lru(u, self._gate(u, "i"), self._gate(u, "r"), self.param, reset=begins,
                                 state=None if state is None else state.h)
        y = functional.geglu(gate, y, "tanh")
        return functional.linear(y, self._matrices["out"], self._vectors["b_out"], residual=residual), conv, h


class S4D(_StateSpace):
    """A diagonal state space with complex states, whose steps do not depend on the tokens: S4D-Lin.

        A = -exp(A_log) + i A_imag;  h = dA h + dB u, discretised by zero-order hold or the bilinear method for dt =
        exp(dt_log);  y = 2 Re(C h) + D u;  y = gelu(y) W_out + b_out, the first half times the sigmoid of the second

    Of each channel d_state / 2 complex states: A_log, A_imag, C_real and C_imag (d_model, d_state / 2), dt_log and D
    (d_model,); W_out (d_model, 2 d_model), b_out (2 d_model,). They start as in the paper: A = -1/2 + i pi n, dt
    log-uniform from 0.001 to 0.1. Calls are those of Mamba; all but W_out stays in float32.

    >>> S4D(32, seed=0)(np.ones((1, 3, 32))).shape
    (1, 3, 32)
    """

    W_out = Matrix("out")
    A_log = Vector()
    A_imag = Vector()
    C_real = Vector()
    C_imag = Vector()
    dt_log = Vector()
    D = Vector()
    b_out = Vector()

    def __init__(self, d_model: int, d_state: int = 64, *, method: Literal["zoh", "bilinear"] = "zoh",
                 seed: Seed = None) -> None:
        super().__init__()
        self.d_model, self.method = checked_size("S4D", "d_model", d_model), method
        self.d_state = checked_size("S4D", "d_state", d_state, least=2)
        if d_state % 2:
            raise ValueError(f"S4D: d_state is {d_state}, expected an even number: states come in conjugate pairs")
        if method not in ("zoh", "bilinear"):
            raise ValueError(f"S4D: method is {method!r}, expected zoh or bilinear")
        rng, shape = np.random.default_rng(seed), (d_model, d_state // 2)
        self._pack("out", [uniform(rng, d_model, (d_model, 2 * d_model))])
        low, high, _ = _STEPS
        c = rng.standard_normal((2, *shape), np.float32) * np.float32(0.5 ** 0.5)
        self._hold_vectors(
            A_log=np.full(shape, math.log(0.5), np.float32), C_real=c[0], C_imag=c[1],
            A_imag=np.tile(math.pi * np.arange(shape[1], dtype=np.float32), (d_model, 1)),
            dt_log=rng.uniform(math.log(low), math.log(high), d_model).astype(np.float32),
            D=rng.standard_normal(d_model, np.float32), b_out=np.zeros(2 * d_model, np.float32))

    def _conv_shape(self) -> tuple[int, ...]:
        return (0,)

    def _h_shape(self) -> tuple[int, ...]:
        return self.d_model, self.d_state // 2

    def _mix(self, x: Floats, state: SSMState | None, residual: Any) -> tuple[Any, Floats, NDArray[Any]]:
        a, b, c, dt = self._derived(self._system, "A_log", "A_imag", "C_real", "C_imag", "dt_log")
        y, h = functional.s4d_scan(x, a, b, c, dt, self._vectors["D"], method=self.method,
                                   state=None if state is None else state.h)
        value, gate = np.split(functional.linear(functional.gelu(y), self._matrices["out"], self._vectors["b_out"]), 2,
                               axis=-1)
        y = value * _sigmoid(gate)
        return y if residual is None else y + residual, np.empty((len(x), 0), np.float32), h

    def _system(self) -> tuple[NDArray[Any], ...]:
        """A, B and C complex64 (d_model, d_state / 2), dt (d_model,)."""
        a = (-np.exp(self.A_log) + 1j * self.A_imag).astype(np.complex64)
        return a, np.ones_like(a), (self.C_real + 1j * self.C_imag).astype(np.complex64), np.exp(self.dt_log)


def _sigmoid(x: Floats) -> Floats:
    return functional.softmax(np.stack([x, np.zeros_like(x)], axis=-1))[..., 0]


def _split(x: Floats, shape: tuple[int, ...]) -> Floats:
    """The last axis of x as the last two of shape, over the same memory."""
    strides = (*x.strides[:2], shape[3] * x.itemsize, x.itemsize)
    return np.lib.stride_tricks.as_strided(x, shape, strides, writeable=False)


def _first_steps(rng: np.random.Generator, n: int) -> Floats:
    """Biases (n,) whose softplus is log-uniform."""
    low, high, least = _STEPS
    steps = np.maximum(np.exp(rng.uniform(math.log(low), math.log(high), n)), least)
    return (steps + np.log(-np.expm1(-steps))).astype(np.float32)
