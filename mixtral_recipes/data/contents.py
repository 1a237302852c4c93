"""Whether data that is on this machine is still what it was, without reading it as data."""

from collections.abc import Iterable
from pathlib import Path

from mixtral_recipes.data.cache import sampled_hash
from mixtral_recipes.data.records.folders import files_in
from mixtral_recipes.data.records.text_parts import TEXT_SUFFIXES
from mixtral_recipes.embedded import resolve
from mixtral_recipes.errors import DataError
from mixtral_recipes.settings.changes import FILES
from mixtral_recipes.system.json_files import hash_of

_CORPUS = (".idx", ".bin")


def contents(places: Iterable[str | Path]) -> dict[str, str]:
    """A hash of the files at each place, by the place's name; nothing for what is elsewhere, as on the Hub.

    Large files are read in part (`cache.sampled_hash`).

    Args:
        places: Files, folders, or the common beginning of a corpus' two files.
    """
    found = {str(place): _files_at(place) for place in places}
    return {
        f"{FILES}{name}": hash_of([[path.name, sampled_hash(path)] for path in files])[:12]
        for name, files in found.items()
        if files
    }


def _files_at(place: str | Path) -> list[Path]:
    try:
        path = resolve(place).expanduser()
        if path.is_dir():
            return files_in(path, (*TEXT_SUFFIXES, *_CORPUS))
        return [one for one in (path, *(Path(f"{path}{ending}") for ending in _CORPUS)) if one.is_file()]
    except (DataError, OSError):
        return []
