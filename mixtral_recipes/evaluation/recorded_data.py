"""The data set a model is judged on: the one its run held out, or another read as that run would have read it."""

import dataclasses
import importlib
import os
from typing import Any

from mixtral_recipes.checkpoints.lineage.record import Lineage
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.data.recognise import recognize
from mixtral_recipes.data.records.open import Source, open_source
from mixtral_recipes.embedded import resolve
from mixtral_recipes.errors import DataError, RecipeError
from mixtral_recipes.settings.data import PackedSequenceSpecs

_MIXTURE = "MixedDataModule"
_MODULES = {
    "SquadDataModule": "squad",
    "FineTuningDataModule": "finetuning",
    "ChatDataModule": "chat",
    "PreTrainingDataModule": "pretraining",
    _MIXTURE: "mixed",
}
_NOT_KEPT = ("class", "made_from", "tokenizer")  # said otherwise, or of the process that trained


def trained_by(record: Lineage) -> Lineage | None:
    """The last run that wrote a model's weights; None for a model that no run of ours trained."""
    return next((one for one in record.ancestors() if one.recipe), None)


def data_of(run: Lineage | None, named: str | None) -> DataModule:
    """A data module with a run's settings: length, batch, packing, template, what is held out.

    Args:
        run: The run's lineage; None where there is none.
        named: Another data set, as ``--data`` takes it; None takes the run's own.

    Raises:
        RecipeError: no data set is named, and the run's own cannot be told from its record.
        DataError: the data set cannot be recognised.
    """
    recorded = _recorded(run.recipe) if run else {}
    if named is None:
        return _module(recorded)
    found = recognize(named)
    settings = _settings_for(found.module_class, recorded)
    module = found.module_class(**(settings | found.kwargs))
    for one in (_recorded(earlier.recipe) for earlier in run.ancestors()) if run else ():
        if any(_is_same(place, place_of(module), found.source) for place in _places(one)):
            own = _settings_for(found.module_class, one)
            for name in {"split", "val_proportion"} & own.keys():  # the shares that training had
                setattr(module, name, own[name])
            return module
    module.judges = True
    return module


def _places(recorded: dict[str, Any]) -> list[str]:
    """Where a run's data was."""
    found = [text for one in (recorded, *_sources(recorded)) if (text := one.get("dataset_root"))]
    paths = _paths(recorded["paths"]) if "paths" in recorded else []
    every = paths.values() if isinstance(paths, dict) else [paths]
    return found + [name for some in every for name in some if isinstance(name, str)]


def _is_same(place: str, spec: str, source: Source | None) -> bool:
    """Whether a data set is the one at a place; of records also whether it is a copy of that."""
    if place == spec or os.path.realpath(place) == os.path.realpath(spec):
        return True
    try:
        return source is not None and resolve(place).exists() and open_source(place).identity() == source.identity()
    except DataError:
        return False


def trained_on(run: Lineage | None, module: str) -> bool:
    """Whether a run's data, or a source of it, was of a module of this name."""
    recorded = _recorded(run.recipe) if run else {}
    return module in (one.get("class") for one in (recorded, *_sources(recorded)))


def _recorded(recipe: dict[str, Any]) -> dict[str, Any]:
    """What a recipe's flat table says of the data, as nested tables."""
    found: dict[str, Any] = {}
    for path, value in recipe.items():
        if path.startswith("data."):
            *between, last = path.split(".")[1:]
            table = found
            for name in between:
                table = table.setdefault(name, {})
            table[last] = value
    return found


def _sources(recorded: dict[str, Any]) -> list[dict[str, Any]]:
    sources = recorded.get("sources")
    return [sources[number] for number in sorted(sources, key=int)] if isinstance(sources, dict) else []


def _module(recorded: dict[str, Any]) -> DataModule:
    """A module as it was, its sources' too.

    Raises:
        RecipeError: the record does not say how the data was read.
    """
    name = recorded.get("class")
    if name not in _MODULES or (name == _MIXTURE and not _sources(recorded)):
        why = f"its record does not say how its run read its data ({name})" if name else "it was not trained by a run"
        raise RecipeError(f"{why}; pass a data set with --data.")
    module_class = getattr(importlib.import_module(f"mixtral_recipes.data.modules.{_MODULES[name]}"), name)
    return module_class(**_arguments(module_class, recorded))


def _settings_for(module_class: type, recorded: dict[str, Any]) -> dict[str, Any]:
    """A run's settings for data of a class: those of such a source; else lengths and batches, which mean the same."""
    like = [one for one in (recorded, *_sources(recorded)) if one.get("class") == module_class.__name__]
    general = _arguments(DataModule, recorded)
    return _arguments(module_class, like[0]) | general if like else general


def _arguments(module_class: type, recorded: dict[str, Any]) -> dict[str, Any]:
    """What a table says, as arguments of a module."""
    known = {field.name for field in dataclasses.fields(module_class)} - set(_NOT_KEPT)
    found = {name: value for name, value in recorded.items() if name in known}
    specs = found.get("packed_sequence_specs")
    if specs:
        found["packed_sequence_specs"] = PackedSequenceSpecs(**{k: v for k, v in specs.items() if k != "class"})
    if "paths" in found:
        found["paths"] = _paths(found["paths"])
    if found.get("weights") is not None:
        found["weights"] = [float(share) for share in str(found["weights"]).split(", ")]
    if "sources" in found:
        found["sources"] = [_module(source) for source in _sources(recorded)]
    return found


def _paths(value: Any) -> Any:
    """Corpora and their weights, from the text that a list becomes in a recipe's table."""
    if isinstance(value, dict):
        return {split: _paths(part) for split, part in value.items()}
    words = str(value).split(", ")
    return [float(word) if word.replace(".", "", 1).isdigit() else word for word in words]


def place_of(data: DataModule) -> str:
    """Where a data set is, for a reader."""
    sources = getattr(data, "sources", None)
    if sources:
        return ", ".join(map(place_of, sources))
    named = getattr(data, "dataset_root", None) or getattr(data, "paths", None)
    return ", ".join(map(str, named)) if isinstance(named, list) else str(named or "rajpurkar/squad")
