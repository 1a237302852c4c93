"""``mixtral-recipes finetune``: train, export, and answer held-out questions before and after."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mixtral_recipes.cli import jobs, options
from mixtral_recipes.cli.output import console, note, print_json


def command(
    overrides: options.Overrides = None,
    recipe: options.Recipe = None,
    peft: Annotated[
        options.PeftScheme, typer.Option("--peft", help="Adapters to train, or none for all weights.")
    ] = options.PeftScheme.lora,
    data: Annotated[
        str | None, typer.Option("--data", help="SQuAD file or folder (JSON, JSONL, parquet), or `squad` from the Hub.")
    ] = None,
    restore_from: Annotated[
        str | None, typer.Option("--restore-from", help="Start from hf://ID, nemo://ID or a folder.")
    ] = None,
    packed: Annotated[bool, typer.Option("--packed/--no-packed", help="Several samples per sequence.")] = False,
    dir: options.Dir = Path("runs"),
    name: options.Name = None,
    num_nodes: options.NumNodes = None,
    num_gpus_per_node: options.NumGpus = None,
    executor: options.Executor = options.ExecutorName.local,
    precision: options.Precision = None,
    hardware: options.Hardware = None,
    instruct: Annotated[bool, typer.Option("--instruct", help="Start from the Instruct variant.")] = False,
    export: Annotated[
        bool | None, typer.Option("--export/--no-export", help="Export the trained model; default: mixtral_tiny only.")
    ] = None,
    evaluate: Annotated[
        int, typer.Option("--evaluate", min=0, help="Held-out questions to answer before and after, when exporting.")
    ] = 100,
    dry_run: options.DryRun = False,
    yaml: options.Yaml = None,
    to_yaml: options.ToYaml = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Fine-tune a checkpoint with LoRA, DoRA, or all weights."""
    given = {
        "num_nodes": num_nodes,
        "num_gpus_per_node": num_gpus_per_node,
        "precision": precision,
        "hardware": hardware,
        "peft_scheme": peft.value,
        "packed_sequence": packed or None,
        "instruct": instruct or None,
    }
    settings: list[tuple[str, Any]] = []
    if data is not None:
        settings.append(("data.dataset_root", _dataset(data)))
    if restore_from is not None:
        settings.append(("resume.restore_config.path", restore_from))
    job = jobs.prepare(
        jobs.JobOptions(
            task="finetune",
            recipe=recipe,
            dir=dir,
            name=name,
            executor=executor.value,
            dry_run=dry_run,
            yaml=yaml,
            to_yaml=to_yaml,
            overrides=overrides or [],
            arguments={key: value for key, value in given.items() if value is not None},
            settings=settings,
        )
    )
    if to_yaml:
        jobs.save_yaml(job, to_yaml)
        return
    note(jobs.describe(job))
    result = jobs.launch(job, dry_run=dry_run)
    if not dry_run and (job.recipe_name == "mixtral_tiny" if export is None else export):
        result |= export_and_evaluate(job, result, questions=evaluate)
    if json:
        print_json(result)


def _dataset(data: str) -> str | None:
    """``--data`` as ``data.dataset_root``: None is the Hub's SQuAD."""
    from mixtral_recipes.embedded import resolve
    from mixtral_recipes.errors import DataError

    if data in ("squad", "rajpurkar/squad"):
        return None
    if not resolve(data).exists():
        raise DataError(f"--data {data}: no such file or folder.")
    return data if "://" in data else str(Path(data).absolute())


def export_and_evaluate(job: jobs.Job, result: dict[str, Any], *, questions: int) -> dict[str, Any]:
    """Export the trained model and compare its answers with the base model's.

    Args:
        job: The job that ran.
        result: Its result; ``checkpoint`` is exported, merged with its base when it holds adapters.
        questions: Held-out questions to answer; 0 skips the comparison.

    Returns:
        ``exported`` and, where it was measured, ``em_before``, ``f1_before``, ``em_after`` and ``f1_after`` in percent.
    """
    from mixtral_recipes import api

    exported = job.run_dir / "exported"
    api.export_ckpt(Path(result["checkpoint"]), target="hf", output_path=exported, overwrite=True)
    outcome: dict[str, Any] = {"exported": str(exported)}
    base = base_folder(job.recipe)
    if not questions:
        return outcome
    from mixtral_recipes.evaluation import evaluate_squad

    data = job.recipe.data.dataset_root
    rows = [("before", base), ("after", exported)]
    for when, folder in rows:
        if folder is None:
            continue
        scores = evaluate_squad(folder, data, limit=questions)
        outcome |= {f"em_{when}": scores["exact_match"], f"f1_{when}": scores["f1"], "questions": scores["count"]}
    _show(outcome)
    return outcome


def base_folder(recipe: Any) -> Path | None:
    """The Hugging Face folder training started from, if it is one on this machine."""
    from mixtral_recipes.embedded import resolve

    folder = resolve(str(recipe.resume.restore_config.path).removeprefix("hf://"))
    return folder if (folder / "config.json").is_file() else None


def _show(outcome: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"{outcome['questions']} held-out questions")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    for key, label in (("em", "exact match"), ("f1", "F1")):
        values = [outcome.get(f"{key}_{when}") for when in ("before", "after")]
        table.add_row(label, *("-" if value is None else f"{value:.1f} %" for value in values))
    console().print(table)
