"""The table, part of Megatron-Core: what becomes of the settings of its three configurations.

Megatron trains many kinds of models, and some of its settings are carried out by Megatron-LM's own scripts. One without
a rule is read while a Mixtral trains; `tests/unit/settings/test_megatron_settings.py` looks for who reads it, so that a
setting that comes with a newer Megatron is not taken without a word.
"""

from dataclasses import dataclass
from typing import Any

from mixtral_recipes.settings.nemo.mixtrals import MIXTRALS
from mixtral_recipes.settings.nemo.rules import Ignored, Only, Rule, each

BY_STRATEGY = Ignored("the layout is set in trainer.strategy", quiet=(1,))
BY_PLUGINS = Ignored("precision is set in trainer.plugins")
PIPELINE_DTYPE = "pipeline stages send each other the dtype of trainer.plugins.precision"
_NO_GRAPHS = "CUDA graphs are not supported"
_ADAM = Ignored("the optimizer is always Adam")
_WITH_STEP = Only(False, "use MegatronCommOverlapCallback(overlap_param_gather_with_optimizer_step=True)")
_ALIKE = "every pipeline stage has the same number of layers"
_FSDP = "weights are split by tensor, pipeline and expert parallelism; Megatron-FSDP is not used"
_ONE_LAYER_SPEC = "the layer spec depends on what is installed"


def _only(value: Any, names: str, why: str, *also: Any) -> dict[str, Rule]:
    return each(Only(value, why, also=also), names)


# Details of what no Mixtral has, or of what is switched off below.
_ABSENT = {
    "Mixtral has no multi-token prediction": "mtp_loss_scaling_factor mtp_use_repeated_layer mtp_detach_heads "
    "mtp_hybrid_override_pattern mtp_standalone mtp_grad_scale_func",
    "Mixtral has no sparse attention": "dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk "
    "dsa_indexer_topk_freq dsa_indexer_skip_topk_offset dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss "
    "dsa_kernel_backend dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu "
    "dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 experimental_attention_variant_loss_scale_func",
    "Mixtral has no linear attention": "linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim "
    "linear_num_key_heads linear_num_value_heads",
    "Mixtral has no Mamba layers": "mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads "
    "mamba_training_ssm_states_dtype use_mamba_mem_eff_path",
    "Mixtral has no shared expert": "moe_shared_expert_overlap use_grouped_gemm_for_shared_expert "
    "moe_shared_expert_glu_interleave_size",
    "Mixtral has no dense layers": "use_grouped_gemm_for_dense_mlp",
    "Mixtral's router has no bias": "moe_router_bias_update_rate moe_router_quantile_balancing_ema",
    "Mixtral's activation is SwiGLU": "use_fused_weighted_squared_relu",
    "Mixtral does not use muP scaling (use_mup)": "mup_width_mult mup_base_hidden_size mup_embedding_mult "
    "mup_output_mult mup_base_head_dim mup_attn_scale_power",
    "qk_clip is not supported": "qk_clip_alpha qk_clip_threshold",
    "FP4 is not supported": "fp4_recipe fp4_param fp4_quantizer_factory",
    "the commands that generate have their own settings": "flash_decode mlp_chunks_for_prefill "
    "nccl_all_reduce_for_prefill use_inference_optimized_layers inference_rng_tracker inference_sampling_seed "
    "inference_fuse_tp_communication inference_disable_triton_nvls_kernels inference_grouped_gemm_backend "
    "inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type "
    "moe_pad_experts_for_cuda_graph_inference",
    "every sequence is split over all context-parallel ranks": "max_seqlen_per_dp_cp_rank",
    "the experts' token exchange is not overlapped": "ep_overlap_early_attn_memory_release "
    "high_priority_a2a_comm_stream",
    "moe_paged_stash is not supported": "moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda "
    "moe_paged_stash_buffer_size_factor_cpu",
    _ONE_LAYER_SPEC: "kitchen_attention_backend",
    "norms and residual additions are not fused": "fused_residual_rmsnorm",
    "the expert load of every layer is always logged": "moe_per_layer_logging",
    "set model.config.moe_expert_capacity_factor": "moe_token_dropping",
    "training sets it itself": "finalize_model_grads_func grad_scale_func",
}  # fmt: skip

