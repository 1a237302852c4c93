"""Golden sbatch scripts. To rewrite them: MIXTRAL_RECIPES_WRITE_GOLDEN=1 pytest tests/unit/executors/test_sbatch.py"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.errors import LaunchError
from mixtral_recipes.executors.slurm.profile import cluster, time_limit_s
from mixtral_recipes.executors.slurm.sbatch import Job, render, secrets_file

GOLDEN = Path(__file__).parents[3] / "golden" / "sbatch"
SITE: dict[str, Any] = {"account": "research", "partition": "batch", "time": "08:00:00"}
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "venv_1_node": (1, 2, {"venv": "/shared/venv"}),
    "venv_2_nodes": (
        2, 8, {"venv": "/shared/venv", "gpus_per_node": 8, "cpus_per_node": 96, "modules": ("cuda/12.8",)},
    ),
    "pyxis_1_node": (1, 8, {"container_image": "nvcr.io/nvidia/nemo:25.09", "gpus_per_node": 8, "mpi": "pmix"}),
    "pyxis_16_nodes": (
        16,
        8,
        {"container_image": "/images/mixtral recipes.sqsh", "mode": "pyxis", "gpus_per_node": 8, "retries": 2,
         "mounts": ("/data:/data:ro",), "env": {"NCCL_DEBUG": "INFO", "NOTE": "it's; #1"}},
    ),
    "apptainer_1_node": (1, 8, {"container_image": "/images/mixtral.sif", "gpus_per_node": 8}),
    "apptainer_4_nodes": (
        4, 8, {"container_image": "/images/mixtral.sif", "gpus_per_node": 8, "mounts": ("/data",), "exclusive": True,
               "sbatch": {"mail-type": "END", "comment": "two words"}, "qos": "high", "mem": "0"},
    ),
}  # fmt: skip


def script(name: str) -> str:
    """The script of one case, as the scheduler would write it."""
    nodes, nproc, settings = CASES[name]
    arguments = ("-m", "mixtral_recipes.executors.rank", "/shared/jobs/tune/configs/recipe.json")
    return render(
        Job("tune", "/shared/jobs/tune", nodes, nproc, arguments, folders=("/shared/runs",)),
        cluster(**SITE, **settings),
    )


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    path = GOLDEN / f"{name}.sh"
    if os.environ.get("MIXTRAL_RECIPES_WRITE_GOLDEN"):
        path.write_text(script(name))
    assert script(name) == path.read_text()


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.sh")), ids=lambda path: path.stem)
def test_golden_is_valid_bash(path: Path) -> None:
    assert path.stem in CASES
    subprocess.run(["bash", "-n", str(path)], check=True)
    if not shutil.which("shellcheck"):
        if os.environ.get("CI"):
            pytest.fail("shellcheck is not installed; CI needs it")
        pytest.skip("needs shellcheck: apt-get install shellcheck")
    checked = subprocess.run(["shellcheck", "--shell=bash", str(path)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_command_without_torchrun() -> None:
    text = render(
        Job("look", "/jobs/look", 1, 1, ("-m", "mixtral_recipes.cli.main", "recipes"), torchrun=False),
        cluster(venv="/v"),
    )
    assert "python -m mixtral_recipes.cli.main recipes" in text
    assert "torch.distributed.run" not in text


def test_secrets_file_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a'b $(id)")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    text = secrets_file(("HF_TOKEN", "WANDB_API_KEY"))
    shown = subprocess.run(["bash", "-c", f'{text}printf %s "$HF_TOKEN"'], capture_output=True, check=True)
    assert shown.stdout.decode() == "a'b $(id)"
    assert "WANDB" not in text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("08:00:00", 28800),
        ("1-0", 86400),
        ("1-12", 129600),
        ("2-00:30", 174600),
        ("1-01:01:01", 90061),
    ],
)
def test_time_limit(text: str, seconds: int) -> None:
    assert time_limit_s(text) == seconds


def test_time_limit_shorter_than_grace_is_refused() -> None:
    with pytest.raises(LaunchError, match="no time to train"):
        cluster(venv="/v", time="3", grace_s=120)


def test_mode_must_fit_the_image() -> None:
    with pytest.raises(LaunchError, match="container_image"):
        cluster(mode="pyxis", venv="/v")
    with pytest.raises(LaunchError, match="Did you mean 'pyxis'"):
        cluster(mode="pixis", container_image="x")
