"""forge_c.integrations.transformers: the attention function and its masks, against the float64 definition and against
transformers' own."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import check_close, multiplies_pairs
from test_attention import expected

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hf_models import PARITY, qkv, quiet  # noqa: E402, F401
from torch import nn  # noqa: E402
from transformers import masking_utils  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.models.gemma2 import modeling_gemma2  # noqa: E402
from transformers.models.gpt_oss import modeling_gpt_oss  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

from forge_c import functional  # noqa: E402
from forge_c.integrations import attention as ours  # noqa: E402
from forge_c.integrations.tensors import array  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reference_check(got: Any, q: Any, k: Any, v: Any, scale: float, **options: Any) -> None:
    """Against the float64 definition, within the bound of conftest's table."""
    out, _, magnitude, size = expected(*(array(t).transpose(0, 2, 1, 3) for t in (q, k, v)), scale=scale, **options)
    op = "attention_pairs" if multiplies_pairs(array(k).dtype) else "attention"
    check_close(op, array(got), out, magnitude=magnitude, n=k.shape[2], d=q.shape[3], s=size)


MODULE = SimpleNamespace(is_causal=True, num_key_value_groups=3, training=False)


@pytest.mark.parametrize("torch_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [
    {}, {"window": 4}, {"softcap": 1.5}, {"sinks": True}, {"causal": False},
    {"window": 4, "sinks": True, "softcap": 3.0},
], ids=str)
@pytest.mark.parametrize(("q_len", "kv_len"), [(9, 9), (1, 40), (5, 40)])
def test_attention_is_the_definition(rng: np.random.Generator, torch_dtype: Any, options: dict[str, Any], q_len: int,
                                     kv_len: int) -> None:
    q, k, v = qkv(rng, torch_dtype, q_len=q_len, kv_len=kv_len, v_dim=12)
    options = {"causal": True} | options
    sinks = None
    if options.pop("sinks", False):
        sinks = torch.from_numpy(rng.standard_normal(6, np.float32)).to(torch_dtype)
    module = SimpleNamespace(is_causal=options["causal"])
    got, weights = ours.attention(module, q, k, v, None, scaling=0.3, sliding_window=options.get("window"),
                                  softcap=options.get("softcap"), s_aux=sinks, dropout=0.0, position_ids=None)
    assert weights is None and got.dtype is torch_dtype and got.shape == (2, q_len, 6, 12) and got.is_contiguous()
    reference_check(got, q, k, v, 0.3, sinks=None if sinks is None else array(sinks), **options)


@pytest.mark.parametrize("eager", [
    pytest.param((modeling_llama, {}), id="llama"),
    pytest.param((modeling_gemma2, {"softcap": 1.5}), id="gemma2"),
    pytest.param((modeling_gpt_oss, {"s_aux": True}), id="gpt_oss"),
])
@pytest.mark.parametrize("kind", ["causal", "window", "padded", "float", "bidirectional"])
def test_attention_is_eager_attention(rng: np.random.Generator, eager: tuple[Any, dict[str, Any]], kind: str) -> None:
    """Each is within its bound of the definition, so they are within two bounds of each other."""
    file, options = eager
    q, k, v = qkv(rng, q_len=9, kv_len=20)
    if "s_aux" in options:
        options = {"s_aux": torch.from_numpy(rng.standard_normal(6, np.float32))}
    sizes = {"batch_size": 2, "q_length": 9, "kv_length": 20, "q_offset": 11}
    if kind == "window":
        sizes["mask_function"] = masking_utils.sliding_window_causal_mask_function(4)
    elif kind == "bidirectional":
        sizes["mask_function"] = masking_utils.bidirectional_mask_function
    if kind == "padded":
        sizes["attention_mask"] = torch.arange(20)[None] >= torch.tensor([[0], [6]])
    given = masking_utils.eager_mask(**sizes)
    mask = given if kind == "float" else ours.mask(**sizes)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=3, training=False, sinks=options.get("s_aux"))
    want, _ = file.eager_attention_forward(module, q, k, v, given, scaling=0.25, **options)
    got, _ = ours.attention(module, q, k, v, mask, scaling=0.25, **options)
    s = float((q.abs().amax() * k.abs().amax()) * 16 * 0.25)
    bound = 2.0**-24 * (2 * (16 + 8) * (1 + s) + 3 * 20 + 16) * v.abs().amax()
    assert (got - want).abs().max() <= 2 * bound < 0.01
    assert (got - want).abs().max() <= PARITY  # and in fact far closer


@pytest.mark.skipif("position_bias" not in inspect.signature(sdpa_attention_forward).parameters,
                    reason="this transformers passes no position_bias")
