"""What a run tells: lines, metrics.jsonl, TensorBoard, W&B and MLflow."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.errors import EnvironmentProblem
from mixtral_recipes.settings.log import MLFlowLogger, NeMoLogger, TensorBoardLogger, WandbLogger
from mixtral_recipes.training.watch.log import RunLog, speed_line, summary

STEP: dict[str, Any] = {
    "step": 3, "loss": 1.25, "grad_norm": float("inf"), "lr": 1e-4, "tokens_per_second": 12345.6, "updated": True,
    "tflops_per_process": 0.5, "memory_gb": 2.0, "expert_imbalance": 1.5, "dropped_share": 0.0, "eta_seconds": 61.0,
    "expert_load": [[1, 2]],
}  # fmt: skip


def test_lines_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(NeMoLogger("run", str(tmp_path)), 10, is_writer=True)
    log.training(STEP, show=True)
    log.training(STEP | {"step": 4}, show=False)
    log.validation({"step": 4, "val_loss": 1.0})
    log.event("save", {"step": 4, "stall_seconds": 0.1})
    log.close()
    log.close()
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(
        "step 3/10  loss 1.2500  grad norm inf  lr 1.00e-04  12,346 tokens/s  0.5 TFLOP/s  2.00 GB"
    )
    assert out[0].endswith("ETA 0:01:01")
    assert out[1:] == ["step 4/10  validation loss 1.0000"]
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["kind"] for entry in entries] == ["train", "train", "val", "save"]
    assert entries[0]["grad_norm"] == "inf"
    assert entries[0]["expert_load"] == [[1, 2]]


def test_a_full_disk_is_told_and_hides_nothing_that_ended_the_run(tmp_path: Path) -> None:
    file = tmp_path / "run" / "metrics.jsonl"
    file.parent.mkdir()
    file.symlink_to("/dev/full")
    log = RunLog(NeMoLogger("run", str(tmp_path)), 10, is_writer=True)
    with pytest.raises(OSError, match=f"No space left on device: '{file}'$"):
        log.event("save", {"step": 4})
    log.fail(ValueError("what ended it"))
    log.close()


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(NeMoLogger("run", str(tmp_path), wandb=WandbLogger()), 10, is_writer=False)
    log.training(STEP, show=True)
    log.say("text")
    log.close()
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


def test_share_of_peak_and_drops_are_said_where_they_are_known() -> None:
    assert "(45% of peak)" in summary(STEP | {"share_of_peak": 0.45})
    assert "dropped 2.5%" in summary(STEP | {"dropped_share": 0.025})
    assert "peak" not in summary(STEP)
    assert "dropped" not in summary(STEP)


def test_waits_and_the_cards_memory_are_said_where_they_matter() -> None:
    assert "for data" not in summary(STEP | {"seconds": 2.0, "data_wait_seconds": 0.01})
    assert "waited 25% for data" in summary(STEP | {"seconds": 2.0, "data_wait_seconds": 0.5})
    assert "2.00 GB (3.50 of the card)" in summary(STEP | {"memory_card_gb": 3.5})


def test_the_last_line_tells_both_speeds() -> None:
    speed = {
        "tokens_per_second": 2110.4, "tokens_per_second_with_warmup": 543.2, "tflops_per_process": 410.0,
        "share_of_peak": 0.414, "data_wait_share": 0.012, "host_wait_share": 0.6,
    }  # fmt: skip
    assert speed_line(speed, {"memory_gb": 18.2, "memory_card_gb": 20.0}) == (
        "speed: 2,110 tokens/s  410 TFLOP/s (41% of peak) (543 tokens/s with the first steps); "
        "waited 1.2% for data, 60% for the step's end; 18.20 GB (20.00 of the card)"
    )
    assert "peak" not in speed_line(speed | {"share_of_peak": None}, {"memory_gb": 1.0})


def test_tensorboard(tmp_path: Path) -> None:
    log = RunLog(NeMoLogger("run", str(tmp_path), tensorboard=TensorBoardLogger(name="tb")), 10, is_writer=True)
    log.training(STEP, show=False)
    log.close()
    (events,) = (tmp_path / "run" / "tb_logs" / "tb").iterdir()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert accumulator.Scalars("train/loss")[0].value == 1.25
    assert "train/grad_norm" not in accumulator.Tags()["scalars"], "what is not finite is left out"


def test_wandb_and_mlflow_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, Any]] = []

    class Run:
        def log(self, numbers: dict[str, float], step: int) -> None:
            told.append(("wandb", (numbers["train/loss"], step)))

        def finish(self) -> None:
            told.append(("wandb", "finished"))

    wandb, mlflow = types.ModuleType("wandb"), types.ModuleType("mlflow")
    wandb.init = lambda **settings: told.append(("init", settings["project"])) or Run()  # pyright: ignore
    for name in ("set_tracking_uri", "set_experiment", "end_run"):
        setattr(mlflow, name, lambda *args, name=name: told.append((name, args)))
    mlflow.start_run = lambda run_name: told.append(("start_run", run_name))  # pyright: ignore
    mlflow.log_metrics = lambda numbers, step: told.append(("mlflow", (numbers["train/loss"], step)))  # pyright: ignore
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    settings = NeMoLogger("run", str(tmp_path), wandb=WandbLogger("p"), mlflow=MLFlowLogger(tracking_uri="uri"))
    log = RunLog(settings, 10, is_writer=True)
    log.training(STEP, show=False)
    log.close()
    assert ("wandb", (1.25, 3)) in told
    assert ("mlflow", (1.25, 3)) in told
    assert ("start_run", "run") in told
    assert told[-1] == ("end_run", ())


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(EnvironmentProblem, match="wandb is not installed; run `pip install wandb`"):
        RunLog(NeMoLogger("run", str(tmp_path), wandb=WandbLogger()), 1, is_writer=True)


def test_runs_may_be_kept_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert NeMoLogger("run", "~/runs").run_dir == tmp_path / "runs" / "run"
    assert NeMoLogger("run", explicit_log_dir="~/mine").run_dir == tmp_path / "mine"
