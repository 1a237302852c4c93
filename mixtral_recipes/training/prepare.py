"""From a recipe to a run that can step: weights, tokenizer, data, model, optimizer, the checkpoint to resume from."""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mixtral_recipes.checkpoints.checkpointer import Checkpointer, Position
from mixtral_recipes.checkpoints.lineage import record, told
from mixtral_recipes.checkpoints.lineage.record import Lineage
from mixtral_recipes.checkpoints.load import find_checkpoint
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.data.tokenizer_choice import chosen_tokenizer, described
from mixtral_recipes.data.tokenizers import tokenizer_identity, vocabulary_size
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.agreement import Vocabulary
from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.models.config import MixtralModel
from mixtral_recipes.peft import count
from mixtral_recipes.peft.busiest import with_experts_named
from mixtral_recipes.settings import changes as recipe_changes
from mixtral_recipes.settings.checkpoint import ModelCheckpoint
from mixtral_recipes.settings.log import NeMoLogger
from mixtral_recipes.settings.optim import MegatronOptimizerModule
from mixtral_recipes.settings.peft import LoRA, QLoRA, recorded
from mixtral_recipes.settings.resume import AutoResume
from mixtral_recipes.settings.trainer import Trainer
from mixtral_recipes.training.model import agreed_model
from mixtral_recipes.training.named_files import named_files
from mixtral_recipes.training.origin import Origin, context_folder
from mixtral_recipes.training.run import TrainingRun, build_run


class Parts:
    """A recipe's parts, defaults filled in; attributes as `api.finetune`'s arguments."""

    def __init__(
        self,
        model: MixtralModel,
        data: DataModule,
        trainer: Trainer,
        log: NeMoLogger | None,
        optim: MegatronOptimizerModule | None,
        resume: AutoResume | None,
        peft: LoRA | None,
        tokenizer: Any,
    ) -> None:
        self.model = dataclasses.replace(model, optim=None, model_transform=None)
        self.data = data
        self.trainer = trainer
        self.log = log or NeMoLogger()
        self.optim = optim or model.optim or MegatronOptimizerModule()
        self.resume = resume or AutoResume()
        self.peft = peft or model.model_transform
        self.tokenizer = tokenizer

    @property
    def checkpoints(self) -> Path:
        """The run's folder of checkpoints."""
        return self.log.run_dir / "checkpoints"

    @property
    def loads_optimizer(self) -> bool:
        """Whether a new run takes the optimizer's state from the checkpoint it starts from."""
        restore = self.resume.restore_config
        return bool(restore and restore.load_optim_state)

    @property
    def asked(self) -> dict[str, recipe_changes.Plain]:
        """Every setting as it was asked for: nothing is read to fill any in, unlike `Ready.recipe`'s."""
        return recipe_changes.asked(
            self.model, self.trainer, self.data, self.optim, self.peft, self.resume, self.tokenizer
        )

    @property
    def files(self) -> dict[str, str]:
        """A hash of the files at each place that settings name."""
        return named_files(self.data, self.resume, self.tokenizer)


@dataclass
class Ready:
    """A run that can step, and how it came to be.

    Attributes:
        run: Model, optimizer, schedule, data.
        checkpointer: Saves it.
        position: Where it starts.
        found: The run's own checkpoint that it resumes from; None for a new run.
        origin: Otherwise, what its weights come from.
        lineage: What the run's checkpoints record of where they come from.
        recipe: Every setting by its path.
        changed: What differs from the settings ``found`` was written with.
        trained: With adapters, how many parameters are trained, by kind of module.
    """

    run: TrainingRun
    checkpointer: Checkpointer
    position: Position
    found: Path | None
    origin: Origin
    lineage: Lineage
    recipe: dict[str, recipe_changes.Plain]
    changed: list[recipe_changes.Change]
    trained: dict[str, int]

    @property
    def restored_from(self) -> str:
        """Where the weights come from."""
        return str(self.found or self.origin.named or "random weights")

    @property
    def opening(self) -> str:
        """How the run starts, in words."""
        where = f"starting from {self.restored_from}"
        if self.found:
            where = f"resuming from {self.found} at step {self.position.step}"
        return where + (f"; training {count.told(self.trained)}" if self.trained else "")

    def facts(self) -> dict[str, Any]:
        """What a run's log says at its start."""
        topology = self.run.topology
        return {
            "step": self.position.step,
            "restored_from": self.restored_from,
            "changed": [str(change) for change in self.changed],
            "topology": topology.describe(),
            "world_size": topology.world_size,
            "trained_parameters": self.trained,
            "recipe": self.recipe,
            "lineage": told.rows(self.lineage),
        }


