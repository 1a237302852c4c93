"""Checks of a whole recipe before anything is built or queued."""

import contextlib
import copy
import dataclasses
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fiddle as fdl

from mixtral_recipes.data.modules.lightning import as_data_module, refuse_other_data
from mixtral_recipes.data.tokenizer_choice import check_place
from mixtral_recipes.errors import (
    DataError,
    EnvironmentProblem,
    MixtralRecipesError,
    MixtralRecipesWarning,
    RecipeError,
    in_short,
)
from mixtral_recipes.importers.resolve import check_source
from mixtral_recipes.layout import cards
from mixtral_recipes.layout.cards import Card
from mixtral_recipes.layout.repair import check_layout
from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.models.kernels import INSTALL
from mixtral_recipes.planner import verdict
from mixtral_recipes.planner.workload import Workload
from mixtral_recipes.settings.check import check_settings
from mixtral_recipes.settings.peft import QLoRA
from mixtral_recipes.settings.resume import AutoResume, refuse_without_start
from mixtral_recipes.settings.tokenizer import of_recipe
from mixtral_recipes.system.files import refuse_long_names, staging_path
from mixtral_recipes.training.model import check_megatron_config, refusals_told, seen_model
from mixtral_recipes.training.origin import check_adopted
from mixtral_recipes.training.states import check_states
from mixtral_recipes.training.watch import callbacks
from mixtral_recipes.training.watch.writers import logger_package


def preflight(recipe: Any, hardware: str | None = "h100", *, elsewhere: bool = False, awaited: bool = False) -> None:
    """Refuse a recipe that cannot run, and warn of settings that have no effect.

    Args:
        recipe: The recipe.
        hardware: The card whose memory it must fit, not asked where the recipe runs without a GPU; None asks for none.
        elsewhere: Whether the job's files and packages are not this machine's (a container, a cluster reached by
            ssh): what is missing here is then a warning.
        awaited: Whether another run makes what the recipe starts from.

    Raises:
        CheckpointError: what it starts from is not there, or cannot be taken.
        RecipeError: every setting of a wrong type; a model, checkpoint and tokenizer that do not fit together, or that
            Megatron-Core refuses; every broken rule of the layout and a layout that breaks none and fits; what takes
            more memory than there is; or a setting that no machine runs (precision, overlap).
    """
    refuse_other_data(getattr(recipe, "data", None))
    for notice in check_settings(fdl.get_callable(recipe), fdl.ordered_arguments(recipe)):
        warnings.warn(notice, MixtralRecipesWarning, stacklevel=2)
    recipe = copy.copy(recipe)
    with _told(elsewhere):
        check_packages(recipe.log)
    _build_parts(recipe, elsewhere=elsewhere)
    recipe.data = as_data_module(_built(recipe, "data"))  # one's own may state its batch only once it is built
    with refusals_told():
        model: Any = _built(recipe, "model")
    names = ("trainer", "resume", "peft", "tokenizer", "optim")
    trainer, resume, peft, tokenizer, optim = (_built(recipe, name) for name in names)
    log = _built(recipe, "log")
    if log is not None and getattr(log, "ckpt", None) is not None:
        longest = log.ckpt.folder_name(log.name, trainer.max_steps, 10**9, 99.99)
        refuse_long_names(staging_path(Path(longest)), on=Path("/"))
    if fdl.get_callable(recipe).__name__ == "finetune":
        refuse_without_start(resume)
    start = resume.restore_config if resume is not None else None
    if start and start.path and not (elsewhere or awaited):
        check_source(start.path)
        check_adopted(start, peft)
    if tokenizer is None and fdl.get_callable(recipe).__name__ == "pretrain":
        tokenizer = "data"
    tokenizer = of_recipe(tokenizer, recipe.data)
    seen = seen_model(model, trainer, resume or AutoResume(), peft, tokenizer, recipe.data)
    with _told(elsewhere):
        check_place(tokenizer or model.tokenizer)
        check_places(recipe.data)
    plugins = trainer.plugins
    made = recipe.__arguments__ | {"model": model, "trainer": trainer, "peft": peft, "optim": optim}
    outline = types.SimpleNamespace(__fn_or_cls__=fdl.get_callable(recipe), **made)  # what is not given has its default
    job = dataclasses.replace(Workload.of(outline), shape=ModelShape.of(seen), topk=seen.moe_router_topk)
    on_gpu = hardware is not None and trainer.accelerator == "gpu"
    check_job(job, cards.card(hardware or "h100"), on_gpu=on_gpu)
    check_megatron_config(seen, trainer)
    plugins.check()
    if optim is not None:
        check_states(optim, plugins, frozen=peft is not None)
    if isinstance(peft, QLoRA):
        peft.check_base(plugins, job.shape, job.topology)
    callbacks.call(trainer.callbacks, "check", Topology.of(trainer))


