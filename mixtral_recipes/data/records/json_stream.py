"""JSON of any arrangement, parsed as it is read: lists, objects one after the other, and objects that hold lists.

The records of a file are the objects in its lists, or the objects themselves. A list may stand under a name in an
object: ``data`` and the like, or the names of splits. No more than one record and a block are in memory.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from mixtral_recipes.data.records.bad_records import BadRecord, passed_over, stop
from mixtral_recipes.data.records.files import LIMIT, longest_line, open_bytes
from mixtral_recipes.data.records.forms import Form, form_of
from mixtral_recipes.data.records.record import SPLIT_NAMES, Record, may_hold
from mixtral_recipes.errors import DataError
from mixtral_recipes.system.json_files import once

_BLOCK = 1 << 20
_SPACE = " \t\r\n"
_IN_NUMBERS = "0123456789+-.eE"


def parse_json(text: str, where: object) -> Any:
    """One JSON value.

    Raises:
        DataError: not JSON, an object that names a field twice, NaN or an infinity.
    """
    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=_no_constant)
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}, column {error.colno}).") from error
    except ValueError as error:
        raise DataError(f"{where}: {_in_json_words(error)}.") from error


def _in_json_words(error: ValueError) -> str:
    """Python's limit of digits, without what it advises programmers to do."""
    return str(error).partition("; use sys.")[0]


def object_of(value: Any, where: str) -> dict[str, Any]:
    """A value, which must be an object.

    Raises:
        DataError: it is not.
    """
    if not isinstance(value, dict):
        kinds = {list: "list", str: "text", type(None): "null", bool: "true or false"}
        raise DataError(f"{where}: is a {kinds.get(type(value), 'number')}, not an object.")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def json_records(path: Path, bad: BadRecord = stop, split: str | None = None) -> Iterator[Record]:
    """The records of a JSON file.

    Args:
        path: The file.
        bad: Called with each element that is not a record.
        split: A split's own name in the file, where it holds several; None takes all records.

    Raises:
        DataError: names the line: not JSON, something behind the end, or two lists whose names do not say what they
            are.
    """
    with open_bytes(path) as file:
        for name, record in _records(_Cursor(path, file), bad):
            if split is None or name == split:
                yield record


def json_splits(path: Path) -> list[str]:
    """The names of the splits a JSON file holds, as they stand there; none where it holds plain records.

    Raises:
        DataError: two of them are names of one split.
    """
    found: dict[str, str] = {}
    with open_bytes(path) as file:
        for name, _ in _records(_Cursor(path, file), passed_over):
            if name.lower() not in SPLIT_NAMES:
                return []
            if (other := found.setdefault(SPLIT_NAMES[name.lower()], name)) != name:
                raise DataError(f"{path}: {other} and {name} name the same split; put their records into one list.")
    return list(found.values())


class _Value(NamedTuple):
    value: Any
    text: str
    where: str


