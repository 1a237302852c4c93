"""The data set a model is judged on: the one its run held out, or another read as that run would have read it."""

import dataclasses
import importlib
from typing import Any

from mixtral_recipes.checkpoints.lineage.record import Lineage
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.data.recognise import recognize
from mixtral_recipes.errors import RecipeError
from mixtral_recipes.settings.data import PackedSequenceSpecs

_MODULES = {
    "SquadDataModule": "squad",
    "FineTuningDataModule": "finetuning",
    "ChatDataModule": "chat",
    "PreTrainingDataModule": "pretraining",
}
_NOT_KEPT = ("class", "made_from", "tokenizer")  # said otherwise, or of the process that trained


def trained_by(record: Lineage) -> Lineage | None:
    """The last run that wrote a model's weights; None for a model that no run of ours trained."""
    return next((one for one in record.ancestors() if one.recipe), None)


def data_of(run: Lineage | None, named: str | None, longest: int) -> DataModule:
    """A data module with a run's settings: length, batch, packing, template, what is held out.

    Args:
        run: The run's lineage; None where there is none.
        named: Another data set, as ``--data`` takes it; None takes the run's own.
        longest: The model's positions; no sequence is longer.

    Raises:
        RecipeError: no data set is named, and the run's own cannot be told from its record.
        DataError: the data set cannot be recognised.
    """
    settings = _settings(run.recipe) if run else {}
    name = run.recipe.get("data.class") if run else None
    if named is not None:
        found = recognize(named)
        module_class, given = found.module_class, found.kwargs
        if module_class.__name__ != name:  # of another kind of data, only lengths and batches mean the same here
            general = {field.name for field in dataclasses.fields(DataModule)}
            settings = {key: value for key, value in settings.items() if key in general}
    else:
        if name not in _MODULES:
            why = f"how its run read its data ({name}) cannot be told from its record" if name else "no run trained it"
            raise RecipeError(f"{why}: name a data set with --data.")
        module_class = getattr(importlib.import_module(f"mixtral_recipes.data.modules.{_MODULES[name]}"), name)
        given = {}
    known = {field.name for field in dataclasses.fields(module_class)}
    module = module_class(**({key: value for key, value in settings.items() if key in known} | given))
    module.seq_length = min(module.seq_length, longest)
    return module


def _settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """What a recipe's table says of the data, as arguments of the module."""
    found: dict[str, Any] = {}
    for path, value in recipe.items():
        top, _, rest = path.partition(".")
        name, _, inner = rest.partition(".")
        if top != "data" or name in _NOT_KEPT:
            continue
        if inner:
            found.setdefault(name, {})[inner] = value
        else:
            found[name] = value
    specs = found.get("packed_sequence_specs")
    if specs:
        found["packed_sequence_specs"] = PackedSequenceSpecs(**{k: v for k, v in specs.items() if k != "class"})
    if "paths" in found:
        found["paths"] = _paths(found["paths"])
    return found


def _paths(value: Any) -> Any:
    """Corpora and their weights, from the text that a list becomes in a recipe's table."""
    if isinstance(value, dict):
        return {split: _paths(part) for split, part in value.items()}
    words = str(value).split(", ")
    return [float(word) if word.replace(".", "", 1).isdigit() else word for word in words]


def place_of(data: DataModule) -> str:
    """Where a data set is, for a reader."""
    named = getattr(data, "dataset_root", None) or getattr(data, "paths", None)
    return ", ".join(map(str, named)) if isinstance(named, list) else str(named or "rajpurkar/squad")
