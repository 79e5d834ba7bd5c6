"""Forwards for modules of a loaded Hugging Face model: norms, gated MLPs, projections, rotary positions.

A module is recognised by its parts and then proven: its own forward and ours must agree on an input, or it is left
alone. A Patch sets `forward` on the instance, never on the class, looks the weights up at every call, and hands
whatever is not its own (another dtype or device, autocast, hooks or adapters on the inside) to the forward that was
there before.
"""
from __future__ import annotations

import functools
import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import linear as torch_linear

from forge_c import functional
from forge_c.formats.layout import Dtype
from forge_c.functional import PackedWeight
from forge_c.integrations.tensors import DTYPES, array, check_no_grad, rows, takes
from forge_c.packing import pack, pack_gated
from forge_c.rotary import RopeTable

# From this many rows on our product over torch's weight, as it lies, is as fast as torch's or faster: 2048 -> 5632 on
# one core with AVX2 takes, in ms, torch 2.4, 4.6, 7.2, 7.9 and ours 4.1, 4.6, 4.7, 4.6 for 1 to 4 rows of float32.
VIEW_ROWS = 3

# Values of a tensor that tell whether it was changed behind torch's back: 64 cost 20 us where a weight is in no cache,
# 0.6 % of the product of one row by 5632 x 2048 numbers of bfloat16.
SAMPLED = 64

# The format of the last projection: its errors reach the probabilities directly, so beside int4 it is int8.
_HEAD: dict[Dtype, Dtype] = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8", "int4": "int8"}

_REFUSALS = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError)
_GATES: dict[str, Callable[..., Any]] = {
    "silu": functional.swiglu,
    "gelu": functional.geglu,
    "gelu_tanh": functools.partial(functional.geglu, approximate="tanh"),
}
_ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
}


class Patch(ABC):
    """One module's forward, replaced. `counted` names the field of Swaps that counts it."""

    counted = ""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.original = module, module.forward

    def install(self) -> None:
        self.module.forward = self.forward

    def remove(self) -> None:
        if getattr(vars(self.module).get("forward"), "__self__", None) is self:
            del self.module.forward

    def nbytes(self) -> int:
        """Memory of packed copies, made if they are not there yet."""
        return 0

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module does instead."""


class Computed(Patch):
    """A module of one input whose result we compute: `run`, where the input and the weights are ours to take."""

    def linears(self) -> tuple[nn.Module, ...]:
        """The layers whose products `run` computes itself."""
        return ()

    def weights(self) -> tuple[torch.Tensor | None, ...]:
        return tuple(w for layer in self.linears() for w in (layer.weight, layer.bias))

    @abstractmethod
    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The module's result."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not all(map(_plain, self.linears())) or not takes(args[0], *self.weights()):
            return self.original(*args, **kwargs)
        if torch.is_grad_enabled():
            weights = {f"weight {i}": w for i, w in enumerate(self.weights()) if w is not None}
            check_no_grad(type(self.module).__name__, x=args[0], **weights)
        return self.run(rows(args[0]))


def _plain(layer: nn.Module) -> bool:
    """A torch Linear and nothing else: no adapter, hook or forward of its own that we would pass over."""
    return (type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks
            and "forward" not in vars(layer))


def _unpatched(module: nn.Module) -> bool:
    """A module with the forward of its class, which takes one input."""
    if "forward" in vars(module):
        return False
    parameters = list(inspect.signature(module.forward).parameters.values())
    return len(parameters) == 1 and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


class Norm(Computed):
    """An RMSNorm. weight (dim,)."""

    counted = "norms"

    def __init__(self, module: nn.Module, eps: float, offset: float) -> None:
        super().__init__(module)
        self.eps, self.offset = eps, offset

    def weights(self) -> tuple[torch.Tensor | None, ...]:
        return (self.module.weight,)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        functional.rms_norm(array(x), array(self.module.weight), self.eps, weight_offset=self.offset, out=array(out))
        return out


def norm(module: nn.Module) -> Norm | None:
    """The patch of a module that is an RMSNorm, with weight or 1 + weight; None for anything else."""
    if not type(module).__name__.endswith("RMSNorm") or not _unpatched(module):
        return None
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not isinstance(eps, float) or not _ours(weight):
        return None
    x = _probe(2, weight) * torch.tensor([[1.0], [1e-3]], dtype=weight.dtype)  # in the second row eps counts
    return next((patch for patch in (Norm(module, eps, offset) for offset in (0.0, 1.0))
                 if _agree(patch, x, _same_values)), None)


def _same_values(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Within three roundings to the dtype and the float32 roundings of a sum over the row."""
    return (got - want).abs() <= (2 * torch.finfo(dtype).eps + 2.0**-24 * got.shape[-1]) * want.abs()


