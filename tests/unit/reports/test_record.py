"""What a run recorded."""

from collections.abc import Callable
from pathlib import Path

from mixtral_recipes.reports.page import page
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
    assert run.skipped == 1


USELESS = [
    "[1]", "{", '"text"', "\x00", "[" * 3000, '{"kind": 3}', '{"kind": "train"}', '{"kind": "train", "step": true}',
    '{"kind": "train", "step": "3"}', '{"kind": "train", "step": -1}', '{"kind": "train", "step": 1e300}',
    f'{{"kind": "train", "step": {"9" * 5000}}}', '{"kind": "train", "step": 1, "step": 2}',
    '{"kind": "train", "step": 1, "loss": [1]}', '{"kind": "train", "step": 1, "expert_load": "text"}',
    '{"kind": "train", "step": 1, "expert_load": [[-1]]}', '{"kind": "train", "step": 1, "router_losses": [1]}',
    '{"kind": "save", "step": 1}', '{"kind": "save", "step": 1, "stall_seconds": "x"}',
    '{"kind": "save", "step": 1, "stall_seconds": 1, "time": 1e18}', '{"kind": "start", "changed": "text"}',
    '{"kind": "start", "recipe": []}', '{"kind": "plan", "step_seconds": {}}', '{"kind": "end", "error": 1}',
]  # fmt: skip
STRANGE = [
    '{"kind": "train", "step": 31, "loss": 1e308, "lr": -1e40, "seconds": 1e29, "memory_gb": NaN, "tags/x": {}}',
    '{"kind": "train", "step": 32, "expert_load": [[1], [2, 3]]}',
    '{"kind": "train", "step": 33, "expert_load": [[]], "loss/$\\\\frac_": 1.0}',
    '{"kind": "of another version"}',
]


def test_lines_that_cannot_be_used_are_counted_and_the_page_is_written(
    write_run: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "run")
    good = page(read_run(folder))
    assert "could not be read" in good
    path = folder / "metrics.jsonl"
    path.write_text("\n".join([path.read_text(), *USELESS, *STRANGE, "", '{"long": "' + "x" * (17 << 20) + '"}']))
    run = read_run(folder)
    assert run.skipped == 1 + len(USELESS) + 1
    assert max(run.steps) == 33
    assert f"{run.skipped} line(s) of metrics.jsonl" in page(run)


def test_an_end_before_a_restart_is_not_the_runs(write_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", end={"error": "RecipeError: x"})
    path = folder / "metrics.jsonl"
    assert read_run(folder).end["error"] == "RecipeError: x"
    path.write_text(path.read_text() + '\n{"kind": "start", "step": 3}\n')
    assert read_run(folder).end == {}