# What would take Megatron-LM's own loop, or goes past adapters, or is another kind of checkpoint.
_NOT_CARRIED_OUT = {
    **_only(None, "fp8", "set trainer.plugins.fp8"),
    **_only(None, "fp8_quantizer_factory", "set trainer.plugins.fp8_recipe"),
    **_only(None, "fp4", "use trainer.plugins.fp8"),
    **_only(False, "qk_clip", "training does not clip queries and keys between steps"),
    **_only(True, "perform_initialization", "it is left out where a checkpoint brings the weights, and only there"),
    **_only(False, "fp32_residual_connection",
            "layers with 16-bit weights do not take it, and in fp32 it changes nothing"),
    **_only(False, "apply_query_key_layer_scaling", "attention always computes its softmax in fp32"),
    **_only(False, "log_max_attention_logit", "training does not log it"),
    **_only(False, "overlap_moe_expert_parallel_comm", "a training step does not interleave two microbatches"),
    **_only(False, "delay_wgrad_compute", "weight gradients are always computed in the backward pass"),
    **_only(False, "moe_paged_stash", "the training step does not check the stash for overflow"),
    **_only(False, "hybrid_context_parallel", "every sequence is split over all context-parallel ranks"),
    **_only(None, "hierarchical_context_parallel_sizes", "context parallelism has only one level"),
    **_only(None, "tensor_parallel_num_weight_shards expert_tensor_parallel_num_weight_shards",
            "set trainer.strategy.tensor_model_parallel_size", 1),
    **_only(1, "gtp_weight_remat_size expert_gtp_weight_remat_size",
            "set trainer.strategy.tensor_model_parallel_size"),
    **_only(None, "num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage pipeline_model_parallel_layout",
            _ALIKE),
    **_only(False, "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split", _ALIKE),
    **_only(False, "defer_embedding_wgrad_compute", "set it in MegatronCommOverlapCallback"),
    **_only(None, "pipeline_model_parallel_comm_backend", "stages communicate over NCCL, on a CPU over gloo", "nccl"),
    **_only(False, "init_model_with_meta_device", _FSDP),
    **_only("transformer_engine", "transformer_impl", _ONE_LAYER_SPEC),
    **_only(False, "use_kitchen use_kitchen_attention", _ONE_LAYER_SPEC),
    **_only(False, "use_te_activation_func", "SwiGLU is fused by bias_activation_fusion"),
    **_only(False, "use_transformer_engine_op_fuser", "fused experts would be computed without their adapters"),
    **_only(False, "moe_single_grouped_weight moe_single_grouped_bias", "a checkpoint stores each expert's own weight"),
    **_only(False, "batch_invariant_mode", "only Megatron-LM's own scripts enable its kernels"),
    **_only(1, "mlp_chunks_for_training", "padding would count as tokens; use recompute_modules=['moe'] instead"),
}  # fmt: skip

