"""``mixtral-recipes finetune``: train, export, and answer held-out questions before and after."""

from typing import Annotated, Any

import typer

from mixtral_recipes.cli.jobs import jobs
from mixtral_recipes.cli.options import options
from mixtral_recipes.cli.output import print_json


def command(
    overrides: options.Overrides = None,
    recipe: options.Recipe = None,
    peft: Annotated[
        options.PeftScheme | None, typer.Option("--peft", help="Adapters to train (default: lora), or all weights.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="File, folder or Hub id: SQuAD, chat, prompts and answers, text.")
    ] = None,
    restore_from: Annotated[
        str | None, typer.Option("--restore-from", help="Start from hf://ID, nemo://ID or a folder.")
    ] = None,
    packed: Annotated[bool | None, typer.Option("--packed/--no-packed", help="Several samples per sequence.")] = None,
    dir: options.Dir = None,
    name: options.Name = None,
    num_nodes: options.NumNodes = None,
    num_gpus_per_node: options.NumGpus = None,
    executor: options.Executor = options.ExecutorName.local,
    cluster: options.Cluster = None,
    account: options.Account = None,
    partition: options.Partition = None,
    time: options.Time = None,
    retries: options.Retries = None,
    slurm: options.SlurmSettings = None,
    detach: options.Detach = False,
    precision: options.Precision = None,
    hardware: options.Hardware = None,
    instruct: Annotated[bool, typer.Option("--instruct", help="Start from the Instruct variant.")] = False,
    export: options.Export = None,
    evaluate: options.Evaluate = 100,
    dry_run: options.DryRun = False,
    yaml: options.Yaml = None,
    to_yaml: options.ToYaml = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Fine-tune a checkpoint with LoRA, DoRA, or all weights."""
    given = {
        "num_nodes": num_nodes,
        "num_gpus_per_node": num_gpus_per_node,
        "precision": precision,
        "hardware": hardware,
        "peft_scheme": peft.value if peft else None,
        "packed_sequence": packed,
        "instruct": instruct or None,
    }
    settings: list[tuple[str, Any]] = []
    if restore_from is not None:
        settings.append(("resume.restore_config.path", restore_from))
    job = jobs.prepare(
        jobs.JobOptions(
            task="finetune",
            recipe=recipe,
            yaml=yaml,
            dir=dir,
            name=name,
            place=jobs.place(
                executor.value, cluster, detach, slurm, account=account, partition=partition, time=time, retries=retries
            ),
            only_check=dry_run or to_yaml is not None,
            overrides=overrides or [],
            arguments={key: value for key, value in given.items() if value is not None},
            settings=settings,
            data=data,
        )
    )
    if to_yaml:
        jobs.save_yaml(job, to_yaml)
        return
    result = jobs.launch(job, dry_run=dry_run)
    result |= after(job, result, export=export, evaluate=evaluate)
    if json:
        print_json(result)


def after(job: jobs.Job, result: dict[str, Any], *, export: bool | None, evaluate: int) -> dict[str, Any]:
    """Export and evaluate where the run left a checkpoint and it was asked for (by default: mixtral_tiny)."""
    wanted = job.recipe_name == "mixtral_tiny" if export is None else export
    if not wanted or not result.get("checkpoint"):
        return {}
    from mixtral_recipes.cli.jobs.after_training import asks_questions, export_and_evaluate

    questions = evaluate if asks_questions(job.recipe.data) else 0
    return export_and_evaluate(job, result["checkpoint"], questions=questions)
