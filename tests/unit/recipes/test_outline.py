"""A recipe in outline is the recipe, as far as memory and time depend on it; default layouts run and fit."""

import pytest

from mixtral_recipes.layout import cards
from mixtral_recipes.overrides import loading
from mixtral_recipes.planner import memory
from mixtral_recipes.planner.plan import NEAR
from mixtral_recipes.planner.workload import Workload
from mixtral_recipes.recipes import catalog
from mixtral_recipes.recipes.outline import Question, default_layout, job_of, outline

pytestmark = pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size is not set:UserWarning")


def questions(name: str) -> list[Question]:
    entry = catalog.entry(name)
    found = []
    for precision in entry.precisions:
        for hardware in ("h100", "b200"):
            for fast in (False, True):
                found.append(Question(name, "pretrain", hardware, precision=precision, performance_mode=fast))
            for peft in catalog.PEFT_SCHEMES:
                if (peft, precision) == ("qlora", "fp8"):
                    continue
                for packed in (False, True):
                    found.append(Question(name, "finetune", hardware, None, None, precision, peft, packed))
    return found


@pytest.mark.parametrize("name", catalog.names())
def test_an_outline_is_the_recipe(name: str) -> None:
    for asked in questions(name):
        arguments: dict[str, object] = {"precision": asked.precision, "hardware": asked.hardware}
        if asked.task == "pretrain":
            arguments["performance_mode"] = asked.performance_mode
        else:
            arguments |= {"peft_scheme": asked.peft_scheme, "packed_sequence": asked.packed_sequence}
        recipe, mine = loading.load(name, asked.task, **arguments), outline(asked)
        assert Workload.of(mine) == Workload.of(recipe), asked
        assert mine.trainer.max_steps == recipe.trainer.max_steps
        assert mine.log.ckpt.save_top_k == recipe.log.ckpt.save_top_k


@pytest.mark.parametrize("name", catalog.names())
def test_every_default_layout_leaves_room(name: str) -> None:
    entry = catalog.entry(name)
    for key, layout in entry.layouts.items():
        task, _, hardware = key.partition("@")
        kind = "pretrain" if task in ("pretrain", "performance") else "finetune"
        for precision in entry.precisions:
            asked = Question(
                name, kind, hardware or "h100", None, None, precision, "lora" if task == "peft" else "none",
                task == "full_packed", task == "performance",
            )  # fmt: skip
            card = cards.card(asked.hardware)
            assert memory.of_job(job_of(asked), card).total < NEAR * card.memory_gb, key
        assert layout.why


def test_other_numbers_of_gpus_get_a_layout_that_fits() -> None:
    """NeMo's two-node example keeps PP4 and cannot start; the planner's layout does."""
    two_nodes = Question("mixtral_8x7b", "pretrain", num_nodes=2)
    layout = default_layout(two_nodes)
    card = cards.card("h100")
    assert layout.topology.world_size == 16
    assert memory.of_job(job_of(two_nodes), card).fits
    assert "planner" in layout.why


@pytest.mark.parametrize("card", ["h100", "h200", "a100"])
@pytest.mark.parametrize(("name", "gpus"), [("mixtral_8x7b", 1), ("mixtral_8x7b", 2), ("mixtral_8x22b", 4)])
def test_adapters_on_few_cards(name: str, gpus: int, card: str) -> None:
    asked = Question(name, "finetune", card, 1, gpus)
    fits = memory.of_job(job_of(asked), cards.card(card)).fits
    assert fits == (gpus > 1 or card == "h200")  # 93 GB of weights on one card
    layout = default_layout(asked)
    assert (layout.num_nodes, layout.num_gpus_per_node, layout.topology.world_size) == (1, gpus, gpus)
    assert ("according to the planner" in layout.why) == fits


def test_more_gpus_are_more_copies_of_the_same_layout() -> None:
    sizes = catalog.entry("mixtral_8x7b").layout("pretrain").topology.settings()
    layout = default_layout(Question("mixtral_8x7b", "pretrain", num_nodes=16))
    assert layout.topology.settings() == sizes
    assert layout.topology.world_size == 128


def test_what_fits_nowhere_is_given_the_leanest_layout() -> None:
    asked = Question("mixtral_8x22b", "finetune", num_nodes=1, peft_scheme="none")
    assert not memory.of_job(job_of(asked), cards.card("h100")).fits
    assert default_layout(asked).why == "No layout fits 8 H100 SXM 80 GB."
