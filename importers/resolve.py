"""A Megatron checkpoint for any way of naming a model."""

from pathlib import Path

from mixtral_recipes import embedded
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.locations import finished


def resolve(source: str) -> Path:
    """A Megatron checkpoint folder for any way of naming a model, importing it first where that is needed.

    Args:
        source: ``nemo://ID`` (a finished import under `models_home`), ``hf://ID[@revision]`` or ``hf://path`` (imported
            once, then reused), ``embedded://ID``, or the path of a checkpoint folder or of a Hugging Face folder
            (imported likewise).

    Raises:
        CheckpointError: nothing is there.
    """
    if source.startswith("nemo://"):
        return finished(source.removeprefix("nemo://"))
    source = str(embedded.resolve(source)) if source.startswith(embedded.PREFIX) else source
    path = Path(source).expanduser()
    if not source.startswith("hf://") and (path / "manifest.json").is_file():
        return path.resolve()
    return import_checkpoint(source)
