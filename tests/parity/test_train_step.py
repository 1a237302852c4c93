"""Training steps equal those of transformers with torch's AdamW on the same batches, fp32."""

from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from mixtral_recipes.training.step import train_step
from tests.distributed.harness import launch
from tests.distributed.small_run import SmallData
from tests.parity.hf_mixtral import CLIP, LR, Folders, hf_model, our_run

TOLERANCE = 1e-5  # relative, fp32
STEPS = 5


def our_steps(folders: Folders, expert_parallel: int) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of our loop."""
    run = our_run(folders, {"expert_model_parallel_size": expert_parallel})
    batches = run.data.train_batches(run.data_place, **run.loader_shape)
    results = [train_step(run, batches) for _ in range(STEPS)]
    return [r.loss for r in results], [r.grad_norm for r in results]


def transformers_steps(folders: Folders) -> tuple[list[float], list[float]]:
    """The same written by hand: padded microbatches, one mean over the global batch's label tokens."""
    from mixtral_recipes.data.batches.batch import DataParallelPlace

    model = hf_model(folders)
    data = SmallData()
    data.setup(None)
    batches = data.train_batches(DataParallelPlace(), multiple=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses, norms = [], []
    for _ in range(STEPS):
        step = list(islice(batches, data.global_batch_size // data.micro_batch_size))
        labels = sum(batch["loss_mask"].sum() for batch in step)
        total = torch.zeros(())
        for batch in step:
            mask = torch.ones_like(batch["tokens"])
            if "padding_mask" in batch:
                mask = batch["padding_mask"].logical_not().long()
            logits = model(batch["tokens"], attention_mask=mask).logits
            each = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
            loss = (each * batch["loss_mask"].flatten()).sum() / labels
            loss.backward()
            total += loss.detach()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        losses.append(float(total))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_equal_transformers(folders: Folders, ranks: int) -> None:
    losses, norms = launch(1, transformers_steps, folders)[0]
    for found_losses, found_norms in launch(ranks, our_steps, folders, ranks):
        assert found_losses == pytest.approx(losses, rel=TOLERANCE)
        assert found_norms == pytest.approx(norms, rel=1e-4)
    assert losses[-1] != pytest.approx(losses[0], rel=1e-3)
