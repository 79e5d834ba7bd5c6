"""Keys of a config.json from which no decoder takes a number: of training, texts, files, other software.

Everything else that a family does not know is refused. Keys that begin with an underscore are notes of a program to
itself, and never meant for a reader.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What transformers' classes write, whichever model it is.
_TRANSFORMERS = """
    model_type architectures auto_map transformers_version adapters_version torch_dtype dtype use_cache output_past
    initializer_range initializer_factor init_std output_attentions output_hidden_states return_dict use_return_dict
    output_router_logits output_scores output_logits return_dict_in_generate chunk_size_feed_forward is_encoder_decoder
    is_decoder is_composition add_cross_attention tie_encoder_decoder cross_attention_hidden_size pruned_heads
    torchscript use_bfloat16 tf_legacy_loss finetuning_task task_specific_params problem_type id2label label2id
    num_labels classifier_dropout classifier_activation classifier_bias classifier_pooling summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj tokenizer_class prefix
    keys_to_ignore_at_inference base_model_tp_plan base_model_pp_plan base_model_ep_plan sub_configs
    attn_implementation experts_implementation cache_implementation transformers_weights transformers.js_config
    pretraining_tp tensor_parallel xla_device hf_transformers_version for_llm_compressor
"""

# Of a text, and how one is drawn: what generate does is said where it is called.
_TEXTS = """
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id
    bos_token eos_token pad_token unk_token additional_special_tokens special_tokens chat_template prompt_template
    system_prompt generation_config max_length min_length max_new_tokens min_new_tokens max_time do_sample temperature
    top_k top_p top_h min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty encoder_repetition_penalty
    presence_penalty frequency_penalty penalty_alpha guidance_scale num_beams num_beam_groups num_return_sequences
    diversity_penalty length_penalty early_stopping no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    force_words_ids constraints sequence_bias stop_strings stop_token_ids suppress_tokens begin_suppress_tokens
    forced_bos_token_id forced_eos_token_id forced_decoder_ids exponential_decay_length_penalty renormalize_logits
    remove_invalid_values token_healing watermarking_config assistant_confidence_threshold assistant_early_exit
    num_assistant_tokens num_assistant_tokens_schedule prompt_lookup_num_tokens max_matching_ngram_size dola_layers
    low_memory cache_config compile_config disable_compile prefill_chunk_size is_assistant use_mtp
    tokenizer_padding_side padding_side tokenizer_model_max_length add_bos_token add_eos_token
"""

# How long texts were when it was trained, and sizes that others round up to.
_LENGTHS = """
    max_sequence_length max_seq_len max_seq_length seq_length seq_len sequence_length model_max_length context_length
    max_context_length max_position max_input_length n_ctx n_positions block_size training_length
    pad_to_multiple_of pad_vocab_size_multiple make_vocab_size_divisible_by padded_vocab_size vocab_size_padded
    original_vocab_size sliding_window_size
"""

# Dropout and losses: nothing of them is left when a model is used.
_TRAINING = """
    attention_dropout attention_dropout_prob attn_dropout attn_pdrop attention_probs_dropout_prob resid_pdrop
    resid_dropout residual_dropout residual_dropout_prob embd_pdrop embd_dropout embed_dropout embedding_dropout dropout
    dropout_rate dropout_prob hidden_dropout hidden_dropout_prob activation_dropout ffn_dropout mlp_dropout layerdrop
    lora_dropout drop_path_rate summary_dropout_prob label_smoothing label_smoothing_factor z_loss z_loss_coef
    z_loss_weight router_aux_loss_coef router_z_loss_coef aux_loss_coef ignore_index neftune_noise_alpha
    gradient_checkpointing gradient_checkpointing_kwargs use_gradient_checkpointing use_recompute recompute
    recompute_granularity activation_checkpointing group_size_ratio shift_attn learning_rate lr weight_decay batch_size
    num_train_epochs num_epochs epochs train_batch_size warmup_steps warmup_ratio max_steps optimizer optim seed
    random_seed max_grad_norm freeze_layers tune_mm_mlp_adapter trained_tokens num_tokens training_steps global_step
    step best_loss final_loss loss fp16 bf16 fp32 tf32 use_fp16 use_bf16 half_precision mixed_precision init_method
    init_device init_config initializer_std embedding_initializer_range output_initializer_range weight_init
    moe_aux_loss_coeff reward_model reward_type use_reward_model value_head_dropout peft_type lora_alpha_trained
