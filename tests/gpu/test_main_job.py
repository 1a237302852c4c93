"""The main job on a GPU as a command, in every precision the tiny recipe has."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu
PRECISIONS = ("fp32", "bf16", "fp8")
Ended = subprocess.CompletedProcess[str]


def finetune(folder: Path, precision: str, accelerator: str, steps: int) -> Ended:
    """The command, to its end."""
    command = [
        sys.executable, "-m", "mixtral_recipes.cli.main", "finetune", "--recipe", "mixtral_tiny", "--executor",
        "direct", "--dir", str(folder / accelerator), "--name", precision, "--precision", precision, "--evaluate", "0",
        "--json", f"trainer.accelerator={accelerator}", f"trainer.max_steps={steps}",
    ]  # fmt: skip
    hidden = {} if accelerator == "gpu" else {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=os.environ | hidden, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """All of them at the same time: each loads its libraries for longer than it trains."""
    folder = tmp_path_factory.mktemp("jobs")
    jobs = {precision: (precision, "gpu", 20) for precision in PRECISIONS} | {"cpu": ("fp32", "cpu", 1)}
    with ThreadPoolExecutor(len(jobs)) as together:
        return dict(zip(jobs, together.map(lambda job: finetune(folder, *job), jobs.values()), strict=True))


def result(ended: Ended) -> dict[str, Any]:
    """The job's JSON."""
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_learns(commands: dict[str, Ended], precision: str) -> None:
    found = result(commands[precision])
    assert found["last_loss"] < found["first_loss"]


def test_fp32_starts_where_the_cpu_does(commands: dict[str, Ended]) -> None:
    """The first loss is of the same weights on the same batch; attention and norms are other kernels."""
    on_gpu, on_cpu = (result(commands[where])["first_loss"] for where in ("fp32", "cpu"))
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
