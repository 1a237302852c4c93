"""Recipe files: short and full forms, and hostile ones that must run nothing."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import mixtral_recipes as llm
from mixtral_recipes.errors import RecipeError
from mixtral_recipes.overrides import loading
from mixtral_recipes.overrides import paths as overrides
from mixtral_recipes.overrides.yaml_file import header, read_recipe, to_yaml, write_recipe
from mixtral_recipes.settings import classes
from mixtral_recipes.system.yaml_files import load_plain

MARK = "tests_hostile_yaml_ran"


def write(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def test_sizes_from_outside_lay_a_short_file_out(tmp_path: Path) -> None:
    file = write(tmp_path, "recipe: mixtral_tiny.finetune\nnum_gpus_per_node: 4\ntrainer: {num_nodes: 3, max_steps: 7}")
    expected = llm.mixtral_tiny.finetune_recipe(num_nodes=1, num_gpus_per_node=1)
    expected.trainer.max_steps = 7
    assert expected.trainer.strategy.expert_model_parallel_size == 1  # of two processes it would be 2
    assert read_recipe(file, num_nodes=1, num_gpus_per_node=1) == expected
    write_recipe(expected, file)
    assert read_recipe(file, num_gpus_per_node=2).trainer.devices == 2


def test_a_short_file_is_the_recipe_with_what_differs(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        recipe: mixtral_8x7b.finetune
        peft_scheme: dora
        num_nodes: 2
        trainer:
          max_steps: 7
          strategy: {context_parallel_size: 2}
        optim: {config: {lr: 1e-5}}
        data: {packed_sequence_specs: {packed_sequence_size: 64}, dataset_kwargs: {a: [1, 2]}}
        log: {wandb: {project: mine}}
        """,
    )
    expected = llm.mixtral_8x7b.finetune_recipe(peft_scheme="dora", num_nodes=2)
    overrides.apply(
        expected,
        [
            "trainer.max_steps=7",
            "trainer.strategy.context_parallel_size=2",
            "optim.config.lr=1e-5",
            "data.packed_sequence_specs.packed_sequence_size=64",
            "data.dataset_kwargs={'a': [1, 2]}",
            "log.wandb.project=mine",
        ],
    )
    assert read_recipe(file) == expected
    assert header(file) == ("mixtral_8x7b", "finetune")


def test_a_part_with_a_class_is_made_anew(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "recipe: mixtral_8x7b.pretrain\ndata: {_target_: SquadDataModule, seq_length: 64}\n"
        "trainer: {callbacks: [{_target_: TimingCallback}]}\n",
    )
    recipe = read_recipe(file)
    assert recipe.data.__fn_or_cls__ is llm.SquadDataModule
    assert recipe.data.seq_length == 64
    replaced = loading.load("mixtral_8x7b", "pretrain").data
    for kept in ("micro_batch_size", "global_batch_size"):
        assert getattr(recipe.data, kept) == getattr(replaced, kept)
    assert len(recipe.trainer.callbacks) == 1


def test_a_full_file_says_where_it_came_from(tmp_path: Path) -> None:
    file = tmp_path / "full.yaml"
    recipe = loading.load("mixtral_tiny", "finetune", packed_sequence=True)
    overrides.apply(recipe, ["model.config.activation_func=gelu", "model.config.attention_backend=fused"])
    write_recipe(recipe, file, name="mixtral_tiny")
    assert header(file) == ("mixtral_tiny", "finetune")
    assert read_recipe(file) == recipe
    assert [path.name for path in tmp_path.iterdir()] == ["full.yaml"]


def test_a_file_that_nemo_run_wrote_is_read(tmp_path: Path) -> None:
    from nemo_run.core.serialization.yaml import YamlSerializer

    recipe = loading.load("mixtral_8x7b", "pretrain")
    file = write(tmp_path, YamlSerializer().serialize(recipe))
    assert "_call_: false" in file.read_text()  # how nemo_run writes pipeline_dtype
    assert read_recipe(file) == recipe


def test_what_no_file_can_name_is_refused_when_written() -> None:
    import nemo_run as run

    recipe = loading.load("mixtral_tiny", "pretrain")
    recipe.data = run.Config(Path, "x")
    with pytest.raises(RecipeError, match="not one of the classes"):
        to_yaml(recipe)


