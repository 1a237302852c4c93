"""The main job on a GPU as a command, in every precision the tiny recipe has."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu


def finetune(folder: Path, precision: str, *more: str, accelerator: str = "gpu") -> dict[str, Any]:
    """The job's JSON."""
    command = [
        sys.executable, "-m", "mixtral_recipes.cli.main", "finetune", "--recipe", "mixtral_tiny", "--executor",
        "direct", "--dir", str(folder), "--name", precision, "--precision", precision, "--evaluate", "0", "--json",
        f"trainer.accelerator={accelerator}", "trainer.max_steps=20", *more,
    ]  # fmt: skip
    hidden = {} if accelerator == "gpu" else {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=os.environ | hidden, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_it_learns(tmp_path: Path, precision: str) -> None:
    result = finetune(tmp_path, precision)
    assert result["last_loss"] < result["first_loss"]


def test_fp32_starts_where_the_cpu_does(tmp_path: Path) -> None:
    """The first loss is of the same weights on the same batch; attention and norms are other kernels."""
    on_gpu, on_cpu = (
        finetune(tmp_path / device, "fp32", "trainer.max_steps=1", accelerator=device)["first_loss"]
        for device in ("gpu", "cpu")
    )
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
