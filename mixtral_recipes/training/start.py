"""From a recipe's parts to a run that can step: base model, tokenizer, data, model, checkpoint."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mixtral_recipes import embedded
from mixtral_recipes.checkpoints.checkpointer import Checkpointer, Position
from mixtral_recipes.checkpoints.folder import read_run_facts
from mixtral_recipes.checkpoints.format.integrity import identity_of, verify_together
from mixtral_recipes.checkpoints.load import find_checkpoint
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.errors import CheckpointError, RecipeError
from mixtral_recipes.models.config import MixtralConfig, MixtralModel
from mixtral_recipes.settings import changes as recipe_changes
from mixtral_recipes.settings.checkpoint import ModelCheckpoint
from mixtral_recipes.settings.log import NeMoLogger
from mixtral_recipes.settings.optim import MegatronOptimizerModule
from mixtral_recipes.settings.peft import LoRA
from mixtral_recipes.settings.resume import AutoResume
from mixtral_recipes.settings.trainer import Trainer
from mixtral_recipes.system.files import write_json
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
        tokenizer: str | None,
    ) -> None:
        self.model = model
        self.data = data
        self.trainer = trainer
        self.log = log or NeMoLogger()
        self.optim = optim or MegatronOptimizerModule()
        self.resume = resume or AutoResume()
        self.peft = peft
        self.tokenizer = tokenizer

    @property
    def checkpoints(self) -> Path:
        """The run's folder of checkpoints."""
        return self.log.run_dir / "checkpoints"


@dataclass
class Ready:
    """A run that can step, and how it came to be.

    Attributes:
        run: Model, optimizer, schedule, data.
        checkpointer: Saves it.
        position: Where it starts.
        found: The run's own checkpoint it goes on from; None where it begins.
        base: The checkpoint its weights come from otherwise; None are random weights.
        recipe: Every setting by its path.
        changed: What differs from the settings ``found`` was written with.
    """

    run: TrainingRun
    checkpointer: Checkpointer
    position: Position
    found: Path | None
    base: Path | None
    recipe: dict[str, recipe_changes.Plain]
    changed: list[recipe_changes.Change]

    @property
    def restored_from(self) -> str:
        """Where the weights come from."""
        return str(self.found or self.base or "random weights")

    @property
    def opening(self) -> str:
        """How the run starts, in words."""
        if self.found:
            return f"resuming from {self.found} at step {self.position.step}"
        return f"starting from {self.restored_from}"


def prepare(parts: Parts, device: torch.device, say: Callable[[str], None], *, for_training: bool = True) -> Ready:
    """Build a run and take up its checkpoint. torch.distributed and Megatron's groups must exist; all ranks call it.

    Args:
        parts: The recipe.
        device: Where tensors live.
        say: Told what the reader should know.
        for_training: Whether the run may write its folder.

    Raises:
        CheckpointError: a checkpoint is damaged, or of another model.
        RecipeError: a setting changed that may not.
    """
    base = restore_source(parts.resume)
    model = parts.model
    if base is not None:
        published = json.loads((base / "context" / "config.json").read_text())
        model = dataclasses.replace(model, config=matching_config(model.config, published, base))
    tokenizer = load_tokenizer(parts.tokenizer or model.tokenizer or (str(base / "context") if base else None))
    parts.data.setup(tokenizer)
    recipe = recipe_changes.describe(
        model=model, trainer=parts.trainer, data=parts.data, optim=parts.optim, peft=parts.peft
    )
    if base is not None:  # adapters belong to their base; a full run's checkpoints hold all its weights
        recipe["base" if parts.peft is not None else "starting weights"] = identity_of(base)
    found = find_checkpoint(parts.resume, parts.checkpoints, say)
    changed = _compare_with(found, recipe, say)
    weights = base if found is None or parts.peft is not None else None  # the run's own full checkpoint has them all
    if weights is not None:
        verify_together(weights)
    run = build_run(model, parts.trainer, parts.data, parts.optim, device=device, peft=parts.peft, weights=weights)
    context = base / "context" if base else None
    if context is None and for_training:
        context = _new_context(parts.log, run.config, tokenizer, torch.distributed.get_rank())
    checkpointer = Checkpointer(
        parts.checkpoints,
        parts.log.ckpt or ModelCheckpoint(),
        model_name=parts.log.name,
        model=run.model,
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        adapters_only=parts.peft is not None,
        context=context,
        facts=_facts(run.topology, parts.peft, base) | {"recipe": recipe},
        asynchronous=parts.trainer.strategy.ckpt_async_save,
    )
    position = checkpointer.load(found) if found else Position()
    restore = parts.resume.restore_config
    if base is not None and not found and restore and restore.load_optim_state:
        checkpointer.load_optimizer(base)
    return Ready(run, checkpointer, position, found, base, recipe, changed)


