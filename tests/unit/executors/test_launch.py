"""Recipes stored without nemo_run's types, sizes, and what is refused before anything starts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixtral_recipes.errors import LaunchError
from mixtral_recipes.executors.launch import launch, size
from mixtral_recipes.executors.stored import store

pytestmark = pytest.mark.filterwarnings("ignore")


class Part:
    """Something a recipe configures."""

    def __init__(self, value: int = 0, inner: object = None) -> None:
        self.value, self.inner = value, inner


def function(part: Part, log: object = None) -> int:
    """What a recipe calls."""
    return part.value


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NEMORUN_HOME", raising=False)


def test_stored_recipe_needs_no_nemo_run(tmp_path: Path) -> None:
    import nemo_run as run

    recipe = run.Partial(json.dumps, obj=run.Config(dict, a=1), sort_keys=True)
    store(recipe, tmp_path / "recipe.json")
    assert (tmp_path / "recipe.json").stat().st_mode & 0o777 == 0o600
    code = (
        "import sys, fiddle as fdl\nfrom pathlib import Path\n"
        "from mixtral_recipes.executors.stored import load_recipe as load\n"
        "print(fdl.build(load(Path(sys.argv[1])))(), 'nemo_run' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "recipe.json")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == '{"a": 1} False'


def test_class_of_the_script_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nemo_run as run

    monkeypatch.setattr(Part, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Part", Part, raising=False)
    with pytest.raises(LaunchError, match="defined in the script itself"):
        store(run.Partial(json.dumps, obj=run.Config(Part, value=1)), tmp_path / "recipe.json")


def test_size() -> None:
    assert size(SimpleNamespace(trainer=SimpleNamespace(num_nodes=2, devices=8))) == (2, 8)
    assert size(SimpleNamespace()) == (1, 1)


@pytest.mark.parametrize("name", ["a;b", "../x", "-n"])
def test_hostile_name_starts_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="not allowed"):
        launch(None, executor="direct", name=name, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_nodes_do_not_fit_local(tmp_path: Path) -> None:
    recipe = SimpleNamespace(trainer=SimpleNamespace(num_nodes=2, devices=1))
    with pytest.raises(LaunchError, match="num_nodes=2"):
        launch(recipe, executor="local", name="x", run_dir=tmp_path)


def test_a_dry_run_for_slurm_leaves_nothing_and_writes_no_secret(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom mixtral_recipes.cli.main import run\nfrom mixtral_recipes.executors.slurm import scheduler\n"
        "write = scheduler.write_text\n"
        "def told(path, *a, **k): print('wrote', path.name); write(path, *a, **k)\n"
        "scheduler.write_text = told\nsys.exit(run(sys.argv[1:]))"
    )
    line = "finetune --recipe mixtral_tiny --executor slurm --dry-run --name dry --slurm venv=/v"
    line += " data.dataset_root=my.json"
    place = tmp_path / "place"
    place.mkdir()
    (place / "my.json").write_text('{"data": []}')
    env = {"MIXTRAL_RECIPES_HOME": str(place / "home"), "TMPDIR": str(place), "HF_TOKEN": "s3cr3t"}
    done = subprocess.run(
        [sys.executable, "-c", code, *line.split()], capture_output=True, text=True, check=False, cwd=place,
        env=os.environ | env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [path.name for path in place.rglob("*")] == ["my.json"]
    assert f"dataset_root: {place}/my.json" in done.stdout  # what the job gets
    assert "wrote sbatch.sh" in done.stdout
    assert "wrote secrets.env" not in done.stdout
    assert f"job_dir={place}/home/jobs/experiments/dry/" in done.stdout
