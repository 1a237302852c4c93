"""A pickle read as data: a small machine of its own, of the few opcodes that plain data takes.

Python's unpicklers run what a file says: they look names up, call them, set attributes of what they found, and grow a
table as far as a file asks. Here a name gives a `Maker` or is refused, only a Maker is called, and attributes are set
only of what a Maker made. Nothing larger than what the file itself holds is allocated.

Source: https://docs.python.org/3/library/pickletools.html, protocols 2 to 4.
"""

import struct
from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any, ClassVar

from mixtral_recipes.errors import CheckpointError

_MOST_OPCODES = 1 << 24  # 64 bytes each at worst; a box of a tensor takes about 40
_MOST_ARGUMENTS = 1 << 23  # of all calls together, members of lists and the like included: calls may copy them
_MOST_MARKS = 100  # open lists, dictionaries and tuples
_LONGEST_TEXT = 1 << 16
_LONGEST_NUMBER = 16  # bytes


@dataclass(frozen=True)
class Maker:
    """What a name in a pickle may be used for.

    Attributes:
        call: Makes a value from the arguments in the pickle, which it checks; None where the name is not called.
        new: Makes an instance with nothing set; None where there is none to make.
        build: Gives a made value its state, which it checks; None where it has none.
    """

    call: Callable[..., Any] | None = None
    new: Callable[[], Any] | None = None
    build: Callable[[Any, Any], None] | None = None


