"""What a recipe calls: pretraining, fine-tuning, conversion, generation and evaluation, under NeMo's names.

Arguments and their order are NeMo's; `settings/nemo/arguments.py` says of each what it does here.
"""

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.inference.sampling_params import SamplingParams

from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.data.modules.lightning import LightningData, as_data_module
from mixtral_recipes.errors import MixtralRecipesWarning, advice_for_scripts
from mixtral_recipes.executors import nemo_run_jobs, preflight, ranks_from_here
from mixtral_recipes.executors.runs import records
from mixtral_recipes.executors.runs.checkpoints import base_folder, checkpoint_folder, model_checkpoint, with_start
from mixtral_recipes.inference.sampling import Sampling
from mixtral_recipes.layout.repair import check_recipe_layout
from mixtral_recipes.models.config import MixtralModel
from mixtral_recipes.planner.prediction import predict
from mixtral_recipes.reports.page import write_report_of
from mixtral_recipes.settings.changes import refuse_other_settings
from mixtral_recipes.settings.check import check_settings
from mixtral_recipes.settings.checkpoint import ModelCheckpoint
from mixtral_recipes.settings.evaluation import EvaluationConfig, EvaluationTarget
from mixtral_recipes.settings.log import NeMoLogger
from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments
from mixtral_recipes.settings.objects import built
from mixtral_recipes.settings.optim import MegatronOptimizerModule
from mixtral_recipes.settings.peft import LoRA
from mixtral_recipes.settings.resume import AutoResume, refuse_without_start
from mixtral_recipes.settings.tokenizer import of_recipe
from mixtral_recipes.settings.trainer import Trainer
from mixtral_recipes.system.files import (
    clear_all_leftovers,
    refuse_unwritable,
    refuse_unwritable_file,
    staging_path,
    write_json,
    write_text,
)
from mixtral_recipes.system.ranks import first, launched_rank, sole_writer
from mixtral_recipes.training import distributed, step
from mixtral_recipes.training.loop import fit
from mixtral_recipes.training.model import check_megatron_config, seen_model
from mixtral_recipes.training.prepare import Parts, prepare
from mixtral_recipes.training.watch.log import RunLog

__all__ = ["evaluate", "export_ckpt", "finetune", "generate", "import_ckpt", "pretrain", "train", "validate"]

_SQUAD = EvaluationConfig()

nemo_run_jobs.activate()  # a script may write its recipe without any of ours


