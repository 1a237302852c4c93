"""``import mixtral_recipes as llm`` reads like NeMo's collection, and loads nothing until a name is used."""

import inspect
import subprocess
import sys
from typing import Any

import pytest

import mixtral_recipes as llm
from mixtral_recipes.recipes import catalog

HEAVY = ("torch", "nemo_run", "megatron", "transformers")


@pytest.mark.parametrize("name", [name for name in llm.__all__ if name != "__version__"])
def test_every_name_is_there(name: str) -> None:
    assert getattr(llm, name) is not None
    assert name in dir(llm)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'mixtral_9x7b'"):
        llm.mixtral_9x7b  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", catalog.names())
def test_every_recipe_module_has_nemos_functions(name: str) -> None:
    module = getattr(llm, name)
    assert name == module.NAME
    for function in ("model", "trainer", "pretrain_recipe", "finetune_recipe"):
        assert getattr(module, function).__factory__, "not a run.cli.factory"
    arguments = list(inspect.signature(module.trainer).parameters)[:11]
    assert arguments == [
        "tensor_parallelism",
        "pipeline_parallelism",
        "pipeline_parallelism_type",
        "virtual_pipeline_parallelism",
        "context_parallelism",
        "sequence_parallelism",
        "expert_parallelism",
        "num_nodes",
        "num_gpus_per_node",
        "max_steps",
        "callbacks",
    ]
    assert list(inspect.signature(module.pretrain_recipe).parameters)[:6] == [
        "dir",
        "name",
        "num_nodes",
        "num_gpus_per_node",
        "performance_mode",
        "fn",
    ]
    assert list(inspect.signature(module.finetune_recipe).parameters)[:6] == [
        "dir",
        "name",
        "num_nodes",
        "num_gpus_per_node",
        "peft_scheme",
        "packed_sequence",
    ]


def test_nemos_pretraining_values() -> None:
    recipe = llm.mixtral_8x7b.pretrain_recipe(name="mine", dir="runs", num_nodes=8, num_gpus_per_node=8)
    assert (recipe.data.global_batch_size, recipe.data.micro_batch_size) == (512, 1)
    assert (recipe.optim.config.lr, recipe.optim.config.adam_beta2) == (3e-4, 0.95)
    assert recipe.optim.lr_scheduler.min_lr == pytest.approx(3e-5)
    assert recipe.trainer.max_steps == 1_168_251
    assert (recipe.log.name, recipe.log.log_dir) == ("mine", "runs")
    # NeMo has True; our loop divides by label tokens, which an average in the collective would contradict.
    assert recipe.trainer.strategy.ddp.average_in_collective is False


def test_nemos_fine_tuning_values() -> None:
    recipe = llm.mixtral_8x22b.finetune_recipe()
    assert (recipe.data.seq_length, recipe.data.global_batch_size) == (2048, 128)
    assert (recipe.optim.config.lr, recipe.optim.config.adam_beta2) == (1e-4, 0.98)
    assert (recipe.optim.lr_scheduler.warmup_steps, recipe.optim.lr_scheduler.min_lr) == (50, 0.0)
    assert (recipe.trainer.num_nodes, recipe.trainer.strategy.tensor_model_parallel_size) == (8, 8)
    assert recipe.trainer.strategy.sequence_parallel is True
    assert recipe.resume.restore_config.path == "nemo://mistralai/Mixtral-8x22B-v0.1"
    assert recipe.peft.dim == 32
    assert recipe.peft.target_modules == ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    full = llm.mixtral_8x22b.finetune_recipe(peft_scheme=None, packed_sequence=True)
    assert full.peft is None
    assert full.optim.config.lr == 5e-6
    assert full.data.global_batch_size == 8
    assert full.data.packed_sequence_specs.packed_sequence_size == 2048


def test_performance_mode_is_nemos() -> None:
    recipe = llm.mixtral_8x7b.pretrain_recipe(performance_mode=True)
    strategy = recipe.trainer.strategy
    assert (strategy.tensor_model_parallel_size, strategy.expert_model_parallel_size) == (8, 1)
    assert strategy.sequence_parallel is True
    assert recipe.trainer.plugins.grad_reduce_in_fp32 is False
    assert [callback.__fn_or_cls__ for callback in recipe.trainer.callbacks] == [
        llm.TimingCallback,
        llm.MegatronTokenDropCallback,
        llm.GarbageCollectionCallback,
        llm.MegatronCommOverlapCallback,
    ]


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        f"import sys, mixtral_recipes, mixtral_recipes.recipes.catalog; print([m for m in {HEAVY} if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_nemos_command_line_has_nemos_commands() -> None:
    from nemo_run.cli.api import list_entrypoints

    import mixtral_recipes.cli.nemo_run_entry  # noqa: F401

    entries: Any = list_entrypoints("llm")["llm"]
    found = {entry.name for entry in entries.values()}
    assert {"train", "pretrain", "finetune", "validate", "import", "export", "generate", "evaluate"} <= found