class Packed:
    """What is made of some tensors, made again when one of them has changed or moved.

    Torch counts what is done to a tensor, but not what is done through its `.data`: so SAMPLED values of each are
    compared too, spread over rows and columns. A merged adapter changes whole rows and is seen; a few numbers may
    not be.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make, self.value = make, None
        self.state: tuple[tuple[int, int], ...] = ()
        self.samples: list[tuple[NDArray[Any], tuple[NDArray[Any], ...]]] = []  # a tensor's memory, places in it
        self.seen: list[bytes] = []

    def __call__(self, *tensors: torch.Tensor | None) -> Any:
        held = [t for t in tensors if t is not None]
        state = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in held)
        if state != self.state or self.sampled() != self.seen:
            self.value, self.state = self.make(), state
            self.samples = [(array(t), _places(t.shape)) for t in held]
            self.seen = self.sampled()
        return self.value

    def sampled(self) -> list[bytes]:
        return [memory[places].tobytes() for memory, places in self.samples]

    def __reduce__(self) -> Any:
        return Packed, (self.make,)  # a copy's tensors lie elsewhere


def _places(shape: tuple[int, ...]) -> tuple[NDArray[Any], ...]:
    """SAMPLED indices into an array (rows,) or (rows, columns): rows evenly, columns by steps of the golden section."""
    i = np.arange(SAMPLED)
    return tuple(i * n // SAMPLED if axis == 0 else (i * 0.618034 % 1 * n).astype(np.intp)
                 for axis, n in enumerate(shape))


def _times(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x @ weight.T + bias by whichever is faster over torch's weight as it lies, see VIEW_ROWS. With a bfloat16 dot
    product that is always torch: ours needs a packed weight to use it."""
    if x.numel() < VIEW_ROWS * x.shape[-1] or (x.dtype is torch.bfloat16 and "bf16" in functional.isa()):
        return torch_linear(x, layer.weight, layer.bias)
    out = x.new_empty((*x.shape[:-1], layer.out_features))
    functional.linear(array(x), array(layer.weight).T, _array(layer.bias), out=array(out))
    return out


def _array(t: torch.Tensor | None) -> NDArray[Any] | None:
    return None if t is None else array(t)


class Linear(Computed):
    """A torch Linear; `form` is the format that it is packed in, None for torch's weight as it lies."""

    counted = "linears"

    def __init__(self, module: nn.Module, form: Dtype | None) -> None:
        super().__init__(module)
        self.form, self.packed = form, Packed(self.make)

    def weights(self) -> tuple[torch.Tensor | None, ...]:
        return self.module.weight, self.module.bias

    def make(self) -> PackedWeight:
        return pack(array(self.module.weight).T, self.form or "float32")

    def nbytes(self) -> int:
        return 0 if self.form is None else self.packed(self.module.weight).nbytes

    def run(self, x: torch.Tensor) -> torch.Tensor:
        if self.form is None:
            return _times(self.module, x)
        out = x.new_empty((*x.shape[:-1], self.module.out_features))
        functional.linear(array(x), self.packed(self.module.weight), _array(self.module.bias), out=array(out))
        return out


def linear(module: nn.Module, form: Dtype | None) -> Linear | None:
    """The patch of a torch Linear; None for anything else."""
    return Linear(module, form) if _plain(module) and _ours(module.weight) else None


class GatedMLP(Computed):
    """down(f(gate(x)) * up(x)); gate and up are two Linears, or one whose first half is the gate."""

    counted = "mlps"

    def __init__(self, module: nn.Module, names: tuple[str, ...], activation: str, form: Dtype | None) -> None:
        super().__init__(module)
        self.names, self.activation, self.form, self.packed = names, activation, form, Packed(self.make)

    def linears(self) -> tuple[nn.Module, ...]:
        return tuple(getattr(self.module, name) for name in self.names)

    def make(self) -> tuple[PackedWeight, NDArray[Any] | None, PackedWeight, NDArray[Any] | None]:
        *inner, down = self.linears()
        form: Dtype = self.form or "float32"
        gate, up = (array(layer.weight).T for layer in inner) if len(inner) == 2 else np.split(
            array(inner[0].weight).T, 2, axis=1)
        bias = None if inner[0].bias is None else np.concatenate([array(layer.bias) for layer in inner]).reshape(2, -1)
        return pack_gated(gate, up, form), bias, pack(array(down.weight).T, form), _array(down.bias)

    def nbytes(self) -> int:
        if self.form is None:
            return 0
        gate_up, _, down, _ = self.packed(*self.weights())
        return gate_up.nbytes + down.nbytes

    def run(self, x: torch.Tensor) -> torch.Tensor:
        *inner, down = self.linears()
        if self.form is not None:
            gate_up, bias, weight, down_bias = self.packed(*self.weights())
            hidden = functional.gated_linear(array(x), gate_up, bias, activation=self.activation)
            out = x.new_empty((*x.shape[:-1], down.out_features))
            functional.linear(hidden, weight, down_bias, out=array(out))
            return out
        gate, up = (_times(layer, x) for layer in inner) if len(inner) == 2 else _times(inner[0], x).chunk(2, dim=-1)
        product = x.new_empty(gate.shape)
        _GATES[self.activation](array(gate), array(up), out=array(product))
        return _times(down, product)


