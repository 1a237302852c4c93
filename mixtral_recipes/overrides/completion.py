"""Every setting's dotted path, for shell completion. Written by scripts/write_override_paths.py."""

# part of a recipe -> its settings
_SETTINGS = {
    "": "model data trainer log resume optim peft tokenizer",
    "model": "config optim tokenizer model_transform",
    "model.config": (
        "perform_initialization use_cpu_initialization moe_grad_scale_func no_sync_func grad_sync_func "
        "param_sync_func deterministic_mode num_microbatches_with_partial_activation_checkpoints "
        "gradient_accumulation_fusion tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag "
        "tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs "
        "tp_comm_atomic_rs cross_entropy_loss_fusion cross_entropy_fusion_impl tp_comm_overlap_disable_qkv "
        "tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend overlap_dispatch_backward_with_experts_wgrad "
        "variable_seq_lengths overlap_p2p_comm batch_p2p_comm batch_p2p_sync use_ring_exchange_p2p "
        "deallocate_pipeline_outputs wgrad_deferral_limit overlap_p2p_comm_warmup_flush "
        "microbatch_group_size_per_vp_stage cpu_offloading cpu_offloading_num_layers cpu_offloading_activations "
        "cpu_offloading_weights cpu_offloading_double_buffering cpu_offloading_retain_pinned_cpu_buffers "
        "barrier_with_L1_time num_layers hidden_size num_attention_heads attention_backend flash_attention_version "
        "num_query_groups ffn_hidden_size kv_channels hidden_dropout attention_dropout fp32_residual_connection "
        "layernorm_epsilon activation_func_fp8_input_store num_moe_experts test_mode calculate_per_token_loss "
        "init_method output_layer_init_method init_method_std embedding_init_method embedding_init_method_std "
        "apply_query_key_layer_scaling disable_bf16_reduced_precision_matmul bias_activation_fusion "
        "bias_dropout_fusion apply_rope_fusion fused_single_qkv_rope recompute_granularity recompute_method "
        "recompute_num_layers distribute_saved_activations recompute_modules fp8_wgrad fp8_output_proj "
        "fp8_dot_product_attention fp8_multi_head_attention tp_only_amax_red moe_ffn_hidden_size "
        "moe_router_load_balancing_type moe_router_topk moe_enable_routing_replay moe_router_padding_for_quantization "
        "moe_router_padding_for_fp8 moe_router_dtype moe_grouped_gemm moe_aux_loss_coeff moe_z_loss_coeff "
        "moe_input_jitter_eps moe_token_dispatcher_type moe_enable_deepep moe_flex_dispatcher_backend "
        "moe_permute_fusion_into_hybridep moe_hybridep_pad_uneven_dispatch_inputs moe_expert_capacity_factor "
        "moe_pad_expert_input_to_capacity moe_token_drop_policy moe_layer_recompute moe_permute_fusion "
        "moe_router_fusion moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_num_sms "
        "moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing "
        "moe_ncclep_static_shape moe_ncclep_zero_copy moe_expert_rank_capacity_factor cp_comm_type enable_cuda_graph "
        "external_cuda_graph cuda_graph_impl cuda_graph_modules inference_cuda_graph_scope cuda_graph_scope "
        "clone_scatter_output_in_embedding disable_parameter_transpose_cache config_logger_dir symmetric_ar_type "
        "quant_recipe fine_grained_activation_offloading offload_modules min_offloaded_tensor_size "
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
        "pipeline_dtype ckpt_async_save"
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
        "barrier_with_L1_time config_logger_dir"
    ),
    "optim.lr_scheduler": "max_steps warmup_steps constant_steps min_lr",
    "peft": (
        "target_modules exclude_modules dim alpha dropout dropout_position lora_A_init_method lora_B_init_method "
        "lora_dtype use_rslora rank_pattern alpha_pattern layers experts router_load modules_to_save "
        "loraplus_lr_ratio"
    ),
    "log.ckpt.train_time_interval": "days hours minutes seconds milliseconds microseconds weeks",
}
# those that have no effect, or one value
_OTHERS = {
    "model.config": (
        "tensor_model_parallel_size tensor_parallel_num_weight_shards gtp_weight_remat_size "
        "pipeline_model_parallel_comm_backend pipeline_model_parallel_size virtual_pipeline_model_parallel_size "
        "sequence_parallel context_parallel_size hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank "
        "hybrid_context_parallel expert_model_parallel_size expert_tensor_parallel_size "
        "expert_tensor_parallel_num_weight_shards expert_gtp_weight_remat_size fp16 bf16 params_dtype "
        "finalize_model_grads_func grad_scale_func mtp_grad_scale_func enable_autocast autocast_dtype "
        "use_te_rng_tracker overlap_moe_expert_parallel_comm delay_wgrad_compute ep_overlap_early_attn_memory_release "
        "pipeline_dtype defer_embedding_wgrad_compute mtp_standalone mtp_num_layers mtp_loss_scaling_factor "
        "mtp_use_repeated_layer mtp_detach_heads mtp_hybrid_override_pattern num_layers_in_first_pipeline_stage "
        "num_layers_in_last_pipeline_stage pipeline_model_parallel_layout account_for_embedding_in_pipeline_split "
        "account_for_loss_in_pipeline_split softmax_scale softmax_type apply_residual_connection_post_layernorm "
        "layernorm_zero_centered_gamma add_bias_linear add_qkv_bias gated_linear_unit activation_func "
        "glu_linear_offset activation_func_clamp_value rotary_interleaved window_size window_attn_skip_freq "
        "normalization qk_layernorm qk_l2_norm qk_clip qk_clip_alpha qk_clip_threshold log_max_attention_logit "
        "attention_output_gate multi_latent_attention no_rope_freq experimental_attention_variant "
        "experimental_attention_variant_loss_scale_func dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk "
        "dsa_indexer_topk_freq dsa_indexer_skip_topk_offset dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss "
        "dsa_kernel_backend dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu "
        "dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 linear_attention_freq linear_conv_kernel_dim "
        "linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads "
        "init_model_with_meta_device use_mup mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult "
        "mup_base_head_dim mup_attn_scale_power attention_softmax_in_fp32 masked_softmax_fusion persist_layer_norm "
        "memory_efficient_layer_norm use_fused_weighted_squared_relu fused_residual_rmsnorm "
        "use_transformer_engine_op_fuser fp8 fp8_recipe fp8_param fp8_quantizer_factory fp8_margin fp8_interval "
        "fp8_amax_history_len fp8_amax_compute_algo first_last_layers_bf16 num_layers_at_start_in_bf16 "
        "num_layers_at_end_in_bf16 use_kitchen use_kitchen_attention kitchen_attention_backend fp4 fp4_recipe "
        "fp4_param fp4_quantizer_factory high_priority_a2a_comm_stream moe_shared_expert_intermediate_size "
        "moe_shared_expert_gate moe_shared_expert_overlap use_grouped_gemm_for_shared_expert "
        "moe_shared_expert_glu_interleave_size moe_layer_freq moe_router_topk_limited_devices moe_router_num_groups "
        "moe_router_group_topk moe_router_pre_softmax moe_router_topk_scaling_factor moe_router_score_function "
        "moe_router_enable_expert_bias moe_router_bias_update_rate moe_router_quantile_balancing_ema "
        "moe_router_force_load_balancing moe_router_force_biased use_grouped_gemm_for_dense_mlp "
        "moe_single_grouped_weight moe_single_grouped_bias moe_token_dropping moe_per_layer_logging "
        "moe_pad_experts_for_cuda_graph_inference moe_apply_probs_on_input moe_latent_size "
        "moe_mlp_glu_interleave_size cuda_graph_use_single_mempool cuda_graph_retain_backward_graph "
        "cuda_graph_warmup_steps flash_decode batch_invariant_mode use_te_activation_func inference_rng_tracker "
        "inference_sampling_seed nccl_all_reduce_for_prefill use_inference_optimized_layers "
        "inference_fuse_tp_communication inference_disable_triton_nvls_kernels inference_grouped_gemm_backend "
        "inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type mrope_section is_hybrid_model "
        "mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads mamba_training_ssm_states_dtype "
        "use_mamba_mem_eff_path mlp_chunks_for_prefill mlp_chunks_for_training heterogeneous_block_specs "
        "hetereogenous_dist_checkpoint transformer_impl delay_offload_until_cuda_graph moe_paged_stash "
        "moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_buffer_size_factor_cpu "
        "position_embedding_type share_embeddings_and_output_weights seq_length rotary_percent"
    ),
    "data": "tokenizer delete_raw dataset_kwargs",
    "data.packed_sequence_specs": (
        "tokenizer_model_name packed_train_data_path packed_val_data_path packed_metadata_path"
    ),
    "trainer": "limit_test_batches accumulate_grad_batches use_distributed_sampler",
    "trainer.strategy.ddp": (
        "use_distributed_optimizer num_distributed_optimizer_instances check_for_nan_in_grad num_buckets "
        "average_in_collective fp8_param_gather fp4_param_gather reuse_grad_buf_for_mxfp8_param_ag use_megatron_fsdp "
        "use_custom_fsdp data_parallel_sharding_strategy gradient_reduce_div_fusion suggested_communication_unit_size "
        "keep_fp8_transpose_cache nccl_ub fsdp_double_buffer fsdp_db_use_persist_buf_on_alloc_fail "
        "fsdp_all_gather_in_start_param_sync outer_dp_sharding_strategy fsdp_manual_registration delay_wgrad_compute "
        "megatron_fsdp_main_params_dtype megatron_fsdp_main_grads_dtype megatron_fsdp_grad_comm_dtype "
        "megatron_fsdp_use_decoupled_grad megatron_fsdp_cuda_graph_mode "
        "megatron_fsdp_enable_fine_grained_param_gather megatron_fsdp_max_pool_double_buffer"
    ),
    "trainer.strategy": "ckpt_parallel_load ckpt_load_strictness gradient_as_bucket_view",
    "resume.restore_config": "load_model_state",
    "optim.config": (
        "min_lr fp8_recipe fp16 bf16 reuse_grad_buf_for_mxfp8_param_ag params_dtype optimizer loss_scale "
        "initial_loss_scale min_loss_scale loss_scale_window hysteresis sgd_momentum muon_momentum muon_split_qkv "
        "muon_nesterov muon_scale_mode muon_fp32_matmul_prec muon_coefficient_type muon_num_ns_steps muon_tp_mode "
        "muon_extra_scale_factor muon_scalar_optimizer lion_beta1 lion_beta2 soap_shampoo_beta "
        "soap_precondition_frequency soap_use_kl_shampoo adaptive_muon_moment2_method adaptive_muon_beta2 "
        "adaptive_muon_eps use_layer_wise_distributed_optimizer overlap_param_gather "
        "overlap_param_gather_with_optimizer_step optimizer_cpu_offload optimizer_offload_fraction "
        "use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d pin_cpu_grads pin_cpu_params "
        "log_num_zeros_in_grad optimizer_cuda_graph"
    ),
}

PATHS = [f"{part}.{name}" if part else name for part, names in _SETTINGS.items() for name in names.split()]
OTHER_PATHS = [f"{part}.{name}" for part, names in _OTHERS.items() for name in names.split()]
