"""An answer about files is remembered until they change, however their times are set."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtral_recipes.system import remembered as module
from mixtral_recipes.system.remembered import remembered


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """Ask for a file's content; every file is taken for an old one."""
    monkeypatch.setattr(module, "_SETTLED_AFTER_S", -1.0)
    return lambda path: remembered(tmp_path / "memos", [path], "content", path.read_text)


def in_place(path: Path) -> None:
    path.write_text("new")


def by_rename(path: Path) -> None:
    other = path.with_name("other")
    other.write_text("new")
    other.replace(path)


def by_copy(path: Path) -> None:
    """As ``cp -p`` and ``rsync -t`` do it: with the times of what is copied."""
    other = path.with_name("other")
    other.write_text("new")
    shutil.copystat(path, other)
    shutil.copyfile(other, path)
    shutil.copystat(other, path)


@pytest.mark.parametrize("write", [in_place, by_rename, by_copy])
def test_other_content_of_the_same_size_and_time_is_read(
    tmp_path: Path, asked: Callable[[Path], str], write: Callable[[Path], None]
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    before = path.stat()
    assert asked(path) == asked(path) == "old"
    write(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert asked(path) == "new"


def test_what_has_not_changed_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    reads: list[Path] = []

    def look() -> str:
        reads.append(path)
        return "answer"

    for settled, expected in ((60.0, 2), (-1.0, 3)):  # a young file could change without a trace: it is read each time
        monkeypatch.setattr(module, "_SETTLED_AFTER_S", settled)
        for _ in range(2):
            assert remembered(tmp_path / "memos", [path], "question", look) == "answer"
        assert len(reads) == expected


def test_what_changes_while_it_is_read_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SETTLED_AFTER_S", -1.0)
    path = tmp_path / "file"
    path.write_text("old")

    def look() -> str:
        text = path.read_text()
        path.write_text("new and longer")
        return text

    assert remembered(tmp_path / "memos", [path], "content", look) == "old"
    assert remembered(tmp_path / "memos", [path], "content", path.read_text) == "new and longer"
