"""``mixtral-recipes doctor``: what this machine has, what it lacks, and how to mend it."""

from typing import Annotated

import typer

from mixtral_recipes.cli.options.result import Json
from mixtral_recipes.cli.output import print_checks, print_json


def command(
    *,
    slurm: Annotated[bool, typer.Option("--slurm", help="Insist on Slurm; else its absence is only noted.")] = False,
    json: Json = False,
) -> None:
    """Check this machine.

    Looks at Python, torch, CUDA, NCCL, Megatron, Transformer Engine, Slurm, containers, folders and disk room.
    """
    from mixtral_recipes.errors import EnvironmentProblem
    from mixtral_recipes.executors.checks import check_machine

    found = check_machine(insist_on_slurm=slurm)
    if json:
        print_json({"checks": [check.as_json() for check in found]})
    else:
        print_checks(found)
    bad = [check.name for check in found if check.verdict == "bad"]
    if bad:
        raise EnvironmentProblem(f"not ready: {', '.join(bad)}; see above for how to mend it.")
