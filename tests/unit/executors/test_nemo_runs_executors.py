"""nemo_run's executors with our recipes: each starts the recipe's ranks, or is refused before anything is sent."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nemo_run as run
import pytest
from invoke.exceptions import UnexpectedExit
from invoke.runners import Result

import mixtral_recipes as llm
from mixtral_recipes.errors import CheckpointError, LaunchError, Preempted
from mixtral_recipes.executors import nemo_run_jobs
from mixtral_recipes.executors.nemo_run_jobs import check
from mixtral_recipes.executors.runs import records
from mixtral_recipes.executors.slurm.executor import slurm_executor


def slurm(**settings: Any) -> run.SlurmExecutor:
    return run.SlurmExecutor(**{"account": "a", "packager": run.Packager()} | settings)


def lepton(nodes: int) -> run.LeptonExecutor:
    return run.LeptonExecutor(
        container_image="i", nemo_run_dir="/d", nodes=nodes, gpus_per_node=2, packager=run.Packager()
    )


def recipe(nodes: int = 1) -> Any:
    made = llm.mixtral_tiny.finetune_recipe(num_nodes=nodes, num_gpus_per_node=2)
    made.data.global_batch_size = 64
    return made


@pytest.mark.parametrize("setting", ["path", "adapter_path"])
@pytest.mark.parametrize("start", ["first", "runs/first", "runs/first/checkpoints/latest"])
def test_a_recipe_may_start_from_the_run_before_it(
    start: str, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    (tmp_path / "runs").mkdir()
    first, second = recipe(), recipe()
    first.log.name = "first"
    setattr(second.resume.restore_config, setting, start)
    with pytest.raises((CheckpointError, LaunchError)):
        check(second, run.LocalExecutor())
    with pytest.raises((CheckpointError, LaunchError)):
        check(second, run.LocalExecutor(), [run.Script(inline="true"), recipe()])
    task, _ = check(second, run.LocalExecutor(), [first])
    assert getattr(task.resume.restore_config, setting) == start  # its process looks which checkpoint there is then


@pytest.mark.parametrize("ssh", [{}, {"ssh": "login", "job_dir": "/scratch/me", "venv": "/v"}], ids=["here", "ssh"])
def test_a_slurm_job_is_given_full_paths(ssh: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    root = Path("/scratch/me") if ssh else tmp_path
    (tmp_path / "my.json").write_text('{"data": []}')
    first, by_name, by_place = recipe(), recipe(), recipe()
    first.log.name, first.data.dataset_root = "first", "my.json"
    by_name.resume.restore_config.path = "first"
    by_place.resume.restore_config.path = "runs/first/checkpoints/latest"
    earlier, _ = check(first, slurm_executor(1, 2, **ssh))
    assert (earlier.log.log_dir, earlier.data.dataset_root) == (str(root / "runs"), str(root / "my.json"))
    assert (first.log.log_dir, first.data.dataset_root) == (None, "my.json")
    starts = [
        check(made, slurm_executor(1, 2, **ssh), [earlier])[0].resume.restore_config for made in (by_name, by_place)
    ]
    assert [start.path for start in starts] == [f"{root}/runs/first", f"{root}/runs/first/checkpoints/latest"]


def test_what_sbatch_refuses_is_a_line() -> None:
    refusal = Result(command="sbatch --parsable x.sh", exited=1, stderr="sbatch: error: a\nsbatch: fatal: b\n")

    def submit(_: Any) -> None:
        raise UnexpectedExit(refusal)

    ran, job = functools.partial(nemo_run_jobs._single_node, submit), SimpleNamespace(executor=slurm())
    with pytest.raises(LaunchError, match=r"^the job was not submitted: fatal: b\.$"):
        ran(SimpleNamespace(jobs=[SimpleNamespace(task=recipe(), **vars(job))]))
    with pytest.raises(UnexpectedExit):  # whose jobs `submit` takes out of the queue again
        ran(SimpleNamespace(jobs=[SimpleNamespace(task=run.Script(inline="true"), **vars(job))]))


def test_a_refused_job_leaves_no_secrets(tmp_path: Path) -> None:
    def submit(_: Any) -> None:
        raise UnexpectedExit(Result(command="sbatch", exited=1, stderr="sbatch: error: invalid account\n"))

    jobs = [SimpleNamespace(task=recipe(), executor=slurm_executor(1, 2, venv="/v"), dependencies=()) for _ in range(2)]
    for number, job in enumerate(jobs):
        job.executor.job_dir = str(tmp_path / str(number))
        Path(job.executor.job_dir).mkdir()
        Path(job.executor.job_dir, "secrets.env").touch()
    jobs[0].handle = "slurm://session/1"  # this one was queued
    with pytest.raises(LaunchError, match=r"^the job was not submitted: invalid account\.$"):
        nemo_run_jobs._single_node(submit, SimpleNamespace(jobs=jobs))
    assert [Path(job.executor.job_dir, "secrets.env").exists() for job in jobs] == [True, False]


@pytest.mark.parametrize(
    ("make", "nodes", "launcher"),
    [
        (run.LocalExecutor, 1, None),
        (lambda: run.LocalExecutor(ntasks_per_node=2, launcher="torchrun"), 1, "torchrun"),
        (slurm, 1, None),  # one process, which starts the ranks
        (lambda: slurm(ntasks_per_node=2), 1, "torchrun"),
        (lambda: slurm(nodes=2, ntasks_per_node=2), 2, "torchrun"),
        (lambda: slurm(ntasks_per_node=2, launcher="ft"), 1, "ft"),
        (lambda: slurm_executor(2, 2), 2, None),  # its script has torchrun
        (lambda: run.DockerExecutor(container_image="i", packager=run.Packager()), 1, None),
        (lambda: lepton(1), 1, None),
        (lambda: lepton(2), 2, "torchrun"),
    ],
)
def test_ranks_are_started(make: Callable[[], Any], nodes: int, launcher: str | None) -> None:
    given = make()
    _, executor = check(recipe(nodes), given)
    assert executor.launcher == launcher
    assert given.launcher == make().launcher  # the caller's own is not changed


def test_and_so_are_those_of_a_task_without_a_trainer() -> None:
    task = run.Partial(llm.generate, path="model", prompts=["Where?"])
    assert check(task, slurm(ntasks_per_node=2))[1].launcher == "torchrun"  # else each process is a job of its own
    assert check(task, slurm())[1].launcher is None
    assert check(task, run.LocalExecutor(ntasks_per_node=2))[1].launcher is None


@pytest.mark.parametrize(
    "executor",
    [
        run.LocalExecutor(ntasks_per_node=4, launcher="torchrun"),
        slurm(ntasks_per_node=4),
        slurm(nodes=2, ntasks_per_node=2, launcher="torchrun"),
        slurm_executor(1, 4),
        lepton(2),
    ],
)
def test_another_number_of_ranks_is_refused(executor: Any) -> None:
    with pytest.raises(LaunchError, match=r"devices is 1 x 2, but the \w+Executor starts (1 x 4|2 x 2) process"):
        check(recipe(), executor)


def test_a_commit_is_packed_only_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    executor = slurm(packager=run.GitArchivePackager())
    with pytest.raises(LaunchError, match=r"packs the newest git commit .* has none; use packager=run.Packager"):
        check(recipe(), executor)
    check(recipe(), run.LocalExecutor(packager=run.GitArchivePackager()))  # packs nothing
    subprocess.run(["git", "init", "-q"], check=True)
    with pytest.raises(LaunchError):
        check(recipe(), executor)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, "commit", "-q", "--allow-empty", "-m", "a"], check=True)
    check(recipe(), executor)


def test_what_is_not_a_recipe_is_left_alone() -> None:
    script, executor = run.Script(inline="true"), slurm(ntasks_per_node=4, packager=run.GitArchivePackager())
    assert check(script, executor) == (script, executor)


@pytest.mark.parametrize("many", [False, True])
def test_the_tasks_of_a_group_get_their_ranks(many: bool, tmp_path: Path) -> None:
    given = [slurm(ntasks_per_node=2), slurm(ntasks_per_node=2)] if many else slurm(ntasks_per_node=2)
    with run.Experiment("group", base_dir=str(tmp_path)) as experiment:
        experiment.add([recipe(), recipe()], executor=given, name="both")
        executor: Any = experiment.jobs[0].executors  # type: ignore[union-attr]
    assert executor.launcher == "torchrun"
    assert len(executor.resource_group) == (2 if many else 0)


@pytest.mark.parametrize(
    ("executor", "told"),
    [
        (lambda: slurm(ntasks_per_node=4), r"devices is 1 x 2, but the SlurmExecutor starts 1 x 4"),
        (lambda: [slurm(ntasks_per_node=2), slurm(ntasks_per_node=4)], r"devices is 1 x 2, but .* starts 1 x 4"),
        (lambda: [slurm()] * 3, r"^3 executors for 2 tasks; use one for all, or one for each\.$"),
        (lambda: slurm_executor(1, 2), r"^a slurm_executor starts one task per job, .*: add each one separately"),
    ],
)
def test_a_group_that_could_not_run_is_refused(executor: Callable[[], Any], told: str, tmp_path: Path) -> None:
    with run.Experiment("group", base_dir=str(tmp_path)) as experiment, pytest.raises(LaunchError, match=told):
        experiment.add([recipe(), recipe()], executor=executor(), name="both")


def test_a_job_that_a_script_submits_is_among_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys.modules["nemo_run.run.job"], "launch", lambda **_: ("slurm_tunnel://nemo_run/7", None))
    made = recipe(2)
    made.log.log_dir, made.log.name = str(tmp_path), "mine"
    with run.Experiment("one", base_dir=str(tmp_path)) as experiment:
        experiment.add(made, executor=slurm_executor(2, 2, partition="p"), name="task")
        (job,) = experiment.jobs
        job._executable = object()  # type: ignore[union-attr]
        job.launch(wait=False, runner=None, dryrun=True)  # type: ignore[arg-type]
        assert records.all_records() == []
        job.launch(wait=False, runner=None)  # type: ignore[arg-type]
    record = records.find("mine")
    assert (record.executor, record.recipe, record.job_id) == ("slurm", "finetune", "7")
    assert (record.nodes, record.nproc_per_node) == (2, 2)
    assert (record.run_dir, record.job_dir) == (str(tmp_path / "mine"), job.executor.job_dir)


def test_a_job_that_was_asked_to_stop_has_not_failed() -> None:
    """Its ranks save and end well; torchrun, which passed the signal on, fails."""
    message = {"message": "SignalException: Process 7 got signal: 15", "extraInfo": {"timestamp": "0"}}
    app = SimpleNamespace(
        state=SimpleNamespace(name="FAILED"), get_structured_error_msg=lambda: json.dumps({"message": message})
    )
    with pytest.raises(Preempted, match="job tune: asked to stop; its log says what it saved"):
        nemo_run_jobs._raise_for(app, SimpleNamespace(id="tune"))
