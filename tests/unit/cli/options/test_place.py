"""Where a job runs: the options for Slurm as they are typed, down to the script that is submitted."""

import gc
import json
import re
from pathlib import Path

import pytest

from mixtral_recipes.cli import main
from mixtral_recipes.cli.options.place import ExecutorName, PlaceOptions
from mixtral_recipes.errors import LaunchError, MixtralRecipesWarning

# option -> the line of the script that would be missing without it
IN_THE_SCRIPT = {
    "--account research": "#SBATCH --account=research",
    "--partition batch": "#SBATCH --partition=batch",
    "--time 01:30:00": "#SBATCH --time=01:30:00",
    "--retries 7": "preempted and lost jobs run again, failed ones 7 time(s)",
    "--slurm qos=fast": "#SBATCH --qos=fast",
    "--slurm env.NCCL_DEBUG=INFO": "export NCCL_DEBUG=INFO",
    "--num-nodes 2": "#SBATCH --nodes=2",
    "--num-gpus-per-node 4": "--nproc-per-node=4",
    "--name mine": "#SBATCH --job-name=mine",
    "--cluster big": "#SBATCH --constraint=h100",
}


FAR = '[far]\nssh = "me@login"\njob_dir = "/scratch/me"\nvenv = "/scratch/me/venv"\n'


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profiles = tmp_path / "clusters.toml"
    profiles.write_text('[big]\nconstraint = "h100"\n' + FAR)
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MIXTRAL_RECIPES_CLUSTERS", str(profiles))
    monkeypatch.delenv("NEMORUN_HOME", raising=False)
    monkeypatch.chdir(tmp_path)


def script(options: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What `finetune --executor slurm OPTIONS --dry-run` would submit."""
    line = f"finetune --recipe mixtral_tiny data.micro_batch_size=4 --executor slurm {options} --dry-run --json"
    assert main.run(line.split()) == 0
    gc.collect()  # what nemo_run leaves open is warned about here, not in the test that comes next
    return json.loads(capsys.readouterr().out.splitlines()[-1])["script"]


@pytest.mark.filterwarnings("ignore")
def test_every_option_reaches_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    given, bare = script(" ".join(IN_THE_SCRIPT), capsys), script("", capsys)
    assert [option for option, line in IN_THE_SCRIPT.items() if line not in given] == []
    assert [option for option, line in IN_THE_SCRIPT.items() if line in bare] == []


def test_processes_per_node_have_two_names() -> None:
    assert PlaceOptions(num_gpus_per_node=4).sizes == PlaceOptions(nproc_per_node=4).sizes == {"num_gpus_per_node": 4}
    assert PlaceOptions(num_nodes=2).sizes == {"num_nodes": 2}


@pytest.mark.parametrize(
    "option",
    ["--account x", "--partition x", "--time 01:00:00", "--retries 0", "--cluster x", "--slurm qos=x", "--detach"],
)
@pytest.mark.parametrize("executor", ["local", "direct"])
def test_an_option_for_slurm_alone_is_refused_elsewhere(
    option: str, executor: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["pretrain", "--executor", executor, *option.split()]) == 2
    name = option.split()[0]
    said = f"error: {name}: no effect with --executor {executor}; use --executor slurm.\n"
    assert capsys.readouterr().err == said


def test_what_was_given_is_set_over_the_profile() -> None:
    options = PlaceOptions(ExecutorName.slurm, cluster="big", account="a", retries=0, slurm=["mem=8G"])
    assert options.over_profile() == {"account": "a", "retries": 0, "mem": "8G"}
    with pytest.raises(LaunchError, match="--account, --retries, --slurm: no effect with --executor local"):
        PlaceOptions(account="a", retries=0, slurm=["mem=8G"]).over_profile()


def test_a_dry_run_says_that_the_run_has_no_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    line = ["finetune", "--recipe", "mixtral_tiny", "--dir", str(tmp_path / "file"), "--name", "a", "--dry-run"]
    assert main.run(line) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/file/a cannot be created: {tmp_path}/file is a file; "
        "choose a folder that you can write to.\n"
    )


@pytest.mark.filterwarnings("ignore")
def test_behind_ssh_a_run_goes_below_the_job_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "some.jsonl").write_text('{"prompt": "Which?", "completion": "That."}\n' * 3)
    line = "finetune --recipe mixtral_tiny --name mine --executor slurm --cluster far --dry-run --json"
    with pytest.warns(MixtralRecipesWarning, match="It must be available where the job runs"):
        assert main.run([*line.split(), "--data", "some.jsonl", "data.dataset_root=/scratch/me/all.jsonl"]) == 0
    gc.collect()
    said = capsys.readouterr().out
    assert json.loads(said.splitlines()[-1])["run_dir"] == "/scratch/me/runs/mine"
    assert "dataset_root: /scratch/me/all.jsonl" in said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--cluster far --data there.jsonl", "there.jsonl: .* set data.dataset_root=PATH .* its path on me@login"),
        ("--cluster far --export", "--export: the model will be on me@login; leave it out"),
        ("--evaluate 5", "--evaluate asks held-out questions on this machine"),
        ("--detach --export", "--export: --detach does not wait for the model; leave it out"),
    ],
)
def test_what_a_job_elsewhere_cannot_do_is_refused(options: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["finetune", "--recipe", "mixtral_tiny", "--executor", "slurm", *options.split()]) == 2
    assert re.search(told, capsys.readouterr().err)
