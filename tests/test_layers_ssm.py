"""Mamba and Mamba-2 as layers: the papers' formulas in float64, states, formats, first weights."""
from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from forge_c.nn import RGLRU, S4D, GatedDeltaNet, Mamba, Mamba2, ShortConv
from forge_c.nn.ssm import SSMState

Array = NDArray[Any]
X = np.random.default_rng(0).standard_normal((2, 21, 24))
LAYERS: dict[str, Callable[..., Any]] = {
    "mamba": lambda **o: Mamba(24, d_state=5, seed=1, **o),
    "mamba with biases": lambda **o: Mamba(24, 6, 3, 3, dt_rank=7, bias=True, conv_bias=False, seed=2, **o),
    "mamba2": lambda **o: Mamba2(24, d_state=6, head_dim=8, seed=3, **o),
    "mamba2 with groups": lambda **o: Mamba2(24, 5, 3, 2, head_dim=4, n_groups=3, bias=True, eps=1e-3,
                                             dt_limit=(0.01, 0.05), seed=4, **o),
    "short conv": lambda **o: ShortConv(24, seed=5, **o), "short conv with biases": lambda **o: ShortConv(
        24, 5, True, seed=6, **o),
    "delta": lambda **o: GatedDeltaNet(24, 4, 2, 6, seed=9, **o), "delta with other values": lambda **o: GatedDeltaNet(
        24, 3, 3, 5, 3, v_dim=7, eps=1e-3, seed=10, **o),
    "rg-lru": lambda **o: RGLRU(24, 3, seed=11, **o), "rg-lru of other widths": lambda **o: RGLRU(
        24, 5, 40, 3, seed=12, **o),
    "s4d": lambda **o: S4D(24, 10, seed=7, **o), "s4d bilinear": lambda **o: S4D(24, 6, method="bilinear", seed=8, **o)}


@pytest.fixture(params=LAYERS)
def layer(request) -> Any:
    made = LAYERS[request.param]()
    rng = np.random.default_rng(5)
    for name in ("b_in", "b_out", "D", "norm", "b_i", "b_r"):
        if getattr(made, name, None) is not None:
            setattr(made, name, rng.uniform(0.5, 1.5, getattr(made, name).shape))
    return made


def s4d(layer: Any, x: Array) -> Array:
    a, c = -np.exp(layer.A_log.astype(np.float64)) + 1j * layer.A_imag, layer.C_real + 1j * layer.C_imag
    dt = np.exp(layer.dt_log.astype(np.float64))[:, None]
    if layer.method == "zoh":
        da, db = np.exp(dt * a), (np.exp(dt * a) - 1) / a
    else:
        da, db = (1 + dt * a / 2) / (1 - dt * a / 2), dt / (1 - dt * a / 2)
    h, y = np.zeros((len(x), *a.shape), np.complex128), np.empty_like(x)
    for t in range(x.shape[1]):
        h = da * h + db * x[:, t, :, None]
        y[:, t] = 2 * (c * h).sum(-1).real + layer.D * x[:, t]
    normal = np.vectorize(lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2))))
    value, gate = np.split(y * normal(y) @ layer.W_out + layer.b_out, 2, axis=-1)
    return value / (1 + np.exp(-gate))