def read_pickle(
    content: bytes,
    find: Callable[[str, str], Any],
    *,
    keys: tuple[type, ...] = (str,),
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Read a pickle.

    Args:
        content: Its bytes.
        find: Called with module and name: gives a `Maker`, or a value without parts. Raises to refuse a name.
        keys: The types that keys of dictionaries and members of sets may have; their hashes must not recurse.
        persistent: Gives the value for a persistent id; None where there are none.

    Raises:
        CheckpointError: it is damaged, or uses what plain data does not need; the text goes on after "it".
    """
    return _Machine(content, find, keys, persistent).run()


class _Machine:
    def __init__(
        self,
        content: bytes,
        find: Callable[[str, str], Any],
        keys: tuple[type, ...],
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        self._content, self._at = content, 0
        self._find, self._keys, self._persistent = find, keys, persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []  # heights of the stack
        self._memo: dict[int, Any] = {}
        self._arguments = 0
        self._made: dict[int, tuple[Any, Maker]] = {}  # by id; what stands here is alive

    def run(self) -> Any:
        for _ in range(_MOST_OPCODES):
            opcode = self._take(1)
            if opcode == b".":
                return self._pop()
            step = self._STEPS.get(opcode)
            if step is None:
                raise CheckpointError(f"uses the pickle opcode {opcode!r}, which plain data does not need")
            step(self)
        raise CheckpointError(f"has more than {_MOST_OPCODES} opcodes")

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._content):
            raise CheckpointError("ends too early")
        taken = self._content[self._at : end]
        self._at = end
        return taken

    def _number(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise CheckpointError("uses a value that does not exist")
        return self._stack.pop()

    def _top(self, kind: type) -> Any:
        value = self._pop()
        if not isinstance(value, kind):
            raise CheckpointError(f"treats a {type(value).__name__} as a {kind.__name__}")
        self._stack.append(value)
        return value

    def _since_mark(self) -> list[Any]:
        if not self._marks:
            raise CheckpointError("closes a group that it did not open")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _mark(self) -> None:
        if len(self._marks) == _MOST_MARKS:
            raise CheckpointError(f"is nested more than {_MOST_MARKS} deep")
        self._marks.append(len(self._stack))

    def _protocol(self) -> None:
        if self._number(1) > 5:
            raise CheckpointError("uses an unknown pickle protocol")

    def _frame(self) -> None:
        if self._number(8) > len(self._content) - self._at:
            raise CheckpointError("ends too early")

    def _text(self, width: int) -> None:
        length = self._number(width)
        if length > _LONGEST_TEXT:
            raise CheckpointError(f"has a text of {length} bytes; the limit is {_LONGEST_TEXT}")
        self._push(str(self._take(length), "utf-8"))

    def _long(self) -> None:
        length = self._number(1)
        if length > _LONGEST_NUMBER:
            raise CheckpointError(f"has a number of {length} bytes; the limit is {_LONGEST_NUMBER}")
        self._push(int.from_bytes(self._take(length), "little", signed=True))

    def _tuple(self, size: int) -> None:
        values = [self._pop() for _ in range(size)]
        self._push(tuple(reversed(values)))

    def _key(self, value: Any) -> Any:
        if type(value) not in self._keys:
            raise CheckpointError(f"has a {type(value).__name__} as a key")
        return value

    def _set_items(self, items: list[Any]) -> None:
        target = self._top(dict)
        if len(items) % 2:
            raise CheckpointError("has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self._key(key)] = value

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _append(self) -> None:
        value = self._pop()
        self._top(list).append(value)

    def _appends(self) -> None:
        values = self._since_mark()
        self._top(list).extend(values)

    def _add_items(self) -> None:
        values = self._since_mark()
        self._top(set).update(map(self._key, values))

    def _put(self, index: int) -> None:
        value = self._pop()
        self._stack.append(value)
        self._memo[index] = value

    def _get(self, width: int) -> None:
        index = self._number(width)
        if index not in self._memo:
            raise CheckpointError(f"refers to value {index}, which it did not store")
        self._push(self._memo[index])

    def _global(self) -> None:
        names: list[str] = []
        for _ in range(2):
            end = self._content.find(b"\n", self._at, self._at + _LONGEST_TEXT)
            if end < 0:
                raise CheckpointError("ends too early")
            names.append(str(self._take(end - self._at), "utf-8"))
            self._at += 1
        self._push(self._find(*names))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise CheckpointError("uses something other than text as a name")
        self._push(self._find(module, name))

    def _reduce(self) -> None:
        arguments, maker = self._pop(), self._pop()
        if not isinstance(maker, Maker) or maker.call is None or not isinstance(arguments, tuple):
            raise CheckpointError("calls something that cannot be called")
        self._arguments += len(arguments) + sum(len(each) for each in arguments if isinstance(each, Sized))
        if self._arguments > _MOST_ARGUMENTS:
            raise CheckpointError(f"passes more than {_MOST_ARGUMENTS} values to its calls")
        self._made_by(maker, maker.call(*arguments))

    def _new(self) -> None:
        arguments, maker = self._pop(), self._pop()
        if not isinstance(maker, Maker) or maker.new is None or arguments != ():
            raise CheckpointError("creates an instance of something that is not a class")
        self._made_by(maker, maker.new())

    def _made_by(self, maker: Maker, value: Any) -> None:
        if maker.build is not None:
            self._made[id(value)] = value, maker
        self._push(value)

    def _build(self) -> None:
        state, value = self._pop(), self._pop()
        _, maker = self._made.get(id(value), (None, None))
        if maker is None or maker.build is None:
            raise CheckpointError("sets attributes of an object that it did not create")
        maker.build(value, state)
        self._push(value)

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise CheckpointError("refers to something outside itself")
        self._push(self._persistent(self._pop()))

    _STEPS: ClassVar[dict[bytes, Callable[["_Machine"], Any]]] = {
        b"\x80": _protocol,
        b"\x95": _frame,
        b"(": _mark,
        b"0": _pop,
        b"1": _since_mark,
        b"N": lambda self: self._push(None),
        b"\x88": lambda self: self._push(True),
        b"\x89": lambda self: self._push(False),
        b"J": lambda self: self._push(int.from_bytes(self._take(4), "little", signed=True)),
        b"K": lambda self: self._push(self._number(1)),
        b"M": lambda self: self._push(self._number(2)),
        b"\x8a": _long,
        b"G": lambda self: self._push(struct.unpack(">d", self._take(8))[0]),
        b"\x8c": lambda self: self._text(1),
        b"X": lambda self: self._text(4),
        b")": lambda self: self._push(()),
        b"t": lambda self: self._push(tuple(self._since_mark())),
        b"\x85": lambda self: self._tuple(1),
        b"\x86": lambda self: self._tuple(2),
        b"\x87": lambda self: self._tuple(3),
        b"]": lambda self: self._push([]),
        b"a": _append,
        b"e": _appends,
        b"}": lambda self: self._push({}),
        b"s": _set_item,
        b"u": lambda self: self._set_items(self._since_mark()),
        b"\x8f": lambda self: self._push(set()),
        b"\x90": _add_items,
        b"q": lambda self: self._put(self._number(1)),
        b"r": lambda self: self._put(self._number(4)),
        b"\x94": lambda self: self._put(len(self._memo)),
        b"h": lambda self: self._get(1),
        b"j": lambda self: self._get(4),
        b"c": _global,
        b"\x93": _stack_global,
        b"R": _reduce,
        b"\x81": _new,
        b"b": _build,
        b"Q": _persistent_id,
    }
