"""Names, variables and paths that must never reach a shell as anything but themselves."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.errors import LaunchError
from mixtral_recipes.executors.names import check_env, check_name, check_path
from mixtral_recipes.executors.slurm.profile import cluster
from mixtral_recipes.executors.slurm.sbatch import Job, render

HOSTILE = [
    "n;touch X", "`touch X`", "$(touch X)", "a b", "a\nb", "a\ttouch X", "..", "../x", "a/../../x", "/etc/x", "-rf",
    "--wrap=id", "'", '"', "'; touch X; '", '"; touch X; "', "a&touch X", "a|touch X", "a>X", "a<X", "*", "?", "~root",
    "$HOME", "${IFS}x", "a\\", "#SBATCH", "", " ", ".", "..x", "a..b", "\x00", "a\rb", "é", "x" * 65, "!x", "{a,b}",
    "[a]", "a=b", "%j",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_name_is_refused(name: str) -> None:
    with pytest.raises(LaunchError, match="not allowed"):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "run-1", "mixtral_8x7b.finetune", "9", "A" * 64])
def test_plain_name_passes(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "path", ["relative", "/a b", "/a;b", "/a$(id)", "/a/../b", "/a\nb", "/a'b", "", "/a`id`", "/a*"]
)
def test_path_that_a_shell_would_change_is_refused(path: str) -> None:
    with pytest.raises(LaunchError):
        check_path(path, "job folder")


@pytest.mark.parametrize(
    "field", ["account", "partition", "qos", "constraint", "reservation", "mem", "mpi", "time", "ssh", "venv"]
)
@pytest.mark.parametrize("value", ["a;touch X", "$(touch X)", "a\n#SBATCH --wrap=id", "-x y", "`id`", "a b", "'"])
def test_hostile_cluster_setting_is_refused(field: str, value: str) -> None:
    with pytest.raises(LaunchError):
        cluster(**{field: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"sbatch": {"x; touch X": "1"}},
        {"sbatch": {"comment": "a\n#SBATCH --wrap=id"}},
        {"mounts": ("-x",)},
        {"modules": ("a\nb",)},
        {"srun_args": ("a\nb",)},
        {"container_image": "-x"},
        {"container_image": "a\nb"},
        {"env": {"A;touch X": "1"}},
        {"env": {"1A": "1"}},
        {"env": {"A": "a\0b"}},
        {"secrets": ("A;B",)},
    ],
)
def test_hostile_table_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(LaunchError, match=r"not allowed|NUL"):
        cluster(**settings)


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "GITHUB_TOKENS"])
def test_secret_in_env_is_refused(name: str) -> None:
    with pytest.raises(LaunchError, match="0600"):
        check_env({name: "value"})


@pytest.mark.parametrize("value", [text for text in HOSTILE if "\0" not in text])
def test_values_are_quoted_in_the_script(value: str, tmp_path: Path) -> None:
    site = cluster(env={"VALUE": value}, venv="/opt/venv", secrets=())
    script = render(Job("job", "/jobs/job", 1, 1, ("-m", "module", value)), site)
    lines = script.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("export VALUE="))
    stop = next(i for i, line in enumerate(lines) if line.startswith("export MIXTRAL_RECIPES_UMASK"))
    part = "\n".join(lines[start:stop]).replace('export MIXTRAL_RECIPES_ATTEMPT_DIR="$attempt"', "")
    shown = subprocess.run(["bash", "-c", f'{part}\nprintf %s "$VALUE"'], cwd=tmp_path, capture_output=True, check=True)
    assert shown.stdout.decode() == value
    assert not list(tmp_path.iterdir())
