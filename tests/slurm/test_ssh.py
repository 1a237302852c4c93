"""A laptop's way to a cluster: everything through a real sshd, behind which alone Slurm answers."""

import getpass
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from slurm_job import expected_loss
from slurm_site import Site, need

from mixtral_recipes.errors import LaunchError
from mixtral_recipes.executors.checks import check_cluster
from mixtral_recipes.executors.runs import records
from mixtral_recipes.executors.runs import states as runs
from mixtral_recipes.executors.slurm.executor import check_files_there
from mixtral_recipes.executors.slurm.profile import cluster

SSHD = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {root}/host_key
PidFile none
AuthorizedKeysFile {root}/key.pub
StrictModes no
UsePAM no
SetEnv SLURM_CONF={conf} HOME={root}/home
"""
#: What the wrapper below gives to ssh in place of ~/.ssh/config; `stranger` has a host key that nobody has seen.
SSH = """\
Host login stranger
    HostName 127.0.0.1
    Port {port}
    User {user}
    IdentityFile {root}/key
    UserKnownHostsFile {root}/known
    IdentitiesOnly yes
    StrictHostKeyChecking yes
Host login
    HostKeyAlias login
"""


@pytest.fixture
def login_node(plain: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Settings of a cluster behind ssh, whose login shell talks; this shell is on no login node."""
    need(ssh=True)
    (port,) = slurm_cluster.free_ports(1)
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    (tmp_path / "known").write_text("login " + (tmp_path / "host_key.pub").read_text())
    (tmp_path / "home").mkdir()
    for file in (".bashrc", ".bash_profile"):
        (tmp_path / "home" / file).write_text("echo Welcome; echo 'Quota: 7 %' >&2\n")
    values = {"port": port, "root": tmp_path, "user": getpass.getuser(), "conf": plain.cluster.conf}
    (tmp_path / "sshd_config").write_text(SSHD.format(**values))
    (tmp_path / "ssh_config").write_text(SSH.format(**values))
    wrapper = tmp_path / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {slurm_cluster.tool("ssh")} -F {tmp_path}/ssh_config "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_CONF")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # the service makes it when it starts
    command = [slurm_cluster.tool("sshd"), "-D", "-f", str(tmp_path / "sshd_config"), "-E", str(tmp_path / "sshd.log")]
    with subprocess.Popen(command) as sshd:
        try:
            slurm_cluster.wait_for((tmp_path / "sshd.log").exists, "sshd")
            yield {"ssh": "login", "job_dir": str(tmp_path / "jobs"), "venv": sys.prefix}
        finally:
            sshd.terminate()


def test_jobs_from_a_laptop(plain: Site, login_node: dict[str, str]) -> None:
    found = check_cluster(cluster(**login_node))
    assert [check.name for check in found if check.verdict == "bad"] == []
    long = plain.submit("far-long", 1, 1, settings=login_node, steps=100_000, step_s=0.2)
    record = plain.submit("far", 1, 1, settings=login_node, steps=3)
    assert record.ssh == "login"
    assert plain.wait(record) == "succeeded"
    assert runs.Watched(record).ended()
    assert runs.result(record) == {"recipe": "job", "steps": 3, "world_size": 1, "last_loss": expected_loss(3)}
    assert "rank 0 step 3" in plain.cli("logs", "far")[1]
    assert Path(record.remote_dir, "code/mixtral_recipes/cli").is_symlink()

    plain.wait_for_step("far-long", 1)
    assert plain.cli("cancel", long.id)[0] == 0
    assert plain.wait(long) == "cancelled"
    slurm_cluster.wait_for(lambda: "saved at step" in plain.cli("logs", long.id)[1], "the ranks to save")
    code, text = plain.cli("resume", long.id, "--json")
    assert code == 0
    again = records.find(long.id)
    assert again.job_id == json.loads(text.splitlines()[-1])["job_id"] != long.job_id
    assert plain.cli("cancel", long.id)[0] == 0
    assert plain.wait(again) == "cancelled"


def test_a_login_node_that_asks_is_refused(plain: Site, login_node: dict[str, str]) -> None:
    with pytest.raises(
        LaunchError, match=r"^login node stranger: .* `ssh stranger` must log in without asking anything"
    ):
        plain.submit("never", 1, 1, settings=login_node | {"ssh": "stranger"})
    assert not Path(login_node["job_dir"]).exists()


def test_files_of_the_laptop_are_not_on_the_cluster(plain: Site, login_node: dict[str, str], tmp_path: Path) -> None:
    import mixtral_recipes as llm

    recipe = llm.mixtral_tiny.finetune_recipe(name="far-data", dir="runs", num_gpus_per_node=1)
    recipe.data.dataset_root = str(tmp_path / "only_here.json")
    told = r"^data.dataset_root=.*only_here.json does not exist on login, where the job runs"
    with pytest.raises(LaunchError, match=told):
        check_files_there(plain.executor(1, 1, **login_node), recipe)
    (tmp_path / "only_here.json").touch()
    check_files_there(plain.executor(1, 1, **login_node), recipe)
