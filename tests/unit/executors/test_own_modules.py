"""A Slurm job takes along what its recipe needs of the user's own modules, and nothing that is installed."""

import importlib
import sys
import tarfile
from pathlib import Path

import nemo_run as run
import pytest

import mixtral_recipes as llm
from mixtral_recipes.executors import nemo_run_jobs
from mixtral_recipes.executors.own_modules import own_modules, with_own_modules
from mixtral_recipes.executors.slurm.executor import slurm_executor


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a package, a module that it imports, and one that it does not."""
    folder = tmp_path / "lab"
    (folder / "lab_of_a_user" / "deep").mkdir(parents=True)
    (folder / "lab_of_a_user" / "deep" / "warn.py").write_text("import its_words\nclass Warn:\n    pass\n")
    (folder / "lab_of_a_user" / "notes.txt").touch()
    (folder / "its_words.py").touch()
    (folder / "another.py").touch()
    monkeypatch.syspath_prepend(str(folder))
    for name in [name for name in sys.modules if name.startswith(("lab_of_a_user", "its_words"))]:
        monkeypatch.delitem(sys.modules, name)  # of another test's folder
    return folder


def test_the_modules_of_a_recipe_go_along(lab: Path, tmp_path: Path) -> None:
    recipe = llm.mixtral_tiny.finetune_recipe(name="narrow", dir=str(tmp_path))
    assert own_modules(recipe, []) == []
    recipe.trainer.callbacks = [run.Config(importlib.import_module("lab_of_a_user.deep.warn").Warn)]
    assert own_modules(recipe, []) == [str(lab / "its_words.py"), str(lab / "lab_of_a_user")]
    assert own_modules(recipe, [str(lab)]) == []
    executor = slurm_executor(account="none", partition="debug", code=())
    packed = with_own_modules(executor, recipe).packager.package(tmp_path, str(tmp_path), "code")
    with tarfile.open(packed) as archive:
        names = archive.getnames()
    assert names == ["its_words.py", "lab_of_a_user/deep/warn.py", "lab_of_a_user/notes.txt"]
    assert executor.packager.package(tmp_path, str(tmp_path), "none") == ""


def test_so_do_those_of_a_task_that_is_no_recipe_of_ours(lab: Path) -> None:
    executor = slurm_executor(account="none", partition="debug", code=())
    task = run.Partial(importlib.import_module("lab_of_a_user.deep.warn").Warn)
    same, sends = nemo_run_jobs.check(task, executor)
    assert same is task
    assert sends.packager.modules == [str(lab / "its_words.py"), str(lab / "lab_of_a_user")]
    assert nemo_run_jobs.check(run.Script("true"), sends)[1].packager.modules == sends.packager.modules
    local = run.LocalExecutor()
    assert nemo_run_jobs.check(task, local) == (task, local)
