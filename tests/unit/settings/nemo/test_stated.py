"""What the text of a settings class says, against the class itself."""

import dataclasses
import importlib
import typing

from mixtral_recipes.settings.classes import OURS, THEIRS
from mixtral_recipes.settings.conformity import annotation, default
from mixtral_recipes.settings.nemo.stated import stated_default, stated_type

MODULES = {name: f"mixtral_recipes.{module}" for name, module in OURS.items()} | THEIRS
SETTINGS = [
    (owner, field.name)
    for owner in (getattr(importlib.import_module(module), name) for name, module in MODULES.items())
    if dataclasses.is_dataclass(owner)
    for field in dataclasses.fields(owner)
]


def test_what_the_text_says_is_what_the_class_says() -> None:
    told = 0
    for owner, name in SETTINGS:
        kind, value = stated_type(owner.__name__, name), stated_default(owner.__name__, name)
        if kind is not typing.Any:
            told += 1
            assert kind == annotation(owner, name), (owner, name)
        if value is not dataclasses.MISSING:
            assert value == default(owner, name), (owner, name)
    assert told > 0.8 * len(SETTINGS)
