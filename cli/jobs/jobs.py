"""From options to a job: choose a recipe, change it, check it, launch it. Shared by pretrain, finetune and run."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixtral_recipes.cli.output import note
from mixtral_recipes.errors import EnvironmentProblem, LaunchError, RecipeError
from mixtral_recipes.recipes import catalog
from mixtral_recipes.system import machine


@dataclass
class Place:
    """Where a job runs.

    Attributes:
        executor: ``direct``, ``local`` or ``slurm``.
        cluster: A profile of clusters.toml, for Slurm.
        detach: Whether to return once the job is queued.
        settings: Settings over the profile's, e.g. ``{"partition": "gpu"}``.
    """

    executor: str = "local"
    cluster: str | None = None
    detach: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


def place(executor: str, cluster: str | None, detach: bool, more: list[str] | None, **given: Any) -> Place:
    """Where a job runs, from its options.

    Args:
        executor: ``direct``, ``local`` or ``slurm``.
        cluster: A profile of clusters.toml.
        detach: Whether to return once the job is queued.
        more: ``--slurm`` options.
        given: Settings with an option of their own; None where it was not given.

    Raises:
        LaunchError: a setting that is not known, or one for Slurm without ``--executor slurm``.
    """
    from mixtral_recipes.executors.slurm.profile import settings_from

    settings = settings_from(more or []) | {key: value for key, value in given.items() if value is not None}
    own = {"cluster": cluster, **given}
    ignored = [f"--{key}" for key, value in own.items() if value is not None] + ["--slurm"] * bool(more)
    if ignored and executor != "slurm":
        raise LaunchError(f"{', '.join(ignored)}: no effect with --executor {executor}; use --executor slurm.")
    return Place(executor, cluster, detach, settings)


@dataclass
class JobOptions:
    """What every job command accepts; see `cli.options`.

    Attributes:
        task: ``pretrain`` or ``finetune``; None takes the file's.
        recipe: Recipe name; None chooses by the machine.
        yaml: A recipe file instead.
        dir: Folder of runs; None takes the file's, or ``runs``.
        name: Run name; None makes one.
        place: Where it runs.
        only_check: Whether nothing will be run, so that this machine need not fit.
        overrides: Dotted overrides.
        arguments: Arguments of the recipe function the user gave, e.g. ``{"num_nodes": 2}``.
        settings: Settings from options of their own, as (path, value), e.g. ``--restore-from``.
        data: The data set that takes the place of the recipe's; None keeps it.
    """

    task: str | None
    recipe: str | None = None
    yaml: Path | None = None
    dir: Path | None = None
    name: str | None = None
    place: Place = field(default_factory=Place)
    only_check: bool = False
    overrides: list[str] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    settings: list[tuple[str, Any]] = field(default_factory=list)
    data: str | None = None

    @property
    def here(self) -> bool:
        """Whether the job will run on this machine."""
        return self.place.executor != "slurm" and not self.only_check


@dataclass
class Job:
    """A recipe that passed its checks, and where it runs."""

    recipe_name: str
    task: str
    recipe: Any
    place: Place
    name: str
    run_dir: Path


def prepare(options: JobOptions) -> Job:
    """Resolve a job and check it.

    Raises:
        RecipeError: a recipe, setting or layout that cannot run.
        EnvironmentProblem: the recipe needs GPUs this machine does not have.
    """
    notes: list[str] = []  # said once all checks have passed: an error stands alone
    if options.yaml is not None:
        recipe_name, task, recipe = _from_file(options, options.yaml)
    else:
        recipe_name, task = _choose(options), options.task or "finetune"
        if options.recipe is None:
            notes.append(f"No GPU here: taking --recipe {recipe_name}, a small Mixtral that runs on the CPU.")
        if options.here and not any(text.startswith("trainer.accelerator=") for text in options.overrides):
            _refuse_without_gpus(recipe_name, task, options)
        recipe = _from_catalog(options, recipe_name, task)
    if options.data is not None:
        recipe.data, taken_for = _data(options.data, recipe.data)
        notes.append(f"Data: {taken_for}.")
    _change(recipe, options)
    name = options.name or recipe.log.name
    if name in (None, "default"):
        name = f"{recipe_name}_{time.strftime('%Y%m%d_%H%M%S')}"
    folder = (options.dir or Path(recipe.log.log_dir or "runs")).absolute()
    recipe.log.log_dir, recipe.log.name = str(folder), name
    _check(recipe, recipe_name, task, options)
    for line in notes:
        note(line)
    return Job(recipe_name, task, recipe, options.place, name, folder / name)


def _choose(options: JobOptions) -> str:
    if options.recipe is not None:
        return catalog.entry(options.recipe).name
    if machine.gpu_count():
        raise RecipeError(f"choose a recipe with --recipe: {', '.join(catalog.names())}.")
    return "mixtral_tiny"


def _from_catalog(options: JobOptions, recipe_name: str, task: str) -> Any:
    from mixtral_recipes.overrides.loading import load

    arguments = dict(options.arguments)
    one_process = recipe_name == "mixtral_tiny" and "num_gpus_per_node" not in arguments and not _two_processes(options)
    if one_process:
        arguments["num_gpus_per_node"] = 1
    recipe = load(recipe_name, task, **arguments)
    if one_process:
        recipe.trainer.strategy.expert_model_parallel_size = 1
    return recipe


def _two_processes(options: JobOptions) -> bool:
    """Two processes where there are two cores and processes are started at all."""
    return not options.here or (options.place.executor != "direct" and machine.cores() >= 2)


def _from_file(options: JobOptions, file: Path) -> tuple[str, str, Any]:
    from mixtral_recipes.overrides import paths as overrides
    from mixtral_recipes.overrides.yaml_file import header, read_recipe

    if options.recipe:
        raise RecipeError(f"--recipe does not go with a recipe file; {file} names its recipe.")
    recipe_name, task = header(file)
    if options.task and task != options.task:
        raise RecipeError(f"{file} is a {task} recipe; run it with: mixtral-recipes run {file}")
    sizes = {"num_nodes": "trainer.num_nodes", "num_gpus_per_node": "trainer.devices"}
    for argument in options.arguments:
        if argument not in sizes:
            raise RecipeError(f"--{argument.replace('_', '-')} does not go with a recipe file; write it into {file}.")
    recipe = read_recipe(file)
    for argument, value in options.arguments.items():
        overrides.set_value(recipe, sizes[argument], value)
    return recipe_name, task, recipe


def _change(recipe: Any, options: JobOptions) -> None:
    from mixtral_recipes.overrides import paths as overrides

    for path, value in options.settings:
        overrides.set_value(recipe, path, value)
    overrides.apply(recipe, options.overrides)


def _data(spec: str, replaced: Any) -> tuple[Any, str]:
    """A configuration of the module that reads a data set, with the batch of the one it replaces, and what it found.

    Files are read through: better a broken record now than in a job that waited for its turn.
    """
    import nemo_run as run

    from mixtral_recipes.data.recognise import recognize

    found = recognize(spec)
    if found.source is not None and found.source.files:
        found.module_class(**found.kwargs).check_records()
    batch = ("seq_length", "micro_batch_size", "global_batch_size", "num_workers", "seed", "packed_sequence_specs")
    kept = {name: getattr(replaced, name) for name in batch if name in replaced.__arguments__}
    return run.Config(found.module_class, **kept, **found.kwargs), found.description


def _check(recipe: Any, recipe_name: str, task: str, options: JobOptions) -> None:
    from mixtral_recipes.overrides.preflight import preflight

    preflight(recipe)
    if task == "finetune" and not getattr(recipe.resume.restore_config, "path", None):
        raise RecipeError(f"{recipe_name} has no public checkpoint to start from; give one with --restore-from.")
    if options.here and recipe.trainer.accelerator == "gpu" and machine.gpu_count() < recipe.trainer.devices:
        raise EnvironmentProblem(_needs_gpus(recipe_name, recipe.trainer.num_nodes, recipe.trainer.devices, ""))


def _refuse_without_gpus(recipe_name: str, task: str, options: JobOptions) -> None:
    """Say at once, before anything is imported, that a recipe cannot run here."""
    entry = catalog.entry(recipe_name)
    if not entry.needs_gpu or machine.gpu_count():
        return
    layout = entry.layout(_layout_task(task, options.arguments), options.arguments.get("hardware", "h100"))
    nodes = options.arguments.get("num_nodes", layout.num_nodes)
    gpus = options.arguments.get("num_gpus_per_node", layout.num_gpus_per_node)
    raise EnvironmentProblem(_needs_gpus(recipe_name, nodes, gpus, f", {layout.topology.describe()}"))


def _layout_task(task: str, arguments: dict[str, Any]) -> str:
    if task == "pretrain":
        return "performance" if arguments.get("performance_mode") else "pretrain"
    if arguments.get("peft_scheme", "lora") != "none":
        return "peft"
    return "full_packed" if arguments.get("packed_sequence") else "full"


def _needs_gpus(recipe_name: str, nodes: int, gpus: int, layout: str) -> str:
    asked = f"{nodes} node{'s' if nodes > 1 else ''} x {gpus}{layout}"
    return (
        f"{recipe_name} needs {nodes * gpus} GPUs ({asked}); this machine has {machine.gpu_count() or 'none'}. Use "
        "--executor slurm for a cluster, --dry-run to check it here, or --recipe mixtral_tiny, which runs on a CPU."
    )


def save_yaml(job: Job, path: Path) -> None:
    """Write the resolved recipe without this machine's run folder, so that it runs anywhere."""
    from mixtral_recipes.overrides.yaml_file import write_recipe

    job.recipe.log.log_dir, job.recipe.log.name = None, "default"
    write_recipe(job.recipe, path, name=job.recipe_name)
    note(f"Wrote {path}; run it with: mixtral-recipes run {path}")


