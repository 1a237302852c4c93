"""``mixtral-recipes run FILE``: a recipe written in YAML."""

from pathlib import Path
from typing import Annotated

import typer

from mixtral_recipes.cli import finetune
from mixtral_recipes.cli.jobs import jobs
from mixtral_recipes.cli.options import options
from mixtral_recipes.cli.output import print_json


def command(
    file: Annotated[Path, typer.Argument(help="A recipe file; examples/ has some to start from.")],
    overrides: options.Overrides = None,
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
    export: options.Export = None,
    evaluate: options.Evaluate = 100,
    dry_run: options.DryRun = False,
    to_yaml: options.ToYaml = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Run a recipe written in a YAML file."""
    given = {"num_nodes": num_nodes, "num_gpus_per_node": num_gpus_per_node}
    job = jobs.prepare(
        jobs.JobOptions(
            task=None,
            yaml=file,
            dir=dir,
            name=name,
            place=jobs.place(
                executor.value, cluster, detach, slurm, account=account, partition=partition, time=time, retries=retries
            ),
            only_check=dry_run or to_yaml is not None,
            overrides=overrides or [],
            arguments={key: value for key, value in given.items() if value is not None},
        )
    )
    if to_yaml:
        jobs.save_yaml(job, to_yaml)
        return
    result = jobs.launch(job, dry_run=dry_run)
    if job.task == "finetune":
        result |= finetune.after(job, result, export=export, evaluate=evaluate)
    if json:
        print_json(result)
