"""Inspect recipes: name one in a line, flatten it to dotted paths, compare two."""

import ast
import re
from pathlib import Path
from typing import Any

import fiddle as fdl

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.overrides import loading
from mixtral_recipes.peft.busiest import with_experts_named
from mixtral_recipes.peft.count import trained_parameters
from mixtral_recipes.planner.weights import parameters
from mixtral_recipes.recipes import catalog
from mixtral_recipes.settings.literals import arguments, expression
from mixtral_recipes.settings.nemo.calls import not_ours

_SPEC = re.compile(r"(\w+(?:\.\w+)*)(\(.*\))?")


def recipe_of(spec: str, default_task: str = "finetune") -> Any:
    """The recipe that a user names.

    Args:
        spec: ``mixtral_8x7b.pretrain``, ``mixtral_8x7b.finetune(peft_scheme='dora')``, a function of the user's own
            (``mylab.recipes.narrow``), or a YAML file.
        default_task: What a name without a task means.

    Raises:
        RecipeError: it names none.
    """
    if spec.endswith((".yaml", ".yml")):
        from mixtral_recipes.overrides.yaml_file import read_recipe

        return read_recipe(Path(spec))
    match = _SPEC.fullmatch(spec)
    if not match:
        raise RecipeError(f"{spec!r} does not name a recipe; use e.g. mixtral_8x7b.finetune, or a .yaml file.")
    path, call = match.groups()
    example = "mixtral_8x7b.finetune(peft_scheme='dora')"
    try:
        read = expression(f"f{call or '()'}")
    except ValueError:
        read = None
    if not isinstance(read, ast.Call):
        raise RecipeError(f"{spec!r}: pass arguments by name, e.g. {example}.")
    given = arguments(read, repr(spec), example)
    name, _, task = path.partition(".")
    if task and name not in catalog.CATALOG:
        return loading.load_own(path, **given)
    return loading.load(catalog.entry(name).name, task or default_task, **given)


def overview(recipe: Any, name: str | None) -> dict[str, Any]:
    """A recipe in a few figures: its model's sizes, its layout, and why that is the default.

    Args:
        recipe: The recipe.
        name: Its name in the catalog, as far as one is known.

    Returns:
        ``model``, ``layout``, ``why`` and ``trained``: parameters by kind of module, empty where all weights are
        trained. ``why`` is None where the layout is not one of the recipe's own.

    Raises:
        RecipeError: its adapters name a layer or an expert that the model has not.
    """
    shape, topology = ModelShape.of(recipe.model.config), Topology.of(recipe.trainer)
    sizes = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "num_moe_experts")
    model = {size: getattr(shape, size) for size in sizes} | {"parameters": parameters(shape)}
    nodes = {"num_nodes": recipe.trainer.num_nodes, "num_gpus_per_node": recipe.trainer.devices}
    own = catalog.CATALOG[name].layouts_of(_tasks(recipe)) if name in catalog.CATALOG else []
    why = [layout.why for layout in own if layout.topology == topology]
    return {
        "model": model,
        "layout": nodes | {"topology": topology.describe(), **topology.settings()},
        "why": why[0] if why else None,
        "trained": _trained(recipe, shape),
    }


def _trained(recipe: Any, shape: ModelShape) -> dict[str, int]:
    if getattr(recipe, "peft", None) is None:
        return {}
    scheme: Any = fdl.build(recipe.peft)
    scheme = with_experts_named(scheme, shape.num_layers, shape.num_moe_experts)
    scheme.check_against(shape.num_layers, shape.num_moe_experts)
    return trained_parameters(scheme, shape)


def _tasks(recipe: Any) -> tuple[str, ...]:
    """Under which tasks the catalog has a recipe's layout."""
    if fdl.get_callable(recipe).__name__ != "finetune":
        return ("pretrain", "performance")
    return ("peft",) if recipe.peft is not None else ("full_packed", "full")


def flat(config: Any, *, defaults: bool, path: str = "") -> dict[str, Any]:
    """Every setting by its dotted path; a part's own path gives its class.

    Args:
        config: A recipe or a part of one.
        defaults: Whether settings nobody set are listed with their defaults.
        path: The path of ``config`` itself.
    """
    if isinstance(config, fdl.Buildable):
        found = {path: fdl.get_callable(config).__name__} if path else {}
        given = fdl.ordered_arguments(config)
        fields = getattr(fdl.get_callable(config), "__dataclass_fields__", {})
        left_out = not_ours(fdl.get_callable(config)) if defaults else set()
        for name, value in fdl.ordered_arguments(config, include_defaults=defaults).items():
            if name in left_out and name not in given:
                continue
            if name not in given and name in fields and callable(make := fields[name].default_factory):
                value = make()
            found |= flat(value, defaults=defaults, path=f"{path}.{name}" if path else str(name))
        return found
    if isinstance(config, list) and any(isinstance(item, fdl.Buildable) for item in config):
        found = {}
        for number, item in enumerate(config):
            found |= flat(item, defaults=defaults, path=f"{path}[{number}]")
        return found
    return {path: config}


def differences(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    """Every setting that differs, as (path, value in a, value in b); `MISSING` where a side has no such setting."""
    left, right = flat(a, defaults=True), flat(b, defaults=True)
    paths = [*left, *(path for path in right if path not in left)]
    pairs = ((path, left.get(path, MISSING), right.get(path, MISSING)) for path in paths)
    return [(path, x, y) for path, x, y in pairs if not _same(x, y)]


def _same(x: Any, y: Any) -> bool:
    return x is y or (type(x) is type(y) and x == y) or (isinstance(x, int | float) and x == y)


class _Missing:
    def __repr__(self) -> str:
        return "-"


MISSING = _Missing()
