"""What a recipe calls: pretraining, fine-tuning, conversion, generation and evaluation, under NeMo's names."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch

from mixtral_recipes import embedded
from mixtral_recipes.data.module import DataModule
from mixtral_recipes.errors import CheckpointError, RecipeError
from mixtral_recipes.models.config import MixtralConfig, MixtralModel
from mixtral_recipes.peft.lora import LoRA
from mixtral_recipes.training import distributed, recipe_changes
from mixtral_recipes.training.agreement import sole_writer
from mixtral_recipes.training.checkpoint import (
    Checkpointer,
    ModelCheckpoint,
    Position,
    clear_leftovers,
    read_run_facts,
)
from mixtral_recipes.training.environment import describe_environment
from mixtral_recipes.training.integrity import identity_of, verify_together
from mixtral_recipes.training.loop import fit
from mixtral_recipes.training.metrics import NeMoLogger, RunLog
from mixtral_recipes.training.optimizer import MegatronOptimizerModule
from mixtral_recipes.training.report import write_report_of
from mixtral_recipes.training.resume import AutoResume
from mixtral_recipes.training.setup import build_run, check_layout
from mixtral_recipes.training.trainer import Trainer


def pretrain(
    model: MixtralModel,
    data: DataModule,
    trainer: Trainer,
    log: NeMoLogger | None = None,
    optim: MegatronOptimizerModule | None = None,
    resume: AutoResume | None = None,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """Train all weights, from random ones or from ``resume.restore_config``.

    Runs in every process of the job.

    Args:
        model: What to train.
        data: On what.
        trainer: How long, how laid out.
        log: Where to write.
        optim: Optimizer and schedule.
        resume: Where to start.
        tokenizer: Folder or Hub id; None takes the model's or the checkpoint's.

    Returns:
        The result, also in RUN/result.json.
    """
    return _train(model, data, trainer, log, optim, resume, None, tokenizer)


def finetune(
    model: MixtralModel,
    data: DataModule,
    trainer: Trainer,
    log: NeMoLogger | None = None,
    optim: MegatronOptimizerModule | None = None,
    resume: AutoResume | None = None,
    peft: LoRA | None = None,
    tokenizer: str | None = "model",
) -> dict[str, Any]:
    """Fine-tune a checkpoint, all of it or by adapters. Arguments as `pretrain`.

    Args:
        peft: Adapters to train; None trains all weights.
        tokenizer: ``"model"`` takes the checkpoint's; else a folder or Hub id.

    Raises:
        RecipeError: ``resume.restore_config.path`` is not set.
    """
    if resume is None or resume.restore_config is None or not resume.restore_config.path:
        raise RecipeError("resume.restore_config.path is not set: fine-tuning needs a checkpoint (--restore-from).")
    return _train(model, data, trainer, log, optim, resume, peft, None if tokenizer == "model" else tokenizer)


def _train(
    model: MixtralModel,
    data: DataModule,
    trainer: Trainer,
    log: NeMoLogger | None,
    optim: MegatronOptimizerModule | None,
    resume: AutoResume | None,
    peft: LoRA | None,
    tokenizer: str | None,
) -> dict[str, Any]:
    log, optim, resume = log or NeMoLogger(), optim or MegatronOptimizerModule(), resume or AutoResume()
    place = distributed.ProcessPlace.from_environment()
    check_layout(model, trainer, data)
    device = distributed.choose_device(trainer.accelerator, place)
    distributed.initialize(trainer.topology(), place, device, seed=trainer.seed)
    run_log = None
    try:
        with sole_writer(log.run_dir / "checkpoints"):
            clear_leftovers(log.run_dir / "checkpoints")
            run_log = RunLog(log, trainer.max_steps, is_writer=place.rank == 0)
            return _train_alone(model, data, trainer, log, optim, resume, peft, tokenizer, device, run_log)
    except Exception as error:
        if run_log is not None:
            run_log.event("end", {"error": f"{type(error).__name__}: {error}"})
        raise
    finally:
        if run_log is not None:
            run_log.close()
            write_report_of(run_log)
        distributed.shut_down()


def _train_alone(
    model: MixtralModel,
    data: DataModule,
    trainer: Trainer,
    log: NeMoLogger,
    optim: MegatronOptimizerModule,
    resume: AutoResume,
    peft: LoRA | None,
    tokenizer: str | None,
    device: torch.device,
    run_log: RunLog,
) -> dict[str, Any]:
    """Train in a run folder no other run writes to."""
    rank = torch.distributed.get_rank()
    base = restore_source(resume)
    if base is not None:
        model = dataclasses.replace(model, config=_matching(model.config, base))
    loaded_tokenizer = load_tokenizer(tokenizer or model.tokenizer or (str(base / "context") if base else None))
    data.setup(loaded_tokenizer)
    recipe = recipe_changes.describe(model=model, trainer=trainer, data=data, optim=optim, peft=peft)
    if base is not None and peft is not None:
        recipe["base"] = identity_of(base)
    found = resume.find(log.run_dir / "checkpoints", run_log.say)
    changed = _compare_with(found, recipe, run_log)
    weights = base if found is None or peft is not None else None  # a full checkpoint of the run's own has them all
    if weights is not None:
        verify_together(weights)
    run = build_run(model, trainer, data, optim, device=device, peft=peft, weights=weights)
    checkpointer = Checkpointer(
        log.run_dir / "checkpoints",
        log.ckpt or ModelCheckpoint(),
        model_name=log.name,
        model=run.model,
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        adapters_only=peft is not None,
        context=base / "context" if base else _new_context(log, run.config, loaded_tokenizer, rank),
        facts=_facts(run.topology, peft, base) | {"recipe": recipe},
        asynchronous=trainer.strategy.ckpt_async_save,
    )
    position = checkpointer.load(found) if found else Position()
    if base is not None and not found and resume.restore_config and resume.restore_config.load_optim_state:
        checkpointer.load_optimizer(base)
    run_log.say(_opening(run.topology, found, base, position))
    run_log.event(
        "start",
        {
            "step": position.step,
            "restored_from": str(found or base or "random weights"),
            "changed": [str(change) for change in changed],
            "topology": run.topology.describe(),
            "world_size": trainer.world_size,
            "environment": describe_environment(device),
            "recipe": recipe,
        },
    )
    result = fit(run, position, checkpointer, run_log)
    result |= {
        "world_size": trainer.world_size,
        "expert_model_parallel_size": run.topology.expert_model_parallel_size,
        "topology": run.topology.describe(),
        "run_dir": str(log.run_dir),
    }
    result["checkpoint"] = result["checkpoint"] or (str(found) if found else None)
    run_log.event("end", result)
    if rank == 0:
        write_json(log.run_dir / "result.json", result)
    return result


def _compare_with(found: Path | None, recipe: dict[str, Any], run_log: RunLog) -> list[recipe_changes.Change]:
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
        run_log.say(f"changed since that checkpoint: {change}")
    return changed


def _opening(topology: Any, found: Path | None, base: Path | None, position: Position) -> str:
    start = f"resuming from {found} at step {position.step}" if found else f"starting from {base or 'random weights'}"
    return f"{topology.world_size} process(es), {topology.describe()}; {start}"


def _new_context(log: NeMoLogger, config: MixtralConfig, tokenizer: Any, rank: int) -> Path:
    """The context folder of a model that starts from random weights: config.json and the tokenizer."""
    from mixtral_recipes.importers.hf_config import from_megatron

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
        facts["peft"] = {
            k: str(v) if k == "lora_dtype" else v for k, v in dataclasses.asdict(peft).items()
        } | {"class": type(peft).__name__}
        facts["base"] = str(base)
        facts["base_identity"] = identity_of(base) if base else None
    return facts


def restore_source(resume: AutoResume) -> Path | None:
    """The Megatron checkpoint ``resume.restore_config`` names, imported first where it is a Hugging Face model.

    Every rank calls it: the first imports, the others wait for it at the import's lock.

    Raises:
        CheckpointError: there is nothing usable.
    """
    if resume.restore_config is None or not resume.restore_config.path:
        return None
    spec = resume.restore_config.path
    path = embedded.resolve(spec)
    if (path / "weights").is_dir():
        return path
    from mixtral_recipes.importers.hf_to_megatron import import_checkpoint

    return import_checkpoint(str(path) if spec.startswith(embedded.PREFIX) else spec)


def _matching(config: MixtralConfig, base: Path) -> MixtralConfig:
    """The recipe's configuration with the checkpoint's vocabulary, refused where the two are different models.

    Raises:
        RecipeError: names the field that differs.
    """
    from mixtral_recipes.importers.hf_config import to_megatron

    stored = to_megatron(json.loads((base / "context" / "config.json").read_text()))
    shape = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
             "num_moe_experts", "moe_router_topk")  # fmt: skip
    for name in shape:
        if name in stored and getattr(config, name) != stored[name]:
            raise RecipeError(
                f"model.config.{name}={getattr(config, name)}, but the checkpoint {base} has {stored[name]}; choose the "
                "recipe of that model, or another --restore-from."
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
        return AutoTokenizer.from_pretrained(embedded.resolve(source))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: no tokenizer can be loaded ({str(error).splitlines()[0]}).") from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file that is either whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_text(json.dumps(value, indent=1))
    staging.replace(path)


def import_ckpt(
    model: MixtralModel, source: str, output_path: str | Path | None = None, overwrite: bool = False
) -> Path:
    """Convert a Hugging Face Mixtral to a Megatron checkpoint, with NeMo's arguments.

    Args:
        model: The model it must be; its layer, width and expert numbers are compared with the source's.
        source: ``hf://org/name[@revision]`` or a folder.
        output_path: Folder to write; None puts it under ``$MIXTRAL_RECIPES_HOME``.
        overwrite: Whether an existing output is replaced.

    Raises:
        CheckpointError: the source is incomplete, damaged, or no Mixtral.
        RecipeError: it is another Mixtral than ``model``.
    """
    from mixtral_recipes.importers.hf_to_megatron import import_checkpoint

    folder = import_checkpoint(source, Path(output_path) if output_path else None, overwrite=overwrite)
    _matching(model.config, folder)
    return folder


def export_ckpt(
    path: str | Path, target: str = "hf", output_path: str | Path | None = None, overwrite: bool = False, **options: Any
) -> Path:
    """Convert a Megatron checkpoint back to Hugging Face files, with NeMo's arguments.

    Args:
        path: Checkpoint folder; an adapter checkpoint is merged into its base on the way.
        target: ``"hf"``.
        output_path: Folder to write; None takes ``path`` with ``-hf`` behind it.
        overwrite: Whether an existing output is replaced.
        **options: As `mixtral_recipes.importers.megatron_to_hf.export_checkpoint` takes them.

    Raises:
        RecipeError: another target.
        CheckpointError: the checkpoint is incomplete or damaged.
    """
    if target != "hf":
        raise RecipeError(f"target={target!r}: only 'hf' can be exported to.")
    from mixtral_recipes.importers.megatron_to_hf import export_checkpoint

    source = Path(path)
    output = Path(output_path) if output_path else source.with_name(source.name + "-hf")
    return export_checkpoint(source, output, overwrite=overwrite, **options)


def generate(path: str | Path, prompts: list[str], max_new_tokens: int = 64, batch_size: int = 8) -> list[str]:
    """Greedy continuations of prompts by a Hugging Face folder (export a checkpoint first)."""
    from mixtral_recipes import evaluation

    return list(evaluation.generate(Path(path), prompts, batch_size, max_new_tokens))


def evaluate(path: str | Path, data: str | Path | None = None, limit: int | None = None) -> dict[str, Any]:
    """Exact match and F1 of a Hugging Face folder on held-out SQuAD questions.

    Args:
        path: Model folder.
        data: As `SquadDataModule.dataset_root`.
        limit: Most questions.
    """
    from mixtral_recipes import evaluation

    return evaluation.evaluate_squad(Path(path), data, limit=limit)
