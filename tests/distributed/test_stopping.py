"""Every way a run can be stopped ends as it should, and in bounded time."""

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_recipes.checkpoints import save as saving
from mixtral_recipes.errors import EnvironmentProblem, Preempted, RecipeError
from mixtral_recipes.training import step
from mixtral_recipes.training.guards.watchdog import Watchdog
from tests.distributed.harness import RankFailed, launch
from tests.distributed.tiny_job import AtStep, Job, checkpoints_of, kill_self_after, metrics_of, silent, start

EP2 = {"expert_model_parallel_size": 2}


def outcome(job: Job, *callbacks: Any) -> str:
    """How a run ended on this rank: its error, or "done"."""
    with silent():
        try:
            start(job, *callbacks)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "done"


def nan_loss_on_one_rank(job: Job, steps: list[int]) -> str:
    """Make one rank's loss NaN at some steps."""
    original = step.sum_losses
    now = [0]

    class Count:
        def on_step_start(self, run: Any, number: int) -> None:
            now[0] = number

    def poisoned(*args: Any) -> Any:
        total, count, sums = original(*args)
        if now[0] in steps and torch.distributed.get_rank() == 1 and total.requires_grad:
            sums = sums.clone()
            sums[0] = torch.nan
            total = total * torch.nan
        return total, count, sums

    step.sum_losses = poisoned
    try:
        return outcome(job, Count())
    finally:
        step.sum_losses = original


def test_nan_stops_before_the_update_and_names_rank_and_checkpoint(tmp_path: Path) -> None:
    job = Job(str(tmp_path), steps=9, every=5, layout=EP2, asynchronous=True, report=True)
    for end in launch(2, nan_loss_on_one_rank, job, [7]):
        assert end.startswith("RecipeError: step 7: the loss is nan on rank 1; nothing was updated.")
        assert str(checkpoints_of(job)[-1]) in end
    assert [int(path.name.split("-")[-2]) for path in checkpoints_of(job)] == [5]
    assert metrics_of(job, "end")[-1]["error"].startswith("RecipeError: step 7")
    assert (job.run_dir / "report.html").is_file()


def test_nan_is_skipped_and_counted_when_allowed(tmp_path: Path) -> None:
    job = Job(str(tmp_path), steps=5, layout=EP2, trainer={"max_skipped_steps": 2})
    assert launch(2, nan_loss_on_one_rank, job, [2, 4]) == ["done", "done"]
    steps = metrics_of(job, "train")
    assert [entry["skipped_steps"] for entry in steps] == [0, 1, 1, 2, 2]
    assert [entry["updated"] for entry in steps] == [True, False, True, False, True]
    assert launch(2, nan_loss_on_one_rank, dataclasses.replace(job, steps=7), [6])[0].startswith(
        "RecipeError: step 6: the loss is nan on rank 1; nothing was updated. 2 step(s) had already been skipped."
    ), "the count is kept in the checkpoint"


def infinite_gradient(job: Job) -> tuple[str, bool]:
    """Put an infinity into one gradient of rank 0; how it ended, and whether the weights stayed."""
    seen: dict[str, Any] = {}

    def poison(run: Any) -> None:
        parameter = run.model[0].decoder.final_layernorm.weight
        seen["parameter"], seen["before"] = parameter, parameter.detach().clone()
        parameter.register_hook(lambda gradient: gradient * torch.inf)

    end = outcome(job, AtStep(2, 0, poison))
    return end, "parameter" not in seen or torch.equal(seen["parameter"], seen["before"])


def test_an_infinite_gradient_never_reaches_the_weights(tmp_path: Path) -> None:
    ends = launch(2, infinite_gradient, Job(str(tmp_path), steps=4, layout=EP2))
    for end, stayed in ends:
        assert end.startswith("RecipeError: step 2: the gradient norm is")
        assert "final_layernorm.weight" in end
        assert stayed


def signalled(job: Job, name: str, when: str) -> tuple[str, float]:
    """Send this process a signal on one rank, in the middle of a step or of a save."""
    sent = [0.0]

    def send() -> None:
        sent[0] = time.monotonic()
        os.kill(os.getpid(), getattr(signal, name))

    if when == "step":
        callback = AtStep(2, 1, lambda run: threading.Timer(0.02, send).start())
        end = outcome(job, callback)
    else:
        original = saving.write_file
        me = torch.distributed.get_rank()

        def slow(*args: Any) -> Any:
            if me == 1 and not sent[0]:
                send()
                time.sleep(0.3)
            return original(*args)

        saving.write_file = slow
        end = outcome(job)
        saving.write_file = original
    return end, time.monotonic() - sent[0] if sent[0] else 0.0


@pytest.mark.parametrize(
    ("name", "when", "asynchronous"),
    [("SIGTERM", "step", False), ("SIGUSR1", "step", True), ("SIGTERM", "save", True), ("SIGINT", "save", False)],
)
def test_a_signal_leads_to_a_save_and_to_leaving(tmp_path: Path, name: str, when: str, asynchronous: bool) -> None:
    job = Job(str(tmp_path), steps=50, every=2, layout=EP2, asynchronous=asynchronous)
    for end, _ in launch(2, signalled, job, name, when):
        assert end.startswith("Preempted: stopped by ")
        assert "saved" in end
    made = len(metrics_of(job, "train"))
    assert made <= 4, "it went on for more than the step the signal came in"
    assert f"-{made}-" in checkpoints_of(job)[-1].name
    assert launch(2, outcome, dataclasses.replace(job, steps=made + 1)) == ["done", "done"]
    assert len(metrics_of(job, "train")) == made + 1