class _Cursor:
    """A place in a JSON text, of which a block is in memory."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file
        self._characters = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder(object_pairs_hook=once, parse_constant=_no_constant)
        self._longest = longest_line()
        self._text = ""
        self._position = 0
        self._line = 1
        self._ended = False

    @property
    def where(self) -> str:
        return f"{self.path}:{self._line}"

    def _go_to(self, position: int) -> None:
        self._line += self._text.count("\n", self._position, position)
        self._position = position

    def _more(self) -> bool:
        """Read a block and forget what is behind; whether there was one."""
        raw = self._file.read(_BLOCK)
        try:
            added = self._characters.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            line = self._line + self._text.count("\n", self._position) + raw.count(b"\n", 0, error.start)
            raise DataError(f"{self.path}:{line}: not UTF-8 ({error.reason}).") from error
        self._text, self._position = self._text[self._position :] + added, 0
        self._ended = not raw
        return bool(raw)

    def peek(self) -> str:
        """The next character that is not a space; empty at the end of the file."""
        while True:
            position, end = self._position, len(self._text)
            while position < end and self._text[position] in _SPACE:
                position += 1
            self._go_to(position)
            if position < end:
                return self._text[position]
            if not self._more():
                return ""

    def take(self, wanted: str) -> None:
        """Pass one character, which must be there."""
        found = self.peek()
        if found != wanted:
            what = repr(found) if found else "the end of the file"
            raise DataError(f"{self.where}: not JSON ({wanted!r} is missing; found {what}).")
        self._go_to(self._position + 1)

    def value(self) -> _Value:
        """The next value, its text, and where it begins."""
        self.peek()
        where = self.where
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                cut_off = error.pos >= len(self._text) - 16 or error.msg.startswith("Unterminated string")
                if cut_off and self._grow(where):
                    continue
                line = self._line + self._text.count("\n", self._position, error.pos)
                raise DataError(f"{self.path}:{line}: not JSON ({error.msg}).") from error
            except RecursionError as error:
                raise DataError(f"{where}: nested too deeply.") from error
            except ValueError as error:
                raise DataError(f"{where}: {_in_json_words(error)}.") from error
            if isinstance(value, int | float) and not self._text[end:].lstrip(_IN_NUMBERS) and self._more():
                continue  # perhaps half a number
            text = self._text[self._position : end]
            self._go_to(end)
            return _Value(value, text, where)

    def _grow(self, where: str) -> bool:
        """Double what is in memory (a long value is not decoded anew for every block); whether there was more."""
        wanted = max(2 * (len(self._text) - self._position), _BLOCK)
        if wanted > self._longest:  # a missing quotation mark would otherwise read the whole file
            raise DataError(
                f"{where}: not JSON (the value that begins here does not end within {self._longest:,} characters; "
                f"{LIMIT} sets the limit)."
            )
        before = len(self._text) - self._position
        while len(self._text) - self._position < wanted and self._more():
            pass
        return len(self._text) - self._position > before

    def whole_record(self) -> _Value | None:
        """The object that begins here, passed if all of it is in memory and no name in it could hold records."""
        if len(self._text) - self._position < _BLOCK // 2 and not self._ended:
            self._more()
        try:
            value, end = self._json.raw_decode(self._text, self._position)
        except (ValueError, RecursionError):
            return None
        if any(may_hold(name) for name in value):
            return None
        found = _Value(value, self._text[self._position : end], self.where)
        self._go_to(end)
        return found

    def to_next_object(self) -> None:
        """Skip to the next line that begins with an object, or to the end."""
        while True:
            found = self._text.find("\n{", self._position)
            if found >= 0:
                self._go_to(found + 1)
                return
            self._go_to(max(self._position, len(self._text) - 1))
            if not self._more():
                self._go_to(len(self._text))
                return


def _records(cursor: _Cursor, bad: BadRecord) -> Iterator[tuple[str, Record]]:
    """All records, each with the name of the list that holds it, or an empty one."""
    first = cursor.peek()
    if first not in ("[", "{"):
        what = f"begins with {first!r}" if first else "is empty"
        raise DataError(f"{cursor.where}: {what}; a JSON file must contain lists of objects, or objects.")
    while cursor.peek() == first:
        if first == "[":
            cursor.take("[")
            yield from (("", record) for record in _list(cursor, bad))
        else:
            yield from _object(cursor, bad)
    if cursor.peek():
        what = "list" if first == "[" else "object"
        raise DataError(f"{cursor.where}: {cursor.peek()!r} follows the end of the {what}.")


def _list(cursor: _Cursor, bad: BadRecord) -> Iterator[Record]:
    """The objects of a list whose bracket was passed."""
    for value, text, where in _elements(cursor):
        if isinstance(value, dict):
            yield Record(value, where, text)
            continue
        try:
            object_of(value, where)
        except DataError as error:
            bad(error, text)


def _elements(cursor: _Cursor) -> Iterator[_Value]:
    if cursor.peek() == "]":
        cursor.take("]")
        return
    while True:
        if not cursor.peek():
            raise DataError(f"{cursor.where}: the list is not closed.")
        yield cursor.value()
        following = cursor.peek()
        if not following:
            raise DataError(f"{cursor.where}: the list is not closed.")
        cursor.take("]" if following == "]" else ",")
        if following == "]":
            return


def _object(cursor: _Cursor, bad: BadRecord) -> Iterator[tuple[str, Record]]:
    """The records an object holds in lists; the object itself where it holds none."""
    whole = cursor.whole_record()
    if whole is not None:
        yield "", Record(whole.value, whole.where, whole.text)
        return
    where = cursor.where
    value: dict[str, Any] = {}
    held: list[str] = []
    try:
        cursor.take("{")
        following = cursor.peek()
        while following != "}":
            name = cursor.value().value
            if not isinstance(name, str):
                raise DataError(f"{cursor.where}: not JSON (a name must be text, but is {name!r}).")
            if name in value:
                raise DataError(f"{where}: field {name!r} appears twice.")
            cursor.take(":")
            if may_hold(name) and cursor.peek() == "[":
                cursor.take("[")
                if cursor.peek() in ("{", "]"):
                    _check_held([*held, name], cursor.where)
                    held.append(name)
                    value[name] = None
                    yield from ((name, record) for record in _list(cursor, bad))
                else:
                    value[name] = [element.value for element in _elements(cursor)]
            else:
                value[name] = cursor.value().value
            following = cursor.peek()
            cursor.take("}" if following == "}" else ",")
        if not value:
            cursor.take("}")
    except DataError as error:
        if held:
            raise
        bad(error)
        cursor.to_next_object()
        return
    if not held:
        yield "", Record(value, where)
    elif form_of(value) not in (None, Form.text):
        raise DataError(
            f"{where}: is a record, but also has a list of records in {held[0]!r}, so it is unclear which to use; "
            "write one record per line (.jsonl)."
        )
    for name, other in value.items():
        if held and isinstance(other, list) and other and all(isinstance(element, dict) for element in other):
            raise DataError(
                f"{where}: {name!r} is a list of objects, and so is {held[0]!r}, so it is unclear which one holds the "
                "records; keep only one of them."
            )


def _check_held(held: list[str], where: str) -> None:
    if len(held) > 1 and any(name.lower() not in SPLIT_NAMES for name in held):
        names = ", ".join(map(repr, held))
        raise DataError(f"{where}: several lists of objects ({names}) that are not the splits of one data set.")
