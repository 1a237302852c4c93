"""Sbatch scripts, the golden ones among them.

To rewrite those: MIXTRAL_RECIPES_WRITE_GOLDEN=1 pytest tests/unit/executors/slurm/test_sbatch.py
"""

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
         "mounts": ("/data:/data:ro",), "env": {"NCCL_DEBUG": "INFO", "WANDB_NOTES": "it's; #1"}},
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


def lines_of(**settings: Any) -> list[str]:
    """The script of a job with these settings, line by line."""
    image = {} if "container_image" in settings else {"venv": "/v"}
    return render(Job("tune", "/jobs/tune", 2, 8, ("-m", "module")), cluster(**image, **settings)).splitlines()


def test_a_backslash_reaches_sbatch() -> None:
    """Which takes one in a header for an escape, between quotes too."""
    assert r"#SBATCH --comment='a\\b'" in lines_of(sbatch={"comment": r"a\b"})


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({"gpus_per_node": 8}, ["#SBATCH --gpus-per-node=8"]),
        ({"gpus_per_node": "h100:8"}, ["#SBATCH --gpus-per-node=h100:8"]),
        ({"gres": "gpu:h100:8"}, ["#SBATCH --gres=gpu:h100:8"]),
        ({"gpus_per_node": 0, "sbatch": {"gres": "gpu:h100:8"}}, ["#SBATCH --gres=gpu:h100:8"]),
        ({"sbatch": {"gpus-per-task": "8"}}, ["#SBATCH --gpus-per-task=8"]),
        ({"sbatch": {"tres-per-task": "gres/gpu:8"}}, ["#SBATCH --tres-per-task=gres/gpu:8"]),
        ({"gpus_per_node": 0, "gpus": True}, []),
    ],
)
def test_a_job_with_gpus_however_they_are_asked_for(settings: dict[str, Any], asked: list[str]) -> None:
    lines = lines_of(container_image="/i.sif", **settings)
    assert [line for line in lines if "gpu" in line and line.startswith("#SBATCH")] == asked
    assert any("apptainer exec --nv " in line for line in lines)
    assert "export TORCH_NCCL_AVOID_RECORD_STREAMS=1" in lines
    assert any("NCCL_IB_DISABLE" in line for line in lines)


@pytest.mark.parametrize(
    "settings", [{}, {"gpus_per_node": 0}, {"gres": "lscratch:100"}, {"gres": "gpu:8", "gpus": False}]
)
def test_a_job_without_gpus(settings: dict[str, Any]) -> None:
    lines = lines_of(container_image="/i.sif", **settings)
    assert not any("--nv" in line or "CUDA" in line or "NCCL" in line or "gpus-per-node" in line for line in lines)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, ["#SBATCH --gpus-per-node=8"]),
        ({"gpus_per_node": 4}, ["#SBATCH --gpus-per-node=4"]),
        ({"gpus_per_node": 0}, []),
        ({"gres": "gpu:h100:8"}, ["#SBATCH --gres=gpu:h100:8"]),
        ({"sbatch": {"gpus": "16"}}, ["#SBATCH --gpus=16"]),
    ],
)
def test_a_recipe_for_gpus_asks_where_nothing_else_does(settings: dict[str, Any], wanted: list[str]) -> None:
    site = cluster(venv="/v", **settings).for_gpus(8)
    lines = render(Job("tune", "/jobs/tune", 2, 8, ("-m", "module")), site).splitlines()
    assert [line for line in lines if "gpu" in line and line.startswith("#SBATCH")] == wanted
    assert "export TORCH_NCCL_AVOID_RECORD_STREAMS=1" in lines


def test_asking_twice_is_refused() -> None:
    with pytest.raises(LaunchError, match=r"gpus_per_node and sbatch\.gres both ask"):
        cluster(venv="/v", gpus_per_node=8, sbatch={"gres": "gpu:8"})


@pytest.mark.parametrize("text", ["h100&ib", "[rack1|rack2]", "(a|b)&c", "[a*2&b*4]", "h100,nvlink", "hbm=80"])
def test_constraints_are_slurms_and_quoted(text: str) -> None:
    (line,) = [line for line in lines_of(constraint=text) if "--constraint" in line]
    option = line.removeprefix("#SBATCH ")
    shown = subprocess.run(["bash", "-c", f"printf %s {option}"], capture_output=True, check=True)
    assert shown.stdout.decode() == f"--constraint={text}"


@pytest.mark.parametrize(
    "key",
    ["export", "output", "open-mode", "signal", "requeue", "no-requeue", "nodes", "time", "wrap", "outp", "sig", "o"],
)
def test_a_line_the_script_relies_on_is_not_replaced(key: str) -> None:
    with pytest.raises(LaunchError, match=f"sbatch line {key} is not allowed"):
        cluster(venv="/v", sbatch={key: "x"})


@pytest.mark.parametrize(
    "flags",
    [
        ("--output=/x",),
        ("--outp=/x",),
        ("-o", "/x"),
        ("--wait=0",),
        ("-N2",),
        ("true",),
        ("--mpi=pmix", "true"),
        ("--",),
    ],
)
def test_srun_is_told_nothing_that_the_script_tells_it(flags: tuple[str, ...]) -> None:
    with pytest.raises(LaunchError, match=r"srun_args entry .* is not allowed"):
        cluster(venv="/v", srun_args=flags)


def test_srun_takes_any_other_option() -> None:
    flags = ("--cpu-bind=cores", "--cpu-bind", "none", "-v", "--gres-flags=enforce-binding")
    assert cluster(venv="/v", srun_args=flags).srun_args == flags


def test_env_file_is_passed_in_the_secrets_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "from the shell")
    file = tmp_path / "job.env"
    file.write_text("# mine\nexport GITHUB_PAT='s3c r3t'\nDB_PASS=a=b$(id)\n\nHF_TOKEN=from the file\n")
    file.chmod(0o640)
    with pytest.raises(LaunchError, match="chmod 600"):
        secrets_file((), str(file))
    file.chmod(0o600)
    text = secrets_file(("HF_TOKEN",), str(file))
    show = 'printf %s "$GITHUB_PAT|$DB_PASS|$HF_TOKEN"'
    shown = subprocess.run(["bash", "-c", text + show], capture_output=True, check=True)
    assert shown.stdout.decode() == "s3c r3t|a=b$(id)|from the shell"
    lines = lines_of(env_file=str(file), secrets=())
    assert any("secrets.env" in line for line in lines)
    assert not any("s3c" in line for line in lines)
    file.write_text("GITHUB_PAT s3cr3t\n")
    with pytest.raises(LaunchError, match="line 1") as refused:
        secrets_file((), str(file))
    assert "s3cr3t" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("UNLIMITED", 0),
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
