"""The table, second part: NeMo's modules, and the names in them that are something else here, or are not.

A name without an entry is what it was: the module that stands here for NeMo's has it. Standard library only, as
`migrate` reads this without loading torch.
"""

from mixtral_recipes.settings.nemo.rules import Base, Ignored, Only, Renamed

# NeMo's module (below ``nemo.``) -> the one that stands for it (below ``mixtral_recipes.``; "" is the package itself).
MODULES: dict[str, str] = {
    "collections": "",
    "collections.llm": "",
    "collections.llm.api": "api",
    "collections.llm.gpt": "",
    "collections.llm.gpt.data": "",
    "collections.llm.gpt.data.alpaca": "",
    "collections.llm.gpt.data.api": "recipes.data",
    "collections.llm.gpt.data.chat": "data.modules.chat",
    "collections.llm.gpt.data.core": "system.home",
    "collections.llm.gpt.data.dolly": "",
    "collections.llm.gpt.data.fine_tuning": "data.modules.finetuning",
    "collections.llm.gpt.data.hf_dataset": "",
    "collections.llm.gpt.data.mlperf_govreport": "",
    "collections.llm.gpt.data.mock": "data.modules.mock",
    "collections.llm.gpt.data.packed_sequence": "settings.data",
    "collections.llm.gpt.data.pre_training": "data.modules.pretraining",
    "collections.llm.gpt.data.squad": "data.modules.squad",
    "collections.llm.gpt.model": "",
    "collections.llm.gpt.model.base": "models.config",
    "collections.llm.gpt.model.hf_auto_model_for_causal_lm": "",
    "collections.llm.gpt.model.mixtral": "models.config",
    "collections.llm.peft": "settings.peft",
    "collections.llm.peft.api": "settings.peft",
    "collections.llm.peft.canonical_lora": "settings.peft",
    "collections.llm.peft.dora": "settings.peft",
    "collections.llm.peft.lora": "settings.peft",
    "collections.llm.recipes": "recipes",
    "collections.llm.recipes.callbacks": "",
    "collections.llm.recipes.callbacks.common": "",
    "collections.llm.recipes.finetune_default": "recipes.finetune_default",
    "collections.llm.recipes.llama3_8b": "training.watch.callbacks",  # NeMo's benchmarks take a callback from there
    "collections.llm.recipes.log": "recipes.log",
    "collections.llm.recipes.log.default": "recipes.log.default",
    "collections.llm.recipes.mixtral_8x22b": "recipes.mixtral_8x22b",
    "collections.llm.recipes.mixtral_8x22b_64k": "recipes.mixtral_8x22b_64k",
    "collections.llm.recipes.mixtral_8x7b": "recipes.mixtral_8x7b",
    "collections.llm.recipes.mixtral_8x7b_16k": "recipes.mixtral_8x7b_16k",
    "collections.llm.recipes.mixtral_8x7b_64k": "recipes.mixtral_8x7b_64k",
    "collections.llm.recipes.optim": "recipes.optim",
    "collections.llm.recipes.optim.adam": "recipes.optim.adam",
    "collections.llm.recipes.precision": "recipes.precision",
    "collections.llm.recipes.precision.mixed_precision": "recipes.precision.mixed_precision",
    "collections.llm.recipes.run": "",
    "collections.llm.recipes.run.executor": "executors.torchrun",
    "collections.llm.inference": "api",
    "collections.llm.inference.base": "api",
    "collections.llm.evaluation": "settings.evaluation",
    "collections.llm.evaluation.api": "settings.evaluation",
    "collections.common": "",
    "collections.common.tokenizers": "settings.tokenizer",
    "collections.common.tokenizers.huggingface": "settings.tokenizer",
    "collections.common.tokenizers.huggingface.auto_tokenizer": "settings.tokenizer",
    "collections.common.tokenizers.null_tokenizer": "settings.tokenizer",
    "collections.common.tokenizers.sentencepiece_tokenizer": "settings.tokenizer",
    "collections.common.tokenizers.tokenizer_spec": "settings.tokenizer",
    "collections.nlp": "",
    "collections.nlp.modules": "",
    "collections.nlp.modules.common": "",
    "collections.nlp.modules.common.tokenizer_utils": "settings.tokenizer",
    "lightning": "",
    "lightning.base": "system.home",
    "lightning.fabric": "",
    "lightning.fabric.fabric": "",
    "lightning.fabric.plugins": "",
    "lightning.fabric.strategies": "",
    "lightning.io": "",
    "lightning.io.api": "api",
    "lightning.io.mixin": "",
    "lightning.lr_scheduler": "settings.optim",
    "lightning.megatron_parallel": "",
    "lightning.nemo_logger": "settings.log",
    "lightning.resume": "settings.resume",
    "lightning.run": "executors.plugins",
    "lightning.run.plugins": "executors.plugins",
    "lightning.pytorch": "",
    "lightning.pytorch.callbacks": "",
    "lightning.pytorch.callbacks.callback": "",
    "lightning.pytorch.callbacks.ddp_parity_checker": "",
    "lightning.pytorch.callbacks.debugging": "",
    "lightning.pytorch.callbacks.deepep": "",
    "lightning.pytorch.callbacks.flops_callback": "training.watch.callbacks",
    "lightning.pytorch.callbacks.garbage_collection": "training.watch.callbacks",
    "lightning.pytorch.callbacks.jit_transform": "",
    "lightning.pytorch.callbacks.layer_freezer": "",
    "lightning.pytorch.callbacks.megatron_comm_overlap": "training.watch.callbacks",
    "lightning.pytorch.callbacks.megatron_enable_experimental_callback": "",
    "lightning.pytorch.callbacks.memory_callback": "",
    "lightning.pytorch.callbacks.memory_profiler": "training.watch.profiling",
    "lightning.pytorch.callbacks.model_callback": "",
    "lightning.pytorch.callbacks.model_checkpoint": "settings.checkpoint",
    "lightning.pytorch.callbacks.model_transform": "",
    "lightning.pytorch.callbacks.moe_token_drop": "training.watch.callbacks",
    "lightning.pytorch.callbacks.nsys": "training.watch.profiling",
    "lightning.pytorch.callbacks.optimizer_monitor": "",
    "lightning.pytorch.callbacks.peft": "settings.peft",
    "lightning.pytorch.callbacks.preemption": "training.watch.callbacks",
    "lightning.pytorch.callbacks.progress_bar": "",
    "lightning.pytorch.callbacks.progress_printer": "training.watch.callbacks",
    "lightning.pytorch.callbacks.pytorch_profiler": "training.watch.profiling",
    "lightning.pytorch.callbacks.runtime_estimator": "",
    "lightning.pytorch.callbacks.speed_monitor": "",
    "lightning.pytorch.loggers": "settings.log",
    "lightning.pytorch.loggers.tensorboard": "settings.log",
    "lightning.pytorch.loggers.wandb": "settings.log",
    "lightning.pytorch.optim": "settings.optim",
    "lightning.pytorch.optim.base": "settings.optim",
    "lightning.pytorch.optim.lr_scheduler": "settings.optim",
    "lightning.pytorch.optim.megatron": "settings.optim",
    "lightning.pytorch.optim.pytorch": "",
    "lightning.pytorch.plugins": "settings.precision",
    "lightning.pytorch.plugins.data_sampler": "data.modules.lightning",
    "lightning.pytorch.plugins.mixed_precision": "settings.precision",
    "lightning.pytorch.strategies": "settings.trainer",
    "lightning.pytorch.strategies.fsdp2_strategy": "",
    "lightning.pytorch.strategies.fsdp_strategy": "",
    "lightning.pytorch.strategies.megatron_strategy": "settings.trainer",
    "lightning.pytorch.strategies.utils": "settings.resume",
    "lightning.pytorch.trainer": "settings.trainer",
    "utils": "",
    "utils.exp_manager": "training.watch.callbacks",
    "utils.msc_utils": "",
}


