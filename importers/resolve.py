"""A Megatron checkpoint for any way of naming a model."""

import hashlib
import os
from pathlib import Path
from typing import Any

from mixtral_recipes.checkpoints.format.manifest import read_manifest
from mixtral_recipes.checkpoints.lineage.identity import identity_of
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.locations import finished, import_name, parse_source
from mixtral_recipes.importers.open import IMPORTABLE, WANTED
from mixtral_recipes.importers.recognise import Form, Found, recognise, required
from mixtral_recipes.system.files import sha256
from mixtral_recipes.system.home import models_home
from mixtral_recipes.system.ranks import first, joined

# What decides the import of an adapter of another form.
_OF_ADAPTERS = ("adapter_*", "weights/*", "context/*.json", "lineage.json")


def resolve(source: str) -> Path:
    """A Megatron checkpoint folder for any way of naming a model, importing it first where that is needed.

    Args:
        source: ``nemo://ID`` (a finished import under `models_home`), ``hf://ID[@revision]`` or ``hf://path`` (imported
            once, then reused), ``embedded://ID``, or the path of a checkpoint folder, or of a folder of any form that
            can be imported (imported likewise; ``nemo://`` before its path is fine).

    Raises:
        CheckpointError: nothing is there.
    """
    if (name := import_name(source)) is not None:
        return finished(name)
    place = parse_source(source)
    if isinstance(place, Path) and not source.startswith("hf://"):
        found = recognise(place)
        if found.form is Form.CHECKPOINT:
            return found.folder
    return import_any(source)


def check_source(source: str) -> None:
    """Refuse what `resolve` would, as far as names and small files say it: nothing is fetched or imported.

    An import that is not there may be made before the job runs, so ``nemo://ID`` is left to the run as a Hub id is.

    Args:
        source: As `resolve` takes it.

    Raises:
        CheckpointError: nothing is there, or something that cannot be taken.
    """
    if import_name(source) is not None:
        return
    place = parse_source(source)
    form = recognise(place).form if isinstance(place, Path) else None
    if isinstance(place, Path) and form is Form.PEFT:
        _peft_base(place)
    elif isinstance(place, Path) and form not in (Form.CHECKPOINT, Form.NEMO_ADAPTER):
        required(place, *IMPORTABLE, wanted=WANTED)


def import_any(
    source: str, output: Path | None = None, *, base: str | None = None, overwrite: bool = False, **options: Any
) -> Path:
    """Import a model, or an adapter for a base that is imported first where it is not yet.

    Args:
        source: As `import_checkpoint` takes it, or the folder of a peft adapter or of a NeMo 2.0 adapter checkpoint.
        output: Where to put the checkpoint; None keeps it under `models_home`, and the same source is converted once.
        base: The model an adapter adapts, as `resolve` takes it; None takes the one the adapter names.
        overwrite: Replace an existing checkpoint.
        **options: As `import_checkpoint` takes them; an adapter has none.

    Raises:
        CheckpointError: the source cannot be taken exactly, or an adapter's base is not known.
    """
    folder = Path(source.removeprefix("hf://").removeprefix("nemo://")).expanduser()
    found = recognise(folder.resolve()) if folder.is_dir() and import_name(source) is None else None
    if found and found.form in (Form.PEFT, Form.NEMO_ADAPTER):
        if options.get("dtype"):
            raise CheckpointError(f"{source} is an adapter, so --dtype has no effect; leave it out.")
        return _import_adapter(found, output, base, overwrite=overwrite)
    if base is not None:
        raise CheckpointError(f"{source} is not an adapter, so --base has no effect; leave it out.")
    return import_checkpoint(source, output, overwrite=overwrite, **options)


def _import_adapter(found: Found, output: Path | None, base: str | None, *, overwrite: bool) -> Path:
    folder = found.folder
    named = base or (_nemo_base if found.form is Form.NEMO_ADAPTER else _peft_base)(folder)
    try:
        model = resolve(named)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: its base model is not available ({error}); pass it with --base.") from error
    if read_manifest(model)["kind"] == "adapter":
        raise CheckpointError(
            f"{folder}: its base {model} is an adapter too; pass the model that both adapt with --base."
        )
    final = Path(os.path.abspath(output)) if output else _adapter_home(folder, model)
    with joined() as group:

        def write() -> Path:
            if output is None and not overwrite and (final / "manifest.json").is_file():
                return final
            if found.form is Form.NEMO_ADAPTER:
                from mixtral_recipes.importers.convert.nemo_to_adapter import write_nemo_adapter

                return write_nemo_adapter(folder, model, final, overwrite=overwrite)
            from mixtral_recipes.importers.peft.convert import write_adapter
            from mixtral_recipes.importers.peft.source import read_settings

            return write_adapter(folder, read_settings(folder), model, final, overwrite=overwrite)

        return first(write, group)


def _nemo_base(folder: Path) -> str:
    from mixtral_recipes.importers.convert.nemo_to_adapter import base_named_by

    return str(base_named_by(folder))


def _peft_base(folder: Path) -> str:
    """The base that a peft adapter names: a folder, or a Hub id."""
    from mixtral_recipes.importers.peft.source import read_settings

    named = str(read_settings(folder).get("base_model_name_or_path") or "")
    if not named:
        raise CheckpointError(
            f"{folder}: adapter_config.json names no base model; pass it with --base PATH or --base hf://ID."
        )
    return named if Path(named).expanduser().exists() else f"hf://{named}"


def _adapter_home(folder: Path, base: Path) -> Path:
    """Where an adapter's import is kept: the same for the same files on the same base, and for nothing else."""
    digest = hashlib.sha256(repr(identity_of(base)).encode())
    for path in sorted(path for pattern in _OF_ADAPTERS for path in folder.glob(pattern)):
        digest.update(f"{path.name} {sha256(path)}".encode())
    return models_home() / "local" / f"{folder.name}@{digest.hexdigest()[:12]}"
