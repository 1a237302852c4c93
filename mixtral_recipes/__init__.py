"""Mixtral recipes on Megatron-Core. ``import mixtral_recipes as llm`` reads like NeMo 2.0's ``llm`` collection.

Every name is loaded when it is first used (PEP 562): importing this package loads neither torch, Megatron nor nemo_run.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module; recipe modules stand for themselves.
_NAMES = {
    "pretrain": "api",
    "finetune": "api",
    "validate": "api",
    "import_ckpt": "api",
    "export_ckpt": "api",
    "generate": "api",
    "evaluate": "api",
    "MixtralModel": "models.config",
    "MixtralConfig": "models.config",
    "MixtralConfig8x3B": "models.config",
    "MixtralConfig8x7B": "models.config",
    "MixtralConfig8x22B": "models.config",
    "MixtralConfigTiny": "models.config",
    "Trainer": "training.trainer",
    "MegatronStrategy": "training.trainer",
    "MegatronMixedPrecision": "training.precision",
    "MegatronOptimizerModule": "training.optimizer",
    "CosineAnnealingScheduler": "training.optimizer",
    "MockDataModule": "data.mock",
    "SquadDataModule": "data.squad",
    "FineTuningDataModule": "data.finetuning",
    "PreTrainingDataModule": "data.pretraining",
    "ChatDataModule": "data.chat",
    "PackedSequenceSpecs": "data.packing",
    "LoRA": "peft.lora",
    "DoRA": "peft.dora",
    "AutoResume": "training.resume",
    "RestoreConfig": "training.resume",
    "ModelCheckpoint": "training.checkpoint",
    "NeMoLogger": "training.metrics",
    "TensorBoardLogger": "training.metrics",
    "WandbLogger": "training.metrics",
    "TimingCallback": "training.callbacks",
    "GarbageCollectionCallback": "training.callbacks",
    "MegatronCommOverlapCallback": "training.callbacks",
    "MegatronTokenDropCallback": "training.callbacks",
    "PreemptionCallback": "training.callbacks",
    "Topology": "topology",
}
_RECIPES = (
    "mixtral_8x7b",
    "mixtral_tiny",
)

__all__ = ["__version__", *_NAMES, *_RECIPES]  # noqa: PLE0604  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    elif name in _RECIPES:
        value = importlib.import_module(f"{__name__}.recipes.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
