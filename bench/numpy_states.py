"""The baseline of state spaces and linear attention, as numpy_ops: token after token, and the best form in products."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray
Call = Callable[[], Any]


def ssd_scan(x: Array, dt: Array, A: Array, B: Array, C: Array, *, dtype: str) -> Call:
    """Token after token; one group."""
    out, h = np.empty_like(x), np.empty((x.shape[0], *x.shape[2:], B.shape[3]), np.float32)

    def call() -> Array:
        h[...] = 0
        for t in range(x.shape[1]):
            h[...] *= np.exp(dt[:, t] * A)[..., None, None]
            h[...] += (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
            np.matmul(h, C[:, t, :, :, None], out=out[:, t, :, :, None])
        return out

    return call


def ssd_scan_chunked(x: Array, dt: Array, A: Array, B: Array, C: Array, *, dtype: str) -> Call:
    """Chunks of 64 tokens as products (arXiv 2405.21060, listing 1); one group."""
    size, causal = 64, np.tril(np.ones((64, 64), bool))

    def call() -> Array:
        out, h = np.empty_like(x), np.zeros((x.shape[0], x.shape[2], B.shape[3], x.shape[3]), np.float32)
        for at in range(0, x.shape[1], size):
            chunk = slice(at, at + size)
            b, c = B[:, chunk, 0][:, None], C[:, chunk, 0][:, None]  # (batch, 1, tokens, n)
            u = (dt[:, chunk, :, None] * x[:, chunk]).transpose(0, 2, 1, 3)  # (batch, heads, tokens, p)
            total = np.cumsum(dt[:, chunk] * A, axis=1).transpose(0, 2, 1)
            mask = causal[:u.shape[2], :u.shape[2]]
            decay = np.exp(np.where(mask, total[..., None] - total[..., None, :], -np.inf))
            y = (c @ b.swapaxes(2, 3) * decay) @ u + np.exp(total)[..., None] * (c @ h)
            out[:, chunk] = y.transpose(0, 2, 1, 3)
            left = np.exp(total[..., -1:] - total)[..., None]
            h = np.exp(total[..., -1])[..., None, None] * h + b.swapaxes(2, 3) @ (left * u)
        return out

    return call


def gated_delta(q: Array, k: Array, v: Array, g: Array, beta: Array, *, dtype: str) -> Call:
    """Token after token; as many heads of q and k as of v."""
    out, s = np.empty_like(v), np.empty((*v.shape[::2], q.shape[3], v.shape[3]), np.float32)
    scale = np.float32(q.shape[3] ** -0.5)

    def call() -> Array:
        s[...] = 0
        for t in range(v.shape[1]):
            s[...] *= np.exp(g[:, t])[..., None, None]
            u = beta[:, t, :, None] * (v[:, t] - np.matvec(s.swapaxes(2, 3), k[:, t]))
            s[...] += k[:, t, :, :, None] * u[:, :, None]
            out[:, t] = scale * np.matvec(s.swapaxes(2, 3), q[:, t])
        return out

    return call


def ssd_step(x: Array, dt: Array, A: Array, B: Array, C: Array, state: Array, *, dtype: str) -> Call:
    """One token, into the state."""
    out, state = np.empty_like(x), state.copy()

    def call() -> Array:
        np.multiply(state, np.exp(dt[:, 0] * A)[..., None, None], out=state)
        np.add(state, (dt[:, 0, :, None] * x[:, 0])[..., None] * B[:, 0, :, None], out=state)
        return np.matmul(state, C[:, 0, :, :, None], out=out[:, 0, :, :, None])

    return call


def gated_delta_step(q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array, *, dtype: str) -> Call:
    """One token, into the state."""
    state = state.copy()
    scale = np.float32(q.shape[3] ** -0.5)

    def call() -> Array:
        np.multiply(state, np.exp(g[:, 0])[..., None, None], out=state)
        u = beta[:, 0, :, None] * (v[:, 0] - np.matvec(state.swapaxes(2, 3), k[:, 0]))
        np.add(state, k[:, 0, :, :, None] * u[:, :, None], out=state)
        return scale * np.matvec(state.swapaxes(2, 3), q[:, 0])

    return call


def s4d_kernel(A: Array, B: Array, C: Array, dt: Array, *, taps: int, dtype: str) -> Call:
    def call() -> Array:
        da = np.exp(dt[:, None] * A)
        powers = np.exp((dt[:, None] * A)[..., None] * np.arange(taps, dtype=np.float32))
        return 2 * np.sum(((da - 1) / A * B * C)[..., None] * powers, axis=1).real

    return call


def gated_delta_chunked(q: Array, k: Array, v: Array, g: Array, beta: Array, *, dtype: str) -> Call:
    """Chunks of 64 tokens as products and one triangular system each (arXiv 2412.06464)."""
    size, eye = 64, np.eye(64, dtype=np.float32)
    scale = np.float32(q.shape[3] ** -0.5)

    def call() -> Array:
        out = np.empty_like(v)
        s = np.zeros((*v.shape[::2], q.shape[3], v.shape[3]), np.float32)
        for at in range(0, v.shape[1], size):
            chunk = slice(at, at + size)
            qc, kc, vc = (a[:, chunk].transpose(0, 2, 1, 3) for a in (q, k, v))
            total = np.cumsum(g[:, chunk], axis=1).swapaxes(1, 2)[..., None]
            b = beta[:, chunk].swapaxes(1, 2)[..., None]
            n = vc.shape[2]
            decay = np.exp(np.minimum(total - total.swapaxes(2, 3), 0))
            system = np.tril(b * (kc @ kc.swapaxes(2, 3)) * decay, -1) + eye[:n, :n]
            u = np.linalg.solve(system, b * (vc - np.exp(total) * (kc @ s)))
            y = np.tril(qc @ kc.swapaxes(2, 3) * decay) @ u + np.exp(total) * (qc @ s)
            out[:, chunk] = scale * y.transpose(0, 2, 1, 3)
            last = total[:, :, -1:]
            s = np.exp(last) * s + (kc * np.exp(last - total)).swapaxes(2, 3) @ u
        return out

    return call


def s4d_scan(u: Array, A: Array, B: Array, C: Array, dt: Array, *, dtype: str) -> Call:
    """Token after token, zero-order hold."""
    da = np.exp(dt[:, None] * A)
    db, out, x = (da - 1) / A * B, np.empty_like(u), np.empty((u.shape[0], *A.shape), np.complex64)

    def call() -> Array:
        x[...] = 0
        for t in range(u.shape[1]):
            x[...] *= da
            x[...] += db * u[:, t, :, None]
            out[:, t] = 2 * np.sum(C * x, axis=-1).real
        return out

    return call


def s4d_scan_fft(u: Array, A: Array, B: Array, C: Array, dt: Array, *, dtype: str) -> Call:
    """The convolution by Fourier transforms, its kernel made outside."""
    length = u.shape[1]
    powers = np.exp((dt[:, None] * A).astype(np.complex128)[..., None] * np.arange(length))
    kernel = 2 * np.sum(((np.exp(dt[:, None] * A) - 1) / A * B * C)[..., None] * powers, axis=1).real
    spectrum = np.fft.rfft(kernel.T.astype(np.float32), 2 * length, axis=0)
    return lambda: np.fft.irfft(np.fft.rfft(u, 2 * length, axis=1) * spectrum, 2 * length, axis=1)[:, :length]


def rg_lru(x: Array, input_gate: Array, recurrence_gate: Array, param: Array, state: Array, *, dtype: str) -> Call:
    """Whatever does not wait for the token before, for 32 tokens at a time; a loop only for h = a h + added."""
    chunk, seq, out = 32, x.shape[1], np.empty_like(x)

    def call() -> Array:
        h, rate = state, -8 * np.logaddexp(0, param)
        for first in range(0, seq, chunk):
            some = slice(first, first + chunk)
            log_a = rate / (1 + np.exp(-recurrence_gate[:, some]))
            a, y = np.exp(log_a), out[:, some]
            np.multiply(np.sqrt(-np.expm1(2 * log_a)), x[:, some] / (1 + np.exp(-input_gate[:, some])), out=y)
            for t in range(y.shape[1]):
                h = np.add(np.multiply(a[:, t], h, out=a[:, t]), y[:, t], out=y[:, t])
        return out

    return call


def rg_lru_by_tokens(x: Array, input_gate: Array, recurrence_gate: Array, param: Array, state: Array, *,
                     dtype: str) -> Call:
    """A loop over tokens."""
    out = np.empty_like(x)

    def call() -> Array:
        h, rate = state, -8 * np.logaddexp(0, param)
        for t in range(x.shape[1]):
            log_a = rate / (1 + np.exp(-recurrence_gate[:, t]))
            h = np.exp(log_a) * h + np.sqrt(-np.expm1(2 * log_a)) * (x[:, t] / (1 + np.exp(-input_gate[:, t])))
            out[:, t] = h
        return out

    return call
