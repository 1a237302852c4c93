"""No setting without effect: every field is read, refused or warned about."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest
import torch

import mixtral_recipes as llm
from mixtral_recipes.errors import MixtralRecipesWarning, RecipeError
from mixtral_recipes.executors.preflight import preflight
from mixtral_recipes.overrides.loading import load
from mixtral_recipes.overrides.paths import set_value
from mixtral_recipes.settings import classes
from mixtral_recipes.settings.check import check_settings
from mixtral_recipes.settings.nemo.arguments import rules_of
from mixtral_recipes.settings.trainer import Trainer
from tests.unit.settings.field_reads import own_fields, reads, sources, unread

FOUND = reads(path.read_text() for path in sources())
SETTINGS_CLASSES = [getattr(llm, name) for name in classes.OURS]


def notices(recipe: Any) -> list[str]:
    return check_settings(fdl.get_callable(recipe), fdl.ordered_arguments(recipe))


@pytest.mark.parametrize("cls", SETTINGS_CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_is_read_refused_or_warned_about(cls: Any) -> None:
    assert unread(cls, FOUND, own_fields(cls), rules_of(cls)) == [], "nothing reads it, and no rule says so"


@pytest.mark.parametrize("cls", SETTINGS_CLASSES, ids=lambda cls: cls.__name__)
def test_a_field_that_nothing_reads_is_named(cls: Any) -> None:
    @dataclass
    class Longer(cls):
        colour_of_the_bicycle_shed: str = "green"

    assert unread(Longer, FOUND, own_fields(Longer), rules_of(Longer)) == ["colour_of_the_bicycle_shed"]


def test_a_name_that_is_read_from_something_else_does_not_count() -> None:
    @dataclass
    class Longer(Trainer):
        num_layers: int = 4  # read from shapes and configs all over the place

    assert unread(Longer, FOUND, own_fields(Longer), rules_of(Longer)) == ["num_layers"]


def test_reading_a_field_by_a_computed_name_counts() -> None:
    found = reads(['def f(trainer):\n    return {name: getattr(trainer, name) for name in ("colour", "size")}'])
    assert unread(Trainer, found, ["colour", "size", "weight"], ()) == ["weight"]


# Setting, task, value, what is told.
TOLD = [
    ("trainer.limit_test_batches", "pretrain", 7, "trainer.limit_test_batches=7 has no effect: there is no test loop."),
    ("trainer.use_distributed_sampler", "finetune", True, "trainer.use_distributed_sampler=True has no effect"),
    ("trainer.strategy.gradient_as_bucket_view", "pretrain", False, "always keeps gradients in its buckets"),
    ("trainer.strategy.ckpt_load_strictness", "pretrain", "raise_all", "without all of the model's tensors is refused"),
    (
        "trainer.strategy.ddp.average_in_collective",
        "pretrain",
        True,
        "divided by the number of label tokens in the global batch",
    ),
    ("optim.config.min_lr", "pretrain", 1e-6, "set optim.lr_scheduler.min_lr"),
    ("optim.config.fp16", "pretrain", True, "set in trainer.plugins"),
    ("model.config.tensor_model_parallel_size", "pretrain", 2, "set in trainer.strategy"),
    ("model.config.seq_length", "pretrain", 1024, "data.seq_length sets the sequence length"),
    ("data.delete_raw", "finetune", False, "data.delete_raw=False has no effect: downloads stay in the Hub's cache."),
    ("data.dataset_kwargs", "finetune", {"add_bos": True}, "NeMo's dataset class"),
]


@pytest.mark.parametrize(("path", "task", "value", "told"), TOLD, ids=[case[0] for case in TOLD])
def test_who_changes_a_setting_without_effect_is_told(path: str, task: str, value: Any, told: str) -> None:
    recipe = load("mixtral_8x7b", task)
    assert notices(recipe) == []
    holder, _, name = path.rpartition(".")
    part = recipe
    for step in holder.split("."):
        part = getattr(part, step)
    setattr(part, name, value)
    (notice,) = notices(recipe)
    assert notice.startswith(path)
    assert told in notice
    with pytest.warns(UserWarning, match=path):
        preflight(recipe)


@pytest.mark.parametrize("task", [llm.train, llm.validate])
@pytest.mark.parametrize("of", ["pretrain", "finetune"])
def test_nemos_own_values_are_not_told_whatever_they_are_given_to(task: Any, of: str) -> None:
    parts = dict(fdl.ordered_arguments(load("mixtral_8x7b", of)))
    parts.pop("peft", None)
    assert check_settings(task, parts) == []


def test_packs_are_made_whatever_nemos_files_are_called() -> None:
    recipe = load("mixtral_8x7b", "finetune", packed_sequence=True)
    recipe.data.packed_sequence_specs.packed_train_data_path = "/data/packs.npy"
    recipe.data.packed_sequence_specs.tokenizer_model_name = "mixtral"
    assert [notice.partition("=")[0] for notice in notices(recipe)] == [
        "data.packed_sequence_specs.tokenizer_model_name",
        "data.packed_sequence_specs.packed_train_data_path",
    ]


def test_unknown_keys_of_nemos_dataset_arguments_are_told_with_the_closest() -> None:
    recipe = load("mixtral_8x7b", "finetune")
    recipe.data = run.Config(llm.FineTuningDataModule, dataset_kwargs={"promt_template": "x", "add_bos": False})
    (notice,) = notices(recipe)
    assert notice.startswith("data.dataset_kwargs: promt_template has no effect. Did you mean 'prompt_template'?")


def test_what_has_one_value_is_refused_with_the_reason() -> None:
    recipe = load("mixtral_8x7b", "finetune")
    recipe.trainer.accumulate_grad_batches = 4
    recipe.resume.restore_config.load_model_state = False
    with pytest.raises(
        RecipeError,
        match=r"trainer.accumulate_grad_batches=4 is not supported .only 1 is.: gradient accumulation follows from",
    ):
        preflight(recipe)
    with pytest.raises(RecipeError, match=r"resume.restore_config.load_model_state=False is not supported"):
        preflight(recipe)


def test_nemos_arguments_are_judged_when_they_are_set_on_objects() -> None:
    recipe = load("mixtral_tiny", "pretrain")
    parts: dict[Any, Any] = {name: fdl.build(part) for name, part in fdl.ordered_arguments(recipe).items()}
    assert check_settings(llm.pretrain, parts) == []
    parts["trainer"].num_sanity_val_steps = 2
    (told,) = check_settings(llm.pretrain, parts)
    assert told.startswith("trainer.num_sanity_val_steps=2 has no effect")
    parts["model"].config.fp16_lm_cross_entropy = True
    with pytest.raises(
        RecipeError, match=r"model\.config\.fp16_lm_cross_entropy=True is not supported \(only False is\)"
    ):
        check_settings(llm.pretrain, parts)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"optim.config.exp_avg_dtype": torch.bfloat16},
            r"requires optim\.config\.use_precision_aware_optimizer=True\.",
        ),
        (
            {"optim.config.use_precision_aware_optimizer": True, "optim.config.use_distributed_optimizer": False},
            r"use_precision_aware_optimizer=True requires optim\.config\.use_distributed_optimizer=True\.",
        ),
        ({"trainer.strategy.ddp.reuse_grad_buf_for_mxfp8_param_ag": True}, r"ddp\.fp8_param_gather=True\."),
        (
            {"trainer.strategy.ddp.num_buckets": 2},
            r"num_buckets=2 is not supported \(only None is\): .* set bucket_size\.",
        ),
        ({"optim.config.lr": None}, r"optim\.config\.lr=None: set a learning rate\."),
    ],
)
def test_what_megatron_would_refuse_is_told_by_its_path(settings: dict[str, Any], told: str) -> None:
    recipe = load("mixtral_tiny", "finetune")
    for path, value in settings.items():
        set_value(recipe, path, value)
    with pytest.raises(RecipeError, match=told):
        preflight(recipe)


# A setting, the other without which it has no effect, and a value of that with which it has.
IDLE = [
    ("trainer.plugins.fp8_recipe", "blockwise", "trainer.plugins.fp8", "hybrid"),
    ("trainer.plugins.num_layers_at_end_in_bf16", 2, "trainer.plugins.first_last_layers_bf16", True),
    ("trainer.plugins.loss_scale", 8.0, "trainer.plugins.precision", "16-mixed"),
    ("model.config.recompute_method", "block", "model.config.recompute_granularity", "full"),
    ("model.config.recompute_modules", ["moe"], "model.config.recompute_granularity", "selective"),
    ("model.config.moe_token_drop_policy", "position", "model.config.moe_expert_capacity_factor", 1.5),
    ("optim.config.decoupled_min_lr", 0.1, "optim.config.decoupled_lr", 1e-3),
    ("peft.dropout_position", "post", "peft.dropout", 0.1),
]


@pytest.mark.parametrize(("path", "value", "other", "switch"), IDLE)
def test_a_setting_that_waits_for_another_is_told(path: str, value: Any, other: str, switch: Any) -> None:
    recipe = load("mixtral_tiny", "finetune", peft_scheme="lora")
    set_value(recipe, path, value)
    (told,) = notices(recipe)
    assert told.startswith(f"{path}={value!r} has no effect without {other}")
    built: Any = fdl.build(recipe)
    assert check_settings(llm.finetune, built.keywords) == [told]
    set_value(recipe, other, switch)
    assert not [notice for notice in notices(recipe) if notice.startswith(path)]


def test_what_was_switched_off_takes_along_what_belongs_to_it_in_silence() -> None:
    recipe = load("mixtral_8x7b", "pretrain", precision="fp8")
    for path in ("trainer.plugins.fp8", "model.config.recompute_granularity"):
        set_value(recipe, path, None)
    set_value(recipe, "trainer.plugins.fp8_recipe", "blockwise")
    set_value(recipe, "model.config.recompute_method", "uniform")
    assert notices(recipe) == []


# Setting, value, what is told.
WRONG = [
    (
        "trainer.limit_val_batches",
        1.0,
        "must be null or a whole number; use null for the whole set, as with Lightning's 1.0",
    ),
    ("optim.config.lr", "1e-5", "optim.config.lr='1e-5' must be null or a number."),
    ("log.log_dir", Path("x"), r"log.log_dir=PosixPath('x') must be null or text; use str(path)."),
    ("trainer.devices", "auto", "trainer.devices='auto' must be a whole number; set the number of processes per node."),
    ("trainer.max_steps", True, "trainer.max_steps=True must be a whole number."),
    ("trainer.strategy.pipeline_dtype", "bf16", "must be null or a dtype"),
    ("trainer.callbacks", "TimingCallback", "must be null or a list"),
    ("data", None, "data=None must be a DataModule or a LightningData."),
    ("data.seq_length", 2048.0, "data.seq_length=2048.0 must be a whole number."),
    ("model.config.num_layers", "32", "model.config.num_layers='32' must be a whole number."),
    ("trainer", None, "trainer=None must be a Trainer."),
    ("log.ckpt.train_time_interval", 15, "must be null or a timedelta"),
    ("peft", "lora", "peft='lora' must be null or a LoRA."),
]


def changed(recipe: Any, path: str, value: Any) -> Any:
    holder, _, name = path.rpartition(".")
    part = recipe
    for step in holder.split(".") if holder else ():
        part = part[step] if isinstance(part, dict) else getattr(part, step)
    if isinstance(part, dict):
        part[name] = value
    else:
        setattr(part, name, value)
    return recipe


@pytest.mark.parametrize(("path", "value", "told"), WRONG, ids=[case[0] for case in WRONG])
def test_a_value_of_another_type_set_from_python_is_refused_by_name(path: str, value: Any, told: str) -> None:
    with pytest.raises(RecipeError, match=path) as refused:
        preflight(changed(load("mixtral_tiny", "finetune"), path, value))
    assert told in str(refused.value)


@pytest.mark.parametrize(("path", "value", "told"), WRONG, ids=[case[0] for case in WRONG])
def test_objects_are_held_to_the_same_types(path: str, value: Any, told: str) -> None:
    recipe = load("mixtral_tiny", "finetune")
    parts = {name: fdl.build(part) for name, part in fdl.ordered_arguments(recipe).items()}
    assert check_settings(llm.finetune, parts) == []
    with pytest.raises(RecipeError, match=path) as refused:
        check_settings(llm.finetune, changed(parts, path, value))
    assert told in str(refused.value)


def test_finetune_called_with_objects_refuses_before_anything_is_built() -> None:
    with pytest.raises(
        RecipeError,
        match=r"data=None must be a DataModule or a LightningData. recipe.trainer.devices='auto' must be a whole",
    ):
        llm.finetune(
            model=llm.MixtralModel(config=llm.MixtralConfigTiny()),
            data=None,  # pyright: ignore[reportArgumentType]
            trainer=llm.Trainer(devices="auto"),  # pyright: ignore[reportArgumentType]
            resume=llm.AutoResume(restore_config=llm.RestoreConfig(path="embedded://mixtral_tiny")),
        )


@pytest.mark.filterwarnings("ignore:full scope")  # Megatron's own
def test_a_warning_names_the_line_that_called() -> None:
    recipe = load("mixtral_tiny", "finetune")
    recipe.model.config.bf16 = True
    recipe.trainer.strategy.tensor_model_parallel_size = 3
    with (
        pytest.warns(MixtralRecipesWarning, match=r"bf16=True has no effect") as told,
        pytest.raises(RecipeError, match="tensor_model_parallel_size=3"),
    ):
        llm.finetune(**fdl.ordered_arguments(recipe))
    assert {Path(each.filename) for each in told if each.category is MixtralRecipesWarning} == {Path(__file__)}


def test_a_part_that_is_not_given_is_named() -> None:
    recipe = load("mixtral_tiny", "finetune")
    del recipe.data
    with pytest.raises(RecipeError, match="data is not set; it must be a DataModule"):
        preflight(recipe)


def test_every_wrong_setting_is_told_at_once() -> None:
    recipe = changed(changed(load("mixtral_tiny", "finetune"), "trainer.devices", "auto"), "optim.config.lr", "1e-5")
    with pytest.raises(RecipeError, match=r"trainer.devices='auto'.*optim.config.lr='1e-5'"):
        preflight(recipe)
