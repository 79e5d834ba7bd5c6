"""Every layer against its formula in float64, at odd and even sizes and in every dtype."""
import ml_dtypes
import numpy as np
import pytest
import quantized
import reference as ref

from forge_c import gated_linear, linear, nn, pack, pack_gated
from forge_c.rotary import rope_table

EPS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def check(got, expected, *lengths: int) -> None:
    """`got` is `expected` but for the rounding of a chain of reductions of these lengths.

    A sum of n terms of random sign cancels to about 1/sqrt(n) of its terms' sizes and its roundings add up to about
    sqrt(n) of one, so n roundings of the result is the scale of its error. Before each reduction its input is rounded
    to the dtype of the activations.
    """
    half_ulp = EPS[got.dtype.name]
    bound = (2.0**-24 * sum(lengths) + (1 + len(lengths)) * half_ulp) * np.abs(expected).max()
    assert got.shape == expected.shape
    np.testing.assert_allclose(got.astype(np.float64), expected, rtol=0, atol=bound)


def values(rng, *shape: int, dtype="float32"):
    return rng.standard_normal(shape, np.float32).astype(dtype)


@pytest.fixture
def weights(rng):
    """Random values for every weight and bias of a layer."""
    def fill(layer):
        for name, value in layer.parameters().items():
            owner = layer
            *inner, last = name.split(".")
            for part in inner:
                owner = getattr(owner, part)
            setattr(owner, last, rng.standard_normal(value.shape) / np.sqrt(value.shape[0] if value.ndim == 2 else 1))
        return layer
    return fill


# ---- norms, activations, positions, Linear, Embedding -----------------------------------------------

@pytest.mark.parametrize("dim", [1, 7, 64, 100])
def test_rms_norm(rng, weights, assert_close, dtype, dim):
    layer, x = weights(nn.RMSNorm(dim, eps=1e-3)), values(rng, 2, 3, dim, dtype=dtype)
    assert_close("rms_norm", layer(x), ref.rms_norm(x, layer.weight, 1e-3), n=dim)


@pytest.mark.parametrize("dim", [2, 7, 64, 100])
def test_layer_norm(rng, weights, assert_close, dtype, dim):
    layer, x = weights(nn.LayerNorm(dim, eps=1e-3)), values(rng, 2, 3, dim, dtype=dtype)
    centre = ref.f64(x).mean(-1, keepdims=True)
    size = (np.abs(ref.f64(x) - centre) + np.abs(ref.f64(x)).mean(-1, keepdims=True)) / np.sqrt(
        ref.f64(x).var(-1, keepdims=True) + 1e-3)
    magnitude = np.abs(layer.weight) * size + np.abs(layer.bias)
    assert_close("layer_norm", layer(x), ref.layer_norm(x, layer.weight, layer.bias, 1e-3), n=dim, magnitude=magnitude)


@pytest.mark.parametrize(("layer", "op", "formula"), [
    (nn.ReLU(), "relu", ref.relu),
    (nn.GELU(), "gelu", ref.gelu),
    (nn.GELU("tanh"), "gelu", lambda x: ref.gelu(x, "tanh")),
    (nn.Swish(), "silu", ref.silu),
])
def test_activations(rng, assert_close, dtype, layer, op, formula):
    x = values(rng, 3, 33, dtype=dtype)
    assert_close(op, layer(x), formula(x), magnitude=np.abs(ref.f64(x)))


def test_whole_numbers_are_numbers():
    x = np.array([-2, -1, 0, 1, 2])
    np.testing.assert_allclose(nn.Swish()(x), ref.silu(x), rtol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 3, 16), (2, 5, 16)])
def test_rotary(rng, assert_close, dtype, shape, interleaved):
    layer = nn.RotaryPositionalEmbedding(12, 40, 500.0, interleaved=interleaved)
    q, k = values(rng, *shape, dtype=dtype), values(rng, *shape, dtype=dtype)
    for x, got in zip((q, k), layer(q, k, start_pos=30), strict=True):
        four = x.reshape(2, 5, -1, 16)
        expected = ref.rope(four, layer.table.cos, layer.table.sin, np.arange(30, 35), interleaved=interleaved)
        assert_close("rope", got, expected.reshape(shape), magnitude=np.abs(ref.f64(four)).max())


def test_rotary_takes_the_scaling_of_a_config():
    scaling = {"rope_type": "linear", "factor": 4.0}
    layer = nn.RotaryPositionalEmbedding(8, 16, scaling=scaling)
    assert layer.table.cos.tobytes() == rope_table(8, 16, scaling=scaling).cos.tobytes()
    assert (layer.dim, layer.max_seq_len) == (8, 16)