def prepare(parts: Parts, device: torch.device, say: Callable[[str], None], *, for_training: bool = True) -> Ready:
    """Build a run and restore its checkpoint. torch.distributed and Megatron's groups must exist; all ranks call it.

    Args:
        parts: The recipe.
        device: Where tensors live.
        say: Called with what the reader should know.
        for_training: Whether the run may write its folder.

    Raises:
        CheckpointError: a checkpoint is damaged, or of another model.
        RecipeError: a setting changed that must not.
    """
    origin = Origin.of(parts.resume, parts.peft)
    text = _Text.of(parts, origin.base)
    parts = copy.copy(parts)  # from here on with what the weights and the tokenizer decide
    parts.peft = _named_experts(origin.scheme, parts.model)
    published = origin.base and origin.base / "context"
    agreed = agreed_model(parts.model.config, parts.trainer, parts.resume, parts.peft, published, text.vocabulary)
    parts.model = dataclasses.replace(parts.model, config=agreed.config)
    parts.data.setup(text.tokenizer)
    recipe = _described(parts, origin, text)
    found = find_checkpoint(parts.resume, parts.checkpoints, say)
    changed = _compare_with(found, recipe, say if for_training else lambda text: None)  # what trains is no concern then
    run = _built(parts, device, origin, found, agreed.new_rows)
    if for_training:
        _tell_of_warmup(parts, run.scheduler.lr_warmup_steps, say)
    lineage = origin.lineage(recipe, parts.peft, parts.data)
    checkpointer = Checkpointer(
        parts.checkpoints,
        parts.log.ckpt or ModelCheckpoint(),
        model_name=parts.log.name,
        model=run.model,
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        adapters_only=parts.peft is not None,
        context=_context(parts, origin, text, agreed.published) if for_training else None,
        facts=_facts(run, parts.peft) | {"recipe": recipe},
        lineage=lineage,
        asynchronous=parts.trainer.strategy.ckpt_async_save,
    )
    position = _restored(checkpointer, run, found, origin.named if parts.loads_optimizer else None)
    lineage = dataclasses.replace(lineage, run={"name": parts.log.name, "step": position.step})
    trained = count.trained_parameters(parts.peft, ModelShape.of(agreed.config)) if parts.peft is not None else {}
    return Ready(run, checkpointer, position, found, origin, lineage, recipe, changed, trained)


def _tell_of_warmup(parts: Parts, taken: int, say: Callable[[str], None]) -> None:
    """Say that a warmup which would not end within the schedule is a shorter one (`settings/optim.py`)."""
    asked = getattr(parts.optim.lr_scheduler, "warmup_steps", taken)
    if asked != taken and getattr(parts.optim.lr_scheduler, "warmup_ratio", None) is None:
        say(f"optim.lr_scheduler.warmup_steps={asked} does not end before the last step; it is shortened to {taken}.")


