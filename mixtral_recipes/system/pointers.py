"""What stands in a file's place: a pointer to one that was not fetched, a pipe, a device."""

import os
from pathlib import Path

from mixtral_recipes.errors import MixtralRecipesError

_LFS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_LONGEST = 1024  # bytes; git-lfs takes nothing longer for a pointer


def refuse_pointer(path: Path, error: type[MixtralRecipesError]) -> None:
    """Refuse what is not a file, or a file whose content was not fetched. Ignores missing paths and folders.

    A pipe may never say anything, and a device never end.

    Args:
        path: The file.
        error: What to raise.

    Raises:
        MixtralRecipesError: it is a pipe or a device, or a pointer of Git LFS or git-annex; the message says how to get
            the file.
    """
    if path.is_symlink() and not path.exists() and "annex/objects" in os.readlink(path):
        raise error(
            f"{path} is a git-annex link to content that is not on this machine; run `git annex get {path.name}`."
        )
    if not path.is_file():
        if path.exists() and not path.is_dir():
            raise error(f"{path} is a pipe or a device, not a file; write its contents to a file first.")
        return
    if path.stat().st_size > _LONGEST:
        return
    with path.open("rb") as file:
        start = file.read(_LONGEST)
    if start.startswith(_LFS):
        raise error(
            f"{path} is a Git LFS pointer of {len(start)} bytes, not the file itself; run `git lfs pull` there, or "
            "download it again."
        )
    if start.startswith((b"/annex/objects/", b"../.git/annex/objects/", b".git/annex/objects/")):
        raise error(f"{path} is a git-annex pointer, not the file itself; run `git annex get {path.name}` there.")
