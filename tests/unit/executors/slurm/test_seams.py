"""The places where we lean on nemo_run's inside: each fails here first when nemo_run changes."""

import subprocess
import sys

import pytest


def test_runs_and_clusters_load_neither_torch_nor_nemo_run() -> None:
    code = (
        "import sys\n"
        "from mixtral_recipes.cli import runs, clusters, doctor, pipeline\n"
        "from mixtral_recipes.executors import checks, launch\n"
        "from mixtral_recipes.executors.runs import records, states, logs\n"
        "from mixtral_recipes.executors.slurm import status, sbatch\n"
        "records.all_records()\n"
        "print([m for m in ('torch', 'nemo_run', 'fiddle', 'transformers', 'megatron') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.filterwarnings("ignore")
def test_nemo_run_still_has_what_we_use() -> None:
    import inspect

    import nemo_run as run
    from nemo_run.run import experiment
    from nemo_run.run.torchx_backend.schedulers import slurm
    from torchx.schedulers import get_scheduler_factories

    from mixtral_recipes.executors.slurm.scheduler import RecipeScheduler, install

    assert hasattr(slurm, "SLURM_JOB_DIRS")
    before = slurm.create_scheduler, slurm._get_job_dirs, experiment.rsync
    try:
        install()
        made = get_scheduler_factories()["slurm_tunnel"]("session")
        assert isinstance(made, RecipeScheduler)
    finally:
        slurm.create_scheduler, slurm._get_job_dirs, experiment.rsync = before
    assert "rsync(tunnel.session, " in inspect.getsource(run.Experiment.run)
    assert "_submit_dryrun" in vars(slurm.SlurmTunnelScheduler)
    assert "schedule" in vars(slurm.SlurmTunnelScheduler)
    assert "describe" in vars(slurm.SlurmTunnelScheduler)
    assert {"clean_mode", "skip_status_at_exit", "base_dir"} <= set(
        inspect.signature(run.Experiment.__init__).parameters
    )


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # invoke leaves its pipes to the garbage collector
def test_submitting_leaves_stdin_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import io

    from invoke.context import Context

    from mixtral_recipes.executors.slurm.scheduler import own_stdin

    ours = io.StringIO("the next line of a shell loop")
    monkeypatch.setattr(sys, "stdin", ours)
    with own_stdin():
        Context().run("cat", hide=True)
    gc.collect()
    assert sys.stdin is ours
    assert ours.read() == "the next line of a shell loop"