def test_position_bias_is_that_of_sdpa(rng: np.random.Generator) -> None:
    q, k, v = qkv(rng, q_len=9, kv_len=9)
    bias = torch.from_numpy(rng.standard_normal((1, 6, 9, 9), np.float32))
    padding = torch.arange(9)[None] >= torch.tensor([[0], [4]])
    sizes = {"batch_size": 2, "q_length": 9, "kv_length": 9, "attention_mask": padding}
    whole = masking_utils.sdpa_mask(**sizes)
    for mine, theirs in ((None, None), (ours.mask(**sizes), whole), (whole, whole),
                         (masking_utils.eager_mask(**sizes),) * 2):
        got, _ = ours.attention(MODULE, q, k, v, mine, scaling=0.25, position_bias=bias)
        want, _ = sdpa_attention_forward(MODULE, q, k, v, theirs, scaling=0.25, position_bias=bias)
        real = padding if theirs is not None else torch.ones(2, 9, dtype=torch.bool)
        assert (got - want)[real].abs().max() <= PARITY


@pytest.mark.parametrize("torch_dtype", DTYPES, ids=str)
def test_nothing_is_copied(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, torch_dtype: Any) -> None:
    q, k, v = qkv(rng, torch_dtype, q_len=1, kv_len=40)
    called: list[dict[str, Any]] = []
    kernel = functional.attention

    def spy(q: Any, k: Any, v: Any, **options: Any) -> Any:
        called.append({"q": q, "k": k, "v": v, **options})
        return kernel(q, k, v, **options)

    monkeypatch.setattr(functional, "attention", spy)
    out, _ = ours.attention(MODULE, q, k, v, None)
    (seen,) = called
    for name, t in (("q", q), ("k", k), ("v", v)):
        assert seen[name].ctypes.data == t.data_ptr() and seen[name].shape == tuple(t.transpose(1, 2).shape)
        assert seen[name].strides == tuple(t.element_size() * n for n in t.transpose(1, 2).stride())
        assert np.shares_memory(seen[name], array(t))
    assert seen["k"].shape[2] == 2, "keys are not repeated for the query heads"
    assert seen["out"].ctypes.data == out.data_ptr() and seen.get("mask") is None
    name = str(torch_dtype).removeprefix("torch.")
    assert seen["q"].dtype == (ml_dtypes.bfloat16 if name == "bfloat16" else name)


def test_a_view_of_bfloat16_shows_later_writes() -> None:
    t = torch.zeros(3, dtype=torch.bfloat16)
    seen = array(t)
    t[1] = 2.5
    assert seen.tolist() == [0, 2.5, 0] and array(nn.Parameter(t)).ctypes.data == t.data_ptr()


def test_attention_errors_say_what_came(rng: np.random.Generator) -> None:
    q, k, v = qkv(rng)
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: ours.attention(MODULE, q.double(), k, v, None), TypeError,
         "query has dtype torch.float64, expected torch.float32"),
        (lambda: ours.attention(MODULE, q, k.to("meta"), v, None), ValueError, "key is on meta, expected cpu"),
        (lambda: ours.attention(MODULE, q, k, v, None, dropout=0.1), ValueError, "dropout is 0.1, expected 0.0"),
        (lambda: ours.attention(MODULE, q, k, v, torch.ones(9, 9, dtype=torch.int32)), TypeError,
         "attention_mask has dtype torch.int32, expected torch.bool"),
        (lambda: ours.attention(MODULE, q, k, v, torch.ones(9, 8, dtype=torch.bool)), ValueError,
         "mask has shape (9, 8), expected one that broadcasts"),
        (lambda: ours.attention(MODULE, q, k, v, ours.mask(2, 4, 9, 5, allow_is_causal_skip=False)), ValueError,
         "attention_mask is for 4 queries and 9 keys, expected 9 and 9"),
        (lambda: ours.attention(MODULE, q, k, v, torch.ones(9, 9, device="meta", dtype=torch.bool)), ValueError,
         "attention_mask is on meta"),
        (lambda: ours.attention(SimpleNamespace(is_causal=False), q, k, v, None, sliding_window=3), ValueError,
         "sliding_window is 3 over 9 keys and not causal"),
    ]
    for call, kind, text in cases:
        with pytest.raises(kind, match=re.escape(text)):
            call()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="value requires a gradient.*no_grad"):
        ours.attention(MODULE, q, k, v.clone().requires_grad_(), None)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="s_aux requires a gradient"):
        ours.attention(MODULE, q, k, v, None, s_aux=nn.Parameter(torch.zeros(6)))
    assert ours.attention(MODULE, q.clone().requires_grad_(), k, v, None)[0].shape == (2, 9, 6, 16)  # under no_grad


# ---- masks --------------------------------------------------------------------------------------------

def all_patterns() -> Iterator[dict[str, Any]]:
    for window in (None, 1, 3, 50):
        function = masking_utils.causal_mask_function if window is None else (
            masking_utils.sliding_window_causal_mask_function(window))
        for q_length, q_offset, kv_length, kv_offset in ((6, 0, 6, 0), (1, 5, 6, 0), (3, 4, 7, 0), (3, 9, 5, 7),
                                                         (4, 0, 9, 0), (1, 3, 9, 0), (2, 0, 1, 0), (6, 0, 4, 0)):
            yield {"q_length": q_length, "q_offset": q_offset, "kv_length": kv_length, "kv_offset": kv_offset,
                   "mask_function": function}
    for q_length, kv_length in ((6, 6), (2, 7)):
        yield {"q_length": q_length, "kv_length": kv_length, "mask_function": masking_utils.bidirectional_mask_function}


