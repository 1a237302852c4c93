"""What a step and a validation make of the losses of their tokens."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.training.run import TrainingRun
from mixtral_recipes.training.step import sum_losses, validate
from tests.fake_world import one_of


def test_only_label_tokens_count() -> None:
    losses = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    mask, padding = torch.tensor([[0.0, 1.0, 1.0, 0.0]]), torch.tensor([[False, False, False, True]])
    total, count, sums = sum_losses(mask, padding, None, losses)
    assert (float(total), int(count), sums.tolist()) == (6.0, 2, [6.0, 2.0, 3.0])
    assert sum_losses(mask, None, None, losses)[2].tolist() == [6.0, 2.0, 4.0]


@pytest.mark.parametrize("padded", [False, True])
def test_the_losses_are_summed_where_they_are(padded: bool) -> None:
    """What is made on the host and brought to a GPU makes the host wait until all before it is done."""
    made: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                made.add(result.device.type)
            return result

    losses = torch.ones(1, 4, device="meta")
    padding = torch.zeros(1, 4, dtype=torch.bool, device="meta") if padded else None
    with Watch():
        sum_losses(losses, padding, None, losses)
    assert made == {"meta"}


def test_sources_are_counted_apart() -> None:
    losses, mask = torch.tensor([[1.0, 2.0], [4.0, 8.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    sources = torch.tensor([[[True, False, False]] * 2, [[False, False, True]] * 2])
    assert sum_losses(mask, None, sources, losses)[2].tolist() == [11.0, 3.0, 4.0, 3.0, 0.0, 8.0, 2.0, 0.0, 1.0]


def test_validation_is_a_mean_over_label_tokens_not_over_batches() -> None:
    batches = iter([[torch.tensor([30.0, 10.0, 12.0, 30, 0, 10, 0])], [torch.tensor([1.0, 1.0, 4.0, 0, 1, 0, 1])]])
    run = SimpleNamespace(
        data=SimpleNamespace(
            validation_batches=lambda place, **_: iter(()),
            num_validation_batches=lambda limit, **_: 2,
            source_names=["a", "b"],
        ),
        data_place=None,
        trainer=SimpleNamespace(limit_val_batches=2),
        loader_shape={"sequence_multiple": 1},
        gather_parameters=lambda: None,
        model=[torch.nn.Linear(1, 1)],
        ddp=[torch.nn.Linear(1, 1)],
        forward_backward=lambda **_: next(batches),
        topology=SimpleNamespace(num_microbatches=lambda batch: 1),
        batch=SimpleNamespace(seq_length=4, micro_batch_size=1),
        device=torch.device("cpu"),
    )
    with one_of(Topology(world_size=1), 0):
        losses = validate(cast(TrainingRun, cast(Any, run)))
    assert losses == ((30 + 1) / (10 + 1), {"a": 3.0, "b": 1.0})
    assert run.ddp[0].training, "left in evaluation mode"
