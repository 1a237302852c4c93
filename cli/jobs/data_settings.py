"""Settings of data written as a run takes them, where data is looked at before there is a recipe, or without one."""

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtral_recipes.data.recognise import Recognized


def columns_in(overrides: Sequence[str]) -> dict[str, str | None]:
    """What overrides say of the names of a data set's fields, which is needed to recognise it."""
    named: dict[str, str | None] = {}
    if given := [text for text in overrides if text.startswith("data.columns=")]:
        import nemo_run as run

        from mixtral_recipes.data.modules.chat import ChatDataModule
        from mixtral_recipes.overrides import paths

        holder: Any = run.Partial(takes_data, data=run.Config(ChatDataModule))
        paths.apply(holder, given)
        named |= holder.data.columns or {}
    named.update(("text", text.partition("=")[2]) for text in overrides if text.startswith("data.text_key="))
    return named


def takes_data(data: Any) -> None:
    """What settings of data are written for: something that has data."""


def module_settings(recognized: "Recognized", texts: Sequence[str]) -> dict[str, Any]:
    """Settings of the module that reads a data set.

    Raises:
        RecipeError: a text that sets nothing of the data, or nothing that this module has.
    """
    if not texts:
        return {}
    import nemo_run as run

    from mixtral_recipes.errors import RecipeError
    from mixtral_recipes.overrides import paths

    for text in texts:
        if not text.startswith("data."):
            raise RecipeError(f"{text!r} is not a data setting; use data.NAME=VALUE.")
        if text.startswith("data.seq_length="):
            raise RecipeError(f"{text}: use --seq-length {text.partition('=')[2]} instead.")
    module = run.Config(recognized.module_class, **recognized.kwargs)
    paths.apply(run.Partial(takes_data, data=module), texts)
    return {str(name): value for name, value in module.__arguments__.items()}


def of_records(overrides: Sequence[str]) -> list[str]:
    """Those that say how records are read; the others are of the batch, or not of the data."""
    from mixtral_recipes.data.modules.base import DataModule

    batch = "|".join(field.name for field in dataclasses.fields(DataModule))
    return [text for text in overrides if text.startswith("data.") and not re.match(rf"data\.({batch})\b", text)]
