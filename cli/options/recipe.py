"""Which recipe, and what is changed in it."""

import enum
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mixtral_recipes.planner.cards import CARDS

option = functools.partial(typer.Option, rich_help_panel="Recipe")


HARDWARE_HELP = f"The card: {', '.join(CARDS)}; default: this machine's, else h100."


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


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PATH=VALUE", help="Settings to change, e.g. trainer.max_steps=20.", autocompletion=complete_override
    ),
]


@dataclass
class RecipeOptions:
    """A recipe by its name or from a file, and what the recipes of every task take."""

    recipe: Annotated[
        str | None,
        option(
            "--recipe",
            metavar="NAME",
            help="One of `recipes list`, or your MODULE.FUNCTION.",
            autocompletion=complete_recipe,
        ),
    ] = None
    yaml: Annotated[Path | None, option("--yaml", metavar="FILE", help="Run the recipe in this file.")] = None
    data: Annotated[
        list[str] | None,
        option(
            "--data",
            metavar="DATA",
            help="File, folder, Hub id or corpus (.bin, .idx): SQuAD, chat, prompts and answers, text. "
            "Several are mixed: --data a.jsonl:0.7 --data b.jsonl:0.3.",
        ),
    ] = None
    precision: Annotated[
        str | None, option("--precision", metavar="TYPE", help="bf16, fp8, or fp32 for mixtral_tiny.")
    ] = None
    hardware: Annotated[
        str | None, option("--hardware", metavar="GPU", help=HARDWARE_HELP, autocompletion=complete_card)
    ] = None


@dataclass
class FineTuningOptions:
    """What is trained, on which data, from which weights."""

    peft: Annotated[
        PeftScheme | None,
        option(
            "--peft",
            metavar="SCHEME",
            help="Adapters to train: lora (default), dora, or qlora (base in 4 bits); none: all weights.",
        ),
    ] = None
    bits: Annotated[
        int | None,
        option("--bits", metavar="N", help="Bits of QLoRA's base: 4 (NF4, default) or 8 (int8 by row)."),
    ] = None
    chat_template: Annotated[
        str | None,
        option("--chat-template", metavar="TEMPLATE", help="mixtral, mistral-v3, chatml or a Jinja file; for chats."),
    ] = None
    restore_from: Annotated[
        str | None,
        option("--restore-from", metavar="MODEL", help="Start from hf://ID, nemo://ID, a folder, or a run's model."),
    ] = None
    resize_vocab: Annotated[
        bool, option("--resize-vocab", help="Add rows for tokens that the tokenizer has and the checkpoint does not.")
    ] = False
    instruct: Annotated[bool, option("--instruct", help="Start from the Instruct variant.")] = False
    packed: Annotated[bool | None, option("--packed/--no-packed", help="Several samples per sequence.")] = None


@dataclass
class PretrainingOptions:
    """What only pretraining offers."""

    performance_mode: Annotated[
        bool, option("--performance-mode", help="NeMo's performance mode: token drop, overlap, bf16 reduction.")
    ] = False