def delta(layer: Any, x: Array) -> Array:
    heads, keys, values = layer.n_heads, layer.n_kv_heads * layer.head_dim, layer.n_heads * layer.v_dim
    qkv, z, b, a = np.split(x @ layer.W_in, np.cumsum([2 * keys + values, values, heads]), axis=-1)
    q, k, v = np.split(convolved(layer, qkv), [keys, 2 * keys], axis=-1)
    q, k = (np.repeat(s.reshape(*x.shape[:2], layer.n_kv_heads, -1), heads // layer.n_kv_heads, axis=2) for s in (q, k))
    q, k = (s / np.sqrt(np.square(s).sum(-1, keepdims=True) + 1e-6) for s in (q, k))
    v, beta = v.reshape(*x.shape[:2], heads, -1), 1 / (1 + np.exp(-b))
    decay = np.exp(-np.exp(layer.A_log.astype(np.float64)) * np.log1p(np.exp(a + layer.b_dt)))
    h, o = np.zeros((len(x), heads, layer.head_dim, layer.v_dim)), np.empty_like(v)
    for t in range(x.shape[1]):
        h = decay[:, t, :, None, None] * h
        wrong = beta[:, t, :, None] * (v[:, t] - np.einsum("bhk,bhkv->bhv", k[:, t], h))
        h = h + k[:, t, :, :, None] * wrong[:, :, None]
        o[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], h) / np.sqrt(layer.head_dim)
    o = o / np.sqrt(np.square(o).mean(-1, keepdims=True) + layer.eps) * layer.norm
    return o.reshape(z.shape) * silu(z) @ layer.W_out


def rg_lru(layer: Any, x: Array) -> Array:
    y, u = np.split(x @ layer.W_in + layer.b_in, 2, axis=-1)
    u = convolved(layer, u, False)
    heads = u.reshape(*x.shape[:2], layer.n_heads, 1, -1)
    i, r = ((heads @ w).reshape(u.shape) + b for w, b in ((layer.W_i, layer.b_i), (layer.W_r, layer.b_r)))
    a = np.exp(-8 * np.log1p(np.exp(layer.param.astype(np.float64))) / (1 + np.exp(-r)))
    a[:, 0] = 0
    h, out = np.zeros((len(x), u.shape[2])), np.empty_like(u)
    for t in range(x.shape[1]):
        out[:, t] = h = a[:, t] * h + np.sqrt(1 - a[:, t] ** 2) * u[:, t] / (1 + np.exp(-i[:, t]))
    return y / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y ** 3))) * out


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def convolved(layer: Any, x: Array, activated: bool = True) -> Array:
    width, f = layer.conv.shape[1], silu if activated else np.asarray
    padded = np.concatenate([np.zeros((len(x), width - 1, x.shape[2])), x], axis=1)
    y = sum(padded[:, k : k + x.shape[1]] * layer.conv[:, k] for k in range(width))
    return f(y + (0 if layer.b_conv is None else layer.b_conv))


