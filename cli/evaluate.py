"""``mixtral-recipes evaluate``."""

from pathlib import Path
from typing import Annotated

from mixtral_recipes.cli.options.evaluation import EvaluationOptions
from mixtral_recipes.cli.options.groups import option
from mixtral_recipes.cli.options.model import LayoutOptions, Model
from mixtral_recipes.cli.options.result import Json
from mixtral_recipes.cli.output import print_json
from mixtral_recipes.executors.runs.checkpoints import model_checkpoint


def command(
    *,
    model: Model,
    what: EvaluationOptions,
    predictions: Annotated[
        Path | None, option("--predictions FILE", "Write the answers to SQuAD's questions to this file, by id.")
    ] = None,
    layout: LayoutOptions,
    json: Json = False,
) -> None:
    """Score a model: questions, loss, perplexity, lm-evaluation-harness.

    On Megatron, in the layout asked for; nothing is exported. The scores are kept beside the model, in its run's
    result.json and report, and in the model card of its export.
    """
    asked, topology = what.asked(), layout.topology()
    if layout.runs_again():
        return

    from mixtral_recipes.cli.jobs.evaluation import measure
    from mixtral_recipes.system.ranks import launched_rank

    named = Path(model).expanduser()
    result = measure(
        model_checkpoint(model),
        asked,
        topology,
        named=named.absolute() if named.is_dir() else None,
        dtype=layout.dtype,
        predictions=predictions,
    )
    if json and launched_rank() == 0:
        print_json({"model": model} | result)