@dataclass(frozen=True)
class _Text:
    """The tokenizer a run trains with.

    Attributes:
        tokenizer: None where there is none.
        vocabulary: What it holds, and its name.
        may_differ: Whether it may be another than that of the checkpoint the run starts from.
    """

    tokenizer: Any
    vocabulary: Vocabulary | None
    may_differ: bool

    @classmethod
    def of(cls, parts: Parts, base: Path | None) -> "_Text":
        """The one that is named, or the base's, with what the data adds to it."""
        named = parts.tokenizer or parts.model.tokenizer
        from_where = named or base or parts.model.config.default_tokenizer
        loaded = chosen_tokenizer(from_where, error=CheckpointError)
        restore = parts.resume.restore_config
        tokenizer = parts.data.tokenizer_for(loaded, grow=bool(restore and restore.resize_vocab))
        vocabulary = Vocabulary(described(from_where), vocabulary_size(tokenizer)) if tokenizer else None
        return cls(tokenizer, vocabulary, bool((named and tokenizer) or tokenizer is not loaded))


def _named_experts(peft: LoRA | None, model: MixtralModel) -> LoRA | None:
    if peft is None:
        return None
    return with_experts_named(peft, model.config.num_layers, model.config.num_moe_experts or 1)


def _described(parts: Parts, origin: Origin, text: _Text) -> dict[str, recipe_changes.Plain]:
    """Every setting by its path, and the identities of weights and tokenizer."""
    recipe = recipe_changes.describe(
        model=parts.model, trainer=parts.trainer, data=parts.data, optim=parts.optim, peft=parts.peft
    )
    identity = tokenizer_identity(text.tokenizer) if text.tokenizer else None
    return recipe | origin.settings(parts.peft) | {"tokenizer": identity}


def _built(parts: Parts, device: torch.device, origin: Origin, found: Path | None, new_rows: range) -> TrainingRun:
    """The run with the weights it starts from, verified."""
    start = origin
    if found is not None:  # the run's own checkpoint has its adapters, or all its weights
        start = Origin(origin.base if parts.peft is not None else None)
    start.verify()
    return build_run(
        parts.model,
        parts.trainer,
        parts.data,
        parts.optim,
        device=device,
        peft=parts.peft,
        weights=start.base,
        new_rows=new_rows,
        adapters=start.adapters,
    )


def _context(parts: Parts, origin: Origin, text: _Text, published: dict[str, Any]) -> Path:
    return context_folder(
        origin.base,
        parts.log.run_dir,
        published,
        text.tokenizer,
        named=text.may_differ,
        writes=torch.distributed.get_rank() == 0,
    )


def _restored(
    checkpointer: Checkpointer, run: TrainingRun, found: Path | None, optimizer_from: Path | None
) -> Position:
    """Where the run starts: at its own checkpoint, or at step 0, which may have another checkpoint's optimizer."""
    position = Position()
    if found is not None:
        position = checkpointer.load(found)
    elif optimizer_from is not None:
        checkpointer.load_optimizer(optimizer_from)
    if found or optimizer_from:
        run.take_up_main_weights()
    return position


def _compare_with(
    found: Path | None, recipe: dict[str, recipe_changes.Plain], say: Callable[[str], None]
) -> list[recipe_changes.Change]:
    """Say what changed in the recipe since a checkpoint was written; refuse what may not change.

    Raises:
        RecipeError: names what may not change.
    """
    written = record.read_or_none(found) if found else None
    before = written.recipe if written else None
    if not before:
        return []
    changed = recipe_changes.changes(before, recipe)
    recipe_changes.refuse_fixed(changed)
    for change in changed:
        say(f"changed since that checkpoint: {change}")
    return changed


def _facts(run: TrainingRun, peft: LoRA | None) -> dict[str, Any]:
    """What a checkpoint's run.json says about the run that wrote it."""
    facts: dict[str, Any] = {"topology": run.topology.describe(), "kind": "adapter" if peft else "training"}
    if peft is not None:
        facts["peft"] = recorded(peft)
    if isinstance(peft, QLoRA):
        # What its values depend on beside the scheme (`peft/quantized/nf4.py`).
        facts["trained_over"] = {"device": run.device.type, "dtype": str(run.config.params_dtype).split(".")[-1]}
    return facts
