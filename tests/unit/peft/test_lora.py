"""Which layers a scheme adapts, and what it refuses (numbers: tests/parity/test_peft.py and tests/distributed)."""

import dataclasses
import json

import pytest

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.layout.shapes import MIXTRAL_TINY
from mixtral_recipes.planner.workload import adapters_of
from mixtral_recipes.settings.classes import OURS
from mixtral_recipes.settings.peft import ALL_LINEAR, SCHEMES, DoRA, LoRA, QLoRA, recorded, scheme_of


@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, set(ALL_LINEAR)),
        ({"target_modules": "all-linear"}, set(ALL_LINEAR)),
        ({"target_modules": "attention"}, {"linear_qkv", "linear_proj"}),
        ({"target_modules": "linear_fc1"}, {"linear_fc1"}),
        ({"target_modules": ["linear_qkv", "linear_fc2"]}, {"linear_qkv", "linear_fc2"}),
        ({"exclude_modules": ["linear_fc1", "linear_fc2"]}, {"linear_qkv", "linear_proj"}),
        ({"exclude_modules": ["output_layer"], "target_modules": []}, set(ALL_LINEAR)),  # NeMo's: all but these
    ],
)
def test_targets(kind: type[LoRA], settings: dict[str, object], expected: set[str]) -> None:
    assert kind(**settings).targets() == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["*.layers.0.*.linear_qkv"]}, r"a pattern; name the kinds of layer .* peft\.layers"),
        ({"target_modules": ["linear_qkv"], "exclude_modules": ["lm_head"]}, "exclude_modules names 'lm_head'"),
        ({"target_modules": ["output_layer"]}, "target_modules names 'output_layer'"),
        ({"target_modules": ["linear_qvk"]}, r"target_modules names 'linear_qvk'.*linear_qkv"),
        ({"target_modules": "atention"}, r"'atention'.*attention"),
        ({"exclude_modules": ["router"]}, "'router'"),
        ({"dropout_position": "middle"}, "dropout_position='middle'"),
        ({"lora_B_init_method": "xavier"}, "use 'zero'"),
        ({"exclude_modules": list(ALL_LINEAR)}, "leave no layer to adapt"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save names 'lm_head', which Megatron calls output_layer"),
        ({"modules_to_save": ["output_lager"]}, "'output_lager'.*output_layer"),
        ({"loraplus_lr_ratio": 0.0}, "loraplus_lr_ratio=0.0 must be positive"),
        ({"experts": "0", "target_modules": "attention"}, "selects experts, but none of their layers is adapted"),
    ],
)
def test_refusals(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        LoRA(**settings).targets()


@pytest.mark.parametrize(
    ("scheme", "layer", "dim", "scale"),
    [
        (LoRA(dim=8, alpha=12), "linear_fc1", 8, 1.5),
        (LoRA(dim=16, alpha=8, use_rslora=True), "linear_fc1", 16, 2.0),
        (LoRA(dim=8, rank_pattern={"linear_fc1": 4}), "decoder.layers.3.mlp.experts.5.linear_fc1", 4, 8.0),
        (LoRA(dim=8, alpha=8, alpha_pattern={"linear_qkv": 2}), "decoder.layers.0.self_attention.linear_qkv", 8, 0.25),
    ],
)
def test_rank_and_scale_of_a_layer(scheme: LoRA, layer: str, dim: int, scale: float) -> None:
    assert (scheme.dim_of(layer), scheme.scale_of(layer)) == (dim, scale)


def test_a_pattern_for_a_layer_that_is_not_adapted_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"peft\.rank_pattern names 'linear_fc1', which is not adapted"):
        LoRA(target_modules="attention", rank_pattern={"linear_fc1": 4}).targets()
    with pytest.raises(RecipeError, match=r"peft\.rank_pattern\.linear_fc1=0 must be positive"):
        LoRA(rank_pattern={"linear_fc1": 0}).targets()


ATTENTION, EXPERT = "decoder.layers.{}.self_attention.linear_qkv", "decoder.layers.{}.mlp.experts.{}.linear_fc1"


