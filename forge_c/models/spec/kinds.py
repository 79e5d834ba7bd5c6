"""What a model is made of: layers are data of kinds. A kind is a frozen dataclass; what is done with it is looked up by
its type (forge_c.models.parts), so that a new kind changes nothing here."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

ABSENT = "absent"  # in a field's metadata: a document leaves it out where it has its default

# ---- what parts are made of ----


@dataclass(frozen=True)
class Norm:
    """RMSNorm or LayerNorm over the last axis; offset 1 where the checkpoint holds w and the norm takes 1 + w."""

    kind: Literal["rms", "layer"]
    eps: float
    offset: float = 0.0


@dataclass(frozen=True)
class Rope:
    """The rotation of a head's first `dim` channels: theta and scaling as forge_c.rope_table takes them."""

    dim: int
    theta: float
    scaling: Mapping[str, Any] = field(hash=False)


# ---- mixers: parts that see the tokens before ----


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention. window: how many keys a token sees, itself included. qk_norm: of each head of q and k,
    before RoPE. fused: the checkpoint holds q, k, v as one matrix."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None = None
    window: int | None = None
    rope: Rope | None = None
    qk_norm: Norm | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    fused: bool = False

    streams: ClassVar[int] = 1  # times hidden: what goes in


@dataclass(frozen=True)
class JoinedAttention(Attention):
    """Attention that is given the embeddings too, behind the residual stream's channels."""

    streams: ClassVar[int] = 2


@dataclass(frozen=True)
class Mamba:
    """The selective state space of Mamba: inner channels, each with `state` numbers; conv: width of the convolution;
    dt_rank: what a token's step is projected from. norm: of dt, B and C; weighted: whether that has weights. bias: of
    the first and the last projection."""

    inner: int
    state: int
    conv: int
    dt_rank: int
    conv_bias: bool = True
    bias: bool = False
    norm: Norm | None = None
    weighted: bool = False

    @property
    def floats(self) -> int:
        """Of a row's state."""
        return (self.conv - 1 + self.state) * self.inner


