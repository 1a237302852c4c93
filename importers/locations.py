"""Where checkpoints are: ``hf://``, ``nemo://`` and paths, and the folder finished imports are kept in."""

from dataclasses import dataclass
from pathlib import Path

from mixtral_recipes.errors import CheckpointError, nearest
from mixtral_recipes.system.home import models_home


@dataclass(frozen=True)
class HubId:
    """A repository on the Hugging Face Hub, and the revision asked for (None is its default branch)."""

    repo: str
    revision: str | None = None


def parse_source(source: str) -> Path | HubId:
    """A Hugging Face model's place: a folder, or a Hub repository.

    Args:
        source: ``hf://org/name``, ``hf://org/name@revision``, ``hf://path/to/folder``, a path, or ``org/name`` where no
            such folder exists.

    Raises:
        CheckpointError: it is none of these.
    """
    text = source.removeprefix("hf://")
    if source.startswith("nemo://"):
        raise CheckpointError(f"{source} is an imported checkpoint already; give hf://org/name or a model folder.")
    if "://" in text:
        raise CheckpointError(f"{source}: only hf://org/name[@revision] and paths are understood.")
    path = Path(text).expanduser()
    if path.exists() or text.startswith(("/", ".", "~")):
        if not path.exists():
            raise CheckpointError(f"{path} does not exist.")
        return path.resolve()
    repo, _, revision = text.partition("@")
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise CheckpointError(f"{source} is neither a folder that exists nor a Hub id (org/name).")
    return HubId(repo, revision or None)


def checkpoint(text: str) -> Path:
    """A checkpoint that is already there: ``nemo://ID``, or a folder."""
    if text.startswith("nemo://"):
        return finished(text.removeprefix("nemo://"))
    if "://" in text:
        raise CheckpointError(f"{text}: a checkpoint folder or nemo://ID is needed here.")
    path = Path(text).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; give a checkpoint folder or nemo://ID.")
    return path.resolve()


def finished(name: str) -> Path:
    """The newest finished import called ``name``, or ``name@revision``."""
    exact = models_home() / name
    if (exact / "manifest.json").is_file():
        return exact
    found = [path.parent for path in models_home().glob(f"{name}@*/manifest.json")]
    if found:
        return max(found, key=lambda path: (path / "manifest.json").stat().st_mtime)
    manifests = models_home().glob("*/*/manifest.json")
    known = sorted(path.parent.relative_to(models_home()).as_posix() for path in manifests)
    hint = nearest(name, known) if known else ""
    raise CheckpointError(
        f"nemo://{name}: no finished import of that name under {models_home()}; "
        f"run `mixtral-recipes import hf://{name.partition('@')[0]}`.{hint}"
    )
