"""The one table of what stands in NeMo AutoModel's YAML files: each key is used (`Renamed`), or not
needed here (`Ignored`), or refused where it has another value (`Only`).

A key that ends in ``.*`` stands for all below it. What is not in the table is refused by name. The page
`docs/reference/automodel.md` is made from it (`scripts/write_automodel_keys.py`).

Source: NVIDIA-NeMo/Automodel, `examples/llm_finetune`, `recipes/llm/train_ft.py` and the configs it reads.
"""

from mixtral_recipes.settings.nemo.rules import Ignored, Only, Renamed, each

_LAYERS = Ignored("mixtral-recipes chooses the layers: Transformer Engine's on GPUs")
_CHECKPOINTS = Ignored("checkpoints are Megatron's, complete and verified; the export command writes safetensors")
_SHARDING = Ignored("weights and optimizer states are split by Megatron's parallel sizes, not by FSDP")
_MICROBATCHES = Ignored("Megatron's schedules split the model by themselves")
_LENGTHS = Ignored("samples are packed, or padded to the longest in their microbatch, and truncated to data.seq_length")
_SAME_SPLITS = Ignored("the validation split of the training data set is used")

KEYS: dict[str, Renamed | Ignored | Only] = {
    "recipe": Only("TrainFinetuneRecipeForNextTokenPrediction", "only fine-tuning files are supported"),
    "recipe._target_": Only("TrainFinetuneRecipeForNextTokenPrediction", "only fine-tuning files are supported"),
    "seed": Renamed("trainer.seed, data.seed"),
    # --- step_scheduler
    "step_scheduler.global_batch_size": Renamed("data.global_batch_size"),
    "step_scheduler.local_batch_size": Renamed("data.micro_batch_size, without packing or a pipeline"),
    "step_scheduler.max_steps": Renamed("trainer.max_steps"),
    "step_scheduler.num_epochs": Ignored("step_scheduler.max_steps sets the length of the run"),
    "step_scheduler.ckpt_every_steps": Renamed("log.ckpt.every_n_train_steps"),
    "step_scheduler.val_every_steps": Renamed("trainer.val_check_interval"),
    "step_scheduler.log_remote_every_steps": Renamed("trainer.log_every_n_steps"),
    "step_scheduler.save_checkpoint_every_epoch": Ignored("checkpoint intervals are counted in steps"),
    "step_scheduler.gc_every_steps": Renamed("GarbageCollectionCallback in trainer.callbacks"),
    "step_scheduler.loss_average_window_steps": Ignored("each step's own loss is logged"),
    "step_scheduler.preemption_signal": Ignored("a run saves and stops on SIGTERM or SIGINT"),
    "step_scheduler.start_step": Only(0, "a run resumes from its own checkpoint automatically", also=(None,)),
    "step_scheduler.start_epoch": Only(0, "a run resumes from its own checkpoint automatically", also=(None,)),
    # --- surroundings
    "dist_env.*": Ignored("NCCL is used on GPUs and gloo on CPUs; trainer.hang_timeout_seconds ends a rank that hangs"),
    "rng._target_": Ignored("the checkpoint holds the state of every random number generator"),
    "rng.seed": Renamed("trainer.seed, data.seed"),
    "rng.ranked": Ignored("each rank seeds its dropout according to its place in the layout"),
    "benchmark.*": Ignored("every run logs tokens and TFLOP per second"),
    "ci.*": Ignored("this section is for AutoModel's own tests"),
    "nvtx": Ignored("add an NsysCallback to trainer.callbacks instead"),
    "slurm.*": Ignored("use --executor slurm, and name a profile with --cluster"),
    "skypilot.*": Ignored("use --executor slurm, and name a profile with --cluster"),
    "prewarm.*": Ignored("no warm-up is needed"),
    "mfu.*": Ignored("every run logs the share of the GPU's peak that it reaches"),
    "compile.*": Ignored("kernels are fused by Megatron and Transformer Engine"),
    # --- model
    "model._target_": Renamed("loading existing weights (from_pretrained)"),
    "model.pretrained_model_name_or_path": Renamed("the recipe, and resume.restore_config.path"),
    "model.revision": Renamed("resume.restore_config.path"),
    "model.torch_dtype": Renamed("trainer.plugins"),
    "model.router_aux_loss_coef": Renamed("model.config.moe_aux_loss_coeff"),
    "model.trust_remote_code": Ignored("code from a model repository is never run"),
    "model.load_base_model": Only(
        True, "fine-tuning starts from existing weights; use pretrain to start from random ones", also=(None,)
    ),
    **each(
        _LAYERS,
        "model.attn_implementation model.backend.* model.use_liger_kernel model.use_sdpa_patching "
        "model.force_hf model.output_hidden_states model.use_cache model.cache_dir sdpa_method",
    ),
    # --- checkpoint
    "checkpoint.enabled": Renamed("log.ckpt"),
    "checkpoint.checkpoint_dir": Renamed("log.log_dir"),
    "checkpoint.is_async": Renamed("trainer.strategy.ckpt_async_save"),
    "checkpoint.max_recent_checkpoints": Renamed("log.ckpt.save_top_k"),
    "checkpoint.restore_from": Renamed("resume.resume_from_path"),
    **each(
        _CHECKPOINTS,
        "checkpoint.model_save_format checkpoint.save_consolidated checkpoint.model_cache_dir "
        "checkpoint.model_repo_id checkpoint.wait_for_staging checkpoint.cpu_offload "
        "checkpoint.dequantize_base_checkpoint checkpoint.single_rank_consolidation checkpoint.staging_dir "
        "checkpoint.v4_compatible checkpoint.best_metric_key checkpoint.consolidation_timeout_minutes "
        "checkpoint.load_base_model",
    ),
    # --- peft
    "peft._target_": Renamed("training adapters"),
    "peft.dim": Renamed("peft.dim"),
    "peft.alpha": Renamed("peft.alpha"),
    "peft.dropout": Renamed("peft.dropout"),
    "peft.dropout_position": Renamed("peft.dropout_position"),
    "peft.lora_A_init": Renamed("peft.lora_A_init_method"),
    "peft.lora_dtype": Renamed("peft.lora_dtype"),
    "peft.use_dora": Renamed("peft=DoRA"),
    "peft.match_all_linear": Renamed("peft.target_modules"),
    "peft.target_modules": Renamed("peft.target_modules: q, k, v are linear_qkv; w1, w3 linear_fc1; w2 linear_fc2"),
    "peft.exclude_modules": Renamed("peft.exclude_modules"),
    "peft.use_triton": Ignored("adapters are computed as separate matrix products"),
    "peft.use_memory_efficient_lora": Ignored("adapters are computed as separate matrix products"),
    "peft.moe_rank_scaling": Only(
        False, "every adapter has rank peft.dim; set peft.rank_pattern to change it per layer", also=(None,)
    ),
    # --- distributed
    "distributed.strategy": Only("fsdp2", "the layout is Megatron's", also=("megatron_fsdp", "ddp")),
    "distributed._target_": Ignored(_SHARDING.why),
    "distributed.dp_size": Renamed("trainer.num_nodes, trainer.devices"),
    "distributed.tp_size": Renamed("trainer.strategy.tensor_model_parallel_size"),
    "distributed.pp_size": Renamed("trainer.strategy.pipeline_model_parallel_size"),
    "distributed.cp_size": Renamed("trainer.strategy.context_parallel_size"),
    "distributed.ep_size": Renamed("trainer.strategy.expert_model_parallel_size; without it, as many ranks as fit"),
    "distributed.sequence_parallel": Renamed("trainer.strategy.sequence_parallel, always on if tp_size > 1"),
    "distributed.activation_checkpointing": Renamed("model.config.recompute_granularity"),
    "distributed.pipeline.pp_schedule": Renamed("trainer.strategy.virtual_pipeline_model_parallel_size"),
    "distributed.pipeline.layers_per_stage": Renamed("trainer.strategy.virtual_pipeline_model_parallel_size"),
    "distributed.pipeline.pp_microbatch_size": Renamed("data.micro_batch_size"),
    "distributed.pipeline.*": _MICROBATCHES,
    **each(
        _SHARDING,
        "distributed.dp_replicate_size distributed.defer_fsdp_grad_sync distributed.reshard_after_forward "
        "distributed.use_hf_tp_plan distributed.moe.* distributed.multimodal.* parallelizer.*",
    ),
    # --- loss, optimizer, schedule
    "loss_fn._target_": Renamed("the loss, which is always cross-entropy"),
    "optimizer._target_": Renamed("optim.config: torch's Adam or AdamW"),
    "optimizer.lr": Renamed("optim.config.lr"),
    "optimizer.betas": Renamed("optim.config.adam_beta1, optim.config.adam_beta2"),
    "optimizer.eps": Renamed("optim.config.adam_eps"),
    "optimizer.weight_decay": Renamed("optim.config.weight_decay"),
    **each(
        Ignored("Megatron's fused Adam with fp32 master weights is used"),
        "optimizer.foreach optimizer.fused optimizer.capturable optimizer.master_weights",
    ),
    "optimizer.amsgrad": Only(False, "Megatron's Adam does not support AMSGrad", also=(None,)),
    "clip_grad_norm.max_norm": Renamed("optim.config.clip_grad"),
    "lr_scheduler.lr_decay_style": Renamed("optim.lr_scheduler: cosine, linear or constant"),
    "lr_scheduler.min_lr": Renamed("optim.lr_scheduler.min_lr"),
    "lr_scheduler.lr_warmup_steps": Renamed("optim.lr_scheduler.warmup_steps"),
    "lr_scheduler.lr_decay_steps": Renamed("optim.lr_scheduler.max_steps"),
    "lr_scheduler.init_lr": Ignored("the warmup always starts from 0"),
    "lr_scheduler.wd_incr_style": Only("constant", "weight decay is always constant", also=(None,)),
    # --- data
    "dataset._target_": Renamed("data"),
    "dataset.dataset_name": Renamed("data.dataset_root"),
    "dataset.path_or_dataset": Renamed("data.dataset_root"),
    "dataset.path_or_dataset_id": Renamed("data.dataset_root"),
    "dataset.name": Renamed("data.dataset_root"),
    "dataset.split": Only("train", "training always uses the train split; use another data set instead", also=(None,)),
    "dataset.seq_length": Renamed("data.seq_length"),
    "dataset.seq_len": Renamed("data.seq_length"),
    "dataset.vocab_size": Renamed("data.vocab_size"),
    "dataset.num_samples": Renamed("data.num_train_samples"),
    "dataset.column_mapping.context": Renamed("data.columns"),
    "dataset.column_mapping.question": Renamed("data.columns"),
    "dataset.column_mapping.answer": Renamed("data.columns"),
    "dataset.answer_only_loss_mask": Renamed("data.dataset_kwargs"),
    "dataset.chat_template": Renamed("data.chat_template"),
    "dataset.use_hf_chat_template": Only(False, "use a data set of messages instead", also=(None,)),
    "dataset.limit_dataset_samples": Only(None, "use a data set of that size"),
    "dataset.tokenizer.*": Ignored("the checkpoint's own tokenizer is used; set model.tokenizer to use another"),
    **each(_LENGTHS, "dataset.padding dataset.truncation dataset.pad_to_max_length dataset.fp8"),
    "dataset.shuffle_seed": Ignored("data.seed, taken from rng.seed, determines the order of the samples"),
    "dataset.random_start": Ignored("random tokens have no fixed start"),
    "packed_sequence.packed_sequence_size": Renamed("data.packed_sequence_specs, data.seq_length"),
    "packed_sequence.packing_strategy": Ignored("samples in a pack never attend to each other, whatever the strategy"),
    "packed_sequence.split_across_pack": Only(False, "a sample is never split across packs", also=(None,)),
    "packed_sequence.max_packs": Only(None, "all samples are packed"),
    "dataloader.num_workers": Renamed("data.num_workers"),
    "dataloader.shuffle": Ignored("samples are always reshuffled every epoch"),
    "dataloader.*": _LENGTHS,
    "validation_dataset.*": _SAME_SPLITS,
    "validation_dataset": Renamed("trainer.val_check_interval; none turns validation off"),
    "validation_dataloader.*": _SAME_SPLITS,
    "validation_dataloader": _SAME_SPLITS,
    # --- logging
    "wandb.project": Renamed("log.wandb.project"),
    "wandb.name": Renamed("log.wandb.name"),
    "wandb.entity": Renamed("log.wandb.entity"),
    "wandb.enable": Renamed("log.wandb"),
    **each(Ignored("set WANDB_DIR and WANDB_MODE in the environment instead"), "wandb.dir wandb.save_dir wandb.mode"),
    "mlflow.experiment_name": Renamed("log.mlflow.experiment_name"),
    "mlflow.run_name": Renamed("log.mlflow.run_name"),
    "mlflow.tracking_uri": Renamed("log.mlflow.tracking_uri"),
    "mlflow.enable": Renamed("log.mlflow"),
    # --- number formats
    "fp8.enabled": Renamed("trainer.plugins: FP8, with a recipe that suits the GPU"),
    "fp8.*": Ignored("the FP8 recipe follows from the GPU"),
    # --- refused whole
    "quantization.*": Only(None, "4-bit and 8-bit weights are not supported in AutoModel files"),
    "qat.*": Only(None, "quantization-aware training is not supported"),
    "neftune.*": Only(None, "embedding noise is not supported"),
    "comet.*": Only(None, "use wandb, mlflow or TensorBoard instead"),
}


def row_of(key: str) -> str | None:
    """The table's row for a key: its own, or that of a part that stands for all below it; None without one."""
    parts = key.split(".")
    rows = [key, *(".".join([*parts[:end], "*"]) for end in range(len(parts), 0, -1))]
    return next((row for row in rows if row in KEYS), None)
