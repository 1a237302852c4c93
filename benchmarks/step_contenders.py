"""What the benchmarks of a training step share: random tokens, one step of ours, one of transformers with peft.

`train_step.py` steps them on a CPU, `gpu_step.py` on a card.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from mixtral_recipes.data.batches.batch import Batch, Sample, Samples
from mixtral_recipes.data.modules.base import DataModule

LEARNING_RATE, CLIP, RANK = 1e-4, 1.0, 16
Step = Callable[[], float]

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


class RandomTokens(Dataset[Sample]):
    """Full sequences of random tokens, all learned."""

    def __init__(self, length: int, vocab_size: int) -> None:
        self.length, self.vocab_size = length, vocab_size

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> Sample:
        tokens = np.random.default_rng(index).integers(0, self.vocab_size, self.length + 1)
        return Sample(tokens=tokens, loss_mask=np.ones(self.length))


@dataclass
class RandomData(DataModule):
    """Random full sequences."""

    vocab_size: int = 2000

    def datasets(self, tokenizer: Any) -> dict[str, Samples]:
        """One endless training set."""
        return {"train": RandomTokens(self.seq_length, self.vocab_size)}


def our_step(
    model: Any,
    trainer: Any,
    data: DataModule,
    optim: Any,
    *,
    device: torch.device,
    peft: Any = None,
    weights: Path | None = None,
) -> Step:
    """One `train_step` of ours, in this process alone.

    Args:
        model: A `MixtralModel`.
        trainer: Its trainer; one process.
        data: Set up.
        optim: Optimizer and schedule.
        device: As `distributed.choose_device` returned it.
        peft: Adapters to train instead of the weights.
        weights: Imported checkpoint to start from; None keeps random weights, the same ones each time.
    """
    from megatron.core import parallel_state

    from mixtral_recipes.training import distributed
    from mixtral_recipes.training.run import build_run
    from mixtral_recipes.training.step import train_step

    if not parallel_state.model_parallel_is_initialized():
        distributed.initialize(trainer.topology(), distributed.ProcessPlace.from_environment(), device, seed=1)
    distributed.seed_everything(1)
    run = build_run(model, trainer, data, optim, device=device, peft=peft, weights=weights)
    batches = data.train_batches(run.data_place, **run.loader_shape)
    return lambda: train_step(run, batches).loss


def with_adapters(model: Any, *, experts: bool, in_fp32: bool = True) -> Any:
    """A transformers model with peft's LoRA on attention, and on the experts too; peft's default is fp32 adapters."""
    from peft import LoraConfig, get_peft_model

    targets = _EXPERTS if experts else None
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=_ATTENTION, target_parameters=targets)
    return get_peft_model(model, lora, autocast_adapter_dtype=in_fp32)


def transformers_step(model: Any, batches: Iterator[Batch], *, microbatches: int = 1) -> Step:
    """One step as transformers' Trainer takes it: clipped gradients, torch's fused AdamW on the weights as they are.

    Args:
        model: On its device.
        batches: Microbatches without padding.
        microbatches: How many of them make a step.
    """
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    device = trained[0].device

    def step() -> float:
        total = torch.zeros((), device=device)
        for _ in range(microbatches):
            batch = next(batches)
            tokens, labels = (batch[name].to(device, non_blocking=True) for name in ("tokens", "labels"))
            logits = model(input_ids=tokens, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()) / microbatches
            loss.backward()
            total += loss.detach()
        if any(parameter.grad is None for parameter in trained):
            raise NotImplementedError("its backward pass gives some of the trained weights no gradient")
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return step


def furthest(losses: Mapping[str, float]) -> float:
    """The largest relative difference between any of these losses and the first."""
    first = next(iter(losses.values()))
    return max(abs(loss - first) / abs(first) for loss in losses.values())