@pytest.mark.parametrize("padding", ["none", "left", "right", "holes", "short"])
def test_a_pattern_stands_for_the_mask_of_sdpa(padding: str) -> None:
    stood = 0
    for sizes in all_patterns():
        seen = sizes["kv_length"] + sizes.get("kv_offset", 0)
        index = torch.arange(seen)[None]
        attention_mask = {
            "none": None, "left": index >= torch.tensor([[0], [3]]), "right": index < torch.tensor([[seen], [2]]),
            "holes": index % torch.tensor([[seen + 1], [2]]) == 0, "short": index[:, :-1] >= 0}[padding]
        sizes = {"batch_size": 2, **sizes, "attention_mask": attention_mask}
        if attention_mask is not None:
            sizes["attention_mask"] = attention_mask.expand(2, -1)
        want = masking_utils.sdpa_mask(**sizes, allow_is_causal_skip=False, local_size=None)
        got = ours.mask(**sizes, allow_is_causal_skip=False, local_size=None, device="cpu", config=None)
        if isinstance(got, ours.PatternMask):
            stood += 1
            assert got.shape == want.shape and got.dtype is torch.bool and got.device.type == "cpu"
            with torch._C.DisableTorchFunctionSubclass():
                assert got.untyped_storage().nbytes() == 1
            assert not got.opened
            got = got & True
        assert type(got) is torch.Tensor and torch.equal(got, want), sizes
        skipped = ours.mask(**sizes, local_size=None)
        if skipped is None:  # then every query sees all keys up to itself, as causal without a mask says
            assert torch.equal(want, ours.Pattern(sizes["q_length"], sizes["kv_length"], sizes["kv_length"], True, None,
                                                  None).dense(2))
    assert stood >= 20


def test_no_mask_where_there_is_nothing_to_hide() -> None:
    for sizes in ({"q_length": 6, "kv_length": 6}, {"q_length": 1, "kv_length": 9, "q_offset": 8},
                  {"q_length": 4, "kv_length": 9, "q_offset": 5}):
        for padding in (None, torch.ones(2, 9, dtype=torch.bool)[:, :sizes["kv_length"]]):
            assert ours.mask(batch_size=2, **sizes, attention_mask=padding) is None
    window = masking_utils.sliding_window_causal_mask_function(6)
    assert ours.mask(2, 6, 6, mask_function=window, local_size=6) is None
    assert isinstance(ours.mask(2, 7, 7, mask_function=window, local_size=6), ours.PatternMask)
    both = {"mask_function": masking_utils.bidirectional_mask_function, "allow_is_bidirectional_skip": True}
    assert ours.mask(2, 6, 6, **both) is None
    assert isinstance(ours.mask(2, 6, 6, **both, attention_mask=torch.arange(6)[None] > torch.tensor([[0], [1]])),
                      ours.PatternMask)


def test_other_patterns_are_real_masks() -> None:
    packed = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    functions = {
        "chunks": masking_utils.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.long)),
        "packed": masking_utils.and_masks(masking_utils.causal_mask_function,
                                          masking_utils.packed_sequence_mask_function(packed)),
        "both ways": masking_utils.sliding_window_bidirectional_mask_function(2),
        "overlay": masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, kv: kv == 4),
        "swapped": masking_utils.and_masks(masking_utils.causal_mask_function, masking_utils.sliding_window_overlay(2)),
    }
    for name, function in functions.items():
        sizes = {"batch_size": 2, "q_length": 6, "kv_length": 6, "mask_function": function}
        got = ours.mask(**sizes, local_size=3)
        assert type(got) is torch.Tensor and got.dtype is torch.bool, name
        assert torch.equal(got, masking_utils.sdpa_mask(**sizes, allow_is_causal_skip=False)), name


def test_a_pattern_that_is_written_to_is_the_mask_that_was_written(rng: np.random.Generator) -> None:
    q, k, v = qkv(rng)
    window = masking_utils.sliding_window_causal_mask_function(3)
    mask = ours.mask(2, 9, 9, mask_function=window)
    before, _ = ours.attention(MODULE, q, k, v, mask, scaling=0.25)
    reference_check(before, q, k, v, 0.25, causal=True, window=3)
    assert not mask.opened and "pattern" in vars(mask)
    mask[:, :, 8, 0] = True
    assert mask.opened and bool(mask[0, 0, 8, 0]) and mask.sum() == 2 * (9 * 3 - 3 + 1)
    after, _ = ours.attention(MODULE, q, k, v, mask, scaling=0.25)
    reference_check(after, q, k, v, 0.25, mask=array(mask.dense()))
    assert torch.equal(before[:, :8], after[:, :8]) and not torch.equal(before[:, 8], after[:, 8])