MODEL: dict[str, Rule] = {
    **{name: Only(value, "the model would no longer be a Mixtral") for name, value in MIXTRALS.items()},
    "seq_length": Ignored("data.seq_length sets the sequence length", beside="max_position_embeddings"),
    **each(
        BY_STRATEGY,
        "tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size "
        "context_parallel_size expert_model_parallel_size expert_tensor_parallel_size",
    ),
    "sequence_parallel": Ignored(BY_STRATEGY.why),
    **each(
        BY_PLUGINS,
        "bf16 fp16 params_dtype enable_autocast fp8_recipe fp8_param fp8_margin fp8_amax_history_len "
        "fp8_amax_compute_algo first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16",
    ),
    "autocast_dtype": Ignored(BY_PLUGINS.why, beside="params_dtype"),
    "fp8_interval": Ignored("Transformer Engine updates its scaling factors at every step"),
    "pipeline_dtype": Ignored(PIPELINE_DTYPE),
    "async_tensor_model_parallel_allreduce": Ignored("Megatron-Core always overlaps this all-reduce", quiet=(True,)),
    "parallel_output": Ignored("the loss is computed from the parallel output", quiet=(True,)),
    "fp16_lm_cross_entropy": Only(False, "set cross_entropy_loss_fusion"),
    "scatter_embedding_sequence_parallel": Ignored("it follows from sequence_parallel", quiet=(True,)),
    "seq_len_interpolation_factor": Only(None, "set model.config.rotary_base for longer sequences"),
    "transformer_layer_spec": Ignored(_ONE_LAYER_SPEC, quiet=(None,)),
    "use_transformer_engine_full_layer_spec": Ignored(
        "Transformer Engine's layers are used where it is installed", quiet=(True, False)
    ),
    "hetereogenous_dist_checkpoint": Only(False, "all layers of a Mixtral are alike and are saved together"),
    "forward_step_fn": Only(None, "the training step is training/step.py"),
    "data_step_fn": Only(None, "the training step is training/step.py"),
    "generation_config": Ignored("it is exported with the model that it came with", quiet=(None,)),
    "tp_comm_overlap_cfg": Ignored("Transformer Engine's own buffers are used", quiet=(None,)),
    "overlap_param_gather_with_optimizer_step": _WITH_STEP,
    "attention_softmax_in_fp32": Ignored("attention always computes its softmax in fp32"),
    "masked_softmax_fusion": Ignored("attention runs as one fused kernel"),
    **each(
        Ignored("the norms are Transformer Engine's or PyTorch's own"),
        "persist_layer_norm memory_efficient_layer_norm",
    ),
    **each(
        Ignored(_NO_GRAPHS),
        "cuda_graph_use_single_mempool cuda_graph_retain_backward_graph cuda_graph_warmup_steps "
        "delay_offload_until_cuda_graph",
    ),
    "use_te_rng_tracker": Only(False, _NO_GRAPHS, also=(None,)),
    **{name: rule for why, names in _ABSENT.items() for name, rule in each(Ignored(why), names).items()},
    **_NOT_CARRIED_OUT,
}

DDP: dict[str, Rule] = {
    "average_in_collective": Ignored(
        "gradients are summed, then divided by the number of label tokens in the global batch"
    ),
    "check_for_nan_in_grad": Ignored("the loss and the gradient norm are checked at every step", quiet=(True, False)),
    "use_distributed_optimizer": Ignored("set optim.config.use_distributed_optimizer", quiet=(True,)),
    "num_distributed_optimizer_instances": Only(1, "the optimizer state is spread over all data-parallel ranks"),
    **each(
        Ignored(BY_PLUGINS.why, quiet=(True,)), "fp8_param_gather reuse_grad_buf_for_mxfp8_param_ag"
    ),  # NeMo's recipes set them
    "fp4_param_gather": Only(False, "use trainer.plugins.fp8"),
    "nccl_ub": Only(False, "gradients stay in PyTorch's own memory"),
    **_only(False, "use_megatron_fsdp use_custom_fsdp", _FSDP),
    **_only("no_shard", "data_parallel_sharding_strategy outer_dp_sharding_strategy", _FSDP),
    "num_buckets": Only(None, "Megatron-FSDP is not used; set bucket_size"),
    "gradient_reduce_div_fusion": Ignored("Megatron-FSDP is not used", quiet=(True, False)),
    **each(
        Ignored("Megatron-FSDP is not used"),
        "suggested_communication_unit_size keep_fp8_transpose_cache fsdp_double_buffer "
        "fsdp_db_use_persist_buf_on_alloc_fail fsdp_all_gather_in_start_param_sync fsdp_manual_registration "
        "megatron_fsdp_main_params_dtype megatron_fsdp_main_grads_dtype megatron_fsdp_grad_comm_dtype "
        "megatron_fsdp_use_decoupled_grad megatron_fsdp_cuda_graph_mode megatron_fsdp_enable_fine_grained_param_gather "
        "megatron_fsdp_max_pool_double_buffer",
    ),
    **_only(False, "delay_wgrad_compute", "weight gradients are always computed in the backward pass"),
}