_MLP_PARTS = ((("gate_proj", "up_proj", "down_proj"), "act_fn"), (("gate_up_proj", "down_proj"), "activation_fn"))


def gated_mlp(module: nn.Module, form: Dtype | None) -> GatedMLP | None:
    """The patch of a module that has exactly the parts of a gated MLP and computes one; None for anything else."""
    for names, act in _MLP_PARTS:
        children = dict(module.named_children())
        if set(children) - {act} != set(names) or not hasattr(module, act) or not _unpatched(module):
            continue
        layers = [children[name] for name in names]
        activation = _activation(getattr(module, act))
        if (activation is None or list(module.parameters(recurse=False)) or not all(map(_plain, layers))
                or not all(_ours(layer.weight) for layer in layers)
                or len({layer.bias is None for layer in layers[:-1]}) > 1):
            continue
        if _agree(GatedMLP(module, names, activation, None), _probe(VIEW_ROWS, layers[0].weight.T), _same_function):
            return GatedMLP(module, names, activation, form)
    return None


def _same_function(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Far looser than rounding (some units in the last place), far tighter than another formula."""
    return ((got - want).norm() <= (2.0**-12 if dtype is torch.float32 else 2.0**-5) * want.norm()) & (want.norm() > 0)


def _activation(act: Any) -> str | None:
    """The name of the activation that a callable computes."""
    x = torch.linspace(-8, 8, 257)
    try:
        with torch.no_grad():
            got = array(act(x))
    except _REFUSALS:
        return None
    near = (name for name, f in _ACTIVATIONS.items() if got.shape == x.shape and np.abs(got - f(array(x))).max() < 1e-5)
    return next(near, None)


def _ours(weight: torch.Tensor) -> bool:
    return weight.dtype in DTYPES and weight.device.type == "cpu" and weight.numel() > 0


def _probe(rows: int, weight: torch.Tensor) -> torch.Tensor:
    """(rows, in_features) normal numbers for a weight (in_features, ...), the same every time."""
    x = np.random.default_rng(0).standard_normal((rows, weight.shape[0]), np.float32)
    return torch.from_numpy(x).to(weight.dtype)


def _agree(patch: Computed, x: torch.Tensor, near: Callable[[torch.Tensor, torch.Tensor, torch.dtype], Any]) -> bool:
    """Whether the patch computes what the module does: near(got, wanted, dtype) in float32."""
    try:
        with torch.no_grad():
            want, got = patch.original(x), patch.run(x)
    except _REFUSALS:
        return False
    if not isinstance(want, torch.Tensor) or want.shape != got.shape or want.dtype is not got.dtype:
        return False
    return bool(near(got.float(), want.float(), x.dtype).all())


class Rotary(Patch):
    """A rotary embedding module: its cosines and sines, computed as ever, carry a RopeTable for `RopeSite`."""

    counted = "rotary"

    def remove(self) -> None:
        super().remove()
        RopeSite.leave(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        made = self.original(*args, **kwargs)
        if isinstance(made, tuple) and len(made) == 2 and all(_doubled(t) for t in made):
            cos, sin = made
            batch, seq, dim = cos.shape
            table = RopeTable(*(t[..., :dim // 2].reshape(-1, dim // 2).float().numpy() for t in made))
            cos._forge_c_rope = table, None if batch == 1 else np.arange(batch * seq).reshape(batch, seq)
        return made


def _doubled(t: Any) -> bool:
    """A tensor (batch, seq, dim) whose second half repeats the first."""
    if not isinstance(t, torch.Tensor) or t.dim() != 3 or t.shape[2] % 2 or not _ours(t) or t.requires_grad:
        return False
    half = t.shape[2] // 2
    return torch.equal(t[..., :half], t[..., half:])


class RopeSite:
    """The function apply_rotary_pos_emb of one modeling file, replaced in that file's globals while an accelerated
    model uses it: ours for cosines that carry a table, those of accelerated models, the file's own for all others."""

    _installed: dict[int, RopeSite] = {}

    def __init__(self, names: dict[str, Any]) -> None:
        self.names, self.original = names, names["apply_rotary_pos_emb"]
        self.users: weakref.WeakSet[Patch] = weakref.WeakSet()
        self.partial = self.proven(12)

        @functools.wraps(self.original)
        def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
            turn = None if args or kwargs else getattr(cos, "_forge_c_rope", None)
            if turn is None or not self.takes(q, cos, turn) or not self.takes(k, cos, turn):
                return self.original(q, k, cos, sin, *args, **kwargs)
            check_no_grad("apply_rotary_pos_emb", q=q, k=k)
            return _turned(q, *turn), _turned(k, *turn)

        self.replacement = apply_rotary_pos_emb

    def takes(self, x: torch.Tensor, cos: torch.Tensor, turn: tuple[RopeTable, Any]) -> bool:
        """Whether x (batch, heads, seq, dim) turns by these cosines (1 or batch, seq, table.dim)."""
        if x.dim() != 4 or cos.dtype is not x.dtype or not takes(x):
            return False
        width, dim = turn[0].dim, x.shape[3]
        return cos.shape[1] == x.shape[2] and cos.shape[0] in (1, x.shape[0]) and (
            width == dim or (self.partial and width < dim))

    def proven(self, dim: int, turning: int = 8) -> bool:
        """Whether the file's function turns the first 8 of `dim` channels by halves, as ours does."""
        rng = np.random.default_rng(0)
        q, k = (torch.from_numpy(rng.standard_normal((2, heads, 3, dim), np.float32)) for heads in (4, 2))
        angles = torch.from_numpy(rng.uniform(0, 7, (2, 3, turning // 2)).astype(np.float32)).repeat(1, 1, 2)
        cos, sin = angles.cos(), angles.sin()
        table = RopeTable(*(t[..., :turning // 2].reshape(6, -1).numpy() for t in (cos, sin)))
        try:
            made = self.original(q, k, cos, sin)
            ours = [_turned(x, table, np.arange(6).reshape(2, 3)) for x in (q, k)]
            return all(bool(((a - b).abs() < 1e-5).all()) for a, b in zip(ours, made, strict=True))
        except _REFUSALS:
            return False

    @classmethod
    def of(cls, module: nn.Module) -> RopeSite | None:
        """The site that an attention module calls, if it is one and its function turns by halves."""
        forward = inspect.unwrap(type(module).forward)
        names = getattr(forward, "__globals__", {})
        if "apply_rotary_pos_emb" not in getattr(getattr(forward, "__code__", None), "co_names", ()):
            return None
        if not inspect.isfunction(names.get("apply_rotary_pos_emb")):
            return None
        site = cls._installed.get(id(names))
        if site is None or names["apply_rotary_pos_emb"] is not site.replacement:
            site = cls(names)
        return site if site.proven(8) else None

    def enter(self, user: Patch) -> None:
        self.users.add(user)
        self.names["apply_rotary_pos_emb"] = self.replacement
        self._installed[id(self.names)] = self
        weakref.finalize(user, self.leave).atexit = False

    @classmethod
    def leave(cls, user: Patch | None = None) -> None:
        """A user less, everywhere; a file without users gets its own function back, unless another took the place."""
        for key, site in list(cls._installed.items()):
            if user is not None:
                site.users.discard(user)
            if not list(site.users):  # iteration passes over the dead, len() may not
                if site.names["apply_rotary_pos_emb"] is site.replacement:
                    site.names["apply_rotary_pos_emb"] = site.original
                del cls._installed[key]


def _turned(x: torch.Tensor, table: RopeTable, positions: NDArray[Any] | None) -> torch.Tensor:
    """x (batch, heads, seq, dim), turned; in memory (batch, seq, heads, dim)."""
    out = x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3]))
    functional.rope(array(rows(x)).transpose(0, 2, 1, 3), table, positions=positions, out=array(out))
    return out.transpose(1, 2)


def _named(model: nn.Module, end: str) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith(end)]


def patches(model: nn.Module, form: Dtype | None) -> list[Patch]:
    """A patch for every module of a model that one fits, none installed."""
    attentions = _named(model, "Attention")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    projections = dict.fromkeys([*(child for module in attentions for child in module.children()), head])
    found: list[Patch | None] = [norm(module) or gated_mlp(module, form) for module in model.modules()]
    found += [linear(module, _HEAD[form] if form and module is head else form) for module in projections
              if module is not None]
    if any(RopeSite.of(module) for module in attentions):
        found += [Rotary(module) for module in _named(model, "RotaryEmbedding") if "forward" not in vars(module)]
    return [patch for patch in found if patch is not None]


def install(model: nn.Module, chosen: list[Patch]) -> None:
    """Put patches in their modules' places."""
    for patch in chosen:
        patch.install()
    rotaries = [patch for patch in chosen if isinstance(patch, Rotary)]
    for module in _named(model, "Attention") if rotaries else ():
        if site := RopeSite.of(module):
            for patch in rotaries:
                site.enter(patch)
