"""Every recipe x task x precision x adapters x packing x hardware builds, reloads equal, passes preflight.

Models are built once per layout; with MIXTRAL_RECIPES_FULL_MATRIX=1 for every single case.
"""

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

from mixtral_recipes.executors.preflight import preflight
from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.overrides import loading, paths
from mixtral_recipes.overrides.yaml_file import read_recipe, write_recipe
from mixtral_recipes.peft.attach import adapters_of
from mixtral_recipes.planner.weights import parameters
from mixtral_recipes.recipes import catalog

# Megatron says so of every configuration without shared experts' sizes; the value it takes is the one we want.

Case = tuple[str, str, dict[str, Any]]


def cases(hardware: tuple[str, ...]) -> list[Case]:
    """The whole matrix."""
    found: list[Case] = []
    for entry, gpu in itertools.product(catalog.CATALOG.values(), hardware):
        for precision in entry.precisions:
            common = {"precision": precision, "hardware": gpu}
            found += [(entry.name, "pretrain", common | {"performance_mode": fast}) for fast in (False, True)]
            for peft, packed in itertools.product(catalog.PEFT_SCHEMES, (False, True)):
                if (peft, precision) != ("qlora", "fp8"):  # refused
                    found.append((entry.name, "finetune", common | {"peft_scheme": peft, "packed_sequence": packed}))
    return found


def case_id(case: Case) -> str:
    return "-".join([case[0], case[1], *(str(value) for value in case[2].values())])


def layout_key(case: Case) -> tuple[Any, ...]:
    """What decides a case's model: its layout and whether there are adapters; packing and GPU only through them."""
    recipe = loading.load(case[0], case[1], **case[2])
    return case[0], Topology.of(recipe.trainer), case[2].get("peft_scheme", "none") != "none"


def covering(all_cases: list[Case]) -> list[Case]:
    """One case per layout, the precisions taken in turn."""
    if os.environ.get("MIXTRAL_RECIPES_FULL_MATRIX"):
        return all_cases
    chosen: dict[tuple[Any, ...], list[Case]] = {}
    for case in all_cases:
        chosen.setdefault(layout_key(case), []).append(case)
    return [group[number % len(group)] for number, group in enumerate(chosen.values())]


@pytest.mark.filterwarnings("ignore:memory. about:UserWarning")  # 64k is near the limit of 80 GB
@pytest.mark.parametrize("name", catalog.names())
def test_every_case_reloads_equal_and_passes_preflight(name: str, tmp_path: Path) -> None:
    serializer = ZlibJSONSerializer()
    for case in cases(tuple(catalog.HARDWARE)):
        if case[0] != name:
            continue
        recipe = loading.load(case[0], case[1], **case[2])
        if (name, case[1]) == ("mixtral_8x3b", "finetune"):  # there is no public checkpoint of it
            paths.set_value(recipe, "resume.restore_config.path", "hf://own/mixtral-8x3b")
        preflight(recipe, case[2]["hardware"])
        if case[2]["hardware"] == "h100" or (case[2]["hardware"], case[2]["precision"]) == ("b200", "fp8"):
            assert serializer.deserialize(serializer.serialize(recipe)) == recipe, case_id(case)
            write_recipe(recipe, tmp_path / "recipe.yaml", name=name)
            assert read_recipe(tmp_path / "recipe.yaml") == recipe, case_id(case)


def test_the_catalog_is_what_the_recipes_build() -> None:
    for case in cases(("h100",)):
        entry, recipe = catalog.entry(case[0]), loading.load(case[0], case[1], **case[2])
        shape = ModelShape.of(recipe.model.config)
        assert (shape.num_layers, shape.hidden_size, shape.num_attention_heads, shape.num_query_groups) == (
            entry.shape.num_layers,
            entry.shape.hidden_size,
            entry.shape.num_attention_heads,
            entry.shape.num_query_groups,
        )
        assert (shape.ffn_hidden_size, shape.num_moe_experts) == (
            entry.shape.ffn_hidden_size,
            entry.shape.num_moe_experts,
        )
        assert shape.max_position_embeddings == entry.shape.max_position_embeddings
        assert recipe.data.seq_length == (entry.seq_length if case[1] == "pretrain" else entry.finetune_seq_length)


@pytest.mark.parametrize("name", catalog.names())
def test_a_trainer_alone_has_the_catalogs_layout(name: str) -> None:
    import mixtral_recipes as llm

    recipe = loading.load(name, "pretrain")
    recipe.trainer = getattr(llm, name).trainer()
    assert Topology.of(recipe.trainer) == catalog.entry(name).layout("pretrain").topology


def check_both_ends(build_rank: Any, case: Case) -> None:
    recipe = loading.load(case[0], case[1], **case[2])
    adapts = getattr(recipe, "peft", None) is not None
    for rank in (0, Topology.of(recipe.trainer).world_size - 1):
        chunks = build_rank(recipe, rank)
        assert len(chunks) == (Topology.of(recipe.trainer).virtual_pipeline_model_parallel_size or 1)
        assert not [name for chunk in chunks for name, p in chunk.named_parameters() if not p.is_meta]
        assert bool(adapters_of(chunks)) == adapts
        trained = {name for chunk in chunks for name, p in chunk.named_parameters() if p.requires_grad}
        assert all(".adapter." in name for name in trained) == adapts


@pytest.mark.parametrize("case", covering(cases(("h100",))), ids=case_id)
def test_first_and_last_rank_build(build_rank: Any, case: Case) -> None:
    check_both_ends(build_rank, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", covering(cases(("h200", "b200", "gb200"))), ids=case_id)
def test_first_and_last_rank_build_on_other_hardware(build_rank: Any, case: Case) -> None:
    check_both_ends(build_rank, case)


@pytest.mark.parametrize(("name", "published"), [("mixtral_8x7b", 46_702_792_704), ("mixtral_8x22b", 140_620_634_112)])
def test_parameters_over_all_ranks_are_the_published_number(build_rank: Any, name: str, published: int) -> None:
    recipe = loading.load(name, "pretrain")
    topology, config = Topology.of(recipe.trainer), recipe.model.config
    ranks_per_stage = topology.world_size // topology.pipeline_model_parallel_size
    total = 0
    for stage in range(topology.pipeline_model_parallel_size):
        for chunk in build_rank(recipe, stage * ranks_per_stage):
            for parameter in chunk.parameters():
                total += parameter.numel() * copies(parameter, topology)
    padding = (
        ModelShape.of(recipe.model.config).padded_vocab_size(topology.tensor_model_parallel_size) - config.vocab_size
    )
    assert total - 2 * padding * config.hidden_size == published == parameters(catalog.entry(name).shape)


def copies(parameter: Any, topology: Any) -> int:
    """How many ranks of a stage hold a different part of a parameter."""
    if not getattr(parameter, "allreduce", True):  # Megatron's mark of an expert's parameter
        return topology.expert_model_parallel_size * topology.expert_tp
    return topology.tensor_model_parallel_size if getattr(parameter, "tensor_model_parallel", False) else 1


def test_the_long_recipes_reach_their_length() -> None:
    for name in catalog.names():
        recipe = loading.load(name, "pretrain")
        assert recipe.model.config.max_position_embeddings >= recipe.data.seq_length


def test_instruct_starts_from_the_instruct_model() -> None:
    recipe = loading.load("mixtral_8x22b", "finetune", instruct=True)
    assert recipe.resume.restore_config.path == "nemo://mistralai/Mixtral-8x22B-Instruct-v0.1"
    assert recipe.model.config.vocab_size == 32768
