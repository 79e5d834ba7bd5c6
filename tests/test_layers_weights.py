"""Weights of layers: how they start, are listed, assigned, read and packed, and what is refused."""
import copy
import pickle

import ml_dtypes
import numpy as np
import pytest

import forge_c.nn
from forge_c import nn, pack

LAYERS = {
    "Linear": lambda **seed: nn.Linear(7, 33, **seed),
    "Embedding": lambda **seed: nn.Embedding(9, 5, **seed),
    "SwiGLU": lambda **seed: nn.SwiGLU(7, 19, **seed),
    "GeGLU": lambda **seed: nn.GeGLU(7, 19, bias=False, **seed),
    "GroupedQueryAttention": lambda **seed: nn.GroupedQueryAttention(24, 4, 2, bias=True, **seed),
    "MultiQueryAttention": lambda **seed: nn.MultiQueryAttention(24, 4, **seed),
    "MultiHeadAttention": lambda **seed: nn.MultiHeadAttention(24, 4, **seed),
    "ModernTransformerBlock": lambda **seed: nn.ModernTransformerBlock(24, 4, 2, **seed),
}
EXPECTED = {
    "Linear": {"weight": (7, 33), "bias": (33,)},
    "Embedding": {"weight": (9, 5)},
    "SwiGLU": {"W_up": (7, 19), "W_gate": (7, 19), "W_down": (19, 7), "b_up": (19,), "b_gate": (19,), "b_down": (7,)},
    "GeGLU": {"W_up": (7, 19), "W_gate": (7, 19), "W_down": (19, 7)},
    "GroupedQueryAttention": {"W_q": (24, 24), "W_k": (24, 12), "W_v": (24, 12), "W_o": (24, 24),
                              "b_q": (24,), "b_k": (12,), "b_v": (12,), "b_o": (24,)},
    "MultiQueryAttention": {"gqa.W_q": (24, 24), "gqa.W_k": (24, 6), "gqa.W_v": (24, 6), "gqa.W_o": (24, 24)},
    "MultiHeadAttention": {"W_q": (24, 24), "W_k": (24, 24), "W_v": (24, 24), "W_o": (24, 24),
                           "b_q": (24,), "b_k": (24,), "b_v": (24,), "b_o": (24,)},
    "ModernTransformerBlock": {
        "norm1.weight": (24,), "norm2.weight": (24,), "attention.W_q": (24, 24), "attention.W_k": (24, 12),
        "attention.W_v": (24, 12), "attention.W_o": (24, 24), "ffn.W_up": (24, 64), "ffn.W_gate": (24, 64),
        "ffn.W_down": (64, 24)},
}


MULTIPLYING = [name for name in LAYERS if name != "Embedding"]


@pytest.fixture(params=LAYERS)
def make(request):
    return LAYERS[request.param]


def owner_of(layer, name: str):
    *inner, last = name.split(".")
    for part in inner:
        layer = getattr(layer, part)
    return layer, last


def example(layer, rng):
    if isinstance(layer, nn.Embedding):
        return np.array([[0, 8, 3]])
    width = 7 if isinstance(layer, nn.Linear | nn.SwiGLU | nn.GeGLU) else 24
    return rng.standard_normal((2, 5, width), np.float32)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


@pytest.mark.parametrize("name", LAYERS)
def test_parameters(name):
    found = LAYERS[name](seed=0).parameters()
    assert {key: value.shape for key, value in found.items()} == EXPECTED[name]
    assert all(value.dtype == np.float32 for value in found.values())


def test_every_layer_is_exported_and_has_a_docstring():
    for name in nn.__all__:
        cls = getattr(forge_c.nn, name)
        assert issubclass(cls, nn.layer.Layer) and cls.__doc__, name
        assert cls.__call__ is nn.layer.Layer.__call__, name


def test_seed_decides_the_start(make):
    first, again, other = make(seed=5), make(seed=5), make(seed=6)
    assert same(first.parameters(), again.parameters())
    assert not same(first.parameters(), other.parameters())
    assert not same(make().parameters(), make().parameters())


def test_starting_takes_nothing_from_numpys_global_generator(make):
    np.random.seed(1)
    before = np.random.get_state()[1].tobytes()
    make(seed=0)
    make()
    assert np.random.get_state()[1].tobytes() == before


