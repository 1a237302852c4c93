"""What a checkpoint can be exported to: one table of formats, read by the command line and by `api.export_ckpt`."""

import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_recipes.errors import CheckpointError, nearest


@dataclass(frozen=True)
class Format:
    """A form a checkpoint leaves in.

    Attributes:
        summary: One line for ``--help``.
        made: What it makes, as results call it: "model" or "adapter".
        function: ``module:name`` below `mixtral_recipes.importers`; called with the checkpoint, the output,
            ``overwrite`` and the options it has arguments for.
        ending: Of a format that is one file: how its name ends.
    """

    summary: str
    made: str
    function: str
    ending: str = ""

    def load(self) -> Any:
        """The function that writes it."""
        module, name = self.function.split(":")
        return getattr(importlib.import_module(f"mixtral_recipes.importers.{module}"), name)


FORMATS = {
    "hf": Format("a model folder, adapters merged into it", "model", "convert.megatron_to_hf:export_checkpoint"),
    "gguf": Format("a file for llama.cpp and Ollama, adapters merged", "model", "gguf.export:export_gguf", ".gguf"),
    "nemo": Format("a NeMo 2.0 checkpoint, adapters merged into it", "model", "convert.megatron_to_nemo:export_nemo"),
    "nemo-peft": Format("the adapter alone, for NeMo 2.0", "adapter", "convert.adapter_to_nemo:export_nemo_adapter"),
    "peft": Format("the adapter alone, for peft and vLLM", "adapter", "peft.export:export_adapter"),
}
FORMER = {"hf-peft": "peft"}  # NeMo's spelling


def summaries() -> str:
    """Every format with its summary, for ``--help``."""
    return "; ".join(f"{name}: {format.summary}" for name, format in FORMATS.items())


def format_of(output: Path) -> str:
    """The format that an output's name calls for: one whose files end so, or Hugging Face's."""
    return next((name for name, format in FORMATS.items() if format.ending and format.ending == output.suffix), "hf")


def default_output(source: Path, target: str) -> Path:
    """Where an export goes that was given no place: beside its checkpoint."""
    name = FORMER.get(target, target)
    ending = FORMATS[name].ending if name in FORMATS else ""
    return source.with_name(source.name + (ending or f"-{target}"))


def made(target: str) -> str:
    """What a format makes, as results call it; of one that is not known, a model."""
    name = FORMER.get(target, target)
    return FORMATS[name].made if name in FORMATS else "model"


def export(
    checkpoint: Path,
    output: Path,
    target: str,
    *,
    overwrite: bool = False,
    told: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write a checkpoint in another form.

    Args:
        checkpoint: A checkpoint folder of ours.
        output: What to make; must not exist.
        target: A name in `FORMATS`, or NeMo's for one.
        overwrite: Replace an earlier export.
        told: Filled with what the format's function has to say besides; see there.
        **options: The format's own; None counts as not given.

    Returns:
        What was made.

    Raises:
        CheckpointError: an unknown format, an option it has not, or what the format's function refuses.
    """
    name = FORMER.get(target, target)
    if name not in FORMATS:
        raise CheckpointError(f"--format {target} is not a known format.{nearest(target, [*FORMATS, *FORMER])}")
    function = FORMATS[name].load()
    given = {option: value for option, value in options.items() if value is not None}
    known = [*inspect.signature(function).parameters][2:]
    for option in given:
        if option not in known:
            raise CheckpointError(f"--{option.replace('_', '-')} has no effect with --format {name}; leave it out.")
    if "told" in known:
        given["told"] = told
    return function(checkpoint, output, overwrite=overwrite, **given)
