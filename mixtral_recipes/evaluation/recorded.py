"""Where scores are kept: beside the model's lineage, in its run's result.json, and in the model card of its export."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixtral_recipes.checkpoints import scores
from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.checkpoints.lineage.identity import identity_of
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.evaluation.evaluate import Evaluation
from mixtral_recipes.importers.convert.card import with_scores
from mixtral_recipes.system.files import read_json, write_json, write_text


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that wrote a checkpoint, where it still lies in it."""
    run_dir = checkpoint.parent.parent
    return run_dir if checkpoint.parent.name == "checkpoints" and (run_dir / "metrics.jsonl").is_file() else None


def keep(checkpoint: Path, named: Path | None, found: Evaluation, say: Callable[[str], None]) -> dict[str, Any]:
    """Write what was found wherever a reader of the model looks.

    Args:
        checkpoint: The checkpoint that was measured.
        named: The folder that the user named, if it is another form of it: an export.
        found: What was found.
        say: Called where a place cannot be written, which is no error: the scores are shown all the same.

    Returns:
        The record: ``created``, ``scores``, ``samples``, with what was measured before.
    """
    weights = identity_of(checkpoint).weights
    record = scores.merged(scores.read(checkpoint, weights), found.scores, found.samples)
    run_dir = run_of(checkpoint)
    exports = {
        folder for folder in (named, run_dir and run_dir / "exported") if folder and _exports(folder, checkpoint)
    }
    try:
        scores.write(checkpoint, weights, record)
        if run_dir is not None and (result := read_json(run_dir / "result.json")):
            write_json(run_dir / "result.json", result | {"evaluation": record})
        for folder in exports:
            _in_export(folder, record)
    except OSError as error:
        say(f"The scores could not be stored with the model ({error.strerror}: {error.filename}).")
    return record


def _exports(folder: Path, checkpoint: Path) -> bool:
    """Whether a folder is an export of ours of this checkpoint, or what the checkpoint was imported from."""
    try:
        own = lineage.read_or_none(folder)
        record = lineage.of_checkpoint(checkpoint)
    except CheckpointError:
        return False
    if own is None or own.kind != "export":
        return False
    source, made_from = record.parent("source"), own.parent("checkpoint")
    return (source is not None and source.record.identity == own.identity) or (
        made_from is not None and made_from.record.identity == record.identity
    )


def _in_export(folder: Path, record: dict[str, Any]) -> None:
    scores.write(folder, lineage.read(folder).identity.weights, record)
    card = folder / "README.md"
    if card.is_file():
        write_text(card, with_scores(card.read_text(encoding="utf-8"), record["scores"]))
