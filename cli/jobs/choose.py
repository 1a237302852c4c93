"""From options to a job: choose a recipe, change it, check it."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixtral_recipes.cli.jobs.data_settings import columns_in
from mixtral_recipes.cli.options.place import ExecutorName, PlaceOptions
from mixtral_recipes.cli.options.recipe import (
    FineTuningOptions,
    PeftScheme,
    PretrainingOptions,
    RecipeOptions,
    option_of,
)
from mixtral_recipes.cli.options.result import JobResultOptions
from mixtral_recipes.cli.output import note
from mixtral_recipes.errors import DataError, EnvironmentProblem, RecipeError
from mixtral_recipes.executors.runs.checkpoints import with_start
from mixtral_recipes.executors.slurm.profile import Cluster, cluster
from mixtral_recipes.layout import cards
from mixtral_recipes.recipes import catalog
from mixtral_recipes.system import machine


@dataclass
class JobOptions:
    """Everything a job command was given.

    Attributes:
        task: ``pretrain`` or ``finetune``; None uses the file's.
        chosen: Recipe by name or from a file; neither chooses by the machine.
        place: Where it runs and writes.
        result: What it is to leave.
        overrides: Dotted overrides.
        tuning: What only fine-tuning offers.
        pretraining: What only pretraining offers.
    """

    task: str | None
    chosen: RecipeOptions
    place: PlaceOptions
    result: JobResultOptions
    overrides: list[str]
    tuning: FineTuningOptions = field(default_factory=FineTuningOptions)
    pretraining: PretrainingOptions = field(default_factory=PretrainingOptions)

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the recipe function that were given, e.g. ``{"num_nodes": 2}``."""
        given = {
            "precision": self.chosen.precision,
            "hardware": self.chosen.hardware or self._own_card,
            "peft_scheme": self.tuning.peft and self.tuning.peft.value,
            "packed_sequence": self.tuning.packed,
            "instruct": self.tuning.instruct or None,
            "performance_mode": self.pretraining.performance_mode or None,
        }
        return self.place.sizes | {name: value for name, value in given.items() if value is not None}

    @property
    def hardware(self) -> str:
        """The card it must fit: the one named, else this machine's where it runs here, else an H100."""
        return self.chosen.hardware or self._own_card or "h100"

    @property
    def _own_card(self) -> str | None:
        """This machine's card, where the job runs on it and the planner knows it."""
        return cards.named(machine.gpu_name()) if self.place.executor is not ExecutorName.slurm else None

    @property
    def here(self) -> bool:
        """Whether the job will run on this machine; if not, the machine need not fit it."""
        only_check = self.result.dry_run or self.result.to_yaml is not None
        return self.place.executor is not ExecutorName.slurm and not only_check


@dataclass
class Job:
    """A recipe that passed its checks, where it runs, and there the settings over the cluster's profile.

    ``on`` is the login node behind which its files are; empty where they are here.
    """

    recipe_name: str
    task: str
    recipe: Any
    place: PlaceOptions
    slurm: dict[str, Any]
    name: str
    run_dir: Path
    on: str = ""


def prepare(options: JobOptions) -> Job:
    """Resolve a job and check it.

    Raises:
        RecipeError: a recipe, setting or layout that cannot run.
        EnvironmentProblem: the recipe needs GPUs this machine does not have.
    """
    slurm = options.place.over_profile()
    site = cluster(options.place.cluster, **slurm) if options.place.executor is ExecutorName.slurm else None
    notes: list[str] = []  # printed once all checks have passed, so that an error stands alone
    if options.chosen.yaml is not None:
        recipe_name, task, recipe = _from_file(options, options.chosen.yaml, notes)
    elif "." in (options.chosen.recipe or ""):
        recipe_name, task = str(options.chosen.recipe), str(options.task)
        recipe = _own(options, recipe_name, task)
    else:
        recipe_name, task = catalog.entry(options.chosen.recipe or _SMALLEST).name, options.task or "finetune"
        if options.chosen.recipe is None:
            notes.append(f"Using --recipe {recipe_name}, a small Mixtral, on {_what_is_here(options)}.")
        if options.here and not any(text.startswith("trainer.accelerator=") for text in options.overrides):
            _refuse_without_gpus(recipe_name, task, options)
        recipe = _from_catalog(options, recipe_name, task)
        notes += _layout_of_few_cards(options, recipe_name, task)
    if options.chosen.data:
        with _read_here(site):
            recipe.data, taken_for = _data(options.chosen.data, recipe.data, options.overrides)
        notes += [f"Data: {line}." for line in taken_for]
    _change(recipe, options)
    if options.chosen.data and not (site and site.ssh and _placed(options.overrides)):
        _read_through(recipe.data)
    name = options.place.name or recipe.log.name
    if name in (None, "default"):
        name = f"{recipe_name}_{time.strftime('%Y%m%d_%H%M%S')}"
    folder = options.place.dir or Path(recipe.log.log_dir or "runs")
    folder = site.folder(folder) if site else folder.expanduser().absolute()
    recipe.log.log_dir, recipe.log.name = str(folder), name
    elsewhere = site is not None and site.elsewhere
    _check(recipe, recipe_name, options, elsewhere=elsewhere)
    for line in notes + ([] if elsewhere else _still_to_come(recipe)):
        note(line)
    on = (site and site.ssh) or ""
    return Job(recipe_name, task, recipe, options.place, slurm, name, folder / name, on)


