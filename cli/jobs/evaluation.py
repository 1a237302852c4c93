"""Measure a model in this process, show what was found, and keep it where readers of the model look."""

import time
from pathlib import Path
from typing import Any

from mixtral_recipes.checkpoints import scores
from mixtral_recipes.cli.output import note, print_table, table
from mixtral_recipes.evaluation.asked import Asked
from mixtral_recipes.evaluation.evaluate import Evaluation, evaluate
from mixtral_recipes.evaluation.recorded import keep, run_of
from mixtral_recipes.evaluation.samples import AFTER
from mixtral_recipes.inference.model import join
from mixtral_recipes.reports.page import write_report
from mixtral_recipes.system.files import refuse_unwritable_file, write_json
from mixtral_recipes.system.ranks import launched_rank
from mixtral_recipes.training import distributed


def measure(
    checkpoint: Path,
    asked: Asked,
    topology: Any,
    *,
    named: Path | None = None,
    dtype: str | None = None,
    predictions: Path | None = None,
) -> dict[str, Any]:
    """Measure a model; all ranks call it, and the first one shows and keeps the scores.

    Args:
        checkpoint: A checkpoint of ours.
        asked: What is measured.
        topology: The layout.
        named: The folder that was named, where it is another form of the checkpoint.
        dtype: What it runs in; None uses config.json's.
        predictions: A file for the answers to SQuAD's questions.

    Returns:
        ``checkpoint``, ``scores``, ``samples`` and ``seconds`` of this evaluation.

    Raises:
        EnvironmentProblem, IsADirectoryError: ``predictions`` could not be written; nothing is measured.
    """
    speaks = launched_rank() == 0
    if predictions is not None:
        refuse_unwritable_file(predictions.absolute())
    started = time.perf_counter()
    try:
        found = evaluate(checkpoint, asked, join(topology), dtype=dtype, say=note if speaks else lambda text: None)
    finally:
        distributed.shut_down()
    if speaks:
        show(found.scores, found.samples)
        if predictions is not None and found.predictions:
            predictions.parent.mkdir(parents=True, exist_ok=True)
            write_json(predictions, found.predictions)
        elif predictions is not None:
            note(f"{predictions} was not written, because no SQuAD question was asked.")
        _keep(checkpoint, named, found)
    return {
        "checkpoint": str(checkpoint),
        "scores": found.scores,
        "samples": found.samples,
        "seconds": round(time.perf_counter() - started, 3),
    }


def show(found: scores.Scores, samples: list[dict[str, Any]]) -> None:
    """Print scores as a table, and held-out questions with their answers."""
    columns, rows = scores.table(found)
    if rows:
        print_table(table(("", *(columns if len(columns) > 1 else ["score"])), rows))
    for sample in samples:
        print(f"\n{_end(sample['question'])}")
        for name, said in sample.items():
            if name != "question":
                print(f"  {name if name != AFTER or len(found) > 1 else 'said':9} {_start(said)}")


def _keep(checkpoint: Path, named: Path | None, found: Evaluation) -> None:
    keep(checkpoint, named, found, note)
    run_dir = run_of(checkpoint)
    if run_dir is not None:
        write_report(run_dir)


def _start(text: str, most: int = 150) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[:most] + " ..."


def _end(text: str, most: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else "... " + line[-most:].partition(" ")[2]