def _refused(instead: str) -> Only:
    return Only(None, instead)


_SERVE = _refused("export the checkpoint and serve the folder, e.g. with `vllm serve FOLDER`")
_COMPRESS = _refused("export the checkpoint and work on the folder, e.g. with NVIDIA's ModelOpt")
_STEP = _refused("the step is mixtral_recipes/training/step.py")
_OPTIMIZER = _refused("use MegatronOptimizerModule(config=OptimizerConfig(lr=...)), which is Adam")
_SCHEDULE = _refused("use CosineAnnealingScheduler, or one of the Warmup... schedulers")
_STRATEGY = _refused("use MegatronStrategy")
_HUB_DATA = _refused("use FineTuningDataModule or ChatDataModule with dataset_root='ORG/NAME'")
_MERGE = _refused("use export_ckpt(path, target='hf'), which merges adapters into their base")
_REPORTED = "every logged step has it"
_CONVERT = _refused("import_ckpt and export_ckpt convert weights, by the table in mixtral_recipes/importers/mapping.py")
_CONTEXT = _refused("a checkpoint's settings are YAML, in its context folder; import_ckpt and export_ckpt convert it")
_FP16 = _refused("use bf16_with_fp8_mixed or another of the bf16_with_... functions")
_OTHER_LOOP = _refused("write a callback with the hooks of training/watch/callbacks.py")

