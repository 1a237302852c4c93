"""Recipes as YAML files, in two forms:

    recipe: mixtral_8x7b.finetune        # short: a recipe, arguments of its function, and what differs
    peft_scheme: lora
    trainer: {max_steps: 200}

    _target_: mixtral_recipes.finetune   # full: every part by class, as `write_recipe` (and nemo_run) writes it
    _partial_: true
    trainer: {_target_: mixtral_recipes.Trainer, ...}

Files that were written with NeMo 2.0 and name its classes are read too, and NeMo AutoModel's (`automodel/`). Reading a
file runs nothing: classes are looked up in the table in `settings.classes`, everything else is plain data.
"""

import contextlib
import enum
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import torch
import yaml

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.overrides import loading, values
from mixtral_recipes.overrides import paths as overrides
from mixtral_recipes.overrides.automodel.reader import AutoModelFile, is_automodel
from mixtral_recipes.recipes import catalog
from mixtral_recipes.settings import classes
from mixtral_recipes.settings.nemo.modules import NotNeeded
from mixtral_recipes.system.files import write_text
from mixtral_recipes.system.yaml_files import load_plain

_TARGET, _PARTIAL, _CALL = "_target_", "_partial_", "_call_"
SIZES = {"num_nodes": "trainer.num_nodes", "num_gpus_per_node": "trainer.devices"}
_FROM = "recipe"  # in a full file: which recipe it was written from


def header(path: Path) -> tuple[str, str]:
    """A file's recipe and task, e.g. ``("mixtral_8x7b", "finetune")``; a full file may name no recipe of ours.

    Raises:
        RecipeError: the file cannot be read, or names neither a recipe nor a task.
    """
    data = load_plain(path, RecipeError)
    with _told_of(path):
        return _header(data, path)


def _header(data: dict[str, Any], path: Path) -> tuple[str, str]:
    if is_automodel(data):
        return AutoModelFile(data).name, "finetune"
    name = data.get(_FROM)
    if name is not None and not isinstance(name, str):
        raise RecipeError(f"recipe: {name!r} is not a recipe; use e.g. recipe: mixtral_8x7b.finetune")
    if _TARGET in data:
        task = overrides.find(data[_TARGET], "tasks", _TARGET).__name__
        return (name or path.stem).partition(".")[0], task
    if name is None:
        raise RecipeError("no recipe is named; begin with e.g. recipe: mixtral_8x7b.finetune")
    recipe, _, task = name.partition(".")
    catalog.entry(recipe)
    if not task:
        raise RecipeError(f"recipe: {name} does not name a task; use {name}.finetune or {name}.pretrain")
    return recipe, task


@contextlib.contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Prefix errors with the file's name."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def automodel_file(path: Path) -> AutoModelFile | None:
    """A file of NeMo AutoModel's, looked through; None if it is one of ours.

    Raises:
        RecipeError: names what in it is unknown or not supported.
    """
    data = load_plain(path, RecipeError)
    with _told_of(path):
        return AutoModelFile(data) if is_automodel(data) else None


def read_recipe(path: Path, **sizes: int) -> run.Partial[Any]:
    """Read a recipe file.

    Args:
        path: A YAML file of either form.
        **sizes: ``num_nodes`` and ``num_gpus_per_node``, which count more than the file's. Of a short file the recipe's
            function gets them, and lays the model out by them.

    Returns:
        The recipe.

    Raises:
        RecipeError: it cannot be read, or names a class, setting or value that recipes do not have.
    """
    data = load_plain(path, RecipeError)
    with _told_of(path):
        if is_automodel(data):
            return AutoModelFile(data).recipe()
        name, task = _header(data, path)
        data.pop(_FROM, None)
        recipe = _full(data, task) if _TARGET in data else _short(data | sizes, name, task)
        for size, value in sizes.items():
            overrides.set_value(recipe, SIZES[size], value)
        return recipe


def _full(data: dict[str, Any], task: str) -> run.Partial[Any]:
    data.pop(_TARGET)
    if data.pop(_PARTIAL, True) is not True:
        raise RecipeError(f"{_PARTIAL} must be true.")
    recipe = run.Partial(classes.find(task, "tasks", _TARGET))
    for key, value in data.items():
        _set(recipe, key, value, key)
    return recipe


