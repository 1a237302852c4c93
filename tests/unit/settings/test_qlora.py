"""What a quantised base is refused for before anything starts."""

from typing import Any

import pytest

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.executors.preflight import preflight
from mixtral_recipes.layout.shapes import MIXTRAL_8X7B, MIXTRAL_TINY
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.overrides import loading, paths
from mixtral_recipes.recipes.outline import Question, outline
from mixtral_recipes.settings.peft import PEFT_STR2CLS, QLoRA, recorded, scheme_of
from mixtral_recipes.settings.precision import MegatronMixedPrecision

BF16 = MegatronMixedPrecision()


def test_its_record_is_read_back() -> None:
    scheme = QLoRA(dim=4, bits=8, block_size=128)
    assert scheme_of(recorded(scheme)) == scheme
    assert PEFT_STR2CLS["qlora"] is QLoRA


@pytest.mark.parametrize(
    ("scheme", "precision", "topology", "message"),
    [
        (QLoRA(bits=2), BF16, Topology(1), r"peft\.bits=2; use 4 \(NF4\) or 8 \(int8\)"),
        (QLoRA(block_size=48), BF16, Topology(1), r"peft\.block_size=48; use 32, 64"),
        (QLoRA(), MegatronMixedPrecision(fp8="hybrid"), Topology(1), "does not work with peft.class=QLoRA"),
        (
            QLoRA(),
            BF16,
            Topology(4, 4, sequence_parallel=True),
            "does not divide linear_fc2's rows of 32 weights on each of 4",
        ),
    ],
)
def test_refusals(scheme: QLoRA, precision: Any, topology: Topology, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        scheme.check_base(precision, MIXTRAL_TINY, topology)


def test_what_goes() -> None:
    QLoRA().check_base(BF16, MIXTRAL_8X7B, Topology(8, 8, sequence_parallel=True))
    QLoRA(bits=8).check_base(BF16, MIXTRAL_TINY, Topology(4, 4, sequence_parallel=True))


def test_preflight_refuses_fp8() -> None:
    recipe = loading.load("mixtral_8x7b", "finetune", peft_scheme="qlora")
    preflight(recipe)
    paths.apply(recipe, ["trainer.plugins.fp8=hybrid"])
    with pytest.raises(RecipeError, match=r"fp8='hybrid' does not work with peft\.class=QLoRA"):
        preflight(recipe)
    with pytest.raises(RecipeError, match=r"precision='fp8' does not work with peft_scheme='qlora'"):
        outline(Question("mixtral_8x7b", peft_scheme="qlora", precision="fp8"))