# Name -> what became of it, in whichever of the modules it stands. `Only(None, ...)` is a name that is not here.
NAMES: dict[str, Base | Ignored | Only | Renamed] = {
    "GPTModel": Renamed("MixtralModel"),
    "LightningModule": Renamed("MixtralModel"),
    "LightningDataModule": Base("a data module needs train_dataloader() only; see own-data.md"),
    "Callback": Base("a callback needs hooks only; a recipe with Lightning's is refused, with the name here"),
    "IOMixin": Base("a recipe keeps what an object was made with"),
    "TokenizerSpec": Base("for annotations"),
    "GPTConfig": _refused("use MixtralConfig and its fields"),
    "deploy": _SERVE,
    "prune": _COMPRESS,
    "distill": _COMPRESS,
    "ptq": _COMPRESS,
    "gpt_data_step": _STEP,
    "gpt_forward_step": _STEP,
    "MaskedTokenLossReduction": _STEP,
    "HFAutoModelForCausalLM": _refused("use MixtralModel, which import_ckpt fills from a Hugging Face folder"),
    "HFDatasetDataModule": _HUB_DATA,
    "HFDatasetDataModulePacked": _HUB_DATA,
    "hf_dataset": _HUB_DATA,
    "dolly": _HUB_DATA,
    "hf_auto_model_for_causal_lm": _refused("use mixtral_8x7b or mixtral_8x22b"),
    "AlpacaDataModule": _refused("use ChatDataModule(dataset_root='tatsu-lab/alpaca')"),
    "DollyDataModule": _HUB_DATA,
    "MLPerfGovReportDataModule": _HUB_DATA,
    "HFMockDataModule": _refused("use MockDataModule"),
    "prepare_packed_sequence_data": _refused("packs are made when a run starts, and cached"),
    "create_sft_dataset": _refused("use FineTuningDataModule or ChatDataModule"),
    "SentencePieceTokenizer": _refused("use get_nmt_tokenizer(library='sentencepiece', tokenizer_model=FILE)"),
    "get_tokenizer": _refused("use AutoTokenizer(pretrained_model_name)"),
    "build_pretraining_datamodule": _refused("PreTrainingDataModule builds itself"),
    "CanonicalLoRA": _refused("use LoRA; `export` can write its adapters as peft has them"),
    "merge_lora": _MERGE,
    "export_lora": _MERGE,
    "gpt_lora": _refused("use LoRA()"),
    "HFMixtralImporter": _CONVERT,
    "HFMixtralExporter": _CONVERT,
    "load_connector_from_trainer_ckpt": _CONVERT,
    "ModelConnector": _CONVERT,
    "load_context": _CONTEXT,
    "track_io": _CONTEXT,
    "OptimizerModule": Base("for annotations; the optimizer is a MegatronOptimizerModule"),
    "LRSchedulerModule": Base("for annotations; the schedules are CosineAnnealingScheduler and the Warmup... ones"),
    "ModelTransform": Base("for annotations; the adapters are LoRA and DoRA"),
    "PEFT": Base("for annotations; the adapters are LoRA and DoRA"),
    "LayerFreezer": _refused("use LoRA; or model.config.freeze_router for the router alone"),
    "Fabric": _STRATEGY,
    "FabricMegatronStrategy": _STRATEGY,
    "FabricMegatronMixedPrecision": _refused("use MegatronMixedPrecision"),
    "FSDPStrategy": _STRATEGY,
    "FSDP2Strategy": _STRATEGY,
    "ParallelismConfig": _refused("use MegatronStrategy, or layout.topology.Topology"),
    "PytorchOptimizerModule": _OPTIMIZER,
    "pytorch_adam_with_cosine_annealing": _OPTIMIZER,
    "pytorch_adam_with_flat_lr": _OPTIMIZER,
    "te_adam_with_cosine_annealing": _OPTIMIZER,
    "te_adam_with_flat_lr": _OPTIMIZER,
    "sgd": _OPTIMIZER,
    "SquareAnnealingScheduler": _SCHEDULE,
    "SquareRootAnnealingScheduler": _SCHEDULE,
    "NoamAnnealingScheduler": _SCHEDULE,
    "NoamHoldAnnealingScheduler": _SCHEDULE,
    "InverseSquareRootAnnealingScheduler": _SCHEDULE,
    "T5InverseSquareRootAnnealingScheduler": _SCHEDULE,
    "PolynomialDecayAnnealingScheduler": _SCHEDULE,
    "PolynomialHoldDecayAnnealingScheduler": _SCHEDULE,
    "AdapterConfig": _refused("evaluation asks the model in its own process, by no server"),
    "fp16_with_fp8_mixed": _FP16,
    "fp16_with_mxfp8_mixed": _FP16,
    "fp16_with_fp8_current_scaling_mixed": _FP16,
    "fp16_with_fp8_subchannel_scaling_mixed": _FP16,
    "JitTransform": _refused("Megatron's fused kernels are on where they run (model.config.accelerate)"),
    "JitConfig": _refused("Megatron's fused kernels are on where they run (model.config.accelerate)"),
    "ModelCallback": _OTHER_LOOP,
    "DeepEPCallback": _refused("set model.config.moe_enable_deepep and moe_token_dispatcher_type='flex'"),
    "MegatronEnableExperimentalCallback": _refused("set what you need of it in model.config"),
    "DdpParityChecker": _refused("compare two checkpoints with the command verify"),
    "EarlyStopping": _refused("set trainer.max_steps; log.ckpt.monitor keeps the best checkpoints"),
    "DeltaTimingCallback": _refused("use TimingCallback"),
    "seed_everything": _refused("set trainer.seed"),
    "rank_zero_only": _refused("ask torch.distributed.get_rank() == 0"),
    "straggler_det_callback": _refused("set trainer.hang_timeout_seconds"),
    "get_vocab_size": _refused("the embedding is padded by model.config.make_vocab_size_divisible_by"),
    "teardown": _refused("a run ends its process groups itself"),
    "setup_model_and_tokenizer": _refused("use generate(path, prompts=...)"),
    "setup_mcore_engine": _refused("use generate(path, prompts=...)"),
    "is_multistorageclient_url": _refused("copy the files to a file system"),
    "configure_no_restart_validation_training_loop": Ignored("a resumed run does not begin with a validation"),
    "FLOPsMeasurementCallback": Ignored(_REPORTED),
    "MemoryMonitor": Ignored(_REPORTED),
    "SpeedMonitor": Ignored(_REPORTED),
    "RuntimeEstimator": Ignored(_REPORTED),
    "LearningRateMonitor": Ignored("every logged step has the gradient norm and the learning rate"),
    "OptimizerMonitor": Ignored("every logged step has the gradient norm and the learning rate"),
    "ProgressPrinter": Ignored("a bar is shown on a terminal, lines elsewhere"),
    "TQDMProgressBar": Ignored("a bar is shown on a terminal, lines elsewhere"),
    "RichProgressBar": Ignored("a bar is shown on a terminal, lines elsewhere"),
    "MegatronProgressBar": Ignored("a bar is shown on a terminal, lines elsewhere"),
    "ModelTrainingStateCallback": Ignored("validation leaves the model as it found it"),
    "ParameterDebugger": Ignored("a loss that is not finite names the layer it came from"),
    "TritonCacheSetup": Ignored("Triton needs no help with its cache"),
}

