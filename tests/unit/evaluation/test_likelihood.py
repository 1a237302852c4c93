"""What is not a number is no score."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.evaluation import loss
from mixtral_recipes.evaluation.likelihood import Ending, likelihoods


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -2.5])
def test_likelihoods(value: float) -> None:
    def found(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((2, 3), value), torch.ones(2, 3, dtype=torch.bool)

    model: Any = SimpleNamespace(share=range, likelihoods=found)
    endings = [Ending([1, 2, 3, 4], 2)] * 2
    if value == -2.5:
        assert likelihoods(model, endings, 2) == [(-5.0, True)] * 2
        return
    with pytest.raises(CheckpointError, match="likelihoods are NaN or infinite"):
        likelihoods(model, endings, 2)


def test_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TrainingRun", "BatchShape", "get_forward_backward_func"):
        monkeypatch.setattr(loss, name, mock.Mock())
    monkeypatch.setattr(loss, "validate", lambda run: SimpleNamespace(loss=float("nan")))
    data: Any = SimpleNamespace(global_batch_size=4, micro_batch_size=2)
    with pytest.raises(CheckpointError, match="losses are NaN or infinite"):
        loss.loss_on(mock.Mock(topology=SimpleNamespace(data_parallel_size=2)), data, None)
