"""The one table of names: what ``mixtral_recipes.NAME`` is, and what a recipe file or an override may name.

Nothing outside the table is imported on a file's word: there are no prefix rules and no attribute walks. Files are
written with a class's public spelling, ``mixtral_recipes.Trainer``, which stays when the code moves. Standard library
only: importing the package reads this.
"""

import functools
import importlib
from typing import Any

from mixtral_recipes.errors import RecipeError, nearest


def _by_name(modules: dict[str, str]) -> dict[str, str]:
    """Name -> module, of the names in each module."""
    return {name: module for module, names in modules.items() for name in names.split()}


# Every class a recipe is made of, by its module. A file may write the class's name alone or with ``mixtral_recipes.``.
OURS = _by_name(
    {
        "models.config": (
            "MixtralModel MixtralConfig MixtralConfig8x3B MixtralConfig8x7B MixtralConfig8x22B MixtralConfigTiny"
        ),
        "settings.trainer": "Trainer MegatronStrategy",
        "settings.precision": "MegatronMixedPrecision",
        "settings.optim": (
            "MegatronOptimizerModule CosineAnnealingScheduler WarmupPolicyScheduler WarmupHoldPolicyScheduler "
            "WarmupAnnealingScheduler WarmupHoldAnnealScheduler"
        ),
        "data.modules.mock": "MockDataModule",
        "data.modules.squad": "SquadDataModule",
        "data.modules.finetuning": "FineTuningDataModule",
        "data.modules.pretraining": "PreTrainingDataModule",
        "data.modules.chat": "ChatDataModule",
        "data.modules.mixed": "MixedDataModule",
        "settings.data": "PackedSequenceSpecs",
        "settings.tokenizer": "AutoTokenizer NullTokenizer",
        "settings.peft": "LoRA DoRA QLoRA",
        "settings.resume": "AutoResume RestoreConfig",
        "settings.checkpoint": "ModelCheckpoint",
        "settings.log": "NeMoLogger TensorBoardLogger WandbLogger MLFlowLogger",
        "training.watch.callbacks": (
            "TimingCallback GarbageCollectionCallback MegatronCommOverlapCallback MegatronTokenDropCallback "
            "PreemptionCallback"
        ),
        "training.watch.profiling": "NsysCallback PytorchProfilerCallback MemoryProfileCallback",
    }
)
# Classes of other packages, by their own full path.
THEIRS = {
    "OptimizerConfig": "megatron.core.optimizer.optimizer_config",
    "DistributedDataParallelConfig": "megatron.core.distributed.distributed_data_parallel_config",
    "timedelta": "datetime",
}
# What a recipe calls: only at the top of a file.
TASKS = {"pretrain": "api", "finetune": "api", "train": "api"}
# Public names no recipe file may hold.
FROM_PYTHON = _by_name(
    {
        "api": "validate import_ckpt export_ckpt generate evaluate",
        "data.modules.base": "DataModule",
        "data.modules.lightning": "LightningAdapter MegatronDataSampler",
        "layout.topology": "Topology",
        "settings.tokenizer": "get_nmt_tokenizer",
        "settings.evaluation": "ApiEndpoint ConfigParams EvaluationConfig EvaluationTarget",
        "recipes.log.default": "default_log default_resume",
        "recipes.data": "mock squad",
        "executors.torchrun": "torchrun",
    }
)
# Functions that are values, e.g. of model.config.activation_func.
FUNCTIONS = dict.fromkeys(("silu", "gelu", "relu"), "torch.nn.functional")
DTYPES = ("float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2", "uint8")
# Settings that name code which Megatron imports; a file may not set them.
NAMES_CODE = ("fp8_quantizer_factory", "fp4_quantizer_factory")