def test_matrices_start_uniform_in_the_inverse_root_of_their_width():
    layer = nn.Linear(400, 300, seed=0)
    for values in (layer.weight, layer.bias):
        assert np.abs(values).max() <= 400**-0.5
    assert np.abs(layer.weight).max() > 0.999 * 400**-0.5
    # The mean of 120000 values of variance 1/1200 is normal with a deviation of 8.4e-5: five of them.
    assert abs(layer.weight.mean()) < 5 * (1 / 1200 / 120000) ** 0.5
    assert np.std(layer.weight) == pytest.approx((1 / 1200) ** 0.5, rel=0.01)


def test_a_block_starts_with_a_different_draw_for_each_matrix():
    block = nn.ModernTransformerBlock(24, 4, 2, seed=0)
    draws = [value.ravel()[:100].tobytes() for name, value in block.parameters().items() if ".W_" in name]
    assert len(set(draws)) == len(draws) == 7


def test_weights_are_settable_and_change_what_is_computed(rng, make):
    layer, x = make(seed=0), example(make(seed=0), rng)
    for name, value in layer.parameters().items():
        before, others = layer(x), layer.parameters()
        new = value + rng.standard_normal(value.shape, np.float32)
        setattr(*owner_of(layer, name), new)
        after = layer.parameters()
        assert after.pop(name).tobytes() == new.tobytes(), name
        others.pop(name)
        assert same(after, others), name
        if not name.endswith("b_k"):
            assert layer(x).tobytes() != before.tobytes(), name


def test_a_bias_on_the_keys_moves_all_scores_of_a_query_alike(rng):
    """Softmax does not see b_k where positions do not turn it; with rope it does."""
    x, b_k = rng.standard_normal((1, 5, 24), np.float32), rng.standard_normal(12)
    plain = nn.GroupedQueryAttention(24, 4, 2, bias=True, seed=0)
    turned = nn.GroupedQueryAttention(24, 4, 2, bias=True, rope=nn.RotaryPositionalEmbedding(6), seed=0)
    before = plain(x), turned(x)
    plain.b_k = turned.b_k = b_k
    np.testing.assert_allclose(plain(x), before[0], rtol=0, atol=1e-5)
    assert np.abs(turned(x) - before[1]).max() > 1e-3


def test_an_assigned_array_is_copied(rng):
    layer, x = nn.Linear(4, 4, seed=0), rng.standard_normal((2, 4), np.float32)
    weight, bias = rng.standard_normal((4, 4), np.float32), rng.standard_normal(4, np.float32)
    layer.weight, layer.bias = weight, bias
    before = layer(x).tobytes()
    weight[:], bias[:] = 0, 0
    assert layer(x).tobytes() == before


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "int8"])
def test_any_number_can_be_assigned(rng, dtype):
    layer, weight = nn.Linear(4, 3, seed=0), (4 * rng.standard_normal((4, 3))).astype(dtype)
    layer.weight = weight
    assert layer.weight.tobytes() == weight.astype(np.float32).tobytes()
    layer.weight = np.asfortranarray(weight)[::-1]
    assert layer.weight.tobytes() == weight[::-1].astype(np.float32).tobytes()


def test_what_is_read_is_read_only(make):
    layer = make(seed=0)
    for name, value in layer.parameters().items():
        assert not value.flags.writeable and value.flags.c_contiguous, name
        with pytest.raises(ValueError, match="read-only"):
            value[0] = 0
    for variant in (layer.astype("bfloat16"), copy.deepcopy(layer)):
        assert not any(value.flags.writeable for value in variant.parameters().values())


# ---- packing ----------------------------------------------------------------------------------------

def test_astype_rounds_matrices_and_leaves_vectors(make):
    layer = make(seed=0)
    half = layer.astype("bfloat16")
    assert (layer.dtype, half.dtype) == ("float32", "bfloat16")
    for name, value in half.parameters().items():
        exact = layer.parameters()[name]
        rounded = exact.astype(ml_dtypes.bfloat16) if exact.ndim == 2 else exact
        np.testing.assert_array_equal(value.astype(np.float32), rounded.astype(np.float32), err_msg=name)


def test_astype_and_back_keeps_the_rounded_values(rng, make):
    half = make(seed=0).astype("bfloat16")
    x = example(half, rng)
    assert same(half.astype("bfloat16").parameters(), half.parameters())
    assert half.astype("bfloat16")(x).tobytes() == half(x).tobytes()
    back = half.astype("float32")
    assert back.dtype == "float32"
    for name, value in back.parameters().items():
        np.testing.assert_array_equal(value, half.parameters()[name].astype(np.float32))