def test_files_that_name_classes_by_their_former_modules_are_read(tmp_path: Path) -> None:
    file = tmp_path / "before.yaml"
    write_recipe(loading.load("mixtral_8x7b", "finetune", packed_sequence=True), file, name="mixtral_8x7b")
    now = file.read_text()
    before = now.replace("_target_: mixtral_recipes.finetune", "_target_: mixtral_recipes.api.finetune")
    for module, names in classes.FORMER.items():
        for name in names.split():
            target = f"_target_: mixtral_recipes.{name}\n"
            before = before.replace(target, target.replace(name, f"{module}.{name}"))
    assert before.count("mixtral_recipes.training.") == 11  # trainer, strategy, precision, logs, ...
    file.write_text(before)
    assert to_yaml(read_recipe(file), name="mixtral_8x7b") == now


FULL = "_target_: mixtral_recipes.api.pretrain\n_partial_: true\n"
SHORT = "recipe: mixtral_tiny.pretrain\n"
BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(12))
RUN = f"import os; os.environ['{MARK}'] = '1'"

# name -> (file, what the refusal names)
HOSTILE: dict[str, tuple[str, str]] = {
    "os.system": (f"{SHORT}data: {{_target_: os.system, command: 'export {MARK}=1'}}", "os.system"),
    "subprocess": (f"{SHORT}data: {{_target_: subprocess.run, args: [touch, {MARK}]}}", "subprocess.run"),
    "builtins.eval": (f'{SHORT}data: {{_target_: builtins.eval, source: "{RUN}"}}', "builtins.eval"),
    "builtins.exec at the top": (f'_target_: builtins.exec\nsource: "{RUN}"', "builtins.exec"),
    "a class at the top": ("_target_: mixtral_recipes.settings.trainer.Trainer\nmax_steps: 1", "Trainer"),
    "a task inside": (f"{SHORT}data: {{_target_: mixtral_recipes.api.pretrain}}", "mixtral_recipes.api.pretrain"),
    "python/object": (f"{SHORT}data: !!python/object:os.system {{}}", "!!python/object:os.system"),
    "python/object/apply": (
        f"{SHORT}data: !!python/object/apply:os.system ['export {MARK}=1']",
        "!!python/object/apply:os.system",
    ),
    "python/object/new": (f"{SHORT}data: !!python/object/new:os.system [x]", "!!python/object/new:os.system"),
    "python/module": (f"{SHORT}data: !!python/module:antigravity ''", "!!python/module:antigravity"),
    "python/name": (f"{SHORT}data: !!python/name:os.system ''", "!!python/name:os.system"),
    "a tag of the file's own": (f"{SHORT}data: !run {{}}", "!run"),
    "binary": (f"{SHORT}data: !!binary aGk=", "!!binary"),
    "torch.load": (f"{SHORT}data: {{_target_: torch.load, f: evil.pt}}", "torch.load"),
    "torch.hub.load": (f"{SHORT}model: {{_target_: torch.hub.load, repo_or_dir: x, model: y}}", "torch.hub.load"),
    "torch's cpp_extension": (f"{SHORT}data: {{_target_: torch.utils.cpp_extension.load, name: x}}", "cpp_extension"),
    "a function kept uncalled": (
        f"{SHORT}model: {{config: {{activation_func: {{_target_: os.system, _call_: false}}}}}}",
        "os.system",
    ),
    "a function as text": (f"{SHORT}model: {{config: {{activation_func: os.system}}}}", "activation_func=os.system"),
    "a module of torch as a dtype": (
        f"{SHORT}trainer: {{strategy: {{pipeline_dtype: torch.os}}}}",
        "trainer.strategy.pipeline_dtype=torch.os",
    ),
    "through an attribute": (
        f"{SHORT}data: {{_target_: mixtral_recipes.checkpoints.checkpointer.shutil.rmtree, path: x}}",
        "shutil.rmtree",
    ),
    "through a class's attribute": (
        f"{SHORT}data: {{_target_: mixtral_recipes.settings.trainer.Trainer.__init__}}",
        "Trainer.__init__",
    ),
    "a module beside the table": (f"{SHORT}data: {{_target_: mixtral_recipes.api.os.system}}", "os.system"),
    "our prefix": (
        f"{SHORT}data: {{_target_: mixtral_recipes.data.modules.squad.Path, x: 1}}",
        "mixtral_recipes.data.modules.squad.Path",
    ),
    "megatron's prefix": (
        f"{SHORT}data: {{_target_: megatron.core.utils.is_te_min_version, version: x}}",
        "megatron.core.utils.is_te_min_version",
    ),
    "a target that is a mapping": (f"{SHORT}data: {{_target_: {{_target_: os.system}}}}", "os.system"),
    "a target that is a list": (f"{SHORT}data: {{_target_: [os, system]}}", "['os', 'system']"),
    "inside plain data": (f"{SHORT}log: {{wandb: {{config: {{x: [{{_target_: os.system}}]}}}}}}", "os.system"),
    "inside callbacks": (f"{SHORT}trainer: {{callbacks: [{{_target_: os._exit, status: 3}}]}}", "os._exit"),
    "Config[...] as text": (
        f"{SHORT}trainer: {{max_steps: 'Config[os.system]'}}",
        "trainer.max_steps=Config[os.system]",
    ),
    "a factory's spelling": (f"{SHORT}data: os.getcwd", "data"),
    "a comprehension": (
        f"{SHORT}trainer: {{max_steps: \"[__import__('os')._exit(3) for x in 'a']\"}}",
        "trainer.max_steps",
    ),
    "a ternary": (f"{SHORT}trainer: {{max_steps: \"1 if __import__('os')._exit(3) else 2\"}}", "trainer.max_steps"),
    "a lambda": (f"{SHORT}trainer: {{max_steps: 'lambda: 1'}}", "trainer.max_steps"),
    "code that Megatron would import": (
        f"{SHORT}model: {{config: {{fp8: e4m3, fp8_recipe: custom, fp8_quantizer_factory: os.system}}}}",
        "model.config.fp8_quantizer_factory",
    ),
    "a private setting": (f"{SHORT}model: {{config: {{_cpu_offloading_context: x}}}}", "_cpu_offloading_context"),
    "a dunder": (f"{SHORT}model: {{__class__: x}}", "__class__"),
    "a dotted key": (f"{SHORT}trainer.max_steps: 3", "trainer.max_steps"),
    "huge aliases": (BOMB, "*a0"),
    "an alias of itself": ("recipe: &a [*a]", "*a"),
    "a merge": (f"{SHORT}trainer: {{<<: {{max_steps: 1}}}}", "<<"),
    "a key given twice": (f"{SHORT}trainer: {{max_steps: 1, max_steps: 2}}", "max_steps"),
    "a number for a key": (f"{SHORT}trainer: {{1: 2}}", "1"),
    "nested very deep": (f"{SHORT}data: {'[' * 5000}{']' * 5000}", "nested deeper"),
    "very large": (f"{SHORT}# {'x' * 1_000_001}", "too large"),
    "not text": ("\x00\x01", "recipe.yaml"),
    "a number of a million digits": (f"{SHORT}trainer: {{max_steps: {'9' * 100_000}}}", "recipe.yaml"),
    "not a YAML mapping": ("- 1", "not a YAML mapping"),
    "an unknown recipe": ("recipe: os.system", "recipe 'os'"),
    "a recipe as a path": ("recipe: ../../etc/passwd.finetune", "recipe"),
    "an argument that is code": (f"{SHORT}fn: os.system", "fn"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_runs_nothing_and_is_refused_by_name(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, named = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, text)
    loading.load("mixtral_tiny", "pretrain")  # what reading a good file imports is imported already
    modules = set(sys.modules)
    with monkeypatch.context() as patch:
        for command in ("system", "_exit", "getcwd", "popen"):
            patch.setattr(os, command, _must_not_run)
        with pytest.raises(RecipeError) as caught:
            read_recipe(file)
    message = str(caught.value)
    assert named in message
    assert re.match(rf"{re.escape(str(file))}\b", message)
    assert "\n" not in message
    assert MARK not in os.environ
    assert not {new for new in set(sys.modules) - modules if not new.startswith(("mixtral_recipes", "megatron"))}
    assert list(tmp_path.iterdir()) == [file]


def _must_not_run(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a recipe file ran something")


def test_at_least_thirty_files_are_hostile() -> None:
    assert len(HOSTILE) >= 30


def test_dates_stay_text_and_errors_name_the_line(tmp_path: Path) -> None:
    assert load_plain(write(tmp_path, "a: 2024-01-01\nb: 14:00:00\nc: 1:30.5"), RecipeError) == {
        "a": "2024-01-01",
        "b": "14:00:00",
        "c": "1:30.5",
    }
    with pytest.raises(RecipeError, match=r"recipe\.yaml:2: "):
        load_plain(write(tmp_path, "a: 1\nb: [1"), RecipeError)


NEMOS_PLACES = {
    "finetune": "nemo.collections.llm.api",
    "pretrain": "nemo.collections.llm.api",
    "MixtralModel": "nemo.collections.llm.gpt.model.mixtral",
    "MixtralConfig8x7B": "nemo.collections.llm.gpt.model.mixtral",
    "Trainer": "nemo.lightning.pytorch.trainer",
    "MegatronStrategy": "nemo.lightning.pytorch.strategies.megatron_strategy",
    "MegatronMixedPrecision": "nemo.lightning.pytorch.plugins.mixed_precision",
    "TimingCallback": "nemo.utils.exp_manager",
    "MockDataModule": "nemo.collections.llm.gpt.data.mock",
    "SquadDataModule": "nemo.collections.llm.gpt.data.squad",
    "PackedSequenceSpecs": "nemo.collections.llm.gpt.data.packed_sequence",
    "NeMoLogger": "nemo.lightning.nemo_logger",
    "TensorBoardLogger": "lightning.pytorch.loggers.tensorboard",
    "ModelCheckpoint": "nemo.lightning.pytorch.callbacks.model_checkpoint",
    "MegatronOptimizerModule": "nemo.lightning.pytorch.optim.megatron",
    "CosineAnnealingScheduler": "nemo.lightning.pytorch.optim.lr_scheduler",
    "AutoResume": "nemo.lightning.resume",
    "RestoreConfig": "nemo.lightning.resume",
    "LoRA": "nemo.collections.llm.peft.lora",
}


@pytest.mark.parametrize(
    "recipe",
    [llm.mixtral_8x7b.finetune_recipe(packed_sequence=True), llm.mixtral_8x7b.pretrain_recipe()],
    ids=["finetune", "pretrain"],
)
def test_a_file_that_was_written_with_nemo(tmp_path: Path, recipe: Any) -> None:
    ours = to_yaml(recipe)
    nemos = re.sub(r"mixtral_recipes\.(\w+)", lambda match: f"{NEMOS_PLACES[match[1]]}.{match[1]}", ours)
    assert "mixtral_recipes" not in nemos
    assert read_recipe(write(tmp_path, nemos)) == read_recipe(write(tmp_path, ours))


def test_what_a_file_of_nemos_names_that_is_not_here(tmp_path: Path) -> None:
    ours = to_yaml(llm.mixtral_8x7b.pretrain_recipe())
    timing, callbacks = "mixtral_recipes.TimingCallback", "nemo.lightning.pytorch.callbacks"
    ignored = write(tmp_path, ours.replace(timing, f"{callbacks}.flops_callback.FLOPsMeasurementCallback"))
    read = read_recipe(ignored)
    assert read.trainer.callbacks[0].__fn_or_cls__.__name__ == "FLOPsMeasurementCallback"
    assert "FLOPs" not in to_yaml(read)
    refused = write(tmp_path, ours.replace(timing, f"{callbacks}.model_callback.ModelCallback"))
    with pytest.raises(
        RecipeError,
        match=r"trainer.callbacks\[0\]: ModelCallback is not available in mixtral-recipes: write a callback",
    ):
        read_recipe(refused)
    for other in ("nemo.collections.llm.gpt.model.llama.TimingCallback", "nemo.utils.exp_manager.os", "nemo.os.system"):
        with pytest.raises(RecipeError, match="is not one of the classes"):
            read_recipe(write(tmp_path, ours.replace(timing, other)))
