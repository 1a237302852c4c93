"""Settings changed from Python, from the command line and from YAML: the same result, and errors that help."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
import torch
import yaml

import mixtral_recipes as llm
from mixtral_recipes.errors import RecipeError
from mixtral_recipes.overrides import completion as override_paths
from mixtral_recipes.overrides import loading
from mixtral_recipes.overrides import paths as overrides
from mixtral_recipes.overrides.yaml_file import read_recipe
from tests.scripts import script

# Every path of NeMo's recipes that users override: (task, path, text on the command line, value in YAML, in Python).
PATHS: list[tuple[str, str, str, Any, Any]] = [
    ("finetune", "model.config.num_layers", "16", 16, 16),
    ("finetune", "model.config.seq_length", "2048", 2048, 2048),
    ("finetune", "model.config.max_position_embeddings", "32768", 32768, 32768),
    ("finetune", "model.config.rotary_base", "5e5", 5e5, 5e5),
    ("finetune", "model.config.moe_aux_loss_coeff", "0.02", 0.02, 0.02),
    ("finetune", "model.config.recompute_granularity", "full", "full", "full"),
    ("finetune", "model.config.recompute_modules", "['moe']", ["moe"], ["moe"]),
    (
        "finetune",
        "model.config.recompute_modules",
        "[moe, mla_up_proj]",
        ["moe", "mla_up_proj"],
        ["moe", "mla_up_proj"],
    ),
    ("finetune", "model.config.num_query_groups", "4", 4, 4),
    ("finetune", "model.config.activation_func", "gelu", "gelu", torch.nn.functional.gelu),
    ("finetune", "trainer.accelerator", "cpu", "cpu", "cpu"),
    ("finetune", "trainer.devices", "4", 4, 4),
    ("finetune", "trainer.num_nodes", "2", 2, 2),
    ("finetune", "trainer.max_steps", "20", 20, 20),
    ("finetune", "trainer.val_check_interval", "5", 5, 5),
    ("finetune", "trainer.limit_val_batches", "3", 3, 3),
    ("finetune", "trainer.limit_test_batches", "None", None, None),
    ("finetune", "trainer.log_every_n_steps", "2", 2, 2),
    ("finetune", "trainer.accumulate_grad_batches", "1", 1, 1),
    (
        "finetune",
        "trainer.callbacks",
        "[TimingCallback,GarbageCollectionCallback(gc_interval_train=5)]",
        [{"_target_": "TimingCallback"}, {"_target_": "GarbageCollectionCallback", "gc_interval_train": 5}],
        [run.Config(llm.TimingCallback), run.Config(llm.GarbageCollectionCallback, gc_interval_train=5)],
    ),
    ("finetune", "trainer.strategy.ddp", "megatron", "megatron", "megatron"),
    (
        "finetune",
        "trainer.plugins",
        "MegatronMixedPrecision(precision='32')",
        {"_target_": "MegatronMixedPrecision", "precision": "32"},
        run.Config(llm.MegatronMixedPrecision, precision="32"),
    ),
    ("finetune", "trainer.strategy.tensor_model_parallel_size", "2", 2, 2),
    ("finetune", "trainer.strategy.pipeline_model_parallel_size", "2", 2, 2),
    ("finetune", "trainer.strategy.virtual_pipeline_model_parallel_size", "4", 4, 4),
    ("finetune", "trainer.strategy.pipeline_dtype", "torch.float32", "float32", torch.float32),
    ("finetune", "trainer.strategy.context_parallel_size", "2", 2, 2),
    ("finetune", "trainer.strategy.sequence_parallel", "True", True, True),
    ("finetune", "trainer.strategy.expert_model_parallel_size", "4", 4, 4),
    ("finetune", "trainer.strategy.expert_tensor_parallel_size", "1", 1, 1),
    ("finetune", "trainer.strategy.gradient_as_bucket_view", "false", False, False),
    ("finetune", "trainer.strategy.ckpt_async_save", "true", True, True),
    ("finetune", "trainer.strategy.ckpt_parallel_load", "true", True, True),
    ("finetune", "trainer.strategy.ckpt_load_strictness", "None", None, None),
    ("finetune", "trainer.strategy.ddp.overlap_grad_reduce", "True", True, True),
    ("finetune", "trainer.strategy.ddp.bucket_size", "1000", 1000, 1000),
    ("finetune", "trainer.plugins.precision", "16-mixed", "16-mixed", "16-mixed"),
    ("finetune", "trainer.plugins.grad_reduce_in_fp32", "False", False, False),
    ("finetune", "trainer.plugins.fp8", "hybrid", "hybrid", "hybrid"),
    ("finetune", "trainer.plugins.fp8_recipe", "tensorwise", "tensorwise", "tensorwise"),
    ("finetune", "data.seq_length", "1024", 1024, 1024),
    ("finetune", "data.global_batch_size", "64", 64, 64),
    ("finetune", "data.micro_batch_size", "2", 2, 2),
    (
        "finetune",
        "data.packed_sequence_specs",
        "PackedSequenceSpecs(packed_sequence_size=512)",
        {"_target_": "PackedSequenceSpecs", "packed_sequence_size": 512},
        run.Config(llm.PackedSequenceSpecs, packed_sequence_size=512),
    ),
    ("finetune", "data.num_workers", "2", 2, 2),
    ("finetune", "data.dataset_root", "some.folder/squad.json", "some.folder/squad.json", "some.folder/squad.json"),
    ("finetune", "data.dataset_kwargs", "{'a': 1}", {"a": 1}, {"a": 1}),
    ("finetune", "optim.config.lr", "1e-5", 1e-5, 1e-5),
    ("finetune", "optim.config.adam_beta2", "0.99", 0.99, 0.99),
    ("finetune", "optim.lr_scheduler.warmup_steps", "7", 7, 7),
    ("finetune", "optim.lr_scheduler.constant_steps", "3", 3, 3),
    ("finetune", "optim.lr_scheduler.min_lr", "1e-6", "1e-6", 1e-6),
    ("finetune", "log.name", "mine", "mine", "mine"),
    ("finetune", "log.log_dir", "runs.of/mine", "runs.of/mine", "runs.of/mine"),
    ("finetune", "log.ckpt", "None", None, None),
    ("finetune", "log.ckpt.save_last", "False", False, False),
    ("finetune", "log.ckpt.save_top_k", "-1", -1, -1),
    ("finetune", "log.ckpt.every_n_train_steps", "25", 25, 25),
    ("pretrain", "log.ckpt.train_time_interval.minutes", "30", 30, 30),
    ("finetune", "log.ckpt.filename", "{step}", "{step}", "{step}"),
    ("finetune", "log.tensorboard", "None", None, None),
    (
        "finetune",
        "log.wandb",
        "WandbLogger(project='p')",
        {"_target_": "WandbLogger", "project": "p"},
        run.Config(llm.WandbLogger, project="p"),
    ),
    (
        "pretrain",
        "resume.restore_config",
        "RestoreConfig(path='hf://x/y')",
        {"_target_": "RestoreConfig", "path": "hf://x/y"},
        run.Config(llm.RestoreConfig, path="hf://x/y"),
    ),
    ("finetune", "resume.restore_config.path", "hf://x/y", "hf://x/y", "hf://x/y"),
    ("finetune", "resume.resume_if_exists", "False", False, False),
    ("finetune", "resume.resume_ignore_no_checkpoint", "False", False, False),
    ("finetune", "resume.resume_from_path", "a.b/c", "a.b/c", "a.b/c"),
    ("finetune", "peft.target_modules", "['linear_qkv']", ["linear_qkv"], ["linear_qkv"]),
    ("finetune", "peft.target_modules", "attention", "attention", "attention"),
    ("finetune", "peft.exclude_modules", "['linear_fc2']", ["linear_fc2"], ["linear_fc2"]),
    ("finetune", "peft.dim", "8", 8, 8),
    ("finetune", "peft.alpha", "64", 64, 64),
    ("finetune", "peft.dropout", "0.1", 0.1, 0.1),
    ("finetune", "peft.dropout_position", "post", "post", "post"),
    ("finetune", "peft.lora_dtype", "bf16", "bfloat16", torch.bfloat16),
]


def set_in_python(recipe: Any, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        recipe = getattr(recipe, parent)
    setattr(recipe, last, value)


def nested(path: str, value: Any) -> dict[str, Any]:
    head, _, rest = path.partition(".")
    return {head: nested(rest, value) if rest else value}


@pytest.mark.parametrize(("task", "path", "text", "in_yaml", "value"), PATHS, ids=lambda x: x if "." in str(x) else "")
def test_three_ways_give_the_same_recipe(
    tmp_path: Path, task: str, path: str, text: str, in_yaml: Any, value: Any
) -> None:
    by_python = loading.load("mixtral_8x7b", task)
    set_in_python(by_python, path, value)
    by_command_line = loading.load("mixtral_8x7b", task)
    overrides.apply(by_command_line, [f"{path}={text}"])
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"recipe": f"mixtral_8x7b.{task}", **nested(path, in_yaml)}))
    assert by_command_line == by_python
    assert read_recipe(file) == by_python


def test_completion_offers_what_has_an_effect() -> None:
    assert {path for _, path, *_ in PATHS} - {*override_paths.PATHS} == {
        "data.dataset_kwargs", "model.config.activation_func", "model.config.seq_length",
        "trainer.accumulate_grad_batches", "trainer.limit_test_batches", "trainer.strategy.ckpt_load_strictness",
        "trainer.strategy.ckpt_parallel_load", "trainer.strategy.gradient_as_bucket_view",
        "trainer.strategy.pipeline_dtype",
    }  # fmt: skip
    assert "optim.config.lr" in override_paths.PATHS
    assert "optim.config.muon_momentum" not in override_paths.PATHS


def changed(*texts: str, task: str = "pretrain", **arguments: Any) -> Any:
    recipe = loading.load("mixtral_8x7b", task, **arguments)
    overrides.apply(recipe, texts)
    return recipe


def test_operators_work_on_what_stands_there() -> None:
    recipe = changed("trainer.max_steps=20", "trainer.max_steps*=3", "optim.config.lr/=3", "data.seq_length-=96")
    assert recipe.trainer.max_steps == 60
    assert recipe.optim.config.lr == pytest.approx(1e-4)
    assert recipe.data.seq_length == 4000


def test_elements_of_lists_are_reached_by_index() -> None:
    recipe = changed("trainer.callbacks[2].gc_interval_train=7", performance_mode=True)
    assert recipe.trainer.callbacks[2].gc_interval_train == 7


def test_a_part_that_is_none_is_created() -> None:
    recipe = changed("resume.restore_config.path=hf://x/y", "log.wandb.project=p", "log.ckpt.train_time_interval=None",
                     "log.ckpt.train_time_interval.minutes=5", "data=SquadDataModule")  # fmt: skip
    assert recipe.resume.restore_config == run.Config(llm.RestoreConfig, path="hf://x/y")
    assert recipe.log.wandb.project == "p"
    assert recipe.log.ckpt.train_time_interval == run.Config(timedelta, minutes=5)


def test_a_class_is_named_by_nemos_path() -> None:
    recipe = changed("data=nemo.collections.llm.gpt.data.squad.SquadDataModule(seq_length=64)")
    assert (recipe.data.__fn_or_cls__, recipe.data.seq_length) == (llm.SquadDataModule, 64)


BATCH = {"seq_length": 3072, "micro_batch_size": 2, "global_batch_size": 96, "num_workers": 3, "seed": 7}
OTHER_DATA = ["SquadDataModule", "FineTuningDataModule", "ChatDataModule", "PreTrainingDataModule", "MockDataModule"]


def test_parts_that_are_no_settings_of_ours_are_named_by_class() -> None:
    recipe = changed("trainer.callbacks[0]=GarbageCollectionCallback(gc_interval_train=10)",
                     "log.ckpt.train_time_interval=timedelta(minutes=5)")  # fmt: skip
    assert recipe.trainer.callbacks == [run.Config(llm.GarbageCollectionCallback, gc_interval_train=10)]
    assert recipe.log.ckpt.train_time_interval == run.Config(timedelta, minutes=5)
    recipe = changed("peft.target_modules=[a, b]", "peft.target_modules[0]=linear_qkv", task="finetune")
    assert recipe.peft.target_modules == ["linear_qkv", "b"]


@pytest.mark.parametrize("name", OTHER_DATA)
@pytest.mark.parametrize("task", ["finetune", "pretrain"])
def test_a_data_module_named_by_class_keeps_the_recipes_batch(name: str, task: str) -> None:
    recipe = loading.load("mixtral_8x7b", task)
    overrides.apply(recipe, [*(f"data.{setting}={value}" for setting, value in BATCH.items()), f"data={name}"])
    assert recipe.data.__fn_or_cls__ is getattr(llm, name)
    assert {setting: getattr(recipe.data, setting) for setting in BATCH} == BATCH
    # also where the recipe had it from its module's defaults, and never over what is written
    recipe = run.Partial(recipe.__fn_or_cls__, data=run.Config(llm.MockDataModule))
    overrides.apply(recipe, [f"data={name}(seq_length=64)"])
    built = (recipe.data.seq_length, recipe.data.micro_batch_size, recipe.data.global_batch_size)
    assert built == (64, llm.MockDataModule.micro_batch_size, llm.MockDataModule.global_batch_size)


def test_packs_are_kept_by_modules_that_pack() -> None:
    recipe = loading.load("mixtral_8x7b", "finetune", packed_sequence=True)
    overrides.apply(recipe, ["data=ChatDataModule"])
    assert recipe.data.packed_sequence_specs.packed_sequence_size == recipe.data.seq_length
    overrides.apply(recipe, ["data=PreTrainingDataModule"])
    assert recipe.data.packed_sequence_specs is None


def test_settings_of_a_bare_part_start_from_its_defaults() -> None:
    recipe = changed("trainer=Trainer(max_steps=3)", "trainer.strategy.ddp.overlap_grad_reduce=True")
    assert recipe.trainer.strategy.ddp.overlap_grad_reduce is True


def test_a_registered_factory_is_named_as_in_nemo() -> None:
    assert changed("model=mixtral_8x22b").model == llm.mixtral_8x22b.model()
    assert changed("data=squad").data == run.Config(
        llm.SquadDataModule, seq_length=4096, global_batch_size=16, micro_batch_size=2
    )


@pytest.mark.parametrize(
    ("text", "made"),
    [("peft=lora", "LoRA"), ("peft=dora", "DoRA"), ("peft=qlora", "QLoRA"), ("data=mock", "MockDataModule"),
     ("data=squad", "SquadDataModule")],
)  # fmt: skip
def test_nemo_runs_command_line_names_parts_by_their_factories(text: str, made: str) -> None:
    from nemo_run.cli.cli_parser import parse_cli_args

    import mixtral_recipes.cli.nemo_run_entry  # noqa: F401

    recipe: Any = parse_cli_args(llm.finetune, [text], output_type=run.Partial)
    assert getattr(recipe, text.partition("=")[0]).__fn_or_cls__.__name__ == made


def test_nemo_run_finds_the_factories() -> None:
    import mixtral_recipes.cli.nemo_run_entry  # noqa: F401

    assert run.cli.resolve_factory(llm.MixtralModel, "mixtral_8x7b") is not None
    assert set(run.cli.list_entrypoints("llm")) == {"llm"}
    factories: list[Any] = run.cli.list_factories("mixtral_recipes.api.pretrain")
    names = [factory.wrapped.__module__ for factory in factories]
    assert "mixtral_recipes.recipes.mixtral_8x7b" in names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trainer.max_step=1", "trainer.max_step=1: Trainer has no setting 'max_step'. Did you mean 'max_steps'?"),
        ("traner.max_steps=1", "pretrain has no setting 'traner'. Did you mean 'trainer'?"),
        ("model.config.num_layrs=3", "MixtralConfig8x7B has no setting 'num_layrs'. Did you mean 'num_layers'?"),
        ("trainer.max_steps=many", "trainer.max_steps=many must be a whole number."),
        ("trainer.max_steps=1.5", "trainer.max_steps=1.5 must be a whole number."),
        (
            "trainer.val_check_interval=0.5",
            "must be a whole number; set the number of steps between validations (0 for none)",
        ),
        ("trainer.max_epochs+=1", "None += 1 cannot be computed."),
        ("log.wandb.config.x+=1", "None += 1 cannot be computed."),
        ("log.wandb.config.x.y=1", "x is not set, so it has no settings to change."),
        (f"trainer.callbacks[{'9' * 5000}].x=1", "is not a valid setting name."),
        ("trainer.max_epochs.x=1", "max_epochs is not set, so it has no settings to change."),
        ("trainer.strategy.sequence_parallel=maybe", "must be true or false."),
        ("model.config.recompute_granularity=ful", "must be null or one of full, selective."),
        ("trainer.callbacks[9].x=1", "the list has no element 9; it has 1, counted from 0."),
        ("trainer.max_steps.x=1", "1168251 has no settings."),
        ("max_steps", "'max_steps' is not a setting; use path=value"),
        ("trainer=TimingCallback", "must be a Trainer"),
        ("data=nemo.collections.llm.gpt.data.dolly.DollyDataModule", "use FineTuningDataModule or ChatDataModule"),
        ("data=os.system", "'os.system' is not one of the classes that a recipe may name."),
        ("trainer.callbacks=[os.system]", "'os.system' is not one of the classes that a recipe may name."),
        ("log.name=Config[os.system]", "name the class itself"),
        ("trainer.strategy.pipeline_dtype=int3", "must be null or a dtype."),
        ("trainer.callbacks=[TimingCallback(]", "is not a list of classes."),
        ("data=SquadDataModule(1)", "pass arguments by name"),
        ("data=SquadDataModule(seed=)", "data=SquadDataModule(seed=) is not a class with arguments"),
        ("data=SquadDataModule(dataset_root=/a)", "text in it is put in quotes"),
        ("data=squad(seed=1)", "squad has no argument 'seed'; write data=squad and data.seed=..., or name a class"),
        ("model=mixtral_8x7b(a=1)", "mixtral_8x7b has no argument 'a'; write model=mixtral_8x7b and model.a=..."),
        ("log.ckpt.train_time_interval=timedelta(minutes='a')", "minutes=a must be a number"),
        ("data=SquadDataModule(seed={[]: 1})", "data: seed={[]: 1} is not a plain value"),
        ("model.config.recompute_modules={[]: 1}", "model.config.recompute_modules={[]: 1} must be null or a list"),
        (f"trainer.callbacks=[{'-' * 20000}1]", "is not a list of classes."),
    ],
)
def test_errors_name_the_setting_and_the_closest(text: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        changed(text)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_adapter_settings_without_adapters_say_so() -> None:
    with pytest.raises(RecipeError, match="trains all weights"):
        changed("peft.dim=8", task="finetune", peft_scheme="none")


def test_completion_knows_every_setting() -> None:
    module = script("write_override_paths")
    assert module.TARGET.read_text() == module.text(), "run python scripts/write_override_paths.py"
