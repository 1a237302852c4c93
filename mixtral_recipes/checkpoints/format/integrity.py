"""Checks that a checkpoint is what its manifest says, before anything in it is unpickled."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mixtral_recipes.checkpoints import scores
from mixtral_recipes.checkpoints.format.manifest import NAME, pieces_of, read_manifest
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.system.files import sha256
from mixtral_recipes.system.machine import io_threads
from mixtral_recipes.system.ranks import gathered, rank_and_size


def damage_of(
    folder: Path, *, share: tuple[int, int] = (0, 1), hashes: bool = True, weights: bool = True
) -> str | None:
    """What is wrong with a checkpoint's files.

    Args:
        folder: The checkpoint.
        share: (rank, ranks): which of the files' pieces to hash; presence, size and names are checked for all.
        hashes: False leaves the files' content unread.
        weights: False leaves that of the weights unread.

    Returns:
        One sentence that names the file, or None when all is well.
    """
    try:
        files: dict[str, dict[str, Any]] = read_manifest(folder)["files"]
        named = _stray(folder, files) or _wrong_sizes(folder, files)
        if named or not hashes:
            return named
        # Large pieces first, then dealt out: every rank hashes about as much.
        read = [name for name in sorted(files) if weights or not name.startswith("weights/")]
        pieces = [(name, *piece) for name in read for piece in pieces_of(files[name])]
        pieces.sort(key=lambda piece: -piece[2])
        rank, ranks = share
        mine = pieces[rank::ranks]
        with ThreadPoolExecutor(io_threads() if ranks == 1 else 1) as pool:
            found = pool.map(lambda piece: sha256(folder / piece[0], piece[1], piece[2]), mine)
            for (name, *_, expected), digest in zip(mine, found, strict=True):
                if digest != expected:
                    pool.shutdown(wait=False, cancel_futures=True)
                    return f"{folder / name}: damaged; its SHA-256 is not the one in the manifest."
    except CheckpointError as error:
        return str(error)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        return f"{folder}: cannot be read ({type(error).__name__}: {error})."
    return None


def _stray(folder: Path, files: dict[str, Any]) -> str | None:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            return f"{path}: is a link; checkpoints must not contain links."
        if path.is_file() and name not in (NAME, scores.NAME) and name not in files:
            return f"{path}: is not listed in the manifest."
    return None


def _wrong_sizes(folder: Path, files: dict[str, dict[str, Any]]) -> str | None:
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path}: missing, although the manifest lists it; the checkpoint is incomplete."
        if path.stat().st_size != entry["size"]:
            return f"{path}: has {path.stat().st_size} bytes, but the manifest says {entry['size']}; it is damaged."
    return None


def damage_together(folder: Path) -> str | None:
    """`damage_of`, the files' hashing shared by all ranks; every rank gets the same answer."""
    return next((found for found in gathered(damage_of(folder, share=rank_and_size())) if found), None)


def verify(folder: Path, *, weights: bool = True) -> dict[str, Any]:
    """Refuse a damaged checkpoint, in this process alone.

    Args:
        folder: The checkpoint.
        weights: False leaves the weights' content unchecked, for the reader to check.

    Returns:
        The manifest.

    Raises:
        CheckpointError: names the file.
    """
    damage = damage_of(folder, weights=weights)
    if damage:
        raise CheckpointError(damage)
    return read_manifest(folder)


def verify_together(folder: Path) -> None:
    """Refuse a damaged checkpoint, on every rank.

    Raises:
        CheckpointError: names the file.
    """
    damage = damage_together(folder)
    if damage:
        raise CheckpointError(damage)
