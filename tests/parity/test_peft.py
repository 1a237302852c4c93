"""Training steps under LoRA and DoRA equal peft's on transformers, from the same adapters on the same batches, fp32.

Compared on attention's output projection, the one linear layer that is a single matrix on both sides: transformers has
q, k and v apart, and holds all experts of a layer in one tensor. Merged adapters of every layer are compared in
test_import_export.py.
"""

from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mixtral_recipes.peft.attach import adapters_of
from mixtral_recipes.settings.peft import DoRA, LoRA
from mixtral_recipes.training.step import train_step
from tests.distributed.harness import launch
from tests.distributed.small_run import SmallData
from tests.parity.hf_mixtral import CLIP, LR, Folders, hf_model, our_run

TOLERANCE = 1e-5  # relative, fp32
STEPS = 5
DIM, ALPHA = 4, 8

Steps = tuple[list[float], list[float]]


def our_steps(folders: Folders, peft: LoRA) -> tuple[Steps, dict[str, torch.Tensor]]:
    """Losses, gradient norms, and the adapters' A before the first step by layer."""
    run = our_run(folders, peft=peft)
    adapters: list[Any] = adapters_of(run.model)
    start = {adapter.layer_name.split(".")[2]: adapter.lora_a.detach().clone() for adapter in adapters}
    batches = run.data.train_batches(run.data_place, **run.loader_shape)
    results = [train_step(run, batches) for _ in range(STEPS)]
    return ([r.loss for r in results], [r.grad_norm for r in results]), start


def peft_steps(folders: Folders, start: dict[str, torch.Tensor], dora: bool) -> Steps:
    """The same with peft, written by hand."""
    from peft import LoraConfig, get_peft_model

    from mixtral_recipes.data.batches.batch import DataParallelPlace

    base: Any = hf_model(folders)
    model: Any = get_peft_model(base, LoraConfig(r=DIM, lora_alpha=ALPHA, target_modules=["o_proj"], use_dora=dora))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data.copy_(start[name.split(".layers.")[1].split(".")[0]])
    data = SmallData()
    data.setup(None)
    batches = data.train_batches(DataParallelPlace(), multiple=8)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses, norms = [], []
    for _ in range(STEPS):
        step = list(islice(batches, data.global_batch_size // data.micro_batch_size))
        labels = sum(batch["loss_mask"].sum() for batch in step)
        losses.append(0.0)
        for batch in step:
            mask = torch.ones_like(batch["tokens"])
            if "padding_mask" in batch:
                mask = batch["padding_mask"].logical_not().long()
            logits = model(input_ids=batch["tokens"], attention_mask=mask).logits
            each = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
            loss = (each * batch["loss_mask"].flatten()).sum() / labels
            loss.backward()
            losses[-1] += float(loss.detach())
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_steps_equal_pefts(folders: Folders, kind: type[LoRA]) -> None:
    ours, start = launch(1, our_steps, folders, kind(target_modules=["linear_proj"], dim=DIM, alpha=ALPHA))[0]
    theirs = launch(1, peft_steps, folders, start, kind is DoRA)[0]
    assert len(start) == 4
    assert ours[0] == pytest.approx(theirs[0], rel=TOLERANCE)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-4)
    assert ours[0][-1] != pytest.approx(ours[0][0], rel=1e-3)