"""

# How somebody's kernels compute the same sums, or spread them over machines.
_KERNELS = """
    use_flash_attn use_flash_attn_2 use_flash_attention use_flash_attention_2 use_flash_attention_v2 flash_attention
    flash_attn flash_attention_2 use_flashattn attn_impl attention_implementation attention_backend attn_backend
    use_sdpa use_sdp use_xformers use_memory_efficient_attention memory_efficient_attention use_triton use_torch_compile
    torch_compile use_liger_kernel use_fused_rope use_fused_rms_norm use_fused_rmsnorm use_fused_swiglu use_fused_mlp
    use_fused_layernorm use_fused_head_and_loss_fn fused_rms_norm fused_rope fused_mlp fused_dropout_add_ln
    fused_bias_fc use_apex use_apex_rmsnorm use_te use_transformer_engine use_custom_kernels use_ring_attention
    use_sequence_parallel sequence_parallel sequence_parallel_degree sequence_parallel_size tensor_parallel_degree
    tensor_parallel_size tensor_parallel_output tensor_model_parallel_size tp_size tp_degree pp_size
    pipeline_parallel_degree pipeline_parallel_size pipeline_model_parallel_size virtual_pp_degree context_parallel_size
    data_parallel_size data_parallel_degree expert_parallel_size device_map device low_cpu_mem_usage
    softmax_in_fp32 attention_softmax_in_fp32 attn_softmax_in_fp32 residual_in_fp32 use_cache_quantization
    use_cache_kernel kv_cache_dtype kv_cache_free_gpu_mem_fraction gpu_memory_utilization enforce_eager max_num_seqs
    max_model_len max_batch_size recommended_dtype use_kernels
"""

# Who made the file, when, of what, and with which program.
_ORIGIN = """
    name model_name model_id model_size author authors license licence language languages description comment comments
    note notes tags datasets dataset_name base_model base_model_name base_model_name_or_path parent_model
    teacher_model model_version internal_version version revision release_date date created_at created_by commit
    commit_hash git_commit pipeline_tag library_name organization citation url homepage
    unsloth_version unsloth_fixed unsloth_optimized is_llama_config axolotl_version axolotl_config llamafactory_version
    trl_version peft_version mergekit_version mlx_version mlx_lm_version vllm_version sglang_version
    optimum_version neuron paddlenlp_version megatron_version nemo_version deepspeed_version accelerate_version
    torch_version pytorch_version onnx_version framework producer converted_from conversion_date
"""

INERT = frozenset((_TRANSFORMERS + _TEXTS + _LENGTHS + _TRAINING + _KERNELS + _ORIGIN).split())

# Keys that change the maths unless they hold a value that means "off"; null always does.
_OFF: Mapping[str, Any] = {
    "rope_interleaved": False, "use_bidirectional_attention": False, "is_causal": True, "use_qk_norm": False,
    "qk_norm": False, "qk_layernorm": False, "use_mrope": False, "lm_head_bias": False, "full_attn_mod": 1,
    "interpolate_factor": 1, "attention_chunk_size": False, "layer_norm_type": False, "clip_qkv": False,
    "attention_bias": False, "mlp_bias": False, "qkv_bias": False, "use_bias": False, "use_qkv_bias": False,
    "attention_out_bias": False, "add_bias_linear": False, "alibi": False, "use_alibi": False, "parallel_attn": False,
    "use_parallel_residual": False, "use_sliding_window": False, "rotary_pct": 1, "rope_ratio": 1,
    "rope_scaling_factor": 1, "logit_scale": 1, "scale_emb": 1, "num_experts": 0,
    "num_local_experts": 0, "num_nextn_predict_layers": 0, "embedding_multiplier": 1, "residual_multiplier": 1,
    "logits_scaling": 1, "mup": False, "use_mup": False, "tie_kv": False}


def without_effect(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a key that the model's family does not know changes nothing."""
    value = config[key]
    if value is None or key.startswith("_") or key in INERT:
        return True
    if key in ("max_window_layers", "sliding_window") and config.get("use_sliding_window") is False:
        return True
    if key == "layer_types":
        return isinstance(value, list) and all(one == "full_attention" for one in value)
    return key in _OFF and isinstance(value, bool | int | float) and bool(value == _OFF[key])
