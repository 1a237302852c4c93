"""Files that are complete or absent, however the writing process ends, and private folders."""

import contextlib
import datetime
import errno
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mixtral_recipes.errors import EnvironmentProblem
from mixtral_recipes.system import home
from mixtral_recipes.system.json_files import MOST_BYTES, parse_object

_LEFTOVERS = ("partial", "replaced", "deleted")
_READ_BYTES = 4 << 20


@contextlib.contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Write a file under a temporary name beside it, and give it its name when all of it is on disk.

    Yields the temporary file, which is there and empty. It is removed when the block raises; the file that had the name
    before, if any, is still there then. Anything else (a pipe, ``/dev/stdout``) is yielded itself and keeps its name.

    Args:
        path: The file; its folder exists.
        private: Whether only its owner may read it. The mode of a file that had the name before does not matter.

    Raises:
        OSError: names ``path``, not the temporary file.
    """
    if _is_stream(path):
        yield path
        return
    temporary = sibling(path, f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666))
        with naming(path):
            yield temporary
            sync(temporary)
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename == str(temporary):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _is_stream(path: Path) -> bool:
    """Whether what has a name is a device or a pipe, or a link to what this process has open, and no file by itself."""
    if path.parent in (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd")):
        return path.exists()
    return path.exists() and not (path.is_file() or path.is_dir())


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give a file's name to an error of the disk: of a write to an open file it has none, of a copy the source's."""
    try:
        yield
    except OSError as error:
        of_the_disk = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
        if of_the_disk and (error.filename is None or error.filename2 is not None):
            raise OSError(error.errno, error.strerror, str(error.filename2 or path)) from error
        if error.errno is None and str(error).endswith(" written"):  # numpy: "20480 requested and 4096 written"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def staging_path(final: Path) -> Path:
    """The sibling a folder is written to before it gets its name."""
    return _beside(final, "partial")


@contextlib.contextmanager
def replacing_folder(final: Path) -> Iterator[Path]:
    """Write a folder so that it appears under its name whole or not at all.

    Yields the staging folder to write into. When the block ends, everything in it is made durable and the folder is
    renamed; a folder that had the name before is kept until then. When the block raises, the staging folder is removed.
    What a killed process left is cleared first, so only one process may write a name at a time (`locks`).
    """
    clear_leftovers(final)
    staging, replaced = staging_path(final), _beside(final, "replaced")
    staging.mkdir(parents=True)
    try:
        with naming(final):
            yield staging
            sync_tree(staging)
        if final.exists():
            final.rename(replaced)
        staging.rename(final)
        sync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        clear_leftovers(final)
        raise


@contextlib.contextmanager
def replacing_files(final: Path, beside: Sequence[str]) -> Iterator[Path]:
    """Write a large file, and small ones that belong beside it, so that it appears under its name whole or not at all.

    Yields a staging folder on the same disk, where all have the names they will have. The file itself is renamed last:
    where it is, the others are. What a killed process left is cleared first, so only one process may write a name at a
    time (`locks`).

    Args:
        final: The file.
        beside: Names of the others.
    """
    clear_leftovers(final)
    staging = staging_path(final)
    staging.mkdir(parents=True)
    try:
        with naming(final):
            yield staging
            sync_tree(staging)
        for name in (*beside, final.name):
            (staging / name).replace(final.parent / name)
        sync(final.parent)
    finally:
        clear_leftovers(final)


def remove_folder(folder: Path) -> None:
    """Remove a folder; a process killed meanwhile leaves nothing half-removed under its name."""
    hidden = _beside(folder, "deleted")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.replace(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def clear_leftovers(final: Path) -> None:
    """Clear what killed processes left beside a folder; one moved aside and not replaced gets its name back."""
    replaced = _beside(final, "replaced")
    if replaced.exists() and not final.exists():
        replaced.rename(final)
    for ending in _LEFTOVERS:
        shutil.rmtree(_beside(final, ending), ignore_errors=True)


def clear_all_leftovers(folder: Path) -> None:
    """`clear_leftovers` of every name in a folder; call it while nobody writes there."""
    for ending in _LEFTOVERS:
        for path in folder.glob(f".*.{ending}"):
            clear_leftovers(folder / path.name[1:].removesuffix(f".{ending}"))


def _beside(final: Path, ending: str) -> Path:
    return sibling(final, f".{final.name}.{ending}")


def sibling(path: Path, name: str) -> Path:
    """Another name in the folder that a path is in.

    Raises:
        IsADirectoryError: the path is ``.`` or ``/``, which have no name that could be given to something.
    """
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, "Has no name that something could get", str(path))
    return path.with_name(name)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that goes again, also where this process is killed: a shell removes it once its input ends."""
    name = tempfile.mkdtemp(prefix="mixtral-recipes-")
    remover = subprocess.Popen(
        ["/bin/sh", "-c", 'read _; rm -rf -- "$0"', name], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, cwd="/", start_new_session=True,
    )  # fmt: skip
    try:
        yield Path(name)
    finally:
        remover.communicate()
        shutil.rmtree(name, ignore_errors=True)


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Write a text file as a whole, in UTF-8."""
    with replacing(path, private=private) as temporary:
        temporary.write_text(text, encoding="utf-8")


