"""The experts of each layer that got most tokens, out of what a run logged."""

import json
from pathlib import Path

import pytest

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.peft.busiest import with_experts_named
from mixtral_recipes.settings.peft import LoRA

LOADS = [[[5, 0, 9, 1], [0, 8, 8, 8]], [[5, 9, 0, 1], [30, 0, 0, 0]]]  # steps, layers, experts


@pytest.fixture
def logged(tmp_path: Path) -> Path:
    lines = [{"kind": "start"}, *({"kind": "train", "expert_load": load} for load in LOADS), {"kind": "train"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_every_layer_has_its_own(logged: Path) -> None:
    for place in (logged, logged / "metrics.jsonl"):
        scheme = with_experts_named(LoRA(experts="busiest:2", router_load=str(place)), 2, 4)
        assert scheme.experts == {"0": [0, 1], "1": [0, 1]}  # layer 0 took 10, 9, 9, 2; layer 1 30, 8, 8, 8
        assert scheme.router_load is None
    chosen = with_experts_named(LoRA(experts="busiest:1", router_load=str(logged), layers="1"), 2, 4)
    assert chosen.experts == {"1": [0]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"experts": "busiest:2"},
            "needs the folder of a run that counted its experts' load",
        ),
        ({"router_load": "{}"}, "needs peft.experts=busiest:N"),
        ({"experts": "busiest:x", "router_load": "{}"}, "needs a number of experts per layer, e.g. busiest:4"),
        ({"experts": "busiest:0", "router_load": "{}"}, "needs a number of experts"),
        ({"experts": f"busiest:{'9' * 5000}", "router_load": "{}"}, "needs a number of experts"),
        ({"experts": "busiest:5", "router_load": "{}"}, "but the model has 4 experts"),
        (
            {"experts": "busiest:2", "router_load": "{}/nothing"},
            "cannot be read as a run's metrics.jsonl .*; set it to the run's folder",
        ),
    ],
)
def test_refusals(logged: Path, settings: dict[str, str], message: str) -> None:
    scheme = LoRA(**{name: value.format(logged) for name, value in settings.items()})  # pyright: ignore
    with pytest.raises(RecipeError, match=message):
        with_experts_named(scheme, 2, 4)


def test_the_load_of_another_model_is_refused(logged: Path) -> None:
    with pytest.raises(RecipeError, match="from a model with 2 layers and 4 experts, but this one has 3 and 4"):
        with_experts_named(LoRA(experts="busiest:2", router_load=str(logged)), 3, 4)
    (logged / "metrics.jsonl").write_text('{"kind": "train"}\n')
    with pytest.raises(RecipeError, match="no step of that run recorded the experts' load"):
        with_experts_named(LoRA(experts="busiest:2", router_load=str(logged)), 2, 4)