@pytest.mark.parametrize("d_model", [1, 7, 64])
def test_sinusoidal(rng, dtype, d_model):
    layer, x = nn.SinusoidalPositionalEncoding(d_model, max_len=300), values(rng, 2, 9, d_model, dtype=dtype)
    position, channel = np.arange(290, 299)[:, None], np.arange(d_model)[None]
    angle = position / 10000.0 ** (2 * (channel // 2) / d_model)
    expected = ref.f64(x) + np.where(channel % 2, np.cos(angle), np.sin(angle))
    check(layer(x, start_pos=290), expected, 2)


@pytest.mark.parametrize(("n_in", "n_out"), [(1, 1), (7, 5), (64, 33), (100, 128)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(rng, weights, assert_close, dtype, n_in, n_out, bias):
    layer = weights(nn.Linear(n_in, n_out, bias))
    x, residual = values(rng, 2, 3, n_in, dtype=dtype), values(rng, 2, 3, n_out, dtype=dtype)
    bias_size = 0 if layer.bias is None else np.abs(layer.bias)
    magnitude = np.abs(ref.f64(x)) @ np.abs(layer.weight) + bias_size + np.abs(ref.f64(residual))
    for extra in ({}, {"residual": residual}):
        expected = ref.linear(x, layer.weight, layer.bias, **extra)
        assert_close("linear", layer(x, **extra), expected, n=n_in, magnitude=magnitude)


@pytest.mark.parametrize("packed", ["int8", "int4"])
@pytest.mark.parametrize(("n_in", "n_out"), [(7, 5), (64, 33), (300, 130)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_in_integers(rng, weights, dtype, packed, n_in, n_out, bias):
    layer = weights(nn.Linear(n_in, n_out, bias)).astype(packed)
    x, residual = quantized.normal(rng, 6, n_in, dtype=dtype), values(rng, 6, n_out, dtype=dtype)
    w = quantized.parts(pack(layer.weight, packed))
    quantized.check_product(layer(x), x, w, layer.bias)
    quantized.check_product(layer(x, residual=residual), x, w, layer.bias, residual)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_embedding(rng, shape):
    layer, ids = nn.Embedding(11, 5, seed=0), rng.integers(0, 11, shape)
    np.testing.assert_array_equal(layer(ids), layer.weight[ids])
    half = layer.astype("bfloat16")
    assert half(ids).dtype == np.float32 and half.weight.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(half(ids), layer.weight.astype(ml_dtypes.bfloat16)[ids].astype(np.float32))


# ---- gated MLPs -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("make", "formula"), [
    (nn.SwiGLU, ref.silu),
    (nn.GeGLU, ref.gelu),
    (lambda *sizes: nn.GeGLU(*sizes, approximate="tanh"), lambda x: ref.gelu(x, "tanh")),
])
@pytest.mark.parametrize(("width", "hidden"), [(1, 1), (7, 19), (64, 48), (33, 130)])
@pytest.mark.parametrize("bias", [True, False])
def test_gated_mlp(rng, weights, dtype, make, formula, width, hidden, bias):
    layer, x = weights(make(width, hidden, bias)), values(rng, 2, 3, width, dtype=dtype)
    b_gate, b_up, b_down = (0 if b is None else ref.f64(b) for b in (layer.b_gate, layer.b_up, layer.b_down))
    gate, up, down = map(ref.f64, (layer.W_gate, layer.W_up, layer.W_down))
    expected = ((ref.f64(x) @ gate + b_gate) * formula(ref.f64(x) @ up + b_up)) @ down + b_down
    check(layer(x), expected, width + 10, hidden + 10)
    check(layer(x, residual=x), expected + ref.f64(x), width + 10, hidden + 10)


@pytest.mark.parametrize("make", [nn.SwiGLU, nn.GeGLU])
@pytest.mark.parametrize(("packed", "width", "hidden"), [
    ("int8", 7, 19), ("int8", 64, 48), ("int8", 133, 130), ("int4", 7, 19), ("int4", 64, 48), ("int4", 192, 128)])
def test_gated_mlp_in_integers(rng, weights, dtype, make, packed, width, hidden):
    """The two calls, with the weights that the layer shows; the hidden row between them is quantised as any other.
    Packed again, those of int4 keep their bits but where a group has one or two numbers: these fit many scales."""
    layer, x = weights(make(width, hidden)).astype(packed), values(rng, 2, 3, width, dtype=dtype)
    bias, activation = np.stack([layer.b_up, layer.b_gate]), "silu" if make is nn.SwiGLU else "gelu"
    inner = gated_linear(x, pack_gated(layer.W_up, layer.W_gate, packed), bias, activation=activation)
    expected = linear(inner, pack(layer.W_down, packed), layer.b_down, residual=x)
    assert layer(x, residual=x).tobytes() == expected.tobytes()


@pytest.mark.parametrize(("width", "hidden"), [(768, 2048), (1, 2), (512, 1365), (100, 266)])
def test_hidden_dim_is_eight_thirds(width, hidden):
    layer = nn.SwiGLU(width, bias=False)
    assert layer.hidden_dim == hidden
    assert layer.W_gate.shape == layer.W_up.shape == (width, hidden) and layer.W_down.shape == (hidden, width)
    assert layer.b_gate is layer.b_up is layer.b_down is None


@pytest.mark.parametrize(("cls", "formula"), [(nn.SwiGLU, ref.silu), (nn.GeGLU, ref.gelu)])
def test_from_llama_is_down_of_act_gate_times_up(rng, cls, formula):
    gate_proj, up_proj, down_proj = values(rng, 11, 6), values(rng, 11, 6), values(rng, 6, 11)
    x = values(rng, 4, 6)
    layer = cls.from_llama(gate_proj, up_proj, down_proj)
    gate, up = ref.f64(x) @ gate_proj.T, ref.f64(x) @ up_proj.T
    check(layer(x), (formula(gate) * up) @ down_proj.T, 6, 11)
    assert (layer.W_up == gate_proj.T).all() and (layer.W_gate == up_proj.T).all() and layer.b_down is None
    assert (layer.input_dim, layer.hidden_dim) == (6, 11)


def test_from_llama_golden():
    """x = 1, gate_proj = 2, up_proj = 3, down_proj = 5: silu(2) * 3 * 5, and not silu(3) * 2 * 5."""
    layer = nn.SwiGLU.from_llama([[2.0]], [[3.0]], [[5.0]])
    assert float(layer([[1.0]])[0, 0]) == pytest.approx(26.423912, rel=1e-6)


def test_from_llama_for_gemma(rng):
    weights = values(rng, 11, 6), values(rng, 11, 6), values(rng, 6, 11)
    x = values(rng, 4, 6)
    layer = nn.GeGLU.from_llama(*weights, approximate="tanh")
    expected = (ref.gelu(ref.f64(x) @ weights[0].T, "tanh") * (ref.f64(x) @ weights[1].T)) @ weights[2].T
    check(layer(x), expected, 6, 11)


# ---- attention and the block ------------------------------------------------------------------------

def attention_formula(layer, x, *, causal, mask=None, rope=None):
    """The ten lines."""
    b = {name: 0 if getattr(layer, name) is None else ref.f64(getattr(layer, name)) for name in ("b_q", "b_k", "b_v")}
    x = ref.f64(x)
    q, k, v = (x @ ref.f64(w) + bias for w, bias in zip((layer.W_q, layer.W_k, layer.W_v), b.values(), strict=True))
    q, k, v = (a.reshape(*x.shape[:2], -1, layer.head_dim) for a in (q, k, v))
    if rope is not None:
        turns = (rope.table.cos, rope.table.sin, np.arange(x.shape[1]))
        q, k = (ref.rope(a, *turns, interleaved=rope.interleaved) for a in (q, k))
    heads, _ = ref.attention(q, k, v, causal=causal, mask=mask)
    return ref.linear(heads.reshape(*x.shape[:2], -1), layer.W_o, layer.b_o)


SIZES = [(24, 4, 4, None), (24, 4, 2, None), (24, 4, 1, None), (35, 5, 5, None), (30, 6, 3, 7), (64, 12, 3, 16)]


@pytest.mark.parametrize(("d_model", "n_heads", "n_kv_heads", "head_dim"), SIZES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_grouped_query_attention(rng, weights, dtype, d_model, n_heads, n_kv_heads, head_dim, bias, causal):
    layer = weights(nn.GroupedQueryAttention(d_model, n_heads, n_kv_heads, bias=bias, head_dim=head_dim, causal=causal))
    x = values(rng, 2, 9, d_model, dtype=dtype)
    lengths = (d_model, layer.head_dim, layer.head_dim, 9, n_heads * layer.head_dim)
    expected = attention_formula(layer, x, causal=causal)
    check(layer(x), expected, *lengths)
    check(layer(x, residual=x), expected + ref.f64(x), *lengths)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [8, 4])
def test_attention_turns_queries_and_keys(rng, weights, interleaved, rotated):
    rope = nn.RotaryPositionalEmbedding(rotated, 32, 100.0, interleaved=interleaved)
    layer, x = weights(nn.GroupedQueryAttention(24, 4, 2, rope=rope, head_dim=8, causal=True)), values(rng, 2, 9, 24)
    check(layer(x), attention_formula(layer, x, causal=True, rope=rope), 24, 8, 8, 9, 32)
    if not interleaved:
        twin = nn.GroupedQueryAttention(24, 4, 2, rope=rope.table, head_dim=8, causal=True)
        for name in ("W_q", "W_k", "W_v", "W_o"):
            setattr(twin, name, getattr(layer, name))
        assert twin(x).tobytes() == layer(x).tobytes()


@pytest.mark.parametrize("shape", [(9, 9), (1, 1, 9, 9), (2, 1, 9, 9), (2, 4, 9, 9), (2, 1, 1, 9)])
@pytest.mark.parametrize("kind", ["bool", "int", "float32", "float64"])
def test_masks(rng, weights, shape, kind):
    layer, x = weights(nn.GroupedQueryAttention(24, 4, 2)), values(rng, 2, 9, 24)
    mask = rng.random(shape) < 0.6 if kind in ("bool", "int") else rng.standard_normal(shape)
    expected = attention_formula(layer, x, causal=False, mask=mask)
    check(layer(x, mask=mask.astype(kind)), expected, 24, 6, 6, 9, 24)


def test_multi_query_and_multi_head_are_grouped_query(rng):
    x = values(rng, 2, 5, 24)
    one, all_heads = nn.MultiQueryAttention(24, 4, seed=3), nn.MultiHeadAttention(24, 4, bias=False, seed=3)
    assert (one.gqa.n_kv_heads, one.gqa.n_rep, all_heads.n_kv_heads, all_heads.n_rep) == (1, 4, 4, 1)
    assert one(x).tobytes() == nn.GroupedQueryAttention(24, 4, 1, seed=3)(x).tobytes()
    assert all_heads(x).tobytes() == nn.GroupedQueryAttention(24, 4, 4, seed=3)(x).tobytes()
    assert nn.MultiHeadAttention(24, 4).b_q is not None


def test_a_query_head_reads_the_head_of_its_group(rng):
    kv, layer = values(rng, 2, 5, 2, 6), nn.GroupedQueryAttention(24, 4, 2)
    repeated = layer.repeat_kv(kv)
    assert repeated.shape == (2, 5, 4, 6)
    for head in range(4):
        np.testing.assert_array_equal(repeated[:, :, head], kv[:, :, head // 2])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("d_model", "n_heads", "n_kv_heads", "bias"), [(48, 4, 2, False), (36, 6, 1, True)])
def test_block(rng, weights, d_model, n_heads, n_kv_heads, bias, causal):
    block = nn.ModernTransformerBlock(d_model, n_heads, n_kv_heads, base=100.0, causal=causal, bias=bias, eps=1e-5)
    weights(block)
    x = values(rng, 2, 9, d_model)
    normed = ref.rms_norm(x, block.norm1.weight, 1e-5)
    h = ref.f64(x) + attention_formula(block.attention, normed, causal=causal, rope=block.rope)
    ffn, normed = block.ffn, ref.rms_norm(h, block.norm2.weight, 1e-5)
    b_up, b_gate, b_down = (0 if b is None else b for b in (ffn.b_up, ffn.b_gate, ffn.b_down))
    expected = h + ((normed @ ffn.W_gate + b_gate) * ref.silu(normed @ ffn.W_up + b_up)) @ ffn.W_down + b_down
    hidden, head_dim = ffn.hidden_dim, d_model // n_heads
    check(block(x), expected, d_model, d_model, head_dim, head_dim, 9, d_model, d_model, d_model, hidden)


def test_block_is_its_layers(rng):
    block, x = nn.ModernTransformerBlock(48, 4, 2, seed=1), values(rng, 2, 9, 48)
    h = block.attention(block.norm1(x), residual=x)
    assert block(x).tobytes() == block.ffn(block.norm2(h), residual=h).tobytes()


def test_block_at_the_missions_size(rng):
    block = nn.ModernTransformerBlock(d_model=768, n_heads=12, n_kv_heads=3, seed=0)
    assert block.ffn.hidden_dim == 2048 and block.attention.head_dim == 64 == block.rope.dim
    assert block.rope.max_seq_len == 4096
    assert block.attention.W_q.shape == (768, 768) and block.attention.W_k.shape == (768, 192)
    y = block(values(rng, 2, 5, 768))
    assert y.shape == (2, 5, 768) and y.dtype == np.float32 and np.isfinite(y).all()
