"""Router health: what is counted, and when a collapse is warned about."""

from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from mixtral_recipes.training.watch import router_health
from mixtral_recipes.training.watch.router_health import CollapseWatch, RouterHealth, Routing


class _Router(TopKRouter):
    """Megatron's type without its construction."""

    def __init__(self, layer: int, routing: Tensor) -> None:
        nn.Module.__init__(self)
        self.layer_number, self.topk, self.given = layer, 2, routing

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return input, self.given


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)


def _health(routing: Tensor) -> tuple[RouterHealth, _Router]:
    router = _Router(1, routing)
    return RouterHealth([nn.ModuleList([router])], 2, 4, torch.device("cpu")), router


def test_counts_choices_and_drops_and_starts_anew() -> None:
    routing = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)  # the second lost a choice
    health, router = _health(routing)
    router(torch.zeros(3))
    found = health.read()
    assert found.load.tolist() == [[3, 1, 0, 1], [0, 0, 0, 0]]
    assert found.dropped.tolist() == [1, 0]
    assert found.dropped_share == pytest.approx(1 / 6)
    assert health.read().load.sum() == 0


def test_padding_and_passes_without_gradients_do_not_count() -> None:
    health, router = _health(torch.ones(2, 4, dtype=torch.bool))
    with torch.no_grad():
        router(torch.zeros(2))
    router.eval()(torch.zeros(2))
    assert health.read().load.sum() == 0
    router.train()(torch.zeros(2), torch.tensor([False, True]))
    assert health.read().load[0].tolist() == [1, 1, 1, 1]
    health.close()
    router(torch.zeros(2))
    assert health.read().load.sum() == 0


def test_entropy_and_imbalance() -> None:
    even, lopsided = torch.full((1, 4), 10.0), torch.tensor([[40.0, 0, 0, 0]])
    assert Routing(even, torch.zeros(1)).entropy.tolist() == [pytest.approx(1.0)]
    assert Routing(lopsided, torch.zeros(1)).entropy.tolist() == [pytest.approx(0.0, abs=1e-6)]
    assert Routing(even, torch.zeros(1)).imbalance == 1.0
    assert Routing(lopsided, torch.zeros(1)).imbalance == 4.0


def _step(*load: float) -> Routing:
    return Routing(torch.tensor([[100.0] * 4, list(load)]), torch.zeros(2))


def test_a_collapse_is_warned_about_once_and_again_after_it_recovered() -> None:
    watch = CollapseWatch()

    def window(*load: float) -> list[str]:
        steps = router_health.TOKENS_PER_EXPERT * 4 // 400
        return [warning for _ in range(steps) for warning in watch.look(_step(*load))]

    assert window(100, 100, 100, 100) == []
    (warning,) = window(398, 1, 1, 0)
    assert "the router of layer 1 is collapsing" in warning
    assert "expert(s) 1, 2, 3" in warning
    assert window(400, 0, 0, 0) == []
    assert window(110, 90, 100, 100) == []
    assert len(window(400, 0, 0, 0)) == 1


def test_few_tokens_are_no_ground_for_a_warning() -> None:
    watch = CollapseWatch()
    small = Routing(torch.tensor([[4.0, 0, 0, 0]]), torch.zeros(1))
    assert [warning for _ in range(10) for warning in watch.look(small)] == []


def test_aux_losses_per_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tracker:
        def report(self, writer: Any, loss_scale: float, **kwargs: Any) -> None:
            for layer in range(2):
                writer.add_scalar(f"moe/load_balancing_loss_layer_{layer}", (layer + 1) * loss_scale, 0)
            writer.add_scalar("load_balancing_loss", 9.0, 0)

    monkeypatch.setattr(router_health, "get_moe_metrics_tracker", Tracker)
    assert router_health.read_aux_losses(2, 4) == {"load_balancing_loss": [0.25, 0.5]}
