"""NeMo AutoModel's YAML files: what becomes of every key."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixtral_recipes.cli import main
from mixtral_recipes.errors import MixtralRecipesWarning, RecipeError
from mixtral_recipes.executors.preflight import preflight
from mixtral_recipes.overrides.automodel.keys import KEYS, row_of
from mixtral_recipes.overrides.automodel.reader import AutoModelFile
from mixtral_recipes.overrides.inspection import flat
from mixtral_recipes.overrides.yaml_file import header, read_recipe
from mixtral_recipes.settings.nemo.rules import Ignored, Only, Renamed
from tests.scripts import script

ROOT = Path(__file__).parents[3]


def file_of(**sections: Any) -> dict[str, Any]:
    """A file in AutoModel's schema, with sections changed key by key; None leaves one out."""
    data: dict[str, Any] = {
        "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
        "step_scheduler": {"global_batch_size": 96, "local_batch_size": 2, "max_steps": 77, "ckpt_every_steps": 11},
        "dist_env": {"backend": "nccl", "timeout_minutes": 3},
        "rng": {"_target_": "nemo_automodel.components.training.rng.StatefulRNG", "seed": 5, "ranked": True},
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
            "pretrained_model_name_or_path": "mistralai/Mixtral-8x7B-v0.1",
            "torch_dtype": "bf16",
        },
        "checkpoint": {"enabled": True, "checkpoint_dir": "kept/", "model_save_format": "safetensors"},
        "distributed": {"strategy": "fsdp2", "dp_size": "none", "tp_size": 1, "cp_size": 1},
        "loss_fn": {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"},
        "dataset": {"_target_": "x.squad.make_squad_dataset", "dataset_name": "rajpurkar/squad", "split": "train"},
        "packed_sequence": {"packed_sequence_size": 0},
        "dataloader": {"_target_": "torchdata.stateful_dataloader.StatefulDataLoader", "shuffle": False},
        "validation_dataset": {"_target_": "x.squad.make_squad_dataset", "split": "validation"},
        "optimizer": {"_target_": "torch.optim.Adam", "betas": [0.8, 0.9], "eps": "1e-7", "lr": "2.0e-5"},
        "lr_scheduler": {"lr_decay_style": "cosine", "min_lr": "1.0e-6"},
    }
    for name, changes in sections.items():
        if changes is None or not isinstance(changes, dict):
            data.pop(name, None) if changes is None else data.update({name: changes})
        else:
            data[name] = {k: v for k, v in (data.get(name, {}) | changes).items() if v != "left out"}
    return data


ADAPTERS = {"_target_": "nemo_automodel.components._peft.lora.PeftConfig", "match_all_linear": True, "dim": 4}


def settings(data: dict[str, Any], **sizes: Any) -> dict[str, Any]:
    recipe = AutoModelFile(data).recipe(**sizes)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        preflight(recipe, elsewhere=True)  # the files named here are nobody's
    others = [str(one.message) for one in told if "must be available where the job runs" not in str(one.message)]
    for text in others:
        warnings.warn(text, MixtralRecipesWarning, stacklevel=2)
    return flat(recipe, defaults=True)


def test_full_fine_tuning_in_a_pipeline_with_packs() -> None:
    pipeline = {"pp_schedule": "interleaved1f1b", "pp_microbatch_size": 4, "scale_grads_in_schedule": False}
    data = file_of(
        distributed={"pp_size": 8, "pipeline": pipeline},
        packed_sequence={"packed_sequence_size": 1024},
        step_scheduler={"val_every_steps": 9},
    )
    found = settings(data, num_nodes=4, num_gpus_per_node=8)
    assert {path: found[path] for path in EXPECTED} == EXPECTED
    assert found["peft"] is None


