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
    "field", ["account", "partition", "qos", "constraint", "reservation", "mem", "mpi", "time", "ssh", "venv", "gres"]
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
        {"env": {"TZ": "a\0b"}},
        {"secrets": ("A;B",)},
    ],
)
def test_hostile_table_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(LaunchError, match=r"not allowed|NUL"):
        cluster(**settings)


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "GITHUB_PAT", "OPENAI_KEY",
     "DB_PASS", "PGPASSWORD",     "MYSQL_PWD", "SLURM_JWT", "APPTAINER_DOCKER_PASSWORD",
     "NETRC", "my_setting", "AZURE_SAS", "NCCL_AUTH_TOKEN",
     "TORCH_KEY",     "HF_HUB_TOKEN", "SSH_AUTH_SOCK", "PYTHONSTARTUP", "CUDA"],
)  # fmt: skip
def test_a_variable_that_is_not_known_to_be_harmless_is_refused(name: str) -> None:
    with pytest.raises(LaunchError, match="0600") as refused:
        check_env({name: "s3cr3t"})
    assert "s3cr3t" not in str(refused.value)


@pytest.mark.parametrize(
    "name",
    ["NCCL_DEBUG", "NCCL_IB_PKEY", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "HF_HOME",
     "TORCH_NCCL_ASYNC_ERROR_HANDLING", "NVTE_FUSED_ATTN", "TOKENIZERS_PARALLELISM", "https_proxy", "LC_ALL"],
)  # fmt: skip
def test_known_settings_pass(name: str) -> None:
    assert check_env({name: "1"}) == {name: "1"}


@pytest.mark.parametrize(
    "settings",
    [
        {"env": {"HTTPS_PROXY": "http://me:s3cr3t@proxy:3128"}},
        {"env": {"HF_ENDPOINT": "https://s3cr3ts3cr3ts3cr3ts3cr3t@mirror"}},
        {"sbatch": {"comment": "see https://me:s3cr3t@wiki"}},
        {"sbatch": {"export": "ALL,GITHUB_PAT=s3cr3t"}},
        {"srun_args": ("--export=ALL,GITHUB_PAT=s3cr3t",)},
        {"srun_args": ("--container-image=docker://me:s3cr3t@registry/image",)},
        {"container_image": "docker://me:s3cr3t@registry/image"},
    ],
)
def test_a_password_on_its_way_into_the_script_is_refused_and_not_repeated(settings: dict[str, Any]) -> None:
    with pytest.raises(LaunchError) as refused:
        cluster(**settings)
    assert "s3cr3t" not in str(refused.value)


@pytest.mark.parametrize("value", [text for text in HOSTILE if "\0" not in text])
def test_values_are_quoted_in_the_script(value: str, tmp_path: Path) -> None:
    site = cluster(env={"NCCL_VALUE": value}, venv="/opt/venv", secrets=())
    script = render(Job("job", "/jobs/job", 1, 1, ("-m", "module", value)), site)
    lines = script.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("export NCCL_VALUE="))
    stop = next(i for i, line in enumerate(lines) if line.startswith("export MIXTRAL_RECIPES_UMASK"))
    part = "\n".join(lines[start:stop]).replace('export MIXTRAL_RECIPES_ATTEMPT_DIR="$attempt"', "")
    shown = subprocess.run(
        ["bash", "-c", f'{part}\nprintf %s "$NCCL_VALUE"'], cwd=tmp_path, capture_output=True, check=True
    )
    assert shown.stdout.decode() == value
    assert not list(tmp_path.iterdir())
