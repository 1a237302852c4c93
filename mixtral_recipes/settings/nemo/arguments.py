"""The table, first part: every argument of NeMo's classes and functions, in NeMo's order.

An argument without a rule does what it did. The other rules say that it has another name here, that it has no effect
and why, or that it has one value and what replaces the others. `calls.py` makes classes take the arguments, `check.py`
holds recipes to the rules, `docs/reference/nemo.md` and `migrate` are made from them.

A class whose arguments are Megatron's is listed with its exceptions only. Rules go by class name and hold for
subclasses too.
"""

from dataclasses import dataclass

from mixtral_recipes.settings.nemo.megatron import BY_PLUGINS, DDP, MODEL, OPTIMIZER, PIPELINE_DTYPE
from mixtral_recipes.settings.nemo.rules import Ignored, Keys, Only, Renamed, Rule, each


@dataclass(frozen=True)
class Call:
    """The arguments of a class or function.

    Attributes:
        order: NeMo's arguments in NeMo's order; those after ``*`` go by name only.
        rules: Argument -> its rule, for those that do not simply do what they did.
    """

    order: tuple[str, ...]
    rules: dict[str, Rule]

    @property
    def names(self) -> list[str]:
        """Every argument, also those NeMo passes on without naming them."""
        return list(dict.fromkeys([*(name for name in self.order if name != "*"), *self.rules]))


def _call(order: str = "", /, **rules: Rule) -> Call:
    return Call(tuple(order.split()), rules)


def _config(name: str, *also: object) -> Only:
    return Only(None, f"set model.config.{name}", also=also)


_MODELS_TOKENIZER = Ignored("the model's tokenizer is used; set model.tokenizer, or tokenizer='data' in the recipe",
                            unless=("tokenizer", "data"))  # fmt: skip
_LOADER = {
    "rampup_batch_size": Only(None, "every step uses data.global_batch_size rows"),
    "pin_memory": Ignored("each batch is copied once, by the step that uses it", quiet=(True, False)),
    "persistent_workers": Ignored("data-loading workers always live as long as the run", quiet=(True, False)),
}
_AT_ITS_SAMPLE = Only(0, "a resumed run continues from the sample its checkpoint reached")
_AT_ITS_STEP = Only(0, "a resumed run continues from the step its checkpoint reached")
_TOKENS_ARE_LOGGED = Ignored("the number of tokens in a step is always logged", quiet=(True, False))
_FINE_TUNING = {
    **_LOADER,
    "tokenizer": _MODELS_TOKENIZER,
    "memmap_workers": Ignored("samples are indexed while they are tokenized", quiet=(1,)),
}
_FINE_TUNING_ORDER = (
    "dataset_root seq_length tokenizer micro_batch_size global_batch_size rampup_batch_size seed memmap_workers "
    "num_workers pin_memory persistent_workers packed_sequence_specs dataset_kwargs"
)
_EVERY_STEP = {
    "interval": Only("step", "the learning rate is updated at every step"),
    "frequency": Only(1, "the learning rate is updated at every step"),
    "monitor": Ignored("no schedule depends on a metric", quiet=("val_loss",)),
}
_SCHEDULE_TAIL = "interval frequency monitor"
_RECIPE = "model data trainer log resume optim"
_NO_SERVER = "evaluation runs the model itself, without a server"
_MASK = Ignored("the causal mask is built inside the attention", quiet=(False,))

