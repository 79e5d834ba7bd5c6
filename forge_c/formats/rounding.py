"""Numbers into the integers, scales and minima of a format: which of them, so that the error is small.

The error of a weight counts as much as its input is large: an `Importance` says how much that is for each of the k
inputs of a matrix, or how inputs go together. The scales of a group come from a search (src_c/kernels/search.h); then
each weight is rounded to the nearest step. Where it is known how inputs go together, the error of a weight is moved to
weights that are not rounded yet and whose inputs can make up for it, as in GPTQ (Frantar and others, 2022)."""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c.checks import unmasked
from forge_c.formats.blocks import LINES
from forge_c.formats.layout import Format
from forge_c.functional import search_scales

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# Groups under 64 of float16's least steps get the best of the few scales that float16 has there.
_LEAST_HALF = np.float32(2.0**-24)
_TINY = 64 * _LEAST_HALF
# A few channels may be a thousand times larger than all others, so no mean is a measure for them.
_FLOOR = 0.01  # of the median channel's importance: that of any channel
_LEAST = 1e-6  # of the mean channel's, where most channels are never used
_DAMPING = 0.02  # of a channel's own: what is added to its mean square where inputs go together


class Importance:
    """How much an error of each of the k weights of a column matters; their mean is 1.

    of_channel (k,). feedback (k, k) or None: upper triangular, U^T U the inverse of the mean product of two inputs."""

    def __init__(self, of_channel: Floats, feedback: Floats | None = None) -> None:
        self.of_channel, self.feedback = of_channel, feedback

    @staticmethod
    def checked(name: str, given: ArrayLike | Importance | None, k: int) -> Importance | None:
        """That of function `name`'s argument: (k,) mean squares of the inputs, or (k, k) mean products of two; or one
        that was made before."""
        if given is None or isinstance(given, Importance):
            return given
        a = np.asarray(unmasked(name, "importance", given))
        if a.dtype.kind not in "fiu" and a.dtype.name != "bfloat16":
            raise TypeError(f"{name}: importance has dtype {a.dtype}, expected numbers")
        if a.shape not in ((k,), (k, k)):
            raise ValueError(f"{name}: importance has shape {a.shape}, expected ({k},) or ({k}, {k})")
        wide = a.astype(np.float64)
        squares = wide if a.ndim == 1 else np.diagonal(wide)
        if not (np.isfinite(wide).all() and (squares >= 0).all()):
            raise ValueError(f"{name}: importance holds a number that is negative or not finite")
        mean = float(squares.mean()) if k else 0.0
        if mean == 0:
            return None
        channel = np.maximum(squares / mean, max(_FLOOR * np.median(squares / mean), _LEAST))
        feedback = None if a.ndim == 1 else _feedback(name, wide / mean, channel)
        return Importance(channel.astype(np.float32), feedback)

    def of(self, rows: range) -> Importance:
        """Of some channels, as they count among all."""
        return Importance(self.of_channel[rows.start : rows.stop])

    def block(self, start: int, stop: int) -> Floats:
        """Of channels start..stop, 0 beyond the last."""
        out = np.zeros(stop - start, np.float32)
        own = self.of_channel[start:stop]
        out[:len(own)] = own
        return out


def _feedback(name: str, products: NDArray[np.float64], channel: NDArray[np.float64]) -> Floats:
    """U of Importance, products (k, k) damped; channel (k,) its diagonal, none of it 0."""
    products[np.diag_indices(len(products))] = channel * (1 + _DAMPING)
    try:
        upper = np.linalg.cholesky(np.linalg.inv(products)).T
    except np.linalg.LinAlgError:
        raise ValueError(f"{name}: importance is no matrix of mean products: it is not positive") from None
    return np.ascontiguousarray(upper, dtype=np.float32)


class Scales(NamedTuple):
    """scale and minimum (n, groups) float32, W = scale u + minimum, and how the format holds them: float16 per group,
    or integers (n, groups) with float16 factors d, m (n, blocks)."""

    scale: Floats
    minimum: Floats
    scales: NDArray
    minima: NDArray
    d: NDArray[np.float16] | None = None
    m: NDArray[np.float16] | None = None


@dataclass(frozen=True)
class Levels:
    """What a format makes of a group: u = 0..top, and its scale one of `groups` integers of a block, or float16."""

    group: int
    groups: int
    top: int
    zero: int
    minima: bool

    @staticmethod
    def of(f: Format) -> Levels:
        row, lines = f.row, LINES.get(f.dtype)
        upper = lines.upper if lines is not None else 0
        groups = row.block_groups if lines is not None and "scales" in lines.rest else 1
        return Levels(f.group or 1, groups, (1 << (row.bits + upper)) - 1, row.zero, f.has_minimum)

    @property
    def block(self) -> int:
        return self.group * self.groups