def test_a_bfloat16_layer_computes_nearly_the_same(rng, make):
    """Weights and inputs are each rounded by 2^-9: along at most six matrices, in sums whose terms cancel."""
    layer = make(seed=0)
    x = example(layer, rng)
    exact, half = layer(x), layer.astype("bfloat16")(x)
    assert half.dtype == np.float32
    assert np.linalg.norm(half - exact) < 6 * 2 * 2.0**-9 * np.linalg.norm(exact)


def test_astype_halves_the_packed_bytes():
    block = nn.ModernTransformerBlock(64, 4, 2, seed=0)
    packed = [sum(w.nbytes for part in (layer.attention, layer.ffn) for w in part._matrices.values())
              for layer in (block, block.astype("bfloat16"))]
    assert packed[0] == 2 * packed[1]


def test_the_two_layers_of_astype_are_independent(rng, make):
    layer = make(seed=0)
    before = layer.parameters()
    for dtype in ("float32", "bfloat16"):
        twin = layer.astype(dtype)
        for name, value in twin.parameters().items():
            setattr(*owner_of(twin, name), np.zeros(value.shape))
        assert same(layer.parameters(), before)
        assert not any(value.astype(np.float32).any() for value in twin.parameters().values())


def test_assigning_to_a_bfloat16_layer_rounds(rng):
    layer, weight = nn.Linear(4, 3, seed=0).astype("bfloat16"), rng.standard_normal((4, 3))
    layer.weight = weight
    np.testing.assert_array_equal(layer.weight, weight.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("name", MULTIPLYING)
def test_integer_formats_hold_what_pack_makes_of_each_matrix(rng, name, dtype):
    layer = LAYERS[name](seed=0)
    whole, x = layer.astype(dtype), example(layer, rng)
    assert whole.dtype == dtype and layer.dtype == "float32"
    for key, value in whole.parameters().items():
        exact = layer.parameters()[key]
        expected = pack(exact, dtype).unpack() if exact.ndim == 2 else exact
        np.testing.assert_array_equal(value, expected, err_msg=key)
    assert same(whole.astype(dtype).parameters(), whole.parameters())
    assert whole.astype(dtype)(x).tobytes() == whole(x).tobytes()
    assert same(whole.astype("float32").parameters(), whole.parameters())
    for twin in (copy.copy(whole), copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert twin(x).tobytes() == whole(x).tobytes()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("name", MULTIPLYING)
def test_assigning_a_matrix_of_an_integer_layer_leaves_the_others(rng, name, dtype):
    """Also those that are packed together with it."""
    layer = LAYERS[name](seed=0).astype(dtype)
    for key, value in layer.parameters().items():
        others, new = layer.parameters(), rng.standard_normal(value.shape, np.float32)
        setattr(*owner_of(layer, key), new)
        after = layer.parameters()
        np.testing.assert_array_equal(after.pop(key), pack(new, dtype).unpack() if new.ndim == 2 else new)
        others.pop(key)
        assert same(after, others), key


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("name", MULTIPLYING)
def test_an_integer_layer_computes_nearly_the_same(rng, name, dtype):
    """Weights uniform up to b have deviation b / sqrt 3 and move by b / 127 / sqrt 12 or b / 7.5 / sqrt 12; x, whose
    largest value is at most five deviations, by 5 / 127 / sqrt 12: along at most six matrices."""
    layer = LAYERS[name](seed=0)
    x = example(layer, rng)
    exact, whole = layer(x), layer.astype(dtype)(x)
    of_w, of_x = {"int8": 1 / 254, "int4": 1 / 15}[dtype], 5 / 127 / 12**0.5
    assert whole.dtype == np.float32
    assert 0 < np.linalg.norm(whole - exact) < 6 * (of_w + of_x) * np.linalg.norm(exact)


@pytest.mark.parametrize("name", MULTIPLYING)
def test_astype_says_how_inputs_are_rounded(rng, name):
    layer = LAYERS[name](seed=0)
    x = example(layer, rng)
    exact = layer(x)
    for dtype, usual in (("int8", "int12"), ("int4", "int8")):
        twins = {a: layer.astype(dtype, activations=a) for a in ("int8", "int12")}
        assert layer.astype(dtype).activations == usual and layer.activations is None
        assert layer.astype(dtype)(x).tobytes() == twins[usual](x).tobytes()
        for activations, twin in twins.items():
            assert twin.activations == activations
            assert {w.activations for w in twin._matrices.values()} <= {activations}
            for other in (copy.copy(twin), pickle.loads(pickle.dumps(twin))):
                assert other(x).tobytes() == twin(x).tobytes()
            for key, value in twin.parameters().items():  # packed again
                setattr(*owner_of(twin, key), value)
            assert {w.activations for w in twin._matrices.values()} <= {activations}
        assert twins["int8"](x).tobytes() != twins["int12"](x).tobytes()
        if dtype == "int8":
            rough, fine = (np.linalg.norm(twin(x) - exact) for twin in twins.values())
            assert fine < rough
    with pytest.raises(ValueError, match=rf"^{type(layer).__name__}\.astype: activations is 'int9', expected one of"):
        layer.astype("int8", activations="int9")
    with pytest.raises(ValueError, match="astype: activations is 'int8', expected None for float32"):
        layer.astype("float32", activations="int8")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_table_of_embeddings_beside_integer_formats_is_bfloat16(dtype):
    table = nn.Embedding(5, 3, seed=0).astype(dtype)
    assert table.dtype == dtype and table.weight.dtype.name == "bfloat16"
    assert table([1, 4]).tobytes() == nn.Embedding(5, 3, seed=0).astype("bfloat16")([1, 4]).tobytes()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_matrix_that_is_not_finite_is_refused_and_the_layer_stays(dtype):
    layer = nn.Linear(4, 3, seed=0).astype(dtype)
    before = layer.parameters()
    with pytest.raises(ValueError, match="NaN or an infinity"):
        layer.weight = np.full((4, 3), np.nan)
    assert same(layer.parameters(), before)


@pytest.mark.parametrize("remake", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_and_pickles_compute_the_same(rng, make, remake):
    layer = make(seed=0)
    x = example(layer, rng)
    assert remake(layer)(x).tobytes() == layer(x).tobytes()


# ---- inputs -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MULTIPLYING)
def test_float64_input_is_cast(rng, name):
    layer = LAYERS[name](seed=0)
    x = example(layer, rng)
    assert layer(x.astype(np.float64)).tobytes() == layer(x).tobytes()
    assert layer(x.tolist()).dtype == np.float32
    assert layer.forward(x).tobytes() == layer(x).tobytes()


@pytest.mark.parametrize("name", MULTIPLYING)
def test_the_result_has_the_inputs_dtype(rng, dtype, name):
    for layer in (LAYERS[name](seed=0).astype(packed) for packed in ("float32", "bfloat16", "int8", "int4")):
        assert layer(example(layer, rng).astype(dtype)).dtype == dtype


def test_inputs_are_never_written(rng, make):
    layer = make(seed=0)
    x = example(layer, rng)
    x.flags.writeable = False
    before = x.tobytes()
    layer(x)
    assert x.tobytes() == before


ONES = np.ones((2, 3, 5), np.float32)
WRONG = [
    (lambda: nn.Linear(4, 3)(ONES), ValueError,
     "linear: x has shape (2, 3, 5), expected (..., 4) for a weight of shape (4, 3)"),
    (lambda: nn.Linear(4, 3)("abc"), TypeError, "Linear: x has dtype <U3, expected numbers"),
    (lambda: nn.RMSNorm(5)(ONES * 1j), TypeError, "RMSNorm: x has dtype complex64, expected numbers"),
    (lambda: nn.Swish()(ONES > 0), TypeError, "Swish: x has dtype bool, expected numbers"),
    (lambda: setattr(nn.Linear(4, 3), "weight", np.ones((3, 4))), ValueError,
     "Linear: weight has shape (3, 4), expected (4, 3)"),
    (lambda: setattr(nn.Linear(4, 3), "bias", 0.0), ValueError, "Linear: bias has shape (), expected (3,)"),
    (lambda: setattr(nn.Linear(4, 3), "weight", None), TypeError, "Linear: weight has dtype object, expected numbers"),
    (lambda: setattr(nn.Linear(4, 3, bias=False), "bias", np.ones(3)), AttributeError,
     "Linear: bias is None, this layer was made without it"),
    (lambda: setattr(nn.SwiGLU(4, 6), "W_up", np.ones((6, 4))), ValueError,
     "SwiGLU: W_up has shape (6, 4), expected (4, 6)"),
    (lambda: setattr(nn.RMSNorm(5), "weight", np.ones(4)), ValueError, "RMSNorm: weight has shape (4,), expected (5,)"),
    (lambda: setattr(nn.Embedding(9, 5), "weight", np.ones((5, 9))), ValueError,
     "Embedding: weight has shape (5, 9), expected (9, 5)"),
    (lambda: nn.Embedding(9, 5)([9]), IndexError, "embedding: id 9 at (0,) is outside the table of 9 rows"),
    (lambda: nn.Embedding(9, 5).astype("int3"), ValueError,
     "Embedding.astype: dtype is 'int3', expected one of float32, bfloat16, int8, int4"),
    (lambda: nn.Linear(4, 3).astype("int3"), ValueError,
     "Linear.astype: dtype is 'int3', expected one of float32, bfloat16, int8, int4"),
    (lambda: nn.GELU("quick"), ValueError, "GELU: approximate is 'quick', expected 'none' or 'tanh'"),
    (lambda: nn.GeGLU(4, approximate="quick"), ValueError, "GeGLU: approximate is 'quick', expected 'none' or 'tanh'"),
    (lambda: nn.SwiGLU.from_llama(np.ones((6, 4)), np.ones((4, 6)), np.ones((4, 6))), ValueError,
     "SwiGLU: up_proj has shape (4, 6), expected (6, 4)"),
    (lambda: nn.SwiGLU.from_llama(np.ones((6, 4)), np.ones((6, 4)), np.ones((6, 4))), ValueError,
     "SwiGLU: down_proj has shape (6, 4), expected (4, 6)"),
    (lambda: nn.SwiGLU.from_llama(np.ones(6), np.ones(6), np.ones(6)), ValueError,
     "SwiGLU: gate_proj has shape (6,), expected (hidden, in)"),
    (lambda: nn.GroupedQueryAttention(24, 4, 3), ValueError,
     "GroupedQueryAttention: n_heads is 4, expected a multiple of n_kv_heads 3"),
    (lambda: nn.GroupedQueryAttention(25, 4, 2), ValueError,
     "GroupedQueryAttention: d_model is 25, expected a multiple of n_heads 4"),
    (lambda: nn.MultiHeadAttention(24, 0), ValueError,
     "MultiHeadAttention: n_heads is 0, expected a multiple of n_kv_heads 0"),
    (lambda: nn.GroupedQueryAttention(24, 4, 2, rope=nn.RotaryPositionalEmbedding(8)), ValueError,
     "GroupedQueryAttention: rope has dim 8, expected at most head_dim 6"),
    (lambda: nn.GroupedQueryAttention(24, 4, 2)(np.ones((5, 24))), ValueError,
     "GroupedQueryAttention: x has shape (5, 24), expected (batch, seq, 24)"),
    (lambda: nn.GroupedQueryAttention(24, 4, 2)(np.ones((1, 5, 24)), mask=np.ones((4, 5), bool)), ValueError,
     "attention: mask has shape (4, 5), expected one that broadcasts to (batch, heads, q_len, kv_len) = (1, 4, 5, 5)"),
    (lambda: nn.RotaryPositionalEmbedding(4, 2)(np.ones((1, 3, 2, 4)), np.ones((1, 3, 2, 4))), IndexError,
     "rope: positions 0 to 2 are outside the table of 2 positions"),
    (lambda: nn.SinusoidalPositionalEncoding(5, 4)(ONES, start_pos=2), IndexError,
     "SinusoidalPositionalEncoding: positions 2 to 4 are outside the table of 4 positions"),
    (lambda: nn.SinusoidalPositionalEncoding(5, 4)(ONES, start_pos=-1), IndexError,
     "SinusoidalPositionalEncoding: positions -1 to 1 are outside the table of 4 positions"),
    (lambda: nn.SinusoidalPositionalEncoding(4)(ONES), ValueError,
     "SinusoidalPositionalEncoding: x has shape (2, 3, 5), expected (batch, seq, 4)"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_calls(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_a_rejected_assignment_changes_nothing(make):
    layer = make(seed=0)
    before = layer.parameters()
    for name, value in before.items():
        with pytest.raises(ValueError):
            setattr(*owner_of(layer, name), np.ones((*value.shape, 1)))
    assert same(layer.parameters(), before)
