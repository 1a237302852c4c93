"""A Megatron checkpoint for any way of naming a model."""

import hashlib
import os
from pathlib import Path
from typing import Any

from mixtral_recipes import embedded
from mixtral_recipes.checkpoints.lineage.identity import identity_of
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.locations import finished, is_path
from mixtral_recipes.importers.recognise import Form, recognise
from mixtral_recipes.system.files import sha256
from mixtral_recipes.system.home import models_home
from mixtral_recipes.system.ranks import first, joined


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
    return import_any(source)


def import_any(
    source: str, output: Path | None = None, *, base: str | None = None, overwrite: bool = False, **options: Any
) -> Path:
    """Import a model, or a peft adapter for a base that is imported first where it is not yet.

    Args:
        source: As `import_checkpoint` takes it, or a peft folder.
        output: Where to put the checkpoint; None keeps it under `models_home`, and the same source is converted once.
        base: The model an adapter adapts, as `resolve` takes it; None takes the one adapter_config.json names.
        overwrite: Replace an existing checkpoint.
        **options: As `import_checkpoint` takes them; an adapter has none.

    Raises:
        CheckpointError: the source cannot be taken exactly, or an adapter's base is not known.
    """
    folder = Path(source.removeprefix("hf://")).expanduser()
    if folder.is_dir() and recognise(folder).form is Form.PEFT:
        return _import_adapter(folder.resolve(), output, base, overwrite=overwrite)
    if base is not None:
        raise CheckpointError(f"{source} is no adapter, so --base says nothing; leave it out.")
    return import_checkpoint(source, output, overwrite=overwrite, **options)


def _import_adapter(folder: Path, output: Path | None, base: str | None, *, overwrite: bool) -> Path:
    from mixtral_recipes.importers.peft.convert import write_adapter
    from mixtral_recipes.importers.peft.source import read_settings

    settings = read_settings(folder)
    named = base or str(settings.get("base_model_name_or_path") or "")
    if not named:
        raise CheckpointError(
            f"{folder}: adapter_config.json names no base model; say which with --base PATH or hf://ID."
        )
    if base is None and not Path(named).expanduser().exists():
        named = f"hf://{named}"
    try:
        model = resolve(named)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: its base model cannot be had ({error}); name one with --base.") from error
    final = Path(os.path.abspath(output)) if output else _adapter_home(folder, model)
    with joined() as group:

        def write() -> Path:
            if output is None and not overwrite and (final / "manifest.json").is_file():
                return final
            return write_adapter(folder, settings, model, final, overwrite=overwrite)

        return first(write, group)


def _adapter_home(folder: Path, base: Path) -> Path:
    """Where an adapter's import is kept: the same for the same files on the same base, and for nothing else."""
    digest = hashlib.sha256(repr(identity_of(base)).encode())
    for path in sorted(folder.glob("adapter_*")):
        digest.update(f"{path.name} {sha256(path)}".encode())
    return models_home() / "local" / f"{folder.name}@{digest.hexdigest()[:12]}"
