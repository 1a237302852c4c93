"""From options to a job: choose a recipe, change it, check it, launch it. Shared by pretrain, finetune and run."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixtral_recipes.cli import machine
from mixtral_recipes.cli.output import note
from mixtral_recipes.errors import EnvironmentProblem, RecipeError
from mixtral_recipes.recipes import catalog


@dataclass
class JobOptions:
    """What every job command accepts; see `cli.options`.

    Attributes:
        arguments: Arguments of the recipe function the user gave, e.g. ``{"num_nodes": 2}``.
        settings: Settings from options of their own, as (path, value), e.g. ``--data``.
    """

    task: str
    recipe: str | None
    dir: Path
    name: str | None
    executor: str
    dry_run: bool
    yaml: Path | None
    to_yaml: Path | None
    overrides: list[str]
    arguments: dict[str, Any] = field(default_factory=dict)
    settings: list[tuple[str, Any]] = field(default_factory=list)


@dataclass
class Job:
    """A recipe that passed its checks, and where it runs."""

    recipe_name: str
    recipe: Any
    executor: str
    name: str
    run_dir: Path


def prepare(options: JobOptions) -> Job:
    """Resolve a job and check it.

    Raises:
        RecipeError: a recipe, setting or layout that cannot run.
        EnvironmentProblem: the recipe needs GPUs this machine does not have.
    """
    recipe_name = _recipe_name(options)
    here = options.executor != "slurm" and not (options.dry_run or options.to_yaml)
    if here and options.yaml is None and not _sets(options, "trainer.accelerator"):
        _refuse_without_gpus(recipe_name, options)
    name = options.name or f"{recipe_name}_{time.strftime('%Y%m%d_%H%M%S')}"
    recipe = _resolve(options, recipe_name, name)
    from mixtral_recipes.recipes.preflight import preflight

    preflight(recipe)
    if here and recipe.trainer.accelerator == "gpu" and not machine.gpu_count():
        raise EnvironmentProblem(_needs_gpus(recipe_name, recipe.trainer.num_nodes, recipe.trainer.devices, ""))
    return Job(recipe_name, recipe, options.executor, recipe.log.name, Path(recipe.log.log_dir) / recipe.log.name)


def _recipe_name(options: JobOptions) -> str:
    if options.yaml is not None:
        from mixtral_recipes.recipes.yaml_file import recipe_name

        if options.recipe:
            raise RecipeError("--recipe and --yaml exclude each other; the file names its recipe.")
        return recipe_name(options.yaml)
    if options.recipe is not None:
        return catalog.entry(options.recipe).name
    if machine.gpu_count():
        raise RecipeError(f"choose a recipe with --recipe: {', '.join(catalog.names())}.")
    note("No GPU here: taking --recipe mixtral_tiny, a small Mixtral that runs on the CPU.")
    return "mixtral_tiny"


def _resolve(options: JobOptions, recipe_name: str, name: str) -> Any:
    from mixtral_recipes.recipes import overrides
    from mixtral_recipes.recipes.loading import load

    if options.yaml is not None:
        from mixtral_recipes.recipes.yaml_file import read_recipe

        recipe = read_recipe(options.yaml)
        if options.name or recipe.log.log_dir is None:
            recipe.log.log_dir, recipe.log.name = str(options.dir), name
        for option, path in (("num_nodes", "trainer.num_nodes"), ("num_gpus_per_node", "trainer.devices")):
            if option in options.arguments:
                overrides.set_value(recipe, path, options.arguments[option])
    else:
        arguments = dict(options.arguments)
        if recipe_name == "mixtral_tiny":
            arguments.setdefault("num_gpus_per_node", _laptop_processes(options))
        recipe = load(recipe_name, options.task, dir=str(options.dir), name=name, **arguments)
        if (
            recipe_name == "mixtral_tiny"
            and recipe.trainer.devices == 1
            and "num_gpus_per_node" not in options.arguments
        ):
            recipe.trainer.strategy.expert_model_parallel_size = 1
    for path, value in options.settings:
        overrides.set_value(recipe, path, value)
    overrides.apply(recipe, options.overrides)
    return recipe


def _laptop_processes(options: JobOptions) -> int:
    """Two processes where there are two cores and processes are started at all."""
    return 2 if options.executor != "direct" and machine.cores() >= 2 else 1


def _sets(options: JobOptions, path: str) -> bool:
    return any(override.startswith(f"{path}=") for override in options.overrides)


def _refuse_without_gpus(recipe_name: str, options: JobOptions) -> None:
    """Say at once, before anything is imported, that a recipe cannot run here."""
    entry = catalog.entry(recipe_name)
    if not entry.needs_gpu or machine.gpu_count():
        return
    layout = entry.layout(_layout_task(options), options.arguments.get("hardware", "h100"))
    nodes = options.arguments.get("num_nodes", layout.num_nodes)
    gpus = options.arguments.get("num_gpus_per_node", layout.num_gpus_per_node)
    raise EnvironmentProblem(_needs_gpus(recipe_name, nodes, gpus, f" ({layout.topology.describe()})"))


def _layout_task(options: JobOptions) -> str:
    if options.task == "pretrain":
        return "performance" if options.arguments.get("performance_mode") else "pretrain"
    if options.arguments.get("peft_scheme", "lora") != "none":
        return "peft"
    return "full_packed" if options.arguments.get("packed_sequence") else "full"


def _needs_gpus(recipe_name: str, nodes: int, gpus: int, layout: str) -> str:
    total = f"{nodes * gpus} GPUs: {nodes} node{'s' if nodes > 1 else ''} x {gpus}{layout}"
    return (
        f"{recipe_name} needs {total}; this machine has no GPU. Use --executor slurm to run it on a cluster, --dry-run to "
        "check it here, or --recipe mixtral_tiny, which runs on a CPU."
    )


def save_yaml(job: Job, path: Path) -> None:
    """Write the resolved recipe, without this machine's run folder, for ``--yaml``."""
    from mixtral_recipes.recipes.yaml_file import write_recipe

    write_recipe(job.recipe, path)
    note(f"Wrote {path}; run it with: mixtral-recipes run {path}")


def launch(job: Job, *, dry_run: bool) -> dict[str, Any]:
    """Run a job and return its result: the loop's, with the recipe's name."""
    from mixtral_recipes.executors.launch import launch as start

    result = start(job.recipe, executor=job.executor, name=job.name, run_dir=job.run_dir, dry_run=dry_run)
    return {"recipe": job.recipe_name, **result}


def describe(job: Job) -> str:
    """A job in one line."""
    from mixtral_recipes.recipes.preflight import topology_of

    topology = topology_of(job.recipe)
    return (
        f"{job.recipe_name}: {topology.world_size} process(es), {topology.describe()}, "
        f"{job.recipe.trainer.max_steps} steps, run folder {job.run_dir}"
    )