# Modules that recipe files named before the code moved -> the classes they named there. Still read, never written.
FORMER = {
    "training.trainer": "Trainer MegatronStrategy",
    "training.precision": "MegatronMixedPrecision",
    "training.optimizer": "MegatronOptimizerModule CosineAnnealingScheduler",
    "training.checkpoint": "ModelCheckpoint",
    "training.resume": "AutoResume RestoreConfig",
    "training.metrics": "NeMoLogger TensorBoardLogger WandbLogger MLFlowLogger",
    "training.callbacks": (
        "TimingCallback GarbageCollectionCallback MegatronCommOverlapCallback MegatronTokenDropCallback "
        "PreemptionCallback"
    ),
    "training.profiling": "NsysCallback PytorchProfilerCallback MemoryProfileCallback",
    "data.mock": "MockDataModule",
    "data.squad": "SquadDataModule",
    "data.finetuning": "FineTuningDataModule",
    "data.pretraining": "PreTrainingDataModule",
    "data.chat": "ChatDataModule",
    "data.packing": "PackedSequenceSpecs",
    "peft.lora": "LoRA",
    "peft.dora": "DoRA",
}

# How a class of one's own gets into a recipe, for errors.
OWN = (
    " A class of your own is set in Python: write a function that returns the recipe, and name it with "
    "--recipe MODULE.FUNCTION."
)

_PACKAGE = "mixtral_recipes"
PUBLIC = OURS | TASKS | FROM_PYTHON


def load(name: str) -> Any:
    """What ``mixtral_recipes.NAME`` is, for a name in `PUBLIC`."""
    return getattr(importlib.import_module(f"{_PACKAGE}.{PUBLIC[name]}"), name)


@functools.cache
def _paths(table: str) -> dict[str, tuple[str, str]]:
    """Every spelling of a table's entries -> (module, name)."""
    ours = {"classes": OURS, "tasks": TASKS, "functions": {}}[table]
    theirs = {"classes": THEIRS, "tasks": {}, "functions": FUNCTIONS}[table]
    places = {name: f"{_PACKAGE}.{module}" for name, module in ours.items()} | theirs
    short = {name: (module, name) for name, module in places.items()}
    public = {f"{_PACKAGE}.{name}": (places[name], name) for name in ours}
    former = {
        f"{_PACKAGE}.{module}.{name}": (places[name], name)
        for module, classes in FORMER.items()
        for name in classes.split()
        if name in ours
    }
    return short | public | former | {f"{module}.{name}": (module, name) for name, module in places.items()}


def names(table: str) -> list[str]:
    """Every name in ``classes``, ``tasks`` or ``functions``."""
    return [name for name in _paths(table) if "." not in name]


def find(spelling: Any, table: str, where: str) -> Any:
    """The class or function that a spelling means.

    Args:
        spelling: A name alone or with its module, e.g. ``LoRA``.
        table: ``classes``, ``tasks`` or ``functions``.
        where: What to call the place in an error.

    Raises:
        RecipeError: it is not in the table.
    """
    found = _paths(table).get(spelling) if isinstance(spelling, str) else None
    if found is None:
        closest = nearest(str(spelling).rpartition(".")[2], names(table))
        own = OWN if table == "classes" and "." in str(spelling) else ""
        raise RecipeError(f"{where}: {spelling!r} is not one of the {table} that a recipe may name.{closest}{own}")
    module, name = found
    return getattr(importlib.import_module(module), name)


def class_named(name: str) -> Any:
    """The class of that name, which code asks for rather than a file."""
    return find(name, "classes", name)


def spelling_of(value: Any) -> str:
    """A class's or function's full path, as files write it.

    Raises:
        RecipeError: it is not in any table, so no file could name it.
    """
    path = f"{value.__module__}.{value.__qualname__}"
    for table in ("classes", "tasks"):
        if path in _paths(table):
            module, name = _paths(table)[path]
            return f"{_PACKAGE}.{name}" if module.startswith(f"{_PACKAGE}.") else path
    for name, module in FUNCTIONS.items():  # by identity: torch's functions do not know where they stand
        if value is getattr(importlib.import_module(module), name):
            return f"{module}.{name}"
    raise RecipeError(f"{path} is not one of the classes and functions that a recipe file may name.{OWN}")