@dataclass(frozen=True)
class Mamba2:
    """The state space of Mamba-2: heads of head_dim channels, `state` numbers to each channel, groups of heads that
    share B and C. norm: of the channels of each group, after the gate or before it. dt_min, dt_max: what a token's step
    is clipped to; None: no bound. bias: of the first and the last projection, or, with out_bias, of the first."""

    heads: int
    head_dim: int
    groups: int
    state: int
    conv: int
    conv_bias: bool = True
    bias: bool = False
    norm: Norm | None = None
    norm_before_gate: bool = False
    dt_min: float = 0.0
    dt_max: float | None = None
    out_bias: bool | None = field(default=None, metadata={ABSENT: True})

    @property
    def has_out_bias(self) -> bool:
        """Whether the last projection has a bias."""
        return self.bias if self.out_bias is None else self.out_bias

    @property
    def inner(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Of the convolution: x, B and C."""
        return self.inner + 2 * self.groups * self.state

    @property
    def floats(self) -> int:
        """Of a row's state."""
        return (self.conv - 1) * self.channels + self.inner * self.state


@dataclass(frozen=True)
class ShortConv:
    """A gated convolution of `width` tokens: b, c, x = in(..), then out(c conv(b x)), all of `channels`."""

    channels: int
    width: int
    bias: bool = False

    @property
    def floats(self) -> int:
        """Of a row's state."""
        return (self.width - 1) * self.channels


@dataclass(frozen=True)
class RGLRU:
    """Griffin's recurrent block (arXiv 2402.19427): y, x = in(..), then out(f(y) rg_lru(conv(x), gates)) of `width`
    channels; conv: width of the convolution. The gates are products of each head's channels. activation: f, as in
    forge_c.gated_linear."""

    width: int
    heads: int
    conv: int
    activation: str

    @property
    def floats(self) -> int:
        """Of a row's state."""
        return self.conv * self.width


# ---- feed-forward parts ----


@dataclass(frozen=True)
class GatedMLP:
    """down(f(gate(x)) * up(x)); activation as in forge_c.gated_linear. fused: the file has gate and up as one."""

    width: int
    activation: str
    bias: bool = False
    fused: bool = False


@dataclass(frozen=True)
class MLP:
    """down(f(up(x))); activation as in forge_c.gated_linear, or relu2, the square of relu."""

    width: int
    activation: str
    bias: bool = False


# ---- the whole ----


@dataclass(frozen=True)
class Router:
    """Mixture of depths (arXiv 2404.02258): the tokens with r = x . w above the threshold go through the layer, seeing
    only each other: (1 - r) x + r layer(x). predictor: inner channels of an MLP that says which, instead of r."""

    threshold: float = 0.0
    predictor: int | None = None


@dataclass(frozen=True)
class Routed:
    """What a layer with a router remembers: of its mixer, the tokens that went through."""

    mixer: Attention
    router: Router

    @property
    def rope(self) -> Rope | None:
        """The mixer's rotation."""
        return self.mixer.rope


@dataclass(frozen=True)
class Multipliers:
    """What a layer's products are multiplied by (muP). The matrices and biases before them take the numbers over as
    they are read. ssm: of z, x, B, C and dt; the inputs of attention's and the state space's first matrices have
    attention_in and ssm_in."""

    attention_in: float = 1.0
    attention_out: float = 1.0
    key: float = 1.0
    ssm_in: float = 1.0
    ssm_out: float = 1.0
    ssm: tuple[float, ...] = (1.0,) * 5
    gate: float = 1.0
    down: float = 1.0


@dataclass(frozen=True)
class Ahead:
    """What is added to a mixer's input: mlp(attention(x | embeddings)). Several layers share its weights, which the
    checkpoint has in layer `of`; each adds low-rank matrices of its own, number `use`, to the mlp's first and, if
    `adapted`, attention's, and multiplies the last by another. A layer's own weights take these over as they are read.
    """

    attention: Any
    mlp: Any
    of: int
    use: int
    rank: int
    adapted: bool


@dataclass(frozen=True)
class LayerSpec:
    """h = x + s mixer(x), h + s mlp(h); or, parallel, x + s (mixer(x) + mlp(x)).
    mixer and mlp: data of a kind, or None. norms: before a part, after it, or both; alone: before the layer's
    only part. router: of the tokens that go through, or None: all do; with one the mixer is Attention. beside: a
    second mixer, which is given what the first is, and whose result is added to the first's; or None. ahead: x +
    mixer(x + ahead(x)), or None."""

    mixer: Any
    mlp: Any
    norm: Norm
    norms: Literal["pre", "post", "both", "alone"] = "pre"
    parallel: bool = False
    residual_scale: float = 1.0
    router: Router | None = field(default=None, metadata={ABSENT: True})
    beside: Any = field(default=None, metadata={ABSENT: True})
    multipliers: Multipliers | None = field(default=None, metadata={ABSENT: True})
    ahead: Ahead | None = field(default=None, metadata={ABSENT: True})

    @property
    def mixers(self) -> tuple[Any, ...]:
        """The first, and one beside or ahead of it."""
        more = self.beside if self.ahead is None else self.ahead.attention
        return (self.mixer,) if more is None else (self.mixer, more)

    @property
    def remembers(self) -> tuple[Any, ...]:
        """The kinds whose states the layer has, one for each mixer."""
        return self.mixers if self.router is None else (Routed(self.mixer, self.router),)


@dataclass(frozen=True)
class Embedding:
    """(vocab_size, width); what is looked up is multiplied by scale."""

    vocab_size: int
    width: int
    scale: float = 1.0


@dataclass(frozen=True)
class Head:
    """The last norm and projection: softcap * tanh(logits_scale * logits / softcap). tied: it is the embedding's.
    absent: the checkpoint has no projection, and the model gives hidden states alone."""

    norm: Norm
    tied: bool
    logits_scale: float = 1.0
    softcap: float | None = None
    absent: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """A decoder: embedding, layers, head, and what its makers say of its texts."""

    model_type: str
    embed: Embedding
    layers: tuple[LayerSpec, ...]
    head: Head
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary."""
        return self.embed.vocab_size

    @property
    def hidden_size(self) -> int:
        """Channels of the residual stream."""
        return self.embed.width

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)
