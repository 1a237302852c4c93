"""One home folder: the variables, a ``~`` in them, and paths that hold from anywhere."""

from pathlib import Path

import pytest

from mixtral_recipes.errors import EnvironmentProblem
from mixtral_recipes.system.files import private_folder
from mixtral_recipes.system.home import data_home, elsewhere, home, jobs_home, models_home, runs_home


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIXTRAL_RECIPES_HOME", raising=False)
    monkeypatch.delenv("NEMORUN_HOME", raising=False)


@pytest.mark.parametrize("value", [None, ""])
def test_unset_and_empty_mean_the_cache_folder(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is not None:
        monkeypatch.setenv("MIXTRAL_RECIPES_HOME", value)
    assert home() == Path.home() / ".cache" / "mixtral-recipes"


def test_every_folder_follows_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path))
    found = {folder().relative_to(tmp_path).as_posix() for folder in (models_home, data_home, runs_home, jobs_home)}
    assert found == {"models", "data", "runs", "jobs"}


@pytest.mark.parametrize(
    ("variable", "folder"), [("MIXTRAL_RECIPES_HOME", home), ("NEMORUN_HOME", jobs_home)], ids=["home", "jobs"]
)
def test_tilde_and_relative_paths_become_absolute(
    variable: str, folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(variable, "~/kept")
    assert folder() == tmp_path / "kept"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, "kept")
    assert folder() == tmp_path / "kept"


def test_a_home_folder_that_cannot_be_made_is_refused_with_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert elsewhere(Path("/proc/a")) == "choose a folder"
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", "/proc/a")
    assert elsewhere(jobs_home()) == "set MIXTRAL_RECIPES_HOME to a folder"
    with pytest.raises(
        EnvironmentProblem, match=r"/proc/a/runs/1 cannot be created \(No such .*; set MIXTRAL_RECIPES_HOME"
    ):
        private_folder(runs_home() / "1")
    monkeypatch.setenv("NEMORUN_HOME", "/proc/b")
    assert elsewhere(jobs_home() / "job") == "set NEMORUN_HOME to a folder"
