"""The exact table of what a recipe file or an override may name: this project's and Megatron's config classes.

Nothing outside the table is imported on a file's word: there are no prefix rules and no attribute walks.
"""

import functools
import importlib
from typing import Any

from mixtral_recipes.errors import RecipeError, nearest

# Class -> module. A file may write the class's name alone or its full path.
CLASSES = {
    "MixtralModel": "mixtral_recipes.models.config",
    "MixtralConfig": "mixtral_recipes.models.config",
    "MixtralConfig8x3B": "mixtral_recipes.models.config",
    "MixtralConfig8x7B": "mixtral_recipes.models.config",
    "MixtralConfig8x22B": "mixtral_recipes.models.config",
    "MixtralConfigTiny": "mixtral_recipes.models.config",
    "Trainer": "mixtral_recipes.settings.trainer",
    "MegatronStrategy": "mixtral_recipes.settings.trainer",
    "MegatronMixedPrecision": "mixtral_recipes.settings.precision",
    "MegatronOptimizerModule": "mixtral_recipes.training.optimizer",
    "CosineAnnealingScheduler": "mixtral_recipes.training.optimizer",
    "MockDataModule": "mixtral_recipes.data.modules.mock",
    "SquadDataModule": "mixtral_recipes.data.modules.squad",
    "FineTuningDataModule": "mixtral_recipes.data.modules.finetuning",
    "PreTrainingDataModule": "mixtral_recipes.data.modules.pretraining",
    "ChatDataModule": "mixtral_recipes.data.modules.chat",
    "PackedSequenceSpecs": "mixtral_recipes.data.batches.packing",
    "LoRA": "mixtral_recipes.peft.lora",
    "DoRA": "mixtral_recipes.peft.dora",
    "AutoResume": "mixtral_recipes.settings.resume",
    "RestoreConfig": "mixtral_recipes.settings.resume",
    "ModelCheckpoint": "mixtral_recipes.checkpoints.checkpointer",
    "NeMoLogger": "mixtral_recipes.training.watch.log",
    "TensorBoardLogger": "mixtral_recipes.training.watch.log",
    "WandbLogger": "mixtral_recipes.training.watch.log",
    "TimingCallback": "mixtral_recipes.training.watch.callbacks",
    "GarbageCollectionCallback": "mixtral_recipes.training.watch.callbacks",
    "MegatronCommOverlapCallback": "mixtral_recipes.training.watch.callbacks",
    "MegatronTokenDropCallback": "mixtral_recipes.training.watch.callbacks",
    "PreemptionCallback": "mixtral_recipes.training.watch.callbacks",
    "OptimizerConfig": "megatron.core.optimizer.optimizer_config",
    "DistributedDataParallelConfig": "megatron.core.distributed.distributed_data_parallel_config",
    "timedelta": "datetime",
}
# What a recipe calls: only at the top of a file.
TASKS = {"pretrain": "mixtral_recipes.api", "finetune": "mixtral_recipes.api"}
# Functions that are values, e.g. of model.config.activation_func.
FUNCTIONS = dict.fromkeys(("silu", "gelu", "relu"), "torch.nn.functional")
DTYPES = ("float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2", "uint8")
# Settings that name code which Megatron imports; a file may not set them.
NAMES_CODE = ("fp8_quantizer_factory", "fp4_quantizer_factory")


@functools.cache
def _paths(table: str) -> dict[str, tuple[str, str]]:
    """Every spelling of a table's entries -> (module, name)."""
    entries: dict[str, str] = {"classes": CLASSES, "tasks": TASKS, "functions": FUNCTIONS}[table]
    short = {name: (module, name) for name, module in entries.items()}
    return short | {f"{module}.{name}": (module, name) for name, module in entries.items()}


def find(spelling: Any, table: str, where: str) -> Any:
    """The class or function a spelling stands for.

    Args:
        spelling: A name alone or with its module, e.g. ``LoRA``.
        table: ``classes``, ``tasks`` or ``functions``.
        where: What to call the place in an error.

    Raises:
        RecipeError: it is not in the table.
    """
    found = _paths(table).get(spelling) if isinstance(spelling, str) else None
    if found is None:
        names = list(CLASSES if table == "classes" else TASKS if table == "tasks" else FUNCTIONS)
        closest = nearest(str(spelling).rpartition(".")[2], names)
        raise RecipeError(f"{where}: {spelling!r} is not among the {table} a recipe may name.{closest}")
    module, name = found
    return getattr(importlib.import_module(module), name)


def spelling_of(value: Any) -> str:
    """A class's or function's full path, as files write it.

    Raises:
        RecipeError: it is not in any table, so no file could name it.
    """
    path = f"{value.__module__}.{value.__qualname__}"
    for table in ("classes", "tasks"):
        if path in _paths(table):
            return path
    for name, module in FUNCTIONS.items():  # by identity: torch's functions do not know where they stand
        if value is getattr(importlib.import_module(module), name):
            return f"{module}.{name}"
    raise RecipeError(f"{path} is not among the classes and functions a recipe file may name; set it from Python.")
