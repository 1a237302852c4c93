"""Files appear whole or not at all, for whom they should, and errors name the file that was asked for."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixtral_recipes.errors import EnvironmentProblem, of_the_machine
from mixtral_recipes.system.files import (
    clear_all_leftovers,
    copy_folder,
    naming,
    private_folder,
    read_json,
    refuse_unwritable,
    refuse_unwritable_file,
    remove_folder,
    replacing,
    replacing_folder,
    staging_path,
    temporary_folder,
    write_json,
    write_text,
)

KILLED = """
import os, signal, sys
from pathlib import Path
from mixtral_recipes.system.files import replacing
with replacing(Path(sys.argv[1])) as staging:
    staging.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("before", [None, "old"])
def test_a_killed_writer_leaves_the_name_as_it_was(before: str | None, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    if before is not None:
        path.write_text(before)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (path.read_text() if path.exists() else None) == before
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_failed_writer_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(FileNotFoundError, match="nothing"), replacing(path) as staging:
        staging.write_text(f"half {Path('nothing').read_text()}")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_the_temporary_file_is_hidden_beside_the_final_one_and_of_its_kind(tmp_path: Path) -> None:
    with replacing(tmp_path / "picture.png") as staging:  # matplotlib and numpy look at the suffix
        assert (staging.parent, staging.suffix) == (tmp_path, ".png")
        assert not list(tmp_path.glob("[!.]*"))
    assert os.listdir(tmp_path) == ["picture.png"]


def test_what_is_no_file_keeps_its_place_and_gets_the_text(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        refuse_unwritable_file(pipe)
        write_text(pipe, "text")
        assert os.read(reader, 9) == b"text"
        assert pipe.is_fifo()
        assert os.listdir(tmp_path) == ["pipe"]
    finally:
        os.close(reader)
    with (tmp_path / "file").open("wb") as file:
        write_text(Path(f"/proc/self/fd/{file.fileno()}"), "through a link")
    assert (tmp_path / "file").read_text() == "through a link"


def test_only_private_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_text(tmp_path / "open", "x")
        write_text(tmp_path / "secret", "x")
        assert (mode(tmp_path / "open"), mode(tmp_path / "secret")) == (0o644, 0o644)
        write_text(tmp_path / "secret", "y", private=True)
    finally:
        os.umask(before)
    assert mode(tmp_path / "secret") == 0o600


def test_private_text_never_goes_through_a_link(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("theirs")
    (tmp_path / "secret").symlink_to(elsewhere)
    write_text(tmp_path / "secret", "ours", private=True)
    assert elsewhere.read_text() == "theirs"
    assert not (tmp_path / "secret").is_symlink()


def test_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "file", tmp_path / "folder"):
        with pytest.raises(OSError, match=rf": '{path}'$"):
            write_text(path, "x")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_disk_that_takes_no_more_leaves_the_name_as_it_was_and_is_told_by_it(tmp_path: Path) -> None:
    """A write to an open file fails without saying which file it was."""
    whole, folder, model = tmp_path / "whole.json", tmp_path / "folder", tmp_path / "model.gguf"
    write_text(whole, "before")
    code = """if True:
        import resource, sys
        from pathlib import Path
        from mixtral_recipes.errors import of_the_machine
        from mixtral_recipes.system.files import replacing_files, replacing_folder, write_text
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        def within():
            with replacing_folder(Path(sys.argv[2])) as staging, (staging / "weights").open("wb") as file:
                file.write(bytes(8192))
        def with_others():
            with replacing_files(Path(sys.argv[3]), ["card"]) as staging, (staging / "model.gguf").open("wb") as file:
                file.write(bytes(8192))
        for write in (lambda: write_text(Path(sys.argv[1]), "x" * 8192), within, with_others):
            try:
                write()
            except OSError as error:
                print(of_the_machine(error))
    """
    done = subprocess.run(
        [sys.executable, "-c", code, whole, folder, model], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        f"{path}: File too large; raise `ulimit -f`, or choose another disk." for path in (whole, folder, model)
    ]
    assert os.listdir(tmp_path) == ["whole.json"]
    assert whole.read_text() == "before"


def test_a_copy_that_finds_no_room_is_told_by_its_target(tmp_path: Path) -> None:
    """As shutil raises it: with both names, the source's first."""
    source, target = str(tmp_path / "source"), str(tmp_path / "target")
    with pytest.raises(OSError, match=f": '{target}'$"), naming(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source, None, target)


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    assert read_json(path) is None
    write_json(path, {"a": [1, 2.5, None]})
    assert read_json(path) == {"a": [1, 2.5, None]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": [1, 2.5, None]}
    path.write_text('{"a": ')
    assert read_json(path) is None
    path.write_text("[1]")
    assert read_json(path) is None


def test_every_missing_parent_of_a_private_folder_is_private(tmp_path: Path) -> None:
    assert mode(private_folder(tmp_path / "a" / "b")) == 0o700
    assert mode(tmp_path / "a") == 0o700


def interrupted_in(folder: Path) -> None:
    (folder / "file").write_text("half")
    raise KeyboardInterrupt


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    final = tmp_path / "parent" / "final"
    with replacing_folder(final) as staging:
        (staging / "file").write_text("one")
        assert not final.exists()
        assert staging == staging_path(final)
    with pytest.raises(KeyboardInterrupt), replacing_folder(final) as staging:
        interrupted_in(staging)
    assert (final / "file").read_text() == "one"
    with replacing_folder(final) as staging:
        (staging / "other").write_text("two")
    assert [path.name for path in final.parent.rglob("*")] == ["final", "other"]


def test_a_removed_folder_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "one" / "weights").mkdir(parents=True)
    (tmp_path / "one" / "weights" / "file").write_text("x")
    (tmp_path / ".one.deleted").mkdir()
    remove_folder(tmp_path / "one")
    assert list(tmp_path.iterdir()) == []


def test_what_killed_processes_left(tmp_path: Path) -> None:
    """One moved away for a successor that never came gets its name back; everything else half-done goes."""
    for name in ("kept", ".kept.partial", ".kept.replaced", ".back.replaced", ".gone.deleted", ".new.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / ".lock").write_text("")
    clear_all_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".lock", "back", "kept"]
    assert (tmp_path / "kept" / "file").read_text() == "kept"
    assert (tmp_path / "back" / "file").read_text() == ".back.replaced"


@pytest.mark.parametrize("path", [".", "/", ""])
def test_a_folder_without_a_name_is_no_place_for_something(path: str) -> None:
    with pytest.raises(IsADirectoryError, match="Has no name"), replacing(Path(path)):
        pass
    with pytest.raises(IsADirectoryError, match="Has no name"), replacing_folder(Path(path)):
        pass


def test_a_temporary_folder_goes_with_its_process(tmp_path: Path) -> None:
    with temporary_folder() as folder:
        (folder / "a").write_text("a")
    assert not folder.exists()
    ends, begins = os.pipe()
    child = os.fork()
    if not child:
        with temporary_folder() as folder:
            os.write(begins, os.fsencode(folder))
            signal.pause()
    folder = Path(os.fsdecode(os.read(ends, 4096)))
    assert folder.is_dir()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for _ in range(1000):
        if not folder.exists():
            break
        time.sleep(0.01)
    assert not folder.exists()


def test_a_folder_that_cannot_be_made_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    refuse_unwritable(tmp_path / "a" / "b")
    refuse_unwritable(tmp_path)
    assert not (tmp_path / "a").exists()
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(EnvironmentProblem, match=f"{path} cannot be created: {tmp_path}/file is a file; choose a"):
            refuse_unwritable(path)
    with pytest.raises(EnvironmentProblem, match=f"^{'é' * 128} is too long for a folder name; use at most 255 bytes"):
        refuse_unwritable(tmp_path / ("é" * 128) / "a")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(EnvironmentProblem, match=f"^{tmp_path} is not writable; choose a folder"):
        refuse_unwritable(tmp_path / "a" / "b")


def test_a_folder_that_cannot_be_copied_is_an_error_of_one_file(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "more" / "left").mkdir(parents=True)
    for name in ("a", "more/b", "more/left/c"):
        (source / name).write_text(name)
    copy_folder(source, target, without=["left"])
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*")) == ["a", "more", "more/b"]
    (target / "a").unlink()
    (target / "a").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/target/a'") as caught:
        copy_folder(source, target)
    assert of_the_machine(caught.value) is not None  # as it is not of what shutil.copytree raises
