"""What follows a run: its export, its scores beside what it started from, and how to go on from there."""

import math
from pathlib import Path
from typing import Any

from mixtral_recipes.cli.jobs.choose import Job
from mixtral_recipes.cli.options.result import AfterTrainingOptions
from mixtral_recipes.cli.output import note
from mixtral_recipes.errors import MixtralRecipesError
from mixtral_recipes.system.files import read_json, write_json

_QUESTIONS = 100  # where nothing is said of them
_BATCH = 32  # questions a process answers at once


def follow_up(job: Job, checkpoint: Path, after: AfterTrainingOptions) -> dict[str, Any]:
    """Export and evaluate a fine-tuned checkpoint, as far as that was asked for.

    Without a word mixtral_tiny's is exported; held-out questions are asked wherever the job ran on this machine, since
    its processes can then be started once more.

    Args:
        job: The job that ran.
        checkpoint: What it saved.
        after: What was asked for.

    Returns:
        ``exported`` and ``evaluation``; of SQuAD also ``questions`` and, in percent, ``em_before``, ``f1_before``,
        ``em_after`` and ``f1_after`` (``em_first_line_...``: if answers were cut off at their first line break).
    """
    outcome: dict[str, Any] = {}
    if _exports(job, after):
        from mixtral_recipes import api

        exported = job.run_dir / "exported"
        api.export_ckpt(checkpoint, target="hf", output_path=exported, overwrite=True)
        outcome["exported"] = str(exported)
    if questions := _questions(job, after):
        outcome |= _evaluated(job, checkpoint, questions)
    return outcome


def left_of(job: Job, result: dict[str, Any], after: AfterTrainingOptions) -> AfterTrainingOptions:
    """What of `follow_up` a finished run does not have: its command was stopped before it, or did not ask for it."""
    exported = result.get("exported")
    there = isinstance(exported, str) and Path(exported, "config.json").is_file()
    return AfterTrainingOptions(
        export=_exports(job, after) and not there, evaluate=0 if "evaluation" in result else _questions(job, after)
    )


def _exports(job: Job, after: AfterTrainingOptions) -> bool:
    return job.recipe_name == "mixtral_tiny" if after.export is None else after.export


def _questions(job: Job, after: AfterTrainingOptions) -> int:
    """How many held-out questions to ask: none where the job's processes were not on this machine."""
    if job.place.executor == "slurm":
        return 0
    return _QUESTIONS if after.evaluate is None else after.evaluate


def _evaluated(job: Job, checkpoint: Path, questions: int) -> dict[str, Any]:
    """Scores before and after. The run is complete without them: if they fail, a warning says so."""
    try:
        found = _scores(job, checkpoint, questions)
    except MixtralRecipesError as error:
        again = f"mixtral-recipes evaluate {job.run_dir} --compare"
        note(f"WARNING: the trained model was not evaluated: {error} Once that is fixed, run: {again}")
        return {}
    outcome: dict[str, Any] = {"evaluation": found}
    for when in ("before", "after"):
        squad = found["scores"].get(when, {}).get("squad")
        if squad:
            outcome |= {
                f"em_{when}": squad["exact_match"],
                f"f1_{when}": squad["f1"],
                f"em_first_line_{when}": squad["exact_match_of_first_line"],
                "questions": squad["count"],
            }
    return outcome


def _scores(job: Job, checkpoint: Path, questions: int) -> dict[str, Any]:
    """Measure in the layout of the run; on a CPU in this process, since all processes share its memory."""
    from mixtral_recipes.layout.topology import Topology
    from mixtral_recipes.system.machine import cores, gpu_count

    trained = Topology.of(job.recipe.trainer)
    if trained.world_size == 1 or not gpu_count():
        import torch

        from mixtral_recipes.cli.jobs.evaluation import measure
        from mixtral_recipes.evaluation.asked import Asked

        torch.set_num_threads(max(1, cores() // trained.world_size))  # as many as each of the run's processes had
        asked = Asked(loss=False, questions=questions, batch_size=_BATCH, compare=True)
        measure(checkpoint, asked, Topology())
    else:
        _in_layout_of(trained, checkpoint, questions)
    return (read_json(job.run_dir / "result.json") or {})["evaluation"]


def _in_layout_of(trained: Any, checkpoint: Path, questions: int) -> None:
    from mixtral_recipes.executors.again import again

    model_ranks = trained.tensor_model_parallel_size * trained.pipeline_model_parallel_size
    experts = math.gcd(trained.expert_model_parallel_size, trained.world_size // model_ranks)
    layout = {
        "--devices": trained.world_size,
        "--tp": trained.tensor_model_parallel_size,
        "--pp": trained.pipeline_model_parallel_size,
        "--ep": experts,
        "--questions": questions,
        "--batch-size": _BATCH,
    }
    words = [word for name, value in layout.items() for word in (name, str(value))]
    again(["evaluate", str(checkpoint), "--no-loss", "--compare", *words], trained.world_size)


def finish(run_dir: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write a run's whole result, its report anew, and say in four lines how to go on.

    Args:
        run_dir: The run's folder.
        result: What the command found.

    Returns:
        The result, as RUN/result.json holds it.
    """
    from mixtral_recipes.reports.page import write_report

    if (run_dir / "result.json").is_file():
        write_json(run_dir / "result.json", result)
        write_report(run_dir)
    for line in closing_lines(run_dir, result):
        print(line)
    return result


def closing_lines(run_dir: Path, result: dict[str, Any]) -> list[str]:
    """Where model, adapter and report are, and how to talk to the model, serve it and ship it."""
    checkpoint = Path(result["checkpoint"])
    here = Path.cwd()
    run = run_dir.relative_to(here) if run_dir.is_relative_to(here) else run_dir
    adapted = (read_json(checkpoint / "manifest.json") or {}).get("kind") == "adapter"
    exported = result.get("exported")
    where = [f"{exported} (Hugging Face form)"] if exported else [] if adapted else [str(checkpoint)]
    where += [f"adapter {checkpoint}"] if adapted else []
    talk = f"chat {run}" if _has_template(checkpoint) else f'generate {run} "..."'
    return [
        f"Model:   {'; '.join(where)}",
        f"Report:  {run_dir / 'report.html'}",
        f"Use it:  mixtral-recipes {talk};  mixtral-recipes serve {run}",
        f"Ship it: mixtral-recipes export {run} FOLDER;  mixtral-recipes export {run} OUT.gguf --format gguf",
    ]


def _has_template(checkpoint: Path) -> bool:
    context = checkpoint / "context"
    settings = read_json(context / "tokenizer_config.json") or {}
    return bool(settings.get("chat_template")) or (context / "chat_template.jinja").is_file()
