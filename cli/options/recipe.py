"""Which recipe, and what is changed in it."""

import enum
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mixtral_recipes.cli.options.groups import argument, field
from mixtral_recipes.layout.cards import CARDS


class PeftScheme(enum.StrEnum):
    """What is trained."""

    lora = "lora"
    dora = "dora"
    qlora = "qlora"
    none = "none"


def option_of(argument: str) -> str:
    """The option that gives an argument of the recipe functions, e.g. ``--peft`` for ``peft_scheme``."""
    return f"--{argument.removesuffix('_scheme').removesuffix('_sequence').replace('_', '-')}"


def complete_override(incomplete: str) -> list[str]:
    """Override paths that start with what is typed."""
    from mixtral_recipes.overrides.completion import PATHS

    return [f"{path}=" for path in PATHS if path.startswith(incomplete)]


def complete_recipe(incomplete: str) -> list[str]:
    """Recipe names that start with what is typed."""
    from mixtral_recipes.recipes.catalog import names

    return [name for name in names() if name.startswith(incomplete)]


def complete_card(incomplete: str) -> list[str]:
    """Cards whose names start with what is typed."""
    return [name for name in CARDS if name.startswith(incomplete)]


# Options of commands that train and of `plan`, which has them under another heading.
recipe_field = functools.partial(
    field, "--recipe NAME", "One of `recipes list`, or your MODULE.FUNCTION.", autocompletion=complete_recipe
)
precision_field = functools.partial(field, "--precision TYPE", "bf16, fp8, or fp32 for mixtral_tiny.")
hardware_field = functools.partial(
    field,
    "--hardware GPU",
    f"The GPU: {', '.join(CARDS)}; default: this machine's, else h100.",
    autocompletion=complete_card,
)
packed_field = functools.partial(field, "--packed/--no-packed", "Several samples per sequence.")
performance_field = functools.partial(
    field, "--performance-mode", "NeMo's performance mode: token drop, overlap, bf16 reduction."
)
_PANEL = "Recipe"
_recipe = functools.partial(field, rich_help_panel=_PANEL)

Overrides = Annotated[
    list[str] | None,
    argument("PATH=VALUE", "Settings to change, e.g. trainer.max_steps=20.", autocompletion=complete_override),
]


@dataclass
class RecipeOptions:
    """A recipe by its name or from a file, and what the recipes of every task take."""

    recipe: str | None = recipe_field(rich_help_panel=_PANEL)
    yaml: Path | None = _recipe("--yaml FILE", "Run the recipe in this file.")
    data: list[str] | None = _recipe(
        "--data DATA",
        "File, folder, Hub id or corpus (.bin, .idx): SQuAD, chat, prompts and answers, text. "
        "Several are mixed: --data a.jsonl:0.7 --data b.jsonl:0.3.",
    )
    precision: str | None = precision_field(rich_help_panel=_PANEL)
    hardware: str | None = hardware_field(rich_help_panel=_PANEL)


@dataclass
class FineTuningOptions:
    """What is trained, on which data, from which weights."""

    peft: PeftScheme | None = _recipe(
        "--peft SCHEME",
        "Adapters to train: lora (default), dora, or qlora (base in 4 bits); none: all weights.",
        case_sensitive=False,
    )
    bits: int | None = _recipe("--bits N", "Bits of QLoRA's base: 4 (NF4, default) or 8 (int8 by row).")
    chat_template: str | None = _recipe(
        "--chat-template TEMPLATE", "mixtral, mistral-v3, chatml or a Jinja file; for chats."
    )
    restore_from: str | None = _recipe(
        "--restore-from MODEL", "Start from hf://ID, nemo://ID, a folder, or a run's model."
    )
    resize_vocab: bool = _recipe(
        "--resize-vocab", "Add rows for tokens that the tokenizer has and the checkpoint does not."
    )
    instruct: bool = _recipe("--instruct", "Start from the Instruct variant.")
    packed: bool | None = packed_field(rich_help_panel=_PANEL)


@dataclass
class PretrainingOptions:
    """What only pretraining offers."""

    performance_mode: bool = performance_field(rich_help_panel=_PANEL)
