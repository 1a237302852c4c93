"""The cache of prepared data: folders named by the hash of everything they were made from, written under a lock."""

import contextlib
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_recipes.system import remembered as answers
from mixtral_recipes.system.files import replacing_folder, sha256, write_json
from mixtral_recipes.system.home import data_home
from mixtral_recipes.system.locks import held

if TYPE_CHECKING:
    import numpy as np

_MADE_FROM, _CONTENTS = "made_from.json", "contents.json"
_PACKAGE = Path(__file__).parents[1]
_CODE = ("__init__.py", "data/**/*.py", "system/**/*.py")  # the release, what reads, and what that builds on
_SAMPLED_ABOVE = 1 << 30
_SAMPLES, _SAMPLE_BYTES = 256, 1 << 20


def prepared(kind: str, made_from: Any, build: Callable[[Path], None]) -> Path:
    """The folder that holds something expensive, building it in the first process that asks.

    Another release, or other code in `mixtral_recipes/data`, makes it anew.

    Args:
        kind: A folder name under `data_home`.
        made_from: JSON-like description of all that the content depends on.
        build: Fills an empty folder; what it leaves when it fails is removed.

    Returns:
        A folder that is complete, and whose files are as they were made: one that is damaged is made again. It carries
        ``made_from.json`` and the hashes of its files.
    """
    with preparing(kind, made_from) as (folder, empty):
        if empty is not None:
            build(empty)
    return folder


@contextlib.contextmanager
def preparing(kind: str, made_from: Any) -> Iterator[tuple[Path, Path | None]]:
    """As `prepared`, for what several processes build together: one of them holds this meanwhile.

    Args:
        kind: A folder name under `data_home`, or the path of a folder elsewhere.
        made_from: As for `prepared`.

    Yields:
        The folder, and the empty one to fill, which gets its name afterwards; None where all is there.
    """
    text, folder = _place_of(kind, made_from)
    if folder.is_dir() and _damage_of(folder, text) is None:
        yield folder, None
        return
    with held(folder):
        if folder.is_dir():
            damage = _damage_of(folder, text)
            if damage is None:
                yield folder, None
                return
            print(f"data: {folder} is being rebuilt: {damage}", file=sys.stderr)
        with replacing_folder(folder) as staging:
            yield folder, staging
            (staging / _MADE_FROM).write_text(text)
            write_json(staging / _CONTENTS, _contents_of(staging))


def save_array(path: Path, array: "np.ndarray") -> None:
    """`numpy.save`, which does not tell when the end of an array finds no room on the disk."""
    import numpy as np

    array = np.ascontiguousarray(array)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


def is_prepared(kind: str, made_from: Any) -> bool:
    """Whether `prepared` was done with these arguments before."""
    return _place_of(kind, made_from)[1].is_dir()


@functools.cache
def code_version() -> str:
    """A digest of the release and of the code that reads data, which may make something else of the same records."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in _CODE for file in _PACKAGE.glob(pattern)):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _place_of(kind: str, made_from: Any) -> tuple[str, Path]:
    """What a folder is made from, as text, and the folder."""
    text = json.dumps({"of": made_from, "code": code_version()}, sort_keys=True, default=str)
    return text, data_home() / kind / hashlib.sha256(text.encode()).hexdigest()[:20]


def _damage_of(folder: Path, made_from: str) -> str | None:
    """What in a prepared folder is not as it was made; None where all is."""
    try:
        if (folder / _MADE_FROM).read_text() != made_from:
            return f"{_MADE_FROM} names something else"
        recorded = json.loads((folder / _CONTENTS).read_text())
        there = _contents_of(folder)
    except (OSError, ValueError) as error:
        return f"it cannot be read ({type(error).__name__}: {error})"
    if not isinstance(recorded, dict):
        return f"{_CONTENTS} names no files"
    different = [name for name in sorted(recorded.keys() | there) if recorded.get(name) != there.get(name)]
    return f"{different[0]} is damaged" if different else None


def _contents_of(folder: Path) -> dict[str, str]:
    """Relative path -> hash of every file in a folder, but of the one that holds this."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / _CONTENTS)
    return {path.relative_to(folder).as_posix(): sampled_hash(path) for path in files}


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, read when it may have changed."""
    return remembered("hashes", path, sha256)


def remembered(kind: str, path: Path, look: Callable[[Path], str]) -> str:
    """What reading a whole file told, for as long as it cannot have changed.

    Args:
        kind: A folder name under `data_home`.
        path: The file.
        look: Reads it, in the first process that asks.
    """
    return answers.remembered(data_home() / kind, [path], "", lambda: look(path))


def sampled_hash(path: Path) -> str:
    """SHA-256 of a file's size and content; of a large one, of stretches spread over it and of its ends.

    For what may take terabytes and is only read in part: a corpus's tokens.
    """
    if path.stat().st_size <= _SAMPLED_ABOVE:
        return content_hash(path)
    return remembered("sampled_hashes", path, _sampled)


def _sampled(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    for number in range(_SAMPLES):
        start = number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1)
        digest.update(sha256(path, start, _SAMPLE_BYTES).encode())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """A tokenizer's whole definition, special tokens and chat template, for keys of caches.

    Stricter than `tokenizers.tokenizer_identity`, which is recorded and compared: what is only written otherwise gets
    other keys.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # What earlier calls padded and cut to stays in the backend, and is no part of the definition.
        definition = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    elif hasattr(tokenizer, "fingerprint"):
        definition = tokenizer.fingerprint()
    else:
        definition = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = [getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "chat_template")]
    return hashlib.sha256(json.dumps([type(tokenizer).__name__, definition, special]).encode()).hexdigest()
