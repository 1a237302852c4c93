"""A cluster, the folders its jobs use, and what a user does with them."""

import contextlib
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
import slurm_job

PATIENCE_S = 1800  # for one job; generous, because it says nothing about speed


def need(*, accounting: bool = False, ssh: bool = False) -> None:
    """Skip, or in CI fail, if the machine lacks a program."""
    missing = slurm_cluster.missing_tools(accounting, ssh)
    if missing:
        packages = slurm_cluster.PACKAGES + (f" {slurm_cluster.ACCOUNTING_PACKAGES}" if accounting else "")
        packages += f" {slurm_cluster.SSH_PACKAGES}" if ssh else ""
        text = f"no {', '.join(missing)} here; apt-get install --no-install-recommends {packages}"
        if os.environ.get("CI"):
            pytest.fail(text, pytrace=False)
        pytest.skip(text)


class Site:
    """A cluster, the folders its jobs use, and what a user does with them."""

    def __init__(self, root: Path, *, accounting: bool) -> None:
        self.root = root
        self.accounting = accounting
        self.cluster = slurm_cluster.Cluster(root / "cluster", accounting=accounting)
        self.runs = root / "runs"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The environment of a shell on this cluster's login node."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(self.cluster.conf))
            patch.setenv("PATH", slurm_cluster.PATH)
            patch.setenv("MIXTRAL_RECIPES_HOME", str(self.root / "home"))
            patch.setenv("MIXTRAL_RECIPES_CLUSTERS", str(self.root / "clusters.toml"))
            patch.delenv("NEMORUN_HOME", raising=False)
            yield

    def executor(self, nodes: int = 2, nproc: int = 1, **settings: Any) -> Any:
        """An executor for this cluster; its jobs take slurm_job along, as they would modules of a user's own."""
        from mixtral_recipes.executors.slurm.executor import slurm_executor

        env = {"OMP_NUM_THREADS": "1"} | settings.pop("env", {})
        settings = {"partition": "debug"} | settings
        return slurm_executor(nodes, nproc, account="none", env=env, **settings)

    def recipe(self, name: str, nodes: int = 2, nproc: int = 1, **job: Any) -> Any:
        """A slurm_job.train recipe."""
        import nemo_run as run

        log = run.Config(slurm_job.Log, log_dir=str(self.runs), name=name)
        trainer = run.Config(slurm_job.Trainer, devices=nproc, num_nodes=nodes)
        return run.Partial(slurm_job.train, log=log, trainer=trainer, **job)

    def submit(
        self, name: str, nodes: int = 2, nproc: int = 1, settings: dict[str, Any] | None = None, **job: Any
    ) -> Any:
        """Submit a job and return its record."""
        from mixtral_recipes.executors.launch import launch
        from mixtral_recipes.executors.runs import records

        executor = self.executor(nodes, nproc, **(settings or {}))
        recipe = self.recipe(name, nodes, nproc, **job)
        began = time.monotonic()
        submitted = launch(recipe, executor=executor, name=name, run_dir=self.runs / name, detach=True)
        print(f"submitted {name} in {time.monotonic() - began:.2f} s")
        return records.find(submitted["run"])

    def wait(self, record: Any, *states: str) -> str:
        """Wait until a run is in one of these states, by default in any final one."""
        from mixtral_recipes.executors.slurm.status import FINAL

        wanted = states or FINAL
        return self._wait_until(record, lambda state: state in wanted, " or ".join(wanted))

    def wait_for_step(self, name: str, step: int) -> None:
        """Wait until a job has saved this many steps."""
        from mixtral_recipes.executors.runs import records

        file = self.runs / name / "state.json"
        self.wait_for(
            records.find(name), lambda: file.exists() and json.loads(file.read_text())[0] >= step, f"at step {step}"
        )

    def wait_for(self, record: Any, condition: Callable[[], bool], what: str) -> None:
        """Wait until a condition holds, but no longer than the run lasts."""
        self._wait_until(record, lambda _: condition(), what)

    def _wait_until(self, record: Any, condition: Callable[[str], bool], what: str) -> str:
        from mixtral_recipes.executors.runs import records
        from mixtral_recipes.executors.runs import states as runs
        from mixtral_recipes.executors.slurm.status import FINAL

        end = time.monotonic() + PATIENCE_S
        while not condition((state := runs.state(records.find(record.id))).state):
            if time.monotonic() > end or state.state in FINAL:
                raise TimeoutError(f"{record.id} is {state}, not {what}:\n{self.logs(record)}")
            time.sleep(0.3)
        return state.state

    def result(self, name: str) -> dict[str, Any]:
        """RUN/result.json."""
        return json.loads((self.runs / name / "result.json").read_text())

    def cli(self, *arguments: str) -> tuple[int, str]:
        """Run ``mixtral-recipes runs ...`` in this process; exit code and stdout."""
        from typer.testing import CliRunner

        from mixtral_recipes.cli.runs import app
        from mixtral_recipes.errors import MixtralRecipesError

        done = CliRunner().invoke(app, arguments)
        code = done.exception.exit_code if isinstance(done.exception, MixtralRecipesError) else done.exit_code
        return code, done.stdout

    def logs(self, record: Any) -> str:
        """Everything a job and Slurm wrote, for a failed test's report."""
        job, cluster = Path(record.job_dir), self.cluster.root / "log"
        patterns = ((job, "attempts*.jsonl"), (job, "attempts/*/*.json"), (job, "attempts/*/node-*.log"))
        patterns += ((job, "sbatch_*.out"), (cluster, "slurm*.log"))
        files = [file for folder, pattern in patterns for file in sorted(folder.glob(pattern))]
        return "\n".join(f"== {file}\n{file.read_text(errors='replace')[-3000:]}" for file in files)

    def succeed(self, record: Any) -> None:
        """Wait until a run has succeeded; where it ends otherwise, the failed test shows all that was logged."""
        self.wait(record, "succeeded")


@contextlib.contextmanager
def started(root: Path, *, accounting: bool) -> Iterator[Site]:
    """A running cluster in ``root``."""
    site = Site(root, accounting=accounting)
    try:
        with site.active():
            site.cluster.start()
        yield site
    finally:
        with site.active():
            site.cluster.stop()
        gc.collect()  # invoke leaves pipes to the garbage collector; now, while warnings are ignored