EXPECTED = {
    "model": "MixtralModel",
    "resume.restore_config.path": "hf://mistralai/Mixtral-8x7B-v0.1",
    "trainer.num_nodes": 4,
    "trainer.max_steps": 77,
    "trainer.val_check_interval": 9,
    "trainer.seed": 5,
    "trainer.strategy.tensor_model_parallel_size": 1,
    "trainer.strategy.pipeline_model_parallel_size": 8,
    "trainer.strategy.virtual_pipeline_model_parallel_size": 2,
    "trainer.strategy.expert_model_parallel_size": 4,
    "trainer.strategy.sequence_parallel": False,
    "data": "SquadDataModule",
    "data.dataset_root": None,
    "data.seq_length": 1024,
    "data.packed_sequence_specs.packed_sequence_size": 1024,
    "data.global_batch_size": 96,
    "data.micro_batch_size": 1,
    "data.seed": 5,
    "optim.config.lr": 2e-5,
    "optim.config.adam_beta1": 0.8,
    "optim.config.adam_beta2": 0.9,
    "optim.config.adam_eps": 1e-7,
    "optim.config.weight_decay": 0.0,
    "optim.config.clip_grad": 1.0,
    "optim.lr_scheduler": "CosineAnnealingScheduler",
    "optim.lr_scheduler.min_lr": 1e-6,
    "optim.lr_scheduler.warmup_steps": 7,
    "log.log_dir": "kept/",
    "log.ckpt.every_n_train_steps": 11,
}


def test_adapters_under_tensor_parallelism() -> None:
    model = {"pretrained_model_name_or_path": "mistralai/Mixtral-8x7B-Instruct-v0.1"}
    given = AutoModelFile(file_of(peft=ADAPTERS, distributed={"tp_size": 4}, model=model, lr_scheduler=None))
    found = flat(given.recipe(), defaults=True)
    assert found["peft"] == "LoRA"
    assert (found["peft.dim"], found["peft.alpha"], found["peft.dropout_position"]) == (4, 32, "post")
    assert sorted(found["peft.target_modules"]) == ["linear_fc1", "linear_fc2", "linear_proj", "linear_qkv"]
    assert found["resume.restore_config.path"].endswith("Instruct-v0.1")
    assert (found["trainer.strategy.sequence_parallel"], found["data.micro_batch_size"]) == (True, 2)
    assert (found["trainer.num_nodes"], found["trainer.strategy.expert_model_parallel_size"]) == (1, 8)
    assert found["optim.lr_scheduler"] == "WarmupPolicyScheduler", "without a schedule the rate is constant"
    notes = " ".join(given.notes)
    for told in (
        "Sequence parallelism is on",
        "since the file does not set them; --num-nodes",
        "Not needed: dist_env.*: NCCL",
    ):
        assert told in notes


@pytest.mark.parametrize(
    ("patterns", "layers"),
    [
        ("*_proj", ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]),
        (["*.self_attn.q_proj", "v_proj"], ["linear_qkv"]),
        (["w1", "w2"], ["linear_fc1", "linear_fc2"]),
    ],
)
def test_layers_are_named_as_hugging_face_does(patterns: Any, layers: list[str]) -> None:
    changes = ADAPTERS | {"match_all_linear": False, "target_modules": patterns}
    assert settings(file_of(peft=changes))["peft.target_modules"] == layers


def test_what_does_not_fit_goes_in_smaller_pieces() -> None:
    given = AutoModelFile(file_of(peft=ADAPTERS, step_scheduler={"local_batch_size": 4, "global_batch_size": 64}))
    recipe = given.recipe()
    preflight(recipe)
    assert recipe.data.micro_batch_size < 4
    assert recipe.data.global_batch_size == 64
    assert any("instead of 4, so that they fit in memory" in note for note in given.notes)


OTHER_DATA: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pairs": (
        {
            "_target_": "x.ColumnMappedTextInstructionDataset",
            "path_or_dataset_id": "org/pairs",
            "name": "small",
            "column_mapping": {"context": "about", "question": "ask", "answer": "say"},
            "answer_only_loss_mask": False,
        },
        {
            "data": "FineTuningDataModule",
            "data.dataset_root": "org/pairs:small",
            "data.columns": {"context": "about", "question": "ask", "output": "say"},
            "data.prompt_template": "{context} {question} {output}",
            "data.dataset_kwargs": {"answer_only_loss": False},
        },
    ),
    "chat": (
        {"_target_": "x.ChatDataset", "path_or_dataset_id": "talk.jsonl", "chat_template": "{{ messages }}"},
        {"data": "ChatDataModule", "data.dataset_root": "talk.jsonl", "data.chat_template": "{{ messages }}"},
    ),
    "mock": (
        {"_target_": "x.MockIterableDataset", "vocab_size": 100, "seq_len": 512, "num_samples": 1000},
        {"data": "MockDataModule", "data.vocab_size": 100, "data.seq_length": 512, "data.num_train_samples": 1000},
    ),
    "squad": (
        {"_target_": "x.make_squad_dataset", "path_or_dataset": "my/squad", "seq_length": 256},
        {"data": "SquadDataModule", "data.dataset_root": "my/squad", "data.seq_length": 256},
    ),
}


