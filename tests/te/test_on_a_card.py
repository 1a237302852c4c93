"""Whole runs on Transformer Engine's layers, on the card of `tests/card`: as long as no GPU is there to run them on.

The card's memory is this machine's and the CPU computes what kernels would, so numbers are compared with those of our
plain layers on the CPU. What is slow, or wrong in a kernel itself, only a GPU shows.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.card.build import environment
from tests.gpu.small_runs import FP8

STRATEGY = "trainer.strategy."
SPREAD = {
    "experts": [],  # the recipe's own way
    "tensors": [
        f"{STRATEGY}tensor_model_parallel_size=2",
        f"{STRATEGY}sequence_parallel=true",
        f"{STRATEGY}expert_model_parallel_size=1",
    ],
    "sequence": [f"{STRATEGY}context_parallel_size=2", f"{STRATEGY}expert_model_parallel_size=1"],
    "layers": [
        f"{STRATEGY}pipeline_model_parallel_size=2",
        f"{STRATEGY}virtual_pipeline_model_parallel_size=2",
        f"{STRATEGY}expert_model_parallel_size=1",
    ],
}
ALONE = {"FAKE_CARD_ALONE": "1"}  # without Transformer Engine
SHORT = ["trainer.max_steps=2", "trainer.limit_val_batches=1", "data.global_batch_size=8", "data.micro_batch_size=4"]


def command(variables: dict[str, str], *words: str, compiled: bool = False) -> str:
    """What a command prints, in a process of its own."""
    own = {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "0" if compiled else "1"}
    process = subprocess.run(
        [sys.executable, "-m", "mixtral_recipes.cli.main", *words, "--debug"],
        env={name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | own | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-6000:]
    return process.stdout


def trained(
    folder: Path,
    variables: dict[str, str],
    *words: str,
    cards: int = 1,
    compiled: bool = False,
    layers: str = "Transformer Engine",
) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of a short fine-tuning; what torch compiles computes nothing on the card."""
    place = ["--executor", "direct"] if cards == 1 else ["--num-gpus-per-node", str(cards)]
    asked = ["--dir", str(folder), "--name", "run", "--evaluate", "0", "--no-export", *place]
    printed = command(variables, "finetune", *asked, *SHORT, *words, compiled=compiled)
    assert not variables or f"layers: {layers}" in printed
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if "grad_norm" in line]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[float, float]]]:
    """By adapter, what our plain layers on the CPU find."""
    return {
        peft: trained(
            tmp_path_factory.mktemp(peft),
            {},
            "--peft",
            peft,
            "trainer.devices=1",
            "trainer.strategy.expert_model_parallel_size=1",
        )
        for peft in ("lora", "none")
    }


def close(found: list[tuple[float, float]], expected: list[tuple[float, float]], by: float) -> bool:
    """Whether losses differ by less than a share, and gradient norms by less than three times as much."""
    pairs = zip(found, expected, strict=True)
    return all(abs(a[0] / b[0] - 1) < by and abs(a[1] / b[1] - 1) < 3 * by for a, b in pairs)


@pytest.mark.parametrize("spread", SPREAD)
def test_two_cards_train_as_the_cpu_does(
    spread: str, card: Path, plain: dict[str, list[tuple[float, float]]], tmp_path: Path
) -> None:
    found = trained(tmp_path, environment(card, 2), "--peft", "lora", *SPREAD[spread], cards=2)
    assert close(found, plain["lora"], by=0.01), (found, plain["lora"])


def test_packed_sequences_are_spread(card: Path, tmp_path: Path) -> None:
    words = ["--peft", "lora", "--packed", *SPREAD["sequence"], "data.global_batch_size=4", "data.micro_batch_size=1"]
    on_cpu, on_cards = tmp_path / "cpu", tmp_path / "cards"
    expected, found = trained(on_cpu, {}, *words, cards=2), trained(on_cards, environment(card, 2), *words, cards=2)
    assert close(found, expected, by=0.01), (found, expected)


@pytest.mark.parametrize(("recipe", "spread"), [("delayed", None), ("tensorwise", None), ("blockwise", "tensors")])
def test_all_weights_are_trained_in_fp8(
    recipe: str, spread: str | None, card: Path, plain: dict[str, list[tuple[float, float]]], tmp_path: Path
) -> None:
    cards = 2 if spread else 1
    asked = [f"trainer.plugins.{name}={value}" for name, value in FP8[recipe].items()]
    words = ["--peft", "none", *asked, *SPREAD.get(spread or "", [])]
    found = trained(tmp_path, environment(card, cards), *words, cards=cards)
    assert close(found, plain["none"], by=0.04), (found, plain["none"])


@pytest.mark.parametrize("layers", ["Transformer Engine", "PyTorch"])
def test_a_run_in_the_commands_own_process_compiles(layers: str, card: Path, tmp_path: Path) -> None:
    there = environment(card) | (ALONE if layers == "PyTorch" else {})
    trained(tmp_path, there, "--peft", "lora", "trainer.max_skipped_steps=2", compiled=True, layers=layers)


@pytest.mark.parametrize("peft", ["lora", "qlora"])
def test_without_a_compiler_nothing_is_compiled(
    peft: str, card: Path, plain: dict[str, list[tuple[float, float]]], tmp_path: Path
) -> None:
    """As in a container that has what runs torch and no more."""
    alone = environment(card) | {"PATH": str(tmp_path), "CC": ""}
    found = trained(tmp_path, alone, "--peft", peft, compiled=True)
    assert close(found, plain["lora"], by=0.01 if peft == "lora" else 0.1), (found, plain["lora"])


def test_without_transformer_engine_the_plain_layers_train(
    card: Path, plain: dict[str, list[tuple[float, float]]], tmp_path: Path
) -> None:
    found = trained(tmp_path, environment(card) | ALONE, "--peft", "lora", layers="PyTorch")
    assert close(found, plain["lora"], by=0.01), (found, plain["lora"])
