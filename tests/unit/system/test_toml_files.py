"""TOML that is clumsy or hostile ends in one line."""

from pathlib import Path

import pytest

from mixtral_recipes.errors import LaunchError
from mixtral_recipes.system.toml_files import read_table

REFUSED: dict[str, tuple[bytes, str]] = {
    "not TOML": (b"a = ", "not TOML"),
    "a key twice": (b"a = 1\na = 2", "not TOML"),
    "nested deep": (b"a = " + b"[" * 100_000, "nested too deeply"),
    "nested deeper than any profile": (b"a = " + b"[" * 50 + b"1" + b"]" * 50, "nested too deeply"),
    "a long number": (b"a = " + b"9" * 5000, "a number of 5000 digits"),
    "infinity": (b"a = inf", "inf is not a finite number"),
    "a number that overflows": (b"a = 1e999", "is not a finite number"),
    "text of another encoding": (b'a = 1\nb = "\xff"', "clusters.toml:2: not UTF-8"),
    "a large file": (b"#" * (2 << 20), "too large"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(tmp_path: Path, what: str) -> None:
    content, why = REFUSED[what]
    path = tmp_path / "clusters.toml"
    path.write_bytes(content)
    with pytest.raises(LaunchError, match=why) as caught:
        read_table(path, LaunchError)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_taken(tmp_path: Path) -> None:
    path = tmp_path / "clusters.toml"
    path.write_bytes(b'\xef\xbb\xbf[a]\r\ntime = 04:00:00\nday = 2026-01-02\nlist = [1, 2.5, true, "\xc3\xa4"]\n')
    assert read_table(path, LaunchError) == {
        "a": {"time": "04:00:00", "day": "2026-01-02", "list": [1, 2.5, True, "ä"]}
    }