_SMALLEST = "mixtral_tiny"  # ships with the package, and trains on whatever there is


def _what_is_here(options: JobOptions) -> str:
    gpus = _gpus(options)
    if not gpus:
        return "the CPU: no GPU here" if options.place.executor is not ExecutorName.slurm else "what the cluster has"
    used = options.arguments.get("num_gpus_per_node", _processes(options))
    return f"{used} of {gpus} GPU(s), {machine.gpu_name() or 'NVIDIA'}, in {options.chosen.precision or 'bf16'}"


def _gpus(options: JobOptions) -> int:
    """GPUs of the machine the job runs on, as far as it is this one."""
    return machine.gpu_count() if options.place.executor is not ExecutorName.slurm else 0


def _from_catalog(options: JobOptions, recipe_name: str, task: str) -> Any:
    from mixtral_recipes.overrides.loading import load

    arguments = dict(options.arguments)
    if recipe_name == _SMALLEST:
        arguments.setdefault("num_gpus_per_node", _processes(options))
        if _gpus(options):
            arguments.setdefault("precision", "bf16")
    return load(recipe_name, task, **arguments)


def _own(options: JobOptions, path: str, task: str) -> Any:
    """The recipe of a user's own function, which need not know of cards where none was named."""
    from mixtral_recipes.overrides.loading import load_own

    unasked = () if options.chosen.hardware else ("hardware",)
    return load_own(path, task, **{name: value for name, value in options.arguments.items() if name not in unasked})


def _layout_of_few_cards(options: JobOptions, recipe_name: str, task: str) -> list[str]:
    """What to say of a layout that the planner chose, since the recipe's own is for other GPUs."""
    entry = catalog.entry(recipe_name)
    if not entry.needs_gpu:
        return []
    layout = _default_layout(options, recipe_name, task)
    if layout in entry.layouts.values() or not (options.place.sizes or options.chosen.hardware):
        return []
    again = ", every layer recomputed" if layout.recompute else ""
    return [f"Layout: {layout.topology.describe()}{again}. {layout.why}"]


def _default_layout(options: JobOptions, recipe_name: str, task: str) -> Any:
    from mixtral_recipes.recipes.outline import Question, default_layout

    known = {field.name for field in dataclasses.fields(Question)}
    return default_layout(Question(recipe_name, task, **{k: v for k, v in options.arguments.items() if k in known}))


def _processes(options: JobOptions) -> int:
    """Two if the executor starts processes and there are two GPUs or, without a GPU, two cores; else one."""
    gpus = _gpus(options)
    if options.place.executor is ExecutorName.direct or not (gpus or options.here):
        return 1 if options.here else 2
    return min(2, gpus or machine.cores())


def _from_file(options: JobOptions, file: Path, notes: list[str]) -> tuple[str, str, Any]:
    from mixtral_recipes.overrides.yaml_file import SIZES, automodel_file, header, read_recipe

    if options.chosen.recipe:
        raise RecipeError(f"--recipe cannot be combined with a recipe file; {file} names its own recipe.")
    recipe_name, task = header(file)
    if options.task and task != options.task:
        raise RecipeError(f"{file} is a {task} recipe; run it with: mixtral-recipes run {file}")
    given = {name: value for name, value in options.arguments.items() if name != "hardware"}  # that is for preflight
    for argument in given:
        if argument not in SIZES:
            raise RecipeError(f"{option_of(argument)} cannot be combined with a recipe file; set it in {file}.")
    automodel = automodel_file(file)
    if automodel is not None:
        recipe = automodel.recipe(**options.arguments)
        notes += automodel.notes
        return recipe_name, task, recipe
    return recipe_name, task, read_recipe(file, **given)


def _change(recipe: Any, options: JobOptions) -> None:
    from mixtral_recipes.overrides import paths as overrides

    tuning = options.tuning
    if tuning.bits is not None and tuning.peft is not PeftScheme.qlora:
        raise RecipeError(f"--bits {tuning.bits} applies only to a quantised base; use --peft qlora, or leave it out.")
    given = {
        "resume.restore_config.path": tuning.restore_from,
        "resume.restore_config.resize_vocab": tuning.resize_vocab or None,
        "data.chat_template": tuning.chat_template,
        "peft.bits": tuning.bits,
    }
    for path, value in given.items():
        if value is not None:
            overrides.set_value(recipe, path, value)
    overrides.apply(recipe, options.overrides)
    recipe.resume = with_start(recipe.resume)


