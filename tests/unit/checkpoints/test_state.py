"""What a resumed run's optimizer is told."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixtral_recipes.checkpoints import state


def test_adams_count_of_steps_is_where_the_weights_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused Adam reads it there, unchecked: a count in host memory is an illegal access on a GPU."""
    weight = torch.nn.Parameter(torch.empty(2, device="meta"))  # a device that is not the CPU
    adam: Any = torch.optim.AdamW([weight], fused=False)
    adam.state[weight] = {"step": torch.zeros((), device="meta")}
    monkeypatch.setattr(state, "parts_of", lambda _: [SimpleNamespace(optimizer=adam)])
    state.set_steps(adam, 7)
    assert adam.state[weight]["step"].device == weight.device
