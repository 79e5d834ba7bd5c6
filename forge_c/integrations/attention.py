"""The attention and mask functions that transformers calls by the name "forge_c".

transformers asks for a mask once a forward and hands it to every layer. A causal pattern, with or without a sliding
window, padding and unused slots of a static cache, is here a PatternMask: a tensor of the usual shape that holds no
(q_len, kv_len) memory and becomes a real mask when anything but our attention looks inside.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from forge_c import functional
from forge_c.integrations.tensors import DTYPES, array, check, rows

NAME = "forge_c"


class Pattern(NamedTuple):
    """Which keys a query sees: the q_len queries are the last of `visible` keys; later keys do not exist yet."""

    q_len: int
    kv_len: int
    visible: int
    causal: bool
    window: int | None          # keys a query sees, itself among them
    keys: torch.Tensor | None   # (batch, visible) bool, False is padding; None: all count

    def dense(self, batch: int) -> torch.Tensor:
        """The mask that this stands for: (batch, 1, q_len, kv_len) bool, True = attend."""
        key = torch.arange(self.kv_len)
        query = torch.arange(self.visible - self.q_len, self.visible)[:, None]
        mask = (key < self.visible).expand(self.q_len, -1)
        if self.causal:
            mask = mask & (key <= query)
        if self.window is not None:
            mask = mask & (key > query - self.window)
        whole = mask.expand(batch, 1, -1, -1)
        if self.keys is None:
            return whole
        return whole & torch.nn.functional.pad(self.keys, (0, self.kv_len - self.visible))[:, None, None]


_LOOKS_OUTSIDE = {getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad")}
_LOOKS_OUTSIDE |= {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.ndimension, torch.Tensor.numel}


class PatternMask(torch.Tensor):
    """A bool mask (batch, 1, q_len, kv_len) known by its Pattern. Torch sees one element, expanded; any operation that
    reads or writes values works on the real mask, made then and kept."""

    pattern: Pattern
    _dense: torch.Tensor | None

    @staticmethod
    def __new__(cls, batch: int, pattern: Pattern) -> PatternMask:
        one = torch.ones((), dtype=torch.bool).expand(batch, 1, pattern.q_len, pattern.kv_len)
        mask: PatternMask = one.as_subclass(cls)
        mask.pattern, mask._dense = pattern, None
        return mask

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.contiguous:  # generate() asks for it; the real mask is
            return args[0]
        if func not in _LOOKS_OUTSIDE:
            args, kwargs = tree_map(lambda a: a.dense() if isinstance(a, PatternMask) else a, (args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def dense(self) -> torch.Tensor:
        """The real mask."""
        if self._dense is None:
            self._dense = self.pattern.dense(self.shape[0]).contiguous()
        return self._dense

    @property
    def opened(self) -> bool:
        """Whether the real mask has been handed out, and may have been written to."""
        return self._dense is not None


def _window_of(mask_function: Callable[..., Any]) -> int | None:
    """W if this is transformers' causal mask with a sliding window of W keys, else None."""
    parts = _captured(mask_function, _SLIDING_CAUSAL, "mask_functions")
    if not isinstance(parts, tuple) or len(parts) != 2 or parts[1] is not causal_mask_function:
        return None
    window = _captured(parts[0], _SLIDING, "sliding_window")
    return window if isinstance(window, int) and not isinstance(window, bool) and window >= 1 else None


def _captured(function: Any, like: Any, name: str) -> Any:
    """What a closure of the same code as `like` has captured under a name; None for any other function."""
    if not inspect.isfunction(function) or not inspect.isfunction(like) or function.__code__ is not like.__code__:
        return None
    return inspect.getclosurevars(function).nonlocals.get(name)


_SLIDING_CAUSAL: Any = sliding_window_causal_mask_function(2)
_SLIDING: Any = inspect.getclosurevars(_SLIDING_CAUSAL).nonlocals.get("mask_functions", (None,))[0]


def mask(batch_size: int, q_length: int, kv_length: int, q_offset: int | torch.Tensor = 0, kv_offset: int = 0,
         mask_function: Callable[..., Any] = causal_mask_function, attention_mask: torch.Tensor | None = None,
         allow_is_causal_skip: bool = True, allow_is_bidirectional_skip: bool = False,
         **kwargs: Any) -> torch.Tensor | None:
    """What transformers hands to our attention as attention_mask; the signature is that of its sdpa_mask.

    None where the queries are the last tokens and all keys count. A PatternMask for windows, padding (attention_mask,
    (batch, seen) bool) and static caches. A real bool mask for every other pattern: chunks, packed sequences, overlays.
    """
    window = _window_of(mask_function)
    causal = window is not None or mask_function is causal_mask_function
    visible = int(q_offset) + q_length - kv_offset if causal else kv_length
    known = causal or mask_function is bidirectional_mask_function
    if not known or not 0 < visible <= kv_length:
        return sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
                         kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
                         allow_is_causal_skip=False, allow_is_bidirectional_skip=allow_is_bidirectional_skip, **kwargs)
    if window is not None and window >= visible:
        window = None
    keys = None
    if attention_mask is not None:
        keys = attention_mask[:, kv_offset:kv_offset + visible].bool()
        keys = torch.nn.functional.pad(keys, (0, visible - keys.shape[1]))
        keys = None if bool(keys.all()) else keys
    may_skip = allow_is_causal_skip if causal else allow_is_bidirectional_skip
    if may_skip and window is None and keys is None and visible == kv_length:
        return None
    return PatternMask(batch_size, Pattern(q_length, kv_length, visible, causal, window, keys))


def attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
              attention_mask: torch.Tensor | None, *, dropout: float = 0.0, scaling: float | None = None,
              sliding_window: int | None = None, softcap: float | None = None, is_causal: bool | None = None,
              s_aux: torch.Tensor | None = None, position_bias: torch.Tensor | None = None,
              **kwargs: Any) -> tuple[torch.Tensor, None]:
    """forge_c.attention in the form that transformers calls.

    query (batch, heads, q_len, dim), key and value (batch, kv_heads, kv_len, dim or v_dim): CPU tensors, float32,
    bfloat16 or float16, read where they lie. Returns ((batch, q_len, heads, v_dim) in query's dtype, None).
    attention_mask: what `mask` made, or any bool (True = attend) or float mask that broadcasts to (batch, heads, q_len,
    kv_len), and then nothing else hides a key. With None, is_causal (the module's by default) and sliding_window count,
    the queries being the last of the keys. s_aux (heads,): sinks. position_bias, like a float mask: added to it.

    Raises TypeError for a dtype, ValueError for a device, a shape or dropout, RuntimeError for a tensor that requires a
    gradient.
    """
    name = f"{NAME} attention"
    check(name, query=query, key=key, value=value)
    check(name, **{arg: t for arg, t in (("s_aux", s_aux), ("position_bias", position_bias)) if t is not None})
    if dropout:
        raise ValueError(f"{name}: dropout is {dropout}, expected 0.0: forge_c is inference only; call model.eval()")
    options: dict[str, Any] = {}
    if isinstance(attention_mask, PatternMask) and not attention_mask.opened:
        pattern = attention_mask.pattern
        if (pattern.q_len, pattern.kv_len) != (query.shape[2], key.shape[2]):
            raise ValueError(f"{name}: attention_mask is for {pattern.q_len} queries and {pattern.kv_len} keys, "
                             f"expected {query.shape[2]} and {key.shape[2]}")
        key, value = key[:, :, :pattern.visible], value[:, :, :pattern.visible]
        options = {"causal": pattern.causal, "window": pattern.window}
        seen = None if pattern.keys is None else pattern.keys[:, None, None]
        position_bias = None if position_bias is None else position_bias[..., :pattern.visible]
    elif attention_mask is None:
        options, seen = _unmasked(module, query.shape[2], key.shape[2], is_causal, sliding_window), None
    else:
        seen = attention_mask.dense() if isinstance(attention_mask, PatternMask) else attention_mask
    if position_bias is not None:
        seen = _biased(seen, position_bias)
    if seen is not None:
        options["mask"] = _mask_array(name, seen)
    out = query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))
    functional.attention(_heads_third(query), _heads_third(key), _heads_third(value), scale=scaling, softcap=softcap,
                         sinks=None if s_aux is None else array(s_aux), out=array(out), **options)
    return out, None


def _unmasked(module: torch.nn.Module, q_len: int, kv_len: int, is_causal: bool | None,
              sliding_window: int | None) -> dict[str, Any]:
    """causal and window where there is no mask to say it."""
    if getattr(module, "is_causal", True) if is_causal is None else is_causal:
        return {"causal": True, "window": sliding_window or None}
    if sliding_window and sliding_window < max(q_len, kv_len):
        raise ValueError(f"{NAME} attention: sliding_window is {sliding_window} over {kv_len} keys and not causal, "
                         "expected an attention_mask that says which keys are in the window")
    return {}


def _biased(seen: torch.Tensor | None, bias: torch.Tensor) -> torch.Tensor:
    """A mask and a bias as one float mask."""
    if seen is None:
        return bias
    return torch.where(seen, bias, -torch.inf) if seen.dtype is torch.bool else bias + seen


def _mask_array(name: str, seen: torch.Tensor) -> Any:
    if seen.dtype is not torch.bool and seen.dtype not in DTYPES:
        raise TypeError(f"{name}: attention_mask has dtype {seen.dtype}, expected torch.bool, torch.float32, "
                        "torch.bfloat16 or torch.float16")
    if seen.device.type != "cpu":
        raise ValueError(f"{name}: attention_mask is on {seen.device}, expected cpu")
    return array(seen)


def _heads_third(t: torch.Tensor) -> Any:
    """(batch, heads, seq, dim) as an array (batch, seq, heads, dim) over its memory; a copy only where dim has gaps."""
    return array(rows(t)).transpose(0, 2, 1, 3)
