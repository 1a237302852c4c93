"""Every example file reads, passes preflight, and needs what its first lines say."""

from pathlib import Path

import pytest

from mixtral_recipes.executors.preflight import preflight
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.overrides.yaml_file import header, read_recipe

EXAMPLES = Path(__file__).parents[3] / "examples"
PROCESSES = {
    "mixtral_8x7b_squad_lora.yaml": 8,
    "mixtral_8x7b_squad_full.yaml": 32,
    "mixtral_8x22b_squad_lora.yaml": 64,
    "mixtral_8x22b_squad_full.yaml": 64,
    "mixtral_tiny.yaml": 2,
}


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.name)
def test_an_example_reads_and_fits(file: Path) -> None:
    recipe = read_recipe(file)
    preflight(recipe)
    assert Topology.of(recipe.trainer).world_size == PROCESSES[file.name]
    assert header(file)[1] == "finetune"


def test_one_node_is_enough_for_8x22b_adapters(tmp_path: Path) -> None:
    text = (EXAMPLES / "mixtral_8x22b_squad_lora.yaml").read_text().replace("# num_nodes: 1", "num_nodes: 1")
    file = tmp_path / "one_node.yaml"
    file.write_text(text)
    recipe = read_recipe(file)
    preflight(recipe)
    assert Topology.of(recipe.trainer).world_size == 8
