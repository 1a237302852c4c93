"""Text from files, shown: one function for each place that reads some characters as orders.

HTML is escaped by jinja and `html.escape`, JSON by `json`.
"""

import json
import re

# Control characters (ANSI escapes begin with one) but line ends and tabs, and what turns the direction of writing.
_ORDERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_LINE_ENDS = re.compile("[\n\x0b\x0c\r\x1c-\x1e\x85\u2028\u2029]")
_MARKDOWN = re.compile(r"[\\`*_\[\]<>|#!~$&]")
_PLAIN_YAML = re.compile(r"[A-Za-z][\w-]*(/[A-Za-z0-9][\w.-]*)?")
_YAML_WORDS = re.compile(r"(?i)(y|n|yes|no|on|off|true|false|null|nan|inf)")


def printable(text: object) -> str:
    """Text for the terminal, over several lines where it has them: nothing in it moves the cursor or hides a part."""
    return _ORDERS.sub(_spelled, str(text))


def in_a_line(text: object) -> str:
    """As `printable`, line ends spelled out too: for errors, cells and names."""
    return printable(_LINE_ENDS.sub(_spelled, str(text)))


def shortened(line: str, most: int = 2000) -> str:
    """A line with its middle left out where it is longer than ``most`` characters: what it repeats of a file can be."""
    head, tail = 2 * most // 3, most // 3
    if len(line) <= most:
        return line
    return f"{line[:head]} [{len(line) - head - tail} characters] {line[-tail:]}"


def _spelled(found: re.Match[str]) -> str:
    return {"\n": "\\n", "\r": "\\r", "\x1b": "\\x1b"}.get(
        found[0], f"\\x{ord(found[0]):02x}" if ord(found[0]) < 256 else f"\\u{ord(found[0]):04x}"
    )


def for_markdown(text: object) -> str:
    """Text in a line or a cell of Markdown, that shows as it is."""
    return _MARKDOWN.sub(r"\\\g<0>", in_a_line(text))


def code_for_markdown(text: object) -> str:
    """Text as code in a line or a cell of Markdown; backticks, which would end it, are left out."""
    return "`" + in_a_line(text).replace("`", "'").replace("|", "\\|") + "`"


def for_yaml(text: str) -> str:
    """A text as a YAML value: as it is where it can only be read as itself, in quotation marks elsewhere."""
    if _PLAIN_YAML.fullmatch(text) and not _YAML_WORDS.fullmatch(text):
        return text
    return json.dumps(text)
