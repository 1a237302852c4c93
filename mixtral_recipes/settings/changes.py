"""What a recipe says, in one flat table; and what changed in it between two starts of a run."""

import dataclasses
import enum
from dataclasses import dataclass
from typing import Any

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.settings.optim import MegatronOptimizerModule

# What a checkpoint's tensors or its optimizer's state depend on.
_FIXED_MODEL = (
    "num_layers", "hidden_size", "ffn_hidden_size", "moe_ffn_hidden_size", "num_attention_heads", "num_query_groups",
    "kv_channels", "num_moe_experts", "vocab_size", "share_embeddings_and_output_weights",
)  # fmt: skip
FIXED = (*(f"model.config.{name}" for name in _FIXED_MODEL), "optim.config.optimizer", "peft", "base", "tokenizer")
# What a setting's place in a table is called that is a hash of the files it names (`data/contents.py`).
FILES = "the files of "
# Where a run runs and how often it reports: no change of the recipe.
_PASSING = ("trainer.callbacks", "model.tokenizer", "model.optim", "model.model_transform", "peft.cache")

Plain = bool | int | float | str | None


@dataclass(frozen=True)
class Change:
    """One setting that differs. ``before`` or ``after`` is ``"(absent)"`` where the setting did not exist."""

    path: str
    before: Plain
    after: Plain

    def __str__(self) -> str:
        return f"{self.path}: {self.before} -> {self.after}"


def describe(**parts: Any) -> dict[str, Plain]:
    """Dotted path -> value of every setting of a recipe's parts (``model=``, ``trainer=``, ...)."""
    table: dict[str, Plain] = {}
    for name, part in parts.items():
        _flatten(name, part, table)
    return {path: value for path, value in table.items() if not path.startswith(_PASSING)}


def asked(model: Any, trainer: Any, data: Any, optim: Any, peft: Any, resume: Any, tokenizer: Any) -> dict[str, Plain]:
    """`describe` of `api.finetune`'s arguments as they were given; nothing is read to fill any in."""
    return describe(
        model=model,
        trainer=trainer,
        data=data,
        optim=optim or model.optim or MegatronOptimizerModule(),
        peft=peft or model.model_transform,
        start=resume and resume.restore_config,
        tokenizer=tokenizer,
    )


def _flatten(path: str, value: Any, into: dict[str, Plain]) -> None:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        into[f"{path}.class"] = type(value).__name__
        for field in dataclasses.fields(value):
            _flatten(f"{path}.{field.name}", getattr(value, field.name, None), into)
    elif isinstance(value, dict):
        for key, item in value.items():
            _flatten(f"{path}.{key}", item, into)
    elif isinstance(value, list | tuple) and any(map(dataclasses.is_dataclass, value)):  # the sources of a mixture
        for number, item in enumerate(value):
            _flatten(f"{path}.{number}", item, into)
    elif value is None or isinstance(value, bool | int | float | str):
        into[path] = value.name if isinstance(value, enum.Enum) else value
    elif isinstance(value, list | tuple | set):
        into[path] = ", ".join(map(_text, sorted(value, key=str) if isinstance(value, set) else value))
    else:
        into[path] = _text(value)


def _text(value: Any) -> str:
    """A value as text that is the same in every process."""
    if isinstance(value, enum.Enum):
        return value.name
    name = getattr(value, "__qualname__", None)
    if name:
        return f"{getattr(value, '__module__', '')}.{name}"
    text = str(value)
    return type(value).__name__ if " at 0x" in text else text


def changes(before: dict[str, Plain], after: dict[str, Plain]) -> list[Change]:
    """What differs between two tables."""
    absent = "(absent)"
    return [
        Change(path, before.get(path, absent), after.get(path, absent))
        for path in sorted(before.keys() | after.keys())
        if before.get(path, absent) != after.get(path, absent)
    ]


def refuse_other_settings(name: str, steps: int, before: dict[str, Plain], after: dict[str, Plain]) -> None:
    """Refuse to reuse a finished run if the settings requested now differ from its own.

    Raises:
        RecipeError: names every setting that differs, with both values.
    """
    found = [change for change in changes(before, after) if not (_is_place(change.path) or _is_unseen(change))]
    if "peft.class" in before.keys() ^ after.keys():  # none of the scheme's settings says more than that
        trained = ("all weights, not adapters", "adapters, not all weights")["peft.class" in after]
        told = [f"this run trains {trained}", *(str(change) for change in found if change.path.split(".")[0] != "peft")]
    else:
        told = [str(change) for change in found]
    if told:
        raise RecipeError(
            f"{name} has already finished {steps} steps with other settings ({'; '.join(told)}): set them back, start "
            f"a run with another --name, or continue it with trainer.max_steps above {steps}."
        )


def _is_place(path: str) -> bool:
    """Whether a setting says on how many processes a run runs: what it made does not depend on it, its default does."""
    return path in ("trainer.devices", "trainer.num_nodes") or path.endswith("_parallel_size")


def _is_unseen(change: Change) -> bool:
    """Whether it is about files that were not looked at both times."""
    return change.path.startswith(FILES) and "(absent)" in (change.before, change.after)


def refuse_fixed(found: list[Change]) -> None:
    """Refuse to continue if something changed that a checkpoint depends on.

    Raises:
        RecipeError: names every such setting and both values.
    """
    fixed = [change for change in found if change.path in FIXED or change.path.startswith(("peft.", "base."))]
    if fixed:
        raise RecipeError(
            f"the run's checkpoints were written with other settings ({'; '.join(map(str, fixed))}), which cannot "
            "change within a run: set them back, or start a run with another --name."
        )
