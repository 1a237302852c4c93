"""`mixtral-recipes migrate` on a file and on a folder."""

import errno
import json
import shutil
from pathlib import Path

import pytest

from mixtral_recipes.cli.main import run

SCRIPT = "from nemo.collections import llm\nrecipe = llm.mixtral_8x7b.pretrain_recipe()\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs" / "more").mkdir(parents=True)
    (tmp_path / "jobs" / "train.py").write_text(SCRIPT)
    (tmp_path / "jobs" / "more" / "plain.py").write_text("print(1)\n")
    (tmp_path / "jobs" / "data.txt").write_text("text")
    return tmp_path


def test_a_report_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    assert run(["migrate", "jobs/train.py"]) == 0
    out, err = capsys.readouterr()
    assert out == ("jobs/train.py:1: changed  from nemo.collections import llm  ->  import mixtral_recipes as llm\n")
    assert err == "1 file(s): 1 changed, 0 warned, 0 refused, 0 notes.\n"
    assert sorted(folder.rglob("*")) == before


def test_the_copy_of_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["migrate", "jobs/train.py", "--write", "--json"]) == 0
    assert (folder / "jobs" / "train_mixtral.py").read_text() == SCRIPT.replace(
        "from nemo.collections import llm", "import mixtral_recipes as llm"
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["changed"], result["written"]) == (1, "jobs/train_mixtral.py")
    assert run(["migrate", "jobs/train.py", "--write"]) == 2
    assert "exists; choose another --output, or pass --overwrite" in capsys.readouterr().err


def test_the_copy_of_a_folder_has_everything(folder: Path) -> None:
    assert run(["migrate", "jobs", "--output", "new"]) == 0
    found = sorted(str(path.relative_to(folder / "new")) for path in (folder / "new").rglob("*") if path.is_file())
    assert found == ["data.txt", "more/plain.py", "train.py"]
    assert "import mixtral_recipes as llm" in (folder / "new" / "train.py").read_text()


def test_a_folder_that_cannot_be_copied_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    copy = shutil.copy2

    def full(source: Path, target: Path) -> None:
        if source.name == "plain.py":
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        copy(source, target)

    monkeypatch.setattr(shutil, "copy2", full)
    assert run(["migrate", "jobs", "--output", "new"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_a_copy_inside_its_folder(folder: Path) -> None:
    assert run(["migrate", ".", "--output", "new"]) == 0
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    own = ["jobs/data.txt", "jobs/more/plain.py", "jobs/train.py"]
    assert found == [*own, *(f"new/{name}" for name in own)]
    assert run(["migrate", ".", "--output", "new", "--overwrite"]) == 0
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == found


def test_a_folder_in_it_may_have_the_copys_name(folder: Path) -> None:
    (folder / "jobs" / "more").rename(folder / "jobs" / "new")
    assert run(["migrate", "jobs", "--output", "new"]) == 0
    assert (folder / "new" / "new" / "plain.py").is_file()


def test_an_existing_folder_keeps_what_it_has(folder: Path) -> None:
    (folder / "new").mkdir()
    (folder / "new" / "notes.txt").write_text("mine")
    assert run(["migrate", "jobs", "--output", "new", "--overwrite"]) == 0
    assert (folder / "new" / "notes.txt").read_text() == "mine"
    assert "import mixtral_recipes as llm" in (folder / "new" / "train.py").read_text()


def test_what_is_refused_ends_with_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "serve.py").write_text("from nemo.collections import llm\nllm.deploy()\n")
    assert run(["migrate", "serve.py"]) == 2
    assert "error: 1 line(s) must be changed by hand" in capsys.readouterr().err


def test_a_folder_is_read_to_its_end_and_what_is_no_python_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "jobs" / "a.py").write_text("print 1\n")
    (folder / "jobs" / "more" / "z.py").write_bytes(b"\xff")
    assert run(["migrate", "jobs", "--output", "new", "--json"]) == 2
    out, err = capsys.readouterr()
    assert "jobs/a.py:1: not valid Python" in out
    assert "jobs/more/z.py:1: not valid Python" in out
    assert "jobs/train.py:1: changed" in out
    assert "2 file(s): 1 changed, 0 warned, 0 refused, 0 notes; not read: 2." in err
    assert "error: 2 file(s) could not be read" in err
    assert len(json.loads(out.splitlines()[-1])["unread"]) == 2
    assert (folder / "new" / "a.py").read_text() == "print 1\n"
    assert "mixtral_recipes" in (folder / "new" / "train.py").read_text()


def test_a_recipe_file_is_to_be_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "recipe.yaml").write_text("_target_: nemo.collections.llm.api.finetune\n")
    assert run(["migrate", "recipe.yaml"]) == 2
    assert "`mixtral-recipes run recipe.yaml`" in capsys.readouterr().err
