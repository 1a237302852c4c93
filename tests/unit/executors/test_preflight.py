"""What preflight refuses besides layouts (those: tests/unit/test_topology.py)."""

import functools
import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest
import torch

import mixtral_recipes as llm
from mixtral_recipes.checkpoints.format.manifest import write_manifest
from mixtral_recipes.data.modules.chat import ChatDataModule
from mixtral_recipes.embedded import resolve
from mixtral_recipes.errors import (
    CheckpointError,
    DataError,
    EnvironmentProblem,
    MixtralRecipesWarning,
    RecipeError,
    asked_by_command,
)
from mixtral_recipes.executors import nemo_run_jobs
from mixtral_recipes.executors.preflight import preflight
from mixtral_recipes.overrides import loading, paths
from mixtral_recipes.settings.peft import recorded
from mixtral_recipes.system.files import write_json


def test_a_precision_no_machine_has() -> None:
    recipe = loading.load("mixtral_8x7b", "pretrain", precision="fp8")
    recipe.trainer.plugins.precision = "16-mixed"
    with pytest.raises(RecipeError, match=r"trainer\.plugins\.fp8='hybrid' does not work with precision='16-mixed'"):
        preflight(recipe)


def test_fine_tuning_needs_a_checkpoint_in_a_dry_run_too() -> None:
    recipe = llm.mixtral_tiny.finetune_recipe(num_gpus_per_node=1)
    recipe.resume = None
    with pytest.raises(RecipeError, match=r"resume\.restore_config\.path is not set"):
        preflight(recipe)


def test_a_name_that_no_checkpoint_can_get() -> None:
    recipe = llm.mixtral_tiny.finetune_recipe(num_gpus_per_node=1)
    recipe.log.ckpt.filename = "{step}-{epoch}"
    with pytest.raises(RecipeError, match=r"log.ckpt.filename='{step}-{epoch}' cannot be filled in; use {model_name}"):
        preflight(recipe)


def test_recomputing_what_only_grouped_products_can() -> None:
    """On GPUs `models/acceleration.py` groups the experts; a recipe need not."""
    recipe = loading.load("mixtral_8x7b", "finetune")
    recipe.model.config.recompute_granularity = "selective"
    recipe.model.config.recompute_modules = ["moe_act"]
    preflight(recipe)
    recipe.model.config.accelerate = False
    with pytest.raises(RecipeError, match="moe_act"):
        preflight(recipe)


def test_overlap_settings_the_layout_cannot_run() -> None:
    recipe = loading.load("mixtral_8x7b", "pretrain")
    recipe.trainer.callbacks.append(run.Config(llm.MegatronCommOverlapCallback, overlap_p2p_comm=False))
    preflight(recipe)
    recipe.trainer.strategy.pipeline_model_parallel_size = 2
    with pytest.raises(RecipeError, match="overlap_p2p_comm=False"):
        preflight(recipe)