def expected(layer: Any, x: Array) -> Array:
    """Token after token, in float64."""
    def plus(bias: Any) -> Any:
        return 0 if bias is None else bias.astype(np.float64)

    if isinstance(layer, S4D | GatedDeltaNet):
        return s4d(layer, x) if isinstance(layer, S4D) else delta(layer, x)
    if isinstance(layer, RGLRU):
        return rg_lru(layer, x) @ layer.W_out + plus(layer.b_out)
    if isinstance(layer, ShortConv):
        b, c, u = np.split(x @ layer.W_in + plus(layer.b_in), 3, axis=-1)
        return c * convolved(layer, b * u, False) @ layer.W_out + plus(layer.b_out)
    mixed, n, a = x @ layer.W_in + plus(layer.b_in), layer.d_state, -np.exp(layer.A_log.astype(np.float64))
    if isinstance(layer, Mamba):
        u, z = np.split(mixed, 2, axis=-1)
        u = convolved(layer, u)
        dt, b, c = np.split(u @ layer.W_x, [layer.dt_rank, layer.dt_rank + n], axis=-1)
        steps = np.log1p(np.exp(dt @ layer.W_dt + layer.b_dt))
        h, y = np.zeros((len(x), layer.d_inner, n)), np.empty_like(u)
        for t in range(x.shape[1]):
            h = np.exp(steps[:, t, :, None] * a) * h + (steps * u)[:, t, :, None] * b[:, t, None]
            y[:, t] = (h * c[:, t, None]).sum(-1) + layer.D * u[:, t]
        return y * silu(z) @ layer.W_out + plus(layer.b_out)
    heads, p, groups, inner = layer.n_heads, layer.head_dim, layer.n_groups, layer.d_inner
    z, xbc, dt = np.split(mixed, [inner, mixed.shape[-1] - heads], axis=-1)
    u, b, c = np.split(convolved(layer, xbc), [inner, inner + groups * n], axis=-1)
    u = u.reshape(*x.shape[:2], heads, p)
    b, c = (np.repeat(s.reshape(*x.shape[:2], groups, n), heads // groups, axis=2) for s in (b, c))
    steps = np.clip(np.log1p(np.exp(dt + layer.b_dt)), *layer._limit)
    h, y = np.zeros((len(x), heads, p, n)), np.empty_like(u)
    for t in range(x.shape[1]):
        fed = (steps[:, t, :, None] * u[:, t])[..., None] * b[:, t, :, None]
        h = np.exp(steps[:, t] * a)[..., None, None] * h + fed
        y[:, t] = (h * c[:, t, :, None]).sum(-1) + layer.D[:, None] * u[:, t]
    g = (y.reshape(*x.shape[:2], inner) * silu(z)).reshape(*x.shape[:2], groups, -1)
    g = g / np.sqrt(np.square(g).mean(-1, keepdims=True) + layer.eps)
    return g.reshape(*x.shape[:2], inner) * layer.norm @ layer.W_out + plus(layer.b_out)


def test_a_layer_is_its_formula(layer, isa):
    want = expected(layer, X)
    assert np.abs(layer(X) - want).max() <= 2e-5 * np.abs(want).max()
    assert np.abs(layer(X, residual=X) - want - X).max() <= 2e-5 * np.abs(want + X).max()


def test_cuts_and_rows_give_the_bits_of_the_whole(layer):
    whole, last = layer(X, use_cache=True)
    for cuts in ([0, 8, 13, 21], range(22)):
        state, parts = None, []
        for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
            y, state = layer(X[:, start:stop], use_cache=True, state=state)
            parts.append(y)
        assert np.concatenate(parts, axis=1).tobytes() == whole.tobytes() == layer(X).tobytes()
        assert state.h.tobytes() == last.h.tobytes() and state.conv.tobytes() == last.conv.tobytes()
        assert state.seq_len == 21
    assert layer(X[1:]).tobytes() == whole[1].tobytes()


def test_a_state_is_never_written_to(layer):
    _, state = layer(X[:, :9], use_cache=True)
    before = state.h.tobytes(), state.conv.tobytes()
    first, _ = layer(X[:, 9:], state=state)
    assert (state.h.tobytes(), state.conv.tobytes()) == before
    assert layer(X[:, 9:], state=state)[0].tobytes() == first.tobytes()


@pytest.mark.parametrize(("dtype", "off"), [("bfloat16", 0.02), ("int8", 0.02), ("int4", 0.3)])
def test_formats(layer, dtype, off):
    packed, want = layer.astype(dtype), layer(X)
    assert packed.dtype == dtype and dtype in repr(packed)
    assert 0 < np.linalg.norm(packed(X) - want) < off * np.linalg.norm(want)
    for name in ("A_log", "conv", "D", "A_imag", "W_i", "W_r", "param"):
        assert not hasattr(layer, name) or getattr(packed, name).tobytes() == getattr(layer, name).tobytes()
    y, state = packed(X[:, :20], use_cache=True)
    assert np.concatenate([y, packed(X[:, 20:], state=state)[0]], axis=1).tobytes() == packed(X).tobytes()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_what_is_between_is_float32(layer, dtype):
    x = X.astype(dtype)
    y, state = layer(x, use_cache=True)
    assert y.dtype == dtype and state.conv.dtype == np.float32
    assert state.h.dtype == (np.complex64 if isinstance(layer, S4D) else np.float32)
    assert y.tobytes() == layer(x.astype(np.float32)).astype(dtype).tobytes()


def test_parameters_load_and_are_read_only(layer):
    held = layer.parameters()
    assert "W_out" in held and ("A_log" in held) == (not isinstance(layer, ShortConv | RGLRU))
    other = LAYERS["mamba"]()
    if held.keys() == other.parameters().keys() and held["W_in"].shape == other.W_in.shape:
        assert other.load(held)(X).tobytes() == layer(X).tobytes()
    with pytest.raises(ValueError, match="read-only"):
        held["W_out"][0] = 1
    with pytest.raises(ValueError, match=f"^{type(layer).__name__}: W_out has shape"):
        layer.W_out = np.zeros(3)


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_made_of_parameters_is_made_once_and_follows_them(name, monkeypatch):
    layer = LAYERS[name]()
    want, twin = layer(X).tobytes(), layer.astype("float32")
    with monkeypatch.context() as without:
        without.setattr(np, "exp", lambda x: pytest.fail("computed again"))
        assert layer(X).tobytes() == twin(X).tobytes() == copy.deepcopy(layer)(X).tobytes() == want
    for parameter, value in layer.parameters().items():
        setattr(layer, parameter, value * 1.25 + 0.125)
        other = LAYERS[name]().load(layer.parameters())
        assert layer(X).tobytes() == other(X).tobytes() != want, parameter
        if value.ndim < 2 or parameter == "A_log":
            with pytest.raises(ValueError, match="read-only"):
                getattr(layer, parameter)[...] = 1
    assert twin(X).tobytes() == want


@pytest.mark.parametrize("make", [lambda: Mamba(512, seed=0), lambda: Mamba2(1024, seed=0)])
def test_first_weights_are_those_of_the_paper(make):
    layer = make()
    steps = np.log1p(np.exp(layer.b_dt.astype(np.float64)))
    assert steps.min() >= 0.99e-3 and steps.max() <= 0.101
    assert abs(np.log(steps).mean() - np.log(0.01)) < 0.5
    a = np.exp(layer.A_log)
    assert (layer.D == 1).all() and a.min() >= 0.999 and a.max() <= 16.001
    if isinstance(layer, Mamba):
        np.testing.assert_allclose(a, np.tile(np.arange(1, 17), (1024, 1)), rtol=1e-6)
    assert layer(np.ones((1, 2, layer.d_model))).tobytes() == make()(np.ones((1, 2, layer.d_model))).tobytes()


def test_first_decays_are_those_of_the_paper():
    """From 0.9 to 0.999 where the gate is open, of each channel its own."""
    a = np.exp(-8 * np.log1p(np.exp(RGLRU(2048, 8, seed=0).param.astype(np.float64))))
    assert a.min() > 0.8999 and a.max() < 0.9991 and abs(a.mean() - 0.9495) < 0.005 and len(set(a)) > 2000


def test_an_empty_call_is_no_beginning():
    """The first token is, wherever it comes."""
    layer = RGLRU(24, 3, seed=0)
    _, state = layer(X[:, :0], use_cache=True)
    assert layer(X, state=state)[0].tobytes() == layer(X).tobytes()


def test_errors():
    layer = Mamba(24, seed=0)
    _, state = layer(X, use_cache=True)
    for call, message in (
            (lambda: layer(X[0]), r"Mamba: x has shape \(21, 24\), expected \(batch, seq, 24\)"),
            (lambda: layer(X[:1], state=state), r"Mamba: state has conv \(2, 3, 48\) and h \(2, 48, 16\), expected"),
            (lambda: Mamba2(24, head_dim=7), "Mamba2: head_dim is 7 and n_groups 1, expected 48 channels in whole"),
            (lambda: Mamba2(24, head_dim=8, n_groups=4), "Mamba2: head_dim is 8 and n_groups 4"),
            (lambda: S4D(24, 5), "S4D: d_state is 5, expected an even number"),
            (lambda: S4D(24, method="euler"), "S4D: method is 'euler', expected zoh or bilinear"),
            (lambda: RGLRU(24, 5), "RGLRU: n_heads is 5, expected a divisor of the 24 channels"),
            (lambda: RGLRU(24, 3, 20), "RGLRU: n_heads is 3, expected a divisor of the 20 channels"),
            (lambda: Mamba(0), "Mamba: d_model is 0, expected at least 1")):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="Mamba: state is a tuple, expected an SSMState"):
        layer(X, state=(state.conv, state.h))
    assert isinstance(state, SSMState) and layer(X[:, :0], state=state)[1].h.tobytes() == state.h.tobytes()