def _short(data: dict[str, Any], name: str, task: str) -> run.Partial[Any]:
    function = loading.recipe_function(name, task)
    known = inspect.signature(function).parameters
    arguments = {key: data.pop(key) for key in list(data) if key in known and key != "fn"}
    recipe = function(**{key: values.check(value, known[key].annotation, key) for key, value in arguments.items()})
    _merge(recipe, data, "")
    return recipe


def _merge(holder: Any, data: dict[str, Any], path: str) -> None:
    """Apply a mapping to a config, leaving the rest unchanged."""
    for key, value in data.items():
        where = f"{path}.{key}" if path else str(key)
        inner = _inner(holder, key, value, where)
        if inner is None:
            _set(holder, key, value, where)
        else:
            _merge(inner, value, where)


def _inner(holder: Any, key: str, value: Any, where: str) -> Any:
    """The part a mapping without ``_target_`` changes, created where it is None; None when the value is set whole."""
    if not isinstance(value, dict) or _TARGET in value or not isinstance(holder, fdl.Buildable):
        return None
    part, _ = overrides.locate(holder, f"{key}.{next(iter(value), '')}", where) if value else (None, None)
    return part if isinstance(part, fdl.Buildable) else None


def _set(holder: Any, key: str, value: Any, where: str) -> None:
    if "." in key:
        raise RecipeError(f"{where}: nest settings instead of writing them with dots.")
    overrides.locate(holder, key, where)  # refuses an unknown setting
    if key in classes.NAMES_CODE and value is not None:
        raise RecipeError(f"{where}: {value!r} would import code, which a recipe file may not do; set it from Python.")
    built = _build(value, where)
    wanted = overrides.annotation(holder, key)
    overrides.assign(holder, key, values.check(built, wanted, where))


def _build(value: Any, where: str) -> Any:
    """Configs in place of mappings with ``_target_``; plain data as it is."""
    if isinstance(value, list):
        return [_build(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if _TARGET not in value:
        return {key: _build(item, f"{where}.{key}") for key, item in value.items()}
    arguments = {key: item for key, item in value.items() if key not in (_TARGET, _PARTIAL, _CALL)}
    if value.get(_CALL) is False and not arguments:
        return _constant(value[_TARGET], where)
    if value.get(_CALL, True) is not True or value.get(_PARTIAL, False) is not False:
        raise RecipeError(f"{where}: {_CALL} and {_PARTIAL} are not supported with {value[_TARGET]!r}.")
    config = run.Config(overrides.find(value[_TARGET], "classes", where))
    for key, item in arguments.items():
        _set(config, key, item, f"{where}.{key}")
    return config


def _constant(spelling: Any, where: str) -> Any:
    """nemo_run's way of writing a dtype or a function."""
    if isinstance(spelling, str) and spelling.removeprefix("torch.") in classes.DTYPES:
        return values.dtype(spelling, where)
    return classes.find(spelling, "functions", where)


def write_recipe(recipe: run.Partial[Any], path: Path, *, name: str | None = None) -> None:
    """Write a recipe in full form.

    Args:
        recipe: The recipe.
        path: The file, replaced as a whole.
        name: The recipe's name, kept in the file.

    Raises:
        RecipeError: it holds something no file can name, such as a class of your own.
    """
    write_text(path, to_yaml(recipe, name=name))


def to_yaml(recipe: run.Partial[Any], *, name: str | None = None) -> str:
    """A recipe as the text of a full file."""
    plain = _plain(recipe)
    if name is not None:
        plain = {_FROM: f"{name}.{fdl.get_callable(recipe).__name__}", **plain}
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=False, width=120)


def _is_not_needed(value: Any) -> bool:
    """Whether it stands for a class of NeMo's that has nothing to do here; `settings.nemo.modules` says so when run."""
    made = fdl.get_callable(value) if isinstance(value, fdl.Buildable) else type(value)
    return isinstance(made, type) and issubclass(made, NotNeeded)


def _plain(value: Any) -> Any:
    if isinstance(value, fdl.Buildable):
        head: dict[str, Any] = {_TARGET: classes.spelling_of(fdl.get_callable(value))}
        if isinstance(value, fdl.Partial):
            head[_PARTIAL] = True
        return head | {key: _plain(item) for key, item in fdl.ordered_arguments(value).items()}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value if not _is_not_needed(item)]
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if callable(value):
        return classes.spelling_of(value)
    raise RecipeError(f"{type(value).__name__} {value!r} cannot be written to a recipe file; use run.Config(...).")