def launch(job: Job, *, dry_run: bool) -> dict[str, Any]:
    """Run a job and return its result: the loop's, with the recipe's name."""
    from mixtral_recipes.executors.launch import launch as start

    note(describe(job))
    executor: Any = job.place.executor
    if dry_run and executor == "local" and job.recipe.trainer.num_nodes > 1:
        note(f"It takes {job.recipe.trainer.num_nodes} nodes: run it with --executor slurm.")
        return {"recipe": job.recipe_name, "dry_run": True, "executor": None, "run_dir": str(job.run_dir)}
    if executor == "slurm":
        from mixtral_recipes.executors.slurm.executor import slurm_executor

        trainer = job.recipe.trainer
        executor = slurm_executor(
            trainer.num_nodes, trainer.devices, cluster_name=job.place.cluster, **job.place.settings
        )
    result = start(
        job.recipe, executor=executor, name=job.name, run_dir=job.run_dir, dry_run=dry_run, detach=job.place.detach
    )
    return {"recipe": job.recipe_name, **result}


def describe(job: Job) -> str:
    """A job in one line."""
    from mixtral_recipes.layout.topology import Topology

    topology = Topology.of(job.recipe.trainer)
    return (
        f"{job.recipe_name}.{job.task}: {topology.world_size} process(es), {topology.describe()}, "
        f"{job.recipe.trainer.max_steps} steps, run folder {job.run_dir}"
    )
