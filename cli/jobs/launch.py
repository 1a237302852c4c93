"""From a command's options to its result: prepare a job, run it, follow it up."""

from pathlib import Path
from typing import Any

from mixtral_recipes.cli.jobs.choose import Job, JobOptions, prepare
from mixtral_recipes.cli.options.result import AfterTrainingOptions
from mixtral_recipes.cli.output import note, print_json
from mixtral_recipes.errors import LaunchError
from mixtral_recipes.system.files import refuse_unwritable


def run_job(options: JobOptions, after: AfterTrainingOptions | None = None) -> None:
    """Do what a job command was asked to do.

    Args:
        options: What it was given.
        after: What follows fine-tuning; None where the command does not offer it.
    """
    job = prepare(options)
    if options.result.to_yaml is not None:
        result = save_yaml(job, options.result.to_yaml)
    elif (done := finished(job)) is not None:
        result = go_on_from(job, {"recipe": job.recipe_name, **done}, after, dry_run=options.result.dry_run)
    else:
        if after is not None and after.export and (job.on or job.place.detach):
            why = f"the model will be on {job.on}" if job.on else "--detach does not wait for the model"
            raise LaunchError(f"--export: {why}; leave it out, and use `mixtral-recipes export` on the finished run.")
        if after is not None and after.evaluate and job.place.executor == "slurm":
            raise LaunchError(
                "--evaluate asks held-out questions on this machine, but the job runs on Slurm; leave it out, "
                "and use `mixtral-recipes evaluate` on the finished run, or in a pipeline."
            )
        result = launch(job, dry_run=options.result.dry_run)
        if job.on and result.get("checkpoint"):
            note(f"The model is in {result['checkpoint']} on {job.on}.")
        elif result.get("checkpoint"):
            from mixtral_recipes.cli.jobs.after_training import finish, follow_up

            if after is not None and job.task == "finetune":
                result |= follow_up(job, Path(result["checkpoint"]), after)
            finish(job.run_dir, result)
    if options.result.json:
        print_json(result)


def finished(job: Job) -> dict[str, Any] | None:
    """The result of a run that made all its steps before; None where there is something to do.

    Raises:
        RecipeError: it made them with other settings.
    """
    from mixtral_recipes.executors.runs import records

    done = records.finished(job.run_dir, job.recipe.trainer.max_steps, job.recipe.resume)
    before = records.asked(job.run_dir)
    if done is not None and before:
        from mixtral_recipes.settings.changes import refuse_other_settings

        refuse_other_settings(job.name, done["steps"], before, _asked(job.recipe, elsewhere=bool(job.on)))
    return done


def _asked(recipe: Any, *, elsewhere: bool) -> dict[str, Any]:
    """A recipe's settings as the job that it is a call of records them, and the files here that it names."""
    import fiddle as fdl

    from mixtral_recipes.data.modules.lightning import as_data_module
    from mixtral_recipes.settings import changes
    from mixtral_recipes.settings.tokenizer import of_recipe
    from mixtral_recipes.training.named_files import named_files

    arguments = fdl.ordered_arguments(recipe, include_defaults=True)
    given: dict[Any, Any] = {
        name: fdl.build(part) if isinstance(part, fdl.Buildable) else part for name, part in arguments.items()
    }
    data = as_data_module(given["data"], given["trainer"])
    scheme = given.get("peft") or given.get("model_transform")
    tokenizer, resume = of_recipe(given["tokenizer"], data), given["resume"]
    asked = changes.asked(given["model"], given["trainer"], data, given["optim"], scheme, resume, tokenizer)
    return asked if elsewhere else asked | named_files(data, resume, tokenizer)


def go_on_from(
    job: Job, result: dict[str, Any], after: AfterTrainingOptions | None, *, dry_run: bool
) -> dict[str, Any]:
    """Do what should have followed a finished run; if nothing is left to do, say so, and say how to continue."""
    from mixtral_recipes.cli.jobs.after_training import closing_lines, finish, follow_up, left_of

    left = AfterTrainingOptions(export=False, evaluate=0)
    if after is not None and job.task == "finetune" and not (job.on or job.place.detach):
        left = left_of(job, result, after)
    if left.export or left.evaluate:
        words = " and ".join(word for word, asked in (("export", left.export), ("evaluate", left.evaluate)) if asked)
        note(f"{job.name} has finished: {result['steps']} steps. Still to do: {words} its model.")
        if not dry_run:
            return finish(job.run_dir, result | follow_up(job, Path(result["checkpoint"]), left))
    else:
        note(
            f"{job.name} has finished: {result['steps']} steps. Nothing was done; for more steps, raise "
            "trainer.max_steps; for another run, use another --name."
        )
    for line in closing_lines(job.run_dir, result):
        print(line)
    return result


def save_yaml(job: Job, path: Path) -> dict[str, Any]:
    """Write the resolved recipe without this machine's run folder, so that it runs anywhere."""
    from mixtral_recipes.overrides.yaml_file import write_recipe

    job.recipe.log.log_dir, job.recipe.log.name = None, "default"
    write_recipe(job.recipe, path, name=job.recipe_name)
    note(f"Wrote {path}; run it with: mixtral-recipes run {path}")
    return {"recipe": job.recipe_name, "yaml": str(path)}


def launch(job: Job, *, dry_run: bool) -> dict[str, Any]:
    """Run a job and return its result: the loop's, with the recipe's name."""
    from mixtral_recipes.executors.launch import launch as start

    executor: Any = job.place.executor.value
    if executor != "slurm":  # a node may see folders that this machine does not
        refuse_unwritable(job.run_dir)
    note(describe(job))
    if dry_run and executor == "local" and job.recipe.trainer.num_nodes > 1:
        note(f"It needs {job.recipe.trainer.num_nodes} nodes; run it with --executor slurm.")
        return {"recipe": job.recipe_name, "dry_run": True, "executor": None, "run_dir": str(job.run_dir)}
    if executor == "slurm":
        from mixtral_recipes.executors.slurm.executor import slurm_executor

        trainer = job.recipe.trainer
        executor = slurm_executor(trainer.num_nodes, trainer.devices, cluster_name=job.place.cluster, **job.slurm)
    result = start(
        job.recipe, executor=executor, name=job.name, run_dir=job.run_dir, dry_run=dry_run, detach=job.place.detach
    )
    if job.place.detach and not dry_run:
        note(f"Run {result['run']} is Slurm job {result['job_id']}; see `mixtral-recipes runs status {result['run']}`.")
    return {"recipe": job.recipe_name, **result}


def describe(job: Job) -> str:
    """A job in one line."""
    from mixtral_recipes.layout.topology import Topology

    topology = Topology.of(job.recipe.trainer)
    return (
        f"{job.recipe_name}.{job.task}: {topology.world_size} process(es), {topology.describe()}, "
        f"{job.recipe.trainer.max_steps} steps, run folder {job.run_dir}"
    )
