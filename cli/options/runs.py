"""A run on the command line: by its id, Slurm job id, name or folder."""

from typing import Annotated

from mixtral_recipes.cli.options.groups import argument


def complete_run(incomplete: str) -> list[str]:
    """Names of runs that start with what is typed, the newest first."""
    from mixtral_recipes.executors.runs.records import all_records

    return list(dict.fromkeys(run.name for run in all_records() if run.name.startswith(incomplete)))


Run = Annotated[
    str,
    argument(
        "RUN", "Run name (the newest of that name), run id, Slurm job id, or run folder.", autocompletion=complete_run
    ),
]