@pytest.mark.parametrize("name", OTHER_DATA)
def test_data_sets(name: str) -> None:
    dataset, expected = OTHER_DATA[name]
    found = settings(file_of(dataset=None) | {"dataset": dataset, "peft": ADAPTERS, "validation_dataset": "none"})
    assert {path: found[path] for path in expected} == expected
    assert found["trainer.val_check_interval"] == 0
    assert found["data.global_batch_size"] == 96


EVERYTHING: dict[str, Any] = {
    "seed": 4,
    "rng": None,
    "step_scheduler": {"val_every_steps": 5, "log_remote_every_steps": 2, "gc_every_steps": 3},
    "model": {"revision": "main", "router_aux_loss_coef": 0.02},
    "checkpoint": {"is_async": True, "max_recent_checkpoints": 2, "restore_from": "kept/x"},
    "distributed": {"dp_size": 8, "ep_size": 4, "activation_checkpointing": True, "sequence_parallel": False},
    "clip_grad_norm": {"max_norm": 0.5},
    "lr_scheduler": {"lr_warmup_steps": 3, "lr_decay_steps": 70, "lr_decay_style": "linear"},
    "optimizer": {"weight_decay": 0.1, "_target_": "torch.optim.AdamW"},
    "dataloader": {"num_workers": 1},
    "wandb": {"project": "p", "name": "n", "entity": "e", "enable": True},
    "mlflow": {"experiment_name": "p", "run_name": "n", "tracking_uri": "u", "enable": True},
    "peft": {
        "_target_": "PeftConfig", "dim": 2, "alpha": 3, "dropout": 0.1, "dropout_position": "pre", "use_dora": True,
        "lora_A_init": "uniform", "lora_dtype": "float32", "target_modules": ["*_proj"], "exclude_modules": ["*o_proj"],
    },
    "fp8": {"enabled": True},
}  # fmt: skip


def test_every_key_that_counts_as_used_is_used() -> None:
    variants = [
        file_of(**EVERYTHING),
        file_of(
            distributed={"pp_size": 8, "pipeline": {"pp_schedule": "interleaved1f1b", "layers_per_stage": 2}},
            fp8={"enabled": False}, validation_dataset="none",
        ),
        file_of(distributed={"pp_size": 2, "pipeline": {"pp_microbatch_size": 2}}, peft=ADAPTERS),
        *(file_of(dataset=None) | {"dataset": dataset, "peft": ADAPTERS} for dataset, _ in OTHER_DATA.values()),
    ]  # fmt: skip
    taken: set[str] = set()
    for data in variants:
        given = AutoModelFile(data)
        given.recipe()
        used = {key for key in given.values.given if isinstance(KEYS[row_of(key) or key], Renamed)}
        assert used - given.values.taken - {"seed"} == set(), "counts as used, and was not looked at"
        taken |= {row_of(key) or "" for key in given.values.given}
    assert {key for key, rule in KEYS.items() if isinstance(rule, Renamed)} - taken == set()
    found = flat(AutoModelFile(variants[0]).recipe(), defaults=True)
    assert (found["trainer.seed"], found["peft"], found["trainer.devices"]) == (4, "DoRA", 8)
    assert (found["optim.config.decoupled_weight_decay"], found["optim.lr_scheduler.max_steps"]) == (True, 70)
    assert (found["trainer.plugins.fp8"], found["model.config.recompute_granularity"]) == ("hybrid", "full")
    assert (found["log.wandb.project"], found["log.mlflow.run_name"]) == ("p", "n")
    assert found["peft.target_modules"]
    assert found["peft.exclude_modules"] == ["linear_proj"]


