"""Data modules in Lightning's shape train to the losses of a built-in one that has the same samples, on any ranks."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import mixtral_recipes as llm
from mixtral_recipes.data.batches.batch import Sample, Shuffled
from mixtral_recipes.data.modules.lightning import as_data_module
from mixtral_recipes.layout.shapes import BatchShape
from mixtral_recipes.training.step import train_step, validate
from tests.distributed.harness import ROOT, launch
from tests.distributed.small_run import Case, SmallData, _Sequences, build

STEPS = 4
LAYOUTS = {"DP2": {}, "PP2": {"pipeline_model_parallel_size": 2}, "CP2": {"context_parallel_size": 2}}


def nemo_sample(sample: Sample, length: int) -> dict[str, torch.Tensor]:
    """A sample with NeMo's keys, padded to ``length``."""
    tokens, n = torch.tensor(sample["tokens"]), len(sample["tokens"]) - 1
    pad = (0, length - n)
    return {
        "tokens": torch.nn.functional.pad(tokens[:-1], pad),
        "labels": torch.nn.functional.pad(tokens[1:], pad, value=-100),
        "loss_mask": torch.nn.functional.pad(torch.tensor(sample["loss_mask"]), pad),
        "position_ids": torch.arange(length),
        "padding_mask": torch.arange(length) >= n,
        "metadata": torch.zeros(()),
    }


class NeMoSamples(Dataset[Any]):
    """The samples of `SmallData`, as NeMo's users give them."""

    def __init__(self, full: bool) -> None:
        self.samples = _Sequences(32, 101, full=full)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return nemo_sample(self.samples[index], 32)


class LightningShaped:
    """What NeMo's users wrote: loaders of batches, the batch size on the module."""

    def __init__(self, full: bool, loader: str) -> None:
        self.full, self.loader = full, loader
        self.seq_length, self.micro_batch_size, self.global_batch_size = 32, 2, 8
        self.called: list[str] = []

    def prepare_data(self) -> None:
        self.called.append("prepare_data")

    def setup(self, stage: str | None = None) -> None:
        self.called.append(f"setup {stage}")
        self.samples = NeMoSamples(self.full)

    def train_dataloader(self) -> Any:
        assert self.called[-1] == "setup fit"
        if self.loader == "positions":
            return DataLoader(self.samples, batch_size=1, shuffle=True)
        order = [int(n) for n in Shuffled(len(self.samples), seed=1234)(0)]
        batches = DataLoader(self.samples, batch_sampler=[order[n : n + 3] for n in range(0, len(order), 3)])
        return batches if self.loader == "own batches" else (batch for batch in batches)

    def val_dataloader(self) -> Any:
        return [DataLoader(self.samples, batch_size=4)]


@dataclasses.dataclass
class WithValidation(SmallData):
    """`SmallData` that validates on its own samples, in their order."""

    def datasets(self, tokenizer: Any) -> dict[str, Dataset[Sample]]:
        train, _ = super().datasets(tokenizer)
        return {"train": train, "validation": train}


def losses(layout: dict[str, Any], full: bool, loader: str) -> list[float]:
    """The loss of each step, and last the validation loss."""
    run = build(Case(layout=layout, steps=STEPS))
    data = WithValidation(full=full) if loader == "built in" else as_data_module(LightningShaped(full, loader))
    data.setup(None)
    run = dataclasses.replace(run, data=data, batch=BatchShape.of(data))
    batches = data.train_batches(run.data_place, **run.loader_shape)
    found = [train_step(run, batches).loss for _ in range(STEPS)]
    losses = validate(run)
    return [*found, losses.loss if losses else 0.0]


@pytest.fixture(scope="module")
def built_in() -> dict[bool, list[float]]:
    return {full: launch(1, losses, {}, full, "built in")[0] for full in (True, False)}


ALONE = [(True, "positions"), (True, "a generator"), (False, "positions"), (False, "own batches")]


@pytest.mark.parametrize(("full", "loader"), ALONE)
def test_a_lightning_shaped_module_trains_to_the_same_losses(
    full: bool, loader: str, built_in: dict[bool, list[float]]
) -> None:
    (found,) = launch(1, losses, {}, full, loader)
    # What stands in the padding differs, and rounding with it.
    assert found == (built_in[full] if full else pytest.approx(built_in[full], rel=1e-6))


RANKS = [("DP2", "positions"), ("DP2", "own batches"), ("PP2", "positions"), ("CP2", "own batches")]


@pytest.mark.parametrize(("layout", "loader"), RANKS)
def test_so_it_does_on_several_ranks(layout: str, loader: str, built_in: dict[bool, list[float]]) -> None:
    for found in launch(2, losses, LAYOUTS[layout], False, loader):
        assert found == pytest.approx(built_in[False], rel=2e-5)


def pretrained(folder: str, lightning: bool) -> tuple[float, float, float]:
    """First, last and validation loss of `pretrain`."""
    from tests.distributed.small_run import small_config

    run_dir = llm.pretrain(
        model=llm.MixtralModel(small_config()),
        data=LightningShaped(True, "positions") if lightning else WithValidation(full=True),  # pyright: ignore[reportArgumentType]
        trainer=llm.Trainer(
            accelerator="cpu", max_steps=STEPS, limit_val_batches=2, plugins=llm.MegatronMixedPrecision(precision="32")
        ),
        log=llm.NeMoLogger(log_dir=folder, name="lightning" if lightning else "built_in", ckpt=None, tensorboard=None),
    )
    result = json.loads((run_dir / "result.json").read_text())
    return result["first_loss"], result["last_loss"], result["val_loss"]


def test_pretrain_takes_one_as_it_is(tmp_path: Path) -> None:
    (expected,) = launch(1, pretrained, str(tmp_path), False)
    (found,) = launch(1, pretrained, str(tmp_path), True)
    assert found == expected
    assert found[1] < found[0]


@pytest.mark.slow
def test_the_page_about_ones_own_data_trains_both_ways(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "guide" / "own-data.md").read_text()
    script = tmp_path / "page.py"
    script.write_text("\n\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MIXTRAL_RECIPES_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, check=True, timeout=600)
    results = [json.loads((tmp_path / "runs" / n / "result.json").read_text()) for n in ("sums", "sums_for_lightning")]
    assert [result["world_size"] for result in results] == [2, 2]
    for name in ("first_loss", "last_loss", "val_loss"):
        assert results[1][name] == pytest.approx(results[0][name], rel=1e-3)
    assert results[0]["last_loss"] < results[0]["first_loss"] / 2
