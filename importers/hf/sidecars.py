"""What travels beside a model's weights: what its configuration and its tokenizer refer to, and its licence.

Nothing else is downloaded or copied, and an import says what it leaves behind.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from mixtral_recipes.data.tokenizers import TOKENIZER_FILES
from mixtral_recipes.errors import CheckpointError, in_short
from mixtral_recipes.system.json_files import MOST_BYTES, parse_object
from mixtral_recipes.system.pointers import refuse_pointer
from mixtral_recipes.system.schema import Count, typed

_Ids = Count | list[Count] | None


class Generation(TypedDict, total=False):
    """What is read of generation_config.json, here or by whoever takes the export."""

    bos_token_id: _Ids
    eos_token_id: _Ids
    pad_token_id: _Ids
    do_sample: bool | None
    temperature: Annotated[float, Meta(ge=0)] | None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None
    top_k: Count | None
    max_length: Count | None
    max_new_tokens: Count | None


_ALWAYS = ("config.json", "generation_config.json", *TOKENIZER_FILES, "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*")
_NAME_CODE = ("config.json", "tokenizer_config.json", "generation_config.json")
_RELATIVE_IMPORT = re.compile(r"^\s*(?:from\s+\.(\w+)\s+import\b|import\s+\.(\w+))", re.MULTILINE)


def travelling(names: Iterable[str], read: Callable[[str], str]) -> list[str]:
    """Which files of a model travel with its weights.

    Args:
        names: Every file there is, relative to the model, with ``/``.
        read: Gives one of them as text.

    Returns:
        Their names, config.json first.

    Raises:
        CheckpointError: a configuration that may name code is not a JSON object.
    """
    present = set(names)
    taken = {name for name in present if any(fnmatchcase(name, pattern) for pattern in _ALWAYS)}
    new = {file for name in _NAME_CODE if name in present for file in code_named_in(_object(name, read(name)))}
    while new := (new & present) - taken:
        taken |= new
        new = {f"{found[1] or found[2]}.py" for file in new for found in _RELATIVE_IMPORT.finditer(read(file))}
    return sorted(taken, key=lambda name: (name != "config.json", name))


def code_named_in(config: dict[str, Any]) -> set[str]:
    """The files of code a configuration names: transformers imports them from beside it when it is told to trust them.

    One in another repository (``org/name--modeling.Model``) is not among them.
    """
    named = list(config["auto_map"].values()) if isinstance(config.get("auto_map"), dict) else []
    pipelines = config.get("custom_pipelines")
    named += [p.get("impl") for p in pipelines.values() if isinstance(p, dict)] if isinstance(pipelines, dict) else []
    flat = [item for value in named for item in (value if isinstance(value, list) else [value])]
    return {f"{item.split('.')[0]}.py" for item in flat if isinstance(item, str) and "--" not in item}


def of(folder: Path) -> list[Path]:
    """The files of a model folder that travel with its weights.

    Raises:
        CheckpointError: one was not fetched, is not what its name says, or is a link that leads out of the model.
    """
    files = [path for path in folder.glob("*") if not path.is_dir()]
    files += [path for path in folder.glob("additional_chat_templates/*") if not path.is_dir()]
    names = [path.relative_to(folder).as_posix() for path in files]
    found = [folder / name for name in travelling(names, lambda name: _text(folder, folder / name))]
    for path in found:
        if path.suffix in (".json", ".jinja", ".py"):
            text = _text(folder, path)
            if path.suffix == ".json":
                content = _object(str(path), text)
                if path.name == "generation_config.json":
                    typed(content, Generation, path, CheckpointError)
        else:
            refuse_foreign(folder, path)
            refuse_pointer(path, CheckpointError)
    return found


def left_behind(names: Iterable[str], taken: Iterable[str]) -> list[str]:
    """What is neither read nor copied, hidden files apart.

    Args:
        names: Every file there is, relative to the model; a folder that was not looked into ends with ``/``.
        taken: Those that are read or copied.
    """
    used = {part for name in taken for part in (name, f"{name.split('/')[0]}/")}
    return sorted(name for name in set(names) - used if not any(part.startswith(".") for part in name.split("/")))


def names_in(folder: Path) -> list[str]:
    """Every file of a folder by its name, and every folder in it as ``name/``."""
    return [f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir()]


def copy(files: Iterable[Path], folder: Path, target: Path) -> None:
    """Copy what `of` gave; a configuration loses the names of code that is not there.

    Args:
        files: The files.
        folder: The model folder they are in.
        target: A folder that exists.
    """
    names = [path.relative_to(folder) for path in files]
    for name in names:
        copied = target / name
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, copied)
    there = {name.as_posix() for name in names}
    for name in _NAME_CODE:
        if name in there:
            _drop_missing_code(target / name, there)


def _drop_missing_code(path: Path, there: set[str]) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    if not code_named_in(config) - there:
        return
    for field in ("auto_map", "custom_pipelines"):
        entries = config.get(field) or {}
        kept = {name: value for name, value in entries.items() if not code_named_in({field: {name: value}}) - there}
        config.pop(field, None)
        if kept:
            config[field] = kept
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _text(folder: Path, path: Path) -> str:
    refuse_foreign(folder, path)
    return text_of(path)


def text_of(path: Path) -> str:
    """A file as text.

    Raises:
        CheckpointError: it was not fetched, or is not text.
    """
    refuse_pointer(path, CheckpointError)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise CheckpointError(f"{path}: has {path.stat().st_size} bytes; the limit is {MOST_BYTES}.")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({in_short(error)}); download it again.") from error


def refuse_foreign(folder: Path, path: Path) -> None:
    """Refuse a link out of the model: what it leads to would travel with the weights, to the Hub even.

    The Hub's cache keeps a revision's files as links into the repository's ``blobs``.

    Args:
        folder: The model's.
        path: A file in it.

    Raises:
        CheckpointError: it leads out of it.
    """
    target = path.resolve()
    inside = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        inside.append(folder.resolve().parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in inside):
        raise CheckpointError(
            f"{path} is a link to {target}, outside the model's folder; replace the link with the file."
        )


def _object(name: str, text: str) -> dict[str, Any]:
    try:
        return parse_object(text)
    except TypeError as error:
        raise CheckpointError(f"{name}: not a JSON object; download it again.") from error
    except ValueError as error:
        raise CheckpointError(f"{name}: not valid JSON ({in_short(error)}); download it again.") from error