def rounded(name: str, f: Format, w: Floats, k: int, importance: Importance | None) -> tuple[Bytes, Scales]:
    """u and what stands beside it, of w (n, k padded to whole blocks), columns of W as rows."""
    levels = Levels.of(f)
    weighed = Importance(np.ones(k, np.float32)) if importance is None else importance
    if weighed.feedback is not None:
        return _with_feedback(name, levels, w, weighed, weighed.feedback)
    h = weighed.block(0, w.shape[1])
    found = _searched(name, levels, w, h)
    grouped = w.reshape(len(w), -1, levels.group)
    u = _nearest(grouped, found, levels)
    if levels.groups > 1:
        _zero_what_is_worse(levels, grouped, found, u)
    elif (tiny := _tiny(grouped)).any():
        found, u = _with_tiny(levels, grouped, tiny, found, u)
    return u.reshape(w.shape), found


def _searched(name: str, levels: Levels, w: Floats, h: Floats) -> Scales:
    """Scales of w (n, k), whole blocks."""
    blocks = w.shape[1] // levels.block
    out = np.empty((len(w), blocks, 2 if levels.groups == 1 else 2 + 2 * levels.groups), np.float32)
    search_scales(out, np.ascontiguousarray(w), h, levels.group, levels.groups, levels.minima, levels.zero, levels.top)
    if levels.groups == 1:
        minima = half(name, out[:, :, 1] if levels.minima else np.zeros_like(out[:, :, 1]))
        scales = half(name, out[:, :, 0] + np.float32(0))  # no -0
        scale = scales.astype(np.float32)
        minimum = minima.astype(np.float32) if levels.minima else scale * np.float32(-levels.zero)
        return Scales(scale, minimum, scales, minima)
    d, m = half(name, out[:, :, 0]), half(name, out[:, :, 1])
    integers = out[:, :, 2:].reshape(len(w), blocks, levels.groups, 2)
    scale = (d.astype(np.float32)[:, :, None] * integers[..., 0]).reshape(len(w), -1)
    minimum = -(m.astype(np.float32)[:, :, None] * integers[..., 1]).reshape(len(w), -1)
    if not levels.minima:
        minimum = scale * np.float32(-levels.zero)
    whole = integers.astype(np.uint8 if levels.minima else np.int8)
    return Scales(scale, minimum, whole[..., 0].reshape(len(w), -1), whole[..., 1].reshape(len(w), -1), d, m)


def up_to_whole_steps(scale: Floats) -> Floats:
    """Scales that float16 would hold coarsely or not at all, as the next larger number that it holds; so no value that
    they reach is cut off."""
    return np.where(scale < _TINY, np.ceil(np.minimum(scale, _TINY) / _LEAST_HALF) * _LEAST_HALF, scale)


def _zero_what_is_worse(levels: Levels, grouped: Floats, s: Scales, u: Bytes) -> None:
    """Groups of coarse blocks that lose more than zeros would become zeros, in place. u (n, groups, group)."""
    coarse = np.zeros(s.scale.shape, bool)
    for factor in (s.d, s.m):
        if factor is not None:
            coarse |= np.repeat((factor != 0) & (np.abs(factor) <= _TINY), levels.groups, axis=1)
    if not coarse.any():
        return
    w = grouped[coarse]
    back = u[coarse] * s.scale[coarse][:, None] + s.minimum[coarse][:, None]
    worse = np.square(back - w).sum(axis=1) > np.square(w).sum(axis=1)
    coarse[coarse] = worse
    for part in (s.scale, s.minimum, s.scales, s.minima):
        part[coarse] = 0
    u[coarse] = levels.zero


def half(name: str, wanted: Floats) -> NDArray[np.float16]:
    """Rounded to float16; ValueError if that is too small for one."""
    with np.errstate(over="ignore"):
        halves = wanted.astype(np.float16)
    if not np.isfinite(halves).all():
        largest = np.abs(wanted).max()
        raise ValueError(f"{name}: weight needs a scale or minimum of {largest:.3g}, more than float16 holds")
    return halves


