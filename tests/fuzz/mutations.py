"""Strategies that damage valid files: bytes, values of a JSON document, words of a text.

Each takes the valid content and draws what becomes of it. Every draw is hypothesis's: an example can be made again.
"""

import json
import re
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.damaged_bytes import SIZES, Draw, damaged_archive, damaged_bytes, damaged_pickle

_WORDS = re.compile(rb"\"[^\"\n]*\"|'[^'\n]*'|[A-Za-z_][\w./-]*|-?\d[\d._eE+-]*|[^\s\w]|\n")


class Raw(str):
    """Text that stands in the document as it is."""


class Pairs(list):
    """An object's names and values; a name may stand there twice."""


NUMBERS = [
    Raw(text)
    for text in (
        *("0", "-1", "1", "-0", "0.5", "1e400", "-1e400", "1e-320", "NaN", "Infinity", "-Infinity", "1.0", "8.0"),
        *(
            "2147483648",
            "9223372036854775808",
            "18446744073709551616",
            "1000000000",
            "1e30",
            "9" * 5000,
            "0." + "1" * 99,
        ),
    )
]
TEXTS = [
    "", " ", "8", "true", "null", "nan", "-1", "1e400", "٣", "a" * 5000, "../../../../etc/passwd", "/etc/passwd",
    "/proc/self/environ", "~", "\x00", "\x1b[2J\x1b[31mred", "\u202e", "\ud800", "%s%n{0}{x!r}",
    "<script>alert(1)</script>", "{{ 9 ** 9 ** 9 }}", "(" * 200, "(a+)+$", "hf://nobody/nothing", "nemo://x",
    "\n\nerror: made up", "__class__", "os.system",
]  # fmt: skip
NESTED = [Raw("[" * depth + "]" * depth) for depth in (3, 500, 100_000)] + [
    Raw('{"a":' * depth + "1" + "}" * depth) for depth in (3, 500, 100_000)
]
CONTAINERS = [
    Raw(text) for text in ("[]", "{}", "[[]]", '[""]', "[null]", "[1,2,3]", '{"": {}}', "[0]", '{"a":1,"a":2}')
]
HOSTILE = [*NUMBERS, *TEXTS, *NESTED, *CONTAINERS, True, False, None]

# Words for texts that are no JSON: TOML, YAML, Jinja, Python.
SNIPPETS = [
    "&a [*a, *a]", "*nowhere", "<<: *x", "!!python/object/apply:os.system [id]", "!!binary aGk=", "1:30:00", "0o17",
    "~", "\t", "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]\n", "? [a]\n: b\n", "{a: 1, a: 2}", "2026-01-01",
    "2026-01-01T00:00:00Z", "[[stage]]", "[stage]", "[a.b.c]", "'''", '"""', "inf", "nan", "1e400", "-1", "0",
    "9" * 400, "yes", "no", "on", "null", "[]", "{}", "{% for a in range(10**9) %}x{% endfor %}", "{{ x * 10**9 }}",
    "{% include '/etc/passwd' %}", "{{ ''.__class__.__mro__ }}", '"\x00"', '"../../x"', '"/etc/passwd"', '"--help"',
    '"-"', "=", ":", "[", "]", "{", "}", "#", ",", "\\", "'", '"', "é", "\u2028", "_target_: os.system",
    "_partial_: true", "None", "lambda: 0", "import os", "def f(", "class", "\x1b[31m", "a" * 3000, "[" * 2000,
]  # fmt: skip


@st.composite
def damaged_json(draw: Draw, content: bytes) -> bytes:
    """One to three values of a document replaced, removed, doubled or wrapped; seldom its bytes damaged instead."""
    if draw(st.integers(0, 7)) == 0:
        return draw(damaged_bytes(content))
    document = json.loads(content, object_pairs_hook=Pairs)
    for _ in range(draw(st.integers(1, 3))):
        document = _damage(draw, document)
    return encode(document).encode("utf-8", "surrogatepass")


