"""Dotted overrides, ``trainer.max_steps=20``, in nemo_run's syntax: ``= += -= *= /= |= &=``, lists by index.

Beyond nemo_run: a misspelt name says the closest valid one; a part that is None (``resume.restore_config``) is created
when a setting inside it is given; whole parts are named by class, ``peft=DoRA(dim=16)``.
"""

import ast
import dataclasses
import inspect
import re
import typing
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import fiddle as fdl
import nemo_run as run
from nemo_run.cli.cli_parser import CLIException, Operation, PythonicParser

from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.errors import RecipeError, nearest
from mixtral_recipes.overrides import values
from mixtral_recipes.settings import classes, conformity
from mixtral_recipes.settings.conformity import options
from mixtral_recipes.settings.literals import arguments, expression
from mixtral_recipes.settings.nemo.modules import NotHere, of_nemo
from mixtral_recipes.settings.nemo.names import NAMES, name_here

_PART = re.compile(r"([A-Za-z_]\w*)((?:\[\d{1,9}\])*)")
_OBJECT = re.compile(r"[A-Za-z_][\w.]*(\(.*\))?")
_TIMEDELTA = ("days", "hours", "minutes", "seconds", "milliseconds", "microseconds", "weeks")  # it has no signature


def apply(recipe: run.Partial[Any], overrides: Iterable[str]) -> None:
    """Change a recipe by dotted overrides, in order.

    A data module named by its class keeps from the one it replaces what every data module has (sequence length, batch
    sizes, ...), where nothing else is written.

    Args:
        recipe: The recipe to change.
        overrides: Texts such as ``optim.config.lr=1e-4``.

    Raises:
        RecipeError: a text that is not an override, an unknown setting, or a value of the wrong type.
    """
    parser = PythonicParser()
    for text in overrides:
        try:
            ((path, (operation, value)),) = parser.parse(text).items()
        except CLIException:
            raise RecipeError(f"{text!r} is not a setting; use path=value, e.g. trainer.max_steps=20.") from None
        holder, name = locate(recipe, path, text)
        new = _value(holder, name, value, path)
        if operation is not Operation.ASSIGN:
            old = get(holder, name)
            try:
                new = parser.apply_operation(operation, old, new)
            except CLIException:
                raise RecipeError(f"{text}: {old!r} {operation.value} {new!r} cannot be computed.") from None
            new = values.check(new, annotation(holder, name), path)
        assign(holder, name, new)


def set_value(recipe: run.Partial[Any], path: str, value: Any) -> None:
    """Change one setting to a value (not text), checked against its type.

    Args:
        recipe: The recipe to change.
        path: Dotted path.
        value: The value.

    Raises:
        RecipeError: an unknown setting, or a value of the wrong type.
    """
    holder, name = locate(recipe, path, path)
    assign(holder, name, values.check(value, annotation(holder, name), path))


def assign(holder: Any, name: Any, value: Any) -> None:
    """Set what `locate` found; a data module that takes another's place keeps its batch."""
    if isinstance(holder, dict | list):
        holder[name] = value
        return
    if _is_data(value) and _is_data(replaced := getattr(holder, name, None)):
        value = with_batch_of(replaced, value)
    setattr(holder, name, value)


def _is_data(part: Any) -> bool:
    target = fdl.get_callable(part) if isinstance(part, fdl.Config) else None
    return isinstance(target, type) and issubclass(target, DataModule)


def with_batch_of(replaced: Any, data: Any) -> Any:
    """A data module's configuration that has from another's all that modules have in common and it does not state.

    Args:
        replaced: The configuration of the module it takes the place of.
        data: Its own, changed and returned.
    """
    target: Any = fdl.get_callable(data)
    for field in dataclasses.fields(DataModule):
        if field.name == "packed_sequence_specs" and not target.packs:
            continue
        kept = getattr(replaced, field.name)
        if field.name not in data.__arguments__ and kept != getattr(data, field.name):
            setattr(data, field.name, kept)
    return data


