"""Several jobs that depend on each other, from a file and from Python."""

from pathlib import Path

import pytest
from slurm_site import Site

from mixtral_recipes.cli.pipeline import recipe_of
from mixtral_recipes.errors import LaunchError
from mixtral_recipes.executors import pipeline
from mixtral_recipes.executors.runs import records

PIPELINE = """
name = "demo"
cluster = "own"
dir = "{dir}"
[[stage]]
name = "look"
command = ["recipes", "list"]
[[stage]]
name = "broken"
command = ["import", "/nonexistent"]
[[stage]]
name = "never"
command = ["recipes", "list"]
"""


def test_failed_stage_stops_the_rest(plain: Site, tmp_path: Path) -> None:
    (plain.root / "clusters.toml").write_text('[own]\naccount = "none"\npartition = "debug"\n')
    file = tmp_path / "demo.toml"
    file.write_text(PIPELINE.format(dir=plain.runs))
    stages, scripts = pipeline.submit(pipeline.read(file), recipe_of)
    assert len(scripts) == 3
    told = r"stage 'broken' failed: .*Not run: never\. Continue with --from broken"
    with pytest.raises(LaunchError, match=told) as caught:
        pipeline.watch(stages)
    assert "job" in str(caught.value)
    assert plain.wait(stages[2]) == "cancelled"
    plain.succeed(stages[0])
    assert records.attempt_folders(stages[2]) == []


def test_experiment_from_python_waits_without_sacct(plain: Site) -> None:
    import nemo_run as run

    import mixtral_recipes.api  # noqa: F401  # as a script has it: from then on experiments send a task's own modules
    from mixtral_recipes.executors.submit import use_jobs_home

    use_jobs_home()
    with run.Experiment("plain", log_level="WARNING", base_dir=str(use_jobs_home())) as experiment:
        first = experiment.add(plain.recipe("py1", 1, 1, steps=2), plain.executor(1, 1), name="first")
        experiment.add(plain.recipe("py2", 1, 1, steps=2), plain.executor(1, 1), name="second", dependencies=[first])
        experiment.run()
    assert plain.result("py1")["steps"] == 2
    assert plain.result("py2")["steps"] == 2
    assert {job.id: str(job.state) for job in experiment.jobs} == {"first": "SUCCEEDED", "second": "SUCCEEDED"}  # type: ignore[union-attr]
