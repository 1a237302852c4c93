"""Every setting's dotted path, for shell completion. Written by scripts/write_override_paths.py."""

# part of a recipe -> its settings
_SETTINGS = {
    "": "model data trainer log resume optim peft tokenizer",
    "model": "config optim tokenizer model_transform",
    "model.config": (
        "use_cpu_initialization moe_grad_scale_func no_sync_func grad_sync_func param_sync_func deterministic_mode "
        "num_microbatches_with_partial_activation_checkpoints gradient_accumulation_fusion tp_comm_overlap "
        "tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad "
        "tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs cross_entropy_loss_fusion "
        "cross_entropy_fusion_impl tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend "
        "overlap_dispatch_backward_with_experts_wgrad variable_seq_lengths overlap_p2p_comm batch_p2p_comm "
        "batch_p2p_sync use_ring_exchange_p2p deallocate_pipeline_outputs wgrad_deferral_limit "
        "overlap_p2p_comm_warmup_flush microbatch_group_size_per_vp_stage cpu_offloading cpu_offloading_num_layers "
        "cpu_offloading_activations cpu_offloading_weights cpu_offloading_double_buffering "
        "cpu_offloading_retain_pinned_cpu_buffers barrier_with_L1_time num_layers hidden_size num_attention_heads "
        "attention_backend flash_attention_version num_query_groups ffn_hidden_size kv_channels hidden_dropout "
        "attention_dropout layernorm_epsilon activation_func_fp8_input_store num_moe_experts test_mode "
        "calculate_per_token_loss init_method output_layer_init_method init_method_std embedding_init_method "
        "embedding_init_method_std disable_bf16_reduced_precision_matmul bias_activation_fusion bias_dropout_fusion "
        "apply_rope_fusion fused_single_qkv_rope recompute_granularity recompute_method recompute_num_layers "
        "distribute_saved_activations recompute_modules fp8_wgrad fp8_output_proj fp8_dot_product_attention "
        "fp8_multi_head_attention tp_only_amax_red moe_ffn_hidden_size moe_router_load_balancing_type moe_router_topk "
        "moe_enable_routing_replay moe_router_padding_for_quantization moe_router_padding_for_fp8 moe_router_dtype "
        "moe_grouped_gemm moe_aux_loss_coeff moe_z_loss_coeff moe_input_jitter_eps moe_token_dispatcher_type "
        "moe_enable_deepep moe_flex_dispatcher_backend moe_permute_fusion_into_hybridep "
        "moe_hybridep_pad_uneven_dispatch_inputs moe_expert_capacity_factor moe_pad_expert_input_to_capacity "
        "moe_token_drop_policy moe_layer_recompute moe_permute_fusion moe_router_fusion moe_flex_dispatcher_num_sms "
        "moe_deepep_num_sms moe_hybridep_num_sms moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute "
        "moe_hybridep_num_sms_preprocessing moe_ncclep_static_shape moe_ncclep_zero_copy "
        "moe_expert_rank_capacity_factor cp_comm_type enable_cuda_graph external_cuda_graph cuda_graph_impl "
        "cuda_graph_modules inference_cuda_graph_scope cuda_graph_scope clone_scatter_output_in_embedding "
        "disable_parameter_transpose_cache config_logger_dir symmetric_ar_type quant_recipe "
        "fine_grained_activation_offloading offload_modules min_offloaded_tensor_size "
        "delta_offload_bytes_across_pp_ranks activation_offload_fraction "
        "fine_grained_offloading_max_inflight_offloads vocab_size make_vocab_size_divisible_by "
        "max_position_embeddings rotary_base freeze_router accelerate"
    ),
    "data": (
        "dataset_root seq_length micro_batch_size global_batch_size force_redownload seed num_workers "
        "packed_sequence_specs made_from val_proportion no_answer on_bad_record truncation prompt_floor streaming "
        "tokenizer num_train_samples num_val_samples vocab_size"
    ),
    "data.packed_sequence_specs": "packed_sequence_size pad_cu_seqlens",
    "trainer": (
        "accelerator devices num_nodes max_steps val_check_interval limit_val_batches log_every_n_steps "
        "enable_checkpointing strategy plugins callbacks seed max_skipped_steps hang_timeout_seconds"
    ),
    "trainer.strategy": (
        "tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size "
        "context_parallel_size sequence_parallel expert_model_parallel_size expert_tensor_parallel_size ddp "
        "ckpt_async_save"
    ),
    "trainer.strategy.ddp": (
        "grad_reduce_in_fp32 overlap_grad_reduce overlap_param_gather align_param_gather check_for_large_grads "
        "bucket_size pad_buckets_for_high_nccl_busbw reduce_scatter_with_fp32_accumulation "
        "param_name_patterns_for_fp32_local_accumulation disable_symmetric_registration"
    ),
    "trainer.plugins": (
        "precision grad_reduce_in_fp32 fp8 fp8_recipe first_last_layers_bf16 fp8_margin fp8_amax_history_len "
        "fp8_amax_compute_algo fp8_param_gather num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 loss_scale "
        "initial_loss_scale min_loss_scale loss_scale_window hysteresis"
    ),
    "log": "name log_dir explicit_log_dir version files_to_copy ckpt tensorboard wandb mlflow",
    "log.ckpt": "monitor save_last save_top_k mode every_n_train_steps train_time_interval filename max_disk_gb",
    "log.tensorboard": "save_dir name",
    "log.wandb": "name project entity config",
    "resume": "restore_config resume_if_exists resume_ignore_no_checkpoint resume_from_path resume_from_directory",
    "resume.restore_config": "path load_optim_state resize_vocab adapter_path",
    "optim": "config lr_scheduler",
    "optim.config": (
        "lr decoupled_lr decoupled_min_lr weight_decay apply_wd_to_qk_layernorm use_precision_aware_optimizer "
        "store_param_remainders main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype adam_beta1 "
        "adam_beta2 adam_eps decoupled_weight_decay use_distributed_optimizer clip_grad grad_norm_skip_threshold "
        "log_num_zeros_in_grad barrier_with_L1_time config_logger_dir"
    ),
    "optim.lr_scheduler": "max_steps warmup_steps constant_steps min_lr",
    "peft": (
        "target_modules exclude_modules dim alpha dropout dropout_position lora_A_init_method lora_B_init_method "
        "lora_dtype use_rslora rank_pattern alpha_pattern layers experts router_load modules_to_save "
        "loraplus_lr_ratio"
    ),
    "log.ckpt.train_time_interval": "days hours minutes seconds milliseconds microseconds weeks",
}

PATHS = [f"{part}.{name}" if part else name for part, names in _SETTINGS.items() for name in names.split()]