def _damage(draw: Draw, value: Any) -> Any:
    """Walk to a place in a document, and change what is there."""
    if isinstance(value, list) and value and draw(st.integers(0, 3)):  # Pairs too
        index = draw(st.integers(0, len(value) - 1))
        if not isinstance(value, Pairs):
            return [*value[:index], _damage(draw, value[index]), *value[index + 1 :]]
        name, inner = value[index]
        how = draw(st.sampled_from(("value", "value", "value", "value", "remove", "twice", "rename", "add")))
        if how == "value":
            return Pairs([*value[:index], (name, _damage(draw, inner)), *value[index + 1 :]])
        if how == "remove":
            return Pairs([*value[:index], *value[index + 1 :]])
        if how == "twice":
            return Pairs([*value, (name, draw(st.sampled_from([inner, *HOSTILE])))])
        if how == "rename":
            new = draw(st.sampled_from([name.upper(), name + " ", "", *TEXTS]))
            return Pairs([*value[:index], (new, inner), *value[index + 1 :]])
        return Pairs([*value, (draw(st.sampled_from(TEXTS)), draw(st.sampled_from(HOSTILE)))])
    how = draw(st.sampled_from(("replace", "replace", "replace", "wrap", "text", "unwrap", "many")))
    if how == "wrap":
        return [value]
    if how == "text":
        return encode(value) if not isinstance(value, str) else list(value[:50])
    if how == "unwrap" and isinstance(value, list) and value:
        return value[0][1] if isinstance(value, Pairs) else value[0]
    if how == "many" and isinstance(value, list):
        return type(value)(value * 50)
    return draw(st.sampled_from(HOSTILE))


def encode(value: Any) -> str:
    """A document as text, with names given twice and raw text in it."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(name)}:{encode(inner)}" for name, inner in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(encode, value)) + "]"
    return json.dumps(value)


@st.composite
def damaged_lines(draw: Draw, content: bytes) -> bytes:
    """One to three lines of a JSONL file damaged as documents, or lines removed, doubled, joined."""
    lines = content.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        how = draw(st.sampled_from(("value", "value", "value", "bytes", "remove", "double", "join", "blank")))
        if how == "value":
            try:
                lines[at] = draw(damaged_json(lines[at]))
            except (ValueError, RecursionError):  # it was damaged before
                lines[at] = draw(damaged_bytes(lines[at]))
        elif how == "bytes":
            lines[at] = draw(damaged_bytes(lines[at]))
        elif how == "remove" and len(lines) > 1:
            del lines[at]
        elif how == "join" and at:
            lines[at - 1 : at + 1] = [lines[at - 1] + lines[at]]
        else:
            lines.insert(
                at, lines[at] if how == "double" else draw(st.sampled_from((b"", b" ", b"[]", b"null", b"\0")))
            )
    return b"\n".join(lines) + b"\n"


@st.composite
def damaged_text(draw: Draw, content: bytes) -> bytes:
    """Words of a text replaced, removed, swapped; lines doubled, removed, moved; seldom its bytes damaged instead."""
    if draw(st.integers(0, 7)) == 0:
        return draw(damaged_bytes(content))
    for _ in range(draw(st.integers(1, 3))):
        words = list(_WORDS.finditer(content))
        how = draw(st.sampled_from(("replace", "replace", "replace", "remove", "swap", "line", "put")))
        if not words:
            return content + draw(st.sampled_from(SNIPPETS)).encode("utf-8", "surrogatepass")
        word = words[draw(st.integers(0, len(words) - 1))]
        snippet = draw(st.sampled_from(SNIPPETS + TEXTS)).encode("utf-8", "surrogatepass")
        if how == "replace":
            content = content[: word.start()] + snippet + content[word.end() :]
        elif how == "remove":
            content = content[: word.start()] + content[word.end() :]
        elif how == "swap":
            other = words[draw(st.integers(0, len(words) - 1))].group()
            content = content[: word.start()] + other + content[word.end() :]
        elif how == "put":
            content = content[: word.start()] + snippet + b" " + content[word.start() :]
        else:
            lines = content.splitlines(keepends=True)
            line = lines.pop(draw(st.integers(0, len(lines) - 1)))
            for _ in range(draw(st.integers(0, 2))):
                lines.insert(draw(st.integers(0, len(lines))), line)
            content = b"".join(lines)
    return content


@st.composite
def damaged_safetensors(draw: Draw, content: bytes) -> bytes:
    """The header damaged as a document, its length told right or wrong; or the file's bytes damaged."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged_bytes(content))
    length = int.from_bytes(content[:8], "little")
    header = draw(damaged_json(content[8 : 8 + length]))
    told = len(header) if draw(st.integers(0, 7)) else draw(st.sampled_from((*SIZES, len(header) + 1)))
    return told.to_bytes(8, "little") + header + content[8 + length :]


DAMAGES = {
    "json": damaged_json,
    "lines": damaged_lines,
    "text": damaged_text,
    "bytes": damaged_bytes,
    "safetensors": damaged_safetensors,
    "pickle": damaged_pickle,
    "archive": damaged_archive,
}
