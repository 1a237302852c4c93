"""The table, second part: NeMo's modules, and the names in them that are something else here, or are not.

A name without an entry is what it was: the module that stands here for NeMo's has it. Standard library only, as
`migrate` reads this without loading torch.
"""

from mixtral_recipes.settings.nemo.rules import Base, Ignored, Only, Renamed, each

# Our module (below ``mixtral_recipes.``; "" is the package itself) -> those of NeMo's (below ``nemo.``) it stands for.
_STANDS_FOR = {
    "": (
        "collections collections.llm collections.llm.gpt collections.llm.gpt.data collections.llm.gpt.data.alpaca "
        "collections.llm.gpt.data.dolly collections.llm.gpt.data.hf_dataset "
        "collections.llm.gpt.data.mlperf_govreport collections.llm.gpt.model "
        "collections.llm.gpt.model.hf_auto_model_for_causal_lm collections.llm.recipes.callbacks "
        "collections.llm.recipes.callbacks.common collections.llm.recipes.run collections.common collections.nlp "
        "collections.nlp.modules collections.nlp.modules.common lightning lightning.fabric lightning.fabric.fabric "
        "lightning.fabric.plugins lightning.fabric.strategies lightning.io lightning.io.mixin "
        "lightning.megatron_parallel lightning.pytorch lightning.pytorch.callbacks "
        "lightning.pytorch.callbacks.callback lightning.pytorch.callbacks.ddp_parity_checker "
        "lightning.pytorch.callbacks.debugging lightning.pytorch.callbacks.deepep "
        "lightning.pytorch.callbacks.jit_transform lightning.pytorch.callbacks.layer_freezer "
        "lightning.pytorch.callbacks.megatron_enable_experimental_callback "
        "lightning.pytorch.callbacks.memory_callback lightning.pytorch.callbacks.model_callback "
        "lightning.pytorch.callbacks.model_transform lightning.pytorch.callbacks.optimizer_monitor "
        "lightning.pytorch.callbacks.progress_bar lightning.pytorch.callbacks.runtime_estimator "
        "lightning.pytorch.callbacks.speed_monitor lightning.pytorch.optim.pytorch "
        "lightning.pytorch.strategies.fsdp2_strategy lightning.pytorch.strategies.fsdp_strategy utils "
        "utils.msc_utils"
    ),
    "api": "collections.llm.api collections.llm.inference collections.llm.inference.base lightning.io.api",
    "recipes.data": "collections.llm.gpt.data.api",
    "data.modules.chat": "collections.llm.gpt.data.chat",
    "system.home": "collections.llm.gpt.data.core lightning.base",
    "data.modules.finetuning": "collections.llm.gpt.data.fine_tuning",
    "data.modules.mock": "collections.llm.gpt.data.mock",
    "settings.data": "collections.llm.gpt.data.packed_sequence",
    "data.modules.pretraining": "collections.llm.gpt.data.pre_training",
    "data.modules.squad": "collections.llm.gpt.data.squad",
    "models.config": "collections.llm.gpt.model.base collections.llm.gpt.model.mixtral",
    "settings.peft": (
        "collections.llm.peft collections.llm.peft.api collections.llm.peft.canonical_lora collections.llm.peft.dora "
        "collections.llm.peft.lora lightning.pytorch.callbacks.peft"
    ),
    "recipes": "collections.llm.recipes",
    "recipes.finetune_default": "collections.llm.recipes.finetune_default",
    "training.watch.callbacks": (  # NeMo's benchmarks take a callback from llama3_8b
        "collections.llm.recipes.llama3_8b lightning.pytorch.callbacks.flops_callback "
        "lightning.pytorch.callbacks.garbage_collection lightning.pytorch.callbacks.megatron_comm_overlap "
        "lightning.pytorch.callbacks.moe_token_drop lightning.pytorch.callbacks.preemption "
        "lightning.pytorch.callbacks.progress_printer utils.exp_manager"
    ),
    "recipes.log": "collections.llm.recipes.log",
    "recipes.log.default": "collections.llm.recipes.log.default",
    "recipes.mixtral_8x22b": "collections.llm.recipes.mixtral_8x22b",
    "recipes.mixtral_8x22b_64k": "collections.llm.recipes.mixtral_8x22b_64k",
    "recipes.mixtral_8x7b": "collections.llm.recipes.mixtral_8x7b",
    "recipes.mixtral_8x7b_16k": "collections.llm.recipes.mixtral_8x7b_16k",
    "recipes.mixtral_8x7b_64k": "collections.llm.recipes.mixtral_8x7b_64k",
    "recipes.optim": "collections.llm.recipes.optim",
    "recipes.optim.adam": "collections.llm.recipes.optim.adam",
    "recipes.precision": "collections.llm.recipes.precision",
    "recipes.precision.mixed_precision": "collections.llm.recipes.precision.mixed_precision",
    "executors.torchrun": "collections.llm.recipes.run.executor",
    "settings.evaluation": "collections.llm.evaluation collections.llm.evaluation.api",
    "settings.tokenizer": (
        "collections.common.tokenizers collections.common.tokenizers.huggingface "
        "collections.common.tokenizers.huggingface.auto_tokenizer collections.common.tokenizers.null_tokenizer "
        "collections.common.tokenizers.sentencepiece_tokenizer collections.common.tokenizers.tokenizer_spec "
        "collections.nlp.modules.common.tokenizer_utils"
    ),
    "settings.optim": (
        "lightning.lr_scheduler lightning.pytorch.optim lightning.pytorch.optim.base "
        "lightning.pytorch.optim.lr_scheduler lightning.pytorch.optim.megatron"
    ),
    "settings.log": (
        "lightning.nemo_logger lightning.pytorch.loggers lightning.pytorch.loggers.tensorboard "
        "lightning.pytorch.loggers.wandb"
    ),
    "settings.resume": "lightning.resume lightning.pytorch.strategies.utils",
    "executors.plugins": "lightning.run lightning.run.plugins",
    "training.watch.profiling": (
        "lightning.pytorch.callbacks.memory_profiler lightning.pytorch.callbacks.nsys "
        "lightning.pytorch.callbacks.pytorch_profiler"
    ),
    "settings.checkpoint": "lightning.pytorch.callbacks.model_checkpoint",
    "settings.precision": "lightning.pytorch.plugins lightning.pytorch.plugins.mixed_precision",
    "data.modules.lightning": "lightning.pytorch.plugins.data_sampler",
    "settings.trainer": (
        "lightning.pytorch.strategies lightning.pytorch.strategies.megatron_strategy lightning.pytorch.trainer"
    ),
}
MODULES = {nemo: ours for ours, names in _STANDS_FOR.items() for nemo in names.split()}


