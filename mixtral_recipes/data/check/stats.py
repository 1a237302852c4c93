"""Data sets in numbers, side by side."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixtral_recipes.data.batches.fit import Tally
from mixtral_recipes.data.modules.pipeline import RecordPipeline
from mixtral_recipes.data.records.bad_records import Skipped
from mixtral_recipes.errors import DataError


@dataclass(frozen=True)
class Comparison:
    """Numbers of data sets.

    Attributes:
        names: What was asked for.
        rows: (what, a value for each data set).
    """

    names: list[str]
    rows: list[tuple[str, list[Any]]]


def compare(modules: Mapping[str, Any], tokenizer: Any) -> Comparison:
    """Count data sets the way a run takes them.

    Args:
        modules: The data modules of one or two data sets, by name.
        tokenizer: Counts their tokens.

    Raises:
        DataError: a data set that has no records of prompts and answers.
    """
    rows: list[dict[str, Any]] = []
    prompts: list[set[str]] = []
    for name, module in modules.items():
        pipeline = module.pipeline()
        if pipeline is None:
            raise DataError(f"{name}: {module.form} have no prompts and answers to count.")
        row, asked = _numbers(pipeline, tokenizer)
        rows.append({"form": module.form, **row})
        prompts.append(asked)
    found = [(what, [row[what] for row in rows]) for what in rows[0]]
    if len(modules) == 2:
        common = len(prompts[0] & prompts[1])
        found.append(("prompts in both", [common, common]))
    return Comparison(list(modules), found)


def _numbers(pipeline: RecordPipeline, tokenizer: Any) -> tuple[dict[str, Any], set[str]]:
    skipped, total = Skipped(), Tally()
    lengths: list[int] = []
    prompts: set[str] = set()
    for split in pipeline.splits:
        for outcome in pipeline.outcomes(split, tokenizer, skipped, total):
            lengths.append(len(outcome.encoded.tokens))
            prompts.add("\n".join(outcome.example.content.texts(learned=False)))
    low, median, most = np.quantile(lengths or [0], (0, 0.5, 1), method="nearest")
    return {
        "records": total.records,
        "cannot be used": skipped.count,
        "left out": sum(total.dropped.values()),
        "turns learned": total.turns,
        "tokens": total.tokens,
        "tokens learned": total.learned,
        "shortest": int(low),
        "median": int(median),
        "longest": int(most),
        "samples cut": total.cut_prompts + total.cut_answers,
        "different prompts": len(prompts),
    }, prompts