def test_every_other_key_is_named_or_refused() -> None:
    for key, rule in KEYS.items():
        leaf = key.removesuffix("*") + "thing" * key.endswith("*")
        nested: Any = "other"
        for part in reversed(leaf.split(".")):
            nested = {part: nested}
        ((section, value),) = nested.items()
        data = file_of() | ({section: value} if not isinstance(value, dict) else {})
        if isinstance(value, dict):
            data = file_of(**{section: value}) if isinstance(file_of().get(section, {}), dict) else data | nested
        if isinstance(rule, Ignored):
            assert any(key in note and rule.why in note for note in AutoModelFile(data).notes), key
        elif isinstance(rule, Only):
            with pytest.raises(RecipeError, match="is not supported: "):
                AutoModelFile(data)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"optimizer": {"learning_rate": 1}}, "optimizer.learning_rate is not a known key."),
    "close": ({"step_scheduler": {"max_step": 5}}, "Did you mean 'step_scheduler.max_steps'?"),
    "two": ({"a": {"b": 1}, "qat": {"enabled": True}}, "a.b is not a known key"),
    "another model": (
        {"model": {"pretrained_model_name_or_path": "mistralai/Mistral-7B-v0.1"}},
        "is not a Mixtral with a recipe",
    ),
    "from nothing": ({"model": {"_target_": "x.from_config"}}, "is not supported, only from_pretrained"),
    "no steps": ({"step_scheduler": {"max_steps": "none", "num_epochs": 2}}, "step_scheduler.max_steps is not set"),
    "a variable": ({"checkpoint": {"checkpoint_dir": "${HOME}/x"}}, "variables are not expanded"),
    "another loss": ({"loss_fn": {"_target_": "x.Hinge"}}, "the loss is always cross-entropy"),
    "another optimizer": ({"optimizer": {"_target_": "os.system"}}, "optimizer._target_=system is not supported"),
    "another data set": ({"dataset": {"_target_": "x.HellaSwag"}}, "dataset._target_=HellaSwag is not supported"),
    "no data set": ({"dataset": {"_target_": None}}, "dataset._target_ is not set; use one of make_squad_dataset"),
    "a part": ({"dataset": {"split": "train[:100]"}}, "dataset.split='train[:100]' is not supported"),
    "a schedule": ({"lr_scheduler": {"lr_decay_style": "WSD"}}, "use cosine, linear, constant"),
    "a number for a loss": ({"loss_fn": {"_target_": 5}}, "loss_fn._target_=5 is not supported"),
    "a number for a data set": ({"dataset": {"_target_": 5}}, "dataset._target_=5 is not supported"),
    "a list for a schedule": ({"lr_scheduler": {"lr_decay_style": ["cosine"]}}, "use cosine, linear, constant"),
    "a number for layers": (
        {"peft": ADAPTERS | {"match_all_linear": False, "target_modules": 5}},
        "peft.target_modules=5 is not allowed; use a list of layer names",
    ),
    "a pipeline": ({"distributed": {"pp_size": 2, "pipeline": {"pp_schedule": "ZBVZeroBubble"}}}, "use 1f1b or"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_is_refused_by_name(name: str, tmp_path: Path) -> None:
    changes, says = REFUSED[name]
    file = tmp_path / "theirs.yaml"
    file.write_text(yaml.safe_dump(file_of(**changes)))
    with pytest.raises(RecipeError) as caught:
        read_recipe(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert says in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_one_runs_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    tiny = {"pretrained_model_name_or_path": "embedded://mixtral_tiny", "torch_dtype": "float32"}
    data = file_of(model=tiny, peft=ADAPTERS, dataset={"dataset_name": "embedded://squad"})
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(data))
    assert header(tmp_path / "theirs.yaml") == ("mixtral_tiny", "finetune")
    assert read_recipe(tmp_path / "theirs.yaml").resume.restore_config.path == "embedded://mixtral_tiny"
    line = ["run", "theirs.yaml", "--dry-run", "--json", "--nproc-per-node", "1", "trainer.max_steps=3"]
    assert main.run(line) == 0
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["recipe"] == "mixtral_tiny"
    assert "1 process(es), TP1 PP1 CP1 EP1 ETP1 DP1, 3 steps" in err
    assert "Not needed: rng._target_" in err
    assert "nemo_automodel" not in sys.modules


def test_the_page_is_made_from_the_table() -> None:
    module = script("write_automodel_keys")
    text = module.PAGE.read_text()
    assert module.page(text) == text, "run python scripts/write_automodel_keys.py"
