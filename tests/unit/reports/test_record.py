"""What a run recorded."""

from collections.abc import Callable
from pathlib import Path

from mixtral_recipes.reports.record import read_run


def test_a_step_made_twice_counts_once_and_a_cut_line_not_at_all(
    write_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert list(run.steps) == list(range(1, 31))
    losses = run.series("loss")
    assert len(losses) == 29, "the step that was not finite is left out"
    assert dict(losses)[9] == 5 / 9, "of a step made twice, the later one counts"
    assert run.expert_load() == [[0.5, 1.5], [1.0, 1.0]]
    assert run.validation_losses() == [(10, 1.0), (20, 0.5), (30, 10 / 30)]
    assert len(run.starts) == 2
    assert run.end == {}


def test_an_end_before_a_restart_is_not_the_runs(write_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", end={"error": "RecipeError: x"})
    path = folder / "metrics.jsonl"
    assert read_run(folder).end["error"] == "RecipeError: x"
    path.write_text(path.read_text() + '\n{"kind": "start", "step": 3}\n')
    assert read_run(folder).end == {}
