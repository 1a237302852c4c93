"""The places where we lean on nemo_run's inside: each fails here first when nemo_run changes."""

import subprocess
import sys

import pytest


def test_runs_and_clusters_load_neither_torch_nor_nemo_run() -> None:
    code = (
        "import sys\n"
        "from mixtral_recipes.cli import runs, clusters, doctor, pipeline\n"
        "from mixtral_recipes.executors import records, runs as core, logs, slurm_status, sbatch, checks, launch\n"
        "records.all_records()\n"
        "print([m for m in ('torch', 'nemo_run', 'fiddle', 'transformers', 'megatron') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.filterwarnings("ignore")
def test_nemo_run_still_has_what_we_use() -> None:
    import inspect

    import nemo_run as run
    from nemo_run.run.torchx_backend.schedulers import local, slurm
    from torchx.schedulers import get_scheduler_factories

    from mixtral_recipes.executors.scheduler import RecipeScheduler, install

    assert hasattr(local, "LOCAL_JOB_DIRS")
    assert hasattr(slurm, "SLURM_JOB_DIRS")
    before = slurm.create_scheduler
    try:
        install()
        made = get_scheduler_factories()["slurm_tunnel"]("session")
        assert isinstance(made, RecipeScheduler)
    finally:
        slurm.create_scheduler = before
    assert "_submit_dryrun" in vars(slurm.SlurmTunnelScheduler)
    assert "describe" in vars(slurm.SlurmTunnelScheduler)
    assert {"clean_mode", "skip_status_at_exit", "base_dir"} <= set(
        inspect.signature(run.Experiment.__init__).parameters
    )
