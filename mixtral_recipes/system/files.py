"""Files that are whole or absent, whatever ends the process that writes them, and folders of one's own."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Write a file under a temporary name beside it, and give it its name when all of it is on disk.

    Yields the temporary file, which is there and empty. It is removed when the block raises; the file that had the name
    before, if any, is then still there.

    Args:
        path: The file; its folder exists.
        private: Whether only its owner may read it. The mode of a file that had the name before does not matter.

    Raises:
        OSError: names ``path``, not the temporary file.
    """
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666))
        yield temporary
        sync_file(temporary)
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename == str(temporary):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Write a text file as a whole, in UTF-8."""
    with replacing(path, private=private) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, private: bool = False) -> None:
    """Write a JSON file as a whole."""
    write_text(path, json.dumps(value, indent=1), private=private)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object, or None when it is missing or half-written."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def private_folder(path: Path) -> Path:
    """Create a folder, and any parent that is missing, for its owner only (mkdir's mode leaves parents open)."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
    return path


def sync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    _sync(path, os.O_RDONLY)


def sync_folder(folder: Path) -> None:
    """Make a folder's list of names durable."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def sync_tree(folder: Path) -> None:
    """Make every file and folder below ``folder`` durable."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync_file(path)
        else:
            sync_folder(path)
    sync_folder(folder)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
