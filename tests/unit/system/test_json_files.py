"""JSON that is clumsy or hostile ends in one line."""

import os
from pathlib import Path

import pytest

from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.system.json_files import read_object

REFUSED: dict[str, tuple[bytes, str]] = {
    "a key twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' appears twice"),
    "nested deep": (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    "a long number": (b'{"a": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
    "infinity": (b'{"a": Infinity}', "Infinity is not a finite number"),
    "NaN": (b'{"a": NaN}', "NaN is not a finite number"),
    "a number that overflows": (b'{"a": 1e999}', "1e999 is not a finite number"),
    "a list": (b"[]", "not a JSON object"),
    "text of another encoding": (b'{"a": "\xff"}', "not valid JSON"),
    "nothing": (b"", "not valid JSON"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(tmp_path: Path, what: str) -> None:
    content, why = REFUSED[what]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path}: .*{why}") as caught:
        read_object(path, CheckpointError)
    assert len(str(caught.value).splitlines()) == 1


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(CheckpointError, match="too large: 1099511627776 bytes"):
        read_object(path, CheckpointError)


def test_taken(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [1, -2.5e-3, true, null, "\xc3\xa4"], "b": {}}')
    assert read_object(path, CheckpointError) == {"a": [1, -0.0025, True, None, "ä"], "b": {}}