def locate(recipe: Any, path: str, text: str) -> tuple[Any, Any]:
    """Follow a path to what holds its last part.

    Args:
        recipe: Where to start.
        path: Dotted path, e.g. ``trainer.callbacks[0].gc_interval_train``.
        text: What the user wrote, for errors.

    Returns:
        The config (or dict, or list) and the name (or key, or index) in it.

    Raises:
        RecipeError: no such setting; names the closest.
    """
    holder, steps = recipe, _steps(path, text)
    for number, step in enumerate(steps):
        _require(holder, step, text)
        if number == len(steps) - 1:
            return holder, step
        inner = get(holder, step)
        if inner is None:
            inner = _create(holder, step, text)
        holder = inner
    raise RecipeError(f"{text!r} does not name a setting.")


def get(holder: Any, name: Any) -> Any:
    """The value of a setting of a part: what was set, or its default.

    A default created for each object (a list, a part) is stored, so that it can be changed.
    """
    if not isinstance(holder, fdl.Buildable):
        return holder.get(name) if isinstance(holder, dict) else holder[name]
    target = fdl.get_callable(holder)
    if name in fdl.ordered_arguments(holder) or not dataclasses.is_dataclass(target):
        return getattr(holder, name, None)
    field = {field.name: field for field in dataclasses.fields(target)}.get(name)
    if field is None or field.default_factory is dataclasses.MISSING:  # None: one that is only NeMo's
        return getattr(holder, name, None)
    parts: list[Any] = [option for option in options(annotation(holder, name)) if dataclasses.is_dataclass(option)]
    assign(holder, name, run.Config(parts[0]) if parts else field.default_factory())
    return getattr(holder, name)


def _steps(path: str, text: str) -> list[str | int]:
    steps: list[str | int] = []
    for part in path.split("."):
        match = _PART.fullmatch(part)
        if not match:
            raise RecipeError(f"{text!r}: {part!r} is not a valid setting name.")
        steps += [match[1], *(int(index) for index in re.findall(r"\d+", match[2]))]
    return steps


def _require(holder: Any, step: str | int, text: str) -> None:
    if isinstance(holder, list):
        if not isinstance(step, int) or step >= len(holder):
            raise RecipeError(f"{text}: the list has no element {step}; it has {len(holder)}, counted from 0.")
    elif isinstance(holder, fdl.Buildable):
        names = fields(holder)
        if step not in names:
            target = fdl.get_callable(holder).__name__
            raise RecipeError(f"{text}: {target} has no setting {step!r}.{nearest(str(step), names)}")
    elif not isinstance(holder, dict):
        raise RecipeError(f"{text}: {holder!r} has no settings.")


def fields(config: Any) -> list[str]:
    """The settings of a config: its class's or function's parameters."""
    target = fdl.get_callable(config)
    if target is timedelta:
        return list(_TIMEDELTA)
    return [name for name in inspect.signature(target).parameters if not name.startswith("_")]


def annotation(holder: Any, name: Any) -> Any:
    """The type of a setting; Any inside a dict or list."""
    if not isinstance(holder, fdl.Buildable):
        return Any
    return conformity.annotation(fdl.get_callable(holder), name)


def _create(holder: Any, name: Any, text: str) -> Any:
    """Fill in a part that is None, where its class is plain from its type."""
    allowed = options(annotation(holder, name))
    classes: list[Any] = [each for each in allowed if dataclasses.is_dataclass(each) or each is timedelta]
    if name == "peft":
        raise RecipeError(f"{text}: this recipe trains all weights; use --peft lora or peft_scheme='lora' first.")
    if dict in [typing.get_origin(option) or option for option in allowed]:
        part: Any = {}
    elif classes:
        part = run.Config(classes[0])
    else:
        raise RecipeError(f"{text}: {name} is not set, so it has no settings to change.")
    assign(holder, name, part)
    return part


