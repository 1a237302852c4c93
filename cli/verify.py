"""``mixtral-recipes verify``."""

from typing import Annotated

import typer


def command(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, or nemo://ID.")],
    against: Annotated[
        str | None, typer.Option(help="Compare every tensor with this source (hf://.. or a model folder).")
    ] = None,
    logits: Annotated[
        bool, typer.Option("--logits", help="Also compare logits with transformers on a few prompts.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
) -> None:
    """Check a checkpoint: structure, hashes, and on request its tensors and logits against a source."""
    from mixtral_recipes.cli.output import console, print_json
    from mixtral_recipes.importers import locations
    from mixtral_recipes.importers.convert.verify import verify_checkpoint

    report = verify_checkpoint(locations.checkpoint(checkpoint), against=against, logits=logits)
    console().print(report.table())
    if as_json:
        print_json(report.as_dict())
    if not report.passed:
        raise typer.Exit(2)
