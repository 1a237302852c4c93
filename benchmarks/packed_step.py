"""Useful tokens per second of a training step, packed against padded, on lengths like SQuAD's.

    python benchmarks/packed_step.py
    python benchmarks/packed_step.py --hidden 512 --steps 8 --micro-batch 8 16 32 --json out.json

One process. Each repeat takes a step of every kind in turn, so that a slow moment of the machine strikes all of them;
the figures are processor time. Useful tokens are those of samples; padded rows are as long as the longest of their
microbatch.
"""

import argparse
import json
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from mixtral_recipes.data.batches.batch import Sample, Samples
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.settings.data import PackedSequenceSpecs


def squad_lengths(count: int, seed: int = 0) -> np.ndarray:
    """SQuAD v1.1 in NeMo's prompt with Mixtral's tokenizer: median 165 tokens, a lognormal tail to 850."""
    return np.clip(np.random.default_rng(seed).lognormal(np.log(165), 0.4, count), 50, 850).astype(np.int64)


class RandomSamples(Dataset[Sample]):
    """Random tokens of given lengths, the last tenth learned."""

    def __init__(self, lengths: np.ndarray, vocab_size: int) -> None:
        self.lengths = lengths
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        n = int(self.lengths[index])
        tokens = np.random.default_rng(index).integers(0, self.vocab_size, n + 1)
        return Sample(tokens=tokens, loss_mask=np.arange(n) >= n - n // 10 - 1)


@dataclass
class SquadLikeData(DataModule):
    """Random samples with SQuAD's lengths, packed or padded."""

    vocab_size: int = 2000
    fixed_length = False

    def datasets(self, tokenizer: Any) -> dict[str, Samples]:
        """Enough samples for any benchmark."""
        return {"train": RandomSamples(squad_lengths(20_000), self.vocab_size)}


def packed_and_padded(pack_size: int, micro_batches: list[int], vocab_size: int = 2000) -> dict[str, DataModule]:
    """Data modules on the same samples, with about as many tokens per step."""
    per_pack = round(pack_size / float(squad_lengths(20_000).mean()))
    modules: dict[str, DataModule] = {
        "packed": SquadLikeData(
            seq_length=1024,
            global_batch_size=4,
            micro_batch_size=1,
            vocab_size=vocab_size,
            packed_sequence_specs=PackedSequenceSpecs(pack_size),
        )
    }
    for micro in micro_batches:
        rows = max(1, round(4 * per_pack / micro)) * micro
        modules[f"padded, {micro} per microbatch"] = SquadLikeData(
            seq_length=1024, global_batch_size=rows, micro_batch_size=micro, vocab_size=vocab_size
        )
    return modules


def measure(modules: dict[str, DataModule], hidden: int, steps: int) -> dict[str, list[float]]:
    """Useful tokens per second of processor time, step by step, for every module."""
    import torch
    from megatron.core.optimizer import OptimizerConfig

    from mixtral_recipes.models.config import MixtralConfigTiny, MixtralModel
    from mixtral_recipes.settings.optim import MegatronOptimizerModule
    from mixtral_recipes.settings.precision import MegatronMixedPrecision
    from mixtral_recipes.settings.trainer import Trainer
    from mixtral_recipes.training import distributed
    from mixtral_recipes.training.run import build_run
    from mixtral_recipes.training.step import train_step

    torch.set_num_threads(1)
    place = distributed.ProcessPlace.from_environment()
    device = distributed.choose_device("auto", place)
    trainer = Trainer(accelerator="auto", max_steps=10_000, plugins=MegatronMixedPrecision(precision="32"))
    distributed.initialize(trainer.topology(), place, device, seed=1)
    config = MixtralConfigTiny(hidden_size=hidden, ffn_hidden_size=2 * hidden, max_position_embeddings=4096)
    runs = {}
    for name, module in modules.items():
        module.setup(None)
        optim = MegatronOptimizerModule(OptimizerConfig(lr=1e-4))
        run = build_run(MixtralModel(config), trainer, module, optim, device=device)
        runs[name] = (run, module.train_batches(run.data_place, **run.loader_shape))
    speeds: dict[str, list[float]] = {name: [] for name in modules}
    for number in range(steps + 1):
        for name, (run, batches) in runs.items():
            start = time.process_time()
            result = train_step(run, batches)
            if number:  # the first step warms up
                speeds[name].append(result.tokens / (time.process_time() - start))
    distributed.shut_down()
    return speeds


def main() -> None:
    """Print each kind's speed and how much faster packing is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--pack-size", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    modules = packed_and_padded(options.pack_size, options.micro_batch)
    speeds = {n: statistics.median(s) for n, s in measure(modules, options.hidden, options.steps).items()}
    for name, speed in speeds.items():
        print(f"{name:<28}{speed:>12,.0f} useful tokens/s{speeds['packed'] / speed:>8.2f}x slower than packed")
    if options.json:
        options.json.write_text(json.dumps(speeds, indent=1))


if __name__ == "__main__":
    main()
