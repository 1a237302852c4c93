"""Text from files, where some characters are orders."""

import pytest
import yaml

from mixtral_recipes.system.escapes import code_for_markdown, for_markdown, for_yaml, in_a_line, printable, shortened


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("over\rwritten", "over\\rwritten"),
        ("\x9b2J \x00 \x7f", "\\x9b2J \\x00 \\x7f"),
        ("gpj.\u202eexe", "gpj.\\u202eexe"),
        ("你好 é \u05d0", "你好 é \u05d0"),
    ],
)
def test_the_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert in_a_line(text) == shown.replace("\n", "\\n")


def test_a_line_is_one_by_every_count_of_lines() -> None:
    text = "".join(map(chr, range(0x2100)))
    assert len(in_a_line(text).splitlines()) == 1


def test_markdown() -> None:
    assert for_markdown("a|b\n# <b>*c*</b>") == r"a\|b\\n\# \<b\>\*c\*\</b\>"
    assert code_for_markdown("a`b|c") == r"`a'b\|c`"


@pytest.mark.parametrize(
    "text", ["org/name", "no", "null", "a: b", "x\n---\ny", "[1]", "*a", "'", '"', "1.5", "a #b", ""]
)
def test_yaml(text: str) -> None:
    assert yaml.safe_load(f"base: {for_yaml(text)}\nnext: 1\n") == {"base": text, "next": 1}


def test_a_long_line_keeps_its_ends() -> None:
    text = "path=" + "x" * 5000 + " is not known; choose another."
    found = shortened(text)
    assert len(found) < 2100
    assert found.startswith("path=xx")
    assert found.endswith("xx is not known; choose another.")
    assert shortened("a" * 2000) == "a" * 2000