def _compare_with(
    found: Path | None, recipe: dict[str, recipe_changes.Plain], say: Callable[[str], None]
) -> list[recipe_changes.Change]:
    """Say what changed in the recipe since a checkpoint was written; refuse what may not change.

    Raises:
        RecipeError: names what may not change.
    """
    before = read_run_facts(found).get("recipe") if found else None
    if not before:
        return []
    changed = recipe_changes.changes(before, recipe)
    recipe_changes.refuse_fixed(changed)
    for change in changed:
        say(f"changed since that checkpoint: {change}")
    return changed


def _new_context(log: NeMoLogger, config: MixtralConfig, tokenizer: Any, rank: int) -> Path:
    """The context folder of a model that starts from random weights: config.json and the tokenizer."""
    from mixtral_recipes.importers.hf.config import from_megatron

    folder = log.run_dir / "context"
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        fields = from_megatron(vars(config), dtype=str(config.params_dtype).removeprefix("torch."))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
            fields |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        write_json(folder / "config.json", fields)
    return folder


def _facts(topology: Any, peft: LoRA | None, base: Path | None) -> dict[str, Any]:
    """What a checkpoint says about the run that wrote it."""
    facts: dict[str, Any] = {"topology": topology.describe(), "kind": "adapter" if peft else "training"}
    if peft is not None:
        facts["peft"] = {k: str(v) if k == "lora_dtype" else v for k, v in dataclasses.asdict(peft).items()} | {
            "class": type(peft).__name__
        }
        facts["base_identity"] = identity_of(base) if base else None
    if base is not None:
        facts["base"] = str(base)  # adapters need it; an export of any run says where its weights began
    return facts


def restore_source(resume: AutoResume) -> Path | None:
    """The Megatron checkpoint ``resume.restore_config`` names, imported first where it is a Hugging Face model.

    All ranks call it together: they share an import.

    Raises:
        CheckpointError: there is nothing usable.
    """
    if resume.restore_config is None or not resume.restore_config.path:
        return None
    spec = resume.restore_config.path
    from mixtral_recipes.importers.resolve import resolve

    return resolve(str(embedded.resolve(spec)) if spec.startswith(embedded.PREFIX) else spec)


def matching_config(config: MixtralConfig, published: dict[str, Any], base: Path) -> MixtralConfig:
    """The recipe's configuration with the checkpoint's vocabulary, refused where the two are different models.

    Args:
        config: The recipe's.
        published: The checkpoint's config.json, in Hugging Face's spelling.
        base: The checkpoint, for the error.

    Raises:
        RecipeError: names the field that differs.
    """
    from mixtral_recipes.importers.hf.config import to_megatron

    stored = to_megatron(published)
    shape = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
             "kv_channels", "num_moe_experts", "moe_router_topk")  # fmt: skip
    for name in shape:
        if name in stored and getattr(config, name) != stored[name]:
            raise RecipeError(
                f"model.config.{name}={getattr(config, name)}, but the checkpoint {base} has {stored[name]}; "
                "choose the recipe of that model, or another --restore-from."
            )
    same = {name: stored[name] for name in ("vocab_size", "rotary_base", "layernorm_epsilon") if name in stored}
    return dataclasses.replace(config, **same)


def load_tokenizer(source: str | None) -> Any:
    """A transformers tokenizer from a folder or Hub id; None for None.

    Raises:
        CheckpointError: there is none.
    """
    if source is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(embedded.resolve(source), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: no tokenizer can be loaded ({str(error).splitlines()[0]}).") from error