def inverse(scale: Floats) -> Floats:
    """1 / scale, 0 where that is not finite."""
    with np.errstate(divide="ignore", over="ignore"):
        found = np.float32(1) / scale
    found[~np.isfinite(found)] = 0
    return found


def _nearest(grouped: Floats, s: Scales, levels: Levels) -> Bytes:
    """u (n, groups, group)."""
    u = grouped - s.minimum[:, :, None]
    u *= inverse(s.scale)[:, :, None]
    np.rint(u, out=u)
    np.clip(u, 0, levels.top, out=u)
    if not levels.minima:
        u[s.scale == 0] = levels.zero
    return u.astype(np.uint8)


def _tiny(grouped: Floats) -> NDArray[np.bool_]:
    """Which groups are so small, and not zero."""
    largest = np.maximum(grouped.max(axis=2), -grouped.min(axis=2))
    return (largest > 0) & (largest < _TINY)


def _with_tiny(levels: Levels, grouped: Floats, tiny: NDArray[np.bool_], s: Scales, u: Bytes) -> tuple[Scales, Bytes]:
    """Tiny groups in whole steps of float16, so that no value of them moves further than to zero."""
    w, scales, minima = grouped[tiny], s.scales.copy(), s.minima.copy()
    if levels.minima:
        step, q = _whole_steps(w, np.ptp(w, axis=1, keepdims=True) / np.float32(levels.top))
        first = q.min(axis=1, keepdims=True)
        scales[tiny], minima[tiny] = (step * _LEAST_HALF)[:, 0], (first * step * _LEAST_HALF)[:, 0]
        u[tiny] = np.minimum(q - first, levels.top)  # beyond where both ends were halfway
    else:
        at = np.abs(w).argmax(axis=1)[:, None]
        sign = np.where(np.take_along_axis(w, at, axis=1) > 0, np.float32(-1), np.float32(1))
        turned = w * sign
        widest = np.maximum(turned.min(axis=1) / np.float32(-levels.zero),
                            turned.max(axis=1) / np.float32(levels.zero - 1))
        step, q = _whole_steps(turned, widest[:, None])
        scales[tiny], u[tiny] = (step * sign * _LEAST_HALF)[:, 0], q + levels.zero
    return s._replace(scales=scales, minima=minima), u


def _whole_steps(w: Floats, widest: Floats) -> tuple[Floats, Floats]:
    """w (groups, group) ~ 2^-24 step q: q nearest, so no value moves further than to zero; step (groups, 1).

    The step is the one from 1 to 10 of least squared error, `widest` (groups, 1) at least: then q is in its range.
    """
    fine = w / _LEAST_HALF
    step, least = np.ones_like(widest), np.full_like(widest, np.inf)
    for candidate in np.arange(1, 11, dtype=np.float32):
        error = np.square(fine - candidate * np.rint(fine / candidate)).sum(axis=1, keepdims=True)
        better = (candidate * _LEAST_HALF >= widest) & (error < least)
        step[better], least[better] = candidate, error[better]
    return step, np.rint(fine / step)


def _with_feedback(name: str, levels: Levels, w: Floats, importance: Importance,
                   upper: Floats) -> tuple[Bytes, Scales]:
    """As rounded. Block by block of k: scales for what is there, then k by k the error goes to the k that follow."""
    n, k = w.shape
    left = np.ascontiguousarray(w.T)  # (k, n), what is still to be rounded
    u, parts = np.empty((k, n), np.uint8), []
    for start in range(0, k, levels.block):
        stop, last = start + levels.block, min(start + levels.block, len(upper))
        part = _searched(name, levels, left[start:stop].T, importance.block(start, stop))
        parts.append(part)
        scale, minimum, per_scale = (np.ascontiguousarray(a.T) for a in (part.scale, part.minimum, inverse(part.scale)))
        errors = np.zeros((max(last - start, 0), n), np.float32)
        for i in range(start, stop):
            g = (i - start) // levels.group
            q = np.clip(np.rint((left[i] - minimum[g]) * per_scale[g]), 0, levels.top)
            u[i] = q
            if i < last:
                error = (left[i] - (scale[g] * q + minimum[g])) / upper[i, i]
                errors[i - start] = error
                left[i + 1:last] -= upper[i, i + 1:last, None] * error
        if last < len(upper):
            left[last:len(upper)] -= upper[start:last, last:].T @ errors
    joined = {field: np.concatenate([getattr(part, field) for part in parts], axis=1)
              for field in Scales._fields if getattr(parts[0], field) is not None}
    return np.ascontiguousarray(u.T), Scales(**joined)
