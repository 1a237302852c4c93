"""mixtral-recipes doctor: what this machine has, what it lacks, and how to mend it."""

import json
from typing import Annotated

import typer


def command(
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")] = False,
    slurm: Annotated[bool, typer.Option(help="Insist on Slurm: without it, its absence is only noted.")] = False,
) -> None:
    """Check Python, torch, CUDA, NCCL, Megatron, Transformer Engine, Slurm, containers, folders and disk room."""
    from mixtral_recipes.errors import EnvironmentProblem
    from mixtral_recipes.executors.checks import check_machine, show

    found = check_machine(insist_on_slurm=slurm)
    if as_json:
        print(json.dumps({"checks": [check.as_json() for check in found]}))
    else:
        show(found)
    bad = [check.name for check in found if check.verdict == "bad"]
    if bad:
        raise EnvironmentProblem(f"not ready: {', '.join(bad)}; see above for how to mend it.")
