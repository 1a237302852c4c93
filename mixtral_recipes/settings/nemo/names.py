"""The table, second part: NeMo's modules, and the names in them that are something else here, or are not.

A name without an entry is what it was: the module that stands here for NeMo's has it. Standard library only, as
`migrate` reads this without loading torch.
"""

from mixtral_recipes.settings.nemo.rules import Ignored, Only, Renamed

# NeMo's module (below ``nemo.``) -> the one that stands for it (below ``mixtral_recipes.``; "" is the package itself).
MODULES: dict[str, str] = {
    "collections": "",
    "collections.llm": "",
    "collections.llm.api": "api",
    "collections.llm.gpt": "",
    "collections.llm.gpt.data": "",
    "collections.llm.gpt.data.chat": "data.modules.chat",
    "collections.llm.gpt.data.fine_tuning": "data.modules.finetuning",
    "collections.llm.gpt.data.mock": "data.modules.mock",
    "collections.llm.gpt.data.packed_sequence": "settings.data",
    "collections.llm.gpt.data.pre_training": "data.modules.pretraining",
    "collections.llm.gpt.data.squad": "data.modules.squad",
    "collections.llm.gpt.model": "",
    "collections.llm.gpt.model.base": "models.config",
    "collections.llm.gpt.model.mixtral": "models.config",
    "collections.llm.peft": "settings.peft",
    "collections.llm.peft.api": "settings.peft",
    "collections.llm.peft.dora": "settings.peft",
    "collections.llm.peft.lora": "settings.peft",
    "collections.llm.recipes": "recipes",
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
    "collections.llm.evaluation": "settings.evaluation",
    "collections.llm.evaluation.api": "settings.evaluation",
    "collections.common": "",
    "collections.common.tokenizers": "settings.tokenizer",
    "collections.common.tokenizers.huggingface": "settings.tokenizer",
    "collections.common.tokenizers.huggingface.auto_tokenizer": "settings.tokenizer",
    "collections.nlp": "",
    "collections.nlp.modules": "",
    "collections.nlp.modules.common": "",
    "collections.nlp.modules.common.tokenizer_utils": "settings.tokenizer",
    "lightning": "",
    "lightning.base": "system.home",
    "lightning.lr_scheduler": "settings.optim",
    "lightning.nemo_logger": "settings.log",
    "lightning.resume": "settings.resume",
    "lightning.run": "executors.plugins",
    "lightning.run.plugins": "executors.plugins",
    "lightning.pytorch": "",
    "lightning.pytorch.callbacks": "",
    "lightning.pytorch.callbacks.flops_callback": "training.watch.callbacks",
    "lightning.pytorch.callbacks.garbage_collection": "training.watch.callbacks",
    "lightning.pytorch.callbacks.megatron_comm_overlap": "training.watch.callbacks",
    "lightning.pytorch.callbacks.memory_profiler": "training.watch.profiling",
    "lightning.pytorch.callbacks.model_checkpoint": "settings.checkpoint",
    "lightning.pytorch.callbacks.moe_token_drop": "training.watch.callbacks",
    "lightning.pytorch.callbacks.nsys": "training.watch.profiling",
    "lightning.pytorch.callbacks.preemption": "training.watch.callbacks",
    "lightning.pytorch.callbacks.progress_printer": "training.watch.callbacks",
    "lightning.pytorch.callbacks.pytorch_profiler": "training.watch.profiling",
    "lightning.pytorch.optim": "settings.optim",
    "lightning.pytorch.optim.base": "settings.optim",
    "lightning.pytorch.optim.lr_scheduler": "settings.optim",
    "lightning.pytorch.optim.megatron": "settings.optim",
    "lightning.pytorch.plugins": "settings.precision",
    "lightning.pytorch.plugins.mixed_precision": "settings.precision",
    "lightning.pytorch.strategies": "settings.trainer",
    "lightning.pytorch.strategies.megatron_strategy": "settings.trainer",
    "lightning.pytorch.strategies.utils": "settings.resume",
    "lightning.pytorch.trainer": "settings.trainer",
    "utils": "",
    "utils.exp_manager": "training.watch.callbacks",
}


def _refused(instead: str) -> Only:
    return Only(None, instead)