OPTIMIZER: dict[str, Rule] = {
    "min_lr": Ignored("the schedule's min_lr is used; set optim.lr_scheduler.min_lr"),
    "bf16": Ignored(BY_PLUGINS.why, quiet=(True,)),
    **each(
        BY_PLUGINS,
        "fp16 params_dtype fp8_recipe loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis",
    ),
    "reuse_grad_buf_for_mxfp8_param_ag": Ignored(BY_PLUGINS.why, quiet=(True,)),
    "overlap_param_gather": Ignored("set trainer.strategy.ddp.overlap_param_gather"),
    "overlap_param_gather_with_optimizer_step": _WITH_STEP,
    "optimizer_cpu_offload": Only(
        False, "optimizer states stay on the weights' device; use_precision_aware_optimizer halves them"
    ),
    **each(
        Ignored("optimizer states stay on the weights' device"),
        "optimizer_offload_fraction use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d pin_cpu_grads "
        "pin_cpu_params",
    ),
    "optimizer": Only("adam", "checkpoints and the planner only handle Adam's states"),
    "use_layer_wise_distributed_optimizer": Only(False, _ADAM.why),
    **each(
        _ADAM,
        "muon_momentum muon_split_qkv muon_nesterov muon_scale_mode muon_fp32_matmul_prec muon_coefficient_type "
        "muon_num_ns_steps muon_tp_mode muon_extra_scale_factor muon_scalar_optimizer lion_beta1 lion_beta2 "
        "soap_shampoo_beta soap_precondition_frequency soap_use_kl_shampoo adaptive_muon_moment2_method "
        "adaptive_muon_beta2 adaptive_muon_eps sgd_momentum",
    ),
    "optimizer_cuda_graph": Only(False, _NO_GRAPHS),
}

#: What Megatron-Core takes only beside another setting of the same part: setting -> the other, and its value.
BESIDE: dict[str, dict[str, tuple[str, Any]]] = {
    "OptimizerConfig": {
        "use_precision_aware_optimizer": ("use_distributed_optimizer", True),
        **dict.fromkeys(
            ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"),
            ("use_precision_aware_optimizer", True),
        ),
    },
    "DistributedDataParallelConfig": {
        "reuse_grad_buf_for_mxfp8_param_ag": ("fp8_param_gather", True),
        "param_name_patterns_for_fp32_local_accumulation": ("grad_reduce_in_fp32", False),
    },
}


@dataclass(frozen=True)
class Without:
    """What a setting has no effect without.

    Attributes:
        other: Another setting of the same part.
        values: Those of its values that count; none: any but null and false.
        quiet: Values that Megatron-Core itself fills in.
    """

    other: str
    values: tuple[Any, ...] = ()
    quiet: tuple[Any, ...] = ()


_FP8, _FP16 = Without("fp8"), Without("precision", ("16-mixed",))

#: What has no effect without another setting of the same part.
IDLE_WITHOUT: dict[str, dict[str, Without]] = {
    "MegatronMixedPrecision": {
        **dict.fromkeys(("fp8_recipe", "fp8_param_gather", "first_last_layers_bf16"), _FP8),
        **dict.fromkeys(("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo"), _FP8),
        **dict.fromkeys(
            ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"), Without("first_last_layers_bf16")
        ),
        **dict.fromkeys(("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window"), _FP16),
        "hysteresis": _FP16,
    },
    "MixtralConfig": {
        **dict.fromkeys(("recompute_method", "recompute_num_layers"), Without("recompute_granularity", ("full",))),
        "recompute_modules": Without("recompute_granularity", ("selective",), quiet=(["core_attn"],)),
        "offload_modules": Without("fine_grained_activation_offloading"),
        "moe_token_drop_policy": Without("moe_expert_capacity_factor"),
    },
    "OptimizerConfig": {"decoupled_min_lr": Without("decoupled_lr")},
    "LoRA": {"dropout_position": Without("dropout")},
}
