"""Names of repositories on the Hugging Face Hub, told from misspelt paths without asking it."""

import difflib
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from mixtral_recipes.errors import MixtralRecipesError, MixtralRecipesWarning

type Kind = Literal["model", "dataset"]


def is_hub_id(name: str) -> bool:
    """Whether the Hub could have a repository of this name: ``org/name``, or ``name`` alone; it is not asked."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def refuse_misspelt_path(name: str, kind: Kind, error: type[MixtralRecipesError]) -> None:
    """Refuse ``folder/name`` where the folder is here and holds no such name: ``hf://`` says that the Hub is meant.

    Args:
        name: What was written, not an existing path. What was downloaded before is not refused.
        kind: What the Hub would be asked for.
        error: What to raise.
    """
    folder = Path(name).expanduser().parent
    if "/" in name and "://" not in name and folder.is_dir() and not _fetched(name, kind):
        raise error(
            f"{name} does not exist in the folder {folder}.{close_to(name)} If you mean the Hub, use hf://{name}."
        )


def warn_of_a_word(name: str, kind: Kind, known: Iterable[str] = ()) -> None:
    """Warn of a single word that is taken for a Hub id: more often it is a misspelt name.

    Args:
        name: What was written. Nothing is said of ``org/name`` and ``hf://name``, of a path, or of what was fetched
            before.
        kind: What the Hub would be asked for.
        known: Names that it may have been meant for.
    """
    if "/" in name or Path(name).expanduser().exists() or _fetched(name, kind):
        return
    warnings.warn(
        f"{name} is not a file or folder, so it is taken as a name on the Hub and downloaded when the run starts."
        f"{close_to(name, known)} If you mean the Hub, use hf://{name}.",
        MixtralRecipesWarning,
        stacklevel=3,
    )


def _fetched(name: str, kind: Kind) -> bool:
    from huggingface_hub import constants

    repo = name.partition("@")[0].partition(":")[0]
    return Path(constants.HF_HUB_CACHE, f"{kind}s--{repo.replace('/', '--')}").is_dir()


def close_to(name: str, known: Iterable[str] = ()) -> str:
    """Suffix for a message: the closest name in the folder, or of those known, of which what follows ``://`` counts."""
    folder = Path(name).expanduser().parent
    entries = filter(Path.exists, folder.iterdir()) if folder.is_dir() else ()
    here = {entry.name: str(folder / entry.name) for entry in entries}
    spelled = here | {each.rpartition("://")[2]: each for each in known}
    close = difflib.get_close_matches(Path(name).name, spelled, n=1)
    return f" Did you mean {spelled[close[0]]!r}?" if close else ""