def _value(holder: Any, name: Any, text: str, path: str) -> Any:
    wanted = annotation(holder, name)
    if _takes_objects(wanted) or (isinstance(holder, list) and isinstance(holder[name], fdl.Buildable)):
        built = _objects(text, wanted, path)
        if built is not None:
            return built
    return values.parse(text, wanted, path)


def _takes_objects(wanted: Any) -> bool:
    allowed = options(wanted)
    inner = [item for option in allowed for item in typing.get_args(option) if typing.get_origin(option) is list]
    return any(dataclasses.is_dataclass(option) or option is timedelta for option in allowed) or Any in inner


def _objects(text: str, wanted: Any, path: str) -> Any:
    """``Class(...)``, a registered nemo_run factory, or a list of classes; None when the text is something else."""
    if text.startswith("[") and text.endswith("]"):
        try:
            nodes = expression(text)
        except ValueError:
            raise RecipeError(f"{path}={text} is not a list of classes.") from None
        return [_object(node, path) for node in getattr(nodes, "elts", [])]
    word = text.lower() in ("none", "null") or any(text in typing.get_args(option) for option in options(wanted))
    if word or not _OBJECT.fullmatch(text):
        return None
    name = text.partition("(")[0]
    factory = _factory(name, wanted)
    try:
        node = expression(text)
    except ValueError:
        raise RecipeError(
            f"{path}={text} is not a class with arguments, as in LoRA(dim=16); text in it is put in quotes."
        ) from None
    if factory is not None:
        given = _arguments(node, path)
        _refuse_unknown(given, list(inspect.signature(factory).parameters), name, path)
        return factory(**given)
    return values.check(_object(node, path), wanted, path)


def _factory(name: str, wanted: Any) -> Any:
    """A factory registered with nemo_run for one of the wanted classes, e.g. ``model=mixtral_8x22b``."""
    import catalogue
    from nemo_run.config import get_type_namespace

    for option in options(wanted):
        if dataclasses.is_dataclass(option):
            _register_recipes(name)
            key = (get_type_namespace(option), name)  # pyright: ignore[reportArgumentType]
            if catalogue.check_exists(*key):
                return catalogue._get(key)
    return None


def _register_recipes(name: str) -> None:
    """Recipe modules, and that of ``data=squad``, register their factories when they are imported."""
    import importlib

    from mixtral_recipes.recipes import catalog

    importlib.import_module(f"mixtral_recipes.recipes.{name if name in catalog.CATALOG else 'data'}")


def _arguments(node: ast.AST, path: str) -> dict[str, Any]:
    return arguments(node, path, "LoRA(dim=16)") if isinstance(node, ast.Call) else {}


def _refuse_unknown(given: Iterable[str], names: list[str], factory: str, path: str) -> None:
    """Refuse arguments that a factory does not have.

    Raises:
        RecipeError: names one.
    """
    for name in given:
        if name not in names:
            raise RecipeError(
                f"{path}={factory}({name}=...): {factory} has no argument {name!r}; write {path}={factory} and "
                f"{path}.{name}=..., or name a class, as in LoRA(dim=16).{nearest(name, names)}"
            )


def _object(node: ast.AST, path: str) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    spelled = ast.unparse(node.func if isinstance(node, ast.Call) else node)
    config = run.Config(find(spelled, "classes", path))
    for name, value in _arguments(node, path).items():
        set_value(config, name, value)  # pyright: ignore[reportArgumentType]
    return config


def find(spelling: Any, table: str, where: str) -> Any:
    """What a file or an override names in `settings.classes`, under NeMo's path too; for what has no effect a stand-in.

    Args:
        spelling: A name alone or with its module, e.g. ``LoRA``.
        table: ``classes`` or ``tasks``.
        where: What to call the place in an error.

    Raises:
        RecipeError: it is not in the table, or NeMo's, and something else does what it did.
    """
    name = name_here(spelling) if isinstance(spelling, str) else None
    if name not in NAMES:
        return classes.find(name if name in classes.names(table) else spelling, table, where)
    try:
        return of_nemo(name)
    except NotHere as error:
        raise RecipeError(f"{where}: {error}") from error
