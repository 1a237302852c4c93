"""The prompts a user gives to a model, as tokens."""

import json
import sys
from pathlib import Path
from typing import Any

from mixtral_recipes.errors import DataError


def read(file: Path) -> list[str]:
    """The prompts of a file: one a line, or one JSON object a line with a ``prompt``; ``-`` is standard input.

    Raises:
        DataError: it cannot be read, has none, or names the line that is broken.
    """
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8-sig")
        text.encode()  # in some locales Python reads bytes that are no text as halves of characters
    except (OSError, UnicodeError) as error:
        raise DataError(f"{file}: cannot be read ({error}).") from error
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.lstrip().startswith("{"):
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{file}, line {number}: is no JSON object with a prompt ({error}).") from error
            if not isinstance(prompt, str):
                raise DataError(f"{file}, line {number}: the prompt must be a text.")
            found.append(prompt)
        elif line.strip():
            found.append(line)
    if not found:
        raise DataError(f"{file} holds no prompt.")
    return found


def tokens(tokenizer: Any, text: str, *, chat: bool) -> list[int]:
    """A prompt's tokens, as the model was trained to see them: its first token, or the chat template, included."""
    if chat:
        from mixtral_recipes.inference.chat import tokens_of

        return tokens_of(tokenizer, [{"role": "user", "content": text}])
    return list(tokenizer(text)["input_ids"])
