"""Mixtral recipes on Megatron-Core. ``import mixtral_recipes as llm`` reads like NeMo 2.0's ``llm`` collection.

Every name is loaded when it is first used (PEP 562): importing this package loads neither torch, Megatron nor nemo_run.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mixtral_recipes.cpu import lazy_compile as _lazy_compile
from mixtral_recipes.settings.classes import PUBLIC as _PUBLIC
from mixtral_recipes.settings.classes import load as _load
from mixtral_recipes.settings.nemo import finder as _finder
from mixtral_recipes.system import quiet as _quiet

if TYPE_CHECKING:  # what type checkers and editors see
    from mixtral_recipes.api import evaluate as evaluate
    from mixtral_recipes.api import export_ckpt as export_ckpt
    from mixtral_recipes.api import finetune as finetune
    from mixtral_recipes.api import generate as generate
    from mixtral_recipes.api import import_ckpt as import_ckpt
    from mixtral_recipes.api import pretrain as pretrain
    from mixtral_recipes.api import train as train
    from mixtral_recipes.api import validate as validate
    from mixtral_recipes.data.modules.base import DataModule as DataModule
    from mixtral_recipes.data.modules.chat import ChatDataModule as ChatDataModule
    from mixtral_recipes.data.modules.finetuning import FineTuningDataModule as FineTuningDataModule
    from mixtral_recipes.data.modules.lightning import LightningAdapter as LightningAdapter
    from mixtral_recipes.data.modules.lightning import MegatronDataSampler as MegatronDataSampler
    from mixtral_recipes.data.modules.mixed import MixedDataModule as MixedDataModule
    from mixtral_recipes.data.modules.mock import MockDataModule as MockDataModule
    from mixtral_recipes.data.modules.pretraining import PreTrainingDataModule as PreTrainingDataModule
    from mixtral_recipes.data.modules.squad import SquadDataModule as SquadDataModule
    from mixtral_recipes.executors.torchrun import torchrun as torchrun
    from mixtral_recipes.layout.topology import Topology as Topology
    from mixtral_recipes.models.config import MixtralConfig as MixtralConfig
    from mixtral_recipes.models.config import MixtralConfig8x3B as MixtralConfig8x3B
    from mixtral_recipes.models.config import MixtralConfig8x7B as MixtralConfig8x7B
    from mixtral_recipes.models.config import MixtralConfig8x22B as MixtralConfig8x22B
    from mixtral_recipes.models.config import MixtralConfigTiny as MixtralConfigTiny
    from mixtral_recipes.models.config import MixtralModel as MixtralModel
    from mixtral_recipes.recipes import mixtral_8x3b as mixtral_8x3b
    from mixtral_recipes.recipes import mixtral_8x7b as mixtral_8x7b
    from mixtral_recipes.recipes import mixtral_8x7b_16k as mixtral_8x7b_16k
    from mixtral_recipes.recipes import mixtral_8x7b_64k as mixtral_8x7b_64k
    from mixtral_recipes.recipes import mixtral_8x22b as mixtral_8x22b
    from mixtral_recipes.recipes import mixtral_8x22b_16k as mixtral_8x22b_16k
    from mixtral_recipes.recipes import mixtral_8x22b_64k as mixtral_8x22b_64k
    from mixtral_recipes.recipes import mixtral_tiny as mixtral_tiny
    from mixtral_recipes.recipes.data import mock as mock
    from mixtral_recipes.recipes.data import squad as squad
    from mixtral_recipes.recipes.log.default import default_log as default_log
    from mixtral_recipes.recipes.log.default import default_resume as default_resume
    from mixtral_recipes.settings.checkpoint import ModelCheckpoint as ModelCheckpoint
    from mixtral_recipes.settings.data import PackedSequenceSpecs as PackedSequenceSpecs
    from mixtral_recipes.settings.evaluation import ApiEndpoint as ApiEndpoint
    from mixtral_recipes.settings.evaluation import ConfigParams as ConfigParams
    from mixtral_recipes.settings.evaluation import EvaluationConfig as EvaluationConfig
    from mixtral_recipes.settings.evaluation import EvaluationTarget as EvaluationTarget
    from mixtral_recipes.settings.log import MLFlowLogger as MLFlowLogger
    from mixtral_recipes.settings.log import NeMoLogger as NeMoLogger
    from mixtral_recipes.settings.log import TensorBoardLogger as TensorBoardLogger
    from mixtral_recipes.settings.log import WandbLogger as WandbLogger
    from mixtral_recipes.settings.optim import CosineAnnealingScheduler as CosineAnnealingScheduler
    from mixtral_recipes.settings.optim import MegatronOptimizerModule as MegatronOptimizerModule
    from mixtral_recipes.settings.optim import WarmupAnnealingScheduler as WarmupAnnealingScheduler
    from mixtral_recipes.settings.optim import WarmupHoldAnnealScheduler as WarmupHoldAnnealScheduler
    from mixtral_recipes.settings.optim import WarmupHoldPolicyScheduler as WarmupHoldPolicyScheduler
    from mixtral_recipes.settings.optim import WarmupPolicyScheduler as WarmupPolicyScheduler
    from mixtral_recipes.settings.peft import DoRA as DoRA
    from mixtral_recipes.settings.peft import LoRA as LoRA
    from mixtral_recipes.settings.peft import QLoRA as QLoRA
    from mixtral_recipes.settings.precision import MegatronMixedPrecision as MegatronMixedPrecision
    from mixtral_recipes.settings.resume import AutoResume as AutoResume
    from mixtral_recipes.settings.resume import RestoreConfig as RestoreConfig
    from mixtral_recipes.settings.tokenizer import AutoTokenizer as AutoTokenizer
    from mixtral_recipes.settings.tokenizer import NullTokenizer as NullTokenizer
    from mixtral_recipes.settings.tokenizer import get_nmt_tokenizer as get_nmt_tokenizer
    from mixtral_recipes.settings.trainer import MegatronStrategy as MegatronStrategy
    from mixtral_recipes.settings.trainer import Trainer as Trainer
    from mixtral_recipes.training.watch.callbacks import GarbageCollectionCallback as GarbageCollectionCallback
    from mixtral_recipes.training.watch.callbacks import MegatronCommOverlapCallback as MegatronCommOverlapCallback
    from mixtral_recipes.training.watch.callbacks import MegatronTokenDropCallback as MegatronTokenDropCallback
    from mixtral_recipes.training.watch.callbacks import PreemptionCallback as PreemptionCallback
    from mixtral_recipes.training.watch.callbacks import TimingCallback as TimingCallback
    from mixtral_recipes.training.watch.profiling import MemoryProfileCallback as MemoryProfileCallback
    from mixtral_recipes.training.watch.profiling import NsysCallback as NsysCallback
    from mixtral_recipes.training.watch.profiling import PytorchProfilerCallback as PytorchProfilerCallback

__version__ = "0.1.0"

_RECIPES = (
    "mixtral_8x7b",
    "mixtral_8x7b_16k",
    "mixtral_8x7b_64k",
    "mixtral_8x22b",
    "mixtral_8x22b_16k",
    "mixtral_8x22b_64k",
    "mixtral_8x3b",
    "mixtral_tiny",
)

# Modules that are attributes of NeMo's collection too.
_MODULES = {"peft": "peft", "recipes": "recipes", "adam": "recipes.optim.adam"}

_quiet.libraries()
_finder.activate()
_lazy_compile.activate()

__all__ = ["__version__", *_PUBLIC, *_RECIPES]  # noqa: PLE0604  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = _load(name)
    elif name in _RECIPES:
        value = importlib.import_module(f"{__name__}.recipes.{name}")
    elif name in _MODULES:
        value = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    elif name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    else:
        from mixtral_recipes.settings.nemo.modules import attribute

        value = attribute("collections.llm", name, alone=True)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