def check_packages(log: Any) -> None:
    """Refuse a logger whose package is not installed, or cannot be imported.

    Args:
        log: A NeMoLogger, or a config of one; None logs nowhere.

    Raises:
        EnvironmentProblem: names the setting and the package.
    """
    for name in ("wandb", "mlflow"):
        if getattr(log, name, None) is not None:
            logger_package(name)


def check_places(data: Any) -> None:
    """Refuse data whose files are not there, without reading them or asking the Hub.

    Args:
        data: A data module; one that makes its files itself is not asked.

    Raises:
        DataError: names what is missing.
    """
    check = getattr(data, "check_places", None)
    if check is not None and not getattr(data, "prepares", False):
        check()


@contextlib.contextmanager
def _told(only: bool) -> Iterator[None]:
    """Turn a refusal into a warning."""
    try:
        yield
    except (DataError, EnvironmentProblem) as error:
        if not only:
            raise
        warnings.warn(f"{error} It must be available where the job runs.", MixtralRecipesWarning, stacklevel=3)


def _build_parts(recipe: Any, *, elsewhere: bool) -> None:
    """Build what costs nothing to build; the model comes later, with the checkpoint it starts from.

    What is missing only here is left out of ``recipe``, and not looked at any further.

    Raises:
        EnvironmentProblem: names the part, and what is not installed.
        RecipeError: names the part.
    """
    for path in ("trainer", "optim", "log", "resume", "peft"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _built(recipe, path)
        except MixtralRecipesError:
            raise
        except Exception as error:  # whatever a class raises over its arguments
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            if "TransformerEngine" in str(cause):  # Megatron looks for its optimizer
                setattr(recipe, path, None)
                with _told(elsewhere):
                    raise EnvironmentProblem(
                        f"{path}.config.use_precision_aware_optimizer=True needs Transformer Engine, which is not "
                        f"installed: {INSTALL}"
                    ) from error
                continue
            raise RecipeError(f"{path} cannot be built: {in_short(cause)}") from error


def check_job(job: Workload, card: Card, *, on_gpu: bool = True) -> None:
    """Refuse a job whose layout cannot run or does not fit, and warn of one that barely does.

    Args:
        job: The job.
        card: The GPU.
        on_gpu: Whether memory is a GPU's.

    Raises:
        RecipeError: a number format the GPU lacks; all broken rules at once, or what takes too much memory, with
            settings that run and fit.
    """
    if not on_gpu:
        check_layout(job.topology, job.shape, job.batch)
        return
    verdict.check_formats(job, card)
    verdict.check_layout_of(job, card)
    refused = verdict.refusal(job, card)
    if refused:
        raise RecipeError(refused)
    notice = verdict.warning(job, card)
    if notice:
        warnings.warn(notice, MixtralRecipesWarning, stacklevel=3)


def _built(recipe: Any, name: str) -> Any:
    part = recipe.__arguments__.get(name)
    return fdl.build(part) if isinstance(part, fdl.Buildable) else part
