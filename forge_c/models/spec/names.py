"""What families call their tensors, where others call them as LLaMA does: patterns, and what stands in their place."""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

Rules = Sequence[tuple[str, str]]

_BACKBONE: Rules = (
    (r"^backbone\.", "model."), (r"^(model\.)?embeddings?\.", r"\1embed_tokens."), (r"^(model\.)?norm_f\.", r"\1norm."),
    (r"^((?:model\.)?layers\.\d+\.)norm\.", r"\1input_layernorm."))
_BAMBA: Rules = (
    (r"^(model\.)?final_layernorm\.", r"\1norm."), (r"\.pre_ff_layernorm\.", ".post_attention_layernorm."),
    (r"\.feed_forward\.", ".mlp."), (r"\.mamba\.", ".mixer."))
_ZAMBA2: Rules = ((r"\.mamba_decoder\.", "."), *_BAMBA)
_NEMOTRON: Rules = (
    *_BACKBONE, (r"\.mixer\.([qkvo])_proj\.", r".self_attn.\1_proj."), (r"\.mixer\.(up|down)_proj\.", r".mlp.\1_proj."))
_GRANITE: Rules = (
    (r"\.mamba\.", ".mixer."), (r"\.shared_mlp\.input_linear\.", ".mlp.gate_up_proj."),
    (r"\.shared_mlp\.output_linear\.", ".mlp.down_proj."))
_LFM2: Rules = (
    (r"^(model\.)?embedding_norm\.", r"\1norm."), (r"\.operator_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."), (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."), (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
    (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."), (r"\.self_attn\.([qk])_layernorm\.", r".self_attn.\1_norm."),
    (r"\.conv\.conv\.", ".mixer.conv1d."), (r"\.conv\.(in|out)_proj\.", r".mixer.\1_proj."))
_GRIFFIN: Rules = (
    (r"^(model\.)?final_norm\.", r"\1norm."), (r"\.temporal_pre_norm\.", ".input_layernorm."),
    (r"\.channel_pre_norm\.", ".post_attention_layernorm."), (r"\.mlp_block\.", ".mlp."),
    (r"\.temporal_block\.([qkvo])_proj\.", r".self_attn.\1_proj."), (r"\.temporal_block\.", ".mixer."),
    (r"\.mixer\.rg_lru\.", ".mixer."), (r"\.mixer\.conv_1d\.", ".mixer.conv1d."))
_NAMES: Mapping[str, Rules] = {"mamba": _BACKBONE, "falcon_mamba": _BACKBONE, "mamba2": _BACKBONE, "bamba": _BAMBA,
                               "falcon_h1": _BAMBA, "granitemoehybrid": _GRANITE, "lfm2": _LFM2,
                               "nemotron_h": _NEMOTRON, "recurrent_gemma": _GRIFFIN, "zamba2": _ZAMBA2}


def tensor_names(model_type: str) -> Callable[[str], str]:
    """The name that LLaMA's files would give a tensor, from the one in files of the family."""
    rules = [(re.compile(pattern), usual) for pattern, usual in _NAMES.get(model_type, ())]

    def renamed(name: str) -> str:
        for pattern, usual in rules:
            name = pattern.sub(usual, name)
        return name

    return renamed
