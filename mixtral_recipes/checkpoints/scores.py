"""``evaluation.json``: what a model scored, in its folder beside ``lineage.json``.

It is written when a model is evaluated, long after its folder was finished, so no manifest, identity or seal knows of
it; it names the weights it is about, and is not believed beside others. Loads no torch: reports read it.
"""

from pathlib import Path
from typing import Any, TypedDict

from mixtral_recipes.system.files import now, read_json, write_json
from mixtral_recipes.system.schema import Count, fits

NAME = "evaluation.json"
FORMAT = "mixtral-recipes/evaluation/1"
Scores = dict[str, dict[str, Any]]


class _Squad(TypedDict, total=False):
    exact_match: float
    f1: float
    exact_match_of_first_line: float
    has_answer_exact: float
    has_answer_f1: float
    no_answer_exact: float
    no_answer_f1: float
    count: Count


class _Loss(TypedDict, total=False):
    val_loss: float
    val_loss_by_source: dict[str, float]


class _Perplexity(TypedDict):
    data: str
    perplexity: float
    bits_per_byte: float


class _Model(TypedDict, total=False):
    squad: _Squad
    loss: _Loss
    perplexity: _Perplexity
    tasks: dict[str, dict[str, float]]


class _Record(TypedDict):
    scores: dict[str, _Model]
    samples: list[dict[str, str]]


_SQUAD = {
    "exact_match": "exact match",
    "f1": "F1",
    "exact_match_of_first_line": "exact match of the first line",
    "has_answer_exact": "exact match, answerable",
    "has_answer_f1": "F1, answerable",
    "no_answer_exact": "exact match, unanswerable",
    "no_answer_f1": "F1, unanswerable",
}


def read(folder: Path, weights: str | None) -> dict[str, Any]:
    """What is recorded of a model: ``scores`` and ``samples``; empty where nothing is, or it is of other weights.

    Args:
        folder: The model's folder.
        weights: The identity of the weights that are there.
    """
    found = read_json(folder / NAME) or {}
    return usable(found) if found.get("format") == FORMAT and found.get("weights") == weights else {}


def usable(record: Any) -> dict[str, Any]:
    """A record that others may have written; empty if it is not one."""
    return record if fits(record, _Record) else {}


def merged(before: dict[str, Any], scores: Scores, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A record with new scores: what was measured again replaces what it was, the rest stays.

    What other models scored on other data goes too, since a row of the table is of one data set.
    """
    of = {kind: found["data"] for one in scores.values() for kind, found in one.items() if "data" in found}
    kept: Scores = {
        name: {kind: found for kind, found in one.items() if of.get(kind, found.get("data")) == found.get("data")}
        for name, one in before.get("scores", {}).items()
    }
    names = [*(name for name in kept if kept[name]), *(name for name in scores if not kept.get(name))]
    return {
        "created": now(),
        "scores": {name: _with(kept.get(name, {}), scores.get(name, {})) for name in names},
        "samples": samples or before.get("samples", []),
    }


def _with(kept: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """One model's scores with new ones; each task is a thing of its own."""
    tasks = {**kept.get("tasks", {}), **new.get("tasks", {})}
    return kept | new | ({"tasks": tasks} if tasks else {})


def write(folder: Path, weights: str | None, record: dict[str, Any]) -> None:
    """Write a record beside a model's ``lineage.json``."""
    write_json(folder / NAME, {"format": FORMAT, "weights": weights, **record})


def table(scores: Scores) -> tuple[list[str], list[list[str]]]:
    """The columns after the first, one for each model, and a row for each thing that was measured."""
    order = {"base": 0, "before": 1, "after": 2}
    columns = sorted(scores, key=lambda name: order.get(name, 3))
    cells = {name: dict(_cells(scores[name])) for name in columns}
    labels = dict.fromkeys(label for name in columns for label in cells[name])
    return columns, [[label, *(cells[name].get(label, "-") for name in columns)] for label in labels]


def _cells(found: dict[str, Any]) -> list[tuple[str, str]]:
    cells: list[tuple[str, str]] = []
    squad = found.get("squad", {})
    data = f" ({squad['count']} questions)" if "count" in squad else ""
    cells += [(f"{label}{data}", f"{squad[key]:.1f} %") for key, label in _SQUAD.items() if key in squad]
    loss = found.get("loss", {})
    cells += [("validation loss", f"{loss['val_loss']:.4f}")] if "val_loss" in loss else []
    cells += [
        (f"validation loss, {name}", f"{value:.4f}") for name, value in loss.get("val_loss_by_source", {}).items()
    ]
    text = found.get("perplexity", {})
    if "perplexity" in text:
        name = Path(str(text.get("data", ""))).name
        cells += [
            (f"perplexity of {name}", f"{text['perplexity']:.4g}"),
            (f"bits per byte of {name}", f"{text['bits_per_byte']:.4f}"),
        ]
    for task, metrics in found.get("tasks", {}).items():
        for metric, value in metrics.items():
            if "_stderr" in metric or metric == "sample_len":
                continue
            name, space, chosen = metric.partition(" ")
            error = metrics.get(f"{name}_stderr{space}{chosen}")
            cells.append((f"{task}: {metric}", f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")))
    return cells
