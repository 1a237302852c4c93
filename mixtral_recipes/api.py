"""What a recipe calls: pretraining, fine-tuning, conversion, generation and evaluation, under NeMo's names."""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.errors import MixtralRecipesWarning, RecipeError
from mixtral_recipes.executors import nemo_run_jobs, ranks_from_here
from mixtral_recipes.layout.repair import check_recipe_layout
from mixtral_recipes.models.config import MixtralModel
from mixtral_recipes.reports.page import write_report_of
from mixtral_recipes.settings.check import check_settings
from mixtral_recipes.settings.log import NeMoLogger
from mixtral_recipes.settings.optim import MegatronOptimizerModule
from mixtral_recipes.settings.peft import LoRA
from mixtral_recipes.settings.resume import AutoResume
from mixtral_recipes.settings.trainer import Trainer
from mixtral_recipes.system.files import clear_all_leftovers
from mixtral_recipes.system.ranks import first, launched_rank, sole_writer
from mixtral_recipes.training import distributed, step
from mixtral_recipes.training.loop import fit
from mixtral_recipes.training.run import Parts, prepare
from mixtral_recipes.training.watch.log import RunLog

__all__ = ["evaluate", "export_ckpt", "finetune", "generate", "import_ckpt", "pretrain", "validate"]


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

    Called in every process of a job, or in one that no launcher started, which then starts the job's on its machine.

    Args:
        model: What to train.
        data: On what.
        trainer: How long, how laid out.
        log: Where to write.
        optim: Optimizer and schedule.
        resume: Where to start.
        tokenizer: Folder or Hub id; None or ``"model"`` takes the model's or the checkpoint's.

    Returns:
        The result, also in RUN/result.json.

    Raises:
        LaunchError: a rank failed that was started from here, or the trainer has several nodes.
        Preempted: the run was asked to stop, and saved.
    """
    parts = Parts(model, data, trainer, log, optim, resume, None, _own(tokenizer))
    return _run(pretrain, parts, functools.partial(_train, "pretrain"))


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
    parts = Parts(model, data, trainer, log, optim, resume, peft, _own(tokenizer))
    return _run(finetune, parts, functools.partial(_train, "finetune"))


def validate(
    model: MixtralModel,
    data: DataModule,
    trainer: Trainer,
    tokenizer: str | None = None,
    log: NeMoLogger | None = None,
    resume: AutoResume | None = None,
    optim: MegatronOptimizerModule | None = None,
    peft: LoRA | None = None,
) -> dict[str, Any]:
    """Measure the validation loss of a run's newest checkpoint, or of ``resume.restore_config``'s weights.

    Nothing is written. Arguments as `pretrain` and `finetune`.

    Returns:
        ``val_loss`` (None without a validation set), ``step`` and ``restored_from``.
    """
    return _run(validate, Parts(model, data, trainer, log, optim, resume, peft, _own(tokenizer)), _validate)


def import_ckpt(
    model: MixtralModel, source: str, output_path: str | Path | None = None, overwrite: bool = False
) -> Path:
    """Convert a Hugging Face Mixtral to a Megatron checkpoint, with NeMo's arguments.

    Args:
        model: The model it must be; its sizes, and what else was given, are compared with the source's.
        source: ``hf://org/name[@revision]`` or a folder.
        output_path: Folder to write; None puts it under ``$MIXTRAL_RECIPES_HOME``.
        overwrite: Whether an existing output is replaced.

    Raises:
        CheckpointError: the source is incomplete, damaged, or not a Mixtral.
        RecipeError: it is a different Mixtral from ``model``.
    """
    from mixtral_recipes.importers.agreement import refuse_another
    from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint

    return import_checkpoint(
        source,
        Path(output_path) if output_path else None,
        overwrite=overwrite,
        accept=lambda opened: refuse_another(model.config, opened.config, opened.folder),
    )


def export_ckpt(
    path: str | Path, target: str = "hf", output_path: str | Path | None = None, overwrite: bool = False, **options: Any
) -> Path:
    """Convert a Megatron checkpoint to Hugging Face files, with NeMo's arguments.

    Args:
        path: Checkpoint folder; an adapter checkpoint is merged into its base on the way to ``"hf"``.
        target: ``"hf"``, or ``"hf-peft"`` for the adapter alone; `mixtral_recipes.importers.exports` lists all.
        output_path: Folder to write; None takes ``path`` with ``-hf`` behind it.
        overwrite: Whether an existing output is replaced.
        **options: As the target's function takes them, e.g. ``dtype="bf16"``.

    Raises:
        CheckpointError: another target, an option it has not, or a checkpoint that is incomplete or damaged.
    """
    from mixtral_recipes.importers.exports import export

    source = Path(path)
    output = Path(output_path) if output_path else source.with_name(f"{source.name}-{target}")
    return export(source, output, target, overwrite=overwrite, **options)


def generate(path: str | Path, prompts: list[str], max_new_tokens: int = 64, batch_size: int = 8) -> list[str]:
    """Greedy continuations of prompts by a Hugging Face folder (export a checkpoint first)."""
    from mixtral_recipes.evaluation import generation

    return list(generation.generate(Path(path), prompts, batch_size, max_new_tokens))


def evaluate(path: str | Path, data: str | Path | None = None, limit: int | None = None) -> dict[str, Any]:
    """Exact match and F1 of a Hugging Face folder on held-out SQuAD questions.

    Args:
        path: Model folder.
        data: As `SquadDataModule.dataset_root`.
        limit: The maximum number of questions.
    """
    from mixtral_recipes.evaluation.scores import evaluate_squad

    return evaluate_squad(Path(path), data, limit=limit)


def _own(tokenizer: str | None) -> str | None:
    """The tokenizer a run is given; None where NeMo's word ``model`` asks for the checkpoint's."""
    return None if tokenizer == "model" else tokenizer


def _run(task: Callable[..., Any], parts: Parts, work: Callable[[Parts], dict[str, Any]]) -> dict[str, Any]:
    """Check a recipe, then do its work: in this process, or in as many as it asks for where no launcher started any."""
    nemo_run_jobs.refuse_while_loading()
    with ranks_from_here.told_to_scheduler():
        for notice in check_settings(task, vars(parts)):
            if launched_rank() == 0:
                warnings.warn(notice, MixtralRecipesWarning, stacklevel=3)
        check_recipe_layout(parts.model, parts.trainer, parts.data)
        trainer, log = parts.trainer, parts.log
        if not ranks_from_here.wanted(trainer.num_nodes, trainer.devices):
            return work(parts)
        name = log.name if task is not validate else f"{log.name}-validate"
        return ranks_from_here.start(
            functools.partial(work, parts),
            devices=trainer.devices,
            name=name,
            run_dir=log.run_dir,
            recipe=task.__name__,
        )


def _train(task: str, parts: Parts) -> dict[str, Any]:
    """Train in a run folder that no other run writes to, and write a report however it ends."""
    run_log = None
    try:
        with ranks_from_here.recorded(name=parts.log.name, run_dir=parts.log.run_dir, recipe=task):
            device = _join(parts.trainer)
            with sole_writer(parts.checkpoints):
                first(lambda: clear_all_leftovers(parts.checkpoints))
                run_log = RunLog(parts.log, parts.trainer.max_steps, is_writer=torch.distributed.get_rank() == 0)
                return fit(prepare(parts, device, run_log.say), run_log)
    except Exception as error:
        if run_log is not None:
            run_log.event("end", {"error": f"{type(error).__name__}: {error}"})
        raise
    finally:
        if run_log is not None:
            run_log.close()
            write_report_of(run_log)
        distributed.shut_down()


def _validate(parts: Parts) -> dict[str, Any]:
    """Measure without writing."""
    try:
        device = _join(parts.trainer)
        say = print if torch.distributed.get_rank() == 0 else lambda text: None
        ready = prepare(parts, device, say, for_training=False)
        return {
            "val_loss": step.validate(ready.run),
            "step": ready.position.step,
            "restored_from": ready.restored_from,
        }
    finally:
        distributed.shut_down()


def _join(trainer: Trainer) -> torch.device:
    """Take this process's device, and meet the other processes."""
    place = distributed.ProcessPlace.from_environment()
    device = distributed.choose_device(trainer.accelerator, place)
    distributed.initialize(trainer.topology(), place, device, seed=trainer.seed)
    return device
