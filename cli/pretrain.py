"""``mixtral-recipes pretrain``."""

from typing import Annotated

import typer

from mixtral_recipes.cli.jobs import jobs
from mixtral_recipes.cli.options import options
from mixtral_recipes.cli.output import print_json


def command(
    overrides: options.Overrides = None,
    recipe: options.Recipe = None,
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
    performance_mode: Annotated[
        bool, typer.Option("--performance-mode", help="NeMo's performance mode: token drop, overlap, bf16 reduction.")
    ] = False,
    dry_run: options.DryRun = False,
    yaml: options.Yaml = None,
    to_yaml: options.ToYaml = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Train a model from random weights."""
    given = {
        "num_nodes": num_nodes,
        "num_gpus_per_node": num_gpus_per_node,
        "precision": precision,
        "hardware": hardware,
        "performance_mode": performance_mode or None,
    }
    job = jobs.prepare(
        jobs.JobOptions(
            task="pretrain",
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
        )
    )
    if to_yaml:
        jobs.save_yaml(job, to_yaml)
        return
    result = jobs.launch(job, dry_run=dry_run)
    if json:
        print_json(result)
