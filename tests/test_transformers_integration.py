"""forge_c.integrations.transformers: whole models of every family against their eager selves, and that everything can
be undone. Models are tiny and random."""

from __future__ import annotations

import copy
import gc
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hf_models import COMMON, FAMILIES, WINDOW, assert_parity, ids, qkv, quiet, tiny, written  # noqa: E402, F401
from torch import nn  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

import forge_c as fc  # noqa: E402
from forge_c import functional  # noqa: E402
from forge_c.integrations import attention as ours  # noqa: E402
from forge_c.integrations import modules  # noqa: E402
from forge_c.integrations.transformers import Swaps, accelerate, register, restore  # noqa: E402

# ---- registered, without accelerate() -----------------------------------------------------------------

@pytest.mark.parametrize(("family", "options"), [
    ("llama", {}), ("mistral", {}), ("gemma2", {}), ("mistral", {"cache_implementation": "static"}),
    ("llama", {"cache_implementation": "static"}), ("gemma2", {"cache_implementation": "static"}),
], ids=str)
def test_generation_makes_no_real_mask(family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither do padding, windows and the unused end of a static cache: they reach the kernel as what they are."""
    made: list[Any] = []
    masks: list[Any] = []
    kernel = functional.attention
    monkeypatch.setattr(ours.Pattern, "dense", lambda self, batch: made.append(self))
    monkeypatch.setattr(ours, "sdpa_mask", lambda **sizes: made.append(sizes))

    def spy(q: Any, k: Any, v: Any, *, mask: Any = None, **rest: Any) -> Any:
        masks.append(None if mask is None else mask.shape)
        return kernel(q, k, v, mask=mask, **rest)

    monkeypatch.setattr(functional, "attention", spy)
    model, prompt = tiny(family, attn_implementation="forge_c"), ids(2, 12)
    written(model, prompt, **options)
    assert not made and masks == [None] * (2 * 24)
    masks.clear()
    written(model, prompt, attention_mask=(prompt > 0) & (torch.arange(12) >= torch.tensor([[0], [5]])), **options)
    assert not made and all(shape is None or shape[1:3] == (1, 1) for shape in masks) and any(masks)


def test_register_twice_and_load_by_name(tmp_path: Path) -> None:
    register()
    register()
    assert transformers.AttentionInterface()["forge_c"] is ours.attention
    assert transformers.AttentionMaskInterface()["forge_c"] is ours.mask
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="forge_c").eval()
    assert loaded.config._attn_implementation == "forge_c"
    prompt = ids(2, 12)
    want = model(prompt).logits
    assert_parity(loaded(prompt).logits, want)
    model.set_attn_implementation("forge_c")
    assert torch.equal(model(prompt).logits, loaded(prompt).logits) and not torch.equal(model(prompt).logits, want)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss", "qwen2_moe", "static"])
def test_by_name_every_family_writes_what_eager_writes(family: str) -> None:
    """Windows of 7 over 12 + 24 tokens, a row padded on the left, softcaps, sinks, static caches."""
    options: dict[str, Any] = {}
    if family == "gpt_oss":
        model = tiny("GptOss", sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2)
    elif family == "qwen2_moe":  # masks with a window, but never says sliding_window to the attention function
        model = tiny("Qwen2Moe", sliding_window=WINDOW, use_sliding_window=True, num_experts=4, num_experts_per_tok=2,
                     moe_intermediate_size=32, shared_expert_intermediate_size=32,
                     layer_types=["sliding_attention", "full_attention"])
        assert "sliding_window=" not in inspect.getsource(inspect.getmodule(type(model)))
    elif family == "static":
        model, options = tiny("gemma2"), {"cache_implementation": "static"}
    else:
        model = tiny(family)
    prompt = ids(2, 12)
    keep = torch.ones_like(prompt)
    keep[1, :5] = 0
    want, want_padded = model(prompt).logits, written(model, prompt, attention_mask=keep, **options)
    model.set_attn_implementation("forge_c")
    assert_parity(model(prompt).logits, want)
    assert written(model, prompt, attention_mask=keep, **options) == want_padded


def test_a_padded_row_writes_what_it_writes_alone() -> None:
    model = tiny("mistral").requires_grad_(False)
    model.set_attn_implementation("forge_c")
    prompt = ids(2, 12)
    keep = torch.ones_like(prompt)
    keep[1, :5] = 0
    together = written(model, prompt, attention_mask=keep)
    assert together == [*written(model, prompt[:1]), *written(model, prompt[1:, 5:])]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_prompt_in_chunks_is_the_prompt(family: str) -> None:
    model = tiny(family)
    prompt = ids(2, 21)
    want = model(prompt).logits
    model.set_attn_implementation("forge_c")
    cache = transformers.DynamicCache(config=model.config)
    parts = [model(prompt[:, a:b], **cache_argument(model, cache)).logits
             for a, b in ((0, 4), (4, 15), (15, 16), (16, 21))]
    assert_parity(torch.cat(parts, dim=1), want)


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """`cache` in new versions of transformers, `past_key_values` before."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def test_an_encoder_sees_both_ways_and_no_padding() -> None:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=64,
        attn_implementation="eager", initializer_range=0.2)).eval()
    prompt, keep = ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    keep[1, 8:] = 0
    want = [model(prompt).last_hidden_state, model(prompt, attention_mask=keep).last_hidden_state[keep.bool()]]
    model.set_attn_implementation("forge_c")
    got = [model(prompt).last_hidden_state, model(prompt, attention_mask=keep).last_hidden_state[keep.bool()]]
    for a, b in zip(got, want, strict=True):
        assert_parity(a, b)
    accelerate(model)
    assert model.forge_c_swaps.norms == 0 and model.forge_c_swaps.attention
    assert_parity(model(prompt).last_hidden_state, want[0])


