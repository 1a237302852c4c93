"""Pointers that stand in a file's place where large files are kept elsewhere and were not fetched."""

import os
from pathlib import Path

from mixtral_recipes.errors import MixtralRecipesError

_LFS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_LONGEST = 1024  # bytes; git-lfs takes nothing longer for a pointer


def refuse_pointer(path: Path, error: type[MixtralRecipesError]) -> None:
    """Refuse a file whose content was not fetched. Does nothing for any other file, or where there is none.

    Args:
        path: The file.
        error: What to raise.

    Raises:
        MixtralRecipesError: it is a pointer of Git LFS or git-annex; the message says how to get the file.
    """
    if path.is_symlink() and not path.exists() and "annex/objects" in os.readlink(path):
        raise error(f"{path} is a link of git-annex to content that is not here; run `git annex get {path.name}`.")
    if not path.is_file() or path.stat().st_size > _LONGEST:
        return
    with path.open("rb") as file:
        start = file.read(_LONGEST)
    if start.startswith(_LFS):
        raise error(
            f"{path} is a Git LFS pointer of {len(start)} bytes, not the file itself; run `git lfs pull` there, or "
            "download it again."
        )
    if start.startswith((b"/annex/objects/", b"../.git/annex/objects/", b".git/annex/objects/")):
        raise error(f"{path} is a pointer of git-annex, not the file itself; run `git annex get {path.name}` there.")