# Modules of NeMo's that are not here, with all below them -> what replaces them.
ELSEWHERE: dict[str, str] = {
    "collections.llm.deploy": _SERVE.why,
    "collections.llm.evaluation.base": "evaluate asks the model in its own process, by no server",
    "collections.llm.modelopt": _COMPRESS.why,
    "collections.llm.recipes.tp_overlap_configs": (
        "leave tp_comm_overlap_cfg out, as Transformer Engine's own buffers are used"
    ),
    "collections.llm.tools": (
        "`mixtral-recipes plan --recipe mixtral_8x7b --max-gpus 64` finds the fastest layout, and runs nothing"
    ),
    "deploy": _SERVE.why,
    "export": _SERVE.why,
    "utils.get_rank": "ask torch.distributed.get_rank() == 0",
    "": "this package has what NeMo's Mixtral scripts use; docs/reference/nemo.md lists it",
}

# Lightning's packages, whose modules the ones below `lightning.pytorch` stand for too.
LIGHTNINGS = ("lightning.pytorch", "pytorch_lightning")


def instead_of(module: str) -> str:
    """What replaces a module of NeMo's (below ``nemo.``) that is not here."""
    while module and module not in ELSEWHERE:
        module = module.rpartition(".")[0]
    return ELSEWHERE[module]


def lightnings_module(module: str) -> str | None:
    """The module below ``mixtral_recipes.`` that stands for one of Lightning's; None where none does."""
    for package in LIGHTNINGS:
        if module == package or module.startswith(f"{package}."):
            ours = f"lightning.pytorch{module.removeprefix(package)}"
            return ours if ours in MODULES else None
    return None


def name_here(spelling: str) -> str | None:
    """The name here of what has this path in NeMo or Lightning (``nemo.lightning.pytorch.trainer.Trainer``).

    Returns:
        None if no module of theirs that is in the table has this path.
    """
    module, _, name = spelling.rpartition(".")
    below = module.removeprefix("nemo.") if module.startswith("nemo.") else lightnings_module(module)
    if below not in MODULES:
        return None
    rule = NAMES.get(name)
    return rule.to if isinstance(rule, Renamed) else name