CALLS: dict[str, Call] = {
    # functions: nemo.collections.llm
    "train": _call(f"{_RECIPE} tokenizer model_transform"),
    "pretrain": _call(_RECIPE),
    "finetune": _call(f"{_RECIPE} peft tokenizer"),
    "validate": _call(f"{_RECIPE} tokenizer model_transform"),
    "import_ckpt": _call("model source output_path overwrite"),
    "export_ckpt": _call(
        "path target output_path overwrite load_connector modelopt_export_kwargs",
        load_connector=Only(None, "a checkpoint itself records what it holds"),
        modelopt_export_kwargs=Only(None, "ModelOpt checkpoints are not supported; quantise the exported folder"),
    ),
    "generate": _call(
        "path trainer prompts encoder_prompts input_dataset params_dtype add_BOS max_batch_size random_seed "
        "inference_batch_times_seqlen_threshold inference_params text_only output_path enable_flash_decode",
        trainer=Ignored("generation runs in this process or in torchrun's, and needs no layout", quiet=(None,)),
        encoder_prompts=Only(None, "Mixtral has no encoder"),
        params_dtype=Ignored("the checkpoint's own dtype is used", quiet=(None,)),
        inference_batch_times_seqlen_threshold=Ignored("generation from Python does not use a pipeline", quiet=(1000,)),
        enable_flash_decode=Ignored("the fastest attention available on this machine is used", quiet=(True,)),
    ),
    "evaluate": _call("target_cfg eval_cfg adapter_cfg", adapter_cfg=Only(None, _NO_SERVER)),
    # nemo.lightning
    "Trainer": _call(
        "* accelerator strategy devices num_nodes precision logger callbacks fast_dev_run max_epochs min_epochs "
        "max_steps min_steps max_time limit_train_batches limit_val_batches limit_test_batches limit_predict_batches "
        "overfit_batches val_check_interval check_val_every_n_epoch num_sanity_val_steps log_every_n_steps "
        "enable_checkpointing enable_progress_bar enable_model_summary accumulate_grad_batches gradient_clip_val "
        "gradient_clip_algorithm deterministic benchmark inference_mode use_distributed_sampler profiler "
        "detect_anomaly barebones plugins sync_batchnorm reload_dataloaders_every_n_epochs default_root_dir",
        accumulate_grad_batches=Only(1, "gradient accumulation follows from data.global_batch_size"),
        limit_test_batches=Ignored("there is no test loop", quiet=(50,)),
        use_distributed_sampler=Ignored("every data-parallel rank reads its own share of the data"),
        precision=Only(None, "set trainer.plugins.precision"),
        logger=Ignored("configure loggers in log", quiet=(None, True, False)),
        fast_dev_run=Only(False, "set trainer.max_steps"),
        **each(
            Only(None, "set the length of the run with trainer.max_steps", also=(-1,)),
            "max_epochs min_epochs min_steps",
        ),
        max_time=Only(None, "on Slurm, set --time; a job at its time limit saves a checkpoint and is requeued"),
        limit_train_batches=Only(None, "set trainer.max_steps", also=(1.0,)),
        limit_predict_batches=Ignored("there is no predict loop", quiet=(None, 1.0)),
        overfit_batches=Only(0.0, "use a data set of that size", also=(0,)),
        check_val_every_n_epoch=Ignored("validation runs every trainer.val_check_interval steps", quiet=(None, 1)),
        num_sanity_val_steps=Ignored("there is no validation before the first step", quiet=(0,)),
        enable_progress_bar=Ignored(
            "progress is shown as a bar on a terminal, and as lines elsewhere", quiet=(None, True)
        ),
        enable_model_summary=Ignored("`recipes show` prints the model's sizes", quiet=(None, True, False)),
        gradient_clip_val=Only(None, "set optim.config.clip_grad"),
        gradient_clip_algorithm=Only(None, "gradients are clipped by norm (optim.config.clip_grad)", also=("norm",)),
        deterministic=_config("deterministic_mode", False),
        benchmark=Ignored("the model has no convolutions", quiet=(None, True, False)),
        inference_mode=Ignored("validation always runs without gradients", quiet=(True,)),
        profiler=Only(None, "use NsysCallback, PytorchProfilerCallback or MemoryProfileCallback"),
        detect_anomaly=Ignored(
            "a loss or gradient that is not finite stops the run with an error that names the step", quiet=(False,)
        ),
        barebones=Only(False, "leave out log.tensorboard and set trainer.enable_checkpointing=False"),
        sync_batchnorm=Ignored("the model has no batch norm", quiet=(False,)),
        reload_dataloaders_every_n_epochs=Ignored("data modules yield an endless stream of samples", quiet=(0,)),
        default_root_dir=Only(None, "set log.log_dir"),
    ),
    "MegatronStrategy": _call(
        "tensor_model_parallel_size pipeline_model_parallel_size pipeline_model_parallel_comm_backend "
        "num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage virtual_pipeline_model_parallel_size "
        "microbatch_group_size_per_vp_stage context_parallel_size sequence_parallel expert_model_parallel_size "
        "moe_extended_tp expert_tensor_parallel_size encoder_tensor_model_parallel_size "
        "encoder_pipeline_model_parallel_size account_for_embedding_in_pipeline_split "
        "account_for_loss_in_pipeline_split data_sampler parallel_devices cluster_environment checkpoint_io "
        "find_unused_parameters ckpt_load_optimizer ckpt_save_optimizer ckpt_load_main_params ddp fsdp lazy_init "
        "pipeline_dtype use_te_rng_tracker use_sharp save_ckpt_format ckpt_async_save ckpt_torch_dist_multiproc "
        "ckpt_assume_constant_structure ckpt_parallel_save ckpt_parallel_save_within_dp ckpt_parallel_load "
        "ckpt_parallel_save_optim ckpt_load_directly_on_device ckpt_load_strictness setup_optimizers "
        "init_model_parallel replace_progress_bar progress_interval restore_config megatron_log_level "
        "use_tp_pp_dp_mapping num_distributed_optimizer_instances nccl_communicator_config_path "
        "pipeline_model_parallel_layout use_gloo_process_groups",
        pipeline_dtype=Ignored(PIPELINE_DTYPE, quiet=(None, "torch.bfloat16")),  # bfloat16 in NeMo's recipes
        gradient_as_bucket_view=Ignored("Megatron's DDP always keeps gradients in its buckets"),
        ckpt_parallel_load=Ignored("every rank reads its own part of a checkpoint", quiet=(True,)),
        ckpt_load_strictness=Ignored("a checkpoint without all of the model's tensors is refused", quiet=("log_all",)),
        pipeline_model_parallel_comm_backend=MODEL["pipeline_model_parallel_comm_backend"],
        num_layers_in_first_pipeline_stage=MODEL["num_layers_in_first_pipeline_stage"],
        num_layers_in_last_pipeline_stage=MODEL["num_layers_in_last_pipeline_stage"],
        microbatch_group_size_per_vp_stage=_config("microbatch_group_size_per_vp_stage"),
        account_for_embedding_in_pipeline_split=MODEL["account_for_embedding_in_pipeline_split"],
        account_for_loss_in_pipeline_split=MODEL["account_for_loss_in_pipeline_split"],
        pipeline_model_parallel_layout=MODEL["pipeline_model_parallel_layout"],
        use_te_rng_tracker=MODEL["use_te_rng_tracker"],
        moe_extended_tp=Only(False, "set trainer.strategy.expert_tensor_parallel_size"),
        **each(
            Only(0, "Mixtral has no encoder", also=(None,)),
            "encoder_tensor_model_parallel_size encoder_pipeline_model_parallel_size",
        ),
        **each(
            Only(None, "mixtral-recipes does not run on Lightning; a strategy holds only the layout and its settings"),
            "data_sampler parallel_devices cluster_environment checkpoint_io",
        ),
        find_unused_parameters=Ignored("Megatron's DDP does not look for unused parameters", quiet=(False,)),
        ckpt_load_optimizer=Only(True, "to start from weights alone, set resume.restore_config.path"),
        **each(
            Only(True, "a checkpoint must be able to resume its run; use `export` to write the weights alone"),
            "ckpt_save_optimizer ckpt_include_optimizer",
        ),
        ckpt_load_main_params=Ignored("a resumed run always restores its fp32 main weights", quiet=(True, False)),
        fsdp=Only(None, "use expert, pipeline and tensor parallelism with the distributed optimizer"),
        lazy_init=Ignored("each rank builds only its own part of the model", quiet=(True, False)),
        optimizer_cpu_offload=OPTIMIZER["optimizer_cpu_offload"],
        use_sharp=Only(False, "set NCCL_COLLNET_ENABLE=1 in the cluster profile's env"),
        save_ckpt_format=Only("torch_dist", "checkpoints are always in Megatron's torch_dist format", also=(None,)),
        **each(
            Ignored("every rank writes its own part of a checkpoint", quiet=(None, True, False)),
            "ckpt_torch_dist_multiproc ckpt_assume_constant_structure ckpt_parallel_save ckpt_parallel_save_within_dp "
            "ckpt_parallel_save_optim",
        ),
        ckpt_load_directly_on_device=Ignored(
            "every rank reads its own part of a checkpoint", quiet=(None, True, False)
        ),
        **each(
            Ignored("training always has an optimizer, and nothing else needs one", quiet=(True, False)),
            "setup_optimizers store_optimizer_states",
        ),
        init_model_parallel=Ignored("Megatron's process groups are always created", quiet=(True,)),
        replace_progress_bar=Ignored("progress is shown as a bar on a terminal, and as lines elsewhere", quiet=(True,)),
        progress_interval=Ignored("progress is logged every trainer.log_every_n_steps steps", quiet=(1,)),
        restore_config=Only(None, "set resume.restore_config"),
        megatron_log_level=Ignored("use --debug to see everything", quiet=(0,)),
        use_tp_pp_dp_mapping=Only(False, "ranks are numbered in Megatron's order (tp, cp, ep, dp, pp)"),
        num_distributed_optimizer_instances=Only(1, "the optimizer state is spread over all data-parallel ranks"),
        nccl_communicator_config_path=Only(None, "set NCCL's environment variables in the cluster profile's env"),
        use_gloo_process_groups=Ignored(
            "CPU process groups are created where a checkpoint needs them", quiet=(True, False)
        ),
        **each(BY_PLUGINS, "params_dtype autocast_dtype precision"),
    ),
    "MegatronMixedPrecision": _call(
        "precision params_dtype pipeline_dtype autocast_dtype autocast_enabled grad_reduce_in_fp32 fp8 fp8_recipe "
        "first_last_layers_bf16 fp8_margin fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad "
        "fp8_dot_product_attention fp8_multi_head_attention fp8_params fp8_param_gather fp4 fp4_recipe "
        "fp16_loss_scale fp16_initial_loss_scale fp16_min_loss_scale fp16_loss_scale_window fp16_hysteresis "
        "num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 reuse_grad_buf_for_mxfp8_param_ag",
        **each(
            Ignored("it follows from precision", quiet=(None, False)), "params_dtype autocast_dtype autocast_enabled"
        ),
        pipeline_dtype=Ignored(PIPELINE_DTYPE, quiet=(None, "torch.bfloat16")),
        fp8_wgrad=Only(True, "set model.config.fp8_wgrad, which delayed scaling reads"),
        fp8_dot_product_attention=_config("fp8_dot_product_attention", False),
        fp8_multi_head_attention=_config("fp8_multi_head_attention", False),
        fp8_params=Renamed("fp8_param_gather"),
        fp4=Only(None, "use fp8"),
        fp4_recipe=Ignored("FP4 is not supported", quiet=("nvfp4", None)),
        fp16_loss_scale=Renamed("loss_scale"),
        fp16_initial_loss_scale=Renamed("initial_loss_scale"),
        fp16_min_loss_scale=Renamed("min_loss_scale"),
        fp16_loss_scale_window=Renamed("loss_scale_window"),
        fp16_hysteresis=Renamed("hysteresis"),
        reuse_grad_buf_for_mxfp8_param_ag=Only(
            False,
            "set it in trainer.strategy.ddp and optim.config, as precision='fp8' with hardware='b200' does",
        ),
    ),
    "NeMoLogger": _call(
        "name log_dir explicit_log_dir version use_datetime_version log_local_rank_0_only log_global_rank_0_only "
        "files_to_copy update_logger_directory ckpt tensorboard wandb extra_loggers",
        use_datetime_version=Ignored(
            "a run's folder is log_dir/name, so that the same command resumes it", quiet=(True, False)
        ),
        **each(
            Ignored("rank 0's lines are shown; every rank's lines go to files", quiet=(True, False)),
            "log_local_rank_0_only log_global_rank_0_only",
        ),
        update_logger_directory=Ignored("loggers always write inside the run's folder", quiet=(True,)),
        extra_loggers=Only((), "use log.tensorboard, log.wandb or log.mlflow, or a callback", also=([], None)),
    ),
    "ModelCheckpoint": _call(
        "monitor verbose save_last save_top_k save_weights_only mode every_n_epochs every_n_train_steps "
        "train_time_interval save_on_train_epoch_end save_optim_on_train_end always_save_context "
        "save_context_on_train_end dirpath filename auto_insert_metric_name enable_version_counter",
        verbose=Ignored("every save is logged", quiet=(True, False)),
        save_weights_only=Only(
            False, "a checkpoint must be able to resume its run; use `export` to write the weights alone"
        ),
        every_n_epochs=Only(None, "set every_n_train_steps"),
        save_on_train_epoch_end=Ignored("runs are counted in steps, not epochs", quiet=(None, False)),
        **each(
            Ignored("a checkpoint always holds weights, optimizer, tokenizer and configuration", quiet=(True, False)),
            "save_optim_on_train_end always_save_context save_context_on_train_end",
        ),
        dirpath=Only(None, "checkpoints are always in log.log_dir/log.name/checkpoints"),
        auto_insert_metric_name=Ignored(
            "filename alone decides what a checkpoint's name contains", quiet=(True, False)
        ),
        enable_version_counter=Ignored("a checkpoint folder is never written twice", quiet=(True, False)),
    ),
    "TensorBoardLogger": _call(
        "save_dir name",
        version=Ignored("the run's folder takes the place of a version", quiet=(None, "")),
        log_graph=Ignored("a model spread over ranks has no single graph", quiet=(False,)),
        default_hp_metric=Ignored("each metric is logged under its own name", quiet=(True, False)),
        prefix=Ignored("metrics are named train/... and val/...", quiet=("", None)),
        sub_dir=Ignored("save_dir and name set the folder", quiet=(None,)),
    ),
    "WandbLogger": _call(
        "name save_dir version offline",
        save_dir=Ignored("files are written inside the run's folder", quiet=(None, ".")),
        version=Only(None, "runs are resumed by their name"),
        offline=Only(False, "set WANDB_MODE=offline in the environment"),
        id=Only(None, "set WANDB_RUN_ID in the environment"),
        group=Only(None, "set WANDB_RUN_GROUP in the environment"),
        job_type=Only(None, "set WANDB_JOB_TYPE in the environment"),
        tags=Only(None, "set WANDB_TAGS in the environment", also=([], ())),
        notes=Only(None, "set WANDB_NOTES in the environment"),
        log_model=Ignored("checkpoints stay in the run's folder", quiet=(False,)),
        prefix=Ignored("metrics are named train/... and val/...", quiet=("", None)),
    ),
    "AutoResume": _call(
        "* restore_config resume_from_directory resume_from_path resume_if_exists resume_past_end "
        "resume_ignore_no_checkpoint adapter_path",
        resume_past_end=Ignored(
            "a run that has reached max_steps ends at once; raise max_steps to continue", quiet=(True, False)
        ),
        adapter_path=Renamed("resume_from_path"),
    ),
    "RestoreConfig": _call(
        "* path load_model_state load_optim_state load_artifacts adapter_path",
        load_model_state=Only(True, "set resume.restore_config=null to restore nothing"),
        load_artifacts=Ignored("the tokenizer saved with the weights is used unless you set another", quiet=(True,)),
    ),
    "MegatronOptimizerModule": _call(
        "config lr_scheduler no_weight_decay_cond scale_lr_cond lr_mult",
        no_weight_decay_cond=Only(None, "Megatron applies weight decay to matrices, but not to biases or norms"),
        scale_lr_cond=Only(None, "every weight has the same learning rate"),
        lr_mult=Only(1.0, "every weight has the same learning rate", also=(1,)),
    ),
    "CosineAnnealingScheduler": _call(f"max_steps warmup_steps constant_steps min_lr {_SCHEDULE_TAIL}", **_EVERY_STEP),
    "WarmupPolicyScheduler": _call(f"warmup_steps warmup_ratio max_steps min_lr {_SCHEDULE_TAIL}", **_EVERY_STEP),
    "WarmupHoldPolicyScheduler": _call(
        f"warmup_steps warmup_ratio hold_steps hold_ratio max_steps min_lr {_SCHEDULE_TAIL}",
        **each(
            Ignored("after the warmup the learning rate stays constant to the end, as in NeMo", quiet=(None,)),
            "hold_steps hold_ratio",
        ),
        **_EVERY_STEP,
    ),
    "WarmupAnnealingScheduler": _call(f"warmup_steps warmup_ratio max_steps min_lr {_SCHEDULE_TAIL}", **_EVERY_STEP),
    "WarmupHoldAnnealScheduler": _call(
        f"warmup_ratio hold_ratio max_steps decay_schedule min_lr {_SCHEDULE_TAIL}", **_EVERY_STEP
    ),
    # models
    "MixtralModel": _call("config optim tokenizer model_transform"),
    "MixtralConfig": _call(**MODEL),
    # data
    "MockDataModule": _call(
        "seq_length tokenizer micro_batch_size global_batch_size rampup_batch_size num_train_samples num_val_samples "
        "num_test_samples num_workers pin_memory persistent_workers create_attention_mask vocab_file merges_file",
        **_LOADER,
        num_test_samples=Ignored("there is no test loop", quiet=(10_000, None)),
        create_attention_mask=_MASK,
        **each(
            Ignored("random tokens are drawn from vocab_size, or from the tokenizer's vocabulary", quiet=(None,)),
            "vocab_file merges_file",
        ),
    ),
    "SquadDataModule": _call(
        _FINE_TUNING_ORDER.replace(" seed", " force_redownload delete_raw seed"),
        **_FINE_TUNING,
        dataset_kwargs=Ignored("NeMo's dataset class is not used"),
        delete_raw=Ignored("downloads stay in the Hub's cache"),
    ),
    "FineTuningDataModule": _call(
        _FINE_TUNING_ORDER,
        **_FINE_TUNING,
        dataset_kwargs=Keys(("prompt_template", "label_key", "answer_only_loss", "add_bos", "add_eos")),
    ),
    "ChatDataModule": _call(
        f"{_FINE_TUNING_ORDER} use_hf_tokenizer_chat_template",
        **_FINE_TUNING,
        dataset_kwargs=Ignored("NeMo's dataset class is not used"),
        use_hf_tokenizer_chat_template=Ignored("a chat template is always used", quiet=(True, False)),
    ),
    "PreTrainingDataModule": _call(
        "paths seq_length tokenizer micro_batch_size global_batch_size rampup_batch_size num_workers pin_memory "
        "persistent_workers reset_position_ids create_attention_mask reset_attention_mask eod_mask_loss seed split "
        "index_mapping_dir num_dataset_builder_threads num_train_samples num_val_samples num_test_samples "
        "dataloader_type init_consumed_samples init_global_step output_log dataset_cls mmap_bin_files "
        "object_storage_cache_path",
        **_LOADER,
        create_attention_mask=_MASK,
        dataloader_type=Only(
            "single", "with num_train_samples the order is Megatron's; without it, each epoch has a new order"
        ),
        init_consumed_samples=_AT_ITS_SAMPLE,
        init_global_step=_AT_ITS_STEP,
        output_log=_TOKENS_ARE_LOGGED,
        dataset_cls=Only("GPTDataset", "Megatron's GPTDataset is used; for another, write your own data module"),
        mmap_bin_files=Ignored("corpora are always memory-mapped", quiet=(True,)),
        object_storage_cache_path=Only(None, "copy the corpus to a mounted file system"),
    ),
    "MegatronDataSampler": _call(
        "seq_len micro_batch_size global_batch_size rampup_batch_size dataloader_type init_consumed_samples "
        "init_global_step output_log decoder_seq_len",
        rampup_batch_size=_LOADER["rampup_batch_size"],
        dataloader_type=Only("single", "the DataLoader sets the order: sequential, or random with shuffle=True"),
        init_consumed_samples=_AT_ITS_SAMPLE,
        init_global_step=_AT_ITS_STEP,
        output_log=_TOKENS_ARE_LOGGED,
        decoder_seq_len=Only(None, "Mixtral has no encoder"),
    ),
    "PackedSequenceSpecs": _call(
        "packed_sequence_size tokenizer_model_name packed_train_data_path packed_val_data_path packed_metadata_path "
        "pad_cu_seqlens",
        tokenizer_model_name=Ignored("the cache is keyed by the tokenizer's content"),
        **each(
            Ignored("packs are built from the samples and cached"),
            "packed_train_data_path packed_val_data_path packed_metadata_path",
        ),
    ),
    "AutoTokenizer": _call(
        "pretrained_model_name vocab_file merges_file mask_token bos_token eos_token pad_token sep_token cls_token "
        "unk_token additional_special_tokens use_fast trust_remote_code include_special_tokens chat_template",
        **each(
            Only(None, "set it in the tokenizer's files"),
            "mask_token bos_token eos_token pad_token sep_token cls_token unk_token",
        ),
        additional_special_tokens=Only((), "set them in the tokenizer's files", also=([], None)),
        use_fast=Ignored("the fast tokenizer is always used", quiet=(True, False)),
        trust_remote_code=Only(False, "code in a checkpoint is never run"),
        include_special_tokens=Ignored("the data module decides which special tokens a sample gets", quiet=(False,)),
    ),
    "get_nmt_tokenizer": _call(
        "library model_name tokenizer_model vocab_file merges_file special_tokens use_fast bpe_dropout r2l legacy "
        "delimiter trust_remote_code chat_template vocab_size",
        special_tokens=Only(None, "set them in the tokenizer's files", also=({},)),
        use_fast=Ignored("the fast tokenizer is always used", quiet=(True, False)),
        bpe_dropout=Only(0.0, "text is always tokenized the same way", also=(0, None)),
        r2l=Only(False, "Mixtral reads from left to right"),
        legacy=Ignored("SentencePiece files are read the way SentencePiece reads them", quiet=(True, False)),
        delimiter=Only(None, "preprocess the text instead"),
        trust_remote_code=Only(False, "code in a checkpoint is never run"),
    ),
    # adapters
    "LoRA": _call(
        "target_modules exclude_modules canonical_mapping dim alpha dropout dropout_position lora_A_init_method "
        "lora_B_init_method a2a_experimental lora_dtype dropout_recompute",
        canonical_mapping=Only(
            None, "use Megatron's layer names: linear_qkv, linear_proj, linear_fc1, linear_fc2", also=({},)
        ),
        a2a_experimental=Only(False, "expert adapters use the experts' own token exchange"),
        dropout_recompute=Ignored("the dropout mask is kept for the backward pass", quiet=(False,)),
    ),
    "DoRA": _call(
        "target_modules exclude_modules canonical_mapping dim alpha dropout dropout_position lora_A_init_method "
        "lora_B_init_method",
    ),
    # callbacks
    "TimingCallback": _call(
        "log_tokens_per_sec timer_kwargs",
        log_tokens_per_sec=Ignored("tokens per second are always reported"),
        timer_kwargs=Ignored("steps are timed with the wall clock"),
    ),
    "GarbageCollectionCallback": _call("gc_interval_train gc_interval_val"),
    "MegatronTokenDropCallback": _call("moe_expert_capacity_factor moe_pad_expert_input_to_capacity"),
    "MegatronCommOverlapCallback": _call(
        "tp_comm_overlap tp_comm_overlap_cfg tp_comm_bootstrap_backend overlap_p2p_comm batch_p2p_comm "
        "overlap_grad_reduce overlap_param_gather overlap_param_gather_with_optimizer_step align_param_gather "
        "bucket_size defer_embedding_wgrad_compute wgrad_deferral_limit",
        tp_comm_overlap_cfg=Ignored("Transformer Engine's own buffers are used", quiet=(None,)),
        tp_comm_bootstrap_backend=_config("tp_comm_bootstrap_backend"),
    ),
    "PreemptionCallback": _call("sig"),
    "NsysCallback": _call(
        "start_step end_step ranks gen_shape nvtx_ranges",
        nvtx_ranges=Ignored("every recorded step is an NVTX range", quiet=(True, False)),
    ),
    "PytorchProfilerCallback": _call(
        "start_step end_step warmup_steps active_steps trace_dir profiler_kwargs",
        warmup_steps=Ignored("recording starts at start_step", quiet=(0,)),
        active_steps=Ignored("recording ends at end_step", quiet=(1,)),
        profiler_kwargs=Only(None, "set record_shapes, with_stack and profile_memory", also=({},)),
    ),
    "MemoryProfileCallback": _call(
        "dir warn_cycles ranks", warn_cycles=Ignored("the snapshot shows what holds memory", quiet=(True, False))
    ),
    # run plugins: nemo.lightning.run.plugins
    "PreemptionPlugin": _call("* preempt_time sig callbacks"),
    "NsysPlugin": _call("* start_step end_step ranks nsys_trace gen_shape"),
    "MemoryProfilePlugin": _call("* dir ranks"),
    "WandbPlugin": _call(
        "* name logger_fn log_task_config",
        log_task_config=Ignored("the recipe is stored in the run's folder and in its checkpoints", quiet=(True, False)),
    ),
    "ConfigValidationPlugin": _call(
        "* validate_preemption validate_checkpoint_dir validate_serialization validate_wandb "
        "validate_nodes_and_devices",
        validate_preemption=Ignored("every run handles SIGTERM and SIGUSR1", quiet=(True, False)),
    ),
    "PerfEnvPlugin": _call(
        "* enable_layernorm_sm_margin layernorm_sm_margin enable_vboost nccl_pp_comm_chunksize gpu_sm100_or_newer "
        "user_buffer_registration",
    ),
    "FaultTolerancePlugin": _call(
        "* num_in_job_restarts num_job_retries_on_failure initial_rank_heartbeat_timeout rank_heartbeat_timeout",
        num_in_job_restarts=Ignored("a failed job is restarted as a whole", quiet=(3,)),
        initial_rank_heartbeat_timeout=Ignored("rank_heartbeat_timeout applies to the whole run", quiet=(1800,)),
    ),
    # Megatron's own
    "DistributedDataParallelConfig": _call(**DDP),
    "OptimizerConfig": _call(**OPTIMIZER),
    # evaluation: nemo.collections.llm.evaluation.api
    "EvaluationConfig": _call(
        "type output_dir supported_endpoint_types params",
        supported_endpoint_types=Ignored(_NO_SERVER, quiet=(None,)),
    ),
    "ConfigParams": _call(
        "* top_p temperature limit_samples num_fewshot max_new_tokens max_retries parallelism task request_timeout "
        "extra batch_size top_k add_bos bootstrap_iters",
        **each(
            Ignored("answers are the most likely ones, or sampled if their task asks for it", quiet=(None, 0, 0.0, 1)),
            "top_p temperature top_k",
        ),
        num_fewshot=Only(None, "set extra={'num_fewshot': N}"),
        max_retries=Ignored(_NO_SERVER, quiet=(None,)),
        parallelism=Ignored(_NO_SERVER, quiet=(None, 1)),
        task=Only(None, "set the tasks in EvaluationConfig's type"),
        request_timeout=Ignored(_NO_SERVER, quiet=(None, 300)),
        add_bos=Ignored("the tokenizer decides how a prompt begins", quiet=(None, False)),
        bootstrap_iters=Ignored("a score's standard error is estimated from 1,000 resamples", quiet=(100000,)),
    ),
    "EvaluationTarget": _call("api_endpoint"),
    "ApiEndpoint": _call(
        "url model_id type nemo_checkpoint_path nemo_triton_http_port",
        url=Only(None, "set nemo_checkpoint_path to the checkpoint itself"),
        model_id=Ignored("the checkpoint records which model it is", quiet=(None, "triton_model")),
        type=Ignored(_NO_SERVER, quiet=("completions",)),
        nemo_triton_http_port=Ignored(_NO_SERVER, quiet=(None, 8000)),
    ),
}


def rules_of(target: object) -> dict[str, Rule]:
    """The rules of a class or function, those of a class's bases included."""
    found: dict[str, Rule] = {}
    for cls in reversed(getattr(target, "__mro__", (target,))):
        call = CALLS.get(getattr(cls, "__name__", ""))
        found |= call.rules if call else {}
    return found