def _data(specs: list[str], replaced: Any, overrides: Sequence[str]) -> tuple[Any, list[str]]:
    """A configuration of the module that reads the data, with the batch of the one it replaces, and what was found."""
    import nemo_run as run

    from mixtral_recipes.data.modules.mixed import MixedDataModule
    from mixtral_recipes.data.modules.pretraining import PreTrainingDataModule
    from mixtral_recipes.data.recognise import recognize, shares
    from mixtral_recipes.overrides.paths import with_batch_of

    names, weights = shares(specs)
    found = [recognize(name, columns_in(overrides) if len(names) == 1 else None) for name in names]
    told = [part.description for part in found]
    if len(found) == 1:
        data = run.Config(found[0].module_class, **found[0].kwargs)
    elif all(part.module_class is PreTrainingDataModule for part in found):
        paths = [part.kwargs["paths"][0] for part in found]
        mixed = [item for pair in zip(weights, paths, strict=True) for item in pair] if weights else paths
        data = run.Config(PreTrainingDataModule, **{**found[0].kwargs, "paths": mixed})
    else:
        sources = [run.Config(part.module_class, **part.kwargs) for part in found]
        data = run.Config(MixedDataModule, sources=sources, weights=weights)
    if weights and len(found) > 1:
        told.append("mixed " + " : ".join(f"{weight:g}" for weight in weights))
    return with_batch_of(replaced, data), told


@contextlib.contextmanager
def _read_here(site: Cluster | None) -> Iterator[None]:
    """Say of data that is not here how to name data that is on a cluster behind ssh."""
    try:
        yield
    except DataError as error:
        if site is None or not site.ssh:
            raise
        raise DataError(
            f"{error} --data is read on this machine, to see what it is: pass a copy (its first lines are enough), "
            f"and set data.dataset_root=PATH (for a corpus, data.paths=PATH) to its path on {site.ssh}."
        ) from error


def _placed(overrides: Sequence[str]) -> bool:
    """Whether the data that a job reads is another copy than the one that ``--data`` names."""
    return any(text.startswith(("data.dataset_root=", "data.paths=")) for text in overrides)


def _read_through(data: Any) -> None:
    """Read the records with the settings of the run: better a broken one now than in a job that waited its turn."""
    import fiddle as fdl

    module: Any = fdl.build(data)
    for pipeline in module.pipelines():
        if pipeline.source.files:
            pipeline.check()


def _check(recipe: Any, recipe_name: str, options: JobOptions, *, elsewhere: bool) -> None:
    from mixtral_recipes.executors.preflight import preflight

    preflight(recipe, options.hardware, elsewhere=elsewhere)
    if options.here and recipe.trainer.accelerator == "gpu" and machine.gpu_count() < recipe.trainer.devices:
        raise EnvironmentProblem(_needs_gpus(recipe_name, recipe.trainer.num_nodes, recipe.trainer.devices, ""))


def _still_to_come(recipe: Any) -> list[str]:
    """What the run's weights need first."""
    from mixtral_recipes.importers.peek import still_to_come

    start = getattr(getattr(recipe.resume, "restore_config", None), "path", None)
    line = still_to_come(start) if start else None
    return [line] if line else []


def _refuse_without_gpus(recipe_name: str, task: str, options: JobOptions) -> None:
    """Say at once, before anything is imported, that a recipe cannot run here."""
    entry = catalog.entry(recipe_name)
    if not entry.needs_gpu or machine.gpu_count():
        return
    layout = _default_layout(options, entry.name, task)
    nodes, gpus = layout.num_nodes, layout.num_gpus_per_node
    raise EnvironmentProblem(_needs_gpus(recipe_name, nodes, gpus, f", {layout.topology.describe()}"))


def _needs_gpus(recipe_name: str, nodes: int, gpus: int, layout: str) -> str:
    asked = f"{nodes} node{'s' if nodes > 1 else ''} x {gpus}{layout}"
    here = machine.gpu_count()
    fewer = f"--num-gpus-per-node {here} for a layout on the {here} here, " if here else ""
    tiny = f"--recipe {_SMALLEST}, which runs on a CPU"
    on_cpu = "trainer.accelerator=cpu" if recipe_name == _SMALLEST else tiny
    return (
        f"{recipe_name} needs {nodes * gpus} GPUs ({asked}); this machine has {here or 'none'}. Use {fewer}"
        f"--executor slurm for a cluster, --dry-run to check it here, or {on_cpu}."
    )
