"""Cluster profiles."""

import re
from pathlib import Path

import pytest

from mixtral_recipes.errors import LaunchError
from mixtral_recipes.executors.slurm.profile import cluster, profiles, settings_from

PROFILES = """
[big]
account = "research"
partition = "batch"
container_image = "nvcr.io/nvidia/nemo:25.09"
mounts = ["/data:/data"]
gpus_per_node = 8
env = {NCCL_DEBUG = "WARN"}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "clusters.toml"
    monkeypatch.setenv("MIXTRAL_RECIPES_CLUSTERS", str(path))
    return path


def test_profile_with_settings_over_it(file: Path) -> None:
    file.write_text(PROFILES)
    site = cluster("big", partition="short", account=None, env={"OMP_NUM_THREADS": "1"})
    assert (site.account, site.partition, site.mode) == ("research", "short", "pyxis")
    assert site.env == {"NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "1"}
    assert site.mounts == ("/data:/data",)


def test_no_file_means_no_profiles(file: Path) -> None:
    assert profiles() == {}
    with pytest.raises(LaunchError, match="no cluster 'big'"):
        cluster("big")


def test_unknown_name_and_key_give_the_nearest(file: Path) -> None:
    file.write_text(PROFILES)
    with pytest.raises(LaunchError, match="Did you mean 'big'"):
        cluster("bigg")
    with pytest.raises(LaunchError, match="Did you mean 'partition'"):
        cluster("big", partitoin="x")


@pytest.mark.parametrize("text", ["[big", "account = 'x'"])
def test_broken_file_is_named(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(LaunchError, match=r"clusters\.toml"):
        profiles()


def test_a_profile_that_cannot_be_used_is_in_no_other_ones_way(file: Path) -> None:
    file.write_text(f"{PROFILES}\n['a b']\naccount = 'x'\n")
    assert cluster("big").account == "research"
    with pytest.raises(LaunchError, match=r"clusters\.toml: cluster name 'a b' is not allowed"):
        cluster("a b")


def test_a_profile_with_a_value_that_is_not_allowed_is_named(file: Path) -> None:
    file.write_text('[far]\nssh = "me@x"\n')
    with pytest.raises(LaunchError, match=r"^cluster 'far': a cluster reached through ssh needs job_dir"):
        cluster("far")
    file.write_text("[far]\ntime = 3\n")
    with pytest.raises(LaunchError, match=f"^{re.escape(str(file))}: far"):
        cluster("far")
    with pytest.raises(LaunchError, match="env=5 is not allowed"):
        cluster(venv="/v", env=5)
    with pytest.raises(LaunchError, match=r"time='999.*; use minutes, HH:MM:SS or D-HH:MM:SS"):
        cluster(venv="/v", time="9" * 5000)


def test_ssh_needs_paths_over_there() -> None:
    with pytest.raises(LaunchError, match="job_dir"):
        cluster(ssh="me@login", venv="/v")
    assert cluster(ssh="me@login:2222", venv="/v", job_dir="/scratch/me").mode == "venv"


def test_where_runs_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    far = cluster(ssh="a-name-of-ssh-config", venv="/v", job_dir="/scratch/me")
    assert [str(far.folder(path)) for path in ("runs", "/data/runs")] == ["/scratch/me/runs", "/data/runs"]
    assert cluster(venv="/v").folder("runs") == tmp_path / "runs"


def test_settings_from_the_command_line() -> None:
    given = [
        "env.NCCL_DEBUG=a=b",
        "gpus_per_node=4",
        "exclusive=true",
        "gpus=true",
        "mounts=/a:/b,/c",
        "time=30",
        "sbatch.comment=x",
        "sbatch.hold=true",
    ]
    settings = settings_from(given)
    assert settings == {
        "env": {"NCCL_DEBUG": "a=b"}, "gpus_per_node": 4, "exclusive": True, "gpus": True, "mounts": ("/a:/b", "/c"),
        "time": "30", "sbatch": {"comment": "x", "hold": True},
    }  # fmt: skip
    assert cluster(**settings, venv="/v").mounts == ("/a:/b", "/c")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partion=x", "Did you mean 'partition'"),
        ("time", "has no value"),
        ("env=x", r"use env\.NAME=value"),
        ("env.=x", r"use env\.NAME=value"),
        ("time.x=1", "use time=value"),
        ("cpus_per_node=-1", "whole number"),
        ("gpus=some", "true or false"),
        ("exclusive=1", "true or false"),
        ("name=x", "does not name a setting"),
    ],
)
def test_setting_that_does_not_fit_is_refused(text: str, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        settings_from([text])


@pytest.mark.parametrize("value", ["a,b", "1.5T", "10 G", "-1"])
def test_a_size_of_memory_that_slurm_does_not_know_is_refused(value: str) -> None:
    for known in ("0", "64000", "900G", "2t", "64GB"):
        assert cluster(venv="/v", mem=known).mem == known
    with pytest.raises(LaunchError, match=f"mem={value!r} is not allowed; use a whole number with K, M, G or T"):
        cluster(venv="/v", mem=value)


@pytest.mark.parametrize("value", [-1, "-1", "h100:", "8 ", "gpu:h100:8", True, "8;id"])
def test_a_count_of_gpus_that_slurm_does_not_know_is_refused(value: object) -> None:
    with pytest.raises(LaunchError, match="gpus_per_node"):
        cluster(venv="/v", gpus_per_node=value)
