"""Commands on a login node: what is asked of ssh, and what comes back. ssh is played by a script."""

from pathlib import Path

import pytest

from mixtral_recipes.errors import LaunchError
from mixtral_recipes.executors.slurm import login


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that runs its last word here, as somebody whose login shell talks."""
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    script = f'printf "%s\\n" "$@" > {tmp_path}/asked; while shift; do l=${{1-$l}}; done; eval "$l"'
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)
    (tmp_path / ".bash_profile").write_text("echo Welcome; echo 'Quota: 7 %' >&2")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return program


def test_only_what_the_command_says_comes_back(ssh: Path) -> None:
    done = login.run("me@login", "cat; printf '\\0\\xff'; exit 3", stdin=b"given\n")
    assert (done.returncode, done.stdout) == (3, b"given\n\0\xff")


def test_ssh_is_asked_for_no_question_and_given_up_in_time(ssh: Path, tmp_path: Path) -> None:
    login.run(login.address("me@login:2222", "/keys/mine"), "true")
    words = (tmp_path / "asked").read_text().splitlines()
    assert {"BatchMode=yes", "ConnectTimeout=20"} <= set(words)
    assert words[-7:-1] == ["-p", "2222", "-i", "/keys/mine", "--", "me@login"]
    assert login.by_hand("me@login:2222#/keys/mine", "sinfo") == "ssh -p 2222 -i /keys/mine me@login sinfo"


def test_no_answer(ssh: Path) -> None:
    done = login.run("login", "exec sleep 60", timeout_s=0.1)
    assert (done.returncode in login.AWAY, done.stderr) == (True, b"login node login: no answer within 0 s")


def test_no_ssh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert login.run("login", "true").stderr == b"login node login: ssh is not installed here"


@pytest.mark.parametrize("name", ["-oProxyCommand=x", "me@-x", "a b", "login;x", "login:port"])
def test_what_is_no_name_of_a_login_node(name: str) -> None:
    with pytest.raises(LaunchError, match="is not a login node"):
        login.ssh(name)


def test_a_folder_arrives_with_its_links_and_modes(ssh: Path, tmp_path: Path) -> None:
    from mixtral_recipes.executors.slurm.tunnel import SSHTunnel

    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "secrets.env").touch(mode=0o600)
    (folder / "cli").symlink_to("../cli")
    tunnel = SSHTunnel(host="login", user="", job_dir="/jobs")
    tunnel.send(str(folder), str(tmp_path / "there" / "deeper"))
    arrived = tmp_path / "there" / "deeper" / "experiment"
    assert (arrived / "cli").readlink() == Path("../cli")
    assert (arrived / "secrets.env").stat().st_mode & 0o777 == 0o600
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match=r"^job files cannot be written to .*file/x: .*Not a directory\.$"):
        tunnel.send(str(folder), str(tmp_path / "file" / "x"))


def test_nemo_run_reads_a_job_of_ours_back_as_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_run.core.tunnel import client
    from nemo_run.run.torchx_backend.schedulers import slurm

    from mixtral_recipes.executors.slurm.scheduler import job_dirs
    from mixtral_recipes.executors.slurm.tunnel import SSHTunnel

    monkeypatch.setattr(slurm, "SLURM_JOB_DIRS", str(tmp_path / "jobs"))
    (tmp_path / "ours" / "configs").mkdir(parents=True)
    (tmp_path / "ours" / "sbatch.sh").touch()
    made = SSHTunnel(host="login", user="me", job_dir="/jobs", port=2222)
    slurm._save_job_dir("7", str(tmp_path / "ours"), made, "logs")
    theirs = client.SSHTunnel(host="login", user="me", job_dir="/jobs")
    slurm._save_job_dir("8", str(tmp_path / "theirs"), theirs, "logs")
    found = job_dirs()
    assert found["7"][1] == made
    assert type(found["8"][1]) is client.SSHTunnel