def _task[F: Callable[..., Any]](function: F) -> F:
    """A task: configs among its arguments are built, and its error is left where the process that started it looks."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with ranks_from_here.told_to_scheduler(), advice_for_scripts():
            return function(*map(built, args), **{name: built(value) for name, value in kwargs.items()})

    return called  # pyright: ignore[reportReturnType]


@_task
def train(
    model: MixtralModel,
    data: DataModule | LightningData,
    trainer: Trainer,
    log: NeMoLogger | None = None,
    resume: AutoResume | None = None,
    optim: MegatronOptimizerModule | None = None,
    tokenizer: Any = None,
    model_transform: LoRA | None = None,
) -> Path:
    """Train a model: all its weights, or adapters.

    Call it in every process of a job. In a process that no launcher started, it starts the job's on this machine.

    Args:
        model: What to train.
        data: What to train on; an object with ``train_dataloader()``, as Lightning has, is put in a `LightningAdapter`.
        trainer: The run's length and layout.
        log: Where to write.
        resume: Where to start from; random weights if there are none to restore.
        optim: Optimizer and schedule; None uses the model's.
        tokenizer: ``"data"`` uses the data module's, ``"model"`` or None the model's or the checkpoint's; else a
            folder, a Hub id, an `AutoTokenizer`, or a tokenizer.
        model_transform: Adapters to train; None trains all weights.

    Returns:
        The run's folder; its result.json holds the outcome.

    Raises:
        LaunchError: a rank that this process started failed, or the trainer has several nodes.
        Preempted: the run was asked to stop, and saved.
    """
    return _run(train, model, data, trainer, log, resume, optim, model_transform, tokenizer)


@_task
def pretrain(
    model: MixtralModel,
    data: DataModule | LightningData,
    trainer: Trainer,
    log: NeMoLogger | None = None,
    resume: AutoResume | None = None,
    optim: MegatronOptimizerModule | None = None,
    tokenizer: Any = "data",
) -> Path:
    """Train all weights, from random ones or from ``resume.restore_config``. Arguments and result as for `train`."""
    return _run(pretrain, model, data, trainer, log, resume, optim, None, tokenizer)


@_task
def finetune(
    model: MixtralModel,
    data: DataModule | LightningData,
    trainer: Trainer,
    log: NeMoLogger | None = None,
    resume: AutoResume | None = None,
    optim: MegatronOptimizerModule | None = None,
    peft: LoRA | None = None,
    tokenizer: Any = "model",
) -> Path:
    """Fine-tune a checkpoint, all of it or by adapters. Arguments and result as for `train`.

    Args:
        peft: Adapters to train; None trains all weights.

    Raises:
        RecipeError: ``resume.restore_config.path`` is not set.
    """
    return _run(finetune, model, data, trainer, log, resume, optim, peft, tokenizer)


@_task
def validate(
    model: MixtralModel,
    data: DataModule | LightningData,
    trainer: Trainer,
    log: NeMoLogger | None = None,
    resume: AutoResume | None = None,
    optim: MegatronOptimizerModule | None = None,
    tokenizer: Any = None,
    model_transform: LoRA | None = None,
) -> Path:
    """Measure the validation loss of a run's newest checkpoint, or of ``resume.restore_config``'s weights.

    Arguments as for `train`.

    Returns:
        The run's folder. Its validation.json, the only file written, holds ``val_loss`` (None without a validation
        set), ``step`` and ``restored_from``.
    """
    return _run(validate, model, data, trainer, log, resume, optim, model_transform, tokenizer)


@_task
def import_ckpt(
    model: MixtralModel, source: str | Path, output_path: str | Path | None = None, overwrite: bool = False
) -> Path:
    """Convert a Hugging Face Mixtral to a Megatron checkpoint, with NeMo's arguments.

    Args:
        model: The expected model; its sizes, and whatever else it sets, are compared with the source's.
        source: ``hf://org/name[@revision]`` or a folder.
        output_path: Folder to write; None puts it under ``$MIXTRAL_RECIPES_HOME``.
        overwrite: Whether an existing output is replaced.

    Raises:
        CheckpointError: the source is incomplete, damaged, or not a Mixtral.
        RecipeError: it is a different Mixtral from ``model``, or ``model`` is not a model.
    """
    from mixtral_recipes.importers.agreement import refuse_another
    from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint

    check_settings(import_ckpt, {"model": model, "source": source})
    return import_checkpoint(
        str(source),
        Path(output_path).expanduser() if output_path else None,
        overwrite=overwrite,
        accept=lambda opened: refuse_another(model.config, opened.config, opened.folder),
    )


@_task
@takes_nemos_arguments
def export_ckpt(
    path: str | Path, target: str = "hf", output_path: str | Path | None = None, overwrite: bool = False, **options: Any
) -> Path:
    """Convert a Megatron checkpoint to Hugging Face files, with NeMo's arguments.

    Args:
        path: Checkpoint folder or ``nemo://ID``, or a run's name or folder; an adapter checkpoint is merged into its
            base on the way to ``"hf"``.
        target: ``"hf"``, or ``"hf-peft"`` for the adapter alone; `mixtral_recipes.importers.exports` lists all.
        output_path: Folder to write (for ``"gguf"``, a file); None appends ``-hf`` or ``.gguf`` to ``path``.
        overwrite: Whether an existing output is replaced.
        **options: Options of the target's function, e.g. ``dtype="bf16"``.

    Raises:
        CheckpointError: an unknown target, an option it does not have, or a checkpoint that is incomplete or damaged.
    """
    from mixtral_recipes.importers.exports import default_output, export

    source = checkpoint_folder(path)
    options["base"] = base_folder(options.get("base"))
    output = Path(output_path).expanduser() if output_path else default_output(source, target)
    return export(source, output, target, overwrite=overwrite, **options)


@_task
@takes_nemos_arguments
def generate(
    path: str | Path,
    prompts: list[str] | None = None,
    input_dataset: str | Path | None = None,
    add_BOS: bool = False,
    max_batch_size: int = 4,
    random_seed: int | None = None,
    inference_params: SamplingParams | Sampling | None = None,
    text_only: bool = False,
    output_path: str | Path | None = None,
    *,
    chat: bool = False,
    dtype: str | None = None,
) -> list[Any]:
    """Continue prompts with a checkpoint, with NeMo's arguments and ours.

    Runs on Megatron, in this process or in all processes of a job that torchrun started, which share the experts.

    Args:
        path: A checkpoint, of adapters too, or anything else that the command `generate` takes: a run's name, a Hub id.
        prompts: The texts to continue.
        input_dataset: Instead of prompts: a JSONL file whose records have an ``input``.
        add_BOS: Whether each prompt begins with the tokenizer's first token.
        max_batch_size: The maximum number of prompts generated together.
        random_seed: Seed for sampling; None draws one from torch's random numbers.
        inference_params: Megatron's ``SamplingParams`` (``CommonInferenceParams``), of which ``temperature``,
            ``top_k``, ``top_p`` and ``num_tokens_to_generate`` are read; or our `mixtral_recipes.inference.sampling`'s
            ``Sampling``, which has its own seed; None generates 30 tokens, always the most likely one.
        text_only: Whether to return texts instead of objects with ``prompt`` and ``generated_text``.
        output_path: A file to write the texts to as well, one JSON string per line.
        chat: Whether each prompt is a question, put into the tokenizer's chat template.
        dtype: "bf16", "fp16" or "fp32"; None uses config.json's.

    Raises:
        CheckpointError: there is no such model, or it cannot be loaded.
        EnvironmentProblem, IsADirectoryError: ``output_path`` cannot be written.
        RecipeError: no prompts are given, or one is too long.
    """
    from mixtral_recipes.evaluation import from_python

    output = Path(output_path).expanduser().absolute() if output_path and launched_rank() == 0 else None
    if output is not None:
        refuse_unwritable_file(output)
    prompts = from_python.prompts_of(prompts, input_dataset)
    seed = random_seed if random_seed is not None else int(torch.randint(2**62, ()))
    texts = from_python.generate(
        model_checkpoint(path),
        prompts,
        from_python.sampling_of(inference_params, seed),
        max_batch_size,
        add_bos=add_BOS,
        chat=chat,
        dtype=dtype,
    )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, "".join(json.dumps(text) + "\n" for text in texts))
    return (
        texts
        if text_only
        else [from_python.Generated(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    )


@_task
@takes_nemos_arguments
def evaluate(target_cfg: EvaluationTarget | str | Path, eval_cfg: EvaluationConfig = _SQUAD) -> dict[str, Any]:
    """Score a model on held-out SQuAD questions or tasks of lm-evaluation-harness, with NeMo's arguments.

    Runs on Megatron, in this process or in all processes of a job that torchrun started. The scores are also kept
    beside the model.

    Args:
        target_cfg: The model, named as for `generate`, or an `EvaluationTarget`.
        eval_cfg: What is evaluated.

    Returns:
        For SQuAD ``exact_match`` and ``f1`` in percent, ``count``, and ``predictions`` by question id; for tasks, the
        metrics of each.

    Raises:
        RecipeError: no model is named, or there is no such task.
    """
    from mixtral_recipes.evaluation import from_python

    return from_python.evaluate(model_checkpoint(from_python.model_of(target_cfg)), eval_cfg)


def _run(
    task: Callable[..., Any],
    model: MixtralModel,
    data: DataModule | LightningData,
    trainer: Trainer,
    log: NeMoLogger | None,
    resume: AutoResume | None,
    optim: MegatronOptimizerModule | None,
    peft: LoRA | None,
    tokenizer: Any,
) -> Path:
    """Check a recipe, then run it: in this process, or in as many as it asks for if no launcher started any."""
    module = as_data_module(data, trainer)
    nemo_run_jobs.refuse_while_loading()
    given = {
        "model": model, "data": module, "trainer": trainer, "log": log, "resume": resume, "optim": optim, "peft": peft,
        "tokenizer": tokenizer,
    }  # fmt: skip
    for notice in check_settings(task, given):
        if launched_rank() == 0:
            warnings.warn(notice, MixtralRecipesWarning, skip_file_prefixes=(str(Path(__file__).parent),))
    if task is finetune:
        refuse_without_start(resume)
    parts = Parts(model, module, trainer, log, optim, resume, peft, of_recipe(tokenizer, module))
    parts.resume = with_start(parts.resume)
    run_dir = parts.log.run_dir.absolute()
    seen = seen_model(parts.model, parts.trainer, parts.resume, parts.peft, parts.tokenizer, parts.data)
    check_recipe_layout(dataclasses.replace(parts.model, config=seen), parts.trainer, parts.data)
    check_megatron_config(seen, parts.trainer)
    if launched_rank() == 0:
        preflight.check_packages(parts.log)
        preflight.check_places(parts.data)
    trainer, log = parts.trainer, parts.log
    done = records.finished(run_dir, trainer.max_steps, parts.resume) if task is not validate else None
    if done is not None:
        now = parts.asked | parts.files
        refuse_other_settings(log.name, done["steps"], records.asked(run_dir) or now, now)
        if launched_rank() == 0:
            print(f"{log.name} has finished: {done['steps']} steps, {done['checkpoint']}; nothing was done.")
        return run_dir
    if launched_rank() == 0:
        refuse_unwritable(run_dir)
        longest = (log.ckpt or ModelCheckpoint()).folder_name(log.name, trainer.max_steps, 10**9, 99.99)
        refuse_unwritable(staging_path(run_dir / "checkpoints" / longest))
    work = functools.partial(_validate, parts) if task is validate else functools.partial(_train, task.__name__, parts)
    if not ranks_from_here.wanted(trainer.num_nodes, trainer.devices):
        work()
        distributed.free_memory()
        return run_dir
    distributed.check_accelerator(trainer.accelerator)
    ranks_from_here.start(
        work,
        devices=trainer.devices,
        name=log.name if task is not validate else f"{log.name}-validate",
        run_dir=log.run_dir,
        recipe=task.__name__,
    )
    return run_dir


def _train(task: str, parts: Parts) -> dict[str, Any]:
    """Train in a run folder that no other run writes to, and write a report however it ends."""
    run_log, asked = None, parts.asked
    try:
        with ranks_from_here.recorded(name=parts.log.name, run_dir=parts.log.run_dir, recipe=task):
            device = distributed.join(parts.trainer)
            with sole_writer(parts.checkpoints):
                first(lambda: clear_all_leftovers(parts.checkpoints))
                run_log = RunLog(parts.log, parts.trainer.max_steps, is_writer=torch.distributed.get_rank() == 0)
                ready = prepare(parts, device, run_log.say)
                run_log.event("plan", _expected(parts, device))
                first(lambda: write_json(records.asked_file(parts.log.run_dir), asked | parts.files))
                return fit(ready, run_log)
    except Exception as error:
        if run_log is not None:
            run_log.fail(error)
        raise
    finally:
        try:
            if run_log is not None:
                run_log.close()
                write_report_of(run_log)
        finally:  # a notebook that is interrupted in a report, too, can train again
            distributed.shut_down()


def _expected(parts: Parts, device: torch.device) -> dict[str, Any]:
    """What the planner expects of a run; empty where it cannot tell, which must not cost anybody a run."""
    try:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        return predict(parts, name) or {}
    except Exception:
        return {}


def _validate(parts: Parts) -> dict[str, Any]:
    """Measure, and write nothing but what was measured."""
    try:
        device = distributed.join(parts.trainer)
        say = print if torch.distributed.get_rank() == 0 else lambda text: None
        ready = prepare(parts, device, say, for_training=False)
        losses = step.validate(ready.run)
        found = {
            "val_loss": losses.loss if losses else None,
            **({"val_loss_by_source": losses.by_source} if losses and losses.by_source else {}),
            "step": ready.position.step,
            "restored_from": ready.restored_from,
        }
        if torch.distributed.get_rank() == 0:
            parts.log.run_dir.mkdir(parents=True, exist_ok=True)
            write_json(parts.log.run_dir / "validation.json", found)
        say(f"validation loss {found['val_loss']} at step {found['step']}")
        return found
    finally:
        distributed.shut_down()