def now() -> str:
    """The time in UTC, as files say when they were made."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_json(path: Path, value: Any, *, private: bool = False) -> None:
    """Write a JSON file as a whole."""
    write_text(path, json.dumps(value, indent=1), private=private)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object that we wrote, or None when it is missing, half-written, or none that we would write."""
    try:
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            return None
        return parse_object(path.read_bytes(), finite=False)
    except (OSError, ValueError, TypeError):
        return None


def lines_of(file: BinaryIO, longest: int) -> Iterator[bytes | None]:
    """The lines of a file, with their ends, no more than one of them in memory; None for one that is longer.

    Args:
        file: At a line's start.
        longest: Bytes.
    """
    while line := file.readline(longest):
        if len(line) < longest or line.endswith(b"\n"):
            yield line
            continue
        while (rest := file.readline(longest)) and not rest.endswith(b"\n"):
            pass
        yield None


def private_folder(path: Path) -> Path:
    """Create a folder, and any parent that is missing, for its owner only (mkdir's mode leaves parents open).

    Raises:
        EnvironmentProblem: it cannot be created.
    """
    try:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        place = home.elsewhere(path)
        raise EnvironmentProblem(
            f"{path} cannot be created ({error.strerror}); {place} that you can write to."
        ) from error
    return path


def refuse_unwritable(path: Path) -> None:
    """Refuse a folder that could not be made or written to, before work is done for it; makes nothing.

    Raises:
        EnvironmentProblem: names the folder above it that is a file or not writable, or a name that is too long.
    """
    there = next(each for each in (path, *path.parents) if os.path.exists(each))  # Path's may raise
    refuse_long_names(path, on=there)
    if not there.is_dir():
        raise EnvironmentProblem(
            f"{path} cannot be created: {there} is a file; {home.elsewhere(path)} that you can write to."
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise EnvironmentProblem(f"{there} is not writable; {home.elsewhere(path)} that you can write to.")


def refuse_unwritable_file(path: Path) -> None:
    """As `refuse_unwritable`, for an absolute path of a file.

    Raises:
        IsADirectoryError: it is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not _is_stream(path):
        refuse_unwritable(path.parent)


def refuse_long_names(path: Path, *, on: Path) -> None:
    """Refuse a folder with a longer name than the file system of a folder that is there takes.

    Raises:
        EnvironmentProblem: names it.
    """
    longest = os.pathconf(on, "PC_NAME_MAX")
    if long := [part for part in path.parts if len(os.fsencode(part)) > longest]:
        raise EnvironmentProblem(f"{long[0]} is too long for a folder name; use at most {longest} bytes.")


def copy_folder(source: Path, target: Path, *, without: Container[str | Path] = ()) -> None:
    """Copy what is in a folder into another; shutil.copytree goes on after an error, and raises a list of texts.

    Args:
        source: The folder.
        target: Is made where it is missing.
        without: Folders that stay behind: those of these names, and those at these absolute paths.

    Raises:
        OSError: names the file that could not be read or written.
    """
    for folder, folders, files in os.walk(source, followlinks=True):
        here = Path(folder).resolve()
        folders[:] = [name for name in folders if name not in without and here / name not in without]
        place = target / Path(folder).relative_to(source)
        place.mkdir(parents=True, exist_ok=True)
        for name in files:
            with naming(place / name):
                shutil.copy2(Path(folder, name), place / name)


def sha256(path: Path, start: int = 0, length: int | None = None) -> str:
    """SHA-256 of a file, or of a stretch of it, in hex."""
    digest = hashlib.sha256()
    left = path.stat().st_size - start if length is None else length
    buffer = memoryview(bytearray(min(_READ_BYTES, max(left, 1))))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (count := file.readinto(buffer[:left])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder, or of a file."""
    if folder.is_file():
        return folder.stat().st_size
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sync_tree(folder: Path) -> None:
    """Make every file and folder below ``folder`` durable."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Make a file's bytes durable, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
