"""``mixtral-recipes verify``."""

from typing import Annotated

from mixtral_recipes.cli.options.checkpoint import Base, Checkpoint
from mixtral_recipes.cli.options.groups import option
from mixtral_recipes.cli.options.result import Json
from mixtral_recipes.cli.output import print_json, print_table, say, table
from mixtral_recipes.executors.runs.checkpoints import base_folder, checkpoint_folder


def command(
    *,
    checkpoint: Checkpoint,
    against: Annotated[
        str | None, option("--against SOURCE", "Compare every tensor with this source: hf://.. or a model folder.")
    ] = None,
    logits: Annotated[bool, option("--logits", "Also compare logits with transformers on a few prompts.")] = False,
    base: Base = None,
    json: Json = False,
) -> None:
    """Compare a checkpoint with its source, tensor by tensor.

    Structure and hashes are always checked; on request every tensor, and logits.
    """
    from mixtral_recipes.errors import CheckpointError
    from mixtral_recipes.importers.convert.verify import verify_checkpoint

    report = verify_checkpoint(checkpoint_folder(checkpoint), against=against, logits=logits, base=base_folder(base))
    say(report.checkpoint)
    rows = [(check.name, "ok" if check.passed else "FAILED", check.detail) for check in report.checks]
    print_table(table(("check", "result", "detail"), rows))
    if json:
        print_json(report.as_dict())
    if failed := [check for check in report.checks if not check.passed]:
        raise CheckpointError(f"{report.checkpoint}: {failed[0].name}: {failed[0].detail}")
