"""What follows a fine-tuning run: export the trained model, and compare its answers with the base model's."""

from pathlib import Path
from typing import Any

from mixtral_recipes.cli.jobs.choose import Job
from mixtral_recipes.cli.options.result import AfterTrainingOptions
from mixtral_recipes.cli.output import print_table, table


def follow_up(job: Job, checkpoint: str, after: AfterTrainingOptions) -> dict[str, Any]:
    """Export and evaluate a checkpoint where that was asked for; without a word, mixtral_tiny's only."""
    wanted = job.recipe_name == "mixtral_tiny" if after.export is None else after.export
    if not wanted:
        return {}
    questions = after.evaluate if asks_questions(job.recipe.data) else 0
    return export_and_evaluate(job, checkpoint, questions=questions)


def export_and_evaluate(job: Job, checkpoint: str, *, questions: int) -> dict[str, Any]:
    """Export a checkpoint to RUN/exported, then answer held-out questions before and after.

    Args:
        job: The job that ran.
        checkpoint: What it saved; merged with its base when it holds adapters.
        questions: Held-out questions to answer; 0 skips the comparison.

    Returns:
        ``exported`` and, where it was measured, ``em_before``, ``f1_before``, ``em_after`` and ``f1_after`` in percent
        (``em_first_line_...``: if answers were cut off at their first line break).
    """
    from mixtral_recipes import api

    exported = job.run_dir / "exported"
    api.export_ckpt(Path(checkpoint), target="hf", output_path=exported, overwrite=True)
    outcome: dict[str, Any] = {"exported": str(exported)}
    if not questions:
        return outcome
    from mixtral_recipes.evaluation.scores import evaluate_squad

    data = job.recipe.data.dataset_root or "rajpurkar/squad"
    for when, folder in (("before", base_folder(job.recipe)), ("after", exported)):
        if folder is not None:
            if when == "before":
                refuse_another_start(Path(checkpoint), folder)
            scores = evaluate_squad(folder, data, limit=questions)
            outcome |= {
                f"em_{when}": scores["exact_match"],
                f"f1_{when}": scores["f1"],
                f"em_first_line_{when}": scores["exact_match_of_first_line"],
                "questions": scores["count"],
            }
    print_table(scores_table(outcome))
    return outcome


def asks_questions(data: Any) -> bool:
    """Whether a recipe's data is SQuAD's form, whose held-out questions can be answered and scored."""
    from mixtral_recipes.data.modules.squad import SquadDataModule

    return issubclass(data.__fn_or_cls__, SquadDataModule)


def base_folder(recipe: Any) -> Path | None:
    """The Hugging Face folder training started from, if it is one on this machine."""
    from mixtral_recipes.embedded import resolve

    folder = resolve(str(recipe.resume.restore_config.path).removeprefix("hf://"))
    return folder if (folder / "config.json").is_file() else None


def refuse_another_start(checkpoint: Path, folder: Path) -> None:
    """Refuse to call a model folder the one a run started from when it holds other weights by now.

    Raises:
        CheckpointError: names both identities.
    """
    from mixtral_recipes.checkpoints.lineage import record
    from mixtral_recipes.checkpoints.lineage.identity import Identity, hash_of_tensors
    from mixtral_recipes.errors import CheckpointError
    from mixtral_recipes.importers.convert import kept
    from mixtral_recipes.importers.convert.tensor_hashes import tensors_of
    from mixtral_recipes.importers.open import open_model

    own = record.read(checkpoint)
    parent = own.parent("base") or own.parent("start")
    if parent is None or parent.record.kind != "model" or not (Path(parent.path or "") / "manifest.json").is_file():
        return
    if not kept.is_of(Path(parent.path or ""), open_model(folder), {}):
        found = Identity(hash_of_tensors(tensors_of(folder, True)))
        raise CheckpointError(
            f"{folder} is not what {checkpoint} was trained from any more: it holds {found.told('weights')}, recorded "
            f"was {parent.record.identity.told('weights')}; put it back, or give --evaluate 0."
        )


def scores_table(outcome: dict[str, Any]) -> Any:
    """Exact match and F1, before and after, side by side."""
    rows: list[tuple[str, ...]] = []
    for key, label in (("em", "exact match"), ("f1", "F1"), ("em_first_line", "exact match of the first line")):
        values = [outcome.get(f"{key}_{when}") for when in ("before", "after")]
        rows.append((label, *("-" if value is None else f"{value:.1f} %" for value in values)))
    return table((f"{outcome['questions']} held-out questions", "before", "after"), rows)