def asleep(job: Job) -> str:
    """One rank sleeps where the others wait for it, and is found to hang some seconds before them."""
    sleeper = torch.distributed.get_rank() == 1
    sign_of_life = Watchdog.alive

    def older(watchdog: Watchdog, doing: str) -> None:
        sign_of_life(watchdog, doing)
        watchdog._last -= 3.0 * sleeper

    Watchdog.alive = older
    return outcome(job, AtStep(2, 1, lambda run: time.sleep(600)))


def test_a_rank_asleep_ends_all_with_their_stacks(tmp_path: Path) -> None:
    job = Job(str(tmp_path), steps=4, layout=EP2, trainer={"hang_timeout_seconds": 12.0})
    started = time.monotonic()
    with pytest.raises(RankFailed, match="died without a word"):  # the watchdog ends the process
        launch(2, asleep, job)
    assert time.monotonic() - started < 120
    # The first to end leaves only when the other has written where it waited.
    stacks = [(job.run_dir / "stacks" / f"rank-{rank}.txt").read_text() for rank in range(2)]
    assert "train_step" in stacks[0]
    assert "in asleep" in stacks[1] or "<lambda>" in stacks[1]
    assert all("no progress for" in stack for stack in stacks)


def dies(job: Job) -> str:
    """One rank dies; the others notice."""
    return outcome(job, AtStep(2, 1, lambda run: os.kill(os.getpid(), signal.SIGKILL)))


def test_a_rank_that_dies_ends_the_others(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(RankFailed):
        launch(2, dies, Job(str(tmp_path), steps=4, layout=EP2, trainer={"hang_timeout_seconds": 20.0}))
    assert time.monotonic() - started < 90


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs to be root and allowed to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


SMALL = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 16, "num_moe_experts": 2}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_keeps_the_last_checkpoint(small_disk: Path, asynchronous: bool) -> None:
    job = Job(str(small_disk), steps=9, every=1, model=SMALL, asynchronous=asynchronous, ckpt={"save_top_k": 3})
    (end,) = launch(1, outcome, job)
    assert end.startswith("EnvironmentProblem: ")
    assert " missing; free some space" in end
    (kept,) = checkpoints_of(job)
    assert f"The run's last checkpoint is {kept}" in end
    assert not list((job.run_dir / "checkpoints").glob(".*.partial"))
    # It can be gone on with, once there is room.
    bigger = ["mount", "-o", "remount,size=20m", str(small_disk)]
    subprocess.run(bigger, check=True)
    assert launch(1, outcome, dataclasses.replace(job, steps=3)) == ["done"]


def no_room_while_writing(job: Job) -> str:
    """The disk fills up under the writer."""
    original = saving.write_file

    def full(*args: Any) -> Any:
        raise OSError(28, os.strerror(28), "weights/__0_0.distcp")

    saving.write_file = full if torch.distributed.get_rank() == 1 else original
    try:
        return outcome(job)
    finally:
        saving.write_file = original


def test_a_disk_that_fills_up_on_one_rank_fails_the_save_on_all(tmp_path: Path) -> None:
    job = Job(str(tmp_path), steps=2, layout=EP2, asynchronous=True)
    for end in launch(2, no_room_while_writing, job):
        assert end.startswith("EnvironmentProblem: rank 1: ")
        assert "No space left on device" in end
        assert "The run has no checkpoint." in end
    assert not list((job.run_dir / "checkpoints").glob("*partial*"))


def killed(job: Job, victim: int, seconds: float) -> str:
    """Kill one rank some time after its training begins, whatever it does then."""
    return outcome(job, AtStep(1, victim, lambda run: kill_self_after(seconds)), _Resumed(victim, seconds))


class _Resumed:
    """Starts the clock also in a run that does not begin at step 1."""

    def __init__(self, victim: int, seconds: float) -> None:
        self.victim, self.seconds, self.started = victim, seconds, False

    def on_step_start(self, run: Any, number: int) -> None:
        if not self.started and number > 1 and torch.distributed.get_rank() == self.victim:
            kill_self_after(self.seconds)
        self.started = True


def kill_at_random(folder: Path, seeds: range) -> None:
    """Kill a rank at random moments of a run that saves every step, resume, and compare with the uninterrupted run."""
    whole = Job(str(folder), "whole", steps=6, layout=EP2)
    assert launch(2, outcome, whole) == ["done", "done"]
    losses = {entry["step"]: entry["loss"] for entry in metrics_of(whole, "train")}
    (train_seconds,) = (entry["train_seconds"] for entry in metrics_of(whole, "end"))
    for seed in seeds:
        draw = random.Random(seed)
        job = dataclasses.replace(whole, name=f"killed-{seed}", every=1, asynchronous=seed % 2 == 0)
        for _ in range(2):  # killed twice, then left alone
            with contextlib.suppress(RankFailed):
                launch(2, killed, job, draw.randrange(2), draw.uniform(0, 2.5 * train_seconds))
        assert launch(2, outcome, job) == ["done", "done"], seed
        found = {entry["step"]: entry["loss"] for entry in metrics_of(job, "train")}
        assert found == losses, seed
        starts = metrics_of(job, "start")
        assert all(entry["step"] == 0 or "checkpoints" in entry["restored_from"] for entry in starts), seed
        shutil.rmtree(job.run_dir)


def test_killed_at_a_few_random_moments(tmp_path: Path) -> None:
    kill_at_random(tmp_path, range(2))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    kill_at_random(tmp_path, range(100, 110))


def test_exit_codes() -> None:
    assert (Preempted.exit_code, RecipeError.exit_code, EnvironmentProblem.exit_code) == (75, 2, 2)
