"""Where checkpoints are: ``hf://``, ``nemo://`` and paths, and the folder finished imports are kept in.

``nemo://`` has two meanings, as in NeMo: before a name, an import that is kept (``nemo://org/name``); before a path, a
NeMo 2.0 checkpoint there (``nemo:///path``).
"""

import glob
from dataclasses import dataclass
from pathlib import Path

from mixtral_recipes.embedded import PREFIX, resolve
from mixtral_recipes.errors import CheckpointError, nearest
from mixtral_recipes.importers.recognise import Form, required
from mixtral_recipes.system.home import models_home
from mixtral_recipes.system.hub_ids import close_to, is_hub_id, refuse_misspelt_path

_NEMO = "nemo://"


@dataclass(frozen=True)
class HubId:
    """A repository on the Hugging Face Hub, and the revision asked for (None is its default branch)."""

    repo: str
    revision: str | None = None


def parse_source(source: str) -> Path | HubId:
    """The place of a model to import: a folder, or a Hub repository.

    Args:
        source: ``hf://org/name``, ``hf://org/name@revision``, ``hf://path/to/folder``, ``nemo:///path/to/checkpoint``,
            a path, ``embedded://mixtral_tiny``, or ``org/name`` where no such folder exists.

    Raises:
        CheckpointError: it is none of these.
    """
    if import_name(source) is not None:
        raise CheckpointError(
            f"{source} names an imported checkpoint; to import, pass hf://org/name, a folder, or nemo:///path of a "
            "NeMo 2.0 checkpoint."
        )
    text = str(resolve(source)) if source.startswith(PREFIX) else source.removeprefix("hf://").removeprefix(_NEMO)
    if "://" in text:
        raise CheckpointError(f"{source}: not supported; use hf://org/name[@revision], nemo:///path or a path.")
    path = Path(text).expanduser()
    if path.exists() or text.startswith(("/", ".", "~")):
        if not path.exists():
            raise CheckpointError(f"{path} does not exist.{close_to(str(path))}")
        return path.resolve()
    repo, _, revision = text.partition("@")
    if repo.count("/") != 1 or not is_hub_id(repo):
        raise CheckpointError(f"{source} is neither a folder that exists nor a Hub id (org/name).")
    if not source.startswith("hf://"):
        refuse_misspelt_path(text, "model", CheckpointError)
    return HubId(repo, revision or None)


def import_name(text: str) -> str | None:
    """The name of a finished import, as in ``nemo://NAME``; None for anything else, including ``nemo://`` and a path.

    Raises:
        CheckpointError: nothing follows ``nemo://`` or ``hf://``, which would mean the current folder.
    """
    if text in ("hf://", _NEMO):
        raise CheckpointError(f"{text} names no model; is a shell variable not set?")
    name = text.removeprefix(_NEMO)
    return None if name == text or name.startswith(("/", ".", "~")) else name


def checkpoint(text: str) -> Path:
    """A checkpoint of this project that is already there: ``nemo://ID``, or a folder.

    Raises:
        CheckpointError: there is none; for a folder of another form, the message says which form and what to do.
    """
    if (name := import_name(text)) is not None:
        return finished(name)
    text = text.removeprefix(_NEMO)
    if "://" in text:
        raise CheckpointError(f"{text}: not supported here; pass a checkpoint folder or nemo://ID.")
    path = Path(text).expanduser()
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; pass a checkpoint folder or nemo://ID.")
    return required(path.resolve(), Form.CHECKPOINT).folder


def finished(name: str) -> Path:
    """The newest finished import called ``name``, or ``name@revision``."""
    exact = models_home() / name
    if (exact / "manifest.json").is_file():
        return exact
    found = [path.parent for path in models_home().glob(f"{glob.escape(name)}@*/manifest.json")]
    if found:
        return max(found, key=lambda path: (path / "manifest.json").stat().st_mtime)
    manifests = models_home().glob("*/*/manifest.json")
    known = sorted(path.parent.relative_to(models_home()).as_posix() for path in manifests)
    hint = nearest(name, known) if known else ""
    raise CheckpointError(
        f"nemo://{name}: no finished import of that name under {models_home()}; "
        f"run `mixtral-recipes import hf://{name.partition('@')[0]}`.{hint}"
    )
