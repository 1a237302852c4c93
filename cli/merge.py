"""``mixtral-recipes merge``."""

from pathlib import Path
from typing import Annotated

from mixtral_recipes.cli.options.checkpoint import Base, Overwrite
from mixtral_recipes.cli.options.groups import argument, option
from mixtral_recipes.cli.options.result import Json
from mixtral_recipes.cli.options.runs import complete_run
from mixtral_recipes.cli.output import note, print_json
from mixtral_recipes.executors.runs.checkpoints import base_folder, checkpoint_folder


def command(
    *,
    adapters: Annotated[
        list[str],
        argument(
            "ADAPTER:WEIGHT...",
            "Adapter checkpoints or runs, each with its weight (default 1).",
            autocompletion=complete_run,
        ),
    ],
    output: Annotated[Path, argument("FOLDER", "Adapter checkpoint to write.")],
    rank: Annotated[
        int | None, option("--rank R", "Reduce each sum to this rank by SVD; default: exact, the ranks add up.")
    ] = None,
    base: Base = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Combine adapters of one base as a weighted sum.

    The sum is an adapter checkpoint: it exports, generates and trains on as any.
    """
    from mixtral_recipes.importers.convert.merge_adapters import Part, merge_adapters

    named = [_weighted(text) for text in adapters]
    parts = [Part(checkpoint_folder(name), weight) for name, weight in named]
    made = merge_adapters(parts, output, rank=rank, base=base_folder(base), overwrite=overwrite)
    note(f"rank {made.rank}" + (f"; the cut leaves out {made.lost:.1e} of the sum" if rank else ", exact"))
    if json:
        print_json({"adapter": str(made.folder), "rank": made.rank, "lost": made.lost})
    else:
        print(made.folder)


def _weighted(text: str) -> tuple[str, float]:
    """An adapter and its weight: what follows the last colon, if that is a number."""
    name, colon, number = text.rpartition(":")
    try:
        return (name, float(number)) if colon and name else (text, 1.0)
    except ValueError:
        return text, 1.0
