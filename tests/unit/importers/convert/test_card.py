"""What an exported model says about where it came from."""

import json

import yaml

from mixtral_recipes.checkpoints.lineage.identity import Identity
from mixtral_recipes.checkpoints.lineage.record import Lineage, Parent
from mixtral_recipes.importers.convert.card import adapter_card, model_card
from tests.mixtral_folder import mixtral_config

RECIPE = {
    "peft.class": "LoRA",
    "peft.dim": 16,
    "data.class": "SquadDataModule",
    "trainer.seed": 1,
    "data.tokenizer": None,
}


def chain(origin: dict[str, str]) -> Lineage:
    """An export of adapters on a fine-tuned model on an import."""
    source = Lineage("source", Identity("f" * 64), origin=origin)
    model = Lineage("model", Identity("f" * 64), parents=(Parent("source", source, "/home/someone/model"),))
    run = {"name": "a", "step": 5, "consumed_samples": 40}
    tuned = Lineage("training", Identity("e" * 64), run=run, parents=(Parent("start", model, "/home/someone/m"),))
    run = {"name": "b|c", "step": 20, "consumed_samples": 640}
    data = {"form": "SQuAD", "sha256": "d" * 64}
    links = (Parent("base", tuned, "/home/someone/runs"),)
    adapter = Lineage("adapter", Identity("c" * 64), run=run, recipe=RECIPE, data=data, parents=links)
    return Lineage("export", Identity("b" * 64, None, "a" * 64), parents=(Parent("checkpoint", adapter, "/home/x"),))


def test_the_card() -> None:
    card = model_card(chain({"id": "hf://org/name", "revision": "abc123"}), mixtral_config(), "v4", "BF16")
    assert "base_model: org/name" in card
    assert "# name (exported)" in card
    for row in (
        "| revision | abc123 |",
        "| step | 20 |",
        "| run | b\\|c |",
        "| recipe | `peft.class=LoRA`, `peft.dim=16`, `data.class=SquadDataModule` |",
        "| adapter | run b\\|c, step 20 | cccccccccccc | - | SQuAD dddddddddddd |",
        "| source | hf://org/name@abc123 | ffffffffffff |",
    ):
        assert row in card
    assert "2 layers and 8 experts (top 2)" in card
    assert "/home" not in card


def test_a_model_that_began_in_a_folder_has_no_base_on_the_hub() -> None:
    card = model_card(chain({"folder": "mine"}), mixtral_config(), "v5", "BF16")
    assert "base_model" not in card
    assert "| source | folder mine |" in card


def test_words_that_stand_for_a_folder_are_explained() -> None:
    settings = {"r": 4, "lora_alpha": 8, "rank_pattern": {}, "use_dora": False, "target_modules": ["q_proj"]}
    card = adapter_card(chain({"folder": "mine"}), settings | {"target_parameters": None}, "v4")
    assert 'from_pretrained("BASE_MODEL")' in card
    assert "`THIS_FOLDER` is where this adapter is, and `BASE_MODEL` is a Hugging Face folder" in card


def test_what_others_wrote_stays_text() -> None:
    """In the front matter, in a heading, in tables and in code: nothing that a name holds becomes Markdown or YAML."""
    name = "org/a: b\n---\n<img src=x>|*bold* `code` \x1b[31m"
    record = chain({"id": f"hf://{name}", "revision": "a|b"})
    card = model_card(record, mixtral_config(), "v4", "BF16")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == name
    shown = r"a: b\\n---\\n\<img src=x\>\|\*bold\* \`code\` \\x1b\[31m"
    assert f"# {shown} (exported)\n" in body
    assert f"hf://org/{shown}@a\\|b" in body
    assert "\x1b" not in body
    settings = {"r": 4, "lora_alpha": 8, "rank_pattern": {}, "use_dora": False, "target_modules": ["a`b"]}
    card = adapter_card(record, settings | {"target_parameters": None}, "v4")
    assert f"from_pretrained({json.dumps(name)})" in card
    assert "on a\\`b;" in card
    assert "BASE_MODEL" not in card
    assert "`data.class=SquadDataModule`" in card
