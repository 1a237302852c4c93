"""Every test that docs/guarantees.md names exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "guarantees.md"
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.read_text())


def test_every_test_exists() -> None:
    assert len(NAMED) > 30
    files = {file: (ROOT / file).read_text() for file, _ in NAMED if (ROOT / file).is_file()}
    tests = {
        (file, node.name) for file, text in files.items() for node in ast.parse(text).body if hasattr(node, "name")
    }
    assert [f"{file}::{name}" for file, name in NAMED if (file, name) not in tests] == []


def test_every_promise_names_one() -> None:
    rows = [
        line for line in PAGE.read_text().splitlines() if line.startswith("| ") and not line.startswith("| promise")
    ]
    assert [row for row in rows if not re.search(r"`tests/[\w/]+\.py::\w+` *(,|\|)", row)] == []
