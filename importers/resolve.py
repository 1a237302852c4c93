"""A Megatron checkpoint for any way of naming a model."""

from pathlib import Path

from mixtral_recipes import embedded
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.locations import finished, is_path
from mixtral_recipes.importers.recognise import Form, recognise


def resolve(source: str) -> Path:
    """A Megatron checkpoint folder for any way of naming a model, importing it first where that is needed.

    Args:
        source: ``nemo://ID`` (a finished import under `models_home`), ``hf://ID[@revision]`` or ``hf://path`` (imported
            once, then reused), ``embedded://ID``, or the path of a checkpoint folder, or of a folder of any form that
            can be imported (imported likewise; ``nemo://`` before its path is fine).

    Raises:
        CheckpointError: nothing is there.
    """
    if source.startswith("nemo://") and not is_path(source):
        return finished(source.removeprefix("nemo://"))
    source = str(embedded.resolve(source)) if source.startswith(embedded.PREFIX) else source
    path = Path(source.removeprefix("nemo://")).expanduser()
    if path.is_dir() and not source.startswith("hf://"):
        found = recognise(path.resolve())
        if found.form is Form.CHECKPOINT:
            return found.folder
    return import_checkpoint(source)
