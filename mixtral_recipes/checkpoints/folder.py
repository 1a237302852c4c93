"""A run's folder of checkpoints: which are there, and what each says of itself."""

from pathlib import Path
from typing import Any, TypedDict

from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.system.json_files import read_object
from mixtral_recipes.system.schema import Count, typed


class _Facts(TypedDict):
    step: Count
    consumed_samples: Count


def list_checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first; one whose step cannot be read comes last, so that it is looked at."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.is_dir() and not p.is_symlink() and not p.name.startswith(".")]
    return sorted(found, key=lambda path: ((facts_or_none(path) or {}).get("step", float("inf")), path.name))


def facts_or_none(checkpoint: Path) -> dict[str, Any] | None:
    """As `read_run_facts`; None where it is missing or damaged."""
    try:
        return read_run_facts(checkpoint)
    except CheckpointError:
        return None


def read_run_facts(checkpoint: Path) -> dict[str, Any]:
    """What ``context/run.json`` says: step, consumed_samples, world_size, metrics and the run's own facts.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = checkpoint / "context" / "run.json"
    try:
        facts = read_object(path, CheckpointError, finite=False)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    typed(facts, _Facts, path, CheckpointError)
    return facts
