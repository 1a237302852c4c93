"""The tokens of a text, and the text of tokens as they come."""

import re
from collections.abc import Sequence
from typing import Any

from mixtral_recipes.errors import DataError


def encoded(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """A text's tokens.

    Args:
        tokenizer: The model's.
        text: The text; a control token that it spells out is that token, so that it may be a whole prompt.
        special: Whether the tokenizer adds what a text begins with.

    Raises:
        DataError: it contains something that is not a character.
    """
    refuse_halves(text)
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def refuse_halves(text: str) -> None:
    """Refuse a text that contains something that is not a character.

    Raises:
        DataError: it does.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"a prompt holds \\u{ord(text[error.start]):04x}, which is half of a UTF-16 pair or a byte that is not "
            "UTF-8; remove it."
        ) from error


class GrowingText:
    """The text of tokens as they come: shown once no further token can change it, and up to a stop text.

    Attributes:
        tokens: What came.
        shown: Their text, as far as it is shown.
        stopped: Whether a stop text ended it.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str],
        *,
        watched: bool = True,
        continues: bool = False,
        ends: frozenset[int] = frozenset(),
    ) -> None:
        """Begin a text.

        Args:
            tokenizer: Turns tokens into text.
            stop: What ends it.
            watched: Whether text is wanted as it comes; else all of it is decoded once, at the end.
            continues: Whether it goes on where another text ends, so that a space at its beginning is part of it.
            ends: Tokens that are no text, whether the tokenizer calls them special or not.
        """
        self._watched = watched
        self._tokenizer = tokenizer
        self._before = _some_text(tokenizer) if continues else []
        self._ends = ends
        self._skipped = 0
        self._skipped = len(self._decoded([]))
        self._stop = stop
        self._held = max(map(len, stop), default=1) - 1  # these last characters may begin a stop text
        self._known = ""  # the text of all tokens that no further token can change
        self._tail = slice(0, 0)  # the last of these; a token's text depends on what stands before it
        self.tokens: list[int] = []
        self.shown = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Take a token; what may be shown now."""
        self.tokens.append(token)
        if not self._watched:
            return ""
        before = self._decoded(self.tokens[self._tail])
        grown = self._decoded(self.tokens[self._tail.start :])[len(before) :]
        whole = self._known + grown
        places = [place for text in self._stop if (place := whole.find(text, len(self.shown))) >= 0]
        if places:
            self.stopped = True
            return self._show(whole[: min(places)])
        if not grown or grown.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""  # a special token, or a character whose bytes are not all there
        self._known, self._tail = whole, slice(self._tail.stop, len(self.tokens))
        return self._show(whole[: max(len(whole) - self._held, len(self.shown))])

    def rest(self) -> str:
        """What was held back, at the end."""
        return "" if self.stopped else self._show(self._decoded(self.tokens))

    def _decoded(self, tokens: list[int]) -> str:
        said = [token for token in tokens if token not in self._ends]
        return self._tokenizer.decode([*self._before, *said], skip_special_tokens=True)[self._skipped :]

    def _show(self, upto: str) -> str:
        grown = upto[len(self.shown) :]
        self.shown = upto if len(upto) > len(self.shown) else self.shown
        return grown


def _some_text(tokenizer: Any) -> list[int]:
    """Tokens for others to stand behind, since tokenizers leave out the space that a text begins with."""
    return tokenizer("a", add_special_tokens=False)["input_ids"]


class TokenTexts:
    """What single tokens stand for within a text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before = _some_text(tokenizer)
        self._skipped = len(self._decoded(self._before))
        self._special = set(tokenizer.all_special_ids)
        self._known: dict[int, tuple[str, list[int] | None]] = {}

    def __call__(self, token: int) -> tuple[str, list[int] | None]:
        """A token's text, of a special one its name, and its bytes; None where it is a part of a character unknown."""
        if token not in self._known:
            self._known[token] = self._of(token)
        return self._known[token]

    def _of(self, token: int) -> tuple[str, list[int] | None]:
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        text = name if token in self._special else self._decoded([*self._before, token])[self._skipped :]
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
            return text, [int(byte[1], 16)]
        return text, None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())

    def _decoded(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