@pytest.mark.parametrize(
    ("settings", "adapted", "left"),
    [
        ({"layers": "2-3"}, [ATTENTION.format(2), EXPERT.format(3, 7)], [ATTENTION.format(1), ATTENTION.format(4)]),
        ({"layers": "0,2-"}, [ATTENTION.format(0), EXPERT.format(9, 7)], [ATTENTION.format(1)]),
        ({"layers": [5]}, [ATTENTION.format(5)], [EXPERT.format(4, 0)]),
        ({"experts": "0,3"}, [ATTENTION.format(1), EXPERT.format(2, 3)], [EXPERT.format(2, 1)]),
        ({"experts": [12]}, [EXPERT.format(2, 12)], [EXPERT.format(2, 1), EXPERT.format(12, 2)]),
        ({"experts": {"1": [2]}}, [EXPERT.format(1, 2), ATTENTION.format(0)], [EXPERT.format(0, 2)]),
        ({"layers": "1", "experts": "2"}, [EXPERT.format(1, 2)], [EXPERT.format(2, 1), ATTENTION.format(2)]),
    ],
)  # fmt: skip
def test_layers_and_experts(settings: dict[str, object], adapted: list[str], left: list[str]) -> None:
    scheme = LoRA(**settings)
    assert all(scheme.adapts(name) for name in adapted)
    assert not any(scheme.adapts(name) for name in left)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "2-8"}, r"peft\.layers='2-8' names layer 8, but the model has 8 \(0 to 7\)"),
        ({"layers": "4-2"}, "'4-2' is not a number or range"),
        ({"layers": "all"}, "'all' is not a number or range; use e.g. 0,3 or 8-31 or 24-"),
        ({"layers": f"0-{'9' * 5000}"}, "is not a number or range"),
        ({"layers": []}, r"peft\.layers=\[\] names no layer"),
        ({"layers": [-1]}, "names layer -1"),
        ({"experts": "0,4"}, r"peft\.experts='0,4' names expert 4, but the model has 4"),
        ({"experts": {"8": [0]}}, "peft.experts names layer 8, but the model has 8"),
        ({"experts": {"9" * 5000: [0]}}, "but the model has 8"),
        ({"experts": {"1": [], "2": [0]}, "layers": "0-1"}, "names no expert in the layers that are adapted"),
        ({"experts": {"1": [4]}}, r"peft\.experts\.1=\[4\] names expert 4"),
    ],
)
def test_what_matches_nothing_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        LoRA(**settings).check_against(8, 4)


@pytest.mark.parametrize(
    "scheme",
    [
        LoRA(dim=4, rank_pattern={"linear_fc1": 2}),
        DoRA(alpha=3, use_rslora=True),
        LoRA(layers="1-", experts={"1": [0, 2]}, modules_to_save=["output_layer"], loraplus_lr_ratio=16),
    ],
)
def test_what_is_recorded_is_read_back(scheme: LoRA) -> None:
    assert scheme_of(json.loads(json.dumps(recorded(scheme)))) == scheme


@dataclasses.dataclass
class Narrow(QLoRA):
    dim: int = 4
    note: str = "mine"


@dataclasses.dataclass
class Louder(LoRA):
    def scale_of(self, layer: str) -> float:
        return 2 * super().scale_of(layer)


def test_checkpoints_record_every_scheme_of_ours() -> None:
    assert set(SCHEMES) == {name for name, module in OURS.items() if module == "settings.peft"}


def test_a_class_of_a_users_own_is_recorded_as_what_it_derives_from() -> None:
    assert scheme_of(json.loads(json.dumps(recorded(Narrow())))) == QLoRA(dim=4)
    assert adapters_of(Narrow(), MIXTRAL_TINY) == adapters_of(QLoRA(dim=4), MIXTRAL_TINY)


def test_a_scheme_that_calculates_differently_is_refused_before_it_is_trained() -> None:
    with pytest.raises(RecipeError, match=r"peft=Louder overrides LoRA\.scale_of"):
        Louder().check_against(8, 4)
