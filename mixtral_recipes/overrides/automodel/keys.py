"""The one table of what stands in NeMo AutoModel's YAML files: each key is used, or not needed here, or refused.

A key that ends in ``.*`` stands for all below it. What is not in the table is refused by name. The page
`docs/reference/automodel.md` is made from it (`scripts/write_automodel_keys.py`).

Source: NVIDIA-NeMo/Automodel, `examples/llm_finetune`, `recipes/llm/train_ft.py` and the configs it reads.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Used:
    """A key that decides something.

    Attributes:
        to: The setting it becomes, or in words what it decides.
    """

    to: str


@dataclass(frozen=True)
class Unneeded:
    """A key without effect here; a file that gives it is told.

    Attributes:
        why: What happens instead.
    """

    why: str


@dataclass(frozen=True)
class Only:
    """A key that may have some values only.

    Attributes:
        values: Those; they change nothing.
        instead: What to do where another is wanted.
    """

    values: tuple[Any, ...]
    instead: str


Rule = Used | Unneeded | Only

_LAYERS = Unneeded("layers are Transformer Engine's on GPUs, and are chosen in one place")
_CHECKPOINTS = Unneeded("checkpoints are Megatron's, whole and verified; the command export writes safetensors")
_SHARDING = Unneeded("weights and optimizer are laid out by Megatron's parallel sizes, not by FSDP")
_MICROBATCHES = Unneeded("Megatron's schedules take the model apart by themselves")
_LENGTHS = Unneeded("samples are padded to the longest of a microbatch, or packed, and cut to data.seq_length")
_SAME_SPLITS = Unneeded("the validation split of the same data set is used")

KEYS: dict[str, Rule] = {
    "recipe": Only(("TrainFinetuneRecipeForNextTokenPrediction",), "only fine-tuning files are read"),
    "recipe._target_": Only(("TrainFinetuneRecipeForNextTokenPrediction",), "only fine-tuning files are read"),
    "seed": Used("trainer.seed, data.seed"),
    # --- step_scheduler
    "step_scheduler.global_batch_size": Used("data.global_batch_size"),
    "step_scheduler.local_batch_size": Used("data.micro_batch_size, without packing and pipeline"),
    "step_scheduler.max_steps": Used("trainer.max_steps"),
    "step_scheduler.num_epochs": Unneeded("a run is as long as step_scheduler.max_steps says"),
    "step_scheduler.ckpt_every_steps": Used("log.ckpt.every_n_train_steps"),
    "step_scheduler.val_every_steps": Used("trainer.val_check_interval"),
    "step_scheduler.log_remote_every_steps": Used("trainer.log_every_n_steps"),
    "step_scheduler.save_checkpoint_every_epoch": Unneeded("checkpoints are counted in steps"),
    "step_scheduler.gc_every_steps": Used("GarbageCollectionCallback in trainer.callbacks"),
    "step_scheduler.loss_average_window_steps": Unneeded("each step's own loss is logged"),
    "step_scheduler.preemption_signal": Unneeded("SIGTERM and SIGINT save and stop"),
    "step_scheduler.start_step": Only((0, None), "a run goes on from its own checkpoint by itself"),
    "step_scheduler.start_epoch": Only((0, None), "a run goes on from its own checkpoint by itself"),
    # --- surroundings
    "dist_env.*": Unneeded("NCCL on GPUs, gloo on CPUs; trainer.hang_timeout_seconds ends a rank that hangs"),
    "rng._target_": Unneeded("the state of every random generator is in the checkpoint"),
    "rng.seed": Used("trainer.seed, data.seed"),
    "rng.ranked": Unneeded("each rank seeds its dropout by its place in the layout"),
    "benchmark.*": Unneeded("tokens and TFLOP per second are in every run's log"),
    "ci.*": Unneeded("it is for AutoModel's own tests"),
    "nvtx": Unneeded("trainer.callbacks takes an NsysCallback"),
    "slurm.*": Unneeded("give --executor slurm, and a profile with --cluster"),
    "skypilot.*": Unneeded("give --executor slurm, and a profile with --cluster"),
    "prewarm.*": Unneeded("nothing has to be warmed up"),
    "mfu.*": Unneeded("the share of the card's peak is in every run's log"),
    "compile.*": Unneeded("kernels are fused by Megatron and Transformer Engine"),
    # --- model
    "model._target_": Used("that weights are loaded: from_pretrained"),
    "model.pretrained_model_name_or_path": Used("the recipe, and resume.restore_config.path"),
    "model.revision": Used("resume.restore_config.path"),
    "model.torch_dtype": Used("trainer.plugins"),
    "model.router_aux_loss_coef": Used("model.config.moe_aux_loss_coeff"),
    "model.trust_remote_code": Unneeded("no code of a model's is ever run"),
    "model.load_base_model": Only((True, None), "fine-tuning starts from weights; use pretrain for random ones"),
    **dict.fromkeys(
        (
            "model.attn_implementation",
            "model.backend.*",
            "model.use_liger_kernel",
            "model.use_sdpa_patching",
            "model.force_hf",
            "model.output_hidden_states",
            "model.use_cache",
            "model.cache_dir",
            "sdpa_method",
        ),
        _LAYERS,
    ),
    # --- checkpoint
    "checkpoint.enabled": Used("log.ckpt"),
    "checkpoint.checkpoint_dir": Used("log.log_dir"),
    "checkpoint.is_async": Used("trainer.strategy.ckpt_async_save"),
    "checkpoint.max_recent_checkpoints": Used("log.ckpt.save_top_k"),
    "checkpoint.restore_from": Used("resume.resume_from_path"),
    **dict.fromkeys(
        (
            "checkpoint.model_save_format",
            "checkpoint.save_consolidated",
            "checkpoint.model_cache_dir",
            "checkpoint.model_repo_id",
            "checkpoint.wait_for_staging",
            "checkpoint.cpu_offload",
            "checkpoint.dequantize_base_checkpoint",
            "checkpoint.single_rank_consolidation",
            "checkpoint.staging_dir",
            "checkpoint.v4_compatible",
            "checkpoint.best_metric_key",
            "checkpoint.consolidation_timeout_minutes",
            "checkpoint.load_base_model",
        ),
        _CHECKPOINTS,
    ),
    # --- peft
    "peft._target_": Used("that adapters are trained"),
    "peft.dim": Used("peft.dim"),
    "peft.alpha": Used("peft.alpha"),
    "peft.dropout": Used("peft.dropout"),
    "peft.dropout_position": Used("peft.dropout_position"),
    "peft.lora_A_init": Used("peft.lora_A_init_method"),
    "peft.lora_dtype": Used("peft.lora_dtype"),
    "peft.use_dora": Used("peft=DoRA"),
    "peft.match_all_linear": Used("peft.target_modules"),
    "peft.target_modules": Used("peft.target_modules: q, k, v are linear_qkv; w1, w3 linear_fc1; w2 linear_fc2"),
    "peft.exclude_modules": Used("peft.exclude_modules"),
    "peft.use_triton": Unneeded("adapters are matrix products of their own"),
    "peft.use_memory_efficient_lora": Unneeded("adapters are matrix products of their own"),
    "peft.moe_rank_scaling": Only((False, None), "every adapter has rank peft.dim; see peft.rank_pattern"),
    # --- distributed
    "distributed.strategy": Only(("fsdp2", "megatron_fsdp", "ddp"), "layouts are Megatron's"),
    "distributed._target_": Unneeded(_SHARDING.why),
    "distributed.dp_size": Used("trainer.num_nodes, trainer.devices"),
    "distributed.tp_size": Used("trainer.strategy.tensor_model_parallel_size"),
    "distributed.pp_size": Used("trainer.strategy.pipeline_model_parallel_size"),
    "distributed.cp_size": Used("trainer.strategy.context_parallel_size"),
    "distributed.ep_size": Used("trainer.strategy.expert_model_parallel_size; else as many as fit"),
    "distributed.sequence_parallel": Used("trainer.strategy.sequence_parallel, on wherever tp_size > 1"),
    "distributed.activation_checkpointing": Used("model.config.recompute_granularity"),
    "distributed.pipeline.pp_schedule": Used("trainer.strategy.virtual_pipeline_model_parallel_size"),
    "distributed.pipeline.layers_per_stage": Used("trainer.strategy.virtual_pipeline_model_parallel_size"),
    "distributed.pipeline.pp_microbatch_size": Used("data.micro_batch_size"),
    "distributed.pipeline.*": _MICROBATCHES,
    **dict.fromkeys(
        (
            "distributed.dp_replicate_size",
            "distributed.defer_fsdp_grad_sync",
            "distributed.reshard_after_forward",
            "distributed.use_hf_tp_plan",
            "distributed.moe.*",
            "distributed.multimodal.*",
            "parallelizer.*",
        ),
        _SHARDING,
    ),
    # --- loss, optimizer, schedule
    "loss_fn._target_": Used("that the loss is cross-entropy, the only one there is"),
    "optimizer._target_": Used("optim.config: torch's Adam or AdamW"),
    "optimizer.lr": Used("optim.config.lr"),
    "optimizer.betas": Used("optim.config.adam_beta1, optim.config.adam_beta2"),
    "optimizer.eps": Used("optim.config.adam_eps"),
    "optimizer.weight_decay": Used("optim.config.weight_decay"),
    **dict.fromkeys(
        ("optimizer.foreach", "optimizer.fused", "optimizer.capturable", "optimizer.master_weights"),
        Unneeded("Megatron's fused Adam with fp32 master weights"),
    ),
    "optimizer.amsgrad": Only((False, None), "Megatron's Adam has no AMSGrad"),
    "clip_grad_norm.max_norm": Used("optim.config.clip_grad"),
    "lr_scheduler.lr_decay_style": Used("optim.lr_scheduler: cosine, linear or constant"),
    "lr_scheduler.min_lr": Used("optim.lr_scheduler.min_lr"),
    "lr_scheduler.lr_warmup_steps": Used("optim.lr_scheduler.warmup_steps"),
    "lr_scheduler.lr_decay_steps": Used("optim.lr_scheduler.max_steps"),
    "lr_scheduler.init_lr": Unneeded("the warmup begins at 0"),
    "lr_scheduler.wd_incr_style": Only(("constant", None), "the weight decay is constant"),
    # --- data
    "dataset._target_": Used("data"),
    "dataset.dataset_name": Used("data.dataset_root"),
    "dataset.path_or_dataset": Used("data.dataset_root"),
    "dataset.path_or_dataset_id": Used("data.dataset_root"),
    "dataset.name": Used("data.dataset_root"),
    "dataset.split": Only(("train", None), "a data set's train split is trained on; give another data set"),
    "dataset.seq_length": Used("data.seq_length"),
    "dataset.seq_len": Used("data.seq_length"),
    "dataset.vocab_size": Used("data.vocab_size"),
    "dataset.num_samples": Used("data.num_train_samples"),
    "dataset.column_mapping.context": Used("data.columns"),
    "dataset.column_mapping.question": Used("data.columns"),
    "dataset.column_mapping.answer": Used("data.columns"),
    "dataset.answer_only_loss_mask": Used("data.dataset_kwargs"),
    "dataset.chat_template": Used("data.chat_template"),
    "dataset.use_hf_chat_template": Only((False, None), "use a data set of messages"),
    "dataset.limit_dataset_samples": Only((None,), "give a data set of that size"),
    "dataset.tokenizer.*": Unneeded("the checkpoint's own tokenizer is used; model.tokenizer names another"),
    **dict.fromkeys(("dataset.padding", "dataset.truncation", "dataset.pad_to_max_length", "dataset.fp8"), _LENGTHS),
    "dataset.shuffle_seed": Unneeded("data.seed, from rng.seed, orders the samples"),
    "dataset.random_start": Unneeded("random tokens begin anywhere"),
    "packed_sequence.packed_sequence_size": Used("data.packed_sequence_specs, data.seq_length"),
    "packed_sequence.packing_strategy": Unneeded("samples do not see each other in a pack, whatever packs them"),
    "packed_sequence.split_across_pack": Only((False, None), "a sample is never split over two packs"),
    "packed_sequence.max_packs": Only((None,), "all samples are packed"),
    "dataloader.num_workers": Used("data.num_workers"),
    "dataloader.shuffle": Unneeded("samples come in a new order each epoch"),
    "dataloader.*": _LENGTHS,
    "validation_dataset.*": _SAME_SPLITS,
    "validation_dataset": Used("trainer.val_check_interval: none never validates"),
    "validation_dataloader.*": _SAME_SPLITS,
    "validation_dataloader": _SAME_SPLITS,
    # --- logging
    "wandb.project": Used("log.wandb.project"),
    "wandb.name": Used("log.wandb.name"),
    "wandb.entity": Used("log.wandb.entity"),
    "wandb.enable": Used("log.wandb"),
    **dict.fromkeys(("wandb.dir", "wandb.save_dir", "wandb.mode"), Unneeded("WANDB_DIR and WANDB_MODE say so")),
    "mlflow.experiment_name": Used("log.mlflow.experiment_name"),
    "mlflow.run_name": Used("log.mlflow.run_name"),
    "mlflow.tracking_uri": Used("log.mlflow.tracking_uri"),
    "mlflow.enable": Used("log.mlflow"),
    # --- number formats
    "fp8.enabled": Used("trainer.plugins: FP8, its recipe by the card"),
    "fp8.*": Unneeded("the FP8 recipe follows from the card"),
    # --- refused whole
    "quantization.*": Only((None,), "weights in 4 or 8 bits are not read from such a file"),
    "qat.*": Only((None,), "there is no quantization-aware training"),
    "neftune.*": Only((None,), "there is no noise on embeddings"),
    "comet.*": Only((None,), "use wandb, mlflow or TensorBoard"),
}


def row_of(key: str) -> str | None:
    """The table's row for a key: its own, or that of a part that stands for all below it; None without one."""
    parts = key.split(".")
    rows = [key, *(".".join([*parts[:end], "*"]) for end in range(len(parts), 0, -1))]
    return next((row for row in rows if row in KEYS), None)