# ---- accelerate() -------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
def test_accelerate_swaps_all_and_writes_the_same(family: str) -> None:
    model, prompt = tiny(family), ids(2, 12)
    keep = torch.ones_like(prompt)
    keep[0, :4] = 0
    want, want_tokens = model(prompt).logits, written(model, prompt, attention_mask=keep)
    weights = {name: (w.data_ptr(), w.clone()) for name, w in model.named_parameters()}
    assert accelerate(model) is model
    layers, norms, linears = COMMON["num_hidden_layers"], *FAMILIES[family][2:]
    assert model.forge_c_swaps == Swaps(
        norms=norms * layers + 1, rotary=1, mlps=layers, linears=linears * layers + 1, attention=True,
        _patches=model.forge_c_swaps._patches, _implementations="eager")
    got = model(prompt).logits
    assert_parity(got, want)
    assert not torch.equal(got, want), "nothing of ours ran"
    assert written(model, prompt, attention_mask=keep) == want_tokens
    assert restore(model) is model
    assert torch.equal(model(prompt).logits, want) and model.config._attn_implementation == "eager"
    assert not any("forward" in vars(m) for m in model.modules()) and not hasattr(model, "forge_c_swaps")
    assert all(w.data_ptr() == weights[name][0] and torch.equal(w, weights[name][1])
               for name, w in model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_swap_computes_with_torchs_own_memory(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerate(tiny(family, torch.bfloat16))
    used: dict[str, set[int]] = {"rms_norm": set(), "linear": set(), "rope": set(), "attention": set()}
    for name, addresses in used.items():
        kernel = getattr(functional, name)

        def spy(*args: Any, kernel: Any = kernel, addresses: set[int] = addresses, **options: Any) -> Any:
            addresses.update(a.ctypes.data for a in args if isinstance(a, np.ndarray))
            return kernel(*args, **options)

        monkeypatch.setattr(functional, name, spy)
    monkeypatch.setattr(functional, "isa", lambda: "avx2")
    model(ids(1, 12))
    assert {p.data_ptr() for name, p in model.named_parameters() if "norm" in name} <= used["rms_norm"]
    matrices = {p.data_ptr() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name}
    assert len(matrices) >= 8 and matrices <= used["linear"]
    assert len(used["rope"]) > 0 and len(used["attention"]) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_to_float32_as_transformers_is(family: str) -> None:
    """Ours rounds to bfloat16 where theirs does or less often; the factor is the scatter of two sums of roundings."""
    model, prompt = tiny(family, torch.bfloat16), ids(2, 12)
    exact = copy.deepcopy(model).float()(prompt).logits
    theirs = model(prompt).logits.float() - exact
    mine = accelerate(model)(prompt).logits
    assert mine.dtype is torch.bfloat16
    assert 0 < (mine.float() - exact).norm() <= 1.25 * theirs.norm()
    assert theirs.norm() <= 0.1 * exact.norm()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_bfloat16_chooses_the_token_wherever_the_choice_is_clear(family: str) -> None:
    """Greedy texts in bfloat16 part where two tokens are nearly as likely, those of eager and sdpa too; so each
    position of the float32 model's text is judged by itself. Clear: a margin over twice the largest error of theirs."""
    model, prompt = tiny(family, torch.bfloat16), ids(2, 12)
    exact_model = copy.deepcopy(model).float()
    text = torch.cat([prompt, torch.tensor(written(exact_model, prompt, new=48))], dim=1)
    exact = exact_model(text).logits
    best = exact.topk(2).values
    clear = best[..., 0] - best[..., 1] > 2 * (model(text).logits.float() - exact).abs().max()
    assert clear.sum() >= clear.numel() // 2
    accelerate(model)
    assert torch.equal(model(text).logits.argmax(-1)[clear], exact.argmax(-1)[clear])
    assert all(len(row) == 24 for row in written(model, prompt))


@pytest.mark.parametrize("options", [
    {"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}, {"prefill_chunk_size": 5},
], ids=str)
def test_every_way_of_generating(options: dict[str, Any]) -> None:
    model, prompt = tiny("llama"), ids(2, 12)
    want = written(model, prompt, **options)
    assert written(accelerate(model), prompt, **options) == want


@pytest.mark.parametrize("scaling", [
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
], ids=lambda s: s["rope_type"])
def test_rope_scaling_is_the_models_own(scaling: dict[str, Any]) -> None:
    options = {"rope_parameters": {"rope_theta": 10000.0, **scaling}, "max_position_embeddings": 24}
    model, prompt = tiny("llama", **options), ids(1, 12)
    want = written(copy.deepcopy(model), prompt)  # old versions keep the dynamic angles of a longer text
    accelerate(model)
    assert model.forge_c_swaps.rotary == 1 and written(model, prompt) == want


def test_part_of_a_head_turns_only_where_the_file_does_so(rng: np.random.Generator) -> None:
    q, k, _ = qkv(rng)
    cos = sin = torch.ones(1, 9, 8)
    for family, partial in (("phi3", True), ("llama", False)):
        model = accelerate(tiny(family))
        site = modules.RopeSite.of(model.model.layers[0].self_attn)
        cos._forge_c_rope = fc.RopeTable(np.ones((9, 4), np.float32), np.ones((9, 4), np.float32)), None
        assert site.partial is partial
        if partial:
            assert torch.equal(site.replacement(q, k, cos, sin)[0][..., 8:], q[..., 8:])
        else:
            with pytest.raises(RuntimeError, match="must match"):
                site.replacement(q, k, cos, sin)


def test_another_model_of_the_family_is_untouched() -> None:
    gc.collect()  # models of other tests leave when they are collected
    name = modeling_llama.apply_rotary_pos_emb
    assert name.__code__.co_filename == modeling_llama.__file__
    first, second, other, prompt = tiny("llama"), tiny("llama", seed=1), tiny("llama", seed=2), ids(2, 12)
    want = other(prompt).logits
    accelerate(first)
    accelerate(second)
    assert modeling_llama.apply_rotary_pos_emb is not name
    assert torch.equal(other(prompt).logits, want)
    restore(first)
    assert modeling_llama.apply_rotary_pos_emb is not name, "second still uses it"
    restore(second)
    assert modeling_llama.apply_rotary_pos_emb is name
    accelerate(first)
    assert modeling_llama.apply_rotary_pos_emb is not name
    del first
    gc.collect()
    assert modeling_llama.apply_rotary_pos_emb is name, "nobody is left to use it"


def test_a_copy_is_a_model_of_its_own() -> None:
    model, prompt = accelerate(tiny("llama"), pack="float32"), ids(1, 12)
    before = model(prompt).logits
    twin = copy.deepcopy(model)
    for weight in twin.parameters():
        weight.mul_(0.5)
    assert torch.equal(model(prompt).logits, before) and not torch.allclose(twin(prompt).logits, before, atol=0.1)
    mine = twin(prompt).logits
    assert_parity(mine, restore(twin)(prompt).logits)
    assert torch.equal(model(prompt).logits, before)


# ---- packed -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
def test_packed_float32_writes_the_same(family: str) -> None:
    model, prompt = tiny(family), ids(2, 12)
    want, want_tokens = model(prompt).logits, written(model, prompt)
    accelerate(model, pack="float32")
    matrices = [w for p in packed_products(model) for w in p.weights() if w is not None and w.dim() == 2]
    assert model.forge_c_swaps.packed_nbytes >= sum(w.nbytes for w in matrices) > 0
    assert_parity(model(prompt).logits, want)
    assert written(model, prompt) == want_tokens
    assert torch.equal(restore(model)(prompt).logits, want)


# What rounding the weights to the format and, for integers, the inputs costs a layer (docs/accuracy.md), times the
# root of the 2 * 7 products on the way to the logits, and a factor of 2 for what norms and the softmax make of it.
@pytest.mark.parametrize(("form", "layer"), [("bfloat16", 0.0023), ("int8", 0.014), ("int4", 0.12)])
def test_packed_formats_lose_what_they_lose(form: str, layer: float) -> None:
    model, prompt = tiny("llama", initializer_range=0.05), ids(2, 12)
    want = model(prompt).logits
    accelerate(model, pack=form)
    got = model(prompt).logits
    assert 0 < (got - want).norm() <= 2 * 14**0.5 * layer * want.norm()
    head = next(p for p in model.forge_c_swaps._patches if getattr(p, "module", None) is model.lm_head)
    assert head.form == ("int8" if form == "int4" else form) and model.forge_c_swaps.pack == form


def test_packed_copies_follow_the_weights() -> None:
    model, other, prompt = tiny("phi3"), tiny("phi3", seed=5), ids(1, 12)
    want = other(prompt).logits
    accelerate(model, pack="float32")
    model(prompt)
    model.load_state_dict(other.state_dict())
    assert_parity(model(prompt).logits, want)
    model.model.layers[0].mlp.down_proj.weight.data = torch.zeros_like(model.model.layers[0].mlp.down_proj.weight)
    other.model.layers[0].mlp.down_proj.weight.zero_()
    assert_parity(model(prompt).logits, other(prompt).logits)


def packed_products(model: Any) -> list[Any]:
    return [p for p in model.forge_c_swaps._patches if isinstance(p, modules.Linear | modules.GatedMLP)]


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_merged_by_hand_is_noticed(family: str, dtype: Any) -> None:
    """`weight.data += B A`, which torch's version of the tensor does not count: each matrix and bias in turn."""
    model, prompt = tiny(family, dtype), ids(1, 12)
    accelerate(model, pack="float32")
    weights = [w for p in packed_products(model) for w in p.weights() if w is not None]
    assert len(weights) >= 9
    for weight in weights:
        before, version = model(prompt).logits, weight._version
        low = torch.randn(weight.shape[0], 4) @ torch.randn(4, weight.shape[-1]) if weight.dim() == 2 else (
            torch.randn(weight.shape))
        weight.data += (0.1 * low).to(dtype)
        got = model(prompt).logits
        assert weight._version == version and not torch.equal(got, before)
        accelerate(restore(model), pack="float32")
        assert torch.equal(got, model(prompt).logits)


def test_a_merge_into_a_part_of_the_rows_is_noticed() -> None:
    """phi3 has queries, keys and values in one matrix; keys are a fifth of it."""
    model, prompt = tiny("phi3"), ids(1, 12)
    accelerate(model, pack="float32")
    before = model(prompt).logits
    model.model.layers[1].self_attn.qkv_proj.weight.data[96:128] += 0.1 * torch.randn(32, 4) @ torch.randn(4, 48)
    after = model(prompt).logits
    assert not torch.equal(after, before)
    assert_parity(after, restore(model)(prompt).logits)


def test_unchanged_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also weights that are NaN, a copy of the model, and memory laid out by columns."""
    model, prompt = tiny("llama"), ids(1, 12)
    down = model.model.layers[0].mlp.down_proj
    down.weight.data = down.weight.data.T.contiguous().T
    down.weight.data[0] = torch.nan
    accelerate(model, pack="float32")
    want, made = model(prompt).logits, []
    monkeypatch.setattr(modules, "pack", lambda *args: made.append(args))
    assert torch.allclose(model(prompt).logits, want, rtol=0, atol=0, equal_nan=True) and not made
    monkeypatch.undo()
    twin = copy.deepcopy(model)
    down.weight.data[:] = 0
    assert torch.allclose(twin(prompt).logits, want, rtol=0, atol=0, equal_nan=True)
    assert torch.isfinite(model(prompt).logits).all()


@pytest.mark.parametrize("pack", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_how_an_input_lies_in_memory_does_not_choose_what_multiplies(dtype: Any, pack: str | None) -> None:
    """A module gets the transposed memory of a tensor, and of a cosine-turned one, and gives the same bits."""
    model = accelerate(tiny("llama", dtype), pack=pack)
    layer, x = model.model.layers[0], torch.randn(2, 9, 48).to(dtype)
    across = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert across.stride(-1) != 1 and torch.equal(across, x)
    for module in (layer.input_layernorm, layer.mlp, layer.self_attn.q_proj, model.lm_head):
        assert torch.equal(module(across), module(x)), type(module).__name__
    q, k = torch.randn(2, 6, 9, 16).to(dtype), torch.randn(2, 2, 9, 16).to(dtype)
    cos, sin = model.model.rotary_emb(x, torch.arange(9)[None])
    want = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    q, k = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k))
    got = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    assert all(map(torch.equal, got, want))


# ---- what is left alone -------------------------------------------------------------------------------

class OddRMSNorm(nn.Module):
    """Looks like one, and takes the root of something else."""

    def __init__(self, dim: int, power: float = 1.5) -> None:
        super().__init__()
        self.weight, self.eps, self.power = nn.Parameter(torch.ones(dim)), 1e-6, power

    def forward(self, x: Any) -> Any:
        return self.weight * x * (x.abs().pow(self.power).mean(-1, keepdim=True) + self.eps) ** (-1 / self.power)


class OddMLP(nn.Module):
    """The parts of a gated MLP, put together the other way round."""

    def __init__(self, act: Any = None, swap: bool = True) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)
        self.act_fn, self.swap = act or nn.SiLU(), swap

    def forward(self, x: Any) -> Any:
        a, b = (self.up_proj, self.gate_proj) if self.swap else (self.gate_proj, self.up_proj)
        return self.down_proj(self.act_fn(a(x)) * b(x))


class WithExtra(OddMLP):
    def __init__(self) -> None:
        super().__init__(swap=False)
        self.dropout = nn.Dropout(0.1)


def test_only_what_matches_exactly_is_swapped() -> None:
    torch.manual_seed(0)
    assert modules.norm(OddRMSNorm(64, 2.0)).offset == 0.0
    assert modules.norm(OddRMSNorm(64)) is None
    assert modules.norm(nn.LayerNorm(64)) is None
    assert modules.norm(OddRMSNorm(64, 2.0).double()) is None
    assert modules.norm(OddRMSNorm(64, 2.0).to("meta")) is None
    for act, name in ((nn.SiLU(), "silu"), (nn.GELU(), "gelu"), (nn.GELU(approximate="tanh"), "gelu_tanh")):
        patch = modules.gated_mlp(OddMLP(act, swap=False), None)
        assert patch is not None and patch.activation == name
    for odd in (OddMLP(), OddMLP(nn.ReLU(), False), OddMLP(nn.Tanh(), False), WithExtra(), OddMLP(swap=False).double()):
        assert modules.gated_mlp(odd, None) is None
    subclass = type("MyLinear", (nn.Linear,), {})(8, 24)
    assert modules.linear(subclass, None) is None and modules.linear(nn.Linear(8, 24), None) is not None
    odd = OddMLP(swap=False)
    odd.up_proj = subclass
    assert modules.gated_mlp(odd, None) is None


def test_interleaved_rotations_are_left_alone() -> None:
    model = transformers.CohereForCausalLM(transformers.CohereConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None, attn_implementation="eager")).eval()
    prompt = ids(1, 12)
    want = model(prompt).logits
    accelerate(model)
    assert (model.forge_c_swaps.rotary, model.forge_c_swaps.mlps) == (0, 2)
    assert_parity(model(prompt).logits, want)


def test_adapters_hooks_and_autocast_go_past_the_swaps() -> None:
    model, prompt = tiny("llama"), ids(1, 12)
    hidden = torch.randn(1, 5, 48)
    mlp = model.model.layers[0].mlp
    with torch.autocast("cpu", torch.bfloat16):
        want = mlp(hidden)
    accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mlp(hidden), want) and want.dtype is torch.bfloat16
    plain = mlp(hidden)
    seen: list[Any] = []
    hook = mlp.up_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert_parity(mlp(hidden), plain)
    assert len(seen) == 1 and seen[0].shape == (1, 5, 80)
    hook.remove()

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Any) -> Any:
            return 2 * self.inner(x)

    mlp.down_proj = Doubled(mlp.down_proj)
    assert_parity(mlp(hidden), 2 * plain)
    mlp.down_proj = mlp.down_proj.inner
    assert torch.equal(mlp(hidden), plain)
    assert model.model.norm(hidden.double()).dtype is torch.float64
    assert model(prompt).logits.shape == (1, 12, 97)


def test_accelerate_errors_leave_the_model_alone() -> None:
    model, prompt = tiny("llama"), ids(1, 12)
    want = model(prompt).logits
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: accelerate("model"), TypeError, "accelerate: model is a str, expected a torch module"),
        (lambda: accelerate(model, pack="int3"), ValueError, "pack is 'int3', expected None or one of float32"),
        (lambda: accelerate(nn.Sequential(nn.Tanh(), nn.ReLU())), ValueError, "Sequential has no RMSNorm"),
        (lambda: accelerate(tiny("llama", torch.float64)), TypeError, "dtype torch.float64, expected torch.float32"),
        (lambda: accelerate(tiny("llama").to("meta")), ValueError, "is on meta, expected cpu"),
        (lambda: restore(model), ValueError, "restore: LlamaForCausalLM is not accelerated"),
    ]
    for call, kind, text in cases:
        with pytest.raises(kind, match=re.escape(text)):
            call()
    broken = tiny("llama", seed=3)
    broken.model.layers[1].self_attn.o_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        accelerate(broken, pack="int8")
    for m in (model, broken):
        assert not any("forward" in vars(part) for part in m.modules()) and m.config._attn_implementation == "eager"
    assert torch.equal(model(prompt).logits, want)
    accelerate(model)
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate(model)
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"requires a gradient.*torch.no_grad\(\)"):
        model(prompt)
    restore(model)
    with torch.enable_grad():
        model(prompt, labels=prompt).loss.backward()
    assert model.model.norm.weight.grad.abs().sum() > 0


def test_the_page_about_integrations_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parent.parent / "docs" / "integrations.md"
    examples = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(examples) >= 2
    model, given = tiny("llama"), ids(1, 12)

    class Texts:
        def __call__(self, text: str, return_tensors: str) -> dict[str, Any]:
            return {"input_ids": given}

        def decode(self, found: Any) -> str:
            return f"{len(found)} tokens"

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **options: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: Texts())
    names: dict[str, Any] = {}
    for example in examples:
        exec(compile(example, page.name, "exec"), names)
    assert names["ids"].shape == (1, 12 + 32) and names["model"].forge_c_swaps.mlps == 2