def _refused(instead: str) -> Only:
    return Only(None, instead)


_SERVE = _refused("export the checkpoint and serve the folder, e.g. with `vllm serve FOLDER`")
_COMPRESS = _refused("export the checkpoint and work on the folder, e.g. with NVIDIA's ModelOpt")

# Name -> what became of it, in whichever of the modules it stands. `Only(None, ...)` is a name that is not here.
NAMES: dict[str, Base | Ignored | Only | Renamed] = {
    **each(Renamed("MixtralModel"), "GPTModel LightningModule"),
    "LightningDataModule": Base("a data module only needs train_dataloader(); see own-data.md"),
    "Callback": Base("a callback only needs hooks; Lightning's hooks are refused with an error that names ours"),
    "IOMixin": Base("a recipe records the arguments that an object is made with"),
    "TokenizerSpec": Base("for type annotations"),
    "GPTConfig": _refused("use MixtralConfig and its fields"),
    "deploy": _SERVE,
    **each(_COMPRESS, "prune distill ptq"),
    **each(
        _refused("the training step is mixtral_recipes/training/step.py"),
        "gpt_data_step gpt_forward_step MaskedTokenLossReduction",
    ),
    "HFAutoModelForCausalLM": _refused("use MixtralModel, which import_ckpt fills from a Hugging Face folder"),
    **each(
        _refused("use FineTuningDataModule or ChatDataModule with dataset_root='ORG/NAME'"),
        "HFDatasetDataModule HFDatasetDataModulePacked hf_dataset dolly DollyDataModule MLPerfGovReportDataModule",
    ),
    "hf_auto_model_for_causal_lm": _refused("use mixtral_8x7b or mixtral_8x22b"),
    "AlpacaDataModule": _refused("use ChatDataModule(dataset_root='tatsu-lab/alpaca')"),
    "HFMockDataModule": _refused("use MockDataModule"),
    "prepare_packed_sequence_data": _refused("packs are built when a run starts, and cached"),
    "create_sft_dataset": _refused("use FineTuningDataModule or ChatDataModule"),
    "SentencePieceTokenizer": _refused("use get_nmt_tokenizer(library='sentencepiece', tokenizer_model=FILE)"),
    "get_tokenizer": _refused("use AutoTokenizer(pretrained_model_name)"),
    "build_pretraining_datamodule": _refused("PreTrainingDataModule builds itself"),
    "CanonicalLoRA": _refused("use LoRA; `export` can write its adapters in peft's format"),
    **each(
        _refused("use export_ckpt(path, target='hf'), which merges adapters into their base"), "merge_lora export_lora"
    ),
    "gpt_lora": _refused("use LoRA()"),
    **each(
        _refused("import_ckpt and export_ckpt convert weights with the table in mixtral_recipes/importers/mapping.py"),
        "HFMixtralImporter HFMixtralExporter load_connector_from_trainer_ckpt ModelConnector",
    ),
    **each(
        _refused("a checkpoint's context folder holds its settings as YAML; import_ckpt and export_ckpt convert it"),
        "load_context track_io",
    ),
    "OptimizerModule": Base("for type annotations; the optimizer is a MegatronOptimizerModule"),
    "LRSchedulerModule": Base(
        "for type annotations; the schedules are CosineAnnealingScheduler and the Warmup... ones"
    ),
    **each(Base("for type annotations; the adapters are LoRA and DoRA"), "ModelTransform PEFT"),
    "LayerFreezer": _refused("use LoRA, or model.config.freeze_router for the router alone"),
    **each(_refused("use MegatronStrategy"), "Fabric FabricMegatronStrategy FSDPStrategy FSDP2Strategy"),
    "FabricMegatronMixedPrecision": _refused("use MegatronMixedPrecision"),
    "ParallelismConfig": _refused("use MegatronStrategy, or layout.topology.Topology"),
    **each(
        _refused("use MegatronOptimizerModule(config=OptimizerConfig(lr=...)), which is Adam"),
        "PytorchOptimizerModule pytorch_adam_with_cosine_annealing pytorch_adam_with_flat_lr "
        "te_adam_with_cosine_annealing te_adam_with_flat_lr sgd",
    ),
    **each(
        _refused("use CosineAnnealingScheduler, or one of the Warmup... schedulers"),
        "SquareAnnealingScheduler SquareRootAnnealingScheduler NoamAnnealingScheduler NoamHoldAnnealingScheduler "
        "InverseSquareRootAnnealingScheduler T5InverseSquareRootAnnealingScheduler PolynomialDecayAnnealingScheduler "
        "PolynomialHoldDecayAnnealingScheduler",
    ),
    "AdapterConfig": _refused("evaluation runs the model itself, without a server"),
    **each(
        _refused("use bf16_with_fp8_mixed or another of the bf16_with_... functions"),
        "fp16_with_fp8_mixed fp16_with_mxfp8_mixed fp16_with_fp8_current_scaling_mixed "
        "fp16_with_fp8_subchannel_scaling_mixed",
    ),
    **each(
        _refused("Megatron's fused kernels are enabled where they can run (model.config.accelerate)"),
        "JitTransform JitConfig",
    ),
    "ModelCallback": _refused("write a callback with the hooks of training/watch/callbacks.py"),
    "DeepEPCallback": _refused("set model.config.moe_enable_deepep and moe_token_dispatcher_type='flex'"),
    "MegatronEnableExperimentalCallback": _refused("set the features you need in model.config"),
    "DdpParityChecker": _refused("compare two checkpoints with the verify command"),
    "EarlyStopping": _refused("set trainer.max_steps; log.ckpt.monitor keeps the best checkpoints"),
    "DeltaTimingCallback": _refused("use TimingCallback"),
    "seed_everything": _refused("set trainer.seed"),
    "rank_zero_only": _refused("use torch.distributed.get_rank() == 0"),
    "straggler_det_callback": _refused("set trainer.hang_timeout_seconds"),
    "get_vocab_size": _refused("the embedding is padded according to model.config.make_vocab_size_divisible_by"),
    "teardown": _refused("a run destroys its own process groups"),
    **each(_refused("use generate(path, prompts=...)"), "setup_model_and_tokenizer setup_mcore_engine"),
    "is_multistorageclient_url": _refused("copy the files to a mounted file system"),
    "configure_no_restart_validation_training_loop": Ignored("a resumed run does not start with validation"),
    **each(
        Ignored("every logged step includes it"), "FLOPsMeasurementCallback MemoryMonitor SpeedMonitor RuntimeEstimator"
    ),
    **each(
        Ignored("every logged step includes the gradient norm and the learning rate"),
        "LearningRateMonitor OptimizerMonitor",
    ),
    **each(
        Ignored("progress is shown as a bar on a terminal, and as lines elsewhere"),
        "ProgressPrinter TQDMProgressBar RichProgressBar MegatronProgressBar",
    ),
    "ModelTrainingStateCallback": Ignored("validation leaves the model as it found it"),
    "ParameterDebugger": Ignored("if a loss is not finite, the error names the layer where it started"),
    "TritonCacheSetup": Ignored("Triton's cache needs no setup"),
}

# Modules of NeMo's that are not here, with all below them -> what replaces them.
ELSEWHERE: dict[str, str] = {
    "collections.llm.deploy": _SERVE.why,
    "collections.llm.evaluation.base": "evaluate runs the model itself, without a server",
    "collections.llm.modelopt": _COMPRESS.why,
    "collections.llm.recipes.tp_overlap_configs": (
        "leave out tp_comm_overlap_cfg; Transformer Engine's own buffers are used"
    ),
    "collections.llm.tools": (
        "`mixtral-recipes plan --recipe mixtral_8x7b --max-gpus 64` finds the fastest layout without running anything"
    ),
    "deploy": _SERVE.why,
    "export": _SERVE.why,
    "utils.get_rank": "use torch.distributed.get_rank() == 0",
    "": "mixtral-recipes has only what NeMo's Mixtral scripts use; docs/reference/nemo.md lists it",
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