_SERVE = _refused("export the checkpoint and serve the folder, e.g. with `vllm serve FOLDER`")
_COMPRESS = _refused("export the checkpoint and work on the folder, e.g. with NVIDIA's ModelOpt")
_STEP = _refused("the step is mixtral_recipes/training/step.py")
_OPTIMIZER = _refused("use MegatronOptimizerModule(config=OptimizerConfig(optimizer=...))")
_SCHEDULE = _refused("use CosineAnnealingScheduler, or one of the Warmup... schedulers")
_STRATEGY = _refused("use MegatronStrategy")
_ADAPTERS = _refused("use LoRA or DoRA")
_HUB_DATA = _refused("use FineTuningDataModule or ChatDataModule with dataset_root='ORG/NAME'")
_MERGE = _refused("use export_ckpt(path, target='hf'), which merges adapters into their base")
_REPORTED = "every logged step has it"
_OTHER_LOOP = _refused("write a callback with the hooks of training/watch/callbacks.py")

# Name -> what became of it, in whichever of the modules it stands. `Only(None, ...)` is a name that is not here.
NAMES: dict[str, Ignored | Only | Renamed] = {
    "GPTModel": Renamed("MixtralModel"),
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
    "AlpacaDataModule": _refused("use ChatDataModule(dataset_root='tatsu-lab/alpaca')"),
    "DollyDataModule": _HUB_DATA,
    "MLPerfGovReportDataModule": _HUB_DATA,
    "HFMockDataModule": _refused("use MockDataModule"),
    "build_pretraining_datamodule": _refused("PreTrainingDataModule builds itself"),
    "CanonicalLoRA": _refused("use LoRA; `export` can write its adapters as peft has them"),
    "merge_lora": _MERGE,
    "export_lora": _MERGE,
    "gpt_lora": _refused("use LoRA()"),
    "PEFT": _ADAPTERS,
    "ModelTransform": _ADAPTERS,
    "LayerFreezer": _refused("use LoRA; or model.config.freeze_router for the router alone"),
    "Fabric": _STRATEGY,
    "FabricMegatronStrategy": _STRATEGY,
    "FabricMegatronMixedPrecision": _refused("use MegatronMixedPrecision"),
    "FSDPStrategy": _STRATEGY,
    "FSDP2Strategy": _STRATEGY,
    "ParallelismConfig": _refused("use MegatronStrategy, or layout.topology.Topology"),
    "MegatronDataSampler": _refused("data modules sample by themselves; see data.micro_batch_size"),
    "OptimizerModule": _OPTIMIZER,
    "PytorchOptimizerModule": _OPTIMIZER,
    "pytorch_adam_with_cosine_annealing": _OPTIMIZER,
    "pytorch_adam_with_flat_lr": _OPTIMIZER,
    "te_adam_with_cosine_annealing": _OPTIMIZER,
    "te_adam_with_flat_lr": _OPTIMIZER,
    "sgd": _OPTIMIZER,
    "LRSchedulerModule": _SCHEDULE,
    "SquareAnnealingScheduler": _SCHEDULE,
    "SquareRootAnnealingScheduler": _SCHEDULE,
    "NoamAnnealingScheduler": _SCHEDULE,
    "NoamHoldAnnealingScheduler": _SCHEDULE,
    "InverseSquareRootAnnealingScheduler": _SCHEDULE,
    "T5InverseSquareRootAnnealingScheduler": _SCHEDULE,
    "PolynomialDecayAnnealingScheduler": _SCHEDULE,
    "PolynomialHoldDecayAnnealingScheduler": _SCHEDULE,
    "AdapterConfig": _refused("evaluation asks the model in its own process, by no server"),
    "JitTransform": _refused("Megatron's fused kernels are on where they run (model.config.accelerate)"),
    "JitConfig": _refused("Megatron's fused kernels are on where they run (model.config.accelerate)"),
    "ModelCallback": _OTHER_LOOP,
    "DeepEPCallback": _refused("set model.config.moe_enable_deepep and moe_token_dispatcher_type='flex'"),
    "MegatronEnableExperimentalCallback": _refused("set what you need of it in model.config"),
    "DdpParityChecker": _refused("compare two checkpoints with the command verify"),
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
    "OptimizerMonitor": Ignored("every logged step has the gradient norm and the learning rate"),
    "ProgressPrinter": Ignored("a bar is shown on a terminal, lines elsewhere"),
    "MegatronProgressBar": Ignored("a bar is shown on a terminal, lines elsewhere"),
    "ModelTrainingStateCallback": Ignored("validation leaves the model as it found it"),
    "ParameterDebugger": Ignored("a loss that is not finite names the layer it came from"),
    "TritonCacheSetup": Ignored("Triton needs no help with its cache"),
}

# Third parties' names that stand in NeMo scripts -> ours.
LIGHTNINGS: dict[str, str] = dict.fromkeys(
    ("lightning.pytorch.loggers", "pytorch_lightning.loggers", "lightning.pytorch.loggers.wandb"), "settings.log"
)
