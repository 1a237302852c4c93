"""The prompts a user gives to a model, as tokens."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixtral_recipes.data.records.files import suffix_of
from mixtral_recipes.data.records.pairs import text_of
from mixtral_recipes.data.records.parse import parse_object, read_records
from mixtral_recipes.errors import DataError
from mixtral_recipes.inference.text import encoded


def read(file: Path, field: str = "prompt", *, plain: bool = True) -> list[str]:
    """The prompts of a file: one a line, or one JSON object a line that holds it; ``-`` is standard input.

    A ``.json`` file is read as data is: its objects may also stand in a list.

    Args:
        file: The file.
        field: What a prompt is called in an object.
        plain: Whether a line that is no object is a prompt itself.

    Raises:
        DataError: it cannot be read, has none, or names the line that is broken.
    """
    found = list(_of_json(file, field) if suffix_of(file) == ".json" else _of_lines(file, field, plain))
    if not found:
        raise DataError(f"{file} holds no prompt.")
    return found


def _of_json(file: Path, field: str) -> Iterator[str]:
    for record in read_records(file):
        yield text_of(record.value.get(field), field, record.where, empty=True)


def _of_lines(file: Path, field: str, plain: bool) -> Iterator[str]:
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8-sig")
        text.encode()  # in some locales Python reads bytes that are no text as halves of characters
    except (OSError, UnicodeError) as error:
        raise DataError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{file}:{number}"
        if not line.strip():
            continue
        if plain and not line.lstrip().startswith("{"):
            yield line
        else:
            yield text_of(parse_object(line, where).get(field), field, where, empty=True)


def tokens(tokenizer: Any, text: str, *, chat: bool) -> list[int]:
    """A prompt's tokens, as the model was trained to see them: its first token, or the chat template, included.

    Raises:
        DataError: it is not text, or there is no chat template for it.
    """
    if chat:
        from mixtral_recipes.inference.chat import tokens_of

        return tokens_of(tokenizer, [{"role": "user", "content": text}])
    return encoded(tokenizer, text)