@pytest.mark.parametrize(
    ("part", "setting"),
    [
        (
            run.Config(llm.MLFlowLogger, tracking_uri="https://me:s3cr3t@mlflow.example.org"),
            r"log\.mlflow\.tracking_uri",
        ),
        (run.Config(llm.WandbLogger, config={"seed": 1, "apiKey": "s3cr3t"}), r"log\.wandb\.config\.apiKey"),
        (run.Config(llm.WandbLogger, config={"see": "ftp://me:s3cr3t@host"}), r"log\.wandb\.config\.see"),
    ],
)
def test_a_secret_that_would_be_recorded(part: run.Config, setting: str) -> None:
    recipe = loading.load("mixtral_tiny", "finetune")
    setattr(recipe.log, "mlflow" if "mlflow" in setting else "wandb", part)
    with pytest.raises(RecipeError, match=setting) as refused:
        preflight(recipe)
    assert "s3cr3t" not in str(refused.value)
    recipe.data = run.Config(llm.ChatDataModule, dataset_root="https://me:s3cr3t@host/data.jsonl")
    with pytest.raises(RecipeError, match=r"data\.dataset_root: the address https://\.\.\.@ carries a password"):
        preflight(recipe)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The embedded model with 1,024 positions, and two more tokens in its tokenizer than its embeddings have."""
    folder = shutil.copytree(resolve("embedded://mixtral_tiny"), tmp_path / "model")
    tokenizer, config = folder / "tokenizer.json", folder / "config.json"
    content = json.loads(tokenizer.read_text())
    last = content["added_tokens"][-1]
    content["added_tokens"] += [{**last, "id": 1999 + n, "content": text} for n, text in enumerate(("<|a|>", "<|b|>"))]
    tokenizer.write_text(json.dumps(content))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 1024}))
    return folder


def starting_from(model: Path | str, *overrides: str, peft: str = "none") -> run.Partial:
    recipe = loading.load("mixtral_tiny", "finetune", num_gpus_per_node=1, peft_scheme=peft)
    paths.apply(recipe, [f"resume.restore_config.path={model}", *overrides])
    return recipe


def test_adapters_are_trained_on_with_their_own_scheme(tmp_path: Path) -> None:
    (tmp_path / "context").mkdir()
    write_json(tmp_path / "context" / "run.json", {"peft": recorded(llm.LoRA(dim=6))})
    write_manifest(tmp_path, kind="adapter")
    with pytest.raises(RecipeError, match=r"was trained with peft\.dim=6, but this run has peft\.dim=8"):
        preflight(starting_from(tmp_path, "peft.dim=8", peft="lora"))


OWN = "model.tokenizer=embedded://mixtral_tiny"
GROW = "resume.restore_config.resize_vocab=True"


def test_a_tokenizer_larger_than_the_embeddings(model: Path) -> None:
    with pytest.raises(RecipeError, match=r"model has 2001 tokens, but the model .* only 1999: .* pass --resize-vocab"):
        preflight(starting_from(model))
    preflight(starting_from(model, GROW))
    preflight(starting_from(model, OWN))
    preflight(starting_from(model, GROW, "model.config.vocab_size=2048"))
    with pytest.raises(RecipeError, match=r"set model\.config\.vocab_size=2001 or more"):
        preflight(starting_from(model, GROW, "model.config.vocab_size=2000"))


@pytest.mark.parametrize("where", ["tokenizer", "model.tokenizer"])
def test_a_tokenizer_that_is_not_there(where: str, tmp_path: Path) -> None:
    recipe = starting_from("embedded://mixtral_tiny", f"{where}={tmp_path / 'none'}")
    with pytest.raises(DataError, match="none: neither a folder or file that exists nor a Hub id"):
        preflight(recipe)
    with pytest.warns(MixtralRecipesWarning, match="It must be available where the job runs"):
        preflight(recipe, elsewhere=True)
    preflight(starting_from("embedded://mixtral_tiny", f"{where}=mistralai/Mixtral-8x7B-v0.1"))


def test_adapters_do_not_learn_new_rows(model: Path) -> None:
    with pytest.raises(RecipeError, match="adds 2 tokens"):
        preflight(starting_from(model, GROW, peft="lora"))
    preflight(starting_from(model, GROW, OWN, peft="lora"))


def test_a_chat_template_whose_markers_are_new_tokens(tmp_path: Path) -> None:
    chat = tmp_path / "chat.jsonl"
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    chat.write_text((json.dumps({"messages": talk}) + "\n") * 4)
    data = run.Config(ChatDataModule, dataset_root=str(chat), chat_template="chatml", seq_length=64)

    def on_chat(*overrides: str, peft: str = "none") -> run.Partial:
        recipe = starting_from(Path(resolve("embedded://mixtral_tiny")), *overrides, peft=peft)
        recipe.data = data
        return recipe

    preflight(on_chat(peft="lora"))  # they are text
    preflight(on_chat(GROW, "model.config.vocab_size=2001"))
    with pytest.raises(RecipeError, match=r"set model\.config\.vocab_size=2001 or more"):
        preflight(on_chat(GROW, "model.config.vocab_size=2000"))
    with pytest.raises(RecipeError, match="adds 2 tokens"):
        preflight(on_chat(GROW, peft="lora"))


def test_a_new_models_tokenizer(model: Path) -> None:
    recipe = loading.load("mixtral_tiny", "pretrain")
    preflight(recipe)
    recipe.model.tokenizer = str(model)
    with pytest.raises(RecipeError, match=r"has 2001 tokens, but model\.config\.vocab_size=1999"):
        preflight(recipe)
    recipe.model.config.vocab_size = 2001
    preflight(recipe)


def test_positions_are_the_checkpoints_where_the_recipe_gives_none(model: Path) -> None:
    preflight(starting_from(model, OWN, "data.seq_length=1024"))
    with pytest.raises(RecipeError, match="seq_length=1025 exceeds max_position_embeddings=1024"):
        preflight(starting_from(model, OWN, "data.seq_length=1025"))
    with pytest.raises(RecipeError, match="seq_length=1024 exceeds max_position_embeddings=512"):
        preflight(starting_from(model, OWN, "data.seq_length=1024", "model.config.max_position_embeddings=512"))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.config.num_layers=3", r"model\.config\.num_layers=3, but the checkpoint .*model has 4"),
        (
            "model.config.moe_router_pre_softmax=True",
            r"pre_softmax=True is not supported .only False is.: the model would no longer",
        ),
        ("model.config.qk_layernorm=True", r"qk_layernorm=True is not supported"),
        ("model.config.window_size=(128, 0)", r"window_size=\(128, 0\) is not supported .only None is."),
        ("model.config.recompute_granularity=full", r"^Megatron-Core refuses model\.config: .*recompute"),
        ("model.config.moe_pad_expert_input_to_capacity=True", r"^Megatron-Core refuses model\.config: .*capacity"),
        ("model.config.cuda_graph_modules=['attnn']", r"^Megatron-Core refuses model\.config: 'attnn' is not known$"),
    ],
)
def test_another_model_than_the_checkpoints_or_one_that_megatron_refuses(override: str, told: str, model: Path) -> None:
    with pytest.raises(RecipeError, match=told) as refused:
        preflight(starting_from(model, OWN, override))
    assert "\n" not in str(refused.value)


def test_another_activation_given_from_python(model: Path) -> None:
    recipe = starting_from(model, OWN)
    recipe.model.config.activation_func = torch.nn.functional.silu
    preflight(recipe)
    recipe.model.config.activation_func = torch.nn.functional.gelu
    with pytest.raises(RecipeError, match=r"activation_func=.*gelu.* is not supported .only 'silu' is."):
        preflight(recipe)


def test_one_expert_per_token_is_taken_from_the_checkpoint(model: Path) -> None:
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_experts_per_tok": 1}))
    preflight(starting_from(model, OWN))


def test_a_model_that_is_not_here_is_left_to_the_run() -> None:
    preflight(starting_from("hf://nobody/nothing"))
    preflight(starting_from("/no/such/folder", "data.seq_length=512"), elsewhere=True)


def test_a_start_that_cannot_be_taken_starts_no_job(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for start, message in (
        ("/no/such/folder", "/no/such/folder does not exist"),
        (tmp_path / "m.gguf", r"m\.gguf is a GGUF model .* pass the model it was made from"),
    ):
        with pytest.raises(CheckpointError, match=message):
            preflight(starting_from(start))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_whose_package_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = loading.load("mixtral_tiny", "finetune")
    setattr(recipe.log, name, run.Config(llm.WandbLogger if name == "wandb" else llm.MLFlowLogger))
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EnvironmentProblem, match=rf"log\.{name} is set, but {name} is not installed"):
        preflight(recipe)
    with pytest.warns(
        MixtralRecipesWarning, match=rf"{name} is not installed.*It must be available where the job runs"
    ):
        preflight(recipe, elsewhere=True)


@pytest.mark.parametrize(
    ("task", "data", "told"),
    [
        (
            "finetune",
            run.Config(llm.SquadDataModule, dataset_root="no/train.json"),
            "no/train.json: no such",
        ),
        ("finetune", run.Config(llm.ChatDataModule, dataset_root="./chats"), "./chats: no such file or folder"),
        ("finetune", run.Config(llm.FineTuningDataModule), "data.dataset_root is not set"),
        ("pretrain", run.Config(llm.PreTrainingDataModule, paths=["30", "a", "70", "b"]), r"a\.bin: no such file"),
        ("pretrain", run.Config(llm.PreTrainingDataModule, paths={"train": ["c.jsonl"]}), "c.jsonl.*: no such file"),
        ("pretrain", run.Config(llm.PreTrainingDataModule), "data.paths is not set"),
    ],
)
def test_data_that_is_not_there(task: str, data: run.Config, told: str) -> None:
    recipe = loading.load("mixtral_tiny", task)
    data.seq_length, data.global_batch_size, data.micro_batch_size = 256, 32, 16
    recipe.data = data
    with pytest.raises(DataError, match=told):
        preflight(recipe)
    with pytest.warns(MixtralRecipesWarning, match="It must be available where the job runs"):
        preflight(recipe, elsewhere=True)


def test_an_experiment_refuses_a_broken_recipe_in_a_scripts_words() -> None:
    recipe = loading.load("mixtral_8x7b", "pretrain")
    recipe.trainer.strategy.expert_model_parallel_size = 3
    with (
        pytest.raises(RecipeError, match=r"To repair: recipe\.trainer\.strategy\.expert_model_parallel_size="),
        run.Experiment("broken", executor=run.LocalExecutor()) as experiment,
    ):
        experiment.add(recipe, name="job")


def test_a_call_gives_a_scripts_advice_and_a_command_its_own() -> None:
    parts = {
        name: fdl.build(part) for name, part in fdl.ordered_arguments(loading.load("mixtral_tiny", "finetune")).items()
    }
    parts["resume"] = None
    with pytest.raises(RecipeError, match=r"^recipe\.resume\.restore_config\.path is not set: .*\(recipe\.resume\."):
        llm.finetune(**parts)
    with asked_by_command(), pytest.raises(RecipeError, match=r"^resume\..*\(--restore-from\)"):
        llm.finetune(**parts)


def test_what_a_recipe_leaves_out_has_its_default() -> None:
    """As in NeMo's notebooks: `run.Partial` of configs that name little."""
    strategy = run.Config(llm.MegatronStrategy, tensor_model_parallel_size=1)
    recipe = run.Partial(
        llm.pretrain,
        model=run.Config(llm.MixtralModel, config=run.Config(llm.MixtralConfigTiny)),
        data=run.Config(llm.MockDataModule, seq_length=32),
        trainer=run.Config(llm.Trainer, strategy=strategy),
    )
    preflight(recipe, None)


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="asks what is said without it")
def test_an_optimizer_that_only_the_job_can_make_is_a_warning() -> None:
    recipe = llm.mixtral_tiny.pretrain_recipe()
    recipe.optim.config.use_precision_aware_optimizer = True
    told = "optim.config.use_precision_aware_optimizer=True needs Transformer Engine, which is not installed: pip"
    with pytest.raises(EnvironmentProblem, match=told):
        preflight(recipe, None)
    with pytest.warns(MixtralRecipesWarning, match=f"{told}.* It must be available where the job runs"):
        preflight(recipe, None, elsewhere=True)


def test_a_recipe_written_by_hand_is_checked_and_a_conversion_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(nemo_run_jobs, "preflight", lambda recipe, *a, **k: seen.append(recipe))
    checked = functools.partial(nemo_run_jobs._checked, lambda self, task, *args, **kwargs: task)
    parts = {"model": run.Config(llm.MixtralModel), "trainer": run.Config(llm.Trainer)}
    trained = (llm.pretrain, llm.finetune, llm.train)
    tasks = [run.Partial(task, data=run.Config(llm.MockDataModule), **parts) for task in trained]
    tasks += [run.Partial(llm.generate, "checkpoint", trainer=parts["trainer"], prompts=["a"]), "a word"]
    for task in tasks:
        assert checked(types.SimpleNamespace(jobs=[]), task, run.LocalExecutor()) == task
    assert [recipe.__fn_or_cls__ for recipe in seen] == list(trained)
